"""MLflow's dashboard on this machine: how to start it, and the view that it opens with."""

import json
import os
import sys
from typing import Any, Literal

_RUN_NAME, _CREATED = "attributes.`Run Name`", "attributes.`Created`"
_WIDTHS = {
    "metrics.`loss`": 110,
    "metrics.`train_flops`": 150,
    "metrics.`error`": 110,
    "metrics.`params_total`": 120,
    "metrics.`images_seen`": 120,
    "metrics.`images_per_second`": 150,
    "metrics.`utilisation`": 110,
    "params.`depth`": 80,
    "params.`width`": 80,
    "params.`budget_flops`": 150,
    "params.`lr`": 90,
    "params.`seed`": 70,
    "tags.`role`": 100,
    "tags.`status`": 100,
}
"""Columns of the view, pixels wide."""


def _view(order_by: str) -> dict[str, Any]:
    """A view of the run list as MLflow's "share" button would store it."""
    return {
        "searchFilter": "",
        "orderByKey": f"metrics.`{order_by}`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(_WIDTHS),
        "columnOrder": [_RUN_NAME, _CREATED, *_WIDTHS],
        "columnWidths": {_RUN_NAME: 300, _CREATED: 130, **_WIDTHS},
        # MLflow nests child runs only while sorted by date; grouped by this tag they stay under their sweep.
        "groupBy": {"aggregateFunction": "min", "groupByKeys": [{"mode": "tag", "groupByData": "sweep"}]},
        "useGroupedValuesInCharts": False,  # a curve a run, not one a sweep
        "runsHiddenMode": "FIRST_20_RUNS",
    }


EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # opens on runs, not on traces of an application
    **{f"mlflow.sharedViewState.varscale-{order}": json.dumps(_view(order)) for order in ("loss", "train_flops")},
}
"""Tags of every MLflow experiment that varscale makes."""


def dashboard_command(tracking_uri: str, port: int = 5000) -> list[str]:
    """The command that shows `tracking_uri` on loopback; empty where that is a server, a dashboard already."""
    if tracking_uri.startswith(("http://", "https://")):
        return []
    server = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri]
    return [*server, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]


def dashboard_environment() -> dict[str, str]:
    """Environment for `dashboard_command`: nothing phones home, no job queue is started."""
    return {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def dashboard_url(
    tracking_uri: str,
    port: int = 5000,
    experiment: str | None = None,
    order_by: Literal["loss", "train_flops"] = "loss",
) -> str:
    """The address that opens an experiment's runs, grouped by sweep and sorted.

    Args:
        tracking_uri: The store; need not be served yet.
        port: Where `dashboard_command` serves it.
        experiment: Its name; default: the one whose run began last. The front page's address where there is none.
        order_by: Metric to sort by.
    """
    from varscale.tracking.store import Store

    server = tracking_uri.startswith(("http://", "https://"))
    base = tracking_uri.rstrip("/") if server else f"http://127.0.0.1:{port}"
    store = Store(tracking_uri)
    number = store.find_experiment(experiment) if experiment else store.newest_experiment()
    if number is None:
        return base
    return f"{base}/#/experiments/{number}/runs?workflowType=machine_learning&viewStateShareKey=varscale-{order_by}"
