"""What the process imports whose forks are workers; it does nothing else."""

import gc

import varscale.training.runs  # noqa: F401

gc.freeze()  # no garbage to look for among a million objects: not in training, nor for seconds when the process ends
