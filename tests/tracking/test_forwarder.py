import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import mlflow
import pytest
from fake_runs import (
    START,
    append_points,
    begun_run,
    finished_cell,
    finished_tokenizer,
    study_cell,
    unfinished_trunk,
    write_study,
)
from mlflow_stores import snapshot

from varscale.store.layout import RunFiles, Store
from varscale.store.records import read_result
from varscale.tracking import Forwarder, deliver_all, runs_table
from varscale.tracking.positions import read_position

BUDGETS = (1e12, 2e12)


def small_study(store: Store) -> tuple[Forwarder, RunFiles, list[RunFiles]]:
    """A study of a tokenizer, a trunk under way and two finished cells."""
    finished_tokenizer(store)
    trunk = unfinished_trunk(store, 12)
    cells = [finished_cell(store, 12, budget) for budget in BUDGETS]
    write_study(store, "rings", cells)
    return Forwarder(store.tracking_uri, store, "rings"), trunk, cells


def end_study(store: Store, name: str, cells: list[RunFiles], status: str = "FINISHED") -> None:
    write_study(store, name, cells, status=status, ended=START + 99)


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


def test_an_experiment_deleted_in_mlflow_does_not_hold_up_others(store: Store) -> None:
    """Its runs that were not delivered yet can't be."""
    _, _, cells = small_study(store)
    client = mlflow.MlflowClient(store.tracking_uri)
    client.delete_experiment(client.create_experiment("rings"))
    write_study(store, "study", [*cells, finished_cell(store, 16, 1e12)])
    lines: list[str] = []
    deliver_all(store, store.tracking_uri, notify=lines.append)
    assert sorted(runs_table(store.tracking_uri, "study")["depth"]) == [12, 12, 16]
    assert len(lines) == 1
    assert "the experiment 'rings' was deleted in MLflow" in lines[0]


def test_an_experiment_deleted_after_its_delivery_is_no_problem(store: Store) -> None:
    forwarder, _, _ = small_study(store)
    assert forwarder.deliver()
    mlflow.MlflowClient(store.tracking_uri).delete_experiment("1")
    assert deliver_all(store, store.tracking_uri).problem == ""


def test_the_runs_folder_may_hold_links(store: Store, tmp_path: Path) -> None:
    """To another disk."""
    for name in ("cells", "studies"):
        (tmp_path / "disk" / name).mkdir(parents=True)
        (store.runs / name).symlink_to(tmp_path / "disk" / name)
    forwarder, _, _ = small_study(store)
    assert forwarder.deliver()
    assert len(runs_table(store.tracking_uri, "rings")) == len(BUDGETS)


def test_a_run_deleted_in_mlflow_stays_deleted(store: Store) -> None:
    forwarder, _, (cell, _) = small_study(store)
    assert forwarder.deliver()
    client = mlflow.MlflowClient(store.tracking_uri)
    state = store.study("rings").delivery("cells", cell.folder.name)
    client.delete_run(read_position(state, store.tracking_uri).run_id)
    append_points(cell, 20, 5)
    assert deliver_all(store, store.tracking_uri).problem == ""
    assert len(snapshot(store.tracking_uri)) == 4
    state.unlink()
    assert deliver_all(store, store.tracking_uri).problem == ""
    assert len(snapshot(store.tracking_uri)) == 4


def test_a_run_that_mlflow_refuses_does_not_hold_up_the_others(store: Store) -> None:
    _, _, cells = small_study(store)
    bad = begun_run(store, "cells", "d4-c1e12-s0", "x", "bad", **{"name with = and 💥": 1})
    append_points(bad, 0, 3)
    write_study(store, "rings", [bad, *cells])
    lines: list[str] = []
    state = deliver_all(store, store.tracking_uri, notify=lines.append)
    assert f"rings/cells/{cells[1].folder.name}" in snapshot(store.tracking_uri)
    assert "name with =" in state.problem
    assert len(lines) == 1


