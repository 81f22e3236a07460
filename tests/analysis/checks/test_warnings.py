"""Each known trap, planted and caught; a clean table raises none."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from planted_tables import chinchilla_table, curve_table, sweep_table
from requirements import shared_path

from analysis.checks.warnings import CODES, table_warnings
from analysis.errors import TableError
from analysis.options import FitOptions
from analysis.pipeline import fit_laws
from analysis.report.html import render
from analysis.tables.table import prepare

QUICK = 200
NAN, INF = float("nan"), float("inf")


def codes(table, **options):
    if "budget_flops" in table.columns:
        options.setdefault("target", ("loss",))
    result = fit_laws(table, FitOptions(bootstrap_draws=QUICK, **options))
    found = {warning.code for warning in result.warnings}
    assert found <= set(CODES)
    return found


def test_clean_well_spread_tables_raise_no_warning():
    assert codes(chinchilla_table(), params="N", flops="C", tokens="D", law=("chinchilla",)) == set()
    assert codes(curve_table(rows=16), flops="C", law=("power-offset",)) == set()


def test_clean_grid_in_the_default_mode_raises_no_warning():
    assert codes(chinchilla_table(), params="N", flops="C", tokens="D") == set()


@pytest.mark.parametrize("seed", range(3))
def test_clean_grid_over_many_decades_in_the_default_mode(seed):
    """Bowls whose ends lie at six times the best size each way, where a plain power law stands beside the surface."""
    rng, rows = np.random.default_rng(seed), []
    for budget in 1e17 * 8.0 ** np.arange(8):
        for params in 0.6 * (budget / 6) ** 0.45 * np.geomspace(1 / 6, 6, 9):
            tokens = budget / 6 / params
            loss = 1.69 + 406.4 * params**-0.34 + 410.7 * tokens**-0.28
            rows.append({"N": params, "C": budget, "D": tokens, "loss": loss * np.exp(0.002 * rng.standard_normal())})
    assert codes(pd.DataFrame(rows), params="N", flops="C", tokens="D") == set()


@pytest.mark.parametrize("offset", [0.05, 1.0])
def test_offset_that_the_data_cannot_tell(offset):
    table = curve_table(rows=6, decades=1.0, noise=0.004, E=offset)
    assert "offset-not-identified" in codes(table, flops="C", law=("power-offset",))


def test_offset_that_drifts_as_budgets_are_added():
    table = pd.read_csv(shared_path("laws/marin.csv"))
    result = fit_laws(table, FitOptions(flops="C", law=("power-offset",), bootstrap_draws=QUICK))
    messages = [warning.message for warning in result.warnings if warning.code == "offset-not-identified"]
    assert any("drifts from 1." in message for message in messages)


def test_few_sizes_and_budgets():
    found = codes(sweep_table(depths=(4, 6, 8), budgets=3))
    assert {"few-sizes", "few-budgets"} <= found


def test_optimum_at_the_edge_and_refused_minima():
    assert {"edge-optimum", "isoflop-refused"} <= codes(sweep_table(depths=(12, 14, 16, 20), budgets=4))


def test_correlated_parameters():
    # Sizes and tokens that grow together cannot be told apart.
    rng = np.random.default_rng(0)
    params = np.geomspace(1e7, 1e9, 25)
    tokens = 20 * params * np.exp(0.02 * rng.standard_normal(25))
    loss = (1.8 + 400 * params**-0.34 + 2000 * tokens**-0.37) * np.exp(0.001 * rng.standard_normal(25))
    table = pd.DataFrame({"N": params, "D": tokens, "loss": loss})
    assert "correlated-parameters" in codes(table, params="N", tokens="D", law=("chinchilla",))


def test_checkpoints():
    table = sweep_table(depths=(3, 4, 6, 8), budgets=6)
    table["run"] = "run" + table["depth"].astype(str)
    with pytest.raises(TableError, match="run ids must be unique"):
        fit_laws(table, FitOptions())
    assert "checkpoints" in codes(table, checkpoints=True)


@pytest.mark.parametrize(
    ("column", "code"),
    [("tokenizer", "mixed-tokenizers"), ("evaluator", "mixed-evaluators"), ("guidance", "mixed-evaluators")],
)
def test_mixed_measures(column, code):
    table = sweep_table()
    table[column] = ["one", "other"] * (len(table) // 2)
    assert code in codes(table)


def test_law_that_is_worse_than_a_baseline():
    # A loss that stops falling: a power law goes on falling, no change is right.
    flops = np.geomspace(1e18, 1e21, 10)
    loss = np.where(flops < 1.5e20, 4 * (flops / 1e18) ** -0.1, 4 * 150**-0.1)
    table = pd.DataFrame({"C": flops, "loss": loss})
    assert "worse-than-baseline" in codes(table, flops="C", law=("power",))


def test_long_warmup_and_many_epochs():
    table = sweep_table()
    table["warmup_images"] = 0.5 * table["images_seen"].min()
    table["epochs"] = 5.0
    assert {"long-warmup", "many-epochs"} <= codes(table)


def test_undertrained_sizes():
    assert "undertrained-sizes" in codes(sweep_table(depths=(3, 4, 6, 24), budgets=4))


def test_one_point_that_decides():
    # Seven runs at nearly the same compute say little of the slope; the eighth, far away, sets it alone.
    rng = np.random.default_rng(0)
    flops = np.append(np.geomspace(1e18, 2e18, 7), 1e21)
    loss = np.append(3.0 * (flops[:7] / 1e18) ** -0.01 * np.exp(1e-4 * rng.standard_normal(7)), 1.5)
    table = pd.DataFrame({"C": flops, "loss": loss})
    result = fit_laws(table, FitOptions(flops="C", law=("power",), bootstrap_draws=QUICK))
    warning = next(each for each in result.warnings if each.code == "decisive-point")
    assert "row 8" in warning.message


def test_rows_that_diverged_are_named():
    """A loss a third above the law is a run's own affair; one three times as high widens every interval."""
    table = chinchilla_table()
    options = {"params": "N", "flops": "C", "tokens": "D", "law": ("chinchilla",)}
    for row, factor in ((4, 3.0), (30, 500.0), (40, 1.3)):
        table.loc[row, "loss"] *= factor
    found = fit_laws(table, FitOptions(bootstrap_draws=QUICK, holdout=False, **options)).warnings
    (far,) = [warning.message for warning in found if warning.code == "outlying-rows"]
    assert "rows 5, 31 lie far above the law" in far
    assert "outlying-rows" not in codes(table, where=("loss < 5",), **options)


