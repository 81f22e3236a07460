"""The report's tables, as headings and cells of text; the template knows nothing of what is in them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from analysis.checks.holdout import Heldout
from analysis.grids.allocation import Allocation
from analysis.grids.grid_bias import bias_text
from analysis.grids.guidance import SHARES, GuidanceCurve
from analysis.grids.side_by_side import OptimalSize
from analysis.report.sentences import (
    SYMBOLS,
    beyond_text,
    data_noun,
    interval,
    law_text,
    measured,
    number,
    parameter_text,
    percent,
    point_text,
    scaled,
)
from analysis.results import FitEntry, LawsResult
from analysis.tables.evaluations import LIKELIHOOD
from analysis.tables.roles import SWEEP_COLUMNS
from analysis.tables.table import RunsTable
from analysis.tables.units import NOUNS

AXES = {"flops": "compute C", "params": "parameters N", "tokens": "tokens D", "params, tokens": "N and D"} | {
    "rate_left, rate_sum": "learning rates",
    "rate_schedule, rate_sum": "learning rates",
    LIKELIHOOD: "loss, as e^-loss",
}
_BLANK = "\N{NO-BREAK SPACE}"
_BASELINES = ("no change", "power law", "nearest run")


@dataclass(frozen=True)
class ReportTable:
    """A table: headings (right-aligned where named in `numeric`), rows of cells, each cell one or more lines."""

    headings: tuple[str, ...]
    rows: Sequence[tuple[tuple[str, ...], ...]]
    title: str = ""
    numeric: frozenset[str] = field(default=frozenset())


def definitions(table: RunsTable) -> list[str]:
    """What N, C and D are, and where they come from."""
    lines = []
    for role, symbol in (("params", "N"), ("flops", "C"), ("tokens", "D")):
        if role in table.frame.columns:
            noun = table.units[role].noun if role in table.units else NOUNS[role]
            source = f", column {table.columns[role]}" if role in table.columns else ""
            lines.append(f"{symbol}: {'' if role == 'params' else 'training '}{noun}{source}")
    if table.columns.get("flops") == SWEEP_COLUMNS["flops"]:
        lines.append(
            "a sweep's C is 3 × the forward pass, 2 × multiply-adds of every matrix product, all attention pairs"
        )
    derived = [note for note in table.notes if note.startswith(("tokens are D", "FLOPs are C", "training FLOPs are"))]
    return [*lines, *derived]


def units(table: RunsTable) -> list[str]:
    """The unit of every number in the report, with what source columns were multiplied by."""
    lines = []
    for role in ("params", "flops", "tokens"):
        if role in table.frame.columns:
            unit = table.units.get(role)
            text = f"{role} in {unit.noun if unit else NOUNS[role]}"
            lines.append(
                text + (f" (given as {unit.given}: × {number(unit.factor)})" if unit and unit.factor != 1 else "")
            )
    shown = (
        f"{name} in {table.units[name].noun}" if name in table.units else f"{name} as given" for name in table.targets
    )
    own = table.columns.get("flops") == SWEEP_COLUMNS["flops"]
    errors = "; error: a share" if any(name.startswith("error") for name in table.targets) else ""
    return [*lines, *([f"loss: {table.loss_unit}{errors}"] if own else shown)]


def laws_table(result: LawsResult) -> ReportTable:
    """Every fit with its parameters."""
    rows = []
    for entry in result.fits:
        law = entry.fitted.law
        cells = (
            (entry.target, entry.group) if entry.group else (entry.target,),
            (AXES.get(entry.x, entry.x) if entry.x != "tokens" else f"{result.table.unit_of_data} D",),
            (law_text(entry), law.formula),
            (str(len(entry.rows)),),
            tuple(parameter_text(entry, name) for name in law.parameters),
            (f"{entry.pearson_r:.4f}" if entry.pearson_r is not None else "–",),
            (number(entry.fitted.value),),
            (f"{entry.fitted.agreeing} of {entry.fitted.starts}",),
        )
        rows.append(cells)
    headings = ("target", "against", "law", "rows", "parameters [95%]", "Pearson r", "objective", "starts agreeing")
    return ReportTable(headings, rows, numeric=frozenset({"rows", "Pearson r", "objective", "starts agreeing"}))


def predictions_table(result: LawsResult) -> ReportTable:
    """Every prediction with both intervals."""
    rows = [
        (
            (entry.name,),
            (point_text(each, result.table.unit_of_data),),
            (number(each.prediction.value),),
            (interval(each.prediction.curve_ci95),),
            (interval(each.prediction.new_run_ci95),),
        )
        for entry in result.fits
        for each in entry.predictions
    ]
    headings = ("law", "at", "value", "95%, the curve", "95%, a new run")
    return ReportTable(headings, rows, numeric=frozenset(headings[2:]))


def heldout_tables(result: LawsResult) -> tuple[ReportTable, ReportTable]:
    """The largest budget and size left out; and rolling forward."""
    rows, rolled = [], []
    for entry in result.fits:
        for check in entry.holdout:
            if check.name.startswith("roll"):
                rolled.append(_rolled_row(entry, check))
                continue
            errors = tuple((percent(check.baselines.get(name)),) for name in _BASELINES)
            rows.append(
                (
                    (entry.name,),
                    (check.name,),
                    (f"{check.n_fitted} / {check.n_held}",),
                    (percent(check.mean_percent),),
                    (percent(check.worst_percent),),
                    (number(check.noise_units),),
                    *errors,
                )
            )
    headings = ("law", "left out", "fitted / left out", "mean error", "worst", "in seed noise", *_BASELINES)
    steps = ("law", "step", "rows fitted", "error of the next", "no change", "parameters")
    return (
        ReportTable(headings, rows, numeric=frozenset(headings[2:])),
        ReportTable(steps, rolled, numeric=frozenset(steps[2:5])),
    )


def allocation_tables(result: LawsResult) -> list[ReportTable]:
    """The best size and data for a budget, by each approach."""
    noun, of_each = data_noun(result.table)
    exponents = ("a (N ∝ C^a)", "b (D ∝ C^b)")
    headings = ("approach", *exponents, "budget (FLOPs)", "best N", f"best D ({noun})", "remark")
    return [
        ReportTable(headings, [_allocation_row(each, of_each) for each in found], target, frozenset(headings[1:6]))
        for target, found in result.allocations.items()
    ]


def sizes_tables(result: LawsResult) -> list[ReportTable]:
    """The best sizes by loss and by FID side by side, budget by budget, and the exponents of their growth."""
    tables = []
    for group, budgets in result.sizes.items():
        names = list(dict.fromkeys(target for each in budgets for target in each.targets))
        first, *others = names
        headings = (
            "budget (FLOPs)",
            *(f"best N by {name}" for name in names),
            *(f"{name} / {first}" for name in others),
        )
        rows = [
            (
                (number(each.budget),),
                *(_optimal_size(each.targets.get(name)) for name in names),
                *((number(each.ratio(name)),) for name in others),
            )
            for each in budgets
        ]
        exponents = (_size_exponent(result, f"{name} [{group}]" if group else name) for name in names)
        rows.append((("a (N ∝ C^a)",), *exponents, *(("",) for _ in others)))
        tables.append(ReportTable(headings, rows, group, frozenset(headings)))
    return tables


def guidance_tables(result: LawsResult) -> list[ReportTable]:
    """The best guidance of each cell by each measure; one table a setting."""
    names = list(dict.fromkeys(target for curve in result.guidance for target in curve.best))
    headings = ("cell", "N", "guidances", *(f"best by {name}" for name in names), "precision", "recall")
    rows: dict[str, list[tuple[tuple[str, ...], ...]]] = {}
    for curve in result.guidance:
        guidances, _ = curve.column("guidance")
        rows.setdefault(curve.settings, []).append(
            (
                (curve.run,),
                (number(curve.sizes.get("params")),),
                (f"{len(guidances)} from {number(guidances[0])} to {number(guidances[-1])}",),
                *(_best_guidance(curve, name) for name in names),
                *(_from_end_to_end(curve, name) for name in SHARES),
            )
        )
    return [ReportTable(headings, found, settings, frozenset(headings[1:])) for settings, found in rows.items()]


def frontier_tables(result: LawsResult) -> list[ReportTable]:
    """Best cells and IsoFLOP minima, budget by budget."""
    headings = ("budget (FLOPs)", "sizes", "best value", "its N", "optimum at N", "95%", "value there", "remark")
    tables = []
    for name, grid in result.grids.items():
        minima = {found.budget: found for found in grid.minima}
        values = grid.frontier[grid.target]
        rows = []
        for budget, size, value in zip(grid.frontier["budget"], grid.frontier["params"], values, strict=True):
            found = minima[budget]
            shown = (budget, None, None, size, found.params)
            cells = [(number(each),) for each in shown]
            cells[1], cells[2] = (str(found.sizes),), (measured(value),)
            there = measured(found.value)
            rows.append((*cells, (interval(found.params_ci95),), (there,), (found.refused,)))
        tables.append(ReportTable(headings, rows, name, frozenset(headings[:-1])))
    return tables


def _rolled_row(entry: FitEntry, check: Heldout) -> tuple[tuple[str, ...], ...]:
    return (
        (entry.name,),
        (check.name.removeprefix("roll forward "),),
        (str(check.n_fitted),),
        (percent(check.mean_percent),),
        (percent(check.baselines.get("no change")),),
        (", ".join(f"{SYMBOLS.get(name, name)} {number(value)}" for name, value in check.parameters.items()),),
    )


def _optimal_size(found: OptimalSize | None) -> tuple[str, ...]:
    """The parabola's minimum with its interval, and the best cell, with what one should know of it."""
    if found is None:
        return ("–",)
    end = ", an end of the sizes" if found.at_end else ""
    cell = f"cell {number(found.params)} of {found.sizes}{end}"
    return (cell,) if found.minimum is None else (f"{number(found.minimum)} {interval(found.minimum_ci95)}", cell)


