"""The best size and data for a budget, three ways: along the frontier, from IsoFLOP minima, from the parametric law.

Hoffmann et al. 2022 call them approaches 1, 2 and 3. The exponents a and b say how the best size and the best number of
tokens grow with compute, N_opt ∝ C^a and D_opt ∝ C^b.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.errors import FitRefused
from analysis.fitting.fit import Fit
from analysis.fitting.intervals import Uncertainty, t_quantile
from analysis.fitting.laws.base import Array
from analysis.fitting.lines import line_through
from analysis.grids.isoflop import Minimum

_GRID = 600
_DRAWS = 500


@dataclass(frozen=True)
class Best:
    """The best size and data at one budget."""

    budget: float
    params: float
    params_ci95: tuple[float, float]
    tokens: float | None = None
    tokens_ci95: tuple[float, float] | None = None
    value: float | None = None


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
    """

    approach: str
    n_points: int
    params_exponent: float | None = None
    params_ci95: tuple[float, float] | None = None
    tokens_exponent: float | None = None
    tokens_ci95: tuple[float, float] | None = None
    best: tuple[Best, ...] = ()
    refused: str = ""


class FlopsPerToken:
    """Training FLOPs a token and parameter, C / (N·D), as a function of size: each size's own, interpolated between."""

    def __init__(self, rows: pd.DataFrame, declared: float | None = None) -> None:
        if declared is not None:
            self._sizes, self._logs = np.array([1.0]), np.array([np.log(declared)])
            return
        ratios = np.log(rows["flops"] / (rows["params"] * rows["tokens"])).groupby(rows["params"]).mean()
        self._sizes, self._logs = ratios.index.to_numpy(dtype=float), ratios.to_numpy(dtype=float)

    def __call__(self, params: Array) -> Array:
        """The ratio at sizes given; outside the sizes seen, that of the nearest one."""
        return np.asarray(np.exp(np.interp(np.log(params), np.log(self._sizes), self._logs)))

    def tokens(self, budget: float, params: Array) -> Array:
        """D that the budget pays for at each size."""
        return np.asarray(budget / (self(params) * params))


def from_points(
    approach: str,
    budgets: Array,
    params: Array,
    tokens: Array | None,
    at: tuple[float, ...],
    errors: Array | None = None,
) -> Allocation:
    """Power laws through (budget, best size) and (budget, best tokens), by least squares of logarithms.

    Their intervals take the points' scatter around the line, or their own standard errors (of log size) if those are
    larger: minima may lie on a line and yet be uncertain, by noise, by the curve chosen, by the steps between sizes.

    Raises:
        FitRefused: fewer than three budgets, or one size throughout.
    """
    if len(budgets) < 3:
        raise FitRefused(f"{len(budgets)} budgets with a best size; three or more are needed")
    if np.ptp(np.log(params)) < 1e-9:
        raise FitRefused("the same size is best at every budget; more sizes are needed")
    size = line_through(np.log(budgets), np.log(params), errors)
    data = None if tokens is None else line_through(np.log(budgets), np.log(tokens), errors)
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


def from_minima(found: list[Minimum], at: tuple[float, ...], other: tuple[Minimum, ...] = ()) -> Allocation:
    """Approach 2, from the budgets whose minimum is bracketed.

    Each minimum is uncertain by its own interval, and by what another curve (`other`) makes of the same budget.
    """
    usable = [each for each in found if each.params is not None]
    others = {each.budget: each.params for each in other if each.params is not None}
    method = found[0].method if found else "parabola"
    tokens = [each.tokens for each in usable if each.tokens is not None]
    errors = []
    for each in usable:
        low, high = each.params_ci95 or (each.params or 1.0, each.params or 1.0)
        shift = np.log((each.params or 1.0) / others[each.budget]) if each.budget in others else 0.0
        errors.append(float(np.hypot(np.log(high / low) / (2 * 1.96), shift)))
    return from_points(
        f"isoflop-{method}",
        np.array([each.budget for each in usable]),
        np.array([each.params for each in usable], dtype=float),
        np.array(tokens) if len(tokens) == len(usable) else None,
        at,
        np.array(errors),
    )


