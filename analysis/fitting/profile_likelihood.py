"""A law along its offset, the other parameters fitted at every E held fixed.

Where the rows hardly tell E, the objective is a long flat valley from E = 0 to the lowest value: descent creeps in it,
and refits that begin at its end, where the derivative by log E vanishes, don't leave it.

Letters: G offsets, S draws, n rows, P free parameters, Q those but the offset.
"""

from dataclasses import replace

import numpy as np
from scipy import special
from scipy.optimize import minimize_scalar

from analysis.fitting.laws.base import NO_OFFSET, OFFSET, Array, Problem
from analysis.fitting.likelihood_region import ROWS_FOR_VALLEYS, SIMPLE, Region
from analysis.fitting.newton import Objective, minimise

_COARSE, _FINE, _FINE_OF_VALLEYS = 20, 61, 31
_FAR = 3.0
"""Draws come from offsets so many times further than the 95% level reaches, in standard errors."""
_NONE = NO_OFFSET / 1000
"""Share of the lowest value that stands for no offset, whose logarithm there is none of."""
_MARKS = 3
_ALMOST_NOTHING = 1e-4
"""Share of the lowest value that a term has in a law without it."""


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


def possible(problem: Problem, y: Array, theta_P: Array, draws: int, seed: int) -> tuple[Array, Region]:
    """What normal errors of unknown size leave possible: draws of θ (S, P), and the 95% region.

    The draws take all offsets for alike likely beforehand: an offset counts with weight S(E)^(-ν/2), S the sum of
    squared log residuals of the law fitted at E held fixed and ν their degrees of freedom; given E, the others are
    Student's t around that fit, as in `OffsetAverage`. The region is where the profile likelihood ratio of
    one quantity stays below its 95% level, S = S_min·(1 + t²/ν): a quantity's interval is its range there.
    """
    generator = np.random.default_rng(seed)
    place, rows = problem.free.index(OFFSET), len(y)
    degrees = max(rows - len(problem.free), 1)
    level = _level(degrees)
    theta_GP, squares_G, offsets_G = _finely(problem, y, theta_P, 1 + _FAR**2 * level)
    _, shares_JGn = problem.evaluate(theta_GP)
    jacobian_GnQ = np.delete(problem.jacobian(theta_GP, shares_JGn), place, axis=2)
    covariance_GQQ = np.linalg.pinv(np.einsum("gnp,gnq->gpq", jacobian_GnQ, jacobian_GnQ), hermitian=True)
    values_GQ, vectors_GQQ = np.linalg.eigh(covariance_GQQ)
    axes_GQQ = (vectors_GQQ * np.sqrt(values_GQ.clip(0.0))[:, None]).swapaxes(1, 2)
    axes_GQP = np.insert(axes_GQQ, place, 0.0, axis=2)
    weights_G = np.exp(-0.5 * degrees * np.log(squares_G / squares_G.min())) * np.gradient(offsets_G)
    drawn_S = generator.choice(len(offsets_G), draws, p=weights_G / weights_G.sum())
    lengths_S = np.sqrt(squares_G[drawn_S] / generator.chisquare(degrees, draws))
    steps_SQ = generator.standard_normal((draws, values_GQ.shape[1])) * lengths_S[:, None]
    drawn_SP = theta_GP[drawn_S] + np.einsum("sq,sqp->sp", steps_SQ, axes_GQP[drawn_S])
    region = _region(problem, y, theta_GP, squares_G, level)
    if len(problem.free) > SIMPLE:
        drawn_SP = drawn_SP.clip(*problem.bounds(y))
    return drawn_SP, replace(region, simpler=_without_a_term(problem, y, theta_GP, squares_G))


