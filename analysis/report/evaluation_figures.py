"""Figures of FID and the like: floors as lines, intervals as bars, values against loss, and the best sizes."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.fitting.intervals import predict
from analysis.grids.guidance import SHARES
from analysis.report.drawing import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    VERMILION,
    Drawing,
    label,
    legend_below,
    log_axis,
    named,
    render,
    run_names,
    sentence,
    shades,
    si,
    size_name,
    value_axis,
)
from analysis.results import FitEntry, LawsResult
from analysis.tables.evaluations import LIKELIHOOD, RECONSTRUCTIONS, measured_floor
from analysis.tables.table import RunsTable


def floors(table: RunsTable, target: str) -> dict[str, float]:
    """The levels to draw as lines: real images against real images, and for FID the tokenizer's reconstructions."""
    found = {}
    floor = measured_floor(table.frame, target)
    if floor is not None:
        found["real images"] = floor
    if target == "fid" and RECONSTRUCTIONS in table.frame.columns:
        values = table.frame[RECONSTRUCTIONS].dropna()
        if len(values) and values.median() > 0:
            found["reconstructions"] = float(values.median())
    return found


def value_axis_with_floors(axes: Axes, values: "pd.Series[float]", levels: dict[str, float]) -> None:
    """The axis of values, with each level as a line across it and its name at either end.

    A level so far below that the values would fill less than two fifths of the axis is named at the bottom instead.
    """
    low, high = np.log([values.min(), values.max()])
    near = [level for level in levels.values() if low - np.log(level) <= 1.5 * (high - low)]
    value_axis(axes, pd.concat([values, pd.Series(near, dtype=float)]))
    looks = {"real images": (GREEN, "--", "left"), "reconstructions": (PURPLE, ":", "right")}
    for name, level in levels.items():
        colour, style, side = looks[name]
        x, text = 0.01 if side == "left" else 0.99, f"{name}, {level:.3g}"
        font: dict[str, Any] = {"color": colour, "size": 6.5, "va": "bottom", "ha": side}
        if level in near:
            axes.axhline(level, color=colour, lw=1, ls=style, zorder=2)
            axes.text(x, level, text, transform=axes.get_yaxis_transform(), **font)
        else:
            axes.text(x, 0.01, f"↓ {text}", transform=axes.transAxes, **font)


