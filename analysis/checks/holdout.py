"""Refits with runs left out: how well a law predicts what it hasn't seen, beside simple baselines."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from analysis.errors import FitRefused, TableError
from analysis.fitting.fit import Fit, fit
from analysis.fitting.laws.base import Array
from analysis.grids.frontier import SeedNoise
from analysis.tables.conditions import meets

MOST_STEPS = 6
MANY_ROWS = 10_000
_MANY = 30


@dataclass
class Refits:
    """Refits of a law to some of its rows, each made once.

    Attributes:
        fitted: the fit of all rows.
        rows: its rows.
        inputs: the columns it takes.
        target: the column it was fitted to.
    """

    fitted: Fit
    rows: pd.DataFrame
    inputs: tuple[str, ...]
    target: str
    _made: dict[bytes, Fit | None] = field(default_factory=dict)

    def on(self, known: NDArray[np.bool_]) -> Fit | None:
        """The law fitted to the rows chosen; None where they don't allow it."""
        key = np.packbits(known).tobytes()
        if key not in self._made:
            chosen = self.rows[known]
            try:
                self._made[key] = fit(
                    self.fitted.law,
                    _columns(chosen, self.inputs),
                    chosen[self.target].to_numpy(dtype=float),
                    objective=self.fitted.objective,
                    offset=self.fitted.offset,
                    few_starts=True,
                    near=None if self.fitted.at_bound else self.fitted,
                )
            except FitRefused:
                self._made[key] = None
        return self._made[key]


@dataclass(frozen=True)
class Heldout:
    """Errors of a refit on the rows left out.

    Attributes:
        name: which rows were left out.
        n_fitted: rows that the refit used.
        n_held: rows left out.
        mean_percent: mean absolute error, per cent of the observed value.
        worst_percent: the largest.
        noise_units: mean absolute error over the seeds' standard deviation; None without repeated seeds.
        baselines: mean absolute error of each baseline, per cent.
        parameters: of the refit.
        place: the input (compute, or size) up to which the refit saw rows.
    """

    name: str
    n_fitted: int
    n_held: int
    mean_percent: float
    worst_percent: float
    noise_units: float | None
    baselines: dict[str, float]
    parameters: dict[str, float]
    place: float

    @property
    def beaten_by(self) -> str:
        """The baseline that did better than the law; empty when none did."""
        best = min(self.baselines, key=lambda name: self.baselines[name])
        return best if self.baselines[best] < self.mean_percent else ""


def heldout_checks(refits: Refits, noise: SeedNoise | None, above: str = "") -> list[Heldout]:
    """Leaves out the largest budget, the largest size, and rolls forward from few to many.

    Of a law of losses that is the lowest loss, where the rows don't say their compute.

    A law of three parameters is held out only where five or more distinct budgets remain, a law of more where there
    remain twice as many rows as parameters.

    Args:
        refits: of the law in question.
        noise: scatter between seeds.
        above: a condition (`tables.conditions`); rows that meet it are left out together, as a check of its own.
    """
    splits = _splits(refits, above)
    checks = (_check(name, column, held, refits, noise) for name, column, held in splits)
    return [check for check in checks if check is not None]


