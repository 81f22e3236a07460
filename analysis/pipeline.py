"""From a table of runs to laws: one pure function."""

from dataclasses import replace

import numpy as np
import pandas as pd

from analysis.checks.forecast import Forecast, forecast
from analysis.checks.holdout import Refits, heldout_checks, offset_path
from analysis.checks.questions import with_questions
from analysis.checks.requests import check_offset, check_options, points_by_role
from analysis.checks.warnings import (
    LawWarning,
    allocation_warnings,
    fit_warnings,
    grid_warnings,
    heldout_warnings,
    table_warnings,
)
from analysis.comparisons import comparisons
from analysis.errors import FitRefused, TableError
from analysis.fitting.bootstrap import resample
from analysis.fitting.fit import fit
from analysis.fitting.intervals import from_draws
from analysis.fitting.laws.base import Array
from analysis.fitting.laws.registry import LAWS, columns_taken
from analysis.fitting.newton import Objective
from analysis.grids.allocation import Allocation
from analysis.grids.frontier import scattered, with_budgets
from analysis.grids.grid import TargetGrid, allocations, build_grid
from analysis.grids.guidance import guidance_curves
from analysis.grids.rows import PlannedFit, check_direction, check_inputs, lacks, log_slopes, plan, rises_with, rows_for
from analysis.grids.side_by_side import side_by_side
from analysis.options import FitOptions
from analysis.predictions import TEN_TIMES, doubtful_answers, predictions
from analysis.progress import steps
from analysis.results import FitEntry, LawsResult
from analysis.tables.annealing import RateSchedule
from analysis.tables.cells import mixed_rows, with_rows_reduced
from analysis.tables.conditions import meets
from analysis.tables.evaluations import is_evaluation, measured_floor
from analysis.tables.repeats import best_rows, seeds_of_cells
from analysis.tables.roles import some
from analysis.tables.table import RunsTable, prepare


def fit_laws(runs: pd.DataFrame, options: FitOptions | None = None) -> LawsResult:
    """Fits what the table allows. Pure: no file is read or written.

    Raises:
        TableError: the table or an option can't be used; one line that says what and where.
    """
    options = options or FitOptions()
    check_options(options)
    table = _prepared(runs, options)
    options = points_by_role(table, options)
    check_offset(table, options)
    if options.holdout_where:
        meets(table.frame, options.holdout_where, "--holdout-where")
    groups = _groups(table)
    if len(groups) < 2:
        result = _fit_group(table, options, "")
    else:
        parts = {name: _fit_group(part, options, name) for name, part in groups.items()}
        result = _joined(table, options, parts)
    if not result.fits:
        reasons = [warning.message for warning in result.warnings if warning.code == "law-skipped"]
        raise TableError("no law could be fitted: " + "; ".join(dict.fromkeys(reasons)))
    effect = _exclusion_effect(runs, options, result)
    warnings = with_questions(table, options, result.warnings)
    return replace(result, warnings=warnings, exclusion_effect=effect, guidance=guidance_curves(table))


def _prepared(runs: pd.DataFrame, options: FitOptions) -> RunsTable:
    table = prepare(runs, options)
    if not options.reduce:
        return table
    rows = with_budgets(table, options.checkpoints)
    return with_rows_reduced(table, table.frame if rows is None else rows, options, columns_taken(options.law))


def _groups(table: RunsTable) -> dict[str, RunsTable]:
    if not table.has("group"):
        return {}
    parts = {str(name): rows.reset_index(drop=True) for name, rows in table.frame.groupby("group", sort=True)}
    return {name: replace(table, frame=rows) for name, rows in parts.items()}


def _joined(table: RunsTable, options: FitOptions, parts: dict[str, LawsResult]) -> LawsResult:
    compared, found = comparisons(table, options, parts)
    shared = table_warnings(table, None, options.checkpoints)
    seen = {(warning.code, warning.message) for warning in shared}
    own = [
        replace(warning, message=f"{name}: {warning.message}")
        for name, part in parts.items()
        for warning in part.warnings
        if (warning.code, warning.message) not in seen
    ]
    return LawsResult(
        options=options,
        table=table,
        fits=tuple(entry for part in parts.values() for entry in part.fits),
        grids={f"{target} [{name}]": grid for name, part in parts.items() for target, grid in part.grids.items()},
        forecasts={
            f"{target} [{name}]": each for name, part in parts.items() for target, each in part.forecasts.items()
        },
        allocations={f"{key} [{name}]": each for name, part in parts.items() for key, each in part.allocations.items()},
        sizes={name: part.sizes[""] for name, part in parts.items() if part.sizes},
        comparisons=tuple(compared),
        warnings=(*shared, *own, *found),
        version=_version(),
    )


