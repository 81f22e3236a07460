"""Tables that fooled the fits: each a small made one of a kind that researchers have, with the value that is right."""

import math
import random
import time

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import brentq

from analysis.errors import TableError
from analysis.fitting import profile_likelihood
from analysis.fitting.bootstrap import case, resample
from analysis.fitting.fit import fit
from analysis.fitting.intervals import from_draws
from analysis.fitting.newton import Objective
from analysis.grids.allocation import from_minima
from analysis.grids.bowls import METHODS
from analysis.grids.flops_per_token import FlopsPerToken
from analysis.grids.frontier import FRONTIERS, frontier_of_runs
from analysis.grids.isoflop import minima
from analysis.grids.parametric import best_sizes
from analysis.options import FitOptions
from analysis.pipeline import fit_laws
from analysis.progress import progress, steps

E, A, ALPHA, B, BETA = 1.7, 400.0, 0.34, 410.0, 0.28
EXPONENT = BETA / (ALPHA + BETA)
QUICK = {"bootstrap_draws": 200, "holdout": False}


def law(params, tokens):
    return E + A * params**-ALPHA + B * tokens**-BETA


def best_size(flops):
    return (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (flops / 6) ** EXPONENT


def bowls(seed, noise, factors, budgets, centre=best_size):
    rng = np.random.default_rng(seed)
    rows = []
    for budget in budgets:
        for params in centre(budget) * np.asarray(factors):
            tokens = budget / 6 / params
            loss = law(params, tokens) * np.exp(noise * rng.standard_normal())
            rows.append({"params": params, "flops": budget, "tokens": tokens, "loss": loss, "budget": budget})
    return pd.DataFrame(rows)


def optima(exponents, noise=0.01):
    """Best sizes and the like against compute: each column a power of it."""
    rng = np.random.default_rng(3)
    flops = np.array([1e16, 3e16, 1e17, 3e17, 1e18, 3e18])
    columns = {
        name: flops**power * np.exp(noise * rng.standard_normal(len(flops))) for name, power in exponents.items()
    }
    return pd.DataFrame({"flops": flops, **columns})


# Laws that rise


@pytest.mark.parametrize("x", [("flops",), ()])
def test_best_sizes_rise_with_a_positive_exponent(x):
    options = FitOptions(target=("params",), x=x, law=("power",), predict=("flops=1e19",), bootstrap_draws=200)
    result = fit_laws(optima({"params": 0.5}), options)
    (entry,) = result.fits
    assert (entry.fitted.law.name, entry.x, entry.is_shown) == ("rising-power", "flops", True)
    assert entry.fitted.parameters["alpha"] == pytest.approx(0.5, abs=0.01)
    low, high = entry.uncertainty.ci95["alpha"]
    assert 0.48 < low < 0.5 < high < 0.52
    assert entry.predictions[0].prediction.value == pytest.approx(1e19**0.5, rel=0.05)
    assert entry.holdout
    assert "not-monotone" not in {each.code for each in result.warnings}


def test_sizes_data_batches_and_rates_in_one_table():
    exponents = {"N opt": 0.54, "D opt": 0.37, "batch": 0.7, "learning rate": -0.2}
    table = optima(exponents).rename(columns={"flops": "C"})
    options = FitOptions(flops="C", params="N opt", tokens="D opt", target=tuple(exponents), x=("flops",), **QUICK)
    result = fit_laws(table, options)
    found = {entry.target: entry for entry in result.fits if entry.fitted.law.name in ("power", "rising-power")}
    for name, exponent in exponents.items():
        entry = found[name]
        assert entry.fitted.law.name == ("rising-power" if exponent > 0 else "power")
        assert entry.fitted.parameters["alpha"] == pytest.approx(abs(exponent), abs=0.01)
    assert not result.grids
    assert not result.allocations


def test_a_target_is_never_fitted_to_itself():
    for options in ({"x": ("params",)}, {"params": "params", "x": ("params",)}):
        with pytest.raises(TableError, match="no law can be fitted to what it is fitted against"):
            fit_laws(optima({"params": 0.5}), FitOptions(target=("params",), **options))


# Frontiers of scattered runs


def scattered_runs(most=0.3):
    """Every third run lies on 3·C^-.08, the others up to 30% above."""
    generator = random.Random(20)
    rows = []
    for place in range(30):
        compute = 10 ** (3 * place / 29)
        excess = 1 if place % 3 == 0 else 1 + most * generator.random()
        rows.append({"flops": 1e18 * compute, "error": round(3 * compute**-0.08 * excess, 4)})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("rule", FRONTIERS)
def test_frontiers_of_scattered_runs(rule):
    options = {"loss": "error", "law": ("power",), "objective": "lsq-log", **QUICK}
    table = scattered_runs()
    plain = fit_laws(table, FitOptions(frontier="all", **options))
    assert plain.fits[0].fitted.parameters["alpha"] == pytest.approx(0.0859, abs=1e-4)
    result = fit_laws(table, FitOptions(frontier=rule, **options))
    assert result.fits[0].fitted.parameters["alpha"] == pytest.approx(0.08, abs=2e-4)
    assert FRONTIERS[rule] in result.fits[0].filters[0]
    for each in (plain, result):
        assert not {each.code for each in each.warnings} & {"frontier-possible", "frontier-taken"}
    # An accuracy is best where it is highest.
    upper = frontier_of_runs(table.assign(accuracy=1 / table["error"]), "accuracy", rule, rises=True)
    np.testing.assert_array_equal(upper["flops"], frontier_of_runs(table, "error", rule)["flops"])


def test_a_hull_holds_every_run_and_an_unknown_rule_is_refused():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"flops": np.exp(rng.uniform(0, 5, 60))})
    table["loss"] = 2 * table["flops"] ** -0.1 * np.exp(rng.exponential(0.2, 60))
    hull = np.log(frontier_of_runs(table, "loss", "hull")[["flops", "loss"]].to_numpy())
    assert len(hull) < len(frontier_of_runs(table, "loss", "envelope"))
    inside = table[table["flops"].between(np.exp(hull[0, 0]), np.exp(hull[-1, 0]))]
    assert (np.log(inside["loss"]) >= np.interp(np.log(inside["flops"]), *hull.T) - 2e-3).all()
    with pytest.raises(TableError, match="unknown --frontier 'best'; the rules are envelope, hull, bins, all"):
        fit_laws(table, FitOptions(frontier="best"))


