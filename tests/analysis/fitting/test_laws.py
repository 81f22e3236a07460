"""The contract of a law, over all that are registered.

A new law is tested here without a word; only its formula must be written down a second time, in FORMULAS, for the
comparison with brute force, together with parameters and a table that can tell them.
"""

import numpy as np
import pytest
from scipy.optimize import minimize

from analysis.fitting.fit import fit
from analysis.fitting.laws.base import Law, Problem, is_exponent
from analysis.fitting.laws.broken_power import BrokenPower
from analysis.fitting.laws.data_constrained import DataConstrained
from analysis.fitting.laws.of_losses import OfLoss
from analysis.fitting.laws.power_sums import PowerSum
from analysis.fitting.laws.registry import LAWS
from analysis.fitting.newton import Objective

FORMULAS = {
    "power": lambda p, x: p["A"] * x ** -p["alpha"],
    "rising-power": lambda p, x: p["A"] * x ** p["alpha"],
    "power-offset": lambda p, x: p["E"] + p["A"] * x ** -p["alpha"],
    "power-floor": lambda p, x: p["E"] + p["A"] * x ** -p["alpha"],
    "power-logit": lambda p, x: p["A"] * x ** -p["alpha"] / (1 + p["A"] * x ** -p["alpha"]),
    "broken-power": lambda p, x: p["A"] * x ** -p["alpha"] * (1 + x / p["B"]) ** (p["alpha"] - p["beta"]),
    "chinchilla": lambda p, n, d: p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["beta"],
    "chinchilla-tied": lambda p, n, d: p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["alpha"],
    "data-constrained": lambda p, n, d, epochs: (
        p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * repeated(p["R"], d / epochs, epochs - 1) ** -p["beta"]
    ),
    "loss-to-error": lambda p, x: p["A"] * (1 - np.exp(-p["k"] * (x - p["x0"]))),
    "loss-to-error-sigmoid": lambda p, x: p["E"] + p["A"] / (1 + np.exp(-p["k"] * (x - p["x0"]))),
    "loss-to-loss": lambda p, x: p["E"] + p["A"] * (x - p["x0"]) ** p["alpha"],
}
TRUE = {
    "power": {"A": 30.0, "alpha": 0.08},
    "rising-power": {"A": 0.1, "alpha": 0.5},
    "power-offset": {"E": 2.0, "A": 40.0, "alpha": 0.2},
    "power-floor": {"E": 1.5, "A": 4000.0, "alpha": 0.3},
    "power-logit": {"A": 300.0, "alpha": 0.15},
    "broken-power": {"A": 50.0, "B": 3e9, "alpha": 0.2, "beta": 0.05},
    "chinchilla": {"E": 1.8, "A": 400.0, "B": 2000.0, "alpha": 0.34, "beta": 0.37},
    "chinchilla-tied": {"E": 1.8, "A": 400.0, "B": 900.0, "alpha": 0.34},
    "data-constrained": {"E": 1.8, "A": 400.0, "B": 2000.0, "R": 15.4, "alpha": 0.34, "beta": 0.37},
    "loss-to-error": {"A": 0.86, "x0": 1.3, "k": 0.7},
    "loss-to-error-sigmoid": {"E": 0.1, "A": 0.65, "x0": 3.4, "k": 2.0},
    "loss-to-loss": {"E": 0.5, "A": 2.0, "x0": 1.5, "alpha": 0.6},
}
THREE_INPUTS = {"data-constrained": ("params", "tokens", "epochs")}
every_law = pytest.mark.parametrize("law", list(LAWS))


def repeated(repetitions, unique, further):
    """What unique tokens are worth that are seen so many further times (Muennighoff et al. 2023, equation 5)."""
    return unique + unique * repetitions * (1 - np.exp(-further / repetitions))


def inputs_of(law):
    if law.startswith("loss-to-"):
        return (np.linspace(1.7, 6.0, 40),)
    if law in THREE_INPUTS:
        params, tokens, epochs = np.meshgrid(np.geomspace(1e7, 1e10, 4), np.geomspace(1e9, 1e12, 4), [1.0, 5.0, 40.0])
        return params.ravel(), tokens.ravel(), epochs.ravel()
    if LAWS[law].is_curve:
        return (np.geomspace(1e6, 1e13, 40),)
    params, tokens = np.meshgrid(np.geomspace(1e7, 1e10, 6), np.geomspace(1e9, 1e12, 6))
    return params.ravel(), tokens.ravel()


