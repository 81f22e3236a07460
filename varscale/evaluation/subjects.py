"""One evaluation's run: its images, their features, the figures and the result file. The reference is passed once.

Letters: N images, b images of a batch, D features, s side of an image in pixels.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from varscale.config import DataSection
from varscale.data.loading import load_ahead
from varscale.data.sources.base import ImageSource
from varscale.data.tokens.captions import StoredCaptions
from varscale.data.transforms import to_model_range
from varscale.errors import CheckpointError
from varscale.evaluation.agreement import RingsAgreement, class_agreement, retrieval
from varscale.evaluation.extractors import Extractor, FeatureSet, open_extractor
from varscale.evaluation.fidelity import measure
from varscale.evaluation.pieces import Pieces, remove_pieces
from varscale.evaluation.plan import FidelityPlan, Subject, as_stored, number_of, other
from varscale.families.base import SamplingOptions
from varscale.families.storage import load_model
from varscale.generation.bulk import drawn_batches
from varscale.generation.rejection import Rejection, open_classifier
from varscale.numerics.device import best_device
from varscale.numerics.machine import device_name, versions
from varscale.store.fingerprint import fingerprint
from varscale.store.layout import RunFiles, Store, TokenFiles
from varscale.store.records import Result, RunIdentity, read_result
from varscale.store.weights import load_tensors, save_tensors, stored_metadata
from varscale.tokenizer.storage import load_tokenizer
from varscale.training.interruption import Report

_FEATURES = "features"
_CLASS_AGREEMENT = "class_agreement"
CEILING_IMAGES = 256
"""Validation images that say how well captions are found in real images and in reconstructions."""


@dataclass(frozen=True)
class Evaluated:
    """What is measured, and what that takes."""

    subject: Subject
    title: str
    """For people."""
    data: DataSection
    """The study's."""
    tokenizer: RunFiles
    """The study's."""
    cell: RunFiles | None = None
    """The cell, where one is measured."""
    latents: RunFiles | None = None
    """The study's stored latents, where its models read these and so are held to reconstructions from them."""
    captions: TokenFiles | None = None
    """The study's token stores, where a cell is told captions: it draws those of the validation images."""

    @property
    def of(self) -> dict[str, str]:
        """Whose images these are, under the runs table's name for it; nobody's where they are real."""
        if self.cell is not None:
            return {"fingerprint": self.cell.fingerprint}
        if self.subject == "real":
            return {}
        if self.latents is not None:
            return {"latents_fingerprint": self.latents.fingerprint}
        return {"tokenizer_fingerprint": self.tokenizer.fingerprint}

    @property
    def models(self) -> tuple[RunFiles, ...]:
        """Those that make the images."""
        if self.subject == "real":
            return ()
        return (self.tokenizer,) if self.cell is None else (self.tokenizer, self.cell)


def evaluate(plan: FidelityPlan, what: Evaluated, files: RunFiles, store: Store, report: Report) -> None:
    """Measure images, and write the result last.

    Raises:
        CheckpointError: Weights are missing, damaged, or of another kind.
        DataError: The images can't be measured.
    """
    with files.locked():
        if read_result(files) is not None:
            remove_pieces(files)
            return
        started, settings = time.time(), plan.settings
        RunIdentity(name=what.title, role="evaluation", params=_described(plan, what)).write(files.identity)
        extractor = open_extractor(plan, what.data, store)
        reference = reference_features(plan, extractor, what.data, store)
        pieces, seconds = _pieces(files, plan, *what.models), list[Tensor]()
        rejection, rings = _rejection(plan, what, store), _rings_agreement(what, settings.samples, store)
        batches = _timed(_batches(plan, what, rejection, pieces.images), seconds)
        batches = batches if rings is None else rings.watched(batches)
        beside = {"seconds": seconds}
        beside |= {} if rings is None else {"rings": rings.seen}
        beside |= {} if rejection is None else {"probabilities": rejection.probabilities}
        drawn = _measured(extractor, _reported(batches, pieces.images, settings.samples, report), pieces, beside)
        figures = measure(drawn, reference, draws=settings.bootstrap_draws)
        asked = _retrieval(plan, what, drawn, reference, extractor)
        asked |= _of_classes(plan, what, drawn, reference)
        asked |= _rings_figures(rings, plan, what) if rings is not None else {}
        of_drawing = {"seconds_an_image": float(torch.cat(seconds).quantile(0.5))} if what.subject == "cell" else {}
        of_drawing |= rejection.figures if rejection is not None else {}
        how = plan.columns() if what.subject == "cell" else {}
        Result(
            fingerprint=files.fingerprint,
            status="finished",
            time=time.time(),
            metrics={**figures, **asked, **of_drawing, "wall_seconds": time.time() - started},
            row={**_columns(what.subject, figures | asked), **what.of, **how},
            provenance={"device": device_name(), "threads": torch.get_num_threads(), **versions()},
        ).write(files.result)
        remove_pieces(files)


