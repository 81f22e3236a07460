"""What a study costs: the arithmetic of tokenizer, tokens, trunks, branches and evaluations, and disk. Pure; no torch.

FLOPs are counted as budgets are, 2 × multiply-adds with all pairs of tokens. What LPIPS and the discriminator of a
tokenizer's training add is not counted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from varscale.config import Experiment
from varscale.data.tokens.manifest import RowType
from varscale.evaluation.plan import INCEPTION, RINGS_CLASSIFIER, RINGS_TRAINING
from varscale.tokenizer.shape import TokenizerShape
from varscale.training.cells import Cell, Trunk

Arithmetic = Literal["float32", "tf32", "bfloat16"]

INCEPTION_FLOPS = 11_426_432_192
"""Of one image: torchvision's inception_v3 at 299 × 299, counted by `torch.utils.flop_counter`."""


class Work(NamedTuple):
    """Arithmetic of one network."""

    network: Literal["model", "tokenizer", "extractor"]
    size: int
    """Training FLOPs of one image of that network: what measured speeds go by; 0 of an extractor."""
    flops: float
    executed: float
    """The same without pairs of tokens that the mask hides: what utilisation refers to."""
    arithmetic: Arithmetic
    """Of its products on a GPU; convolutions of float32 are TF32 there."""
    trains: bool = False
    """Whether these are whole training steps, which are what is measured."""
    block_calls: int = 0
    """How often a block is called to draw images, each time with few tokens: what that takes beside the arithmetic."""


@dataclass(frozen=True)
class SizeCosts:
    """One size's trunk and branches, or what is left of them."""

    trunk: Trunk
    cells: tuple[Cell, ...]
    """Those whose branches are trained."""
    trunk_images: int
    """Images that the trunk trains on."""

    @property
    def branch_images(self) -> int:
        """Images of all branches together."""
        return sum(cell.decay_images for cell in self.cells)

    @property
    def all_images(self) -> int:
        """Images of trunk and branches."""
        return self.trunk_images + self.branch_images

    @property
    def milestones(self) -> tuple[int, ...]:
        """Images after which branches leave the trunk."""
        return tuple(sorted({cell.branch_images for cell in self.cells}))

    @property
    def bytes(self) -> int:
        """Checkpoints where branches leave the trunk, and each cell's weights."""
        model = self.trunk.model
        return len(self.milestones) * model.checkpoint_bytes() + len(self.cells) * model.weights_bytes()


@dataclass(frozen=True)
class StudyCosts:
    """A study's work, part by part, or what is left of it."""

    sizes: tuple[SizeCosts, ...]
    tokenizer: tuple[Work, ...]
    encoding: tuple[Work, ...]
    evaluations: tuple[Work, ...]

    @property
    def trunks(self) -> tuple[Work, ...]:
        """Of all sizes."""
        return tuple(training_work(size.trunk, size.trunk_images) for size in self.sizes)

    @property
    def branches(self) -> tuple[Work, ...]:
        """Of all sizes."""
        return tuple(training_work(size.trunk, size.branch_images) for size in self.sizes)

    @property
    def separate(self) -> tuple[Work, ...]:
        """What the cells would take if each was trained from its start to its end."""
        return tuple(training_work(size.trunk, sum(cell.images for cell in size.cells)) for size in self.sizes)

    @property
    def all(self) -> tuple[Work, ...]:
        """Everything that is done."""
        return (*self.tokenizer, *self.encoding, *self.trunks, *self.branches, *self.evaluations)

    @property
    def chains(self) -> list[tuple[Work, ...]]:
        """Of each size what can't go on side by side: its trunk, and its longest branch."""
        return [
            (
                training_work(size.trunk, size.trunk_images),
                training_work(size.trunk, max(cell.decay_images for cell in size.cells)),
            )
            for size in self.sizes
        ]


def study_costs(experiment: Experiment, cells: Sequence[Cell], *, validation: int, encoded: int) -> StudyCosts:
    """All of a study's work.

    Each cell is measured on `validation` images; `encoded` views of training images, and validation images, become
    tokens.
    """
    guidances = experiment.evaluation.fidelity.drawings if experiment.evaluation.fidelity else ()
    drawn = [(cell, guidance) for guidance in guidances for cell in cells]
    return StudyCosts(
        size_costs(cells),
        tokenizer_work(experiment),
        encoding_work(experiment, encoded),
        (*validation_work(cells, validation), *fidelity_work(experiment, drawn, floors=True)),
    )


