"""The `varscale` command: one short function a verb; each imports what it needs when it runs, so --help is quick."""

import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from varscale import __version__
from varscale.config import Experiment
from varscale.config_files import ExperimentError, load_experiment
from varscale.files import ExperimentFiles, fingerprint, read_json, write_atomically, write_json

if TYPE_CHECKING:
    from analysis.options import FitOptions


class _Commands(typer.core.TyperGroup):
    """The verbs; an interrupted one says so, which Typer alone doesn't."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, SystemExit) as stop:
            # Lightning turns an interruption into an exit
            if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            typer.echo("varscale: interrupted; what is done is kept, call it again to go on", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="Scaling-law studies of visual autoregressive (next-scale prediction) image models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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


@app.command()
def sweep(
    experiment: ExperimentName,
    depths: Depths = None,
    workers: Workers = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    set_: Overrides = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Train the grid (what is finished is not trained again), then fit the laws."""
    settings = _load(experiment, set_, depths, workers)
    if dry_run:
        _print_plan(settings, runs_dir)
        return
    from rich.console import Console

    from sweeps.orchestrator import run_sweep
    from sweeps.view import SweepView
    from varscale.tracking import Forwarder

    files = ExperimentFiles(runs_dir, settings.name)
    console = Console()
    forwarder = Forwarder(_store(tracking_uri, files), files, notify=partial(console.print, markup=False))
    outcome = run_sweep(settings, files, SweepView(console), forwarder)
    try:
        for title, reason in outcome.failed.items():
            console.print(f"failed: {title}: {reason}", style="red", markup=False, highlight=False)
        forwarder.finish(outcome.record, "FAILED" if outcome.failed else "FINISHED")
        if not outcome.rows:
            raise typer.Exit(1)
        fitted = fingerprint(kind="laws", rows=outcome.rows, version=__version__)
        if read_json(files.laws_state) != {"fitted": fitted, "laws": _digest(files.laws)}:
            written = _fit_sweep(outcome.rows, settings.name, files)
            forwarder.attach(outcome.record, [written.laws_json, written.report_html, *written.figures])
            write_json(files.laws_state, {"fitted": fitted, "laws": _digest(files.laws)})
        else:
            console.print("nothing is new: the laws stand")
    finally:
        forwarder.stop()
    _print_paths(files.laws / "laws.json", files.laws / "report.html")
    if outcome.failed:
        raise typer.Exit(1)


@app.command()
def plan(
    experiment: ExperimentName, depths: Depths = None, set_: Overrides = None, runs_dir: RunsDir = DEFAULT_RUNS
) -> None:
    """Show the cells: parameters, FLOPs, steps, memory, and hours where the machine was measured."""
    _print_plan(_load(experiment, set_, depths), runs_dir)


@app.command()
def status(
    experiment: ExperimentName, depths: Depths = None, set_: Overrides = None, runs_dir: RunsDir = DEFAULT_RUNS
) -> None:
    """Show each cell's state, and where its log is."""
    from rich.console import Console

    from sweeps.status import status_table

    settings = _load(experiment, set_, depths)
    Console().print(status_table(settings, ExperimentFiles(runs_dir, settings.name)))


@app.command()
def train(
    experiment: ExperimentName,
    depth: Annotated[int, typer.Option(min=1, help="Transformer blocks.")],
    budget: Annotated[float | None, typer.Option(help="Training FLOPs; default: optim.epochs passes.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed.")] = 0,
    set_: Overrides = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
) -> None:
    """Train one model in a single run, without trunk and branch; with `by_depth`'s recipe where no budget is given."""
    from sweeps.single import train_single

    if budget is not None and not 0 < budget < float("inf"):
        raise ExperimentError(f"--budget {budget:g}: expected training FLOPs, such as 1e15")
    with _mistakes_as_one_line(of_training=True):
        result = train_single(_load(experiment, set_), depth, budget, seed, runs_dir)
    typer.echo(result)


@app.command(name="train-tokenizer")
def train_tokenizer(experiment: ExperimentName, set_: Overrides = None, runs_dir: RunsDir = DEFAULT_RUNS) -> None:
    """Train and measure the tokenizer."""
    from sweeps.single import make_tokenizer

    with _mistakes_as_one_line(of_training=True):
        typer.echo(make_tokenizer(_load(experiment, set_), runs_dir).result)