def _without_a_term(problem: Problem, y: Array, theta_GP: Array, squares_G: Array) -> Region | None:
    """The region of the law without its term like an offset, where the rows don't reject that law (F test, 5%).

    Where there is no such term, its exponents are of nothing: fitted to the noise they leave squares that are lower
    than a χ² of so many parameters allows for (Davies 1987), and the level lies too low.
    """
    simpler = problem.law.without_term_like_an_offset
    if simpler is None:
        return None
    nested = replace(problem, law=simpler)
    kept = [problem.free.index(name) for name in nested.free]
    fewer, degrees = len(problem.free) - len(kept), max(len(y) - len(problem.free), 1)
    level = _level(degrees + fewer)
    theirs_GP, their_squares_G, _ = _finely(nested, y, theta_GP[squares_G.argmin(), kept], 1 + level)
    rejected = squares_G.min() * (1 + fewer * float(special.fdtri(fewer, degrees, 0.95)) / degrees)
    return _region(nested, y, theirs_GP, their_squares_G, level) if their_squares_G.min() <= rejected else None


def _region(problem: Problem, y: Array, theta_GP: Array, squares_G: Array, level: float) -> Region:
    """Where squares grow by a share of the least at most; its first and last offset lie between two of the grid."""
    limit, logs_G = float(squares_G.min() * (1 + level)), theta_GP[:, problem.free.index(OFFSET)]
    inside = np.flatnonzero(squares_G <= limit)
    first, last = inside[[0, -1]]
    sides = [first, max(first - 1, 0)], [last, min(last + 1, len(logs_G) - 1)]
    low, high = (float(np.exp(np.interp(limit, squares_G[side], logs_G[side]))) for side in sides)
    return Region(problem, y, theta_GP[inside], squares_G[inside], limit, (low, high))


def _level(degrees: int) -> float:
    """Share of the least sum of squares by which it may grow at the 95% level."""
    return float(special.stdtrit(degrees, 0.975)) ** 2 / degrees


def _finely(problem: Problem, y: Array, theta_P: Array, limit: float) -> tuple[Array, Array, Array]:
    """θ, sums of squares and offsets along a fine grid over the offsets whose squares stay below a multiple."""
    fine = _FINE_OF_VALLEYS if _has_valleys(problem, y) else _FINE
    offsets_G = (1 - np.linspace(1, 0.05, fine) ** 2) * y.min() + _NONE * y.min()  # denser near the lowest value
    ones_n, squares = np.ones(len(y)), Objective("lsq-log")
    theta_GP, squares_G = _lowest_valley(problem, y, ones_n, theta_P, squares, offsets_G)
    floor = 1e-16
    near = np.flatnonzero(np.maximum(squares_G, floor) <= limit * max(float(squares_G.min()), floor))
    first, last = max(near[0] - 1, 0), min(near[-1] + 1, fine - 1)
    finer_G = np.linspace(offsets_G[first], offsets_G[last], fine)
    nearest_G = np.abs(finer_G[:, None] - offsets_G).argmin(axis=1)
    one_P = theta_GP[int(squares_G.argmin())]
    found = along(problem, y, ones_n, one_P, squares, finer_G)
    if _has_valleys(problem, y):
        found = _lower(found, along(problem, y, ones_n, theta_GP[nearest_G], squares, finer_G))
        found = _handed_on(problem, y, ones_n, found, squares, finer_G)
    theta_GP, squares_G = found
    return theta_GP, np.maximum(squares_G, floor), finer_G