def truth(law, inputs):
    return FORMULAS[law](TRUE[law], *inputs)


def random_theta(rng, problem, count):
    """Parameters around 0.3, but the loss at which nothing is left well below all losses."""
    theta_SP = rng.normal(0.3, 0.2, (count, len(problem.free)))
    if "x0" in problem.free:
        theta_SP[:, problem.free.index("x0")] -= 2.0
    return theta_SP


def noisy(law, values, seed=3, size=0.02):
    errors = size * np.random.default_rng(seed).standard_normal(values.shape)
    return 1 / (1 + (1 / values - 1) * np.exp(-errors)) if LAWS[law].link == "logit" else values * np.exp(errors)


def test_ids_and_parameters_of_laws_json_stay():
    assert {name: law.parameters for name, law in LAWS.items()} == {
        "power": ("A", "alpha"),
        "rising-power": ("A", "alpha"),
        "power-offset": ("E", "A", "alpha"),
        "chinchilla": ("E", "A", "B", "alpha", "beta"),
        "chinchilla-tied": ("E", "A", "B", "alpha"),
        "broken-power": ("A", "B", "alpha", "beta"),
        "power-logit": ("A", "alpha"),
        "power-floor": ("E", "A", "alpha"),
        "data-constrained": ("E", "A", "B", "R", "alpha", "beta"),
        "loss-to-error": ("A", "x0", "k"),
        "loss-to-error-sigmoid": ("E", "A", "x0", "k"),
        "loss-to-loss": ("E", "A", "x0", "alpha"),
    }


@every_law
def test_a_law_is_registered_by_its_name_and_describes_itself(law):
    found = LAWS[law]
    assert isinstance(found, Law)
    assert found.name == law
    assert found.formula
    assert set(found.parameters) <= {"E", "A", "B", "R", "x0", "k", "alpha", "beta"}
    assert {"alpha", "k"} & set(found.parameters)
    assert found.has_offset == ("E" in found.parameters)
    assert found.columns("flops") == (("flops",) if found.is_curve else THREE_INPUTS.get(law, ("params", "tokens")))
    shown = dict.fromkeys(found.parameters, "1") | {"power": "C^-0.1"}
    assert "{" not in found.legend.format(**shown)


@every_law
def test_values_are_those_of_the_formula_at_random_parameters(law):
    rng, inputs = np.random.default_rng(5), inputs_of(law)
    problem = Problem.of(LAWS[law], inputs)
    theta_SP = random_theta(rng, problem, 8)
    predicted_Sn = LAWS[law].respond(problem.evaluate(theta_SP)[0])
    for natural, predicted in zip(problem.natural(theta_SP), predicted_Sn, strict=True):
        parameters = dict(zip(LAWS[law].parameters, natural, strict=True))
        np.testing.assert_allclose(predicted, FORMULAS[law](parameters, *inputs), rtol=1e-9)


@every_law
def test_a_pinned_offset_is_the_formula_with_that_offset(law):
    inputs = inputs_of(law)
    if not LAWS[law].has_offset:
        with pytest.raises(ValueError, match="no offset to pin"):
            Problem.of(LAWS[law], inputs, 1.7)
        return
    problem = Problem.of(LAWS[law], inputs, 1.7)
    theta_1P = random_theta(np.random.default_rng(2), problem, 1)
    natural = dict(zip(LAWS[law].parameters, problem.natural(theta_1P)[0], strict=True))
    assert natural["E"] == pytest.approx(1.7)
    predicted = LAWS[law].respond(problem.evaluate(theta_1P)[0][0])
    np.testing.assert_allclose(predicted, FORMULAS[law](natural, *inputs), rtol=1e-9)


