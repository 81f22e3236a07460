"""Grids of runs: cells, budgets, seed noise, and the frontier (the lower envelope of loss against compute)."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.fitting.laws.base import Array
from analysis.tables.evaluations import LIKELIHOOD, companions
from analysis.tables.table import RunsTable

FRONTIERS = {
    "envelope": "runs that no run of less compute matches",
    "hull": "runs on the convex hull of the logarithms",
    "bins": "the best run of each bin of compute, where no smaller bin matches it",
}
"""What may be taken for the best of scattered runs."""
ALL_RUNS = "all"
"""Stands for no such choice."""
_ON_HULL = 1e-3
_SCATTERED, _CLEARLY_SCATTERED = 0.02, 0.05
"""How far beaten runs lie above the best, in the middle: beyond noise that is usual, beyond noise that is rare."""
_FEWEST_BEST = 6
_FALLING = -0.5
_MOST_SCATTERED = 1000
_SAME_BUDGET = 0.02
_WIDEST_BUDGET = 0.05
_BUDGETS_APART = 0.1
_CLEARLY_APART = 0.3


@dataclass(frozen=True)
class SeedNoise:
    """Scatter of the logarithm of a target between runs alike in all but the seed: relative standard deviation."""

    relative: float
    degrees_of_freedom: int


@dataclass(frozen=True)
class Scatter:
    """Runs that others of less compute beat.

    Attributes:
        beaten: how many.
        excess: how far above the best they lie in the middle, in log.
        is_clear: whether noise is no likely cause, the target falls with compute as a whole, and enough runs are left.
    """

    beaten: int
    excess: float
    is_clear: bool


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


def envelope(grid_cells: pd.DataFrame, target: str, rises: bool = False) -> pd.DataFrame:
    """The best cell of each budget, in order of budget: the frontier over cooled branches; `rises`: more is better."""
    usable = grid_cells[grid_cells[target].notna()]
    values = usable.groupby("budget")[target]
    best = usable.loc[values.idxmax() if rises else values.idxmin()]
    return best.sort_values("budget").reset_index(drop=True)


def curve_envelope(frame: pd.DataFrame, target: str, rises: bool = False) -> pd.DataFrame:
    """The rows that no row with less or equal compute matches: the envelope of whole curves (approach 1).

    It is the lower one, or where more is better (`rises`) the upper one.
    """
    ordered = frame.sort_values(["flops", target], ascending=[True, not rises])
    values = ordered[target] * (-1.0 if rises else 1.0)
    lowest = values.cummin().shift(fill_value=np.inf)
    return ordered[values < lowest].reset_index(drop=True)


def frontier_of_runs(frame: pd.DataFrame, target: str, rule: str, rises: bool = False) -> pd.DataFrame:
    """The best of runs that share no budgets, in order of compute.

    Args:
        frame: the runs, with `flops` and the target.
        target: the column.
        rule: one of `FRONTIERS`. An envelope takes every lucky run; bins, about as many as the square root of one and a
            half times the runs, take one of several; a hull takes only what no two others lie below, which suits laws
            that are straight or bend upwards.
        rises: more is better, as of an accuracy.
    """
    ordered = frame.sort_values(["flops", target], ascending=[True, not rises])
    x_n = np.log(ordered["flops"].to_numpy(dtype=float))
    y_n = np.log(ordered[target].to_numpy(dtype=float)) * (-1.0 if rises else 1.0)
    kept_n = np.ones(len(ordered), dtype=bool)
    if rule == "bins" and np.ptp(x_n) > 0:
        count = max(3, int(np.sqrt(1.5 * len(ordered))))
        bins_n = np.minimum(((x_n - x_n[0]) / np.ptp(x_n) * count).astype(int), count - 1)
        best = pd.Series(y_n).groupby(bins_n).idxmin().to_numpy()
        kept_n = np.isin(np.arange(len(ordered)), best)
    before_n = np.minimum.accumulate(np.where(kept_n, y_n, np.inf))
    kept_n &= y_n < np.concatenate([[np.inf], before_n[:-1]])
    if rule == "hull":
        kept_n &= y_n <= _hull(x_n[kept_n], y_n[kept_n], x_n) + _ON_HULL
    return ordered[kept_n].reset_index(drop=True)


def scattered(frame: pd.DataFrame, target: str) -> Scatter | None:
    """Whether runs are beaten by others of less compute, by so much that it isn't noise; None where few are.

    Very many rows are points on curves rather than runs.
    """
    if not 8 <= len(frame) <= _MOST_SCATTERED:
        return None
    values_n = frame.sort_values("flops")[target].to_numpy(dtype=float)
    excess_n = np.log(values_n / np.minimum.accumulate(values_n))
    beaten_n = excess_n > 0
    if beaten_n.mean() <= 1 / 3 or (excess := float(np.median(excess_n[beaten_n]))) <= _SCATTERED:
        return None
    falls = frame["flops"].corr(frame[target], method="spearman") < _FALLING
    enough = (~beaten_n).sum() >= _FEWEST_BEST
    return Scatter(int(beaten_n.sum()), excess, bool(excess > _CLEARLY_SCATTERED and falls and enough))


def fullest_budget(grid_cells: pd.DataFrame) -> tuple[float, int]:
    """The budget at which most sizes have a cell, the largest of several, and how many sizes it has."""
    counts = grid_cells.groupby("budget")["params"].nunique()
    most = int(counts.max())
    return float(str(counts[counts == most].index.max())), most


def _hull(x_m: Array, y_m: Array, at_n: Array) -> Array:
    """Height of the lower convex hull of points in order of x, falling in y, at places among them."""
    corners: list[int] = []
    for place in range(len(x_m)):
        while len(corners) > 1:
            first, last = corners[-2], corners[-1]
            if (y_m[last] - y_m[first]) * (x_m[place] - x_m[first]) < (y_m[place] - y_m[first]) * (
                x_m[last] - x_m[first]
            ):
                break
            corners.pop()
        corners.append(place)
    return np.asarray(np.interp(at_n, x_m[corners], y_m[corners]))


def _cluster(flops: Array) -> Array:
    """Gives FLOPs that follow each other within 2% the same budget, their geometric mean.

    Within 10%, where budgets lie so far apart that it is clear which FLOPs were meant for one.
    """
    order = np.argsort(flops, kind="stable")
    logs = np.log(flops[order])
    gaps = np.diff(logs)
    means = _means(logs, gaps > _BUDGETS_APART)
    apart = gaps[gaps > _BUDGETS_APART].min(initial=np.inf)
    if apart < _CLEARLY_APART or np.abs(logs - means).max() > _WIDEST_BUDGET:
        means = _means(logs, gaps > _SAME_BUDGET)
    budgets = np.empty_like(flops)
    budgets[order] = np.exp(means)
    return budgets


def _means(logs: Array, begins: NDArray[np.bool_]) -> Array:
    """Of each value the mean of its group; groups begin after the places given."""
    labels = np.concatenate([[0], np.cumsum(begins)])
    return np.asarray((np.bincount(labels, weights=logs) / np.bincount(labels))[labels])
