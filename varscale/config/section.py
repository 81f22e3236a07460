"""What the parts of an experiment are made of: a frozen section, and numbers within bounds."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A part of an experiment: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _numbers_only(value: Any) -> Any:
    """Python counts with booleans and would read text; an experiment doesn't."""
    if isinstance(value, bool):
        raise ValueError(f"input should be a number, got {str(value).lower()}")
    if isinstance(value, str):
        raise ValueError(f"input should be a valid integer, got {value!r}")
    return value


Whole = Annotated[int, BeforeValidator(_numbers_only)]
Real = Annotated[float, Field(strict=True)]
Truth = Annotated[bool, Field(strict=True)]
Fraction = Annotated[Real, Field(ge=0, le=1)]
Decay = Annotated[Real, Field(ge=0, lt=1)]
Positive = Annotated[Real, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[Real, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[Whole, Field(ge=1, le=2**40)]
CountOrZero = Annotated[Whole, Field(ge=0, le=2**40)]
Seed = Annotated[Whole, Field(ge=0, lt=2**31)]
