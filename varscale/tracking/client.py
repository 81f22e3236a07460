"""Everything that calls MLflow's client. MLflow is imported when an `MLflowStore` is made, not before."""

import json
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from varscale.errors import ExperimentDeletedError, TrackingError
from varscale.tracking.positions import OPEN, Point, Position
from varscale.tracking.uris import check_tracking_uri, is_server, masked, sqlite_file, without_secrets

KEY_TAG = "varscale.run"
LONGEST_TAG = 8000
MOST_RUNS = 50_000
"""That one search may give."""
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the forwarder tries again itself
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Settings of MLflow's client, unless the user set them: a server that is down or slow is left alone soon."""
WIDTHS = {
    "attributes": {"Run Name": 300, "Created": 130},
    "metrics": {
        "loss": 110,
        "train_flops": 150,
        "error": 110,
        "params_total": 120,
        "images_seen": 120,
        "images_per_second": 150,
        "utilisation": 110,
    },
    "params": {"depth": 80, "width": 80, "budget_flops": 150, "lr": 90, "seed": 70},
    "tags": {"role": 100, "status": 100},
}
"""Columns of the run list that the dashboard opens with, pixels wide."""


class RunDeletedError(LookupError):
    """The user deleted a run in MLflow; it stays deleted."""


class MLflowStore:
    """MLflow's client, reduced to what varscale does with it. Every method may raise when the store does not answer."""

    def __init__(self, tracking_uri: str, runs: Path | None = None) -> None:
        """Import MLflow and, for a database, create or open it.

        Args:
            tracking_uri: The store.
            runs: The runs folder that is delivered, where pictures lie if the store is a database elsewhere.

        Raises:
            TrackingError: The URI can't work, or its database can't be opened.
        """
        check_tracking_uri(tracking_uri)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._artifacts = None if is_server(tracking_uri) or runs is None else runs.resolve() / "mlartifacts"
        import mlflow.entities

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # errors reach the user as one line, by the forwarder
        if (database := sqlite_file(tracking_uri)) is not None:
            _prepare_database(database)
            self._artifacts = database.resolve().parent / "mlartifacts"
        self._client, self._entities = mlflow.MlflowClient(tracking_uri=tracking_uri), mlflow.entities
        self._numbers: dict[str, str] = {}
        self._prepared: set[str] = set()

    def newest_experiment(self) -> str | None:
        """The id of the experiment whose varscale run began last, or None."""
        experiments = [experiment.experiment_id for experiment in self._client.search_experiments()]
        runs = self._client.search_runs(
            experiments, f"tags.`{KEY_TAG}` LIKE '%/%'", max_results=1, order_by=["start_time DESC"]
        )
        return str(runs[0].info.experiment_id) if runs else None

    def search(self, experiment: str, condition: str, *, deleted: bool = False) -> list[Any]:
        """MLflow's runs of an experiment, oldest first; none where there is no such experiment."""
        if experiment not in self._numbers:
            found = self._client.get_experiment_by_name(experiment)
            if found is None:
                return []
            self._numbers[experiment] = found.experiment_id
        view = self._entities.ViewType.ALL if deleted else self._entities.ViewType.ACTIVE_ONLY
        runs = self._client.search_runs([self._numbers[experiment]], condition, view, MOST_RUNS, ["start_time"])
        return list(runs)

    def find(self, experiment: str, key: str) -> Position | None:
        """The run with this key, its parameters and the last step of each metric; None: there is none.

        Raises:
            RunDeletedError: The user deleted it, or its experiment, in MLflow.
        """
        quote = '"' if "'" in key else "'"
        runs = self.search(experiment, f"tags.`{KEY_TAG}` = {quote}{key}{quote}", deleted=True)
        if not runs:
            return None
        run = runs[0]
        if run.info.lifecycle_stage == "deleted":
            raise RunDeletedError(key)
        steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        return Position(run_id=run.info.run_id, steps=steps, params=sorted(run.data.params))

    def create(self, experiment: str, key: str, name: str, start: int, tags: Mapping[str, str]) -> str:
        """A new run that started at `start` (Unix milliseconds); its id.

        Raises:
            ExperimentDeletedError: Its experiment was deleted in MLflow.
        """
        own = {KEY_TAG: key, "mlflow.source.name": "varscale", "mlflow.source.type": "LOCAL"}
        shortened = {key: value[:LONGEST_TAG] for key, value in tags.items()}
        number = self._experiment(experiment)
        run = self._client.create_run(number, start_time=start, tags={**shortened, **own}, run_name=name)
        return str(run.info.run_id)

    def log(self, run_id: str, params: Mapping[str, Any], points: Sequence[Point], tags: Mapping[str, str]) -> None:
        """Add parameters, points of curves and tags, together.

        Parameters, which MLflow never changes, are written so that Python reads the same number again. Points have
        their own times, and the same again change nothing. Tags are set or replaced.
        """
        new = self._entities
        texts = {key: repr(value) if isinstance(value, float) else str(value) for key, value in params.items()}
        self._client.log_batch(
            run_id,
            [new.Metric(k, v, point.milliseconds, point.images) for point in points for k, v in point.metrics.items()],
            [new.Param(key, text) for key, text in texts.items()],
            [new.RunTag(key, value[:LONGEST_TAG]) for key, value in tags.items()],
            synchronous=True,
        )

    def set_status(self, run_id: str, status: str, end: int) -> None:
        """RUNNING, or ended as FINISHED, FAILED or KILLED at `end` (Unix milliseconds)."""
        if status == OPEN:
            self._client.update_run(run_id, status=OPEN)
        else:
            self._client.set_terminated(run_id, status, end)

    def upload(self, run_id: str, file: Path, folder: str | None = None) -> None:
        """Add or replace an artifact."""
        self._client.log_artifact(run_id, str(file), folder)

    def _experiment(self, name: str) -> str:
        """The id of MLflow's experiment of that name, created with the dashboard's view where there is none."""
        if name not in self._prepared:
            found = self._client.get_experiment_by_name(name)
            if found is not None and found.lifecycle_stage == "deleted":
                raise ExperimentDeletedError(
                    f"the experiment {name!r} was deleted in MLflow: "
                    f"`mlflow experiments restore --experiment-id {found.experiment_id}` brings it back"
                )
            place = self._artifacts and (self._artifacts / name).as_uri()
            number = found.experiment_id if found else self._client.create_experiment(name, place)
            for key, value in _experiment_tags().items():
                if found is None or found.tags.get(key) != value:
                    self._client.set_experiment_tag(number, key, value)
            self._numbers[name] = number
            self._prepared.add(name)
        return self._numbers[name]


