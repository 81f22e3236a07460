"""The bootstrap: refits of resampled tables, thousands at a time.

Letters: S draws, n rows, P free parameters.

Draws share the rows of the fit, each with its own weights (case bootstrap: how often a row was drawn; rows of one run
are drawn together where rows are checkpoints) or with its own values (parametric bootstrap: the fitted curve plus
normal errors). So all draws are minimised together, from the fit's own optimum.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from analysis.fitting import profile_likelihood
from analysis.fitting.fit import Fit
from analysis.fitting.laws.base import OFFSET, Array
from analysis.fitting.likelihood_region import ROWS_FOR_VALLEYS, Region
from analysis.fitting.newton import Objective, minimise

MANY_ROWS = 1000
"""Above so many, one Newton step a draw takes the place of a refit (not for very few runs)."""
PROFILED_ROWS = 5000
"""Up to so many, offsets that rows don't tell are profiled."""
BY_RUN, BY_CELL = "case bootstrap by run", "case bootstrap by cell"
_SMOOTH = 20
"""Sums over fewer drawn runs are too uneven for one Newton step."""
_ENOUGH, _MANY_UNITS = 10, 100
"""Fewer units don't show whether their scatter is even; nor, with fewer than a hundred, heavy tails."""
_UNEVEN = 0.05
_UNSURE = 0.12
"""Standard error of log E beyond which refits from one optimum don't tell an offset's interval."""
_DECILES_APART = 2.5631031
_CHUNKS = (32, 512)
_ELEMENTS = 32_000


@dataclass(frozen=True)
class Draws:
    """Parameters of refits.

    Attributes:
        method: what was resampled, in words.
        theta_SP: internal parameters, one row a draw.
        units: how many independent units (rows or runs) were resampled.
        region: the 95% region, where intervals are a quantity's range in it rather than from the draws' spread.
    """

    method: str
    theta_SP: Array
    units: int
    region: Region | None = None

    @property
    def of_runs(self) -> bool:
        """Whether whole runs were drawn, with all their checkpoints."""
        return self.method == BY_RUN

    def interval(self, estimate: float, of: Callable[[Array], Array], quantile: float) -> tuple[float, float]:
        """The 95% interval of a quantity: the estimate ± `quantile` times the draws' spread.

        Draws of runs are few values drawn again and again, far from normal: there it is the draws' own 2.5% and 97.5%
        quantiles.

        Args:
            estimate: its value at the fit.
            of: its values at many θ.
            quantile: Student's t.
        """
        if self.of_runs:
            low, high = np.quantile(of(self.theta_SP), [0.025, 0.975])
            return min(float(low), estimate), max(float(high), estimate)
        half = quantile * self.spread(of(self.theta_SP))
        return estimate - half, estimate + half

    def spread(self, drawn_S: Array) -> float:
        """Size of the draws' scatter: their standard deviation, or for parametric draws what their deciles say.

        Refits to small tables now and then end far away, where the offset vanishes; deciles don't notice.
        """
        if self.method.startswith("case"):
            with np.errstate(over="ignore", invalid="ignore"):  # coefficients of inputs beyond 1e150
                return float(drawn_S.std(ddof=1))
        return decile_spread(drawn_S)


def decile_spread(drawn_S: Array) -> float:
    """Standard deviation of a normal distribution with the first and last decile of the draws."""
    low, high = np.quantile(drawn_S, [0.1, 0.9])
    return float((high - low) / _DECILES_APART)


def resample(
    fitted: Fit, draws: int, seed: int, clusters: NDArray[Any] | None = None, repeats: NDArray[Any] | None = None
) -> Draws:
    """Case bootstrap where rows scatter unevenly or with heavy tails, and of runs; parametric otherwise.

    Normal errors are tried first because cases are noisy: where few of a hundred rows decide a prediction, its interval
    is 10% wider on average and varies by 20%. Where the rows don't tell the offset, draws are of all offsets that they
    leave possible.

    Args:
        fitted: the fit.
        draws: how many refits.
        seed: seed of the random numbers.
        clusters: a label for each row; rows with the same label (checkpoints of a run) are drawn together, however few.
        repeats: labels like these for rows that differ only in their seed, used where cases are drawn.
    """
    labels, units = _labels(len(fitted.y_n), clusters if clusters is not None else repeats)
    hardly = len(fitted.y_n) <= PROFILED_ROWS and (offset_error(fitted) > _UNSURE or _has_second_offset(fitted))
    cases = clusters is not None or _need_cases(fitted, labels, units)
    if clusters is None and (hardly or (_is_skewed(fitted) and not cases)):
        drawn_SP, region = profile_likelihood.possible(fitted.problem, fitted.y_n, fitted.theta_P, draws, seed)
        return Draws("profile likelihood along the offset", drawn_SP, len(fitted.y_n), region)
    if len(fitted.y_n) > MANY_ROWS and units >= _SMOOTH:
        return one_step(fitted, draws, seed, labels)
    if cases:
        return case(fitted, draws, seed, labels, "cell" if clusters is None else "run")
    return parametric(fitted, draws, seed)


