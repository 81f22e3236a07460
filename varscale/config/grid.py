"""The cells of a sweep."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from varscale.config.section import Changes, Depth, Positive, Section, Seed, Steps

# a variant may be left without depths, where the grid has none of its own
Depths = Annotated[tuple[Depth, ...], Field(max_length=1024)]
Budgets = Annotated[tuple[Positive, ...], Field(max_length=1024)]
Seeds = Annotated[tuple[Seed, ...], Field(max_length=1024)]


class Variant(Section):
    """Further cells of a study: chosen points, with settings changed, in addition to the grid."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=100)]
    """Short name shown beside its cells."""
    depths: Depths
    """Depths of its cells."""
    budgets: Budgets
    """Training FLOPs of its cells."""
    seeds: Seeds = (0,)
    """Seeds of its cells."""
    settings: Changes = Field(default_factory=dict, max_length=100)
    """Dotted fields of `model` and `optim` changed for them, such as optim.lr: 0.002."""


class GridConfig(Section):
    """The cells: depth × training FLOPs × seeds, plus variants."""

    depths: Annotated[Depths, Field(min_length=1)]
    """Transformer blocks of each size."""
    budgets: Annotated[Budgets, Field(min_length=1)]
    """Training FLOPs of a cell: 3 × the dense forward pass × images."""
    seeds: Annotated[Seeds, Field(min_length=1)] = (0,)
    """Seeds; each is a trunk of its own."""
    min_steps: Steps = 200
    """A cell of fewer steps is an error."""
    variants: Annotated[tuple[Variant, ...], Field(max_length=1024)] = ()
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
