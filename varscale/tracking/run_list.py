"""The view of the run list that MLflow's dashboard opens with."""

import json
from typing import Any

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
        "groupBy": None,
        "runsHiddenMode": "FIRST_20_RUNS",
    }


EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # opens on runs, not on traces of an application
    **{f"mlflow.sharedViewState.varscale-{order}": json.dumps(_view(order)) for order in ("loss", "train_flops")},
}
"""Tags of every MLflow experiment that varscale makes."""
