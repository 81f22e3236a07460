"""Known traps of scaling-law fits: each has a code, and a warning where a table or a fit falls into it.

docs/laws.md explains the codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.checks.forecast import Forecast
from analysis.checks.holdout import Heldout
from analysis.fitting.bootstrap import leave_one_out, uneven
from analysis.fitting.fit import Fit
from analysis.fitting.intervals import Uncertainty
from analysis.fitting.laws.base import NO_OFFSET, OFFSET, Array, is_exponent
from analysis.fitting.newton import residuals_of
from analysis.grids.allocation import Allocation
from analysis.grids.grid import TargetGrid
from analysis.grids.grid_bias import bias_text
from analysis.grids.isoflop import MINIMUM_SIZES
from analysis.tables.epochs import epochs
from analysis.tables.evaluations import is_evaluation
from analysis.tables.experts import active_params
from analysis.tables.repeats import REPEATED
from analysis.tables.roles import plain_name, some
from analysis.tables.table import RunsTable, mixtures
from analysis.tables.units import NOUNS, parse_units, unit_in_name

CODES: dict[str, str] = {
    "approaches-disagree": "two ways of finding the best size give exponents whose intervals don't meet",
    "at-bound": "a parameter ended at the edge of what is allowed",
    "below-floor": "values lie at or below the floor that was measured",
    "beyond-one": "a rising power law of values up to 1 predicts more than 1",
    "checkpoints": "rows are checkpoints of runs, not runs",
    "copied-rows": "groups share rows word for word",
    "correlated-parameters": "N and D, or two parameters with both centred (geometric means), are correlated above .99",
    "decisive-point": "leaving out one row moves an exponent or the offset out of its interval",
    "edge-optimum": "the best size of a budget is the smallest or largest of the grid",
    "few-budgets": "fewer than four budgets",
    "few-sizes": "fewer than four sizes",
    "frontier-possible": "a law of compute is fitted to runs that are not the best of their compute",
    "frontier-taken": "a law of compute is fitted to those of scattered runs that none of less compute beats",
    "holdout-skipped": "the rows named could not be held out",
    "isoflop-refused": "no IsoFLOP minimum at a budget",
    "late-start": "runs begin after steps whose learning rates are not known",
    "law-skipped": "a law was not fitted, because columns or rows are missing",
    "logarithms": "values look like logarithms",
    "long-warmup": "the warm-up is longer than a quarter of the shortest run",
    "many-epochs": "runs saw their data more than four times",
    "minority-optimum": "fewer than half of the starts reached the best optimum",
    "missing-runs": "runs of the grid have no result",
    "mixed-evaluators": "values come from different evaluators, sample counts or guidance",
    "mixed-precision": "values come from runs of different numerical precision",
    "mixed-rows": "rows alike in N, C and D differ in another column, so they are no repetitions",
    "mixed-tokenizers": "losses come from different tokenizers, or are measured in different units",
    "not-monotone": "the target goes the other way over the fitted rows than a power law does",
    "not-optima": "sizes of runs are fitted as if they were best sizes",
    "odd-epochs": "epochs are not tokens over unique tokens",
    "odd-flops": "FLOPs don't behave like training FLOPs",
    "offset-not-identified": "the data don't tell the offset E within 10%, or it drifts as budgets are added",
    "parabola-bias": "on this grid parabolas would miss the best sizes even without noise",
    "point-unused": "no law was fitted that takes a point or budget asked for",
    "prediction-failed": "the held-out prediction of the largest budget did not hold",
    "repeated-rows": "rows repeat another row's values",
    "outlying-rows": "rows lie far above the law, as runs that diverged do",
    "own-column": "the table uses a name for something else than it means here",
    "rows-excluded": "rows were left out",
    "same-column": "two roles have the same values",
    "uneven-scatter": "rows scatter around the law more at one end than at the other",
    "unlikely-units": "FLOPs a parameter and token are far from the usual 6",
    "unfit-tokenizer": "runs were trained on a tokenizer whose own figures speak against it",
    "several-peaks": "runs under a law of learning rates anneal from several peak rates",
    "undertrained-sizes": "a size saw far less data for its parameters than the best ones, at every budget",
    "warm-up-rows": "rows of a warm-up are fitted by a law of learning rates",
    "worse-than-baseline": "held out, a simple baseline predicts better than the law",
}
LONGEST_WARMUP = 0.25
MOST_EPOCHS = 4.0
UNDERTRAINED = 1 / 30
LEAST_DATA, MOST_DATA = 1e-6, 1e8
"""D / N, or C / (6·N²)."""
_SMALL = 1e6
"""Larger numbers than this and their unit are counted in ones, whatever the column is called."""
LEAST_RATIO, MOST_RATIO = 0.05, 1e6
"""C / (N·D): a mixture of experts has less than 6, images instead of tokens give thousands."""
UNEVEN = 0.003
_FEW_RUNS = 5
_DRIFT = 0.1
_FLAT = 1e-9
_COLLINEAR = 0.99
_DECISIVE_ERRORS = 5.0
_CLEARLY = 0.25
"""Share of an interval's half that a value lies beyond it; in clean tables of few rows one now and then just does."""
_SHOWN = 5e-4
"""Smaller changes don't show in four digits."""
_MOST_ROWS_LEFT_OUT = 300
_FAR, _FAR_DEVIATIONS = 0.4, 20.0
"""How far above the law, in logarithms and in median residuals, no noise between runs reaches."""


