"""Figures of values against compute or size: frontier, curves, IsoFLOP sets."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.checks.forecast import LargestBudgetCheck, OffsetAverage
from analysis.fitting.intervals import predict
from analysis.fitting.laws.base import Array
from analysis.grids.frontier import FRONTIERS
from analysis.grids.grid import TargetGrid
from analysis.report.drawing import (
    BLUE,
    GREEN,
    INK,
    PURPLE,
    VERMILION,
    Drawing,
    label,
    legend_below,
    log_axis,
    named,
    points,
    power_of_ten,
    render,
    run_names,
    sentence,
    shades,
    size_name,
    value_axis,
)
from analysis.report.evaluation_figures import floors, interval_bars, marks_in_words, value_axis_with_floors
from analysis.results import FitEntry, LawsResult
from analysis.tables.table import RunsTable

_HELD_AND_FREE = "Lines: the law fitted to the frontier, above the measured floor and above a free one. "
_LINES = (("-", INK), ("--", VERMILION), (":", GREEN), ("-.", PURPLE), ("--", BLUE))


def against_compute(result: LawsResult, key: str, group: str, target: str, name: str) -> Drawing:
    """Cells as points joined by size, the frontier, its law with the interval for a new run, and the held-out check."""
    grid, check = result.grids[key], result.checks.get(key)
    entries = [entry for entry in result.entries(target, "flops", group) if entry.is_shown]
    bent = [each for each in entries if each.fitted.law.name in ("power-offset", "power-floor")]
    drawn = [each for each in bent if each.fitted.law == bent[0].fitted.law] or entries[:1]
    levels = floors(result.table, target)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        _size_lines(axes, result.table, grid, target)
        best = grid.frontier
        reach = np.geomspace(best["flops"].min() / 1.3, best["flops"].max() * 4, 80)
        _band(axes, best, target, grid, reach)
        for entry, (style, colour) in zip(drawn, _LINES, strict=False):
            axes.plot(reach, entry.fitted.predict(reach), style, color=colour, label=_formula(entry), zorder=4)
        rings = axes.plot(best["flops"], best[target], "o", mfc="none", mec=INK, ms=6, mew=0.8, zorder=5)
        rings[0].set_label("frontier")
        named(rings, run_names(result.table, best))
        _prediction_mark(axes, grid, check)
        log_axis(axes, "x")
        value_axis_with_floors(axes, pd.concat([grid.cells[target], best[target]]), levels)
        axes.set(xlabel=label(result.table, "flops"), ylabel=label(result.table, target))
        legend_below(figure, axes)

    caption = (
        f"{sentence(result.table, target)} against training compute. Points are runs, joined by size; rings mark the "
        "best run of each budget (the frontier). "
        + ("", "Line: the law fitted to the frontier. ", _HELD_AND_FREE)[len(drawn)]
        + ("" if grid.rises else "Band: 95% interval for a new run, averaged over the offset.")
        + marks_in_words(levels, grid.cells, target)
    )
    if check is not None:
        caption += " Bars: the largest budget as predicted from the smaller ones alone, with its 95% interval."
    return render(name, caption, draw, height=3.3)


def against(result: LawsResult, target: str, x: str, name: str, group: str = "") -> Drawing:
    """The rows of the fits against x, with each law that is shown."""
    entries = result.entries(target, x, group)
    rows = entries[0].rows
    drawn = [entry for entry in entries if entry.is_shown]
    banded = next((each for each in drawn if each.fitted.law.has_offset), drawn[-1] if drawn else None)
    levels = floors(result.table, target)
    chosen = {f"frontier: {text}" for text in FRONTIERS.values()}
    on_frontier = bool(chosen.intersection(entries[0].filters))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        values = rows[x].to_numpy(dtype=float)
        interval_bars(axes, rows, rows[x], target, BLUE)
        if on_frontier:
            _others(axes, result.table, target, group)
        points(
            axes,
            values,
            rows[target].to_numpy(dtype=float),
            "frontier" if on_frontier else "runs",
            run_names(result.table, rows),
        )
        reach = np.geomspace(values.min() / 1.2, values.max() * 1.2, 120)
        if banded is not None:
            _interval_bands(axes, banded, reach)
        for entry, (style, colour) in zip(drawn, _LINES, strict=False):
            axes.plot(reach, entry.fitted.predict(reach), style, color=colour, label=_formula(entry))
        log_axis(axes, "x", counts=x == "params")
        value_axis_with_floors(axes, rows[target], levels)
        axes.set(xlabel=label(result.table, x), ylabel=label(result.table, target))
        legend_below(figure, axes)

    filters = [each for each in entries[0].filters if each not in result.table.filters]
    which = f" ({'; '.join(filters)})" if filters else ""
    caption = f"{sentence(result.table, target)} against {label(result.table, x)}{which}. "
    if banded is None:
        caption += "No law is drawn: over these rows the values don't fall."
    else:
        name_of_law = banded.fitted.law.name
        caption += f"Bands: 95% intervals of {name_of_law}, for the curve (darker) and for a new run."
    caption += marks_in_words(levels, rows, target)
    return render(name, caption, draw, height=2.9)


def isoflop(result: LawsResult, grid: TargetGrid, target: str, name: str) -> Drawing:
    """Target against size, one line a budget, with a parabola and its minimum where one is bracketed."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        budgets = sorted(grid.cells["budget"].unique())
        for budget, colour in zip(budgets, shades(len(budgets)), strict=True):
            rows = grid.cells[grid.cells["budget"] == budget].sort_values("params")
            found = next((each for each in grid.minima if each.budget == budget), None)
            bowl = found is not None and found.params is not None
            drawn = axes.plot(rows["params"], rows[target], "o" if bowl else "o:", color=colour, lw=0.8)
            named(drawn, run_names(result.table, rows))
            axes.plot([], [], "-", color=colour, label=power_of_ten(budget))
            if found is not None and found.params is not None and found.value is not None:
                logs = np.log(rows["params"].to_numpy(dtype=float))
                fine = np.linspace(logs.min(), logs.max(), 80)
                axes.plot(np.exp(fine), np.polyval(found.coefficients, fine - logs.mean()), color=colour)
                axes.plot(found.params, found.value, "*", color=colour, ms=8, mec=INK, mew=0.5, zorder=5)
                if found.params_ci95 is not None:
                    axes.plot(found.params_ci95, [found.value] * 2, "-", color=INK, lw=0.7, zorder=4)
        log_axis(axes, "x", counts=True)
        value_axis(axes, grid.cells[target])
        axes.set(xlabel=label(result.table, "params"), ylabel=label(result.table, target))
        legend_below(figure, axes, title="budget (FLOPs)", columns=4)

    bracketed, extreme = sum(each.params is not None for each in grid.minima), "maximum" if grid.rises else "minimum"
    caption = (
        f"IsoFLOP sets: {sentence(result.table, target).lower()} against size at each budget. "
        f"{bracketed} of {len(grid.minima)} budgets bracket a {extreme} (star, on a parabola in log N, with its 95% "
        "interval); the others are joined by dots."
    )
    return render(name, caption, draw, height=3.1)