def reference_features(
    plan: FidelityPlan, extractor: Extractor, data: DataSection, store: Store, report: Report = lambda done, total: None
) -> FeatureSet:
    """Features of the reference's images: from the store, or made now and kept there for all evaluations."""
    files = store.run(plan.reference_key())
    with files.locked():
        try:
            tensors, _ = load_tensors(files.weights, _FEATURES, files.fingerprint)
            made = FeatureSet(tensors["features"], extractor.identity, int(tensors["image_size"]))
        except (CheckpointError, KeyError):
            images, pieces = number_of(plan.reference), _pieces(files, plan)
            real = _real(data, plan.settings.reference, images, plan.settings.batch_size, pieces.images)
            made = _measured(extractor, _reported(real, pieces.images, images, report), pieces, {})
            tensors = {"features": made.features_ND, "image_size": torch.tensor(made.image_size)}
            save_tensors(files.weights, tensors, {"kind": _FEATURES, "fingerprint": files.fingerprint})
        remove_pieces(files)
        return made


def _pieces(files: RunFiles, plan: FidelityPlan, *models: RunFiles) -> Pieces:
    """Of images that these models make. How many pass at once is rounding, but is to be the same in all pieces."""
    weights = [stored_metadata(each.weights)["checksum"] for each in models]
    batch_size = plan.settings.batch_size
    return Pieces(files, fingerprint(kind="pieces", of=files.fingerprint, batch_size=batch_size, weights=weights))


def _measured(
    extractor: Extractor, batches: Iterator[Tensor], pieces: Pieces, beside: Mapping[str, list[Tensor]]
) -> FeatureSet:
    """Features of the images in the pieces, and of those of the batches, which follow them and become pieces, too.

    `beside` are lists that get one more tensor with each batch: it is kept in the pieces, and read back from there.
    """
    if pieces.images:
        for name, found in beside.items():
            found.append(pieces.tensors()[name])
    for images_b3ss in batches:
        pieces.add({**extractor.measured(images_b3ss), **{name: found[-1] for name, found in beside.items()}})
    return extractor.feature_set(pieces.tensors())


def _rejection(plan: FidelityPlan, what: Evaluated, store: Store) -> Rejection | None:
    settings = plan.settings
    if what.subject != "cell" or plan.candidates == 1:
        return None
    place = "evaluation.fidelity.classifier"
    classifier = open_classifier(settings.classifier, settings.classifier_weights, what.data, store, place=place)
    return Rejection(classifier, plan.candidates)


def _batches(plan: FidelityPlan, what: Evaluated, rejection: Rejection | None, first: int) -> Iterator[Tensor]:
    """The images from `first` on."""
    settings, device = plan.settings, best_device()
    if what.subject != "cell":
        images = number_of(plan.floor)
        real = _real(what.data, other(settings.reference), images, settings.batch_size, first)
        return real if what.subject == "real" else _reconstructed(what, real)
    assert what.cell is not None
    tokenizer = load_tokenizer(what.tokenizer.weights, what.tokenizer.fingerprint).to(device)
    model = load_model(what.cell.weights, what.cell.fingerprint).to(device)
    labels_N = _told(what, settings.samples, model.config.num_classes).to(device)
    options = SamplingOptions(
        plan.guidance,
        settings.top_k,
        settings.top_p,
        settings.seed,
        guidance_schedule=settings.guidance_schedule,
    )
    if rejection is not None:
        rejection.check(model.config.num_classes, what.data.image_size, labels_N)
    how: dict[str, Any] = {"batch_size": settings.batch_size, "first": first, "rejection": rejection}
    return drawn_batches(model, tokenizer, labels_N, options, **how)


