"""What the parts of an experiment are made of, and the parts that every experiment has in the same form.

Every value has an upper bound, far above what the largest study of the next ten years needs, so that a slip of the
keyboard is an error and not a machine out of memory.
"""

import math
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of an experiment: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _whole(value: Any) -> Any:
    """1e6 is a count, too; strict integers leave out all floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# strict: neither booleans nor text are numbers
Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Truth = Annotated[bool, Field(strict=True)]

Fraction = Annotated[Real, Field(ge=0, le=1)]
Decay = Annotated[Real, Field(ge=0, lt=1)]
Positive = Annotated[Real, Field(gt=0, le=1e30)]
NonNegative = Annotated[Real, Field(ge=0, le=1e30)]
Side = Annotated[Whole, Field(ge=1, le=8192)]
"""Pixels, or tokens, along one side of a square."""
Channels = Annotated[Whole, Field(ge=1, le=2**14)]
Few = Annotated[Whole, Field(ge=1, le=1024)]
"""Parts of a model, or other things that are counted on fingers."""
BatchSize = Annotated[Whole, Field(ge=1, le=2**24)]
BatchSizeOrZero = Annotated[Whole, Field(ge=0, le=2**24)]
Classes = Annotated[Whole, Field(ge=1, le=2**24)]
Codes = Annotated[Whole, Field(ge=2, le=2**24)]
Images = Annotated[Whole, Field(ge=1, le=2**40)]
ImagesOrZero = Annotated[Whole, Field(ge=0, le=2**40)]
Steps = Annotated[Whole, Field(ge=1, le=2**40)]
Processes = Annotated[Whole, Field(ge=0, le=4096)]
"""Processes or threads; 0: as many as suit the machine."""
Seed = Annotated[Whole, Field(ge=0, lt=2**31)]

PathText = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
"""Path of a file or folder."""
Name = Annotated[str, Field(min_length=1, max_length=200)]
"""A short text."""
Quantizer = Literal["codebook", "bitwise"]
Parametrization = Literal["paper", "mup", "complete-p"]
PARAMETRIZATIONS: tuple[Parametrization, ...] = get_args(Parametrization)


def _different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise ValueError(f"repeated values in {list(values)}")
    return values


Different = AfterValidator(_different)
"""Of the values of a list, none stands there twice."""
Changes = dict[Name, Any]
"""Dotted fields and what they become; they are checked where they are applied."""


class OptimConfig(Section):
    """How the transformers are trained: AdamW with a schedule of images seen."""

    lr: Positive = 1e-4
    """Base learning rate: the rate at `lr_batch_size` images a step; used: lr · batch_size / lr_batch_size, unless
    `lr_batch_rule` or `lr_horizon` say otherwise."""
    lr_batch_size: BatchSize = 256
    """Batch size that `lr` refers to."""
    # the three below stay out of what is written, and so out of fingerprints, where nothing is said of them
    lr_batch_rule: Annotated[Literal["linear", "sqrt"], Field(exclude_if=lambda value: value == "linear")] = "linear"
    """How the rate follows the batch: as batch_size / lr_batch_size, or as its square root."""
    lr_horizon: Annotated[Images | None, Field(exclude_if=lambda value: value is None)] = None
    """Images T0 of the run that `lr` was found with: the rate is also times (T0 / T)^lr_horizon_exponent, where T is
    the images of the size's run of the smallest budget (all its budgets share a trunk, and so a rate). None: lengths
    don't matter."""
    lr_horizon_exponent: Annotated[Fraction, Field(exclude_if=lambda value: value == 0.3)] = 0.3
    """How the rate follows the length of a run."""
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
    schedule: Literal["wsd", "cosine", "linear"] = "wsd"
    """`wsd`: warm-up, stable, decay. `cosine`: warm-up, then half a cosine to the end, so that budgets of a size share
    no more than the warm-up. `linear`: warm-up, 5% constant, linear to the end (the reference; single runs only)."""
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
        """The learning rate that is used, whatever the length of a run."""
        if self.lr_batch_rule == "sqrt":
            return self.lr * math.sqrt(self.batch_size / self.lr_batch_size)
        return self.lr * self.batch_size / self.lr_batch_size

    def horizon_factor(self, images: int) -> float:
        """On that rate, where the run of the smallest budget has so many images."""
        return 1.0 if self.lr_horizon is None else (self.lr_horizon / max(images, 1)) ** self.lr_horizon_exponent