def _size_lines(axes: Axes, table: RunsTable, grid: TargetGrid, target: str) -> None:
    sizes = sorted(grid.cells["params"].unique())
    for place, (size, colour) in enumerate(zip(sizes, shades(len(sizes)), strict=True)):
        rows = grid.cells[grid.cells["params"] == size].sort_values("flops")
        name = size_name(rows) if len(sizes) <= 9 or place in (0, len(sizes) - 1) else None
        interval_bars(axes, rows, rows["flops"], target, colour)
        drawn = axes.plot(rows["flops"], rows[target], "o-", color=colour, lw=0.8, ms=3, label=name, zorder=3)
        named(drawn, run_names(table, rows))


def _band(axes: Axes, best: pd.DataFrame, target: str, grid: TargetGrid, reach: Array) -> None:
    if len(best) < 3 or grid.rises:
        return
    average = OffsetAverage(best["flops"].to_numpy(dtype=float), best[target].to_numpy(dtype=float), grid.noise)
    _, low, high = average.predict(reach)
    axes.fill_between(reach, low, high, color="#8a8f98", alpha=0.28, lw=0, label="95%, new run", zorder=1)


def _others(axes: Axes, table: RunsTable, target: str, group: str) -> None:
    """All runs, behind those of the frontier."""
    frame = table.frame
    chosen = frame[frame["group"].astype(str) == group] if group else frame
    drawn = axes.plot(
        chosen["flops"], chosen[target], "o", color="#8a8f98", ms=2, alpha=0.5, label="all runs", zorder=2
    )
    named(drawn, run_names(table, chosen))


def _interval_bands(axes: Axes, entry: FitEntry, reach: Array) -> None:
    sure = predict(entry.fitted, entry.uncertainty, reach)
    for pairs, alpha in (([each.new_run_ci95 for each in sure], 0.18), ([each.curve_ci95 for each in sure], 0.3)):
        low, high = np.array(pairs).T
        axes.fill_between(reach, low, high, color="#8a8f98", alpha=alpha, lw=0, zorder=1)


def _prediction_mark(axes: Axes, grid: TargetGrid, check: LargestBudgetCheck | None) -> None:
    if check is None:
        return
    place, bars = (
        grid.frontier["flops"].iloc[-1],
        [[check.predicted - check.ci95[0]], [check.ci95[1] - check.predicted]],
    )
    style: dict[str, Any] = {"color": VERMILION, "ms": 13, "mew": 1.2, "lw": 1, "capsize": 4, "zorder": 6}
    # a bar without a face, so that what was observed shows through
    axes.errorbar([place], [check.predicted], bars, fmt="_", label="predicted", **style)


def _formula(entry: FitEntry) -> str:
    values = {name: f"{value:.3g}" for name, value in entry.fitted.parameters.items()}
    if "E" in entry.fitted.at_bound:
        values["E"] = "0"
    x = {"flops": "C", "params": "N", "tokens": "D"}.get(entry.x, "x")
    sign = 1 if entry.fitted.law.name == "rising-power" else -1
    exponent = sign * entry.fitted.parameters.get("alpha", 0.0)  # laws without one don't name it
    power = f"{x}$^{{{exponent:.3g}}}$".replace("-", "−")
    text = entry.fitted.law.legend.format(power=power, **values) or entry.fitted.law.name
    floor = "" if entry.fitted.law.name != "power-floor" else ", free" if entry.fitted.offset is None else ", held"
    return text + floor
