"""Planted laws: 95% intervals hold the truth about 95 times in 100.

`make test` draws a few tables of each form and catches gross errors; `make test-coverage` (marker `coverage`) draws a
thousand of each and holds the stated bounds.
"""

import os
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest

from analysis.errors import FitRefused
from analysis.fitting.bootstrap import resample
from analysis.fitting.fit import fit
from analysis.fitting.intervals import from_draws, predict
from analysis.fitting.laws.registry import LAWS
from analysis.grids.allocation import from_minima
from analysis.grids.bowls import METHODS
from analysis.grids.isoflop import minima
from analysis.grids.parametric import from_law

SEED = 20260101
DRAWS = 400


def grid():
    """An IsoFLOP grid of 36 runs with C = 6ND, and the point of ten times the largest budget."""
    params, flops = np.meshgrid(np.geomspace(1e8, 1e10, 6), np.geomspace(1e19, 1e21, 6))
    return (params.ravel(), flops.ravel() / 6 / params.ravel()), (np.array([1.3e10]), np.array([1e22 / 6 / 1.3e10]))


def curve(rows, low, high):
    return (np.geomspace(low, high, rows),), (np.array([10 * high]),)


PLANTED = {
    "power": (curve(12, 1e18, 1e21), {"A": 3.0 * 1e18**0.05, "alpha": 0.05}, 0.01),
    "power-offset": (curve(16, 1e18, 1e22), {"E": 1.7, "A": 1.3 * 1e18**0.2, "alpha": 0.2}, 0.004),
    "power-floor": (curve(16, 1e18, 1e22), {"E": 1.8, "A": 20 * 1e18**0.3, "alpha": 0.3}, 0.02),
    "power-logit": (curve(14, 1e18, 1e21), {"A": 9.0 * 1e18**0.1, "alpha": 0.1}, 0.02),
    "broken-power": (curve(40, 1e16, 1e24), {"A": 3 * 1e20**0.2, "B": 1e20, "alpha": 0.2, "beta": 0.05}, 0.01),
    "chinchilla": (grid(), {"E": 1.8, "A": 480.0, "B": 2085.0, "alpha": 0.347, "beta": 0.366}, 0.005),
    "chinchilla-tied": (grid(), {"E": 1.8, "A": 480.0, "B": 1500.0, "alpha": 0.35}, 0.005),
}

UNIDENTIFIED = {
    "power-offset": (curve(10, 1e18, 1e21), {"E": 1.0, "A": 3 * 1e18**0.12, "alpha": 0.12}, 0.01),
    "power-floor": (curve(10, 1e18, 1e21), {"E": 2.0, "A": 30 * 1e18**0.3, "alpha": 0.3}, 0.03),
    "chinchilla": (grid(), {"E": 0.3, "A": 9.0, "B": 17.0, "alpha": 0.12, "beta": 0.15}, 0.01),
}
"""Offsets that so few rows, or so slow laws, hardly tell: many of these fits end at E = 0."""


def truth(law, inputs, planted):
    p = planted[law][1]
    x = inputs[0]
    if law == "broken-power":
        return p["A"] * x ** -p["alpha"] * (1 + x / p["B"]) ** (p["alpha"] - p["beta"])
    if law == "power-logit":
        odds = p["A"] * x ** -p["alpha"]
        return odds / (1 + odds)
    total = p.get("E", 0.0) + p["A"] * x ** -p["alpha"]
    return total + p["B"] * inputs[1] ** -p.get("beta", p["alpha"]) if "B" in p else total


def held(law, tables, draws, planted=PLANTED):
    """Share of tables whose intervals hold the truth, by parameter and for the prediction."""
    (inputs, far), parameters, noise = planted[law]
    rng = np.random.default_rng([SEED, sorted(LAWS).index(law)])
    values, beyond = truth(law, inputs, planted), float(truth(law, far, planted)[0])
    names = [name for name in parameters if name in ("alpha", "beta", "E")]
    hits = dict.fromkeys((*names, "prediction"), 0)
    for table in range(tables):
        errors = noise * rng.standard_normal(len(values))
        odds = 1 / (1 + (1 / values - 1) * np.exp(-errors))
        drawn = odds if law == "power-logit" else values * np.exp(errors)
        fitted = fit(law, inputs, drawn, few_starts=True)
        uncertainty = from_draws(fitted, resample(fitted, draws, seed=table))
        for name in names:
            low, high = uncertainty.ci95[name]
            hits[name] += low <= parameters[name] <= high
        low, high = predict(fitted, uncertainty, *far)[0].curve_ci95
        hits["prediction"] += low <= beyond <= high
    return {name: count / tables for name, count in hits.items()}


