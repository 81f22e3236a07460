"""Forecasts: what they say, that they can't be changed afterwards, and what came of them."""

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted_tables import sweep_table

from analysis.checks.forecast import largest_budget_check
from analysis.errors import TableError
from analysis.forecasts import KeptForecast, ReadBy, forecast_at, outcomes, read_again, read_forecast, track_record
from analysis.options import FitOptions
from analysis.pipeline import fit_laws
from analysis.tables.table import prepare

OPTIONS = FitOptions(law=("power",), holdout=False, bootstrap_draws=50)
BASE = 2.5e9


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return sweep_table(budgets=6, seeds=3)


@pytest.fixture(scope="module")
def kept(table: pd.DataFrame) -> KeptForecast:
    return forecast_at(fit_laws(table[table["budget_flops"] < 5e10], OPTIONS), BASE * 32, "rings", 1000.0)


def test_a_forecast_is_the_prediction_of_the_largest_budget(table: pd.DataFrame, kept: KeptForecast) -> None:
    """That a report makes of the same runs when the largest budget has come; at its nominal FLOPs."""
    grid = fit_laws(table, OPTIONS).grids["loss"]
    x_n, y_n, budgets_n = (grid.frontier[name].to_numpy(dtype=float, copy=True) for name in ("flops", "loss", "budget"))
    x_n[-1] = BASE * 32
    check = largest_budget_check(x_n, y_n, budgets_n, "loss", grid.noise)
    (value,) = [each for each in kept.values if each.target == "loss"]
    assert value.value == pytest.approx(check.predicted, rel=1e-9)
    assert value.ci95 == pytest.approx(check.ci95, rel=1e-9)
    assert {each.target for each in kept.values} == {"loss", "loss_last_scale", "error", "error_last_scale"}
    assert kept.extrapolation == pytest.approx(2, rel=0.01)


def test_outcomes_are_those_of_the_budgets_best_run(table: pd.DataFrame, kept: KeptForecast) -> None:
    found = {each.value.target: each for each in outcomes(kept, table, {})}
    largest = table[table["budget_flops"] == BASE * 32]
    loss = found["loss"]
    assert loss.observed == largest["loss"].min()
    assert loss.runs == len(largest) == 4
    assert loss.inside == (loss.value.ci95[0] <= loss.observed <= loss.value.ci95[1])
    assert loss.error_percent == pytest.approx(100 * (largest["loss"].min() / loss.value.value - 1))
    assert loss.value.seed_noise is not None
    assert loss.seed_deviations == pytest.approx(loss.error_percent / 100 / loss.value.seed_noise)
    assert outcomes(kept, table[table["budget_flops"] < 5e10], {}) == []


def test_the_track_record_counts_hits_and_misses_and_no_forecast_after_its_run(
    table: pd.DataFrame, kept: KeptForecast
) -> None:
    is_largest = table["budget_flops"] == BASE * 32
    exact = table.copy()
    for value in kept.values:
        exact.loc[is_largest, value.target] = value.value
    missed = exact.assign(loss=np.where(is_largest, 0.5 * exact["loss"], exact["loss"]))
    ended = dict.fromkeys(table["run"], 2000.0)
    record = track_record([(kept, outcomes(kept, frame, ended)) for frame in (exact, missed)])
    assert record.hits() == (7, 8)
    assert [each.value.target for each in record.counted if not each.inside] == ["loss"]
    assert record.waiting == ()
    late = outcomes(replace(kept, made=3000.0), table, ended)
    assert all(each.early for each in late)
    assert track_record([(kept, late)]).hits() == (0, 0)
    assert track_record([(kept, [])]).waiting == (kept,)


def test_a_file_reads_back_and_can_not_be_changed(kept: KeptForecast) -> None:
    text = kept.as_text()
    assert read_forecast(text, "f.json").kept == kept
    assert len(text) < 2500
    for change in ({"made": 1.0}, {"flops": 2e30}, {"study": "other"}, {"signature": "0" * 64}):
        with pytest.raises(TableError, match=r"f\.json: changed after it was made"):
            read_forecast(json.dumps({**json.loads(text), **change}), "f.json")
    values = json.loads(text)["values"]
    values[0]["ci95"][1] *= 2
    with pytest.raises(TableError, match="changed"):
        read_forecast(json.dumps({**json.loads(text), "values": values}), "f.json")


