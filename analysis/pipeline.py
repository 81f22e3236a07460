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
from analysis.errors import FitRefused, TableError
from analysis.fitting import OBJECTIVES, Objective, fit
from analysis.frontier import cells, curve_envelope, envelope, largest_common_budget, seed_noise, with_budgets
from analysis.heldout import heldout_checks
from analysis.holdout import roll_forward
from analysis.intervals import from_draws, predict
from analysis.isoflop import METHODS, minima
from analysis.laws import LAWS, Array
from analysis.options import DEFAULT_LAWS, FitOptions
from analysis.parametric import Allocation, FlopsPerToken, from_law, from_minima, from_points
from analysis.results import FitEntry, LawsResult, PredictionAt, TargetGrid, WrittenLaws, inputs_of
from analysis.table import ROLES, RunsTable, prepare
from analysis.traps import Caution

_TEN_TIMES = 10.0
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
    return result


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
    allocations: dict[str, tuple[Allocation, ...]] = {}
    for target in table.targets:
        if frame is not None:
            grids[target] = _grid(frame, target, table.targets, options)
            cautions += _grid_cautions(target, grids[target], first=target == table.targets[0])
        for x, law in _plan(table, options, grid=frame is not None):
            rows, filters = _rows_for(x, law, target, table, grids.get(target), options)
            entry, problems = _one_fit(law, target, x, rows, (*table.filters, *filters), table, grids, options, group)
            cautions += problems
            if entry is not None:
                fits.append(entry)
        if table.has("params", "flops"):
            found = _allocations(target, table, grids.get(target), fits, options)
            if found:
                allocations[target] = found
                cautions += traps.of_allocations(target, found)
    return LawsResult(options, table, tuple(fits), grids, allocations, (), tuple(cautions), _version())


def _plan(table: RunsTable, options: FitOptions, grid: bool) -> list[tuple[str, str]]:
    """Which laws are fitted against what, in order.

    On a grid, loss against size is taken at one budget, where it bends up again beyond the best size: no law with an
    offset is fitted to it unasked.
    """
    laws = options.law or DEFAULT_LAWS
    places = options.x or tuple(role for role in ("flops", "params") if table.has(role)) or ("tokens",)
    plan = [(x, law) for x in places for law in laws if LAWS[law].inputs == ("x",)]
    if grid and not options.law and not options.x:
        plan = [(x, law) for x, law in plan if x != "params" or not LAWS[law].has_offset]
    wanted = options.law or (table.has("params", "tokens") and not options.x)
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
    cautions += traps.of_heldout(name, fitted, checks)
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
    return replace(entry, predictions=_predictions(entry, table, options)), cautions


def _predictions(entry: FitEntry, table: RunsTable, options: FitOptions) -> tuple[PredictionAt, ...]:
    """At the points asked for that name this law's inputs, and at ten times the largest compute fitted."""
    points = [_parse_point(text) for text in options.predict]
    points = [point for point in points if set(point) == set(entry.inputs)]
    if entry.inputs == ("flops",):
        points.append({"flops": _TEN_TIMES * float(entry.rows["flops"].max())})
    elif len(entry.inputs) == 2 and "flops" in entry.rows.columns:
        per_token = FlopsPerToken(entry.rows, options.tokens_from_flops)
        budget = _TEN_TIMES * float(entry.rows["flops"].max())
        best = from_law(entry.fitted, entry.uncertainty, entry.rows, (budget,), options.tokens_from_flops).best[0]
        points.append({"params": best.params, "tokens": float(per_token.tokens(budget, np.array([best.params]))[0])})
    if not points:
        return ()
    inputs = tuple(np.array([point[name] for point in points]) for name in entry.inputs)
    return tuple(
        PredictionAt(point, prediction, {name: _distance(entry.rows[name], point[name]) for name in point})
        for point, prediction in zip(points, predict(entry.fitted, entry.uncertainty, *inputs), strict=True)
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


def _grid(frame: pd.DataFrame, target: str, targets: tuple[str, ...], options: FitOptions) -> TargetGrid:
    grid_cells = cells(frame, targets)
    frontier = envelope(grid_cells, target)
    noise = seed_noise(frame[frame[target].notna()], target)
    x, y, budgets = (frontier[name].to_numpy(dtype=float) for name in ("flops", target, "budget"))
    refused = ""
    rolled = []
    try:
        rolled = roll_forward(x, y, budgets, target, noise)
    except FitRefused as refusal:
        refused = str(refusal)
    found = {method: tuple(minima(grid_cells, target, method, noise, options.seed)) for method in METHODS}
    first = found.pop(METHODS[0])
    return TargetGrid(grid_cells, frontier, first, noise, tuple(rolled), refused, found)


def _grid_cautions(target: str, grid: TargetGrid, first: bool) -> list[Caution]:
    """What the grid doesn't reach; the same for every target, so said of the first one only."""
    found = []
    refused = [each for each in grid.minima if each.refused]
    if refused and first:
        budgets = ", ".join(f"{each.budget:.3g}" for each in refused)
        message = f"{target}: no IsoFLOP minimum at {len(refused)} of {len(grid.minima)} budgets ({budgets} FLOPs)"
        found.append(Caution("isoflop-refused", f"{message}; {refused[-1].refused}"))
    sizes = grid.cells["params"]
    edge = grid.frontier[grid.frontier["params"].isin([sizes.min(), sizes.max()])]
    if len(edge) and sizes.nunique() > 1 and first:
        budgets = ", ".join(f"{each:.3g}" for each in edge["budget"])
        found.append(Caution("edge-optimum", f"{target}: the best size is at the edge of the grid at {budgets} FLOPs"))
    if grid.check and not grid.check.held:
        found.append(Caution("prediction-failed", f"{target}: the prediction of the largest budget did not hold"))
    return found


def _allocations(
    target: str, table: RunsTable, grid: TargetGrid | None, fits: list[FitEntry], options: FitOptions
) -> tuple[Allocation, ...]:
    """Approaches 1, 2 and 3 side by side, each refused by name where it can't be used."""
    top = float(table.frame["flops"].max())
    at = options.allocate or (top, _TEN_TIMES * top)
    found = []
    if grid is not None:
        best = grid.frontier
        tokens = best["tokens"].to_numpy(dtype=float) if "tokens" in best.columns else None
        budgets, sizes = best["flops"].to_numpy(dtype=float), best["params"].to_numpy(dtype=float)
        try:
            found.append(from_points("envelope", budgets, sizes, tokens, at))
        except FitRefused as refusal:
            found.append(Allocation("envelope", len(best), refused=str(refusal)))
        for method, minima_found in ((METHODS[0], grid.minima), *grid.other_minima.items()):
            try:
                found.append(from_minima(list(minima_found), at))
            except FitRefused as refusal:
                found.append(Allocation(f"isoflop-{method}", len(minima_found), refused=str(refusal)))
    parametric = (
        from_law(entry.fitted, entry.uncertainty, entry.rows, at, options.tokens_from_flops)
        for entry in fits
        if entry.target == target and len(entry.inputs) == 2
    )
    return (*found, *parametric)


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
