"""From tables to written laws: contents of laws.json, files, exclusions, and the held-out prediction."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from planted_tables import chinchilla_table, sweep_table

from analysis.checks.forecast import LargestBudgetCheck, largest_budget_check
from analysis.errors import TableError
from analysis.options import FitOptions
from analysis.pipeline import fit_laws
from analysis.report.sentences import check_sentence
from analysis.report.writing import write

QUICK = FitOptions(target=("loss",), bootstrap_draws=100)
FIT_KEYS = {
    "name",
    "law",
    "target",
    "x",
    "data",
    "objective",
    "parameters",
    "standard_errors",
    "ci95",
    "covariance",
    "pearson_r",
    "starts",
    "holdout",
    "warnings",
}


@pytest.fixture(scope="module")
def result():
    return fit_laws(
        sweep_table(depths=(3, 4, 6, 8, 12, 16), budgets=6, seeds=3), FitOptions(title="planted", bootstrap_draws=200)
    )


def test_everything_is_written_and_laws_json_follows_the_schema(result, tmp_path):
    written = write(result, tmp_path / "laws")
    content = json.loads(written.laws_json.read_text())
    assert content["schema"] == 1
    for entry in content["fits"]:
        assert set(entry) >= FIT_KEYS
        assert set(entry["data"]) == {"n_runs", "sha256", "filters"}
        assert set(entry["objective"]) == {"name", "delta", "space", "value"}
        assert set(entry["starts"]) == {"count", "agreeing"}
        assert entry["objective"]["name"] == "huber"
        assert entry["objective"]["delta"] == 1e-3
        for name, (low, high) in entry["ci95"].items():
            assert low <= entry["parameters"][name] <= high
    names = {path.name for path in (tmp_path / "laws").iterdir()}
    for stem in ("loss_vs_compute", "error_vs_compute", "loss_vs_parameters", "isoflop", "residuals", "holdout"):
        assert {f"{stem}.svg", f"{stem}.png"} <= names
    assert not [name for name in names if "partial" in name]
    html = written.report_html.read_text()
    assert html.count("<figure") == len(written.figures) // 2
    assert "http" not in html.replace("http://www.w3.org", "")


def test_frontier_is_the_best_cell_of_each_budget(result):
    table = result.table.frame
    grid = result.grids["loss"]
    best = table.groupby(["budget", "params"])["loss"].mean().groupby("budget").min()
    np.testing.assert_allclose(grid.frontier["loss"], best)
    assert grid.noise is not None
    assert grid.noise.degrees_of_freedom == 2


def test_prediction_of_the_largest_budget_uses_the_smaller_ones_only(result):
    check = result.checks.get("loss")
    assert check is not None
    assert check.n_budgets == 5
    changed = sweep_table(depths=(3, 4, 6, 8, 12, 16), budgets=6, seeds=3)
    changed.loc[changed["budget_flops"] == changed["budget_flops"].max(), "loss"] *= 0.9
    other = fit_laws(changed, QUICK).checks.get("loss")
    assert other is not None
    assert other.predicted == check.predicted
    assert other.ci95 == check.ci95
    assert check.held
    assert not other.held


def test_prediction_of_a_planted_frontier_is_inside_its_interval_about_as_often_as_stated():
    inside = []
    for seed in range(100):
        table = sweep_table(depths=(4, 6, 8), budgets=5, noise=0.003, seed=seed)
        best = table.groupby("budget_flops")["loss"].min()
        budgets = best.index.to_numpy(dtype=float)
        inside.append(largest_budget_check(budgets, best.to_numpy(), budgets, "loss").inside)
    assert 0.90 <= np.mean(inside) <= 1.0


def test_three_sizes_are_refused_by_name_and_everything_else_goes_on():
    result = fit_laws(sweep_table(depths=(12, 16, 20), budgets=5), QUICK)
    assert all("3 sizes" in found.refused for found in result.grids["loss"].minima)
    assert "few-sizes" in {warning.code for warning in result.warnings}
    assert result.find("chinchilla") is None
    assert result.checks.get("loss") is not None


def test_diverged_cells_and_other_variants_are_left_out_and_recorded():
    table = sweep_table(depths=(4, 6, 8, 12), budgets=4)
    table.loc[0, "status"] = "diverged"
    table.loc[0, "loss"] = np.nan
    table.loc[1, "variant"] = "lr x2"
    result = fit_laws(table, QUICK)
    reasons = {each.reason: each.rows for each in result.table.exclusions}
    assert reasons == {"status is not finished": ("1",), "variant of the base recipe": ("2",)}
    assert result.as_json()["fits"][0]["data"]["n_runs"] <= len(table) - 2


def test_any_table_maps_its_columns():
    rng = np.random.default_rng(0)
    params, tokens = np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5))
    loss = 1.7 + 400 * params**-0.34 + 400 * tokens**-0.28
    table = pd.DataFrame({"Model Size": params.ravel(), "seen": tokens.ravel(), "nll": loss.ravel()})
    table["nll"] *= np.exp(1e-4 * rng.standard_normal(len(table)))
    options = FitOptions(params="Model Size", tokens="seen", loss="nll", law=("chinchilla",))
    entry = fit_laws(table, options).find("chinchilla")
    assert entry is not None
    assert entry.fitted.parameters["alpha"] == pytest.approx(0.34, abs=0.01)
    assert entry.as_json()["data"]["n_runs"] == 25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (FitOptions(loss="lss"), "no column 'lss'; did you mean 'loss'"),
        (FitOptions(law=("powr",)), "unknown law 'powr'"),
        (FitOptions(objective="mean"), "unknown objective 'mean'"),
        (FitOptions(where=("loss < 0",)), "no rows are left"),
        (FitOptions(where=("loss <",)), "--where 'loss <'"),
        (FitOptions(drop_highest=99), "leaves none"),
    ],
)
def test_errors_are_one_clear_line(options, message):
    with pytest.raises(TableError, match=message) as caught:
        fit_laws(sweep_table(depths=(4, 6), budgets=3), options)
    assert "\n" not in str(caught.value)


def test_points_to_predict_may_be_named_by_the_tables_own_columns():
    table = pd.DataFrame({"Training FLOP": np.geomspace(1e18, 1e21, 8)})
    table["loss"] = 1.7 + 40 * table["Training FLOP"] ** -0.1
    options = FitOptions(flops="Training FLOP", law=("power-offset",), predict=("Training FLOP=1e23", "tokens=1e9"))
    result = fit_laws(table, replace(options, allocate=(1e24,)))
    (asked,) = [each for each in result.fits[0].predictions if each.at == {"flops": 1e23}]
    assert asked.prediction.value == pytest.approx(1.7 + 40 * 1e23**-0.1, rel=1e-4)
    unused = [each.message for each in result.warnings if each.code == "point-unused"]
    assert [text.split(":")[0] for text in unused] == ["--predict tokens=1e+09", "--budget 1e+24"]
    with pytest.raises(TableError, match="did you mean 'Training FLOP'"):
        fit_laws(table, FitOptions(flops="Training FLOP", predict=("Training FLOPs=1e23",)))


def test_values_that_do_not_vary_have_no_law():
    """Nor is a prediction that is as good as no change, which is exact, one that did not hold."""
    table = sweep_table()
    with pytest.raises(TableError, match=r"power: all rows have the same value \(3\)"):
        fit_laws(table.assign(loss=3.0), FitOptions(target=("loss",)))
    check = LargestBudgetCheck("loss", 1e12, 4, 3.0, 3.0, (2.9, 3.1), 3.0, 2.0)
    assert check.held
    assert "held" in check_sentence(check)
    assert "off by 0, no change would be exact." in check_sentence(check)


def test_frontier_without_a_law_of_compute_is_said():
    table = chinchilla_table()[["N", "D", "loss"]]
    options = FitOptions(params="N", tokens="D", law=("chinchilla",), frontier="hull", bootstrap_draws=50)
    assert any("--frontier hull chooses runs" in each.message for each in fit_laws(table, options).warnings)


def test_percentages_beyond_a_hundred():
    """Of a score that is counted in hundredths; a batch size below a hundred may well grow beyond."""
    values = np.geomspace(20, 80, 8)
    table = pd.DataFrame({"C": np.geomspace(1e18, 1e22, 8), "mmlu": values, "batch": values})
    options = FitOptions(flops="C", target=("mmlu", "batch"), predict=("flops=1e24",), bootstrap_draws=50)
    (warning,) = [each for each in fit_laws(table, options).warnings if each.code == "beyond-one"]
    assert warning.message.startswith("mmlu against flops: rising-power: reaches 160")
