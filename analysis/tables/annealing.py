"""Sums of learning rates along runs, which the laws of the rate's annealing take.

Tissue et al. 2024 (arXiv 2408.11029) write L = L0 + A·S1^-α - C·S2 for the loss at a step: S1 is the sum of the rates
of all steps so far, and S2 = Σ m_i the area of their annealing, m_i = λ·m_(i-1) + (rate_(i-1) - rate_i). Summed by
parts, S2 = (peak - mean) / (1 - λ), where the running mean is mean_i = λ·mean_(i-1) + (1 - λ)·rate_i. So
L = E + A·S1^-α + C·left with left = mean / (1 - λ), the area that is left to anneal, and E = L0 - C·peak / (1 - λ): a
sum of positive terms. The two are the same law where all runs have one peak. Of constant runs at several rates the
paper's says that their losses are alike at the same S1, this one that higher rates have higher losses.
"""

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.errors import TableError
from analysis.options import ANNEALING, MULTI_POWER, FitOptions
from analysis.tables.checkpoints import RATES, RUNS
from analysis.tables.roles import numbers, plain_name, some

_Array = NDArray[np.float64]
RATE_SUM, RATE_LEFT, RATE_SCHEDULE = "rate_sum", "rate_left", "rate_schedule"
_STEPS = re.compile(r"(global_|train(ing)?_|optimizer_)?(step|iteration|iter|update)s?(_?(number|no|id))?")
_COUNTS = re.compile(r"(images|tokens|samples|sequences)(_(seen|so_far|processed))?|consumed_(tokens|samples|images)")
_HORIZON = 1000.0
"""Steps over which a fall of the rate takes effect, 1 / (1 - λ), in the paper."""
_LEAST = 1e-9
"""Of the highest rate: where rates stay at zero, little is left to anneal, but not nothing."""
_LATE = 3.0
_WARM = 0.9
"""Of the peak, from which on a run counts as warmed up."""
_NEEDS = "a law of learning rates needs the rows along each run"


@dataclass(frozen=True, eq=False)
class RateSchedule:
    """A run's learning rates along their own sum; in warm-up they are the highest one.

    Attributes:
        name: the run's.
        sums_m: of all rates so far, at each of its rows.
        rates_m: there.
        warm_sum: the sum where the warm-up ends; 0 where there is none.
    """

    name: str
    sums_m: _Array
    rates_m: _Array
    warm_sum: float = 0.0

    @property
    def peak(self) -> float:
        """The rate at which its warm-up ends, from which annealing is counted."""
        return float(self.rates_m[0])

    @property
    def begins_late(self) -> bool:
        """Whether the first row lies several rows' distance after the first step: what was before is not known."""
        gaps_m = np.diff(self.sums_m) / np.maximum(self.rates_m[1:], _LEAST * self.rates_m.max())
        return len(gaps_m) > 0 and bool(self.sums_m[0] > _LATE * np.median(gaps_m) * self.rates_m[0])


@dataclass(frozen=True)
class WithRates:
    """A table with sums of rates.

    Attributes:
        source: its rows with `rate_sum` (S1), `rate_schedule` (the schedule's number, from 1) and, if it is taken,
            `rate_left`.
        alone: which of them are alone in their run.
        schedules: of the other runs.
        note: how that was worked out.
    """

    source: pd.DataFrame
    alone: "pd.Series[bool]"
    schedules: tuple[RateSchedule, ...]
    note: str


def with_rate_sums(source: pd.DataFrame, columns: dict[str, str], options: FitOptions) -> WithRates:
    """The rows with the sums of rates that laws of them take.

    All rows of a run count, with and without a loss; rates between rows lie on straight lines.

    Args:
        source: rows as they were read.
        columns: source column by role.
        options: for the names of runs and the horizon.

    Raises:
        TableError: there is no column of rates or of what orders the rows, or they don't make sense as those of runs.
    """
    rate = _named(source, RATES, f"{_NEEDS} with their learning rates, in a column such as 'lr' or 'learning_rate'")
    steps = _first(source, _STEPS)
    order = steps or columns.get("tokens") or _first(source, _COUNTS)
    if order is None:
        raise TableError(f"{_NEEDS} in their order, by a column such as 'step' or 'iteration'; {_has(source)}")
    horizon = options.annealing_horizon or _HORIZON
    of_area = ANNEALING in options.law
    if of_area and not options.annealing_horizon and not steps:
        raise TableError(
            f"column {order!r} counts no steps: say by --annealing-horizon over how many of them a fall of the rate "
            f"takes effect (in the paper over {_HORIZON:,.0f} steps, λ = {1 - 1 / _HORIZON:g})"
        )
    _check_sizes(source, columns)
    runs = columns.get("run_id") or _runs(source)
    found = pd.DataFrame({"order": numbers(source, order), "rate": numbers(source, rate)}, index=source.index)
    names = source[runs].map(str) if runs else pd.Series("", index=source.index)
    alone = names.groupby(names).transform("size") == 1
    if alone.all():
        raise TableError(f"{_NEEDS}: " + (f"each {runs!r} has one" if runs else "this table has one"))
    sums, schedules = np.full((len(source), 3), np.nan), []
    for code, (name, rows) in enumerate(found[~alone].groupby(names[~alone], sort=False), start=1):
        where = f"{runs} {name!r}" if runs else "the table"
        places_n, rates_n = _rates(rows, where, order, rate)
        sums_n, left_n = rate_sums(places_n, rates_n, horizon)
        values = np.stack([np.where(sums_n > 0, sums_n, np.nan), left_n, np.full_like(sums_n, code)], axis=1)
        by_place = pd.DataFrame(values, index=places_n).reindex(rows["order"].to_numpy(dtype=float))
        sums[source.index.get_indexer(rows.index)] = by_place.to_numpy()
        held_n = _held(rates_n)
        warm = int(np.argmax(rates_n >= _WARM * held_n[0]))
        schedules.append(RateSchedule(str(name), sums_n, held_n, float(sums_n[warm]) if warm else 0.0))
    text = f"sums of the rates in {rate!r} follow {order!r}" + (f" within each {runs!r}" if runs else "")
    text += f", with λ = {1 - 1 / horizon:.6g}" if of_area else ""
    text += "; before its first row a run's rate is taken as the first row's"
    if MULTI_POWER in options.law and runs:
        numbered = (f"{code} {each.name!r}" for code, each in enumerate(schedules, start=1))
        text += f"; {RATE_SCHEDULE} is {some(tuple(numbered))}"
    filled = {RATE_SUM: sums[:, 0], RATE_SCHEDULE: sums[:, 2]} | ({RATE_LEFT: sums[:, 1]} if of_area else {})
    return WithRates(source.assign(**filled), alone, tuple(schedules), text)