# a variant may be left without depths, where the grid has none of its own
Depths = Annotated[tuple[Few, ...], Field(max_length=1024)]
Budgets = Annotated[tuple[Positive, ...], Field(max_length=1024)]
Seeds = Annotated[tuple[Seed, ...], Field(max_length=1024)]


MOST_CELLS = 100_000
"""Of a study."""


class Variant(Section):
    """Further cells of a study: chosen points, with settings changed, in addition to the grid."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=100)]
    """Short name shown beside its cells."""
    depths: Depths
    """Depths of its cells."""
    budgets: Budgets
    """Training FLOPs of its cells."""
    seeds: Seeds = (0,)
    """Seeds of its cells."""
    settings: Changes = Field(default_factory=dict, max_length=100)
    """Dotted fields of `model` and `optim` changed for them, such as optim.lr: 0.002."""


class GridConfig(Section):
    """The cells: depth × training FLOPs × seeds, plus variants."""

    depths: Annotated[Depths, Field(min_length=1), Different]
    """Transformer blocks of each size."""
    budgets: Annotated[Budgets, Field(min_length=1), Different]
    """Training FLOPs of a cell: 3 × the dense forward pass × images."""
    seeds: Annotated[Seeds, Field(min_length=1), Different] = (0,)
    """Seeds; each is a trunk of its own."""
    min_steps: Steps = 200
    """A cell of fewer steps is an error."""
    variants: Annotated[tuple[Variant, ...], Field(max_length=1024)] = ()
    """Further cells: seeds for the noise, learning rates at the corners."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise ValueError(f"variants: repeated values in {names}")
        parts: tuple[GridConfig | Variant, ...] = (self, *self.variants)
        cells = sum(len(part.depths) * len(part.budgets) * len(part.seeds) for part in parts)
        if cells > MOST_CELLS:
            raise ValueError(f"budgets: {cells} cells, with all depths, seeds and variants; at most {MOST_CELLS}")
        return self


def _several(value: Any) -> Any:
    """One number stands for a list of it alone."""
    return value if isinstance(value, list | tuple) else (value,)


Guidance = Annotated[Real, Field(ge=0, le=1e6)]
Guidances = Annotated[tuple[Guidance, ...], Field(min_length=1, max_length=1024), Different, BeforeValidator(_several)]

Candidate = Annotated[Whole, Field(ge=1, le=256)]
Candidates = Annotated[tuple[Candidate, ...], Field(min_length=1, max_length=16), Different, BeforeValidator(_several)]

FeatureExtractor = Literal[
    "inception-v3-compat",
    "rings-classifier",
    "vgg16",
    "clip-rn50",
    "clip-rn101",
    "clip-rn50x4",
    "clip-rn50x16",
    "clip-rn50x64",
    "clip-vit-b-32",
    "clip-vit-b-16",
    "clip-vit-l-14",
    "clip-vit-l-14-336px",
    "dinov2-vit-s-14",
    "dinov2-vit-b-14",
    "dinov2-vit-l-14",
    "dinov2-vit-g-14",
]


GuidanceSchedule = Literal["ramp", "constant"]
"""Guidance grows linearly from 0 at the first scale (the reference), or is the same at all scales."""


class FidelityConfig(Section):
    """How far a cell's images are from real ones: FID, MIND, KID, precision and recall."""

    samples: Annotated[Whole, Field(ge=100, le=2**24)] = 2048
    """Images drawn of each cell; fewer than 2,048 warn, and no two numbers of images are comparable."""
    extractor: FeatureExtractor | None = None
    """What makes features of images: a network of torch-fidelity's, or a small classifier trained on rings. None: the
    latter for rings, otherwise Inception."""
    weights: PathText | None = None
    """File of the extractor's weights; None: torch-fidelity downloads them."""
    reference: Literal["train", "validation"] = "train"
    """Real images that the drawn ones are compared with; the floors take the others."""
    reference_images: Annotated[Whole, Field(ge=100, le=2**24)] | None = 10_000
    """How many of them, spread evenly; None: all (procedural images: a number is needed)."""
    guidance: Guidances = (0.0,)
    """Classifier-free guidance of the last scale: one number, or a list of those at which each cell is measured, the
    first of which is in a cell's own row of the runs table. At 0 images are of the distribution that was learnt, as the
    loss is."""
    guidance_schedule: GuidanceSchedule = "ramp"
    """`ramp`: guidance grows from 0 at the first scale, as in the reference; `constant`: it is the same at all."""
    top_k: Annotated[Whole, Field(ge=0, le=2**24)] = 0
    """Sample among the k likeliest tokens; 0: all."""
    top_p: Fraction = 0.0
    """Sample among the likeliest tokens that hold this probability; 0: all."""
    seed: Seed = 0
    """Of the drawn images' noise."""
    candidates: Candidates = (1,)
    """Images drawn for each that is measured: of more than one, the one that `classifier` finds likeliest of its class
    (rejection sampling). One number, or a list of which each is measured: `[1, 4]` is without and with."""
    classifier: Name | None = None
    """What tells classes apart: a model of torchvision's by its name, such as resnet101, or `rings-classifier`. None:
    the latter for rings; otherwise `classifier_weights` is a whole model in TorchScript."""
    classifier_weights: PathText | None = None
    """File of the classifier's weights."""
    bootstrap_draws: Annotated[Whole, Field(ge=2, le=100_000)] = 50
    """Times that images are drawn anew for the intervals."""
    batch_size: BatchSize = 64
    """Images drawn, and passed through the extractor, at once."""

    @property
    def drawings(self) -> tuple[float, ...]:
        """The guidance of each time that a cell's images are drawn, candidates counted."""
        return self.guidance * sum(self.candidates)