def _is_skewed(fitted: Fit) -> bool:
    """A law of four parameters or more with an offset, fitted to rows of up to a thousand: its draws are skewed.

    Student's t isn't; and refits near one optimum miss the others that such laws have (a level, a place, a steepness).
    """
    several = OFFSET in fitted.problem.free and fitted.free_count > 3
    return several and not fitted.objective.raw and len(fitted.y_n) <= MANY_ROWS


def _need_cases(fitted: Fit, labels: NDArray[np.intp], units: int) -> bool:
    """Whether residuals are visibly no independent normal errors of one size: drawn cases keep what they are.

    A hundred units show heavy tails (Anscombe & Glynn's test), and whether those of one cell are alike (F test).
    """
    residuals_n = fitted.residuals_n
    if units < _ENOUGH or np.ptp(residuals_n) == 0:
        return False
    likelihoods = [uneven(fitted)]
    if units >= _MANY_UNITS:
        likelihoods.append(stats.kurtosistest(residuals_n, alternative="greater").pvalue)
        if units < len(residuals_n):
            likelihoods.append(stats.f_oneway(*(residuals_n[labels == unit] for unit in range(units))).pvalue)
    return min(likelihoods) < _UNEVEN


def _has_second_offset(fitted: Fit) -> bool:
    """Whether another term may stand for the offset, however well the rows seem to tell it at the best fit."""
    few = len(fitted.y_n) <= ROWS_FOR_VALLEYS
    return few and OFFSET in fitted.problem.free and fitted.law.like_an_offset is not None


def case(fitted: Fit, draws: int, seed: int, clusters: NDArray[Any] | None = None, cluster: str = "run") -> Draws:
    """Refits to rows (or clusters of rows) drawn with replacement, as many as there are."""
    generator = np.random.default_rng(seed)
    labels, units = _labels(len(fitted.y_n), clusters)

    def chunk(count: int) -> tuple[Array, Array]:
        return fitted.y_n, _drawn_counts(generator, count, units)[:, labels]

    method = "case bootstrap" if units == len(labels) else BY_CELL if cluster == "cell" else BY_RUN
    return Draws(method, _refit(fitted, draws, chunk), units)


def one_step(fitted: Fit, draws: int, seed: int, clusters: NDArray[Any] | None = None) -> Draws:
    """The case bootstrap with one Newton step a draw instead of a refit: the same to first order in 1/√n.

    A loss that is linear in the residuals has no curvature of its own; there it is the density of residuals around
    zero, counted within a narrow band.
    """
    generator = np.random.default_rng(seed)
    rows = len(fitted.y_n)
    labels, units = _labels(rows, clusters)
    u_1n, shares_J1n = fitted.problem.evaluate(fitted.theta_P[None])
    jacobian_nP = fitted.problem.jacobian(fitted.theta_P[None], shares_J1n)[0]
    if fitted.objective.raw:
        jacobian_nP = jacobian_nP * fitted.law.respond(u_1n[0])[:, None]
    residuals_n, delta = fitted.residuals_n, fitted.objective.final_delta
    pull_n, curvature = residuals_n, 1.0
    if delta is not None:
        band = max(delta, 0.3 * float(np.median(np.abs(residuals_n))) * (rows / 1000) ** -0.2)
        pull_n = np.clip(residuals_n, -delta, delta)
        curvature = delta * float((np.abs(residuals_n) < band).mean()) / band
    steps_nP = (pull_n[:, None] * jacobian_nP) @ np.linalg.inv(curvature * jacobian_nP.T @ jacobian_nP)
    sums_UP = np.stack([np.bincount(labels, weights=column, minlength=units) for column in steps_nP.T], axis=1)
    sums_UP -= sums_UP.mean(axis=0)
    drawn = [_drawn_counts(generator, 1, units) @ sums_UP for _ in range(draws)]
    return Draws("case bootstrap, one step", fitted.theta_P + np.concatenate(drawn), units)


def parametric(fitted: Fit, draws: int, seed: int) -> Draws:
    """Refits to the fitted curve plus normal errors of the residuals' size (n - p degrees of freedom)."""
    generator = np.random.default_rng(seed)
    u_n = fitted.problem.evaluate(fitted.theta_P[None])[0][0]
    rows = len(fitted.y_n)
    size = scatter(fitted)

    def chunk(count: int) -> tuple[Array, Array]:
        errors_Sn = size * generator.standard_normal((count, rows))
        if fitted.objective.raw:
            lowest = 1e-3 * float(fitted.y_n.min())
            return np.maximum(fitted.law.respond(u_n) + errors_Sn, lowest), np.ones((count, rows))
        return fitted.law.respond(u_n + errors_Sn), np.ones((count, rows))

    return Draws("parametric bootstrap", _refit(fitted, draws, chunk), rows)


