"""Fits against published optima, closed forms and brute force."""

import numpy as np
import pandas as pd
import pytest
from requirements import shared_path

from analysis.errors import FitRefused
from analysis.fitting.fit import fit
from analysis.fitting.newton import Objective


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
