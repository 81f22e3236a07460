"""Exact fits: many starts, analytic derivatives, all starts minimised at once.

Letters: S parameter vectors (starts or draws), n rows, J terms, P free parameters.

Where the law is a sum of terms, the coefficients at given exponents are a linear problem, so a start is a point of a
grid over the exponents alone, with coefficients from non-negative least squares (variable projection, Golub & Pereyra
1973). From there Newton's method minimises the objective itself.
"""

from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from scipy.optimize import nnls

from analysis import valley
from analysis.descent import Objective, bounds, minimise, residuals_of, respond, target
from analysis.errors import FitRefused
from analysis.laws import LAWS, NO_OFFSET, Array, Law, Problem

AGREEMENT = 1e-6
"""Starts agree when their objectives differ by less than this share."""
_ROWS_FOR_STARTS = 2000
_A_MATCH = 1.02
"""An optimum higher than the best by more than this on two thousand rows is not the best on all."""


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        law: the law.
        objective: what was minimised.
        value: the objective reached, a sum over rows.
        parameters: reported parameters by name, for inputs in their own units.
        theta_P: internal parameters (logarithms of centred coefficients, then exponents).
        problem: the law at the fitted rows.
        y_n: the fitted values.
        residuals_n: log y - log ŷ (log odds for power-logit, y - ŷ for raw least squares).
        starts: how many starts were tried.
        agreeing: how many ended within 1e-6 (relative) of the best objective.
        offset: the pinned offset, or None.
        at_bound: names of parameters that ended at the edge of what is allowed (an offset of zero, an exponent of 20).
    """

    law: Law
    objective: Objective
    value: float
    parameters: dict[str, float]
    theta_P: Array
    problem: Problem
    y_n: Array
    residuals_n: Array
    starts: int
    agreeing: int
    offset: float | None = None
    at_bound: tuple[str, ...] = field(default=())

    def predict(self, *inputs: Array) -> Array:
        """ŷ at inputs given in the same units as the fitted ones."""
        u_1n, _ = self.at(*inputs).evaluate(self.theta_P[None])
        return respond(self.law, u_1n[0])

    def at(self, *inputs: Array) -> Problem:
        """The fitted law at other rows, with the fit's centring, so that θ means the same."""
        arrays = tuple(np.atleast_1d(np.asarray(values, dtype=float)) for values in inputs)
        return Problem.of(self.law, arrays, self.offset, centres=self.problem.centres)

    @property
    def free_count(self) -> int:
        """Number of free parameters."""
        return len(self.problem.free)


