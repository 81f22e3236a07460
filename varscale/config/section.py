"""What the parts of an experiment are made of: a frozen section, and values within bounds.

Every value has an upper bound, far above what the largest study of the next ten years needs, so that a slip of the
keyboard is an error and not a machine out of memory.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A part of an experiment: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _whole(value: Any) -> Any:
    """1e6 is a count, too; strict integers leave out all floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# strict: neither booleans nor text are numbers
Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Truth = Annotated[bool, Field(strict=True)]

Fraction = Annotated[Real, Field(ge=0, le=1)]
Decay = Annotated[Real, Field(ge=0, lt=1)]
Positive = Annotated[Real, Field(gt=0, le=1e30)]
NonNegative = Annotated[Real, Field(ge=0, le=1e30)]
Depth = Annotated[Whole, Field(ge=1, le=1024)]
"""Transformer blocks."""
Side = Annotated[Whole, Field(ge=1, le=8192)]
"""Pixels, or tokens, along one side of a square."""
Channels = Annotated[Whole, Field(ge=1, le=2**14)]
Few = Annotated[Whole, Field(ge=1, le=1024)]
"""Parts of a model, or other things that are counted on fingers."""
BatchSize = Annotated[Whole, Field(ge=1, le=2**24)]
BatchSizeOrZero = Annotated[Whole, Field(ge=0, le=2**24)]
Classes = Annotated[Whole, Field(ge=1, le=2**24)]
Codes = Annotated[Whole, Field(ge=2, le=2**24)]
Images = Annotated[Whole, Field(ge=1, le=2**40)]
ImagesOrZero = Annotated[Whole, Field(ge=0, le=2**40)]
Steps = Annotated[Whole, Field(ge=1, le=2**40)]
Processes = Annotated[Whole, Field(ge=0, le=4096)]
"""Processes or threads; 0: as many as suit the machine."""
Seed = Annotated[Whole, Field(ge=0, lt=2**31)]

PathText = Annotated[str, Field(min_length=1, max_length=4096)]
"""Path of a file or folder."""
Name = Annotated[str, Field(min_length=1, max_length=200)]
"""A short text."""
Changes = dict[Name, Any]
"""Dotted fields and what they become; they are checked where they are applied."""