def _fit_group(table: RunsTable, options: FitOptions, group: str) -> LawsResult:
    frame = with_budgets(table, options.checkpoints)
    warnings = table_warnings(table, frame, options.checkpoints)
    taken = columns_taken(options.law)
    mixed = mixed_rows(table, table.frame if frame is None else frame, options, taken)
    warnings += [LawWarning("mixed-rows", mixed.message)] if mixed else []
    apart = mixed_rows(table, frame, options) if taken and frame is not None else mixed  # for a grid, which takes none
    fits: list[FitEntry] = []
    grids: dict[str, TargetGrid] = {}
    forecasts: dict[str, Forecast] = {}
    by_target: dict[str, tuple[Allocation, ...]] = {}
    for target in table.targets:
        if table.frame[target].isna().all():
            warnings.append(LawWarning("law-skipped", f"{target}: no row has a value"))
            continue
        is_input = target in table.columns.values()  # a best size against compute
        if frame is not None and not is_input:
            rises = rises_with(frame, "flops", target, options)
            best = best_rows(frame, ["budget", "params"], apart.columns, target, rises) if apart else frame
            grids[target] = build_grid(best, target, table.targets, options.seed, rises)
            forecasts[target] = forecast(grids[target])
            warnings += grid_warnings(grids[target], forecasts[target], target in _sized(table))
        fitted, skipped = _fit_target(table, target, grids.get(target), options, group)
        fits += fitted
        warnings += [*skipped, *(warning for entry in fitted for warning in entry.warnings)]
        if frame is None and not is_input:
            warnings += _frontier_of_scattered(fitted, table, target, options)
        if table.has("params", "flops") and not is_input:
            top = float(table.frame["flops"].max())
            at = options.allocate or (top, TEN_TIMES * top)
            surfaces = [(each.fitted, each.uncertainty, each.rows) for each in fitted if each.fitted.law.is_surface]
            if best_sizes := allocations(grids.get(target), surfaces, at, options.tokens_from_flops):
                by_target[target] = best_sizes
                warnings += allocation_warnings(target, best_sizes)
    warnings += doubtful_answers(options, fits, bool(by_target))
    sizes = side_by_side([grids[target] for target in _sized(table) if target in grids])
    return LawsResult(
        options=options,
        table=table,
        fits=tuple(fits),
        grids=grids,
        forecasts=forecasts,
        allocations=by_target,
        sizes={"": sizes} if sizes else {},
        warnings=tuple(warnings),
        version=_version(),
    )


def _fit_target(
    table: RunsTable, target: str, grid: TargetGrid | None, options: FitOptions, group: str
) -> tuple[list[FitEntry], list[LawWarning]]:
    """Every law planned for one target, and why others were skipped."""
    fitted, skipped = [], []
    floor, below = _floor(table, target)
    skipped += below
    for planned in plan(table, target, options, grid, floor):
        x, law = planned.x, planned.law
        rows, filters = rows_for(x, law, target, table, grid, options)
        along = (x,) if LAWS[law].is_curve else (x, "flops")
        if any(rises_with(rows, each, target, options) for each in along):
            if law == "power":
                planned = replace(planned, law="rising-power")
            elif LAWS[law].has_offset and not options.law:
                continue
            law = planned.law
        name = f"{target} against {x}: {_law_name(planned, floor, options)}" + (f" [{group}]" if group else "")
        steps.info("fitting %s to %d rows", name, len(rows))
        missing = [each for each in LAWS[law].columns(x) if each not in rows.columns]
        try:
            if missing:
                raise FitRefused(lacks(LAWS[law], missing, rows.columns))
            entry = _entry(name, planned, target, rows, grid, options, table.schedules)
        except FitRefused as refusal:
            where = name if missing else f"{target} against {x}"
            skipped.append(LawWarning("law-skipped", f"{where}: {refusal}", name))
        else:
            fitted.append(replace(entry, filters=(*table.filters, *filters), group=group))
    return (fitted if options.law else _without_companions(fitted)), skipped


def _entry(
    name: str,
    planned: PlannedFit,
    target: str,
    rows: pd.DataFrame,
    grid: TargetGrid | None,
    options: FitOptions,
    schedules: tuple[RateSchedule, ...],
) -> FitEntry:
    """One fitted law with all that belongs to it: intervals, held-out checks, predictions, warnings."""
    x, law = planned.x, LAWS[planned.law].along(schedules)
    columns = law.columns(x)
    check_inputs(law, columns, rows)
    inputs = tuple(rows[each].to_numpy(dtype=float) for each in columns)
    values = rows[target].to_numpy(dtype=float)
    offset = planned.floor if planned.floor is not None else options.offset if law.has_offset else None
    objective = Objective(options.objective, options.delta)  # type: ignore[arg-type]  # checked in check_options
    check_direction(law, columns, rows, target)
    fitted = fit(law, inputs, values, objective=objective, offset=offset)
    clusters = rows["run_id"].to_numpy() if options.checkpoints and "run_id" in rows.columns else None
    draws = resample(fitted, options.bootstrap_draws, options.seed, clusters, seeds_of_cells(rows, columns))
    uncertainty = from_draws(fitted, draws)
    warnings = fit_warnings(name, fitted, uncertainty, rows, columns, values)
    refits = Refits(fitted, rows, columns, target)
    checks = heldout_checks(refits, grid.noise if grid else None, options.holdout_where) if options.holdout else []
    if options.holdout and options.holdout_where and not any(check.name.startswith("where") for check in checks):
        message = f"{name}: no check of the rows where {options.holdout_where} (none, all, or too few rows remain)"
        warnings.append(LawWarning("holdout-skipped", message, name))
    free_offset = fitted.law.has_offset and fitted.offset is None and len(columns) == 1
    warnings += heldout_warnings(name, checks, offset_path(refits) if free_offset else [], values.min())
    entry = FitEntry(
        name=name,
        target=target,
        x=x,
        rows=rows,
        fitted=fitted,
        uncertainty=uncertainty,
        pearson_r=_pearson(inputs[0], values) if len(inputs) == 1 else None,
        holdout=tuple(checks),
        warnings=tuple(warnings),
    )
    return replace(entry, predictions=predictions(entry, options))


