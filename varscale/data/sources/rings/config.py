"""Procedural images of soft Gaussian rings, as an experiment describes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from varscale.config.data import DataSection, Split
from varscale.config.section import Few, Real, Whole

if TYPE_CHECKING:
    from varscale.data.sources.base import ImageSource

Radius = Annotated[Real, Field(gt=0, le=0.5)]
Width = Annotated[Real, Field(gt=0, le=1)]


class RingsSection(DataSection):
    """Procedural images of soft Gaussian rings; the class is the number of rings."""

    kind: Literal["rings"] = "rings"
    """Source of the images."""
    min_rings: Few = 1
    """Fewest rings in an image."""
    max_rings: Few = 3
    """Most rings in an image."""
    radius: tuple[Radius, Radius] = (0.16, 0.30)
    """Smallest and largest radius, as a share of the side."""
    width: tuple[Width, Width] = (0.045, 0.045)
    """Smallest and largest standard deviation of the profile across a ring, as a share of the side."""
    colours: Annotated[Whole, Field(ge=1, le=8)] = 4
    """Ring colours in use."""
    # left out of what is written, and so of fingerprints, where there are none
    backgrounds: Annotated[Whole, Field(ge=0, le=8, exclude_if=lambda number: number == 0)] = 0
    """Colours of backgrounds, as often as the dark one, which captions don't name; no ring has its background's colour.
    0: all are dark."""

    procedural = True

    def open(self, split: Split, images: int | None) -> ImageSource:
        """Rings; to train on, a whole number of the windows that they are shuffled in."""
        from varscale.data.loading import whole_windows
        from varscale.data.sources.rings.drawing import Style
        from varscale.data.sources.rings.source import RingsSource

        assert images is not None  # checked with the section
        style = Style(self.min_rings, self.max_rings, self.radius, self.width, self.colours, self.backgrounds)
        number = whole_windows(images) if split == "train" else images
        return RingsSource(number, self.image_size, split, self.seed, style)

    @model_validator(mode="after")
    def _check(self) -> Self:
        classes = self.max_rings - self.min_rings + 1
        if self.num_classes != classes:
            rings = f"{self.min_rings} to {self.max_rings} rings"
            raise ValueError(f"num_classes: {self.num_classes}, but {rings} make {classes} classes")
        if self.backgrounds and self.colours == 1:
            raise ValueError("backgrounds: no ring has its background's colour, so there must be 2 colours or more")
        if self.validation_images is None:
            raise ValueError("validation_images: procedural rings need a number, such as 2048")
        if self.horizontal_flip or self.views != 1 or self.resize_ratio != 1:
            raise ValueError("views: rings are drawn at image_size; neither views, resize_ratio nor flips apply")
        for name, (low, high) in (("radius", self.radius), ("width", self.width)):
            if low > high:
                raise ValueError(f"{name}: expected the smallest, then the largest, not [{low:g}, {high:g}]")
        return self


SECTION = RingsSection