def _best_guidance(curve: GuidanceCurve, target: str) -> tuple[str, ...]:
    """Where the parabola has its minimum, or at which end the lowest is."""
    found = curve.best.get(target)
    if found is None:
        return ("–",)
    where = "by a parabola" if found.bracketed else "an end of the range: not bracketed"
    return number(found.guidance), f"{number(found.value)}, {where}"


def _from_end_to_end(curve: GuidanceCurve, name: str) -> tuple[str, ...]:
    _, values = curve.column(name)
    return (f"{number(values[0])} → {number(values[-1])}" if values else "–",)


def _size_exponent(result: LawsResult, key: str) -> tuple[str, ...]:
    """How the best size grows, from the parabolas' minima, or else along the frontier."""
    known = {each.approach: each for each in result.allocations.get(key, ()) if each.params_exponent is not None}
    for approach in ("isoflop-parabola", "envelope"):
        if approach in known:
            return f"{number(known[approach].params_exponent)} {interval(known[approach].params_ci95)}", approach
    return ("–",)


def _allocation_row(each: Allocation, of_each: float) -> tuple[tuple[str, ...], ...]:
    if each.refused:
        return (each.approach,), ("–",), ("–",), ("",), ("",), ("",), (f"refused: {each.refused}",)
    exponents, columns = [], []
    for value, pair in ((each.params_exponent, each.params_ci95), (each.tokens_exponent, each.tokens_ci95)):
        exponents.append((number(value), interval(pair)) if value is not None else ("–",))
    columns.append([(number(best.budget), _BLANK) for best in each.best])
    columns.append([(number(best.params), interval(best.params_ci95)) for best in each.best])
    columns.append(
        [
            (number(best.tokens / of_each), interval(scaled(best.tokens_ci95, of_each))) if best.tokens else ("–", "")
            for best in each.best
        ]
    )
    lines = [tuple(line for pair in column for line in pair) for column in columns]
    remarks = [f"{number(best.budget)} FLOPs: {beyond_text(best.beyond)}" for best in each.best if best.beyond != 1]
    if each.lost:
        of = each.lost + each.n_points
        remarks.append(f"no minimum at {each.lost} of {of} budgets: it would be an end of the sizes")
    if each.bias is not None:
        remarks.append(f"without noise on the surface off by: {bias_text(each.bias)}")
    return (each.approach,), *exponents, *lines, tuple(remarks) or ("",)
