"""The verb that writes down what a larger budget will reach, and later says how that came out."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from varscale import __version__
from varscale.cli.laws import study_name, study_results
from varscale.cli.options import RUNS, RunsDir, open_store
from varscale.errors import ExperimentError
from varscale.store.atomic import write_atomically
from varscale.store.layout import Store

CHECK = "check"


def forecast(
    what: Annotated[
        str | None, typer.Argument(metavar="EXPERIMENT|check", help="Whose runs to forecast from; or check them all.")
    ] = None,
    flops: Annotated[float | None, typer.Option(help="Training FLOPs of the run that is to come.")] = None,
    runs: Annotated[list[Path] | None, typer.Option(help="A table of runs instead of an experiment's.")] = None,
    params: Annotated[str | None, typer.Option(metavar="COLUMN", help="Of the table: parameters.")] = None,
    flops_column: Annotated[str | None, typer.Option(metavar="COLUMN", help="Of the table: training FLOPs.")] = None,
    loss: Annotated[str | None, typer.Option(metavar="COLUMN", help="Of the table: loss.")] = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Write down what a larger budget will reach, before it is trained; `forecast check` says how it came out."""
    if (what is None) == (not runs) and what != CHECK:
        raise typer.BadParameter("give an EXPERIMENT or --runs FILE, one of them, or check")
    if what == CHECK and flops is not None:
        raise typer.BadParameter("--flops: check looks at all forecasts")
    store = open_store(runs_dir)
    if what == CHECK:
        _check(store, runs or [], flops_column or "flops")
        return
    if flops is None:
        raise typer.BadParameter("--flops names the budget, such as --flops 1e21")
    from analysis.forecasts import forecast_at
    from analysis.options import FitOptions
    from analysis.pipeline import fit_laws
    from analysis.tables.reading import read_runs

    if runs:
        table, name = read_runs(runs), ", ".join(path.name for path in runs)
        options = FitOptions(params=params, flops=flops_column, loss=loss, law=("power",), holdout=False)
    else:
        name = study_name(str(what), store)
        table, options = study_results(store, name), FitOptions(law=("power",), holdout=False)
    kept = forecast_at(fit_laws(table, options), flops, name, time.time())
    folder = store.forecasts
    folder.mkdir(parents=True, exist_ok=True)
    of = Path(name.partition(",")[0]).stem
    path = folder / f"{of}-{flops:.4g}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(kept.made))}.json"
    write_atomically(path, kept.as_text().encode())
    for value in kept.values:
        low, high = value.ci95
        typer.echo(f"{value.target} at {flops:.3g} FLOPs: {value.value:.4g} [{low:.4g}, {high:.4g}]")
    typer.echo(f"{kept.extrapolation:.3g} times the largest budget, by version {__version__}\n{path}")


def _check(store: Store, tables: list[Path], flops_column: str) -> None:
    """Compare every forecast of the runs folder with the runs that came later, and print the track record."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from analysis.errors import TableError
    from analysis.forecasts import ForecastOutcome, KeptForecast, outcomes, read_forecast, track_record
    from analysis.tables.reading import read_runs

    found: list[tuple[KeptForecast, list[ForecastOutcome]]] = []
    for path in sorted(store.forecasts.glob("*.json")):
        try:
            kept = read_forecast(path.read_text(errors="replace"), str(path))
        except (TableError, OSError) as error:
            typer.echo(f"left out: {error}", err=True)
            continue
        if store.study(kept.study).record.exists():
            rows = study_results(store, kept.study)
            found.append((kept, outcomes(kept, rows, "train_flops", _ended(store, rows))))
        elif tables:
            found.append((kept, outcomes(kept, read_runs(tables), flops_column, {})))
        else:
            typer.echo(f"{path}: of {kept.study}; --runs FILE names the table with the runs that came later", err=True)
    if not found:
        raise ExperimentError(f"{store.forecasts}: no forecasts; `varscale forecast EXPERIMENT --flops …` makes one")
    record, table = track_record(found), Table(box=SIMPLE)
    for heading in ("forecast of", "FLOPs", "target", "forecast", "observed", "error", "seed deviations", "inside"):
        table.add_column(heading, justify="left" if heading in ("forecast of", "target") else "right")
    for each in record.outcomes:
        low, high = each.value.ci95
        seeds = f"{each.seed_deviations:+.1f}" if each.seed_deviations is not None else ""
        inside = "made after its run" if each.early else "yes" if each.inside else "no"
        forecast_text = f"{each.value.value:.4g} [{low:.4g}, {high:.4g}]"
        numbers = (f"{each.forecast.flops:.3g}", each.value.target, forecast_text, f"{each.observed:.4g}")
        table.add_row(each.forecast.study, *numbers, f"{each.error_percent:+.2f}%", seeds, inside)
    console = Console()
    if record.outcomes:
        console.print(table)
    hits, of = record.hits()
    if of:
        mean = sum(abs(each.error_percent) for each in record.counted) / of
        console.print(f"{hits} of {of} inside their 95% interval, mean error {mean:.2g}%", highlight=False)
    for kept in record.waiting:
        console.print(f"no run of {kept.flops:.3g} FLOPs yet: {kept.study}", highlight=False)


def _ended(store: Store, rows: Any) -> dict[Any, float]:
    """When each row's run ended."""
    from varscale.store.layout import RunFiles
    from varscale.store.records import read_result

    times = {}
    for index, run in rows["run"].items():
        result = read_result(RunFiles(store.runs / "cells" / str(run)))
        if result is not None:
            times[index] = result.time
    return times
