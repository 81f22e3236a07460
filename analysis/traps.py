"""Known traps of scaling-law fits, each with a code; docs/laws.md explains them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.bootstrap import leave_one_out, uneven
from analysis.descent import residuals_of
from analysis.fitting import Fit
from analysis.holdout import Heldout
from analysis.intervals import Uncertainty
from analysis.laws import NO_OFFSET, Array
from analysis.parametric import Allocation
from analysis.table import RunsTable

if TYPE_CHECKING:
    from analysis.results import FitEntry

CODES: dict[str, str] = {
    "approaches-disagree": "two ways of finding the best size give exponents whose intervals don't meet",
    "at-bound": "a parameter ended at the edge of what is allowed",
    "checkpoints": "rows are checkpoints of runs, not runs",
    "correlated-parameters": "N and D, or two parameters with both centred (geometric means), are correlated above .99",
    "decisive-point": "leaving out one row moves an exponent or the offset out of its interval",
    "edge-optimum": "the best size of a budget is the smallest or largest of the grid",
    "few-budgets": "fewer than four budgets",
    "few-sizes": "fewer than four sizes",
    "holdout-skipped": "the rows named could not be held out",
    "isoflop-refused": "no IsoFLOP minimum at a budget",
    "law-skipped": "a law was not fitted, because columns or rows are missing",
    "long-warmup": "the warm-up is longer than a quarter of the shortest run",
    "many-epochs": "runs saw their images more than four times",
    "minority-optimum": "fewer than half of the starts reached the best optimum",
    "missing-runs": "runs of the grid have no result",
    "mixed-evaluators": "values come from different evaluators, sample counts or guidance",
    "mixed-tokenizers": "losses come from different tokenizers",
    "not-monotone": "the target does not fall with x over the fitted rows",
    "offset-not-identified": "the data don't tell the offset E within 10%, or it drifts as budgets are added",
    "point-unused": "no law was fitted that takes a point asked for",
    "prediction-failed": "the held-out prediction of the largest budget did not hold",
    "repeated-rows": "rows repeat another row's values",
    "own-column": "the table uses a name for something else than it means here",
    "rows-excluded": "rows were left out",
    "uneven-scatter": "rows scatter around the law more at one end than at the other",
    "unlikely-units": "FLOPs a parameter and token are far from the usual 6",
    "undertrained-sizes": "a size saw far less data for its parameters than the best ones, at every budget",
    "worse-than-baseline": "held out, a simple baseline predicts better than the law",
}
_EVALUATOR_COLUMNS = ("evaluator", "extractor", "reference_set", "samples", "sample_count", "n_samples", "num_samples")
EVALUATOR_COLUMNS = (*_EVALUATOR_COLUMNS, "guidance", "cfg", "cfg_scale")
TOKENIZER_COLUMNS = ("tokenizer", "tokenizer_name", "vocab_size", "patch_nums")
FEWEST_SIZES = 4
LONGEST_WARMUP = 0.25
MOST_EPOCHS = 4.0
UNDERTRAINED = 1 / 30
LEAST_RATIO, MOST_RATIO = 0.05, 1e6
"""C / (N·D): a mixture of experts has less than 6, images instead of tokens give thousands."""
UNEVEN = 0.003
_DRIFT = 0.1
_FLAT = 1e-9
_COLLINEAR = 0.99
_DECISIVE_ERRORS = 5.0
_CLEARLY = 0.25
"""Share of an interval's half that a value lies beyond it; in clean tables of few rows one now and then just does."""
_MOST_ROWS_LEFT_OUT = 300


@dataclass(frozen=True)
class Caution:
    """Something a reader must know before trusting a number."""

    code: str
    message: str
    fit: str = ""


