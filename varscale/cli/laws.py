"""`varscale fit-laws`, and the laws at the end of a sweep."""

import textwrap
from collections.abc import Collection, Mapping
from dataclasses import fields
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varscale import __version__
from varscale.cli.options import RUNS, RunsDir, TrackingUri, load, members_of, open_store, tracking_store
from varscale.errors import ExperimentError
from varscale.store.atomic import write_atomically
from varscale.store.layout import Store, StudyFiles

if TYPE_CHECKING:
    from analysis.options import FitOptions
    from analysis.report.writing import WrittenLaws
    from varscale.store.records import FittedLaws

# an option of fit-laws, by what it is about
_table = partial(typer.Option, rich_help_panel="The table and its columns")
_column = partial(_table, metavar="COLUMN")
_rows = partial(typer.Option, rich_help_panel="Which rows count")
_fitting = partial(typer.Option, rich_help_panel="What is fitted, and how")
_asked = partial(typer.Option, rich_help_panel="What the laws are asked")
_written = partial(typer.Option, rich_help_panel="What is written")


def fit_laws(
    context: typer.Context,
    experiment: Annotated[
        list[str] | None, typer.Argument(metavar="EXPERIMENT", help="Experiment whose results to fit.")
    ] = None,
    runs: Annotated[
        list[Path] | None, _table(help="Table: CSV, Markdown, Parquet, JSON lines; or several, such as 'a*.csv'.")
    ] = None,
    from_mlflow: Annotated[bool, _table("--from-mlflow", help="Read MLflow's runs.")] = False,
    params: Annotated[str | None, _column(help="Parameters, N.")] = None,
    flops: Annotated[str | None, _column(help="Training FLOPs, C.")] = None,
    tokens: Annotated[str | None, _column(help="Training tokens, D.")] = None,
    loss: Annotated[str | None, _column(help="Loss.")] = None,
    budget: Annotated[str | None, _column("--budget-column", help="Nominal budget of IsoFLOP sets.")] = None,
    seed_column: Annotated[str | None, _column(help="Seed of the run.")] = None,
    run_id: Annotated[str | None, _column(help="Name of the run.")] = None,
    group: Annotated[str | None, _column(help="Groups, fitted apart and compared.")] = None,
    units: Annotated[
        list[str] | None,
        _table("--unit", metavar="ROLE=UNIT", help="Unit of a column, such as flops=PFLOP or params=M."),
    ] = None,
    where: Annotated[list[str] | None, _rows(help="Condition on rows, such as 'loss < 5'.")] = None,
    drop_highest: Annotated[int, _rows(help="Leave out so many rows of the highest loss.")] = 0,
    reduce: Annotated[str, _rows(help="Take min, mean, median or last of rows alike in N, C, D and seed.")] = "",
    by: Annotated[
        list[str] | None, _rows(metavar="COLUMN", help="Column over which --reduce takes it; repeatable.")
    ] = None,
    tokens_from_flops: Annotated[
        float | None, _rows(help="C = k N D with this k, such as 6, gives the third of the three.")
    ] = None,
    law: Annotated[list[str] | None, _fitting(metavar="ID", help="Law to fit; repeatable.")] = None,
    target: Annotated[list[str] | None, _fitting(metavar="COLUMN", help="What to fit; repeatable.")] = None,
    x: Annotated[list[str] | None, _fitting(metavar="COLUMN", help="What to fit it against; repeatable.")] = None,
    objective: Annotated[str, _fitting(help="huber, lad, lsq-log or lsq.")] = "huber",
    delta: Annotated[float, _fitting(help="Huber's δ.")] = 1e-3,
    offset: Annotated[float | None, _fitting(help="Pin the offset E.")] = None,
    offset_source: Annotated[str, _fitting(help="Where the pinned offset comes from.")] = "",
    predict: Annotated[list[str] | None, _asked(help="Point to predict, such as flops=1e21.")] = None,
    allocate: Annotated[
        list[float] | None, _asked("--budget", metavar="FLOPS", help="Find the best size for it.")
    ] = None,
    checkpoints: Annotated[bool, _rows("--checkpoints", help="Rows are checkpoints of runs.")] = False,
    frontier: Annotated[
        str, _rows(metavar="RULE", help="Which of scattered runs to fit: envelope, hull, bins or all.")
    ] = "",
    annealing_horizon: Annotated[
        float | None, _rows(metavar="STEPS", help="Steps that a fall of the rate takes to act, in law annealing.")
    ] = None,
    compare: Annotated[list[str] | None, _asked(metavar="GROUP", help="Group to compare, repeatedly.")] = None,
    published: Annotated[bool, _written("--published", help="Draw VAR's published laws beside.")] = False,
    holdout: Annotated[bool, _asked(help="Refit with runs left out, and report the errors.")] = True,
    holdout_where: Annotated[str | None, _asked(help="Rows to hold out, such as 'flops >= 1e21'.")] = None,
    title: Annotated[
        str | None, _written(help="Heading of the report.", show_default="the experiment, or the files")
    ] = None,
    bootstrap_draws: Annotated[int, _fitting(help="Draws of the bootstrap.")] = 1000,
    seed: Annotated[int, _fitting(help="Seed of the bootstrap.")] = 0,
    out: Annotated[Path | None, _written(help="Folder for laws.json, report and figures.")] = None,
    runs_dir: RunsDir = RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Fit scaling laws to an experiment's results, MLflow's runs, or any table.

    A sweep's laws, and what they say of a larger budget:
      varscale fit-laws rings --predict flops=1e13
    The best size and data for a budget, from any table of runs:
      varscale fit-laws --runs t.csv --params N --flops C --tokens D --budget 1e24
    A table of images seen, which says nothing of compute:
      varscale fit-laws --runs t.csv --params N --tokens D --unit tokens=images
    Compute that follows from the other two:
      varscale fit-laws --runs t.csv --params N --tokens D --tokens-from-flops 6
    Families side by side:
      varscale fit-laws --runs t.csv --flops C --group family
    Training curves; scattered runs that share no budgets:
      varscale fit-laws --runs 'logs/*.csv' --checkpoints --run-id run --flops C
      varscale fit-laws --runs t.csv --flops C --frontier hull
    How well the largest runs are predicted from the others:
      varscale fit-laws --runs t.csv --flops C --holdout-where 'C >= 1e21'
    """
    from analysis.options import FitOptions
    from analysis.tables.reading import read_runs

    named = experiment or []
    if runs and named and all(Path(each).is_file() and Path(each).suffix not in (".yaml", ".yml") for each in named):
        runs, named = [*runs, *map(Path, named)], []  # the shell made several files of a pattern
    if len(named) != (not runs):
        raise typer.BadParameter("give an EXPERIMENT or --runs FILE, one of them")
    if from_mlflow and runs:
        raise typer.BadParameter("--from-mlflow reads an EXPERIMENT's runs; it doesn't go with --runs FILE")
    if runs:
        folder, table = Path("laws"), read_runs(runs)
        name = ", ".join(table.attrs["sources"][:3]) + (", …" if len(table.attrs["sources"]) > 3 else "")
    else:
        store = open_store(runs_dir, writing=False)
        name, members = study_and_members(named[0], store)
        folder = store.study(name).laws
        if from_mlflow and members:
            raise typer.BadParameter(f"--from-mlflow reads one study; name a member, such as {named[0]}:{min(members)}")
        if from_mlflow:
            from varscale.tracking import runs_table

            table = runs_table(tracking_store(tracking_uri, store), name)
        else:
            table = study_results(store, name, members)
    _say_what_is_left_out(table, name)
    choices: dict[str, Any] = {"title": name, **_comparing(table)}
    for field in fields(FitOptions):  # which knows the defaults of what was not given
        if (value := context.params[field.name]) not in (None, "", [], ()):
            choices[field.name] = tuple(value) if isinstance(value, list) else value
    written = _fit(table, FitOptions(**choices), out or folder)
    typer.echo(f"{written.laws_json}\n{written.report_html}")


def fit_sweep(rows: list[dict[str, Any]], failed: Collection[str], files: StudyFiles) -> "WrittenLaws | None":
    """Fit a sweep's results, unless their laws stand; where they allow no law, its table is written all the same."""
    from varscale.store.fingerprint import fingerprint
    from varscale.store.records import FittedLaws

    fitted = fingerprint(kind="laws", rows=rows, missing=list(failed), version=__version__)
    if FittedLaws.read(files.fitted) == _fitted_laws(fitted, files.laws):
        return None
    import pandas as pd

    from analysis.errors import TableError
    from analysis.options import FitOptions

    table = pd.DataFrame(rows)
    table.attrs["missing"] = tuple(failed)
    try:
        written = _fit(table, FitOptions(title=files.name, **_comparing(table)), files.laws)
    except TableError as error:
        write_atomically(files.laws / "runs.csv", table.to_csv(index=False).encode())
        cells = len({row["run"] for row in rows})
        raise ExperimentError(f"{cells} cells are in {files.laws / 'runs.csv'}, but {error}") from error
    _fitted_laws(fitted, files.laws).write(files.fitted)
    return written


def study_and_members(experiment: str, store: Store) -> tuple[str, dict[str, str]]:
    """Name of a study, and of a file with members the name of each one's own study."""
    from varscale.config.yaml import name_of

    if experiment == Path(experiment).name and store.study(experiment).record.exists():
        return experiment, {}
    members = members_of(experiment)
    return (name_of(experiment) if members else load(experiment, None).name), members


def _comparing(table: Any) -> dict[str, Any]:
    """What is compared of a table of several members: nothing is of another."""
    from analysis.tables.evaluations import comparable_targets
    from sweeps.members import MEMBER

    if MEMBER not in table.columns:
        return {}
    members = tuple(table[MEMBER].unique())
    return {"group": MEMBER, "target": comparable_targets(table), "compare": members if len(members) > 1 else ()}


def _fitted_laws(fitted: str, folder: Path) -> "FittedLaws":
    """The laws in a folder as they are now."""
    from varscale.store.records import FittedLaws

    paths = [path for path in (folder / "laws.json", folder / "report.html") if path.exists()]
    return FittedLaws(fitted=fitted, laws={path.name: sha256(path.read_bytes()).hexdigest() for path in paths})


def study_results(store: Store, name: str, members: Mapping[str, str] | None = None, recipe: str = "") -> Any:
    """A study's runs table, or one of all its members' studies, with the cells that are missing from it.

    `recipe` is another one than the study's latest.

    Raises:
        ExperimentError: It has none yet.
    """
    import pandas as pd

    from sweeps.members import members_table
    from sweeps.study import study_table

    found = members_table(store, members) if members else study_table(store, name, recipe)
    if found is None or not found.rows:
        folder = store.study(name).folder
        raise ExperimentError(f"{folder}: no finished cells; run `varscale sweep {name}` first")
    table = pd.DataFrame(found.rows)
    table.attrs |= {"missing": tuple(found.missing), "others": found.others}
    return table


def _say_what_is_left_out(table: Any, name: str) -> None:
    if others := table.attrs.get("others"):
        typer.echo(f"left out: {others} cells of {name} that were trained by other recipes than the latest", err=True)
    if missing := table.attrs.get("missing"):
        some = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        typer.echo(f"missing: {len(missing)} cells of {name} have no result: {some}", err=True)


def _check_writable(folder: Path) -> None:
    """Finds out before the fit whether its files can be written."""
    from tempfile import TemporaryFile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("laws.json", "report.html", "runs.csv"):
            if (folder / name).is_dir():
                raise IsADirectoryError(None, f"{name} is a folder")
        with TemporaryFile(dir=folder) as probe:
            probe.write(b"varscale")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ExperimentError(f"{folder}: laws can't be written here ({reason}); choose another --out") from error


def _fit(table: Any, options: "FitOptions", folder: Path) -> "WrittenLaws":
    from rich.console import Console

    from analysis.errors import TableError
    from analysis.pipeline import fit_laws
    from analysis.progress import progress
    from analysis.report.terminal import terminal_summary
    from analysis.report.writing import write

    _check_writable(folder)
    with progress(partial(typer.echo, err=True)):
        try:
            result = fit_laws(table, options)
        except TableError as error:  # a reason for every law and target
            raise TableError(textwrap.shorten(str(error), 240, placeholder=" …")) from error
        Console().print(terminal_summary(result))
        return write(result, folder)