class EvaluationConfig(Section):
    """How cells are measured and shown."""

    batch_size: BatchSize = 256
    """Images a batch on the validation set."""
    samples_per_class: Annotated[Whole, Field(ge=0, le=2**16)] = 4
    """Sampled images a class in the sample grid; 0: none."""
    sample_classes: Classes = 8
    """Classes shown in the sample grid, at most."""
    guidance: Guidance = 1.5
    """Classifier-free guidance of the last scale, ramped up from 0."""
    top_k: Annotated[Whole, Field(ge=0, le=2**24)] = 0
    """Sample among the k likeliest tokens; 0: all."""
    top_p: Fraction = 0.0
    """Sample among the likeliest tokens that hold this probability; 0: all."""
    fidelity: FidelityConfig | None = None
    """FID and its like of every cell, measured by jobs of their own; None: not measured."""


class RunResources(Section):
    """What one run takes of a machine or a cluster."""

    devices: Annotated[Whole, Field(ge=1, le=1024)] = 1
    """GPUs of each node, or processes where there are no GPUs, which share the images of a step."""
    nodes: Annotated[Whole, Field(ge=1, le=4096)] = 1
    """Nodes of a cluster."""
    sharded: Truth = False
    """Whether the devices divide weights and moments among them (FSDP2), for models that don't fit into one; otherwise
    each has them all (DDP)."""
    hours: Positive | None = None
    """Time limit of a run on a cluster; None: the site's, or as the plan says."""

    @property
    def processes(self) -> int:
        """All devices."""
        return self.devices * self.nodes


class ResourcesConfig(RunResources):
    """What the trunk and the branches of each size take. It changes how sums are rounded, and nothing else."""

    by_parameters: dict[Annotated[float, Field(gt=0, le=1e30)], RunResources] = Field(
        default_factory=dict, max_length=1024
    )
    """For models of at least so many parameters, instead: `1e9: {devices: 8, sharded: true}`."""

    def of(self, parameters: int) -> RunResources:
        """Those of a model."""
        reached = [least for least in self.by_parameters if least <= parameters]
        return (
            self.by_parameters[max(reached)] if reached else RunResources(**self.model_dump(exclude={"by_parameters"}))
        )


class RuntimeConfig(Section):
    """How runs use the machine. `auto` is measured once for a whole sweep and stored with it."""

    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the transformer block."""
    micro_batch: BatchSizeOrZero = 0
    """Images that pass through the transformer at once: a step of more goes in parts, whose gradients are added up.
    0: of each size, as many as fit into the device's memory."""
    threads: Processes = 0
    """CPU threads a worker; 0: processors / workers."""
    tokenizer_threads: Processes = 0
    """CPU threads of the tokenizer's run and of encoding, which have the machine to themselves; 0: all processors."""
    workers: Processes = 0
    """Runs at once; 0: one a GPU, or one a processor without GPUs."""
    log_every_steps: Steps = 20
    """Steps between points of the training curves."""
    checkpoint_seconds: Annotated[Real, Field(gt=0, le=1e9)] = 60.0
    """Time between checkpoints that an interrupted run goes on from."""
    retries: Annotated[Whole, Field(ge=0, le=1000)] = 2
    """Times a crashed run is tried again."""
