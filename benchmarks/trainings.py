"""Training steps of ours: without Lightning around them, and as a sweep runs them."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies import cell_of_steps
from varscale.data.loading import StepBatches
from varscale.data.tokens.store import TokenStore
from varscale.numerics.device import deterministic
from varscale.store.layout import RunFiles, read_json
from varscale.training import runs as model_run
from varscale.training.cells import Precision, Trunk
from varscale.training.module import TokenModelModule
from varscale.training.runs import Inputs

NEVER = 10**9


class BareTraining:
    """The module's own step (loss, backward, its clipping, its optimizer), called in a plain loop."""

    def __init__(self, module: TokenModelModule, precision: Precision) -> None:
        """Take a module that logs never, since there is no trainer to log to."""
        self.module, self.precision = module, precision
        self.optimizer = module.configure_optimizers()

    def step(self, batch: dict[str, Tensor]) -> float:
        """One step; the loss before it."""
        module = self.module
        batch = {name: tensor.to(module.device) for name, tensor in batch.items()}
        with deterministic():  # as in runs
            with torch.autocast(module.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
                loss = module.training_step(batch, 0)
            loss.backward()
        module.configure_gradient_clipping(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        module.steps += 1
        return loss.item()


def bare_training(trunk: Trunk, inputs: Inputs) -> BareTraining:
    """The training that a sweep would run for this size, in these numerics."""
    runtime = trunk.experiment.runtime.model_copy(update={"log_every_steps": NEVER})
    silent = replace(trunk, experiment=trunk.experiment.model_copy(update={"runtime": runtime}))
    module = model_run._module(silent, inputs)
    if torch.cuda.is_available():
        module.cuda()
    return BareTraining(module, inputs.numerics.precision)


def batches(trunk: Trunk, inputs: Inputs) -> "itertools.cycle[dict[str, Tensor]]":
    """A few batches of stored tokens, again and again."""
    store = TokenStore.open(inputs.tokens.train)
    steps = StepBatches(store, seed=0, batch_size=trunk.batch_size, start_step=0, num_steps=8)
    return itertools.cycle(list(steps))


_numbers = itertools.count()


def sweep_run(trunk: Trunk, inputs: Inputs, steps: int, folder: Path) -> dict[str, Any]:
    """A whole cell as a worker of a sweep runs it: Lightning, logging, checkpoints, token store, result file.

    Returns:
        Its row of the runs table, with `images_per_second`, `utilisation` and `data_wait_share`.
    """
    cell = cell_of_steps(trunk.experiment, trunk.depth, steps)
    files = RunFiles(folder / f"cell-{next(_numbers)}")
    model_run.train_cell(cell, None, files, inputs, lambda done, total: None)
    result = read_json(files.result)
    assert result is not None
    row: dict[str, Any] = result["row"]
    return row