def of_table(table: RunsTable, grid: pd.DataFrame | None, checkpoints: bool) -> list[Caution]:
    """What is wrong with the rows, whatever is fitted to them."""
    frame = table.frame
    found = [
        Caution("rows-excluded", f"{len(each.rows)} rows left out: {each.reason} (rows {_some(each.rows)})")
        for each in table.exclusions
    ]
    if table.missing:
        share = f"{len(table.missing)} of {len(table.missing) + table.n_source} runs have no result"
        found.append(
            Caution("missing-runs", f"{share}, perhaps the best ones of their budgets: {_some(table.missing)}")
        )
    found += [Caution("own-column", text) for text in table.own]
    found += [Caution("repeated-rows", note) for note in table.notes if "repeat" in note]
    if "params" in frame.columns and (sizes := frame["params"].nunique()) < FEWEST_SIZES:
        needs = "four or more are needed for IsoFLOP minima and for a surface"
        found.append(Caution("few-sizes", f"{sizes} size{'s' if sizes > 1 else ''}; {needs}"))
    levels = grid["budget"] if grid is not None else frame["flops"] if "flops" in frame.columns else None
    if levels is not None and (budgets := levels.nunique()) < 4:
        found.append(Caution("few-budgets", f"{budgets} budget{'s' if budgets > 1 else ''}; four or more are needed"))
    if checkpoints:
        found.append(
            Caution(
                "checkpoints", "rows are checkpoints of runs: their rate hadn't decayed, and they aren't independent"
            )
        )
    for code, columns in (("mixed-evaluators", EVALUATOR_COLUMNS), ("mixed-tokenizers", TOKENIZER_COLUMNS)):
        for name in frame.columns:
            if _plain(name) in columns and (count := frame[name].nunique()) > 1:
                found.append(Caution(code, f"column {name} has {count} values; values that differ in it don't compare"))
    return (
        found + _units(frame) + _schedule(frame) + _undertrained(grid if grid is not None else frame, table.targets[0])
    )


def of_fit(
    name: str, fitted: Fit, uncertainty: Uncertainty, rows: pd.DataFrame, inputs: Sequence[str], values: Array
) -> list[Caution]:
    """What is wrong with one fit."""
    found = []
    if fitted.agreeing * 2 < fitted.starts:
        message = f"{name}: {fitted.agreeing} of {fitted.starts} starts reached the best optimum"
        found.append(Caution("minority-optimum", message, name))
    if fitted.at_bound:
        message = f"{name}: {', '.join(fitted.at_bound)} ended at the edge of what is allowed"
        found.append(Caution("at-bound", message, name))
    rising_share = values.max() < 1 and not name.startswith(("loss", "error"))  # accuracies are to rise
    if len(inputs) == 1 and fitted.law.name == "power" and fitted.parameters["alpha"] <= _FLAT and not rising_share:
        found.append(Caution("not-monotone", f"{name}: the target doesn't fall with x over these rows", name))
    if uneven(fitted) < UNEVEN:
        message = f"{name}: the residuals are larger at one end of the data than at the other"
        found.append(Caution("uneven-scatter", message, name))
    found += _correlated(name, fitted, uncertainty)
    found += _decisive(name, fitted, uncertainty, rows)
    if fitted.law.has_offset and fitted.offset is None:
        low, high = uncertainty.ci95["E"]
        offset = fitted.parameters["E"]
        if fitted.law.name != "power-floor" and (offset < 1e-3 * values.min() or (high - low) / 2 > _DRIFT * offset):
            message = f"{name}: E = {offset:.4g} [{low:.4g}, {high:.4g}] is not identified by {len(values)} rows"
            found.append(Caution("offset-not-identified", message, name))
    return found


def of_heldout(name: str, checks: Sequence[Heldout], offsets: Sequence[float], lowest: float) -> list[Caution]:
    """Held out: worse than a baseline, or an offset that drifts in one direction as rows are added.

    Args:
        name: of the fit.
        checks: held-out refits.
        offsets: E as rows are added, the last of all rows.
        lowest: the lowest value fitted; far below it an offset is zero, and doesn't drift.
    """
    found = []
    for check in checks:
        if check.beaten_by and not check.name.startswith("roll") and check.mean_percent > 0.1:
            message = (
                f"{name}, {check.name} held out: off by {check.mean_percent:.2f}%, "
                f"{check.beaten_by} by {check.baselines[check.beaten_by]:.2f}%"
            )
            found.append(Caution("worse-than-baseline", message, name))
    steps = np.diff(offsets)
    # Wandering to and fro is noise, which the interval tells; going one way is a law of another shape.
    one_way = len(steps) >= 2 and abs(steps.sum()) > 0.8 * np.abs(steps).sum()
    if one_way and abs(steps.sum()) > max(_DRIFT * abs(offsets[-1]), NO_OFFSET * lowest):
        message = f"{name}: E drifts from {offsets[0]:.4g} to {offsets[-1]:.4g} as budgets are added"
        found.append(Caution("offset-not-identified", message, name))
    return found


def without_companions(fits: Sequence["FitEntry"]) -> list["FitEntry"]:
    """One target's fits; a power law that stands beside a better law is not warned of for being worse."""
    better = any(
        entry.fitted.law.has_offset and not any(each.code == "worse-than-baseline" for each in entry.cautions)
        for entry in fits
    )

    def kept(entry: "FitEntry") -> tuple[Caution, ...]:
        companion = better and entry.fitted.law.name == "power"
        return tuple(each for each in entry.cautions if not (companion and each.code == "worse-than-baseline"))

    return [replace(entry, cautions=kept(entry)) for entry in fits]


