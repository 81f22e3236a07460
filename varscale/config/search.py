"""The search section: which settings `varscale tune` varies, between what, and what it judges them by."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from varscale.config.section import (
    PARAMETRIZATIONS,
    Budgets,
    Different,
    Few,
    Name,
    Parametrization,
    Positive,
    Real,
    Section,
    Seed,
    Seeds,
    Steps,
    Truth,
    Whole,
)


def _number(value: Any, whole_or_real: ValidatorFunctionWrapHandler) -> Any:
    """One message for both kinds of numbers, without pydantic's names of them."""
    try:
        return whole_or_real(value)
    except ValidationError:
        raise ValueError(f"expected a number between -1e30 and 1e30, got {value!r:.50}") from None


End = Annotated[
    Annotated[Whole, Field(ge=-(2**40), le=2**40)] | Annotated[Real, Field(ge=-1e30, le=1e30)], WrapValidator(_number)
]


class SearchRange(Section):
    """Numbers between two ends; whole ones where the setting's own value is whole."""

    low: End
    """The least."""
    high: End
    """The largest."""
    log: Truth = False
    """Whether factors count instead of differences, as for learning rates."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low: an empty range from {self.low:g} to {self.high:g}; low must be below high")
        if self.log and self.low <= 0:
            raise ValueError(f"low: {self.low:g}; a range of factors (log: true) begins above 0")
        return self

    def ends(self) -> tuple[Any, ...]:
        """Values that must be possible."""
        return self.low, self.high


class SearchChoices(Section):
    """Some values, without an order."""

    choices: Annotated[tuple[Any, ...], Field(min_length=2, max_length=1000)]
    """The values; each may be a list, such as optim.betas or tokenizer.patch_nums."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(choice in self.choices[:place] for place, choice in enumerate(self.choices)):
            raise ValueError(f"choices: repeated values in {list(self.choices)}")
        return self

    def ends(self) -> tuple[Any, ...]:
        """Values that must be possible."""
        return self.choices


DIMENSIONS: dict[str, type[Section]] = {"range": SearchRange, "choices": SearchChoices}
"""What a setting is varied over, by the names that stand in pydantic's locations."""


def _kind(value: Any) -> str:
    return (
        "choices" if isinstance(value, SearchChoices) or (isinstance(value, dict) and "choices" in value) else "range"
    )


Dimension = Annotated[
    Annotated[SearchRange, Tag("range")] | Annotated[SearchChoices, Tag("choices")], Discriminator(_kind)
]


class TransferConfig(Section):
    """Whether a rate found at a small size serves large ones: the same rates at several sizes (`tune --transfer`)."""

    parametrizations: Annotated[tuple[Parametrization, ...], Field(min_length=1, max_length=10), Different] = (
        PARAMETRIZATIONS
    )
    """Those that are compared; scaled from the smallest of the sizes, unless `model` says from where."""
    depths: Annotated[tuple[Few, ...], Field(min_length=2, max_length=100), Different] | None = None
    """Sizes; None: the grid's."""
    steps: Steps = 500
    """Steps of each run, so that sizes differ in nothing else."""
    rates: Annotated[Whole, Field(ge=5, le=100)] = 7
    """Base rates (`optim.lr`), each √2 times the one before. More may be asked for later."""
    centre: Positive | None = None
    """The middle one, or the upper one of the two in the middle; None: the experiment's own."""
    seeds: Annotated[Seeds, Field(min_length=2), Different] = (0, 1)
    """Each rate is tried with all of them."""


class SearchConfig(Section):
    """A search for settings, one model a trial, all trials at equal compute."""

    objective: Literal["loss", "fid", "mind", "loss-and-flops"] = "loss"
    """What is minimised: the validation loss, or FID or MIND of drawn images (as `evaluation.fidelity` says), at the
    largest of `budgets`; or loss and training FLOPs together, whose Pareto front is sought (each trial is of one of
    `budgets`). Losses of different tokenizers don't compare, so where the tokenizer varies it is FID or MIND."""
    depth: Few | None = None
    """Size of the models; None: the smallest of the grid."""
    budgets: Annotated[Budgets, Field(min_length=1)] | None = None
    """Training FLOPs at which trials are compared, rising: a trial that is worse than the median at one of them is not
    trained on to the next. None: the smallest budget of the grid."""
    space: Annotated[dict[Name, Dimension], Field(max_length=100)] = Field(default_factory=dict)
    """Dotted fields of `optim`, `model` and `tokenizer`, or `depth`: each with `low` and `high`, or `choices`. Empty:
    the learning rate, to an eighth and to eight times its own value."""
    sampler: Literal["gp", "tpe", "random"] = "gp"
    """What proposes the settings: Optuna's Gaussian process, its tree-structured Parzen estimator, or chance."""
    seed: Seed = 0
    """Of the sampler, and of the trials' runs."""
    confirmation_seeds: Seeds | None = None
    """Seeds with which the best settings and the experiment's own are trained again: the trials' seed chose the best,
    and says nothing about whether it is better. Fewer than two: not at all. None: the three after `seed`."""
    transfer: TransferConfig = TransferConfig()
    """What `varscale tune --transfer` tries instead."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.budgets is not None and list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(f"budgets: {list(self.budgets)}; each must be larger than the one before")
        if self.seed in self.seeds_to_confirm:
            raise ValueError(f"confirmation_seeds: {self.seed} is the seed that chooses the best; name others")
        return self

    @property
    def seeds_to_confirm(self) -> Seeds:
        """`confirmation_seeds`, those that None stands for included."""
        return (
            self.confirmation_seeds
            if self.confirmation_seeds is not None
            else tuple(self.seed + 1 + index for index in range(3))
        )
