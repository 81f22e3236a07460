"""Minima, frontiers, held-out refits and comparisons, on tables whose truth is known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from planted_tables import chinchilla_table, evaluation_table, sweep_table
from requirements import shared_path

from analysis.errors import TableError
from analysis.grids.allocation import from_minima
from analysis.grids.bowls import METHODS
from analysis.grids.frontier import curve_envelope, with_budgets
from analysis.grids.isoflop import minima
from analysis.options import FitOptions
from analysis.pipeline import fit_laws
from analysis.tables.table import prepare

QUICK = {"bootstrap_draws": 100, "target": ("loss",)}


def bowls(noise=0.0, sizes=7):
    rng = np.random.default_rng(0)
    rows = []
    for budget, best in ((1e18, 1e8), (1e19, 3e8), (1e20, 9e8)):
        for params in best * np.geomspace(0.1, 8, sizes):
            loss = 3.0 + 0.05 * np.log(params / best) ** 2 + noise * rng.standard_normal()
            rows.append({"budget": budget, "params": params, "tokens": budget / (6 * params), "loss": loss})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("method", METHODS)
def test_minima_of_exact_bowls(method):
    for found, best in zip(minima(bowls(), "loss", method), (1e8, 3e8, 9e8), strict=True):
        assert found.params == pytest.approx(best, rel=0.002 if method != "akima" else 0.05)
        assert found.value == pytest.approx(3.0, abs=1e-6 if method != "akima" else 0.002)
        assert found.tokens == pytest.approx(found.budget / (6 * found.params), rel=1e-6)


def test_interval_of_a_minimum_covers_it():
    inside = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        table = bowls()
        table["loss"] += 0.01 * rng.standard_normal(len(table))
        for found, best in zip(minima(table, "loss", seed=seed), (1e8, 3e8, 9e8), strict=True):
            if found.params_ci95 is not None:
                inside.append(found.params_ci95[0] <= best <= found.params_ci95[1])
    assert 0.88 <= np.mean(inside) <= 0.995


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (bowls(sizes=3), "3 sizes at this budget; at least 4 are needed"),
        (bowls().assign(loss=lambda t: t["params"]), "not bracketed: the smallest size"),
        (bowls().assign(loss=lambda t: 1 / t["params"]), "not bracketed: the largest size"),
    ],
)
def test_minima_are_refused_by_name(rows, reason):
    assert all(reason in found.refused for found in minima(rows, "loss"))


def test_three_approaches_agree_on_a_planted_law():
    options = FitOptions(params="N", flops="C", tokens="D", tokens_from_flops=6, allocate=(1e22,), **QUICK)
    result = fit_laws(chinchilla_table(), options)
    truth = 0.3658 / (0.3478 + 0.3658)
    approaches = {each.approach: each for each in result.allocations["loss"]}
    assert set(approaches) == {"envelope", *(f"isoflop-{each}" for each in METHODS), "parametric chinchilla"}
    for each in approaches.values():
        assert each.params_ci95[0] <= truth <= each.params_ci95[1], each.approach
        assert each.best[0].budget == 1e22
    parametric = approaches["parametric chinchilla"]
    assert parametric.params_exponent == pytest.approx(truth, abs=0.002)
    share = (0.3478 * 482.01) / (0.3658 * 2085.43)
    expected = share ** (1 / (0.3478 + 0.3658)) * (1e22 / 6) ** truth
    assert parametric.best[0].params == pytest.approx(expected, rel=0.05)


def test_envelope_of_curves_is_the_running_minimum():
    table = pd.DataFrame({"flops": [1.0, 2, 3, 4, 5], "loss": [5.0, 4, 4.5, 3, 3.5]})
    assert list(curve_envelope(table, "loss")["flops"]) == [1, 2, 4]


def test_held_out_errors_of_epochs_larger_runs():
    table = pd.read_csv(shared_path("laws/epoch_chinchilla.csv"))
    options = FitOptions(
        params="Model Size",
        flops="Training FLOP",
        loss="loss",
        drop_highest=5,
        tokens_from_flops=6,
        law=("chinchilla",),
        holdout_where="flops >= 1e21",
        bootstrap_draws=50,
    )
    entry = fit_laws(table, options).fits[0]
    check = next(each for each in entry.holdout if each.name.startswith("where"))
    assert (check.n_fitted, check.n_held) == (217, 23)
    assert check.mean_percent == pytest.approx(1.05, abs=0.005)
    assert check.worst_percent == pytest.approx(2.8, abs=0.05)
    assert check.beaten_by == ""
    assert {each.name for each in entry.holdout} >= {"largest budget", "largest params"}


def test_baselines_are_what_they_say():
    flops = np.geomspace(1e18, 1e20, 8)
    table = pd.DataFrame({"C": flops, "loss": 4 * (flops / 1e18) ** -0.1})
    entry = fit_laws(table, FitOptions(flops="C", law=("power-offset",), bootstrap_draws=50)).fits[0]
    check = next(each for each in entry.holdout if each.name == "largest budget")
    assert check.baselines["no change"] == pytest.approx(100 * (table["loss"][6] / table["loss"][7] - 1))
    assert check.baselines["power law"] == pytest.approx(0.0, abs=1e-6)


def test_three_parameters_are_held_out_only_where_five_budgets_remain():
    flops = np.geomspace(1e18, 1e20, 5)
    table = pd.DataFrame({"C": flops, "loss": 2 + 2 * (flops / 1e18) ** -0.1})
    result = fit_laws(table, FitOptions(flops="C", law=("power", "power-offset"), bootstrap_draws=50))
    assert result.find("power-offset").holdout == ()
    assert result.find("power").holdout


def test_groups_are_fitted_apart_and_compared():
    one, other = sweep_table(depths=(3, 4, 6, 8), budgets=6), sweep_table(depths=(3, 4, 6, 8), budgets=6, seed=9)
    other["loss"] *= 0.97
    other["run"] += "-b"
    table = pd.concat([one.assign(family="var"), other.assign(family="ar")])
    result = fit_laws(table, FitOptions(group="family", **QUICK))
    (comparison,) = result.comparisons
    assert (comparison.a, comparison.b, comparison.matched_budgets) == ("ar", "var", 6)
    assert comparison.loss_ratio == pytest.approx(0.97, abs=0.002)
    assert comparison.loss_ratio_ci95[0] < comparison.loss_ratio < comparison.loss_ratio_ci95[1]
    assert comparison.exponent_ci95[0] < 0 < comparison.exponent_ci95[1]
    assert {entry.group for entry in result.fits} == {"ar", "var"}
    with pytest.raises(TableError, match="no such group"):
        fit_laws(table, FitOptions(group="family", compare=("ar", "vr"), **QUICK))


def test_curves_are_enveloped_only_when_declared():
    table = sweep_table(depths=(3, 4, 6, 8), budgets=6)
    table["run"] = "depth" + table["depth"].astype(str)
    result = fit_laws(table, FitOptions(checkpoints=True, law=("power",), x=("flops",), **QUICK))
    assert result.fits[0].filters == ("frontier: lower envelope of the curves",)
    assert result.fits[0].uncertainty.method == "case bootstrap by run"
    assert not result.grids


def frontier(scale, seed):
    """A frontier that bends towards an offset, as real ones do."""
    flops = np.geomspace(1e18, 3e20, 6)
    noise = 0.0015 * np.random.default_rng(seed).standard_normal(6)
    return pd.DataFrame({"C": flops, "loss": scale * (1.8 + 0.74 * (flops / 1e20) ** -0.18) * np.exp(noise)})


def test_compute_to_match_follows_the_bend_of_the_frontier():
    reached = 1.8 + 0.74 * 3**-0.18
    truth = ((reached / 1.03 - 1.8) / 0.74) ** (-1 / 0.18) / 3  # A = 1.03 × B must come down to what B reaches
    inside = []
    for seed in range(12):
        table = pd.concat([frontier(1.03, seed).assign(g="a"), frontier(1.0, seed + 100).assign(g="b")])
        options = FitOptions(flops="C", group="g", bootstrap_draws=100, holdout=False)
        (found,) = fit_laws(table, options).comparisons
        assert found.compute_ratio == pytest.approx(truth, rel=0.3)
        inside.append(found.compute_ratio_ci95[0] <= truth <= found.compute_ratio_ci95[1])
    assert np.mean(inside) > 0.8


def test_tokens_exponent_is_given_where_no_formula_of_compute_was_declared():
    result = fit_laws(chinchilla_table(), FitOptions(params="N", flops="C", tokens="D", law=("chinchilla",), **QUICK))
    parametric = next(each for each in result.allocations["loss"] if each.approach.startswith("parametric"))
    assert parametric.params_exponent + parametric.tokens_exponent == pytest.approx(1, abs=1e-6)
    assert parametric.tokens_ci95[0] < parametric.tokens_exponent < parametric.tokens_ci95[1]


def test_minima_without_any_scatter_have_a_line_all_the_same():
    """Akima's were weighted by the inverse of a variance of zero."""
    result = fit_laws(evaluation_table(budgets=4), FitOptions(where=("depth > 3",), **QUICK))
    akima = next(each for each in result.allocations["loss"] if each.approach == "isoflop-akima")
    assert akima.params_exponent == pytest.approx(0.5, abs=0.03)


