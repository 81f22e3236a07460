"""Two groups of runs side by side: exponents, loss at matched compute, and how much more compute one needs.

Groups without compute are compared along parameters or tokens in the same way.
"""

from dataclasses import dataclass, field

import numpy as np

from analysis.errors import FitRefused
from analysis.fitting.bootstrap import decile_spread
from analysis.fitting.fit import Fit
from analysis.fitting.intervals import Uncertainty, t_quantile
from analysis.fitting.laws.base import Array
from analysis.fitting.lines import line_through

_SAME_COMPUTE = 0.05
_ENOUGH = 4
INPUTS = {"flops": "compute", "params": "parameters", "tokens": "tokens"}
"""What groups are compared along, the first that both have."""


@dataclass(frozen=True)
class Side:
    """One group: its frontier (compute and target), the power law fitted to it, and the law with an offset if any.

    Where the table has no compute, `flops` holds parameters or tokens; `others_In` the rest of N, C and D, as far as
    rows have them.
    """

    name: str
    flops: Array
    values: Array
    fitted: Fit
    uncertainty: Uncertainty
    with_offset: tuple[Fit, Uncertainty] | None = None
    others_In: Array = field(default_factory=lambda: np.empty((0, 0)))

    @property
    def curve(self) -> tuple[Fit, Uncertainty]:
        """The law that follows the frontier's bend, if it was fitted."""
        return self.with_offset or (self.fitted, self.uncertainty)


@dataclass(frozen=True)
class Comparison:
    """What distinguishes group A from group B.

    Attributes:
        target: the column compared.
        a: name of group A.
        b: name of group B.
        exponent_difference: α of A minus α of B (power laws of compute).
        exponent_ci95: its interval.
        matched_budgets: number of budgets that both have.
        loss_ratio: geometric mean of A's value over B's at matched compute.
        loss_ratio_ci95: paired interval, None with fewer than two matched budgets.
        compute_ratio: compute that A needs for what B reaches at `at_flops`, over `at_flops`. Where four or more
            budgets match: the ratio of values there, read off a line through the paired ratios, followed along A's own
            curve (with its offset where it has one); otherwise from the two power laws.
        compute_ratio_ci95: its interval.
        at_flops: where the compute ratio is taken: the largest compute that both have seen.
        along: the input compared along, whose values all of this means by compute: flops, params or tokens.
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
    along: str = "flops"


def compare(target: str, a: Side, b: Side, along: str = "flops") -> Comparison:
    """Compares two groups' frontiers.

    Raises:
        FitRefused: a group's loss doesn't fall with compute, so that no amount of compute is equivalent; or their
            ranges of compute don't meet, so that laws would be compared where one of them has no rows.
    """
    name = INPUTS.get(along, along)
    for lower, upper in ((a, b), (b, a)):
        if lower.flops.max() * (1 + _SAME_COMPUTE) < upper.flops.min():
            ends = f"{lower.name} ends at {lower.flops.max():.3g}, {upper.name} begins at {upper.flops.min():.3g}"
            raise FitRefused(f"they have no {name} in common ({ends})")
    alphas = [_alphas(side) for side in (a, b)]
    for side, alpha_S in zip((a, b), alphas, strict=True):
        if alpha_S[0] <= 0:
            raise FitRefused(f"{side.name}: {target} does not fall with {name}")
    degrees = min(a.uncertainty.degrees_of_freedom, b.uncertainty.degrees_of_freedom)
    difference_S = _paired(alphas[0], alphas[1])
    matched = _matched(a, b)
    ratio, ratio_ci95 = matched.loss_ratio
    place = min(float(a.flops.max()), float(b.flops.max()))
    compute = _along_curve(a, place, matched.ratio_at(place))
    if compute is None:
        logs = [np.log(_at(side.fitted, side.uncertainty, place)) for side in (a, b)]
        compute_S = _paired(*logs) / alphas[0][: len(difference_S)]
        half = t_quantile(degrees) * a.uncertainty.draws.spread(compute_S[1:])
        compute = float(compute_S[0]), half
    return Comparison(
        target=target,
        a=a.name,
        b=b.name,
        exponent_difference=float(difference_S[0]),
        exponent_ci95=_around(difference_S, a.uncertainty.draws.spread(difference_S[1:]), degrees),
        matched_budgets=len(matched.flops_m),
        loss_ratio=ratio,
        loss_ratio_ci95=ratio_ci95,
        compute_ratio=float(np.exp(compute[0])),
        compute_ratio_ci95=(float(np.exp(compute[0] - compute[1])), float(np.exp(compute[0] + compute[1]))),
        at_flops=float(place),
        along=along,
    )


@dataclass(frozen=True)
class _Matched:
    """Logarithms of both groups' values at the budgets that both have."""

    flops_m: Array
    a_m: Array
    b_m: Array

    @property
    def loss_ratio(self) -> tuple[float | None, tuple[float, float] | None]:
        """Geometric mean of the ratios, with Student's t for the paired differences of logarithms."""
        differences_m = self.a_m - self.b_m
        if not len(differences_m):
            return None, None
        middle = float(differences_m.mean())
        if len(differences_m) < 2:
            return float(np.exp(middle)), None
        half = t_quantile(len(differences_m) - 1) * float(differences_m.std(ddof=1)) / np.sqrt(len(differences_m))
        return float(np.exp(middle)), (float(np.exp(middle - half)), float(np.exp(middle + half)))

    def ratio_at(self, place: float) -> tuple[float, float] | None:
        """Logarithm of the ratio at a place, by a line through four or more, and half its interval."""
        if len(self.flops_m) < _ENOUGH:
            return None
        middle, low, high = line_through(np.log(self.flops_m), self.a_m - self.b_m).at(float(np.log(place)))
        return middle, (high - low) / 2


