"""The multi-power law of learning curves under any schedule: Luo et al. 2025 (arXiv 2503.12811).

The paper writes L = L0 + A·S^-α - B·Σ_k (rate_(k-1) - rate_k)·(1 - w_k), w_k = (1 + C·rate_k^-γ·S_k)^-β, where S is the
sum of the rates of all steps so far and S_k that from step k on. The drops sum to peak - rate, so that the same law is
L = E + A·S^-α + B·left with left = rate + Σ_k (rate_(k-1) - rate_k)·w_k and E = L0 - B·peak: a sum of positive terms,
as `tables.annealing` has of the law of Tissue et al. The two are one where all runs have one peak.

What a rate has dropped is summed over some bins of each schedule, of which the one under way ends at the row.

θ = (log E, log A, log B, log C, alpha, beta, gamma), B and C for rates over the highest one. Letters as in `log_terms`;
M pairs of a row and a bin that the row has behind it.
"""

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from analysis.errors import FitRefused
from analysis.fitting.laws.base import OFFSET, Array, Law, Problem
from analysis.fitting.laws.log_terms import LogTerms, Slots, named
from analysis.fitting.laws.power_sums import Term, power_sum
from analysis.tables.annealing import RateSchedule

_BINS = 64
_LEAST = 1e-9
"""Of the sum so far, for what has only just dropped."""
_LARGEST_LOG = 300.0
_REACHES = (1e-1, 1e-2, 1e-3)
_BETAS, _GAMMA = (0.3, 1.0), 0.5
_OF_KNOWN_SHAPE = power_sum("", "", ("left", "rate_sum"), Term("E"), Term("A", "alpha", 1), Term("B", fixed=1.0))


@dataclass(frozen=True)
class MultiPower(LogTerms):
    """A law of sums of rates whose `rate_schedule` says, by its number, along which of the schedules they were."""

    schedules: tuple[RateSchedule, ...] = field(default=(), compare=False)

    @property
    def levels(self) -> tuple[str, ...]:
        """Of progress and of what is left to anneal."""
        return "A", "B"

    def along(self, schedules: tuple[RateSchedule, ...]) -> Law:
        """The law of runs with these schedules.

        Raises:
            FitRefused: the rate of none of them ever falls.
        """
        if not any((np.diff(each.rates_m) < 0).any() for each in schedules):
            raise FitRefused(f"{self.name}: no run's learning rate falls")
        return replace(self, schedules=schedules)

    @property
    def _peak(self) -> float:
        return max(float(each.rates_m.max()) for each in self.schedules)

    def prepare(self, problem: Problem) -> dict[str, Any]:
        """The drops behind each row."""
        codes_n, sums_n = np.exp(problem.log_inputs_In + np.array(problem.centres)[:, None])
        return {"drops": _Drops.behind(self.schedules, codes_n, sums_n, self._peak, problem.centres[1])}

    def logs(self, problem: Problem, theta_SP: Array) -> Array:
        """Of the offset, of progress, and of what is left to anneal."""
        values, sums_n = named(problem, theta_SP), problem.log_inputs_In[1]
        progress_Sn = values["A"] - values["alpha"] * sums_n
        left_Sn = values["B"] + np.log(problem.prepared["drops"].left(values))
        return np.stack([np.broadcast_to(values[OFFSET], left_Sn.shape), progress_Sn, left_Sn])

    def derivatives(self, problem: Problem, theta_SP: Array) -> Slots:
        """Of those; what is left depends on z = log(C·rate^-γ·S_k) and on beta."""
        values, drops = named(problem, theta_SP), problem.prepared["drops"]
        slots = Slots(problem, 3, len(theta_SP))
        slots.set(0, OFFSET, 1.0)
        slots.set(1, "A", 1.0)
        slots.set(1, "alpha", -problem.log_inputs_In[1])
        slots.set(2, "B", 1.0)
        beta_S1 = values["beta"]
        reach_SM = drops.reach(values)
        log_SM, share_SM = np.log1p(reach_SM), reach_SM / (1 + reach_SM)
        kept_SM = np.exp(-beta_S1 * log_SM)
        by_z_SM, by_beta_SM = -beta_S1 * share_SM * kept_SM, -log_SM * kept_SM
        twice_SM = by_z_SM * (1 - (1 + beta_S1) * share_SM)
        mixed_SM = share_SM * kept_SM * (beta_S1 * log_SM - 1)
        left_Sn = drops.rate_n + drops.summed(kept_SM)
        first = {"C": drops.summed(by_z_SM), "beta": drops.summed(by_beta_SM), "gamma": drops.summed(by_z_SM, 1)}
        first = {name: each / left_Sn for name, each in first.items()}
        second = {
            ("C", "C"): drops.summed(twice_SM),
            ("C", "gamma"): drops.summed(twice_SM, 1),
            ("gamma", "gamma"): drops.summed(twice_SM, 2),
            ("C", "beta"): drops.summed(mixed_SM),
            ("beta", "gamma"): drops.summed(mixed_SM, 1),
            ("beta", "beta"): drops.summed(-log_SM * by_beta_SM),
        }
        for name, by_Sn in first.items():
            own = {other: each / left_Sn for (one, other), each in second.items() if one == name}
            slots.set(2, name, by_Sn, *((other, each - by_Sn * first[other]) for other, each in own.items()))
        return slots

    def starts(self, problem: Problem, y: Array, weights_n: Array, raw: bool, few: bool) -> Array:
        """The best of those of the law whose C, beta and gamma are known, for several of them."""
        drops, found = problem.prepared["drops"], []
        for reach, beta in product(_REACHES[1:2] if few else _REACHES, _BETAS):
            shape = {"C": -np.log(reach), "beta": beta, "gamma": _GAMMA}
            left_n = drops.left({name: np.array([[value]]) for name, value in shape.items()})[0]
            inputs_In = np.stack([np.log(left_n), problem.log_inputs_In[1]])
            known = replace(problem, law=_OF_KNOWN_SHAPE, log_inputs_In=inputs_In)
            starts_SP = _OF_KNOWN_SHAPE.starts(known, y, weights_n, raw, few=True)
            squares_S = (weights_n * (np.log(y) - known.evaluate(starts_SP)[0]) ** 2).sum(axis=1)
            best = dict(zip(known.free, starts_SP[squares_S.argmin()], strict=True)) | shape
            found.append([best[name] for name in problem.free])
        return np.array(found)

    def shift(self, problem: Problem, name: str, values: dict[str, Array]) -> Array | float:
        """A and C are of sums at their centre, B and C of rates over the highest one."""
        peak, centre = float(np.log(self._peak)), problem.centres[1]
        if name == "C":
            return values["gamma"] * peak - centre
        return values["alpha"] * centre if name == "A" else -peak if name == "B" else 0.0

    def bounds(self, problem: Problem, name: str) -> tuple[float, float] | None:
        """Drops take effect within a hundred-millionth of the sum of rates, or within a hundred times that sum.

        Towards a beta of zero what is left is a logarithm, in which B·beta is all that can be told.
        """
        ends = {"C": (float(np.log(1e-2)), float(np.log(1e8))), "beta": (1e-3, 20.0), "gamma": (-5.0, 5.0)}
        return (1e-4, 20.0) if name == "alpha" else ends.get(name)


