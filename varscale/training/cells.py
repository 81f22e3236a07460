"""What a cell is: one model size trained on one budget, as a branch of its size's trunk. Pure; no torch.

A trunk is the constant-rate run of one size (depth, seed, variant); a cell branches off it after 1 - decay_fraction of
its own images and decays the rate over the rest (warm-up, stable, decay). Under a cosine the trunk is
the warm-up alone.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from varscale.config import Experiment
from varscale.config.section import RunResources
from varscale.errors import ExperimentError
from varscale.families.base import ModelDescription, TokenSpace
from varscale.numerics.machine import Peers
from varscale.store.fingerprint import fingerprint
from varscale.store.layout import RunKey

_MEMORY_SHARE = 0.6
"""Of the memory; activations are estimated to within a third, and the backward pass needs room of its own."""


@dataclass(frozen=True)
class Execution:
    """How a machine carries out the runs of a study: it changes rounding only, and is recorded with every result."""

    compiled: bool = False
    """Whether the model's blocks are compiled."""
    threads: int = 1
    """CPU threads of a run."""
    memory_bytes: float = math.inf
    """What a run has; decides how many images of a step pass at once."""
    peak_flops: float = math.nan
    """Measured matrix-multiply peak of a worker, FLOPs a second: what utilisation refers to."""
    peers: Peers = field(default_factory=Peers)
    """The processes of a run."""


