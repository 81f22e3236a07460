"""Parquet files of images, as an experiment describes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from varscale.config.data import DataSection, Split
from varscale.config.section import Name, PathText

if TYPE_CHECKING:
    from varscale.data.sources.base import ImageSource


class ParquetSection(DataSection):
    """Parquet files with image bytes and labels, as Hugging Face lays them out."""

    kind: Literal["parquet"] = "parquet"
    """Source of the images."""
    train_path: PathText
    """File, or folder of files, of the training set."""
    validation_path: PathText
    """File, or folder of files, of the validation set."""
    image_column: Name = "image"
    """Column of image bytes: binary, or a struct with a field `bytes`."""
    label_column: Name = "label"
    """Column of integer labels."""

    places = frozenset({"train_path", "validation_path"})

    def open(self, split: Split, images: int | None) -> ImageSource:
        """All images of the split's files."""
        from varscale.data.sources.parquet.source import ParquetSource

        return ParquetSource(
            self.train_path if split == "train" else self.validation_path,
            self.crop(split),
            image_column=self.image_column,
            label_column=self.label_column,
            num_classes=self.num_classes,
            max_undecodable=self.max_undecodable,
        )


SECTION = ParquetSection