@pytest.mark.parametrize("law", ["power", "power-offset", "chinchilla"])
def test_intervals_of_a_few_planted_tables_hold_the_truth(law):
    # 40 tables at 95% hold at least 33 with a probability of 99.9%.
    assert min(held(law, tables=40, draws=150).values()) >= 33 / 40


@pytest.mark.coverage
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("law", list(PLANTED))
def test_intervals_of_a_thousand_planted_tables_hold_the_truth(law):
    shares = held(law, tables=1000, draws=DRAWS)
    print(f"{law}: {shares}")
    assert all(0.93 <= share <= 0.97 for share in shares.values()), shares


@pytest.mark.coverage
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("law", UNIDENTIFIED)
def test_intervals_where_rows_hardly_tell_the_offset(law):
    shares = held(law, tables=1000, draws=400, planted=UNIDENTIFIED)
    print(law, shares)
    assert min(shares.values()) >= 0.9


# Laws and designs drawn at random

TABLES = int(os.environ.get("COVERAGE_TABLES", "300"))
FIRST = int(os.environ.get("COVERAGE_FIRST", "0"))
"""A study in parts: COVERAGE_FIRST=0 COVERAGE_TABLES=100, then 100 and 100, and so on."""
WIDEST = 1.3


@dataclass
class Found:
    """Estimates, intervals and truths of one quantity over tables."""

    estimates: list = field(default_factory=list)
    intervals: list = field(default_factory=list)
    truths: list = field(default_factory=list)

    def add(self, estimate, interval, truth):
        self.estimates.append(estimate)
        self.intervals.append(interval)
        self.truths.append(truth)

    @property
    def hits(self):
        low, high = np.array(self.intervals).T
        return float(((low <= self.truths) & (np.array(self.truths) <= high)).mean())

    @property
    def width(self):
        """Mean width over that of 95% of the estimates' own spread around the truth."""
        spread = 2 * 1.96 * np.sqrt(np.mean(np.square(np.array(self.estimates) - self.truths)))
        return float(np.diff(self.intervals, axis=1).mean() / spread)

    @property
    def median_width(self):
        """Median width over that of 95% of the estimates' own deviations."""
        spread = 2 * 1.96 * np.std(self.estimates, ddof=1)
        return float(np.median(np.diff(self.intervals, axis=1)) / spread)


def random_surface(rng, draws, table, found):
    """Four to seven budgets of four to seven sizes around the best ones, off them by up to a factor of two."""
    alpha, beta = rng.uniform(0.25, 0.4, 2)
    offset, budgets = rng.uniform(1.0, 2.5), np.geomspace(1e18, 10 ** rng.uniform(20, 21.5), rng.integers(4, 8))
    middle = 3e8, budgets.mean() / 6 / 3e8
    scale = {"A": rng.uniform(0.25, 0.6) * middle[0] ** alpha, "B": rng.uniform(0.25, 0.6) * middle[1] ** beta}
    flops = np.repeat(budgets, sizes := rng.integers(4, 8))
    share = (alpha * scale["A"] / (beta * scale["B"])) ** (1 / (alpha + beta))
    around = np.geomspace(0.25, 4, sizes) * 2 ** rng.uniform(-1, 1)
    params = share * (flops / 6) ** (beta / (alpha + beta)) * np.tile(around, len(budgets))
    ten = 10 * budgets[-1] / 6
    far_params = share * ten ** (beta / (alpha + beta))
    parameters = {"E": offset, "alpha": alpha, "beta": beta, **scale}

    def value(params, tokens):
        return offset + scale["A"] * params**-alpha + scale["B"] * tokens**-beta

    inputs, far = (params, flops / 6 / params), (np.array([far_params]), np.array([ten / far_params]))
    fitted, uncertainty = _fitted("chinchilla", inputs, value, far, parameters, (rng, draws, table), found)
    rows = pd.DataFrame({"params": params, "tokens": inputs[1], "flops": flops})
    (best,) = from_law(fitted, uncertainty, rows, (10 * budgets[-1],), declared=6.0).best
    found["best size"].add(np.log(best.params), np.log(best.params_ci95), np.log(far_params))


