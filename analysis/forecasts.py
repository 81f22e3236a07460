"""Forecasts written down before the run, and what came of them.

A forecast says what the best run of a budget will reach, from the runs that are there. It is kept in a small file with
a hash over all of it, so that nobody, its author neither, can improve it afterwards.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from pydantic import TypeAdapter

from analysis.checks.forecast import OffsetAverage
from analysis.errors import FitRefused, TableError
from analysis.results import LawsResult, finite

SAME_BUDGET = 0.02
"""Runs whose FLOPs differ by less are of the same budget."""
MOST_FLOPS = 1e60
"""Of a forecast; more is a slip of the keyboard."""


@dataclass(frozen=True)
class ForecastValue:
    """What is forecast of one target.

    Attributes:
        target: its column.
        value: the median of a new run.
        ci95: the new run's 95% interval.
        budgets: how many budgets it rests on.
        seed_noise: relative standard deviation between seeds, where runs were repeated.
    """

    target: str
    value: float
    ci95: tuple[float, float]
    budgets: int
    seed_noise: float | None = None


@dataclass(frozen=True)
class KeptForecast:
    """A forecast as its file holds it.

    Attributes:
        study: what it is of: a study's name, or the table's files.
        made: when, Unix seconds.
        flops: the budget.
        extrapolation: the budget over the largest one that it rests on.
        law: what was extrapolated.
        table: SHA-256 of the rows that it rests on.
        version: of varscale.
        values: one a target.
    """

    study: str
    made: float
    flops: float
    extrapolation: float
    law: str
    table: str
    version: str
    values: tuple[ForecastValue, ...]

    def as_text(self) -> str:
        """The file's content, signed."""
        content = finite(asdict(self))
        return json.dumps({"schema": 1, **content, "signature": _signature(content)}, indent=1) + "\n"


@dataclass(frozen=True)
class ForecastOutcome:
    """One target of a forecast beside the best run of its budget.

    Attributes:
        forecast: the forecast.
        value: of the target.
        observed: the best run's.
        runs: how many runs of the budget there are.
        early: whether the best run had ended before the forecast was made, so that it is none.
    """

    forecast: KeptForecast
    value: ForecastValue
    observed: float
    runs: int
    early: bool = False

    @property
    def error_percent(self) -> float:
        """Observed minus forecast, in per cent of the forecast."""
        return 100 * (self.observed / self.value.value - 1)

    @property
    def seed_deviations(self) -> float | None:
        """The same in standard deviations between seeds; None where they are not known."""
        noise = self.value.seed_noise
        return self.error_percent / (100 * noise) if noise else None

    @property
    def inside(self) -> bool:
        """Whether the observed value lies in the 95% interval."""
        return self.value.ci95[0] <= self.observed <= self.value.ci95[1]


@dataclass(frozen=True)
class TrackRecord:
    """All forecasts whose runs have come.

    Attributes:
        outcomes: one a target and forecast.
        waiting: forecasts without a run so far.
    """

    outcomes: tuple[ForecastOutcome, ...]
    waiting: tuple[KeptForecast, ...] = field(default=())

    @property
    def counted(self) -> tuple[ForecastOutcome, ...]:
        """Those that were made before their run."""
        return tuple(each for each in self.outcomes if not each.early)

    def hits(self) -> tuple[int, int]:
        """How many lie in their interval, and of how many."""
        return sum(each.inside for each in self.counted), len(self.counted)


def forecast_at(result: LawsResult, flops: float, study: str, made: float) -> KeptForecast:
    """What the fitted runs say of a budget.

    The power law above an offset is averaged over the offset, as for the prediction of the largest budget.

    Raises:
        TableError: There is a run of that budget already, or nothing can be forecast.
    """
    if not 0 < flops <= MOST_FLOPS:
        raise TableError(f"--flops {flops:g}: expected training FLOPs above 0 and up to {MOST_FLOPS:g}, such as 1e21")
    frame = result.table.frame
    if "flops" in frame.columns and (there := int(_of_budget(frame["flops"], flops).sum())):
        raise TableError(f"--flops {flops:g}: {there} runs of that budget are there already; a forecast comes before")
    values, largest, reasons = [], 0.0, []
    for grid in result.grids.values():
        x_n, y_n = (grid.frontier[name].to_numpy(dtype=float) for name in ("flops", grid.target))
        try:
            middle, low, high = OffsetAverage(x_n, y_n, grid.noise).predict(np.array([flops]))
        except FitRefused as refusal:
            reasons.append(f"{grid.target}: {refusal}")
            continue
        noise = grid.noise.relative if grid.noise else None
        values.append(ForecastValue(grid.target, float(middle[0]), (float(low[0]), float(high[0])), len(x_n), noise))
        largest = max(largest, float(x_n.max()))
    if not values:
        why = "; ".join(reasons) or "no two sizes share budgets, of which the best would be extrapolated"
        raise TableError(f"nothing can be forecast: {why}")
    if flops < largest:
        raise TableError(
            f"--flops {flops:g}: less than the largest budget of the runs, {largest:.3g}; a forecast is of a larger one"
        )
    law = "power law above an offset, averaged over the offset"
    return KeptForecast(study, made, flops, flops / largest, law, result.table.sha256, result.version, tuple(values))


def read_forecast(text: str, place: str) -> KeptForecast:
    """A forecast from its file's content.

    Raises:
        TableError: It is none, or was changed after it was made.
    """
    try:
        content = json.loads(text)
        signature = content.pop("signature")
        if content.pop("schema") != 1:
            raise ValueError("another schema")
        kept = TypeAdapter(KeptForecast).validate_json(json.dumps(content), strict=True)
        if not (0 < kept.flops < np.inf and all(each.value for each in kept.values)):
            raise ValueError("numbers that nothing compares with")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).partition(" [type=")[0].split())[:200]  # pydantic's, without its address
        raise TableError(f"{place}: no forecast ({type(error).__name__}: {reason})") from None
    if signature != _signature(content):
        raise TableError(f"{place}: changed after it was made; it doesn't count")
    return kept


def outcomes(kept: KeptForecast, runs: pd.DataFrame, flops: str, ended: Mapping[Any, float]) -> list[ForecastOutcome]:
    """What came of a forecast, for each target that the runs have.

    Args:
        kept: The forecast.
        runs: A row a run.
        flops: Their column of training FLOPs.
        ended: When each row's run ended, Unix seconds, by the frame's index, as far as it is known.
    """
    of_budget = runs[_of_budget(pd.to_numeric(runs[flops], errors="coerce"), kept.flops)]
    found = []
    for value in kept.values:
        numbers = pd.to_numeric(of_budget.get(value.target, pd.Series(dtype=float)), errors="coerce").dropna()
        if len(numbers):
            early = ended.get(numbers.idxmin(), np.inf) < kept.made
            found.append(ForecastOutcome(kept, value, float(numbers.min()), len(numbers), early))
    return found


def track_record(found: Sequence[tuple[KeptForecast, Sequence[ForecastOutcome]]]) -> TrackRecord:
    """All forecasts with their outcomes, together."""
    return TrackRecord(tuple(each for _, own in found for each in own), tuple(kept for kept, own in found if not own))


def _of_budget(flops: "pd.Series[float]", budget: float) -> "pd.Series[bool]":
    return (flops / budget - 1).abs() < SAME_BUDGET


def _signature(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