def test_failed_prediction():
    table = sweep_table(depths=(3, 4, 6, 8), budgets=5)
    table.loc[table["budget_flops"] == table["budget_flops"].max(), "loss"] *= 0.9
    assert "prediction-failed" in codes(table)


def test_repeated_and_excluded_rows_are_mentioned():
    table = chinchilla_table()
    table = pd.concat([table, table.iloc[:3]], ignore_index=True)
    table.loc[5, "loss"] = np.nan
    assert {"repeated-rows", "rows-excluded"} <= codes(table, params="N", flops="C", tokens="D", law=("chinchilla",))


def test_laws_that_lack_a_column_are_skipped_with_a_warning():
    table = curve_table()
    result = fit_laws(table, FitOptions(flops="C", law=("power", "chinchilla"), bootstrap_draws=QUICK))
    assert [entry.fitted.law.name for entry in result.fits] == ["power"]
    assert "law-skipped" in {warning.code for warning in result.warnings}


def uneven_table(seed):
    """Runs whose scatter grows twenty-fold along compute."""
    table = curve_table(rows=60, decades=4.0, noise=0.0)
    noise = 1e-4 * np.geomspace(1, 20, 60) * np.random.default_rng(seed).standard_normal(60)
    return table.assign(loss=table["loss"] * np.exp(noise))


def test_scatter_that_differs_between_the_ends_is_said_and_resampled_by_cases():
    result = fit_laws(uneven_table(0), FitOptions(flops="C", law=("power-offset",), bootstrap_draws=QUICK))
    assert "uneven-scatter" in {warning.code for warning in result.warnings}
    assert result.fits[0].uncertainty.method == "case bootstrap"
    even = fit_laws(curve_table(rows=60), FitOptions(flops="C", law=("power-offset",), bootstrap_draws=QUICK))
    assert even.fits[0].uncertainty.method == "parametric bootstrap"
    assert "uneven-scatter" not in {warning.code for warning in even.warnings}


