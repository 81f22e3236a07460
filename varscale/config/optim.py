"""How the transformers are trained."""

from typing import Annotated, Literal

from pydantic import Field

from varscale.config.section import BatchSize, Decay, Fraction, NonNegative, Positive, Real, Section


class OptimConfig(Section):
    """How the transformers are trained: AdamW with a schedule of images seen."""

    lr: Positive = 1e-4
    """Base learning rate: the rate at `lr_batch_size` images a step; used: lr · batch_size / lr_batch_size."""
    lr_batch_size: BatchSize = 256
    """Batch size that `lr` refers to."""
    batch_size: BatchSize = 768
    """Images a step, over all devices; the same for every size."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the transformers' matrix products; losses of different arithmetic are not compared."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay rates."""
    weight_decay: NonNegative = 0.05
    """AdamW's decay (none on biases, norms, 1-d and position, level and scale parameters)."""
    final_weight_decay: NonNegative | None = None
    """Weight decay at the end, reached along a cosine (schedule `linear` only); None: constant."""
    grad_clip: Positive = 2.0
    """Largest norm of the gradient."""
    schedule: Literal["wsd", "linear"] = "wsd"
    """`wsd`: warm-up, stable, decay (grids). `linear`: warm-up, 5% constant, linear to the end (the reference)."""
    warmup_fraction: Fraction = 0.1
    """Warm-up as a share of the smallest budget's images (`linear`: of the run's own)."""
    decay_fraction: Annotated[Real, Field(gt=0, lt=1)] = 0.2
    """Share of a budget over which a branch's rate falls linearly (`wsd`)."""
    final_lr_ratio: Fraction = 0.0
    """Rate at the end as a share of the peak."""
    epochs: Annotated[Real, Field(gt=0, le=1e6)] | None = None
    """Length of a single run that names no budget, passes over the data."""

    @property
    def peak_lr(self) -> float:
        """The learning rate that is used."""
        return self.lr * self.batch_size / self.lr_batch_size
