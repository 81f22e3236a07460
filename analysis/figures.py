"""Figures at the width of a paper's column, as SVG and PNG, in colours that colour-blind readers can tell apart.

Sizes and budgets have an order, so they are shaded from dark to light (viridis); things without an order use Okabe
and Ito's palette. In the report the same drawing is inlined with its ink set to the text colour, so that it reads on
light and dark.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from analysis.holdout import OffsetAverage
from analysis.laws import Array

if TYPE_CHECKING:
    from analysis.results import FitEntry, LawsResult, TargetGrid

COLUMN_INCHES = 3.4
INK = "#16181d"
ORANGE, BLUE, GREEN, VERMILION, PURPLE = "#e69f00", "#0072b2", "#009e73", "#d55e00", "#cc79a7"
_STYLE: dict[str, Any] = {
    "font.size": 8,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#8a8f98",
    "grid.alpha": 0.25,
    "grid.linewidth": 0.4,
    "legend.fontsize": 6.5,
    "legend.title_fontsize": 6.5,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.labelspacing": 0.25,
    "legend.borderaxespad": 0.2,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "svg.fonttype": "path",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.unicode_minus": True,
}
NAMES = {
    "loss": "loss (nats a token)",
    "loss_last_scale": "loss, last scale (nats a token)",
    "error": "token error (all scales)",
    "error_last_scale": "token error (last scale)",
    "flops": "training compute (FLOPs)",
    "params": "parameters",
    "tokens": "training tokens",
}


@dataclass(frozen=True)
class Drawing:
    """One figure: a stable file name, a caption, and its renderings."""

    name: str
    caption: str
    svg: str
    inline_svg: str
    png: bytes


def draw_all(result: "LawsResult") -> list[Drawing]:
    """Every figure that the result has data for."""
    drawings = []
    for name, target in (("loss_vs_compute", _first(result, "loss")), ("error_vs_compute", _first(result, "error"))):
        if target in result.grids:
            drawings.append(against_compute(result, target, name))
        elif target and any(entry.x == "flops" and entry.target == target for entry in result.fits):
            drawings.append(against(result, target, "flops", name))
    target = result.table.targets[0]
    if any(entry.x == "params" and entry.target == target for entry in result.fits):
        drawings.append(against(result, target, "params", "loss_vs_parameters"))
    if target in result.grids:
        drawings.append(isoflop(result, target))
    drawings.append(residuals(result, target))
    if target in result.grids and result.grids[target].roll_forward:
        drawings.append(holdout(result, target))
    return drawings


def against_compute(result: "LawsResult", target: str, name: str) -> Drawing:
    """Cells as points joined by size, the frontier, its law with the interval for a new run, and the held-out check."""
    grid = result.grids[target]
    entry = result.find("power-offset", target, "flops") or result.find("power", target, "flops")

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        _size_lines(axes, grid, target)
        best = grid.frontier
        reach = np.geomspace(best["flops"].min() / 1.3, best["flops"].max() * 4, 80)
        _band(axes, best, target, grid, reach)
        if entry is not None:
            axes.plot(reach, entry.fitted.predict(reach), color=INK, lw=1.2, label=_formula(entry), zorder=4)
        axes.plot(best["flops"], best[target], "o", mfc="none", mec=INK, ms=6, mew=0.8, zorder=5, label="frontier")
        if grid.check is not None:
            _prediction_mark(axes, grid, target)
        _log_axis(axes, "x")
        _value_axis(axes, pd.concat([grid.cells[target], best[target]]))
        axes.set(xlabel=NAMES["flops"], ylabel=NAMES.get(target, target))
        _legend_below(figure, axes)

    caption = (
        f"{_sentence(target)} against training compute. Points are runs, joined by size; rings mark the best run of "
        "each budget (the frontier). Line: the law fitted to the frontier. Band: 95% interval for a new run, averaged "
        "over the offset."
    )
    if grid.check is not None:
        caption += " Diamond: the largest budget as predicted from the smaller ones alone, with its 95% interval."
    return _render(name, caption, draw, height=3.3)


def against(result: "LawsResult", target: str, x: str, name: str) -> Drawing:
    """The rows of the fits against x, with each law."""
    entries = [entry for entry in result.fits if entry.target == target and entry.x == x]
    rows = entries[0].rows

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        values = rows[x].to_numpy(dtype=float)
        axes.plot(values, rows[target], "o", color=BLUE, ms=3.5 if len(rows) < 60 else 2, label="runs", zorder=3)
        reach = np.geomspace(values.min() / 1.2, values.max() * 1.2, 120)
        for entry, style, colour in zip(entries, ("-", "--", ":", "-."), (INK, VERMILION, GREEN, PURPLE), strict=False):
            axes.plot(reach, entry.fitted.predict(reach), style, color=colour, label=_formula(entry))
        _log_axis(axes, "x", counts=x == "params")
        _value_axis(axes, rows[target])
        axes.set(xlabel=NAMES.get(x, x), ylabel=NAMES.get(target, target))
        _legend_below(figure, axes)

    filters = [each for each in entries[0].filters if each not in result.table.filters]
    which = f" ({'; '.join(filters)})" if filters else ""
    return _render(name, f"{_sentence(target)} against {NAMES.get(x, x)}{which}.", draw, height=2.9)


def isoflop(result: "LawsResult", target: str) -> Drawing:
    """Target against size, one line a budget, with a parabola and its minimum where one is bracketed."""
    grid = result.grids[target]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        budgets = sorted(grid.cells["budget"].unique())
        for budget, colour in zip(budgets, _shades(len(budgets)), strict=True):
            rows = grid.cells[grid.cells["budget"] == budget].sort_values("params")
            found = next(each for each in grid.minima if each.budget == budget)
            axes.plot(rows["params"], rows[target], "o" if found.coefficients else "o:", color=colour, lw=0.8)
            axes.plot([], [], "-", color=colour, label=_power_of_ten(budget))
            if found.params is not None and found.value is not None and found.coefficients:
                logs = np.log(rows["params"].to_numpy(dtype=float))
                fine = np.linspace(logs.min(), logs.max(), 80)
                axes.plot(np.exp(fine), np.polyval(found.coefficients, fine - logs.mean()), color=colour)
                axes.plot(found.params, found.value, "*", color=colour, ms=8, mec=INK, mew=0.5, zorder=5)
        _log_axis(axes, "x", counts=True)
        _value_axis(axes, grid.cells[target])
        axes.set(xlabel=NAMES["params"], ylabel=NAMES.get(target, target))
        _legend_below(figure, axes, title="budget (FLOPs)", columns=4)

    bracketed = sum(each.params is not None for each in grid.minima)
    caption = (
        f"IsoFLOP sets: {_sentence(target).lower()} against size at each budget. "
        f"{bracketed} of {len(grid.minima)} budgets bracket a minimum (star, on a parabola in log N); "
        "the others are joined by dots."
    )
    return _render("isoflop", caption, draw, height=3.1)


def residuals(result: "LawsResult", target: str) -> Drawing:
    """Relative residuals of the law fitted to most rows."""
    entries = [entry for entry in result.fits if entry.target == target]
    wanted = ("chinchilla", "power-offset", "power")
    entry = next((each for law in wanted for each in entries if each.fitted.law.name == law), entries[0])
    places = entry.inputs if len(entry.inputs) > 1 else (entry.x,)

    def draw(figure: Figure) -> None:
        axes_row = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
        percent = 100 * (entry.fitted.y_n / _fitted_values(entry) - 1)
        for axes, place in zip(axes_row, places, strict=True):
            axes.axhline(0, color=INK, lw=0.6)
            axes.plot(entry.rows[place], percent, "o", color=BLUE, ms=3 if len(percent) < 60 else 1.8, alpha=0.8)
            _log_axis(axes, "x", counts=place == "params")
            axes.set(xlabel=NAMES.get(place, place))
        axes_row[0].set(ylabel="residual (%)")

    caption = f"Residuals of {entry.name}: observed over fitted, minus one."
    return _render("residuals", caption, draw, height=2.1)


def holdout(result: "LawsResult", target: str) -> Drawing:
    """Each budget predicted from the smaller ones, as the error relative to what was observed."""
    checks = result.grids[target].roll_forward

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        places = np.arange(len(checks))
        middle = np.array([100 * check.error / check.observed for check in checks])
        low = np.array([100 * (check.ci95[0] / check.observed - 1) for check in checks])
        high = np.array([100 * (check.ci95[1] / check.observed - 1) for check in checks])
        baseline = np.array([100 * check.baseline_error / check.observed for check in checks])
        axes.axhline(0, color=INK, lw=0.6)
        axes.errorbar(
            places, middle, [middle - low, high - middle], fmt="D", color=BLUE, ms=4, lw=1, capsize=2.5, label="law"
        )
        axes.plot(places + 0.12, baseline, "_", color=VERMILION, ms=9, mew=2, label="no change")
        axes.set_xticks(places, [f"{_power_of_ten(check.budget)}\nfrom {check.n_budgets}" for check in checks])
        axes.set_xlim(-0.6, len(checks) - 0.4)
        axes.set(xlabel="budget (FLOPs), and from how many smaller ones", ylabel="error (%)")
        axes.grid(axis="x", visible=False)
        _legend_below(figure, axes)

    caption = (
        f"Rolling forward: each budget's best {_sentence(target).lower()} predicted from the smaller budgets alone, "
        "with the 95% interval for a new run; beside it what the next smaller budget's value, taken as it is, would be "
        "off by."
    )
    return _render("holdout", caption, draw, height=2.5)


def _size_lines(axes: Axes, grid: "TargetGrid", target: str) -> None:
    sizes = sorted(grid.cells["params"].unique())
    for size, colour in zip(sizes, _shades(len(sizes)), strict=True):
        rows = grid.cells[grid.cells["params"] == size].sort_values("flops")
        depth = rows["depth"].iloc[0] if "depth" in rows.columns else np.nan
        label = f"depth {depth:g}, {_si(size)}" if np.isfinite(depth) else f"{_si(size)} parameters"
        axes.plot(rows["flops"], rows[target], "o-", color=colour, lw=0.8, ms=3, label=label, zorder=3)


def _band(axes: Axes, best: pd.DataFrame, target: str, grid: "TargetGrid", reach: Array) -> None:
    if len(best) < 3:
        return
    average = OffsetAverage(best["flops"].to_numpy(dtype=float), best[target].to_numpy(dtype=float), grid.noise)
    _, low, high = average.predict(reach)
    axes.fill_between(reach, low, high, color="#8a8f98", alpha=0.28, lw=0, label="95%, new run", zorder=1)


def _prediction_mark(axes: Axes, grid: "TargetGrid", target: str) -> None:
    check = grid.check
    if check is None:
        return
    place = grid.frontier["flops"].iloc[-1] * 1.12
    bars = [[check.predicted - check.ci95[0]], [check.ci95[1] - check.predicted]]
    axes.errorbar(
        [place], [check.predicted], bars, fmt="D", color=VERMILION, ms=4, lw=1, capsize=2.5, zorder=6, label="predicted"
    )


def _fitted_values(entry: "FitEntry") -> Array:
    return entry.fitted.predict(*(entry.rows[each].to_numpy(dtype=float) for each in entry.inputs))


def _formula(entry: "FitEntry") -> str:
    p = {name: f"{value:.3g}" for name, value in entry.fitted.parameters.items()}
    x = {"flops": "C", "params": "N", "tokens": "D"}.get(entry.x, "x")
    texts = {
        "power": f"power, {x}^-{p['alpha']}",
        "power-offset": f"{p.get('E')} + A·{x}^-{p['alpha']}",
        "power-floor": f"{p.get('E')} + A·{x}^-{p['alpha']}",
        "power-logit": f"odds, {x}^-{p['alpha']}",
        "broken-power": f"broken, {x}^-{p['alpha']} to {x}^-{p.get('beta')}",
    }
    return texts.get(entry.fitted.law.name, entry.fitted.law.name).replace("^-", "$^{-").replace("--", "") + (
        "}$" if "^-" in texts.get(entry.fitted.law.name, "") else ""
    )


def _first(result: "LawsResult", kind: str) -> str:
    """The first target of a kind: token error, or anything else as loss."""
    names = [name for name in result.table.targets if ("error" in name) == (kind == "error")]
    return names[0] if names else ""


def _sentence(target: str) -> str:
    text = NAMES.get(target, target)
    return text[0].upper() + text[1:]


def _shades(count: int) -> Sequence[Any]:
    return [mpl.colormaps["viridis"](value) for value in np.linspace(0.1, 0.88, max(count, 2))[:count]]


def _si(value: float) -> str:
    """Powers of ten for budgets, SI letters for counts below 10¹³."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size <= value < 1000 * size and value < 1e13:
            return f"{value / size:.3g}{letter}"
    exponent = int(np.floor(np.log10(value)))
    return f"{value / 10.0**exponent:.3g}e{exponent}" if exponent >= 3 else f"{value:.3g}"


