"""Exact fits: many starts, analytic derivatives, a damped Newton method for all starts (or bootstrap draws) at once.

Letters: S parameter vectors (starts or draws), n rows, J terms, P free parameters.

Where the law is a sum of terms, the coefficients at given exponents are a linear problem, so a start is a point of a
grid over the exponents alone, with coefficients from non-negative least squares (variable projection, Golub & Pereyra
1973). From there Newton's method minimises the objective itself. Huber's loss with a small δ, and least absolute
deviations, are approached through a sequence of smoother problems (δ shrinking), each solved from the last one's
solution.
"""

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

import numpy as np
from scipy.optimize import nnls

from analysis.errors import FitRefused
from analysis.laws import LAWS, Array, Law, Problem

ObjectiveName = Literal["huber", "lad", "lsq-log", "lsq"]
OBJECTIVES: dict[str, str] = {
    "huber": "sum of Huber losses (½r² inside δ, δ(|r| - δ/2) outside) of log residuals",
    "lad": "sum of absolute log residuals",
    "lsq-log": "sum of squared log residuals",
    "lsq": "sum of squared residuals",
}
_LAD_DELTA = 1e-9
_AGREEMENT = 1e-6
_ROWS_FOR_STARTS = 2000


@dataclass(frozen=True)
class Objective:
    """What a fit minimises: a sum over rows, of residuals in log space (log odds for power-logit) or raw."""

    name: ObjectiveName = "huber"
    delta: float = 1e-3

    @property
    def raw(self) -> bool:
        """Whether residuals are of the values themselves rather than of their logarithms."""
        return self.name == "lsq"

    @property
    def final_delta(self) -> float | None:
        """Where the loss turns from quadratic to linear; None for least squares."""
        return {"huber": self.delta, "lad": _LAD_DELTA}.get(self.name)

    def terms(self, residuals: Array) -> Array:
        """The loss of each residual, as reported."""
        if self.name == "huber":
            size = np.abs(residuals)
            return np.where(size <= self.delta, 0.5 * residuals**2, self.delta * (size - 0.5 * self.delta))
        return np.abs(residuals) if self.name == "lad" else np.square(residuals)


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
    weights: Array | None = None,
    few_starts: bool = False,
) -> Fit:
    """Fits a law to rows.

    Args:
        law: the law, or its name.
        inputs: one array an input of the law (x, or N and D), positive, in any unit.
        y: the values, positive (between 0 and 1 for power-logit).
        objective: what to minimise; the sum of Huber losses of log residuals by default.
        offset: holds E at this value.
        weights: how often each row counts (all once by default).
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
    weights_n = np.ones_like(y) if weights is None else np.asarray(weights, dtype=float)
    theta_SP, values_S, count = _from_many_starts(problem, y, weights_n, objective, few_starts)
    best = int(np.argmin(values_S))
    theta_1P, polished_1 = minimise(
        problem, y, weights_n[None], theta_SP[[best]], objective, smooth=False, iterations=400
    )
    theta_P = theta_1P[0] if polished_1[0] <= values_S[best] else theta_SP[best]
    residuals_n = _residuals(problem, y, theta_P[None], objective.raw)[0][0]
    value = float((weights_n * objective.terms(residuals_n)).sum())
    # Objectives of zero (as many parameters as rows) agree by what is lost against the values' own size.
    scale = max(value, 1e-14 * float(np.abs(target(law, y, objective.raw)).sum()))
    agreeing = int((values_S <= value + _AGREEMENT * scale).sum())
    lower_P, upper_P = _bounds(problem, y)
    edge = (theta_P <= lower_P + 1e-6) | (theta_P >= upper_P - 1e-6)
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
    distinct = len(np.unique(np.stack(inputs), axis=1).T)
    if distinct <= free:
        raise FitRefused(
            f"{law.name} has {free} free parameters: it needs more than {free} distinct rows, not {distinct}"
        )
    for name, values in zip(law.inputs, inputs, strict=True):
        if len(np.unique(values)) < 2:
            raise FitRefused(f"{law.name}: all rows have the same {name} ({values[0]:g})")


def target(law: Law, y: Array, raw: bool) -> Array:
    """The values in the space where residuals are taken."""
    if raw:
        return y
    return np.asarray(np.log(y) - np.log1p(-y) if law.link == "logit" else np.log(y))


def respond(law: Law, u: Array) -> Array:
    """The linked prediction back to the values' own units."""
    return np.asarray(1.0 / (1.0 + np.exp(-u)) if law.link == "logit" else np.exp(u))


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
        solution, _ = nnls(np.stack(columns, axis=1) * scale_n[:, None], (y - offset) * scale_n)
        floor = 1e-3 * float(np.median(y))
        logs = np.log(np.maximum(solution, floor))
        by_name = {term.coefficient: value for term, value in zip(coefficients, logs, strict=True)} | chosen
        starts.append([by_name[name] for name in problem.free])
    return np.array(starts)


