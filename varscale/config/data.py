"""Where images come from: what the sections of all sources share. Each source has a folder in `varscale/data/sources/`.

Nothing here is heavy: what opens images is imported when they are opened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from varscale.config.kinds import Kinds
from varscale.config.section import Classes, Images, ImagesOrZero, Real, Section, Seed, Side, Truth, Whole

if TYPE_CHECKING:
    from varscale.data.sources.base import ImageSource
    from varscale.data.transforms import Crop

Split = Literal["train", "validation"]


class DataSection(Section, ABC):
    """What every source of images has. A source adds its own fields and says how it is opened."""

    kind: Annotated[str, Field(max_length=100)]
    """Source of the images."""
    image_size: Side
    """Side of the square training images, pixels."""
    num_classes: Classes
    """Labels are 0 … num_classes - 1; the models add one "no class" for guidance."""
    validation_images: Images | None = None
    """Images of the validation set that are used; None: all (procedural sources must say)."""
    views: Annotated[Whole, Field(ge=1, le=2**20)] = 1
    """Crops (and flips) of each training image, each encoded once into the token store."""
    resize_ratio: Annotated[Real, Field(ge=1, le=1000)] = 1.0
    """Shorter side after resizing (Lanczos), as a multiple of image_size, before cropping. The paper: 1.125."""
    horizontal_flip: Truth = False
    """Flip each view with probability ½. The paper: no."""
    seed: Seed = 0
    """Seed of procedural images, crops and flips."""
    max_undecodable: ImagesOrZero = 10
    """Images that may fail to decode (each is named and skipped) before the run stops."""

    procedural: ClassVar[bool] = False
    """Whether images are drawn as they are needed: image i is the same however many there are, and none repeats."""
    places: ClassVar[frozenset[str]] = frozenset()
    """Fields that say where the images lie, which is no part of what they are."""

    @abstractmethod
    def open(self, split: Split, images: int | None) -> ImageSource:
        """The images of a split: of a procedural source at least so many, of any other all that are stored.

        Raises:
            DataError: Missing or malformed data.
        """

    def crop(self, split: Split) -> Crop:
        """How stored pictures become square images: random views to train on, the centre to validate."""
        from varscale.data.transforms import Crop

        training = split == "train"
        return Crop(
            image_size=self.image_size,
            resize_ratio=self.resize_ratio,
            # without room to move there is one crop; rectangles still leave room along their longer side
            random=training and (self.views > 1 or self.resize_ratio > 1),
            flip=training and self.horizontal_flip,
            seed=self.seed,
        )


DATA_KINDS: Kinds[DataSection] = Kinds("kind", "varscale.data.sources")
