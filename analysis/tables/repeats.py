"""Rows alike in size, compute and data: copies, repetitions with another seed, or runs that differ in something else.

Only repetitions tell the noise between seeds. Where rows differ in another column (learning rate, kind of loss, data),
that column is named, and the best of them stands for its cell.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from analysis.tables.annealing import RATE_SCHEDULE
from analysis.tables.evaluations import setting_columns
from analysis.tables.roles import LABELS, ROLES, plain_name, some

REPEATED = "rows repeat another row's values and are kept"
REDUCTIONS = ("min", "mean", "median", "last")
SWEEP_RECIPE = ("variant", "family", "width", "heads", "batch_size", "lr", "warmup_images", "precision", "compiled")
"""Columns of a sweep's table in which cells of one size, compute and data may differ; all others are measured."""
_SEEDS = {"seed", "seeds", "replicate", "replica", "repeat", "repetition", "trial", "fold"}
_CAUSES = {
    *(
        "lr",
        "learning",
        "rate",
        "batch",
        "bs",
        "wd",
        "decay",
        "optim",
        "optimizer",
        "optimiser",
        "schedule",
        "scheduler",
    ),
    *("warmup", "beta", "beta1", "beta2", "eps", "dropout", "momentum", "kind", "type", "variant", "recipe", "method"),
    *("data", "dataset", "mix", "mixture", "mup", "tokenizer", "precision", "dtype", "arch", "architecture", "setting"),
}
_NAMES = {"id", "uuid", "name", "run", "job", "hash", "sha", "commit", "fingerprint", "label", "index", "idx", "number"}
_MEASURED = {
    *("time", "timestamp", "date", "datetime", "day", "days", "hour", "hours", "minutes", "seconds", "secs", "sec"),
    *(
        "duration",
        "elapsed",
        "runtime",
        "walltime",
        "wall",
        "started",
        "finished",
        "start",
        "end",
        "created",
        "updated",
    ),
    *("host", "hostname", "node", "nodes", "machine", "device", "gpu", "gpus", "url", "link", "path", "dir", "folder"),
    *("log", "user", "author", "owner", "comment", "comments", "note", "notes", "throughput", "speed", "mfu", "memory"),
    *("utilisation", "utilization", "power", "energy", "cost", "price", "loss", "losses", "error", "err", "acc"),
    *("accuracy", "perplexity", "ppl", "bpb", "nll", "fid", "kid", "mind", "score", "norm", "std", "stderr", "low"),
    *("high", "status", "state", "row", "file", "x", "y"),
}
_SYMBOLS = {"params": "N", "flops": "C", "budget": "C", "tokens": "D"}
_MOST_GROUPS = 6
_EVIDENCE = 0.01
_OUTCOME = 0.9
_NO_DIFFERENCE = 1e-6
"""Per cent."""


@dataclass(frozen=True)
class Differing:
    """Rows alike in `alike` that differ in other columns.

    Attributes:
        columns: the columns that tell them apart, the seed aside.
        message: what they are and how far their values lie apart.
    """

    columns: tuple[str, ...]
    message: str = ""


def differing(
    frame: pd.DataFrame,
    alike: list[str],
    targets: Sequence[str],
    used: Iterable[str],
    own_sweep: bool = False,
    given: Sequence[str] = (),
) -> Differing | None:
    """In which columns rows differ that agree in `alike`; None where there are no such rows, or they are repetitions.

    A column that only numbers, names or times rows, or that was measured like the target, is no cause of its values.
    Where seeds tell rows apart, another column has to be a known setting, or to move values beyond chance.

    Args:
        frame: rows with their roles and all columns of their source.
        alike: the columns in which rows of a cell agree.
        targets: the columns that are fitted.
        used: further columns that have a meaning already, such as those that roles were taken from.
        own_sweep: whether the table is one that a sweep of varscale wrote.
        given: columns that are known to tell rows apart; those are named that tell them apart further.
    """
    rows = frame[frame.duplicated(alike, keep=False) & frame[targets[0]].notna()] if alike else frame.iloc[:0]
    rows = rows[rows.duplicated(alike, keep=False)]
    if not len(rows):
        return None
    cells = rows.groupby(alike, dropna=False, sort=False).ngroup().to_numpy()
    logs = np.log(rows[targets[0]].to_numpy(dtype=float))
    known = {*ROLES, *LABELS, *alike, *targets, *used, *given, *setting_columns(frame), "device", RATE_SCHEDULE}
    names = [name for name in frame.columns if name not in known and (not own_sweep or name in SWEEP_RECIPE)]
    found = _Found(rows, cells, logs, frame)
    columns = found.causes(
        [name for name in names if found.varies(name)], [name for name in given if found.varies(name)]
    )
    if not columns:
        return None
    message = _message(rows, cells, logs, columns, alike, targets[0])
    return Differing(columns, message) if message else None