def _along_curve(side: Side, place: float, ratio: tuple[float, float] | None) -> tuple[float, float] | None:
    """Logarithm of the compute that divides a group's value by a ratio, and half its interval; None if none does.

    The interval joins that of the ratio, through the curve's slope, with the scatter of the curve's draws.
    """
    if ratio is None:
        return None
    fitted, uncertainty = side.curve
    natural_SP = fitted.problem.natural(np.vstack([fitted.theta_P, uncertainty.draws.theta_SP]))
    columns = dict(zip(fitted.law.parameters, natural_SP.T, strict=True))
    offset_S, alpha_S = columns.get("E", np.zeros(len(natural_SP))), columns["alpha"]
    value_S = _at(fitted, uncertainty, place)

    def compute(change: float) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(-np.log((value_S * np.exp(-change) - offset_S) / (value_S - offset_S)) / alpha_S)

    middle_S = compute(ratio[0])
    ends = [float(compute(ratio[0] + sign * ratio[1])[0]) for sign in (-1, 1)]
    drawn_S = middle_S[1:][np.isfinite(middle_S[1:])]
    if not np.isfinite([middle_S[0], *ends]).all() or len(drawn_S) < 0.9 * len(middle_S[1:]):
        return None
    scatter = t_quantile(uncertainty.degrees_of_freedom) * decile_spread(drawn_S)
    return float(middle_S[0]), float(np.hypot((ends[1] - ends[0]) / 2, scatter))


def _alphas(side: Side) -> Array:
    """α of the fit, then of its draws."""
    place = side.fitted.problem.free.index("alpha")
    return np.concatenate([[side.fitted.theta_P[place]], side.uncertainty.draws.theta_SP[:, place]])


def _at(fitted: Fit, uncertainty: Uncertainty, flops: float) -> Array:
    """The law's value at a compute, for the fit and its draws."""
    thetas_SP = np.vstack([fitted.theta_P, uncertainty.draws.theta_SP])
    return np.asarray(np.exp(fitted.at(np.array([flops])).evaluate(thetas_SP)[0][:, 0]))


def _paired(a_S: Array, b_S: Array) -> Array:
    """Differences of estimates and of independent draws, B's taken in reverse so that equal seeds don't pair up."""
    count = min(len(a_S), len(b_S)) - 1
    return np.concatenate([[a_S[0] - b_S[0]], a_S[1 : count + 1] - b_S[1 : count + 1][::-1]])


def _around(values_S: Array, size: float, degrees: int) -> tuple[float, float]:
    half = t_quantile(degrees) * size
    return float(values_S[0] - half), float(values_S[0] + half)


def _matched(a: Side, b: Side) -> _Matched:
    """The points whose compute agrees within 5%, of several those nearest in the other inputs, too."""
    pairs = []
    alike = a.others_In.shape[0] == b.others_In.shape[0] > 0
    for place, (flops, value) in enumerate(zip(a.flops, a.values, strict=True)):
        apart_n = np.abs(np.log(b.flops / flops))
        others_n = np.abs(np.log(b.others_In / a.others_In[:, [place]])).sum(axis=0) if alike else 0.0
        nearest = int(np.argmin(apart_n + np.where(apart_n < _SAME_COMPUTE, others_n, np.inf)))
        if apart_n[nearest] < _SAME_COMPUTE:
            pairs.append((float(flops), float(np.log(value)), float(np.log(b.values[nearest]))))
    columns = np.array(pairs, dtype=float).reshape(-1, 3).T
    return _Matched(*columns)