def _told(what: Evaluated, samples: int, classes: int) -> Tensor:
    """Labels (N,), as many of each class; or embeddings (N, D) of captions of validation images, spread evenly."""
    if what.captions is None:
        return torch.arange(samples) % classes
    captions = StoredCaptions.read_required(what.captions.validation)
    return captions.of_images(_spread(samples, len(captions.index_N)))


def _rings_agreement(what: Evaluated, samples: int, store: Store) -> RingsAgreement | None:
    """What counts the rings of a cell where captions are stored, also of one that is told classes beside these."""
    data = what.data
    if what.cell is None or not _rings_are_counted(data):
        return None
    if what.captions is None:
        return RingsAgreement(data, store, label_N=_told(what, samples, data.num_classes))
    assert data.validation_images is not None  # checked with the section
    return RingsAgreement(data, store, image_N=_spread(samples, data.validation_images))


def _rings_are_counted(data: DataSection) -> bool:
    return data.kind == "rings" and data.captions is not None


def _rings_figures(rings: RingsAgreement, plan: FidelityPlan, what: Evaluated) -> dict[str, float]:
    """Agreement of what was drawn; of real images, which is the counter's error; and of these as reconstructed."""
    count, batch_size = min(plan.settings.samples, len(rings.source)), plan.settings.batch_size
    real, again = (_real(what.data, "validation", count, batch_size) for _ in range(2))
    return rings.figures(real=real, reconstructed=_reconstructed(what, again))


def _of_classes(plan: FidelityPlan, what: Evaluated, drawn: FeatureSet, reference: FeatureSet) -> dict[str, float]:
    """In how many images the class that was asked for is seen; in real and reconstructed ones, their own."""
    split = plan.settings.reference
    if what.captions is not None or what.data.num_classes < 2 or _rings_are_counted(what.data):
        return {}
    if what.subject == "cell":
        label_N = _told(what, len(drawn.features_ND), what.data.num_classes)
    else:
        label_N = _labels(what.data, other(split), len(drawn.features_ND))
    real = reference.features_ND, _labels(what.data, split, len(reference.features_ND))
    share = class_agreement(drawn.features_ND, label_N, real)
    return {} if share is None else {_CLASS_AGREEMENT: share}


def _retrieval(
    plan: FidelityPlan, what: Evaluated, drawn: FeatureSet, reference: FeatureSet, extractor: Extractor
) -> dict[str, float]:
    """How often a drawn image's caption is found among others, by what real images' features say of theirs.

    Beside it the same of validation images, and of these as the tokenizer reconstructs them: no model on it is above.
    """
    if what.captions is None or what.cell is None or plan.settings.reference != "train":
        return {}
    train, validation = (StoredCaptions.read_required(path) for path in (what.captions.train, what.captions.validation))
    pairs = reference.features_ND, _of_real(train, what.data, len(reference.features_ND))
    figures = retrieval(drawn.features_ND, _told(what, len(drawn.features_ND), 0), pairs)
    if not figures:
        return {}
    count, batch_size = min(CEILING_IMAGES, len(validation.index_N)), plan.settings.batch_size
    told_ND = _of_real(validation, what.data, count)
    real, again = (_real(what.data, "validation", count, batch_size) for _ in range(2))
    for name, batches in (("real", real), ("reconstructed", _reconstructed(what, again))):
        found = retrieval(extractor.features(batches).features_ND, told_ND, pairs)
        figures |= {f"{key}_{name}": share for key, share in found.items() if key == "text_retrieval"}
    return figures


