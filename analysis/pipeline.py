"""From a table of runs to laws: one pure function, and one that writes its result."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import FitRefused, TableError
from analysis.fitting import OBJECTIVES, Fit, Objective, fit
from analysis.frontier import SeedNoise, cells, envelope, largest_common_budget, seed_noise, with_budgets
from analysis.holdout import LargestBudgetCheck, largest_budget_check
from analysis.intervals import Uncertainty, linearised
from analysis.isoflop import Minimum, minima
from analysis.laws import LAWS, Array
from analysis.options import DEFAULT_LAWS, FitOptions
from analysis.table import RunsTable, hash_rows, prepare
from analysis.traps import Caution

SCHEMA = 1


@dataclass(frozen=True)
class FitEntry:
    """One fitted law with all that a reader needs to trust it."""

    name: str
    target: str
    x: str
    rows: pd.DataFrame
    filters: tuple[str, ...]
    fitted: Fit
    uncertainty: Uncertainty | None
    pearson_r: float | None
    holdout: tuple[dict[str, Any], ...] = ()
    cautions: tuple[Caution, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """Columns of `rows` that the law takes."""
        return ("params", "tokens") if self.fitted.law.inputs == ("params", "tokens") else (self.x,)

    def as_json(self) -> dict[str, Any]:
        """The entry as laws.json holds it."""
        law, uncertainty = self.fitted.law, self.uncertainty
        return {
            "name": self.name,
            "law": law.name,
            "formula": law.formula,
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
            "standard_errors": uncertainty.standard_errors if uncertainty else None,
            "ci95": {name: list(pair) for name, pair in uncertainty.ci95.items()} if uncertainty else None,
            "covariance": uncertainty.covariance if uncertainty else None,
            "interval_method": uncertainty.method if uncertainty else None,
            "pearson_r": self.pearson_r,
            "starts": {"count": self.fitted.starts, "agreeing": self.fitted.agreeing},
            "offset_pinned": self.fitted.offset,
            "holdout": list(self.holdout),
            "warnings": sorted({caution.code for caution in self.cautions}),
        }


@dataclass(frozen=True)
class TargetGrid:
    """What the grid of cells says about one target."""

    cells: pd.DataFrame
    frontier: pd.DataFrame
    minima: tuple[Minimum, ...]
    noise: SeedNoise | None
    check: LargestBudgetCheck | None
    check_refused: str = ""
    roll_forward: tuple[LargestBudgetCheck, ...] = ()


@dataclass(frozen=True)
class LawsResult:
    """All fits of a table, with the table itself."""

    options: FitOptions
    table: RunsTable
    fits: tuple[FitEntry, ...]
    grids: Mapping[str, TargetGrid] = field(default_factory=dict)
    cautions: tuple[Caution, ...] = ()
    version: str = ""

    def find(self, law: str, target: str | None = None, x: str | None = None) -> FitEntry | None:
        """The first entry of a law, for a target and an x where given."""
        for entry in self.fits:
            if entry.fitted.law.name == law and target in (None, entry.target) and x in (None, entry.x):
                return entry
        return None

    def as_json(self) -> dict[str, Any]:
        """The content of laws.json."""
        return {
            "schema": SCHEMA,
            "title": self.options.title,
            "version": self.version,
            "table": {
                "sources": list(self.table.sources),
                "sha256": self.table.sha256,
                "n_rows": self.table.n_source,
                "n_kept": len(self.table.frame),
                "columns": self.table.columns,
                "filters": list(self.table.filters),
                "exclusions": [{"reason": e.reason, "rows": list(e.rows)} for e in self.table.exclusions],
                "notes": list(self.table.notes),
            },
            "fits": [entry.as_json() for entry in self.fits],
            "frontier": {name: _frontier_json(grid.frontier, name) for name, grid in self.grids.items()},
            "isoflop": {name: [_minimum_json(each) for each in grid.minima] for name, grid in self.grids.items()},
            "predictions": [_check_json(grid.check) for grid in self.grids.values() if grid.check],
            "seed_noise": {
                name: {"relative": grid.noise.relative, "degrees_of_freedom": grid.noise.degrees_of_freedom}
                for name, grid in self.grids.items()
                if grid.noise
            },
            "warnings": [{"code": c.code, "message": c.message, "fit": c.fit} for c in self.cautions],
        }


@dataclass(frozen=True)
class WrittenLaws:
    """Where a result was written."""

    laws_json: Path
    report_html: Path
    runs_csv: Path
    figures: tuple[Path, ...]


def fit_laws(runs: pd.DataFrame, options: FitOptions | None = None) -> LawsResult:
    """Fits what the table allows. Pure: no file is read or written.

    Raises:
        TableError: the table or an option can't be used; one line that says what and where.
    """
    options = options or FitOptions()
    _check_options(options)
    table = prepare(runs, options)
    frame = with_budgets(table)
    cautions = _table_cautions(table, frame)
    fits: list[FitEntry] = []
    grids: dict[str, TargetGrid] = {}
    for target in table.targets:
        if frame is not None:
            grids[target] = _grid(frame, target, table.targets)
            cautions += _grid_cautions(target, grids[target])
        for x in options.x or tuple(role for role in ("flops", "params") if table.has(role)) or ("tokens",):
            rows, filters = _rows_against(x, target, table, grids.get(target))
            for law in _laws(options):
                if LAWS[law].inputs == ("x",):
                    _append_fit(fits, cautions, law, target, x, rows, (*table.filters, *filters), options)
        for law in _laws(options):
            if LAWS[law].inputs != ("x",):
                rows = table.frame[table.frame[target].notna()]
                if not table.has("params", "tokens"):
                    if law in options.law:
                        cautions.append(Caution("law-skipped", f"{law} needs columns for parameters and tokens", law))
                    continue
                _append_fit(fits, cautions, law, target, "params, tokens", rows, table.filters, options)
    if not fits:
        raise TableError("no law could be fitted: " + "; ".join(c.message for c in cautions))
    return LawsResult(options, table, tuple(fits), grids, tuple(cautions), _version())


def write(result: LawsResult, out_dir: Path) -> WrittenLaws:
    """Writes laws.json, report.html, runs.csv and the figures; each file appears whole or not at all."""
    from analysis.figures import draw_all
    from analysis.report import render

    out_dir.mkdir(parents=True, exist_ok=True)
    drawings = draw_all(result)
    figures = []
    for drawing in drawings:
        for suffix, content in (("svg", drawing.svg.encode()), ("png", drawing.png)):
            figures.append(_replace(out_dir / f"{drawing.name}.{suffix}", content))
    runs_csv = _replace(out_dir / "runs.csv", result.table.frame.to_csv(index=False).encode())
    report_html = _replace(out_dir / "report.html", render(result, drawings).encode())
    text = json.dumps(_finite(result.as_json()), indent=2, allow_nan=False)
    laws_json = _replace(out_dir / "laws.json", (text + "\n").encode())
    return WrittenLaws(laws_json, report_html, runs_csv, tuple(figures))


def _check_options(options: FitOptions) -> None:
    for law in options.law:
        if law not in LAWS:
            raise TableError(f"unknown law {law!r}; the laws are {', '.join(LAWS)}")
    if options.objective not in OBJECTIVES:
        raise TableError(f"unknown objective {options.objective!r}; the objectives are {', '.join(OBJECTIVES)}")
    if not options.delta > 0:
        raise TableError(f"delta must be positive, not {options.delta:g}")


def _laws(options: FitOptions) -> tuple[str, ...]:
    return options.law or DEFAULT_LAWS


def _rows_against(
    x: str, target: str, table: RunsTable, grid: TargetGrid | None
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The rows that belong in a fit against x, and the filter that says which."""
    if grid is not None and x == "flops":
        return grid.frontier, ("frontier: best cell of each budget",)
    if grid is not None and x == "params":
        budget = largest_common_budget(grid.cells)
        if budget is not None:
            chosen = grid.cells[grid.cells["budget"] == budget]
            return chosen, (f"budget == {budget:.6g} (the largest that all sizes have)",)
    frame = table.frame
    if x not in frame.columns:
        return frame.iloc[:0], ()
    frame = frame.assign(**{x: pd.to_numeric(frame[x], errors="coerce")})
    return frame[frame[target].notna() & frame[x].notna()], ()