def test_units_that_were_forgotten():
    table = chinchilla_table()
    mapped = {"params": "N", "flops": "C", "tokens": "D", "law": ("chinchilla",)}
    table["C"] /= 1e15
    assert "unlikely-units" in codes(table, **mapped)
    assert "unlikely-units" not in codes(table, units=("flops=PFLOP",), **mapped)


def test_rows_to_hold_out_that_cannot_be():
    mapped = {"params": "N", "flops": "C", "tokens": "D", "law": ("chinchilla",)}
    assert "holdout-skipped" in codes(chinchilla_table(), holdout_where="C > 1e30", **mapped)
    with pytest.raises(TableError, match="--holdout-where 'C >'"):
        codes(chinchilla_table(), holdout_where="C >", **mapped)


def test_checkpoints_need_run_ids():
    with pytest.raises(TableError, match="--checkpoints needs --run-id"):
        codes(curve_table(), flops="C", checkpoints=True)


def test_own_columns_are_mentioned():
    table = curve_table().assign(status=["ok", "crashed"] * 6)
    assert "own-column" in codes(table, flops="C", law=("power-offset",))


@pytest.mark.parametrize("objective", ["huber", "lad", "lsq", "lsq-log"])
def test_equal_losses_are_refused(objective):
    flat = chinchilla_table().assign(loss=2.5)
    for mapped in ({"params": "N", "tokens": "D"}, {"params": "N", "flops": "C", "tokens": "D"}):
        with pytest.raises(TableError, match=r"power: all rows have the same value \(2\.5\)"):
            fit_laws(flat, FitOptions(objective=objective, bootstrap_draws=50, **mapped))


@pytest.mark.parametrize("spread", [0.02, 0.1])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_ladder_of_so_many_tokens_a_parameter(spread, seed):
    """Sizes and data that grow together can't tell one exponent from the other, wherever the fit ends on the ridge."""
    rng = np.random.default_rng(seed)
    params = np.geomspace(1e7, 1e10, 30)
    tokens = 20 * params * np.exp(spread * rng.standard_normal(30))
    loss = (1.8 + 480 * params**-0.34 + 2085 * tokens**-0.36) * np.exp(0.002 * rng.standard_normal(30))
    table = pd.DataFrame({"N": params, "D": tokens, "loss": loss})
    assert "correlated-parameters" in codes(table, params="N", tokens="D", law=("chinchilla",), holdout=False)


@pytest.mark.parametrize("name", ["loss", "val_loss", "bits per byte"])
def test_traps_do_not_depend_on_what_the_loss_is_called(name):
    rising = pd.DataFrame({"C": np.geomspace(1e18, 1e21, 8), name: np.linspace(2.0, 3.0, 8)})
    assert "not-monotone" in codes(rising, flops="C", loss=name, law=("power",))
    starved = chinchilla_table()
    starved = pd.concat([starved, starved.tail(1).assign(N=3e11, D=1e21 / 6 / 3e11, loss=2.9)]).rename(
        columns={"loss": name}
    )
    assert "undertrained-sizes" in codes(starved, params="N", flops="C", tokens="D", loss=name, law=("chinchilla",))


def test_a_rising_law_of_what_falls_is_said():
    """Asked for, or chosen because one row lies far above the others at the end."""
    falling = pd.DataFrame({"C": np.geomspace(1e18, 1e21, 8), "rate": np.geomspace(3e-3, 1e-3, 8)})
    asked = {"flops": "C", "target": ("rate",), "holdout": False}
    assert "not-monotone" in codes(falling, law=("rising-power",), **asked)
    assert "not-monotone" not in codes(falling, **asked)
    assert "not-monotone" not in codes(falling.assign(rate=1 / falling["rate"]), law=("rising-power",), **asked)
    falling.loc[7, "rate"] = 0.1
    assert "not-monotone" in codes(falling, **asked)


