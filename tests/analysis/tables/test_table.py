"""Tables in every format and every state: mapped, filtered, checked, or refused in one clear line."""

import json

import numpy as np
import pandas as pd
import pytest
from planted_tables import chinchilla_table, sweep_table

from analysis.errors import TableError
from analysis.options import FitOptions
from analysis.pipeline import fit_laws
from analysis.tables.reading import read_runs
from analysis.tables.table import prepare

MAPPED = FitOptions(params="N", flops="C", tokens="D", loss="loss")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "jsonl", "json"])
def test_every_format_gives_the_same_rows_and_hash(suffix, tmp_path):
    table = chinchilla_table()
    path = tmp_path / f"runs.{suffix}"
    if suffix == "parquet":
        table.to_parquet(path)
    elif suffix == "jsonl":
        table.to_json(path, orient="records", lines=True, double_precision=15)
    elif suffix == "json":
        path.write_text(json.dumps(table.to_dict(orient="records")))
    else:
        table.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    read = prepare(read_runs([path]), MAPPED)
    np.testing.assert_allclose(read.frame[["params", "flops", "tokens", "loss"]], table[["N", "C", "D", "loss"]])
    assert read.sources == (path.name,)
    if suffix in ("csv", "parquet", "json"):
        assert read.sha256 == prepare(table, MAPPED).sha256


def test_several_files_become_one_table_whose_rows_name_their_file(tmp_path):
    for name in ("a", "b"):
        chinchilla_table(sizes=2, budgets=2).to_csv(tmp_path / f"{name}.csv", index=False)
    table = read_runs([tmp_path / "a.csv", tmp_path / "b.csv"])
    assert list(table["row"]) == [f"{name}.csv:{row}" for name in "ab" for row in range(1, 5)]


def test_hash_depends_on_values_and_not_on_what_else_the_table_holds():
    table = chinchilla_table()
    reference = prepare(table, MAPPED).sha256
    assert prepare(table.assign(note="x"), MAPPED).sha256 == reference
    changed = table.copy()
    changed.loc[0, "loss"] *= 1 + 1e-12
    assert prepare(changed, MAPPED).sha256 != reference


def test_filters_are_applied_in_order_and_recorded():
    options = FitOptions(params="N", flops="C", tokens="D", where=("N > 1e8", "loss < 3"), drop_highest=2)
    table = prepare(chinchilla_table(), options)
    assert table.filters == ("where N > 1e8", "where loss < 3", "drop-highest 2 (loss)")
    assert len(table.frame) + sum(len(each.rows) for each in table.exclusions) == table.n_source
    assert (table.frame["N"] > 1e8).all()


def test_columns_with_spaces_are_filtered_in_backticks():
    table = chinchilla_table().rename(columns={"N": "Model Size"})
    options = FitOptions(params="Model Size", flops="C", tokens="D", where=("`Model Size` > 1e8",))
    assert (prepare(table, options).frame["Model Size"] > 1e8).all()


def test_tokens_are_derived_only_when_asked():
    table = chinchilla_table().drop(columns="D")
    assert not prepare(table, FitOptions(params="N", flops="C")).has("tokens")
    derived = prepare(table, FitOptions(params="N", flops="C", tokens_from_flops=6))
    np.testing.assert_allclose(derived.frame["tokens"], chinchilla_table()["D"])
    assert "tokens are D = C / (6·N)" in derived.notes


def test_exclusions_say_what_they_change():
    table = chinchilla_table()
    table.loc[0, "loss"] *= 1.3
    options = FitOptions(params="N", flops="C", tokens="D", law=("chinchilla",), drop_highest=1, bootstrap_draws=50)
    assert "instead of" in fit_laws(table, options).exclusion_effect


def test_missing_values_are_left_out_by_name():
    table = chinchilla_table()
    table.loc[3, "loss"] = np.nan
    table.loc[4, "N"] = np.nan
    kept = prepare(table, MAPPED)
    assert {(each.reason, each.rows) for each in kept.exclusions} == {
        ("no value in loss", ("4",)),
        ("no value in params", ("5",)),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.iloc[:0], "the table of runs is empty"),
        (lambda t: t.drop(columns="N").assign(n_params=1.0), "no column 'N'"),
        (lambda t: t.assign(loss="n/a"), "column 'loss': not a number in row 1"),
        (lambda t: t.assign(loss=-t["loss"]), "'loss': values must be positive and finite; .* change their sign"),
        (lambda t: t.assign(C=np.inf), "column 'C': values must be positive and finite; .* --where 'C < 1e300'"),
        (lambda t: t.assign(loss=range(len(t))), r"not so in row 1 \(0.0\); .* --where 'loss > 0'"),
        (lambda t: t.assign(loss=np.nan), "no rows are left"),
        (lambda t: t.assign(D=0.0), "column 'D'"),
        (lambda t: t.assign(loss=True), "column 'loss' holds bool, not numbers"),
        (lambda t: t.assign(C=pd.Timestamp("2026-01-01")), "column 'C' holds datetime64"),
        (lambda t: pd.concat([t, t[["N"]]], axis=1), "two columns named 'N'"),
    ],
)
def test_bad_tables_are_refused_in_one_line(change, message):
    with pytest.raises(TableError, match=message) as caught:
        fit_laws(change(chinchilla_table()), MAPPED)
    assert "\n" not in str(caught.value)


