"""Fits against published optima, closed forms and brute force."""

import numpy as np
import pandas as pd
import pytest
from requirements import shared_path
from scipy.optimize import minimize

from analysis.descent import Objective
from analysis.errors import FitRefused
from analysis.fitting import fit
from analysis.laws import LAWS, Problem


@pytest.fixture(scope="module")
def epoch():
    """Epoch AI's points without the five highest losses, with D = C / 6N."""
    table = pd.read_csv(shared_path("laws/epoch_chinchilla.csv")).sort_values("loss").iloc[:-5]
    params = table["Model Size"].to_numpy()
    return (params, table["Training FLOP"].to_numpy() / 6 / params), table["loss"].to_numpy()


@pytest.mark.parametrize(
    ("objective", "value", "expected"),
    [
        ("huber", 0.00101827402, {"A": 477.826, "B": 2143.42, "E": 1.81722, "alpha": 0.34731, "beta": 0.36717}),
        ("lad", 1.12949465, {"A": 482.006, "B": 2085.435, "E": 1.81686, "alpha": 0.34781, "beta": 0.36585}),
        ("lsq", 0.0832038, {"E": 1.88281, "alpha": 0.357615, "beta": 0.427621}),
    ],
)
def test_chinchilla_on_epochs_points_reaches_the_stated_optima(epoch, objective, value, expected):
    inputs, losses = epoch
    fitted = fit("chinchilla", inputs, losses, objective=Objective(objective))
    assert fitted.value <= value * (1 + 1e-6)
    for name, parameter in expected.items():
        assert fitted.parameters[name] == pytest.approx(parameter, rel=2e-5), name
    assert fitted.agreeing > fitted.starts / 2


def test_keeping_the_highest_losses_changes_beta():
    table = pd.read_csv(shared_path("laws/epoch_chinchilla.csv"))
    params = table["Model Size"].to_numpy()
    fitted = fit("chinchilla", (params, table["Training FLOP"].to_numpy() / 6 / params), table["loss"].to_numpy())
    assert fitted.parameters["beta"] == pytest.approx(0.453, abs=5e-4)


def test_law_of_the_smaller_runs_predicts_the_larger_ones(epoch):
    (params, tokens), losses = epoch
    small = 6 * params * tokens < 1e21
    assert small.sum() == 217
    fitted = fit("chinchilla", (params[small], tokens[small]), losses[small])
    errors = np.abs(fitted.predict(params[~small], tokens[~small]) / losses[~small] - 1)
    assert errors.mean() == pytest.approx(0.0105, abs=5e-5)
    assert errors.max() == pytest.approx(0.028, abs=5e-4)


def test_marin_with_the_offset_pinned():
    table = pd.read_csv(shared_path("laws/marin.csv"))
    fitted_rows = table[table["in_fit"] == 1]
    fitted = fit("power-offset", (fitted_rows["C"].to_numpy(),), fitted_rows["loss"].to_numpy(), offset=1.6)
    assert fitted.parameters["alpha"] == pytest.approx(0.0941, abs=5e-5)
    assert fitted.parameters["A"] == pytest.approx(95.2, abs=0.3)
    assert fitted.predict(np.array([1e21]))[0] == pytest.approx(2.606, abs=5e-4)


def test_evos_regressions_to_six_digits():
    minima = pd.read_csv(shared_path("laws/evo_isoflop_minima.csv"))
    published = pd.read_csv(shared_path("laws/evo_published_fits.csv")).set_index("model")
    for (variable, model), rows in minima.groupby(["variable", "model"]):
        exponent, coefficient = ("a", "a_0") if variable == "params" else ("b", "b_0")
        fitted = fit("power", (rows["flops"].to_numpy(),), rows["value"].to_numpy(), objective=Objective("lsq-log"))
        assert -fitted.parameters["alpha"] == pytest.approx(published.loc[model, exponent], rel=1e-6)
        assert fitted.parameters["A"] == pytest.approx(published.loc[model, coefficient], rel=1e-6)


TRUE = {
    "power": {"A": 30.0, "alpha": 0.08},
    "power-offset": {"E": 2.0, "A": 40.0, "alpha": 0.2},
    "power-floor": {"E": 1.5, "A": 4000.0, "alpha": 0.3},
    "power-logit": {"A": 300.0, "alpha": 0.15},
    "broken-power": {"A": 50.0, "B": 3e9, "alpha": 0.2, "beta": 0.05},
    "chinchilla": {"E": 1.8, "A": 400.0, "B": 2000.0, "alpha": 0.34, "beta": 0.37},
    "chinchilla-tied": {"E": 1.8, "A": 400.0, "B": 900.0, "alpha": 0.34},
}


