"""The figures of a result, at the width of a paper's column; `drawing.py` says how they look."""

import re
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.drawing import (
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
    power_of_ten,
    render,
    sentence,
    shades,
    si,
    value_axis,
)
from analysis.holdout import OffsetAverage
from analysis.laws import Array
from analysis.published import published

if TYPE_CHECKING:
    from analysis.results import FitEntry, LawsResult, TargetGrid

MANY_POINTS = 60
_LINES = (("-", INK), ("--", VERMILION), (":", GREEN), ("-.", PURPLE), ("--", BLUE))


def draw_all(result: "LawsResult") -> list[Drawing]:
    """Every figure that the result has data for."""
    drawings = []
    for stem in ("loss", "error"):
        for key, group, target in _keys(result, stem):
            drawings += _against_compute(result, key, group, target, f"{stem}_vs_compute")
    for key, group, target in _keys(result, "loss"):
        suffix = _suffix(group)
        if _entries(result, target, "params", group):
            drawings.append(against(result, target, "params", f"loss_vs_parameters{suffix}", group))
        for x in sorted({entry.x for entry in result.fits} - {"flops", "params", "params, tokens"}):
            if _entries(result, target, x, group):
                drawings.append(against(result, target, x, f"loss_vs{_suffix(x)}{suffix}", group))
        if key in result.grids:
            drawings.append(isoflop(result, result.grids[key], target, f"isoflop{suffix}"))
        surface = next((e for e in result.fits if e.target == target and len(e.inputs) == 2 and e.group == group), None)
        if surface is not None:
            drawings.append(contour(result, surface, f"contour{suffix}"))
        drawings.append(residuals(result, _main(result, target, group), f"residuals{suffix}"))
        if key in result.grids and result.grids[key].roll_forward:
            drawings.append(holdout(result, key, target, f"holdout{suffix}"))
        drawings.append(clouds(result, _main(result, target, group), f"clouds{suffix}"))
    if result.comparisons:
        drawings.append(groups(result))
    if result.options.published:
        drawings += published(result)
    return drawings


def against_compute(result: "LawsResult", key: str, group: str, target: str, name: str) -> Drawing:
    """Cells as points joined by size, the frontier, its law with the interval for a new run, and the held-out check."""
    grid = result.grids[key]
    entries = _entries(result, target, "flops", group)
    entry = next((each for each in entries if each.fitted.law.name == "power-offset"), entries[0] if entries else None)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        _size_lines(axes, grid, target)
        best = grid.frontier
        reach = np.geomspace(best["flops"].min() / 1.3, best["flops"].max() * 4, 80)
        _band(axes, best, target, grid, reach)
        if entry is not None:
            axes.plot(reach, entry.fitted.predict(reach), color=INK, lw=1.2, label=_formula(entry), zorder=4)
        axes.plot(best["flops"], best[target], "o", mfc="none", mec=INK, ms=6, mew=0.8, zorder=5, label="frontier")
        _prediction_mark(axes, grid)
        log_axis(axes, "x")
        value_axis(axes, pd.concat([grid.cells[target], best[target]]))
        axes.set(xlabel=label(result.table, "flops"), ylabel=label(result.table, target))
        legend_below(figure, axes)

    caption = (
        f"{sentence(result.table, target)} against training compute. Points are runs, joined by size; rings mark the "
        "best run of each budget (the frontier). Line: the law fitted to the frontier. Band: 95% interval for a new "
        "run, averaged over the offset."
    )
    if grid.check is not None:
        caption += " Diamond: the largest budget as predicted from the smaller ones alone, with its 95% interval."
    return render(name, caption, draw, height=3.3)


def against(result: "LawsResult", target: str, x: str, name: str, group: str = "") -> Drawing:
    """The rows of the fits against x, with each law."""
    entries = _entries(result, target, x, group)
    rows = entries[0].rows

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        values = rows[x].to_numpy(dtype=float)
        _points(axes, values, rows[target].to_numpy(dtype=float), "runs")
        reach = np.geomspace(values.min() / 1.2, values.max() * 1.2, 120)
        for entry, (style, colour) in zip(entries, _LINES, strict=False):
            axes.plot(reach, entry.fitted.predict(reach), style, color=colour, label=_formula(entry))
        log_axis(axes, "x", counts=x == "params")
        value_axis(axes, rows[target])
        axes.set(xlabel=label(result.table, x), ylabel=label(result.table, target))
        legend_below(figure, axes)

    filters = [each for each in entries[0].filters if each not in result.table.filters]
    which = f" ({'; '.join(filters)})" if filters else ""
    caption = f"{sentence(result.table, target)} against {label(result.table, x)}{which}."
    return render(name, caption, draw, height=2.9)


