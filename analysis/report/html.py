"""The report: one HTML file that needs nothing else."""

import re
from collections.abc import Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from analysis.checks.warnings import CODES
from analysis.fitting.newton import OBJECTIVES
from analysis.report import tables
from analysis.report.answers import answers
from analysis.report.drawing import Drawing
from analysis.report.sentences import check_sentence, comparison_sentence, doubts, headline, number
from analysis.results import LawsResult

MOST_OPEN = 6
"""Figures that are not folded."""


def render(result: LawsResult, drawings: Sequence[Drawing]) -> str:
    """The report as HTML, with its figures inside."""
    heldout, rolled = tables.heldout_tables(result)
    return _template().render(
        result=result,
        drawings=list(drawings),
        headline=headline(result),
        answers=answers(result),
        most_open=MOST_OPEN,
        data=result.table.unit_of_data,
        doubts=doubts(result),
        objectives=OBJECTIVES,
        definitions=tables.definitions(result.table),
        units=tables.units(result.table),
        codes=CODES,
        evaluations=result.table.settings,
        methods=sorted({entry.uncertainty.method for entry in result.fits}),
        laws=tables.laws_table(result),
        predictions=tables.predictions_table(result),
        heldout=heldout,
        rolled=rolled,
        allocations=tables.allocation_tables(result),
        sizes=tables.sizes_tables(result),
        guidance=tables.guidance_tables(result),
        frontiers=tables.frontier_tables(result),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("analysis.report"),
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