@dataclass(frozen=True)
class LawWarning:
    """Something a reader must know before trusting a number."""

    code: str
    message: str
    fit: str = ""


def table_warnings(table: RunsTable, grid: pd.DataFrame | None, checkpoints: bool) -> list[LawWarning]:
    """What is wrong with the rows, whatever is fitted to them."""
    frame = table.frame
    found = [
        LawWarning("rows-excluded", f"{len(each.rows)} rows left out: {each.reason} (rows {some(each.rows)})")
        for each in table.exclusions
    ]
    if table.missing:
        share = f"{len(table.missing)} of {len(table.missing) + table.n_runs} runs have no result"
        message = f"{share}, perhaps the best ones of their budgets: {some(table.missing)}"
        found.append(LawWarning("missing-runs", message))
    found += [LawWarning("own-column", text) for text in table.own]
    found += [LawWarning(code, text) for code, text in table.evaluations]
    found += [LawWarning("repeated-rows", note) for note in table.notes if note.endswith(REPEATED)]
    if "params" in frame.columns and (sizes := frame["params"].nunique()) < MINIMUM_SIZES:
        needs = "four or more are needed for IsoFLOP minima and for a surface"
        found.append(LawWarning("few-sizes", f"{sizes} size{'s' if sizes > 1 else ''}; {needs}"))
    levels = grid["budget"] if grid is not None else frame["flops"] if "flops" in frame.columns else None
    if levels is not None and (budgets := levels.nunique()) < 4:
        found.append(
            LawWarning("few-budgets", f"{budgets} budget{'s' if budgets > 1 else ''}; four or more are needed")
        )
    if checkpoints:
        message = "rows are checkpoints of runs: their rate hadn't decayed, and they aren't independent"
        if (runs := frame["run_id"].nunique()) < _FEW_RUNS:
            message += f"; draws of {runs} runs say little of how sure anything is"
        found.append(LawWarning("checkpoints", message))
    found += [LawWarning(code, text) for code, text in mixtures(frame) if code]
    found += _unfit_tokenizer(frame)
    starved = _undertrained(grid if grid is not None else frame, table.targets[0], table.unit_of_data)
    return [*found, *_units(table), *_schedule(table), *starved]


def fit_warnings(
    name: str, fitted: Fit, uncertainty: Uncertainty, rows: pd.DataFrame, inputs: Sequence[str], values: Array
) -> list[LawWarning]:
    """What is wrong with one fit."""
    found = []
    if fitted.agreeing * 2 < fitted.starts:
        message = f"{name}: {fitted.agreeing} of {fitted.starts} starts reached the best optimum"
        found.append(LawWarning("minority-optimum", message, name))
    if fitted.at_bound:
        message = f"{name}: {', '.join(fitted.at_bound)} ended at the edge of what is allowed"
        found.append(LawWarning("at-bound", message, name))
    rising_share = values.max() < 1 and not (
        name.startswith(("loss", "error")) or is_evaluation(name)
    )  # accuracies are to rise
    way = {"rising-power": "rise"} | ({} if rising_share else {"power": "fall"})
    if fitted.law.name in way and fitted.parameters["alpha"] <= _FLAT:
        message = f"{name}: the target doesn't {way[fitted.law.name]} with x over these rows"
        found.append(LawWarning("not-monotone", message, name))
    if uneven(fitted) < UNEVEN:
        message = f"{name}: the residuals are larger at one end of the data than at the other"
        found.append(LawWarning("uneven-scatter", message, name))
    if far := outlying(fitted, rows):
        found.append(LawWarning("outlying-rows", f"{name}: {far}", name))
    found += _correlated(name, fitted, uncertainty)
    found += _decisive(name, fitted, uncertainty, rows)
    if fitted.law.has_offset and fitted.offset is None:
        low, high = uncertainty.ci95[OFFSET]
        offset = fitted.parameters[OFFSET]
        if fitted.law.name != "power-floor" and (offset < 1e-3 * values.min() or (high - low) / 2 > _DRIFT * offset):
            message = f"{name}: E = {offset:.4g} [{low:.4g}, {high:.4g}] is not identified by {len(values)} rows"
            if term := fitted.law.like_an_offset:
                message += f": the term with {term} may stand for it"
            found.append(LawWarning("offset-not-identified", message, name))
    return found


