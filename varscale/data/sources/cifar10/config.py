"""CIFAR-10, as an experiment describes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from varscale.config.data import DataSection, Split
from varscale.config.section import PathText

if TYPE_CHECKING:
    from varscale.data.sources.base import ImageSource


class Cifar10Section(DataSection):
    """CIFAR-10 as torchvision downloads it (`path/cifar-10-batches-py`)."""

    kind: Literal["cifar10"] = "cifar10"
    """Source of the images."""
    path: PathText
    """Folder that holds cifar-10-batches-py."""

    places = frozenset({"path"})

    def open(self, split: Split, images: int | None) -> ImageSource:
        """The 50,000 images to train on, or the 10,000 to validate."""
        from varscale.data.sources.cifar10.source import Cifar10Source

        return Cifar10Source(
            self.path,
            self.crop(split),
            train=split == "train",
            num_classes=self.num_classes,
            max_undecodable=self.max_undecodable,
        )


SECTION = Cifar10Section