def size_costs(cells: Iterable[Cell]) -> tuple[SizeCosts, ...]:
    """Each trunk of the cells, with their branches."""
    grouped: dict[str, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(cell.trunk.label, []).append(cell)
    return tuple(
        SizeCosts(group[0].trunk, tuple(group), max(cell.branch_images for cell in group)) for group in grouped.values()
    )


def training_work(trunk: Trunk, images: int) -> Work:
    """So many images, trained on."""
    model, size = trunk.model, trunk.flops_per_image
    executed = images * model.executed_training_flops()
    return Work("model", size, images * size, executed, trunk.experiment.optim.precision, trains=True)


def tokenizer_work(experiment: Experiment) -> tuple[Work, ...]:
    """The tokenizer's training; nothing where it is read from a file."""
    if experiment.tokenizer.checkpoint is not None:
        return ()
    size = TokenizerShape(experiment.tokenizer.architecture).training_flops()
    flops = size * experiment.tokenizer.training.total_images
    return (Work("tokenizer", size, flops, flops, "tf32", trains=True),)


def encoding_work(experiment: Experiment, images: int) -> tuple[Work, ...]:
    """So many images, or views of images, encoded into tokens."""
    return (_tokenizer_passes(experiment, images, encoded=True, arithmetic="tf32"),)


def stored_bytes(experiment: Experiment) -> int:
    """Of one view of an image in the stores that its models read."""
    tokenizer = experiment.tokenizer
    return RowType.of(
        tokenizer.patch_nums,
        vocab_size=tokenizer.vocab_size,
        num_classes=experiment.data.num_classes,
        latent_channels=tokenizer.latent_channels if experiment.model.description.reads == "latents" else None,
    ).bytes


def validation_work(cells: Iterable[Cell], images: int) -> list[Work]:
    """One pass of each cell over so many validation images, and the cell's grid of samples."""
    found = []
    for cell in cells:
        model, experiment = cell.trunk.model, cell.trunk.experiment
        evaluation, precision = experiment.evaluation, experiment.optim.precision
        passed = images * model.forward_flops(), images * model.executed_forward_flops()
        shown = evaluation.samples_per_class * min(evaluation.sample_classes, model.num_classes)
        found.append(Work("model", cell.trunk.flops_per_image, *passed, precision))
        found += _drawing(cell, shown, evaluation.guidance, max(1, shown))
    return found


def fidelity_work(experiment: Experiment, drawn: Sequence[tuple[Cell, float]], *, floors: bool) -> list[Work]:
    """What `evaluation.fidelity` draws of cells, each at a guidance, and passes through the extractor; and the floors.

    All of the reference is counted where its number is stated. The extractor is in it where its FLOPs are known.
    """
    settings = experiment.evaluation.fidelity
    if settings is None or not (drawn or floors):
        return []
    works = [
        work for cell, guidance in drawn for work in _drawing(cell, settings.samples, guidance, settings.batch_size)
    ]
    seen, image = len(drawn) * settings.samples, extractor_flops(experiment) or 0
    if floors:
        works.append(_tokenizer_passes(experiment, settings.samples, encoded=True, decoded=True, arithmetic="tf32"))
        seen += 2 * settings.samples + (settings.reference_images or 0)
    return [*works, Work("extractor", 0, seen * image, seen * image, "tf32")]


def extractor_flops(experiment: Experiment) -> int | None:
    """Of one image through the extractor of `evaluation.fidelity`; None where that is not known here."""
    settings, data = experiment.evaluation.fidelity, experiment.data
    if settings is None:
        return 0
    name = settings.extractor or (RINGS_CLASSIFIER if data.kind == "rings" else INCEPTION)
    if name == RINGS_CLASSIFIER:  # three convolutions, each halving the side; its training takes seconds
        width, side = int(RINGS_TRAINING["width"]), data.image_size
        sides = [side := -(-side // 2) for _ in range(3)]
        products = 3 * 25 * width, width * 9 * 2 * width, 2 * width * 9 * 2 * width
        layers = sum(each * side**2 for each, side in zip(products, sides, strict=True))
        whitening = 5 * width * int(RINGS_TRAINING["features"])
        return 2 * (layers + whitening + 2 * width * data.num_classes)
    return INCEPTION_FLOPS if name == INCEPTION else None


def _drawing(cell: Cell, images: int, guidance: float, at_once: int) -> list[Work]:
    """Images drawn of a cell, so many at once, and decoded; on a GPU in bfloat16."""
    model = cell.trunk.model
    flops, batches = images * model.sampling_flops(guidance=guidance > 0), -(-images // at_once)
    calls = batches * model.sampling_calls()
    drawing = Work("model", cell.trunk.flops_per_image, flops, flops, "bfloat16", block_calls=calls)
    return [drawing, _tokenizer_passes(cell.trunk.experiment, images, decoded=True, arithmetic="bfloat16")]


def _tokenizer_passes(
    experiment: Experiment, images: int, *, encoded: bool = False, decoded: bool = False, arithmetic: Arithmetic
) -> Work:
    shape = TokenizerShape(experiment.tokenizer.architecture)
    flops = images * (encoded * shape.encode_flops() + decoded * shape.decode_flops())
    return Work("tokenizer", shape.training_flops(), flops, flops, arithmetic)