def heldout_warnings(name: str, checks: Sequence[Heldout], offsets: Sequence[float], lowest: float) -> list[LawWarning]:
    """Held out: worse than a baseline, or an offset that drifts in one direction as rows are added.

    Args:
        name: name of the fit.
        checks: held-out refits.
        offsets: E as rows are added; the last one is that of all rows.
        lowest: the lowest value fitted; far below it an offset is zero, and doesn't drift.
    """
    found = []
    for check in checks:
        if check.beaten_by and not check.name.startswith("roll") and check.mean_percent > 0.1:
            message = (
                f"{name}, {check.name} held out: off by {check.mean_percent:.2f}%, "
                f"{check.beaten_by} by {check.baselines[check.beaten_by]:.2f}%"
            )
            found.append(LawWarning("worse-than-baseline", message, name))
    steps = np.diff(offsets)
    # Wandering to and fro is noise, which the interval tells; going one way is a law of another shape.
    one_way = len(steps) >= 2 and abs(steps.sum()) > 0.8 * np.abs(steps).sum()
    if one_way and abs(steps.sum()) > max(_DRIFT * abs(offsets[-1]), NO_OFFSET * lowest):
        message = f"{name}: E drifts from {offsets[0]:.4g} to {offsets[-1]:.4g} as budgets are added"
        found.append(LawWarning("offset-not-identified", message, name))
    return found


def grid_warnings(grid: TargetGrid, forecast: Forecast, first: bool) -> list[LawWarning]:
    """What the grid doesn't reach; that is much the same for all losses, so it is said of the first one and of FID."""
    found = []
    target, refused = grid.target, [each for each in grid.minima if each.refused]
    if refused and first:
        budgets = some(tuple(f"{each.budget:.3g}" for each in refused))
        message = f"{target}: no IsoFLOP minimum at {len(refused)} of {len(grid.minima)} budgets ({budgets} FLOPs)"
        end = refused[-1].end
        flat = (
            f"; a line through the others tends to sizes too {'small' if end == 'largest' else 'large'}" if end else ""
        )
        found.append(LawWarning("isoflop-refused", f"{message}; {refused[-1].refused}{flat}"))
    sizes = grid.cells["params"]
    edge = grid.frontier[grid.frontier["params"].isin([sizes.min(), sizes.max()])]
    if len(edge) and sizes.nunique() > 1 and first:
        budgets = some(tuple(f"{each:.3g}" for each in edge["budget"]))
        message = f"{target}: the best size is at the edge of the grid at {budgets} FLOPs"
        found.append(LawWarning("edge-optimum", message))
    if forecast.check and not forecast.check.held:
        message = f"{target}: the prediction of the largest budget did not hold"
        found.append(LawWarning("prediction-failed", message))
    return found


def allocation_warnings(target: str, allocations: Sequence[Allocation]) -> list[LawWarning]:
    """Parabolas that this grid biases, and approaches whose exponents' intervals don't meet."""
    found = []
    parabola = next((each for each in allocations if each.approach == "isoflop-parabola"), None)
    if parabola is not None and parabola.bias is not None and parabola.bias.large:
        message = (
            f"{target}: simulated without noise on this grid, parabolas miss the surface: {bias_text(parabola.bias)}"
        )
        found.append(LawWarning("parabola-bias", message))
    apart = ("isoflop-cubic", "isoflop-akima")  # other readings of the same minima
    known = [each for each in allocations if each.params_ci95 is not None and each.approach not in apart]
    intervals = [each.params_ci95 for each in known if each.params_ci95 is not None]
    if not intervals or max(low for low, _ in intervals) <= min(high for _, high in intervals):
        return found
    each_way = ", ".join(f"{each.params_exponent:.3f} by {each.approach}" for each in known)
    return [*found, LawWarning("approaches-disagree", f"{target}: N_opt grows as C to the power {each_way}")]


