"""The verb that writes down what a larger budget will reach, and later says how that came out."""

import re
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varscale import __version__
from varscale.cli.laws import study_and_members, study_results
from varscale.cli.options import (
    RUNS,
    RunsDir,
    TableParams,
    TableTokens,
    TableUnits,
    TableWhere,
    TokensFromFlops,
    ask_about,
    open_store,
)
from varscale.errors import ExperimentError
from varscale.store.atomic import write_atomically
from varscale.store.layout import Store

if TYPE_CHECKING:
    from analysis.forecasts import ForecastFile, ForecastOutcome, ReadBy, TrackRecord

CHECK = "check"


def forecast(
    what: Annotated[
        str | None, typer.Argument(metavar="EXPERIMENT|check", help="Whose runs to forecast from; or check them all.")
    ] = None,
    flops: Annotated[float | None, typer.Option(help="Training FLOPs of the run that is to come.")] = None,
    runs: Annotated[list[Path] | None, typer.Option(help="A table of runs instead of an experiment's.")] = None,
    params: TableParams = None,
    flops_column: Annotated[str | None, typer.Option(metavar="COLUMN", help="Of the table: training FLOPs.")] = None,
    tokens: TableTokens = None,
    tokens_from_flops: TokensFromFlops = None,
    loss: Annotated[str | None, typer.Option(metavar="COLUMN", help="Of the table: loss.")] = None,
    units: TableUnits = None,
    where: TableWhere = None,
    of: Annotated[
        str | None, typer.Option("--of", metavar="NAME", help="Check the forecasts of this experiment or table alone.")
    ] = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Write down what a larger budget will reach, before it is trained; `forecast check` says how it came out."""
    if (what is None) == (not runs) and what != CHECK:
        raise typer.BadParameter("give an EXPERIMENT or --runs FILE (or --runs 'a*.csv'), one of them, or check")
    if what == CHECK and flops is not None:
        raise typer.BadParameter("--flops: check looks at all forecasts")
    if what != CHECK and of:
        raise typer.BadParameter("--of NAME is for check")
    given = (params, flops_column, tokens, loss, tokens_from_flops, tuple(units or ()), tuple(where or ()))
    if not runs and any(given):
        raise typer.BadParameter("columns, units and --where are of a table, --runs FILE")
    store = open_store(runs_dir)
    from analysis.forecasts import ReadBy

    read = ReadBy(*given)
    if what == CHECK:
        _check(store, runs or [], read, of)
    elif flops is None:
        raise typer.BadParameter("--flops names the budget, such as --flops 1e21")
    else:
        _make(store, what, runs or [], read, flops)


def _make(store: Store, what: str | None, tables: list[Path], read: "ReadBy", flops: float) -> None:
    """Write down a forecast, and print it."""
    from analysis.forecasts import forecast_at
    from analysis.options import FitOptions
    from analysis.pipeline import fit_laws
    from analysis.tables.reading import read_runs
    from analysis.tables.table import prepare
    from varscale.store.records import StudyRecord

    options, recipe = FitOptions(**vars(read), law=("power",), holdout=False, bootstrap_draws=50), ""
    if tables:
        table = read_runs(tables)
        name = ", ".join(table.attrs["sources"][:3]) + (", …" if len(table.attrs["sources"]) > 3 else "")
    else:
        name, members = study_and_members(str(what), store)
        if members:
            raise ExperimentError(f"{what}: holds several experiments; name one of them, such as {what}:{min(members)}")
        table, recipe = study_results(store, name), StudyRecord.load(store.study(name).record).recipe
    result = fit_laws(table, options)
    ask_about(result)
    every = prepare(table, replace(options, where=())) if read.where else None
    kept = forecast_at(result, flops, name, time.time(), every)
    earlier = [each for _, each in _forecasts(store, quiet=True)]
    previous = max(earlier, key=lambda each: each.kept.made).signature if earlier else ""
    text = replace(kept, recipe=recipe, previous=previous).as_text()
    store.forecasts.mkdir(parents=True, exist_ok=True)
    of = re.sub(r"[^\w.-]+", "-", Path(name.partition(",")[0]).stem)[:60]
    stem = f"{of}-{flops:.4g}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(kept.made))}"
    paths = (store.forecasts / f"{stem}{'' if n == 1 else f'-{n}'}.json" for n in count(1))
    path = next(path for path in paths if not path.exists())  # never over another one of the same second
    write_atomically(path, text.encode())
    for value in kept.values:
        low, high = value.ci95
        typer.echo(f"{value.target} at {flops:.3g} FLOPs: {value.value:.4g} [{low:.4g}, {high:.4g}]")
    typer.echo(f"{kept.extrapolation:.3g} times the largest budget, by version {__version__}\n{path}")


def _forecasts(store: Store, quiet: bool = False) -> list[tuple[Path, "ForecastFile"]]:
    """The forecasts of a runs folder; what is none, was changed, or is a copy is named and left out."""
    from analysis.errors import TableError
    from analysis.forecasts import read_forecast

    found: dict[str, tuple[Path, ForecastFile]] = {}
    for path in sorted(store.forecasts.glob("*.json")):
        try:
            file = read_forecast(path.read_text(errors="replace"), str(path))
            if file.signature in found:
                raise TableError(f"{path}: a copy of {found[file.signature][0].name}")
            found[file.signature] = path, file
        except (TableError, OSError) as error:
            if not quiet:
                typer.echo(f"left out: {error}", err=True)
    return sorted(found.values(), key=lambda each: each[1].kept.made)


def _check(store: Store, tables: list[Path], read: "ReadBy", of: str | None) -> None:
    """Compare the forecasts of the runs folder with the runs that came later, and print the track record."""
    from analysis.errors import TableError
    from analysis.forecasts import outcomes, read_again, track_record
    from analysis.tables.reading import read_runs

    forecasts = _forecasts(store)
    if not forecasts:
        raise ExperimentError(f"{store.forecasts}: no forecasts; `varscale forecast EXPERIMENT --flops …` makes one")
    signatures = {file.signature for _, file in forecasts}
    for path, file in forecasts:
        if file.kept.previous and file.kept.previous not in signatures:
            message = "the forecast made before it in this folder is gone, or was changed: the record isn't whole"
            typer.echo(f"{path}: {message}", err=True)
    chosen = [(path, file.kept) for path, file in forecasts if of is None or file.kept.study == of]
    if not chosen:
        raise ExperimentError(f"--of {of}: no forecast of it; there are some of {_names(forecasts)}")
    own = {kept.study for _, kept in chosen if store.study(kept.study).record.exists()}
    of_tables = {kept.study for _, kept in chosen} - own
    if tables and not of_tables:
        raise ExperimentError(f"--runs: none of these forecasts was made from a table, all of {_names(forecasts)}")
    rows = read_runs(tables) if tables else None
    if rows is not None and len(of_tables) > 1:
        of_tables &= set(rows.attrs["sources"])
        if not of_tables:
            whose = f"{_names(forecasts)}; --of NAME says whose runs {tables[0]} has"
            raise ExperimentError(f"there are forecasts of {whose}")
    found = []
    for path, kept in chosen:
        try:
            if kept.study in own:
                results = study_results(store, kept.study, recipe=kept.recipe)
                found.append((kept, outcomes(kept, results, _ended(store, results))))
            elif rows is not None and kept.study in of_tables:
                found.append((kept, outcomes(kept, rows, {}, read_again(kept.read, read))))
            else:
                typer.echo(f"{path}: of {kept.study}; --runs FILE names the table with the later runs", err=True)
        except (TableError, ExperimentError) as error:
            if len(chosen) == 1:
                raise
            typer.echo(f"{path}: {error}", err=True)
    _print(track_record(found))
    if read.where:
        typer.echo(f"compared with rows where {' and '.join(read.where)} alone")


def _names(forecasts: Iterable[tuple[Path, "ForecastFile"]]) -> str:
    return " and of ".join(dict.fromkeys(file.kept.study for _, file in forecasts))


def _print(record: "TrackRecord") -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("forecast of", "FLOPs", "target", "forecast", "observed", "error", "inside"):
        names = heading in ("forecast of", "target")
        table.add_column(heading, justify="left" if names else "right", overflow="fold", no_wrap=not names)
    for each in record.outcomes:
        table.add_row(*map(Text, _shown(each)))
    console = Console()
    if record.outcomes:
        console.print(table)
    if len(record.counted) < len(record.outcomes):
        console.print("late: made after its run had ended; it doesn't count")
    hits, of = record.hits()
    if of:
        mean = sum(abs(each.error_percent) for each in record.counted) / of
        console.print(f"{hits} of {of} inside their 95% interval, mean error {mean:.2g}%", highlight=False)
    for kept in record.waiting:
        conditions = f" where {' and '.join(kept.read.where)}" if kept.read.where else ""
        console.print(Text(f"no run of {kept.flops:.3g} FLOPs yet: {kept.study}{conditions}"))
    for kept, targets in record.unseen:
        console.print(Text(f"no value of {', '.join(targets)} to compare yet: {kept.study}, {kept.flops:.3g} FLOPs"))


def _shown(each: "ForecastOutcome") -> tuple[str, ...]:
    low, high = each.value.ci95
    seeds = f"\n{each.seed_deviations:+.1f} seed SD" if each.seed_deviations is not None else ""
    inside = "late" if each.early else "yes" if each.inside else "no"
    return (
        each.forecast.study,
        f"{each.forecast.flops:.3g}",
        each.value.target,
        f"{each.value.value:.4g}\n[{low:.4g}, {high:.4g}]",
        f"{each.observed:.4g}",
        f"{each.error_percent:+.2f}%{seeds}",
        inside,
    )


def _ended(store: Store, rows: Any) -> dict[str, float]:
    """When each run ended."""
    from varscale.store.layout import RunFiles
    from varscale.store.records import read_result

    results = {str(run): read_result(RunFiles(store.runs / "cells" / str(run))) for run in rows["run"].unique()}
    return {run: result.time for run, result in results.items() if result is not None}