def test_a_forecast_of_an_earlier_version_counts(kept: KeptForecast) -> None:
    """Which had nothing of how rows are read, nor of the forecast before it."""
    content = json.loads(kept.as_text())
    early = {name: content[name] for name in ("study", "made", "flops", "extrapolation", "law", "table", "version")}
    early["values"] = [{key: each[key] for key in each if key != "settings"} for each in content["values"]]
    signature = hashlib.sha256(json.dumps(early, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    text = json.dumps({"schema": 1, **early, "signature": signature})
    assert read_forecast(text, "f.json").kept == kept


@pytest.mark.parametrize(
    "change",
    [{"study": 5}, {"flops": "much"}, {"flops": 0}, {"made": None}, {"values": [{"target": "loss", "value": "1"}]}],
)
def test_signed_content_that_makes_no_forecast(kept: KeptForecast, change: dict[str, Any]) -> None:
    """Anybody can sign a file, so its signature says nothing about what is in it."""
    content = {**json.loads(kept.as_text()), **change}
    signed = {name: value for name, value in content.items() if name not in ("schema", "signature")}
    text = json.dumps(signed, sort_keys=True, separators=(",", ":"))
    with pytest.raises(TableError, match=r"f\.json: no forecast") as refused:
        read_forecast(json.dumps({**content, "signature": hashlib.sha256(text.encode()).hexdigest()}), "f.json")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2, "signature": ""}', "null", '{"signature": 1}'])
def test_what_is_no_forecast(text: str) -> None:
    with pytest.raises(TableError, match=r"f\.json: no forecast"):
        read_forecast(text, "f.json")


def test_a_forecast_after_its_run_is_refused(table: pd.DataFrame) -> None:
    result = fit_laws(table, OPTIONS)
    with pytest.raises(TableError, match="4 runs of that budget are there already"):
        forecast_at(result, BASE * 32, "rings", 0.0)
    for flops in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(TableError, match="expected training FLOPs above 0"):
            forecast_at(result, flops, "rings", 0.0)


def test_what_can_not_be_forecast() -> None:
    curve = pd.DataFrame({"flops": [1e18, 2e18, 4e18, 8e18], "loss": [3.0, 2.8, 2.7, 2.65]})
    with pytest.raises(TableError, match="nothing can be forecast: no two sizes share budgets"):
        forecast_at(fit_laws(curve, OPTIONS), 1e20, "runs.csv", 0.0)
    few = sweep_table(budgets=2)
    with pytest.raises(TableError, match="needs three or more points"):
        forecast_at(fit_laws(few, OPTIONS), 1e20, "rings", 0.0)


def test_later_rows_are_read_as_those_of_the_forecast() -> None:
    """Columns, units, numbers in words and conditions; what a fit would leave out doesn't count."""
    table = sweep_table(budgets=6)
    own = pd.DataFrame(
        {
            "size": (table["params_total"] / 1e3).map("{:.4f}k".format),
            "PF": (table["train_flops"] / 1e15).map("{:.9f}".format),
            "nats": table["loss"],
            "error": (100 * table["error"]).map("{:.4f}%".format),
            "kind": "text",
        }
    )
    is_later = table["budget_flops"] == BASE * 32
    options = replace(OPTIONS, params="size", flops="PF", loss="nats", target=("nats", "error"), units=("flops=PFLOP",))
    options = replace(options, where=("kind == 'text'",))
    made = forecast_at(fit_laws(own[~is_later], options), BASE * 32, "own.csv", 0.0)
    better = own[is_later].assign(kind="code", nats=0.5 * own["nats"])
    later = pd.concat([own[is_later], better], ignore_index=True).drop(columns="size")
    found = {each.value.target: each for each in outcomes(made, later, {})}
    assert found["nats"].observed == table.loc[is_later, "loss"].min()
    assert found["error"].observed == pytest.approx(table.loc[is_later, "error"].min(), rel=1e-5)
    assert found["nats"].runs == is_later.sum()
    renamed = later.rename(columns={"nats": "val_loss", "PF": "C"})
    with pytest.raises(TableError, match="no column 'PF'"):
        outcomes(made, renamed.drop(columns="error"), {})
    again = outcomes(made, renamed, {}, read_again(made.read, ReadBy(flops="C", loss="val_loss")))
    assert [each.observed for each in again] == [each.observed for each in found.values()]
    with pytest.raises(
        TableError, match=r"no rows are left \(4 rows: where kind == 'text'; 4 rows: where error < 0.1\)"
    ):
        outcomes(made, later, {}, read_again(made.read, ReadBy(where=("error < 0.1",))))


def test_variants_and_unfinished_runs_are_no_outcome(table: pd.DataFrame, kept: KeptForecast) -> None:
    is_later = table["budget_flops"] == BASE * 32
    others = [table[is_later].assign(loss=0.1, **change) for change in ({"variant": "lr"}, {"status": "diverged"})]
    (loss, *_) = outcomes(kept, pd.concat([table, *others], ignore_index=True), {})
    assert loss.observed == table.loc[is_later, "loss"].min()


def test_a_measure_taken_otherwise_is_no_outcome(table: pd.DataFrame) -> None:
    """FID of fewer images is higher, whatever the model."""
    measured = table.assign(fid=8 * table["loss"], evaluation_samples=5000)
    is_later = measured["budget_flops"] == BASE * 32
    made = forecast_at(fit_laws(measured[~is_later], OPTIONS), BASE * 32, "rings", 0.0)
    for samples, targets in ((5000, {"loss", "fid"}), (1000, {"loss"})):
        later = measured[is_later].assign(evaluation_samples=samples)
        found = outcomes(made, later, {})
        assert {each.value.target for each in found} & {"loss", "fid"} == targets
    assert "fid" in track_record([(made, found)]).unseen[0][1]


def test_conditions_hide_no_run_of_the_budget(table: pd.DataFrame) -> None:
    options = replace(OPTIONS, where=("budget_flops < 5e10",))
    with pytest.raises(TableError, match="4 runs of that budget are there already"):
        forecast_at(fit_laws(table, options), BASE * 32, "rings", 0.0, prepare(table, OPTIONS))


def test_what_rises_is_not_forecast(table: pd.DataFrame) -> None:
    rising = table.assign(accuracy=1 - table["error"])
    with pytest.raises(TableError, match="accuracy: it rises with compute"):
        forecast_at(fit_laws(rising, replace(OPTIONS, loss="accuracy")), BASE * 64, "rings", 0.0)