def test_a_column_to_fit_against_must_be_numbers():
    with pytest.raises(TableError, match="column 'kind': not a number"):
        fit_laws(chinchilla_table().assign(kind="a"), FitOptions(params="N", x=("kind",)))


def test_rows_without_a_group_are_left_out_by_name():
    table = chinchilla_table()
    table["family"] = ["a", None] * (len(table) // 2) + ["a"] * (len(table) % 2)
    kept = prepare(table, FitOptions(params="N", flops="C", tokens="D", group="family"))
    assert kept.exclusions[0].reason == "no value in group"


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_units_of_any_size_give_the_same_exponent(scale):
    table = chinchilla_table()
    options = FitOptions(flops="C", law=("power",), bootstrap_draws=50, holdout=False)
    plain = fit_laws(table[["C", "loss"]], options).fits[0]
    scaled = fit_laws(pd.DataFrame({"C": table["C"] * scale, "loss": table["loss"]}), options).fits[0]
    assert scaled.fitted.parameters["alpha"] == pytest.approx(plain.fitted.parameters["alpha"], rel=1e-6)
    assert scaled.uncertainty.ci95["alpha"] == pytest.approx(plain.uncertainty.ci95["alpha"], rel=1e-6)


def test_one_size_and_one_budget_are_errors_or_warnings_never_tracebacks():
    table = chinchilla_table()
    one_budget = fit_laws(table[table["C"] == table["C"].max()], FitOptions(params="N", flops="C", tokens="D"))
    assert {"few-budgets", "law-skipped"} <= {warning.code for warning in one_budget.warnings}
    sweep = sweep_table()
    one_size = fit_laws(sweep[sweep["depth"] == 8], FitOptions(target=("loss",), bootstrap_draws=100))
    assert "few-sizes" in {warning.code for warning in one_size.warnings}
    with pytest.raises(TableError, match="no law could be fitted"):
        fit_laws(table.iloc[:1], FitOptions(params="N", flops="C", tokens="D"))


@pytest.mark.parametrize("name", ["missing.csv", "runs.xlsx", "empty.csv", "broken.parquet"])
def test_files_that_cannot_be_read_are_named(name, tmp_path):
    if name != "missing.csv":
        (tmp_path / name).write_text("")
    with pytest.raises(TableError, match=name):
        read_runs([tmp_path / name])


def test_repeated_run_ids_are_an_error():
    table = sweep_table()
    table.loc[1, "run"] = table.loc[0, "run"]
    with pytest.raises(TableError, match="run ids must be unique"):
        fit_laws(table, FitOptions())


def test_a_hundred_thousand_rows_are_fitted_exactly():
    rng = np.random.default_rng(0)
    flops = np.exp(rng.uniform(np.log(1e17), np.log(1e22), 100_000))
    loss = (1.7 + 2.0 * (flops / 1e17) ** -0.2) * np.exp(0.01 * rng.standard_normal(100_000))
    options = FitOptions(flops="C", law=("power-offset",), bootstrap_draws=300)
    entry = fit_laws(pd.DataFrame({"C": flops, "loss": loss}), options).fits[0]
    assert entry.fitted.parameters["E"] == pytest.approx(1.7, abs=0.005)
    assert entry.fitted.parameters["alpha"] == pytest.approx(0.2, abs=0.003)


@pytest.mark.parametrize("seed", range(4))
def test_scattered_runs_that_agree_in_compute_by_chance_are_no_grid(seed):
    """240 runs over three decades: nearly half have another within 2% in compute."""
    rng = np.random.default_rng(seed)
    flops = np.exp(rng.uniform(np.log(1e18), np.log(3e21), 240))
    params = np.sqrt(flops) * np.exp(rng.uniform(-1.2, 1.2, 240))
    table = pd.DataFrame({"params": params, "flops": flops, "loss": 1.8 + 480 * params**-0.35})
    assert not fit_laws(table, FitOptions(law=("power",), x=("flops",), bootstrap_draws=50)).grids


def test_dense_compute_is_no_grid_of_budgets():
    """Rows a hair's breadth apart in compute, over decades: each within 2% of the next, no budget shared."""
    rng = np.random.default_rng(3)
    params, tokens = (np.exp(rng.uniform(np.log(low), np.log(1e3 * low), 3000)) for low in (1e7, 1e9))
    loss = (1.8 + 480 * params**-0.35 + 2100 * tokens**-0.37) * np.exp(0.01 * rng.standard_normal(3000))
    table = pd.DataFrame({"N": params, "C": 6 * params * tokens, "loss": loss})
    options = FitOptions(params="N", flops="C", loss="loss", law=("power",), x=("flops",), bootstrap_draws=50)
    result = fit_laws(table, options)
    assert not result.grids
    assert len(result.fits[0].rows) == 3000
