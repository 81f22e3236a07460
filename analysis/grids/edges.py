"""Best sizes near an end of the sizes, or beyond it, and lines through those that are found.

A budget whose best size is an end has no minimum, and of those near an end the ones are found that noise draws inwards.
So a line through what is found misses the truth on the same side nearly always. How often a minimum is found, and
where, is simulated for any best size; a line's likelihood then takes into account at which budgets nothing was found.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.fitting.laws.base import Array
from analysis.grids.bowls import curves, lowest

_PLACES, _BEYOND, _DRAWS, _POINTS = 19, 3.0, 150, 201
"""Best sizes that are tried, from so many steps below the sizes to as many above, and how often each."""
_FEW = 5
"""Minima found at a place, from which their mean and spread are taken."""
_LINES, _RARELY = 81, 1e-3
"""Heights tried at either end of a line; and the least share of minima found, or not found, that is believed."""


@dataclass(frozen=True)
class Sought:
    """What a method finds at a budget, by where the best size is (M places).

    Attributes:
        places_M: log N_opt.
        share_M: how often there is a minimum, as the best size isn't an end of the sizes.
        mean_M: its mean.
        spread_M: its standard deviation.
    """

    places_M: Array
    share_M: Array
    mean_M: Array
    spread_M: Array


@dataclass(frozen=True)
class LikelyLines:
    """Lines of log N_opt against log C that reach the 95% level of the likelihood (L lines)."""

    log_budget: float
    heights_L: Array
    slopes_L: Array

    def at(self, log_budget: float) -> tuple[float, float]:
        """The least and largest log N_opt."""
        logs_L = self.heights_L + self.slopes_L * (log_budget - self.log_budget)
        return float(logs_L.min()), float(logs_L.max())


def sought(logs_n: Array, method: str, bend: float, scatter: float) -> Sought:
    """What a method finds of parabolic bowls over these sizes, whose best size is another one each time.

    Args:
        logs_n: logarithms of the sizes.
        method: one of `bowls.METHODS`.
        bend: relative rise of the value with the square of the distance from the best size, in log N.
        scatter: relative standard deviation of a cell.
    """
    centre, reach = float(logs_n.mean()), _BEYOND * np.ptp(logs_n) / (len(logs_n) - 1)
    logs = logs_n - centre
    places_M = np.linspace(logs.min() - reach, logs.max() + reach, _PLACES)
    errors_n1S = scatter * np.random.default_rng(0).standard_normal((len(logs), 1, _DRAWS))
    bowls_nMS = (1 + bend * (logs[:, None, None] - places_M[:, None]) ** 2) * (1 + errors_n1S)
    bowls_nX = bowls_nMS.reshape(len(logs), -1)
    fine, curves_GX = curves(logs, bowls_nX, method, _POINTS)
    inside_2X = [_is_inside(each) for each in (bowls_nX, curves_GX)]
    found_MS = np.logical_and(*inside_2X).reshape(_PLACES, -1)
    lowest_MS = np.where(found_MS, lowest(fine, curves_GX)[0].reshape(_PLACES, -1), 0.0)
    count_M = np.maximum(found_MS.sum(axis=1), 1)
    mean_M = lowest_MS.sum(axis=1) / count_M
    spread_M = np.sqrt((found_MS * (lowest_MS - mean_M[:, None]) ** 2).sum(axis=1) / count_M)
    often_M = found_MS.sum(axis=1) >= _FEW  # elsewhere as at the nearest of these
    known = np.flatnonzero(often_M if often_M.any() else ~often_M)
    mean_M, spread_M = (np.interp(np.arange(_PLACES), known, each_M[known]) for each_M in (mean_M, spread_M))
    return Sought(places_M + centre, found_MS.mean(axis=1), mean_M + centre, np.maximum(spread_M, 1e-9))


def likely_lines(
    logs_B: Array, minima_B: Sequence[float | None], sought_B: Sequence[Sought], quantile: float
) -> LikelyLines:
    """The lines whose likelihood reaches the 95% level, given what is found at which budgets, and what isn't.

    Args:
        logs_B: logarithms of two or more budgets, in order.
        minima_B: log N_opt as found; None where nothing is.
        sought_B: what would be found there.
        quantile: Student's t of the level.
    """
    ends = [np.linspace(of.places_M[0], of.places_M[-1], _LINES) for of in (sought_B[0], sought_B[-1])]
    heights_L, last_L = (each.ravel() for each in np.meshgrid(*ends))
    slopes_L = (last_L - heights_L) / (logs_B[-1] - logs_B[0])
    cost_L = np.zeros(len(heights_L))
    for log, found, of in zip(logs_B, minima_B, sought_B, strict=True):
        best_L = heights_L + slopes_L * (log - logs_B[0])
        share_L = np.interp(best_L, of.places_M, of.share_M)
        if found is None:
            cost_L -= np.log(np.maximum(1 - share_L, _RARELY))
            continue
        mean_L, spread_L = (np.interp(best_L, of.places_M, each_M) for each_M in (of.mean_M, of.spread_M))
        cost_L += 0.5 * ((found - mean_L) / spread_L) ** 2 + np.log(spread_L) - np.log(np.maximum(share_L, _RARELY))
    likely_L = cost_L <= cost_L.min() + 0.5 * quantile**2
    return LikelyLines(float(logs_B[0]), heights_L[likely_L], slopes_L[likely_L])


def _is_inside(values_nX: Array) -> Array:
    """Whether each column's lowest value is neither the first nor the last."""
    lowest_X = values_nX.argmin(axis=0)
    return np.asarray((lowest_X > 0) & (lowest_X < len(values_nX) - 1))
