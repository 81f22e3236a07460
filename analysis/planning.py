"""What was asked for: options checked, points parsed, and which laws are fitted to which rows."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from analysis import traps
from analysis.descent import OBJECTIVES
from analysis.errors import TableError
from analysis.frontier import curve_envelope, fullest_budget
from analysis.laws import LAWS
from analysis.options import DEFAULT_LAWS, FitOptions
from analysis.results import FitEntry, TargetGrid
from analysis.roles import ROLES, column
from analysis.table import RunsTable
from analysis.traps import Caution


def check_options(options: FitOptions) -> None:
    """Refuses choices that no table could meet.

    Raises:
        TableError: naming the flag and what would be right.
    """
    for law in options.law:
        if law not in LAWS:
            raise TableError(f"unknown law {law!r}; the laws are {', '.join(LAWS)}")
    if options.compare and options.group is None:
        raise TableError(f"--compare {options.compare[0]} needs --group COLUMN, which names the groups")
    if options.offset is not None and options.law and not any(LAWS[law].has_offset for law in options.law):
        raise TableError(f"--offset {options.offset:g} has no effect: of {', '.join(options.law)} none has an offset")
    if options.objective not in OBJECTIVES:
        raise TableError(f"unknown objective {options.objective!r}; the objectives are {', '.join(OBJECTIVES)}")
    if not options.delta > 0:
        raise TableError(f"--delta must be positive, not {options.delta:g}")
    if options.drop_highest < 0:
        raise TableError(f"--drop-highest counts rows, so it can't be {options.drop_highest}")
    if options.seed < 0:
        raise TableError(f"--seed must be a whole number from 0 up, not {options.seed}")
    if options.bootstrap_draws < 50:
        raise TableError(f"--bootstrap-draws {options.bootstrap_draws} is too few for an interval; at least 50")
    if options.offset is not None and not options.offset > 0:
        raise TableError(f"--offset must be positive, not {options.offset:g}; law power has none")
    for budget in options.allocate:
        if not 0 < budget < math.inf:
            raise TableError(f"--budget must be positive and finite, not {budget:g}")
    for text in options.predict:
        parse_point(text)


def parse_point(text: str) -> dict[str, float]:
    """A point to predict, such as `flops=1e21`, by column.

    Raises:
        TableError: the text is no list of column=number.
    """
    point = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not equals or not 0 < number < math.inf:
            raise TableError(f"--predict {text!r}: write column=number, such as flops=1e21 or params=1e9,tokens=2e10")
        point[name.strip()] = number
    return point


def points_by_role(table: RunsTable, options: FitOptions) -> FitOptions:
    """The options with the points to predict named by role, such as `flops`, where they name a column of the table.

    Raises:
        TableError: no column has the name, or laws of several inputs don't take it.
    """
    roles = {source: role for role, source in table.columns.items()}
    points = []
    for text in options.predict:
        point = {roles.get(name, name): value for name, value in parse_point(text).items()}
        for name in set(point) - set(ROLES):
            column(table.frame, name)
            if len(point) > 1:
                raise TableError(f"--predict {text!r}: points of several columns are of params, tokens and flops")
        points.append(",".join(f"{name}={value!r}" for name, value in point.items()))
    return replace(options, predict=tuple(points))


def unused_points(options: FitOptions, fits: Sequence[FitEntry]) -> list[Caution]:
    """The points that no law fitted takes."""
    found = []
    for text in options.predict:
        point = parse_point(text)
        if not any(point.items() <= each.at.items() for entry in fits for each in entry.predictions):
            message = f"--predict {text}: no law was fitted against {' and '.join(point)}"
            found.append(Caution("point-unused", message))
    return found


def plan(table: RunsTable, options: FitOptions, grid: TargetGrid | None) -> list[tuple[str, str]]:
    """Which laws are fitted against what, in order.

    On a grid, loss against size is taken at one budget, where it bends up again beyond the best size: no law with an
    offset is fitted to it unasked, and none at all where no budget has half of the sizes (each budget has sizes of its
    own; the IsoFLOP sets say what there is to say). Nor is a surface fitted unasked to fewer than four sizes.
    """
    laws = options.law or DEFAULT_LAWS
    places = options.x or tuple(role for role in ("flops", "params") if table.has(role)) or ("tokens",)
    plan = [(x, law) for x in places for law in laws if LAWS[law].inputs == ("x",)]
    if grid is not None and not options.law and not options.x:
        shared = 2 * fullest_budget(grid.cells)[1] >= grid.cells["params"].nunique()
        plan = [(x, law) for x, law in plan if x != "params" or (shared and not LAWS[law].has_offset)]
    surface = table.has("params", "tokens") and table.frame["params"].nunique() >= traps.FEWEST_SIZES
    wanted = options.law or (surface and not options.x)
    return plan + [("params, tokens", law) for law in laws if LAWS[law].inputs != ("x",) and wanted]


def rows_for(
    x: str, law: str, target: str, table: RunsTable, grid: TargetGrid | None, options: FitOptions
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The rows that belong in a fit, and the filter that says which."""
    frame = table.frame[table.frame[target].notna()]
    if LAWS[law].inputs != ("x",):
        return frame, ()
    if x == "flops" and options.checkpoints and table.has("flops"):
        return curve_envelope(frame, target), ("frontier: lower envelope of the curves",)
    if grid is not None and x == "flops":
        return grid.frontier, ("frontier: best cell of each budget",)
    if grid is not None and x == "params":
        cells = grid.cells[grid.cells[target].notna()]
        budget, most = fullest_budget(cells)
        chosen = cells[cells["budget"] == budget]
        sizes = cells["params"].nunique()
        which = "the largest that all sizes have" if most == sizes else f"the one with most sizes, {most} of {sizes}"
        at = f"one budget, {budget:.6g} FLOPs: {which}"
        best = chosen["params"].to_numpy(dtype=float)[int(chosen[target].to_numpy(dtype=float).argmin())]
        falling = chosen[chosen["params"] <= best]
        if 3 <= len(falling) < len(chosen):
            return falling, (at, "sizes up to the best one (larger ones see too little data)")
        return chosen, (at,)
    if x not in frame.columns:
        return frame.iloc[:0], ()
    return frame[frame[x].notna()], ()
