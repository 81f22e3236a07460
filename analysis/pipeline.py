"""From a table of runs to laws: one pure function, and one that writes its result."""

import json
import os
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import traps
from analysis.bootstrap import resample
from analysis.compare import Comparison, Side, compare
from analysis.descent import OBJECTIVES, Objective
from analysis.errors import FitRefused, TableError
from analysis.fitting import fit
from analysis.frontier import curve_envelope, largest_common_budget, with_budgets
from analysis.grids import TEN_TIMES, allocations, build_grid, grid_cautions
from analysis.heldout import heldout_checks, offset_path
from analysis.intervals import from_draws, predict
from analysis.laws import LAWS, Array
from analysis.options import DEFAULT_LAWS, FitOptions
from analysis.parametric import Allocation, FlopsPerToken, from_law
from analysis.results import FitEntry, LawsResult, PredictionAt, TargetGrid, WrittenLaws, inputs_of
from analysis.table import ROLES, RunsTable, prepare
from analysis.traps import Caution

_MOST_GROUPS_PAIRED = 4


def fit_laws(runs: pd.DataFrame, options: FitOptions | None = None) -> LawsResult:
    """Fits what the table allows. Pure: no file is read or written.

    Raises:
        TableError: the table or an option can't be used; one line that says what and where.
    """
    options = options or FitOptions()
    _check_options(options)
    table = prepare(runs, options)
    groups = _groups(table)
    if len(groups) < 2:
        result = _fit_group(table, options, "")
    else:
        parts = {name: _fit_group(part, options, name) for name, part in groups.items()}
        result = _joined(table, options, parts)
    if not result.fits:
        raise TableError("no law could be fitted: " + "; ".join(caution.message for caution in result.cautions))
    return replace(result, exclusion_effect=_exclusion_effect(runs, options, result))


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
    text = json.dumps(result.as_json(), indent=2, allow_nan=False)
    laws_json = _replace(out_dir / "laws.json", (text + "\n").encode())
    return WrittenLaws(laws_json, report_html, runs_csv, tuple(figures))


def _check_options(options: FitOptions) -> None:
    for law in options.law:
        if law not in LAWS:
            raise TableError(f"unknown law {law!r}; the laws are {', '.join(LAWS)}")
    if options.objective not in OBJECTIVES:
        raise TableError(f"unknown objective {options.objective!r}; the objectives are {', '.join(OBJECTIVES)}")
    if not options.delta > 0:
        raise TableError(f"--delta must be positive, not {options.delta:g}")
    if options.bootstrap_draws < 50:
        raise TableError(f"--bootstrap-draws {options.bootstrap_draws} is too few for an interval; at least 50")
    if options.offset is not None and not options.offset > 0:
        raise TableError(f"--offset must be positive, not {options.offset:g}; law power has none")
    for budget in options.allocate:
        if not budget > 0:
            raise TableError(f"--budget must be positive, not {budget:g}")
    for text in options.predict:
        _parse_point(text)


def _groups(table: RunsTable) -> dict[str, RunsTable]:
    if not table.has("group"):
        return {}
    parts = {str(name): rows.reset_index(drop=True) for name, rows in table.frame.groupby("group", sort=True)}
    return {name: replace(table, frame=rows) for name, rows in parts.items()}


def _joined(table: RunsTable, options: FitOptions, parts: dict[str, LawsResult]) -> LawsResult:
    comparisons, cautions = _comparisons(table, options, parts)
    shared = traps.of_table(table, None, options.checkpoints)
    seen = {(caution.code, caution.message) for caution in shared}
    own = [
        replace(caution, message=f"{name}: {caution.message}")
        for name, part in parts.items()
        for caution in part.cautions
        if (caution.code, caution.message) not in seen
    ]
    return LawsResult(
        options=options,
        table=table,
        fits=tuple(entry for part in parts.values() for entry in part.fits),
        grids={f"{target} [{name}]": grid for name, part in parts.items() for target, grid in part.grids.items()},
        allocations={f"{key} [{name}]": each for name, part in parts.items() for key, each in part.allocations.items()},
        comparisons=tuple(comparisons),
        cautions=(*shared, *own, *cautions),
        version=_version(),
    )