def _floor(table: RunsTable, target: str) -> tuple[float | None, list[LawWarning]]:
    """The measured floor that laws of a target are held at; none, with a warning, where values don't lie above it."""
    floor = measured_floor(table.frame, target)
    low = table.frame[table.frame[target] <= (floor or 0.0)]
    if not len(low):
        return floor, []
    message = f"{target}: {len(low)} values are not above the measured floor of {floor:.4g}, so no law is held at it"
    return None, [LawWarning("below-floor", f"{message} (rows {some(tuple(low['row'].astype(str)))})")]


def _law_name(planned: PlannedFit, floor: float | None, options: FitOptions) -> str:
    """A law's id, with what tells its two fits apart where a floor was measured."""
    if planned.law != "power-floor" or floor is None or options.offset is not None:
        return planned.law
    return f"{planned.law}, floor {'free' if planned.floor is None else 'held'}"


def _sized(table: RunsTable) -> list[str]:
    """The targets whose best sizes are compared: the first, which is a loss as a rule, and evaluations."""
    return [target for target in table.targets if target == table.targets[0] or is_evaluation(target)]


def _without_companions(fits: list[FitEntry]) -> list[FitEntry]:
    """One target's fits; a power law that stands beside a better law is not warned of for being worse."""
    worse = "worse-than-baseline"
    if not any(each.fitted.law.has_offset and worse not in {one.code for one in each.warnings} for each in fits):
        return fits
    return [
        replace(entry, warnings=tuple(each for each in entry.warnings if each.code != worse))
        if entry.fitted.law.name == "power"
        else entry
        for entry in fits
    ]


def _frontier_of_scattered(
    fits: list[FitEntry], table: RunsTable, target: str, options: FitOptions
) -> list[LawWarning]:
    """Which of the runs a law of compute is fitted to that share no budgets, most of them beaten by smaller ones."""
    entry = next((each for each in fits if each.x == "flops"), None)
    runs = table.frame[table.frame[target].notna()]
    if entry is None or options.frontier or options.checkpoints or log_slopes([runs["flops"]], runs[target])[0] >= 0:
        return []
    if not (scatter := scattered(runs, target)):
        return []
    if len(entry.rows) < len(runs):
        message = (
            f"{target} against flops is fitted to the lower envelope, {len(entry.rows)} of {len(runs)} runs: "
            f"{scatter.beaten} are beaten by runs of less compute, typically by {np.expm1(scatter.excess):.0%}; "
            "--frontier all fits every run, hull or bins fewer"
        )
        return [LawWarning("frontier-taken", message, entry.name)]
    message = (
        f"{target} against flops is fitted to all {len(runs)} runs, although {scatter.beaten} of them are beaten by "
        "runs of less compute; --frontier envelope, hull or bins fits the best ones"
    )
    return [LawWarning("frontier-possible", message, entry.name)]


def _pearson(x: Array, y: Array) -> float | None:
    """Correlation of log x and log y; None when one of them is constant."""
    logs = np.log(x), np.log(y)
    varied = len(x) > 2 and all(np.ptp(each) > 0 for each in logs)
    return float(np.corrcoef(*logs)[0, 1]) if varied else None


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("varscale")
    except PackageNotFoundError:
        return "unknown"


def _exclusion_effect(runs: pd.DataFrame, options: FitOptions, result: LawsResult) -> str:
    """What the first surface (or curve) would have been with the rows that filters left out."""
    if not (options.where or options.drop_highest) or result.table.has("group"):
        return ""
    entry = next((each for each in result.fits if len(each.inputs) > 1), result.fits[0])
    try:
        table = _prepared(runs, replace(options, where=(), drop_highest=0))
        rows, _ = rows_for(entry.x, entry.fitted.law.name, entry.target, table, None, options)
        inputs = tuple(rows[each].to_numpy(dtype=float) for each in entry.inputs)
        values = rows[entry.target].to_numpy(dtype=float)
        objective = entry.fitted.objective
        whole = fit(entry.fitted.law, inputs, values, objective=objective, offset=entry.fitted.offset, few_starts=True)
    except (TableError, FitRefused):
        return ""
    changes = ", ".join(
        f"{name} {whole.parameters[name]:.4g} instead of {value:.4g}" for name, value in entry.fitted.parameters.items()
    )
    return f"with all {len(rows)} rows, {entry.name} has {changes}"
