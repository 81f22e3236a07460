"""Image folders, as an experiment describes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from varscale.config.data import PicturesSection, Split
from varscale.config.section import PathText

if TYPE_CHECKING:
    from varscale.data.sources.base import ImageSource


class FolderSection(PicturesSection):
    """Image folders in torchvision's layout, `train_path/<class>/<image>`."""

    kind: Literal["folder"] = "folder"
    """Source of the images."""
    train_path: PathText
    """Folder of the training set."""
    validation_path: PathText
    """Folder of the validation set."""

    places = frozenset({"train_path", "validation_path"})

    def open(self, split: Split, images: int | None) -> ImageSource:
        """All images of the split's folder."""
        from varscale.data.sources.folder.source import FolderSource

        path = self.train_path if split == "train" else self.validation_path
        return FolderSource(path, self.crop(split), num_classes=self.num_classes, max_undecodable=self.max_undecodable)


SECTION = FolderSection
