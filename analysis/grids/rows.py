"""Which laws are fitted to which rows of a table."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.errors import FitRefused
from analysis.fitting.laws.base import Array, Law
from analysis.fitting.laws.registry import LAWS
from analysis.grids.frontier import ALL_RUNS, FRONTIERS, curve_envelope, frontier_of_runs, fullest_budget, scattered
from analysis.grids.grid import TargetGrid
from analysis.grids.isoflop import MINIMUM_SIZES
from analysis.options import DEFAULT_LAWS, EVALUATION_LAWS, FitOptions
from analysis.tables.checkpoints import last_rows
from analysis.tables.epochs import ratio
from analysis.tables.evaluations import LIKELIHOOD, is_evaluation
from analysis.tables.roles import ROLES, numbers, plain_name, rows_text
from analysis.tables.table import RunsTable
from analysis.tables.units import UNIQUE_TOKENS

_LOSSES_TELL = 0.5
"""Correlation of the ranks of errors and losses, below which one says little of the other."""
_FALLS_BY_NAME = re.compile(r"loss|error|perplexity|ppl|bpb|bits|nats|nll|entropy", re.IGNORECASE)


@dataclass(frozen=True)
class PlannedFit:
    """A law to fit.

    Attributes:
        x: what it is fitted against.
        law: its id.
        floor: the measured floor at which its offset is held; None where the offset is free, or pinned by an option.
    """

    x: str
    law: str
    floor: float | None = None


def plan(
    table: RunsTable, target: str, options: FitOptions, grid: TargetGrid | None, floor: float | None = None
) -> list[PlannedFit]:
    """Which laws are fitted to a target against what, in order.

    Where its floor was measured, `power-floor` is fitted with the offset held there, then with a free one. FID and its
    like are fitted against loss, too.

    On a grid, loss against size is taken at one budget, where it bends up again beyond the best size: no law with an
    offset is fitted to it unasked, and none at all where no budget has half of the sizes (each budget has sizes of its
    own; the IsoFLOP sets say what there is to say). Nor is a surface fitted unasked to fewer than four sizes.
    """
    evaluation = is_evaluation(target)
    itself = {role for role, source in table.columns.items() if source == target}
    laws = options.law or (EVALUATION_LAWS if evaluation else DEFAULT_LAWS)
    places = options.x or tuple(role for role in ("flops", "params") if table.has(role) and role not in itself)
    places = places or ("tokens",)
    if evaluation and not options.x and table.has(LIKELIHOOD):
        places += (LIKELIHOOD,)
    held = [floor] if floor is not None and options.offset is None else []
    plan = [
        PlannedFit(x, law, each)
        for x in places
        for law in laws
        if LAWS[law].is_curve
        for each in (*(held if law == "power-floor" else ()), None)
    ]
    if grid is not None and not options.law and not options.x:
        shared = 2 * fullest_budget(grid.cells)[1] >= grid.cells["params"].nunique()
        free = [each for each in plan if LAWS[each.law].has_offset and each.floor is None]
        plan = [each for each in plan if each.x != "params" or (shared and each not in free)]
    surface = not itself and table.has("params", "tokens") and table.frame["params"].nunique() >= MINIMUM_SIZES
    wanted = options.law or (surface and not options.x)
    return plan + [PlannedFit(LAWS[law].place, law) for law in laws if not LAWS[law].is_curve and wanted]


def may_rise(target: str, options: FitOptions) -> bool:
    """Whether a target that grows with x is as it should be: a best size, a batch, a rate, an accuracy; not a loss."""
    return target != options.loss and not is_evaluation(target) and not _FALLS_BY_NAME.search(target)


def rises_with(rows: pd.DataFrame, x: str, target: str, options: FitOptions) -> bool:
    """Whether a target that may rise does so with x, or with both of `params, tokens`."""
    names = x.split(", ")
    if not may_rise(target, options) or not set(names) <= set(rows.columns):
        return False
    return bool((log_slopes([rows[name] for name in names], rows[target]) > 0).all())


def log_slopes(inputs: "Sequence[pd.Series[float]]", y: "pd.Series[float]") -> Array:
    """What y does with each of its inputs, the others held: a plane through the logarithms of rows that have them."""
    logs = np.log(np.stack([each.to_numpy(dtype=float) for each in (*inputs, y)]))
    logs = logs[:, np.isfinite(logs).all(axis=0)]
    logs = logs - logs[:, :1]  # what is constant is nothing now, rather than all but nothing
    logs = logs - logs.mean(axis=1, keepdims=True) if logs.size else logs
    return np.asarray(np.linalg.lstsq(logs[:-1].T, logs[-1], rcond=None)[0])


def lacks(law: Law, missing: Sequence[str], columns: Iterable[str]) -> str:
    """That a table has no columns for some of a law's inputs, what else they follow from, and what is spelled so."""
    others = {name: (above, below) for name, above, below in law.ratios if name in missing}
    text = f"the table has no column for {' and '.join(missing)}"
    text += "".join(f", nor {below} beside {above}" for above, below in others.values())
    wanted = {*missing, *(below for _, below in others.values())}
    near = [f"{name!r} to {plain_name(name)}" for name in columns if name not in wanted and plain_name(name) in wanted]
    return text + (f"; rename {' and '.join(near)}" if near else "")


