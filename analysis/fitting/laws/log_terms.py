"""Laws that are sums of positive terms whose logarithms are not linear in θ; `power_sums` has those that are.

Letter J: the terms.
"""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from analysis.fitting.laws.base import OFFSET, Array, Law, Problem


@dataclass(frozen=True)
class LogTerms(Law):
    """A sum of terms, of which a law gives logarithms and their derivatives; its own take the terms' shares."""

    @abstractmethod
    def logs(self, problem: Problem, theta_SP: Array) -> Array:
        """The terms' logarithms, (J, S, n)."""

    @abstractmethod
    def derivatives(self, problem: Problem, theta_SP: Array) -> "Slots":
        """Their derivatives by θ."""

    def prepare(self, problem: Problem) -> dict[str, tuple[bytes, "Slots"]]:
        """The last derivatives: a step of Newton's method asks for them three times."""
        return {}

    def evaluate(self, problem: Problem, theta_SP: Array) -> tuple[Array, Array]:
        """The logarithm of the sum, and the terms' shares of it."""
        logs_JSn = self.logs(problem, theta_SP)
        u_Sn = np.logaddexp.reduce(logs_JSn, axis=0)
        return u_Sn, np.exp(logs_JSn - u_Sn)

    def jacobian(self, problem: Problem, theta_SP: Array, shares_JSn: Array) -> Array:
        """∂u/∂θ."""
        return np.asarray((shares_JSn[..., None] * self._last(problem, theta_SP).first_JSnP).sum(axis=0))

    def curvature(
        self, problem: Problem, theta_SP: Array, shares_JSn: Array, outer_Sn: Array, second_Sn: Array
    ) -> Array:
        """Σ_n (outer · ∂u ∂uᵀ + second · ∂²u)."""
        slots = self._last(problem, theta_SP)
        jacobian_SnP = (shares_JSn[..., None] * slots.first_JSnP).sum(axis=0)
        own_JSn = shares_JSn * second_Sn
        result_SPP = _products(jacobian_SnP, outer_Sn - second_Sn) + _products(slots.first_JSnP, own_JSn).sum(axis=0)
        for term, first, second, values_Sn in slots.second:
            added_S = (own_JSn[term] * values_Sn).sum(axis=1)
            result_SPP[:, first, second] += added_S
            if first != second:
                result_SPP[:, second, first] += added_S
        return np.asarray(result_SPP)

    def _last(self, problem: Problem, theta_SP: Array) -> "Slots":
        key = theta_SP.tobytes()
        kept: tuple[bytes, Slots] | None = problem.prepared.get("last")
        if kept is None or kept[0] != key:
            kept = key, self.derivatives(problem, theta_SP)
            problem.prepared["last"] = kept
        return kept[1]


def _products(rows_SnP: Array, weights_Sn: Array) -> Array:
    """Σ_n weight · row rowᵀ."""
    return np.asarray((rows_SnP * weights_Sn[..., None]).swapaxes(-1, -2) @ rows_SnP)


def named(problem: Problem, theta_SP: Array) -> dict[str, Array]:
    """θ by name, each (S, 1) so that it meets rows; the pinned offset among them."""
    values = {name: theta_SP[:, [place]] for place, name in enumerate(problem.free)}
    if problem.pinned_log_offset is not None:
        values[OFFSET] = np.full((len(theta_SP), 1), problem.pinned_log_offset)
    return values


class Slots:
    """Derivatives of the logarithms of a law's terms, filled in by the names of its parameters.

    Attributes:
        first_JSnP: the first ones.
        second: the second ones that are not zero: term, both parameters, and values (S, n).
    """

    def __init__(self, problem: Problem, terms: int, thetas: int) -> None:
        self._places = {name: place for place, name in enumerate(problem.free)}
        self.first_JSnP = np.zeros((terms, thetas, problem.log_inputs_In.shape[1], len(problem.free)))
        self.second: list[tuple[int, int, int, Array]] = []

    def set(self, term: int, name: str, value: Array | float, *seconds: tuple[str, Array]) -> None:
        """A term's derivative by a parameter, and that derivative's own by others; nothing for a pinned one."""
        if name in self._places:
            place = self._places[name]
            self.first_JSnP[term, ..., place] = value
            self.second += [(term, place, self._places[other], values_Sn) for other, values_Sn in seconds]