def interval_bars(axes: Axes, rows: pd.DataFrame, x: "pd.Series[float]", target: str, colour: Any) -> None:
    """The 95% intervals of values, where the table has them."""
    if not {f"{target}_low", f"{target}_high"} <= set(rows.columns):
        return
    low, high = (rows[f"{target}_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
    shown = np.isfinite(low) & np.isfinite(high) & (low > 0)
    middle = np.sqrt(low * high)[shown]
    bars = [middle - low[shown], high[shown] - middle]
    axes.errorbar(x.to_numpy(dtype=float)[shown], middle, bars, fmt="none", ecolor=colour, lw=0.8, zorder=3)


def marks_in_words(levels: dict[str, float], rows: pd.DataFrame, target: str) -> str:
    """What a caption says of bars and lines."""
    bars = " Bars: 95% intervals of the values." if f"{target}_low" in rows.columns else ""
    meanings = {
        "real images": "real images against real images of the same number",
        "reconstructions": "the tokenizer's reconstructions",
    }
    lines = " and ".join(meanings[name] for name in levels)
    return bars + (f" Level lines, or arrows where far below: {lines}." if lines else "")


def against_loss(result: LawsResult, target: str, name: str, group: str) -> Drawing:
    """Cells by size against their loss, with the laws fitted to all of them."""
    every = result.entries(target, LIKELIHOOD, group)
    entries = [entry for entry in every if entry.is_shown]
    entries = [entry for entry in entries if entry.fitted.law.has_offset] or entries
    rows = every[0].rows
    loss = -np.log(rows[LIKELIHOOD])
    levels = floors(result.table, target)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        reach = np.linspace(loss.min() - 0.05 * np.ptp(loss), loss.max() + 0.05 * np.ptp(loss), 120)
        for entry, (style, colour) in zip(entries, (("-", INK), ("--", VERMILION)), strict=False):
            axes.plot(reach, entry.fitted.predict(np.exp(-reach)), style, color=colour, label=_formula(entry), zorder=4)
        if entries:
            sure = predict(entries[0].fitted, entries[0].uncertainty, np.exp(-reach))
            low, high = np.array([each.new_run_ci95 for each in sure]).T
            axes.fill_between(reach, low, high, color="#8a8f98", alpha=0.25, lw=0, zorder=1)
        sizes = sorted(rows["params"].unique()) if "params" in rows.columns else []
        for size, colour in zip(sizes, shades(len(sizes)), strict=True):
            chosen = rows[rows["params"] == size]
            shown = size_name(chosen) if len(sizes) <= 9 or size in (sizes[0], sizes[-1]) else None
            interval_bars(axes, chosen, loss[chosen.index], target, colour)
            drawn = axes.plot(loss[chosen.index], chosen[target], "o", color=colour, label=shown, zorder=5)
            named(drawn, run_names(result.table, chosen))
        if not sizes:
            drawn = axes.plot(loss, rows[target], "o", color=BLUE, label="runs", zorder=5)
            named(drawn, run_names(result.table, rows))
        value_axis_with_floors(axes, rows[target], levels)
        axes.set(xlabel=f"loss ({result.table.loss_unit})", ylabel=label(result.table, target))
        legend_below(figure, axes)

    law = (
        f"Band: 95% interval for a new run, by the {_words(entries[0])}." if entries else "No law falls with the loss."
    )
    caption = (
        f"{sentence(result.table, target)} against loss, one point a cell. {law}{marks_in_words(levels, rows, target)}"
    )
    return render(name, caption, draw, height=3.1)


def sizes(result: LawsResult, group: str, name: str) -> Drawing:
    """The best size of each budget by each target."""
    budgets = result.sizes[group]
    names = list(dict.fromkeys(target for each in budgets for target in each.targets))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for place, target in enumerate(names[:5]):
            colour, marker = (INK, BLUE, VERMILION, ORANGE, GREEN)[place], "osD^v"[place]
            found = [(each.budget * 1.03**place, each.targets[target]) for each in budgets if target in each.targets]
            for budget, size in found:
                if size.minimum is not None and size.minimum_ci95 is not None:
                    axes.plot([budget] * 2, size.minimum_ci95, "-", color=colour, lw=0.8)
            x = [budget for budget, _ in found]
            best = [size.minimum or size.params for _, size in found]
            axes.plot(x, best, "-", color=colour, lw=0.8, alpha=0.5)
            filled = [size.minimum is not None for _, size in found]
            for is_minimum, face in ((True, colour), (False, "none")):
                chosen = [i for i, each in enumerate(filled) if each == is_minimum]
                axes.plot([x[i] for i in chosen], [best[i] for i in chosen], marker, color=colour, mfc=face, ms=4.5)
            axes.plot(
                [],
                [],
                f"{marker}-",
                color=colour,
                ms=4.5,
                lw=0.8,
                label=f"by {label(result.table, target).split(' (')[0]}",
            )
        log_axis(axes, "x")
        log_axis(axes, "y", counts=True)
        axes.set(xlabel=label(result.table, "flops"), ylabel="best size (parameters)")
        legend_below(figure, axes)

    caption = (
        "The best size at each budget, by each measure. Filled: minimum of a parabola in log N, with its 95% interval; "
        "hollow: the best cell, where the sizes bracket no minimum."
    )
    return render(name, caption, draw, height=2.7)


def against_guidance(result: LawsResult, settings: str, name: str) -> Drawing:
    """FID and the like, precision and recall of the cells that were evaluated at several guidances under a setting."""
    curves = [curve for curve in result.guidance if curve.settings == settings]
    targets = list(dict.fromkeys(target for curve in curves for target in curve.best))
    shares = any(name in point for curve in curves for point in curve.points for name in SHARES)
    by = "params" if len({curve.sizes.get("params") for curve in curves}) > 1 else "budget"
    levels = sorted({curve.sizes[by] for curve in curves if by in curve.sizes})
    colours = dict(zip(levels, shades(len(levels)), strict=True))
    panels = len(targets) + shares

    def draw(figure: Figure) -> None:
        rows = np.atleast_1d(figure.subplots(panels, sharex=True))
        for axes, target in zip(rows, targets, strict=False):
            for curve in curves:
                colour = colours.get(curve.sizes.get(by, 0.0), BLUE)
                drawn = axes.plot(*curve.column(target), "o-", color=colour, lw=0.8, ms=2.5)
                named(drawn, [curve.run] * len(curve.column(target)[0]))
                if (best := curve.best.get(target)) and best.bracketed:
                    axes.plot(best.guidance, best.value, "D", mfc="none", mec=VERMILION, ms=3.5, mew=0.7, zorder=5)
            value_axis(axes, pd.Series([value for curve in curves for value in curve.column(target)[1]]))
            axes.set(ylabel=label(result.table, target))
        if shares:
            for share, style in zip(SHARES, ("-", "--"), strict=True):
                for curve in curves:
                    colour = colours.get(curve.sizes.get(by, 0.0), BLUE)
                    rows[-1].plot(*curve.column(share), style, color=colour, lw=0.8)
                rows[-1].plot([], [], style, color=INK, lw=0.8, label=share.removeprefix("image_"))
            rows[-1].set(ylabel="share of images")
        for level, colour in colours.items():
            if len(levels) <= 9 or level in (levels[0], levels[-1]):
                one = next(curve.sizes for curve in curves if curve.sizes.get(by) == level)
                shown = size_name(pd.DataFrame([one])) if by == "params" else f"{si(level)} FLOPs"
                rows[-1].plot([], [], "o-", color=colour, lw=0.8, ms=2.5, label=shown)
        rows[-1].plot([], [], "D", mfc="none", mec=VERMILION, ms=3.5, mew=0.7, label="best, by a parabola")
        rows[-1].set(xlabel="classifier-free guidance")
        figure.align_ylabels()
        legend_below(figure, rows[-1])

    measures = " and ".join(sentence(result.table, target) for target in targets)
    caption = (
        f"{measures} against guidance, a line for each of {len(curves)} cells ({settings}). "
        "Diamonds: minimum of a parabola in the logarithm through the lowest point and its neighbours; none where the "
        "lowest is at an end." + (" Below: precision (solid) and recall (dashed)." if shares else "")
    )
    return render(name, caption, draw, height=1.0 + 1.35 * panels)


def _words(entry: FitEntry) -> str:
    return "law held at the measured floor" if entry.fitted.offset is not None else f"law {entry.fitted.law.name}"


def _formula(entry: FitEntry) -> str:
    """Such as 5.1 + 0.02·e^{3.1 loss}."""
    values = entry.fitted.parameters
    offset = f"{values['E']:.3g} + " if "E" in values and "E" not in entry.fitted.at_bound else ""
    which = "" if "E" not in values else ", free" if entry.fitted.offset is None else ", held"
    return f"{offset}{values['A']:.2g}·e$^{{{values['alpha']:.3g}\\,loss}}${which}"
