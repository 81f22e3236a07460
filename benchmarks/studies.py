"""The sizes that are measured, as experiments like any other, with an untrained tokenizer and stored tokens.

Speed does not depend on what the tokens are, so they are drawn at random; everything else is what a sweep uses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from varscale.config import Experiment
from varscale.config.yaml import changed, load_experiment
from varscale.data.sources.rings.source import RingsSource
from varscale.data.tokens.writer import encode_store
from varscale.store.layout import RunKey, Store, TokenFiles
from varscale.store.records import TokensSummary
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.tokenizer.storage import save_tokenizer
from varscale.training.cells import Cell, Execution, Trunk
from varscale.training.runs import Inputs

TOKENIZER, TOKENS = RunKey("tokenizers", "untrained", "0"), RunKey("tokens", "random", "0")

TOKENS_130: dict[str, Any] = {
    "data.image_size": 32,
    "data.validation_images": 64,
    "tokenizer.patch_nums": [1, 2, 3, 4, 6, 8],
    "tokenizer.vocab_size": 512,
    "tokenizer.latent_channels": 16,
    "tokenizer.base_channels": 16,
    "tokenizer.channel_multipliers": [1, 1, 2],
    "optim.batch_size": 32,
    "optim.lr_batch_size": 32,
    "optim.warmup_fraction": 0.0,
    "optim.lr": 1e-3,
    "evaluation.samples_per_class": 0,
}
"""130 tokens of 512 codes, batches of 32: the sizes of the issue's context."""


@dataclass(frozen=True)
class Size:
    """A transformer that is measured."""

    depth: int
    width: int
    heads: int

    @property
    def title(self) -> str:
        """For tables."""
        return f"depth {self.depth} width {self.width} heads {self.heads}"


def experiment_130(size: Size, **changes: Any) -> Experiment:
    """The experiment in which this depth has this width and these heads; 130 tokens."""
    if size.width % size.depth:
        raise ValueError(f"width {size.width} is not a multiple of depth {size.depth}")
    settings = {
        **TOKENS_130,
        "model.width_per_depth": size.width // size.depth,
        "model.head_dim": size.width // size.heads,
        **changes,
    }
    return changed(rings(), settings, "benchmarks")


def experiment_680(size: Size, batch: int) -> Experiment:
    """The paper's tokens at 256 × 256 pixels, of little images: 680 tokens of 4,096 codes."""
    settings = {
        "data.image_size": 32,
        "tokenizer.patch_nums": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
        "tokenizer.vocab_size": 4096,
        "tokenizer.latent_channels": 32,
        "tokenizer.base_channels": 8,
        "tokenizer.norm_groups": 8,
        "tokenizer.channel_multipliers": [1, 1],
        "model.width_per_depth": size.width // size.depth,
        "model.head_dim": size.width // size.heads,
        "optim.batch_size": batch,
        "optim.lr_batch_size": batch,
    }
    return changed(rings(), settings, "benchmarks")


def rings() -> Experiment:
    """The shipped experiment, without pictures and with a small validation set."""
    settings = {"evaluation.samples_per_class": 0, "data.validation_images": 64}
    return changed(load_experiment("rings"), settings, "benchmarks")


def trunk_of(experiment: Experiment, depth: int) -> Trunk:
    """The size of a depth; its warm-up, if any, is that of the shipped grid."""
    return Trunk(experiment, depth, 0, min(experiment.grid.budgets))


def size_of(trunk: Trunk) -> Size:
    """Of a VAR."""
    columns = trunk.model.columns()
    return Size(trunk.depth, columns["width"], columns["heads"])


def cell_of_steps(experiment: Experiment, depth: int, steps: int) -> Cell:
    """A run of exactly so many steps."""
    flops = trunk_of(experiment, depth).flops_per_image * experiment.optim.batch_size
    budget = float(steps * flops)
    return Trunk(experiment, depth, 0, budget).cell(budget)


def make_inputs(folder: Path, experiment: Experiment, execution: Execution, images: int = 8192) -> Inputs:
    """A tokenizer's file and token stores, made unless they are there."""
    store = Store(folder)
    inputs = Inputs(store.run(TOKENIZER), store.tokens(TOKENS), execution)
    if not inputs.tokenizer.weights.exists():
        save_tokenizer(inputs.tokenizer.weights, untrained_tokenizer(experiment), TOKENIZER.fingerprint)
        _encode(inputs.tokens, experiment, images)
    return inputs


def untrained_tokenizer(experiment: Experiment) -> MultiScaleTokenizer:
    """The experiment's tokenizer as it is before training, with codes that differ."""
    torch.manual_seed(0)
    tokenizer = MultiScaleTokenizer(experiment.tokenizer.architecture)
    torch.nn.init.normal_(tokenizer.quantizer.codebook_Vc)
    return tokenizer.eval()


def _encode(files: TokenFiles, experiment: Experiment, images: int) -> None:
    settings = experiment.tokenizer

    def random_tokens(images_B3HW: torch.Tensor) -> Sequence[torch.Tensor]:
        return [torch.randint(settings.vocab_size, (len(images_B3HW), side**2)) for side in settings.patch_nums]

    for split, number in (("train", images), ("validation", 64)):
        encode_store(
            files.folder / split,
            RingsSource(number, experiment.data.image_size, "train" if split == "train" else "validation"),
            random_tokens,
            patch_nums=settings.patch_nums,
            vocab_size=settings.vocab_size,
            tokenizer_fingerprint=TOKENIZER.fingerprint,
            shard_images=8192,
            batch_size=64,
            workers=0,
        )
    TokensSummary(images=images, unigram_entropy=0.0).write(files.summary)
