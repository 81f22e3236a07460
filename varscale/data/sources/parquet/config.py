"""Parquet files of images, as an experiment describes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from varscale.config.data import PicturesSection, Split
from varscale.config.section import Name, Whole

if TYPE_CHECKING:
    from varscale.data.sources.parquet.source import ParquetSource


class ParquetSection(PicturesSection):
    """Parquet files with image bytes and labels, as Hugging Face lays them out."""

    kind: Literal["parquet"] = "parquet"
    """Source of the images."""
    image_column: Name = "image"
    """Column of images: binary, paths, a struct with a field `bytes` or `path`, or a list of one of these."""
    label_column: Name | None = "label"
    """Column of labels: whole numbers, booleans, or names of classes; null: no labels, a single class."""
    first_label: Annotated[Whole, Field(ge=-(2**31), lt=2**31)] = 0
    """The number that stands for the first class: 1 where labels are 1 … num_classes."""

    apart = PicturesSection.apart | {"first_label"}  # labels are what is left when it is taken off

    def open_all(self, path: str, split: Split) -> ParquetSource:
        """All images of a path's files."""
        from varscale.data.sources.parquet.labels import LabelColumn
        from varscale.data.sources.parquet.source import ParquetSource, find_files

        named_by = find_files(self.train_path) if split == "validation" and self.label_column else ()
        return ParquetSource(
            path,
            self.crop(split),
            image_column=self.image_column,
            labels=LabelColumn(self.label_column, self.first_label, named_by),
            captions=self.captions,
            num_classes=self.num_classes,
            max_undecodable=self.max_undecodable,
        )


SECTION = ParquetSection
