"""The report: one HTML file that needs nothing else, and the table for the terminal."""

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.fitting import OBJECTIVES
from analysis.holdout import LargestBudgetCheck

if TYPE_CHECKING:
    from analysis.figures import Drawing
    from analysis.results import FitEntry, LawsResult

SYMBOLS = {"alpha": "α", "beta": "β", "E": "E", "A": "A", "B": "B"}
AXES = {"flops": "training compute C", "params": "parameters N", "tokens": "tokens D", "params, tokens": "N and D"}


def render(result: "LawsResult", drawings: Sequence["Drawing"]) -> str:
    """The report as HTML, with its figures inside."""
    return _template().render(
        result=result,
        drawings={drawing.name: drawing for drawing in drawings},
        checks=[grid.check for grid in result.grids.values() if grid.check],
        headline=_headline(result),
        objectives=OBJECTIVES,
        axes=AXES,
    )


def terminal_summary(result: "LawsResult") -> RenderableType:
    """Fits, held-out predictions and warnings, for rich's console."""
    table = Table(title=result.options.title, title_justify="left", box=None, pad_edge=False)
    table.add_column("target", overflow="fold")
    table.add_column("against")
    table.add_column("law")
    table.add_column("rows", justify="right")
    table.add_column("parameters (95% interval)", overflow="fold")
    for entry in result.fits:
        shown = ", ".join(parameter_text(entry, name) for name in entry.fitted.law.parameters if name not in ("A", "B"))
        table.add_row(entry.target, entry.x, entry.fitted.law.name, str(len(entry.rows)), shown)
    parts: list[RenderableType] = [table]
    for grid in result.grids.values():
        if grid.check:
            style = "green" if grid.check.held else "yellow"
            parts.append(Text(check_sentence(grid.check), style=style))
    if result.cautions:
        codes: dict[str, int] = {}
        for caution in result.cautions:
            codes[caution.code] = codes.get(caution.code, 0) + 1
        counted = ", ".join(f"{code} ({count})" if count > 1 else code for code, count in codes.items())
        parts.append(Text(f"warnings: {counted}", style="yellow"))
    return Group(*parts)


def parameter_text(entry: "FitEntry", name: str) -> str:
    """A parameter with its interval, such as α = 0.347 [0.32, 0.38]."""
    text = f"{SYMBOLS.get(name, name)} = {number(entry.fitted.parameters[name])}"
    if name == "E" and entry.fitted.offset is not None:
        return text + " (pinned)"
    low, high = entry.uncertainty.ci95[name]
    return f"{text} [{number(low)}, {number(high)}]"


def check_sentence(check: LargestBudgetCheck) -> str:
    """The held-out prediction in one sentence that says whether it held."""
    verdict = "held" if check.held else "did not hold"
    place = "inside" if check.inside else "outside"
    share = abs(check.error) / abs(check.baseline_error) if check.baseline_error else float("inf")
    return (
        f"Prediction {verdict}: best {check.target} at {number(check.budget)} FLOPs, "
        f"from {check.n_budgets} smaller budgets, {check.predicted:.4f} "
        f"[{check.ci95[0]:.4f}, {check.ci95[1]:.4f}]; observed {check.observed:.4f} ({place}), "
        f"off by {check.error:+.4f}, {share:.0%} of the error of no change ({check.baseline_error:+.4f})."
    )


def number(value: float) -> str:
    """Four significant digits; powers of ten from a million on."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.4g}"


def _headline(result: "LawsResult") -> str:
    first = result.table.targets[0]
    grid = result.grids.get(first)
    if grid is not None and grid.check is not None:
        return check_sentence(grid.check)
    entry = result.fits[0]
    return f"{entry.name}: " + ", ".join(parameter_text(entry, name) for name in entry.fitted.law.parameters) + "."


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("analysis"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["number"] = number
    environment.globals.update(parameter_text=parameter_text, check_sentence=check_sentence, symbols=SYMBOLS)
    return environment.get_template("report.html.jinja")
