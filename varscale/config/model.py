"""The transformer and its optimisation."""

from typing import Annotated, Literal

from pydantic import Field

from varscale.config.section import Count, Decay, Fraction, NonNegative, Positive, Real, Section, Truth, Whole


class ModelConfig(Section):
    """The VAR transformer; depth derives the rest."""

    family: Literal["var"] = "var"
    """Model family."""
    width_per_depth: Annotated[Whole, Field(ge=1, le=2**16)] = 64
    """Transformer width = width_per_depth · depth."""
    head_dim: Annotated[Whole, Field(ge=1, le=2**16)] = 64
    """Channels of an attention head, at least: a size has as many heads as divide its width and leave each that many
    (64, the paper's, with width 64 · depth makes heads = depth)."""
    mlp_ratio: Annotated[Positive, Field(le=1000)] = 4.0
    """Hidden width of the feed-forward layers as a multiple of the width."""
    drop_path_at_depth_24: Fraction = 0.1
    """Stochastic depth of the last block is this · depth / 24, linear over the blocks."""
    label_dropout: Fraction = 0.1
    """Probability that a training image's label is replaced by "no class"."""
    shared_adaln: Truth = False
    """One AdaLN projection for all blocks (the paper's d36 at 512 px)."""
    normalise_queries_keys: Truth = True
    """L2-normalise queries and keys and learn a temperature a head."""
    adaln_init: NonNegative = 0.5
    """Scale of AdaLN's scale and shift weights at initialisation."""
    adaln_gamma_init: NonNegative = 1e-3
    """Scale of AdaLN's gate (gamma) weights at initialisation."""
    head_init: NonNegative = 0.02
    """Scale of the classifier's weights at initialisation."""

    def width(self, depth: int) -> int:
        """Transformer width of a model of `depth` blocks."""
        return self.width_per_depth * depth

    def heads(self, depth: int) -> int:
        """Attention heads of a model of `depth` blocks: at least one."""
        width = self.width(depth)
        return max((heads for heads in range(1, width // self.head_dim + 1) if width % heads == 0), default=1)

    def drop_path_rate(self, depth: int) -> float:
        """Stochastic-depth rate of the last block of a model of `depth` blocks."""
        return self.drop_path_at_depth_24 * depth / 24


class OptimConfig(Section):
    """How the transformers are trained: AdamW with a schedule of images seen."""

    lr: Positive = 1e-4
    """Base learning rate: the rate at `lr_batch_size` images a step; used: lr · batch_size / lr_batch_size."""
    lr_batch_size: Count = 256
    """Batch size that `lr` refers to."""
    batch_size: Count = 768
    """Images a step, over all devices; the same for every size."""
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
    epochs: Positive | None = None
    """Length of a single run that names no budget, passes over the data."""

    @property
    def peak_lr(self) -> float:
        """The learning rate that is used."""
        return self.lr * self.batch_size / self.lr_batch_size
