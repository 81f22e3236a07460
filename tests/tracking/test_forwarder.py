import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy
import pandas
import pytest
from fake_runs import START, append_points, finished_cell, unfinished_trunk, write_identity, write_result

from varscale.errors import TrackingError
from varscale.store.layout import ExperimentFiles, RunFiles, read_json, write_json
from varscale.tracking import Forwarder, check_tracking_uri, deliver_all, runs_table
from varscale.tracking.records import read_record

BUDGETS = (1e12, 2e12)


def snapshot(tracking_uri: str) -> dict[str, Any]:
    """Everything in a store, without the ids that MLflow draws: {run: (facts, {metric: [(time, step, value)]})}."""
    client = mlflow.MlflowClient(tracking_uri)
    experiments = client.search_experiments()
    runs = client.search_runs([experiment.experiment_id for experiment in experiments])
    keys = {run.info.run_id: run.data.tags["varscale.run"] for run in runs}
    assert len(set(keys.values())) == len(runs), "a run is there twice"
    content = {}
    for run in runs:
        tags = dict(run.data.tags)
        for tag in ("mlflow.parentRunId", "reused_runs"):
            if tag in tags:
                tags[tag] = ",".join(keys[run_id] for run_id in tags[tag].split(","))
        histories = {
            name: [(m.timestamp, m.step, repr(m.value)) for m in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }
        facts = (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time, run.data.params, tags)
        artifacts = sorted(item.path for item in client.list_artifacts(run.info.run_id))
        content[keys[run.info.run_id]] = (facts, histories, artifacts)
    return content


def small_sweep(files: ExperimentFiles) -> tuple[Forwarder, Path, list[Path]]:
    folders = [unfinished_trunk(files, 12), *(finished_cell(files, 12, budget) for budget in BUDGETS)]
    forwarder = Forwarder(files.tracking_uri, files)
    sweep = forwarder.sweep("first", "rings · depth 12", {"depths": "12"}, folders)
    return forwarder, sweep, folders


def test_a_sweep_is_delivered_as_its_files_have_it(files: ExperimentFiles) -> None:
    forwarder, sweep, (trunk, cell, _) = small_sweep(files)
    figure = files.laws / "loss.png"
    figure.parent.mkdir()
    figure.write_bytes(b"figure")
    forwarder.attach(sweep, [figure])
    assert forwarder.deliver()
    content = snapshot(files.tracking_uri)
    assert len(content) == 4

    (name, status, start, end, params, tags), histories, artifacts = content[f"rings/cells/{cell.name}"]
    assert (name, status, start) == ("d12 · 1e12 FLOPs · seed 0", "FINISHED", START * 1000)
    assert end == round((START + 20.5) * 1000)
    assert float(params["budget_flops"]) == 1e12
    assert tags["mlflow.parentRunId"] == "rings/sweeps/first.sweep.json"
    assert (tags["role"], tags["status"], tags["sweep"]) == ("cell", "finished", "rings · depth 12")
    assert artifacts == ["samples.png"]
    lines = [json.loads(text) for text in (cell / "metrics.jsonl").read_text().splitlines()]
    for metric in ("train_loss", "lr"):
        expected = [(round(line["time"] * 1000), line["images"], repr(line["metrics"][metric])) for line in lines]
        assert histories[metric] == expected
    result = read_json(cell / "result.json") or {}
    assert histories["loss"] == [(end, 640, repr(result["metrics"]["loss"]))]

    assert content["rings/sweeps/first.sweep.json"][0][:2] == ("rings · depth 12", "RUNNING")
    assert content["rings/sweeps/first.sweep.json"][2] == ["laws"]
    assert content[f"rings/trunks/{trunk.name}"][0][1] == "RUNNING"
    forwarder.finish(sweep)
    assert forwarder.deliver()
    statuses = {facts[1] for facts, _, _ in snapshot(files.tracking_uri).values()}
    assert statuses == {"FINISHED"}


def test_curves_grow_and_nothing_is_doubled(files: ExperimentFiles) -> None:
    trunk = RunFiles(unfinished_trunk(files, 4, points=3))
    forwarder = Forwarder(files.tracking_uri, files)
    forwarder.watch(trunk.folder)
    for first in (3, 6, 9):
        assert forwarder.deliver()
        append_points(trunk, first, 3)
    (trunk.folder / "mlflow.json").unlink()
    assert Forwarder(files.tracking_uri, files).deliver()  # watches nothing
    assert deliver_all(files.runs, files.tracking_uri).pending == 0
    [(_, histories, _)] = snapshot(files.tracking_uri).values()
    assert [step for _, step, _ in histories["train_loss"]] == [32 * (index + 1) for index in range(12)]


def test_more_points_than_one_call_holds(files: ExperimentFiles) -> None:
    unfinished_trunk(files, 4, points=1234)
    state = deliver_all(files.runs, files.tracking_uri)
    assert (state.pending, state.problem) == (0, "")
    [(_, histories, _)] = snapshot(files.tracking_uri).values()
    assert len(histories["train_loss"]) == 1234


def test_killed_between_call_and_state(tmp_path: Path, empty_database: Path) -> None:
    """SIGKILL right after MLflow took something and before that is written down; the next delivery mends it."""
    moments = ("create", "log_points", "upload", "set_status")
    for moment in (*moments, "never"):
        files = ExperimentFiles(tmp_path / moment, "rings")
        small_sweep(files)
        append_points(RunFiles(next(files.root.glob("trunks/*"))), 30, 500)
        record = next(files.root.glob("sweeps/*.sweep.json"))
        write_json(record, {**(read_json(record) or {}), "created": START})
        shutil.copy(empty_database, files.runs / "mlflow.db")
    program = textwrap.dedent(
        f"""
        import os, signal
        from pathlib import Path
        import mlflow
        from varscale.tracking import deliver_all
        from varscale.tracking.store import Store

        def deliver_until(moment):
            original, calls = getattr(Store, moment), []
            def killed(self, *args):
                result = original(self, *args)
                calls.append(1)
                if len(calls) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result
            setattr(Store, moment, killed)
            runs = Path({str(tmp_path)!r}) / moment
            deliver_all(runs, f"sqlite:///{{runs / 'mlflow.db'}}")
            os._exit(0)

        for moment in {moments!r}:
            if os.fork() == 0:
                deliver_until(moment)
            assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL
        """
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
    contents = []
    for moment in (*moments, "never"):
        uri = f"sqlite:///{tmp_path / moment / 'mlflow.db'}"
        before = 0 if moment == "never" else len(snapshot(uri))
        assert before > 0 or moment == "never"
        state = deliver_all(tmp_path / moment, uri)
        assert (state.pending, state.problem) == (0, "")
        contents.append(snapshot(uri))
    assert all(content == contents[-1] for content in contents)
    assert len(contents[-1]) == 4


def test_a_deleted_database_is_rebuilt_the_same(files: ExperimentFiles, empty_database: Path) -> None:
    forwarder, sweep, folders = small_sweep(files)
    forwarder.finish(sweep)
    forwarder.deliver()
    cells = [*folders, finished_cell(files, 16, 1e12)]
    forwarder.finish(forwarder.sweep("second", "rings · depths 12, 16", {"depths": "12,16"}, cells))
    forwarder.deliver()
    before = snapshot(files.tracking_uri)
    shutil.copy(empty_database, files.runs / "mlflow.db")
    assert deliver_all(files.runs, files.tracking_uri).problem == ""
    assert snapshot(files.tracking_uri) == before


def test_a_later_sweep_lists_what_it_reuses(files: ExperimentFiles) -> None:
    _, _, folders = small_sweep(files)  # never delivered by its own forwarder
    other = ExperimentFiles(files.runs, "study")
    new = finished_cell(other, 16, 1e12)
    forwarder = Forwarder(files.tracking_uri, other)
    forwarder.sweep("later", "study", {}, [*folders, new])
    assert forwarder.deliver()
    content = snapshot(files.tracking_uri)
    tags = content["study/sweeps/later.sweep.json"][0][5]
    assert tags["reused_runs"].split(",") == [f"rings/{folder.parent.name}/{folder.name}" for folder in folders]
    parents = {key: facts[5].get("mlflow.parentRunId") for key, (facts, _, _) in content.items()}
    assert parents[f"rings/cells/{folders[1].name}"] == "rings/sweeps/first.sweep.json"
    assert parents[f"study/cells/{new.name}"] == "study/sweeps/later.sweep.json"
    assert len(content) == 6
    assert sorted(runs_table(files.tracking_uri, "study")["depth"]) == [12, 12, 16]


def test_a_sweep_lists_what_it_took_from_single_runs_of_another_experiment(files: ExperimentFiles) -> None:
    """No sweep of theirs owns them; a parent in another experiment would hide them in both."""
    single = finished_cell(files, 12, 1e12)
    other = ExperimentFiles(files.runs, "study")
    forwarder = Forwarder(files.tracking_uri, other)
    forwarder.sweep("later", "study", {}, [single, finished_cell(other, 16, 1e12)])
    assert forwarder.deliver()
    content = snapshot(files.tracking_uri)
    assert content["study/sweeps/later.sweep.json"][0][5]["reused_runs"] == f"rings/cells/{single.name}"
    assert "mlflow.parentRunId" not in content[f"rings/cells/{single.name}"][0][5]
    assert sorted(runs_table(files.tracking_uri, "study")["depth"]) == [12, 16]


def test_an_experiment_deleted_in_mlflow_does_not_hold_up_others(files: ExperimentFiles) -> None:
    """Its runs that were not delivered yet can't be."""
    _, _, folders = small_sweep(files)
    client = mlflow.MlflowClient(files.tracking_uri)
    client.delete_experiment(client.create_experiment("rings"))
    other = ExperimentFiles(files.runs, "study")
    new = finished_cell(other, 16, 1e12)
    lines: list[str] = []
    forwarder = Forwarder(files.tracking_uri, other, lines.append)
    forwarder.sweep("later", "study", {}, [*folders, new])
    forwarder.deliver()
    assert list(runs_table(files.tracking_uri, "study")["depth"]) == [16]
    assert any("the experiment 'rings' was deleted in MLflow" in line for line in lines)


def test_the_table_has_the_numbers_of_the_files(files: ExperimentFiles) -> None:
    forwarder, _, folders = small_sweep(files)
    print_ = "diverged"
    run = files.cell("d20-c1.0e+12-s0", print_)
    write_identity(run, "d20", "cell", print_, depth=20, budget_flops=1e12, compiled=True, lr=3e-3 / 7)
    append_points(run, 0, 2)
    write_result(run, print_, START + 3, status="diverged", loss=float("nan"), train_flops=1.5e11)
    forwarder.sweep("first", "rings · depth 12", {}, [*folders, run.folder])
    deliver_all(files.runs, files.tracking_uri)
    table = runs_table(files.tracking_uri, "rings").set_index("run")
    assert list(table["status"].sort_values()) == ["diverged", "finished", "finished"]
    cell = read_json(next(files.root.glob("cells/d12-c1*")) / "result.json") or {}
    row = table.loc["d12 · 1e12 FLOPs · seed 0"]
    for column in ("loss", "error", "loss_scale_1", "loss_scale_2", "train_flops", "params_total"):
        assert row[column] == cell["metrics"][column]
    assert row["budget_flops"] == 1e12
    assert row["lr"] == 3e-3 / 7  # the parameter, not the last point of the curve of that name
    assert numpy.isnan(table.loc["d20", "loss"])
    assert pandas.api.types.is_integer_dtype(table["depth"])
    assert "train_loss" not in table
    assert snapshot(files.tracking_uri)[f"rings/cells/{run.folder.name}"][0][1] == "FAILED"


def test_the_table_equals_the_rows_of_the_results(files: ExperimentFiles) -> None:
    rows = []
    for seed, budget in enumerate(BUDGETS):
        run = RunFiles(finished_cell(files, 12, budget, seed=seed))
        identity, result = read_json(run.identity) or {}, read_json(run.result) or {}
        row = {
            **{"run": f"d12-s{seed}", "experiment": "rings", "family": "var", "depth": 12, "width": 24, "seed": seed},
            **{"variant": "", "budget_flops": budget, "train_flops": budget * 0.999, "images_seen": 640 + seed},
            **{"lr": 3e-3 / 7, "loss": 3.1 + seed / 3, "loss_scale_1": 4.0, "loss_scale_2": 2.0 / 3},
            **{"tokenizer": "1e12345678901234", "fingerprint": result["fingerprint"], "status": "finished"},
            **{"wall_seconds": 12.5, "precision": "float32", "compiled": False, "threads": 1},
        }
        metrics = {key: value for key, value in row.items() if isinstance(value, int | float)}
        write_json(run.identity, {**identity, "params": {key: row[key] for key in list(row)[1:11]}})
        write_json(run.result, {**result, "metrics": metrics, "row": row})
        rows.append(row)
    deliver_all(files.runs, files.tracking_uri)
    table = runs_table(files.tracking_uri, "rings").sort_values("run", ignore_index=True)
    pandas.testing.assert_frame_equal(table, pandas.DataFrame(rows), check_exact=True, check_like=True)
    [metrics, *_] = [histories for _, histories, _ in snapshot(files.tracking_uri).values()]
    assert "train_flops" in metrics
    assert "depth" not in metrics  # a parameter; metrics stay few


def test_an_experiments_folder_may_be_a_link(files: ExperimentFiles, tmp_path: Path) -> None:
    """To another disk."""
    (tmp_path / "disk").mkdir()
    files.root.symlink_to(tmp_path / "disk")
    forwarder, sweep, _ = small_sweep(files)
    forwarder.finish(sweep)
    assert forwarder.deliver()
    assert len(runs_table(files.tracking_uri, "rings")) == len(BUDGETS)


def test_the_table_is_of_the_latest_recipe(files: ExperimentFiles) -> None:
    """Of all its sweeps, with cells that they took from others; sweeps of one name are told apart."""
    budgets = (1e12, 2e12, 4e12)
    first, second, third = (finished_cell(files, 12, budget) for budget in budgets)
    forwarder = Forwarder(files.tracking_uri, files)
    for key, recipe, folders in (("a1", "one", [first]), ("b2", "two", [second]), ("c3", "one", [third, second])):
        sweep = forwarder.sweep(key, "rings · depth 12", {"recipe": recipe}, folders)
        forwarder.finish(sweep)
        assert forwarder.deliver()
    table = runs_table(files.tracking_uri, "rings")
    assert sorted(table["budget_flops"]) == list(budgets)
    forwarder.sweep("b2", "rings · depth 12", {"recipe": "two"}, [second])
    forwarder.finish(files.sweep("b2"))
    assert forwarder.deliver()
    assert list(runs_table(files.tracking_uri, "rings")["budget_flops"]) == [2e12]
    names = [record.name for path in files.sweep_records() if (record := read_record(path))]
    assert names == ["rings · depth 12", "rings · depth 12 · b2", "rings · depth 12 · c3"]


def test_a_store_that_does_not_answer_is_named() -> None:
    uri = "http://127.0.0.1:9"
    with pytest.raises(TrackingError, match=f"MLflow at {uri}: "):
        runs_table(uri, "rings")


def test_an_unknown_experiment_is_named(files: ExperimentFiles) -> None:
    with pytest.raises(TrackingError, match="no finished cell of an experiment 'absent'"):
        runs_table(files.tracking_uri, "absent")


def test_a_run_deleted_in_mlflow_stays_deleted(files: ExperimentFiles) -> None:
    forwarder, _, folders = small_sweep(files)
    assert forwarder.deliver()
    state = read_json(folders[1] / "mlflow.json") or {}
    client = mlflow.MlflowClient(files.tracking_uri)
    client.delete_run(state["stores"][files.tracking_uri]["run_id"])
    append_points(RunFiles(folders[1]), 20, 5)
    assert deliver_all(files.runs, files.tracking_uri).problem == ""
    assert len(snapshot(files.tracking_uri)) == 3


def test_a_run_that_mlflow_refuses_does_not_hold_up_the_others(files: ExperimentFiles) -> None:
    bad = files.cell("a-bad-one", "x")
    write_identity(bad, "bad", "cell", "x", **{"name with = and 💥": 1})
    append_points(bad, 0, 3)
    _, _, folders = small_sweep(files)
    lines: list[str] = []
    state = deliver_all(files.runs, files.tracking_uri, notify=lines.append)
    assert f"rings/cells/{folders[1].name}" in snapshot(files.tracking_uri)
    assert "name with =" in state.problem
    assert len(lines) == 1


def test_the_thread_delivers_while_a_run_writes(files: ExperimentFiles) -> None:
    trunk = RunFiles(unfinished_trunk(files, 4, points=1))
    forwarder = Forwarder(files.tracking_uri, files)
    forwarder.watch(trunk.folder)
    forwarder.start(interval_seconds=0.05)
    for index in range(1, 20):
        append_points(trunk, index, 1)
        time.sleep(0.02)
    assert forwarder.stop(seconds=30) == 0
    [(_, histories, _)] = snapshot(files.tracking_uri).values()
    assert len(histories["train_loss"]) == 20


def test_a_database_that_can_not_be_opened_costs_one_line(tmp_path: Path) -> None:
    files = ExperimentFiles(tmp_path, "rings")
    unfinished_trunk(files, 4)
    lines: list[str] = []
    (tmp_path / "broken.db").write_bytes(b"not a database, but long enough to be read as one" * 100)
    forwarder = Forwarder(f"sqlite:///{tmp_path / 'broken.db'}", files, lines.append)
    forwarder.watch(next(files.root.glob("trunks/*")))
    assert not forwarder.deliver()
    assert forwarder.state.pending == 60
    assert forwarder.stop(seconds=5) == 60
    assert len(lines) == 2
    assert "not a database" in lines[0]
    assert "60 points not delivered" in lines[1]


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "./mlruns", "sqlite://", "http://", "ftp://host"])
def test_uris_that_can_not_work(uri: str) -> None:
    with pytest.raises(TrackingError, match="use sqlite:///"):
        check_tracking_uri(uri)


def test_importing_tracking_imports_no_mlflow() -> None:
    program = "import varscale.tracking, sys, os; print([m for m in ('mlflow', 'torch', 'pandas') if m in sys.modules])"
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": ""}
    root = Path(__file__).parents[2]
    shown = subprocess.run(
        [sys.executable, "-c", program + "; print(os.environ['MLFLOW_DISABLE_TELEMETRY'])"],
        capture_output=True, text=True, check=True, cwd=root, env=environment,
    )  # fmt: skip
    assert shown.stdout.split() == ["[]", "true"]


def test_records_survive_being_read_back(files: ExperimentFiles) -> None:
    forwarder, sweep, folders = small_sweep(files)
    forwarder.attach(sweep, [files.laws / "a.png"])
    again = forwarder.sweep("first", "rings · depth 12", {"depths": "12"}, [folders[0]])
    content = read_json(again) or {}
    assert again == sweep
    assert len(content["runs"]) == 3
    assert content["attachments"] == [str((files.laws / "a.png").resolve())]
    write_json(sweep, {"something": "else"})
    assert deliver_all(files.runs, files.tracking_uri).problem == ""