def test_warnings_count_data_in_the_tables_own_unit():
    starved = pd.DataFrame({"params": [1e6, 1e6, 1e9, 1e9], "tokens": [1e9, 4e9, 1e6, 2e6], "loss": [3.0, 2.5, 5, 4]})
    table = prepare(
        starved.assign(flops=6 * starved["params"] * starved["tokens"]), FitOptions(units=("tokens=images",))
    )
    messages = [warning.message for warning in table_warnings(table, None, checkpoints=False)]
    assert any("images a parameter" in message for message in messages)
    assert not any("tokens a parameter" in message for message in messages)


def test_an_accuracy_may_rise():
    table = pd.DataFrame({"C": np.geomspace(1e18, 1e21, 8), "accuracy": np.linspace(0.2, 0.6, 8)})
    asked = {"flops": "C", "target": ("accuracy",), "law": ("power",), "holdout": False}
    assert not codes(table, **asked) & {"not-monotone", "beyond-one"}
    assert "beyond-one" in codes(table, predict=("C=1e24",), **asked)
    assert "frontier-possible" not in codes(table, loss="accuracy", **asked)


def test_a_point_that_widens_its_own_interval_is_decisive_all_the_same():
    flops = np.geomspace(1e18, 1e21, 9)
    loss = 3 * (flops / 1e18) ** -0.05 * np.exp(0.001 * np.random.default_rng(0).standard_normal(9))
    table = pd.DataFrame({"C": flops, "loss": loss})
    options = {"flops": "C", "law": ("power",), "objective": "lsq-log"}
    assert "decisive-point" not in codes(table, **options)
    table.loc[0, "loss"] *= 0.8
    assert "decisive-point" in codes(table, **options)


@pytest.mark.parametrize(("column", "code"), [("Evaluator", "mixed-evaluators"), ("CFG scale", "mixed-evaluators"),
                                              ("Tokenizer-name", "mixed-tokenizers")])  # fmt: skip
def test_mixed_columns_are_known_by_other_spellings(column, code):
    table = curve_table(rows=12).assign(**{column: ["a", "b"] * 6})
    assert code in codes(table, flops="C", law=("power",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_highest": -2}, "--drop-highest"),
        ({"seed": -1}, "--seed"),
        ({"predict": ("flops=inf",)}, "--predict"),
        ({"allocate": (float("inf"),)}, "--budget"),
        ({"compare": ("a", "b")}, "--compare a needs --group"),
        ({"offset": 1.0, "law": ("power",)}, "--offset 1 has no effect"),
        ({"offset": 99.0}, r"--offset 99 must be below the lowest value that is fitted \(1\.\d+ of loss\)"),
        ({"offset": 99.0, "law": ("power", "power-offset")}, "--offset 99 must be below the lowest"),
        *(({"offset": value}, "--offset must be positive and finite") for value in (-1.0, 0.0, NAN, INF)),
        *(({"delta": value}, "--delta must lie between") for value in (-1.0, 0.0, NAN, INF, 1e-300, 1e300)),
        *(({"tokens_from_flops": value}, "--tokens-from-flops must be") for value in (-6.0, 0.0, NAN, INF)),
        *(({"tokens_from_flops": value}, "--tokens-from-flops must lie") for value in (1e-308, 1e308)),
        *(({"allocate": (value,)}, "--budget must lie between") for value in (1e-308, 1e308)),
        ({"target": ("C",)}, r"--target C: no law can be fitted to what it is fitted against \(flops\)"),
        ({"x": ("loss",), "target": ("loss",)}, r"--target loss: no law can be fitted to what it is fitted against"),
        *(({"allocate": (1e20, value)}, "--budget must be") for value in (-1.0, 0.0, NAN)),
        *(({"predict": (f"flops={value}",)}, "--predict") for value in ("nan", "-1", "1e999", "", "x")),
        ({"bootstrap_draws": 10**12}, "--bootstrap-draws must be at most 100,000, not 1000000000000"),
        ({"bootstrap_draws": 10**400}, "--bootstrap-draws must be at most 100,000"),
        ({"bootstrap_draws": -(10**12)}, "--bootstrap-draws"),
        ({"seed": 2**32}, "--seed must be a whole number from 0 to 4294967295, not 4294967296"),
        ({"seed": 10**400}, "--seed must be a whole number"),
        ({"drop_highest": 12}, "--drop-highest 12 leaves none of the 12 rows"),
        ({"drop_highest": 10**30}, "--drop-highest"),
        ({"compare": ("a",), "group": "C"}, "--compare a names one group"),
        ({"offset_source": "a paper"}, "--offset-source says where a pinned offset comes from"),
        ({"delta": 0.1, "objective": "lad"}, "--delta 0.1 is Huber's, and has no effect with --objective lad"),
        ({"holdout_where": "C > 1e20", "holdout": False}, "--holdout-where and --no-holdout contradict each other"),
    ],
)
def test_flags_that_cannot_be_met_are_refused(options, message):
    with pytest.raises(TableError, match=message) as caught:
        fit_laws(curve_table(), FitOptions(flops="C", **options))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("flag", ["where", "holdout_where"])
