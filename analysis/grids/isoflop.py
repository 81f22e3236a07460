"""IsoFLOP minima: at one budget, the size with the lowest loss (Hoffmann et al. 2022, approach 2)."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.interpolate import Akima1DInterpolator

from analysis.fitting.bootstrap import decile_spread
from analysis.fitting.intervals import t_quantile
from analysis.fitting.laws.base import Array
from analysis.grids.frontier import SeedNoise

MINIMUM_SIZES = 4
METHODS = ("parabola", "cubic", "akima")
_DEGREES = {"parabola": 2, "cubic": 3}
_DRAWS = 400
_GRID, _DRAWS_GRID = 2001, 401


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


def minima(
    grid_cells: pd.DataFrame, target: str, method: str = "parabola", noise: SeedNoise | None = None, seed: int = 0
) -> list[Minimum]:
    """The minimum of each budget, refused by name where the sizes don't bracket one.

    The interval of a minimum comes from refits to the curve plus normal errors (parametric bootstrap). Their size is
    pooled over the budgets' parabolas, and with the scatter between seeds where runs were repeated.
    """
    usable = grid_cells[grid_cells[target].notna()].sort_values(["budget", "params"])
    found = [minimum(rows, target, float(str(budget)), method) for budget, rows in usable.groupby("budget")]
    size, degrees = _pooled_scatter(usable, target, noise)
    if degrees < 1:
        return found
    generator = np.random.default_rng(seed)
    return [
        each
        if each.params is None
        else replace(each, params_ci95=_interval(each, usable, target, size, degrees, generator))
        for each in found
    ]


def minimum(rows: pd.DataFrame, target: str, budget: float, method: str = "parabola") -> Minimum:
    """The minimum of one budget's cells."""
    params = rows["params"].to_numpy(dtype=float)
    values = rows[target].to_numpy(dtype=float)
    sizes = len(np.unique(params))
    reason = _why_not(params, values, sizes, method)
    if reason:
        return Minimum(budget, sizes, method, refused=reason)
    centre = float(np.log(params).mean())
    logs = np.log(params) - centre
    fine, curve_G1 = _curves(logs, values[:, None], method)
    best = int(curve_G1[:, 0].argmin())
    if best in (0, len(fine) - 1):
        return Minimum(budget, sizes, method, refused=f"the {method} has no minimum within the sizes")
    place, value, coefficients = float(fine[best]), float(curve_G1[best, 0]), ()
    if method != "akima":
        coefficients = tuple(np.polyfit(logs, values, _DEGREES[method]).tolist())
        flat = np.roots(np.polyder(coefficients)).real  # the grid has found which of them
        place = float(flat[np.abs(flat - place).argmin()])
        value = float(np.polyval(coefficients, place))
    tokens = None
    if "tokens" in rows.columns:
        tokens = float(np.exp(np.interp(place, logs, np.log(rows["tokens"].to_numpy(dtype=float)))))
    return Minimum(budget, sizes, method, float(np.exp(place + centre)), value, tokens, coefficients=coefficients)


def _why_not(params: Array, values: Array, sizes: int, method: str) -> str:
    needed = 5 if method == "cubic" else MINIMUM_SIZES  # a row more than coefficients
    if sizes < needed:
        return f"{sizes} size{'s' if sizes != 1 else ''} at this budget; at least {needed} are needed"
    best = int(np.argmin(values))
    if best == 0:
        return f"not bracketed: the smallest size ({params[0]:.3g}) is the best, smaller ones are needed"
    if best == len(values) - 1:
        return f"not bracketed: the largest size ({params[-1]:.3g}) is the best, larger ones are needed"
    return ""


def _pooled_scatter(cells: pd.DataFrame, target: str, noise: SeedNoise | None) -> tuple[float, int]:
    """Standard deviation around parabolas and its degrees of freedom, over all budgets with more than three sizes."""
    squares, degrees = 0.0, 0
    for _, rows in cells.groupby("budget"):
        if rows["params"].nunique() > 3:
            logs = np.log(rows["params"].to_numpy(dtype=float))
            values = rows[target].to_numpy(dtype=float)
            coefficients = np.polyfit(logs - logs.mean(), values, 2)
            squares += float(((values - np.polyval(coefficients, logs - logs.mean())) ** 2).sum())
            degrees += len(rows) - 3
    if noise is not None:
        typical = float(cells[target].median())
        squares += noise.degrees_of_freedom * (noise.relative * typical) ** 2
        degrees += noise.degrees_of_freedom
    return float(np.sqrt(squares / max(degrees, 1))), degrees


def _interval(
    found: Minimum, cells: pd.DataFrame, target: str, size: float, degrees: int, generator: np.random.Generator
) -> tuple[float, float]:
    rows = cells[cells["budget"] == found.budget]
    logs = np.log(rows["params"].to_numpy(dtype=float))
    logs = logs - logs.mean()
    values = rows[target].to_numpy(dtype=float)
    fitted = np.polyval(found.coefficients, logs) if found.coefficients else values
    drawn_nS = fitted[:, None] + size * generator.standard_normal((len(values), _DRAWS))
    fine, curves_GS = _curves(logs, drawn_nS, found.method, _DRAWS_GRID)
    half = t_quantile(degrees) * decile_spread(fine[curves_GS.argmin(axis=0)])
    middle = float(np.log(found.params or 1.0))
    return float(np.exp(middle - half)), float(np.exp(middle + half))


def _curves(logs: Array, values_nS: Array, method: str, points: int = _GRID) -> tuple[Array, Array]:
    """The method's curve through each column of values, on a grid of centred log N between the sizes."""
    fine = np.linspace(logs.min(), logs.max(), points)
    if method == "akima":
        return fine, np.asarray(Akima1DInterpolator(logs, values_nS)(fine))
    coefficients = np.polyfit(logs, values_nS, _DEGREES[method])
    return fine, np.vander(fine, len(coefficients)) @ coefficients