def random_curve(rng, draws, table, found):
    """Ten to thirty runs over two to four decades of compute."""
    alpha, offset = rng.uniform(0.15, 0.35), rng.uniform(1.0, 2.5)
    x = 1e18 * np.geomspace(1, 10 ** rng.uniform(2, 4), rng.integers(10, 31))
    scale = rng.uniform(0.6, 1.5) * 1e18**alpha
    parameters = {"E": offset, "alpha": alpha}
    _fitted("power-offset", (x,), lambda x: offset + scale * x**-alpha, (10 * x[-1:],), parameters,
            (rng, draws, table), found)  # fmt: skip


def _fitted(law, inputs, value, far, parameters, chance, found):
    rng, draws, table = chance
    exact = value(*inputs)
    noise = rng.uniform(0.002, 0.008)
    fitted = fit(law, inputs, exact * np.exp(noise * rng.standard_normal(len(exact))), few_starts=True)
    uncertainty = from_draws(fitted, resample(fitted, draws, seed=table))
    for name in (each for each in ("E", "alpha", "beta") if each in parameters):
        found[name].add(fitted.parameters[name], uncertainty.ci95[name], parameters[name])
    prediction = predict(fitted, uncertainty, *far)[0]
    found["prediction"].add(prediction.value, prediction.curve_ci95, float(value(*far)[0]))
    return fitted, uncertainty


def random_bowls(rng, draws, table, found):
    """Four to nine budgets of six to ten sizes: the exponent that each method finds without noise is to be held."""
    alpha, beta = rng.uniform(0.25, 0.4, 2)
    budgets = np.geomspace(1e18, 10 ** rng.uniform(19.5, 22), rng.integers(4, 10))
    scale = {"A": 0.4 * 3e8**alpha, "B": 0.4 * (budgets.mean() / 1.8e9) ** beta}
    share = (alpha * scale["A"] / (beta * scale["B"])) ** (1 / (alpha + beta))
    reach = rng.uniform(3, 12)
    around = np.geomspace(1 / reach, reach, rng.integers(6, 11)) * 1.3 ** rng.uniform(-1, 1)
    rows = pd.DataFrame({"budget": np.repeat(budgets, len(around))})
    rows["params"] = share * (rows["budget"] / 6) ** (beta / (alpha + beta)) * np.tile(around, len(budgets))
    tokens = rows["budget"] / 6 / rows["params"]
    exact = rows.assign(loss=1.8 + scale["A"] * rows["params"] ** -alpha + scale["B"] * tokens**-beta)
    noise = rng.uniform(0.0003, 0.003)
    drawn = exact.assign(loss=exact["loss"] * np.exp(noise * rng.standard_normal(len(rows))))
    for method in METHODS:
        try:
            truth = from_minima(minima(exact, "loss", method), ()).params_exponent
            result = from_minima(minima(drawn, "loss", method, seed=table), ())
        except FitRefused:  # too few budgets whose best size is no end of the grid
            continue
        if result.n_points == len(budgets):
            found[method].add(result.params_exponent, result.params_ci95, truth)


def random_runs(rng, draws, table, found):
    """Five to twelve runs of twenty checkpoints, with an error of each run's own beside each row's."""
    alpha, beta = rng.uniform(0.25, 0.4, 2)
    sizes = np.geomspace(5e7, 10 ** rng.uniform(8.7, 9.5), rng.integers(5, 13))
    params, tokens = np.repeat(sizes, 20), np.tile(np.geomspace(2e9, 1e11, 20), len(sizes))
    scale = {"A": 0.4 * 3e8**alpha, "B": 0.4 * 2e10**beta}
    exact = 1.8 + scale["A"] * params**-alpha + scale["B"] * tokens**-beta
    errors = 0.003 * rng.standard_normal(len(exact)) + np.repeat(0.002 * rng.standard_normal(len(sizes)), 20)
    fitted = fit("chinchilla", (params, tokens), exact * np.exp(errors), few_starts=True)
    uncertainty = from_draws(fitted, resample(fitted, draws, table, np.repeat(np.arange(len(sizes)), 20)))
    for name, truth in (("E", 1.8), ("alpha", alpha), ("beta", beta)):
        found[name].add(fitted.parameters[name], uncertainty.ci95[name], truth)