def minimise(
    problem: Problem,
    y: Array,
    weights_Sn: Array,
    start_SP: Array,
    objective: Objective,
    *,
    smooth: bool = True,
    iterations: int = 200,
) -> tuple[Array, Array]:
    """Damped Newton from each start: the θ reached, (S, P), and the objectives there, (S,).

    Args:
        problem: the law at the rows.
        y: the values, (n,) or one row a start (S, n).
        weights_Sn: how often each row counts.
        start_SP: where to start.
        objective: what to minimise.
        smooth: approach Huber and LAD through larger δ.
        iterations: at most so many steps for each δ.
    """
    last = objective.final_delta
    if last is None:
        theta_SP = _newton(problem, y, weights_Sn, start_SP, objective.raw, None, iterations, 1e-13)
    else:
        theta_SP = start_SP
        if smooth:
            typical = float(np.median(np.abs(_residuals(problem, y, start_SP, objective.raw)[0])))
            delta = max(min(typical, 0.1), last)
            while delta > 3 * last:
                theta_SP = _newton(problem, y, weights_Sn, theta_SP, objective.raw, delta, min(iterations, 30), 1e-7)
                delta /= 5
        theta_SP = _newton(problem, y, weights_Sn, theta_SP, objective.raw, last, iterations, 1e-13)
    residuals_Sn = _residuals(problem, y, theta_SP, objective.raw)[0]
    return theta_SP, (weights_Sn * objective.terms(residuals_Sn)).sum(axis=1)


def with_objective(fitted: Fit, name: ObjectiveName) -> Fit:
    """The same rows fitted with another objective."""
    inputs = tuple(
        np.exp(logs + centre) for logs, centre in zip(fitted.problem.log_inputs_In, fitted.problem.centres, strict=True)
    )
    objective = replace(fitted.objective, name=name)
    return fit(fitted.law, inputs, fitted.y_n, objective=objective, offset=fitted.offset)


def _from_many_starts(
    problem: Problem, y: Array, weights_n: Array, objective: Objective, few: bool
) -> tuple[Array, Array, int]:
    """Where the starts ended (S, P), their objectives and how many there were.

    With very many rows the starts run on an even subset of them, and what they find is then refined on all rows, each
    distinct optimum once.
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
    first, kept = first[:5], np.minimum(inverse, 4)
    refined_SP, refined_S = minimise(
        problem, y, np.broadcast_to(weights_n, (len(first), len(y))), theta_SP[first], objective
    )
    return refined_SP[kept], refined_S[kept], len(starts_SP)


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


def _bounds(problem: Problem, y: Array) -> tuple[Array, Array]:
    """A box wide enough never to matter for a law that the data identify."""
    low, high = float(np.log(np.min(y))), float(np.log(np.max(y)))
    lower, upper = [], []
    single = len(problem.law.terms) <= 1
    t_n = problem.log_inputs_In[0]
    for name in problem.free:
        if name in ("alpha", "beta"):
            lower.append(-20.0 if single else 1e-4)
            upper.append(20.0)
        elif name == "B" and not problem.law.terms:
            lower.append(float(t_n.min()) - 3.0)
            upper.append(float(t_n.max()) + 3.0)
        else:
            lower.append(low - 25.0)
            upper.append(high + 25.0)
    return np.array(lower), np.array(upper)


def _residuals(problem: Problem, y: Array, theta_SP: Array, raw: bool) -> tuple[Array, Array, Array]:
    """Residuals (S, n), linked predictions and terms' shares."""
    u_Sn, shares_JSn = problem.evaluate(theta_SP)
    predicted_Sn = respond(problem.law, u_Sn) if raw else u_Sn
    return target(problem.law, y, raw) - predicted_Sn, u_Sn, shares_JSn


def _loss(residuals: Array, delta: float | None) -> Array:
    """The loss per row that Newton minimises, scaled so that its curvature at zero is one."""
    if delta is None:
        return 0.5 * residuals**2
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * residuals**2, delta * (size - 0.5 * delta))


