"""A result on disk: laws.json, report.html, runs.csv and the figures; each file appears whole or not at all."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from analysis.progress import steps
from analysis.report.figures import draw_all
from analysis.report.html import render
from analysis.results import LawsResult


@dataclass(frozen=True)
class WrittenLaws:
    """Where a result was written."""

    laws_json: Path
    report_html: Path
    runs_csv: Path
    figures: tuple[Path, ...]


def write(result: LawsResult, out_dir: Path) -> WrittenLaws:
    """Writes laws.json, report.html, runs.csv and the figures; each file appears whole or not at all."""
    out_dir.mkdir(parents=True, exist_ok=True)
    steps.info("drawing the report's figures")
    drawings = draw_all(result)
    figures = []
    for drawing in drawings:
        for suffix, content in (("svg", drawing.svg.encode()), ("png", drawing.png)):
            figures.append(_replace(out_dir / f"{drawing.name}.{suffix}", content))
    runs_csv = _replace(out_dir / "runs.csv", result.table.measured.to_csv(index=False).encode())
    report_html = _replace(out_dir / "report.html", render(result, drawings).encode())
    text = json.dumps(result.as_json(), indent=2, allow_nan=False)
    laws_json = _replace(out_dir / "laws.json", (text + "\n").encode())
    return WrittenLaws(laws_json, report_html, runs_csv, tuple(figures))


def _replace(path: Path, content: bytes) -> Path:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)
    return path
