"""Straight lines through few points, with intervals."""

from dataclasses import dataclass

import numpy as np

from analysis.fitting.intervals import t_quantile
from analysis.fitting.laws.base import Array


@dataclass(frozen=True)
class Line:
    """y against x by least squares, with Student's t for its slope and its height."""

    intercept: float
    slope: float
    centre: float
    variance: float
    spread: float
    points: int

    @property
    def slope_ci95(self) -> tuple[float, float]:
        """Interval of the slope."""
        half = t_quantile(self.points - 2) * float(np.sqrt(self.variance / self.spread))
        return self.slope - half, self.slope + half

    def at(self, x: float) -> tuple[float, float, float]:
        """Value and interval of the line."""
        value = self.intercept + self.slope * (x - self.centre)
        half = t_quantile(self.points - 2) * float(
            np.sqrt(self.variance * (1 / self.points + (x - self.centre) ** 2 / self.spread))
        )
        return value, value - half, value + half


def line_through(x: Array, y: Array, errors: Array | None = None, weights: Array | None = None) -> Line:
    """The line through three or more points; their own standard errors take the scatter's place if they are larger.

    Weights, whose mean is one, make points count more or less.
    """
    weights = np.ones_like(x) if weights is None else weights
    centre, height = float((weights * x).mean()), float((weights * y).mean())
    spread_x = float((weights * (x - centre) ** 2).sum())
    slope = float((weights * (x - centre) * y).sum() / spread_x)
    residuals = y - height - slope * (x - centre)
    variance = float((weights * residuals**2).sum() / (len(x) - 2))
    if errors is not None:
        variance = max(variance, float((errors**2).mean()))
    return Line(height, slope, centre, variance, spread_x, len(x))
