"""Which runs, within a given compute, tell most of one quantity: c-optimal designs, by a greedy search with exchanges.

To first order the variance of a quantity g(θ) is ∇gᵀ (Σ JᵀJ / σ²)⁻¹ ∇g, a sum over all runs of what each tells, so that
it is known before a run is trained (Elfving 1952). As J depends on θ, which is known only roughly, the logarithm of the
variance is averaged over several θ and several laws (Chaloner & Verdinelli 1995).

Letters: K candidates, S parameter vectors θ, P parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from analysis.fitting.laws.base import Array

_LARGEST_BUDGETS = 10
"""How many of the candidates' budgets are tried as the largest of a design."""
_THRIFT = (1.0, 0.6)
"""Powers of a run's compute by which its gain is divided: the first takes many small runs before a large one."""
_LEAST_GAIN = 0.006
"""Runs that lower the variance by a smaller share are left out."""
_MOST_RUNS = 60
_EXCHANGES = 3


@dataclass
class Beliefs:
    """One law at several θ that may be true: what is known of the quantity, and what each candidate would tell.

    Attributes:
        gradient_SP: of the quantity by θ.
        covariance_SPP: of θ, given the runs that there are.
        jacobian_SKP: of the candidates' predictions by θ, in standard deviations of a run.
    """

    gradient_SP: Array
    covariance_SPP: Array
    jacobian_SKP: Array

    @property
    def variances(self) -> Array:
        """Of the quantity, at each θ, (S,)."""
        return np.asarray(np.einsum("sp,spq,sq->s", self.gradient_SP, self.covariance_SPP, self.gradient_SP))

    def gains(self) -> Array:
        """Mean logarithm of what is left of the quantity's variance after each candidate, (K,)."""
        turned_SP = np.einsum("spq,sq->sp", self.covariance_SPP, self.gradient_SP)
        along_SK = np.einsum("skp,sp->sk", self.jacobian_SKP, turned_SP)
        spread_SK = np.einsum("skp,spq,skq->sk", self.jacobian_SKP, self.covariance_SPP, self.jacobian_SKP)
        left_SK = 1 - along_SK**2 / ((1 + spread_SK) * self.variances[:, None])
        return np.asarray(np.log(np.maximum(left_SK, 1e-12)).mean(axis=0))

    def after(self, candidate: int) -> "Beliefs":
        """With a candidate's run added."""
        row_SP = self.jacobian_SKP[:, candidate]
        turned_SP = np.einsum("spq,sq->sp", self.covariance_SPP, row_SP)
        total_S = 1 + (row_SP * turned_SP).sum(axis=1)
        covariance_SPP = self.covariance_SPP - turned_SP[:, :, None] * turned_SP[:, None] / total_S[:, None, None]
        return Beliefs(self.gradient_SP, covariance_SPP, self.jacobian_SKP)


@dataclass(frozen=True)
class Compute:
    """What candidates still cost, with trunks shared by the cells of one size.

    A trunk is trained in one go: from the checkpoint before the first branch that it has no checkpoint for, to the last
    such branch.

    Attributes:
        flops_K: of each candidate, trained from its start to its end.
        size_K: which size it is of, a number.
        start_K: FLOPs of the furthest checkpoint of its trunk before its branch, 0 without any; ∞ where one is at it.
        own_share: of a run's FLOPs that it shares with no other: its branch; 1 where runs are trained apart.
    """

    flops_K: Array
    size_K: NDArray[np.intp]
    start_K: Array
    own_share: float = 1.0

    def added(self, chosen: Sequence[int]) -> Array:
        """What each candidate costs in addition to those chosen, (K,)."""
        first, last = self._stretches(chosen)
        longer_K = np.maximum(last[self.size_K], self._branches) - np.minimum(first[self.size_K], self.start_K)
        trunk_K = np.maximum(longer_K, 0.0) - np.maximum(last - first, 0.0)[self.size_K]
        return np.asarray(trunk_K + self.own_share * self.flops_K)

    def of(self, chosen: Sequence[int]) -> float:
        """What they cost together."""
        first, last = self._stretches(chosen)
        return float(np.maximum(last - first, 0.0).sum() + self.own_share * self.flops_K[list(chosen)].sum())

    def _stretches(self, chosen: Sequence[int]) -> tuple[Array, Array]:
        """Where each size's trunk goes on, and to where; nowhere: from ∞ to -∞."""
        places, sizes = list(chosen), int(self.size_K.max()) + 1
        first, last = np.full(sizes, np.inf), np.full(sizes, -np.inf)
        np.minimum.at(first, self.size_K[places], self.start_K[places])
        np.maximum.at(last, self.size_K[places], self._branches[places])
        return first, last

    @cached_property
    def _branches(self) -> Array:
        """FLOPs of the trunk up to each branch; -∞ where it has been trained up to there."""
        return np.where(np.isinf(self.start_K), -np.inf, (1 - self.own_share) * self.flops_K)


