"""Ranges of single quantities within the 95% level of the likelihood.

A quantity is held at a value while all parameters are fitted; the value moves away from the best fit's until the sum
of squares reaches the level. So the way along a curved valley is found, which straight steps leave. Where a law has
several valleys, ways begin in each (Venzon & Moolgavkar 1988 seek the same ends of one valley).

Letters: G offsets, K ways, M predictions, n rows, P free parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from analysis.fitting.laws.base import OFFSET, Array, Problem, is_exponent
from analysis.fitting.newton import Objective, minimise, residuals_of

SIMPLE, ROWS_FOR_VALLEYS = 5, 500
"""Laws of more parameters have several valleys: a term may stand for the offset, or for another term. With more rows,
looking for them takes seconds."""
_STARTS = 5
"""Of laws with several valleys, ways to each side begin at so many of the offsets, too."""
_POINTS = 12
"""Predictions that ways are gone for; of more at once, the others' ranges are those of the laws found on the ways."""
_HEAVY = 100.0
"""Times as much as all rows together a prediction's own row counts, which holds it near a value."""
_ROUNDS, _ITERATIONS = 10, 40
_NEAR = 0.02
"""Share of the level's height, or of the way, within which the end of a way is found."""
_LARGEST_STEP, _LARGEST_LOG = 1.0, 600.0

Hold = Callable[[Array, Array], tuple[Array, Array]]
"""From values (K,) and starts (K, P) to the θ fitted with the quantity held there, and what the quantity became."""


