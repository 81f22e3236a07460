"""Many starts of one fit, all minimised at once.

Letters: S parameter vectors (starts), n rows, P free parameters.
"""

from dataclasses import replace

import numpy as np

from analysis.fitting.laws.base import Array, Problem
from analysis.fitting.newton import Objective, minimise

ROWS_FOR_STARTS = 2000
"""Starts run on at most so many rows."""
_A_MATCH = 1.02
"""An optimum higher than the best by more than this on two thousand rows is not the best on all."""


def from_many_starts(
    problem: Problem, y: Array, weights_n: Array, objective: Objective, few: bool
) -> tuple[Array, Array, int]:
    """Where the starts ended (S, P), their objectives and how many there were.

    With very many rows the starts run on an even subset of them, and what they find is then refined on all rows, each
    distinct optimum once, but for those that are no match for the best already on the subset.
    """
    every = len(y) // ROWS_FOR_STARTS + 1
    if every == 1:
        starts_SP = problem.law.starts(problem, y, weights_n, objective.raw, few)
        weights_Sn = np.broadcast_to(weights_n, (len(starts_SP), len(y)))
        theta_SP, values_S = minimise(problem, y, weights_Sn, starts_SP, objective)
        return theta_SP, values_S, len(starts_SP)
    chosen = np.sort(np.random.default_rng(0).permutation(len(y))[: len(y) // every])
    subset = replace(problem, log_inputs_In=problem.log_inputs_In[:, chosen])
    starts_SP = subset.law.starts(subset, y[chosen], weights_n[chosen], objective.raw, few)
    weights_Sn = np.broadcast_to(weights_n[chosen], (len(starts_SP), len(chosen)))
    theta_SP, values_S = minimise(subset, y[chosen], weights_Sn, starts_SP, objective)
    _, first, inverse = np.unique(np.round(np.log(values_S + 1e-300), 4), return_index=True, return_inverse=True)
    first = first[values_S[first] <= _A_MATCH * values_S.min()][:5]
    refined_SP, refined_S = minimise(
        problem, y, np.broadcast_to(weights_n, (len(first), len(y))), theta_SP[first], objective
    )
    lost_S = inverse >= len(first)
    kept_S = np.minimum(inverse, len(first) - 1)
    return refined_SP[kept_S], np.where(lost_S, np.inf, refined_S[kept_S]), len(starts_SP)
