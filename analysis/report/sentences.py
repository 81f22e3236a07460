"""The report's and the terminal's sentences, and how numbers stand in them."""

from analysis.checks.compare import INPUTS, Comparison
from analysis.checks.forecast import LargestBudgetCheck
from analysis.results import FitEntry, LawsResult, PredictionAt
from analysis.tables.table import RunsTable
from analysis.tables.units import NOUNS

SYMBOLS = {"alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "lambda": "λ"}


def law_text(entry: FitEntry) -> str:
    """A law's id, with what tells its two fits apart where a floor was measured."""
    name = entry.name.removeprefix(f"{entry.target} against {entry.x}: ")
    return name.removesuffix(f" [{entry.group}]") if entry.group else name


def parameter_text(entry: FitEntry, name: str) -> str:
    """A parameter with its interval, such as α = 0.347 [0.32, 0.38]."""
    text = f"{SYMBOLS.get(name, name)} = {number(entry.fitted.parameters[name])}"
    if name == "E" and entry.fitted.offset is not None:
        return text + " (pinned)"
    return f"{text} {interval(entry.uncertainty.ci95[name])}"


def headline(result: LawsResult) -> str:
    """The first thing to know: whether the prediction held, or the law that says most."""
    for name, check in result.checks.items():
        return check_sentence(check, name)
    entry = result.main(result.fits[0].target, result.fits[0].group)
    return f"{entry.name}: " + ", ".join(parameter_text(entry, name) for name in entry.fitted.law.parameters) + "."


def doubts(result: LawsResult) -> list[str]:
    """Whose sizes don't reach past the best ones: by the first target, for each group."""
    first = {name: grid for name, grid in result.grids.items() if grid.target == result.table.targets[0]}
    return [end_sentence(grid.best_end, name) for name, grid in first.items() if grid.best_end]


def end_sentence(end: str, name: str) -> str:
    """What it means that the best size is an end of the grid at every budget (`TargetGrid.best_end`)."""
    beyond = "smaller" if end == "smallest" else "larger"
    return (
        f"{name}: at every budget the {end} size of the grid is best; {beyond} ones may do better, so the frontier and "
        "its laws are those of this grid, not of the best models."
    )


def check_sentence(check: LargestBudgetCheck, name: str = "") -> str:
    """The held-out prediction in one sentence that says whether it held."""
    verdict = "held" if check.held else "did not hold"
    place = "inside" if check.inside else "outside"
    no_change = "no change would be exact"
    if check.baseline_error:
        share = abs(check.error) / abs(check.baseline_error)
        no_change = f"{share:.0%} of the error of no change ({_signed(check.baseline_error)})"
    return (
        f"Prediction {verdict}: best {name or check.target} at {number(check.budget)} FLOPs, "
        f"from {check.n_budgets} smaller budgets, {measured(check.predicted)} "
        f"[{measured(check.ci95[0])}, {measured(check.ci95[1])}]; observed {measured(check.observed)} ({place}), "
        f"off by {_signed(check.error)}, {no_change}."
    )


def comparison_sentence(each: Comparison, data: str = NOUNS["tokens"]) -> str:
    """Two groups in one sentence; `data` is what D counts."""
    parts = [
        f"{each.a} against {each.b} ({each.target}): exponent {each.exponent_difference:+.3g} "
        f"{interval(each.exponent_ci95)}"
    ]
    if each.loss_ratio is not None:
        shown = f" {interval(each.loss_ratio_ci95)}" if each.loss_ratio_ci95 else ""
        places = "budgets" if each.along == "flops" else "places"
        parts.append(f"value × {number(each.loss_ratio)}{shown} at {each.matched_budgets} matched {places}")
    what, unit = INPUTS.get(each.along, each.along), NOUNS.get(each.along, each.along)
    what, unit = (data, data) if each.along == "tokens" else (what, unit)
    parts.append(
        f"{each.a} needs × {number(each.compute_ratio)} {interval(each.compute_ratio_ci95)} the {what} to match "
        f"{each.b} at {number(each.at_flops)} {unit}"
    )
    return "; ".join(parts) + "."


def point_text(each: PredictionAt, data: str = NOUNS["tokens"]) -> str:
    """Where a prediction is made, with how far beyond the data; `data` is what D counts."""
    shown = {"tokens": data}
    parts = [f"{shown.get(name, name)} = {number(value)}" for name, value in each.at.items()]
    far = {name: value for name, value in each.extrapolation.items() if not 0.999 < value < 1.001}
    beyond = ", ".join(f"{shown.get(name, name)} × {number(value)}" for name, value in far.items())
    return ", ".join(parts) + (f" (beyond the data: {beyond})" if far else " (inside the data)")


def interval(pair: tuple[float, float] | None) -> str:
    """[low, high]; a dash for none."""
    return f"[{number(pair[0])}, {number(pair[1])}]" if pair else "–"


def number(value: float | None) -> str:
    """Four significant digits; powers of ten from a million on."""
    if value is None or value != value:
        return "–"
    if abs(value) == float("inf"):
        return "∞" if value > 0 else "−∞"
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def measured(value: float | None) -> str:
    """A value that was measured or is to be: four decimals; of small ones, or large ones, four significant digits."""
    return f"{value:.4f}" if value is not None and 1 <= abs(value) < 1e4 else number(value)


def _signed(error: float) -> str:
    return ("+" if error > 0 else "") + measured(error)


def percent(value: float | None) -> str:
    """An error with two decimals; a dash where there is none."""
    return "–" if value is None else f"{value:.2f}%"


def data_noun(table: RunsTable) -> tuple[str, float]:
    """What D counts where people read it, and how many of the table's D one of these is.

    Language models' tables count tokens. Tables whose D is in images count images, and so do sweeps of varscale, whose
    images have each as many tokens.
    """
    if {"tokens_seen", "images_seen"} <= set(table.measured.columns) and table.columns.get("tokens") == "tokens_seen":
        of_each = table.measured["tokens_seen"] / table.measured["images_seen"]
        if of_each.max() <= of_each.min() * (1 + 1e-6):
            return "images", float(of_each.median())
    return table.unit_of_data, 1.0


def scaled(pair: tuple[float, float] | None, unit: float) -> tuple[float, float] | None:
    """An interval in other units."""
    return pair and (pair[0] / unit, pair[1] / unit)


def beyond_text(factor: float) -> str:
    """How far a best size lies beyond those of the runs."""
    return f"{number(factor)} × the {'largest' if factor > 1 else 'smallest'} size"
