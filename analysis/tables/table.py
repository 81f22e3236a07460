"""Tables of runs: mapped to roles, filtered and checked, with every exclusion recorded.

Inside the package a table has the columns `params` (N), `flops` (C), `tokens` (D), `budget` (FLOPs that group a row
into an IsoFLOP set), `run_id`, `group`, `seed`, as far as the source has them, then the targets under their own names.
A source column that has one of these names and another meaning is kept as `source …`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.errors import TableError
from analysis.options import FitOptions
from analysis.tables.annealing import RATE_LEFT, RATE_SCHEDULE, RATE_SUM, RateSchedule, with_rate_sums
from analysis.tables.conditions import meets
from analysis.tables.evaluations import EVALUATORS, GUIDANCES, companions, kept_apart, runs
from analysis.tables.repeats import copies
from analysis.tables.roles import (
    LABELS,
    ROLES,
    SWEEP_COLUMNS,
    condition_name,
    free_name,
    map_columns,
    numbers,
    plain_name,
    rows_text,
    some,
)
from analysis.tables.units import NOUNS, Unit

BASE_VARIANTS = ("", "base", "default", "none")
NATS = "nats a token"
_OR = " or "
_APART = "column {name} has {count} values; values that differ in it don't compare"
MIXTURES = (
    ("mixed-evaluators", (*EVALUATORS, *GUIDANCES), _APART),
    ("mixed-tokenizers", ("tokenizer", "tokenizer_name", "vocab_size", "patch_nums", "loss_unit"), _APART),
    (
        "mixed-precision",
        ("precision",),
        "rows were computed in {count} precisions ({values}), which don't quite compare",
    ),
    ("", ("device",), "rows were computed on different devices ({values}): they differ in rounding only"),
)
"""Columns in which rows may differ, what that means, and the code of the warning; without a code it is a note."""


@dataclass(frozen=True)
class Exclusion:
    """Rows that a rule left out."""

    reason: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class RunsTable:
    """A checked table.

    Attributes:
        frame: the runs kept, a row each; `row` holds the place in the source.
        columns: which source column plays each role.
        targets: the columns to fit that exist.
        units: by role or column, as they were given; values here are multiplied by their factors already.
        filters: what was asked for, as text, in order.
        exclusions: what was left out and why.
        notes: what a reader should know (repeated rows, values derived, what was guessed about a file).
        own: names that mean something here and that the table uses for something else.
        sha256: hash of the kept rows' values.
        sources: names of the files.
        n_source: number of rows before any exclusion.
        n_runs: number of runs before any exclusion; a run has a row for each way in which it was evaluated.
        missing: runs that belong to the table and have no result.
        evaluations: which rows are left out of the fits of FID and its like alone, or fitted apart, by warning code.
        settings: of evaluations among the targets, how their values were made.
        measured: the rows kept, of which a run has one for each way in which it was evaluated.
        schedules: of learning rates, which `rate_schedule` numbers from 1, where a law takes them.
    """

    frame: pd.DataFrame
    columns: dict[str, str]
    targets: tuple[str, ...]
    filters: tuple[str, ...] = ()
    exclusions: tuple[Exclusion, ...] = ()
    notes: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    units: Mapping[str, Unit] = field(default_factory=dict)
    sha256: str = ""
    sources: tuple[str, ...] = ()
    n_source: int = 0
    n_runs: int = 0
    missing: tuple[str, ...] = ()
    evaluations: tuple[tuple[str, str], ...] = ()
    settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    measured: pd.DataFrame = field(default_factory=pd.DataFrame)
    schedules: tuple[RateSchedule, ...] = ()

    @property
    def is_sweep(self) -> bool:
        """Whether compute is that of a sweep of varscale, whose columns are known."""
        return self.columns.get("flops") == SWEEP_COLUMNS["flops"]

    @property
    def loss_unit(self) -> str:
        """What a sweep's loss is measured in."""
        return loss_unit(self.frame)

    @property
    def unit_of_data(self) -> str:
        """What D counts: tokens, or what was said by `--unit tokens=images`."""
        return self.units["tokens"].noun if "tokens" in self.units else NOUNS["tokens"]

    def has(self, *roles: str) -> bool:
        """Whether all these columns exist."""
        return all(role in self.frame.columns for role in roles)


