"""An empty MLflow database, made once (its migrations take seconds) and copied for every test."""

import shutil
from pathlib import Path

import pytest

from varscale.store.layout import Store
from varscale.tracking.client import MLflowStore


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MLflowStore(f"sqlite:///{path}").newest_experiment()
    return path


@pytest.fixture
def store(tmp_path: Path, empty_database: Path) -> Store:
    """A runs folder with an empty database in its default place."""
    store = Store(tmp_path / "runs")
    store.runs.mkdir()
    shutil.copy(empty_database, store.runs / "mlflow.db")
    return store