def test_conditions_are_refused_in_one_line_whatever_they_hold(flag):
    for condition in ("@pd", "loss.sum() > 1", "(" * 3000 + "loss > 1" + ")" * 3000, "loss", "9**9**9 > 1"):
        given = (condition,) if flag == "where" else condition
        with pytest.raises(TableError, match=f"--{flag.replace('_', '-')} ") as caught:
            fit_laws(curve_table(), FitOptions(flops="C", **{flag: given}))
        assert "\n" not in str(caught.value)


def test_rows_of_different_devices_are_a_note_and_of_different_precisions_a_warning():
    """Beside each other: the same mechanism decides; only rows that are kept count."""
    table = curve_table(rows=12).assign(device=["H100 <b>", "cpu"] * 6, precision=["bf16", "fp32"] * 6)
    options = FitOptions(flops="C", law=("power",), bootstrap_draws=50)
    result = fit_laws(table, options)
    note = "rows were computed on different devices (H100 <b>, cpu): they differ in rounding only"
    assert note in result.table.notes
    assert note in result.as_json()["table"]["notes"]
    assert note.replace("<b>", "&lt;b&gt;") in render(result, [])
    assert not [each for each in result.warnings if "device" in each.message]
    (warning,) = [each for each in result.warnings if each.code == "mixed-precision"]
    assert "bf16, fp32" in warning.message
    assert not [each for each in result.table.notes if "precision" in each]
    alike = fit_laws(table, replace(options, where=("device == 'cpu'",)))
    assert not [each for each in alike.table.notes if "device" in each]
    assert "mixed-precision" not in {each.code for each in alike.warnings}
    lone = curve_table(rows=12).assign(device=["cpu", None] * 6, patch_nums=[[1, 2]] * 12)
    assert not [each for each in fit_laws(lone, options).table.notes if "device" in each]


def test_a_tokenizer_that_was_accepted_against_its_figures_is_a_warning(tmp_path):
    """In a table read from a file, too, where the empty text of fit tokenizers is no value."""
    faults = "reconstructions are no better than one <mean> picture"
    options = FitOptions(flops="C", law=("power",), bootstrap_draws=50)
    curve_table(rows=12).assign(tokenizer_faults=[faults] * 3 + [""] * 9).to_csv(tmp_path / "runs.csv", index=False)
    result = fit_laws(pd.read_csv(tmp_path / "runs.csv"), options)
    (warning,) = [each for each in result.warnings if each.code == "unfit-tokenizer"]
    assert warning.message == f"3 of 12 runs: their tokenizer was accepted although {faults}"
    assert warning.message.replace("<mean>", "&lt;mean&gt;") in render(result, [])
    for fit in ("", None):
        clean = fit_laws(curve_table(rows=12).assign(tokenizer_faults=[fit] * 12), options)
        assert "unfit-tokenizer" not in {each.code for each in clean.warnings}


def test_changes_that_digits_do_not_show_are_no_decisive_points():
    table = curve_table(rows=10, noise=0.0, E=2.0)
    table.loc[8, "loss"] *= 1.0002  # without it E changes by less than a thousandth
    assert "decisive-point" not in codes(table, flops="C", law=("power-offset",))
    assert "decisive-point" not in codes(curve_table(rows=8, noise=0.0), flops="C", law=("power-offset",))
