"""Slurm as an executor: the graph of jobs becomes Slurm's own arrays and dependencies, submitted by submitit."""
