"""Curves through bowls, the values of several sizes at one budget, and where they are lowest."""

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from analysis.fitting.laws.base import Array

METHODS = ("parabola", "cubic", "akima")
DEGREES = {"parabola": 2, "cubic": 3}
_POINTS = 2001


def lowest(fine: Array, curves_GS: Array) -> tuple[Array, Array]:
    """Where each curve is lowest, and its value there, by a parabola through the lowest point and its neighbours."""
    best_S = np.clip(curves_GS.argmin(axis=0), 1, len(fine) - 2)
    every = np.arange(curves_GS.shape[1])
    left_S, middle_S, right_S = (curves_GS[best_S + shift, every] for shift in (-1, 0, 1))
    bend_S = left_S - 2 * middle_S + right_S
    shift_S = np.where(bend_S > 0, 0.5 * (left_S - right_S) / np.where(bend_S > 0, bend_S, 1.0), 0.0)
    values_S = middle_S - 0.25 * (left_S - right_S) * shift_S
    return fine[best_S] + (fine[1] - fine[0]) * np.clip(shift_S, -1, 1), values_S


def curves(logs: Array, values_nS: Array, method: str | int, points: int = _POINTS) -> tuple[Array, Array]:
    """A method's curve, or a polynomial of a degree, through each column of values, on a grid between the sizes."""
    fine = np.linspace(logs.min(), logs.max(), points)
    if method == "akima":
        return fine, np.asarray(Akima1DInterpolator(logs, values_nS)(fine))
    coefficients = np.polyfit(logs, values_nS, DEGREES[method] if isinstance(method, str) else method)
    return fine, np.vander(fine, len(coefficients)) @ coefficients