def _lowest_valley(
    problem: Problem, y: Array, weights_n: Array, theta_P: Array, objective: Objective, offsets_G: Array
) -> tuple[Array, Array]:
    """As `along`; of a law with several valleys the lowest that its own starts lead to at some of the offsets."""
    found = along(problem, y, weights_n, theta_P, objective, offsets_G)
    if not _has_valleys(problem, y):
        return found
    marks = np.linspace(0, len(offsets_G) - 1, _MARKS).astype(int)
    place, bottoms = problem.free.index(OFFSET), []
    starts_SP = problem.law.starts(problem, y, weights_n, objective.raw, few=True)
    weights_Sn = np.broadcast_to(weights_n, (len(starts_SP), len(y)))
    for offset in offsets_G[marks]:
        starts_SP[:, place] = np.log(offset)
        ends_SP, values_S = minimise(problem, y, weights_Sn, starts_SP, objective, held=place)
        bottoms.append(ends_SP[values_S.argmin()])
    above_G = np.searchsorted(marks, np.arange(len(offsets_G))).clip(1, _MARKS - 1)
    for shift in (-1, 0):
        starts_GP = np.array(bottoms)[above_G + shift]
        found = _lower(found, along(problem, y, weights_n, starts_GP, objective, offsets_G))
    if term := problem.law.like_an_offset:  # the law without it is a valley of its own
        starts_1P = found[0][[found[1].argmin()]]
        level = problem.free.index(term)
        starts_1P[:, level] = np.log(_ALMOST_NOTHING * y.min())
        without_1P, _ = minimise(problem, y, weights_n[None], starts_1P, objective, held=level)
        found = _lower(found, along(problem, y, weights_n, without_1P[0], objective, offsets_G))
    return _handed_on(problem, y, weights_n, found, objective, offsets_G)


def _has_valleys(problem: Problem, y: Array) -> bool:
    """Whether a law has so many parameters, and so few rows that looking for other valleys takes seconds."""
    return len(problem.free) > SIMPLE and len(y) <= ROWS_FOR_VALLEYS


def _handed_on(
    problem: Problem, y: Array, weights_n: Array, found: tuple[Array, Array], objective: Objective, offsets_G: Array
) -> tuple[Array, Array]:
    """Fits along offsets, each begun anew from where those of its neighbours ended, and from the lowest of all."""
    place, weights_Gn = problem.free.index(OFFSET), np.broadcast_to(weights_n, (len(offsets_G), len(y)))

    def traded(found: tuple[Array, Array], theta_GP: Array) -> tuple[Array, Array]:
        starts_GP = problem.law.traded(problem, theta_GP, offsets_G)
        if starts_GP is None:
            return found
        return _lower(found, minimise(problem, y, weights_Gn, starts_GP, objective, held=place))

    found = traded(found, np.tile(found[0][found[1].argmin()], (len(offsets_G), 1)))
    for shift in (1, -1):
        neighbours_GP = np.roll(found[0], shift, axis=0)
        found = _lower(found, along(problem, y, weights_n, neighbours_GP, objective, offsets_G))
        found = traded(found, neighbours_GP)
    return found


def _lower(first: tuple[Array, Array], *others: tuple[Array, Array]) -> tuple[Array, Array]:
    """At each offset the lowest of several fits."""
    theta_GP, values_G = first
    for theirs_GP, heights_G in others:
        better_G = heights_G < values_G
        theta_GP, values_G = np.where(better_G[:, None], theirs_GP, theta_GP), np.minimum(heights_G, values_G)
    return theta_GP, values_G


def along(
    problem: Problem, y: Array, weights_n: Array, theta_P: Array, objective: Objective, offsets_G: Array
) -> tuple[Array, Array]:
    """θ (G, P) and objectives (G,) of the fits with E held at each offset, begun at θ with its other terms rescaled.

    Args:
        problem: the law at the rows.
        y: their values.
        weights_n: how often each counts.
        theta_P: where to begin, or (G, P), from where at each offset.
        objective: what to minimise.
        offsets_G: the offsets.
    """
    starts_GP = np.array(np.broadcast_to(theta_P, (len(offsets_G), len(problem.free))))
    place, middle = problem.free.index(OFFSET), float(np.median(y))
    left_G = np.log((middle - offsets_G) / np.maximum(middle - np.exp(starts_GP[:, place]), 1e-3 * middle))
    for other, name in enumerate(problem.free):
        if name in problem.law.levels:
            starts_GP[:, other] += left_G
    starts_GP[:, place] = np.log(offsets_G)
    weights_Gn = np.broadcast_to(weights_n, (len(offsets_G), len(y)))
    return minimise(problem, y, weights_Gn, starts_GP, objective, held=place)
