"""Options that several verbs have, and how they are read."""

import re
from pathlib import Path
from typing import Annotated

import typer

from varscale.config import Experiment
from varscale.config.yaml import load_experiment
from varscale.errors import ExperimentError
from varscale.store.layout import ExperimentFiles

ExperimentName = Annotated[str, typer.Argument(metavar="EXPERIMENT", help="A shipped experiment, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field, such as optim.lr=3e-4.")
]
Depths = Annotated[str | None, typer.Option(help="Depths of the grid, such as 12,16,20.")]
RunsDir = Annotated[Path, typer.Option(help="Where everything is written.")]
TrackingUri = Annotated[
    str | None,
    typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow's store; default: SQLite in the runs folder."),
]
Workers = Annotated[int | None, typer.Option(help="Runs at once; default: one a GPU, or one a processor.")]
DEFAULT_RUNS = Path("runs")


def load(
    experiment: str, overrides: list[str] | None, depths: str | None = None, workers: int | None = None
) -> Experiment:
    """The experiment with `--set`, `--depths` and `--workers` merged in."""
    overrides = list(overrides or ())
    if depths is not None:
        overrides.append(f"grid.depths={whole_numbers('--depths', depths, least=1)}")
    if workers is not None:
        if workers < 1:
            raise ExperimentError(f"--workers {workers}: expected 1 or more")
        overrides.append(f"runtime.workers={workers}")
    loaded = load_experiment(experiment, overrides)
    return loaded if depths is None else loaded.with_variants_in_grid()


def tracking_store(tracking_uri: str | None, files: ExperimentFiles) -> str:
    """MLflow's store: the one that is named, or SQLite in the runs folder."""
    if tracking_uri is None and re.search(r"\?|%[0-9A-Fa-f]{2}", str(files.runs.resolve())):
        raise ExperimentError(f"--runs-dir {files.runs}: SQLite can't lie below a folder with ? or %20 in its name")
    return tracking_uri or files.tracking_uri


def whole_numbers(option: str, text: str, least: int = 0) -> list[int]:
    """Numbers of an option such as 12,16,20."""
    if not all(part.strip().isdecimal() and int(part) >= least for part in text.split(",")):
        raise ExperimentError(f"{option} {text}: expected whole numbers from {least} up, such as 1,2,3")
    return [int(part) for part in text.split(",")]
