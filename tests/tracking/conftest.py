"""An empty MLflow database, made once (its migrations take seconds) and copied for every test."""

import shutil
from pathlib import Path

import pytest

from varscale.store.layout import ExperimentFiles
from varscale.tracking.store import Store


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Store(f"sqlite:///{path}").newest_experiment()
    return path


@pytest.fixture
def files(tmp_path: Path, empty_database: Path) -> ExperimentFiles:
    """Layout of an experiment `rings` with an empty database in its default place."""
    files = ExperimentFiles(tmp_path / "runs", "rings")
    files.runs.mkdir()
    shutil.copy(empty_database, files.runs / "mlflow.db")
    return files
