"""Which column plays which role, by the flags given or by the names that a sweep writes, and its values as numbers."""

import difflib
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import TableError
from analysis.options import DEFAULT_TARGETS, FitOptions
from analysis.tables.units import NOUNS, Unit, parse_units

ROLES = ("params", "flops", "tokens", "budget")
LABELS = ("run_id", "group", "seed")
SWEEP_COLUMNS = {
    "params": "params_total",
    "flops": "train_flops",
    "tokens": "tokens_seen",
    "budget": "budget_flops",
    "loss": "loss",
    "run_id": "run",
    "seed": "seed",
}
FOUND_BY_NAME = ("params", "flops", "tokens", "seed")
"""Roles that a table's column of the same name takes without being asked."""
UNUSED_UNLESS_ASKED = {
    "budget": "--budget-column budget",
    "group": "--group group",
    "run_id": "--run-id run_id",
    "status": "--where \"status == '…'\"",
    "variant": "--where \"variant == '…'\"",
}
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?(?=\D*$)")
_GAPS = re.compile(r"(?<=\d)[ _'’\u00a0\u2009\u202f](?=\d{3}(?!\d))")
"""Between thousands where no decimal mark can be meant: 20 000 000, 20_000_000, 20'000'000."""
_WITH_SUFFIX = re.compile(
    r"[~≈]?\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*"
    r"(?:(?P<suffix>thousand|million|billion|trillion|[kmbt]n?|[gpz]|e(?=flop)|%)s?)?"
    r"\s*(?:flops?|param(?:eter)?s?|tokens|images|nats|bits)?",
    re.IGNORECASE,
)
_POWER_OF_TEN = re.compile(r"(?:(?P<number>\d+\.?\d*)\s*[x×·*]\s*)?10\s*(?:\^|\*\*)\s*\{?(?P<power>[+-]?\d{1,3})\}?")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18, "z": 1e21, "%": 0.01}
_LONGEST_NUMBER = 40
_FAR_BELOW = 1e-3
_MISSING = ("", "-", "--", "---", "–", "—", "−", "?", "NA", "N/A", "n/a", "na", "NaN", "nan", "None", "none", "null")


@dataclass(frozen=True)
class RoleMapping:
    """Which source column plays each role, what is fitted, and in which units.

    Attributes:
        columns: source column by role.
        targets: columns to fit.
        units: by role or column, as far as they were given.
        is_sweep: whether the table is one that a sweep of varscale wrote.
        notes: what was taken by its name alone.
        own: names that mean something here and that the table uses for something else.
    """

    columns: dict[str, str]
    targets: tuple[str, ...]
    units: dict[str, Unit] = field(default_factory=dict)
    is_sweep: bool = False
    notes: tuple[str, ...] = ()
    own: tuple[str, ...] = ()


def map_columns(frame: pd.DataFrame, options: FitOptions) -> RoleMapping:
    """Gives roles to columns.

    Raises:
        TableError: a column that was named is missing, or nothing can be fitted.
    """
    is_sweep = {"params_total", "train_flops"} <= set(frame.columns)
    given = {
        "params": options.params,
        "flops": options.flops,
        "tokens": options.tokens,
        "budget": options.budget,
        "run_id": options.run_id,
        "group": options.group,
        "seed": options.seed_column,
    }
    columns: dict[str, str] = {}
    notes: list[str] = []
    for role, name in given.items():
        if name is not None:
            columns[role] = column(frame, name)
        elif is_sweep and SWEEP_COLUMNS.get(role) in frame.columns:
            columns[role] = SWEEP_COLUMNS[role]
        elif role in FOUND_BY_NAME and role in frame.columns and role not in given.values():
            columns[role] = role
            notes.append(f"column {role!r} is taken for {NOUNS.get(role, role)} by its name")
    if options.tokens is None and options.tokens_from_flops is not None and {"params", "flops"} <= set(columns):
        columns.pop("tokens", None)
    if "budget" in columns and "flops" not in columns:
        columns["flops"] = columns["budget"]
        notes.append("training FLOPs are the nominal budgets, for want of a column of their own")
    targets = _targets(frame, options)
    for name in options.x:
        if name not in ROLES:
            column(frame, name)
        if name in LABELS:
            raise TableError(f"--x {name}: the name means something else here; rename the column")
    if not any(role in columns for role in ("params", "flops", "tokens")) and not options.x and not options.of_rates:
        raise TableError("name at least one column to fit against, by --params, --flops or --tokens")
    units = parse_units(options.units)
    for name in units:
        if name in NOUNS and name not in columns:
            raise TableError(f"--unit {name}={units[name].given}: no column plays {name}")
        if name not in NOUNS:
            column(frame, name)
    for name in targets:
        if inputs := _inputs_that_it_plays(name, columns, options.x):
            raise TableError(f"--target {name}: no law can be fitted to what it is fitted against ({inputs[0]})")
    own = [] if is_sweep else _own(frame, columns, targets, options)
    return RoleMapping(columns, tuple(targets), units, is_sweep, tuple(notes), tuple(own))


