"""Image folders, as an experiment describes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from varscale.config.data import PicturesSection, Split

if TYPE_CHECKING:
    from varscale.data.sources.folder.source import FolderSource


class FolderSection(PicturesSection):
    """Image folders in torchvision's layout, `train_path/<class>/<image>`."""

    kind: Literal["folder"] = "folder"
    """Source of the images."""

    def open_all(self, path: str, split: Split) -> FolderSource:
        """All images of a folder."""
        from varscale.data.sources.folder.source import FolderSource

        return FolderSource(path, self.crop(split), num_classes=self.num_classes, max_undecodable=self.max_undecodable)


SECTION = FolderSection
