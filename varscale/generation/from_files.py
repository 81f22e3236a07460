"""Models from files, and pictures of what they draw: a finished cell's, or any model's and its tokenizer's."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from varscale.config.captions import CaptionsSection
from varscale.data.captions import TextEncoder, open_encoder
from varscale.data.tokens.captions import StoredCaptions
from varscale.data.tokens.store import TokenStore
from varscale.errors import DataError, ExperimentError
from varscale.families.base import SamplingOptions
from varscale.families.models import FamilyModel, Sample
from varscale.families.storage import load_model
from varscale.generation.labels import NO_CLASS
from varscale.generation.pictures import save_pictures, scale_pictures
from varscale.generation.rejection import Rejection
from varscale.generation.sampling import sample_with
from varscale.numerics.device import best_device
from varscale.store.layout import RunFiles, TokenFiles
from varscale.store.records import CaptionsRecord, PlainName, Record, read_result
from varscale.store.weights import stored_metadata
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.tokenizer.storage import load_tokenizer


class _Job(Record):
    """What a cell's job.json says of its inputs."""

    tokens: PlainName


@dataclass(frozen=True)
class Drawable:
    """A model and its tokenizer on this machine's device."""

    place: Path
    """The cell's folder, or the model's file."""
    model: FamilyModel
    tokenizer: MultiScaleTokenizer
    model_checksum: str
    tokenizer_checksum: str
    class_names: tuple[str, ...] = ()
    """Name of each label, where a cell's training images had names."""
    captions: CaptionsRecord | None = None
    """What embeds the captions that a cell is told."""

    @classmethod
    def load(cls, place: Path, tokenizer_file: Path | None = None) -> "Drawable":
        """From a finished cell's folder, or from a model's .safetensors file and its tokenizer's.

        Raises:
            ExperimentError: The folder holds no finished cell, the cell diverged, or no tokenizer is named.
            CheckpointError: Weights are missing or damaged.
        """
        return DrawableFiles.find(place, tokenizer_file).load()

    def tokens(self, advice: str = "name a cell's folder") -> TokenFiles:
        """Files of the tokens that the model was trained on; without them an error ends in the advice.

        Raises:
            ExperimentError: It isn't known what these are.
        """
        job = _Job.read(RunFiles(self.place).job)
        if job is None:
            raise ExperimentError(f"{self.place}: no job.json that says what it was trained on; {advice}")
        return TokenFiles(self.place.resolve().parents[1] / "tokens" / job.tokens)

    def training_labels(self) -> NDArray[np.int64]:
        """How many training images each class has, (C,).

        Raises:
            ExperimentError: It isn't known what the model was trained on.
            TokenStoreError: The tokens are missing or damaged.
        """
        store = TokenStore.open(self.tokens("name the classes").train, views=1, verify="sizes")
        return np.bincount(store.labels(), minlength=store.num_classes)

    def training_captions(self, count: int) -> tuple[list[str], Tensor]:
        """Those of `count` training images, spread evenly over them, and their embeddings (count, D).

        Raises:
            ExperimentError: It isn't known what the model was trained on.
            TokenStoreError: The captions are missing or damaged.
        """
        captions = StoredCaptions.read_required(self.tokens("say by --text what to draw").train)
        image_N = torch.arange(count) * len(captions.index_N) // count
        return captions.texts_of(image_N), captions.of_images(image_N)

    def embedded(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (B, D) of texts, as those of the captions that the model was told; `none` is no caption.

        Raises:
            ExperimentError: The model was told classes, or it isn't known what embedded its captions, or that differs.
            DataError: A text is empty, or the encoder's weights are missing.
        """
        if self.model.config.text_width is None:
            raise ExperimentError(f"--text: {self.place} was told classes, not captions; name classes by --labels")
        return embedded(texts, self.captions, self.place)


@dataclass(frozen=True)
class DrawableFiles:
    """Where a model and its tokenizer lie, to be looked at before they are loaded, which may take minutes."""

    place: Path
    model: Path
    tokenizer: Path
    fingerprints: tuple[str | None, str | None] = (None, None)
    """What both must have been made by, where that is known."""
    class_names: tuple[str, ...] = ()
    captions: CaptionsRecord | None = None
    """See `Drawable`."""

    @classmethod
    def find(cls, place: Path, tokenizer_file: Path | None = None) -> "DrawableFiles":
        """See `Drawable.load`."""
        if place.suffix == ".safetensors":
            if tokenizer_file is None:
                raise ExperimentError(f"{place}: name its tokenizer's file by --tokenizer, or name the cell's folder")
            return cls(place, place, tokenizer_file)
        if tokenizer_file is not None:
            raise ExperimentError("--tokenizer: only for a model's .safetensors file; a cell has its own")
        if place.is_file():
            raise ExperimentError(
                f"{place}: no .safetensors file; `varscale import-official` makes one of the reference's"
            )
        cell, tokenizer = _files_of_cell(place)
        result, fingerprints = read_result(cell), (cell.fingerprint, tokenizer.fingerprint)
        names, captions = (result.class_names, result.captions) if result is not None else ((), None)
        return cls(place, cell.weights, tokenizer.weights, fingerprints, names, captions)

    def load(self) -> Drawable:
        """Both on this machine's device; see `Drawable.load`."""
        device = best_device()
        model = load_model(self.model, self.fingerprints[0]).to(device)
        tokenizer = load_tokenizer(self.tokenizer, self.fingerprints[1]).to(device)
        checksums = stored_metadata(self.model)["checksum"], stored_metadata(self.tokenizer)["checksum"]
        return Drawable(self.place, model, tokenizer, *checksums, self.class_names, self.captions)


def draw(
    drawable: Drawable,
    labels: Sequence[int] | Tensor,
    count: int,
    options: SamplingOptions,
    out: Path,
    *,
    show_scales: bool = False,
    rejection: Rejection | None = None,
) -> None:
    """Draw `count` images of each label, or embedding of a caption, into one picture, a row a label.

    With `show_scales` each image has a row of its own, with the picture after each scale; with `rejection` each is
    chosen among several.

    Raises:
        ExperimentError: The model draws no tokens, whose scales could be shown.
        ValueError: A label is out of range.
    """
    config = drawable.model.config
    if show_scales and config.reads == "latents":
        raise ExperimentError(f"--show-scales: models of family {config.family} draw latents, which have no scales")
    labels_B = torch.as_tensor(labels, device=best_device()).repeat_interleave(count, dim=0)
    candidates = rejection.candidates if rejection else 1
    drawn = sample_with(drawable.model, drawable.tokenizer, labels_B.repeat_interleave(candidates, dim=0), options)
    if rejection is not None:
        chosen_B = rejection.choose(drawn.images.mul(255).round().to(torch.uint8), labels_B)
        drawn = Sample(drawn.images[chosen_B], [tokens_B[chosen_B] for tokens_B in drawn.tokens])
    if show_scales:
        save_pictures(scale_pictures(drawable.tokenizer, drawn.tokens), out, len(drawn.tokens))
    else:
        save_pictures(drawn.images, out, count)


def embedded(texts: Sequence[str], captions: CaptionsRecord | None, place: Path) -> Tensor:
    """Embeddings (B, D) of texts for the model of `place` that was told such captions; see `Drawable.embedded`."""
    if captions is None:
        raise ExperimentError(f"--text: {place} does not say what embedded its captions; name the cell's folder")
    encoder = open_encoder(CaptionsSection.model_validate(captions.settings))
    if encoder.identity != captions.identity:
        raise ExperimentError(
            f"--text: {place} was told captions by {captions.identity}, and here is {encoder.identity}: "
            "other weights give other embeddings"
        )
    try:
        return torch.stack([_no_caption(encoder) if text == NO_CLASS else _one(encoder, text) for text in texts])
    except DataError as error:
        raise DataError(f"--text: {error}") from None


def _one(encoder: TextEncoder, text: str) -> Tensor:
    return torch.from_numpy(encoder.embed([text])[0])


def _no_caption(encoder: TextEncoder) -> Tensor:
    return torch.zeros(encoder.width)


def tokenizer_file(place: Path) -> tuple[Path, str | None]:
    """A tokenizer's weights and, where it is known, the fingerprint that they must have.

    Args:
        place: The file itself, the folder of a tokenizer, or that of a cell, which has its tokenizer's name.

    Raises:
        ExperimentError: There is none.
    """
    if place.suffix == ".safetensors":
        return place, None
    files = RunFiles(place.resolve())
    if files.folder.parent.name != "tokenizers":
        _, files = _files_of_cell(place)
    return files.weights, files.fingerprint


def _files_of_cell(run: Path) -> tuple[RunFiles, RunFiles]:
    """A finished cell's files and its tokenizer's."""
    files = RunFiles(run.resolve())
    result = read_result(files)
    if result is None or not result.row:
        raise ExperimentError(f"{run}: no finished cell (result.json); `varscale status` lists them")
    if result.status != "finished":
        raise ExperimentError(f"{run}: this cell {result.status}: it has no weights to draw images from")
    fingerprint = str(result.row["tokenizer_fingerprint"])
    folders = files.folder.parent.with_name("tokenizers").glob(f"*-{glob.escape(fingerprint)}")
    tokenizer_files = next(map(RunFiles, folders), None)
    if tokenizer_files is None:
        raise ExperimentError(f"{run}: its tokenizer, {fingerprint}, is not in this runs folder")
    return files, tokenizer_files