def fit(
    law: Law | str,
    inputs: tuple[Array, ...],
    y: Array,
    *,
    objective: Objective | None = None,
    offset: float | None = None,
    few_starts: bool = False,
) -> Fit:
    """Fits a law to rows.

    Args:
        law: the law, or its name.
        inputs: one array an input of the law (x, or N and D), positive, in any unit.
        y: the values, positive (between 0 and 1 for power-logit).
        objective: what to minimise; the sum of Huber losses of log residuals by default.
        offset: holds E at this value.
        few_starts: a coarser grid of starts, for refits of rows that have been fitted before.

    Raises:
        FitRefused: too few distinct rows for the law's parameters, or values that the law can't take.
    """
    law = LAWS[law] if isinstance(law, str) else law
    objective = objective or Objective()
    y = np.asarray(y, dtype=float)
    inputs = tuple(np.asarray(values, dtype=float) for values in inputs)
    check(law, inputs, y, offset)
    problem = Problem.of(law, inputs, offset)
    weights_n = np.ones_like(y)
    theta_SP, values_S, count = _from_many_starts(problem, y, weights_n, objective, few_starts)
    best = int(np.argmin(values_S))
    theta_1P, polished_1 = minimise(
        problem, y, weights_n[None], theta_SP[[best]], objective, smooth=False, iterations=400
    )
    theta_P = theta_1P[0] if polished_1[0] <= values_S[best] else theta_SP[best]
    lowest = min(float(polished_1[0]), float(values_S[best]))
    minority = 2 * (values_S <= lowest * (1 + AGREEMENT)).sum() < count
    if "E" in problem.free and minority and not few_starts and len(y) <= _ROWS_FOR_STARTS:
        bottom_P, value = valley.bottom(problem, y, weights_n, theta_P, objective)
        theta_P = bottom_P if value < lowest else theta_P
    residuals_n = residuals_of(problem, y, theta_P[None], objective.raw)[0][0]
    value = float((weights_n * objective.terms(residuals_n)).sum())
    # Objectives of zero (as many parameters as rows) agree by what is lost against the values' own size.
    scale = max(value, 1e-14 * float(np.abs(target(law, y, objective.raw)).sum()))
    agreeing = int((values_S <= value + AGREEMENT * scale).sum())
    lower_P, upper_P = bounds(problem, y)
    edge = (theta_P <= lower_P + 1e-6) | (theta_P >= upper_P - 1e-6)
    if "E" in problem.free:
        edge[problem.free.index("E")] |= np.exp(theta_P[problem.free.index("E")]) < NO_OFFSET * y.min()
    return Fit(
        law=law,
        objective=objective,
        value=value,
        parameters=dict(zip(law.parameters, problem.natural(theta_P[None])[0].tolist(), strict=True)),
        theta_P=theta_P,
        problem=problem,
        y_n=y,
        residuals_n=residuals_n,
        starts=count,
        agreeing=agreeing,
        offset=offset,
        at_bound=tuple(name for name, hit in zip(problem.free, edge, strict=True) if hit),
    )


def check(law: Law, inputs: tuple[Array, ...], y: Array, offset: float | None) -> None:
    """Refuses data that the law can't be fitted to, saying why."""
    free = len(law.parameters) - (offset is not None)
    if any((values <= 0).any() or not np.isfinite(values).all() for values in inputs):
        raise FitRefused(f"{law.name}: inputs must be positive and finite")
    if (y <= 0).any() or not np.isfinite(y).all() or (law.link == "logit" and (y >= 1).any()):
        span = "between 0 and 1" if law.link == "logit" else "positive"
        raise FitRefused(f"{law.name}: values must be {span} and finite")
    if offset is not None and offset >= y.min():
        raise FitRefused(f"{law.name}: the offset pinned at {offset:g} is not below the lowest value, {y.min():.4g}")
    if len(y) > 1 and y.min() == y.max():
        raise FitRefused(f"{law.name}: all rows have the same value ({y[0]:g})")
    distinct = len(np.unique(np.stack(inputs), axis=1).T)
    if distinct <= free:
        raise FitRefused(
            f"{law.name} has {free} free parameters: it needs more than {free} distinct rows, not {distinct}"
        )
    for name, values in zip(law.inputs, inputs, strict=True):
        if len(np.unique(values)) < 2:
            raise FitRefused(f"{law.name}: all rows have the same {name} ({values[0]:g})")