def study(draw, first, tables, draws=DRAWS):
    found = defaultdict(Found)
    for table in range(first, first + tables):
        draw(np.random.default_rng([SEED, table]), draws, table, found)
    for name, each in found.items():
        print(f"{draw.__name__}, {name}: {each.hits:.3f} of {len(each.truths)}, width {each.width:.2f}")
    return found


@pytest.mark.coverage
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("draw", "least"), [(random_surface, 0.93), (random_curve, 0.90), (random_bowls, 0.93)])
def test_intervals_of_laws_and_designs_drawn_at_random(draw, least):
    """Hits of 93 to 97 in 100 and widths within 1.3 of the estimates' spread, wider for parts of 300 tables.

    Bowls are twice as many, since the first 300 are lucky ones for parabolas: of them even the noise alone, without
    what a parabola misses of a bowl's shape, holds the exponent in 97.3 of 100.
    The 300 curves are unlucky ones: the likelihood ratio itself holds E in 91.7 of 100 of them, and
    in 93.8 of 100 of the 600 tables that follow.
    """
    for name, each in study(draw, FIRST, TABLES * (1 + (draw is random_bowls))).items():
        slack = max(1.0, np.sqrt(300 / len(each.truths)))
        assert 0.95 - (0.95 - least) * slack <= each.hits <= 0.95 + 0.02 * slack, name
        assert each.width <= WIDEST + 0.15 * (slack - 1), name


@pytest.mark.coverage
@pytest.mark.timeout(3600)
def test_intervals_of_few_runs_are_those_of_their_draws():
    """The draws of so few runs are all that is known: they hold a little less than they say where runs are alike."""
    for name, each in study(random_runs, FIRST, TABLES, draws=200).items():
        assert each.hits >= 0.9, name
        assert each.width <= 1.5, name


ERRORS = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "heavy tails": lambda rng, size: rng.standard_t(3, size) / np.sqrt(3),
    "growing": lambda rng, size: rng.standard_normal(size) * np.geomspace(0.4, 2, size),
}


@pytest.mark.coverage
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("errors", ERRORS)
def test_surfaces_of_a_hundred_and_twenty_rows(errors):
    """Twelve sizes at ten budgets, errors that grow with compute: what draws are chosen holds the truth."""
    flops, params = (
        each.ravel() for each in np.meshgrid(np.geomspace(1e18, 1e20, 10), np.geomspace(1e7, 1e9, 12), indexing="ij")
    )
    inputs, far = (params, flops / 6 / params), (np.array([5e9]), np.array([1e21 / 6 / 5e9]))
    parameters = {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.34, "beta": 0.28}
    planted = {"chinchilla": ((inputs, far), parameters, 0.0)}
    exact, beyond = truth("chinchilla", inputs, planted), float(truth("chinchilla", far, planted)[0])
    found = defaultdict(Found)
    for table in range(TABLES):
        drawn = exact * np.exp(0.004 * ERRORS[errors](np.random.default_rng(table), len(exact)))
        fitted = fit("chinchilla", inputs, drawn, few_starts=True)
        uncertainty = from_draws(fitted, resample(fitted, 300, seed=table))
        for name in ("E", "alpha", "beta"):
            found[name].add(fitted.parameters[name], uncertainty.ci95[name], parameters[name])
        prediction = predict(fitted, uncertainty, *far)[0]
        found["prediction"].add(prediction.value, prediction.curve_ci95, beyond)
    for name, each in found.items():
        print(f"120 rows, {errors} errors, {name}: {each.hits:.3f}, width {each.width:.2f}")
        assert 0.92 <= each.hits <= 0.98, name
        assert each.width <= WIDEST, name


def sigmoid(x, low, high, steepness, middle):
    return low + high / (1 + np.exp(-steepness * (x - middle)))


def shifted_power(x, offset, scale, place, exponent):
    return offset + scale * (x - place).clip(0) ** exponent


