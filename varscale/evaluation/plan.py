"""What an evaluation of images is told apart by: what is measured, how, and against which images. Without torch.

Figures that differ in any of it (extractor and its weights, reference, number of images, guidance and other choices of
drawing) are never mixed, so all of it is in an evaluation's fingerprint, and beside its figures in the runs table.
"""

import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from varscale.config import DataSection, Experiment
from varscale.config.section import FidelityConfig
from varscale.errors import CheckpointError, ExperimentError
from varscale.store.fingerprint import file_digest, fingerprint
from varscale.store.layout import RunFiles, RunKey

EVALUATOR = "fidelity-2"
"""Raised when code changes the figures by more than rounding."""
INCEPTION, RINGS_CLASSIFIER = "inception-v3-compat", "rings-classifier"
RINGS_TRAINING = {"images": 12_800, "batch_size": 64, "lr": 2e-3, "width": 32, "features": 32, "seed": 0}
"""Of the classifier of rings: part of its identity."""
ALL_KEPT = "all"
"""Said of images that no classifier chose."""
USUAL = {"guidance_schedule": "ramp", "images_kept": ALL_KEPT}
"""Columns of what can be chosen since there are evaluations: what is usual is no part of their identity."""
_LAST_LAYERS = {INCEPTION: b"Mixed_7c.branch_pool.conv.weight", "vgg16": b"classifier.6.weight"}
"""Of extractors whose files are looked at beforehand: the name of a tensor that these hold."""
FEWEST_IMAGES, FEW_IMAGES = 100, 2048
"""Fewer are refused; fewer give a warning."""

Subject = Literal["cell", "real", "reconstructed"]
"""What is measured: a cell's images, real ones (the floor of any model), or these as the tokenizer reconstructs them
(the floor of models on this tokenizer)."""


@dataclass(frozen=True)
class FidelityPlan:
    """How the images of a study are measured, and against which."""

    settings: FidelityConfig
    extractor: str
    """Name of the extractor, and hash of its weights or of what they follow from."""
    reference: str
    """Split and number of the reference's images, and a hash of what they are."""
    floor: str
    """The same of the real images whose own distance to the reference is the floor."""
    classifier: str = ""
    """What chooses among candidates, by name and hash; nothing where there is one candidate an image."""

    @classmethod
    def of(cls, experiment: Experiment) -> "FidelityPlan | None":
        """Of an experiment; None where it asks for none.

        Raises:
            ExperimentError: The extractor can't measure these images, or the reference has fewer than it should.
            CheckpointError: The file of weights is missing.
            DataError: Images are missing or malformed.
        """
        settings, data = experiment.evaluation.fidelity, experiment.data
        if settings is None:
            return None
        if data.procedural and settings.reference_images is None:
            raise ExperimentError(
                "evaluation.fidelity.reference_images: procedural images need a number, such as 10000"
            )
        reference = _images(data, settings.reference, settings.reference_images)
        floor = _images(data, other(settings.reference), settings.samples)
        classifier = ""
        if max(settings.candidates) > 1:
            place = "evaluation.fidelity.classifier"
            classifier = classifier_identity(settings.classifier, settings.classifier_weights, data, place)
        return cls(settings, _extractor(settings, data), reference, floor, classifier)

    @property
    def has_floors(self) -> bool:
        """Whether there are as many real images for the floors as are drawn of a cell; others would not compare."""
        return number_of(self.floor) == self.settings.samples

    @property
    def extractor_name(self) -> str:
        """The extractor's name alone."""
        return self.extractor.partition(":")[0]

    @property
    def guidance(self) -> float:
        """At which a cell's images are drawn; of several the first."""
        return self.settings.guidance[0]

    @property
    def candidates(self) -> int:
        """Images drawn for each that is measured; of several numbers the first."""
        return self.settings.candidates[0]

    @property
    def images_kept(self) -> str:
        """Which of the drawn images are measured, in words."""
        return f"1 of {self.candidates} by {self.classifier}" if self.candidates > 1 else ALL_KEPT

    @property
    def how(self) -> str:
        """How a cell's images are drawn, for people."""
        schedule = " at all scales" if self.settings.guidance_schedule == "constant" else ""
        kept = f" · 1 of {self.candidates} kept" if self.candidates > 1 else ""
        return f"guidance {self.guidance:g}{schedule}{kept}"

    def one_by_one(self) -> "tuple[FidelityPlan, ...]":
        """One plan for each guidance and number of candidates: an evaluation is at one."""
        return tuple(
            replace(self, settings=self.settings.model_copy(update={"guidance": (guidance,), "candidates": (count,)}))
            for guidance in self.settings.guidance
            for count in self.settings.candidates
        )

    def key(self, subject: Subject, run: RunFiles | None) -> RunKey:
        """Identity of an evaluation, `run` being the cell or the tokenizer; None for real images."""
        of, how = run.fingerprint if run else "", self.columns()
        measured = {name: how.pop(name) for name in ("evaluator", "extractor", "reference_set")}
        how = {name: value for name, value in how.items() if USUAL.get(name) != value}
        images = how if subject == "cell" else {"images": self.floor}
        draws = self.settings.bootstrap_draws
        identity = fingerprint(kind="evaluation", subject=subject, of=of, draws=draws, **measured, **images)
        name = run.folder.name.removesuffix(f"-{of}") if run else self.floor.rpartition("-")[0]
        drawn = f"g{self.guidance:g}" + (f"-1of{self.candidates}" if self.candidates > 1 else "")
        return RunKey("evaluations", f"{name}-{drawn if subject == 'cell' else subject}", identity)

    def reference_key(self) -> RunKey:
        """Identity of the reference's features."""
        identity = fingerprint(kind="features", reference=self.reference, extractor=self.extractor)
        return RunKey("evaluations", f"reference-{self.reference.rpartition('-')[0]}", identity)

    def columns(self) -> dict[str, Any]:
        """What the runs table says beside a cell's figures: two that differ in any of it don't compare."""
        return {
            "evaluator": EVALUATOR,
            "extractor": self.extractor,
            "reference_set": self.reference,
            "samples": self.settings.samples,
            "guidance": self.guidance,
            "guidance_schedule": self.settings.guidance_schedule,
            "top_k": self.settings.top_k,
            "top_p": self.settings.top_p,
            "sampling_seed": self.settings.seed,
            "images_kept": self.images_kept,
        }