def _units(table: RunsTable) -> list[LawWarning]:
    """Units that columns' names state and nobody gave, or that no model has."""
    frame, examples = table.frame, "say units, such as --unit flops=PFLOP or --unit params=M"
    stated = [(role, name, unit_in_name(role, name)) for role, name in table.columns.items() if role in NOUNS]
    found = [
        f"column {name!r} seems to be in {unit}: say --unit '{role}={unit}'"
        for role, name, unit in stated
        if unit
        and role not in table.units
        and frame[role].max() < max(_SMALL, parse_units((f"{role}={unit}",))[role].factor)
    ]
    if not found and {"params", "flops"} <= set(frame.columns):
        active = active_params(table)
        of_six = frame["flops"] / (frame["params"] if active is None else active) / 6
        tokens = frame["tokens"] if "tokens" in frame.columns else of_six
        ratio, per_size = float((6 * of_six / tokens).median()), float((tokens / frame["params"]).median())
        if not LEAST_RATIO < ratio < MOST_RATIO:
            found = [f"C / (N·D) is {ratio:.2g}, where 6 is usual; {examples}"]
        elif not LEAST_DATA < per_size < MOST_DATA:
            found = [f"C, N or D would mean {per_size:.2g} {table.unit_of_data} a parameter; {examples}"]
    return [LawWarning("unlikely-units", message) for message in found]


def _unfit_tokenizer(frame: pd.DataFrame) -> list[LawWarning]:
    """Runs that a sweep was told to train although it had found faults of their tokenizer."""
    if "tokenizer_faults" not in frame.columns:
        return []
    faults = frame["tokenizer_faults"].dropna().astype(str).str.strip()
    return [
        LawWarning("unfit-tokenizer", f"{count} of {len(frame)} runs: their tokenizer was accepted although {text}")
        for text, count in faults[faults != ""].value_counts().items()
    ]


def _schedule(table: RunsTable) -> list[LawWarning]:
    found, frame = [], table.frame
    named = {plain_name(name): name for name in frame.columns}
    for pair in (("warmup_images", "images_seen"), ("warmup_steps", "steps")):
        if not named.keys() >= set(pair):
            continue
        warmup, length = (pd.to_numeric(frame[named[name]], errors="coerce") for name in pair)
        share = float((warmup / length).max())
        if share > LONGEST_WARMUP:
            found.append(LawWarning("long-warmup", f"the warm-up is {share:.0%} of the shortest run"))
    if (most := float(epochs(table).max())) > MOST_EPOCHS:
        found.append(LawWarning("many-epochs", f"a run saw its data {most:.1f} times; new data count for more"))
    return found


def _undertrained(frame: pd.DataFrame, target: str, data: str) -> list[LawWarning]:
    """Sizes whose longest run has far fewer tokens (or other `data`) a parameter than the largest budget's best."""
    if not {"params", "tokens", "flops", target} <= set(frame.columns):
        return []
    level = "budget" if "budget" in frame.columns else "flops"
    top = frame[frame[level] >= 0.5 * frame[level].max()]
    if top[target].isna().all():
        return []
    vary = frame[[target, "flops"]].nunique().min() > 1
    rises = vary and frame[target].corr(frame["flops"], method="spearman") > 0  # an accuracy
    best = top.loc[top[target].idxmax() if rises else top[target].idxmin()]
    ratio = (frame["tokens"] / frame["params"]).groupby(frame["params"]).max()
    own = float(best["tokens"] / best["params"])
    # a size of one budget only is an end of that budget's bowl
    repeated = frame.groupby("params")[level].nunique() > 1
    limit = np.where(repeated, UNDERTRAINED, UNDERTRAINED / 10) * own
    poor = ratio[(ratio < limit) & (ratio < 1.0)]
    if not len(poor):
        return []
    names = ", ".join(f"{size:.3g}" for size in poor.index)
    message = f"sizes {names} have at most {poor.max():.2g} {data} a parameter; the best run has {own:.3g}"
    return [LawWarning("undertrained-sizes", message)]