def column(frame: pd.DataFrame, name: str) -> str:
    """The name, if it is one of the frame's columns.

    Raises:
        TableError: naming the nearest columns.
    """
    if name in frame.columns:
        return name
    by_case = {str(each).lower(): str(each) for each in frame.columns if each != "row"}
    near = difflib.get_close_matches(name.lower(), list(by_case), n=3, cutoff=0.5)
    named = "did you mean " + " or ".join(repr(by_case[each]) for each in near)
    hint = named if near else f"columns: {_some_columns(frame)}"
    raise TableError(f"the table has no column {name!r}; {hint}")


def _some_columns(frame: pd.DataFrame) -> str:
    names = [str(each) for each in frame.columns if each != "row"]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def free_name(frame: pd.DataFrame, name: str) -> str:
    """What a table's own column is called here whose name means something else."""
    while name in frame.columns:
        name = f"source {name}"
    return name


def plain_name(name: str) -> str:
    """A column's name as others spell it too: `CFG scale` and `cfg-scale` are cfg_scale."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def condition_name(name: str) -> str:
    """A column's name as conditions write it."""
    return name if name.isidentifier() else f"`{name}`"


def some(names: tuple[str, ...]) -> str:
    """The first eight, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def numbers(frame: pd.DataFrame, name: str, counts: bool = False) -> "pd.Series[float]":
    """A column as numbers; blank text, dashes and NA are missing values.

    Commas are thousands separators where that is certain: every comma is followed by three digits, and some number
    has two of them or the column holds counts. Suffixes (`125m`, `6.7 B`, `300k`) are read where most values have one.

    Args:
        frame: rows with their `row`.
        name: the column.
        counts: whether it holds parameters, FLOPs or tokens, which have no decimal commas of three digits.

    Raises:
        TableError: naming the rows whose value is no number.
    """
    source = frame[name]
    if isinstance(source.dtype, pd.CategoricalDtype):
        source = source.astype(source.cat.categories.dtype if source.notna().all() else object)
    if pd.api.types.is_bool_dtype(source) or pd.api.types.is_datetime64_any_dtype(source):
        raise TableError(f"column {name!r} holds {source.dtype}, not numbers")
    if pd.api.types.is_complex_dtype(source) or pd.api.types.is_timedelta64_dtype(source):
        raise TableError(f"column {name!r} holds {source.dtype}, not numbers")
    blank = source.isna()
    if not pd.api.types.is_numeric_dtype(source):
        texts = source.map(lambda value: _plain(value) if isinstance(value, str) else value).astype(object)
        missing = texts.map(lambda value: isinstance(value, str) and value in _MISSING).astype(bool)
        blank = texts.isna() | (missing if not missing.all() else texts == "")
        source = _with_suffixes(_without_thousands(texts.mask(blank, None), counts))
        source = source.map(lambda value: None if isinstance(value, bool | list | dict | complex) else value)
    values = pd.to_numeric(source, errors="coerce").astype("float64")
    values = pd.Series(values.to_numpy(dtype=np.float64, na_value=np.nan), index=frame.index)
    bad = values.isna() & ~blank
    if bad.any():
        raise TableError(f"column {name!r}: not a number in {rows_text(frame, bad, name)}{_hint(frame, bad, name)}")
    return values


def rows_text(frame: pd.DataFrame, bad: "pd.Series[bool]", name: str) -> str:
    """Which rows, with their values."""
    chosen = frame[bad.to_numpy()]
    shown = ", ".join(
        f"row {row} ({str(value)[:40]})" for row, value in zip(chosen["row"][:5], chosen[name][:5], strict=True)
    )
    return shown + (f" and {len(chosen) - 5} more" if len(chosen) > 5 else "")


def _targets(frame: pd.DataFrame, options: FitOptions) -> list[str]:
    targets = list(dict.fromkeys(column(frame, name) for name in options.target))
    if options.loss is not None and options.loss not in targets:
        targets.insert(0, column(frame, options.loss))
    if not targets:
        targets = [name for name in DEFAULT_TARGETS if name in frame.columns and frame[name].notna().any()]
    if not targets and "loss" in frame.columns:
        targets = ["loss"]
    if not targets:
        raise TableError(f"name the column to fit, by --loss or --target; columns: {_some_columns(frame)}")
    return targets


def _inputs_that_it_plays(target: str, columns: dict[str, str], x: tuple[str, ...]) -> list[str]:
    """The inputs that a target is itself, where that leaves nothing to fit it against.

    Best sizes, best numbers of tokens and the like are targets too, against the other inputs.
    """
    usual = ("flops", "params", "tokens")
    plays = [role for role, source in columns.items() if source == target and role in (*ROLES, target)]
    asked = [name for name in x if columns.get(name, name) == target]
    others = [role for role in usual if role in columns and role not in plays]
    return asked or [role for role in plays if role not in usual or not (others or x)]


def _own(frame: pd.DataFrame, columns: dict[str, str], targets: list[str], options: FitOptions) -> list[str]:
    """What the table uses a name for that means something here."""
    used = {*columns.values(), *targets, *options.x}
    found = []
    for name, flag in UNUSED_UNLESS_ASKED.items():
        asked = any(name in condition for condition in options.where)
        if name in frame.columns and name not in used and not asked and frame[name].astype(str).nunique() > 1:
            found.append(f"the table's own column {name!r} has no effect here; say {flag} if it should")
    shadowed = [role for role in (*ROLES, *LABELS) if role in frame.columns and columns.get(role, role) != role]
    return found + [
        f"{role!r} means column {columns[role]!r}; the table's own {role!r} is kept as 'source {role}'"
        for role in shadowed
    ]


def _plain(text: str) -> str:
    """A text without gaps between thousands and with the sign minus as computers write it."""
    return _GAPS.sub("", text.strip()).replace("−", "-")


def _without_thousands(texts: "pd.Series[str]", counts: bool) -> "pd.Series[str]":
    with_comma = texts[texts.map(lambda value: isinstance(value, str) and "," in value).astype(bool)]
    certain = len(with_comma) and with_comma.map(lambda value: _THOUSANDS.match(value) is not None).all()
    if not certain or not (counts or with_comma.str.count(",").gt(1).any()):
        return texts
    return texts.map(lambda value: value.replace(",", "") if isinstance(value, str) else value)


def _with_suffixes(texts: "pd.Series[str]") -> "pd.Series[Any]":
    """Numbers such as 1.3B or 10^21 as such, where at least half of the column's texts have such forms.

    A number without a suffix that is far smaller than all others is none: 20 beside 0.13B was meant for 20M.
    """
    known = texts.dropna()
    read = known.map(_scaled).astype("float64")
    if 2 * read.notna().sum() < len(known) or not len(known):
        return texts
    bare = pd.to_numeric(known[read.isna()], errors="coerce")
    unclear = bare.index[bare < _FAR_BELOW * read.min()]
    return texts.mask(texts.index.isin(read.dropna().index), read).mask(texts.index.isin(unclear), "?")


def _scaled(value: object) -> float | None:
    """A text such as `6.7 b` or `3x10^21` as a number."""
    if not isinstance(value, str) or len(value) > _LONGEST_NUMBER:
        return None
    if (value[-1:].isalpha() or value[-1:] == "%") and (found := _WITH_SUFFIX.fullmatch(value)):
        return float(found["number"]) * (_SUFFIXES[found["suffix"][0].lower()] if found["suffix"] else 1.0)
    value = re.sub("10(?=[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻])", "10^", value).translate(_RAISED)
    if found := _POWER_OF_TEN.fullmatch(value):
        return float(f"{found['number'] or 1}e{found['power']}")
    return None


def _hint(frame: pd.DataFrame, bad: "pd.Series[bool]", name: str) -> str:
    texts = [str(value).strip() for value in frame.loc[bad.to_numpy(), name].unique()]
    first = texts[0]
    if _scaled(first) is not None or first.replace(".", "", 1).isdecimal():
        return "; give all of the column's numbers a suffix such as 125m or 1.3B, or none"
    if re.fullmatch(r"[+-]?\d+([.,]\d+)+(e[+-]?\d+)?", first, re.IGNORECASE):
        return "; write decimals with a point and thousands without separators"
    if 2 * bad.sum() < len(bad) and len(texts) == 1 and re.fullmatch("[a-zA-Z ]{1,40}", first):
        return f"; leave such out by --where \"{condition_name(name)} != '{first}'\""
    return ""