class _Found:
    """Rows of cells that hold several, and which of their columns could be why they differ."""

    def __init__(self, rows: pd.DataFrame, cells: NDArray[Any], logs: NDArray[Any], frame: pd.DataFrame) -> None:
        self.rows, self.cells, self.logs, self.frame = rows, cells, logs, frame
        self.levels: dict[str, NDArray[Any]] = {}

    def varies(self, name: str) -> bool:
        """Whether the column differs within a cell."""
        self.levels[name] = _codes(self.rows[name])
        return len(np.unique(np.stack([self.cells, self.levels[name]]), axis=1).T) > len(np.unique(self.cells))

    def causes(self, names: list[str], given: list[str]) -> tuple[str, ...]:
        """The fewest columns, most likely first, that tell the rows apart beyond those given."""
        seeds = [name for name in names if _words(name) & _SEEDS]
        if "seed" in self.rows.columns:
            seeds, self.levels["seed"] = [*seeds, "seed"], _codes(self.rows["seed"])
        apart = self._apart(seeds)
        likely = {name: self._evidence(name) for name in names if name not in seeds and self._possible(name)}
        chosen = list(given)
        for name in sorted(likely, key=lambda each: (not _words(each) & _CAUSES, likely[each])):
            needed = apart == len(self.rows) or chosen
            if needed and not _words(name) & _CAUSES and likely[name] > _EVIDENCE:
                continue
            if self._apart([*chosen, name]) > self._apart(chosen):
                chosen.append(name)
        return tuple(chosen[len(given) :])

    def _apart(self, names: list[str]) -> int:
        """How many kinds of rows cells and columns make."""
        return len(np.unique(np.stack([self.cells, *(self.levels[name] for name in names)]), axis=1).T)

    def _possible(self, name: str) -> bool:
        words, values = _words(name), self.frame[name]
        once = len(np.unique(_codes(values))) == len(values)
        if pd.api.types.is_datetime64_any_dtype(values):
            return False
        if words & _CAUSES:
            return not (once and _is_text(values))
        if words & _MEASURED or (once and (words & _NAMES or _is_text(values))):
            return False
        if not once or _is_text(values):
            return True
        numbers = pd.to_numeric(values, errors="coerce").to_numpy(dtype=float, na_value=np.nan)
        if np.isnan(numbers).any() or (np.diff(numbers) > 0).all() or (np.diff(numbers) < 0).all():
            return False  # a number or a time of the row
        ranks = np.argsort(np.argsort(numbers[np.isin(self.frame.index, self.rows.index)]))
        return bool(abs(np.corrcoef(ranks, np.argsort(np.argsort(self.logs)))[0, 1]) < _OUTCOME)

    def _evidence(self, name: str) -> float:
        """How likely values would differ as much between the column's levels, within cells, by chance."""
        around = self.logs - _means(self.logs, self.cells)
        levels = np.unique(self.levels[name], return_inverse=True)[1]
        explained = float((_means(around, levels) ** 2).sum())
        first, total = int(levels.max()), float((around**2).sum())
        second = len(around) - len(np.unique(self.cells)) - first
        if first < 1 or second < 1 or total == 0:
            return 1.0
        return float(special.fdtrc(first, second, explained / first / max((total - explained) / second, 1e-300)))


def best_rows(
    frame: pd.DataFrame, cell: list[str], columns: Sequence[str], target: str, rises: bool = False
) -> pd.DataFrame:
    """Of each cell the rows of the setting (values of `columns`) of the lowest mean of the target, or the highest."""
    means = frame[target].groupby(_joint(frame, [*cell, *columns])).transform("mean") ** (-1 if rises else 1)
    lowest = means.groupby(_joint(frame, cell)).transform("min")
    return frame[means <= lowest * (1 + 1e-12)]


def seeds_of_cells(rows: pd.DataFrame, inputs: Sequence[str]) -> NDArray[np.int64] | None:
    """A label a row, the same for rows alike in a law's inputs, size, compute and data; None where no seed is said."""
    if "seed" not in rows.columns:
        return None
    alike = [*inputs, *(name for name in ROLES if name in rows.columns and name not in inputs)]
    return np.asarray(rows.groupby(alike, dropna=False).ngroup(), dtype=np.int64)