def isoflop(result: "LawsResult", grid: "TargetGrid", target: str, name: str) -> Drawing:
    """Target against size, one line a budget, with a parabola and its minimum where one is bracketed."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        budgets = sorted(grid.cells["budget"].unique())
        for budget, colour in zip(budgets, shades(len(budgets)), strict=True):
            rows = grid.cells[grid.cells["budget"] == budget].sort_values("params")
            found = next((each for each in grid.minima if each.budget == budget), None)
            bowl = found is not None and found.params is not None
            axes.plot(rows["params"], rows[target], "o" if bowl else "o:", color=colour, lw=0.8)
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

    bracketed = sum(each.params is not None for each in grid.minima)
    caption = (
        f"IsoFLOP sets: {sentence(result.table, target).lower()} against size at each budget. "
        f"{bracketed} of {len(grid.minima)} budgets bracket a minimum (star, on a parabola in log N, with its 95% "
        "interval); the others are joined by dots."
    )
    return render(name, caption, draw, height=3.1)


def contour(result: "LawsResult", entry: "FitEntry", name: str) -> Drawing:
    """The parametric surface over N and D, the runs, and the best size for each budget."""
    rows = entry.rows
    keys = [entry.target, f"{entry.target} [{entry.group}]"]
    found = [each for key in keys for each in result.allocations.get(key, ()) if each.approach.startswith("parametric")]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        params, tokens = (np.geomspace(rows[each].min() / 1.5, rows[each].max() * 1.5, 90) for each in entry.inputs)
        mesh_params, mesh_tokens = np.meshgrid(params, tokens)
        surface = entry.fitted.predict(mesh_params.ravel(), mesh_tokens.ravel()).reshape(mesh_params.shape)
        shading = axes.contourf(params, tokens, surface, levels=14, cmap="viridis")
        bar = figure.colorbar(shading, ax=axes, pad=0.02)
        bar.set_label(label(result.table, entry.target))
        axes.plot(rows["params"], rows["tokens"], "o", color="white", mec=INK, mew=0.5, ms=3.2, label="runs")
        best = [(each.params, each.tokens) for allocation in found for each in allocation.best if each.tokens]
        inside = [pair for pair in best if pair[0] <= params[-1] and pair[1] <= tokens[-1]]
        if inside:
            axes.plot(
                *zip(*inside, strict=True), "*", color=VERMILION, ms=8, mec=INK, mew=0.5, label="best for a budget"
            )
        log_axis(axes, "x", counts=True)
        log_axis(axes, "y", counts=True)
        axes.set(xlabel=label(result.table, "params"), ylabel=label(result.table, "tokens"))
        axes.grid(visible=False)
        legend_below(figure, axes)

    caption = f"The surface of {entry.fitted.law.name} over parameters and tokens, with the runs."
    return render(name, caption, draw, height=3.0)


def residuals(result: "LawsResult", entry: "FitEntry", name: str) -> Drawing:
    """Relative residuals of a law against size and compute."""
    wanted = ("params", "flops") if len(entry.inputs) > 1 else (entry.x,)
    places = [each for each in wanted if each in entry.rows.columns] or list(entry.inputs)

    def draw(figure: Figure) -> None:
        axes_row = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
        values = entry.fitted.predict(*(entry.rows[each].to_numpy(dtype=float) for each in entry.inputs))
        percent = 100 * (entry.fitted.y_n / values - 1)
        for axes, place in zip(axes_row, places, strict=True):
            axes.axhline(0, color=INK, lw=0.6)
            _points(axes, entry.rows[place].to_numpy(dtype=float), percent, "")
            log_axis(axes, "x", counts=place == "params")
            axes.set(xlabel=label(result.table, place).split(" (")[0])
        axes_row[0].set(ylabel="residual (%)")

    return render(name, f"Residuals of {entry.name}: observed over fitted, minus one.", draw, height=2.1)


def holdout(result: "LawsResult", key: str, target: str, name: str) -> Drawing:
    """Each budget predicted from the smaller ones, as the error relative to what was observed."""
    checks = result.grids[key].roll_forward

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        places = np.arange(len(checks))
        observed = np.array([check.observed for check in checks])
        middle = 100 * np.array([check.error for check in checks]) / observed
        low, high = (100 * (np.array([check.ci95[side] for check in checks]) / observed - 1) for side in (0, 1))
        baseline = 100 * np.array([check.baseline_error for check in checks]) / observed
        axes.axhline(0, color=INK, lw=0.6)
        bars = [middle - low, high - middle]
        axes.errorbar(places, middle, bars, fmt="D", color=BLUE, ms=4, lw=1, capsize=2.5, label="law")
        axes.plot(places + 0.12, baseline, "_", color=VERMILION, ms=9, mew=2, label="no change")
        axes.set_xticks(places, [f"{power_of_ten(check.budget)}\nfrom {check.n_budgets}" for check in checks])
        axes.set_xlim(-0.6, len(checks) - 0.4)
        axes.set(xlabel="budget (FLOPs), and from how many smaller ones", ylabel="error (%)")
        axes.grid(axis="x", visible=False)
        legend_below(figure, axes)

    caption = (
        f"Rolling forward: each budget's best {sentence(result.table, target).lower()} predicted from the smaller "
        "budgets alone, with the 95% interval for a new run; beside it what the next smaller budget's value, taken "
        "as it is, would be off by."
    )
    return render(name, caption, draw, height=2.5)


def clouds(result: "LawsResult", entry: "FitEntry", name: str) -> Drawing:
    """The draws of the bootstrap: how two parameters vary together."""
    names = list(entry.fitted.law.parameters)
    second = next(each for each in ("beta", "E", "A") if each in names)
    places = names.index("alpha"), names.index(second)
    drawn_SP = entry.fitted.problem.natural(entry.uncertainty.draws.theta_SP[:1500])
    symbol = {"beta": "β", "alpha": "α"}

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        x, y = drawn_SP[:, places[0]], drawn_SP[:, places[1]]
        if second == "A":
            axes.set_yscale("log")
        axes.plot(x, y, ".", color=BLUE, ms=2, alpha=0.35, rasterized=True)
        point = entry.fitted.parameters["alpha"], entry.fitted.parameters[second]
        axes.plot(*point, "+", color=VERMILION, ms=10, mew=1.6)
        for interval, line in zip((entry.uncertainty.ci95["alpha"], entry.uncertainty.ci95[second]), "xy", strict=True):
            for edge in interval:
                (axes.axvline if line == "x" else axes.axhline)(edge, color=INK, lw=0.6, ls=":")
        low, high = np.quantile(drawn_SP[:, places], [0.005, 0.995], axis=0)
        span = np.maximum(high - low, 1e-9)
        intervals = np.array([entry.uncertainty.ci95["alpha"], entry.uncertainty.ci95[second]])
        axes.set_xlim(min(low[0], intervals[0, 0]) - 0.1 * span[0], max(high[0], intervals[0, 1]) + 0.1 * span[0])
        if second != "A":
            axes.set_ylim(min(low[1], intervals[1, 0]) - 0.1 * span[1], max(high[1], intervals[1, 1]) + 0.1 * span[1])
        axes.set(xlabel=symbol["alpha"], ylabel=symbol.get(second, second))

    which = f"{entry.uncertainty.method} for {entry.name}"
    caption = f"Draws of the {which}, with the fit (cross) and the 95% intervals (dotted)."
    return render(name, caption, draw, height=2.4)


def groups(result: "LawsResult") -> Drawing:
    """Frontiers of the groups with their power laws."""
    target = result.comparisons[0].target
    entries = [e for e in result.fits if (e.fitted.law.name, e.target, e.x) == ("power", target, "flops")]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for entry, colour in zip(entries, (BLUE, VERMILION, GREEN, PURPLE, ORANGE, INK), strict=False):
            values = entry.rows["flops"].to_numpy(dtype=float)
            axes.plot(values, entry.rows[target], "o", color=colour)
            reach = np.geomspace(values.min(), values.max() * 2, 50)
            axes.plot(reach, entry.fitted.predict(reach), "-", color=colour, label=f"{entry.group}: {_formula(entry)}")
        log_axis(axes, "x")
        value_axis(axes, pd.concat([entry.rows[target] for entry in entries]))
        axes.set(xlabel=label(result.table, "flops"), ylabel=label(result.table, target))
        legend_below(figure, axes, columns=2)

    return render(
        "comparison", f"{sentence(result.table, target)} of each group's frontier, with power laws.", draw, 3.0
    )


def _keys(result: "LawsResult", stem: str) -> list[tuple[str, str, str]]:
    """Name of the grid, group and first target of a kind (token error, or anything else as loss), for each group."""
    names = [name for name in result.table.targets if ("error" in name) == (stem == "error")]
    if not names:
        return []
    found = sorted({entry.group for entry in result.fits if entry.target == names[0]})
    return [(f"{names[0]} [{group}]" if group else names[0], group, names[0]) for group in found]


def _suffix(text: str) -> str:
    """What a group or column adds to a file's name."""
    return "_" + re.sub(r"[^\w.-]+", "_", text) if text else ""