def starting_points(problem: Problem, y: Array, weights_n: Array, raw: bool, few: bool = False) -> Array:
    """A grid over the exponents with the best non-negative coefficients at each point, (S, P)."""
    law = problem.law
    t_n = problem.log_inputs_In[0]
    values_n = target(law, y, raw=False)
    if len(law.terms) == 1:
        slope, intercept = np.polyfit(t_n, values_n, 1)
        spread = np.zeros(1) if few else np.array([0.0, -0.5, 0.5, -1.0, 1.0])
        return np.stack([np.full(len(spread), intercept), -slope + spread * max(abs(slope), 0.05)], axis=1)
    if not law.terms:
        return _break_starts(t_n, values_n)
    exponents = [name for name in problem.free if name in ("alpha", "beta")]
    points = (4 if few else 8) if len(exponents) > 1 else (6 if few else 24)
    grid = np.geomspace(0.02, 2.5, points)
    # Coefficients minimise relative residuals, which are log residuals to first order.
    scale_n = np.sqrt(weights_n) / (np.ones_like(y) if raw else y)
    offset = np.exp(problem.pinned_log_offset) if problem.pinned_log_offset is not None else 0.0
    coefficients = [term for term in law.terms if term.coefficient in problem.free]
    starts = []
    for point in product(grid, repeat=len(exponents)):
        chosen = dict(zip(exponents, point, strict=True))
        columns = [
            np.exp(-chosen[term.exponent] * problem.log_inputs_In[term.input]) if term.exponent else np.ones_like(y)
            for term in coefficients
        ]
        design_nJ, values_scaled_n = np.stack(columns, axis=1) * scale_n[:, None], (y - offset) * scale_n
        try:
            solution = nnls(design_nJ, values_scaled_n)[0]
        except RuntimeError:  # nnls circles where columns are all but the same
            solution = np.asarray(np.linalg.lstsq(design_nJ, values_scaled_n, rcond=None)[0], dtype=np.float64)
        floor = 1e-3 * float(np.median(y))
        logs = np.log(np.maximum(solution, floor))
        by_name = {term.coefficient: value for term, value in zip(coefficients, logs, strict=True)} | chosen
        starts.append([by_name[name] for name in problem.free])
    return np.array(starts)


def _from_many_starts(
    problem: Problem, y: Array, weights_n: Array, objective: Objective, few: bool
) -> tuple[Array, Array, int]:
    """Where the starts ended (S, P), their objectives and how many there were.

    With very many rows the starts run on an even subset of them, and what they find is then refined on all rows, each
    distinct optimum once, but for those that are no match for the best already on the subset.
    """
    every = len(y) // _ROWS_FOR_STARTS + 1
    if every == 1:
        starts_SP = starting_points(problem, y, weights_n, objective.raw, few)
        weights_Sn = np.broadcast_to(weights_n, (len(starts_SP), len(y)))
        theta_SP, values_S = minimise(problem, y, weights_Sn, starts_SP, objective)
        return theta_SP, values_S, len(starts_SP)
    chosen = np.sort(np.random.default_rng(0).permutation(len(y))[: len(y) // every])
    subset = replace(problem, log_inputs_In=problem.log_inputs_In[:, chosen])
    starts_SP = starting_points(subset, y[chosen], weights_n[chosen], objective.raw, few)
    weights_Sn = np.broadcast_to(weights_n[chosen], (len(starts_SP), len(chosen)))
    theta_SP, values_S = minimise(subset, y[chosen], weights_Sn, starts_SP, objective)
    _, first, inverse = np.unique(np.round(np.log(values_S + 1e-300), 4), return_index=True, return_inverse=True)
    first = first[values_S[first] <= _A_MATCH * values_S.min()][:5]
    refined_SP, refined_S = minimise(
        problem, y, np.broadcast_to(weights_n, (len(first), len(y))), theta_SP[first], objective
    )
    lost_S = inverse >= len(first)
    kept_S = np.minimum(inverse, len(first) - 1)
    return refined_SP[kept_S], np.where(lost_S, np.inf, refined_S[kept_S]), len(starts_SP)


def _break_starts(t_n: Array, values_n: Array) -> Array:
    """Places of the break across the data, with slopes by least squares at each."""
    starts = []
    span = max(float(np.ptp(t_n)), 1e-9)
    for place in np.linspace(t_n.min() - 0.1 * span, t_n.max() + 0.1 * span, 15):
        beyond_n = np.logaddexp(0.0, t_n - place)
        columns = np.stack([np.ones_like(t_n), beyond_n - t_n, -beyond_n], axis=1)
        (a, alpha, beta), *_ = np.linalg.lstsq(columns, values_n, rcond=None)
        starts.append([a, place, alpha, beta])
    return np.array(starts)
