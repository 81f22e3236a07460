"""The report: one HTML file that needs nothing else, and the table for the terminal."""

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from analysis import report_tables as tables
from analysis.descent import OBJECTIVES
from analysis.drawing import Drawing
from analysis.report_tables import check_sentence, comparison_sentence, end_sentence, number, parameter_text
from analysis.traps import CODES

if TYPE_CHECKING:
    from analysis.results import LawsResult

__all__ = ["check_sentence", "comparison_sentence", "headline", "render", "terminal_summary"]


def render(result: "LawsResult", drawings: Sequence[Drawing]) -> str:
    """The report as HTML, with its figures inside."""
    heldout, rolled = tables.heldout_tables(result)
    return _template().render(
        result=result,
        drawings=list(drawings),
        checks=[grid.check for grid in result.grids.values() if grid.check],
        headline=headline(result),
        doubts=_doubts(result),
        objectives=OBJECTIVES,
        definitions=tables.definitions(result.table),
        units=tables.units(result.table),
        codes=CODES,
        methods=sorted({entry.uncertainty.method for entry in result.fits}),
        laws=tables.laws_table(result),
        predictions=tables.predictions_table(result),
        heldout=heldout,
        rolled=rolled,
        allocations=tables.allocation_tables(result),
        frontiers=tables.frontier_tables(result),
    )


def terminal_summary(result: "LawsResult") -> RenderableType:
    """Fits, held-out predictions and warnings, for rich's console."""
    table = Table(title=Text(result.options.title), title_justify="left", box=None, pad_edge=False)
    for name, right in (("target", False), ("against", False), ("law", False), ("rows", True)):
        table.add_column(name, justify="right" if right else "left")
    table.add_column("parameters (95% interval)", overflow="fold")
    for entry in result.fits:
        shown = ", ".join(parameter_text(entry, name) for name in entry.fitted.law.parameters if name not in ("A", "B"))
        name = f"{entry.target} [{entry.group}]" if entry.group else entry.target
        table.add_row(Text(name), entry.x, entry.fitted.law.name, str(len(entry.rows)), Text(shown))
    checks = {name: grid.check for name, grid in result.grids.items() if grid.check}
    parts: list[RenderableType] = [
        table,
        *(Text(check_sentence(each, name), style="green" if each.held else "yellow") for name, each in checks.items()),
        *(Text(comparison_sentence(each)) for each in result.comparisons),
    ]
    parts += [Text(doubt, style="yellow") for doubt in _doubts(result)]
    if result.cautions:
        codes: dict[str, int] = {}
        for caution in result.cautions:
            codes[caution.code] = codes.get(caution.code, 0) + 1
        counted = ", ".join(f"{code} ({count})" if count > 1 else code for code, count in codes.items())
        parts.append(Text(f"warnings: {counted}; the report explains them", style="yellow"))
    return Group(*parts)


def headline(result: "LawsResult") -> str:
    """The first thing to know: whether the prediction held, or the law that says most."""
    for name, grid in result.grids.items():
        if grid.check:
            return check_sentence(grid.check, name)
    entry = result.main(result.fits[0].target, result.fits[0].group)
    return f"{entry.name}: " + ", ".join(parameter_text(entry, name) for name in entry.fitted.law.parameters) + "."


def _doubts(result: "LawsResult") -> list[str]:
    """Whose sizes don't reach past the best ones: by the first target, for each group."""
    first = {name: grid for name, grid in result.grids.items() if grid.target == result.table.targets[0]}
    return [end_sentence(grid.best_end, name) for name, grid in first.items() if grid.best_end]


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("analysis"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(number=number, powers=_powers)
    environment.globals.update(check_sentence=check_sentence, comparison_sentence=comparison_sentence)
    return environment.get_template("report.html.jinja")


def _powers(text: str) -> Markup:
    """Exponents, written ^-α or ^(α-β), raised."""
    raised = re.sub(r"\^(\([^)]*\)|-?[\wα-ω]+)", r"<sup>\1</sup>", str(escape(text)))
    return Markup(raised.replace("<sup>-", "<sup>−"))