def _against_compute(result: "LawsResult", key: str, group: str, target: str, name: str) -> list[Drawing]:
    name += _suffix(group)
    if key in result.grids:
        return [against_compute(result, key, group, target, name)]
    return [against(result, target, "flops", name, group)] if _entries(result, target, "flops", group) else []


def _entries(result: "LawsResult", target: str, x: str, group: str) -> list["FitEntry"]:
    return [entry for entry in result.fits if (entry.target, entry.x, entry.group) == (target, x, group)]


def _main(result: "LawsResult", target: str, group: str) -> "FitEntry":
    """The fit that says most: the surface, then the curve with an offset, then any."""
    entries = [entry for entry in result.fits if entry.target == target and entry.group == group]
    for law in ("chinchilla", "chinchilla-tied", "power-offset"):
        for entry in entries:
            if entry.fitted.law.name == law:
                return entry
    return entries[0]


def _points(axes: Axes, x: Array, y: Array, name: str) -> None:
    many = len(x) > MANY_POINTS
    axes.plot(x, y, "o", color=BLUE, ms=1.8 if many else 3.2, alpha=0.8, label=name, zorder=3, rasterized=len(x) > 2000)


def _size_lines(axes: Axes, grid: "TargetGrid", target: str) -> None:
    sizes = sorted(grid.cells["params"].unique())
    for place, (size, colour) in enumerate(zip(sizes, shades(len(sizes)), strict=True)):
        rows = grid.cells[grid.cells["params"] == size].sort_values("flops")
        depth = rows["depth"].iloc[0] if "depth" in rows.columns else np.nan
        name = f"depth {depth:g}, {si(size)}" if np.isfinite(depth) else f"{si(size)} parameters"
        shown = len(sizes) <= 9 or place in (0, len(sizes) - 1)
        axes.plot(
            rows["flops"], rows[target], "o-", color=colour, lw=0.8, ms=3, label=name if shown else None, zorder=3
        )


