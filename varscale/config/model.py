"""What the sections of all model families share. Each family has a folder in `varscale/families/`."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from varscale.config.kinds import Kinds
from varscale.config.section import Section


class FamilySection(Section, ABC):
    """Settings of a family of models, of which depth derives the rest; a family adds its own fields."""

    family: Annotated[str, Field(max_length=100)]
    """Model family."""

    @abstractmethod
    def width(self, depth: int) -> int:
        """Transformer width of a model of `depth` blocks."""

    @abstractmethod
    def heads(self, depth: int) -> int:
        """Attention heads of a model of `depth` blocks."""

    if TYPE_CHECKING:  # the fields of the only family, until families answer for themselves

        def __getattr__(self, name: str) -> Any: ...


FAMILY_KINDS: Kinds[FamilySection] = Kinds("family", "varscale.families", default="var")