def _comparisons(
    table: RunsTable, options: FitOptions, parts: dict[str, LawsResult]
) -> tuple[list[Comparison], list[Caution]]:
    """Every pair of groups (those named, or all of a few), by power laws of compute."""
    for name in options.compare:
        if name not in parts:
            raise TableError(f"--compare {name!r}: no such group; the groups are {', '.join(parts)}")
    names = list(options.compare) or (list(parts) if len(parts) <= _MOST_GROUPS_PAIRED else [])
    found, cautions = [], []
    for target in table.targets:
        for a, b in combinations(names, 2):
            sides = [_side(parts[name], name, target) for name in (a, b)]
            if sides[0] is None or sides[1] is None:
                continue
            try:
                found.append(compare(target, sides[0], sides[1]))
            except FitRefused as refusal:
                cautions.append(Caution("law-skipped", f"comparison of {a} and {b}: {refusal}"))
    return found, cautions


def _side(part: LawsResult, name: str, target: str) -> Side | None:
    entry = next((e for e in part.fits if (e.fitted.law.name, e.target, e.x) == ("power", target, "flops")), None)
    if entry is None:
        return None
    flops, values = (entry.rows[each].to_numpy(dtype=float) for each in ("flops", target))
    return Side(name, flops, values, entry.fitted, entry.uncertainty)


def _fit_group(table: RunsTable, options: FitOptions, group: str) -> LawsResult:
    frame = with_budgets(table, options.checkpoints)
    cautions = traps.of_table(table, frame, options.checkpoints)
    fits: list[FitEntry] = []
    grids: dict[str, TargetGrid] = {}
    by_target: dict[str, tuple[Allocation, ...]] = {}
    for target in table.targets:
        if frame is not None:
            grids[target] = build_grid(frame, target, table.targets, options)
            cautions += grid_cautions(target, grids[target], first=target == table.targets[0])
        for x, law in _plan(table, options, grid=frame is not None):
            rows, filters = _rows_for(x, law, target, table, grids.get(target), options)
            entry, problems = _one_fit(law, target, x, rows, (*table.filters, *filters), table, grids, options, group)
            cautions += problems
            if entry is not None:
                fits.append(entry)
        if table.has("params", "flops"):
            best_sizes = allocations(target, table, grids.get(target), fits, options)
            if best_sizes:
                by_target[target] = best_sizes
                cautions += traps.of_allocations(target, best_sizes)
    return LawsResult(options, table, tuple(fits), grids, by_target, (), tuple(cautions), _version())


def _plan(table: RunsTable, options: FitOptions, grid: bool) -> list[tuple[str, str]]:
    """Which laws are fitted against what, in order.

    On a grid, loss against size is taken at one budget, where it bends up again beyond the best size: no law with an
    offset is fitted to it unasked. Nor is a surface fitted unasked to fewer than four sizes.
    """
    laws = options.law or DEFAULT_LAWS
    places = options.x or tuple(role for role in ("flops", "params") if table.has(role)) or ("tokens",)
    plan = [(x, law) for x in places for law in laws if LAWS[law].inputs == ("x",)]
    if grid and not options.law and not options.x:
        plan = [(x, law) for x, law in plan if x != "params" or not LAWS[law].has_offset]
    surface = table.has("params", "tokens") and table.frame["params"].nunique() >= traps.FEWEST_SIZES
    wanted = options.law or (surface and not options.x)
    return plan + [("params, tokens", law) for law in laws if LAWS[law].inputs != ("x",) and wanted]


