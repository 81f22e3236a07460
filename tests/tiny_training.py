"""A tokenizer, token stores and an experiment so small that a training of many steps takes a second.

Letters: B batch, L tokens of an image.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_experiment import SMALL
from small_models import make_tokenizer
from torch.nn import functional as F

from varscale.config import Experiment
from varscale.config.tokenizer import TokenizerArchitecture, TokenizerTraining
from varscale.config.yaml import validate
from varscale.data.sources.rings.source import RingsSource
from varscale.data.tokens.store import TokenStore, unigram_entropy
from varscale.data.tokens.writer import encode_store
from varscale.families.storage import load_model
from varscale.store.curves import CurvePoint, read_curve
from varscale.store.layout import RunFiles, RunKey, Store
from varscale.store.records import TokensSummary
from varscale.tokenizer.storage import save_tokenizer
from varscale.training.callbacks import Checkpoints, ProgressCallback
from varscale.training.cells import Cell, Trunk
from varscale.training.runs import Inputs, train_cell

PATCH_NUMS = (1, 2, 4)
VOCAB_SIZE = 16
TOKENS = 21
BATCH = 8

TOKENIZER: dict[str, Any] = {
    "patch_nums": PATCH_NUMS,
    "vocab_size": VOCAB_SIZE,
    "latent_channels": 4,
    "base_channels": 4,
    "channel_multipliers": (1, 2),
    "residual_blocks": 1,
    "attention": False,
    "norm_groups": 2,
}


def sections(training: dict[str, Any], **changes: Any) -> tuple[TokenizerArchitecture, TokenizerTraining]:
    """The architecture of `TOKENIZER` and a training, both with the changes that are theirs."""
    named = TokenizerArchitecture.model_fields
    architecture = TOKENIZER | {name: value for name, value in changes.items() if name in named}
    training = {"quantize_after": 0.0} | training  # the few steps of a test are all to have tokens
    training |= {name: value for name, value in changes.items() if name not in named}
    return TokenizerArchitecture(**architecture), TokenizerTraining(**training)


def little_experiment(**sections: dict[str, Any]) -> Experiment:
    """8 × 8 rings, 21 tokens, batches of 8; `sections` changes fields of whole sections."""
    settings: dict[str, Any] = {
        **SMALL,
        "data": {"kind": "rings", "image_size": 8, "num_classes": 3, "validation_images": 40},
        "tokenizer": TOKENIZER,
        "model": {"width_per_depth": 8, "head_dim": 8, "drop_path_at_depth_24": 0.9, "adaln_gamma_init": 0.1},
        "optim": {"lr": 5e-3, "lr_batch_size": BATCH, "batch_size": BATCH, "warmup_fraction": 0.25},
        "grid": {"depths": [2], "budgets": [1e12]},
        "evaluation": {"samples_per_class": 0},
        "runtime": {"log_every_steps": 5, "checkpoint_seconds": 1000.0},
    }
    return validate({name: {**part, **sections.get(name, {})} if isinstance(part, dict) else part
                     for name, part in settings.items()}, "a test")  # fmt: skip


def cell_of_steps(experiment: Experiment, steps: int, smallest: int | None = None, depth: int = 2) -> Cell:
    """The cell of exactly `steps` steps; its trunk's warm-up belongs to `smallest` steps."""
    flops = Trunk(experiment, depth, 0, 1.0).flops_per_image * experiment.optim.batch_size
    return Trunk(experiment, depth, 0, float((smallest or steps) * flops)).cell(float(steps * flops))


def encode(images_B3HW: torch.Tensor, patch_nums: Sequence[int] = PATCH_NUMS) -> list[torch.Tensor]:
    """Brightness of each cell of each scale's grid: tokens with structure that no training has to find."""
    grey_B1HW = (images_B3HW.mean(1, keepdim=True) + 1) / 2
    levels = (VOCAB_SIZE - 1) * grey_B1HW.clamp(0, 0.999) ** 0.5
    return [F.adaptive_avg_pool2d(levels, side).round().long().flatten(1) for side in patch_nums]


def make_inputs(folder: Path, train_images: int = 400, patch_nums: tuple[int, ...] = PATCH_NUMS) -> Inputs:
    """An untrained tokenizer's file and the token stores of a study."""
    inputs = inputs_in(folder)
    tokenizer = make_tokenizer(patch_nums, VOCAB_SIZE)
    save_tokenizer(inputs.tokenizer.weights, tokenizer, inputs.tokenizer.fingerprint)
    stores: dict[str, TokenStore] = {}
    for split, images in (("train", train_images), ("validation", 40)):
        stores[split] = encode_store(
            inputs.tokens.folder / split,
            RingsSource(images, 8, "train" if split == "train" else "validation"),
            partial(encode, patch_nums=patch_nums),
            patch_nums=patch_nums,
            vocab_size=VOCAB_SIZE,
            tokenizer_fingerprint=inputs.tokenizer.fingerprint,
            shard_images=512,
            batch_size=64,
            workers=0,
        )
    entropy = unigram_entropy(stores["train"])
    TokensSummary(images=train_images, unigram_entropy=entropy).write(inputs.tokens.summary)
    return inputs


def inputs_in(folder: Path) -> Inputs:
    """What `make_inputs` made there."""
    store = Store(folder)
    tokenizer, tokens = RunKey("tokenizers", "rings", "tokenizer0"), RunKey("tokens", "rings", "tokens0")
    return Inputs(store.run(tokenizer), store.tokens(tokens))


def files_of(run: Cell | Trunk, inputs: Inputs, folder: Path) -> RunFiles:
    """A run's files in a runs folder."""
    return Store(folder).run(run.key(inputs.tokens.fingerprint))


def points(files: RunFiles) -> list[CurvePoint]:
    """A run's metrics file."""
    return list(read_curve(files.metrics))


def ignore(done: int, total: int) -> None:
    """A listener to progress that doesn't care."""


def assert_same_run(
    cell: Cell, branch: RunFiles, inputs: Inputs, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch has the weights, to the bit, of a run without a trunk that was killed on its way."""
    alone = files_of(cell, inputs, folder)
    report_every_step(monkeypatch)
    checkpoint_every(monkeypatch, 7)
    with pytest.raises(Killed):
        train_cell(cell, None, alone, inputs, kill_at(9 * BATCH))
    train_cell(cell, None, alone, inputs, ignore)
    ours, theirs = (load_model(files.weights).state_dict() for files in (branch, alone))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


class Killed(RuntimeError):
    """Stands for a killed process."""


def kill_at(images: int) -> Callable[[int, int], None]:
    """A listener to progress that ends the run after so many images; see `report_every_step`."""

    def report(done: int, total: int) -> None:
        if done == images:
            raise Killed

    return report


def report_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is reported a few times a second; let it be after every step."""

    def after_step(self: Any, trainer: Any, module: Any, *_: Any) -> None:
        self._report(module.images_seen)

    monkeypatch.setattr(ProgressCallback, "on_train_batch_end", after_step)


_SAVE_DUE = Checkpoints._save_due


def checkpoint_every(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Checkpoints are due by the clock; let it be by steps."""

    def save_due(self: Any, trainer: Any, module: Any) -> None:
        self._seconds = -1.0 if module.images_seen // BATCH % steps == 0 else 1e9
        _SAVE_DUE(self, trainer, module)

    monkeypatch.setattr(Checkpoints, "_save_due", save_due)
