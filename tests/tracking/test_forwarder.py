"""What is delivered to MLflow: all of it, once, whatever interrupts."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import filelock
import mlflow
import pytest
from fake_runs import (
    BUDGETS,
    START,
    append_points,
    begun_run,
    end_study,
    finished_cell,
    small_study,
    study_cell,
    unfinished_trunk,
    write_study,
)
from mlflow_stores import snapshot

from varscale.store.layout import Store
from varscale.store.records import read_result
from varscale.tracking import Forwarder, deliver_all, runs_table


def test_a_study_is_delivered_as_its_files_have_it(store: Store) -> None:
    forwarder, trunk, (cell, other) = small_study(store)
    laws = store.study("rings").laws
    laws.mkdir()
    for name in ("loss.png", "loss.svg", "laws.json", "report.html", "runs.csv", "fitted.json", "notes.txt"):
        (laws / name).write_bytes(b"content")
    (laws / "secret.png").symlink_to(Path(__file__))
    assert forwarder.deliver()
    content = snapshot(store.tracking_uri)
    assert len(content) == 5

    (name, status, start, end, params, tags), histories, artifacts = content[f"rings/cells/{cell.folder.name}"]
    assert (name, status, start) == ("d12 · 1e12 FLOPs · seed 0", "FINISHED", START * 1000)
    assert end == round((START + 20.5) * 1000)
    assert float(params["budget_flops"]) == 1e12
    assert params["lr"] == repr(3e-3 / 7)
    assert (tags["mlflow.parentRunId"], tags["recipe"]) == ("rings/study", "one")
    assert (tags["role"], tags["status"], tags["fingerprint"]) == ("cell", "finished", cell.fingerprint)
    assert (tags["threads"], tags["device"], tags["precision"]) == ("1", "cpu", "float32")
    assert artifacts == ["samples.png"]
    assert histories.keys() == {
        *("train_loss", "lr", "loss", "error", "loss_scale_1", "loss_scale_2", "params_total", "images_seen"),
        *("train_flops", "images_per_second", "model_flops_utilisation"),
    }
    lines = [json.loads(text) for text in cell.metrics.read_text().splitlines()]
    for metric in ("train_loss", "lr"):
        expected = [(round(line["time"] * 1000), line["images"], repr(line["metrics"][metric])) for line in lines]
        assert histories[metric] == expected
    result = read_result(cell)
    assert result is not None
    assert histories["loss"] == [(end, 640, repr(result.metrics["loss"]))]

    (name, status, start, end, _, tags), _, artifacts = content["rings/study"]
    assert (name, status, start, end, artifacts) == ("rings", "RUNNING", START * 1000, None, ["laws"])
    shown = {key: tags[key] for key in ("role", "recipe", "cells", "depths", "tokenizer", "missing")}
    expected_tags = {"role": "study", "recipe": "one", "cells": "2", "depths": "12,16", "tokenizer": "rings-tokens01"}
    assert shown == {**expected_tags, "missing": ""}
    client = mlflow.MlflowClient(store.tracking_uri)
    [run] = client.search_runs(["1"], "tags.role = 'study'")
    files = {Path(item.path).name for item in client.list_artifacts(run.info.run_id, "laws")}
    assert files == {"loss.png", "loss.svg", "laws.json", "report.html", "runs.csv"}

    assert content["rings/tokenizers/rings-tokens01"][0][1] == "FINISHED"
    assert content[f"rings/trunks/{trunk.folder.name}"][0][1] == "RUNNING"
    end_study(store, "rings", [cell, other])
    assert forwarder.deliver()
    facts = [facts for facts, _, _ in snapshot(store.tracking_uri).values()]
    assert {fact[1] for fact in facts} == {"FINISHED"}
    assert max(fact[3] for fact in facts) == (START + 99) * 1000


def test_a_study_that_is_swept_again(store: Store) -> None:
    """It runs again, its artifacts are renewed, and its cells, labels and titles change."""
    forwarder, _, cells = small_study(store)
    laws = store.study("rings").laws
    laws.mkdir()
    (laws / "laws.json").write_text("old")
    end_study(store, "rings", cells, "KILLED")
    assert forwarder.deliver()
    key = "rings/study"
    assert snapshot(store.tracking_uri)[key][0][1] == "KILLED"
    (laws / "laws.json").write_text("renewed")
    new = begun_run(store, "cells", "d16-c1e12-s0", "new", "new")
    seen = study_cell(cells[0], title="another title", budget_flops=3e12)
    write_study(store, "rings", [seen, cells[1], new])
    assert forwarder.deliver()
    content = snapshot(store.tracking_uri)
    assert content[key][0][1] == "RUNNING"
    assert content[key][0][5]["missing"] == "d16 · 1e12 FLOPs · seed 0"
    assert content[f"rings/cells/{cells[0].folder.name}"][0][0] == "another title"
    table = runs_table(store.tracking_uri, "rings")
    assert sorted(table["budget_flops"]) == [2e12, 3e12]
    assert table.attrs == {"missing": ("d16 · 1e12 FLOPs · seed 0",), "others": 0}
    assert [path.read_text() for path in store.runs.glob("mlartifacts/rings/*/artifacts/laws/laws.json")] == ["renewed"]
    append_points(new, 0, 2)
    for path in store.study("rings").folder.glob("mlflow/*.json"):
        path.unlink()
    assert deliver_all(store, store.tracking_uri).problem == ""
    assert sorted(runs_table(store.tracking_uri, "rings")["budget_flops"]) == [2e12, 3e12]


def test_curves_grow_and_nothing_is_doubled(store: Store) -> None:
    cell = begun_run(store, "cells", "d4-c1e12-s0", "abc", "cell")
    append_points(cell, 0, 3)
    study = write_study(store, "rings", [cell])
    forwarder = Forwarder(store.tracking_uri, store, "rings")
    for first in (3, 6, 9):
        assert forwarder.deliver()
        append_points(cell, first, 3)
    study.delivery("cells", cell.folder.name).unlink()
    assert Forwarder(store.tracking_uri, store, "absent").deliver()
    assert deliver_all(store, store.tracking_uri).pending == 0
    histories = snapshot(store.tracking_uri)[f"rings/cells/{cell.folder.name}"][1]
    assert [step for _, step, _ in histories["train_loss"]] == [32 * (index + 1) for index in range(12)]


def test_more_points_than_one_call_holds(store: Store) -> None:
    cell = finished_cell(store, 4, 1e12, points=1234)
    write_study(store, "rings", [cell])
    state = deliver_all(store, store.tracking_uri)
    assert (state.pending, state.problem) == (0, "")
    histories = snapshot(store.tracking_uri)[f"rings/cells/{cell.folder.name}"][1]
    assert len(histories["train_loss"]) == 1234


def test_killed_between_call_and_state(tmp_path: Path, empty_database: Path) -> None:
    """SIGKILL right after MLflow took something and before that is written down; the next delivery mends it."""
    moments = ("create 2", "log 2", "log 3", "upload 2", "set_status 2")  # the third is in the middle of a curve
    for moment in (*moments, "never"):
        store = Store(tmp_path / moment)
        _, trunk, cells = small_study(store)
        append_points(trunk, 30, 500)
        end_study(store, "rings", cells)
        shutil.copy(empty_database, store.runs / "mlflow.db")
    program = textwrap.dedent(
        f"""
        import os, signal
        from pathlib import Path
        import mlflow
        from varscale.store.layout import Store
        from varscale.tracking import deliver_all
        from varscale.tracking.client import MLflowStore

        def deliver_until(moment):
            name, number = moment.split()
            original, calls = getattr(MLflowStore, name), []
            def killed(self, *args):
                result = original(self, *args)
                calls.append(1)
                if len(calls) == int(number):
                    os.kill(os.getpid(), signal.SIGKILL)
                return result
            setattr(MLflowStore, name, killed)
            store = Store(Path({str(tmp_path)!r}) / moment)
            deliver_all(store, store.tracking_uri)
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
        store = Store(tmp_path / moment)
        before = 0 if moment == "never" else len(snapshot(store.tracking_uri))
        assert before > 0 or moment == "never"
        state = deliver_all(store, store.tracking_uri)
        assert (state.pending, state.problem) == (0, "")
        contents.append(snapshot(store.tracking_uri))
    assert all(content == contents[-1] for content in contents)
    assert len(contents[-1]) == 5