def _band(axes: Axes, best: pd.DataFrame, target: str, grid: "TargetGrid", reach: Array) -> None:
    if len(best) < 3:
        return
    average = OffsetAverage(best["flops"].to_numpy(dtype=float), best[target].to_numpy(dtype=float), grid.noise)
    _, low, high = average.predict(reach)
    axes.fill_between(reach, low, high, color="#8a8f98", alpha=0.28, lw=0, label="95%, new run", zorder=1)


def _prediction_mark(axes: Axes, grid: "TargetGrid") -> None:
    check = grid.check
    if check is None:
        return
    place = grid.frontier["flops"].iloc[-1] * 1.12
    bars = [[check.predicted - check.ci95[0]], [check.ci95[1] - check.predicted]]
    axes.errorbar(
        [place], [check.predicted], bars, fmt="D", color=VERMILION, ms=4, lw=1, capsize=2.5, zorder=6, label="predicted"
    )


def _formula(entry: "FitEntry") -> str:
    p = {name: f"{value:.3g}" for name, value in entry.fitted.parameters.items()}
    x = {"flops": "C", "params": "N", "tokens": "D"}.get(entry.x, "x")
    falling = f"{x}$^{{{-entry.fitted.parameters['alpha']:.3g}}}$".replace("-", "−")
    texts = {
        "power": f"power, {falling}",
        "power-offset": f"{p.get('E')} + A·{falling}",
        "power-floor": f"{p.get('E')} + A·{falling}",
        "power-logit": f"odds, {falling}",
        "broken-power": f"broken, {falling} bending at {p.get('B')}",
    }
    return texts.get(entry.fitted.law.name, entry.fitted.law.name)