def copies(frame: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Notes of rows that repeat another row's values, in all of the columns given or in all but the seed.

    The latter where that is so of most rows that differ in the seed: values of few digits agree now and then.
    """
    values = [name for name in names if name != "run_id"]
    unlike = frame.drop_duplicates(values)
    counts = [len(frame) - len(unlike)]
    if "seed" in values:
        values.remove("seed")
        places = [name for name in values if name in (*ROLES, *LABELS)]
        several = unlike.duplicated(places).sum() if places else len(unlike)
        copied = int(unlike.duplicated(values).sum())
        counts.append(copied if 2 * copied > several else 0)
    return [
        f"{where}{count} {REPEATED}" for where, count in zip(("", "under other seeds "), counts, strict=False) if count
    ]


def reduced(
    frame: pd.DataFrame, alike: list[str], over: Sequence[str], how: str, targets: Sequence[str]
) -> pd.DataFrame:
    """One row for all that agree in `alike`: the one with the lowest first target, the last one, means or medians.

    Args:
        frame: rows.
        alike: the columns in which they have to agree.
        over: those over which is reduced; `last` goes by the first of them that holds numbers, or by the rows' order.
        how: one of `REDUCTIONS`.
        targets: the columns that are fitted.
    """
    keys = pd.Series(_joint(frame, alike), index=frame.index)
    if how in ("mean", "median"):
        grouped = {name: frame[name].groupby(keys) for name in targets}
        values = {
            name: each.transform("mean") if how == "mean" else each.transform("median")
            for name, each in grouped.items()
        }
        rows = frame["row"].map(str).groupby(keys).transform("+".join)
        return frame.assign(**values, row=rows)[~keys.duplicated()]
    order = frame[targets[0]].rank(method="first", ascending=False, na_option="top").to_numpy()
    if how == "last":
        numeric = (pd.to_numeric(frame[name], errors="coerce") for name in over if name in frame.columns)
        order = next(
            (values.to_numpy() for values in numeric if values.notna().all()), np.arange(len(frame), dtype=float)
        )
    last = keys.iloc[np.argsort(order, kind="stable")]
    return frame[frame.index.isin(last.index[~last.duplicated(keep="last")])]


def copies_between_groups(frame: pd.DataFrame, targets: Sequence[str]) -> str:
    """Which groups share rows that agree in every value that is used, in a line; empty where none do."""
    if "group" not in frame.columns:
        return ""
    used = [name for name in (*ROLES, "seed", *targets) if name in frame.columns]
    kinds = pd.Series(_joint(frame, used), index=frame.index)
    groups = frame["group"].map(str)
    shared = groups.groupby(kinds).transform("nunique") > 1
    if not shared.any():
        return ""
    alike = frame["row"].map(str)[shared].groupby(kinds[shared], sort=False)
    rows = some(tuple("=".join(each.iloc[:_MOST_GROUPS]) for _, each in islice(alike, 8)))
    among = list(dict.fromkeys(groups[shared]))
    who = _list(among[:_MOST_GROUPS]) + (", …" if len(among) > _MOST_GROUPS else "")
    more = ", …" if alike.ngroups > 8 else ""
    return (
        f"groups {who} share {alike.ngroups} rows word for word (rows {rows}{more}): copies, which say nothing of a "
        "difference; leave them out of all but one"
    )


def _message(
    rows: pd.DataFrame,
    cells: NDArray[Any],
    logs: NDArray[Any],
    columns: Sequence[str],
    alike: Sequence[str],
    target: str,
) -> str:
    settings = _joint(rows, columns)
    means = pd.Series(_means(logs, np.unique(np.stack([cells, settings]), axis=1, return_inverse=True)[1]))
    spread = np.expm1(means.groupby(cells).max() - means.groupby(cells).min())
    spread = 100 * spread[pd.Series(settings).groupby(cells).nunique() > 1]
    shown = _list([f"{name} ({_levels(rows[name])})" for name in columns])
    if not spread.max() > _NO_DIFFERENCE:
        return ""
    low, high = f"{spread.min():.2g}%", f"{spread.max():.2g}%"
    ends = f", {low} to {high}" if low != high else ""
    seeded = "seed" in rows.columns and rows["seed"].map(str).groupby(cells).nunique().max() == 1
    same = [_SYMBOLS.get(name, name) for name in alike if name != "group"] + (["seed"] if seeded else [])
    return (
        f"{len(rows)} rows alike in {_list(same)} differ in {shown}, and their {target} by "
        f"{spread.median():.2g}% (median of {len(spread)} places{ends}): no repetitions, so no seed noise is read from "
        f"them; say --reduce min, or --where or --group {columns[0]}"
    )


def _levels(values: "pd.Series[Any]") -> str:
    levels = values.drop_duplicates() if not _is_text(values) else values.map(str).drop_duplicates()
    shown = [f"{value:g}" if isinstance(value, int | float) else str(value)[:40] for value in levels.sort_values()]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _list(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _words(name: object) -> set[str]:
    return set(re.split(r"[\W_]+", plain_name(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name)))))


def _is_text(values: "pd.Series[Any]") -> bool:
    return not pd.api.types.is_numeric_dtype(values)


def _codes(values: "pd.Series[Any]") -> NDArray[Any]:
    """A number for each distinct value; a missing one is a value, too."""
    texts = values if pd.api.types.is_numeric_dtype(values) else values.map(str)
    return np.asarray(pd.factorize(texts, use_na_sentinel=False)[0])


def _joint(frame: pd.DataFrame, columns: Sequence[str]) -> NDArray[Any]:
    """A number for each distinct row of several columns."""
    codes = np.stack([np.zeros(len(frame), dtype=int), *(_codes(frame[name]) for name in columns)])
    return np.asarray(np.unique(codes, axis=1, return_inverse=True)[1]).reshape(-1)


def _means(values: NDArray[Any], labels: NDArray[Any]) -> NDArray[Any]:
    """Each value's mean over those of its label."""
    return np.asarray((np.bincount(labels, weights=values) / np.maximum(np.bincount(labels), 1))[labels])
