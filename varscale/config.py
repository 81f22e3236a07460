"""An experiment: frozen, validated settings, read from YAML by `varscale.config_files`.

Every field is documented where it is declared; `Experiment.model_json_schema()` carries the same texts.
Counts are whole numbers of what the name says (images, tokens, steps); FLOPs are 2 × multiply-adds.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _numbers_only(value: Any) -> Any:
    """Python counts with booleans and would read text; an experiment doesn't."""
    if isinstance(value, bool):
        raise ValueError(f"input should be a number, got {str(value).lower()}")
    if isinstance(value, str):
        raise ValueError(f"input should be a valid integer, got {value!r}")
    return value


Whole = Annotated[int, BeforeValidator(_numbers_only)]
Real = Annotated[float, Field(strict=True)]
Truth = Annotated[bool, Field(strict=True)]
Fraction = Annotated[Real, Field(ge=0, le=1)]
Decay = Annotated[Real, Field(ge=0, lt=1)]
Positive = Annotated[Real, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[Real, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[Whole, Field(ge=1)]
CountOrZero = Annotated[Whole, Field(ge=0)]
Seed = Annotated[Whole, Field(ge=0, lt=2**31)]
SMALLEST_ADVERSARIAL_IMAGE = 24
"""Side, pixels, below which nothing is left for the last of the PatchGAN discriminator's convolutions."""


class Section(BaseModel):
    """A part of an experiment: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


# ---------------------------------------------------------------------------------------------------------- data


class ImageData(Section):
    """What every source of images has."""

    image_size: Count
    """Side of the square training images, pixels."""
    num_classes: Count
    """Labels are 0 … num_classes - 1; the models add one "no class" for guidance."""
    validation_images: Count | None = None
    """Images of the validation set that are used; None: all (procedural sources must say)."""
    views: Count = 1
    """Crops (and flips) of each training image, each encoded once into the token store."""
    resize_ratio: Annotated[Real, Field(ge=1)] = 1.0
    """Shorter side after resizing (Lanczos), as a multiple of image_size, before cropping. The paper: 1.125."""
    horizontal_flip: Truth = False
    """Flip each view with probability ½. The paper: no."""
    seed: Seed = 0
    """Seed of procedural images, crops and flips."""
    max_undecodable: CountOrZero = 10
    """Images that may fail to decode (each is named and skipped) before the run stops."""


class RingsData(ImageData):
    """Procedural images of soft Gaussian rings; the class is the number of rings."""

    kind: Literal["rings"] = "rings"
    """Source of the images."""
    min_rings: Count = 1
    """Fewest rings in an image."""
    max_rings: Count = 3
    """Most rings in an image."""
    radius: tuple[Fraction, Fraction] = (0.16, 0.30)
    """Smallest and largest radius, as a share of the side."""
    width: tuple[Fraction, Fraction] = (0.045, 0.045)
    """Smallest and largest standard deviation of the profile across a ring, as a share of the side."""
    colours: Annotated[Whole, Field(ge=1, le=8)] = 4
    """Ring colours in use."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_classes != self.max_rings - self.min_rings + 1:
            raise ValueError(
                f"num_classes: {self.num_classes}, but {self.min_rings} to {self.max_rings} rings make "
                f"{self.max_rings - self.min_rings + 1} classes"
            )
        if self.validation_images is None:
            raise ValueError("validation_images: procedural rings need a number, such as 2048")
        if self.horizontal_flip or self.views != 1 or self.resize_ratio != 1:
            raise ValueError(
                "views: rings are drawn at image_size; views, resize_ratio and horizontal_flip don't apply"
            )
        for name, (low, high) in (("radius", self.radius), ("width", self.width)):
            if not 0 < low <= high:
                raise ValueError(f"{name}: expected the smallest, above 0, then the largest, not [{low:g}, {high:g}]")
        return self


class FolderData(ImageData):
    """Image folders in torchvision's layout, `train_path/<class>/<image>`."""

    kind: Literal["folder"]
    """Source of the images."""
    train_path: str
    """Folder of the training set."""
    validation_path: str
    """Folder of the validation set."""


class ParquetData(ImageData):
    """Parquet files with image bytes and labels, as Hugging Face lays them out."""

    kind: Literal["parquet"]
    """Source of the images."""
    train_path: str
    """File, or folder of files, of the training set."""
    validation_path: str
    """File, or folder of files, of the validation set."""
    image_column: str = "image"
    """Column of image bytes: binary, or a struct with a field `bytes`."""
    label_column: str = "label"
    """Column of integer labels."""


class Cifar10Data(ImageData):
    """CIFAR-10 as torchvision downloads it (`path/cifar-10-batches-py`)."""

    kind: Literal["cifar10"]
    """Source of the images."""
    path: str
    """Folder that holds cifar-10-batches-py."""


DataConfig = Annotated[RingsData | FolderData | ParquetData | Cifar10Data, Field(discriminator="kind")]


# ----------------------------------------------------------------------------------------------------- tokenizer


class TokenizerTraining(Section):
    """How the multi-scale VQ-VAE is trained."""

    images: Count = 64_000
    """Length of the training, images seen."""
    batch_size: Count = 64
    """Images a step, over all devices."""
    lr: Positive = 3e-4
    """Peak learning rate of AdamW."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay rates."""
    weight_decay: NonNegative = 0.05
    """AdamW's weight decay (none on biases, norms, other 1-d parameters and the codebook)."""
    grad_clip: Positive = 1.0
    """Largest norm of the gradient."""
    warmup_images: CountOrZero = 3_200
    """Linear warm-up, images."""
    final_lr_ratio: Fraction = 0.01
    """The rate falls to this share of the peak along a cosine."""
    ema_decay: Decay = 0.995
    """Decay a step of the averaged weights that are used for tokens, decoding and metrics."""
    l1_weight: NonNegative = 0.2
    """Weight of the mean absolute error of pixels in [-1, 1]."""
    l2_weight: NonNegative = 1.0
    """Weight of the mean squared error."""
    perceptual_weight: NonNegative = 0.0
    """Weight of LPIPS; needs `perceptual_weights_path`."""
    perceptual_weights_path: str | None = None
    """File of torchvision's VGG-16 weights, the backbone of LPIPS."""
    adversarial_weight: NonNegative = 0.0
    """Weight of the hinge PatchGAN term, scaled adaptively as in VQGAN (eq. 7)."""
    adversarial_start: Fraction = 0.3
    """Share of the training after which the adversarial term sets in."""
    discriminator_channels: Count = 64
    """Base channels of the PatchGAN discriminator."""
    quantize_after: Annotated[Real, Field(ge=0, le=0.8)] = 0.0
    """Share of the training in which images pass unquantized (with a small penalty on the features' squares), before
    codes are initialised from the features. Short trainings converge several times faster with about 0.2."""
    restart_every_steps: Count = 50
    """Steps between restarts of dead codes; none in the last fifth of training."""
    restart_usage: Fraction = 0.1
    """A code is dead when used less often than this share of its fair share since the last restart."""
    seed: Seed = 0
    """Seed of initialisation and data order."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_images > self.images:
            raise ValueError(f"warmup_images: {self.warmup_images}, but the training has {self.images} images")
        return self


class TokenizerConfig(Section):
    """The multi-scale VQ-VAE (VAR, section 3.2)."""

    patch_nums: tuple[Count, ...]
    """Side of each scale's token map, strictly growing, ending at the latent size."""
    vocab_size: Annotated[Whole, Field(ge=2, le=2**32)]
    """Codes in the one codebook that all scales share."""
    latent_channels: Count
    """Channels of the latent map and of a code."""
    base_channels: Count
    """Channels of the encoder's and decoder's highest resolution."""
    channel_multipliers: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 1, 2, 2, 4)
    """Channels of each resolution as multiples of base_channels; n entries downsample by 2^(n-1)."""
    residual_blocks: Count = 2
    """Residual blocks a resolution (the decoder has one more)."""
    attention: Truth = True
    """Self-attention at the lowest resolution."""
    norm_groups: Count = 32
    """Groups of the group norms; must divide the channels of every resolution."""
    phi_count: Count = 4
    """φ convolutions shared among the scales."""
    phi_ratio: Fraction = 0.5
    """Share of the convolution in φ(h) = (1 - r) h + r conv(h)."""
    commitment_weight: NonNegative = 0.25
    """β of the quantizer's loss."""
    checkpoint: str | None = None
    """File of a finished tokenizer (ours or the reference's vae_*.pth) to use instead of training one."""
    training: TokenizerTraining = TokenizerTraining()
    """How it is trained."""

    @property
    def latent_size(self) -> int:
        """Side of the latent map, the last scale's token map."""
        return self.patch_nums[-1]

    @property
    def tokens_per_image(self) -> int:
        """L, tokens of an image over all scales."""
        return sum(side * side for side in self.patch_nums)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.patch_nums or any(b <= a for a, b in zip(self.patch_nums, self.patch_nums[1:], strict=False)):
            raise ValueError(f"patch_nums: must grow strictly, got {list(self.patch_nums)}")
        for multiplier in self.channel_multipliers:
            if (self.base_channels * multiplier) % self.norm_groups:
                raise ValueError(
                    f"norm_groups: {self.norm_groups} does not divide {self.base_channels * multiplier} channels "
                    f"(base_channels {self.base_channels} × {multiplier})"
                )
        if self.training.perceptual_weight > 0 and self.training.perceptual_weights_path is None:
            raise ValueError("training.perceptual_weights_path: LPIPS needs the file of VGG-16's weights")
        return self


# --------------------------------------------------------------------------------------------------------- model


class ModelConfig(Section):
    """The VAR transformer; depth derives the rest."""

    family: Literal["var"] = "var"
    """Model family."""
    width_per_depth: Count = 64
    """Transformer width = width_per_depth · depth."""
    head_dim: Count = 64
    """Channels of an attention head, at least: a size has as many heads as divide its width and leave each that many
    (64, the paper's, with width 64 · depth makes heads = depth)."""
    mlp_ratio: Positive = 4.0
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


# ------------------------------------------------------------------------------------------ grid and evaluation


class Variant(Section):
    """Further cells of a study: chosen points, with settings changed, in addition to the grid."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    """Short name shown beside its cells."""
    depths: tuple[Count, ...]
    """Depths of its cells."""
    budgets: tuple[Positive, ...]
    """Training FLOPs of its cells."""
    seeds: tuple[Seed, ...] = (0,)
    """Seeds of its cells."""
    settings: dict[str, Any] = {}
    """Dotted fields of `model` and `optim` changed for them, such as optim.lr: 0.002."""


class GridConfig(Section):
    """The cells: depth × training FLOPs × seeds, plus variants."""

    depths: Annotated[tuple[Count, ...], Field(min_length=1)]
    """Transformer blocks of each size."""
    budgets: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Training FLOPs of a cell: 3 × the dense forward pass × images."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """Seeds; each is a trunk of its own."""
    min_steps: Count = 200
    """A cell of fewer steps is an error."""
    variants: tuple[Variant, ...] = ()
    """Further cells: seeds for the noise, learning rates at the corners."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for field in ("depths", "budgets", "seeds"):
            values = getattr(self, field)
            if len(set(values)) != len(values):
                raise ValueError(f"{field}: repeated values in {list(values)}")
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise ValueError(f"variants: repeated names in {names}")
        return self


class EvaluationConfig(Section):
    """How cells are measured and shown."""

    batch_size: Count = 256
    """Images a batch on the validation set."""
    samples_per_class: CountOrZero = 4
    """Sampled images a class in the sample grid; 0: none."""
    sample_classes: Count = 8
    """Classes shown in the sample grid, at most."""
    guidance: NonNegative = 1.5
    """Classifier-free guidance of the last scale, ramped up from 0."""
    top_k: CountOrZero = 0
    """Sample among the k likeliest tokens; 0: all."""
    top_p: Fraction = 0.0
    """Sample among the likeliest tokens that hold this probability; 0: all."""


class RuntimeConfig(Section):
    """How runs use the machine. `auto` is measured once for a whole sweep and stored with it."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the transformers' matrix products."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the transformer block."""
    threads: CountOrZero = 0
    """CPU threads a worker; 0: processors / workers."""
    tokenizer_threads: CountOrZero = 0
    """CPU threads of the tokenizer's run and of encoding, which have the machine to themselves; 0: all processors."""
    workers: CountOrZero = 0
    """Runs at once; 0: one a GPU, or one a processor without GPUs."""
    log_every_steps: Count = 20
    """Steps between points of the training curves."""
    checkpoint_seconds: Positive = 60.0
    """Time between checkpoints that an interrupted run goes on from."""
    retries: CountOrZero = 2
    """Times a crashed run is tried again."""


class Experiment(Section):
    """Everything that a study is: data, tokenizer, model family, optimisation, grid, evaluation."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the study and of its folder under runs/."""
    data: DataConfig
    """Images."""
    tokenizer: TokenizerConfig
    """Multi-scale VQ-VAE."""
    model: ModelConfig
    """Transformer."""
    optim: OptimConfig
    """Optimisation of the transformer."""
    grid: GridConfig
    """Cells of the sweep."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Measurement."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Use of the machine."""
    by_depth: dict[Annotated[int, Field(ge=1)], dict[str, Any]] = {}
    """Dotted fields of `model`, `optim` that a single run of that depth changes (the reference's recipe varies with
    depth); grids ignore it, so that all sizes of a law share one recipe."""

    def with_variants_in_grid(self) -> Self:
        """The study without cells of variants at depths that the grid has not."""
        kept = tuple(
            variant.model_copy(update={"depths": tuple(d for d in variant.depths if d in self.grid.depths)})
            for variant in self.grid.variants
        )
        return self.model_copy(update={"grid": self.grid.model_copy(update={"variants": kept})})

    @model_validator(mode="after")
    def _check(self) -> Self:
        downsampling = 2 ** (len(self.tokenizer.channel_multipliers) - 1)
        if self.tokenizer.latent_size * downsampling != self.data.image_size:
            raise ValueError(
                f"tokenizer.patch_nums: ends at {self.tokenizer.latent_size}, but {self.data.image_size} px over "
                f"{downsampling} (channel_multipliers has {len(self.tokenizer.channel_multipliers)} entries) "
                f"is {self.data.image_size / downsampling:g}"
            )
        if self.tokenizer.training.adversarial_weight > 0 and self.data.image_size < SMALLEST_ADVERSARIAL_IMAGE:
            raise ValueError(
                f"tokenizer.training.adversarial_weight: the discriminator needs images of at least "
                f"{SMALLEST_ADVERSARIAL_IMAGE} px, not {self.data.image_size}: set it to 0"
            )
        return self
