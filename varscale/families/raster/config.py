"""The raster family's section of an experiment, and the description of one of its transformers."""

from typing import ClassVar, Literal

from varscale.families.base import Family, Reads
from varscale.families.shared.description import TransformerDescription, TransformerSection


class RasterConfig(TransformerDescription):
    """One transformer that predicts the tokens of one scale, one after the other."""

    family: Literal["raster"] = "raster"
    """The family."""

    reads: ClassVar[Reads] = "scale"
    modulates_once = True
    guides_from_the_start = True

    @property
    def pass_sides(self) -> tuple[int, ...]:
        """Each token is a map of its own."""
        return (1,) * self.tokens

    def implementation(self) -> Family:
        """The part that needs torch."""
        from varscale.families.raster.family import RasterFamily

        return RasterFamily()


class RasterSection(TransformerSection):
    """The next-token transformer; it needs a tokenizer of one scale."""

    family: Literal["raster"] = "raster"
    """Model family."""

    description = RasterConfig


SECTION = RasterSection