def _append_fit(
    fits: list[FitEntry],
    cautions: list[Caution],
    law: str,
    target: str,
    x: str,
    rows: pd.DataFrame,
    filters: tuple[str, ...],
    options: FitOptions,
) -> None:
    name = f"{target} against {x}: {law}"
    columns = ("params", "tokens") if LAWS[law].inputs != ("x",) else (x,)
    if any(each not in rows.columns for each in columns):
        cautions.append(Caution("law-skipped", f"{name}: no column for {x}", name))
        return
    inputs = tuple(rows[each].to_numpy(dtype=float) for each in columns)
    values = rows[target].to_numpy(dtype=float)
    offset = options.offset if LAWS[law].has_offset else None
    objective = Objective(options.objective, options.delta)  # type: ignore[arg-type]  # checked in _check_options
    try:
        if LAWS[law].has_offset and len(columns) == 1 and np.cov(np.log(inputs[0]), values)[0, 1] >= 0:
            raise FitRefused(f"{law}: the target does not fall with x over these rows")
        fitted = fit(law, inputs, values, objective=objective, offset=offset)
    except FitRefused as refusal:
        cautions.append(Caution("law-skipped", f"{target} against {x}: {refusal}", name))
        return
    own = tuple(_fit_cautions(name, fitted, inputs, values))
    cautions.extend(own)
    fits.append(
        FitEntry(
            name=name,
            target=target,
            x=x,
            rows=rows,
            filters=filters,
            fitted=fitted,
            uncertainty=linearised(fitted),
            pearson_r=_pearson(inputs, values) if len(inputs) == 1 else None,
            cautions=own,
        )
    )


