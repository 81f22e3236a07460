"""Where images come from: what the sections of all sources share. Each source has a folder in `varscale/data/sources/`.

Nothing here is heavy: what opens images is imported when they are opened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from varscale.config.captions import CaptionsSection
from varscale.config.kinds import Kinds
from varscale.config.section import Classes, Images, ImagesOrZero, PathText, Real, Section, Seed, Side, Truth, Whole

if TYPE_CHECKING:
    from varscale.data.sources.base import ImageSource
    from varscale.data.sources.decoded import EncodedSource
    from varscale.data.transforms import Crop


Level = Annotated[Real, Field(ge=-1e30, le=1e30)]


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
    """Pictures that may be damaged; they are named and left out, and more of them stop the run before it begins."""
    # left out of what is written, and so of fingerprints, where there are none
    captions: Annotated[CaptionsSection | None, Field(exclude_if=lambda value: value is None)] = None
    """Captions of the images, for models of `condition: text`; None: they are not read."""

    procedural: ClassVar[bool] = False
    """Whether images are drawn as they are needed: image i is the same however many there are, and none repeats."""
    places: ClassVar[frozenset[str]] = frozenset()
    """Fields that say where the images lie, which is no part of what they are."""
    apart: ClassVar[frozenset[str]] = frozenset()
    """Fields that count as part of an experiment's identity only where they change an image, which its content says."""

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


class PicturesSection(DataSection, ABC):
    """What sources have whose pictures are stored, by anyone, in any format."""

    train_path: PathText
    """Folder of the training set, or of Parquet files: file, folder, or pattern such as data/*/train-*.parquet."""
    validation_path: PathText | None
    """The same of the validation set; null: there is none, and `validation_images` of the training set, spread evenly
    over it, are held out."""
    training_images: Images | None = None
    """Images of the training set that are used, spread evenly over it; null: all."""
    background: Annotated[str, Field(max_length=100), AfterValidator(lambda text: _colour(text))] = "white"
    """Colour behind transparent parts: a name, or such as "#ff8000"."""
    levels: tuple[Level, Level] | None = None
    """Values of pictures with more than 8 bits a channel that become black and white; null: they stop the run."""

    places = frozenset({"train_path", "validation_path"})
    apart = frozenset({"background", "levels", "training_images"})

    @abstractmethod
    def open_all(self, path: str, split: Split) -> EncodedSource:
        """All pictures at a path, cropped as those of a split are; raises what `open` raises."""

    def open(self, split: Split, images: int | None) -> ImageSource:
        """The images of a split, but for those that are held out, or more than `training_images`."""
        if self.validation_path is not None:
            source = self.open_all(self.train_path if split == "train" else self.validation_path, split)
        else:
            source = self.open_all(self.train_path, split).held_out(self.validation_images or 0, split)
        return source.spread(self.training_images) if split == "train" and self.training_images else source

    def crop(self, split: Split) -> Crop:
        """How stored pictures become square images."""
        from PIL import ImageColor

        red, green, blue, *_ = ImageColor.getrgb(self.background)
        return replace(super().crop(split), background=(red, green, blue), levels=self.levels)

    @model_validator(mode="after")
    def _check_pictures(self) -> Self:
        if self.validation_path is None and self.validation_images is None:
            raise ValueError(
                "validation_path: null, so validation_images must say how many training images are held out"
            )
        if self.levels is not None and not self.levels[0] < self.levels[1]:
            raise ValueError(
                f"levels: expected the value of black, then a larger one of white, not {list(self.levels)}"
            )
        return self


DATA_KINDS: Kinds[DataSection] = Kinds("kind", "varscale.data.sources")


def _colour(text: str) -> str:
    from PIL import ImageColor

    try:
        ImageColor.getrgb(text)
    except ValueError:
        raise ValueError('expected a colour, such as white or "#ff8000"') from None
    return text
