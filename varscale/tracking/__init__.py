"""MLflow: the only place that knows its names. Importing this is quick; MLflow itself is imported on first use.

Result and metric files are the truth; MLflow is a view of them. The store may be absent, slow or late, its database may
be deleted, the forwarder may be killed at any moment: training never waits, and `deliver_all` ends in the same runs
with the same points.
"""

import os

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before any import of MLflow, and for servers started from here

from varscale.errors import TrackingError
from varscale.tracking.dashboard import dashboard_command, dashboard_environment, dashboard_url
from varscale.tracking.forwarder import Forwarder, ForwarderState, deliver_all
from varscale.tracking.store import check_tracking_uri
from varscale.tracking.table import runs_table

__all__ = [
    "Forwarder",
    "ForwarderState",
    "TrackingError",
    "check_tracking_uri",
    "dashboard_command",
    "dashboard_environment",
    "dashboard_url",
    "deliver_all",
    "runs_table",
]