def is_rejection(error: Exception) -> bool:
    """Whether the store answered and refused this one request, so that other runs may be delivered still."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, ExperimentDeletedError):
        return True
    return isinstance(error, MlflowException) and error.get_http_status_code() in (400, 404, 409, 413, 422)


def first_line(error: Exception, tracking_uri: str) -> str:
    """What a store's error says, one line, without the URI's password."""
    text = without_secrets(str(error).strip(), tracking_uri)
    return (text.splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def answering(tracking_uri: str) -> Iterator[None]:
    """Turn whatever a store answers that it should not into a `TrackingError`."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(f"MLflow at {masked(tracking_uri)}: {first_line(error, tracking_uri)}") from None


def _prepare_database(path: Path) -> None:
    """Create MLflow's tables where there are none, and fail at once where SQLite can't open a file.

    MLflow itself would try to open it again for minutes. It also creates its tables in many steps inside the file, and
    a process killed between two of them leaves a database that no MLflow opens again. So they are made in a file
    beside it, which takes the name when it is whole.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with closing(sqlite3.connect(path, timeout=20)) as connection:
                connection.execute("PRAGMA schema_version")
            return
        with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
            new = Path(folder) / path.name
            _create_tables(new, path.parent / "mlartifacts")
            with suppress(FileExistsError):  # another process was first
                os.link(new, path)
    except (sqlite3.Error, OSError) as error:
        raise TrackingError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _create_tables(database: Path, artifacts: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(f"sqlite:///{database}", artifacts.resolve().as_uri()).engine.dispose()


def _experiment_tags() -> dict[str, str]:
    """An experiment's kind, and views of its run list as MLflow's "share" button would store them."""
    widths = {f"{kind}.`{name}`": width for kind, names in WIDTHS.items() for name, width in names.items()}
    view = {
        "searchFilter": "",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [column for column in widths if not column.startswith("attributes.")],
        "columnOrder": list(widths),
        "columnWidths": widths,
        "groupBy": None,
        "runsHiddenMode": "FIRST_20_RUNS",
    }
    tags = {"mlflow.experimentKind": "custom_model_development"}  # opens on runs, not on traces of an application
    for order in ("loss", "train_flops"):
        tags[f"mlflow.sharedViewState.varscale-{order}"] = json.dumps({**view, "orderByKey": f"metrics.`{order}`"})
    return tags