def rate_sums(steps_n: _Array, rates_n: _Array, horizon: float = _HORIZON) -> tuple[_Array, _Array]:
    """S1 and the area left to anneal at each of a run's steps, which grow.

    Up to where rates first fall, a run warms up: that is no annealing, so that its mean is held at the highest one.

    Args:
        steps_n: steps so far at each row.
        rates_n: learning rates there; between rows they lie on straight lines, before the first one they are the same.
        horizon: 1 / (1 - λ), in steps.
    """
    decay = 1 - 1 / horizon
    held_n = _held(rates_n)
    gaps_m = np.diff(steps_n)
    # Σ (rate + i·slope) over a gap's steps i = 1 … gap, and the same weighted by λ^(gap - i)
    growth_m = rates_n[:-1] * gaps_m + np.diff(rates_n) * (gaps_m + 1) / 2
    kept_m = decay**gaps_m
    lag_m = 1 - decay * horizon * (1 - kept_m) / gaps_m
    added_m = (1 - kept_m) * held_n[:-1] + np.diff(held_n) * lag_m
    means = [float(held_n[0])]
    for kept, added in zip(kept_m, added_m, strict=True):
        means.append(kept * means[-1] + added)
    sum_n = rates_n[0] * steps_n[0] + np.concatenate([[0.0], np.cumsum(growth_m)])
    return sum_n, horizon * np.maximum(means, _LEAST * rates_n.max())


def _held(rates_n: _Array) -> _Array:
    """The rates with those of the warm-up, up to where they first fall, at the highest of them."""
    falls = np.flatnonzero(np.diff(rates_n) < 0)
    warm = falls[0] if len(falls) else len(rates_n) - 1
    return np.where(np.arange(len(rates_n)) <= warm, rates_n[warm], rates_n)


def _rates(rows: pd.DataFrame, where: str, order: str, rate: str) -> tuple[_Array, _Array]:
    """One run's places, each once and in order, and its rates there."""
    known = rows.dropna()
    if not len(known) or (known < 0).any(axis=None) or known["rate"].max() == 0:
        raise TableError(
            f"{where} has no learning rates that can be summed: they (column {rate!r}) and {order!r} must be numbers "
            "of 0 or more, and some rate above 0"
        )
    apart = known.groupby("order")["rate"].agg(["min", "max"])
    unlike = apart[apart["max"] > apart["min"] * (1 + 1e-6)]
    if len(unlike):
        first = unlike.iloc[0]
        raise TableError(
            f"{where} has learning rates of {first['min']:g} and {first['max']:g} at the same {order}, "
            f"{unlike.index[0]:g}: if these are several runs, name them by --checkpoints --run-id COLUMN"
        )
    places_n = np.unique(rows["order"].dropna().to_numpy(dtype=float))
    return places_n, np.interp(places_n, apart.index.to_numpy(dtype=float), apart["max"].to_numpy(dtype=float))


def _runs(source: pd.DataFrame) -> str | None:
    """The column that names runs; one in which they have several rows, if there is any."""
    names = [str(name) for name in source.columns if RUNS.fullmatch(_short(name))]
    counts = {name: source[name].map(str).nunique() for name in names}
    several = [name for name in names if 1 < counts[name] < len(source)]
    return next(iter([*several, *(name for name in names if counts[name] > 1)]), None)


def _check_sizes(source: pd.DataFrame, columns: dict[str, str]) -> None:
    if "params" not in columns:
        return
    groups = source[columns["group"]].map(str) if "group" in columns else pd.Series("", index=source.index)
    if (numbers(source, columns["params"], counts=True).groupby(groups).nunique() > 1).any():
        raise TableError(
            f"a law of learning rates is one of a single size, and {columns['params']!r} has several values; take one "
            "of them by --where, or --group by it"
        )


def _named(source: pd.DataFrame, names: re.Pattern[str], needs: str) -> str:
    if (found := _first(source, names)) is None:
        raise TableError(f"{needs}; {_has(source)}")
    return found


def _first(source: pd.DataFrame, names: re.Pattern[str]) -> str | None:
    return next((str(name) for name in source.columns if names.fullmatch(_short(name))), None)


def _short(name: object) -> str:
    """Of a nested record's columns (`metrics.lr`, `train/lr`) the last part."""
    return plain_name(re.split("[./]", str(name))[-1])


def _has(source: pd.DataFrame) -> str:
    return "the table has " + some(tuple(str(name) for name in source.columns if name != "row"))
