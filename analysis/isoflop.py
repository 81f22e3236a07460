"""IsoFLOP minima: at one budget, the size with the lowest loss (Hoffmann et al. 2022, approach 2)."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.interpolate import Akima1DInterpolator

from analysis.laws import Array

MINIMUM_SIZES = 4
METHODS = ("parabola", "cubic", "akima")


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


def minima(grid_cells: pd.DataFrame, target: str, method: str = "parabola") -> list[Minimum]:
    """The minimum of each budget, refused by name where the sizes don't bracket one."""
    found = []
    for budget, rows in grid_cells[grid_cells[target].notna()].groupby("budget"):
        found.append(minimum(rows.sort_values("params"), target, float(str(budget)), method))
    return found


def minimum(rows: pd.DataFrame, target: str, budget: float, method: str = "parabola") -> Minimum:
    """The minimum of one budget's cells."""
    params = rows["params"].to_numpy(dtype=float)
    values = rows[target].to_numpy(dtype=float)
    sizes = len(np.unique(params))
    reason = _why_not(params, values, sizes)
    if reason:
        return Minimum(budget, sizes, method, refused=reason)
    centre = float(np.log(params).mean())
    logs = np.log(params) - centre
    place: float | None
    value: float | None
    if method == "akima":
        place, value, coefficients = _akima(logs, values)
    else:
        coefficients = tuple(np.polyfit(logs, values, 2 if method == "parabola" or sizes < 5 else 3).tolist())
        place, value = _polynomial_minimum(logs, coefficients)
    if place is None or value is None:
        return Minimum(budget, sizes, method, refused=f"the {method} has no minimum within the sizes")
    tokens = None
    if "tokens" in rows.columns:
        tokens = float(np.exp(np.interp(place, logs, np.log(rows["tokens"].to_numpy(dtype=float)))))
    return Minimum(budget, sizes, method, float(np.exp(place + centre)), value, tokens, coefficients=coefficients)


def curve(found: Minimum, params: Array, centre: float) -> Array:
    """The fitted polynomial at sizes given."""
    return np.asarray(np.polyval(found.coefficients, np.log(params) - centre))


def _why_not(params: Array, values: Array, sizes: int) -> str:
    if sizes < MINIMUM_SIZES:
        return f"{sizes} size{'s' if sizes != 1 else ''} at this budget; at least {MINIMUM_SIZES} are needed"
    best = int(np.argmin(values))
    if best == 0:
        return f"not bracketed: the smallest size ({params[0]:.3g}) is the best, smaller ones are needed"
    if best == len(values) - 1:
        return f"not bracketed: the largest size ({params[-1]:.3g}) is the best, larger ones are needed"
    return ""


def _polynomial_minimum(logs: Array, coefficients: tuple[float, ...]) -> tuple[float | None, float | None]:
    roots = np.roots(np.polyder(np.array(coefficients)))
    real = roots[np.abs(roots.imag) < 1e-9].real
    bending = np.polyval(np.polyder(np.array(coefficients), 2), real)
    inside = real[(bending > 0) & (real >= logs.min()) & (real <= logs.max())]
    if not len(inside):
        return None, None
    values = np.polyval(coefficients, inside)
    return float(inside[np.argmin(values)]), float(values.min())


def _akima(logs: Array, values: Array) -> tuple[float, float, tuple[float, ...]]:
    fine = np.linspace(logs.min(), logs.max(), 2001)
    curve_values = Akima1DInterpolator(logs, values)(fine)
    best = int(np.argmin(curve_values))
    return float(fine[best]), float(curve_values[best]), ()