@dataclass
class _Log:
    filters: list[str] = field(default_factory=list)
    exclusions: list[Exclusion] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def prepare(given: pd.DataFrame, options: FitOptions) -> RunsTable:
    """Maps columns to roles, filters, checks. Pure: the frame given stays as it is.

    Raises:
        TableError: naming the column and the rows, with what would be right.
    """
    if not len(given):
        raise TableError("the table of runs is empty")
    names = pd.Index([str(name) for name in given.columns])
    if names.has_duplicates:
        raise TableError(f"the table has two columns named {str(names[names.duplicated()][0])!r}")
    log = _Log()
    source = given.set_axis(names, axis="columns").reset_index(drop=True)
    if "row" not in source.columns or not source["row"].is_unique or source["row"].isna().any():
        source = source.rename(columns={"row": free_name(source, "row")})
        source["row"] = [str(number) for number in range(1, len(source) + 1)]
    mapping = map_columns(source, options)
    ids = source[mapping.columns["run_id"]] if "run_id" in mapping.columns else source["row"]
    log.notes += [*given.attrs.get("notes", ()), *mapping.notes]
    if mapping.is_sweep:
        source = _leave_out_unfinished(source, log)
    columns, others = mapping.columns, [name for name in options.x if name not in ROLES]
    source = _with_numbers(source, columns, (*mapping.targets, *others), log)
    schedules: tuple[RateSchedule, ...] = ()
    if options.of_rates:
        rates = with_rate_sums(source, columns, options)
        schedules = rates.schedules
        log.notes.append(rates.note)
        source = _exclude(
            rates.source, rates.alone, "the only row of its run, whose learning rates can't be summed", log
        )
        source = _exclude(source, source[RATE_SUM].isna(), "no learning rates before it", log)
    for condition in options.where:
        source = _where(source, condition, log)
    _need_rows(source, log)
    wanted = (*mapping.targets, *others, *companions(source, mapping.targets))
    frame, shadowed = _with_roles(source, columns, wanted, mapping.units)
    targets = tuple(shadowed.get(name, name) for name in mapping.targets)
    renamed = [f"the target {name!r} is called {shadowed[name]!r} here" for name in mapping.targets if name in shadowed]
    log.notes += renamed
    roles = [role for role in columns if role in ROLES]
    labels = [name for name in ("group", *(["run_id"] if options.checkpoints else [])) if name in columns]
    frame = _leave_out_missing(frame, [*roles, *labels], targets, log)
    _need_rows(frame, log)
    _check_positive(frame, [*roles, *targets, *others], columns)
    frame = _derive(frame, options, log)
    _check_positive(frame, [role for role in ROLES[:3] if role in frame.columns], columns)
    if options.drop_highest:
        frame = _drop_highest(frame, targets, options.drop_highest, log)
    measured = frame.reset_index(drop=True)
    loss = options.loss or "loss"
    likely = loss in targets and all(unit.startswith("nats") for unit in loss_unit(measured).split(_OR))
    apart = kept_apart(measured, targets, loss if likely else "")
    _check_run_ids(apart.frame, options)
    known = dict.fromkeys((*ROLES, *LABELS, RATE_SUM, RATE_LEFT, RATE_SCHEDULE, *targets))
    kept = [name for name in known if name in measured.columns]
    log.notes += copies(apart.frame, kept)
    if further := len(measured) - len(apart.frame):
        log.notes.append(f"{further} rows are further evaluations of runs that other rows have")
    log.notes += [text for code, text in mixtures(apart.frame) if not code]
    return RunsTable(
        frame=apart.frame,
        columns=columns,
        targets=apart.targets,
        filters=tuple(log.filters),
        exclusions=tuple(log.exclusions),
        notes=tuple(log.notes),
        own=mapping.own,
        units=mapping.units,
        sha256=hash_rows(measured[kept]),
        sources=tuple(given.attrs.get("sources", ())),
        n_source=len(given),
        n_runs=len(given) if options.checkpoints else ids.nunique(),
        missing=tuple(given.attrs.get("missing", ())),
        evaluations=apart.found,
        settings=apart.settings,
        measured=measured,
        schedules=schedules,
    )


def loss_unit(frame: pd.DataFrame) -> str:
    """As the rows say; those that don't are in nats a token."""
    if "loss_unit" not in frame.columns:
        return NATS
    return _OR.join(sorted(frame["loss_unit"].fillna(NATS).astype(str).unique()))