@dataclass(frozen=True)
class _Drops:
    """What the rate has dropped by behind each row.

    Attributes:
        rate_n: the rows' own rates over the highest one.
        log_lag_M: logarithms of the sums of rates since then, centred.
        log_rate_M: those of the rates dropped to, over the highest one.
        sums: the drops by pair and row, times (-log rate)⁰, ¹ and ².
    """

    rate_n: Array
    log_lag_M: Array
    log_rate_M: Array
    sums: tuple[csr_array, ...]

    @staticmethod
    def behind(
        schedules: tuple[RateSchedule, ...], codes_n: Array, sums_n: Array, peak: float, centre: float
    ) -> "_Drops":
        """Of rows at sums of rates along the schedules of their numbers, from 1."""
        rate_n = np.empty_like(sums_n)
        found = []
        for code in np.unique(np.rint(codes_n)).astype(int):
            rows = np.flatnonzero(np.rint(codes_n) == code)
            schedule = schedules[code - 1]
            rate_n[rows], pairs = _along(schedule, sums_n[rows])
            found.append((rows[pairs[0]], *pairs[1:]))
        row_M, drop_M, lag_M, dropped_to_M = (np.concatenate(each) for each in zip(*found, strict=True))
        lag_M = np.maximum(lag_M, _LEAST * sums_n[row_M])
        log_rate_M = np.log(dropped_to_M / peak)
        places = row_M, np.arange(len(row_M))
        shape = len(sums_n), len(row_M)
        sums = tuple(csr_array((drop_M / peak * (-log_rate_M) ** k, places), shape=shape) for k in range(3))
        return _Drops(rate_n / peak, np.log(lag_M) - centre, log_rate_M, sums)

    def reach(self, values: dict[str, Array]) -> Array:
        """C·rate^-γ·S_k, (S, M)."""
        log_SM = values["C"] + self.log_lag_M - values["gamma"] * self.log_rate_M
        return np.asarray(np.exp(np.minimum(log_SM, _LARGEST_LOG)))

    def left(self, values: dict[str, Array]) -> Array:
        """What is left to anneal, over the highest rate, (S, n)."""
        kept_SM = np.exp(-values["beta"] * np.log1p(self.reach(values)))
        return np.maximum(self.rate_n + self.summed(kept_SM), _LEAST)

    def summed(self, values_SM: Array, power: int = 0) -> Array:
        """Σ over the drops behind each row, (S, n)."""
        return np.asarray((self.sums[power] @ values_SM.T).T)


def _along(schedule: RateSchedule, sums_n: Array) -> tuple[Array, tuple[NDArray[np.intp], Array, Array, Array]]:
    """Rates at sums of rates, and of each pair with a bin behind them: row, drop, sum since then, rate dropped to.

    Bins are even in how far the rate has moved, apart from where it rests. A drop is one to the rate of the row at
    its end.
    """
    moved_m = np.append(0.0, np.cumsum(np.abs(np.diff(schedule.rates_m))))
    rests = moved_m[1:][np.diff(moved_m) == 0]
    edges = np.unique(np.concatenate([np.linspace(0.0, moved_m[-1], _BINS + 1), rests]))
    moved_n = np.interp(sums_n, schedule.sums_m, moved_m)
    ends_nK = np.minimum(edges[1:], moved_n[:, None])
    row_M, bin_M = np.nonzero(ends_nK > edges[:-1])
    start_M, end_M = edges[bin_M], ends_nK[row_M, bin_M]
    middle_M = (start_M + end_M) / 2
    start_rate_M, middle_rate_M, end_rate_M = (
        np.interp(each, moved_m, schedule.rates_m) for each in (start_M, middle_M, end_M)
    )
    lag_M = sums_n[row_M] - np.interp(middle_M, moved_m, schedule.sums_m)
    dropped_to_M = schedule.rates_m[np.searchsorted(moved_m, middle_M)]
    dropped_to_M = np.where(dropped_to_M > 0, dropped_to_M, middle_rate_M)
    rates_n = np.asarray(np.interp(moved_n, moved_m, schedule.rates_m))
    return rates_n, (row_M, start_rate_M - end_rate_M, lag_M, dropped_to_M)
