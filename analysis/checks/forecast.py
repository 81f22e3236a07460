"""The largest budget predicted from the smaller ones, which that fit has not seen, and what "no change" would say."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import special
from scipy.optimize.elementwise import find_root

from analysis.errors import FitRefused
from analysis.fitting.laws.base import Array
from analysis.grids.frontier import SeedNoise
from analysis.grids.grid import TargetGrid

ASSUMED_NOISE = SeedNoise(relative=0.002, degrees_of_freedom=1)


@dataclass(frozen=True)
class OffsetAverage:
    """Prediction from few points, averaged over the offset that few points can't identify.

    For every offset E between 0 (the pure power law) and the lowest value seen, the power law above that offset is
    fitted by least squares of log residuals. An offset counts with weight S(E)^(-ν/2), S its sum of squares: the
    likelihood of normal errors of unknown size. A new run's log value, given E, is Student's t with ν = n - 2 degrees
    of freedom around the fit, with variance s²(1 + leverage). The prediction is the median of that mixture and the
    interval its quantiles, so it holds the parameters' uncertainty, a new run's own scatter and the doubt between
    `power` and `power-offset`. Two things join S and ν: the pooled variance of runs repeated with other seeds, with its
    degrees of freedom, and one degree of freedom with a scatter of 0.2%, so that three or four points that happen to
    lie on a line don't make a new run certain.

    Attributes:
        x_n: inputs of the fitted points.
        y_n: their values.
        noise: seed noise, where measured.
    """

    x_n: Array
    y_n: Array
    noise: SeedNoise | None = None

    def __post_init__(self) -> None:
        if len(np.unique(self.x_n)) < 3:
            raise FitRefused(f"a prediction needs three or more points, not {len(np.unique(self.x_n))}")

    def predict(self, x: Array) -> tuple[Array, Array, Array]:
        """Median and 95% interval of a new run at inputs x."""
        offsets_G, theta_G2, _, covariance_G22, weights_G = self._profile
        t_m = np.log(np.atleast_1d(np.asarray(x, dtype=float))) - self._centre
        u_Gm, jacobian_Gm2 = _curve(t_m, offsets_G, theta_G2)
        leverage_Gm = np.einsum("gmp,gpq,gmq->gm", jacobian_Gm2, covariance_G22, jacobian_Gm2)
        scale_Gm = np.sqrt(self._variance[:, None] * (leverage_Gm + 1.0))
        middle, low, high = (self._quantile(level, u_Gm, scale_Gm, weights_G) for level in (0.5, 0.025, 0.975))
        return np.exp(middle), np.exp(low), np.exp(high)

    @property
    def degrees_of_freedom(self) -> int:
        """ν: points minus two, plus those of the seed noise."""
        return len(self.y_n) - 2 + sum(each.degrees_of_freedom for each in self._noises)

    @property
    def _noises(self) -> tuple[SeedNoise, ...]:
        return (ASSUMED_NOISE,) if self.noise is None else (ASSUMED_NOISE, self.noise)

    @cached_property
    def _centre(self) -> float:
        return float(np.log(self.x_n).mean())

    @cached_property
    def _variance(self) -> Array:
        return np.maximum(self._profile[2], 1e-16) / self.degrees_of_freedom

    @cached_property
    def _profile(self) -> tuple[Array, Array, Array, Array, Array]:
        """Offsets, θ, sums of squares (with the seeds'), (JᵀJ)⁻¹ and weights along the grid of G offsets."""
        t_n = np.log(self.x_n) - self._centre
        offsets_G = (1 - np.linspace(1, 0.05, 161) ** 2) * float(self.y_n.min())
        slopes_G, middles_G = np.polyfit(t_n, np.log(self.y_n[:, None] - offsets_G), 1)
        theta_G2 = np.stack([middles_G, -slopes_G], axis=1)
        logs_n = np.log(self.y_n)
        for _ in range(40):
            u_Gn, jacobian_Gn2 = _curve(t_n, offsets_G, theta_G2)
            normal_G22 = np.einsum("gnp,gnq->gpq", jacobian_Gn2, jacobian_Gn2) + 1e-14 * np.eye(2)
            gradient_G2 = np.einsum("gnp,gn->gp", jacobian_Gn2, logs_n - u_Gn)
            theta_G2 = theta_G2 + np.linalg.solve(normal_G22, gradient_G2[..., None])[..., 0]
        u_Gn, jacobian_Gn2 = _curve(t_n, offsets_G, theta_G2)
        covariance_G22 = np.linalg.inv(np.einsum("gnp,gnq->gpq", jacobian_Gn2, jacobian_Gn2) + 1e-14 * np.eye(2))
        squares_G = ((logs_n - u_Gn) ** 2).sum(axis=1)
        squares_G = squares_G + sum(each.degrees_of_freedom * each.relative**2 for each in self._noises)
        log_weights_G = -0.5 * self.degrees_of_freedom * np.log(np.maximum(squares_G, 1e-16))
        # The grid is denser near the lowest value: weight by its spacing, so that E itself is uniform.
        weights_G = np.exp(log_weights_G - log_weights_G.max()) * np.gradient(offsets_G)
        return offsets_G, theta_G2, squares_G, covariance_G22, weights_G / weights_G.sum()

    def _quantile(self, level: float, u_Gm: Array, scale_Gm: Array, weights_G: Array) -> Array:
        """The mixture's quantile at each input; it lies between those of its parts."""
        weighty_G = weights_G > 1e-9 * weights_G.max()
        u_Gm, scale_Gm, weights_G = u_Gm[weighty_G], scale_Gm[weighty_G], weights_G[weighty_G]

        def excess(value_m: Array, place_m: NDArray[np.intp]) -> Array:
            below_Gm = special.stdtr(self.degrees_of_freedom, (value_m - u_Gm[:, place_m]) / scale_Gm[:, place_m])
            return np.asarray(weights_G @ below_Gm / weights_G.sum() - level)

        parts_Gm = u_Gm + special.stdtrit(self.degrees_of_freedom, level) * scale_Gm
        margin_m = 1e-6 * scale_Gm.max(axis=0)
        bracket = parts_Gm.min(axis=0) - margin_m, parts_Gm.max(axis=0) + margin_m
        return np.asarray(find_root(excess, bracket, args=(np.arange(u_Gm.shape[1]),), tolerances={"xatol": 1e-9}).x)


@dataclass(frozen=True)
class LargestBudgetCheck:
    """The largest budget's best value, predicted from the smaller budgets alone.

    Attributes:
        target: the column.
        budget: the largest budget, FLOPs.
        n_budgets: how many smaller budgets the prediction used.
        observed: the value found there.
        predicted: the prediction.
        ci95: its 95% interval for a new run.
        baseline: the value of the next smaller budget ("no change").
        extrapolation: largest budget over the next smaller one.
    """

    target: str
    budget: float
    n_budgets: int
    observed: float
    predicted: float
    ci95: tuple[float, float]
    baseline: float
    extrapolation: float

    @property
    def error(self) -> float:
        """Predicted minus observed."""
        return self.predicted - self.observed

    @property
    def baseline_error(self) -> float:
        """What "no change from the next smaller budget" is off by."""
        return self.baseline - self.observed

    @property
    def inside(self) -> bool:
        """Whether the observed value lies in the interval."""
        return self.ci95[0] <= self.observed <= self.ci95[1]

    @property
    def held(self) -> bool:
        """Inside the interval and off by less than a quarter of the baseline's error, where that is off at all."""
        return self.inside and (self.baseline_error == 0 or abs(self.error) < 0.25 * abs(self.baseline_error))


def largest_budget_check(
    x_n: Array, y_n: Array, budgets_n: Array, target: str, noise: SeedNoise | None = None
) -> LargestBudgetCheck:
    """Predicts the last point of a frontier, in order of budget, from the ones before.

    Raises:
        FitRefused: fewer than four budgets.
    """
    if len(x_n) < 4:
        raise FitRefused(f"predicting the largest budget needs four or more budgets, not {len(x_n)}")
    average = OffsetAverage(x_n[:-1], y_n[:-1], noise)
    middle, low, high = average.predict(x_n[-1:])
    return LargestBudgetCheck(
        target=target,
        budget=float(budgets_n[-1]),
        n_budgets=len(x_n) - 1,
        observed=float(y_n[-1]),
        predicted=float(middle[0]),
        ci95=(float(low[0]), float(high[0])),
        baseline=float(y_n[-2]),
        extrapolation=float(x_n[-1] / x_n[-2]),
    )


@dataclass(frozen=True)
class Forecast:
    """Each budget from the fourth on predicted from the smaller ones, or why none is.

    Attributes:
        rolled: the checks, the last one that of the largest budget.
        refused: why there is none.
    """

    rolled: tuple[LargestBudgetCheck, ...] = ()
    refused: str = ""

    @property
    def check(self) -> LargestBudgetCheck | None:
        """The largest budget predicted from the smaller ones; None where `refused` says why."""
        return self.rolled[-1] if self.rolled else None


def forecast(grid: TargetGrid) -> Forecast:
    """Rolls forward along a grid's frontier."""
    x_n, y_n, budgets_n = (grid.frontier[name].to_numpy(dtype=float) for name in ("flops", grid.target, "budget"))
    if grid.rises:
        return Forecast(refused="it rises with compute, and what is extrapolated is a law that falls")
    counts = range(min(4, len(x_n)), len(x_n) + 1)
    try:
        checks = (largest_budget_check(x_n[:n], y_n[:n], budgets_n[:n], grid.target, grid.noise) for n in counts)
        return Forecast(tuple(checks))
    except FitRefused as refusal:
        return Forecast(refused=str(refusal))


def _curve(t_m: Array, offsets_G: Array, theta_G2: Array) -> tuple[Array, Array]:
    """log(E + e^(a - αt)) and its derivatives by (a, α), for each offset: (G, m) and (G, m, 2)."""
    power_Gm = np.exp(np.clip(theta_G2[:, :1] - theta_G2[:, 1:] * t_m, -700, 700))
    total_Gm = offsets_G[:, None] + power_Gm
    share_Gm = power_Gm / total_Gm
    return np.log(total_Gm), np.stack([share_Gm, -share_Gm * t_m], axis=-1)
