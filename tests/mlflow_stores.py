"""MLflow servers on loopback, and all that a store holds."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import mlflow
import pytest

from varscale.tracking.dashboard import dashboard_command, dashboard_environment


def snapshot(tracking_uri: str) -> dict[str, Any]:
    """Everything in a store, without the ids that MLflow draws: {run: (facts, {metric: [(time, step, value)]})}."""
    client = mlflow.MlflowClient(tracking_uri)
    experiments = {experiment.experiment_id: experiment.name for experiment in client.search_experiments()}
    runs = client.search_runs(list(experiments))
    keys = {run.info.run_id: run.data.tags["varscale.run"] for run in runs}
    assert len(set(keys.values())) == len(runs), "a run is there twice"
    content = {}
    for run in runs:
        assert keys[run.info.run_id].split("/")[0] == experiments[run.info.experiment_id]
        tags = dict(run.data.tags)
        if "mlflow.parentRunId" in tags:
            tags["mlflow.parentRunId"] = keys[tags["mlflow.parentRunId"]]
        histories = {
            name: [(m.timestamp, m.step, repr(m.value)) for m in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }
        facts = (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time, run.data.params, tags)
        artifacts = sorted(item.path for item in client.list_artifacts(run.info.run_id))
        content[keys[run.info.run_id]] = (facts, histories, artifacts)
    return content


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(tracking_uri: str, port: int, folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """An MLflow server in a folder, as `varscale dashboard` starts it, in a process group of its own."""
    server = subprocess.Popen(
        [*dashboard_command(tracking_uri, port), *options],
        env=dashboard_environment(tracking_uri),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(port, server)
        yield server
    finally:
        kill(server)


def wait_for(port: int, server: "subprocess.Popen[bytes]") -> None:
    for _ in range(1800):  # MLflow imports for a minute on a busy machine
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except (URLError, OSError):
            assert server.poll() is None, "the server ended"
            time.sleep(0.1)
    pytest.fail("the server did not start")


def kill(server: "subprocess.Popen[bytes]") -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