def test_loss_against_size_is_taken_at_one_budget_even_if_none_has_all_sizes():
    table = chinchilla_table(budgets=5)  # each budget has sizes of its own
    mapped = {"params": "N", "flops": "C", "tokens": "D"}
    assert fit_laws(table, FitOptions(**mapped, **QUICK)).find("power", x="params") is None
    entry = fit_laws(table, FitOptions(**mapped, law=("power",), **QUICK)).find("power", x="params")
    assert entry.rows["budget"].nunique() == 1
    assert "the one with most sizes, 7 of 35" in entry.filters[0]


def test_the_minimum_of_a_parabola_is_its_vertex():
    sizes = np.geomspace(1e6, 3e8, 7)
    rows = pd.DataFrame({"params": sizes, "loss": 2 + 0.1 * (np.log(sizes) - np.log(1.234567e7)) ** 2, "budget": 1e18})
    for method in ("parabola", "cubic"):
        (found,) = minima(rows, "loss", method)
        assert found.params == pytest.approx(1.234567e7, rel=1e-9)
        assert found.value == pytest.approx(2.0, rel=1e-12)


def test_a_cubic_through_as_many_sizes_as_it_has_coefficients_is_refused():
    rows = pd.DataFrame({"params": [1e6, 4e6, 1.6e7, 6.4e7], "loss": [2.5, 2.1, 2.0, 2.4], "budget": 1e18})
    (parabola,), (cubic,) = minima(rows, "loss"), minima(rows, "loss", "cubic")
    assert parabola.params is not None
    assert cubic.refused == "4 sizes at this budget; at least 5 are needed"


