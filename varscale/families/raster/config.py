"""The raster family's section of an experiment, and the description of one of its transformers."""

from typing import ClassVar, Literal

from varscale.families.base import Family, Reads
from varscale.families.shared.description import TransformerDescription, TransformerSection


class RasterConfig(TransformerDescription):
    """One transformer that predicts the tokens of one scale, one after the other."""

    family: Literal["raster"] = "raster"
    """The family."""

    reads: ClassVar[Reads] = "scale"

    @property
    def pass_sides(self) -> tuple[int, ...]:
        """Each token is a map of its own."""
        return (1,) * self.tokens

    def sampling_flops(self, *, guidance: bool = True, cache: bool = True) -> int:
        """Sampling one image in a pass a token.

        The blocks' modulations are computed once. Guidance is the same at all tokens, so the first pass mixes, too.
        """
        branches, mixed = (2, 4 * self.width**2) if guidance else (1, 0)
        once = 0 if self.shared_adaln else branches * (self.tokens - 1) * self._modulation()
        return super().sampling_flops(guidance=guidance, cache=cache) + mixed - once

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
