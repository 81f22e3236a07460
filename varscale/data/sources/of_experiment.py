"""The image sources that an experiment's `data` section describes."""

from typing import Literal

from varscale.config import Cifar10Data, DataConfig, FolderData, ParquetData, RingsData
from varscale.data.loading import whole_windows
from varscale.data.sources.base import ImageSource, RingsSource, SubsetSource
from varscale.data.sources.decoded import Cifar10Source, FolderSource
from varscale.data.sources.parquet import ParquetSource
from varscale.data.transforms import Crop
from varscale.errors import DataError
from varscale.store.fingerprint import DataIdentity

_UNIDENTIFYING = {"validation_images", "max_undecodable", "views", "train_path", "validation_path", "path"}
"""Fields that don't change training images: where they lie doesn't, nor how often each is seen."""


def training_source(data: DataConfig, images: int) -> ImageSource:
    """Training images: of a procedural source at least `images`, so that none repeats; of any other, all.

    Raises:
        DataError: missing or malformed data.
    """
    if isinstance(data, RingsData):
        return _rings(data, "train", whole_windows(images))
    return _stored(data, "train")


def validation_source(data: DataConfig) -> ImageSource:
    """Validation images, `data.validation_images` of them.

    Raises:
        DataError: missing or malformed data, or fewer images than asked for.
    """
    if isinstance(data, RingsData):
        assert data.validation_images is not None  # checked with the experiment
        return _rings(data, "validation", data.validation_images)
    source = _stored(data, "validation")
    return source if data.validation_images is None else SubsetSource(source, data.validation_images)


def _rings(data: RingsData, split: Literal["train", "validation"], images: int) -> RingsSource:
    return RingsSource(
        num_images=images,
        image_size=data.image_size,
        split=split,
        seed=data.seed,
        min_rings=data.min_rings,
        max_rings=data.max_rings,
        radius=data.radius,
        width=data.width,
        colours=data.colours,
    )


def _stored(data: FolderData | ParquetData | Cifar10Data, split: Literal["train", "validation"]) -> ImageSource:
    training = split == "train"
    # without room to move there is one crop; rectangles still leave room along their longer side
    crop = Crop(
        image_size=data.image_size,
        resize_ratio=data.resize_ratio,
        random=training and (data.views > 1 or data.resize_ratio > 1),
        flip=training and data.horizontal_flip,
        seed=data.seed,
    )
    common = {"num_classes": data.num_classes, "max_undecodable": data.max_undecodable}
    match data:
        case FolderData():
            return FolderSource(data.train_path if training else data.validation_path, crop, **common)
        case ParquetData():
            return ParquetSource(
                data.train_path if training else data.validation_path,
                crop,
                image_column=data.image_column,
                label_column=data.label_column,
                **common,
            )
        case Cifar10Data():
            return Cifar10Source(data.path, crop, train=training, **common)


def data_identity(data: DataConfig) -> DataIdentity:
    """What the images depend on; opens stored data, so that what is wrong with them shows before anything is trained.

    The number of procedural training images is left out: image i is the same however many there are.

    Raises:
        DataError: missing or malformed data, or fewer validation images than asked for.
    """
    settings: dict[str, object] = data.model_dump(mode="json", exclude=_UNIDENTIFYING)
    validation: dict[str, object] = {"images": data.validation_images}
    if isinstance(data, RingsData):
        return DataIdentity(settings, validation)
    train, held_out = training_source(data, 1), validation_source(data)
    _check_splits(train, held_out.source if isinstance(held_out, SubsetSource) else held_out)
    validation["content"] = held_out.fingerprint  # fingerprints are of the images and their crops
    return DataIdentity({**settings, "content": train.fingerprint}, validation, data.views, len(train))


def _check_splits(train: ImageSource, validation: ImageSource) -> None:
    """Raise `DataError` where validation images are among the training images, or labels mean other classes."""
    if isinstance(train, ParquetSource) and isinstance(validation, ParquetSource):
        shared = {file.resolve() for file in train.files} & {file.resolve() for file in validation.files}
        if shared:
            raise DataError(
                f"data.validation_path: {min(shared)} is among the training files, too; name the split's own files, "
                f"such as {min(shared).parent / 'validation-*.parquet'}"
            )
    if isinstance(train, FolderSource) and isinstance(validation, FolderSource):
        if train.root.resolve() == validation.root.resolve():
            raise DataError(f"data.validation_path: {validation.root} is the training set's folder, too")
        different = sorted({*train.classes} ^ {*validation.classes})
        if different:
            raise DataError(
                f"data.validation_path: {validation.root} and {train.root} differ in their class folders, such as "
                f"{different[0]}: labels would mean different classes"
            )
