"""IsoFLOP minima: at one budget, the size with the lowest loss (Hoffmann et al. 2022, approach 2)."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import minimize_scalar

from analysis.fitting.bootstrap import decile_spread
from analysis.fitting.intervals import t_quantile
from analysis.fitting.laws.base import Array
from analysis.grids.bowls import DEGREES, curves, lowest
from analysis.grids.edges import Sought, sought
from analysis.grids.frontier import SeedNoise

MINIMUM_SIZES = 4
_HIGHEST = 4
"""Degree of the polynomials that are tried for the bowls' shape."""
_UNEVEN = 0.01
"""Significance at which scatter is taken for a power of the budget."""
_DRAWS = 400
_POINTS = 401


@dataclass(frozen=True)
class Simulated:
    """A budget's minimum as the same method finds it in simulated bowls.

    Attributes:
        log_params_S: log N_opt of each.
        log_tokens_S: log D_opt; log N_opt again where the table has no tokens.
        degrees_of_freedom: of the scatter that was simulated.
        off_S: by how much the smooth curve's own minimum lies beyond what the method finds, in log N; zero for a
            parabola where the bowls are parabolas. The first is of the smooth curve itself, others of simulated bowls.
    """

    log_params_S: Array
    log_tokens_S: Array
    degrees_of_freedom: int
    off_S: Array


@dataclass(frozen=True)
class Minimum:
    """The minimum of the target over size at one budget, or why there is none.

    Attributes:
        budget: FLOPs.
        sizes: how many sizes have a cell at the budget.
        method: parabola, cubic (both in log N) or akima (interpolation).
        params: size at the minimum, N_opt.
        value: target there.
        tokens: tokens (or images) that the budget pays for at that size, interpolated between the sizes' own.
        refused: why there is no minimum; empty when there is one.
        params_ci95: interval of N_opt.
        coefficients: of the polynomial in log(N / geometric mean), highest power first.
        simulated: what noise makes of it.
        end: where there is none because it would be an end of the sizes: "smallest" or "largest".
        sought: how the method finds best sizes there, where at some budget the best is an end.
    """

    budget: float
    sizes: int
    method: str = "parabola"
    params: float | None = None
    value: float | None = None
    tokens: float | None = None
    refused: str = ""
    params_ci95: tuple[float, float] | None = None
    coefficients: tuple[float, ...] = ()
    simulated: Simulated | None = None
    end: str = ""
    sought: Sought | None = None


def minima(
    grid_cells: pd.DataFrame, target: str, method: str = "parabola", noise: SeedNoise | None = None, seed: int = 0
) -> list[Minimum]:
    """The minimum of each budget, refused by name where the sizes don't bracket one.

    Intervals come from simulated bowls: the smooth curve through each budget's cells plus normal errors of the cells'
    scatter around it, and with them the scatter between seeds where runs were repeated. The smooth curve is the
    parabola unless a polynomial of degree three or four follows the bowls significantly better, so that what a parabola
    misses of the bowls' shape isn't taken for noise. For Akima's curve, which is local, it runs through the six sizes
    around the minimum only: a wide bowl's far sides say nothing about the scatter near its floor. There the scatter may
    be a power of the budget, if that is significantly likelier; around whole bowls it may be their shape.
    """
    usable = grid_cells[grid_cells[target].notna()].sort_values(["budget", "params"])
    bowls = {float(str(budget)): rows for budget, rows in usable.groupby("budget")}
    found = [minimum(rows, target, budget, method) for budget, rows in bowls.items()]
    if method == "akima":
        bowls = {each.budget: _around(bowls[each.budget], each.params) for each in found if each.params is not None}
    smooth = _smooth(bowls, target, noise, uneven=method == "akima")
    if smooth.degrees_of_freedom < 1:
        return found
    generator = np.random.default_rng(seed)
    found = [
        each if each.params is None else _with_interval(each, bowls[each.budget], target, smooth, generator)
        for each in found
    ]
    return _with_search(found, usable, target, smooth) if any(each.end for each in found) else found


