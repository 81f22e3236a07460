"""Options that several verbs have, how they are read, and which errors are for people: one line, no traceback."""

import re
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from analysis.errors import TableError
from varscale.errors import ExperimentError, UserError
from varscale.store.layout import DEFAULT_RUNS, Store

if TYPE_CHECKING:
    from analysis.checks.warnings import LawWarning
    from analysis.results import LawsResult
    from sweeps.view import SweepView
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
Launcher = Annotated[Literal["local", "slurm"], typer.Option(help="What carries the runs out.")]
SiteName = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE[:NAME]", help="Of Slurm: a site of ~/.config/varscale/sites.yaml, or a file."),
]
Workers = Annotated[int | None, typer.Option(help="Runs at once; default: one a GPU, or one a processor.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance, at the last scale.")]
GuidanceSchedules = Annotated[
    Literal["ramp", "constant"], typer.Option(help="Guidance grows from 0 at the first scale, or is the same at all.")
]
Temperature = Annotated[float, typer.Option(help="Below 1: likelier tokens.")]
TopK = Annotated[int, typer.Option(help="Sample among the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Sample among tokens of this probability; 0: all.")]
Smooth = Annotated[bool, typer.Option("--smooth", help="Mix codes: smoother, but not for measures.")]
NoiseSeed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed.")]
ShowScales = Annotated[bool, typer.Option("--show-scales", help="Show the picture after each scale.")]
ClassifierName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Classifier of candidates: a model of torchvision's, or rings-classifier."),
]
ClassifierWeights = Annotated[
    Path | None, typer.Option(help="File of its weights; without --classifier a whole model, in TorchScript.")
]
TableParams = Annotated[str | None, typer.Option(metavar="COLUMN", help="Of the table: parameters.")]
TableTokens = Annotated[str | None, typer.Option(metavar="COLUMN", help="Of the table: training tokens.")]
TokensFromFlops = Annotated[float | None, typer.Option(help="Of the table: C = k N D with this k gives the third.")]
TableUnits = Annotated[
    list[str] | None,
    typer.Option("--unit", metavar="ROLE=UNIT", help="Of the table: unit of a column, such as flops=PFLOP."),
]
TableWhere = Annotated[list[str] | None, typer.Option(help="Of the table: condition on rows, such as 'loss < 5'.")]
RUNS = str(DEFAULT_RUNS)
MENDABLE = (UserError, TableError, OSError)
"""What a person who uses varscale can mend; printed as one line."""


def load(
    experiment: str,
    overrides: list[str] | None,
    depths: str | None = None,
    workers: int | None = None,
    workers_option: str = "--workers",
) -> "Experiment":
    """The experiment with `--set`, `--depths` and `--workers` (or as that option is called) merged in."""
    from varscale.config.yaml import load_experiment  # half a second, which --help can do without

    options: dict[str, str] = {}  # override → the option that it stands for, which messages name instead
    if depths is not None:
        options[f"grid.depths={whole_numbers('--depths', depths, least=1)}"] = f"--depths {depths}"
    if workers is not None:
        if workers < 1:
            raise ExperimentError(f"{workers_option} {workers}: expected 1 or more")
        options[f"runtime.workers={workers}"] = f"{workers_option} {workers}"
    try:
        loaded = load_experiment(experiment, [*(overrides or ()), *options])
    except ExperimentError as error:
        message = str(error)
        for override, option in options.items():
            message = message.replace(f"--set {override}", option)
        raise ExperimentError(message) from None
    return loaded if depths is None else loaded.with_variants_in_grid()


def load_parts(
    experiment: str, overrides: list[str] | None, depths: str | None = None, workers: int | None = None
) -> "dict[str, Experiment]":
    """`load` for each member of a file, as `file:member`, or for the one experiment, as it was named."""
    from varscale.config.yaml import parts_of

    return {part: load(part, overrides, depths, workers) for part in parts_of(experiment)}


def members_of(experiment: str) -> dict[str, str]:
    """Name of each member of a file, and of its study; nothing of an experiment by itself."""
    parts = load_parts(experiment, None)
    return {} if experiment in parts else {part.rpartition(":")[2]: settings.name for part, settings in parts.items()}


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
    parts = [part.strip() for part in text.split(",")]
    # Python refuses to make a number of some thousand digits
    if not all(part.isdecimal() and len(part) < 20 and least <= int(part) < 2**31 for part in parts):
        raise ExperimentError(f"{option} {text[:100]}: expected whole numbers from {least} up, such as 1,2,3")
    return [int(part) for part in parts]


def check_output(place: str, path: Path) -> None:
    """Raise `ExperimentError` where no file can be written at `path`: before the work that it is to hold, not after."""
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "there is a folder of that name")
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        with TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise ExperimentError(f"{place}: can't be written ({error.strerror}); name another file") from None


def check_new_output(path: Path) -> None:
    """`check_output` of `--out`, where a file that is there may be somebody's own work: it is never replaced."""
    check_output(f"--out {path}", path)
    if path.exists():
        raise ExperimentError(f"--out {path}: is there already; delete it, or name another file")


@contextmanager
def mistakes_as_one_line() -> Iterator[None]:
    """For values and files of the user's that libraries refuse with errors of their own, and for too little memory."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, MENDABLE):
            raise
        raise ExperimentError(textwrap.shorten(str(error), 400, placeholder=" …")) from error
    except RuntimeError as error:  # PyTorch has a class of its own for GPUs alone
        if not re.search("can't allocate memory|out of memory", str(error)):
            raise
        raise ExperimentError(f"out of memory: {textwrap.shorten(str(error), 300, placeholder=' …')}") from error


def ask_about(result: "LawsResult") -> None:
    """Say on standard error what is odd about a table and its grid; what is of single laws is not said."""
    from analysis.report.sentences import doubts

    for doubt in doubts(result):
        typer.echo(doubt, err=True)
    of_laws = ("law-skipped", "few-sizes", "isoflop-refused", "parabola-bias", "approaches-disagree", "point-unused")
    say([each for each in result.warnings if not each.fit and each.code not in of_laws])


def say(warnings: "Iterable[LawWarning]") -> None:
    """Print the first warning of each code on standard error."""
    from analysis.report.terminal import first_of_each

    lines = first_of_each(warnings, "which fit-laws shows")
    if re.search("--(checkpoints|reduce|group)", " ".join(lines)):
        lines.append("--checkpoints, --reduce and --group are fit-laws'; here --where says which rows to take")
    for line in lines:
        typer.echo(line, err=True)


def patient_view() -> "SweepView":
    """Shows on standard error how far a run is: on a terminal at once, in a log now and then."""
    from rich.console import Console

    from sweeps.view import SweepView

    return SweepView(Console(stderr=True), patient=True)