def test_clearly_scattered_runs_have_their_envelope_unasked():
    result = fit_laws(scattered_runs(), FitOptions(loss="error", law=("power",), objective="lsq-log", **QUICK))
    (entry,) = result.fits
    assert entry.fitted.parameters["alpha"] == pytest.approx(0.08, abs=2e-4)
    assert FRONTIERS["envelope"] in entry.filters[0]
    (said,) = (each.message for each in result.warnings if each.code == "frontier-taken")
    assert "lower envelope, 10 of 30 runs: 20 are beaten by runs of less compute, typically by 15%" in said
    assert "--frontier all" in said


@pytest.mark.parametrize(
    ("table", "possible"),
    [
        (scattered_runs(most=0.08), True),  # so near to the best that it may be noise
        (scattered_runs().assign(error=lambda frame: frame["error"].to_numpy()[::-1]), False),  # rises with compute
        (scattered_runs().rename(columns={"error": "learning rate"}), True),  # lower rates aren't better ones
    ],
)
def test_other_scattered_runs_are_all_fitted_unasked(table, possible):
    target = next(name for name in table.columns if name != "flops")
    result = fit_laws(table, FitOptions(target=(target,), law=("power",), **QUICK))
    assert len(result.fits[0].rows) == 30
    assert ("frontier-possible" in {each.code for each in result.warnings}) is possible