OF_LOSSES = {
    "loss-to-loss, .2%": ("loss-to-loss", shifted_power, (1.5, 0.9, 1.8, 1.1), (2.2, 4.0), 0.002),
    "loss-to-loss, .3%": ("loss-to-loss", shifted_power, (0.5, 1.2, 1.5, 0.6), (1.8, 5.0), 0.003),
    "loss-to-loss, 1%": ("loss-to-loss", shifted_power, (1.2, 1.1, 1.4, 1.0), (2.0, 3.2), 0.01),
    "sigmoid, a fifth of its bend, 1.5%": ("loss-to-error-sigmoid", sigmoid, (0.05, 0.7, 6, 0.75), (0.55, 0.7), 0.015),
    "sigmoid, 1%": ("loss-to-error-sigmoid", sigmoid, (0.05, 0.7, 6, 0.75), (0.5, 1.1), 0.01),
    "sigmoid, .5%": ("loss-to-error-sigmoid", sigmoid, (0.1, 0.65, 2.0, 3.4), (2.8, 4.6), 0.005),
}


@pytest.mark.coverage
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("design", OF_LOSSES)
def test_predictions_of_twenty_losses(design):
    """Inside the rows, and by a twentieth beyond either end; medians of widths, since some tables tell no end."""
    law, function, parameters, (low, high), noise = OF_LOSSES[design]
    at, found = np.array([0.95 * low, (low + high) / 2, 1.05 * high]), defaultdict(Found)
    for table in range(100):
        rng = np.random.default_rng(table)
        x = rng.uniform(low, high, 20)
        y = function(x, *parameters) * np.exp(noise * rng.standard_normal(20))
        fitted = fit(law, (x,), y, few_starts=True)
        predictions = predict(fitted, from_draws(fitted, resample(fitted, 100, 0)), at)
        for name, each, truth in zip(("below", "inside", "above"), predictions, function(at, *parameters), strict=True):
            found[name].add(each.value, each.curve_ci95, truth)
    for name, each in found.items():
        print(f"{design}, {name}: {each.hits:.2f}, median width {each.median_width:.2f}")
        assert each.hits >= 0.9, name
        assert each.median_width <= (WIDEST if name == "inside" else 1.5), name


@pytest.mark.coverage
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("interaction", [0.0, 50.0])
def test_a_hundred_tables_of_sparse_mixtures(interaction):
    """E, which the interaction may stand for, and predictions inside the rows and at three times the largest run."""
    sizes, data, shares = np.geomspace(2e8, 6e9, 4), np.geomspace(2e9, 6e10, 4), (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
    inputs = tuple(each.ravel() for each in np.meshgrid(sizes, shares, data, indexing="ij"))

    def law(n, x, d):
        main = 1.5 + 400 * n**-0.34 + 410 * d**-0.28 + 0.3 * x**0.17
        return main + interaction * x**-0.1 * n**-0.3

    at, found = (np.array([2e9, 2e10]), np.array([0.1, 0.1]), np.array([2e10, 2e11])), defaultdict(Found)
    for table in range(100):
        errors = np.random.default_rng(table).standard_normal(len(inputs[0]))
        fitted = fit("sparse-mixture", inputs, law(*inputs) * np.exp(0.002 * errors), few_starts=True)
        uncertainty = from_draws(fitted, resample(fitted, 100, 0))
        found["E"].add(fitted.parameters["E"], uncertainty.ci95["E"], 1.5)
        for name, each, truth in zip(("inside", "beyond"), predict(fitted, uncertainty, *at), law(*at), strict=True):
            found[name].add(each.value, each.curve_ci95, truth)
    for name, each in found.items():
        print(f"sparse mixtures, F = {interaction:g}, {name}: {each.hits:.2f}, median width {each.median_width:.2f}")
        assert each.hits >= 0.92, name
    assert max(found[name].median_width for name in ("inside", "beyond")) <= WIDEST


def test_a_few_bowls_and_a_surface_drawn_at_random_are_held():
    bowls, surfaces = study(random_bowls, 0, 12), study(random_surface, 0, 4, draws=150)
    assert min(bowls[method].hits for method in METHODS) >= 9 / 12
    assert min(each.hits for each in surfaces.values()) >= 0.5
