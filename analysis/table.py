"""Tables of runs: read from any file, mapped to roles, filtered and checked, with every exclusion recorded.

Inside the package a table has the columns `params` (N), `flops` (C), `tokens` (D), `budget` (FLOPs that group a row
into an IsoFLOP set), `run_id`, `group`, `seed`, as far as the source has them, then the targets under their own names.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import TableError
from analysis.options import DEFAULT_TARGETS, FitOptions

ROLES = ("params", "flops", "tokens", "budget")
SWEEP_COLUMNS = {
    "params": "params_total",
    "flops": "train_flops",
    "tokens": "tokens_seen",
    "budget": "budget_flops",
    "loss": "loss",
    "run_id": "run",
    "seed": "seed",
}
BASE_VARIANTS = ("", "base", "default", "none")
UNITS = {"params": "parameters", "flops": "FLOPs", "tokens": "tokens", "budget": "FLOPs"}


@dataclass(frozen=True)
class Exclusion:
    """Rows that a rule left out."""

    reason: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class RunsTable:
    """A checked table.

    Attributes:
        frame: the rows kept; `row` holds the place in the source.
        columns: which source column plays each role.
        targets: the columns to fit that exist.
        filters: what was asked for, as text, in order.
        exclusions: what was left out and why.
        notes: what a reader should know (repeated rows, values derived).
        sha256: hash of the kept rows' values.
        sources: names of the files.
        n_source: number of rows before any exclusion.
    """

    frame: pd.DataFrame
    columns: dict[str, str]
    targets: tuple[str, ...]
    filters: tuple[str, ...] = ()
    exclusions: tuple[Exclusion, ...] = ()
    notes: tuple[str, ...] = ()
    sha256: str = ""
    sources: tuple[str, ...] = ()
    n_source: int = 0

    def has(self, *roles: str) -> bool:
        """Whether all these columns exist."""
        return all(role in self.frame.columns for role in roles)


@dataclass
class _Log:
    filters: list[str] = field(default_factory=list)
    exclusions: list[Exclusion] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_runs(paths: Sequence[str | Path]) -> pd.DataFrame:
    """Reads CSV, TSV, Parquet, JSON-lines or JSON files into one table; `row` names each row's file and place.

    Raises:
        TableError: a file is missing, empty, or of a kind that can't be read.
    """
    if not paths:
        raise TableError("no file with runs was given")
    frames = []
    for path in map(Path, paths):
        frame = _read_one(path)
        prefix = f"{path.name}:" if len(paths) > 1 else ""
        frame["row"] = [f"{prefix}{number}" for number in range(1, len(frame) + 1)]
        frames.append(frame)
    table = pd.concat(frames, ignore_index=True)
    table.attrs["sources"] = tuple(str(Path(path).name) for path in paths)
    return table


def prepare(runs: pd.DataFrame, options: FitOptions) -> RunsTable:
    """Maps columns to roles, filters, checks. Pure: the frame given stays as it is.

    Raises:
        TableError: naming the column and the rows, with what would be right.
    """
    if not len(runs):
        raise TableError("the table of runs is empty")
    twice = runs.columns[runs.columns.duplicated()]
    if len(twice):
        raise TableError(f"the table has two columns named {str(twice[0])!r}")
    log = _Log()
    frame = runs.copy()
    if "row" not in frame.columns:
        frame["row"] = [str(number) for number in range(1, len(frame) + 1)]
    columns, targets = _map_columns(frame, options)
    frame = _leave_out_unfinished(frame, log)
    for condition in options.where:
        frame = _where(frame, condition, log)
    _need_rows(frame, log)
    for role, column in columns.items():
        if role in ROLES:
            frame[role] = _numbers(frame, column)
        elif role in ("run_id", "group", "seed"):
            frame[role] = frame[column]
    others = [name for name in options.x if name not in ROLES]
    for name in (*targets, *others):
        frame[name] = _numbers(frame, name)
    roles = [role for role in columns if role in ROLES]
    frame = _leave_out_missing(frame, [*roles, *(["group"] if "group" in columns else [])], targets, log)
    _need_rows(frame, log)
    _check_positive(frame, [*roles, *targets, *others], columns)
    frame = _derive(frame, columns, options, log)
    if options.drop_highest:
        frame = _drop_highest(frame, targets[0], options.drop_highest, log)
    _check_run_ids(frame, options)
    repeated = frame.duplicated(subset=[c for c in (*ROLES, "group", "seed", *targets) if c in frame.columns])
    if repeated.any():
        log.notes.append(f"{int(repeated.sum())} rows repeat another row's values and are kept")
    frame = frame.reset_index(drop=True)
    kept = [c for c in (*ROLES, "run_id", "group", "seed", *targets) if c in frame.columns]
    return RunsTable(
        frame=frame,
        columns=columns,
        targets=tuple(targets),
        filters=tuple(log.filters),
        exclusions=tuple(log.exclusions),
        notes=tuple(log.notes),
        sha256=hash_rows(frame[kept]),
        sources=tuple(runs.attrs.get("sources", ())),
        n_source=len(runs),
    )


def hash_rows(frame: pd.DataFrame) -> str:
    """SHA-256 of a frame's column names and values, independent of the file format they came from."""
    digest = hashlib.sha256(json.dumps(list(map(str, frame.columns))).encode())
    for column in frame.columns:
        values = frame[column]
        if pd.api.types.is_numeric_dtype(values):
            digest.update(values.to_numpy(dtype=np.float64).tobytes())
        else:
            digest.update("\x1f".join(map(str, values)).encode())
    return digest.hexdigest()


