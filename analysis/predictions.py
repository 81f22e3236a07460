"""What fitted laws say at points: those that were asked for, and ten times the largest compute."""

import re

import numpy as np
import pandas as pd

from analysis.checks.requests import parse_point
from analysis.checks.warnings import LawWarning
from analysis.fitting.intervals import predict
from analysis.grids.flops_per_token import FlopsPerToken
from analysis.grids.parametric import from_law
from analysis.options import FitOptions
from analysis.results import FitEntry, PredictionAt
from analysis.tables.annealing import RATE_SCHEDULE

_SHARE = re.compile(r"acc|score|percent|pct|%|mmlu|exact_match|pass@", re.IGNORECASE)
"""Names of shares, which may be counted in hundredths."""
TEN_TIMES = 10.0
"""How far beyond the largest compute fitted the report looks."""


def predictions(entry: FitEntry, options: FitOptions) -> tuple[PredictionAt, ...]:
    """At the points asked for that name this law's inputs, and at ten times the largest compute fitted.

    A law of N and D is taken at a compute's best size and data.
    """
    points = [parse_point(text) for text in options.predict]
    if "flops" in entry.rows.columns and entry.x != "params":
        points.append({"flops": TEN_TIMES * float(entry.rows["flops"].max())})
    usable = []
    for point in points:
        if set(point) == set(entry.inputs):
            if not _is_beyond_end(entry, point):
                usable.append(point)
        elif set(point) == {"flops"} and entry.fitted.law.is_surface and "flops" in entry.rows.columns:
            factor = options.tokens_from_flops
            best = from_law(entry.fitted, entry.uncertainty, entry.rows, (point["flops"],), factor).best[0]
            tokens = FlopsPerToken(entry.rows, factor).tokens(point["flops"], np.array([best.params]))
            usable.append(point | {"params": best.params, "tokens": float(tokens[0])})
    if not usable:
        return ()
    inputs = tuple(np.array([point[name] for point in usable]) for name in entry.inputs)
    return tuple(
        PredictionAt(
            point,
            prediction,
            {name: _distance(entry.rows[name], point[name]) for name in point if name != RATE_SCHEDULE},
        )
        for point, prediction in zip(usable, predict(entry.fitted, entry.uncertainty, *inputs), strict=True)
    )


def doubtful_answers(options: FitOptions, fits: list[FitEntry], best_sizes: bool) -> list[LawWarning]:
    """What was asked for that no law fitted can say, and shares that would exceed 1."""
    found = []
    for text in options.predict:
        point = parse_point(text)
        if not any(point.items() <= each.at.items() for entry in fits for each in entry.predictions):
            shown = ",".join(f"{name}={value:g}" for name, value in point.items())
            why = f"no law was fitted against {' and '.join(point)}"
            if ended := [entry for entry in fits if set(point) == set(entry.inputs)]:
                place = ended[0].fitted.law.ends_at(ended[0].fitted.parameters)
                why = f"{ended[0].fitted.law.name} ends at {place:.4g}, where nothing is left that could be reduced"
            found.append(LawWarning("point-unused", f"--predict {shown}: {why}"))
    if options.allocate and not best_sizes:
        message = "best sizes take --params and --flops, and a law of N and D or four sizes that share budgets"
        found.append(LawWarning("point-unused", f"--budget {options.allocate[0]:g}: {message}"))
    if options.frontier and not any(entry.x == "flops" for entry in fits):
        message = f"--frontier {options.frontier} chooses runs for laws of compute, and none was fitted"
        found.append(LawWarning("point-unused", message))
    for entry in fits:
        highest = max((each.prediction.value for each in entry.predictions), default=0.0)
        top = float(entry.rows[entry.target].max())
        whole = 1.0 if top <= 1 else 100.0 if top <= 100 and _SHARE.search(entry.target) else np.inf
        if entry.fitted.law.name == "rising-power" and whole < highest:
            message = f"{entry.name}: reaches {highest:.3g}; if {entry.target} is a share, say --law power-logit"
            message += " of it divided by 100" if whole > 1 else ""
            found.append(LawWarning("beyond-one", message, entry.name))
    return found


def _is_beyond_end(entry: FitEntry, point: dict[str, float]) -> bool:
    """Whether a law ends before a point."""
    end = entry.fitted.law.ends_at(entry.fitted.parameters)
    return end is not None and point[entry.inputs[0]] <= end


def _distance(values: "pd.Series[float]", place: float) -> float:
    """How far beyond the data: over the largest value, or over the smallest if below it, 1 inside."""
    low, high = float(values.min()), float(values.max())
    return place / high if place > high else place / low if place < low else 1.0
