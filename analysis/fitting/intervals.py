"""Standard errors, covariance and intervals from draws of the bootstrap.

The interval of a quantity is its estimate ± Student's t (n - p degrees of freedom) × the draws' spread, or its range
within the 95% level of the likelihood where the rows hardly tell the offset (`profile_likelihood`), or the quantiles of
draws of whole runs. An offset lies between zero and the lowest value. Exponents and the
offset are taken as they are, the coefficients A and B and predictions on the logarithmic scale. docs/laws.md has the
coverage measured on planted laws.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy import special

from analysis.fitting.bootstrap import Draws, scatter
from analysis.fitting.fit import Fit
from analysis.fitting.laws.base import NO_OFFSET, OFFSET, Array, Problem, is_exponent


@dataclass(frozen=True)
class Uncertainty:
    """How well the parameters are known.

    Attributes:
        method: how the draws were made.
        standard_errors: by parameter name: the draws' spread.
        ci95: 95% intervals by parameter name.
        covariance: of the parameters, in the law's order.
        correlations: of the internal parameters (centred inputs) at the optimum, (JᵀJ)⁻¹ scaled to one on its diagonal.
        scatter: standard deviation of a single row around the law, in the residuals' space.
        degrees_of_freedom: rows (cells, where seeds are said) minus free parameters.
        draws: the draws themselves.
    """

    method: str
    standard_errors: dict[str, float]
    ci95: dict[str, tuple[float, float]]
    covariance: list[list[float]]
    correlations: Array
    scatter: float
    degrees_of_freedom: int
    draws: Draws


@dataclass(frozen=True)
class Prediction:
    """A law's value at one point, with an interval for the curve and one for a new run."""

    value: float
    curve_ci95: tuple[float, float]
    new_run_ci95: tuple[float, float]


def from_draws(fitted: Fit, draws: Draws) -> Uncertainty:
    """Intervals of the reported parameters."""
    # Of checkpoints the rows tell how much one scatters; how far the law is known, the draws of runs tell.
    degrees = max((len(fitted.y_n) if draws.of_runs else draws.units) - fitted.free_count, 1)
    quantile = t_quantile(degrees)
    natural_SP = fitted.problem.natural(draws.theta_SP)
    errors, intervals = {}, {}
    for place, (name, value) in enumerate(fitted.parameters.items()):
        plain = name == OFFSET or is_exponent(name)
        of = partial(_parameter if plain else _log_parameter, fitted, place)
        middle = value if plain else float(np.log(max(value, 1e-300)))
        if draws.region is not None:
            low, high = draws.region.of_parameter(name)
            low, high = min(low, middle), max(high, middle)
        else:
            low, high = draws.interval(middle, of, quantile)
        if name == OFFSET:
            none = low < NO_OFFSET * fitted.y_n.min()
            low, high = 0.0 if none else low, max(min(high, float(fitted.y_n.min())), value)
        if not plain:
            if ends := fitted.law.bounds(fitted.problem, name):
                turned = middle - float(fitted.theta_P[fitted.problem.free.index(name)])
                low, high = max(low, ends[0] + turned), min(high, ends[1] + turned)
            low, high = float(np.exp(max(low, -700.0))), float(np.exp(min(high, 700.0)))
        intervals[name] = (low, high)
        errors[name] = draws.spread(natural_SP[:, place])
    return Uncertainty(
        method=draws.method,
        standard_errors=errors,
        ci95={name: (float(low), float(high)) for name, (low, high) in intervals.items()},
        covariance=_covariance(natural_SP, np.array(list(errors.values()))).tolist(),
        correlations=_local_correlations(fitted),
        scatter=scatter(fitted),
        degrees_of_freedom=degrees,
        draws=draws,
    )


def predict(fitted: Fit, uncertainty: Uncertainty, *inputs: Array) -> list[Prediction]:
    """The law at points given, each with both intervals."""
    problem = fitted.at(*inputs)
    u_m = problem.evaluate(fitted.theta_P[None])[0][0]
    quantile = t_quantile(uncertainty.degrees_of_freedom)
    region = uncertainty.draws.region
    ends_m2 = None if region is None else np.stack(region.of_predictions(problem), axis=1)
    found = []
    for place, u in enumerate(u_m):
        if ends_m2 is None:
            alone = replace(problem, log_inputs_In=problem.log_inputs_In[:, [place]])
            below, above = uncertainty.draws.interval(float(u), partial(_linked, alone), quantile)
        else:
            below, above = min(ends_m2[place, 0], u), max(ends_m2[place, 1], u)
        value = float(fitted.law.respond(u))
        # Raw residuals have the values' unit; relative to the value they are a scatter of the logarithm.
        around = uncertainty.scatter / value if fitted.objective.raw else uncertainty.scatter
        pairs = []
        for scattered in (0.0, quantile * around):
            ends = u - np.hypot(u - below, scattered), u + np.hypot(above - u, scattered)
            low, high = (float(fitted.law.respond(end)) for end in ends)
            pairs.append((low, high))
        found.append(Prediction(value, pairs[0], pairs[1]))
    return found


def _parameter(fitted: Fit, place: int, theta_SP: Array) -> Array:
    return fitted.problem.natural(theta_SP)[:, place]


def _log_parameter(fitted: Fit, place: int, theta_SP: Array) -> Array:
    return np.asarray(np.log(np.maximum(_parameter(fitted, place, theta_SP), 1e-300)))


def _linked(alone: Problem, theta_SP: Array) -> Array:
    """The linked prediction at a problem's only row."""
    return alone.evaluate(theta_SP)[0][:, 0]


def t_quantile(degrees: int) -> float:
    """Student's t at the upper end of a two-sided 95% interval."""
    return float(special.stdtrit(degrees, 0.975))


def _local_correlations(fitted: Fit) -> Array:
    covariance_PP = fitted.problem.covariance(fitted.theta_P[None], np.ones((1, len(fitted.y_n))))[0]
    errors_P = np.maximum(np.sqrt(np.maximum(np.diag(covariance_PP), 0.0)), 1e-300)
    return np.asarray(covariance_PP / errors_P / errors_P[:, None])


def _covariance(natural_SP: Array, errors_P: Array) -> Array:
    """Correlations of the draws with the standard errors reported, so that the diagonal is their squares."""
    with np.errstate(over="ignore"):
        return np.asarray(_correlations(natural_SP) * np.outer(errors_P, errors_P))


def _correlations(values_SP: Array) -> Array:
    scale_P = np.maximum(np.abs(values_SP).max(axis=0), 1e-300)
    deviations = values_SP / scale_P - (values_SP / scale_P).mean(axis=0)
    sizes = np.sqrt((deviations**2).sum(axis=0))
    sizes = np.where(sizes > 0, sizes, 1.0)
    return np.asarray((deviations / sizes).T @ (deviations / sizes))
