"""VAR's section of an experiment, and the description of one VAR transformer."""

from typing import Literal

from varscale.families.base import Family
from varscale.families.shared.description import TransformerDescription, TransformerSection


class VARConfig(TransformerDescription):
    """One VAR transformer."""

    family: Literal["var"] = "var"
    """The family."""

    def implementation(self) -> Family:
        """VAR's part that needs torch."""
        from varscale.families.var.family import VARFamily

        return VARFamily()


class VARSection(TransformerSection):
    """The VAR transformer."""

    family: Literal["var"] = "var"
    """Model family."""

    description = VARConfig


SECTION = VARSection
