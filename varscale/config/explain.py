"""What is wrong with an experiment's values, on one line that names each file (or override) and key."""

import difflib
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from varscale.config.experiment import Experiment
from varscale.config.kinds import Kinds
from varscale.config.search import DIMENSIONS
from varscale.config.section import Section
from varscale.config.text import shortened

Key = tuple[str, ...]
"""Where a value stands in an experiment, such as ("optim", "lr")."""

Place = Callable[[Key, bool], str]
"""Where a value was written; True: a section's own check failed, which may be due to other values in it."""

KINDS: dict[str, Kinds[Any]] = {
    name: kinds for name, field in Experiment.model_fields.items() if (kinds := Kinds.of(field)) is not None
}
"""The sections that come in several kinds."""
MOVED = {"runtime.precision": "precision is now part of the recipe: write optim.precision: float32 (or bfloat16)"}
"""Keys of earlier versions, and what to write now."""

_MOST_PROBLEMS = 5


def explain(error: ValidationError, place: Place) -> str:
    """All that pydantic found wrong, or the first of it; `place` names where each value was written."""
    details = error.errors(include_url=False)
    sections = {detail["loc"][:end] for detail in details for end in range(len(detail["loc"]))}
    inner = [detail for detail in details if detail["loc"] not in sections]
    problems = []
    for detail in inner[:_MOST_PROBLEMS]:
        key, message = _problem(detail)
        problems.append(f"{place(key, detail['type'] == 'value_error')}: {shortened('.'.join(key))}: {message}")
    if len(inner) > _MOST_PROBLEMS:
        problems.append(f"and {len(inner) - _MOST_PROBLEMS} more")
    return "; ".join(problems)


def explain_section(error: ValidationError, section: type[Section], source: str) -> str:
    """The same of a section that stands by itself and has none below it."""
    problems = []
    for detail in error.errors(include_url=False)[:_MOST_PROBLEMS]:
        key = ".".join(map(str, detail["loc"]))
        if detail["type"] == "extra_forbidden":
            problem = f"unknown key{nearest(key, sorted(section.model_fields))}"
        else:
            problem = f"{detail['msg'][0].lower()}{detail['msg'][1:]}, got {reprlib.repr(detail['input'])}"
        problems.append(f"{source}: {shortened(key)}: {problem}")
    return "; ".join(problems)


def nearest(word: str, choices: Sequence[str]) -> str:
    """`; did you mean …?`, or nothing where no choice is like the word."""
    within = [choice for choice in choices if choice.endswith(f"/{word}")]
    close = within or difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _problem(detail: ErrorDetails) -> tuple[Key, str]:
    """The key that is wrong, and what is wrong with it."""
    key, section = _written(detail["loc"])
    shown = reprlib.repr(detail["input"])
    match detail["type"]:
        case "extra_forbidden" if ".".join(key) in MOVED:
            return key, MOVED[".".join(key)]
        case "extra_forbidden":
            return key, f"unknown key{nearest(key[-1], sorted(section.model_fields) if section else [])}"
        case "missing":
            return key, "missing"
        case "union_tag_not_found" if isinstance(detail["input"], dict):
            kinds = KINDS[key[0]]
            return (*key, kinds.key), f"missing; one of {', '.join(kinds.sections)}"
        case "union_tag_invalid":
            kinds, given = KINDS[key[0]], shortened(detail["ctx"]["tag"])
            names = list(kinds.sections)
            return (*key, kinds.key), f"{given!r} is none of {', '.join(names)}{nearest(given, names)}"
        case "model_type" | "model_attributes_type" | "dict_type" | "union_tag_not_found":
            return key, f"expected a section of keys, got {shown}"
        case "tuple_type":
            return key, f"expected a list, such as [12, 16], got {shown}"
        case "value_error":
            # a section's own check names the field first, "patch_nums: must grow strictly"; a field's check doesn't
            field, _, message = detail["msg"].removeprefix("Value error, ").partition(": ")
            return ((*key, *field.split(".")), message) if message else (key, field)
    return key, f"{detail['msg'][0].lower()}{detail['msg'][1:]}, got {shown}"


def _written(location: Sequence[int | str]) -> tuple[Key, type[Section] | None]:
    """A location without the kinds that pydantic puts into it, and the section of which its last part is a key."""
    key: list[str] = []
    section: type[Section] | None = None
    below: type[Section] | None = Experiment
    parts = iter(location)
    for part in parts:
        key.append(str(part))
        if isinstance(part, int):  # a position in a list of sections
            continue
        if key[:-1] == ["search", "space"]:
            below = DIMENSIONS.get(str(next(parts, None)))
            continue
        section, below = below, None
        field = section.model_fields.get(part) if section else None
        if field is not None and (kinds := Kinds.of(field)) is not None:
            below = kinds.sections.get(str(next(parts, None)))
        elif field is not None:
            annotations = (field.annotation, *get_args(field.annotation))  # a section, or a tuple of sections
            classes = (part for part in annotations if isinstance(part, type))
            below = next((part for part in classes if issubclass(part, Section)), None)
    return tuple(key), section