def _rows_for(
    x: str, law: str, target: str, table: RunsTable, grid: TargetGrid | None, options: FitOptions
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The rows that belong in a fit, and the filter that says which."""
    frame = table.frame[table.frame[target].notna()]
    if LAWS[law].inputs != ("x",):
        return frame, ()
    if x == "flops" and options.checkpoints and table.has("flops"):
        return curve_envelope(frame, target), ("frontier: lower envelope of the curves",)
    if grid is not None and x == "flops":
        return grid.frontier, ("frontier: best cell of each budget",)
    if grid is not None and x == "params":
        budget = largest_common_budget(grid.cells)
        if budget is not None:
            chosen = grid.cells[(grid.cells["budget"] == budget) & grid.cells[target].notna()]
            at = f"budget == {budget:.6g} (the largest that all sizes have)"
            best = chosen["params"].to_numpy(dtype=float)[int(chosen[target].to_numpy(dtype=float).argmin())]
            falling = chosen[chosen["params"] <= best]
            if 3 <= len(falling) < len(chosen):
                return falling, (at, "sizes up to the best one (larger ones see too little data)")
            return chosen, (at,)
    if x not in frame.columns:
        return frame.iloc[:0], ()
    return frame[frame[x].notna()], ()


def _one_fit(
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
    name = f"{target} against {x}: {law}" + (f" [{group}]" if group else "")
    columns = inputs_of(LAWS[law].inputs, x)
    missing = [each for each in columns if each not in rows.columns]
    if missing:
        return None, [Caution("law-skipped", f"{name}: the table has no column for {' and '.join(missing)}", name)]
    inputs = tuple(rows[each].to_numpy(dtype=float) for each in columns)
    values = rows[target].to_numpy(dtype=float)
    offset = options.offset if LAWS[law].has_offset else None
    objective = Objective(options.objective, options.delta)  # type: ignore[arg-type]  # checked in _check_options
    try:
        if LAWS[law].has_offset and len(columns) == 1 and len(values) > 1 and _slope(inputs[0], values) >= 0:
            raise FitRefused(f"{law}: the target does not fall with x over these rows")
        fitted = fit(law, inputs, values, objective=objective, offset=offset)
    except FitRefused as refusal:
        return None, [Caution("law-skipped", f"{target} against {x}: {refusal}", name)]
    clusters = rows["run_id"].to_numpy() if options.checkpoints and "run_id" in rows.columns else None
    uncertainty = from_draws(fitted, resample(fitted, options.bootstrap_draws, options.seed, clusters))
    cautions = traps.of_fit(name, fitted, uncertainty, rows, columns, values)
    noise = grids[target].noise if target in grids else None
    checks = heldout_checks(fitted, rows, columns, target, noise, options.holdout_where) if options.holdout else []
    free_offset = fitted.law.has_offset and fitted.offset is None and len(columns) == 1
    cautions += traps.of_heldout(name, checks, offset_path(fitted, rows, x, target) if free_offset else [])
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


def _predictions(entry: FitEntry, options: FitOptions) -> tuple[PredictionAt, ...]:
    """At the points asked for that name this law's inputs, and at ten times the largest compute fitted.

    A law of N and D is taken at a compute's best size and data.
    """
    points = [_parse_point(text) for text in options.predict]
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


def _parse_point(text: str) -> dict[str, float]:
    point = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not equals or not number > 0:
            raise TableError(f"--predict {text!r}: write column=number, such as flops=1e21 or params=1e9,tokens=2e10")
        point[name.strip()] = number
    unknown = [name for name in point if name not in ROLES]
    if unknown and len(point) > 1:
        raise TableError(f"--predict {text!r}: points of several columns are of params, tokens and flops")
    return point


def _slope(x: Array, y: Array) -> float:
    return float(np.cov(np.log(x), np.log(y))[0, 1])


def _pearson(x: Array, y: Array) -> float | None:
    """Correlation of log x and log y; None when one of them is constant."""
    logs_x, logs_y = np.log(x), np.log(y)
    return (
        float(np.corrcoef(logs_x, logs_y)[0, 1]) if len(x) > 2 and np.ptp(logs_x) > 0 and np.ptp(logs_y) > 0 else None
    )


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


def _exclusion_effect(runs: pd.DataFrame, options: FitOptions, result: LawsResult) -> str:
    """What the first surface (or curve) would have been with the rows that filters left out."""
    if not (options.where or options.drop_highest) or result.table.has("group"):
        return ""
    entry = next((each for each in result.fits if len(each.inputs) > 1), result.fits[0])
    try:
        table = prepare(runs, replace(options, where=(), drop_highest=0))
        rows, _ = _rows_for(entry.x, entry.fitted.law.name, entry.target, table, None, options)
        inputs = tuple(rows[each].to_numpy(dtype=float) for each in entry.inputs)
        values = rows[entry.target].to_numpy(dtype=float)
        objective = entry.fitted.objective
        whole = fit(entry.fitted.law, inputs, values, objective=objective, offset=options.offset, few_starts=True)
    except (TableError, FitRefused):
        return ""
    changes = ", ".join(
        f"{name} {whole.parameters[name]:.4g} instead of {value:.4g}" for name, value in entry.fitted.parameters.items()
    )
    return f"with all {len(rows)} rows, {entry.name} has {changes}"