def _of_real(captions: StoredCaptions, data: DataSection, count: int) -> Tensor:
    """Embeddings (count, D) of the captions of the images that `_real` gives."""
    return captions.of_images(torch.arange(count) if data.procedural else _spread(count, len(captions.index_N)))


def _spread(count: int, number: int) -> Tensor:
    """Places of so many images, spread evenly over a set."""
    return torch.arange(count) * number // count


def _chosen(data: DataSection, split: Literal["train", "validation"], count: int) -> tuple[ImageSource, Tensor]:
    """A split's images, and places of `count` of them, evenly spread, so that data sorted by class stay balanced."""
    source = as_stored(data).open(split, count)
    return source, _spread(count, count if source.procedural else len(source))


def _labels(data: DataSection, split: Literal["train", "validation"], count: int) -> Tensor:
    source, chosen_N = _chosen(data, split, count)
    return torch.from_numpy(source.labels_of(chosen_N.numpy()))


def _real(
    data: DataSection, split: Literal["train", "validation"], count: int, batch_size: int, first: int = 0
) -> Iterator[Tensor]:
    """The chosen images of a split from `first` on."""
    source, chosen_N = _chosen(data, split, count)
    batches = (chosen_N[start : start + batch_size] for start in range(first, count, batch_size))
    loaded = load_ahead(lambda index_b: source.load_batch(index_b.numpy(), [0] * len(index_b))[0], batches, 1)
    return map(torch.from_numpy, loaded)


@torch.no_grad()
def _reconstructed(what: Evaluated, real: Iterator[Tensor]) -> Iterator[Tensor]:
    """Images that went through the tokenizer's tokens, or its latents, and back."""
    device = best_device()
    tokenizer = load_tokenizer(what.tokenizer.weights, what.tokenizer.fingerprint).to(device)
    for pixels_b3ss in real:
        images_b3ss = to_model_range(pixels_b3ss.numpy()).to(device)
        if what.latents is not None:
            images_b3ss = tokenizer.decode_features(tokenizer.features(images_b3ss))
        else:
            images_b3ss = tokenizer.decode(tokenizer.encode(images_b3ss))
        yield ((images_b3ss + 1) / 2).mul(255).round().to(torch.uint8)


def _timed(batches: Iterator[Tensor], seconds: list[Tensor]) -> Iterator[Tensor]:
    """The batches as they are; of each, `seconds` gets what an image took to make."""
    while True:
        started = time.perf_counter()
        images_b3ss = next(batches, None)
        if images_b3ss is None:
            return
        if images_b3ss.is_cuda:
            torch.cuda.synchronize()
        of_each = (time.perf_counter() - started) / len(images_b3ss)
        seconds.append(torch.tensor([of_each], dtype=torch.float64))
        yield images_b3ss


def _reported(batches: Iterator[Tensor], done: int, total: int, report: Report) -> Iterator[Tensor]:
    report(done, total)
    for images_b3ss in batches:
        yield images_b3ss
        done += len(images_b3ss)
        report(done, total)


def _described(plan: FidelityPlan, what: Evaluated) -> dict[str, Any]:
    described = {"subject": what.subject, "title": what.title, "of": next(iter(what.of.values()), "")}
    return {**described, "floor": plan.floor, **plan.columns(), "bootstrap_draws": plan.settings.bootstrap_draws}


def _columns(subject: Subject, figures: dict[str, float]) -> dict[str, float]:
    """Names of the runs table: `fid`; of real images `fid_floor`; of reconstructions `rfid`.

    Agreement is no distance that a floor bounds, and has the same names as where rings are counted.
    """
    if subject == "cell":
        return figures
    found = {}
    for name, value in figures.items():
        figure = next((end for end in ("_low", "_high") if name.endswith(end)), "")
        base = name.removesuffix(figure)
        if name == _CLASS_AGREEMENT:
            found[f"{name}_{subject}"] = value
        else:
            found[f"r{name}" if subject == "reconstructed" else f"{base}_floor{figure}"] = value
    return found
