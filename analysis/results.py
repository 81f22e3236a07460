"""What a table of runs says: typed results, and their form in laws.json (schema 1)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.compare import Comparison
from analysis.fitting import Fit
from analysis.frontier import SeedNoise
from analysis.holdout import Heldout
from analysis.intervals import Prediction, Uncertainty
from analysis.isoflop import Minimum
from analysis.largest_budget import LargestBudgetCheck
from analysis.options import FitOptions
from analysis.parametric import Allocation
from analysis.table import RunsTable, hash_rows
from analysis.traps import Caution

SCHEMA = 1


@dataclass(frozen=True)
class PredictionAt:
    """A law's value at a named point.

    Attributes:
        at: the inputs, by column.
        prediction: value and intervals.
        extrapolation: for each input, the point over the largest fitted value (or below one, over the smallest).
    """

    at: dict[str, float]
    prediction: Prediction
    extrapolation: dict[str, float]


@dataclass(frozen=True)
class FitEntry:
    """One fitted law with all that a reader needs to trust it."""

    name: str
    target: str
    x: str
    rows: pd.DataFrame
    filters: tuple[str, ...]
    fitted: Fit
    uncertainty: Uncertainty
    pearson_r: float | None
    holdout: tuple[Heldout, ...] = ()
    predictions: tuple[PredictionAt, ...] = ()
    cautions: tuple[Caution, ...] = ()
    group: str = ""

    @property
    def falls(self) -> bool:
        """Whether the target falls with x; a law that rises is drawn in no figure."""
        return not any(caution.code == "not-monotone" for caution in self.cautions)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Columns of `rows` that the law takes."""
        return inputs_of(self.fitted.law.inputs, self.x)

    def as_json(self) -> dict[str, Any]:
        """The entry as laws.json holds it."""
        law, uncertainty = self.fitted.law, self.uncertainty
        return {
            "name": self.name,
            "law": law.name,
            "formula": law.formula,
            "group": self.group or None,
            "target": self.target,
            "x": self.x,
            "data": {
                "n_runs": len(self.rows),
                "sha256": hash_rows(self.rows[[*self.inputs, self.target]]),
                "filters": list(self.filters),
            },
            "objective": {
                "name": self.fitted.objective.name,
                "delta": self.fitted.objective.delta if self.fitted.objective.name == "huber" else None,
                "space": "raw" if self.fitted.objective.raw else law.link,
                "value": self.fitted.value,
            },
            "parameters": self.fitted.parameters,
            "standard_errors": uncertainty.standard_errors,
            "ci95": {name: list(pair) for name, pair in uncertainty.ci95.items()},
            "covariance": uncertainty.covariance,
            "interval_method": f"{uncertainty.method}, {len(uncertainty.draws.theta_SP)} draws",
            "pearson_r": self.pearson_r,
            "starts": {"count": self.fitted.starts, "agreeing": self.fitted.agreeing},
            "offset_pinned": self.fitted.offset,
            "range": {name: [self.rows[name].min(), self.rows[name].max()] for name in self.inputs},
            "scatter": uncertainty.scatter,
            "holdout": [asdict(check) for check in self.holdout],
            "predictions": [_prediction_json(each) for each in self.predictions],
            "warnings": sorted({caution.code for caution in self.cautions}),
        }


@dataclass(frozen=True)
class TargetGrid:
    """What the grid of cells says about one target."""

    target: str
    cells: pd.DataFrame
    frontier: pd.DataFrame
    minima: tuple[Minimum, ...]
    noise: SeedNoise | None
    roll_forward: tuple[LargestBudgetCheck, ...] = ()
    check_refused: str = ""
    other_minima: Mapping[str, tuple[Minimum, ...]] = field(default_factory=dict)

    @property
    def best_end(self) -> str:
        """Which of the sizes is best at every budget, "smallest" or "largest"; empty where neither is."""
        sizes, best = self.cells["params"], self.frontier["params"]
        if sizes.nunique() < 2:
            return ""
        return "smallest" if (best == sizes.min()).all() else "largest" if (best == sizes.max()).all() else ""

    @property
    def check(self) -> LargestBudgetCheck | None:
        """The largest budget predicted from the smaller ones; None where `check_refused` says why."""
        return self.roll_forward[-1] if self.roll_forward else None


