"""Standard errors, covariance and intervals of a fit from its curvature."""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.fitting import Fit
from analysis.laws import Array


@dataclass(frozen=True)
class Uncertainty:
    """How well the parameters are known.

    Attributes:
        method: how the intervals were found.
        standard_errors: by parameter name.
        ci95: 95% intervals by parameter name.
        covariance: of the parameters, in the law's order.
        covariance_theta_PP: of the internal parameters.
        scatter: standard deviation of a single row around the law, in the residuals' space.
        degrees_of_freedom: rows minus free parameters.
    """

    method: str
    standard_errors: dict[str, float]
    ci95: dict[str, tuple[float, float]]
    covariance: list[list[float]]
    covariance_theta_PP: Array
    scatter: float
    degrees_of_freedom: int


def linearised(fitted: Fit) -> Uncertainty | None:
    """Normal theory around the optimum, with Student's t; coefficients on the logarithmic scale.

    The covariance is s²(JᵀJ)⁻¹, times π/2 for the objectives that weigh residuals by size rather than by square (the
    asymptotic variance of a median against a mean, for normal errors). None where no degrees of freedom are left.
    """
    degrees = len(fitted.y_n) - fitted.free_count
    if degrees < 1:
        return None
    _, shares_J1n = fitted.problem.evaluate(fitted.theta_P[None])
    jacobian_nP = fitted.problem.jacobian(fitted.theta_P[None], shares_J1n)[0]
    if fitted.objective.raw:
        jacobian_nP = jacobian_nP * (fitted.y_n - fitted.residuals_n)[:, None]
    scatter = float(np.sqrt((fitted.residuals_n**2).sum() / degrees))
    inflation = np.pi / 2 if fitted.objective.name in ("huber", "lad") else 1.0
    covariance_PP = inflation * scatter**2 * np.linalg.pinv(jacobian_nP.T @ jacobian_nP, hermitian=True)
    transform = fitted.problem.natural_jacobian(fitted.theta_P)
    natural_covariance = transform @ covariance_PP @ transform.T
    errors = np.sqrt(np.maximum(np.diag(natural_covariance), 0.0))
    quantile = float(stats.t.ppf(0.975, degrees))
    intervals = {}
    for name, value, error in zip(fitted.law.parameters, fitted.parameters.values(), errors, strict=True):
        if name in ("alpha", "beta"):
            intervals[name] = (value - quantile * float(error), value + quantile * float(error))
        else:
            factor = float(np.exp(min(quantile * float(error) / value, 700.0))) if value > 0 else 1.0
            intervals[name] = (value / factor, value * factor)
    return Uncertainty(
        method="linearised",
        standard_errors=dict(zip(fitted.law.parameters, errors.tolist(), strict=True)),
        ci95=intervals,
        covariance=natural_covariance.tolist(),
        covariance_theta_PP=covariance_PP,
        scatter=scatter,
        degrees_of_freedom=degrees,
    )
