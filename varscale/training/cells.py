"""What a cell is: one model size trained on one budget, as a branch of its size's trunk. Pure; no torch.

A trunk is the constant-rate run of one size (depth, seed, variant); a cell branches off it after 1 - decay_fraction of
its own images and decays the rate over the rest (warm-up, stable, decay).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from varscale.config import Experiment
from varscale.config.yaml import changed
from varscale.errors import ExperimentError
from varscale.families.var.config import VARShape
from varscale.store.layout import fingerprint

Precision = Literal["float32", "bfloat16"]
_MEMORY_SHARE = 0.6
"""Of the memory; activations are estimated to within a third, and the backward pass needs room of its own."""


@dataclass(frozen=True)
class Numerics:
    """How a whole sweep computes; decided once, the same for every size, and part of every fingerprint."""

    precision: Precision
    """Arithmetic of the transformers' matrix products."""
    compiled: bool
    """Whether transformer blocks are compiled."""
    native_kernels: bool
    """Whether attention on a CPU uses our compiled kernel (it differs from torch's in the last bits)."""
    threads: int
    """CPU threads of a transformer's run."""
    tokenizer_threads: int
    """CPU threads of the tokenizer's run."""
    memory_bytes: int | None = None
    """What a transformer's run has; None: enough. In fingerprints only by the parts that a size's steps go in."""

    @property
    def identity(self) -> dict[str, Any]:
        """The part of it that is a part of every transformer's fingerprint."""
        return {name: getattr(self, name) for name in ("precision", "compiled", "native_kernels", "threads")}

    @property
    def element_bytes(self) -> int:
        """Of a number in the matrix products."""
        return 2 if self.precision == "bfloat16" else 4