def test_a_deleted_database_is_rebuilt_the_same(store: Store, empty_database: Path) -> None:
    forwarder, _, cells = small_study(store)
    forwarder.deliver()
    end_study(store, "rings", cells)
    write_study(store, "another", [*cells, finished_cell(store, 16, 1e12)], recipe="two")
    assert deliver_all(store, store.tracking_uri).problem == ""
    before = snapshot(store.tracking_uri)
    assert len(before) == 5 + 6
    shutil.copy(empty_database, store.runs / "mlflow.db")
    assert deliver_all(store, store.tracking_uri).problem == ""
    assert snapshot(store.tracking_uri) == before


def test_runs_of_two_studies_stand_in_both(store: Store) -> None:
    """Each with its study's labels, though MLflow knows the cell of the first study already."""
    forwarder, trunk, (cell, _) = small_study(store)
    assert forwarder.deliver()
    seen = study_cell(cell, title="in later", recipe="two", budget_flops=1.004e12, variant="wide", experiment="later")
    new = study_cell(finished_cell(store, 16, 1e12), recipe="two")
    write_study(store, "later", [seen, new], recipe="two", status="KILLED", ended=START + 50)
    assert deliver_all(store, store.tracking_uri).problem == ""
    content = snapshot(store.tracking_uri)
    assert len(content) == 5 + 5
    for study, title, budget, variant, recipe in (
        ("rings", "d12 · 1e12 FLOPs · seed 0", 1e12, "", "one"),
        ("later", "in later", 1.004e12, "wide", "two"),
    ):
        (name, _, _, _, params, tags), histories, _ = content[f"{study}/cells/{cell.folder.name}"]
        assert (name, float(params["budget_flops"]), params["variant"]) == (title, budget, variant)
        assert (tags["mlflow.parentRunId"], tags["recipe"]) == (f"{study}/study", recipe)
        assert len(histories["train_loss"]) == 20
        row = runs_table(store.tracking_uri, study).set_index("fingerprint").loc[cell.fingerprint]
        assert (row["budget_flops"], row["variant"], row["experiment"]) == (budget, variant, study)
        assert f"{study}/tokenizers/rings-tokens01" in content
    statuses = {study: content[f"{study}/trunks/{trunk.folder.name}"][0][1] for study in ("rings", "later")}
    assert statuses == {"rings": "RUNNING", "later": "KILLED"}
    assert sorted(runs_table(store.tracking_uri, "later")["depth"]) == [12, 16]
    before = content
    assert deliver_all(store, store.tracking_uri).problem == ""
    assert snapshot(store.tracking_uri) == before


