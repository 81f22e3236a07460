"""The whole experiment, and what its parts must agree on."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from varscale.config.data import DATA_KINDS, DataSection
from varscale.config.search import SearchConfig
from varscale.config.section import (
    Changes,
    EvaluationConfig,
    GridConfig,
    OptimConfig,
    ResourcesConfig,
    RuntimeConfig,
    Section,
)
from varscale.config.tokenizer import TokenizerConfig
from varscale.families.base import FAMILY_KINDS, FamilySection, cut_without_meaning


class Experiment(Section):
    """Everything that a study is: data, tokenizer, model family, optimisation, grid, evaluation."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
    """Name of the study and of its folder under runs/."""
    data: Annotated[DataSection, DATA_KINDS]
    """Images."""
    tokenizer: TokenizerConfig
    """Multi-scale VQ-VAE."""
    model: Annotated[FamilySection, FAMILY_KINDS]
    """Transformer."""
    optim: OptimConfig
    """Optimisation of the transformer."""
    grid: GridConfig
    """Cells of the sweep."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Measurement."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Use of the machine."""
    resources: ResourcesConfig = ResourcesConfig()
    """Devices and time of a run."""
    search: SearchConfig = SearchConfig()
    """Hyperparameters that `varscale tune` looks for."""
    by_depth: dict[Annotated[int, Field(ge=1, le=1024)], Changes] = Field(default_factory=dict, max_length=1024)
    """Dotted fields of `model`, `optim` that a single run of that depth without a budget changes (the reference's
    recipe varies with depth), but for those that `--set` names; grids and their cells ignore it, so that all sizes of a
    law share one recipe."""

    def with_variants_in_grid(self) -> Self:
        """The study without cells of variants at depths that the grid has not."""
        kept = []
        for variant in self.grid.variants:
            depths = tuple(depth for depth in variant.depths if depth in self.grid.depths)
            kept.append(variant.model_copy(update={"depths": depths}))
        return self.model_copy(update={"grid": self.grid.model_copy(update={"variants": tuple(kept)})})

    @model_validator(mode="after")
    def _check(self) -> Self:
        tokenizer, side = self.tokenizer, self.data.image_size
        if tokenizer.image_size != side:
            raise ValueError(
                f"tokenizer.patch_nums: ends at {tokenizer.latent_size}, but {side} px over {tokenizer.downsampling} "
                f"(channel_multipliers has {len(tokenizer.channel_multipliers)} entries) "
                f"is {side / tokenizer.downsampling:g}"
            )
        if self.model.condition == "text" and self.data.captions is None:
            raise ValueError(
                "model.condition: text needs data.captions, which says how captions are embedded; "
                "data.captions={encoder: words} is the plainest"
            )
        scales = list(tokenizer.patch_nums)
        if self.model.description.reads == "scale" and len(scales) > 1:
            raise ValueError(
                f"model.family: {self.model.family} reads tokens of one scale, but tokenizer.patch_nums has "
                f"{len(scales)}, {scales}: set it to [{scales[-1]}]"
            )
        parts = {"evaluation": self.evaluation, "evaluation.fidelity": self.evaluation.fidelity}
        for name, part in parts.items():
            why = part and cut_without_meaning(self.model.draws, part.top_k, part.top_p)
            if part and why:
                key = "top_k" if cut_without_meaning(self.model.draws, part.top_k, 0) else "top_p"
                raise ValueError(
                    f"{name}.{key}: chooses among tokens, which these models of family {self.model.family} have no use "
                    f"for ({why}): leave it at 0"
                )
        try:
            tokenizer.training.check_image_size(side)
        except ValueError as error:
            raise ValueError(f"tokenizer.training.{error}") from None
        return self
