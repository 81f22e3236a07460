"""Rings as a source of images."""

from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from varscale.config.data import Split
from varscale.data.sources.base import ImageSource, Indices, Labels, Pixels, digest
from varscale.data.sources.rings.captions import caption
from varscale.data.sources.rings.drawing import Style, render_rings, what_is_drawn
from varscale.errors import DataError


class RingsSource(ImageSource):
    """Procedural rings of one split; every view of an image is the same.

    Any other number of images gives the same images as far as both go. Training and validation images never coincide.
    The arguments are those of `render_rings`.

    Raises:
        DataError: If there are no images or pixels.
    """

    procedural = True
    varies = False

    def __init__(
        self,
        num_images: int,
        image_size: int,
        split: Split = "train",
        seed: int = 0,
        style: Style = Style(),  # noqa: B008  # frozen
    ) -> None:
        for name, value in (("num_images", num_images), ("image_size", image_size)):
            if value < 1:
                raise DataError(f"rings: {name}: {value} is not positive")
        self.name = f"rings ({split}, seed {seed})"
        self.num_images, self.image_size, self.num_classes = num_images, image_size, style.num_classes
        self.split: Split = split
        self.seed, self.style = seed, style
        self.undecodable = {}

    @property
    def fingerprint(self) -> str:
        """Hash of the settings; num_images is left out, so that a store can grow."""
        style = asdict(self.style)
        if not self.style.backgrounds:  # as it was before there were any
            del style["backgrounds"]
        settings = ("rings", self.image_size, self.split, self.seed, *style.values())
        return digest([repr(settings).encode()])

    def __len__(self) -> int:
        return self.num_images

    def load_batch(self, indices: Indices, views: Indices) -> tuple[Pixels, Labels]:
        """Images (B, 3, s, s) and labels (B,)."""
        number_B = np.asarray(indices, dtype=np.int64)
        return render_rings(self.seed, number_B, self.image_size, self.split, self.style)

    def what_is_drawn(self, indices: Indices) -> NDArray[np.int64]:
        """How many rings of each colour images have, and last their background, (B, colours + 1)."""
        return what_is_drawn(self.seed, np.asarray(indices), self.split, self.style)

    def captions(self) -> list[str]:
        """How many rings of which colours, on which background: "two red rings and one green ring on blue"."""
        kinds_UJ, kind_N = np.unique(self.what_is_drawn(np.arange(len(self))), axis=0, return_inverse=True)
        texts = [caption(rings_K, background) for *rings_K, background in kinds_UJ.tolist()]
        return [texts[kind] for kind in kind_N.ravel().tolist()]