@app.command()
def tokenize(experiment: ExperimentName, set_: Overrides = None, runs_dir: RunsDir = DEFAULT_RUNS) -> None:
    """Encode the images into the token store."""
    from sweeps.single import make_tokens

    with _mistakes_as_one_line(of_training=True):
        typer.echo(make_tokens(_load(experiment, set_), runs_dir))


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="Folder of a finished cell.")],
    labels: Annotated[str, typer.Option(help="Classes, such as 0,1,2.")] = "0",
    count: Annotated[int, typer.Option(min=1, help="Images of each class.")] = 4,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance at the last scale.")] = 1.5,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among tokens of this probability; 0: all.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("samples.png"),
) -> None:
    """Sample images of a finished cell."""
    from varscale.generation.from_files import draw

    if out.is_dir():
        raise ExperimentError(f"--out {out}: a folder; name the PNG to write")
    with _mistakes_as_one_line():
        draw(run, _whole_numbers("--labels", labels), count, guidance, top_k, top_p, seed, out)
    typer.echo(out)


@app.command(name="fit-laws")
def fit_laws(
    experiment: Annotated[str | None, typer.Argument(help="Experiment whose results to fit.")] = None,
    runs: Annotated[list[Path] | None, typer.Option(help="CSV, Parquet or JSON-lines table; repeatable.")] = None,
    from_mlflow: Annotated[bool, typer.Option("--from-mlflow", help="Read MLflow's runs.")] = False,
    params: Annotated[str | None, typer.Option(metavar="COLUMN", help="Parameters, N.")] = None,
    flops: Annotated[str | None, typer.Option(metavar="COLUMN", help="Training FLOPs, C.")] = None,
    tokens: Annotated[str | None, typer.Option(metavar="COLUMN", help="Training tokens, D.")] = None,
    loss: Annotated[str | None, typer.Option(metavar="COLUMN", help="Loss.")] = None,
    budget_column: Annotated[str | None, typer.Option(metavar="COLUMN", help="Nominal budget of IsoFLOP sets.")] = None,
    seed_column: Annotated[str | None, typer.Option(metavar="COLUMN", help="Seed of the run.")] = None,
    run_id: Annotated[str | None, typer.Option(metavar="COLUMN", help="Name of the run.")] = None,
    group: Annotated[str | None, typer.Option(metavar="COLUMN", help="Groups, fitted apart and compared.")] = None,
    unit: Annotated[
        list[str] | None, typer.Option(metavar="ROLE=UNIT", help="Unit of a column, such as flops=PFLOP or params=M.")
    ] = None,
    where: Annotated[list[str] | None, typer.Option(help="Condition on rows, such as 'loss < 5'.")] = None,
    drop_highest: Annotated[int, typer.Option(help="Leave out so many rows of the highest loss.")] = 0,
    tokens_from_flops: Annotated[float | None, typer.Option(help="Set D = C / (k N) with this k, such as 6.")] = None,
    law: Annotated[list[str] | None, typer.Option(metavar="ID", help="Law to fit; repeatable.")] = None,
    target: Annotated[list[str] | None, typer.Option(metavar="COLUMN", help="What to fit; repeatable.")] = None,
    x: Annotated[list[str] | None, typer.Option(metavar="COLUMN", help="What to fit it against; repeatable.")] = None,
    objective: Annotated[str, typer.Option(help="huber, lad, lsq-log or lsq.")] = "huber",
    delta: Annotated[float, typer.Option(help="Huber's δ.")] = 1e-3,
    offset: Annotated[float | None, typer.Option(help="Pin the offset E.")] = None,
    offset_source: Annotated[str, typer.Option(help="Where the pinned offset comes from.")] = "",
    predict: Annotated[list[str] | None, typer.Option(help="Point to predict, such as flops=1e21.")] = None,
    budget: Annotated[list[float] | None, typer.Option(metavar="FLOPS", help="Find the best size for it.")] = None,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Rows are checkpoints of runs.")] = False,
    compare: Annotated[list[str] | None, typer.Option(metavar="GROUP", help="Group to compare; twice.")] = None,
    published: Annotated[bool, typer.Option("--published", help="Draw VAR's published laws beside.")] = False,
    holdout: Annotated[bool, typer.Option(help="Refit with runs left out, and report the errors.")] = True,
    holdout_where: Annotated[str | None, typer.Option(help="Rows to hold out, such as 'C >= 1e21'.")] = None,
    title: Annotated[
        str | None, typer.Option(help="Heading of the report.", show_default="the experiment, or the files")
    ] = None,
    bootstrap_draws: Annotated[int, typer.Option(help="Draws of the bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for laws.json, report and figures.")] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Fit scaling laws to an experiment's results, MLflow's runs, or any table."""
    from analysis.options import FitOptions
    from analysis.reading import read_runs

    if (experiment is None) == (not runs):
        raise typer.BadParameter("give an EXPERIMENT or --runs FILE, one of them")
    name = ", ".join(path.name for path in runs or ()) if experiment is None else _load(experiment, None).name
    files = ExperimentFiles(runs_dir, name)
    if runs:
        table = read_runs(runs)
    elif from_mlflow:
        from varscale.tracking import runs_table

        table = runs_table(_store(tracking_uri, files), name)
    else:
        table = _results(files)
    options = FitOptions(
        title=title or name,
        params=params,
        flops=flops,
        tokens=tokens,
        loss=loss,
        budget=budget_column,
        seed_column=seed_column,
        run_id=run_id,
        group=group,
        units=tuple(unit or ()),
        where=tuple(where or ()),
        drop_highest=drop_highest,
        tokens_from_flops=tokens_from_flops,
        law=tuple(law or ()),
        target=tuple(target or ()),
        x=tuple(x or ()),
        objective=objective,
        delta=delta,
        offset=offset,
        offset_source=offset_source,
        predict=tuple(predict or ()),
        allocate=tuple(budget or ()),
        checkpoints=checkpoints,
        compare=tuple(compare or ()),
        published=published,
        holdout=holdout,
        holdout_where=holdout_where or "",
        bootstrap_draws=bootstrap_draws,
        seed=seed,
    )
    written = _fit(table, options, out or (files.laws if experiment else Path("laws")))
    _print_paths(written.laws_json, written.report_html)


@app.command()
def dashboard(
    port: Annotated[int, typer.Option(help="Port on loopback.")] = 5000,
    runs_dir: RunsDir = DEFAULT_RUNS,
    tracking_uri: TrackingUri = None,
) -> None:
    """Deliver what MLflow has not got yet, then serve its dashboard on loopback."""
    import subprocess

    from varscale.tracking import dashboard_command, dashboard_environment, dashboard_url, deliver_all

    uri = _store(tracking_uri, ExperimentFiles(runs_dir, ""))
    if deliver_all(runs_dir, uri, notify=typer.echo).problem:
        raise typer.Exit(1)  # the reason was printed
    typer.echo(dashboard_url(uri, port))
    command = dashboard_command(uri, port)
    if command:  # a tracking server is its own dashboard
        raise typer.Exit(subprocess.call(command, env=dashboard_environment()))


@app.command(name="import-official")
def import_official(
    checkpoint: Annotated[Path, typer.Argument(help="The reference's vae_*.pth or var_*.pth.")],
    out: Annotated[Path, typer.Argument(help="File to write, .safetensors.")],
    patch_nums: Annotated[str, typer.Option(help="Sides of the token maps.")] = "1,2,3,4,5,6,8,10,13,16",
    tokenizer: Annotated[Path | None, typer.Option(help="Imported tokenizer, for a var_*.pth.")] = None,
) -> None:
    """Turn a checkpoint of FoundationVision/VAR into ours."""
    from varscale.official_files import import_checkpoint

    with _mistakes_as_one_line():
        import_checkpoint(checkpoint, out, _whole_numbers("--patch-nums", patch_nums), tokenizer)
    typer.echo(out)


@app.command(name="export-official")
def export_official(
    model: Annotated[Path, typer.Argument(help="Our tokenizer or weights, .safetensors.")],
    out: Annotated[Path, typer.Argument(help="File to write, .pth.")],
) -> None:
    """Turn our model into a checkpoint of FoundationVision/VAR."""
    from varscale.official_files import export_checkpoint

    with _mistakes_as_one_line():
        export_checkpoint(model, out)
    typer.echo(out)


def main() -> None:
    """Run the command; errors that a person can mend are one line, without traceback."""
    _refuse_shadowed_packages()
    try:
        app(prog_name="varscale")
    except Exception as error:
        if not _mendable(error):
            raise
        sys.exit(f"varscale: {error}")


def _load(
    experiment: str, overrides: list[str] | None, depths: str | None = None, workers: int | None = None
) -> Experiment:
    overrides = list(overrides or ())
    if depths is not None:
        overrides.append(f"grid.depths={_whole_numbers('--depths', depths, least=1)}")
    if workers is not None:
        overrides.append(f"runtime.workers={workers}")
    loaded = load_experiment(experiment, overrides)
    return loaded if depths is None else loaded.with_variants_in_grid()


def _store(tracking_uri: str | None, files: ExperimentFiles) -> str:
    """MLflow's store: the one that is named, or SQLite in the runs folder."""
    if tracking_uri is None and "?" in str(files.runs.resolve()):
        raise ExperimentError(f"--runs-dir {files.runs}: SQLite can't lie below a folder with ? in its name")
    return tracking_uri or files.tracking_uri


def _print_plan(experiment: Experiment, runs_dir: Path) -> None:
    from rich.console import Console

    from sweeps.status import plan_table

    Console().print(plan_table(experiment, ExperimentFiles(runs_dir, experiment.name)))


def _whole_numbers(option: str, text: str, least: int = 0) -> list[int]:
    if not all(part.strip().isdecimal() and int(part) >= least for part in text.split(",")):
        raise ExperimentError(f"{option} {text}: expected whole numbers from {least} up, such as 1,2,3")
    return [int(part) for part in text.split(",")]


@contextmanager
def _mistakes_as_one_line(of_training: bool = False) -> Iterator[None]:
    """For files and values of the user's that libraries refuse with errors of many kinds (a training with fewer)."""
    from pickle import UnpicklingError

    kinds = (ValueError,) if of_training else (ValueError, RuntimeError, UnpicklingError)
    try:
        yield
    except kinds as error:
        if _mendable(error):
            raise
        raise ExperimentError(textwrap.shorten(str(error), 400, placeholder=" …")) from error


def _fit_sweep(rows: list[dict[str, Any]], name: str, files: ExperimentFiles) -> Any:
    """Fit a sweep's results; where they allow no law, its table is written all the same."""
    import pandas as pd

    from analysis.errors import TableError
    from analysis.options import FitOptions

    table = pd.DataFrame(rows)
    try:
        return _fit(table, FitOptions(title=name), files.laws)
    except TableError as error:
        write_atomically(files.laws / "runs.csv", table.to_csv(index=False).encode())
        raise ExperimentError(f"{len(rows)} cells are in {files.laws / 'runs.csv'}, but {error}") from error


def _digest(laws: Path) -> list[str] | None:
    """Hashes of the laws and their report as they are now; None unless both are there."""
    from hashlib import sha256

    paths = [laws / "laws.json", laws / "report.html"]
    return [sha256(path.read_bytes()).hexdigest() for path in paths] if all(path.exists() for path in paths) else None


def _results(files: ExperimentFiles) -> Any:
    import pandas as pd

    from sweeps.status import finished_rows

    rows, others = finished_rows(files)
    if others:
        typer.echo(
            f"left out: {others} cells in {files.root} of other tokenizers, whose losses don't compare", err=True
        )
    if not rows:
        raise ExperimentError(f"{files.root}: no finished cells; run `varscale sweep {files.experiment}` first")
    return pd.DataFrame(rows)


def _fit(table: Any, options: "FitOptions", folder: Path) -> Any:
    from rich.console import Console

    from analysis.errors import TableError
    from analysis.pipeline import fit_laws
    from analysis.report import terminal_summary
    from analysis.writing import write

    try:
        result = fit_laws(table, options)
    except TableError as error:  # a reason for every law and target
        raise TableError(textwrap.shorten(str(error), 240, placeholder=" …")) from error
    Console().print(terminal_summary(result))
    return write(result, folder)


def _print_paths(*paths: Path) -> None:
    for path in paths:
        typer.echo(path)


def _mendable(error: Exception) -> bool:
    """Whether an error is about what the user gave us, by its type's name: naming the types would import torch."""
    names = {kind.__name__ for kind in type(error).__mro__}
    mendable = {
        "ExperimentError",
        "DataError",
        "TokenStoreError",
        "TableError",
        "SweepError",
        "TrackingError",
        "Diverged",
    }
    return bool(names & (mendable | {"OSError"}))


def _refuse_shadowed_packages() -> None:
    """Stop when `sweeps` or `analysis` of another project would be imported instead of ours."""
    from importlib.util import find_spec

    home = Path(__file__).resolve().parent.parent
    for package in ("sweeps", "analysis"):
        spec = find_spec(package)
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parent != home / package:
            found = "missing" if spec is None else f"shadowed by {spec.origin or spec.submodule_search_locations}"
            sys.exit(f"varscale: its package {package!r} is {found}; run varscale from another folder or environment")


if __name__ == "__main__":
    main()
