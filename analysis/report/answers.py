"""What was asked for, as tables narrow enough for a terminal: predictions at points, rows held out, best sizes."""

from analysis.checks.requests import parse_point
from analysis.grids.allocation import Allocation
from analysis.report.sentences import beyond_text, data_noun, interval, law_text, number, percent, point_text, scaled
from analysis.report.tables import ReportTable
from analysis.results import FitEntry, LawsResult, PredictionAt
from analysis.tables.table import RunsTable


def answers(result: LawsResult) -> list[ReportTable]:
    """A table for each point of `--predict`, one of `--holdout-where`, and the best sizes for budgets of `--budget`."""
    asked = [*(_at_point(result, text) for text in result.options.predict), _held_out(result)]
    found = [table for table in asked if table.rows]
    return [*found, *(best_sizes(result) if result.options.allocate else [])]


def best_sizes(result: LawsResult) -> list[ReportTable]:
    """The best size and data of each budget by each approach, for the first target."""
    first = result.table.targets[0]
    chosen = {key: each for key, each in result.allocations.items() if key == first or key.startswith(f"{first} [")}
    return [_best(result.table, key, found) for key, found in chosen.items() if any(not each.refused for each in found)]


def _at_point(result: LawsResult, text: str) -> ReportTable:
    point = parse_point(text)
    found = [
        (entry, each)
        for entry in result.fits
        if (each := next((one for one in entry.predictions if point.items() <= one.at.items()), None)) is not None
    ]
    place = PredictionAt(point, found[0][1].prediction, found[0][1].extrapolation) if found else None
    headings = ("predicted", "value", "95%, the curve", "95%, a new run")
    rows = [_prediction_row(result.table, entry, each, point) for entry, each in found]
    return ReportTable(
        headings, rows, f"at {point_text(place, result.table.unit_of_data)}" if place else "", frozenset(headings[1:])
    )


def _held_out(result: LawsResult) -> ReportTable:
    headings = ("predicted from the others", "rows", "mean error", "worst", "no change")
    rows = [
        (
            (_law(entry),),
            (str(check.n_held),),
            *((percent(each),) for each in (check.mean_percent, check.worst_percent, check.baselines.get("no change"))),
        )
        for entry in result.fits
        for check in entry.holdout
        if check.name.startswith("where")
    ]
    return ReportTable(headings, rows, f"rows where {result.options.holdout_where}", frozenset(headings[1:]))


def _law(entry: FitEntry) -> str:
    group = f" [{entry.group}]" if entry.group else ""
    return f"{entry.target}{group}, {law_text(entry)}"


def _prediction_row(
    table: RunsTable, entry: FitEntry, each: PredictionAt, point: dict[str, float]
) -> tuple[tuple[str, ...], ...]:
    noun, of_each = data_noun(table)
    shown = {"params": ("N", 1.0), "tokens": (noun, of_each)}
    further = [
        f"{shown.get(name, (name, 1.0))[0]} {number(value / shown.get(name, (name, 1.0))[1])}"
        for name, value in each.at.items()
        if name not in point
    ]
    law = (
        _law(entry),
        *([f"best size: {', '.join(further)}"] if further else []),
    )
    prediction = each.prediction
    intervals = ((interval(prediction.curve_ci95),), (interval(prediction.new_run_ci95),))
    return law, (number(prediction.value),), *intervals


def _best(table: RunsTable, key: str, found: tuple[Allocation, ...]) -> ReportTable:
    noun, of_each = data_noun(table)
    headings = ("approach", "FLOPs", "best N (parameters)", f"best D ({noun})")
    rows = []
    for approach in found:
        for best in approach.best:
            data: tuple[str, ...] = ("–",)
            if best.tokens is not None:
                data = (number(best.tokens / of_each), interval(scaled(best.tokens_ci95, of_each)))
            far = (beyond_text(best.beyond),) if best.beyond != 1 else ()
            size = (number(best.params), interval(best.params_ci95), *far)
            without = (f"{approach.n_points} of {approach.n_points + approach.lost} budgets",) if approach.lost else ()
            rows.append(((approach.approach, *without), (number(best.budget),), size, data))
    return ReportTable(headings, rows, f"best size by {key}", frozenset(headings[1:]))