def _fit_cautions(name: str, fitted: Fit, inputs: tuple[Array, ...], values: Array) -> list[Caution]:
    found = []
    if fitted.agreeing * 2 < fitted.starts:
        message = f"{name}: {fitted.agreeing} of {fitted.starts} starts reached the best optimum"
        found.append(Caution("minority-optimum", message, name))
    if fitted.at_bound:
        message = f"{name}: {', '.join(fitted.at_bound)} ended at the edge of what is allowed"
        found.append(Caution("at-bound", message, name))
    if fitted.law.has_offset and fitted.offset is None:
        uncertainty = linearised(fitted)
        lowest = float(values.min())
        relative = uncertainty.standard_errors["E"] / lowest if uncertainty else np.inf
        if fitted.parameters["E"] < 1e-3 * lowest or relative > 0.1:
            message = f"{name}: E = {fitted.parameters['E']:.3g} is not identified by {len(values)} rows"
            found.append(Caution("offset-not-identified", message, name))
    if len(inputs) == 1 and fitted.law.name == "power" and fitted.parameters["alpha"] <= 0:
        found.append(Caution("not-monotone", f"{name}: the target doesn't fall with x over these rows", name))
    return found


def _grid(frame: pd.DataFrame, target: str, targets: tuple[str, ...]) -> TargetGrid:
    grid_cells = cells(frame, targets)
    frontier = envelope(grid_cells, target)
    noise = seed_noise(frame[frame[target].notna()], target)
    x, y, budgets = (frontier[name].to_numpy(dtype=float) for name in ("flops", target, "budget"))
    rolled: tuple[LargestBudgetCheck, ...] = ()
    refused = ""
    try:
        largest_budget_check(x, y, budgets, target, noise)
        rolled = tuple(
            largest_budget_check(x[:count], y[:count], budgets[:count], target, noise) for count in range(4, len(x) + 1)
        )
    except FitRefused as refusal:
        refused = str(refusal)
    check = rolled[-1] if rolled else None
    return TargetGrid(grid_cells, frontier, tuple(minima(grid_cells, target)), noise, check, refused, rolled)


def _table_cautions(table: RunsTable, frame: pd.DataFrame | None) -> list[Caution]:
    found = [
        Caution("rows-excluded", f"{len(each.rows)} rows left out: {each.reason} (rows {_some(each.rows)})")
        for each in table.exclusions
    ]
    found += [Caution("repeated-rows", note) for note in table.notes if "repeat" in note]
    if frame is not None and (sizes := frame["params"].nunique()) < 4:
        found.append(Caution("few-sizes", f"{sizes} sizes; four or more are needed for IsoFLOP minima"))
    if frame is not None and (budgets := frame["budget"].nunique()) < 4:
        found.append(Caution("few-budgets", f"{budgets} budgets; four or more are needed for a law of compute"))
    return found


def _grid_cautions(target: str, grid: TargetGrid) -> list[Caution]:
    found = []
    sizes = grid.cells["params"].nunique()
    refused = [each for each in grid.minima if each.refused]
    if refused and sizes >= 4:
        budgets = ", ".join(f"{each.budget:.3g}" for each in refused)
        message = f"{target}: no IsoFLOP minimum at {len(refused)} of {len(grid.minima)} budgets ({budgets} FLOPs)"
        found.append(Caution("isoflop-refused", message))
    if grid.check and not grid.check.held:
        found.append(Caution("prediction-failed", f"{target}: the prediction of the largest budget did not hold"))
    return found


def _some(rows: tuple[str, ...]) -> str:
    return ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


def _pearson(inputs: tuple[Array, ...], values: Array) -> float | None:
    """Correlation of log x and log y; None when one of them is constant."""
    x, y = np.log(inputs[0]), np.log(values)
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0 else None


def _frontier_json(frontier: pd.DataFrame, target: str) -> list[dict[str, Any]]:
    names = [
        n for n in ("budget", "flops", "params", "tokens", "depth", target, "runs", "row") if n in frontier.columns
    ]
    return [{str(key): value for key, value in each.items()} for each in frontier[names].to_dict(orient="records")]


def _minimum_json(found: Minimum) -> dict[str, Any]:
    return {
        "budget": found.budget,
        "sizes": found.sizes,
        "method": found.method,
        "params": found.params,
        "tokens": found.tokens,
        "value": found.value,
        "params_ci95": list(found.params_ci95) if found.params_ci95 else None,
        "refused": found.refused or None,
    }


def _check_json(check: LargestBudgetCheck) -> dict[str, Any]:
    return {
        "target": check.target,
        "budget": check.budget,
        "n_budgets": check.n_budgets,
        "observed": check.observed,
        "predicted": check.predicted,
        "ci95": list(check.ci95),
        "error": check.error,
        "error_percent": 100 * check.error / check.observed,
        "baseline": check.baseline,
        "baseline_error": check.baseline_error,
        "extrapolation": check.extrapolation,
        "inside": check.inside,
        "held": check.held,
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN, infinity or numpy types."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _replace(path: Path, content: bytes) -> Path:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("varscale")
    except PackageNotFoundError:
        return "unknown"
