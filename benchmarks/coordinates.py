"""Coordinate check of VAR's parametrizations: sizes of activations, and of what a few steps change in them.

`python -m benchmarks.coordinates docs/figures/coordinates.png` draws them over width × 8 and over depth × 8. Under a
parametrization with which rates carry over they stay as they are (Yang et al. 2022, arXiv 2203.03466, appendix D).

Letters in tensor names: B batch, L tokens of an image, M those of the later scales, c latent channels.
"""

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varscale.config.section import PARAMETRIZATIONS
from varscale.families.var.config import VARConfig
from varscale.families.var.family import VARFamily
from varscale.families.var.transformer import VAR
from varscale.training.module import EPSILON

GROWTHS = (1, 2, 4, 8)
WIDTH, DEPTH, HEAD_CHANNELS = 16, 2, 8
"""Of the base."""
IMAGES, STEPS, SEEDS = 8, 4, range(2)
RATE = 4e-3


@dataclass(frozen=True)
class Coordinates:
    """Root mean squares by name; updates are changes since initialisation."""

    activations: Mapping[str, float]
    updates: Mapping[str, float]


def scaled_config(parametrization: str, width: int, depth: int, **changes: Any) -> VARConfig:
    """A model of any width and depth, scaled from the base."""
    base: dict[str, Any] = {} if parametrization == "paper" else {"base_width": WIDTH}
    if parametrization == "complete-p":
        base["base_depth"] = DEPTH
    settings: dict[str, Any] = {"adaln_gamma_init": 0.5, "base_head_channels": HEAD_CHANNELS, **base, **changes}
    return VARConfig(
        patch_nums=(1, 2, 3), vocab_size=32, latent_channels=8, num_classes=4, depth=depth, width=width,
        heads=width // HEAD_CHANNELS, parametrization=parametrization, **settings,
    )  # fmt: skip


def measure(config: VARConfig, seed: int, steps: int = STEPS) -> Coordinates:
    """Train a model on a batch of random tokens, its parameters grouped as the family says."""
    torch.manual_seed(seed)
    var = VAR(config)
    parameters = dict(var.named_parameters())
    groups = [
        {
            "params": [parameters[name] for name in group.names],
            "lr": RATE * group.rate,
            "eps": EPSILON * group.epsilon,
            "weight_decay": 0.0,
        }
        for group in VARFamily().parameter_groups(var)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    labels_B = torch.arange(IMAGES) % config.num_classes
    inputs_BMc = torch.randn(IMAGES, config.tokens - 1, config.latent_channels)
    tokens_BL = torch.randint(config.vocab_size, (IMAGES, config.tokens))
    before = _activations(var, labels_B, inputs_BMc)
    for _ in range(steps):
        loss = F.cross_entropy(var(labels_B, inputs_BMc).flatten(0, 1), tokens_BL.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = _activations(var, labels_B, inputs_BMc)
    updates = {name: _size(value - before[name]) for name, value in after.items()}
    return Coordinates({name: _size(value) for name, value in after.items()}, updates)


@functools.cache
def mean_coordinates(config: VARConfig, steps: int = STEPS) -> Coordinates:
    """Over the seeds."""
    found = [measure(config, seed, steps) for seed in SEEDS]

    def mean(kind: str) -> dict[str, float]:
        return {name: sum(getattr(one, kind)[name] for one in found) / len(found) for name in getattr(found[0], kind)}

    return Coordinates(mean("activations"), mean("updates"))


@torch.no_grad()
def _activations(var: VAR, labels_B: Tensor, inputs_BMc: Tensor) -> dict[str, Tensor]:
    """Of the last block and of the whole model."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen[name] = output

    block = var.blocks[-1]
    watched = {"attention": block.attention, "feed-forward": block.feedforward, "AdaLN": block.modulation}
    handles = [module.register_forward_hook(functools.partial(keep, name)) for name, module in watched.items()]
    # a hook of a block also keeps all of them out of the kernel, which would not call those of its parts
    handles.append(block.register_forward_hook(functools.partial(keep, "stream")))
    seen["logits"] = var(labels_B, inputs_BMc)
    for handle in handles:
        handle.remove()
    return seen


def _size(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def draw(path: Path) -> None:
    """A row for activations and one for updates; a column for each parametrization over width, then over depth."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 6, figsize=(15, 5.4), sharex=True, sharey="row", layout="constrained")
    for column, (side, parametrization) in enumerate((s, p) for s in ("width", "depth") for p in PARAMETRIZATIONS):
        found = []
        for growth in GROWTHS:
            width, depth = (WIDTH * growth, DEPTH) if side == "width" else (WIDTH, DEPTH * growth)
            found.append(mean_coordinates(scaled_config(parametrization, width, depth)))
        for row, kind in enumerate(("activations", "updates")):
            panel = axes[row, column]
            for name in getattr(found[0], kind):
                sizes = [getattr(one, kind)[name] for one in found]
                panel.plot(GROWTHS, [size / sizes[0] for size in sizes], marker="o", markersize=3, label=name)
            panel.axhspan(0.5, 2, color="0.92", zorder=0)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.set_title(parametrization if row == 0 else "", fontsize=10)
            panel.set_xlabel(f"{side} / base" if row else "")
        axes[0, 0].set_ylabel("activations / base")
        axes[1, 0].set_ylabel(f"change in {STEPS} steps / base")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