def test_damaged_files_stop_only_what_they_belong_to(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """A study.json, positions, an identity, a result: named in the log; what was delivered is recognised."""
    forwarder, _, cells = small_study(store)
    write_study(store, "study", [*cells, finished_cell(store, 16, 1e12)])
    assert forwarder.deliver()
    before = snapshot(store.tracking_uri)
    state = store.study("rings").delivery("cells", cells[0].folder.name)
    for content in (
        '{"stores": []}',
        '{"stores": {"x": {"offset": -1}}}',
        "[[",
        state.read_text().replace("640", "32"),
    ):
        state.write_text(content)
        assert forwarder.state.pending > 0  # counts as not delivered
        assert Forwarder(store.tracking_uri, store, "rings").deliver()
        assert snapshot(store.tracking_uri) == before
    store.study("rings").record.write_text('{"cells": 5}')
    cells[0].identity.write_text("{}")
    cells[1].result.write_text(cells[1].result.read_text().replace('"loss": 4', '"loss": 3'))
    caplog.set_level(logging.WARNING)
    assert deliver_all(store, store.tracking_uri).problem == ""
    for name in ("study.json", "run.json", "result.json"):
        assert f"{name}: damaged" in caplog.text
    table = runs_table(store.tracking_uri, "study")
    assert list(table["depth"]) == [16]
    assert table.attrs["missing"] == tuple(study_cell(cell).title for cell in cells)


def test_a_result_that_was_delivered_and_then_damaged_is_none_until_it_is_made_anew(store: Store) -> None:
    forwarder, _, (cell, _) = small_study(store)
    assert forwarder.deliver()
    good = cell.result.read_text()
    cell.result.write_text(good.replace('"loss": ', '"loss": 1'))
    assert forwarder.deliver()
    table = runs_table(store.tracking_uri, "rings")
    assert list(table["budget_flops"]) == [2e12]
    assert table.attrs["missing"] == ("d12 · 1e12 FLOPs · seed 0",)
    cell.result.write_text(good)
    assert forwarder.deliver()
    table = runs_table(store.tracking_uri, "rings")
    assert sorted(table["budget_flops"]) == [1e12, 2e12]
    assert table.attrs["missing"] == ()


def test_a_line_that_a_damaged_file_holds_is_skipped(store: Store) -> None:
    cell = finished_cell(store, 12, 1e12, points=2)
    good = cell.metrics.read_bytes()
    damaged = [
        b'{"time": 1790000000, "images": -5, "metrics": {"train_loss": 1.0}}',
        b'{"time": 1790000000, "images": 9999, "metrics": {"train_loss": NaN}}',
        b'{"time": 1790000000, "images": 9999, "metrics": {"train_loss": "text"}}',
        b'{"time": 1790000000, "images": 9999, "metrics": {"train_loss": 1' + b"0" * 400 + b"}}",
        b'{"time": -5, "images": 9999, "metrics": {"train_loss": 1.0}}',
        b'{"time": 1e400, "images": 9999, "metrics": {"train_loss": 1.0}}',
        b'{"time": 1790000000, "images": 9999, "metrics": {"train\\u0007 = loss": 1.0}}',
        b"[" * 100_000,
        b"\xff\x00",
    ]
    cell.metrics.write_bytes(b"\n".join(damaged) + b"\n" + good)
    write_study(store, "rings", [cell])
    assert deliver_all(store, store.tracking_uri) == deliver_all(store, store.tracking_uri)
    (facts, histories, _) = snapshot(store.tracking_uri)[f"rings/cells/{cell.folder.name}"]
    assert facts[2] == START * 1000
    assert [step for _, step, _ in histories["train_loss"]] == [32, 64]


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


def test_a_database_that_can_not_be_opened_costs_one_line(tmp_path: Path) -> None:
    store = Store(tmp_path)
    unfinished_trunk(store, 4)
    write_study(store, "rings", [begun_run(store, "cells", "d4-c1e12-s0", "abc", "cell")])
    lines: list[str] = []
    (tmp_path / "broken.db").write_bytes(b"not a database, but long enough to be read as one" * 100)
    forwarder = Forwarder(f"sqlite:///{tmp_path / 'broken.db'}", store, "rings", lines.append)
    assert not forwarder.deliver()
    assert forwarder.state.pending == 60
    assert forwarder.stop(seconds=5) == 60
    assert len(lines) == 2
    assert "not a database" in lines[0]
    assert "60 points not delivered" in lines[1]


@pytest.fixture
def read_only(store: Store) -> Iterator[Store]:
    """A runs folder that this process may read, but not write; not as the superuser, who may write everywhere."""
    for folder in (store.runs, *store.runs.parents):
        if Path(tempfile.gettempdir()) in folder.parents:
            folder.chmod(0o755)
    store.runs.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield store
    os.seteuid(user)
    store.runs.chmod(0o755)


def test_a_runs_folder_that_can_not_be_written_to_is_named_at_once(read_only: Store) -> None:
    lines: list[str] = []
    began = time.monotonic()
    state = deliver_all(read_only, read_only.tracking_uri, notify=lines.append)
    assert "Permission denied" in state.problem
    assert len(lines) == 1
    assert str(read_only.tracking_lock) in lines[0]
    forwarder = Forwarder(read_only.tracking_uri, read_only, "rings", lines.append)
    forwarder.start()
    forwarder.stop()
    assert time.monotonic() - began < 3


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