def _truth(law, inputs):
    p = TRUE[law]
    if law == "broken-power":
        (x,) = inputs
        return p["A"] * x ** -p["alpha"] * (1 + x / p["B"]) ** (p["alpha"] - p["beta"])
    if law == "power-logit":
        odds = p["A"] * inputs[0] ** -p["alpha"]
        return odds / (1 + odds)
    total = p.get("E", 0.0) + p["A"] * inputs[0] ** -p["alpha"]
    return total + p["B"] * inputs[1] ** -p.get("beta", p["alpha"]) if "B" in p else total


def _inputs(law):
    if law.startswith("chinchilla"):
        params, tokens = np.meshgrid(np.geomspace(1e7, 1e10, 6), np.geomspace(1e9, 1e12, 6))
        return params.ravel(), tokens.ravel()
    return (np.geomspace(1e6, 1e13, 40),)


@pytest.mark.parametrize("law", list(TRUE))
@pytest.mark.parametrize("objective", ["huber", "lad", "lsq-log", "lsq"])
def test_exact_tables_give_their_parameters_back(law, objective):
    inputs = _inputs(law)
    fitted = fit(law, inputs, _truth(law, inputs), objective=Objective(objective))
    for name, value in TRUE[law].items():
        assert fitted.parameters[name] == pytest.approx(value, rel=2e-3), name


@pytest.mark.parametrize("law", list(TRUE))
def test_no_general_minimiser_finds_a_lower_objective(law):
    rng = np.random.default_rng(3)
    inputs = _inputs(law)
    values = _truth(law, inputs)
    values = np.where(values < 1, values * np.exp(0.01 * rng.standard_normal(values.shape)), values)
    values = values if law == "power-logit" else values * np.exp(0.02 * rng.standard_normal(values.shape))
    fitted = fit(law, inputs, values, objective=Objective("huber"))
    objective = fitted.objective

    def value(theta):
        u, _ = fitted.problem.evaluate(theta[None])
        target = np.log(values / (1 - values)) if law == "power-logit" else np.log(values)
        return float(objective.terms(target - u[0]).sum())

    for _ in range(5):
        start = fitted.theta_P + 0.05 * rng.standard_normal(len(fitted.theta_P))
        other = minimize(value, start, method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-10, "fatol": 1e-14})
        assert fitted.value <= other.fun * (1 + 1e-9)


@pytest.mark.parametrize("law", list(LAWS))
def test_derivatives_equal_differences(law):
    rng = np.random.default_rng(0)
    inputs = _inputs(law)
    problem = Problem.of(LAWS[law], inputs)
    theta = rng.normal(0.3, 0.2, (1, len(problem.free)))
    factors, outer = rng.standard_normal((2, 1, len(inputs[0])))
    _, shares = problem.evaluate(theta)
    step = 1e-5

    def gradient_at(point):
        return problem.gradient(point, problem.evaluate(point)[1], factors)

    for p in range(theta.shape[1]):
        shift = np.zeros_like(theta)
        shift[0, p] = step
        ahead, behind = (problem.evaluate(theta + sign * shift)[0] for sign in (1, -1))
        assert (factors * (ahead - behind)).sum() / (2 * step) == pytest.approx(
            problem.gradient(theta, shares, factors)[0, p], rel=1e-6, abs=1e-7
        )
        second = (gradient_at(theta + shift) - gradient_at(theta - shift)) / (2 * step)
        curvature = problem.curvature(theta, shares, np.zeros_like(factors), factors)
        np.testing.assert_allclose(curvature[0, p], second[0], rtol=1e-5, atol=1e-6)
    jacobian = problem.jacobian(theta, shares)[0]
    np.testing.assert_allclose(
        problem.curvature(theta, shares, outer, np.zeros_like(outer))[0], (jacobian.T * outer) @ jacobian, rtol=1e-9
    )


def test_too_few_rows_or_impossible_values_are_refused():
    x = np.array([1.0, 2.0, 3.0])
    with pytest.raises(FitRefused, match="more than 3 distinct rows, not 3"):
        fit("power-offset", (x,), np.array([3.0, 2.5, 2.2]))
    with pytest.raises(FitRefused, match="between 0 and 1"):
        fit("power-logit", (x,), np.array([0.5, 1.0, 0.2]))
    with pytest.raises(FitRefused, match="no offset to pin"):
        fit("power", (x,), np.array([3.0, 2.5, 2.2]), offset=1.0)
    with pytest.raises(FitRefused, match="not below the lowest value"):
        fit("power-offset", (x,), np.array([3.0, 2.5, 2.2]), offset=2.3)
    with pytest.raises(FitRefused, match="distinct"):
        fit("power", (np.ones(5),), np.arange(1.0, 6.0))
