"""Training FLOPs a token and parameter, k = C / (N·D), as a smooth function of size."""

import numpy as np
import pandas as pd

from analysis.fitting.laws.base import Array

_STEEPEST = 0.5
"""Exponent of N that the FLOPs a token and parameter have at most, beyond the sizes."""
_HARDLY = 0.005


class FlopsPerToken:
    """Training FLOPs a token and parameter, k = C / (N·D), as a smooth function of size.

    A line from each size's own ratio to the next would have a kink at each, where the best size then sticks over a
    range of budgets. So within the sizes log k is a polynomial in log N: a straight line, or of degree two or three
    where that follows the sizes' own ratios clearly better. Beyond them it goes on in a straight line, k a power of N.

    Args:
        rows: with params, tokens and flops.
        declared: k, where C = k·N·D was declared.
    """

    def __init__(self, rows: pd.DataFrame, declared: float | None = None) -> None:
        ratios = np.log(rows["flops"] / (rows["params"] * rows["tokens"])).groupby(rows["params"]).mean()
        logs, values = np.log(ratios.index.to_numpy(dtype=float)), ratios.to_numpy(dtype=float)
        self._ends = float(logs.min()), float(logs.max())
        self._centre = float(logs.mean())
        if declared is not None or len(logs) == 1:
            self._law = np.array([np.log(declared) if declared is not None else values[0]])
            return
        misses = []
        for degree in range(1, int(np.clip(len(logs) - 2, 1, 3)) + 1):
            law = np.polyfit(logs - self._centre, values, degree)
            misses.append(float(np.abs(np.polyval(law, logs - self._centre) - values).max()))
            if degree == 1 or misses[-1] < 0.5 * misses[-2]:
                self._law = law
            if misses[-1] < _HARDLY:
                break

    def __call__(self, params: Array) -> Array:
        """The ratio at sizes given."""
        logs = np.log(params)
        inside = np.clip(logs, *self._ends)
        slope = np.clip(np.polyval(np.polyder(self._law), inside - self._centre), -_STEEPEST, _STEEPEST)
        return np.asarray(np.exp(np.polyval(self._law, inside - self._centre) + slope * (logs - inside)))

    def beyond(self, params: float) -> float | None:
        """The ratio of the largest or smallest size for one that is larger or smaller; None among the sizes."""
        log = float(np.log(params))
        nearest = float(np.clip(log, *self._ends))
        return None if abs(log - nearest) < _HARDLY else float(self(np.exp(np.array([nearest])))[0])

    def tokens(self, budget: float, params: Array) -> Array:
        """D that the budget pays for at each size."""
        return np.asarray(budget / (self(params) * params))
