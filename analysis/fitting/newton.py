"""Damped Newton for many parameter vectors at once: starts of one fit, or draws of a bootstrap.

Letters: S parameter vectors, n rows, J terms, P free parameters.

Huber's loss with a small δ, and least absolute deviations, are approached through a sequence of smoother problems (δ
shrinking), each solved from the last one's solution.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import huber

from analysis.fitting.laws.base import Array, Problem

ObjectiveName = Literal["huber", "lad", "lsq-log", "lsq"]
OBJECTIVES: dict[str, str] = {
    "huber": "sum of Huber losses (½r² inside δ, δ(|r| - δ/2) outside) of log residuals",
    "lad": "sum of absolute log residuals",
    "lsq-log": "sum of squared log residuals",
    "lsq": "sum of squared residuals",
}
_LAD_DELTA = 1e-9


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
            return np.asarray(huber(self.delta, residuals))
        return np.abs(residuals) if self.name == "lad" else np.square(residuals)


def minimise(
    problem: Problem,
    y: Array,
    weights_Sn: Array,
    start_SP: Array,
    objective: Objective,
    *,
    smooth: bool = True,
    iterations: int = 200,
    held: int | None = None,
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
        held: a parameter that keeps each start's value.
    """
    last, raw = objective.final_delta, objective.raw
    if last is None:
        theta_SP = _newton(problem, y, weights_Sn, start_SP, raw, None, iterations, 1e-13, held)
    else:
        theta_SP = start_SP
        if smooth:
            typical = float(np.median(np.abs(residuals_of(problem, y, start_SP, objective.raw)[0])))
            delta = max(min(typical, 0.1), last)
            while delta > 3 * last:
                theta_SP = _newton(problem, y, weights_Sn, theta_SP, raw, delta, min(iterations, 30), 1e-7, held)
                delta /= 5
        theta_SP = _newton(problem, y, weights_Sn, theta_SP, raw, last, iterations, 1e-13, held)
    residuals_Sn = residuals_of(problem, y, theta_SP, raw)[0]
    return theta_SP, (weights_Sn * objective.terms(residuals_Sn)).sum(axis=1)


def residuals_of(problem: Problem, y: Array, theta_SP: Array, raw: bool) -> tuple[Array, Array, Array]:
    """Residuals (S, n), linked predictions and terms' shares."""
    u_Sn, shares_JSn = problem.evaluate(theta_SP)
    residuals_Sn = y - problem.law.respond(u_Sn) if raw else problem.law.linked(y) - u_Sn
    return residuals_Sn, u_Sn, shares_JSn


def _loss(residuals: Array, delta: float | None) -> Array:
    """The loss per row that Newton minimises, scaled so that its curvature at zero is one."""
    if delta is None:
        return 0.5 * residuals**2
    return np.asarray(huber(delta, residuals))