def _power_of_ten(value: float) -> str:
    exponent = int(np.floor(np.log10(value) + 1e-9))
    mantissa = f"{value / 10.0**exponent:.3g}"
    return f"$10^{{{exponent}}}$" if mantissa == "1" else rf"${mantissa}\!\times\!10^{{{exponent}}}$"


def _log_axis(axes: Axes, which: str, counts: bool = False) -> None:
    """A logarithmic axis with at least two labelled ticks, however short it is; counts are written as 20k, 3M."""
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    decades = np.log10(high / low)
    if decades < 2.2:
        steps = (1.0, 2.0, 5.0) if decades < 1.5 else (1.0, 3.0)
        axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: _si(value) if counts or value < 1e4 else _power_of_ten(value))
    )


def _value_axis(axes: Axes, values: "pd.Series[float]") -> None:
    """Logarithmic where values span a factor of three, linear otherwise (a short log axis has no ticks)."""
    low, high = float(values.min()), float(values.max())
    if high / low > 3:
        _log_axis(axes, "y")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
        margin = 0.08 * max(high - low, 1e-3 * high)
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, low - 6 * margin), min(top, high + 4 * margin))


def _legend_below(figure: Figure, axes: Axes, title: str | None = None, columns: int = 3) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), title=title)


def _render(name: str, caption: str, draw: Callable[[Figure], None], height: float) -> Drawing:
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with mpl.rc_context(style):
        figure = Figure(figsize=(COLUMN_INCHES, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        vector, pixels = io.StringIO(), io.BytesIO()
        figure.savefig(vector, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(pixels, format="png", dpi=300, facecolor="white")
    inline = _for_inlining(vector.getvalue(), name)
    return Drawing(name, caption, _on_white(vector.getvalue()), inline, pixels.getvalue())


def _on_white(svg: str) -> str:
    return re.sub(r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="white"/>', svg, count=1)


def _for_inlining(svg: str, name: str) -> str:
    """The bare element: ids of its own, the page's text colour for ink, sized by the page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = body.replace(INK, "currentColor")
    return re.sub(
        r'<svg([^>]*?) width="[^"]*"', r"<svg\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1), count=1
    )
