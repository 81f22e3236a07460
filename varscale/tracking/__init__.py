"""MLflow: the only place that knows its names. Importing this is quick; MLflow itself is imported on first use.

Result and metric files are the truth; MLflow is a view of them, one MLflow experiment a study. The store may be absent,
slow or late, its database may be deleted, the forwarder may be killed at any moment: training never waits, and
`deliver_all` ends in the same runs with the same points.
"""

import os

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before any import of MLflow, and for servers started from here

from varscale.tracking.dashboard import check_port, dashboard_url, serve_dashboard
from varscale.tracking.forwarder import Forwarder, deliver_all
from varscale.tracking.table import runs_table
from varscale.tracking.uris import check_tracking_uri, masked

__all__ = [
    "Forwarder",
    "check_port",
    "check_tracking_uri",
    "dashboard_url",
    "deliver_all",
    "masked",
    "runs_table",
    "serve_dashboard",
]
