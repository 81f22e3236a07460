"""Grids of runs: cells, budgets, seed noise, and the frontier (the lower envelope of loss against compute)."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.fitting.laws.base import Array
from analysis.tables.evaluations import LIKELIHOOD, companions
from analysis.tables.table import RunsTable

_SAME_BUDGET = 0.02
_WIDEST_BUDGET = 0.05
_BUDGETS_APART = 0.1


@dataclass(frozen=True)
class SeedNoise:
    """Scatter of the logarithm of a target between runs alike in all but the seed: relative standard deviation."""

    relative: float
    degrees_of_freedom: int


def with_budgets(table: RunsTable, curves: bool = False) -> pd.DataFrame | None:
    """The rows with a `budget`: the declared one, or FLOPs that agree within 2% where several sizes share them.

    None where the table is no grid (fewer than two budgets that two or more sizes share, or FLOPs so dense that they
    agree by chance: chains over more than 5% either way, or budgets mostly less than a tenth apart), or rows are
    points on curves.
    """
    frame = table.frame
    if curves or "flops" not in frame.columns or "params" not in frame.columns:
        return None
    if "budget" not in frame.columns:
        flops = frame["flops"].to_numpy(dtype=float)
        budgets = _cluster(flops)
        if np.abs(np.log(flops / budgets)).max() > _WIDEST_BUDGET:
            return None
        gaps = np.diff(np.log(np.unique(budgets)))
        if len(gaps) and np.median(gaps) < _BUDGETS_APART:
            return None
        frame = frame.assign(budget=budgets)
    sizes = frame.groupby("budget")["params"].nunique()
    if (sizes >= 2).sum() < 2:
        return None
    if "budget" not in table.frame.columns and sizes.lt(2).mean() > 0.5:
        return None
    return frame


def cells(frame: pd.DataFrame, targets: tuple[str, ...]) -> pd.DataFrame:
    """One row a (budget, size), averaged over seeds; `runs` counts them, `row` names them."""
    keys = [name for name in ("budget", "params") if name in frame.columns]
    wanted = ("flops", "tokens", "depth", *targets, *companions(frame, targets), LIKELIHOOD)
    numbers = [name for name in wanted if name in frame.columns and name not in keys]
    grouped = frame.groupby(keys, sort=True)
    table = grouped[numbers].mean()
    table["runs"] = grouped.size()
    table["row"] = grouped["row"].agg(lambda rows: "+".join(map(str, rows)))
    return table.reset_index()


def seed_noise(frame: pd.DataFrame, target: str) -> SeedNoise | None:
    """Pooled standard deviation of log target within cells that hold several runs; None without such cells."""
    if "budget" not in frame.columns or "params" not in frame.columns:
        return None
    logs = frame[target].astype(float).map(np.log)
    grouped = logs.groupby([frame["budget"], frame["params"]])
    counts = grouped.transform("size")
    spread = (logs - grouped.transform("mean"))[counts > 1]
    degrees = int((counts > 1).sum() - (grouped.size() > 1).sum())
    if degrees < 1:
        return None
    return SeedNoise(float(np.sqrt((spread**2).sum() / degrees)), degrees)


def envelope(grid_cells: pd.DataFrame, target: str) -> pd.DataFrame:
    """The best cell of each budget, in order of budget: the frontier over cooled branches."""
    usable = grid_cells[grid_cells[target].notna()]
    best = usable.loc[usable.groupby("budget")[target].idxmin()]
    return best.sort_values("budget").reset_index(drop=True)


def curve_envelope(frame: pd.DataFrame, target: str) -> pd.DataFrame:
    """The rows that no row with less or equal compute matches: the lower envelope of whole curves (approach 1)."""
    ordered = frame.sort_values(["flops", target])
    lowest = ordered[target].cummin().shift(fill_value=np.inf)
    return ordered[ordered[target] < lowest].reset_index(drop=True)


def fullest_budget(grid_cells: pd.DataFrame) -> tuple[float, int]:
    """The budget at which most sizes have a cell, the largest of several, and how many sizes it has."""
    counts = grid_cells.groupby("budget")["params"].nunique()
    most = int(counts.max())
    return float(str(counts[counts == most].index.max())), most


def _cluster(flops: Array) -> Array:
    """Gives FLOPs that follow each other within 2% the same budget, their geometric mean."""
    order = np.argsort(flops, kind="stable")
    logs = np.log(flops[order])
    labels = np.concatenate([[0], np.cumsum(np.diff(logs) > _SAME_BUDGET)])
    means = np.bincount(labels, weights=logs) / np.bincount(labels)
    budgets = np.empty_like(flops)
    budgets[order] = np.exp(means[labels])
    return budgets