@dataclass(frozen=True)
class LawsResult:
    """All fits of a table, with the table itself.

    Attributes:
        options: what was asked for.
        table: the rows kept, and what was left out.
        fits: one entry a law, target, x and group.
        grids: by target (followed by the group in brackets where there are groups).
        allocations: by the same names, one an approach.
        comparisons: of groups, pairwise.
        cautions: all warnings.
        version: of varscale.
        exclusion_effect: how the exponents change when rows left out by filters come back.
    """

    options: FitOptions
    table: RunsTable
    fits: tuple[FitEntry, ...]
    grids: Mapping[str, TargetGrid] = field(default_factory=dict)
    allocations: Mapping[str, tuple[Allocation, ...]] = field(default_factory=dict)
    comparisons: tuple[Comparison, ...] = ()
    cautions: tuple[Caution, ...] = ()
    version: str = ""
    exclusion_effect: str = ""

    def entries(self, target: str, x: str, group: str = "") -> list[FitEntry]:
        """Every law fitted to a target against x."""
        return [each for each in self.fits if (each.target, each.x, each.group) == (target, x, group)]

    def find(self, law: str, target: str | None = None, x: str | None = None) -> FitEntry | None:
        """The first entry of a law, for a target and an x where given."""
        for entry in self.fits:
            if entry.fitted.law.name == law and target in (None, entry.target) and x in (None, entry.x):
                return entry
        return None

    def main(self, target: str, group: str = "") -> FitEntry:
        """The fit that says most of a target: the surface, then the curve with an offset, then any."""
        entries = [entry for entry in self.fits if (entry.target, entry.group) == (target, group)]
        for law in ("chinchilla", "chinchilla-tied", "power-offset"):
            for entry in entries:
                if entry.fitted.law.name == law:
                    return entry
        return entries[0]

    def as_json(self) -> dict[str, Any]:
        """The content of laws.json."""
        content: dict[str, Any] = finite(
            {
                "schema": SCHEMA,
                "title": self.options.title,
                "version": self.version,
                "seed": self.options.seed,
                "table": {
                    "sources": list(self.table.sources),
                    "sha256": self.table.sha256,
                    "n_rows": self.table.n_source,
                    "n_kept": len(self.table.frame),
                    "columns": self.table.columns,
                    "units": {name: asdict(unit) for name, unit in self.table.units.items()},
                    "filters": list(self.table.filters),
                    "exclusions": [asdict(each) for each in self.table.exclusions],
                    "notes": list(self.table.notes),
                },
                "fits": [entry.as_json() for entry in self.fits],
                "frontier": {name: _frontier_json(grid.frontier) for name, grid in self.grids.items()},
                "isoflop": {name: _minima_json(grid) for name, grid in self.grids.items()},
                "allocation": {name: [asdict(each) for each in found] for name, found in self.allocations.items()},
                "predictions": [_check_json(grid.check) for grid in self.grids.values() if grid.check],
                "seed_noise": {name: asdict(grid.noise) for name, grid in self.grids.items() if grid.noise},
                "comparisons": [asdict(each) for each in self.comparisons],
                "warnings": [asdict(each) for each in self.cautions],
            }
        )
        return content


@dataclass(frozen=True)
class WrittenLaws:
    """Where a result was written."""

    laws_json: Path
    report_html: Path
    runs_csv: Path
    figures: tuple[Path, ...]


def inputs_of(law_inputs: tuple[str, ...], x: str) -> tuple[str, ...]:
    """The columns a law takes: its own for N and D, the x chosen for the rest."""
    return ("params", "tokens") if law_inputs == ("params", "tokens") else (x,)


def finite(value: Any) -> Any:
    """The value without NaN, infinity and numpy's types, which JSON has not."""
    if isinstance(value, dict):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _prediction_json(each: PredictionAt) -> dict[str, Any]:
    return {
        "at": each.at,
        "value": each.prediction.value,
        "curve_ci95": each.prediction.curve_ci95,
        "new_run_ci95": each.prediction.new_run_ci95,
        "extrapolation": each.extrapolation,
    }


def _frontier_json(frontier: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in each.items()} for each in frontier.to_dict(orient="records")]


def _minima_json(grid: TargetGrid) -> list[dict[str, Any]]:
    return [asdict(each) for found in (grid.minima, *grid.other_minima.values()) for each in found]


def _check_json(check: LargestBudgetCheck) -> dict[str, Any]:
    return asdict(check) | {
        "error": check.error,
        "error_percent": 100 * check.error / check.observed,
        "baseline_error": check.baseline_error,
        "inside": check.inside,
        "held": check.held,
    }