def test_without_flops_the_most_data_are_held_out_once():
    table = chinchilla_table().drop(columns="C")
    result = fit_laws(table, FitOptions(params="N", tokens="D", law=("chinchilla",), bootstrap_draws=100))
    names = [check.name for check in result.fits[0].holdout if not check.name.startswith("roll")]
    assert names == ["largest tokens", "largest params"]


def akima_exponents(seeds, budgets, factors, far_side, noise):
    """Exponents of planted bowls (0.5 in truth), and the widths of their intervals, over tables of one law."""
    exponents, widths = [], []
    for seed in range(seeds):
        rng, rows = np.random.default_rng(seed), []
        for budget in budgets:
            for off in factors:
                params = 0.6 * off * np.sqrt(budget / 6)
                tokens = budget / (6 * params)
                loss = (1.7 + 400 * params**-0.34 + 410 * tokens**-0.34) * (1 + far_side * off**1.5)
                noisy = loss * (1 + noise(budget) * rng.standard_normal())
                rows.append({"budget": budget, "params": params, "tokens": tokens, "loss": noisy})
        found = from_minima(minima(pd.DataFrame(rows), "loss", "akima", seed=seed), ())
        exponents.append(found.params_exponent)
        widths.append(np.ptp(found.params_ci95))
    return np.array(exponents), np.array(widths)


def test_the_far_sides_of_wide_bowls_do_not_widen_what_akima_finds():
    """Large models that have hardly begun to learn make a side that no polynomial follows; Akima's curve never sees it.

    The estimates' own spread, over tables of the same law, is what the interval should have.
    """
    budgets, factors = np.geomspace(1e17, 1e20, 6), np.geomspace(1 / 40, 40, 10)
    exponents, widths = akima_exponents(12, budgets, factors, 0.001, lambda _: 0.002)
    assert np.mean(widths) <= 2 * 2 * 1.96 * np.std(exponents, ddof=1)
    assert np.mean(np.abs(exponents - 0.5) < widths / 2) >= 10 / 12


