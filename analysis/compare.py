"""Two groups of runs side by side: exponents, loss at matched compute, and how much more compute one needs."""

from dataclasses import dataclass

import numpy as np

from analysis.errors import FitRefused
from analysis.fitting import Fit
from analysis.intervals import Uncertainty, t_quantile
from analysis.laws import Array

_SAME_COMPUTE = 0.05


@dataclass(frozen=True)
class Side:
    """One group: its frontier (compute and target) and the power law fitted to it."""

    name: str
    flops: Array
    values: Array
    fitted: Fit
    uncertainty: Uncertainty


@dataclass(frozen=True)
class Comparison:
    """What distinguishes group A from group B.

    Attributes:
        target: the column compared.
        a: name of A.
        b: name of B.
        exponent_difference: α of A minus α of B (power laws of compute).
        exponent_ci95: its interval.
        matched_budgets: number of budgets that both have.
        loss_ratio: geometric mean of A's value over B's at matched compute.
        loss_ratio_ci95: paired interval, None with fewer than two matched budgets.
        compute_ratio: compute that A needs for what B reaches at `at_flops`, over `at_flops`.
        compute_ratio_ci95: its interval.
        at_flops: where the compute ratio is taken: the largest compute that both have seen.
    """

    target: str
    a: str
    b: str
    exponent_difference: float
    exponent_ci95: tuple[float, float]
    matched_budgets: int
    loss_ratio: float | None
    loss_ratio_ci95: tuple[float, float] | None
    compute_ratio: float
    compute_ratio_ci95: tuple[float, float]
    at_flops: float


def compare(target: str, a: Side, b: Side) -> Comparison:
    """Compares two groups' frontiers.

    Raises:
        FitRefused: a group's loss doesn't fall with compute, so that no amount of compute is equivalent.
    """
    alphas = [_alphas(side) for side in (a, b)]
    for side, alpha_S in zip((a, b), alphas, strict=True):
        if alpha_S[0] <= 0:
            raise FitRefused(f"{side.name}: {target} does not fall with compute")
    degrees = min(a.uncertainty.degrees_of_freedom, b.uncertainty.degrees_of_freedom)
    difference_S = _paired(alphas[0], alphas[1])
    ratio, ratio_ci95, matched = _matched(a, b)
    place = min(a.flops.max(), b.flops.max())
    compute_S = _paired(*(np.log(_at(side, place)) for side in (a, b))) / alphas[0][: len(difference_S)]
    half = t_quantile(degrees) * a.uncertainty.draws.spread(compute_S[1:])
    return Comparison(
        target=target,
        a=a.name,
        b=b.name,
        exponent_difference=float(difference_S[0]),
        exponent_ci95=_around(difference_S, a.uncertainty.draws.spread(difference_S[1:]), degrees),
        matched_budgets=matched,
        loss_ratio=ratio,
        loss_ratio_ci95=ratio_ci95,
        compute_ratio=float(np.exp(compute_S[0])),
        compute_ratio_ci95=(float(np.exp(compute_S[0] - half)), float(np.exp(compute_S[0] + half))),
        at_flops=float(place),
    )


def _alphas(side: Side) -> Array:
    """α of the fit, then of its draws."""
    place = side.fitted.problem.free.index("alpha")
    return np.concatenate([[side.fitted.theta_P[place]], side.uncertainty.draws.theta_SP[:, place]])


def _at(side: Side, flops: float) -> Array:
    problem = side.fitted.at(np.array([flops]))
    thetas = np.vstack([side.fitted.theta_P, side.uncertainty.draws.theta_SP])
    return np.asarray(np.exp(problem.evaluate(thetas)[0][:, 0]))


def _paired(a_S: Array, b_S: Array) -> Array:
    """Differences of estimates and of independent draws, B's taken in reverse so that equal seeds don't pair up."""
    count = min(len(a_S), len(b_S)) - 1
    return np.concatenate([[a_S[0] - b_S[0]], a_S[1 : count + 1] - b_S[1 : count + 1][::-1]])


def _around(values_S: Array, size: float, degrees: int) -> tuple[float, float]:
    half = t_quantile(degrees) * size
    return float(values_S[0] - half), float(values_S[0] + half)


def _matched(a: Side, b: Side) -> tuple[float | None, tuple[float, float] | None, int]:
    """Ratio at budgets that agree within 5%, with Student's t for the paired differences of logarithms."""
    pairs = []
    for flops, value in zip(a.flops, a.values, strict=True):
        nearest = int(np.argmin(np.abs(np.log(b.flops / flops))))
        if abs(np.log(b.flops[nearest] / flops)) < _SAME_COMPUTE:
            pairs.append(np.log(value / b.values[nearest]))
    if not pairs:
        return None, None, 0
    middle = float(np.mean(pairs))
    if len(pairs) < 2:
        return float(np.exp(middle)), None, 1
    half = t_quantile(len(pairs) - 1) * float(np.std(pairs, ddof=1)) / np.sqrt(len(pairs))
    return float(np.exp(middle)), (float(np.exp(middle - half)), float(np.exp(middle + half))), len(pairs)
