"""Delivery to a real MLflow server, absent, late, killed, slow and broken; its dashboard, also in a real browser."""

import http.server
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import mlflow
import pytest
from fake_runs import append_points, begun_run, finished_cell, unfinished_trunk, write_study
from mlflow_stores import free_port, kill, served, wait_for
from requirements import require_program

from varscale.errors import TrackingError
from varscale.store.layout import RunFiles, Store
from varscale.tracking import Forwarder, check_port, dashboard_url, deliver_all, serve_dashboard

ROOT = Path(__file__).parents[2]


def steps(tracking_uri: str) -> list[int]:
    client = mlflow.MlflowClient(tracking_uri)
    [experiment] = client.search_experiments(filter_string="name = 'rings'")
    [run] = client.search_runs([experiment.experiment_id], "tags.role = 'cell'")
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "train_loss")]


def unfinished_cell(store: Store, depth: int = 4, points: int = 5) -> RunFiles:
    run = begun_run(store, "cells", f"d{depth}-c1e12-s0", f"unfinished{depth}", "cell", depth=depth)
    append_points(run, 0, points)
    return run


def test_a_server_that_is_late_dies_and_comes_back(store: Store) -> None:
    port = free_port()
    assert dashboard_url(store.tracking_uri, port) == f"http://127.0.0.1:{port}"  # nothing there yet: the front page
    uri = f"http://127.0.0.1:{port}"
    lines: list[str] = []
    run = unfinished_cell(store)
    write_study(store, "rings", [run])
    forwarder = Forwarder(uri, store, "rings", lines.append)
    began = time.monotonic()
    assert not forwarder.deliver()
    assert time.monotonic() - began < 5
    assert forwarder.state.pending == 10
    assert len(lines) == 1
    assert uri in lines[0]

    with served(store.tracking_uri, port, store.runs) as server:
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
    with served(store.tracking_uri, port, store.runs):
        assert deliver_all(store, uri).pending == 0
        assert steps(uri) == [32 * (index + 1) for index in range(15)]
        assert serve_dashboard(uri) == 0  # a server is its own dashboard
        assert dashboard_url(uri).startswith(f"{uri}/#/experiments/1/runs?")
        with_password = uri.replace("//", "//me:hunter2@")
        assert dashboard_url(with_password).startswith(f"{uri}/#/experiments/1/runs?")
        assert deliver_all(store, with_password).pending == 0
        assert steps(uri) == [32 * (index + 1) for index in range(15)]


class Broken(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(500, "broken")

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.mark.parametrize("kind", ["answers 500", "never answers"])
def test_a_broken_server_costs_little(store: Store, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    write_study(store, "rings", [unfinished_cell(store, depth, points=30) for depth in range(4, 12)])
    lines: list[str] = []
    if kind == "answers 500":
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
    else:
        silent = socket.create_server(("127.0.0.1", 0), backlog=16)
        port = silent.getsockname()[1]
    began = time.monotonic()
    state = deliver_all(store, f"http://127.0.0.1:{port}", notify=lines.append)
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


def test_the_dashboard_in_a_browser(store: Store, tmp_path: Path) -> None:
    chromium = require_program("chromium")
    depths, budgets = (12, 16), (1e12, 2e12)
    for depth in depths:
        unfinished_trunk(store, depth)
    write_study(store, "rings", [finished_cell(store, depth, budget) for depth in depths for budget in budgets])
    assert Forwarder(store.tracking_uri, store, "rings").deliver()
    port = free_port()

    def dump(address: str) -> str:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=2200,1400"]
        command = [chromium, *options, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"]
        return subprocess.run(
            [*command, "--dump-dom", address], capture_output=True, text=True, check=True, timeout=120
        ).stdout

    with served(store.tracking_uri, port, store.runs):
        by_loss = dump(dashboard_url(store.tracking_uri, port))
        by_flops = dump(dashboard_url(store.tracking_uri, port, "train_flops"))
    names = [f"d{depth} · {budget} FLOPs · seed 0" for depth in depths for budget in ("1e12", "2e12")]
    assert rows(by_loss, names) == [
        "d12 · 2e12 FLOPs · seed 0",
        "d16 · 2e12 FLOPs · seed 0",
        "d12 · 1e12 FLOPs · seed 0",
        "d16 · 1e12 FLOPs · seed 0",
    ]
    flops = [name.split(" · ")[1] for name in rows(by_flops, names)]
    assert flops == ["1e12 FLOPs", "1e12 FLOPs", "2e12 FLOPs", "2e12 FLOPs"]
    for header in ("Sort: loss", "train_flops", "params_total"):
        assert header in by_loss
    assert "Group:" not in by_loss
    assert "Sort: train_flops" in by_flops


@pytest.mark.parametrize("port", [-1, 0, 65536, 99999])
def test_a_port_that_is_none_is_named(port: int) -> None:
    with pytest.raises(TrackingError, match=f"--port {port}: expected a number from 1 to 65535"):
        check_port(port)


def test_a_port_in_use_is_named(store: Store) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for use in (lambda: check_port(port), lambda: serve_dashboard(store.tracking_uri, port)):
            with pytest.raises(TrackingError, match=f"--port {port}: Address already in use"):
                use()


def test_a_server_that_ends_by_itself_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.db").write_bytes(b"not a database, but long enough to be read as one" * 100)
    with pytest.raises(TrackingError, match=r"^MLflow's server ended with status 1: .*file is not a database"):
        serve_dashboard(f"sqlite:///{tmp_path / 'broken.db'}", free_port())


def running_commands() -> Iterator[tuple[int, bytes]]:
    """Number and arguments of every process, as `ps` shows them."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield int(path.parent.name), path.read_bytes()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_dashboard_ends_without_a_traceback_and_leaves_no_process(store: Store, how: signal.Signals) -> None:
    """Ctrl-C, twice from an impatient user, or a request to end; the list of processes shows no URI."""
    port = free_port()
    program = (  # as in a terminal: a shell's background job, such as these tests may be, ignores Ctrl-C
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"from varscale.tracking import serve_dashboard; exit(serve_dashboard({store.tracking_uri!r}, {port}))"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, start_new_session=True, **pipes)
    try:
        wait_for(port, process)
        commands = [command for number, command in running_commands() if number != process.pid]
        assert any(b"mlflow" in command and str(port).encode() in command for command in commands)
        assert not any(str(store.runs).encode() in command for command in commands)
        process.send_signal(how)
        time.sleep(0.1)
        process.send_signal(how)
        output, _ = process.communicate(timeout=60)
    finally:
        kill(process)
    assert process.returncode == (0 if how == signal.SIGINT else 128 + how)
    assert output == b""
    check_port(port)
