"""What was measured of cells' images, in MLflow: several evaluations of one cell stand beside each other."""

import os
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pandas
import pytest
from fake_runs import START, finished_cell, finished_tokenizer, study_cell, write_study

from varscale.evaluation.plan import EVALUATOR
from varscale.evaluation.stored import StoredEvaluations
from varscale.store.layout import RunFiles, RunKey, Store
from varscale.store.records import Result, RunIdentity, read_result
from varscale.tracking import deliver_all, runs_table

SETTINGS = {
    **{"evaluator": EVALUATOR, "extractor": "rings-classifier:0123", "reference_set": "train-200-ab", "samples": 120},
    **{"guidance": 0.0, "top_k": 0, "top_p": 0.0, "sampling_seed": 0},
}


def write_evaluation(
    store: Store, subject: str, of: RunFiles | None, number: int, row: Any, **changes: Any
) -> RunFiles:
    """An evaluation as a job leaves it."""
    how = {**SETTINGS, **changes}
    files = store.run(RunKey("evaluations", f"{subject}-g{how['guidance']:g}", f"{number:016d}"))
    fingerprint = of.fingerprint if of else ""
    params = {"subject": subject, "of": fingerprint, "floor": f"validation-{how['samples']}-cd", **how}
    RunIdentity(name=subject, role="evaluation", params=params).write(files.identity)
    result = Result(fingerprint=files.fingerprint, status="finished", time=START + 100 + number, row=row)
    result.write(files.result)
    return files


def evaluated(store: Store, cell: RunFiles, number: int, fid: float, **changes: Any) -> RunFiles:
    row = {"fid": fid, "fid_low": fid - 1, "mind": 10 * fid, "fingerprint": cell.fingerprint, **SETTINGS, **changes}
    return write_evaluation(store, "cell", cell, number, row, **changes)


def metrics_of(store: Store, cell: RunFiles) -> dict[str, list[float]]:
    client = mlflow.MlflowClient(store.tracking_uri)
    (run,) = client.search_runs(["1"], f"tags.fingerprint = '{cell.fingerprint}'")
    names = [name for name in run.data.metrics if name.startswith(("fid", "mind", "rfid"))]
    return {name: [each.value for each in client.get_metric_history(run.info.run_id, name)] for name in names}


@pytest.fixture
def cells(store: Store) -> list[RunFiles]:
    """Two cells with floors, the first one measured by the study's own settings and in two other ways."""
    finished_tokenizer(store)
    made = [finished_cell(store, 12, budget) for budget in (1e12, 2e12)]
    for cell in made:
        result = read_result(cell)
        assert result is not None
        result.model_copy(update={"row": {**result.row, "tokenizer_fingerprint": "tokens01"}}).write(cell.result)
    tokenizer = RunFiles(store.runs / "tokenizers" / "rings-tokens01")
    write_evaluation(store, "real", None, 1, {"fid_floor": 0.5})
    write_evaluation(store, "reconstructed", tokenizer, 2, {"rfid": 0.7, "tokenizer_fingerprint": "tokens01"})
    own = evaluated(store, made[0], 3, 30.0, guidance=2.0)
    evaluated(store, made[0], 4, 20.0)
    evaluated(store, made[0], 5, 10.0, samples=5000, guidance=3.0)
    seen = study_cell(made[0], experiment="rings").model_copy(update={"evaluations": (own.folder.name,)})
    write_study(store, "rings", [seen, made[1]])
    return made


def table_of(store: Store) -> pandas.DataFrame:
    return runs_table(store.tracking_uri, "rings")


def test_several_evaluations_of_a_cell_stand_beside_each_other(store: Store, cells: list[RunFiles]) -> None:
    assert deliver_all(store, store.tracking_uri).problem == ""
    found = metrics_of(store, cells[0])
    assert found == {
        **{"fid": [30.0], "fid_low": [29.0], "mind": [300.0], "fid_floor": [0.5], "rfid": [0.7]},
        **{"fid_guidance_0": [20.0], "fid_low_guidance_0": [19.0], "mind_guidance_0": [200.0]},
        **{"fid_floor_guidance_0": [0.5], "rfid_guidance_0": [0.7]},
        **{f"{name}_samples_5000_guidance_3": [value] for name, value in (("fid", 10.0), ("fid_low", 9.0))},
        "mind_samples_5000_guidance_3": [100.0],
    }
    assert metrics_of(store, cells[1]) == {}


def test_the_table_has_a_row_for_each(store: Store, cells: list[RunFiles]) -> None:
    deliver_all(store, store.tracking_uri)
    table = table_of(store)
    assert table.attrs == {"missing": (), "others": 0}
    ours = table[table["fingerprint"] == cells[0].fingerprint]
    stored, result = StoredEvaluations(store), read_result(cells[0])
    assert result is not None
    own = "cell-g2-0000000000000003"
    rows = stored.rows(result, [own])
    assert [row["guidance"] for row in rows] == [2.0, 0.0, 3.0]
    for column in ("fid", "guidance", "samples", "fid_floor", "rfid"):
        expected = pandas.Series([row.get(column) for row in rows], dtype=float)
        pandas.testing.assert_series_equal(ours[column].astype(float), expected, check_names=False, check_index=False)
    assert ours["loss"].nunique() == 1
    (other,) = table[table["fingerprint"] != cells[0].fingerprint].to_dict("records")
    assert pandas.isna(other["fid"])


def test_one_that_is_added_later_is_delivered_and_nothing_twice(store: Store, cells: list[RunFiles]) -> None:
    deliver_all(store, store.tracking_uri)
    before = metrics_of(store, cells[0])
    deliver_all(store, store.tracking_uri)
    assert metrics_of(store, cells[0]) == before
    evaluated(store, cells[0], 6, 25.0, guidance=1.5)
    evaluated(store, cells[1], 7, 5.0)
    deliver_all(store, store.tracking_uri)
    after = metrics_of(store, cells[0])
    assert {name: values[-1] for name, values in after.items() if name in before} == {
        name: values[-1] for name, values in before.items()
    }
    assert after["fid_guidance_1.5"] == [25.0]
    assert metrics_of(store, cells[1])["fid"] == [5.0]
    assert sorted(table_of(store)["fid"]) == [5.0, 10.0, 20.0, 25.0, 30.0]


def test_one_that_is_gone_or_torn_is_taken_back(store: Store, cells: list[RunFiles]) -> None:
    deliver_all(store, store.tracking_uri)
    shutil.rmtree(store.runs / "evaluations" / "cell-g0-0000000000000004")
    torn = store.runs / "evaluations" / "cell-g3-0000000000000005" / "result.json"
    torn.write_text(torn.read_text()[:-30])
    os.utime(torn, (START, START))
    deliver_all(store, store.tracking_uri)
    assert list(table_of(store)["fid"].dropna()) == [30.0]


def test_a_new_database_gets_the_same(
    store: Store, cells: list[RunFiles], empty_database: Path, tmp_path: Path
) -> None:
    deliver_all(store, store.tracking_uri)
    shutil.copy(empty_database, tmp_path / "other.db")
    other = f"sqlite:///{tmp_path / 'other.db'}"
    assert deliver_all(store, other).problem == ""
    order = ["run", "guidance"]  # MLflow has none for runs that were made within a millisecond
    there, here = (
        table.sort_values(order, ignore_index=True) for table in (runs_table(other, "rings"), table_of(store))
    )
    pandas.testing.assert_frame_equal(there, here)
