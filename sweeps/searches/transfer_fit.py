"""What losses at several rates and sizes say of rates that carry over. Pure: numbers in, numbers out.

Rates and sizes are logarithms to base 2, so that 1 is a doubling.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

REACH = 1.0
"""The parabola is fitted to rates up to so many doublings from the best one: loss bends away from it further off."""
CONFIDENCE = 0.95

Floats = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Valley:
    """The parabola through the losses of one size, in the logarithm of the rate."""

    best: float
    """Where it is lowest; where that is not bracketed, the best rate that was tried."""
    lowest: float
    """Loss there, mean over the seeds."""
    curvature: float
    """c in lowest + c·(rate - best)²."""
    error: float
    """Standard error of `best`."""
    interval: Interval | None
    """95% interval of `best` (Fieller); None: no minimum that the noise leaves standing lies between rates tried."""
    tried: Mapping[float, float]
    """Mean loss at each rate at which all runs ended."""
    left_out: tuple[float, ...]
    """Rates at which a run diverged or failed."""

    def excess(self, rate: float) -> float:
        """How much more than the lowest the loss is: by the parabola, or further off between losses that were measured.

        Infinite above the rates at which all runs ended.
        """
        rates = np.array(sorted(self.tried))
        if rate > rates[-1] + 1e-9:
            return math.inf
        if abs(rate - self.best) <= REACH:
            return self.curvature * (rate - self.best) ** 2
        return float(np.interp(rate, rates, [self.tried[each] for each in rates])) - self.lowest


@dataclass(frozen=True)
class Transfer:
    """What a change of size does under one parametrization."""

    drift: float | None
    """Doublings of the best rate a doubling of size; None: fewer than two sizes have a minimum."""
    drift_interval: Interval | None
    """95%."""
    lost: float | None
    """Loss that the smallest size's best rate costs at the largest."""
    lost_interval: Interval | None
    """95%."""


def fit_valley(rates: Sequence[float], losses: Sequence[float], seeds: Sequence[int]) -> Valley:
    """Least squares of a parabola with an offset for each seed, whose runs have noise in common.

    Args:
        rates: log2 of each run's rate.
        losses: Infinite for a run that diverged or failed; its rate is left out.
        seeds: Each run's seed.

    Raises:
        ValueError: Fewer than three rates at which all runs ended.
    """
    x, y, of = np.asarray(rates, float), np.asarray(losses, float), np.asarray(seeds)
    tried = {float(rate): float(y[x == rate].mean()) for rate in np.unique(x) if np.isfinite(y[x == rate]).all()}
    left_out = tuple(sorted(set(x) - set(tried)))
    if len(tried) < 3:
        raise ValueError(f"{len(tried)} rates at which all runs ended; a parabola needs three")
    best = min(tried, key=lambda rate: tried[rate])
    kept = np.isin(x, list(tried)) & (np.abs(x - best) <= REACH + 1e-9)
    x, y, of = x[kept] - best, y[kept], of[kept]
    names = np.unique(of)
    design = np.column_stack([of[:, None] == names, x, x**2]).astype(float)
    solution, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    freedom = len(y) - design.shape[1]
    slope, bend = float(solution[-2]), float(solution[-1])
    edge = best in (min(tried), max(tried))
    if edge or rank < design.shape[1] or freedom < 1 or bend <= 0:
        return Valley(best, tried[best], max(bend, 0.0), math.nan, None, tried, left_out)
    noise = float(((y - design @ solution) ** 2).sum()) / freedom
    covariance = (noise * np.linalg.inv(design.T @ design))[-2:, -2:]
    shift = -slope / (2 * bend)
    gradient = np.array([-1 / (2 * bend), slope / (2 * bend**2)])
    error = math.sqrt(float(gradient @ covariance @ gradient))
    lowest = float(solution[:-2].mean()) - bend * shift**2
    interval = _fieller(slope, bend, covariance, _quantile(freedom))
    around = None if interval is None else (best + interval[0], best + interval[1])
    return Valley(best + shift, lowest, bend, error, around, tried, left_out)


def fit_transfer(valleys: Mapping[float, Valley]) -> Transfer:
    """Drift of the best rate with the size, by a weighted line, and what it costs.

    The drift's interval is the wider of two: from the minima's own intervals, and from their scatter about the line.
    Valleys are given by log2 of the size.
    """
    fitted = {size: valley for size, valley in valleys.items() if valley.interval is not None}
    drift = drift_interval = lost = lost_interval = None
    if len(fitted) >= 2:
        drift, drift_interval = _line(np.array(list(fitted)), list(fitted.values()))
    small, large = valleys[min(valleys)], valleys[max(valleys)]
    if small.interval is not None and large.interval is not None:
        lost = large.excess(small.best)
        below, above = _reach(np.array([1.0, -1.0]), [small, large])
        around = [large.excess(small.best + step) for step in np.linspace(-below, above, 101)]
        lost_interval = (min(around), max(around))
    return Transfer(drift, drift_interval, lost, lost_interval)


def _line(sizes: Floats, valleys: Sequence[Valley]) -> tuple[float, Interval]:
    """Slope, and its interval."""
    best = np.array([valley.best for valley in valleys])
    weights = 1 / np.maximum([valley.error for valley in valleys], 1e-9) ** 2
    centred = sizes - np.average(sizes, weights=weights)
    spread = float((weights * centred**2).sum())
    slope = float((weights * centred * best).sum()) / spread
    below, above = _reach(weights * centred / spread, valleys)
    if len(sizes) > 2:
        left = best - np.average(best, weights=weights) - slope * centred
        scatter = float((weights * left**2).sum()) / (len(sizes) - 2)
        half = _quantile(len(sizes) - 2) * math.sqrt(scatter / spread)
        below, above = max(half, below), max(half, above)
    return slope, (slope - below, slope + above)


def _reach(factors: Floats, valleys: Sequence[Valley]) -> Interval:
    """How far a sum of factors · best rates may lie below and above its estimate.

    Independent intervals, which need not be symmetric, combined end by end (Zou and Donner 2008, "Construction of
    confidence limits about effect measures"; MOVER).
    """
    ends = np.array([np.array(valley.interval) - valley.best for valley in valleys]) * factors[:, None]
    return math.hypot(*ends.min(axis=1)), math.hypot(*ends.max(axis=1))


def _quantile(freedom: int) -> float:
    """Of Student's t."""
    return float(stdtrit(freedom, 0.5 + CONFIDENCE / 2))


def _fieller(slope: float, bend: float, covariance: Floats, quantile: float) -> Interval | None:
    """Where slope + 2·bend·x is zero within noise; None: everywhere far off, too."""
    squared = quantile**2
    a = 4 * (bend**2 - squared * covariance[1, 1])
    b = 4 * (slope * bend - squared * covariance[0, 1])
    c = slope**2 - squared * covariance[0, 0]
    if a <= 0:
        return None
    root = math.sqrt(max(b**2 - 4 * a * c, 0.0))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)
