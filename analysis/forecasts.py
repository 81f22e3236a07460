"""Forecasts written down before the run, and what came of them.

A forecast says what the best run of a budget will reach, from the runs that are there. It is kept in a small file with
a hash over all of it and the hash of the forecast before it, so that nobody, its author neither, can improve it, or
leave out one that failed, unnoticed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from pydantic import TypeAdapter

from analysis.checks.forecast import OffsetAverage
from analysis.errors import FitRefused, TableError
from analysis.options import FitOptions
from analysis.results import LawsResult, finite
from analysis.tables.table import RunsTable, prepare

SAME_BUDGET = 0.02
"""Runs whose FLOPs differ by less are of the same budget."""
MOST_FLOPS = 1e60
"""Of a forecast; more is a slip of the keyboard."""


@dataclass(frozen=True)
class ReadBy:
    """How the rows were read that a forecast rests on: its fields are those of `FitOptions`."""

    params: str | None = None
    flops: str | None = None
    tokens: str | None = None
    loss: str | None = None
    tokens_from_flops: float | None = None
    units: tuple[str, ...] = ()
    where: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: FitOptions) -> "ReadBy":
        """Those of what a law was asked for."""
        return cls(*(getattr(options, name) for name in cls.__dataclass_fields__))

    def of_later(self, targets: tuple[str, ...]) -> FitOptions:
        """The same for rows whose parameters and tokens don't matter, unless they say the FLOPs."""
        asked = FitOptions(**vars(self), target=targets)
        if self.tokens_from_flops is not None and self.flops is None:
            return asked
        units = tuple(unit for unit in self.units if unit.partition("=")[0].strip() not in ("params", "tokens"))
        return replace(asked, params=None, tokens=None, tokens_from_flops=None, units=units)


@dataclass(frozen=True)
class ForecastValue:
    """What is forecast of one target.

    Attributes:
        target: its column.
        value: the median of a new run.
        ci95: the new run's 95% interval.
        budgets: how many budgets it rests on.
        seed_noise: relative standard deviation between seeds, where runs were repeated.
        settings: of FID and its like, how the values were made.
    """

    target: str
    value: float
    ci95: tuple[float, float]
    budgets: int
    seed_noise: float | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


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
        read: how these rows were read, and the later ones are.
        recipe: of a study, whose runs are compared with it.
        previous: signature of the forecast made before it in the same folder.
    """

    study: str
    made: float
    flops: float
    extrapolation: float
    law: str
    table: str
    version: str
    values: tuple[ForecastValue, ...]
    read: ReadBy = field(default_factory=ReadBy)
    recipe: str = ""
    previous: str = ""

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
        unseen: forecasts whose runs have come, with the targets of which these have no value that compares.
    """

    outcomes: tuple[ForecastOutcome, ...]
    waiting: tuple[KeptForecast, ...] = field(default=())
    unseen: tuple[tuple[KeptForecast, tuple[str, ...]], ...] = field(default=())

    @property
    def counted(self) -> tuple[ForecastOutcome, ...]:
        """Those that were made before their run."""
        return tuple(each for each in self.outcomes if not each.early)

    def hits(self) -> tuple[int, int]:
        """How many lie in their interval, and of how many."""
        return sum(each.inside for each in self.counted), len(self.counted)


def forecast_at(
    result: LawsResult, flops: float, study: str, made: float, every: RunsTable | None = None
) -> KeptForecast:
    """What the fitted runs say of a budget.

    The power law above an offset is averaged over the offset, as for the prediction of the largest budget.

    Args:
        result: Laws of the runs.
        flops: The budget.
        study: What the runs are of.
        made: When, Unix seconds.
        every: The runs before conditions, which may leave out runs of the budget; None: there were no conditions.

    Raises:
        TableError: There is a run of that budget already, or nothing can be forecast.
    """
    if not 0 < flops <= MOST_FLOPS:
        raise TableError(f"--flops {flops:g}: expected training FLOPs above 0 and up to {MOST_FLOPS:g}, such as 1e21")
    frame = (every or result.table).frame
    if "flops" in frame.columns and (there := int(_of_budget(frame["flops"], flops).sum())):
        raise TableError(f"--flops {flops:g}: {there} runs of that budget are there already; a forecast comes before")
    values, largest, reasons = [], 0.0, []
    for grid in result.grids.values():
        x_n, y_n = (grid.frontier[name].to_numpy(dtype=float) for name in ("flops", grid.target))
        if grid.rises or (len(x_n) > 1 and np.corrcoef(np.log(x_n), np.log(y_n))[0, 1] > 0):
            reasons.append(f"{grid.target}: it rises with compute; a forecast is of what falls, such as loss or error")
            continue
        try:
            middle, low, high = OffsetAverage(x_n, y_n, grid.noise).predict(np.array([flops]))
        except FitRefused as refusal:
            reasons.append(f"{grid.target}: {refusal}")
            continue
        noise = grid.noise.relative if grid.noise else None
        settings = result.table.settings.get(grid.target, {})
        interval = float(low[0]), float(high[0])
        values.append(ForecastValue(grid.target, float(middle[0]), interval, len(x_n), noise, settings))
        largest = max(largest, float(x_n.max()))
    if not values:
        raise TableError(f"nothing can be forecast: {'; '.join(reasons) or _why_no_grid(result.table)}")
    if flops < largest:
        raise TableError(
            f"--flops {flops:g}: less than the largest budget of the runs, {largest:.3g}; a forecast is of a larger one"
        )
    law = "power law above an offset, averaged over the offset"
    table, read = result.table, ReadBy.of(result.options)
    return KeptForecast(study, made, flops, flops / largest, law, table.sha256, result.version, tuple(values), read)


