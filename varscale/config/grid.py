"""The cells of a sweep."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from varscale.config.section import Count, Positive, Section, Seed


class Variant(Section):
    """Further cells of a study: chosen points, with settings changed, in addition to the grid."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    """Short name shown beside its cells."""
    depths: tuple[Count, ...]
    """Depths of its cells."""
    budgets: tuple[Positive, ...]
    """Training FLOPs of its cells."""
    seeds: tuple[Seed, ...] = (0,)
    """Seeds of its cells."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Dotted fields of `model` and `optim` changed for them, such as optim.lr: 0.002."""


class GridConfig(Section):
    """The cells: depth × training FLOPs × seeds, plus variants."""

    depths: Annotated[tuple[Count, ...], Field(min_length=1)]
    """Transformer blocks of each size."""
    budgets: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Training FLOPs of a cell: 3 × the dense forward pass × images."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """Seeds; each is a trunk of its own."""
    min_steps: Count = 200
    """A cell of fewer steps is an error."""
    variants: tuple[Variant, ...] = ()
    """Further cells: seeds for the noise, learning rates at the corners."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for field in ("depths", "budgets", "seeds"):
            values = getattr(self, field)
            if len(set(values)) != len(values):
                raise ValueError(f"{field}: repeated values in {list(values)}")
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise ValueError(f"variants: repeated names in {names}")
        return self
