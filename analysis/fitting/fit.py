"""Exact fits: Newton's method with analytic derivatives, from many starts at once.

Letters: S parameter vectors (starts or draws), n rows, P free parameters.
"""

from dataclasses import dataclass, field

import numpy as np

from analysis.errors import FitRefused
from analysis.fitting import profile_likelihood
from analysis.fitting.laws.base import NO_OFFSET, OFFSET, Array, Law, Problem
from analysis.fitting.laws.registry import LAWS
from analysis.fitting.newton import Objective, minimise, residuals_of
from analysis.fitting.starts import ROWS_FOR_STARTS, SOME_ROWS, from_many_starts

AGREEMENT = 1e-6
"""Starts agree when the objectives that they reach differ by less than this share."""


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
        agreeing: how many of them reached the best objective, to within a millionth of it.
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
        return self.law.respond(u_1n[0])

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
    near: Fit | None = None,
) -> Fit:
    """Fits a law to rows.

    Args:
        law: the law, or its name.
        inputs: one array an input of the law (x, or N and D), positive, in any unit.
        y: the values, positive (between 0 and 1 for power-logit).
        objective: what to minimise; the sum of Huber losses of log residuals by default.
        offset: holds E at this value.
        few_starts: a coarser grid of starts, for refits of rows that have been fitted before.
        near: a fit of much the same rows; with many rows its optimum is the only start.

    Raises:
        FitRefused: too few distinct rows for the law's parameters, or values that the law can't take.
    """
    law = LAWS[law] if isinstance(law, str) else law
    objective = objective or Objective()
    y = np.asarray(y, dtype=float)
    inputs = tuple(np.asarray(values, dtype=float) for values in inputs)
    check(law, inputs, y, offset)
    weights_n = np.ones_like(y)
    if near is not None and len(y) > SOME_ROWS:
        problem = Problem.of(law, inputs, offset, near.problem.centres)
        theta_SP, values_S = minimise(problem, y, weights_n[None], near.theta_P[None], objective)
        count = 1
    else:
        problem = Problem.of(law, inputs, offset)
        theta_SP, values_S, count = from_many_starts(problem, y, weights_n, objective, few_starts)
    best = int(np.argmin(values_S))
    theta_1P, polished_1 = minimise(
        problem, y, weights_n[None], theta_SP[[best]], objective, smooth=False, iterations=400
    )
    theta_P = theta_1P[0] if polished_1[0] <= values_S[best] else theta_SP[best]
    lowest = min(float(polished_1[0]), float(values_S[best]))
    minority = 2 * (values_S <= lowest * (1 + AGREEMENT)).sum() < count
    if OFFSET in problem.free and minority and not few_starts and len(y) <= ROWS_FOR_STARTS:
        bottom_P, value = profile_likelihood.bottom(problem, y, weights_n, theta_P, objective)
        theta_P = bottom_P if value < lowest else theta_P
    residuals_n = residuals_of(problem, y, theta_P[None], objective.raw)[0][0]
    value = float((weights_n * objective.terms(residuals_n)).sum())
    # Objectives of zero (as many parameters as rows) agree by what is lost against the values' own size.
    scale = max(value, 1e-14 * float(np.abs(y if objective.raw else law.linked(y)).sum()))
    agreeing = int((values_S <= value + AGREEMENT * scale).sum())
    lower_P, upper_P = problem.bounds(y)
    edge = (theta_P <= lower_P + 1e-6) | (theta_P >= upper_P - 1e-6)
    if OFFSET in problem.free:
        place = problem.free.index(OFFSET)
        edge[place] |= np.exp(theta_P[place]) < NO_OFFSET * y.min()
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