def of_allocations(target: str, allocations: Sequence[Allocation]) -> list[Caution]:
    """Approaches whose exponents' intervals don't meet."""
    apart = ("isoflop-cubic", "isoflop-akima")  # other readings of the same minima
    known = [each for each in allocations if each.params_ci95 is not None and each.approach not in apart]
    intervals = [each.params_ci95 for each in known if each.params_ci95 is not None]
    if not intervals or max(low for low, _ in intervals) <= min(high for _, high in intervals):
        return []
    each_way = ", ".join(f"{each.params_exponent:.3f} by {each.approach}" for each in known)
    return [Caution("approaches-disagree", f"{target}: N_opt grows as C to the power {each_way}")]


def _units(frame: pd.DataFrame) -> list[Caution]:
    """FLOPs a parameter and token that no model has: a unit was forgotten."""
    if not {"params", "tokens", "flops"} <= set(frame.columns):
        return []
    ratio = float((frame["flops"] / frame["params"] / frame["tokens"]).median())
    if LEAST_RATIO < ratio < MOST_RATIO:
        return []
    message = f"C / (N·D) is {ratio:.2g}, where 6 is usual; say units, such as --unit flops=PFLOP or --unit params=M"
    return [Caution("unlikely-units", message)]


def _schedule(frame: pd.DataFrame) -> list[Caution]:
    found = []
    named = {_plain(name): name for name in frame.columns}
    for pair in (("warmup_images", "images_seen"), ("warmup_steps", "steps")):
        if not named.keys() >= set(pair):
            continue
        warmup, length = (pd.to_numeric(frame[named[name]], errors="coerce") for name in pair)
        share = float((warmup / length).max())
        if share > LONGEST_WARMUP:
            found.append(Caution("long-warmup", f"the warm-up is {share:.0%} of the shortest run"))
    epochs = pd.to_numeric(frame["epochs"], errors="coerce") if "epochs" in frame.columns else pd.Series(dtype=float)
    if (most := float(epochs.max())) > MOST_EPOCHS:
        found.append(Caution("many-epochs", f"a run saw its images {most:.1f} times; new images count for more"))
    return found


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _undertrained(frame: pd.DataFrame, target: str) -> list[Caution]:
    """Sizes whose longest run has far fewer tokens a parameter than the best run of the largest budget."""
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
    message = f"sizes {names} have at most {poor.max():.2g} tokens a parameter; the best run has {own:.3g}"
    return [Caution("undertrained-sizes", message)]


def _correlated(name: str, fitted: Fit, uncertainty: Uncertainty) -> list[Caution]:
    if len(fitted.problem.law.inputs) < 2:
        return []
    collinear = abs(float(np.asarray(np.corrcoef(fitted.problem.log_inputs_In))[0, 1]))
    if collinear > _COLLINEAR:
        message = f"{name}: N and D of the rows are correlated {collinear:.3f}: the rows can't tell alpha from beta"
        return [Caution("correlated-parameters", message, name)]
    worst = np.abs(uncertainty.correlations - np.diag(np.diag(uncertainty.correlations)))
    if worst.max() <= 0.99:
        return []
    first, second = np.unravel_index(int(worst.argmax()), worst.shape)
    message = f"{name}: {fitted.problem.free[first]} and {fitted.problem.free[second]} are correlated {worst.max():.3f}"
    return [Caution("correlated-parameters", message, name)]


def _decisive(name: str, fitted: Fit, uncertainty: Uncertainty, rows: pd.DataFrame) -> list[Caution]:
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
            error_n = error_n * values if parameter == "E" else error_n  # θ holds its logarithm
            outside_n |= np.abs(values - fitted.parameters[parameter]) > _DECISIVE_ERRORS * error_n
        outside = np.flatnonzero(outside_n)
        if parameter in ("alpha", "beta", "E") and len(outside):
            worst = outside[np.argmax(np.abs(values[outside] - fitted.parameters[parameter]))]
            label = rows["row"].iloc[int(worst)] if "row" in rows.columns else str(int(worst) + 1)
            message = (
                f"{name}: without row {label}, {parameter} is {values[worst]:.4g} "
                f"instead of {fitted.parameters[parameter]:.4g}"
            )
            return [Caution("decisive-point", message, name)]
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


def _some(rows: tuple[str, ...]) -> str:
    return ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