@dataclass(frozen=True)
class Trunk:
    """The warm-up and stable part that all cells of one size, seed and variant share."""

    experiment: Experiment
    """Settings, the variant's changes made."""
    depth: int
    """Transformer blocks."""
    seed: int
    """Seed of initialisation, data order, label dropout and stochastic depth."""
    smallest_budget: float
    """Training FLOPs that the warm-up is a share of."""
    variant: str = ""
    """Name of the study's variant, empty for the grid itself."""

    @cached_property
    def shape(self) -> VARShape:
        """Sizes that parameters and FLOPs follow from."""
        tokenizer, model = self.experiment.tokenizer, self.experiment.model
        return VARShape(
            patch_nums=tokenizer.patch_nums,
            vocab_size=tokenizer.vocab_size,
            latent_channels=tokenizer.latent_channels,
            num_classes=self.experiment.data.num_classes,
            depth=self.depth,
            width=model.width(self.depth),
            heads=model.heads(self.depth),
            mlp_ratio=model.mlp_ratio,
            shared_adaln=model.shared_adaln,
            normalise_queries_keys=model.normalise_queries_keys,
        )

    def check(self) -> None:
        """Raise `ExperimentError` where the model's settings don't make a transformer of this depth."""
        model, width = self.experiment.model, self.experiment.model.width(self.depth)
        if (rate := model.drop_path_rate(self.depth)) >= 1:
            raise ExperimentError(
                f"model.drop_path_at_depth_24: {model.drop_path_at_depth_24:g} is a rate of {rate:.3g} at depth "
                f"{self.depth}; it must stay below 1"
            )
        if round(width * model.mlp_ratio) < 1:
            raise ExperimentError(
                f"model.mlp_ratio: {model.mlp_ratio:g} leaves depth {self.depth} of width {width} no hidden channel"
            )

    @property
    def batch_size(self) -> int:
        """Images a step."""
        return self.experiment.optim.batch_size

    @cached_property
    def flops_per_image(self) -> int:
        """Training FLOPs of an image: 3 × the forward pass with all L × L attention pairs."""
        return self.shape.training_flops()

    @property
    def warmup_images(self) -> int:
        """Length of the warm-up, a whole number of steps."""
        return round(self.experiment.optim.warmup_fraction * self.steps(self.smallest_budget)) * self.batch_size

    @property
    def name(self) -> str:
        """Readable name, unique within an experiment together with the fingerprint."""
        return "-".join(filter(None, (f"d{self.depth}", f"s{self.seed}", self.variant)))

    def images_at_once(self, numerics: Numerics) -> int:
        """Images of a step that pass together: all, or parts of about one size that the memory holds."""
        most = self.experiment.runtime.micro_batch or self._most_images(numerics)
        return math.ceil(self.batch_size / math.ceil(self.batch_size / most))

    def check_memory(self, numerics: Numerics) -> None:
        """Raise `ExperimentError` where not even one image fits, unless the experiment says how many pass at once."""
        if not self.experiment.runtime.micro_batch and numerics.memory_bytes and self._spare_images(numerics) < 1:
            needed = self.shape.step_bytes(1, element_bytes=numerics.element_bytes)
            raise ExperimentError(
                f"grid.depths: depth {self.depth} needs {needed / 2**30:.1f} GiB for a step of one image, and a run "
                f"has {numerics.memory_bytes / 2**30:.1f} GiB here"
            )

    def _most_images(self, numerics: Numerics) -> int:
        if numerics.memory_bytes is None:
            return self.batch_size
        return min(self.batch_size, max(1, int(self._spare_images(numerics))))

    def _spare_images(self, numerics: Numerics) -> float:
        """Images whose activations fit beside weights and moments."""
        assert numerics.memory_bytes is not None
        spare = _MEMORY_SHARE * numerics.memory_bytes - self.shape.training_state_bytes()
        return spare / self.shape.activation_bytes(1, element_bytes=numerics.element_bytes)

    def steps(self, budget: float) -> int:
        """Whole steps that a budget pays for."""
        return int(budget // (self.flops_per_image * self.batch_size))

    def cell(self, budget: float) -> "Cell":
        """The cell of this trunk at a budget."""
        return Cell(self, budget)

    def fingerprint(self, tokens: str, numerics: Numerics) -> str:
        """Identity: every setting that changes the trunk's numbers, and its tokens' fingerprint."""
        optim = self.experiment.optim
        return fingerprint(
            kind="trunk",
            tokens=tokens,
            numerics=numerics.identity,
            images_at_once=self.images_at_once(numerics),
            shape=asdict(self.shape),
            model=self.experiment.model.model_dump(mode="json"),
            depth=self.depth,
            seed=self.seed,
            peak_lr=optim.peak_lr,
            batch_size=optim.batch_size,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            grad_clip=optim.grad_clip,
            warmup_images=self.warmup_images,
        )


@dataclass(frozen=True)
class Cell:
    """One point of the grid."""

    trunk: Trunk
    """The run it branches off."""
    budget_flops: float
    """Training FLOPs it may spend."""

    @property
    def steps(self) -> int:
        """Optimizer steps from the start of the trunk to the end of the branch."""
        return self.trunk.steps(self.budget_flops)

    @property
    def images(self) -> int:
        """Images seen at the end."""
        return self.steps * self.trunk.batch_size

    @property
    def decay_images(self) -> int:
        """Images over which the rate decays."""
        return round(self.trunk.experiment.optim.decay_fraction * self.steps) * self.trunk.batch_size

    @property
    def branch_images(self) -> int:
        """Images seen where the branch leaves the trunk."""
        return self.images - self.decay_images

    @property
    def name(self) -> str:
        """Readable name, unique within an experiment together with the fingerprint."""
        trunk = self.trunk
        parts = (f"d{trunk.depth}", f"c{self.budget_flops:.3g}".replace("+", ""), f"s{trunk.seed}", trunk.variant)
        return "-".join(filter(None, parts))

    @property
    def title(self) -> str:
        """Name for people: tables, MLflow."""
        variant = f" · {self.trunk.variant}" if self.trunk.variant else ""
        budget = f"{self.budget_flops:.3g}".replace("e+", "e")
        return f"depth {self.trunk.depth} · {budget} FLOPs · seed {self.trunk.seed}{variant}"

    def fingerprint(self, tokens: str, numerics: Numerics) -> str:
        """Identity: the trunk's, where and how the branch ends, and what it is measured on."""
        return fingerprint(
            kind="cell",
            trunk=self.trunk.fingerprint(tokens, numerics),
            images=self.images,
            decay_images=self.decay_images,
            schedule=self.trunk.experiment.optim.schedule,
            final_lr_ratio=self.trunk.experiment.optim.final_lr_ratio,
            final_weight_decay=self.trunk.experiment.optim.final_weight_decay,
            validation_images=self.trunk.experiment.data.validation_images,
            evaluation_batch_size=self.trunk.experiment.evaluation.batch_size,  # sums round differently
        )

    def parameters(self) -> dict[str, Any]:
        """What describes the cell, under the names of the runs table."""
        experiment, shape = self.trunk.experiment, self.trunk.shape
        tokens_per_image = experiment.tokenizer.tokens_per_image
        return {
            "experiment": experiment.name,
            "family": experiment.model.family,
            "depth": self.trunk.depth,
            "width": shape.width,
            "heads": shape.heads,
            "seed": self.trunk.seed,
            "variant": self.trunk.variant,
            "budget_flops": self.budget_flops,
            "train_flops": float(self.images * self.trunk.flops_per_image),
            "flops_per_image": float(self.trunk.flops_per_image),
            "params_total": shape.parameters(),
            "params_active": shape.active_parameters(),
            "images_seen": self.images,
            "tokens_seen": self.images * tokens_per_image,
            "steps": self.steps,
            "batch_size": self.trunk.batch_size,
            "lr": experiment.optim.peak_lr,
            "warmup_images": self.trunk.warmup_images,
        }


def grid_cells(experiment: Experiment) -> tuple[Cell, ...]:
    """All cells of an experiment's grid and variants, each once, sizes in order, budgets rising.

    Raises:
        ExperimentError: cells of fewer than `grid.min_steps` steps, a warm-up that runs into a decay, or a variant
            whose settings are invalid.
    """
    grid = experiment.grid
    _check_schedule(experiment, "optim.schedule")
    cells = [
        cell
        for depth in grid.depths
        for seed in grid.seeds
        for cell in _cells(experiment, depth, seed, "", grid.budgets)
    ]
    for variant in grid.variants:
        source = f"grid.variants: {variant.name}"
        for key in variant.settings:
            if not key.startswith(("model.", "optim.")):
                raise ExperimentError(f"{source}: {key}: only fields of model and optim can vary within a study")
        altered = changed(experiment, variant.settings, source)
        _check_schedule(altered, f"{source}: optim.schedule")
        name = variant.name if variant.settings else ""  # further seeds of the same recipe are cells like any other
        for depth in variant.depths:
            for seed in variant.seeds:
                cells += _cells(altered, depth, seed, name, variant.budgets)
    check_lengths(cells, grid.min_steps)
    _check_repeats(cells)
    unique: dict[tuple[str, float], Cell] = {}
    for cell in cells:
        unique.setdefault((cell.trunk.name, cell.budget_flops), cell)
    return tuple(unique.values())


def _check_schedule(experiment: Experiment, key: str) -> None:
    if experiment.optim.schedule != "wsd":
        raise ExperimentError(f"{key}: a grid branches its cells off trunks, which only wsd allows")


def _check_repeats(cells: Sequence[Cell]) -> None:
    budgets: dict[tuple[str, int], float] = {}
    for cell in cells:
        first = budgets.setdefault((cell.trunk.name, cell.steps), cell.budget_flops)
        if first != cell.budget_flops:
            raise ExperimentError(
                f"grid.budgets: {first:.6g} and {cell.budget_flops:.6g} are the same run of {cell.steps} steps at "
                f"depth {cell.trunk.depth}: leave one out"
            )


def _cells(experiment: Experiment, depth: int, seed: int, variant: str, budgets: Iterable[float]) -> Iterable[Cell]:
    trunk = Trunk(experiment, depth, seed, min(experiment.grid.budgets), variant)
    return [trunk.cell(budget) for budget in sorted(budgets)]


def check_lengths(cells: Sequence[Cell], min_steps: int) -> None:
    """Raise `ExperimentError` for models that can't be, cells of fewer steps, and warm-ups that run into the decay."""
    for cell in cells:
        cell.trunk.check()
    short = [cell for cell in cells if cell.steps < min_steps]
    if short:
        worst = min(short, key=lambda cell: cell.steps)
        # shown with three digits: one per cent more is enough, however they are rounded
        needed = 1.01 * min_steps * worst.trunk.flops_per_image * worst.trunk.batch_size
        raise ExperimentError(
            f"grid.budgets: {len(short)} of the cells have fewer than grid.min_steps = {min_steps} steps; depth "
            f"{worst.trunk.depth} at {worst.budget_flops:.3g} FLOPs has {worst.steps} and needs {needed:.3g} FLOPs"
        )
    for cell in cells:
        if cell.trunk.experiment.optim.schedule == "wsd" and not 0 < cell.decay_images < cell.images:
            raise ExperimentError(
                f"optim.decay_fraction: {cell.trunk.experiment.optim.decay_fraction:g} of the {cell.steps} steps of "
                f"{cell.title} leaves no whole step to decay the rate over, or none before"
            )
        if cell.branch_images < cell.trunk.warmup_images:
            raise ExperimentError(
                f"optim.warmup_fraction: the warm-up takes {cell.trunk.warmup_images} images, but the decay of "
                f"{cell.title} starts at {cell.branch_images} of {cell.images}: lower it, or optim.decay_fraction"
            )