def test_runs_that_share_budgets_keep_the_frontier_of_their_budgets():
    table = bowls(0, 0.002, np.geomspace(0.1, 10, 7), np.geomspace(1e18, 1e21, 5))
    result = fit_laws(table, FitOptions(law=("power",), x=("flops",), **QUICK))
    assert result.fits[0].filters == ("frontier: best cell of each budget",)
    assert len(fit_laws(table, FitOptions(law=("power",), x=("flops",), frontier="all", **QUICK)).fits[0].rows) == 35


def test_one_noisy_curve_is_no_scatter_of_runs():
    flops = np.geomspace(1e18, 1e21, 12)
    loss = 3 * (flops / 1e18) ** -0.05 * np.exp(0.005 * np.random.default_rng(0).standard_normal(12))
    result = fit_laws(pd.DataFrame({"flops": flops, "loss": loss}), FitOptions(**QUICK))
    assert "frontier-possible" not in {each.code for each in result.warnings}


# Few runs with many checkpoints


def test_six_runs_have_the_intervals_of_their_draws():
    generator = random.Random(1)
    rows = [
        (params, step * 5e7, round(law(params, step * 5e7) * math.exp(generator.gauss(0, 0.01)), 4))
        for params in (53e6, 86e6, 130e6, 203e6, 310e6, 482e6)
        for step in range(1, 21)
    ]
    table = pd.DataFrame(rows, columns=["params", "tokens", "loss"])
    table["run"] = [f"m{params / 1e6:.0f}" for params in table["params"]]
    options = FitOptions(run_id="run", checkpoints=True, law=("chinchilla",), holdout=False)
    (entry,) = fit_laws(table, options).fits
    ci95, draws = entry.uncertainty.ci95, entry.uncertainty.draws
    drawn = dict(zip(entry.fitted.law.parameters, entry.fitted.problem.natural(draws.theta_SP).T, strict=True))
    for name, values in drawn.items():
        np.testing.assert_allclose(ci95[name], np.quantile(values, [0.025, 0.975]), rtol=1e-3)
    assert ci95["alpha"] == pytest.approx((0.20, 0.57), abs=0.02)
    assert ci95["E"] == pytest.approx((1.34, 2.32), abs=0.05)


def test_an_offset_is_never_above_the_lowest_value():
    rng = np.random.default_rng(0)
    for seed in range(5):
        x = np.geomspace(1, 100, 7)
        y = (1 + 2 * x**-0.1) * np.exp(0.01 * rng.standard_normal(7))
        fitted = fit("power-offset", (x,), y)
        low, high = from_draws(fitted, resample(fitted, 200, seed)).ci95["E"]
        assert 0 <= low <= fitted.parameters["E"] <= high <= max(y.min(), fitted.parameters["E"])


# Bowls


@pytest.mark.parametrize(
    ("noise", "factors"), [(0.0005, (0.13, 0.23, 0.41, 0.73, 1.3, 2.3, 4.1, 7.3, 13)), (0.002, (0.25, 0.5, 1, 2, 4))]
)
def test_exponents_of_bowls_are_as_uncertain_as_simulation_says(noise, factors):
    budgets = np.geomspace(1e18, 1e21, 7)
    for method in METHODS:
        found = []
        for seed in range(12):
            exact = from_minima(minima(bowls(seed, noise, factors, budgets), "loss", method, seed=seed), (1e22,))
            found.append((exact.params_exponent, *exact.params_ci95))
        values, low, high = np.array(found).T
        half = ((high - low) / 2).mean()
        assert 0.6 < half / (1.96 * values.std(ddof=1)) < 2.2, method
        assert ((low <= EXPONENT) & (high >= EXPONENT)).sum() >= 10, method
        if noise == 0.0005:
            assert half < {"parabola": 0.002, "cubic": 0.004, "akima": 0.022}[method]


