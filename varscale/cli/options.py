"""Options that several verbs have, how they are read, and which errors are for people: one line, no traceback."""

import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analysis.errors import TableError
from varscale.errors import ExperimentError, UserError
from varscale.store.layout import DEFAULT_RUNS, Store

if TYPE_CHECKING:
    from varscale.config import Experiment

ExperimentName = Annotated[str, typer.Argument(metavar="EXPERIMENT", help="A shipped experiment, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field, such as optim.lr=3e-4.")
]
Depths = Annotated[str | None, typer.Option(help="Depths of the grid, such as 12,16,20.")]
RunsDir = Annotated[str, typer.Option(help="Where everything is written.")]
TrackingUri = Annotated[
    str | None,
    typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow's store; default: SQLite in the runs folder."),
]
Workers = Annotated[int | None, typer.Option(help="Runs at once; default: one a GPU, or one a processor.")]
RUNS = str(DEFAULT_RUNS)
MENDABLE = (UserError, TableError, OSError)
"""What a person who uses varscale can mend; printed as one line."""


def load(
    experiment: str, overrides: list[str] | None, depths: str | None = None, workers: int | None = None
) -> "Experiment":
    """The experiment with `--set`, `--depths` and `--workers` merged in."""
    from varscale.config.yaml import load_experiment  # half a second, which --help can do without

    overrides = list(overrides or ())
    if depths is not None:
        overrides.append(f"grid.depths={whole_numbers('--depths', depths, least=1)}")
    if workers is not None:
        if workers < 1:
            raise ExperimentError(f"--workers {workers}: expected 1 or more")
        overrides.append(f"runtime.workers={workers}")
    loaded = load_experiment(experiment, overrides)
    return loaded if depths is None else loaded.with_variants_in_grid()


def open_store(runs_dir: str, *, writing: bool = True) -> Store:
    """The runs folder; what an earlier version left in it is said in one line.

    Raises:
        ExperimentError: It can't be one.
    """
    store = Store(Path(runs_dir))
    store.check(writing=writing)
    for study in store.old_studies():
        folder = store.runs / study
        typer.echo(
            f"{folder} has the layout of an earlier version: it is not continued, but stays readable: "
            f"varscale fit-laws --runs {folder}/laws/runs.csv",
            err=True,
        )
    return store


def tracking_store(tracking_uri: str | None, store: Store) -> str:
    """MLflow's store: the one that is named, or SQLite in the runs folder."""
    if tracking_uri is None and re.search(r"\?|%[0-9A-Fa-f]{2}", str(store.runs.resolve())):
        raise ExperimentError(f"--runs-dir {store.runs}: SQLite can't lie below a folder with ? or %20 in its name")
    return tracking_uri or store.tracking_uri


def whole_numbers(option: str, text: str, least: int = 0) -> list[int]:
    """Numbers of an option such as 12,16,20."""
    if not all(part.strip().isdecimal() and least <= int(part) < 2**31 for part in text.split(",")):
        raise ExperimentError(f"{option} {text[:100]}: expected whole numbers from {least} up, such as 1,2,3")
    return [int(part) for part in text.split(",")]


@contextmanager
def mistakes_as_one_line() -> Iterator[None]:
    """For values and files of the user's that libraries refuse with a ValueError of their own."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, MENDABLE):
            raise
        raise ExperimentError(textwrap.shorten(str(error), 400, placeholder=" …")) from error