def mixtures(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """What the rows differ in that tells how far their values compare: the warning's code, or none for a note."""
    found = []
    for code, columns, meaning in MIXTURES:
        for name in frame.columns:
            if plain_name(name) in columns and len(values := sorted(frame[name].dropna().astype(str).unique())) > 1:
                shown = some(tuple(value[:40] for value in values))
                found.append((code, meaning.format(name=name, count=len(values), values=shown)))
    return found


def hash_rows(frame: pd.DataFrame) -> str:
    """SHA-256 of a frame's column names and values, independent of the file format they came from."""
    digest = hashlib.sha256(json.dumps(list(map(str, frame.columns))).encode())
    for name in frame.columns:
        values = frame[name]
        if pd.api.types.is_numeric_dtype(values):
            digest.update(values.to_numpy(dtype=np.float64).tobytes())
        else:
            digest.update("\x1f".join(map(str, values)).encode())
    return digest.hexdigest()


def _with_roles(
    source: pd.DataFrame, columns: Mapping[str, str], measured: Iterable[str], units: Mapping[str, Unit]
) -> tuple[pd.DataFrame, dict[str, str]]:
    """The source with its roles as columns, and what its own columns of these names are called now.

    All are taken from the source before any is set: names may be swapped.
    """
    names = [role for role in (*ROLES, *LABELS) if role in source.columns and columns.get(role) != role]
    shadowed = {role: free_name(source, role) for role in names}
    taken: dict[str, Any] = {}
    for role, name in columns.items():
        if role in ROLES:
            values = numbers(source, name, counts=True)
            taken[role] = units[role].values(values) if role in units else values
        else:
            taken[role] = _labels(source[name])
    for name in measured:
        taken.setdefault(shadowed.get(name, name), numbers(source, name))
    return source.rename(columns=shadowed).assign(**taken), shadowed


def _labels(values: "pd.Series[Any]") -> "pd.Series[Any]":
    """Names of runs, groups or seeds; texts where they are of several kinds, or of one that can't be a label."""
    kinds = set(values.dropna().map(type))
    if len(kinds) > 1 or kinds & {list, dict, set}:
        return values.map(str).where(values.notna(), None).astype(object)
    return values.astype(object)


def _with_numbers(source: pd.DataFrame, columns: Mapping[str, str], measured: Iterable[str], log: _Log) -> pd.DataFrame:
    """The source with texts such as 1.3B as numbers, before conditions are met; what is no number may be left out."""
    labels = {columns[name] for name in LABELS if name in columns}
    counts = {columns[role] for role in ROLES if role in columns}
    read: dict[str, Any] = {}
    for name in dict.fromkeys((*columns.values(), *measured)):
        if name in labels or pd.api.types.is_numeric_dtype(source[name]):
            continue
        try:
            read[name] = numbers(source, name, counts=name in counts)
        except TableError:
            continue
        written = zip(source[name], read[name], strict=True)
        if first := next((each for each in written if isinstance(each[0], str) and _unusual(each[0])), None):
            log.notes.append(f"column {name!r}: numbers are read from texts, such as {first[1]:g} from {first[0]!r}")
    return source.assign(**read)


def _unusual(text: str) -> bool:
    """Whether a text is read as a number that isn't simply one."""
    try:
        float(text)
    except ValueError:
        return any(sign.isdigit() for sign in text)
    return False


def _leave_out_unfinished(frame: pd.DataFrame, log: _Log) -> pd.DataFrame:
    """Diverged cells, and variants of a cell (another learning rate) beside the base recipe."""
    if "status" in frame.columns:
        bad = frame["status"].notna() & (frame["status"].astype(str) != "finished")
        frame = _exclude(frame, bad, "status is not finished", log)
    if "variant" in frame.columns:
        names = frame["variant"].astype(object).fillna("").astype(str).str.lower()
        other = ~names.isin(BASE_VARIANTS)
        if other.any() and not other.all():
            frame = _exclude(frame, other, "variant of the base recipe", log)
    return frame


def _where(frame: pd.DataFrame, condition: str, log: _Log) -> pd.DataFrame:
    keep = meets(frame, condition)
    log.filters.append(f"where {condition}")
    return _exclude(frame, ~keep, f"where {condition}", log)


def _drop_highest(frame: pd.DataFrame, targets: Sequence[str], count: int, log: _Log) -> pd.DataFrame:
    target, numbers = targets[0], runs(frame, targets)
    if count >= numbers.nunique():
        raise TableError(f"--drop-highest {count} leaves none of the {numbers.nunique()} rows")
    worst = frame[target].sort_values(ascending=False, kind="stable").index
    highest = numbers.loc[worst].drop_duplicates()[:count]
    log.filters.append(f"drop-highest {count} ({target})")
    return _exclude(frame, numbers.isin(highest), f"one of the {count} highest values of {target}", log)


def _exclude(frame: pd.DataFrame, bad: Any, reason: str, log: _Log) -> pd.DataFrame:
    mask = np.asarray(bad, dtype=bool)
    if mask.any():
        log.exclusions.append(Exclusion(reason, tuple(frame["row"][mask].astype(str))))
    return frame[~mask]


def _need_rows(frame: pd.DataFrame, log: _Log) -> None:
    if not len(frame):
        causes = "; ".join(f"{len(each.rows)} rows: {each.reason}" for each in log.exclusions)
        raise TableError(f"no rows are left ({causes})")


def _leave_out_missing(frame: pd.DataFrame, roles: Iterable[str], targets: Sequence[str], log: _Log) -> pd.DataFrame:
    """Rows without a value: in the first target or an input they are left out and named."""
    for name in (*roles, targets[0]):
        frame = _exclude(frame, frame[name].isna(), f"no value in {name}", log)
    return frame


def _check_positive(frame: pd.DataFrame, names: Sequence[str], columns: dict[str, str]) -> None:
    for name in names:
        values = frame[name].to_numpy(dtype=float)
        bad = ~(values > 0) & ~np.isnan(values) | np.isinf(values)
        if bad.any():
            source = columns.get(name, name)
            where = rows_text(frame, pd.Series(bad, index=frame.index), name)
            way_out = _way_out(source, values, bad)
            raise TableError(f"column {source!r}: values must be positive and finite; not so in {where}; {way_out}")


def _way_out(source: str, values: NDArray[np.float64], bad: NDArray[np.bool_]) -> str:
    if (values[~np.isnan(values)] < 0).all():
        return "all are negative: are they log-likelihoods? Then change their sign"
    name = condition_name(source)
    return f"leave them out by --where '{name} {'> 0' if values[bad].min() <= 0 else '< 1e300'}'"


def _derive(frame: pd.DataFrame, options: FitOptions, log: _Log) -> pd.DataFrame:
    """The third of N, D and C from the other two, where C = k·N·D was declared."""
    factor = options.tokens_from_flops
    if factor is None:
        return frame
    missing = [role for role in ("params", "flops", "tokens") if role not in frame.columns]
    if len(missing) > 1:
        raise TableError("--tokens-from-flops needs two of the columns of parameters, of FLOPs and of tokens")
    with np.errstate(over="ignore"):
        if missing == ["tokens"]:
            log.notes.append(f"tokens are D = C / ({factor:g}·N)")
            return frame.assign(tokens=frame["flops"] / (factor * frame["params"]))
        if missing == ["flops"]:
            log.notes.append(f"FLOPs are C = {factor:g}·N·D")
            return frame.assign(flops=factor * frame["params"] * frame["tokens"])
        if missing == ["params"]:
            log.notes.append(f"parameters are N = C / ({factor:g}·D)")
            return frame.assign(params=frame["flops"] / (factor * frame["tokens"]))
    return frame


def _check_run_ids(frame: pd.DataFrame, options: FitOptions) -> None:
    if options.checkpoints and "run_id" not in frame.columns:
        raise TableError("--checkpoints needs --run-id: rows of one run are drawn together")
    if "run_id" not in frame.columns or options.checkpoints:
        return
    repeated = frame["run_id"].duplicated(keep=False) & frame["run_id"].notna()
    if repeated.any():
        names = ", ".join(repr(name) for name in frame["run_id"][repeated].unique()[:3])
        raise TableError(
            f"run ids must be unique, but {names} repeat (rows {', '.join(frame['row'][repeated][:6])}); "
            "say --checkpoints if rows are checkpoints of runs"
        )