def column(frame: pd.DataFrame, name: str) -> str:
    """The name, if it is one of the frame's columns.

    Raises:
        TableError: naming the nearest columns.
    """
    if name in frame.columns:
        return name
    names = [str(each) for each in frame.columns if each != "row"]
    by_case = {each.lower(): each for each in names}
    near = difflib.get_close_matches(name.lower(), list(by_case), n=3, cutoff=0.5)
    hint = (
        "did you mean " + " or ".join(repr(by_case[each]) for each in near) if near else "columns: " + ", ".join(names)
    )
    raise TableError(f"the table has no column {name!r}; {hint}")


def _read_one(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise TableError(f"{path}: no such file")
    kind = path.suffix.lower()
    try:
        if kind in (".parquet", ".pq"):
            frame = pd.read_parquet(path)
        elif kind in (".jsonl", ".ndjson"):
            frame = pd.read_json(path, lines=True)
        elif kind == ".json":
            frame = pd.DataFrame(json.loads(path.read_text(encoding="utf-8")))
        elif kind in (".csv", ".tsv", ".txt"):
            frame = pd.read_csv(path, sep="\t" if kind == ".tsv" else ",")
        else:
            raise TableError(f"{path}: unknown kind of table {kind!r}; .csv, .tsv, .parquet, .jsonl or .json")
    except (ValueError, OSError, TypeError) as error:
        if isinstance(error, TableError):
            raise
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TableError(f"{path}: can't be read as a table: {first_line}") from error
    if not len(frame):
        raise TableError(f"{path}: the table has no rows")
    return frame


def _map_columns(frame: pd.DataFrame, options: FitOptions) -> tuple[dict[str, str], list[str]]:
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
    for role, name in given.items():
        if name is not None:
            columns[role] = column(frame, name)
        elif SWEEP_COLUMNS.get(role) in frame.columns:
            columns[role] = SWEEP_COLUMNS[role]
    if options.tokens is None and options.tokens_from_flops is not None:
        columns.pop("tokens", None)
    targets = [column(frame, name) for name in options.target]
    if options.loss is not None and options.loss not in targets:
        targets.insert(0, column(frame, options.loss))
    if not targets:
        targets = [name for name in DEFAULT_TARGETS if name in frame.columns and frame[name].notna().any()]
    if not targets:
        column(frame, options.loss or "loss")
    for name in options.x:
        if name not in ROLES:
            column(frame, name)
    if not any(role in columns for role in ("params", "flops", "tokens")) and not options.x:
        raise TableError("name at least one column to fit against: params, flops or tokens")
    return columns, targets


def _leave_out_unfinished(frame: pd.DataFrame, log: _Log) -> pd.DataFrame:
    """Diverged cells, and variants of a cell (another learning rate) beside the base recipe."""
    if "status" in frame.columns:
        bad = frame["status"].notna() & (frame["status"].astype(str) != "finished")
        frame = _exclude(frame, bad, "status is not finished", log)
    if "variant" in frame.columns:
        names = frame["variant"].fillna("").astype(str).str.lower()
        other = ~names.isin(BASE_VARIANTS)
        if other.any() and not other.all():
            frame = _exclude(frame, other, "variant of the base recipe", log)
    return frame


def _where(frame: pd.DataFrame, condition: str, log: _Log) -> pd.DataFrame:
    try:
        keep = frame.eval(condition, engine="python")
    except Exception as error:  # pandas raises many kinds for a malformed condition
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TableError(f"--where {condition!r}: {reason} (put names with spaces in `backticks`)") from error
    if not isinstance(keep, pd.Series) or keep.dtype != bool:
        raise TableError(f"--where {condition!r} is not a condition that is true or false for each row")
    log.filters.append(f"where {condition}")
    return _exclude(frame, ~keep, f"where {condition}", log)


def _drop_highest(frame: pd.DataFrame, target: str, count: int, log: _Log) -> pd.DataFrame:
    if count >= len(frame):
        raise TableError(f"--drop-highest {count} leaves none of the {len(frame)} rows")
    worst = frame[target].sort_values(ascending=False, kind="stable").index[:count]
    log.filters.append(f"drop-highest {count} ({target})")
    return _exclude(frame, frame.index.isin(worst), f"one of the {count} highest values of {target}", log)


def _exclude(frame: pd.DataFrame, bad: Any, reason: str, log: _Log) -> pd.DataFrame:
    mask = np.asarray(bad, dtype=bool)
    if mask.any():
        log.exclusions.append(Exclusion(reason, tuple(frame["row"][mask].astype(str))))
    return frame[~mask]


def _need_rows(frame: pd.DataFrame, log: _Log) -> None:
    if not len(frame):
        causes = "; ".join(f"{len(each.rows)} rows: {each.reason}" for each in log.exclusions)
        raise TableError(f"no rows are left ({causes})")


def _numbers(frame: pd.DataFrame, name: str) -> pd.Series:
    if pd.api.types.is_bool_dtype(frame[name]) or pd.api.types.is_datetime64_any_dtype(frame[name]):
        raise TableError(f"column {name!r} holds {frame[name].dtype}, not numbers")
    values = pd.to_numeric(frame[name], errors="coerce").astype(float)
    bad = values.isna() & frame[name].notna()
    if bad.any():
        raise TableError(f"column {name!r}: not a number in {_rows(frame, bad, name)}")
    return values


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
            where = _rows(frame, pd.Series(bad, index=frame.index), name)
            raise TableError(f"column {source!r}: values must be positive and finite; not so in {where}")


def _rows(frame: pd.DataFrame, bad: pd.Series, name: str) -> str:
    chosen = frame[bad]
    shown = ", ".join(f"row {row} ({value})" for row, value in zip(chosen["row"][:5], chosen[name][:5], strict=True))
    return shown + (f" and {len(chosen) - 5} more" if len(chosen) > 5 else "")


def _derive(frame: pd.DataFrame, columns: dict[str, str], options: FitOptions, log: _Log) -> pd.DataFrame:
    factor = options.tokens_from_flops
    if factor is None:
        return frame
    if not factor > 0:
        raise TableError(f"--tokens-from-flops {factor:g} must be positive")
    if "params" not in columns or ("flops" not in columns and "tokens" not in columns):
        raise TableError("--tokens-from-flops needs the columns of parameters and of FLOPs")
    frame = frame.copy()
    if "tokens" not in columns:
        frame["tokens"] = frame["flops"] / (factor * frame["params"])
        log.notes.append(f"tokens are D = C / ({factor:g}·N)")
    elif "flops" not in columns:
        frame["flops"] = factor * frame["params"] * frame["tokens"]
        log.notes.append(f"FLOPs are C = {factor:g}·N·D")
    return frame


def _check_run_ids(frame: pd.DataFrame, options: FitOptions) -> None:
    if "run_id" not in frame.columns or options.checkpoints:
        return
    repeated = frame["run_id"].duplicated(keep=False) & frame["run_id"].notna()
    if repeated.any():
        names = ", ".join(repr(name) for name in frame["run_id"][repeated].unique()[:3])
        raise TableError(
            f"run ids must be unique, but {names} repeat (rows {', '.join(frame['row'][repeated][:6])}); "
            "say --checkpoints if rows are checkpoints of runs"
        )