def offset_path(refits: Refits) -> list[float]:
    """E as rows are added in order of the law's one input, from half of its values (four at least) to all."""
    values = _towards(refits, refits.inputs[0])
    levels = _levels(values)
    kept = levels[max(4, len(levels) // 2) - 1 : -1] if len(values) <= MANY_ROWS else ()
    path = [again.parameters["E"] for level in kept if (again := refits.on(values <= level)) is not None]
    return [*path, refits.fitted.parameters["E"]]


def _towards(refits: Refits, column: str) -> Array:
    """A column so that it grows to where predictions are made: losses, by which other values rise, fall there."""
    values = refits.rows[column].to_numpy(dtype=float)
    return 1 / values if refits.fitted.law.of_losses and column == refits.inputs[0] else values


def _splits(refits: Refits, above: str) -> list[tuple[str, str, Array]]:
    """Names, the column that decides, and which rows are left out."""
    rows, inputs, law = refits.rows, refits.inputs, refits.fitted.law
    order = next((name for name in ("budget", "flops") if name in rows.columns), inputs[-1])
    of_compute = not law.is_curve or law.of_losses or inputs[0] in ("tokens", "flops")
    column = order if of_compute else inputs[0]
    values = _towards(refits, column)
    splits = [(_name("lowest" if law.of_losses and column == inputs[0] else "largest", column), column, _top(values))]
    if "params" in inputs and len(inputs) > 1:
        splits.append(("largest params", "params", _top(rows["params"].to_numpy(dtype=float))))
    if above:
        splits.append((f"where {above}", column, _meeting(rows, above)))
    levels = _levels(values)
    last = len(levels) - 1
    steps = MOST_STEPS if len(rows) <= MANY_ROWS else 2
    for count in sorted({*np.linspace(3, last, steps).astype(int).tolist()}) if last >= 3 else []:
        inside, following = values <= levels[count - 1], values <= levels[count]
        splits.append(
            (f"roll forward {count} of {len(levels)}", column, np.where(inside, 0, np.where(following, 1, 2)))
        )
    return splits


def _meeting(rows: pd.DataFrame, condition: str) -> Array:
    """Which rows meet the condition: none of cells averaged over seeds that lack its column."""
    try:
        return np.asarray(meets(rows, condition), dtype=float)
    except TableError:  # the whole table has the column, or the fit would have been refused
        return np.zeros(len(rows))


def _name(prefix: str, column: str) -> str:
    return f"{prefix} {'budget' if column in ('budget', 'flops') else column}"


def _levels(values: Array) -> Array:
    """Distinct values; twelve even quantiles where there are very many."""
    distinct = np.unique(values)
    return distinct if len(distinct) <= _MANY else np.unique(np.quantile(values, np.linspace(0.1, 1.0, 12)))


def _top(values: Array) -> Array:
    """The rows at the largest value, or the top tenth where nearly every row has its own."""
    distinct = np.unique(values)
    limit = distinct[-1] * (1 - 1e-9) if len(distinct) <= _MANY else float(np.quantile(values, 0.9))
    return np.asarray(values >= limit)


def _check(name: str, column: str, held: Array, refits: Refits, noise: SeedNoise | None) -> Heldout | None:
    # Zero is fitted, one is predicted, two is neither (later than the next step of a roll forward).
    rows, inputs, target = refits.rows, refits.inputs, refits.target
    known, unknown = rows[held == 0], rows[held == 1]
    free = refits.fitted.free_count
    if not len(unknown) or not len(known):
        return None
    if free == 3 and known[column].nunique() < 5:
        return None
    if free > 3 and len(known) < 2 * free:
        return None
    again = refits.on(held == 0)
    if again is None:
        return None
    observed = unknown[target].to_numpy(dtype=float)
    errors = 100 * np.abs(again.predict(*_columns(unknown, inputs)) / observed - 1)
    return Heldout(
        name=name,
        n_fitted=len(known),
        n_held=len(unknown),
        mean_percent=float(errors.mean()),
        worst_percent=float(errors.max()),
        noise_units=float(errors.mean() / (100 * noise.relative)) if noise and noise.relative > 0 else None,
        baselines=_baselines(
            known, unknown, inputs, target, column, refits.fitted.law.name not in ("power", "rising-power")
        ),
        parameters=again.parameters,
        place=float(known[column].max()),
    )


def _columns(rows: pd.DataFrame, inputs: tuple[str, ...]) -> tuple[Array, ...]:
    return tuple(rows[name].to_numpy(dtype=float) for name in inputs)


def _baselines(
    known: pd.DataFrame, unknown: pd.DataFrame, inputs: tuple[str, ...], target: str, column: str, with_power: bool
) -> dict[str, float]:
    """No change: the row before along the column left out, alike otherwise. Power law: no offset. Nearest run."""
    observed = unknown[target].to_numpy(dtype=float)
    logs_known, logs_unknown = (np.log(np.stack(_columns(rows, inputs), axis=1)) for rows in (known, unknown))
    scale = np.maximum(logs_known.std(axis=0), 1e-9)
    values = known[target].to_numpy(dtype=float)
    nearest = values[cKDTree(logs_known / scale).query(logs_unknown / scale)[1]]
    before = nearest
    # Alike otherwise: the same size when budgets are left out, the same budget when a size is.
    alike = "params" if column != "params" else ("budget" if "budget" in known.columns else None)
    if alike in known.columns and alike != target:
        last = known.sort_values(column).drop_duplicates(alike, keep="last").set_index(alike)[target]
        alike_before = unknown[alike].map(last).to_numpy(dtype=float)
        before = np.where(np.isnan(alike_before), nearest, alike_before)
    design = np.column_stack([np.ones(len(known)), logs_known])
    slopes, *_ = np.linalg.lstsq(design, np.log(values), rcond=None)
    power = np.exp(np.column_stack([np.ones(len(unknown)), logs_unknown]) @ slopes)
    candidates = {"no change": before, "nearest run": nearest} | ({"power law": power} if with_power else {})
    return {name: float(100 * np.abs(each / observed - 1).mean()) for name, each in candidates.items()}
