"""How FID and its like depend on classifier-free guidance, cell by cell, and the guidance at which they are lowest."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.tables.evaluations import at_several_guidances, is_evaluation
from analysis.tables.table import RunsTable

SHARES = ("image_precision", "image_recall")


@dataclass(frozen=True)
class BestGuidance:
    """Where a measure is lowest.

    Attributes:
        guidance: the minimum of a parabola in the measure's logarithm through the lowest value and its neighbours;
            where the lowest is at an end of the guidances, or not above 0, that guidance itself.
        value: the measure there.
        lowest_at: the guidance of the lowest value measured.
        bracketed: whether there are values on either side of the lowest. Otherwise the best may lie beyond the range.
    """

    guidance: float
    value: float
    lowest_at: float
    bracketed: bool


@dataclass(frozen=True)
class GuidanceCurve:
    """A cell's measures against guidance, all other settings being the same.

    Attributes:
        run: the cell's name in the table.
        settings: how it was evaluated, in words.
        sizes: its `params`, `flops`, `budget` and `depth`, as far as they are known.
        points: in order of guidance; each has `guidance`, the measures with their intervals, precision and recall.
        best: by measure.
    """

    run: str
    settings: str
    sizes: Mapping[str, float]
    points: tuple[Mapping[str, float], ...]
    best: Mapping[str, BestGuidance]

    def column(self, name: str) -> "tuple[list[float], list[float]]":
        """The guidances at which something was measured, and its values there."""
        known = [each for each in self.points if name in each]
        return [each["guidance"] for each in known], [each[name] for each in known]


def guidance_curves(table: RunsTable) -> tuple[GuidanceCurve, ...]:
    """Of every cell with three or more guidances under one setting."""
    targets = [target for target in table.targets if is_evaluation(target) and target in table.measured.columns]
    if not targets:
        return ()
    wanted = [*targets, *(f"{target}_{end}" for target in targets for end in ("low", "high")), *SHARES]
    names = ["guidance", *(name for name in wanted if name in table.measured.columns)]
    curves = []
    for settings, rows in at_several_guidances(table.measured, targets):
        points = tuple(_known(row, names) for _, row in rows.iterrows())
        best = {target: found for target in targets if (found := best_guidance(rows["guidance"], rows[target]))}
        if best:
            first = rows.iloc[0]
            run = str(first["run_id"] if "run_id" in rows.columns else first["row"])
            sizes = _known(first, [name for name in ("params", "flops", "budget", "depth") if name in rows.columns])
            curves.append(GuidanceCurve(run, settings, sizes, points, best))
    return tuple(curves)


def best_guidance(guidance: "pd.Series[float]", values: "pd.Series[float]") -> BestGuidance | None:
    """Where values are lowest; None where there are fewer than three."""
    known = values.notna().to_numpy()
    x, y = guidance.to_numpy(dtype=float)[known], values.to_numpy(dtype=float)[known]
    if len(x) < 3:
        return None
    place = int(y.argmin())
    lowest = float(x[place])
    bracketed, near = 0 < place < len(x) - 1, slice(max(place - 1, 0), place + 2)
    if not bracketed or y[place] <= 0:  # KID may be below 0, where it has no logarithm
        return BestGuidance(lowest, float(y[place]), lowest, bracketed)
    curvature, slope, constant = map(float, np.polyfit(x[near] - lowest, np.log(y[near]), 2))
    shift = -slope / (2 * curvature)
    value = float(np.exp(constant + shift * slope / 2))
    return BestGuidance(lowest + shift, value, lowest, bracketed=True)


def _known(row: "pd.Series[float]", names: list[str]) -> dict[str, float]:
    numbers = pd.to_numeric(row[names], errors="coerce").to_numpy(dtype=float)
    return {name: float(value) for name, value in zip(names, numbers, strict=True) if np.isfinite(value)}