def _newton(
    problem: Problem,
    y: Array,
    weights_Sn: Array,
    start_SP: Array,
    raw: bool,
    delta: float | None,
    iterations: int,
    tolerance: float,
) -> Array:
    """Newton steps with the exact Hessian, damped by the matrix of iteratively reweighted least squares.

    That matrix is positive definite and scales with the problem, so the damping doesn't depend on units; with much
    damping the step is a short step of reweighted least squares, which lowers the objective.
    """
    lower_P, upper_P = _bounds(problem, y)
    theta_SP = np.clip(start_SP, lower_P, upper_P)
    parameters = theta_SP.shape[1]
    y_is_shared = y.ndim == 1
    active = np.arange(len(theta_SP))
    damping_S = np.full(len(theta_SP), 0.1)
    still_S = np.zeros(len(theta_SP), dtype=int)
    residuals_Sn, u_Sn, shares_JSn = _residuals(problem, y, theta_SP, raw)
    value_S = (weights_Sn * _loss(residuals_Sn, delta)).sum(axis=1)
    identity = np.eye(parameters)
    for _ in range(iterations):
        if not len(active):
            break
        now_SP, w_Sn = theta_SP[active], weights_Sn[active]
        r_Sn, shares = residuals_Sn[active], shares_JSn[:, active]
        if delta is None:
            psi_Sn, slope_Sn, reweight_Sn = r_Sn, np.ones_like(r_Sn), np.ones_like(r_Sn)
        else:
            size_Sn = np.abs(r_Sn)
            psi_Sn = np.clip(r_Sn, -delta, delta)
            slope_Sn = (size_Sn <= delta).astype(float)
            reweight_Sn = delta / np.maximum(size_Sn, delta)
        first_Sn, second_Sn = _response_derivatives(problem.law, u_Sn[active], raw)
        gradient_SP = -problem.gradient(now_SP, shares, w_Sn * psi_Sn * first_Sn)
        curvature_outer = w_Sn * (slope_Sn * first_Sn**2 - psi_Sn * second_Sn)
        hessian_SPP = problem.curvature(now_SP, shares, curvature_outer, -w_Sn * psi_Sn * first_Sn)
        metric_SPP = problem.curvature(now_SP, shares, w_Sn * reweight_Sn * first_Sn**2, np.zeros_like(r_Sn))
        diagonal_SP = np.einsum("spp->sp", metric_SPP)
        ridge_SP = 1e-9 * diagonal_SP + 1e-12 * diagonal_SP.max(axis=1, keepdims=True) + 1e-300
        metric_SPP = metric_SPP + identity * ridge_SP[:, None]
        system_SPP = hessian_SPP + damping_S[active, None, None] * metric_SPP
        step_SP = _solve(system_SPP, metric_SPP, gradient_SP)
        trial_SP = np.clip(now_SP - step_SP, lower_P, upper_P)
        rows_y = y if y_is_shared else y[active]
        trial_r, trial_u, trial_shares = _residuals(problem, rows_y, trial_SP, raw)
        trial_value = (w_Sn * _loss(trial_r, delta)).sum(axis=1)
        decrease_S = value_S[active] - trial_value
        better_S = decrease_S > 0
        accepted = active[better_S]
        theta_SP[accepted] = trial_SP[better_S]
        residuals_Sn[accepted], u_Sn[accepted] = trial_r[better_S], trial_u[better_S]
        shares_JSn[:, accepted] = trial_shares[:, better_S]
        value_S[accepted] = trial_value[better_S]
        damping_S[active] = np.where(better_S, damping_S[active] * 0.1, np.maximum(damping_S[active] * 8, 1e-8))
        damping_S[active] = np.where(damping_S[active] < 1e-10, 0.0, damping_S[active])
        # Done: three steps in a row gain nothing, or no step of any damping does.
        small_S = decrease_S <= tolerance * np.abs(value_S[active])
        still_S[active] = np.where(small_S & better_S, still_S[active] + 1, np.where(better_S, 0, still_S[active]))
        done_S = (still_S[active] >= 2) | (damping_S[active] > 1e8) | (value_S[active] < 1e-30)
        active = active[~done_S]
    return theta_SP


def _response_derivatives(law: Law, u_Sn: Array, raw: bool) -> tuple[Array, Array]:
    """First and second derivative of the prediction, in the residuals' space, by the linked prediction u."""
    if not raw:
        return np.ones_like(u_Sn), np.zeros_like(u_Sn)
    value_Sn = respond(law, u_Sn)
    if law.link == "logit":
        slope_Sn = value_Sn * (1 - value_Sn)
        return slope_Sn, slope_Sn * (1 - 2 * value_Sn)
    return value_Sn, value_Sn


def _solve(system_SPP: Array, metric_SPP: Array, gradient_SP: Array) -> Array:
    """Solves for the steps; where the system is not positive definite, the metric takes its place."""
    scale_SP = 1.0 / np.sqrt(np.maximum(np.einsum("spp->sp", metric_SPP), 1e-300))
    scaled = system_SPP * scale_SP[:, :, None] * scale_SP[:, None, :]
    values_SP, vectors_SPP = np.linalg.eigh(scaled)
    # Directions of negative curvature are taken downhill with their size; flat ones are kept short.
    size_SP = np.maximum(np.abs(values_SP), 1e-9 * np.abs(values_SP).max(axis=1, keepdims=True) + 1e-300)
    projected_SP = np.einsum("spq,sp->sq", vectors_SPP, gradient_SP * scale_SP)
    return np.asarray(np.einsum("spq,sq->sp", vectors_SPP, projected_SP / size_SP) * scale_SP)
