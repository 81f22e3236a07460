"""Rows that are checkpoints of runs: how they are recognised, and the last one of each run."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.tables.roles import plain_name

RUNS = re.compile(r"run|run_?(id|name)|wandb_(id|run|name)|job_?(id)?|trial(_id)?|file")
_SIZES = re.compile(r"model(_name)?|name|experiment|config|size|params")
"""Of these one run each where steps grow; tokens that grow are as well those of several runs of one size."""
_STEPS = re.compile(
    r"(global_|train(ing)?_|optimizer_)?(step|iteration|iter|update|epoch)(_?(number|no|id))?"
    r"|(tokens|images|samples|sequences)_(seen|so_far|processed)|consumed_(tokens|samples|images)"
)
RATES = re.compile(r"lr|learning_?rate|current_lr")
_FEW = 3
"""A run of fewer rows doesn't show whether they follow each other."""
_MOSTLY = 0.9
_MANY = 8
"""So many rows at even steps, alike in size, are one run's even where no column names runs."""


@dataclass(frozen=True)
class Curves:
    """Rows that follow each other.

    Attributes:
        runs: the column that names runs; empty where all rows are of one.
        progress: the column that grows along them.
        count: how many runs have several rows.
        cooling: whether the learning rate hasn't come to its end in most rows; empty where no column tells.
    """

    runs: str
    progress: str
    count: int
    cooling: str = ""


def recognised(frame: pd.DataFrame, several_files: bool) -> Curves | None:
    """The runs whose checkpoints the rows seem to be; None where nothing speaks for it.

    Within each run (or file) tokens or steps differ from row to row, at one size. Without a column of runs, steps have
    to grow through all of the table, or tokens evenly.

    Args:
        frame: rows with their roles.
        several_files: whether a column `file` names each row's file.
    """
    steps = [name for name in frame.columns if _STEPS.fullmatch(plain_name(str(name)))]
    progress = [*(["tokens"] if "tokens" in frame.columns else []), *steps]
    named = [name for name in frame.columns if RUNS.fullmatch(plain_name(str(name)))]
    named = [name for name in named if name != "file" or several_files]
    sized = [name for name in frame.columns if _SIZES.fullmatch(plain_name(str(name)))]
    for runs in ["run_id"] * ("run_id" in frame.columns) + named + sized:
        sizes = frame[runs].map(str).groupby(frame[runs].map(str)).transform("size")
        rows = frame[(sizes >= _FEW) & frame[runs].notna()]
        for name in (steps if runs in sized else progress) if 2 * len(rows) > len(frame) else []:
            parts = [part for _, part in rows.groupby(rows[runs].map(str), sort=False)]
            if all(_grows(part, name, in_order=runs == "file") for part in parts):
                return Curves(runs, name, len(parts), _cooling(parts))
    for name in progress:
        even = name in steps or _even(frame[name])
        if even and len(frame) >= _MANY and _grows(frame, name, in_order=True):
            return Curves("", name, 1, _cooling([frame]))
    return None


def last_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Each run's last row, by tokens, FLOPs or steps as far as they grow within runs, else by its place."""
    steps = [name for name in frame.columns if _STEPS.fullmatch(plain_name(str(name)))]
    runs = frame["run_id"].map(str)
    for name in ("tokens", "flops", *steps):
        values = pd.to_numeric(frame[name], errors="coerce") if name in frame.columns else pd.Series(dtype=float)
        if len(values) and values.notna().all() and (values.groupby(runs).nunique() > 1).any():
            return frame[values == values.groupby(runs).transform("max")].drop_duplicates("run_id", keep="last")
    return frame[~runs.duplicated(keep="last")]


def _grows(rows: pd.DataFrame, name: str, in_order: bool) -> bool:
    """Whether a column differs from row to row, at one size; in the rows' order, if that counts.

    A run that went on from an earlier checkpoint falls back now and then.
    """
    values = _values(rows[name])
    if ("params" in rows.columns and rows["params"].nunique() > 1) or not np.isfinite(values).all():
        return False
    grows = bool((np.diff(values) > 0).mean() > _MOSTLY) if len(values) > 1 else False
    return grows or (not in_order and len(np.unique(values)) > _MOSTLY * len(values))


def _even(values: "pd.Series[Any]") -> bool:
    steps = np.diff(_values(values))
    return len(steps) > 1 and bool(np.ptp(steps) <= 1e-6 * np.abs(steps).max())


def _values(values: "pd.Series[Any]") -> Any:
    return pd.to_numeric(values, errors="coerce").to_numpy(dtype=float, na_value=np.nan)


def _cooling(parts: list[pd.DataFrame]) -> str:
    """The column of a learning rate that changes within runs."""
    for name in parts[0].columns:
        if RATES.fullmatch(plain_name(str(name))) and any(part[name].nunique() > 1 for part in parts):
            return str(name)
    return ""