def _why_no_grid(table: RunsTable) -> str:
    if not table.has("flops"):
        return "the runs say no FLOPs; --flops-column names them, and --tokens-from-flops 6 takes C = 6 N D"
    unnamed = "" if table.has("params") else " (--params names the column of sizes)"
    return f"no two sizes share budgets, of which the best would be extrapolated{unnamed}"


@dataclass(frozen=True)
class ForecastFile:
    """A forecast as it was read, with its signature."""

    kept: KeptForecast
    signature: str


def read_forecast(text: str, place: str) -> ForecastFile:
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
    return ForecastFile(kept, signature)


def read_again(first: ReadBy, given: ReadBy) -> ReadBy:
    """As the forecast's rows were read, but for what is given anew; further conditions are added to its own."""
    anew = {name: value for name, value in vars(given).items() if value not in (None, ())}
    return replace(first, **anew | {"where": (*first.where, *given.where)})


def outcomes(
    kept: KeptForecast, runs: pd.DataFrame, ended: Mapping[str, float], read: ReadBy | None = None
) -> list[ForecastOutcome]:
    """What came of a forecast, for each target that the runs have.

    Rows count that would count in a fit: those that meet the forecast's conditions; of a sweep those that finished,
    without variants of the recipe; of FID and its like those that were measured as the forecast's were.

    Args:
        kept: The forecast.
        runs: A row a run.
        ended: When runs ended, Unix seconds, by the name in their column `run`, as far as it is known.
        read: How the rows are read, where they aren't as the forecast's were.

    Raises:
        TableError: The rows have no FLOPs, or none of the targets, or values that are none.
    """
    read = read or kept.read
    column = {kept.read.loss or "loss": read.loss or kept.read.loss or "loss"}
    names = {value.target: column.get(value.target, value.target) for value in kept.values}
    own = tuple(name for name in names.values() if name in runs.columns) or tuple(names.values())[:1]
    table = prepare(runs, read.of_later(own))
    if not table.has("flops"):
        raise TableError("no column of training FLOPs; --flops-column names it")
    of_budget = table.frame[_of_budget(table.frame["flops"], kept.flops)]
    found = []
    for value in kept.values:
        target = names[value.target]
        numbers = of_budget[target].dropna() if target in of_budget.columns else of_budget["flops"].iloc[:0]
        if not len(numbers) or _measured_otherwise(value, table.settings.get(target, {})):
            continue
        best = int(numbers.to_numpy().argmin())
        run = str(of_budget.get("run", of_budget["row"])[numbers.index].iloc[best])
        early = ended.get(run, np.inf) < kept.made
        found.append(ForecastOutcome(kept, value, float(numbers.min()), len(numbers), early))
    return found


def _measured_otherwise(value: ForecastValue, settings: Mapping[str, str]) -> bool:
    """Whether an evaluation's setting differs from that of the forecast; floors are measured anew."""
    shared = [name for name in settings if name in value.settings and not name.endswith("_floor")]
    return any(settings[name] != value.settings[name] for name in shared)


def track_record(found: Sequence[tuple[KeptForecast, Sequence[ForecastOutcome]]]) -> TrackRecord:
    """All forecasts with their outcomes, together."""
    unseen = []
    for kept, own in found:
        seen = {each.value.target for each in own}
        if own and (others := tuple(each.target for each in kept.values if each.target not in seen)):
            unseen.append((kept, others))
    every = tuple(each for _, own in found for each in own)
    return TrackRecord(every, tuple(kept for kept, own in found if not own), tuple(unseen))


def _of_budget(flops: "pd.Series[float]", budget: float) -> "pd.Series[bool]":
    return (flops / budget - 1).abs() < SAME_BUDGET


def _signature(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
