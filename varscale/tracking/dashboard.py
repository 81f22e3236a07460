"""MLflow's dashboard on this machine: where it opens, and its server."""

import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Literal, NoReturn

from varscale.errors import TrackingError
from varscale.tracking.client import MLflowStore, answering
from varscale.tracking.uris import check_tracking_uri, is_server, masked, without_secrets

HOST = "127.0.0.1"
SECONDS_TO_END = 5


def dashboard_url(tracking_uri: str, port: int = 5000, order_by: Literal["loss", "train_flops"] = "loss") -> str:
    """The address that opens the runs of the study whose run began last, sorted.

    The front page's address where the store holds no run. It need not be served yet (`serve_dashboard`).

    Raises:
        TrackingError: The URI can't work, or the store does not answer.
    """
    base = masked(tracking_uri).rstrip("/") if is_server(tracking_uri) else f"http://{HOST}:{port}"
    with answering(tracking_uri):
        number = MLflowStore(tracking_uri).newest_experiment()
    if number is None:
        return base
    return f"{base}/#/experiments/{number}/runs?workflowType=machine_learning&viewStateShareKey=varscale-{order_by}"


def check_port(port: int) -> None:
    """Raise `TrackingError` where no server can listen on a port of loopback: it is none, or in use."""
    if not 1 <= port <= 65535:
        raise TrackingError(f"--port {port}: expected a number from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise TrackingError(f"--port {port}: {error.strerror}; name another one") from None


def serve_dashboard(tracking_uri: str, port: int = 5000) -> int:
    """Serve MLflow's dashboard on loopback until Ctrl-C; at once back where the URI is a server, its own dashboard.

    Returns:
        The command's exit status.

    Raises:
        TrackingError: The port or the store can't be used, or the server ended by itself; with its last words.
    """
    if is_server(tracking_uri):
        return 0
    check_tracking_uri(tracking_uri)
    check_port(port)
    try:
        with _started(tracking_uri, port) as server:
            words = deque(server.stdout or (), maxlen=50)
            status = server.wait()
    except KeyboardInterrupt:
        return 0
    lines = [line.strip() for line in words if line.strip()]
    told = [line for line in lines if "Error" in line or "Exception" in line] or lines or ["it said nothing"]
    raise TrackingError(f"MLflow's server ended with status {status}: {without_secrets(told[-1], tracking_uri)[:300]}")


def dashboard_command(tracking_uri: str, port: int = 5000) -> list[str]:
    """The command that serves a store, to be run in `dashboard_environment`."""
    return [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]


def dashboard_environment(tracking_uri: str) -> dict[str, str]:
    """Environment for `dashboard_command`: nothing phones home, and the list of processes shows no password."""
    return os.environ | {"MLFLOW_BACKEND_STORE_URI": tracking_uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


@contextmanager
def _started(tracking_uri: str, port: int) -> "Iterator[subprocess.Popen[str]]":
    """A server that ends, with its children, when this does: also by a request to end or with the terminal."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    former = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    former[signal.SIGINT] = signal.getsignal(signal.SIGINT)
    server = subprocess.Popen(
        dashboard_command(tracking_uri, port),
        env=dashboard_environment(tracking_uri),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches this process alone
    )
    try:
        yield server
    finally:
        for number in former:
            signal.signal(number, signal.SIG_IGN)  # an impatient second Ctrl-C
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(server.pid, number)
                server.wait(SECONDS_TO_END)
        for number, handler in former.items():
            signal.signal(number, handler)
