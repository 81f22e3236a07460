"""Training steps of ours: without Lightning around them, and as a sweep runs them."""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.studies import cell_of_steps
from varscale.data.loading import StepBatches
from varscale.data.tokens.store import TokenStore
from varscale.numerics.device import best_device, deterministic
from varscale.store.layout import Store
from varscale.store.records import read_result
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.tokenizer.storage import load_tokenizer
from varscale.training.cells import Trunk
from varscale.training.module import ModelModule
from varscale.training.runs import Inputs, train_cell


class BareTraining:
    """The module's model, loss and optimizer in a plain loop: loss, backward, clipping and AdamW, part by part."""

    def __init__(self, module: ModelModule, tokenizer: MultiScaleTokenizer, precision: str) -> None:
        self.module, self.tokenizer, self.precision = module, tokenizer, precision
        self.optimizer = module.configure_optimizers()

    def step(self, batch: dict[str, Tensor]) -> float:
        """One step; the loss before it."""
        module, total, images = self.module, 0.0, len(batch["labels_B"])
        size = module.images_at_once or images
        batch = {name: tensor.to(module.device) for name, tensor in batch.items()}
        with deterministic():  # as in runs
            for begin in range(0, images, size):
                part = {name: tensor[begin : begin + size] for name, tensor in batch.items()}
                with torch.autocast(module.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
                    loss_BL = module.family.losses(module.model, self.tokenizer, part, module.seed).loss_BL
                loss = loss_BL.mean() * (len(loss_BL) / images)
                loss.backward()
                total += loss.item()
            nn.utils.clip_grad_norm_(module.model.parameters(), module.optim.grad_clip, foreach=True)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return total


def bare_training(trunk: Trunk, inputs: Inputs) -> BareTraining:
    """The training that a sweep would run for this size."""
    torch.set_num_threads(inputs.execution.threads)
    tokenizer = load_tokenizer(inputs.tokenizer.weights, inputs.tokenizer.fingerprint)
    optim, images = trunk.experiment.optim, trunk.images_at_once(inputs.execution.memory_bytes)
    module = ModelModule(
        trunk.model, optim, tokenizer, seed=trunk.seed, compiled=inputs.execution.compiled, images_at_once=images
    )
    return BareTraining(module.to(best_device()), tokenizer, optim.precision)


def batches(trunk: Trunk, inputs: Inputs) -> "itertools.cycle[dict[str, Tensor]]":
    """A few batches of stored tokens, again and again."""
    store = TokenStore.open(inputs.tokens.train)
    steps = StepBatches(store, seed=0, batch_size=trunk.batch_size, start_step=0, num_steps=8)
    return itertools.cycle(list(steps))


_numbers = itertools.count()


def sweep_run(trunk: Trunk, inputs: Inputs, steps: int, folder: Path) -> dict[str, Any]:
    """A whole cell as a worker of a sweep runs it: Lightning, logging, checkpoints, token store, result file.

    Returns:
        Its row of the runs table, with `images_per_second` and `data_wait_share`.
    """
    cell = cell_of_steps(trunk.experiment, trunk.depth, steps)
    files = Store(folder / f"cell-{next(_numbers)}").run(cell.key(inputs.tokens.fingerprint))
    train_cell(cell, None, files, inputs, lambda done, total: None)
    result = read_result(files)
    assert result is not None
    return dict(result.row)