def _newton(
    problem: Problem,
    y: Array,
    weights_Sn: Array,
    start_SP: Array,
    raw: bool,
    delta: float | None,
    iterations: int,
    tolerance: float,
    held: int | None,
) -> Array:
    """Newton steps with the exact Hessian, damped by the matrix of iteratively reweighted least squares.

    That matrix is positive definite and scales with the problem, so the damping doesn't depend on units; with much
    damping the step is a short step of reweighted least squares, which lowers the objective.
    """
    lower_P, upper_P = problem.bounds(y)
    reached_SP = np.clip(start_SP, lower_P, upper_P)
    # All below is of the starts still under way, `active` says which; finished ones are left in reached_SP.
    active, theta_SP, w_Sn = np.arange(len(reached_SP)), reached_SP, weights_Sn
    damping_S, still_S = np.full(len(theta_SP), 0.1), np.zeros(len(theta_SP), dtype=int)
    r_Sn, u_Sn, shares_JSn = residuals_of(problem, y, theta_SP, raw)
    value_S = (w_Sn * _loss(r_Sn, delta)).sum(axis=1)
    identity = np.eye(theta_SP.shape[1])
    for _ in range(iterations):
        psi_Sn, slope_Sn, reweight_Sn = _psi(r_Sn, delta)
        first_Sn, second_Sn = (
            problem.law.response_derivatives(u_Sn) if raw else (np.ones_like(u_Sn), np.zeros_like(u_Sn))
        )
        pull_Sn = w_Sn * psi_Sn * first_Sn
        gradient_SP = -problem.gradient(theta_SP, shares_JSn, pull_Sn)
        outer_Sn = w_Sn * (slope_Sn * first_Sn**2 - psi_Sn * second_Sn)
        hessian_SPP = problem.curvature(theta_SP, shares_JSn, outer_Sn, -pull_Sn)
        metric_SPP = problem.curvature(theta_SP, shares_JSn, w_Sn * reweight_Sn * first_Sn**2, np.zeros_like(r_Sn))
        diagonal_SP = np.einsum("spp->sp", metric_SPP)
        ridge_SP = 1e-9 * diagonal_SP + 1e-12 * diagonal_SP.max(axis=1, keepdims=True) + 1e-300
        metric_SPP = metric_SPP + identity * ridge_SP[:, None]
        system_SPP = hessian_SPP + damping_S[:, None, None] * metric_SPP
        if held is not None:
            gradient_SP[:, held] = 0.0
            system_SPP[:, held, :] = system_SPP[:, :, held] = identity[held]
            metric_SPP[:, held, held] = 1.0
        step_SP = _solve(system_SPP, metric_SPP, gradient_SP)
        trial_SP = np.clip(theta_SP - step_SP, lower_P, upper_P)
        trial_r, trial_u, trial_shares = residuals_of(problem, y, trial_SP, raw)
        trial_value = (w_Sn * _loss(trial_r, delta)).sum(axis=1)
        decrease_S = value_S - trial_value
        better_S = decrease_S > 0
        better_S1 = better_S[:, None]
        theta_SP = np.where(better_S1, trial_SP, theta_SP)
        r_Sn, u_Sn = np.where(better_S1, trial_r, r_Sn), np.where(better_S1, trial_u, u_Sn)
        shares_JSn = np.where(better_S1, trial_shares, shares_JSn)
        value_S = np.where(better_S, trial_value, value_S)
        # Done: the undamped step promises nothing, three steps in a row gain nothing, or no step of any damping does.
        nothing_S = tolerance * np.abs(value_S)
        still_S = np.where(better_S, np.where(decrease_S <= nothing_S, still_S + 1, 0), still_S)
        promised_S = (gradient_SP * step_SP).sum(axis=1) * (1 + damping_S)
        damping_S = np.where(better_S, damping_S * 0.1, np.maximum(damping_S * 8, 1e-8))
        damping_S[damping_S < 1e-10] = 0.0
        going_S = (promised_S > nothing_S) & (still_S < 2) & (damping_S <= 1e8) & (value_S >= 1e-30)
        if going_S.all():
            continue
        reached_SP[active] = theta_SP
        active, theta_SP, w_Sn = active[going_S], theta_SP[going_S], w_Sn[going_S]
        if not len(active):
            break
        damping_S, still_S, value_S = damping_S[going_S], still_S[going_S], value_S[going_S]
        r_Sn, u_Sn, shares_JSn = r_Sn[going_S], u_Sn[going_S], shares_JSn[:, going_S]
        y = y if y.ndim == 1 else y[going_S]
    reached_SP[active] = theta_SP
    return reached_SP


def _psi(r_Sn: Array, delta: float | None) -> tuple[Array, Array, Array]:
    """The loss's first and second derivative by a residual, and the weight of iteratively reweighted least squares."""
    if delta is None:
        ones_Sn = np.ones_like(r_Sn)
        return r_Sn, ones_Sn, ones_Sn
    size_Sn = np.abs(r_Sn)
    return np.clip(r_Sn, -delta, delta), (size_Sn <= delta).astype(float), delta / np.maximum(size_Sn, delta)


def _solve(system_SPP: Array, metric_SPP: Array, gradient_SP: Array) -> Array:
    """Solves for the steps; where the system is not positive definite, the metric takes its place."""
    scale_SP = 1.0 / np.sqrt(np.maximum(np.einsum("spp->sp", metric_SPP), 1e-300))
    scaled = system_SPP * scale_SP[:, :, None] * scale_SP[:, None, :]
    values_SP, vectors_SPP = np.linalg.eigh(scaled)
    # Directions of negative curvature are taken downhill with their size; flat ones are kept short.
    size_SP = np.maximum(np.abs(values_SP), 1e-9 * np.abs(values_SP).max(axis=1, keepdims=True) + 1e-300)
    projected_SP = np.einsum("spq,sp->sq", vectors_SPP, gradient_SP * scale_SP)
    return np.asarray(np.einsum("spq,sq->sp", vectors_SPP, projected_SP / size_SP) * scale_SP)