@dataclass(frozen=True)
class Region:
    """The θ whose sum of squares stays below a limit.

    Attributes:
        problem: the law at the rows.
        y_n: their values.
        theta_GP: fits at offsets held fixed, in the region.
        squares_G: their sums of squares.
        limit: the largest sum of squares in it.
        offsets: the least and the largest offset in it.
        simpler: the region of the law without its term like an offset, where the rows don't reject that. Ranges are
            those of both: a term that is not there follows the noise, and leads the others astray.
    """

    problem: Problem
    y_n: Array
    theta_GP: Array
    squares_G: Array
    limit: float
    offsets: tuple[float, float]
    simpler: "Region | None" = None

    def of_parameter(self, name: str) -> tuple[float, float]:
        """The least and largest value of a parameter; of the logarithm, where it is neither offset nor exponent."""
        low, high = self._of_parameter(name)
        if self.simpler is None or name not in self.simpler.problem.law.parameters:
            return low, high
        least, largest = self.simpler.of_parameter(name)
        return min(low, least), max(high, largest)

    def of_predictions(self, at: Problem) -> tuple[Array, Array]:
        """The least and largest linked prediction at each row of a problem, (M,) each."""
        low_M, high_M = self._of_predictions(at)
        if self.simpler is None:
            return low_M, high_M
        least_M, largest_M = self.simpler.of_predictions(replace(at, law=self.simpler.problem.law))
        return np.minimum(low_M, least_M), np.maximum(high_M, largest_M)

    def _of_parameter(self, name: str) -> tuple[float, float]:
        if name == OFFSET:
            return self.offsets
        problem, theta_GP = self.problem, self.theta_GP
        if name in problem.law.levels:
            problem, theta_GP = _uncentred(problem, theta_GP)
        place = problem.free.index(name)
        lower_P, upper_P = problem.bounds(self.y_n)

        def hold(values_K: Array, starts_KP: Array) -> tuple[Array, Array]:
            held_KP = starts_KP.copy()
            held_KP[:, place] = values_K.clip(lower_P[place], upper_P[place])
            weights_Kn = np.ones((len(held_KP), len(self.y_n)))
            held_KP, _ = minimise(problem, self.y_n, weights_Kn, held_KP, _SQUARES, iterations=_ITERATIONS, held=place)
            return held_KP, held_KP[:, place]

        best_P = theta_GP[self.squares_G.argmin()]
        size = float(np.sqrt(problem.covariance(best_P[None], np.ones((1, len(self.y_n))))[0, place, place]))
        starts, signs_K = self._starts(theta_GP[:, [place]])
        ways = _Ways(problem, self, hold, best_P[place], signs_K * self._step(size))
        ends_K, held_KP = ways.ends(theta_GP[starts[:, 0], place], theta_GP[starts[:, 0]])
        natural_K = problem.natural(held_KP)[:, problem.law.parameters.index(name)]
        last_K = ends_K - held_KP[:, place]
        reported_K = (natural_K if is_exponent(name) else np.log(np.maximum(natural_K, 1e-300))) + last_K
        return float(reported_K.min()), float(reported_K.max())

    def _of_predictions(self, at: Problem) -> tuple[Array, Array]:
        predictions = at.log_inputs_In.shape[1]
        chosen = np.unique(np.linspace(0, predictions - 1, min(predictions, _POINTS)).astype(int))
        some = replace(at, log_inputs_In=at.log_inputs_In[:, chosen])
        rows, best_P = len(self.y_n), self.theta_GP[self.squares_G.argmin()]
        starts, signs = self._starts(some.evaluate(self.theta_GP)[0])
        start_K, sign_K = starts.ravel(), np.repeat(signs, len(chosen))
        point_K, every_K = np.tile(np.arange(len(chosen)), len(starts)), np.arange(starts.size)
        both = replace(
            self.problem, log_inputs_In=np.concatenate([self.problem.log_inputs_In, some.log_inputs_In], axis=1)
        )
        weights_Kn = np.zeros((starts.size, rows + len(chosen)))
        weights_Kn[:, :rows], weights_Kn[every_K, rows + point_K] = 1.0, _HEAVY * rows
        y_Kn = np.full_like(weights_Kn, self.y_n[0])
        y_Kn[:, :rows] = self.y_n

        def hold(values_K: Array, starts_KP: Array) -> tuple[Array, Array]:
            y_Kn[every_K, rows + point_K] = at.law.respond(values_K.clip(-_LARGEST_LOG, _LARGEST_LOG))
            held_KP, _ = minimise(both, y_Kn, weights_Kn, starts_KP, _SQUARES, iterations=_ITERATIONS)
            return held_KP, some.evaluate(held_KP)[0][every_K, point_K]

        best_1M, shares_J1M = some.evaluate(best_P[None])
        slopes_MP = some.jacobian(best_P[None], shares_J1M)[0]
        covariance_PP = self.problem.covariance(best_P[None], np.ones((1, rows)))[0]
        sizes_M = np.sqrt(np.maximum(np.einsum("mp,pq,mq->m", slopes_MP, covariance_PP, slopes_MP), 0.0))
        ways = _Ways(self.problem, self, hold, best_1M[0, point_K], sign_K * self._step(sizes_M)[point_K])
        began_K = some.evaluate(self.theta_GP)[0][start_K, point_K]
        ends_K, theta_KP = ways.ends(began_K, self.theta_GP[start_K])
        found_M = at.evaluate(np.concatenate([self.theta_GP, theta_KP]))[0]
        low_M, high_M = found_M.min(axis=0), found_M.max(axis=0)
        np.minimum.at(low_M, chosen[point_K], ends_K)
        np.maximum.at(high_M, chosen[point_K], ends_K)
        return low_M, high_M

    def _starts(self, values_GM: Array) -> tuple[np.ndarray, Array]:
        """Which of the offsets' fits ways begin at, (starts, M), first all those upwards, and their signs.

        The fit in which the quantity is already furthest is always one of them.
        """
        several = self.problem.law.of_losses or len(self.problem.free) > SIMPLE
        starts = _STARTS if several and len(self.y_n) <= ROWS_FOR_VALLEYS else 0
        some = np.unique(np.linspace(0, len(self.theta_GP) - 1, starts).astype(int))
        everywhere = np.broadcast_to(some[:, None], (len(some), values_GM.shape[1]))
        upwards, downwards = (np.vstack([each, everywhere]) for each in (values_GM.argmax(0), values_GM.argmin(0)))
        return np.vstack([upwards, downwards]), np.repeat([1.0, -1.0], len(upwards))

    def _step(self, sizes: Array | float) -> Array:
        """How far a quantity would be from its best value at the limit, were the law linear."""
        reach = np.sqrt(self.limit - self.squares_G.min()) * np.asarray(sizes)
        return np.asarray(np.clip(np.nan_to_num(reach), 1e-9, _LARGEST_STEP))


_SQUARES = Objective("lsq-log")


