"""Scaling laws from tables of runs: fits, intervals, held-out checks, figures and a report.

The package reads DataFrames and knows nothing of how the runs were made. Names are loaded when first used, so that
importing `analysis` costs nothing:

    >>> from analysis import FitOptions, fit_laws, read_runs, write
    >>> result = fit_laws(read_runs(["runs.csv"]), FitOptions(params="Model Size", flops="Training FLOP", loss="loss"))
    >>> written = write(result, Path("laws"))
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "FitOptions": "analysis.options",
    "TableError": "analysis.errors",
    "FitRefused": "analysis.errors",
    "read_runs": "analysis.tables.reading",
    "fit_laws": "analysis.pipeline",
    "write": "analysis.report.writing",
    "fit": "analysis.fitting.fit",
    "LAWS": "analysis.fitting.laws.registry",
    "terminal_summary": "analysis.report.terminal",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'analysis' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
