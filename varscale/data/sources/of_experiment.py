"""The image sources that an experiment's `data` section describes."""

from varscale.config import DataSection
from varscale.data.sources.base import ImageSource
from varscale.store.fingerprint import DataIdentity


def training_source(data: DataSection, images: int) -> ImageSource:
    """Training images: of a procedural source at least `images`, so that none repeats; of any other, all."""
    return data.training(images)


def validation_source(data: DataSection) -> ImageSource:
    """Validation images, `data.validation_images` of them."""
    return data.validation()


def data_identity(data: DataSection) -> DataIdentity:
    """What the images depend on; opens stored data, so that what is wrong shows before anything is trained."""
    return data.identity()
