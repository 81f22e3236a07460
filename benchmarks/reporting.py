"""Reports as a table on the terminal, JSON and Markdown."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measuring import Cell, Report
from varscale.store.atomic import write_atomically, write_json


def show(report: Report, console: Console) -> None:
    """Print a benchmark's table, goals and notes."""
    table = Table(title=report.title, title_justify="left")
    for number, column in enumerate(report.columns):
        words = any(isinstance(row[number], str) for row in report.rows)
        table.add_column(column, justify="left" if words else "right")
    for row in report.rows:
        table.add_row(*map(_text, row))
    console.print(table)
    for goal in report.goals:
        console.print(f"{'met   ' if goal.met else 'MISSED'}  {goal.text}: {goal.measured}", highlight=False)
    for note in report.notes:
        console.print(note, style="dim", highlight=False)
    console.print()


def write(reports: Sequence[Report], machine: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write `bench.json`, `bench.md` and the figures; the paths of the two."""
    folder.mkdir(parents=True, exist_ok=True)
    json_path, markdown_path = folder / "bench.json", folder / "bench.md"
    write_json(json_path, {"machine": machine, "benchmarks": [_written(report) for report in reports]})
    for report in reports:
        if report.figure is not None:
            write_atomically(folder / f"{report.name}.svg", report.figure.encode())
    parts = ["# Benchmarks", "\n".join(f"- {name}: {value}" for name, value in machine.items())]
    write_atomically(markdown_path, "\n\n".join([*parts, *map(_markdown, reports)]).encode() + b"\n")
    return json_path, markdown_path


def _written(report: Report) -> dict[str, Any]:
    return {name: value for name, value in asdict(report).items() if name != "figure"}


def _markdown(report: Report) -> str:
    lines = [f"## {report.title}", "", "| " + " | ".join(report.columns) + " |"]
    lines.append("|" + " --- |" * len(report.columns))
    lines += ["| " + " | ".join(map(_text, row)) + " |" for row in report.rows]
    lines += ["", *(f"- {'met' if goal.met else 'missed'}: {goal.text}: **{goal.measured}**" for goal in report.goals)]
    lines += ["", *(f"- {note}" for note in report.notes)]
    return "\n".join(lines).rstrip()


def _text(value: Cell) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.3e}"
    return str(value)