@dataclass(frozen=True)
class Trunk:
    """The warm-up and stable part that all cells of one size, seed and variant share."""

    experiment: Experiment
    """Settings, the variant's changes made."""
    depth: int
    """The model's size."""
    seed: int
    """Seed of initialisation, data order, label dropout and stochastic depth."""
    smallest_budget: float
    """Training FLOPs that the warm-up is a share of."""
    variant: str = ""
    """Name of the study's variant, empty for the grid itself."""
    tried: tuple[tuple[str, Any], ...] = ()
    """Settings that a search tries in it, with their values, such as optim.lr."""

    @cached_property
    def model(self) -> ModelDescription:
        """The model.

        Raises:
            ExperimentError: The settings make no model of this size.
        """
        tokenizer, captions = self.experiment.tokenizer, self.experiment.data.captions
        told = captions if self.experiment.model.condition == "text" else None
        tokens = TokenSpace(
            patch_nums=tokenizer.patch_nums,
            vocab_size=tokenizer.vocab_size,
            latent_channels=tokenizer.latent_channels,
            quantizer=tokenizer.quantizer,
            num_classes=self.experiment.data.num_classes,
            text_width=None if told is None else told.embedding_width,
        )
        return self.experiment.model.describe(tokens, self.depth)

    @property
    def model_name(self) -> str:
        """What a paper's table calls the model, such as VAR-d16."""
        return f"{self.model.family.upper()}-d{self.depth}"

    @property
    def batch_size(self) -> int:
        """Images a step."""
        return self.experiment.optim.batch_size

    @cached_property
    def resources(self) -> RunResources:
        """What its runs take.

        Raises:
            ExperimentError: The images of a step can't be divided evenly among the devices.
        """
        resources = self.experiment.resources.of(self.model.parameters())
        if self.batch_size % resources.processes:
            raise ExperimentError(
                f"resources.devices: {resources.processes} devices can't share optim.batch_size = {self.batch_size} "
                f"images evenly at depth {self.depth}"
            )
        return resources

    @cached_property
    def flops_per_image(self) -> int:
        """Training FLOPs of an image: 3 × the forward pass with all L × L attention pairs."""
        return self.model.training_flops()

    @property
    def warmup_images(self) -> int:
        """Length of the warm-up, a whole number of steps."""
        return round(self.experiment.optim.warmup_fraction * self.steps(self.smallest_budget)) * self.batch_size

    @property
    def peak_lr(self) -> float:
        """Learning rate between warm-up and decay."""
        optim = self.experiment.optim
        return optim.peak_lr * optim.horizon_factor(self.steps(self.smallest_budget) * self.batch_size)

    @property
    def label(self) -> str:
        """Short name for tables, unique within a study."""
        return "-".join(filter(None, (f"d{self.depth}", f"s{self.seed}", self.variant)))

    @property
    def title(self) -> str:
        """Name for people."""
        variant = f" · {self.variant}" if self.variant else ""
        return f"depth {self.depth} · trunk · seed {self.seed}{variant}"

    @property
    def element_bytes(self) -> int:
        """Of a number in the matrix products."""
        return 2 if self.experiment.optim.precision == "bfloat16" else 4

    def images_at_once(self, memory_bytes: float) -> int:
        """Images of a device's share that pass together: all, or parts of about one size that the memory holds."""
        share = self.batch_size // self.resources.processes
        fitting = int(min(share, max(1, self._spare_images(memory_bytes))))
        most = self.experiment.runtime.micro_batch or fitting
        return math.ceil(share / math.ceil(share / most))

    def fits(self, memory_bytes: float) -> bool:
        """Whether at least one image fits, or the experiment says how many pass at once."""
        return bool(self.experiment.runtime.micro_batch) or self._spare_images(memory_bytes) >= 1

    def step_bytes(self, images: int) -> float:
        """What a device needs for a step with so many images at once; compiled blocks need up to a third less."""
        return self._state_bytes + self.model.activation_bytes(images, element_bytes=self.element_bytes)

    def _spare_images(self, memory_bytes: float) -> float:
        """Images whose activations fit beside weights and moments."""
        spare = _MEMORY_SHARE * memory_bytes - self._state_bytes
        return spare / self.model.activation_bytes(1, element_bytes=self.element_bytes)

    @property
    def _state_bytes(self) -> float:
        """Weights, gradients and moments on a device."""
        whole = self.model.training_state_bytes()
        return whole / self.resources.processes if self.resources.sharded else whole

    def steps(self, budget: float) -> int:
        """Whole steps that a budget pays for."""
        return int(budget // (self.flops_per_image * self.batch_size))

    def cell(self, budget: float) -> "Cell":
        """The cell of this trunk at a budget."""
        return Cell(self, budget)

    def key(self, tokens_fingerprint: str) -> RunKey:
        """Identity: every setting that changes the trunk's results, and its tokens' fingerprint."""
        optim = self.experiment.optim
        identity = fingerprint(
            kind="trunk",
            tokens=tokens_fingerprint,
            model=self.model.model_dump(mode="json"),
            seed=self.seed,
            precision=optim.precision,
            peak_lr=self.peak_lr,
            batch_size=optim.batch_size,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            grad_clip=optim.grad_clip,
            warmup_images=self.warmup_images,
        )
        return RunKey("trunks", f"{self.model.family}-d{self.depth}-s{self.seed}", identity)

    def parameters(self) -> dict[str, Any]:
        """What describes the trunk, under the names of the runs table."""
        model, optim = self.model, self.experiment.optim
        return {
            "family": model.family,
            "depth": self.depth,
            **model.columns(),
            "seed": self.seed,
            "flops_per_image": float(self.flops_per_image),
            "params_total": model.parameters(),
            "params_active": model.active_parameters(),
            "sampling_passes": model.sampling_passes(),
            "loss_unit": model.loss_unit,
            "batch_size": self.batch_size,
            "lr": self.peak_lr,
            "warmup_images": self.warmup_images,
            "precision": optim.precision,
        }


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
        """Images over which the rate decays: along a cosine all that come after the warm-up."""
        optim = self.trunk.experiment.optim
        if optim.schedule == "cosine":
            return max(0, self.images - self.trunk.warmup_images)
        return round(optim.decay_fraction * self.steps) * self.trunk.batch_size

    @property
    def branch_images(self) -> int:
        """Images seen where the branch leaves the trunk."""
        return self.images - self.decay_images

    @property
    def train_flops(self) -> float:
        """Training FLOPs it does spend: whole steps."""
        return float(self.images * self.trunk.flops_per_image)

    @property
    def label(self) -> str:
        """Short name for tables, unique within a study."""
        return f"{self.trunk.label}-c{_short(self.budget_flops)}"

    @property
    def title(self) -> str:
        """Name for people: tables, MLflow."""
        trunk = self.trunk
        variant = f" · {trunk.variant}" if trunk.variant else ""
        return f"depth {trunk.depth} · {_short(self.budget_flops)} FLOPs · seed {trunk.seed}{variant}"

    def key(self, tokens_fingerprint: str) -> RunKey:
        """Identity: the trunk's, and where and how the branch ends.

        Neither the study's name for it nor its nominal budget counts: two studies that contain it share it.
        """
        trunk, optim = self.trunk, self.trunk.experiment.optim
        identity = fingerprint(
            kind="cell",
            trunk=trunk.key(tokens_fingerprint).fingerprint,
            images=self.images,
            decay_images=self.decay_images,
            schedule=optim.schedule,
            final_lr_ratio=optim.final_lr_ratio,
            final_weight_decay=optim.final_weight_decay,
        )
        name = f"{trunk.model.family}-d{trunk.depth}-c{_short(self.train_flops)}-s{trunk.seed}"
        return RunKey("cells", name, identity)

    def parameters(self) -> dict[str, Any]:
        """What describes the cell in any study, under the names of the runs table."""
        return {
            **self.trunk.parameters(),
            "train_flops": self.train_flops,
            "images_seen": self.images,
            "tokens_seen": self.images * self.trunk.model.tokens,
            "steps": self.steps,
        }

    def labels(self) -> dict[str, Any]:
        """What one study calls it, under the names of the runs table."""
        return {
            "experiment": self.trunk.experiment.name,
            "variant": self.trunk.variant,
            "budget_flops": self.budget_flops,
            **dict(self.trunk.tried),
        }


def provenance(execution: Execution, trunk: Trunk) -> dict[str, Any]:
    """How this machine carries out a run, for its result."""
    from varscale.kernels.building import usable
    from varscale.numerics.device import best_device
    from varscale.numerics.machine import device_name, versions

    return {
        "device": device_name(),
        "compiled": execution.compiled,
        "threads": execution.threads,
        "kernels": "native" if usable() and best_device().type == "cpu" else "torch",
        "images_at_once": trunk.images_at_once(execution.memory_bytes),
        "devices": trunk.resources.processes,
        **versions(),
    }


def _short(flops: float) -> str:
    """FLOPs with three digits, such as 1.95e12."""
    return f"{flops:.3g}".replace("e+", "e")
