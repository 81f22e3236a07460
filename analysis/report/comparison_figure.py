"""Groups side by side in one figure: frontiers with power laws, and the compute that one needs to match another."""

from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.checks.compare import INPUTS, Comparison
from analysis.report.drawing import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    Drawing,
    label,
    legend_below,
    log_axis,
    named,
    plain,
    render,
    run_names,
    sentence,
    value_axis,
)
from analysis.report.evaluation_figures import interval_bars
from analysis.results import FitEntry, LawsResult
from analysis.tables.evaluations import is_evaluation
from analysis.tables.table import RunsTable

_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, INK)
_MARKERS = "osD^v"
_SMALLEST_DRAWN = 1e-4
"""Of ratios of compute, and its inverse the largest: intervals that go on beyond end there, in an arrow."""


def groups(result: LawsResult) -> Drawing:
    """A panel for each target that was compared, and one of the first group's compute over that of each other."""
    first = result.comparisons[0]
    along = [each for each in result.comparisons if each.along == first.along and _drawn(each.target, first.target)]
    targets = list(dict.fromkeys(each.target for each in along))
    laws = {target: _power_laws(result, target, first.along) for target in targets}
    order = list(dict.fromkeys(name for each in along for name in (each.a, each.b)))
    colours = dict(zip(order, cycle(_COLOURS), strict=False))
    ratios = [each for each in along if each.a == first.a]

    def draw(figure: Figure) -> None:
        heights = [1.7] * len(targets) + [0.12 + 0.17 * len(ratios)]
        *panels, last = figure.subplots(len(heights), height_ratios=heights)
        for axes, target in zip(panels, targets, strict=True):
            for name, colour in colours.items():
                if name in laws[target]:
                    _frontier(axes, result, laws[target][name], colour)
            log_axis(axes, "x")
            value_axis(axes, pd.concat([entry.rows[target] for entry in laws[target].values()]))
            axes.set(xlabel=label(result.table, first.along), ylabel=label(result.table, target))
        for name, colour in colours.items():
            text = _exponents(name, [laws[target][name] for target in targets if name in laws[target]], result.table)
            panels[0].plot([], [], "o-", color=colour, ms=3, label=text)
        legend_below(figure, panels[0], "exponent α of the power law, with its 95% interval", columns=2)
        _ratios(last, ratios, result.table, colours)

    reference = f"the {INPUTS.get(first.along, first.along)} that {plain(first.a)} needs to match each other group"
    caption = (
        f"{' and '.join(sentence(result.table, target) for target in targets)} of each group's frontier, with power "
        f"laws. Below: {reference}, over what that group has, with 95% intervals."
    )
    return render(
        "comparison",
        caption,
        draw,
        height=1.2 + (1.75 + 0.06 * len(order)) * len(targets) + 0.2 * len(ratios) / len(targets),
    )


def _drawn(target: str, first: str) -> bool:
    """The first target, which is a loss as a rule, and FID and its like, at the commonest guidance."""
    return target == first or (is_evaluation(target) and "_guidance_" not in target)


def _power_laws(result: LawsResult, target: str, x: str) -> dict[str, FitEntry]:
    """The power law of each group."""
    return {e.group: e for e in result.fits if (e.fitted.law.name, e.target, e.x) == ("power", target, x)}


def _frontier(axes: Axes, result: LawsResult, entry: FitEntry, colour: str) -> None:
    values = entry.rows[entry.x].to_numpy(dtype=float)
    interval_bars(axes, entry.rows, entry.rows[entry.x], entry.target, colour)
    named(axes.plot(values, entry.rows[entry.target], "o", color=colour), run_names(result.table, entry.rows))
    if entry.is_shown:
        reach = np.geomspace(values.min(), values.max() * 2, 50)
        axes.plot(reach, entry.fitted.predict(reach), "-", color=colour)


def _exponents(name: str, laws: list[FitEntry], table: RunsTable) -> str:
    """A group's name with the exponent of each target."""
    lines = [plain(name)]
    for law in laws:
        low, high = law.uncertainty.ci95["alpha"]
        lines.append(f"{label(table, law.target)}: {law.fitted.parameters['alpha']:.3g} [{low:.3g}, {high:.3g}]")
    return "\n".join(lines)


def _ratios(axes: Axes, ratios: list[Comparison], table: RunsTable, colours: dict[str, str]) -> None:
    """How much compute the first group needs to match each other one: a bar for each target."""
    others, targets = (list(dict.fromkeys(names)) for names in zip(*((e.b, e.target) for e in ratios), strict=True))
    for each in ratios:
        place, step = others.index(each.b), targets.index(each.target)
        height = place + 0.5 * (step + 0.5) / len(targets) - 0.25
        values = each.compute_ratio, *each.compute_ratio_ci95
        ends = np.clip(values, _SMALLEST_DRAWN, 1 / _SMALLEST_DRAWN)
        axes.plot(ends[1:], [height] * 2, "-", color=colours[each.b], lw=1)
        for value, end in zip(values[1:], ends[1:], strict=True):
            if value != end:  # it goes on beyond what is drawn
                axes.plot(end, height, "<" if value < end else ">", color=colours[each.b], ms=3)
        axes.plot(ends[0], height, _MARKERS[step], color=colours[each.b], ms=4)
    for step, target in enumerate(targets if len(targets) > 1 else ()):
        axes.plot([], [], _MARKERS[step], color=INK, ms=4, label=f"by {label(table, target)}")
    axes.axvline(1, color=INK, lw=0.7, zorder=1)
    low, high = axes.get_xlim()
    if low <= 0 or high / low > 3:  # a short logarithmic axis has no ticks
        log_axis(axes, "x")
    axes.set(yticks=range(len(others)), yticklabels=map(plain, others), ylim=(len(others) - 0.5, -0.5))
    what = INPUTS.get(ratios[0].along, ratios[0].along)
    axes.set(xlabel=f"{plain(what)} of {plain(ratios[0].a)} that matches it, over its own")
    if len(targets) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(targets))
