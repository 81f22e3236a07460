"""Delivery to an MLflow server on PostgreSQL, as docs/mlflow.md sets it up, and straight into such a database."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fake_runs import append_points, finished_cell, finished_tokenizer, unfinished_trunk, write_study
from mlflow_stores import free_port, kill, served, snapshot
from requirements import require_program
from toy_sweep import command, environment

from varscale.store.layout import RunFiles, Store
from varscale.tracking import Forwarder, deliver_all, runs_table
from varscale.tracking.client import MLflowStore

PASSWORD, OTHER_PASSWORD = "hunter2-of-the-database", "hunter2-of-the-server"


class Cluster:
    """A PostgreSQL of its own, on loopback, which asks for a password."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        user = "postgres" if os.geteuid() == 0 else None  # PostgreSQL refuses to be root's
        self._as: dict[str, Any] = {"user": user, "group": user, "extra_groups": []} if user else {}
        password = folder / "password"
        password.write_text(PASSWORD)
        if user:
            for path in (folder, password):
                shutil.chown(path, user)
        self._run("initdb", "--username=varscale", f"--pwfile={password}", "--auth=scram-sha-256", "--no-sync")

    def start(self) -> None:
        options = f"-F -p {self.port} -c listen_addresses=127.0.0.1 -k ''"
        self._run("pg_ctl", "--wait", f"--log={self.folder / 'log'}", f"--options={options}", "start")

    def crash(self) -> None:
        self._run("pg_ctl", "--mode=immediate", "stop")

    def create(self, database: str) -> str:
        """An empty database; its URI."""
        import psycopg

        with psycopg.connect(self._uri("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {database}".encode())
        return self._uri(database)

    def _uri(self, database: str) -> str:
        return f"postgresql://varscale:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def _run(self, program: str, *arguments: str) -> None:
        own = [require_program(program), f"--pgdata={self.folder / 'data'}", *arguments]
        subprocess.run(own, cwd=self.folder, check=True, stdout=subprocess.DEVNULL, timeout=120, **self._as)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    require_program("initdb")
    with tempfile.TemporaryDirectory(prefix="varscale-postgresql-") as folder:  # which its user can reach
        cluster = Cluster(Path(folder))
        cluster.start()
        yield cluster
        cluster.crash()


@pytest.fixture
def study(store: Store) -> tuple[RunFiles, list[RunFiles]]:
    """A trunk under way and two finished cells."""
    finished_tokenizer(store)
    trunk, cells = (
        unfinished_trunk(store, 12, points=500),
        [finished_cell(store, 12, budget) for budget in (1e12, 2e12)],
    )
    write_study(store, "rings", cells)
    laws = store.study("rings").laws
    laws.mkdir()
    (laws / "report.html").write_text("the report")
    return trunk, cells


def written(run: RunFiles) -> list[tuple[int, int, str]]:
    """Time, step and value of a run's losses, as its file has them."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [(round(line["time"] * 1000), line["images"], repr(line["metrics"]["train_loss"])) for line in lines]


def test_server_and_database_die_in_the_middle_of_a_curve(
    store: Store,
    study: tuple[RunFiles, list[RunFiles]],
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What came before is there, once and in order; when they are back the rest follows, and what was written since."""
    (trunk, cells), database, port = study, cluster.create("served"), free_port()
    uri, lines = f"http://me:{OTHER_PASSWORD}@127.0.0.1:{port}", list[str]()
    options = ("--artifacts-destination", str(tmp_path / "artifacts"))
    forwarder = Forwarder(uri, store, "rings", lines.append)
    log, points_before = MLflowStore.log, list[int]()
    with served(database, port, tmp_path, *options) as server:

        def killed_meanwhile(self: MLflowStore, run_id: str, params: Any, points: Any, tags: Any) -> None:
            if len(points) == 200:
                points_before.append(len(points))
            if len(points_before) == 2 and server.poll() is None:
                kill(server)
                cluster.crash()
            log(self, run_id, params, points, tags)

        monkeypatch.setattr(MLflowStore, "log", killed_meanwhile)
        assert not forwarder.deliver(seconds=60)
        assert server.poll() is not None
    append_points(trunk, 500, 50)
    cells.append(finished_cell(store, 16, 1e12))
    write_study(store, "rings", cells)
    assert not forwarder.deliver()
    cluster.start()
    with served(database, port, tmp_path, *options):
        before = snapshot(uri)
        assert before[f"rings/trunks/{trunk.folder.name}"][1]["train_loss"] == written(trunk)[:200]
        assert forwarder.deliver(seconds=60)
        assert [line.partition(": ")[0] for line in lines] == [
            f"MLflow at http://127.0.0.1:{port}",
            f"MLflow at http://127.0.0.1:{port} takes data again",
        ]
        after = snapshot(uri)
        for path in store.study("rings").folder.glob("mlflow/*.json"):
            path.unlink()
        assert deliver_all(store, uri).pending == 0
        assert snapshot(uri) == after
        assert sorted(runs_table(uri, "rings")["depth"]) == [12, 12, 16]
    for kind, run in [("trunks", trunk), *(("cells", cell) for cell in cells)]:
        assert after[f"rings/{kind}/{run.folder.name}"][1]["train_loss"] == written(run)
    assert deliver_all(store, store.tracking_uri).pending == 0
    assert snapshot(store.tracking_uri) == after  # as in SQLite
    found = {path.name for path in (tmp_path / "artifacts").rglob("*") if path.is_file()}
    assert found == {"samples.png", "report.html"}
    shown = "".join([*lines, caplog.text, *capfd.readouterr(), repr(after)])
    assert "hunter2" not in shown
    assert_no_password_below(tmp_path)


def test_sync_rebuilds_a_study_in_an_empty_database(
    store: Store,
    study: tuple[RunFiles, list[RunFiles]],
    cluster: Cluster,
    tmp_path: Path,
) -> None:
    """Also of a user whose umask lets everybody write."""
    assert deliver_all(store, store.tracking_uri).pending == 0
    uri = cluster.create("rebuilt")
    process = subprocess.run(
        command("sync"),
        cwd=tmp_path,
        env=environment() | {"MLFLOW_TRACKING_URI": uri},
        umask=0,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "MLflow has everything\n", "")
    assert snapshot(uri) == snapshot(store.tracking_uri)
    files = [path for path in store.runs.rglob("*") if not path.is_symlink()]
    assert (store.runs / "mlartifacts" / "rings") in files
    assert not [path for path in files if path.stat().st_mode & 0o002]
    assert not (tmp_path / "mlruns").exists()
    assert_no_password_below(tmp_path)


def assert_no_password_below(folder: Path) -> None:
    for path in folder.rglob("*"):
        with suppress(OSError):
            assert b"hunter2" not in path.read_bytes(), path
