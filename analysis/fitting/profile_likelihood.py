"""A law along its offset, the other parameters fitted at every E held fixed.

Where the rows hardly tell E, the objective is a long flat valley from E = 0 to the lowest value: descent creeps in it,
and refits that begin at its end, where the derivative by log E vanishes, don't leave it.

Letters: G offsets, S draws, n rows, P free parameters.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special
from scipy.optimize import minimize_scalar

from analysis.fitting.laws.base import NO_OFFSET, OFFSET, Array, Problem, is_exponent
from analysis.fitting.newton import Objective, minimise

_COARSE, _FINE = 20, 61
_NONE = NO_OFFSET / 1000
"""Share of the lowest value that stands for no offset, whose logarithm there is none of."""


def bottom(problem: Problem, y: Array, weights_n: Array, theta_P: Array, objective: Objective) -> tuple[Array, float]:
    """The lowest point of the valley that a fit lies in: θ and the objective there."""
    offsets_G = y.min() * np.linspace(_NONE, 0.95, _COARSE)
    theta_GP, values_G = along(problem, y, weights_n, theta_P, objective, offsets_G)
    best = int(values_G.argmin())

    def height(offset: float) -> float:
        return float(along(problem, y, weights_n, theta_GP[best], objective, np.array([offset]))[1][0])

    around = offsets_G[max(best - 1, 0)], offsets_G[min(best + 1, _COARSE - 1)]
    offset = minimize_scalar(height, bounds=around, method="bounded", options={"xatol": 1e-7 * y.min()}).x
    refined_1P, _ = along(problem, y, weights_n, theta_GP[best], objective, np.array([offset]))
    starts_2P = np.stack([theta_GP[best], refined_1P[0]])
    ends_2P, values_2 = minimise(problem, y, np.stack([weights_n] * 2), starts_2P, objective, smooth=False)
    lowest = int(values_2.argmin())
    return ends_2P[lowest], float(values_2[lowest])


def possible(problem: Problem, y: Array, theta_P: Array, draws: int, seed: int) -> tuple[Array, Array]:
    """What normal errors of unknown size leave possible: draws of θ, and θ on the edge of the 95% region, (S, P) each.

    The draws take all offsets for alike likely beforehand: an offset counts with weight S(E)^(-ν/2), S the sum of
    squared log residuals of the law fitted at E held fixed and ν their degrees of freedom; given E, the others are
    Student's t around that fit, as in `OffsetAverage`. The edge is where the profile likelihood ratio of
    one quantity reaches its 95% level, S = S_min·(1 + t²/ν): a quantity's interval is its range there.
    """
    generator = np.random.default_rng(seed)
    place, rows = problem.free.index(OFFSET), len(y)
    offsets_G = (1 - np.linspace(1, 0.05, _FINE) ** 2) * y.min() + _NONE * y.min()  # denser near the lowest value
    theta_GP, squares_G = along(problem, y, np.ones(rows), theta_P, Objective("lsq-log"), offsets_G)
    squares_G = np.maximum(squares_G, 1e-16)
    degrees = max(rows - len(problem.free), 1)
    _, shares_JGn = problem.evaluate(theta_GP)
    jacobian_GnQ = np.delete(problem.jacobian(theta_GP, shares_JGn), place, axis=2)
    covariance_GQQ = np.linalg.pinv(np.einsum("gnp,gnq->gpq", jacobian_GnQ, jacobian_GnQ), hermitian=True)
    values_GQ, vectors_GQQ = np.linalg.eigh(covariance_GQQ)
    roots_GQQ = vectors_GQQ * np.sqrt(values_GQ.clip(0.0))[:, None]
    steps_SQ = generator.standard_normal((draws, values_GQ.shape[1]))

    def moved(chosen_S: NDArray[np.signedinteger[Any]], lengths_S: Array, steps_SQ: Array) -> Array:
        moves_SQ = np.einsum("spq,sq->sp", roots_GQQ[chosen_S], steps_SQ) * lengths_S[:, None]
        return np.asarray(theta_GP[chosen_S] + np.insert(moves_SQ, place, 0.0, axis=1))

    weights_G = np.exp(-0.5 * degrees * np.log(squares_G / squares_G.min())) * np.gradient(offsets_G)
    drawn_S = generator.choice(_FINE, draws, p=weights_G / weights_G.sum())
    drawn_SP = moved(drawn_S, np.sqrt(squares_G[drawn_S] / generator.chisquare(degrees, draws)), steps_SQ)
    slack_G = squares_G.min() * (1 + special.stdtrit(degrees, 0.975) ** 2 / degrees) - squares_G
    inside_S = np.resize(np.flatnonzero(slack_G >= 0), draws)
    directions_SQ = steps_SQ / np.linalg.norm(steps_SQ, axis=1, keepdims=True)
    return drawn_SP, moved(inside_S, np.sqrt(slack_G[inside_S]), directions_SQ)


def along(
    problem: Problem, y: Array, weights_n: Array, theta_P: Array, objective: Objective, offsets_G: Array
) -> tuple[Array, Array]:
    """θ (G, P) and objectives (G,) of the fits with E held at each offset, begun at θ with its other terms rescaled."""
    starts_GP = np.tile(theta_P, (len(offsets_G), 1))
    place, middle = problem.free.index(OFFSET), float(np.median(y))
    left_G = np.log((middle - offsets_G) / max(middle - np.exp(theta_P[place]), 1e-3 * middle))
    for other, name in enumerate(problem.free):
        if other != place and not is_exponent(name):
            starts_GP[:, other] += left_G
    starts_GP[:, place] = np.log(offsets_G)
    weights_Gn = np.broadcast_to(weights_n, (len(offsets_G), len(y)))
    return minimise(problem, y, weights_Gn, starts_GP, objective, held=place)
