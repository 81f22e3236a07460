"""One fitted law with all that belongs to it: intervals, held-out checks, predictions, warnings."""

from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis import traps
from analysis.bootstrap import resample
from analysis.descent import Objective
from analysis.errors import FitRefused
from analysis.fitting import fit
from analysis.grids import TEN_TIMES
from analysis.holdout import Refits, heldout_checks, offset_path
from analysis.intervals import from_draws, predict
from analysis.laws import LAWS, Array
from analysis.options import FitOptions
from analysis.parametric import FlopsPerToken, from_law
from analysis.planning import parse_point
from analysis.results import FitEntry, PredictionAt, TargetGrid, inputs_of
from analysis.table import RunsTable
from analysis.traps import Caution


def one_fit(
    law: str,
    target: str,
    x: str,
    rows: pd.DataFrame,
    filters: tuple[str, ...],
    table: RunsTable,
    grids: dict[str, TargetGrid],
    options: FitOptions,
    group: str,
) -> tuple[FitEntry | None, list[Caution]]:
    """Fits a law to its rows; None, with a warning that says why, where that can't be done."""
    name = f"{target} against {x}: {law}" + (f" [{group}]" if group else "")
    columns = inputs_of(LAWS[law].inputs, x)
    missing = [each for each in columns if each not in rows.columns]
    if missing:
        return None, [Caution("law-skipped", f"{name}: the table has no column for {' and '.join(missing)}", name)]
    inputs = tuple(rows[each].to_numpy(dtype=float) for each in columns)
    values = rows[target].to_numpy(dtype=float)
    offset = options.offset if LAWS[law].has_offset else None
    objective = Objective(options.objective, options.delta)  # type: ignore[arg-type]  # checked in check_options
    try:
        if LAWS[law].has_offset and len(columns) == 1 and len(values) > 1 and _slope(inputs[0], values) >= 0:
            raise FitRefused(f"{law}: the target does not fall with x over these rows")
        fitted = fit(law, inputs, values, objective=objective, offset=offset)
    except FitRefused as refusal:
        return None, [Caution("law-skipped", f"{target} against {x}: {refusal}", name)]
    clusters = rows["run_id"].to_numpy() if options.checkpoints and "run_id" in rows.columns else None
    draws = resample(fitted, options.bootstrap_draws, options.seed, clusters, _repeats(rows))
    uncertainty = from_draws(fitted, draws)
    cautions = traps.of_fit(name, fitted, uncertainty, rows, columns, values)
    noise = grids[target].noise if target in grids else None
    refits = Refits(fitted, rows, columns, target)
    checks = heldout_checks(refits, noise, options.holdout_where) if options.holdout else []
    if options.holdout and options.holdout_where and not any(check.name.startswith("where") for check in checks):
        message = f"{name}: no check of the rows where {options.holdout_where} (none, all, or too few rows remain)"
        cautions.append(Caution("holdout-skipped", message, name))
    free_offset = fitted.law.has_offset and fitted.offset is None and len(columns) == 1
    cautions += traps.of_heldout(name, checks, offset_path(refits) if free_offset else [], values.min())
    entry = FitEntry(
        name=name,
        target=target,
        x=x,
        rows=rows,
        filters=filters,
        fitted=fitted,
        uncertainty=uncertainty,
        pearson_r=_pearson(inputs[0], values) if len(inputs) == 1 else None,
        holdout=tuple(checks),
        cautions=tuple(cautions),
        group=group,
    )
    return replace(entry, predictions=_predictions(entry, options)), cautions


def _repeats(rows: pd.DataFrame) -> NDArray[np.int64] | None:
    """A label a row, the same for rows alike in all but the seed; None where no seed is said."""
    if "seed" not in rows.columns:
        return None
    alike = [name for name in ("params", "tokens", "flops", "budget") if name in rows.columns]
    return np.asarray(rows.groupby(alike, dropna=False).ngroup(), dtype=np.int64)


def _predictions(entry: FitEntry, options: FitOptions) -> tuple[PredictionAt, ...]:
    """At the points asked for that name this law's inputs, and at ten times the largest compute fitted.

    A law of N and D is taken at a compute's best size and data.
    """
    points = [parse_point(text) for text in options.predict]
    if "flops" in entry.rows.columns and entry.x != "params":
        points.append({"flops": TEN_TIMES * float(entry.rows["flops"].max())})
    usable = []
    for point in points:
        if set(point) == set(entry.inputs):
            usable.append(point)
        elif set(point) == {"flops"} and len(entry.inputs) == 2 and "flops" in entry.rows.columns:
            factor = options.tokens_from_flops
            best = from_law(entry.fitted, entry.uncertainty, entry.rows, (point["flops"],), factor).best[0]
            tokens = FlopsPerToken(entry.rows, factor).tokens(point["flops"], np.array([best.params]))
            usable.append(point | {"params": best.params, "tokens": float(tokens[0])})
    if not usable:
        return ()
    inputs = tuple(np.array([point[name] for point in usable]) for name in entry.inputs)
    return tuple(
        PredictionAt(point, prediction, {name: _distance(entry.rows[name], point[name]) for name in point})
        for point, prediction in zip(usable, predict(entry.fitted, entry.uncertainty, *inputs), strict=True)
    )


def _distance(values: "pd.Series[float]", place: float) -> float:
    """How far beyond the data: over the largest value, or over the smallest if below it, 1 inside."""
    low, high = float(values.min()), float(values.max())
    return place / high if place > high else place / low if place < low else 1.0


def _slope(x: Array, y: Array) -> float:
    return float(np.cov(np.log(x), np.log(y))[0, 1])


def _pearson(x: Array, y: Array) -> float | None:
    """Correlation of log x and log y; None when one of them is constant."""
    logs_x, logs_y = np.log(x), np.log(y)
    return (
        float(np.corrcoef(logs_x, logs_y)[0, 1]) if len(x) > 2 and np.ptp(logs_x) > 0 and np.ptp(logs_y) > 0 else None
    )