def number_of(images: str) -> int:
    """How many images `FidelityPlan.reference` or `.floor` are."""
    return int(images.split("-")[1])


def other(split: Literal["train", "validation"]) -> Literal["train", "validation"]:
    """The split that the reference is not of."""
    return "validation" if split == "train" else "train"


def as_stored(data: DataSection) -> DataSection:
    """The same images neither enlarged, cropped at random nor flipped: what FID is counted against in papers."""
    return data.model_copy(update={"views": 1, "resize_ratio": 1.0, "horizontal_flip": False})


def rings_identity(data: DataSection) -> str:
    """Identity of the classifier of an experiment's rings."""
    return f"{RINGS_CLASSIFIER}:{fingerprint(kind='extractor', data=described_images(data), **RINGS_TRAINING)}"


def classifier_identity(name: str | None, weights: str | None, data: DataSection | None, place: str) -> str:
    """Name and hash of what `varscale.generation.rejection.open_classifier` opens, which says what the arguments are.

    Raises:
        ExperimentError: No classifier follows from these.
        CheckpointError: The file can't be read.
    """
    own = data is not None and data.kind == "rings"
    if name == RINGS_CLASSIFIER or (name is None and weights is None and own):
        if data is None or not own or weights is not None:
            raise ExperimentError(
                f"{place}: {RINGS_CLASSIFIER} takes no weights, and images of a rings experiment alone"
            )
        return rings_identity(data)
    if weights is None:
        missing = "no classifier is named, and these images have none of their own" if name is None else "no weights"
        raise ExperimentError(f"{place}: {missing}; expected resnet101, say, and a file of its weights")
    try:
        digest, whole = file_digest(Path(weights)), _looks_like(Path(weights), "")
    except OSError as error:
        raise CheckpointError(f"{place}: {weights}: {error.strerror}; expected a file of weights") from None
    if not whole:
        raise CheckpointError(f"{place}: {weights}: not all of the file; expected a file of weights")
    return f"{name or Path(weights).stem}:{digest[:16]}"


def where_from(name: str) -> str:
    """Where an extractor's weights are found, and by which checksum they are told."""
    from torch_fidelity.feature_extractor_clip import MODEL_BASE_URL, MODEL_METADATA
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    if name == INCEPTION:
        return f"get {URL_INCEPTION_V3} (its SHA-256 begins with 6726825d) and name it by --weights"
    if name in MODEL_METADATA:
        url = f"{MODEL_BASE_URL}/{MODEL_METADATA[name]['hash']}/{MODEL_METADATA[name]['filename']}.pt"
        return f"get {url} (the hash in its address is its SHA-256) and name it by --weights"
    if name == "vgg16":
        return "get torchvision's vgg16-397923af.pth (its SHA-256 begins with 397923af) and name it by --weights"
    return "torch.hub gets it from facebookresearch/dinov2 where there is a network, and keeps it"


def _extractor(settings: FidelityConfig, data: DataSection) -> str:
    name = settings.extractor or (RINGS_CLASSIFIER if data.kind == "rings" else INCEPTION)
    if name == RINGS_CLASSIFIER:
        if data.kind != "rings" or settings.weights is not None:
            raise ExperimentError(f"evaluation.fidelity.extractor: {name} measures rings alone, and takes no weights")
        return rings_identity(data)
    if settings.weights is None:
        return f"{name}:as-downloaded"
    if name.startswith("dinov2"):
        raise CheckpointError(
            f"evaluation.fidelity.weights: torch-fidelity takes no file for {name}; {where_from(name)}"
        )
    path, place = Path(settings.weights), f"evaluation.fidelity.weights: {settings.weights}"
    try:
        digest, whole = file_digest(path), _looks_like(path, name)
    except OSError as error:
        raise CheckpointError(f"{place}: {error.strerror}; {where_from(name)}") from None
    if not whole:
        raise CheckpointError(f"{place}: not weights of {name}, or not all of the file; {where_from(name)}")
    return f"{name}:{digest[:16]}"


def _looks_like(path: Path, name: str) -> bool:
    """Whether a file can hold an extractor's weights, told without torch, before any cell is trained.

    PyTorch writes the tensors' names first, and since 1.6 a zip archive, whose directory comes last.
    """
    with path.open("rb") as file:
        head = file.read(1 << 20)
    archive = head.startswith(b"PK")
    return (not archive or zipfile.is_zipfile(path)) and _LAST_LAYERS.get(name, b"") in head


def _images(data: DataSection, split: Literal["train", "validation"], count: int | None) -> str:
    plain = as_stored(data)
    if data.procedural:
        content: object = described_images(plain)
    else:
        source = plain.open(split, None)
        content, count = source.fingerprint, min(count or len(source), len(source))
    return f"{split}-{count}-{fingerprint(kind='images', split=split, images=count, content=content)[:8]}"


def described_images(data: DataSection) -> dict[str, Any]:
    """What procedural images depend on, for fingerprints."""
    return data.model_dump(mode="json", exclude={"validation_images", "max_undecodable", "captions", *data.places})
