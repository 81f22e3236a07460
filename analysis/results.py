"""What a table of runs says: typed results, and their form in laws.json (schema 1)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from analysis.checks.compare import Comparison
from analysis.checks.forecast import Forecast, LargestBudgetCheck
from analysis.checks.holdout import Heldout
from analysis.checks.warnings import LawWarning
from analysis.fitting.fit import Fit
from analysis.fitting.intervals import Prediction, Uncertainty
from analysis.grids.allocation import Allocation
from analysis.grids.grid import TargetGrid
from analysis.grids.guidance import GuidanceCurve
from analysis.grids.side_by_side import SizesAtBudget
from analysis.options import FitOptions
from analysis.tables.table import RunsTable, hash_rows

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
    fitted: Fit
    uncertainty: Uncertainty
    pearson_r: float | None
    filters: tuple[str, ...] = ()
    holdout: tuple[Heldout, ...] = ()
    predictions: tuple[PredictionAt, ...] = ()
    warnings: tuple[LawWarning, ...] = ()
    group: str = ""

    @property
    def is_shown(self) -> bool:
        """Whether figures draw the law: not where a target that should fall with x doesn't."""
        return not any(warning.code == "not-monotone" for warning in self.warnings)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Columns of `rows` that the law takes."""
        return self.fitted.law.columns(self.x)

    def as_json(self) -> dict[str, Any]:
        """The entry as laws.json holds it, but for its warnings, some of which are of all fits together."""
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
        }


@dataclass(frozen=True)
class LawsResult:
    """All fits of a table, with the table itself.

    Attributes:
        options: what was asked for.
        table: the rows kept, and what was left out.
        fits: one entry a law, target, x and group.
        grids: by target (followed by the group in brackets where there are groups).
        forecasts: of the largest budget, by the same names.
        allocations: by the same names, one an approach.
        sizes: best sizes by loss, FID and the like, budget by budget, for each group ("" where there are none).
        guidance: FID and its like against guidance, for each cell with several.
        comparisons: of groups, pairwise.
        warnings: of the table and all fits.
        version: of varscale.
        exclusion_effect: how the exponents change when rows left out by filters come back.
    """

    options: FitOptions
    table: RunsTable
    fits: tuple[FitEntry, ...]
    grids: Mapping[str, TargetGrid] = field(default_factory=dict)
    forecasts: Mapping[str, Forecast] = field(default_factory=dict)
    allocations: Mapping[str, tuple[Allocation, ...]] = field(default_factory=dict)
    sizes: Mapping[str, tuple[SizesAtBudget, ...]] = field(default_factory=dict)
    guidance: tuple[GuidanceCurve, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    warnings: tuple[LawWarning, ...] = ()
    version: str = ""
    exclusion_effect: str = ""

    @property
    def checks(self) -> dict[str, LargestBudgetCheck]:
        """The largest budget predicted from the smaller ones, where that could be done, by the grids' names."""
        return {name: each.check for name, each in self.forecasts.items() if each.check}

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
        for law in ("chinchilla", "chinchilla-tied", "power-offset", "power-floor"):
            for entry in entries:
                if entry.fitted.law.name == law:
                    return entry
        return entries[0]

    def _codes(self, entry: FitEntry) -> list[str]:
        """Codes of the warnings of a fit."""
        return sorted({warning.code for warning in self.warnings if warning.fit == entry.name})

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
                    "n_kept": len(self.table.measured),
                    "columns": self.table.columns,
                    "units": {name: asdict(unit) for name, unit in self.table.units.items()},
                    "filters": list(self.table.filters),
                    "exclusions": [asdict(each) for each in self.table.exclusions],
                    "notes": list(self.table.notes),
                    "evaluations": self.table.settings,
                },
                "exclusion_effect": self.exclusion_effect,
                "fits": [entry.as_json() | {"warnings": self._codes(entry)} for entry in self.fits],
                "frontier": {name: _frontier_json(grid.frontier) for name, grid in self.grids.items()},
                "isoflop": {name: _minima_json(grid) for name, grid in self.grids.items()},
                "allocation": {name: [asdict(each) for each in found] for name, found in self.allocations.items()},
                "best_sizes": [
                    {"group": group or None, **asdict(each)} for group, found in self.sizes.items() for each in found
                ],
                "guidance": [asdict(each) for each in self.guidance],
                "predictions": [{"name": name, **_check_json(check)} for name, check in self.checks.items()],
                "seed_noise": {name: asdict(grid.noise) for name, grid in self.grids.items() if grid.noise},
                "comparisons": [asdict(each) for each in self.comparisons],
                "warnings": [asdict(each) for each in self.warnings],
            }
        )
        return content


def finite(value: Any) -> Any:
    """The value without NaN, infinity and numpy's types, which JSON has not."""
    if isinstance(value, Mapping):
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
    every = (each for found in (grid.minima, *grid.other_minima.values()) for each in found)
    return [{key: value for key, value in vars(each).items() if key not in ("simulated", "sought")} for each in every]


def _check_json(check: LargestBudgetCheck) -> dict[str, Any]:
    return asdict(check) | {
        "error": check.error,
        "error_percent": 100 * check.error / check.observed,
        "baseline_error": check.baseline_error,
        "inside": check.inside,
        "held": check.held,
    }