def minimum(rows: pd.DataFrame, target: str, budget: float, method: str = "parabola") -> Minimum:
    """The minimum of one budget's cells."""
    params = rows["params"].to_numpy(dtype=float)
    values = rows[target].to_numpy(dtype=float)
    sizes = len(np.unique(params))
    reason, end = _why_not(params, values, sizes, method)
    if reason:
        return Minimum(budget, sizes, method, refused=reason, end=end)
    centre = float(np.log(params).mean())
    logs = np.log(params) - centre
    fine, curve_G1 = curves(logs, values[:, None], method)
    best = int(curve_G1[:, 0].argmin())
    if best in (0, len(fine) - 1):
        reason, end = f"the {method} has no minimum within the sizes", "largest" if best else "smallest"
        return Minimum(budget, sizes, method, refused=reason, end=end)
    place, value, coefficients = float(fine[best]), float(curve_G1[best, 0]), ()
    if method != "akima":
        coefficients = tuple(np.polyfit(logs, values, DEGREES[method]).tolist())
        flat = np.roots(np.polyder(coefficients)).real  # the grid has found which of them
        place = float(flat[np.abs(flat - place).argmin()])
        value = float(np.polyval(coefficients, place))
    tokens = None
    if "tokens" in rows.columns:
        tokens = float(np.exp(np.interp(place, logs, np.log(rows["tokens"].to_numpy(dtype=float)))))
    return Minimum(budget, sizes, method, float(np.exp(place + centre)), value, tokens, coefficients=coefficients)


def _why_not(params: Array, values: Array, sizes: int, method: str) -> tuple[str, str]:
    """Why there is no minimum, and at which end the best size is, if it is at one."""
    needed = 5 if method == "cubic" else MINIMUM_SIZES  # a row more than coefficients
    if sizes < needed:
        return f"{sizes} size{'s' if sizes != 1 else ''} at this budget; at least {needed} are needed", ""
    best = int(np.argmin(values))
    if best == 0:
        return f"not bracketed: the smallest size ({params[0]:.3g}) is the best, smaller ones are needed", "smallest"
    if best == len(values) - 1:
        return f"not bracketed: the largest size ({params[-1]:.3g}) is the best, larger ones are needed", "largest"
    return "", ""


def _around(rows: pd.DataFrame, params: float) -> pd.DataFrame:
    """The sizes that decide the piece of an Akima curve that holds a size: three below it and three above."""
    above = int(np.searchsorted(rows["params"].to_numpy(dtype=float), params))
    first = int(np.clip(above - 3, 0, max(len(rows) - 6, 0)))
    return rows.iloc[first : first + 6]


@dataclass(frozen=True)
class _Smooth:
    """The smooth curves through bowls: their degree, and the relative scatter of cells around them by budget."""

    degree: int
    scatter: dict[float, float]
    degrees_of_freedom: int


def _smooth(bowls: dict[float, pd.DataFrame], target: str, noise: SeedNoise | None, uneven: bool) -> _Smooth:
    """Polynomials that follow the bowls, and the scatter around them.

    The degree rises from two as long as some higher one lowers the sum of squares significantly (F test over all
    budgets): bowls that are steep on both sides may be followed by degree four and not by three.
    """
    degree = 2
    squares_B, degrees_B = _squares(bowls.values(), target, 2, 2)
    for higher in range(3, _HIGHEST + 1):
        lower, fewer = (each.sum() for each in _squares(bowls.values(), target, degree, higher))
        rest_B, left_B = _squares(bowls.values(), target, higher, higher)
        rest, left = rest_B.sum(), left_B.sum()
        if left and stats.f.sf((lower - rest) / (fewer - left) / max(rest / left, 1e-300), fewer - left, left) <= 0.05:
            degree, squares_B, degrees_B = higher, rest_B, left_B
    logs_B = np.log(np.array(list(bowls), dtype=float))
    centre = float(np.average(logs_B, weights=degrees_B)) if degrees_B.any() else 0.0
    if noise is not None:  # known of all budgets together
        squares_B = np.append(squares_B, noise.degrees_of_freedom * noise.relative**2)
        degrees_B = np.append(degrees_B, noise.degrees_of_freedom)
        logs_B = np.append(logs_B, centre)
    slope = _growth(logs_B - centre, squares_B, degrees_B) if uneven else 0.0
    grown_B = np.exp(slope * (logs_B - centre))  # the variance, but for a constant
    scatter_B = np.sqrt(grown_B * (squares_B / grown_B).sum() / max(degrees_B.sum(), 1.0))
    return _Smooth(degree, dict(zip(bowls, scatter_B.tolist(), strict=False)), int(degrees_B.sum()))