def _correlated(name: str, fitted: Fit, uncertainty: Uncertainty) -> list[LawWarning]:
    if len(fitted.problem.law.inputs) < 2:
        return []
    collinear = abs(float(np.asarray(np.corrcoef(fitted.problem.log_inputs_In))[0, 1]))
    if collinear > _COLLINEAR:
        message = f"{name}: N and D of the rows are correlated {collinear:.3f}: the rows can't tell alpha from beta"
        return [LawWarning("correlated-parameters", message, name)]
    worst = np.abs(uncertainty.correlations - np.diag(np.diag(uncertainty.correlations)))
    if worst.max() <= 0.99:
        return []
    first, second = np.unravel_index(int(worst.argmax()), worst.shape)
    message = f"{name}: {fitted.problem.free[first]} and {fitted.problem.free[second]} are correlated {worst.max():.3f}"
    return [LawWarning("correlated-parameters", message, name)]


def outlying(fitted: Fit, rows: pd.DataFrame) -> str:
    """Which rows lie so far above a law that follows the others that they may have diverged; a line, or nothing."""
    above_n = fitted.law.linked(fitted.y_n) - fitted.problem.evaluate(fitted.theta_P[None])[0][0]
    far_n = (above_n > _FAR) & (above_n > _FAR_DEVIATIONS * np.median(np.abs(above_n)))
    if len(rows) < 2 * fitted.free_count or not far_n.any():
        return ""
    label = rows["row"] if "row" in rows.columns else pd.Series(range(1, len(rows) + 1))
    named, values = some(tuple(label[far_n].astype(str))), fitted.y_n[far_n]
    return (
        f"rows {named} lie far above the law that others follow ({values.min():.4g} and more): did they diverge? They "
        "widen intervals; --where leaves them out"
    )


def _decisive(name: str, fitted: Fit, uncertainty: Uncertainty, rows: pd.DataFrame) -> list[LawWarning]:
    """One row without which an exponent or the offset leaves its interval, or moves by many of the rest's own errors.

    The interval alone would miss a row that widens it.
    """
    count = len(fitted.y_n)
    if not 4 <= count <= 2000 or count <= fitted.free_count + 1:
        return []
    theta_nP = leave_one_out(fitted)
    natural_nP = fitted.problem.natural(theta_nP)
    errors_nP = _errors_without_each(fitted, theta_nP) if count <= _MOST_ROWS_LEFT_OUT else None
    for place, parameter in enumerate(fitted.law.parameters):
        low, high = uncertainty.ci95[parameter]
        values = natural_nP[:, place]
        margin = _CLEARLY * (high - low) / 2
        outside_n = (values < low - margin) | (values > high + margin)
        if errors_nP is not None and parameter in fitted.problem.free:
            error_n = errors_nP[:, fitted.problem.free.index(parameter)]
            error_n = error_n * values if parameter == OFFSET else error_n  # θ holds its logarithm
            outside_n |= np.abs(values - fitted.parameters[parameter]) > _DECISIVE_ERRORS * error_n
        outside = np.flatnonzero(outside_n & (np.abs(values - fitted.parameters[parameter]) > _SHOWN * np.abs(values)))
        if (parameter == OFFSET or is_exponent(parameter)) and len(outside):
            worst = outside[np.argmax(np.abs(values[outside] - fitted.parameters[parameter]))]
            label = rows["row"].iloc[int(worst)] if "row" in rows.columns else str(int(worst) + 1)
            message = (
                f"{name}: without row {label}, {parameter} is {values[worst]:.4g} "
                f"instead of {fitted.parameters[parameter]:.4g}"
            )
            return [LawWarning("decisive-point", message, name)]
    return []


def _errors_without_each(fitted: Fit, theta_nP: Array) -> Array:
    """Standard errors of θ from all rows but one, each in turn, to first order."""
    rows, free = theta_nP.shape
    if rows - 1 - free < 3:
        return np.full_like(theta_nP, np.inf)
    residuals_nn = residuals_of(fitted.problem, fitted.y_n, theta_nP, raw=False)[0]
    kept_nn = 1.0 - np.eye(rows)
    variance_n = (kept_nn * residuals_nn**2).sum(axis=1) / (rows - 1 - free)
    unit_nP = np.einsum("spp->sp", fitted.problem.covariance(theta_nP, kept_nn))
    return np.asarray(np.sqrt(unit_nP.clip(0.0) * variance_n[:, None]))
