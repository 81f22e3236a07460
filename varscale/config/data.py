"""Where images come from."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from varscale.config.section import Count, CountOrZero, Fraction, Real, Section, Seed, Truth, Whole


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
