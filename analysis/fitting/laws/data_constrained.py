"""Repeated data and excess parameters: y = E + A·N'^-α + B·D'^-β, what N parameters and D tokens of U unique are worth.

Muennighoff et al. 2023 (arXiv 2305.16264): D' = U + U·R·(1 - exp(-(D/U - 1)/R)), so that R says after how many
repetitions unique tokens are worth little (15.4 in the paper). `ExcessParameters` has its second such term: N' is the
same of the parameters beyond U_N, those with which U tokens are best used, α·A·U_N^-α = β·B·U^-β; R_N was 5.3 in the
paper. Up to U_N, N' is N. The paper fits R and R_N alone, with the rest from runs of unique data; here all are fitted.

θ = (log E, log A, log B, log R, log R_N, alpha, beta). Letters as in `log_terms`.
"""

from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np

from analysis.fitting.laws.base import OFFSET, Array, Problem, is_exponent
from analysis.fitting.laws.log_terms import LogTerms, Slots, named
from analysis.fitting.laws.power_sums import Term, power_sum

_REPETITIONS = (3.0, 20.0)
_EXCESS = (5.0, 1e4)
_LARGEST_RATIO = 200.0
"""Of logarithms of ratios, so that their powers stay numbers."""
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
        values, (sizes_n, tokens_n, epochs_n) = named(problem, theta_SP), _inputs(problem)
        size_Sn = values["A"] - values["alpha"] * (sizes_n + self._lost_size(problem, values).value)
        data_Sn = values["B"] - values["beta"] * (tokens_n + _lost(epochs_n, values["R"]).value)
        return np.stack([np.broadcast_to(values[OFFSET], size_Sn.shape), size_Sn, data_Sn])

    def derivatives(self, problem: Problem, theta_SP: Array) -> Slots:
        """Of those."""
        values, (_, tokens_n, epochs_n) = named(problem, theta_SP), _inputs(problem)
        lost = _lost(epochs_n, values["R"])
        slots = Slots(problem, 3, len(theta_SP))
        slots.set(0, OFFSET, 1.0)
        slots.set(2, "B", 1.0)
        slots.set(2, "beta", -(tokens_n + lost.value), ("R", -lost.by_R))
        slots.set(2, "R", -values["beta"] * lost.by_R, ("R", -values["beta"] * lost.by_R_R))
        self._size_derivatives(problem, values, slots)
        return slots

    def _lost_size(self, problem: Problem, values: dict[str, Array]) -> "_Lost":
        """What parameters lose of their worth: nothing here."""
        nothing_Sn = np.zeros((len(values["A"]), problem.log_inputs_In.shape[1]))
        return _Lost(*[nothing_Sn] * 6)

    def _size_derivatives(self, problem: Problem, values: dict[str, Array], slots: Slots) -> None:
        slots.set(1, "A", 1.0)
        slots.set(1, "alpha", -problem.log_inputs_In[0])

    def starts(self, problem: Problem, y: Array, weights_n: Array, raw: bool, few: bool) -> Array:
        """Those of the law of new data, with D' for several R, and several R_N where there is one."""
        parts = []
        sizes_n, tokens_n, epochs_n = _inputs(problem)
        for log_R in np.log(_REPETITIONS[1:2] if few else _REPETITIONS):
            inputs_In = np.stack([sizes_n, tokens_n + _lost(epochs_n, log_R[None, None]).value[0]])
            new = replace(problem, law=_OF_NEW_DATA, log_inputs_In=inputs_In, centres=problem.centres[:2])
            found = dict(zip(new.free, _OF_NEW_DATA.starts(new, y, weights_n, raw, few=True).T, strict=True))
            for log_R_N in np.log(_EXCESS) if "R_N" in problem.free else (0.0,):
                given = found | {"R": np.full_like(found["A"], log_R), "R_N": np.full_like(found["A"], log_R_N)}
                parts.append(np.stack([given[name] for name in problem.free], axis=1))
        return np.concatenate(parts)

    def shift(self, problem: Problem, name: str, values: dict[str, Array]) -> Array | float:
        """The centre of the term's input times its exponent; R and R_N are counts."""
        terms = {"A": ("alpha", 0), "B": ("beta", 1)}
        if name not in terms:
            return 0.0
        exponent, place = terms[name]
        return values[exponent] * problem.centres[place]

    def bounds(self, problem: Problem, name: str) -> tuple[float, float] | None:
        """R between a tenth of a repetition and a thousand, R_N up to where nothing is lost; exponents as of sums."""
        if name in ("R", "R_N"):
            return float(np.log(0.1)), float(np.log(1000.0 if name == "R" else 1e5))
        return (1e-4, 20.0) if is_exponent(name) else None