def test_where_scatter_falls_with_compute_the_later_minima_count_more():
    """Akima's exponents of bowls whose noise falls from 2% to 0.06%, against their own spread over tables."""
    budgets, factors = np.geomspace(1e17, 1e20, 9), np.geomspace(1 / 6, 6, 8)
    exponents, widths = akima_exponents(24, budgets, factors, 0.0, lambda budget: 0.02 * (budget / 1e17) ** -0.5)
    assert np.mean(widths) <= 1.1 * 2 * 1.96 * np.std(exponents, ddof=1)
    assert np.mean(np.abs(exponents - 0.5) < widths / 2) >= 22 / 24


def test_the_best_of_what_rises_is_the_highest():
    """An accuracy that falls with the loss on a straight line has the same best cells and sizes, upside down."""
    table = chinchilla_table().assign(accuracy=lambda rows: 1.1 - rows["loss"] / 5)
    options = FitOptions(params="N", flops="C", tokens="D", bootstrap_draws=50, holdout=False)
    result = fit_laws(table, replace(options, target=("loss", "accuracy")))
    loss, accuracy = result.grids["loss"], result.grids["accuracy"]
    assert accuracy.frontier["params"].tolist() == loss.frontier["params"].tolist()
    assert (accuracy.frontier["accuracy"] == table.groupby("C")["accuracy"].max().to_numpy()).all()
    for highest, lowest in zip(accuracy.minima, loss.minima, strict=True):
        assert highest.params == pytest.approx(lowest.params, rel=1e-6)
        assert highest.value == pytest.approx(1.1 - lowest.value / 5, rel=1e-6)
    assert {each.fitted.law.name for each in result.fits if each.target == "accuracy"} == {"rising-power"}
    assert "it rises" in result.forecasts["accuracy"].refused


def test_no_surface_that_falls_is_fitted_to_what_rises_with_size_and_data():
    """Neither unasked where there is no compute, nor when it is asked for."""
    table = chinchilla_table()[["N", "D", "loss"]].assign(accuracy=lambda rows: 1.1 - rows["loss"] / 5)
    options = FitOptions(params="N", tokens="D", target=("accuracy",), bootstrap_draws=50, holdout=False)
    assert {each.fitted.law.name for each in fit_laws(table, options).fits} == {"rising-power"}
    with pytest.raises(TableError, match="does not fall with params or tokens"):
        fit_laws(table, replace(options, law=("chinchilla",)))


def test_envelope_of_curves_of_an_accuracy_is_the_upper_one():
    steps = np.geomspace(1, 100, 8)
    curves = [
        pd.DataFrame({"run": f"{size:g}", "N": size, "C": 6 * size * steps, "accuracy": (0.3 - 1 / size) * steps**0.1})
        for size in (5.0, 10.0, 20.0)
    ]
    options = FitOptions(run_id="run", params="N", flops="C", checkpoints=True, target=("accuracy",), x=("flops",))
    (entry,) = fit_laws(pd.concat(curves), replace(options, bootstrap_draws=50, holdout=False)).fits
    best = pd.concat(curves).sort_values(["C", "accuracy"], ascending=[True, False])["accuracy"].cummax().unique()
    assert entry.filters[-1] == "frontier: upper envelope of the curves"
    assert entry.rows["accuracy"].tolist() == best.tolist()


@pytest.mark.parametrize(("apart", "budgets"), [(10**0.5, 6), (1.12, None)])
def test_flops_around_nominal_budgets(apart, budgets):
    """FLOPs that miss their budget by up to 4% belong to it where the next one is far off."""
    rng = np.random.default_rng(9)
    table = pd.DataFrame(
        [
            {"flops": budget * rng.uniform(0.96, 1.04), "params": params, "loss": 3.0}
            for budget in 1e18 * apart ** np.arange(6)
            for params in np.geomspace(1e7, 1e8, 7)
        ]
    )
    found = with_budgets(prepare(table, FitOptions(params="params", flops="flops")))
    assert (None if found is None else found["budget"].nunique()) == budgets
