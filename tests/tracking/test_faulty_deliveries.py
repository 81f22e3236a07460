"""What was deleted, damaged or can't be written holds up nothing else."""

import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from fake_runs import (
    START,
    append_points,
    begun_run,
    finished_cell,
    small_study,
    study_cell,
    unfinished_trunk,
    write_study,
)
from mlflow_stores import snapshot

from varscale.store.layout import Store
from varscale.tracking import Forwarder, deliver_all, runs_table
from varscale.tracking.positions import read_position


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


def test_a_process_killed_while_it_creates_the_database_leaves_none_that_no_mlflow_opens(store: Store) -> None:
    """MLflow creates its tables in more than fifty steps, each written by itself."""
    forwarder, _, _ = small_study(store)
    (store.runs / "mlflow.db").unlink()
    first = multiprocessing.get_context("fork").Process(target=forwarder.deliver)
    first.start()
    while first.is_alive() and not any(path.stat().st_size > 100_000 for path in store.runs.rglob("mlflow.db")):
        time.sleep(0.001)
    first.kill()
    first.join()
    assert first.exitcode != 0
    assert forwarder.deliver(), forwarder.state.problem
    assert len(snapshot(store.tracking_uri)) == 5
