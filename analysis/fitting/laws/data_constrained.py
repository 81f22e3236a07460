"""Repeated data: y = E + A·N^-α + B·D'^-β, D' the number of new tokens that would be worth as much as D repeated ones.

Muennighoff et al. 2023 (arXiv 2305.16264): D' = U + U·R·(1 - exp(-(D/U - 1)/R)) of U unique tokens, so that R says
after how many repetitions they are worth little (15.4 in the paper). Its second such term, for parameters beyond those
that the unique tokens call for, is left out here.

θ = (log E, log A, log B, log R, alpha, beta). Letters as in `log_terms`.
"""

from dataclasses import dataclass, replace

import numpy as np

from analysis.fitting.laws.base import OFFSET, Array, Problem, is_exponent
from analysis.fitting.laws.log_terms import LogTerms, Slots, named
from analysis.fitting.laws.power_sums import Term, power_sum

_REPETITIONS = (3.0, 20.0)
_OF_NEW_DATA = power_sum(
    *("chinchilla", "", ("params", "tokens"), Term("E"), Term("A", "alpha"), Term("B", "beta", 1)),
)


@dataclass(frozen=True)
class DataConstrained(LogTerms):
    """Chinchilla's law of parameters and tokens, of which `epochs` says how often each was seen."""

    @property
    def levels(self) -> tuple[str, ...]:
        """Of size and data."""
        return "A", "B"

    def logs(self, problem: Problem, theta_SP: Array) -> Array:
        """Of the offset, the size and the data."""
        values, sizes_n = named(problem, theta_SP), problem.log_inputs_In[0]
        size_Sn = values["A"] - values["alpha"] * sizes_n
        worth_Sn = values["B"] - values["beta"] * _worth(problem, values["R"])[0]
        return np.stack([np.broadcast_to(values[OFFSET], size_Sn.shape), size_Sn, worth_Sn])

    def derivatives(self, problem: Problem, theta_SP: Array) -> Slots:
        """Of those."""
        values = named(problem, theta_SP)
        worth_Sn, first_Sn, second_Sn = _worth(problem, values["R"])
        slots = Slots(problem, 3, len(theta_SP))
        slots.set(0, OFFSET, 1.0)
        slots.set(1, "A", 1.0)
        slots.set(1, "alpha", -problem.log_inputs_In[0])
        slots.set(2, "B", 1.0)
        slots.set(2, "beta", -worth_Sn, ("R", -first_Sn))
        slots.set(2, "R", -values["beta"] * first_Sn, ("R", -values["beta"] * second_Sn))
        return slots

    def starts(self, problem: Problem, y: Array, weights_n: Array, raw: bool, few: bool) -> Array:
        """Those of the law of new data, with D' for several R."""
        place = problem.free.index("R")
        parts = []
        for repetitions in _REPETITIONS[1:2] if few else _REPETITIONS:
            log_R = np.log([[repetitions]])
            inputs_In = np.stack([problem.log_inputs_In[0], _worth(problem, log_R)[0][0]])
            new = replace(problem, law=_OF_NEW_DATA, log_inputs_In=inputs_In, centres=problem.centres[:2])
            starts_SQ = _OF_NEW_DATA.starts(new, y, weights_n, raw, few=True)
            parts.append(np.insert(starts_SQ, place, log_R[0, 0], axis=1))
        return np.concatenate(parts)

    def shift(self, problem: Problem, name: str, values: dict[str, Array]) -> Array | float:
        """The centre of the term's input times its exponent; R counts repetitions."""
        terms = {"A": ("alpha", 0), "B": ("beta", 1)}
        if name not in terms:
            return 0.0
        exponent, place = terms[name]
        return values[exponent] * problem.centres[place]

    def bounds(self, problem: Problem, name: str) -> tuple[float, float] | None:
        """R between a tenth of a repetition and a thousand; exponents as of other sums."""
        if name == "R":
            return float(np.log(0.1)), float(np.log(1000.0))
        return (1e-4, 20.0) if is_exponent(name) else None


def _worth(problem: Problem, log_R_S1: Array) -> tuple[Array, Array, Array]:
    """Log D', centred as the tokens are, with its first and second derivative by log R; each (S, n)."""
    epochs_n = np.maximum(np.exp(problem.log_inputs_In[2] + problem.centres[2]), 1.0)
    R_S1 = np.exp(log_R_S1)
    reach_Sn = (epochs_n - 1) / R_S1
    left_Sn = np.exp(-reach_Sn)
    total_Sn = 1 + R_S1 * (1 - left_Sn)  # D' / U
    first_Sn = R_S1 * (1 - left_Sn - reach_Sn * left_Sn)
    second_Sn = first_Sn - R_S1 * reach_Sn**2 * left_Sn
    worth_Sn = problem.log_inputs_In[1] + np.log(total_Sn / epochs_n)
    slope_Sn = first_Sn / total_Sn
    return worth_Sn, slope_Sn, second_Sn / total_Sn - slope_Sn**2