@dataclass(frozen=True)
class ExcessParameters(DataConstrained):
    """The whole law of the paper: parameters beyond those that the unique tokens call for lose worth, too."""

    def _lost_size(self, problem: Problem, values: dict[str, Array]) -> "_Lost":
        """By N / U_N."""
        return _lost(problem.log_inputs_In[0] - _called_for(problem, values), values["R_N"])

    def _size_derivatives(self, problem: Problem, values: dict[str, Array], slots: Slots) -> None:
        """Of A - α·(log N + lost(m, R_N)), m = log N - log U_N, which depends on A, B, alpha and beta."""
        alpha_S1, beta_S1, lost = values["alpha"], values["beta"], self._lost_size(problem, values)
        _, tokens_n, epochs_n = _inputs(problem)
        called_Sn = _called_for(problem, values)
        by_beta_Sn = -(tokens_n - epochs_n - 1 / beta_S1) / alpha_S1
        m = {"A": -1 / alpha_S1, "B": 1 / alpha_S1, "alpha": (called_Sn - 1 / alpha_S1) / alpha_S1, "beta": by_beta_Sn}
        m |= {"R_N": np.zeros_like(alpha_S1)}
        m_twice = {
            ("A", "alpha"): alpha_S1**-2,
            ("B", "alpha"): -(alpha_S1**-2),
            ("alpha", "alpha"): (3 / alpha_S1 - 2 * called_Sn) / alpha_S1**2,
            ("alpha", "beta"): -by_beta_Sn / alpha_S1,
            ("beta", "beta"): -1 / (alpha_S1 * beta_S1**2),
        }
        lost_by = {name: lost.by_m * m[name] + lost.by_R * (name == "R_N") for name in m}
        seconds: dict[str, list[tuple[str, Array]]] = {name: [] for name in m}
        for one, other in combinations_with_replacement(m, 2):
            bent_Sn = (
                lost.by_m_m * m[one] * m[other]
                + lost.by_m * m_twice.get((one, other), 0.0)
                + lost.by_m_R * (m[one] * (other == "R_N") + m[other] * (one == "R_N"))
                + lost.by_R_R * (one == other == "R_N")
            )
            mixed_Sn = lost_by[other] * (one == "alpha") + lost_by[one] * (other == "alpha")
            seconds[one].append((other, -alpha_S1 * bent_Sn - mixed_Sn))
        for name, by_Sn in lost_by.items():
            own_Sn = (name == "A") - (name == "alpha") * (problem.log_inputs_In[0] + lost.value)
            slots.set(1, name, own_Sn - alpha_S1 * by_Sn, *seconds[name])


def _inputs(problem: Problem) -> tuple[Array, Array, Array]:
    """Logarithms of sizes and tokens, centred, and of epochs, which are not."""
    sizes_n, tokens_n, epochs_n = problem.log_inputs_In
    return sizes_n, tokens_n, epochs_n + problem.centres[2]


def _called_for(problem: Problem, values: dict[str, Array]) -> Array:
    """Log U_N, centred as sizes are: the parameters whose share of the loss is in balance with the unique tokens'."""
    _, tokens_n, epochs_n = _inputs(problem)
    balance_S1 = values["A"] - values["B"] + np.log(values["alpha"] / values["beta"])
    return np.asarray((balance_S1 + values["beta"] * (tokens_n - epochs_n)) / values["alpha"])


class _Lost(NamedTuple):
    """How much of a logarithm's worth is lost, and its derivatives by the ratio's logarithm m and by log R, (S, n)."""

    value: Array
    by_m: Array
    by_R: Array
    by_m_m: Array
    by_m_R: Array
    by_R_R: Array


def _lost(ratios_Sn: Array, log_R_S1: Array) -> _Lost:
    """Log((1 + R·(1 - exp(-(r - 1)/R))) / r) of ratios r = e^m, of repetitions or of parameters; 0 up to r = 1."""
    beyond_Sn = ratios_Sn > 0
    ratio_Sn, R_S1 = np.exp(np.clip(ratios_Sn, 0.0, _LARGEST_RATIO)), np.exp(log_R_S1)
    reach_Sn = (ratio_Sn - 1) / R_S1
    left_Sn = np.exp(-reach_Sn)
    worth_Sn = 1 + R_S1 * (1 - left_Sn)
    by_m_Sn = ratio_Sn * left_Sn / worth_Sn
    by_R_Sn = R_S1 * (1 - left_Sn - reach_Sn * left_Sn) / worth_Sn
    found = (
        np.log(worth_Sn / ratio_Sn),
        by_m_Sn - 1,
        by_R_Sn,
        by_m_Sn * (1 - ratio_Sn / R_S1 - by_m_Sn),
        by_m_Sn * (reach_Sn - by_R_Sn),
        by_R_Sn - R_S1 * reach_Sn**2 * left_Sn / worth_Sn - by_R_Sn**2,
    )
    return _Lost(*(np.where(beyond_Sn, each, 0.0) for each in found))