def design(beliefs: Sequence[Beliefs], compute: Compute, spend: float) -> list[int]:
    """The candidates whose runs narrow the quantity's interval most, of all that `spend` pays for; in order of use.

    A greedy search takes the run of the largest gain for its compute, again and again. It is done once for each of
    several largest budgets, since one large run may be worth more than many small ones. In the best result each run is
    then exchanged for another one as long as that helps.
    """
    affordable = np.unique(compute.flops_K[compute.added([]) <= spend])
    best: tuple[float, list[int]] = (0.0, [])
    for largest in affordable[::-1][:_LARGEST_BUDGETS]:
        for thrift in _THRIFT:
            found = _greedy(beliefs, compute, spend, float(largest), thrift, [])
            best = min(best, found, key=lambda each: each[0])
    for _ in range(_EXCHANGES):
        before = best[0]
        for candidate in list(best[1]):
            if candidate in best[1]:
                others = [each for each in best[1] if each != candidate]
                found = _greedy(beliefs, compute, spend, np.inf, 0.0, others, refuse=candidate)
                best = min(best, found, key=lambda each: each[0])
        if best[0] > before - _LEAST_GAIN:
            break
    return best[1]


def log_ratio(beliefs: Sequence[Beliefs], chosen: Sequence[int]) -> float:
    """Mean logarithm of the quantity's variance after the candidates chosen, over that before."""
    return float(np.mean([np.log(_with(each, chosen).variances / each.variances).mean() for each in beliefs]))


def _greedy(
    beliefs: Sequence[Beliefs],
    compute: Compute,
    spend: float,
    largest: float,
    thrift: float,
    chosen: list[int],
    refuse: int = -1,
) -> tuple[float, list[int]]:
    """The logarithm of what is left of the variance, and the candidates chosen, those given among them."""
    chosen = list(chosen)
    now = [_with(each, chosen) for each in beliefs]
    while len(chosen) < _MOST_RUNS:
        added_K = compute.added(chosen)
        possible_K = (compute.flops_K <= largest) & (added_K <= spend - compute.of(chosen))
        possible_K[[*chosen, refuse] if refuse >= 0 else chosen] = False
        gains_K = np.where(possible_K, np.mean([each.gains() for each in now], axis=0), 0.0)
        worth_K = np.where(gains_K < -_LEAST_GAIN, -gains_K / added_K**thrift, 0.0)
        if not worth_K.any():
            break
        chosen.append(int(worth_K.argmax()))
        now = [each.after(chosen[-1]) for each in now]
    left = [np.log(after.variances / each.variances).mean() for after, each in zip(now, beliefs, strict=True)]
    return float(np.mean(left)), chosen


def _with(beliefs: Beliefs, chosen: Sequence[int]) -> Beliefs:
    for candidate in chosen:
        beliefs = beliefs.after(candidate)
    return beliefs