def offset_error(fitted: Fit) -> float:
    """Standard error of log E to first order: how little the rows tell of a free offset. 0 without one."""
    if OFFSET not in fitted.problem.free:
        return 0.0
    place, rows = fitted.problem.free.index(OFFSET), len(fitted.y_n)
    variance = fitted.problem.covariance(fitted.theta_P[None], np.ones((1, rows)))[0, place, place]
    around = scatter(fitted) / fitted.y_n.mean() if fitted.objective.raw else scatter(fitted)
    return float(around * np.sqrt(max(variance, 0.0)))


def scatter(fitted: Fit) -> float:
    """Standard deviation of a row around the law, in the residuals' space.

    The sum of squares around a least-squares fit is (n - p)σ² on average; around a fit of least absolute deviations it
    is larger by p(π/2 - 1)σ² for normal errors, because that fit's variance is π/2 times as large.
    """
    lost = fitted.free_count * (1.0 if fitted.objective.final_delta is None else 2.0 - np.pi / 2)
    return float(np.sqrt((fitted.residuals_n**2).sum() / max(len(fitted.y_n) - lost, 1.0)))


def uneven(fitted: Fit) -> float:
    """How likely residuals of even size would differ in size along an input, or the fitted value, as these do.

    The p-value of the largest of Spearman's correlations of |residual| with each of them (Bonferroni), 1 where there
    are too few rows.
    """
    rows = len(fitted.y_n)
    if rows < _ENOUGH:
        return 1.0
    along = [*fitted.problem.log_inputs_In]
    if len(along) > 1:
        along += [fitted.problem.evaluate(fitted.theta_P[None])[0][0]]
    sizes_n = np.abs(fitted.residuals_n)
    if np.ptp(sizes_n) == 0:
        return 1.0
    likelihoods = [float(stats.spearmanr(sizes_n, each_n).pvalue) for each_n in along if np.ptp(each_n) > 0]
    return min(1.0, len(likelihoods) * min(likelihoods))


def leave_one_out(fitted: Fit) -> Array:
    """θ without each row in turn, (n, P), refitted from the optimum."""
    rows = len(fitted.y_n)
    weights_nn = 1.0 - np.eye(rows)
    starts_nP = np.tile(fitted.theta_P, (rows, 1))
    return minimise(fitted.problem, fitted.y_n, weights_nn, starts_nP, refit_objective(fitted), iterations=60)[0]


def refit_objective(fitted: Fit) -> Objective:
    """What refits minimise: the fit's objective, least absolute deviations rounded off well inside the scatter.

    Their corner is a tenth of a typical residual wide, which moves an estimate by far less than it is
    known to, and a refit needs a third of the steps.
    """
    typical = float(np.median(np.abs(fitted.residuals_n)))
    if fitted.objective.name != "lad" or typical < 1e-7:
        return fitted.objective
    return Objective("huber", 0.1 * typical)


def _labels(rows: int, clusters: NDArray[Any] | None) -> tuple[NDArray[np.intp], int]:
    """Which unit each row belongs to, and how many units there are."""
    if clusters is None:
        return np.arange(rows), rows
    labels = np.unique(clusters, return_inverse=True)[1].reshape(-1)
    return labels, int(labels.max()) + 1


def _drawn_counts(generator: np.random.Generator, draws: int, units: int) -> Array:
    """How often each unit is drawn, (S, U), with as many drawn as there are."""
    flat = generator.integers(0, units, (draws, units)) + np.arange(draws)[:, None] * units
    return np.bincount(flat.ravel(), minlength=draws * units).reshape(draws, units).astype(float)


def _refit(fitted: Fit, draws: int, chunk: Callable[[int], tuple[Array, Array]]) -> Array:
    """Runs the draws in chunks that fit a processor's cache, on up to four threads (numpy releases the lock)."""
    size, objective = int(np.clip(_ELEMENTS // len(fitted.y_n), *_CHUNKS)), refit_objective(fitted)
    counts = [min(size, draws - first) for first in range(0, draws, size)]

    def run(work: tuple[Array, Array]) -> Array:
        y, weights_Sn = work
        starts_SP = np.tile(fitted.theta_P, (len(weights_Sn), 1))
        return minimise(fitted.problem, y, weights_Sn, starts_SP, objective, iterations=30)[0]

    workers = min(4, os.cpu_count() or 1, len(counts))
    if workers < 2:
        return np.concatenate([run(chunk(count)) for count in counts])
    with ThreadPoolExecutor(workers) as pool:
        return np.concatenate(list(pool.map(run, map(chunk, counts))))