def from_law(
    fitted: Fit, uncertainty: Uncertainty, rows: pd.DataFrame, at: tuple[float, ...], declared: float | None = None
) -> Allocation:
    """Approach 3: the law minimised at each budget over sizes, with each size's own FLOPs a token.

    Where C = k·N·D was declared, the closed form a = β / (α + β) holds and is used.
    """
    per_token = FlopsPerToken(rows, declared)
    theta_SP = np.vstack([fitted.theta_P, uncertainty.draws.theta_SP])
    if declared is not None:
        exponents_S = _closed_form(fitted, theta_SP)
        tokens_exponents_S = 1 - exponents_S
    else:
        theta_SP = theta_SP[: _DRAWS + 1]
        low, high = float(rows["flops"].min()), float(rows["flops"].max())
        first_S, last_S = (_minimise_over_sizes(fitted, theta_SP, rows, per_token, each)[0] for each in (low, high))
        span = np.log(high / low) if high > low else np.nan
        exponents_S = np.log(last_S / first_S) / span
        tokens_exponents_S = np.log(per_token.tokens(high, last_S) / per_token.tokens(low, first_S)) / span
    best = []
    for budget in at:
        sizes_S, values_S = _minimise_over_sizes(fitted, theta_SP[: _DRAWS + 1], rows, per_token, budget)
        tokens_S = per_token.tokens(budget, sizes_S)
        best.append(
            Best(
                budget,
                float(sizes_S[0]),
                _interval(sizes_S, uncertainty, log=True),
                float(tokens_S[0]),
                _interval(tokens_S, uncertainty, log=True),
                float(values_S[0]),
            )
        )
    return Allocation(
        f"parametric {fitted.law.name}",
        len(fitted.y_n),
        float(exponents_S[0]),
        _interval(exponents_S, uncertainty),
        float(tokens_exponents_S[0]),
        _interval(tokens_exponents_S, uncertainty),
        tuple(best),
    )


def best_sizes(fitted: Fit, rows: pd.DataFrame, budgets: Array, declared: float | None = None) -> tuple[Array, Array]:
    """N_opt and D_opt of a law of N and D at budgets, without intervals."""
    per_token = FlopsPerToken(rows, declared)
    theta_1P = fitted.theta_P[None]
    found = [_minimise_over_sizes(fitted, theta_1P, rows, per_token, float(each))[0] for each in budgets]
    sizes = np.concatenate(found)
    return sizes, np.asarray(budgets / (per_token(sizes) * sizes))


def _closed_form(fitted: Fit, theta_SP: Array) -> Array:
    free = fitted.problem.free
    alpha_S = theta_SP[:, free.index("alpha")]
    beta_S = theta_SP[:, free.index("beta")] if "beta" in free else alpha_S
    return np.asarray(beta_S / (alpha_S + beta_S))


def _minimise_over_sizes(
    fitted: Fit, theta_SP: Array, rows: pd.DataFrame, per_token: FlopsPerToken, budget: float
) -> tuple[Array, Array]:
    """The best size at a budget and the value there, for each θ."""
    sizes = np.geomspace(rows["params"].min() / 300, rows["params"].max() * 3000, _GRID)
    problem = fitted.at(sizes, per_token.tokens(budget, sizes))
    u_Sn, _ = problem.evaluate(theta_SP)
    best_S = np.clip(u_Sn.argmin(axis=1), 1, _GRID - 2)
    every = np.arange(len(theta_SP))
    left, middle, right = (u_Sn[every, best_S + shift] for shift in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift_S = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0)
    step = np.log(sizes[1] / sizes[0])
    lowest_S = middle - 0.25 * (left - right) * shift_S
    return np.exp(np.log(sizes[best_S]) + step * np.clip(shift_S, -1, 1)), fitted.law.respond(lowest_S)


def _interval(values_S: Array, uncertainty: Uncertainty, log: bool = False) -> tuple[float, float]:
    """Percentiles of case draws; the estimate ± t times the spread of parametric ones."""
    drawn_S = values_S[1:]
    if uncertainty.draws.edge_SP is not None or uncertainty.draws.method.startswith("case"):
        low, high = np.quantile(drawn_S, [0.025, 0.975])
        return float(low), float(high)
    quantile = t_quantile(uncertainty.degrees_of_freedom)
    if log:
        half = quantile * uncertainty.draws.spread(np.log(drawn_S))
        return float(values_S[0] * np.exp(-half)), float(values_S[0] * np.exp(half))
    half = quantile * uncertainty.draws.spread(drawn_S)
    return float(values_S[0] - half), float(values_S[0] + half)
