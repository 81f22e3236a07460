"""From a table of runs to laws: one pure function."""

from dataclasses import replace
from itertools import combinations

import pandas as pd

from analysis import traps
from analysis.compare import Comparison, Side, compare
from analysis.entries import one_fit
from analysis.errors import FitRefused, TableError
from analysis.fitting import fit
from analysis.frontier import with_budgets
from analysis.grids import allocations, build_grid, grid_cautions
from analysis.options import FitOptions
from analysis.parametric import Allocation
from analysis.planning import check_options, plan, points_by_role, rows_for, unused_points
from analysis.results import FitEntry, LawsResult, TargetGrid
from analysis.table import RunsTable, meets, prepare
from analysis.traps import Caution

_MOST_GROUPS_PAIRED = 4


def fit_laws(runs: pd.DataFrame, options: FitOptions | None = None) -> LawsResult:
    """Fits what the table allows. Pure: no file is read or written.

    Raises:
        TableError: the table or an option can't be used; one line that says what and where.
    """
    options = options or FitOptions()
    check_options(options)
    table = prepare(runs, options)
    options = points_by_role(table, options)
    if options.holdout_where:
        meets(table.frame, options.holdout_where, "--holdout-where")
    groups = _groups(table)
    if len(groups) < 2:
        result = _fit_group(table, options, "")
    else:
        parts = {name: _fit_group(part, options, name) for name, part in groups.items()}
        result = _joined(table, options, parts)
    if not result.fits:
        reasons = [caution.message for caution in result.cautions if caution.code == "law-skipped"]
        raise TableError("no law could be fitted: " + "; ".join(dict.fromkeys(reasons)))
    return replace(result, exclusion_effect=_exclusion_effect(runs, options, result))


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
    bent = part.find("power-offset", target, "flops")
    with_offset = (bent.fitted, bent.uncertainty) if bent is not None else None
    return Side(name, flops, values, entry.fitted, entry.uncertainty, with_offset)


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
        fitted: list[FitEntry] = []
        for x, law in plan(table, options, grids.get(target)):
            rows, filters = rows_for(x, law, target, table, grids.get(target), options)
            entry, problems = one_fit(law, target, x, rows, (*table.filters, *filters), table, grids, options, group)
            if entry is None:
                cautions += problems
            else:
                fitted.append(entry)
        if not options.law:
            fitted = traps.without_companions(fitted)
        fits += fitted
        cautions += [caution for entry in fitted for caution in entry.cautions]
        if table.has("params", "flops"):
            best_sizes = allocations(target, table, grids.get(target), fits, options)
            if best_sizes:
                by_target[target] = best_sizes
                cautions += traps.of_allocations(target, best_sizes)
    cautions += unused_points(options, fits)
    return LawsResult(options, table, tuple(fits), grids, by_target, (), tuple(cautions), _version())


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
        rows, _ = rows_for(entry.x, entry.fitted.law.name, entry.target, table, None, options)
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
