"""Approach 3 to the best size and data for a budget: a law of N and D, minimised over sizes (Hoffmann et al. 2022).

Letters: S sets of parameters θ, P free parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd

from analysis.fitting.fit import Fit
from analysis.fitting.intervals import Uncertainty, t_quantile
from analysis.fitting.laws.base import OFFSET, Array
from analysis.fitting.likelihood_region import Region
from analysis.grids.allocation import Allocation, Best
from analysis.grids.bowls import lowest
from analysis.grids.flops_per_token import FlopsPerToken

_GRID = 600
_DRAWS = 500


def from_law(
    fitted: Fit, uncertainty: Uncertainty, rows: pd.DataFrame, at: tuple[float, ...], declared: float | None = None
) -> Allocation:
    """How the best size grows by a law of N and D, and the best sizes at some budgets.

    Where C = k·N·D was declared, the closed form a = β / (α + β) holds and is used. Otherwise k as a function of size
    is known among the sizes only; where the best size lies beyond them, intervals also hold what a constant k gives.
    """
    law = _Minimised(fitted, uncertainty, rows, FlopsPerToken(rows, declared))
    if declared is not None:
        exponent, (low, high) = law.interval(partial(_closed_form, fitted))
        exponents = [(exponent, (low, high)), (1 - exponent, (1 - high, 1 - low))]
    else:
        exponents = [law.exponent(of_tokens) for of_tokens in (False, True)]
    (exponent, interval), (tokens_exponent, tokens_interval) = exponents
    name, best = f"parametric {fitted.law.name}", tuple(map(law.best_at, at))
    return Allocation(name, len(fitted.y_n), exponent, interval, tokens_exponent, tokens_interval, best)


def best_sizes(fitted: Fit, rows: pd.DataFrame, budgets: Array, declared: float | None = None) -> tuple[Array, Array]:
    """N_opt and D_opt of a law of N and D at budgets, without intervals."""
    per_token = FlopsPerToken(rows, declared)
    theta_1P = fitted.theta_P[None]
    found = [minimise_over_sizes(fitted, theta_1P, rows, per_token, float(each))[0] for each in budgets]
    sizes = np.concatenate(found)
    return sizes, np.asarray(budgets / (per_token(sizes) * sizes))


def minimise_over_sizes(
    fitted: Fit, theta_SP: Array, rows: pd.DataFrame, per_token: FlopsPerToken, budget: float
) -> tuple[Array, Array]:
    """The best size at a budget and the value there, for each θ."""
    sizes = np.geomspace(rows["params"].min() / 300, rows["params"].max() * 3000, _GRID)
    problem = fitted.at(sizes, per_token.tokens(budget, sizes))
    u_Sn, _ = problem.evaluate(theta_SP)
    logs_S, lowest_S = lowest(np.log(sizes), u_Sn.T)
    return np.exp(logs_S), fitted.law.respond(lowest_S)


@dataclass(frozen=True)
class _Minimised:
    """A law of N and D with how well it is known, and its lowest points at budgets."""

    fitted: Fit
    uncertainty: Uncertainty
    rows: pd.DataFrame
    per_token: FlopsPerToken

    def exponent(self, of_tokens: bool) -> tuple[float, tuple[float, float]]:
        """A (or b, of tokens) between the least and most compute of the rows, with its interval."""
        ends = float(self.rows["flops"].min()), float(self.rows["flops"].max())
        span = np.log(ends[1] / ends[0]) if ends[1] > ends[0] else np.nan

        def growth(per_token: FlopsPerToken, theta_SP: Array) -> Array:
            first_S, last_S = (self._log_sizes(per_token, each, theta_SP) for each in ends)
            if of_tokens:
                sizes_2S = np.exp([first_S, last_S])
                first_S, last_S = (np.log(per_token.tokens(*each)) for each in zip(ends, sizes_2S, strict=True))
            return np.asarray((last_S - first_S) / span)

        found = [self.interval(partial(growth, each)) for each in self._readings(ends[1])]
        intervals_R2 = np.array([interval for _, interval in found])
        return found[0][0], (float(intervals_R2[:, 0].min()), float(intervals_R2[:, 1].max()))

    def best_at(self, budget: float) -> Best:
        """The best size and data at a budget, with intervals; the least size has the most data."""
        sizes, values = minimise_over_sizes(self.fitted, self.fitted.theta_P[None], self.rows, self.per_token, budget)
        found = []
        for per_token in self._readings(budget):
            _, ends = self.interval(partial(self._log_sizes, per_token, budget))
            low, high = np.exp(ends)
            found.append((low, high, *per_token.tokens(budget, np.array([high, low]))))
        lows, highs, least, most = np.array(found).T
        tokens = float(self.per_token.tokens(budget, sizes)[0])
        ends_of_tokens = float(least.min()), float(most.max())
        best, ends_of_sizes = float(sizes[0]), (float(lows.min()), float(highs.max()))
        return Best(budget, best, ends_of_sizes, tokens, ends_of_tokens, float(values[0]))

    def interval(self, of: Callable[[Array], Array]) -> tuple[float, tuple[float, float]]:
        """What follows from θ at the fit, and its interval: its range in the likelihood's region, or from the draws."""
        draws = replace(self.uncertainty.draws, theta_SP=self.uncertainty.draws.theta_SP[:_DRAWS])
        value = float(of(self.fitted.theta_P[None])[0])
        if draws.region is not None:
            low, high = _range(draws.region, of)
            return value, (min(low, value), max(high, value))
        if draws.method.startswith("case"):
            low, high = np.quantile(of(draws.theta_SP), [0.025, 0.975])
            return value, (min(float(low), value), max(float(high), value))
        return value, draws.interval(value, of, t_quantile(self.uncertainty.degrees_of_freedom))

    def _readings(self, budget: float) -> list[FlopsPerToken]:
        """K as a function of size, and a constant one where the best size at a budget lies beyond the rows' sizes."""
        best = self._log_sizes(self.per_token, budget, self.fitted.theta_P[None])[0]
        level = self.per_token.beyond(float(np.exp(best)))
        return [self.per_token, *([] if level is None else [FlopsPerToken(self.rows, level)])]

    def _log_sizes(self, per_token: FlopsPerToken, budget: float, theta_SP: Array) -> Array:
        return np.log(minimise_over_sizes(self.fitted, theta_SP, self.rows, per_token, budget)[0])


