"""Editing and reconstructing pictures that lie in files, and what is reported of it.

All that a person can have got wrong is said before weights are read, which takes minutes for large models.

Letters in tensor names: B images, S side in pixels.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from varscale.errors import DataError, ExperimentError
from varscale.families.base import SamplingOptions
from varscale.families.storage import stored_description
from varscale.families.var.config import VARConfig
from varscale.generation.editing import DistanceBand, edit, kept_tokens, psnr_by_distance
from varscale.generation.from_files import DrawableFiles, embedded, tokenizer_file
from varscale.generation.labels import NO_CLASS, labels_of
from varscale.generation.pictures import opened_picture, read_picture, save_picture, save_pictures, scale_pictures
from varscale.numerics.device import best_device
from varscale.store.atomic import write_atomically
from varscale.tokenizer.storage import load_tokenizer, stored_architecture

PAIRS = ("edited and reconstruction", "edited and source", "reconstruction and source")
"""What is compared by distance from the mask."""
BLACK = (0, 0, 0)
"""Transparent parts of a mask are not masked."""
SHADE = 0.35
"""How much is left of what is masked, in the picture of the mask."""


@dataclass(frozen=True)
class EditRegion:
    """What is drawn anew: a mask's white, or a box; or all but that."""

    mask: Path | None = None
    box: tuple[int, int, int, int] | None = None
    """Left, top, right and bottom, pixels; right and bottom are the first that are outside."""
    outside: bool = False

    def of(self, side: int) -> Tensor:
        """As bool (S, S).

        Raises:
            DataError: The mask can't be read, or has another size.
            ExperimentError: The region is empty or goes over the image's edge.
        """
        if self.box is not None:
            left, top, right, bottom = self.box
            if not (left < right <= side and top < bottom <= side):
                raise ExperimentError(
                    f"--box {','.join(map(str, self.box))}: expected left,top,right,bottom in pixels, such as "
                    f"{side // 4},{side // 4},{side // 2},{side // 2}, to {side} at most"
                )
            mask_SS = torch.zeros(side, side, dtype=torch.bool)
            mask_SS[top:bottom, left:right] = True
            place = f"--box {','.join(map(str, self.box))}"
        else:
            assert self.mask is not None
            levels_SS = torch.from_numpy(np.array(opened_picture(self.mask, side, BLACK).convert("L")))
            mask_SS = levels_SS >= (1 if levels_SS.max() == 1 else 128)  # 0 and 1 are what programs write
            place = str(self.mask)
        if self.outside:
            mask_SS = ~mask_SS
        if not mask_SS.any():
            what = "all of it is kept by --outside" if self.outside else "it has no white, which is what is drawn anew"
            raise DataError(f"{place}: an empty mask: {what}")
        return mask_SS


@dataclass(frozen=True)
class EditRequest:
    """An image, and how it is to be edited."""

    image: Path
    region: EditRegion
    label: str | None
    """The class, by its number or name; None or `none`: no class."""
    text: str | None
    """The caption, for a model that is told captions; None or `none`: no caption."""
    count: int
    """How many edits."""
    source_scales: int
    composite: bool
    """Paste the source's pixels over what is not masked."""
    show_scales: bool

    def checked(self, files: DrawableFiles) -> tuple[Tensor, Tensor, Tensor]:
        """The image (1, 3, S, S) in [0, 1], the mask (S, S), and the label (1,) or the caption's embedding (1, D).

        Raises:
            DataError: A picture can't be read, has another size, or the mask or the text is empty.
            ExperimentError: An option is out of range for this model, or not for such models.
            CheckpointError: A file of weights is missing or foreign.
        """
        description, architecture = stored_description(files.model), stored_architecture(files.tokenizer)
        if not isinstance(description, VARConfig):
            raise ExperimentError(f"{files.place}: models of family {description.family} can't edit images")
        if not 0 <= self.source_scales < len(description.patch_nums):
            raise ExperimentError(
                f"--source-scales {self.source_scales}: the model has {len(description.patch_nums)} scales, of which "
                "one at least has to be drawn"
            )
        label = self._label(files, description)
        image_13SS, mask_SS = read_picture(self.image, architecture.image_size), self.region.of(architecture.image_size)
        if all(kept.all() for kept in kept_tokens(mask_SS, description.patch_nums, self.source_scales)):
            raise ExperimentError("the mask covers less than half of every token, so nothing is drawn; enlarge it")
        return image_13SS, mask_SS, label

    def _label(self, files: DrawableFiles, description: VARConfig) -> Tensor:
        if description.text_width is not None:
            if self.label is not None:
                raise ExperimentError(
                    f"--label: {files.place} was told captions, not classes; say by --text what to draw"
                )
            return embedded([self.text or NO_CLASS], files.captions, files.place)
        if self.text is not None:
            raise ExperimentError(f"--text: {files.place} was told classes, not captions; name a class by --label")
        labels = labels_of("--label", self.label or NO_CLASS, description.num_classes, files.class_names)
        if len(labels) != 1:
            raise ExperimentError(f"--label {self.label!s:.100}: expected one class")
        return torch.tensor(labels)


