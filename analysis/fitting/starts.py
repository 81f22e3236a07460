"""Many starts of one fit, all minimised at once.

Letters: S parameter vectors (starts), n rows, P free parameters.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from analysis.fitting.laws.base import Array, Problem
from analysis.fitting.newton import Objective, minimise

ROWS_FOR_STARTS = 2000
"""With more rows, starts run on some of them."""
SOME_ROWS = 500
"""On so many; refits of more begin where the fit ended."""
_A_MATCH = 1.02
"""An optimum higher than the best by more than this on some rows is not the best on all."""


def from_many_starts(
    problem: Problem, y: Array, weights_n: Array, objective: Objective, few: bool
) -> tuple[Array, Array, int]:
    """Where the starts ended (S, P), their objectives and how many there were.

    With very many rows the starts run on an even subset of them; for least absolute deviations they run on a smoother
    loss. What they find is then refined on all rows by the objective itself, each distinct optimum once, but for those
    that are no match for the best already.
    """
    whole = len(y) <= ROWS_FOR_STARTS
    chosen = np.arange(len(y)) if whole else _even_subset(len(y))
    subset = problem if whole else replace(problem, log_inputs_In=problem.log_inputs_In[:, chosen])
    rough = Objective() if objective.name == "lad" else objective
    starts_SP = subset.law.starts(subset, y[chosen], weights_n[chosen], objective.raw, few)
    weights_Sn = np.broadcast_to(weights_n[chosen], (len(starts_SP), len(chosen)))
    theta_SP, values_S = minimise(subset, y[chosen], weights_Sn, starts_SP, rough)
    if whole and rough is objective:
        return theta_SP, values_S, len(starts_SP)
    nothing = 1e-14 * float(np.abs(problem.law.linked(y)).sum()) + 1e-300
    _, first, inverse = np.unique(np.round(np.log(values_S + nothing), 4), return_index=True, return_inverse=True)
    first = first[values_S[first] <= _A_MATCH * values_S.min() + nothing][:5]
    refined_SP, refined_S = minimise(
        problem, y, np.broadcast_to(weights_n, (len(first), len(y))), theta_SP[first], objective
    )
    lost_S = inverse >= len(first)
    kept_S = np.minimum(inverse, len(first) - 1)
    return refined_SP[kept_S], np.where(lost_S, np.inf, refined_S[kept_S]), len(starts_SP)


def _even_subset(rows: int) -> NDArray[np.intp]:
    return np.sort(np.random.default_rng(0).permutation(rows)[:SOME_ROWS])
