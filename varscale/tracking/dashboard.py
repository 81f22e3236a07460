"""MLflow's dashboard on this machine: how to start it, and where it opens."""

import os
import sys
from typing import Literal

from varscale.tracking.store import Store


def dashboard_command(tracking_uri: str, port: int = 5000) -> list[str]:
    """The command that shows `tracking_uri` on loopback; empty where that is a server, a dashboard already."""
    if tracking_uri.startswith(("http://", "https://")):
        return []
    server = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri]
    return [*server, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]


def dashboard_environment() -> dict[str, str]:
    """Environment for `dashboard_command`: nothing phones home, no job queue is started."""
    return {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def dashboard_url(tracking_uri: str, port: int = 5000, order_by: Literal["loss", "train_flops"] = "loss") -> str:
    """The address that opens the runs of the experiment whose run began last, grouped by sweep and sorted.

    The front page's address where the store holds no run.

    Args:
        tracking_uri: The store; need not be served yet.
        port: Where `dashboard_command` serves it.
        order_by: Metric to sort by.
    """
    server = tracking_uri.startswith(("http://", "https://"))
    base = tracking_uri.rstrip("/") if server else f"http://127.0.0.1:{port}"
    number = Store(tracking_uri).newest_experiment()
    if number is None:
        return base
    return f"{base}/#/experiments/{number}/runs?workflowType=machine_learning&viewStateShareKey=varscale-{order_by}"
