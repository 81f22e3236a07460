"""The summary for the terminal."""

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.checks.warnings import LawWarning
from analysis.report.answers import answers, best_sizes
from analysis.report.sentences import check_sentence, comparison_sentence, doubts, law_text, parameter_text
from analysis.report.tables import ReportTable
from analysis.results import LawsResult

_MOST_UNANSWERED = 5


def terminal_summary(result: LawsResult) -> RenderableType:
    """Fits, what was asked for, held-out predictions and the first warning of each code, for rich's console."""
    table = Table(title=Text(result.options.title), title_justify="left", box=None, pad_edge=False)
    for name, right in (("target", False), ("against", False), ("law", False), ("rows", True)):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    table.add_column("parameters (95% interval)", overflow="fold")
    for entry in result.fits:
        shown = "\n".join(parameter_text(entry, name) for name in entry.fitted.law.parameters if name not in ("A", "B"))
        name = f"{entry.target} [{entry.group}]" if entry.group else entry.target
        table.add_row(Text(name), entry.x, law_text(entry), str(len(entry.rows)), Text(shown))
    parts: list[RenderableType] = [
        table,
        *map(_in_columns, [*answers(result), *([] if result.options.allocate else best_sizes(result))]),
        *(
            Text(check_sentence(each, name), style="green" if each.held else "yellow")
            for name, each in result.checks.items()
        ),
        *(Text(comparison_sentence(each, result.table.unit_of_data)) for each in result.comparisons),
    ]
    parts += [Text(doubt, style="yellow") for doubt in doubts(result)]
    parts += [Text(line, style="yellow") for line in first_of_each(result.warnings, "in the report")]
    return Group(*parts)


def first_of_each(warnings: Iterable[LawWarning], others: str) -> list[str]:
    """A line for each code: its first message, and how many more there are; `others` says where.

    What was asked for and has no answer is said one by one, if it isn't much.
    """
    by_code: dict[str, list[str]] = {}
    for warning in warnings:
        by_code.setdefault(warning.code, []).append(warning.message)
    lines = []
    for code, messages in by_code.items():
        shown = messages[: _MOST_UNANSWERED if code == "point-unused" else 1]
        rest = len(messages) - len(shown)
        lines += [f"{code}: {message}" for message in shown]
        lines[-1] += f" (and {rest} more like it, {others})" if rest else ""
    return lines


def _in_columns(table: ReportTable) -> Table:
    title = Text(f"\n{table.title}".rstrip())
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in table.headings:
        shown.add_column(Text(name), justify="right" if name in table.numeric else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text("\n".join(cell)) for cell in row))
    return shown