def test_what_parabolas_miss_on_a_grid_is_simulated():
    """On an asymmetric surface, by a wide grid that drifts from the best sizes: against vertices and closed forms."""
    alpha, beta, a, b = 0.46, 0.16, 2500.0, 30.0
    budgets = np.geomspace(1e18, 1e21, 6)

    def best(budget):
        return (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (budget / 6) ** (beta / (alpha + beta))

    def table_of(factors, drift):
        table = bowls(0, 0.0, factors, budgets, lambda budget: best(budget) * (budget / 1e18) ** drift)
        loss = 1.7 + a * table["params"] ** -alpha + b * table["tokens"] ** -beta
        return table.assign(loss=loss * np.exp(1e-6 * np.random.default_rng(0).standard_normal(len(table))))

    table = table_of(np.geomspace(0.1, 12, 8), 0.12)
    options = FitOptions(budget="budget", tokens_from_flops=6, law=("chinchilla",), **QUICK)
    result = fit_laws(table, options)
    parabola = next(each for each in result.allocations["loss"] if each.approach == "isoflop-parabola")
    found = [np.exp(np.log(rows["params"]).mean()) * math.exp(_vertex(rows)) for _, rows in table.groupby("budget")]
    truth, right = best(budgets), beta / (alpha + beta)
    np.testing.assert_allclose(parabola.bias.sizes, found / truth - 1, atol=2e-3)
    exponent = np.polyfit(np.log(budgets), np.log(found), 1)[0]
    assert parabola.bias.exponent == pytest.approx(exponent - right, abs=5e-4)
    assert parabola.bias.worst_size > 0.1
    assert parabola.params_ci95[0] <= right + 5e-4
    assert parabola.params_ci95[1] >= right - 5e-4
    assert "parabola-bias" in {each.code for each in result.warnings}
    centred = fit_laws(table_of(np.geomspace(0.4, 2.5, 5), 0.0), options)
    assert "parabola-bias" not in {each.code for each in centred.warnings}


def _vertex(rows):
    logs = np.log(rows["params"])
    square, slope, _ = np.polyfit(logs - logs.mean(), rows["loss"], 2)
    return -slope / (2 * square)


# FLOPs a token that change with size


def falling_flops():
    rows = []
    for params, ratio in ((2e8, 10.0), (4e8, 9.2), (8e8, 8.4), (1.3e9, 7.9)):
        for tokens in params * np.array([20, 40, 100, 200]):
            loss = 0.93 + 12.5 * params**-0.104 + 33.5 * tokens**-0.162
            rows.append({"params": params, "tokens": tokens, "flops": ratio * params * tokens, "loss": loss})
    return pd.DataFrame(rows)


def test_best_sizes_beyond_the_grid_follow_a_smooth_law_of_flops_a_token():
    table = falling_flops()
    result = fit_laws(table, FitOptions(law=("chinchilla",), objective="lsq-log", **QUICK))
    (found,) = result.allocations["loss"]
    level, continued = 0.162 / (0.104 + 0.162), 0.162 / (0.104 + 0.162 * (1 - 0.125))
    assert level - 0.005 < found.params_exponent < continued + 0.01
    assert found.params_ci95[0] <= level + 1e-3
    assert found.params_ci95[1] >= continued - 2e-3
    budgets = np.geomspace(1e18, 1e23, 60)
    steps_up = np.diff(np.log(best_sizes(result.fits[0].fitted, table, budgets)[0])) / np.diff(np.log(budgets))
    assert np.ptp(steps_up) < 0.02


def test_flops_a_token_are_a_power_of_size_beyond_the_sizes_and_each_sizes_own_within():
    params = np.geomspace(1e7, 1e9, 6)
    rows = pd.DataFrame({"params": params, "tokens": 1e9}).assign(flops=7 * params**0.9 * 1e9)
    per_token = FlopsPerToken(rows)
    np.testing.assert_allclose(per_token(np.array([1e6, 1e8, 1e12])), 7 * np.array([1e6, 1e8, 1e12]) ** -0.1)
    np.testing.assert_allclose(FlopsPerToken(rows.head(1))(np.array([1e6, 1e12])), 7 * 1e7**-0.1)
    np.testing.assert_allclose(FlopsPerToken(rows, 6.0)(np.array([1e6, 1e12])), 6.0)


# Large tables


def test_a_curve_of_three_thousand_rows_takes_seconds():
    tokens = 1e6 * np.arange(1, 3001)
    loss = (0.2 + 320 * tokens**-0.35) * np.exp(0.02 * np.random.default_rng(18).standard_normal(3000))
    began = time.process_time()
    options = FitOptions(x=("tokens",), law=("power-offset", "broken-power"), holdout=False)
    result = fit_laws(pd.DataFrame({"tokens": tokens, "loss": loss}), options)
    assert time.process_time() - began < 5
    entry = result.find("power-offset")
    assert entry.uncertainty.method == "case bootstrap, one step"
    assert entry.fitted.parameters["alpha"] == pytest.approx(0.35, abs=0.01)
    refitted = case(fit("power-offset", (tokens,), loss), 40, seed=0).theta_SP.std(axis=0)
    np.testing.assert_allclose(entry.uncertainty.draws.theta_SP.std(axis=0), refitted, rtol=0.4)


def test_least_absolute_deviations_are_as_fast_as_huber():
    generator = random.Random(19)
    rows = [(10 ** generator.uniform(7.7, 10.2), 10 ** generator.uniform(8.7, 11.3)) for _ in range(230)]
    params, tokens = np.array(rows).T
    loss = law(params, tokens) * np.exp(0.005 * np.random.default_rng(19).standard_normal(230))
    taken, found = {}, {}
    for name in ("huber", "lad"):
        began = time.process_time()
        found[name] = fit("chinchilla", (params, tokens), loss, objective=Objective(name))
        resample(found[name], 150, seed=0)
        taken[name] = time.process_time() - began
    assert taken["lad"] < 2.5 * taken["huber"]
    parameters = found["lad"].parameters
    assert (parameters["E"], parameters["alpha"], parameters["beta"]) == pytest.approx((1.7, 0.34, 0.28), abs=0.03)


def test_what_takes_long_says_so_and_what_does_not_is_silent():
    said = []
    with progress(said.append, first=0.05, every=0.05):
        steps.info("fitting loss against flops")
        time.sleep(0.2)
    assert said
    assert said[0].startswith("fitting loss against flops (0 s so far)")
    with progress(said.clear):  # would fail, if it were called
        pass


# Rows that tell an offset only within limits


def test_the_region_of_a_profile_likelihood_is_where_pinned_fits_reach_its_level():
    """Against a search for the exponents at which the best law of that exponent is just not refused."""
    rng = np.random.default_rng(2)
    x = np.geomspace(1, 1e3, 14)
    y = (1.5 + 2 * x**-0.3) * np.exp(0.01 * rng.standard_normal(14))
    fitted = fit("power-offset", (x,), y, objective=Objective("lsq-log"))
    _, region = profile_likelihood.possible(fitted.problem, y, fitted.theta_P, 100, seed=0)
    low, high = region.of_parameter("alpha")

    def excess(alpha):
        power = x**-alpha
        offsets = np.linspace(0, y.min() * 0.999, 4000)
        coefficients = np.exp((np.log(y[:, None] - offsets) - np.log(power)[:, None]).mean(axis=0))
        least = np.inf
        for _ in range(30):  # Gauss-Newton in log A at every offset
            fitted_values = offsets + coefficients * power[:, None]
            share = coefficients * power[:, None] / fitted_values
            residuals = np.log(y)[:, None] - np.log(fitted_values)
            coefficients = coefficients * np.exp((share * residuals).sum(axis=0) / (share**2).sum(axis=0))
        least = (residuals**2).sum(axis=0).min()
        return least - fitted.value * (1 + 2.200985**2 / 11)  # Student's t of 11 degrees at 97.5%

    alpha = fitted.parameters["alpha"]
    assert low == pytest.approx(brentq(excess, 0.02, alpha, xtol=1e-5), abs=0.02 * (high - low))
    assert high == pytest.approx(brentq(excess, alpha, 1.5, xtol=1e-5), abs=0.02 * (high - low))
