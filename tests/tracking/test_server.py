"""Delivery to a real MLflow server, absent, late, killed, slow and broken; and its dashboard in a real browser."""

import http.server
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import mlflow
import pytest
from fake_runs import append_points, finished_cell, unfinished_trunk
from requirements import require_program

from varscale.store.layout import ExperimentFiles, RunFiles
from varscale.tracking import Forwarder, dashboard_command, dashboard_environment, dashboard_url, deliver_all

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(database: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """An MLflow server as `varscale dashboard` starts it, in a process group of its own."""
    server = subprocess.Popen(
        dashboard_command(f"sqlite:///{database}", port),
        env=dashboard_environment(),
        cwd=database.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (URLError, OSError):
                assert server.poll() is None, "the server ended"
                time.sleep(0.1)
        else:
            pytest.fail("the server did not start")
        yield server
    finally:
        kill(server)


def kill(server: "subprocess.Popen[bytes]") -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def steps(tracking_uri: str) -> list[int]:
    client = mlflow.MlflowClient(tracking_uri)
    [experiment] = client.search_experiments(filter_string="name = 'rings'")
    [run] = client.search_runs([experiment.experiment_id])
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "train_loss")]


def test_a_server_that_is_late_dies_and_comes_back(files: ExperimentFiles) -> None:
    port = free_port()
    assert dashboard_url(files.tracking_uri, port) == f"http://127.0.0.1:{port}"  # nothing there yet: the front page
    uri = f"http://127.0.0.1:{port}"
    lines: list[str] = []
    run = RunFiles(unfinished_trunk(files, 4, points=5))
    forwarder = Forwarder(uri, files, lines.append)
    forwarder.watch(run.folder)
    began = time.monotonic()
    assert not forwarder.deliver()
    assert time.monotonic() - began < 5
    assert forwarder.state.pending == 10
    assert len(lines) == 1
    assert uri in lines[0]

    with served(files.runs / "mlflow.db", port) as server:
        assert forwarder.deliver()
        assert lines[1:] == [f"MLflow at {uri} takes data again"]
        append_points(run, 5, 5)
        kill(server)
        append_points(run, 10, 5)
        began = time.monotonic()
        assert not forwarder.deliver()
        assert time.monotonic() - began < 5
        assert forwarder.stop(seconds=5) == 20
        assert "20 points not delivered" in lines[-1]
    with served(files.runs / "mlflow.db", port):
        assert deliver_all(files.runs, uri).pending == 0
        assert steps(uri) == [32 * (index + 1) for index in range(15)]
        assert dashboard_command(uri) == []
        assert dashboard_url(uri).startswith(f"{uri}/#/experiments/1/runs?")


class Broken(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(500, "broken")

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.mark.parametrize("kind", ["answers 500", "never answers"])
def test_a_broken_server_costs_little(files: ExperimentFiles, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    for depth in range(4, 12):
        unfinished_trunk(files, depth)
    lines: list[str] = []
    if kind == "answers 500":
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
    else:
        silent = socket.create_server(("127.0.0.1", 0), backlog=16)
        port = silent.getsockname()[1]
    began = time.monotonic()
    state = deliver_all(files.runs, f"http://127.0.0.1:{port}", notify=lines.append)
    assert time.monotonic() - began < 4
    assert state.pending == 8 * 60
    assert len(lines) == 1
    if kind == "answers 500":
        server.shutdown()
        server.server_close()
    else:
        silent.close()


def rows(page: str, names: list[str]) -> list[str]:
    """Names in the order in which the page shows them for the first time."""
    return sorted((name for name in names if name in page), key=page.index)


def test_the_dashboard_in_a_browser(files: ExperimentFiles, tmp_path: Path) -> None:
    chromium = require_program("chromium")
    depths, budgets = (12, 16), (1e12, 2e12)
    folders = [unfinished_trunk(files, depth) for depth in depths]
    folders += [finished_cell(files, depth, budget) for depth in depths for budget in budgets]
    forwarder = Forwarder(files.tracking_uri, files)
    forwarder.finish(forwarder.sweep("a", "rings · depths 12, 16", {}, folders))
    forwarder.finish(forwarder.sweep("b", "rings · depths 12, 20", {}, [folders[2], finished_cell(files, 20, 1e12)]))
    assert forwarder.deliver()
    port = free_port()

    def dump(address: str) -> str:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=2200,1400"]
        command = [chromium, *options, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"]
        return subprocess.run(
            [*command, "--dump-dom", address], capture_output=True, text=True, check=True, timeout=120
        ).stdout

    with served(files.runs / "mlflow.db", port):
        by_loss = dump(dashboard_url(files.tracking_uri, port))
        by_flops = dump(dashboard_url(files.tracking_uri, port, "train_flops"))
    names = [f"d{depth} · {budget} FLOPs · seed 0" for depth in (12, 16, 20) for budget in ("1e12", "2e12")]
    # Each sweep is a group: its name, then its cells in order. d12 is in both and shown once, where it was trained.
    first, second = "Group: rings · depths 12, 16", "Group: rings · depths 12, 20"
    assert rows(by_loss, [first, second, *names]) == [
        first,
        "d12 · 2e12 FLOPs · seed 0",
        "d16 · 2e12 FLOPs · seed 0",
        "d12 · 1e12 FLOPs · seed 0",
        "d16 · 1e12 FLOPs · seed 0",
        second,
        "d20 · 1e12 FLOPs · seed 0",
    ]
    flops = [name.split(" · ")[1] for name in rows(by_flops, [name for name in names if "d20" not in name])]
    assert flops == ["1e12 FLOPs", "1e12 FLOPs", "2e12 FLOPs", "2e12 FLOPs"]
    for header in ("Sort: loss", "Group by: sweep", "train_flops", "params_total"):
        assert header in by_loss
    assert "Sort: train_flops" in by_flops
