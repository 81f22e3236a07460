"""The best size and data for a budget, along the frontier and from IsoFLOP minima.

Hoffmann et al. 2022 call these approaches 1 and 2; `parametric` is approach 3. The exponents a and b say how the best
size and the best number of tokens grow with compute, N_opt ∝ C^a and D_opt ∝ C^b.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.errors import FitRefused
from analysis.fitting.bootstrap import decile_spread
from analysis.fitting.intervals import t_quantile
from analysis.fitting.laws.base import Array
from analysis.fitting.lines import line_through
from analysis.grids.edges import likely_lines
from analysis.grids.isoflop import Minimum

LARGEST_EXPONENT_BIAS = 0.01
LARGEST_SIZE_BIAS = 0.1
_UNLIKELY = 0.05
_PAYS = 0.75
"""Share of the interval of unweighted minima, down to which weights have to narrow it."""


@dataclass(frozen=True)
class Best:
    """The best size and data at one budget.

    Attributes:
        budget: FLOPs.
        params: N_opt.
        params_ci95: its interval.
        tokens: D_opt.
        tokens_ci95: its interval.
        value: the target there, by a law.
        beyond: the size over the largest of the runs, or over the smallest where it is smaller; 1 among them.
    """

    budget: float
    params: float
    params_ci95: tuple[float, float]
    tokens: float | None = None
    tokens_ci95: tuple[float, float] | None = None
    value: float | None = None
    beyond: float = 1.0


@dataclass(frozen=True)
class GridBias:
    """By how much minima on this grid miss the surface's own best sizes, without noise.

    Attributes:
        law: of the surface.
        budgets: the budgets that have a minimum.
        sizes: found over true best size, minus one, at each.
        exponent: found minus true exponent of the growth of the best size; None for fewer than three budgets.
    """

    law: str
    budgets: tuple[float, ...]
    sizes: tuple[float, ...]
    exponent: float | None

    @property
    def worst_size(self) -> float:
        """The largest miss of a best size, with its sign."""
        return max(self.sizes, key=abs)

    @property
    def large(self) -> bool:
        """Whether a reader must know: the exponent is off by more than 0.01, or a best size by more than 10%."""
        return abs(self.exponent or 0.0) > LARGEST_EXPONENT_BIAS or abs(self.worst_size) > LARGEST_SIZE_BIAS


@dataclass(frozen=True)
class Allocation:
    """How the best size and data grow with compute, by one approach, or why that can't be said.

    Attributes:
        approach: envelope, isoflop-parabola, isoflop-cubic, isoflop-akima, or parametric with the law's name.
        n_points: budgets (or rows, for the parametric law) that it rests on.
        params_exponent: a.
        params_ci95: interval of a.
        tokens_exponent: b; None where the table has no tokens.
        tokens_ci95: interval of b.
        best: N_opt and D_opt at the budgets asked for.
        refused: why there is no answer.
        bias: what IsoFLOP minima miss on this grid even without noise, where a surface was fitted.
        lost: budgets without a minimum because it would be an end of the sizes.
    """

    approach: str
    n_points: int
    params_exponent: float | None = None
    params_ci95: tuple[float, float] | None = None
    tokens_exponent: float | None = None
    tokens_ci95: tuple[float, float] | None = None
    best: tuple[Best, ...] = ()
    refused: str = ""
    bias: GridBias | None = None
    lost: int = 0


def beyond_sizes(allocation: Allocation, sizes: Array) -> Allocation:
    """The allocation with how far its best sizes lie beyond those of the runs."""
    low, high = float(sizes.min()), float(sizes.max())
    best = tuple(replace(each, beyond=each.params / min(max(each.params, low), high)) for each in allocation.best)
    return replace(allocation, best=best)


def from_points(
    approach: str,
    budgets: Array,
    params: Array,
    tokens: Array | None,
    at: tuple[float, ...],
    errors: Array | None = None,
    weights: Array | None = None,
) -> Allocation:
    """Power laws through (budget, best size) and (budget, best tokens), by (weighted) least squares of logarithms.

    Their intervals take the points' scatter around the line, or their own standard errors (of log size) if those are
    larger: minima may lie on a line and yet be uncertain, by noise, by the curve chosen, by the steps between sizes.

    Raises:
        FitRefused: fewer than three budgets, or one size throughout.
    """
    if len(budgets) < 3:
        raise FitRefused(f"{len(budgets)} budgets with a best size; three or more are needed")
    if np.ptp(np.log(params)) < 1e-9:
        raise FitRefused("the same size is best at every budget; more sizes are needed")
    size = line_through(np.log(budgets), np.log(params), errors, weights)
    data = None if tokens is None else line_through(np.log(budgets), np.log(tokens), errors, weights)
    best = []
    for budget in at:
        value, low, high = (float(np.exp(each)) for each in size.at(np.log(budget)))
        best_tokens = None if data is None else tuple(float(np.exp(each)) for each in data.at(np.log(budget)))
        best.append(
            Best(
                budget,
                value,
                (low, high),
                best_tokens[0] if best_tokens else None,
                (best_tokens[1], best_tokens[2]) if best_tokens else None,
            )
        )
    return Allocation(
        approach,
        len(budgets),
        size.slope,
        size.slope_ci95,
        data.slope if data else None,
        data.slope_ci95 if data else None,
        tuple(best),
    )


def from_frontier(frontier: pd.DataFrame, grid_cells: pd.DataFrame, at: tuple[float, ...]) -> Allocation:
    """Approach 1, from the best cell of each budget; the best size is known to the step between sizes, over √12."""
    errors = []
    for budget, params in zip(frontier["budget"], frontier["params"], strict=True):
        sizes = np.log(np.unique(grid_cells.loc[grid_cells["budget"] == budget, "params"].to_numpy(dtype=float)))
        gaps = np.diff(sizes)
        place = int(np.argmin(np.abs(sizes - np.log(params))))
        near = gaps[max(place - 1, 0) : place + 1]
        errors.append(float(near.mean()) / np.sqrt(12) if len(near) else 1.0)
    tokens = frontier["tokens"].to_numpy(dtype=float) if "tokens" in frontier.columns else None
    budgets, params = frontier["flops"].to_numpy(dtype=float), frontier["params"].to_numpy(dtype=float)
    return from_points("envelope", budgets, params, tokens, at, np.array(errors))


def from_minima(found: list[Minimum], at: tuple[float, ...]) -> Allocation:
    """Approach 2, from the budgets whose minimum is bracketed.

    Intervals hold what noise makes of the minima (`isoflop.Simulated`), and how far the method's exponent is off that
    of the smooth curves through the same bowls. Where the minima lie further from a line than noise would have them,
    they are the line's own. Minima count alike. Akima's are weighted by the inverse of each one's variance under that
    noise where this narrows the exponent's interval to three quarters or less, as where scatter falls with compute:
    what polynomials miss of a bowl's shape is not noise, and would get more weight.

    Raises:
        FitRefused: fewer than three budgets, or one size throughout.
    """
    usable = [each for each in found if each.params is not None]
    method = f"isoflop-{found[0].method if found else 'parabola'}"
    budgets = np.array([each.budget for each in usable])
    params = np.array([each.params for each in usable], dtype=float)
    tokens = [each.tokens for each in usable if each.tokens is not None]
    tokens_B = np.array(tokens) if len(tokens) == len(usable) else None
    lines = replace(from_points(method, budgets, params, tokens_B, at), lost=sum(bool(each.end) for each in found))
    simulated = [each.simulated for each in usable if each.simulated is not None]
    if len(simulated) < len(usable):
        return lines
    drawn_BS = np.stack([each.log_params_S for each in simulated])
    if _further_than_noise(np.log(budgets), np.log(params), drawn_BS):
        return lines
    size = _Spread(
        np.log(budgets),
        np.ones(len(budgets)),
        drawn_BS,
        np.stack([each.off_S for each in simulated]),
        t_quantile(simulated[0].degrees_of_freedom),
    )
    spreads_B = np.array([decile_spread(drawn_S) for drawn_S in drawn_BS])
    if method == "isoflop-akima" and spreads_B.all():
        weighted = replace(size, weights_B=spreads_B**-2 / (spreads_B**-2).mean())
        if weighted.half_of_slope() <= _PAYS * size.half_of_slope():
            size = weighted
            weighted_lines = from_points(method, budgets, params, tokens_B, at, weights=size.weights_B)
            lines = replace(weighted_lines, lost=lines.lost)
    data = replace(size, drawn_BS=np.stack([each.log_tokens_S for each in simulated]))
    best = tuple(
        replace(
            each,
            params_ci95=size.factor(each.params, np.log(each.budget)),
            tokens_ci95=data.factor(each.tokens, np.log(each.budget)) if each.tokens is not None else None,
        )
        for each in lines.best
    )
    around = size.around(lines.params_exponent), data.around(lines.tokens_exponent)
    return _reaching(replace(lines, params_ci95=around[0], tokens_ci95=around[1], best=best), found, size.quantile)


def _reaching(lines: Allocation, found: list[Minimum], quantile: float) -> Allocation:
    """The lines with intervals that also hold the lines that are likely given where nothing was found (`edges`)."""
    known = [(each, each.sought) for each in found if each.sought is not None]
    if not known:
        return lines
    minima_B = [None if each.params is None else float(np.log(each.params)) for each, _ in known]
    likely = likely_lines(np.log([each.budget for each, _ in known]), minima_B, [of for _, of in known], quantile)

    def at(each: Best) -> Best:
        low, high = np.array(likely.at(float(np.log(each.budget)))) - np.log(each.params)
        tokens = each.tokens and each.tokens_ci95 and _holding(each.tokens_ci95, each.tokens * np.exp([-high, -low]))
        return replace(
            each, params_ci95=_holding(each.params_ci95, each.params * np.exp([low, high])), tokens_ci95=tokens or None
        )

    a, b = lines.params_exponent, lines.tokens_exponent
    slopes = np.array([likely.slopes_L.min(), likely.slopes_L.max()])
    return replace(
        lines,
        params_ci95=lines.params_ci95 and _holding(lines.params_ci95, slopes),
        tokens_ci95=lines.tokens_ci95 and _holding(lines.tokens_ci95, (b or 0.0) + (a or 0.0) - slopes[::-1]),
        best=tuple(map(at, lines.best)),
    )


def _holding(interval: tuple[float, float], other: Array) -> tuple[float, float]:
    return min(interval[0], float(other[0])), max(interval[1], float(other[1]))


@dataclass(frozen=True)
class _Spread:
    """How far lines through simulated minima (B budgets, S simulations) differ, in slope and in height."""

    logs_B: Array
    weights_B: Array
    drawn_BS: Array
    off_BS: Array
    quantile: float

    def around(self, slope: float | None) -> tuple[float, float] | None:
        """Interval of a slope."""
        return None if slope is None else (slope - self.half_of_slope(), slope + self.half_of_slope())

    def half_of_slope(self) -> float:
        """Half the width of a slope's interval."""
        return self._half(self._slopes(self.drawn_BS), self._slopes(self.off_BS))

    def factor(self, value: float, log: float) -> tuple[float, float]:
        """Interval of the line's value at a place."""
        heights_S, off_S = (
            np.average(each, axis=0, weights=self.weights_B) + self._slopes(each) * (log - self._centre)
            for each in (self.drawn_BS, self.off_BS)
        )
        half = self._half(heights_S, off_S)
        return value * float(np.exp(-half)), value * float(np.exp(half))

    def _slopes(self, values_B: Array) -> Array:
        off_centre_B = self.logs_B - self._centre
        return np.asarray(self.weights_B * off_centre_B @ values_B / (self.weights_B * off_centre_B**2).sum())

    @property
    def _centre(self) -> float:
        return float(np.average(self.logs_B, weights=self.weights_B))

    def _half(self, drawn_S: Array, off_S: Array) -> float:
        # What the method is off beyond twice the deviation that noise alone makes of it.
        off = float(np.sqrt(max(off_S[0] ** 2 - (2 * decile_spread(off_S[1:])) ** 2, 0.0)))
        return float(np.hypot(self.quantile * decile_spread(drawn_S), off))


def _further_than_noise(logs_B: Array, minima_B: Array, drawn_BS: Array) -> bool:
    """Whether minima lie further from a line than one in twenty of simulated ones do for their noise alone."""
    noise_BS = drawn_BS - drawn_BS.mean(axis=1, keepdims=True)
    design_B2 = np.stack([np.ones_like(logs_B), logs_B - logs_B.mean()], axis=1)
    apart_BB = np.eye(len(logs_B)) - design_B2 @ np.linalg.pinv(design_B2)
    seen, simulated_S = (((apart_BB @ each) ** 2).sum(axis=0) for each in (minima_B, noise_BS))
    return bool((simulated_S >= seen).mean() < _UNLIKELY)