def _squares(bowls: Collection[pd.DataFrame], target: str, degree: int, allowing: int) -> tuple[Array, Array]:
    """Relative squares around each bowl's polynomial, and degrees of freedom; zeros where a degree isn't allowed."""
    found_B2 = np.zeros((len(bowls), 2))
    for place, rows in enumerate(bowls):
        if rows["params"].nunique() > allowing + 1:
            _, values, curve = _polynomial(rows, target, degree)
            found_B2[place] = float(((values / curve - 1) ** 2).sum()), len(rows) - degree - 1
    return found_B2[:, 0], found_B2[:, 1]


def _growth(logs_B: Array, squares_B: Array, degrees_B: Array) -> float:
    """Exponent with which the variance grows with the budget, by maximum likelihood; zero unless clearly likelier."""
    if np.count_nonzero(degrees_B) < 3 or squares_B.sum() < 1e-24:
        return 0.0

    def deviance(slope: float) -> float:
        """Of variances with an exponent, minus that of equal ones, where `logs_B` are centred by `degrees_B`."""
        return float(degrees_B.sum() * np.log((squares_B * np.exp(-slope * logs_B)).sum() / squares_B.sum()))

    best = minimize_scalar(deviance, bounds=(-3.0, 3.0), method="bounded")
    return float(best.x) if stats.chi2.sf(-best.fun, 1) <= _UNEVEN else 0.0


def _polynomial(rows: pd.DataFrame, target: str, degree: int) -> tuple[Array, Array, Array]:
    """Centred log sizes, values, and a polynomial's heights there."""
    logs = np.log(rows["params"].to_numpy(dtype=float))
    logs = logs - logs.mean()
    values = rows[target].to_numpy(dtype=float)
    return logs, values, np.polyval(np.polyfit(logs, values, degree), logs)


def _with_search(found: list[Minimum], usable: pd.DataFrame, target: str, smooth: "_Smooth") -> list[Minimum]:
    """The minima with what the method finds of bowls of any best size, as bent and as noisy as these."""
    bowls = {float(str(budget)): rows for budget, rows in usable.groupby("budget")}
    known = {each.budget for each in found if each.params is not None or each.end}
    bends = []
    for budget in known:
        logs, values, _ = _polynomial(bowls[budget], target, 2)
        bends.append(np.polyfit(logs, values / abs(values.mean()), 2)[0])
    bend, typical = float(np.median(bends)), float(np.mean([*smooth.scatter.values()]))
    if bend <= 0:
        return found
    return [
        replace(
            each,
            sought=sought(
                np.log(bowls[each.budget]["params"].to_numpy(dtype=float)),
                each.method,
                bend,
                smooth.scatter.get(each.budget, typical),
            ),
        )
        if each.budget in known
        else each
        for each in found
    ]


def _with_interval(
    found: Minimum,
    rows: pd.DataFrame,
    target: str,
    smooth: _Smooth,
    generator: np.random.Generator,
) -> Minimum:
    """The minimum with its interval and the simulated ones."""
    degree, degrees = min(smooth.degree, max(len(rows) - 2, 2)), smooth.degrees_of_freedom
    logs, _, curve = _polynomial(rows, target, degree)
    errors_nS = smooth.scatter[found.budget] * generator.standard_normal((len(logs), _DRAWS))
    errors_nS[:, 0] = 0.0  # the smooth curve itself
    bowls_nS = curve[:, None] * (1 + errors_nS)
    drawn_S, _ = lowest(*curves(logs, bowls_nS, found.method, _POINTS))
    smooth_S, _ = lowest(*curves(logs, bowls_nS, degree, _POINTS))
    half = t_quantile(degrees) * decile_spread(drawn_S[1:])
    middle = float(np.log(found.params or 1.0))
    drawn_2S = np.stack([drawn_S + float(np.log(rows["params"]).mean())] * 2)
    if "tokens" in rows.columns:
        drawn_2S[1] = np.interp(drawn_S, logs, np.log(rows["tokens"].to_numpy(dtype=float)))
    simulated = Simulated(drawn_2S[0, 1:], drawn_2S[1, 1:], degrees, smooth_S - drawn_S)
    return replace(found, params_ci95=(float(np.exp(middle - half)), float(np.exp(middle + half))), simulated=simulated)