@dataclass(frozen=True)
class _Ways:
    """Ways of one quantity, or of several predictions, away from the best fit.

    Attributes:
        problem: the law at the rows, in the form that θ belongs to.
        region: where ways end.
        hold: fits with the quantity held.
        middle: the quantity at the best fit, (K,) or one for all.
        step_K: the first step, whose sign is the way's direction.
    """

    problem: Problem
    region: Region
    hold: Hold
    middle: Array | float
    step_K: Array

    def ends(self, value_K: Array, theta_KP: Array) -> tuple[Array, Array]:
        """Where each way leaves the region, or the last place found in it, and θ there.

        The height, the root of the share of the level that is used up, is all but linear in the quantity: 0 at the
        best fit and 1 at the end, which false position finds.
        """
        held_KP, reached_K = self.hold(value_K, theta_KP)
        lower_K = self._heights(held_KP) <= self._heights(theta_KP)
        theta_KP, value_K = np.where(lower_K[:, None], held_KP, theta_KP), np.where(lower_K, reached_K, value_K)
        sign_K, height_K = np.sign(self.step_K), self._heights(theta_KP)
        beyond_K, above_K = np.full(len(value_K), np.nan), np.full(len(value_K), np.nan)
        for _ in range(_ROUNDS):
            ahead_K = self._ahead(value_K, height_K, beyond_K, above_K)
            held_KP, reached_K = self.hold(ahead_K, theta_KP)
            tried_K = self._heights(held_KP)
            forward_K = sign_K * (reached_K - value_K)
            inside_K, outside_K = (tried_K <= 1) & (forward_K >= 0), tried_K > 1
            closer_K = outside_K & ~(sign_K * (reached_K - beyond_K) >= 0)
            still_K = inside_K & (forward_K <= 1e-3 * np.abs(self.step_K))
            value_K, height_K = np.where(inside_K, reached_K, value_K), np.where(inside_K, tried_K, height_K)
            theta_KP = np.where(inside_K[:, None], held_KP, theta_KP)
            beyond_K, above_K = np.where(closer_K, reached_K, beyond_K), np.where(closer_K, tried_K, above_K)
            gap_K = sign_K * (beyond_K - value_K)
            near_K = (height_K > 1 - _NEAR) | (gap_K <= _NEAR * np.abs(value_K - self.middle))
            if (near_K | still_K | ~(inside_K | outside_K)).all():
                break
        between_K = sign_K * (beyond_K - value_K) > 0
        share_K = np.where(between_K, (1 - height_K) / np.maximum(above_K - height_K, 1e-9), 0.0)
        return np.where(between_K, value_K + share_K * (beyond_K - value_K), value_K), theta_KP

    def _ahead(self, value_K: Array, height_K: Array, beyond_K: Array, above_K: Array) -> Array:
        """Where to try next: between the places inside and outside, or further along the line from the middle."""
        done_K, sign_K = value_K - self.middle, np.sign(self.step_K)
        further_K = done_K * np.clip(1 / np.maximum(height_K, 1e-2), 1.05, 3.0)
        first_K = sign_K * done_K < 0.5 * np.abs(self.step_K)
        onwards_K = self.middle + np.where(first_K, self.step_K, further_K)
        between_K = sign_K * (beyond_K - value_K) > 0
        share_K = np.clip((1 - height_K) / np.maximum(above_K - height_K, 1e-9), 0.05, 0.95)
        return np.where(between_K, value_K + share_K * (beyond_K - value_K), onwards_K)

    def _heights(self, theta_KP: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            residuals_Kn = residuals_of(self.problem, self.region.y_n, theta_KP, raw=False)[0]
            squares_K = np.nan_to_num((residuals_Kn**2).sum(axis=1), nan=np.inf)
        lowest = self.region.squares_G.min()
        return np.asarray(np.sqrt(np.maximum(squares_K - lowest, 0.0) / (self.region.limit - lowest)))


def _uncentred(problem: Problem, theta_GP: Array) -> tuple[Problem, Array]:
    """The same law of inputs in their own units, whose coefficients are the reported ones."""
    logs_In = problem.log_inputs_In + np.array(problem.centres)[:, None]
    own = replace(problem, centres=(0.0,) * len(problem.centres), log_inputs_In=logs_In)
    values = {name: theta_GP[:, place] for place, name in enumerate(problem.free)}
    turned_GP = theta_GP.copy()
    for place, name in enumerate(problem.free):
        if name != OFFSET and not is_exponent(name):
            turned_GP[:, place] += problem.law.shift(problem, name, values) - own.law.shift(own, name, values)
    return own, turned_GP