def check_inputs(law: Law, columns: Sequence[str], rows: pd.DataFrame) -> None:
    """Refuses inputs that a law can't take, and epochs that tell nothing of repeated data.

    Raises:
        FitRefused: naming the rows.
    """
    for name in columns:
        bad = ~(rows[name] > 0)
        if bad.any():
            zeros = name == "epochs" and (rows[name] == 0).any()
            hint = "the first pass over the data is one" if zeros else f"--where '{name} > 0' leaves them out"
            raise FitRefused(f"{law.name}: {name} must be above 0; not so in {rows_text(rows, bad, name)}; {hint}")
    epochs = rows["epochs"] if "epochs" in columns else None
    if epochs is not None and epochs.max() <= 1 and epochs.nunique() > 1:
        hint = f"is {UNIQUE_TOKENS!r} in another unit than tokens (--unit {UNIQUE_TOKENS}=1)?"
        raise FitRefused(f"{law.name}: no row saw its data more than once (epochs up to {epochs.max():.3g}); {hint}")


def check_direction(law: Law, columns: Sequence[str], rows: pd.DataFrame, target: str) -> None:
    """Refuses a target that goes the other way than a law: one with an offset falls, one of losses rises.

    Raises:
        FitRefused: saying so.
    """
    along = [each for each in columns if law.is_curve or each in ("params", "tokens")]
    if not (law.of_losses or law.has_offset) or not along or len(rows) < 2:
        return
    way, sign = ("rise", 1) if law.of_losses else ("fall", -1)
    if (sign * log_slopes([rows[each] for each in along], rows[target]) <= 0).all():
        what = "x" if law.is_curve else " or ".join(along)
        hint = "; laws of a loss take errors, such as 1 less an accuracy" if law.of_losses else ""
        raise FitRefused(f"{law.name}: the target does not {way} with {what} over these rows{hint}")
    if law.of_losses and rows[along[0]].corr(rows[target], method="spearman") < _LOSSES_TELL:
        raise FitRefused(f"{law.name}: over these rows the target hardly follows {along[0]}")


def rows_for(
    x: str, law: str, target: str, table: RunsTable, grid: TargetGrid | None, options: FitOptions
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The rows that belong in a fit, and the filter that says which."""
    frame = table.frame[table.frame[target].notna()]
    if not LAWS[law].is_curve:
        for name, above, below in LAWS[law].ratios:
            if name not in frame.columns and {above, below} <= set(frame.columns):
                frame = frame.assign(**{name: ratio(table, frame, above, below)})
        own = {name: numbers(frame, name) for name in LAWS[law].inputs if name not in ROLES and name in frame.columns}
        return frame.assign(**own), ()
    rises = x == "flops" and rises_with(frame, x, target, options)
    if x == "flops" and options.checkpoints and not options.frontier and table.has("flops"):
        side = "upper" if rises else "lower"
        return curve_envelope(frame, target, rises), (f"frontier: {side} envelope of the curves",)
    if x == "flops" and table.has("flops") and (rule := _rule(frame, target, grid, options)):
        if rule == ALL_RUNS:
            return frame, ("frontier: every run",)
        return frontier_of_runs(frame, target, rule, rises), (f"frontier: {FRONTIERS[rule]}",)
    if grid is not None and x == "flops":
        return grid.frontier, ("frontier: best cell of each budget",)
    if grid is not None and x == "params":
        cells = grid.cells[grid.cells[target].notna()]
        budget, most = fullest_budget(cells)
        chosen = cells[cells["budget"] == budget]
        sizes = cells["params"].nunique()
        which = "the largest that all sizes have" if most == sizes else f"the one with most sizes, {most} of {sizes}"
        at = f"one budget, {budget:.6g} FLOPs: {which}"
        heights = chosen[target].to_numpy(dtype=float)
        best = chosen["params"].to_numpy(dtype=float)[int(heights.argmax() if grid.rises else heights.argmin())]
        falling = chosen[chosen["params"] <= best]
        if 3 <= len(falling) < len(chosen):
            return falling, (at, "sizes up to the best one (larger ones see too little data)")
        return chosen, (at,)
    if x == LIKELIHOOD and grid is not None:
        return grid.cells[grid.cells[[target, x]].notna().all(axis="columns")], ("every cell, seeds averaged",)
    if x not in frame.columns:
        return frame.iloc[:0], ()
    if options.checkpoints and (frame.groupby("run_id")[x].nunique() < 2).all():
        return last_rows(frame[frame[x].notna()]), ("the last row of each run",)
    return frame[frame[x].notna()], ()


def _rule(frame: pd.DataFrame, target: str, grid: TargetGrid | None, options: FitOptions) -> str:
    """Which rule chooses among runs: the one asked for, else an envelope where most are clearly beaten by smaller ones.

    Best sizes, rates and accuracies have no lower envelope unasked.
    """
    if options.frontier or grid is not None or may_rise(target, options):
        return options.frontier
    scatter = scattered(frame, target)
    return "envelope" if scatter and scatter.is_clear else ""