def edit_files(files: DrawableFiles, request: EditRequest, options: SamplingOptions, out: Path) -> list[DistanceBand]:
    """Edit an image, and write the edits beside a picture of source, mask, reconstruction and edits, `out` (.png).

    Beside it are `<name>-0.png`, …, `<name>-psnr.csv` and, on request, `<name>-scales.png`.

    Returns:
        What is alike at which distance from the mask, of the pairs of `PAIRS`, before any pixels are pasted.

    Raises:
        ExperimentError, DataError: See `EditRequest.checked`.
        CheckpointError: Weights are missing or damaged.
        ValueError: An option of sampling is out of range.
    """
    source_13SS, mask_SS, label = request.checked(files)
    drawable, device = files.load(), best_device()
    labels_B = label.to(device).repeat_interleave(request.count, dim=0)
    edited = edit(
        drawable.model,
        drawable.tokenizer,
        source_13SS.to(device) * 2 - 1,
        mask_SS,
        labels_B,
        options,
        source_scales=request.source_scales,
    )
    images_B3SS, reconstruction_13SS = edited.images.cpu(), edited.reconstructions.cpu()
    pairs = ((images_B3SS, reconstruction_13SS), (images_B3SS, source_13SS), (reconstruction_13SS, source_13SS))
    bands = psnr_by_distance(pairs, mask_SS, drawable.tokenizer.architecture.downsampling)
    if request.composite:
        images_B3SS = torch.where(mask_SS, images_B3SS, source_13SS)
    shown_13SS = torch.where(mask_SS, source_13SS * SHADE, source_13SS)
    save_pictures(torch.cat((source_13SS, shown_13SS, reconstruction_13SS, images_B3SS)), out, 3 + request.count)
    for number, image_3SS in enumerate(images_B3SS):
        save_picture(image_3SS, out.with_name(f"{out.stem}-{number}.png"))
    if request.show_scales:
        tokens = [torch.cat(both) for both in zip(edited.source_tokens, edited.tokens, strict=True)]
        scales = scale_pictures(drawable.tokenizer, tokens)
        save_pictures(scales, out.with_name(f"{out.stem}-scales.png"), len(tokens))
    write_atomically(out.with_name(f"{out.stem}-psnr.csv"), _table(bands).encode())
    return bands


def reconstruct_files(place: Path, images: Sequence[Path], out: Path, *, show_scales: bool = False) -> list[float]:
    """Write each image and its reconstruction into one picture (.png), a row an image; gives each one's PSNR in dB.

    The tokenizer is that of a file or folder of its own, or of a cell's folder. With `show_scales` the reconstruction
    is shown after each scale instead of the last alone.

    Raises:
        DataError: A picture can't be read, or has another size.
        ExperimentError, CheckpointError: There is no tokenizer, or it is damaged.
    """
    path, fingerprint = tokenizer_file(place)
    side = stored_architecture(path).image_size
    sources_B3SS = torch.cat([read_picture(image, side) for image in images])
    tokenizer = load_tokenizer(path, fingerprint).to(best_device())
    tokens = tokenizer.encode(sources_B3SS.to(best_device()) * 2 - 1)
    scales_BK3SS = scale_pictures(tokenizer, tokens).cpu().unflatten(0, (len(images), -1))
    shown_BK3SS = scales_BK3SS if show_scales else scales_BK3SS[:, -1:]
    rows = torch.cat((sources_B3SS.unsqueeze(1), shown_BK3SS), dim=1)
    save_pictures(rows.flatten(0, 1), out, rows.shape[1])
    errors_B = (scales_BK3SS[:, -1] - sources_B3SS).square().mean(dim=(1, 2, 3))
    return [float(value) for value in -10 * errors_B.log10()]


def _table(bands: Sequence[DistanceBand]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("nearest", "farthest", "pixels", *(f"psnr {pair}" for pair in PAIRS)))
    writer.writerows(
        (band.nearest, band.farthest, band.pixels, *(f"{value:.3f}" for value in band.psnr)) for band in bands
    )
    return text.getvalue()