def _range(region: Region, of: Callable[[Array], Array]) -> tuple[float, float]:
    """The least and largest value in a region, taken for linear in the ellipsoid around the fit at each offset."""
    problem, fits_GP = region.problem, region.theta_GP
    place = problem.free.index(OFFSET)
    jacobian_GnQ = np.delete(problem.jacobian(fits_GP, problem.evaluate(fits_GP)[1]), place, axis=2)
    covariance_GQQ = np.linalg.pinv(np.einsum("gnp,gnq->gpq", jacobian_GnQ, jacobian_GnQ), hermitian=True)
    variances_GQ, axes_GQQ = np.linalg.eigh(covariance_GQQ)
    reach_G = np.sqrt(np.maximum(region.limit - region.squares_G, 0.0))
    steps_GQQ = (axes_GQQ * np.sqrt(variances_GQ.clip(0.0))[:, None]).swapaxes(1, 2) * reach_G[:, None, None]
    steps_GQP = np.insert(steps_GQQ, place, 0.0, axis=2)
    box_2P = problem.bounds(region.y_n)

    def at(each_GQP: Array) -> Array:
        theta_GQP = (fits_GP[:, None] + each_GQP).clip(*box_2P)
        return of(theta_GQP.reshape(-1, theta_GQP.shape[-1])).reshape(theta_GQP.shape[:2])

    slopes_GQ = at(steps_GQP) - at(-steps_GQP)
    slopes_GQ /= np.maximum(np.linalg.norm(slopes_GQ, axis=1, keepdims=True), 1e-300)
    steepest_G1P = np.einsum("gq,gqp->gp", slopes_GQ, steps_GQP)[:, None]
    values_2G = np.stack([at(steepest_G1P), at(-steepest_G1P)])
    return float(values_2G.min()), float(values_2G.max())


def _closed_form(fitted: Fit, theta_SP: Array) -> Array:
    free = fitted.problem.free
    alpha_S = theta_SP[:, free.index("alpha")]
    beta_S = theta_SP[:, free.index("beta")] if "beta" in free else alpha_S
    return np.asarray(beta_S / (alpha_S + beta_S))