def test_the_runs_folder_may_hold_links(store: Store, tmp_path: Path) -> None:
    """To another disk."""
    for name in ("cells", "studies"):
        (tmp_path / "disk" / name).mkdir(parents=True)
        (store.runs / name).symlink_to(tmp_path / "disk" / name)
    forwarder, _, _ = small_study(store)
    assert forwarder.deliver()
    assert len(runs_table(store.tracking_uri, "rings")) == len(BUDGETS)


def test_the_thread_delivers_while_a_run_writes(store: Store) -> None:
    trunk = unfinished_trunk(store, 12, points=1)
    write_study(store, "rings", [finished_cell(store, 12, 1e12)])
    forwarder = Forwarder(store.tracking_uri, store, "rings")
    forwarder.start(interval_seconds=0.05)
    for index in range(1, 20):
        append_points(trunk, index, 1)
        time.sleep(0.02)
    assert forwarder.stop(seconds=30) == 0
    histories = snapshot(store.tracking_uri)[f"rings/trunks/{trunk.folder.name}"][1]
    assert len(histories["train_loss"]) == 20


def test_a_delivery_waits_for_another_process_and_says_so(store: Store) -> None:
    small_study(store)
    lines: list[str] = []
    with filelock.FileLock(store.tracking_lock):
        state = deliver_all(store, store.tracking_uri, seconds=3, notify=lines.append)
        assert state.pending > 0
    assert state.problem == ""
    assert ["another process delivers" in lines[0], "not delivered to" in lines[1], len(lines)] == [True, True, 2]


def test_what_a_running_sweep_writes_meanwhile_is_not_out_of_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dashboard beside a sweep delivered everything; the sweep delivers what it wrote since."""
    _, trunk, _ = small_study(store)
    deliver = Forwarder.deliver

    def deliver_and_write(forwarder: Forwarder, seconds: float = 20.0) -> bool:
        complete = deliver(forwarder, seconds)
        append_points(trunk, 30, 5)
        return complete

    monkeypatch.setattr(Forwarder, "deliver", deliver_and_write)
    lines: list[str] = []
    assert deliver_all(store, store.tracking_uri, notify=lines.append).pending == 10
    assert lines == []


def test_importing_tracking_imports_no_mlflow() -> None:
    program = "import varscale.tracking, sys, os; print([m for m in ('mlflow', 'torch', 'pandas') if m in sys.modules])"
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": ""}
    root = Path(__file__).parents[2]
    shown = subprocess.run(
        [sys.executable, "-c", program + "; print(os.environ['MLFLOW_DISABLE_TELEMETRY'])"],
        capture_output=True, text=True, check=True, cwd=root, env=environment,
    )  # fmt: skip
    assert shown.stdout.split() == ["[]", "true"]