@every_law
def test_derivatives_equal_differences(law):
    rng = np.random.default_rng(0)
    inputs = inputs_of(law)
    problem = Problem.of(LAWS[law], inputs)
    theta = random_theta(rng, problem, 1)
    factors, outer = rng.standard_normal((2, 1, len(inputs[0])))
    _, shares = problem.evaluate(theta)
    step = 1e-5

    def gradient_at(point):
        return problem.gradient(point, problem.evaluate(point)[1], factors)

    jacobian = problem.jacobian(theta, shares)[0]
    for p in range(theta.shape[1]):
        shift = np.zeros_like(theta)
        shift[0, p] = step
        ahead, behind = (problem.evaluate(theta + sign * shift)[0] for sign in (1, -1))
        np.testing.assert_allclose(jacobian[:, p], (ahead - behind)[0] / (2 * step), rtol=1e-6, atol=1e-8)
        assert (factors * (ahead - behind)).sum() / (2 * step) == pytest.approx(
            problem.gradient(theta, shares, factors)[0, p], rel=1e-6, abs=1e-7
        )
        second = (gradient_at(theta + shift) - gradient_at(theta - shift)) / (2 * step)
        curvature = problem.curvature(theta, shares, np.zeros_like(factors), factors)
        np.testing.assert_allclose(curvature[0, p], second[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        problem.curvature(theta, shares, outer, np.zeros_like(outer))[0], (jacobian.T * outer) @ jacobian, rtol=1e-9
    )


@pytest.mark.parametrize("link", ["log", "logit"])
def test_links_and_their_derivatives(link):
    law = next(law for law in LAWS.values() if law.link == link)
    u = np.linspace(-3, 2, 9)
    np.testing.assert_allclose(law.linked(law.respond(u)), u, atol=1e-12)
    step = 1e-4
    ahead, here, behind = (law.respond(u + shift) for shift in (step, 0.0, -step))
    first, second = law.response_derivatives(u)
    np.testing.assert_allclose(first, (ahead - behind) / (2 * step), rtol=1e-6)
    np.testing.assert_allclose(second, (ahead - 2 * here + behind) / step**2, rtol=1e-4, atol=1e-6)


@every_law
@pytest.mark.parametrize("few", [False, True])
def test_starts_are_sensible_and_agree(law, few):
    inputs = inputs_of(law)
    values = noisy(law, truth(law, inputs), size=0.002)
    problem = Problem.of(LAWS[law], inputs)
    starts = LAWS[law].starts(problem, values, np.ones_like(values), False, few)
    lower, upper = problem.bounds(values)
    assert starts.shape[1] == len(problem.free)
    assert np.isfinite(starts).all()
    assert ((starts >= lower) & (starts <= upper)).all(axis=1).mean() > 0.9  # the minimiser moves the rest to its edge
    fitted = fit(law, inputs, values, few_starts=few)
    assert fitted.starts == len(starts)
    assert 2 * fitted.agreeing >= fitted.starts


@every_law
@pytest.mark.parametrize("objective", ["huber", "lad", "lsq-log", "lsq"])
def test_exact_tables_give_their_parameters_back(law, objective):
    inputs = inputs_of(law)
    fitted = fit(law, inputs, truth(law, inputs), objective=Objective(objective))
    for name, value in TRUE[law].items():
        assert fitted.parameters[name] == pytest.approx(value, rel=2e-3), name
    assert fitted.at_bound == ()


@every_law
def test_parameters_follow_the_units_of_the_inputs(law):
    """Exponents stay; the fitted values stay: what turns coefficients over is the law's own shift."""
    inputs = inputs_of(law)
    values = noisy(law, truth(law, inputs), size=0.002)
    in_thousandths = (*(1000 * each for each in inputs[:2]), *inputs[2:])  # epochs have no unit
    plain, scaled = fit(law, inputs, values), fit(law, in_thousandths, values)
    for name in LAWS[law].parameters:
        if is_exponent(name):
            assert scaled.parameters[name] == pytest.approx(plain.parameters[name], rel=1e-6)
    np.testing.assert_allclose(
        FORMULAS[law](scaled.parameters, *in_thousandths),
        FORMULAS[law](plain.parameters, *inputs),
        rtol=1e-6,
    )


@every_law
def test_no_general_minimiser_finds_a_lower_objective(law):
    rng = np.random.default_rng(3)
    inputs = inputs_of(law)
    values = noisy(law, truth(law, inputs))
    fitted = fit(law, inputs, values, objective=Objective("huber"))
    goal = np.log(values / (1 - values)) if LAWS[law].link == "logit" else np.log(values)

    def value(theta):
        return float(fitted.objective.terms(goal - fitted.problem.evaluate(theta[None])[0][0]).sum())

    for _ in range(5):
        start = fitted.theta_P + 0.05 * rng.standard_normal(len(fitted.theta_P))
        other = minimize(value, start, method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-10, "fatol": 1e-14})
        assert fitted.value <= other.fun * (1 + 1e-9)


def test_all_forms_are_registered():
    assert {type(law) for law in LAWS.values()} == {PowerSum, BrokenPower, DataConstrained, OfLoss}
