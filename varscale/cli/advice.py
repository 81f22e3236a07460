"""The verb that says which cells to train next."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varscale.cli.options import (
    RUNS,
    Overrides,
    RunsDir,
    TableParams,
    TableTokens,
    TableUnits,
    TableWhere,
    TokensFromFlops,
    check_new_output,
    load,
    open_store,
    say,
)
from varscale.errors import ExperimentError
from varscale.store.atomic import write_atomically

if TYPE_CHECKING:
    from analysis.checks.advice import Advice, Question
    from sweeps.study import Study
    from varscale.config import Experiment
    from varscale.store.layout import Store
    from varscale.training.cells import Cell, Trunk


def advise(
    spend: Annotated[float, typer.Option(metavar="FLOPS", help="Training FLOPs that the new cells may take.")],
    experiment: Annotated[
        str | None, typer.Argument(metavar="EXPERIMENT", help="Whose grid to extend, or to begin.")
    ] = None,
    predict: Annotated[
        str | None, typer.Option(metavar="POINT", help="What to predict: flops=1e21, or params=1e9,tokens=2e10.")
    ] = None,
    budget: Annotated[float | None, typer.Option(metavar="FLOPS", help="Find the best size of this, instead.")] = None,
    target: Annotated[str, typer.Option(metavar="COLUMN", help="What is predicted.")] = "loss",
    prior: Annotated[
        str, typer.Option(help="Exponents of N and D to assume before there are runs; default: Chinchilla's.")
    ] = "",
    overrides: Overrides = None,
    runs: Annotated[list[Path] | None, typer.Option(help="A table of runs instead of an experiment's.")] = None,
    params: TableParams = None,
    flops: Annotated[str | None, typer.Option(metavar="COLUMN", help="Of the table: training FLOPs.")] = None,
    tokens: TableTokens = None,
    tokens_from_flops: TokensFromFlops = None,
    units: TableUnits = None,
    where: TableWhere = None,
    out: Annotated[
        Path | None, typer.Option(help="Write an experiment with the study's cells and these; of a table, a CSV file.")
    ] = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Say which cells, within a given compute, would narrow a prediction's interval (or a best size's) most."""
    if (experiment is None) == (not runs):
        raise typer.BadParameter("give an EXPERIMENT or --runs FILE (or --runs 'a*.csv'), one of them")
    if (predict is None) == (budget is None):
        raise typer.BadParameter("--predict flops=1e21 or --budget 1e21 says what is to be known better, one of them")
    if runs and overrides:
        raise typer.BadParameter("--set is of an EXPERIMENT, not of a table, --runs FILE")
    of_table = (params, flops, tokens, tokens_from_flops, *(units or ()), *(where or ()))
    if experiment is not None and any(each is not None for each in of_table):
        raise typer.BadParameter("columns, units and --where are of a table, --runs FILE")
    assumed = _exponents(prior)
    if out is not None:
        check_new_output(out)
    from analysis.checks.advice import advise as advise_on
    from analysis.checks.advice import positive, question_of
    from analysis.checks.candidates import table_candidates
    from analysis.checks.questions import oddities
    from analysis.options import FitOptions
    from analysis.tables.reading import read_runs
    from analysis.tables.table import prepare

    question = question_of(predict, budget)
    positive("--spend", spend)
    if runs:
        options = FitOptions(
            params=params,
            flops=flops,
            tokens=tokens,
            target=(target,),
            tokens_from_flops=tokens_from_flops,
            units=tuple(units or ()),
            where=tuple(where or ()),
        )
        table = prepare(read_runs(runs), options)
        rows = table.frame
        say(oddities(table, options))
        advice = advise_on(rows, target, table_candidates(rows, spend), question, spend, prior=assumed)
        _print(advice, target, prior)
        if out is not None:
            write_atomically(out, advice.cells.to_csv(index=False).encode())
        return
    settings = load(str(experiment), overrides)
    advice, grid = _of_study(settings, open_store(runs_dir, writing=False), target, question, spend, assumed)
    _print(advice, target, prior)
    if out is not None:
        write_atomically(out, _extending(str(experiment), overrides or [], settings.name, grid, out).encode())
        typer.echo(f"{out}: varscale sweep {out} trains them")


def _of_study(
    settings: "Experiment", store: "Store", target: str, question: "Question", spend: float, prior: dict[str, float]
) -> tuple["Advice", dict[str, Any]]:
    """The advice, and a grid of the cells that have ended and those that are advised."""
    import pandas as pd

    from analysis.checks.advice import advise as advise_on
    from analysis.checks.candidates import COLUMNS, Trunks
    from analysis.options import FitOptions
    from analysis.tables.table import prepare
    from sweeps.further_cells import further_cells, grid_settings
    from sweeps.grid import grid_cells

    own = grid_cells(settings)
    study, ended = _ended(settings, store, own)

    def checkpoints(trunk: "Trunk") -> list[float]:
        return [float(images * trunk.flops_per_image) for images in study.checkpoints(trunk)] if study else []

    def trained(trunk: "Trunk") -> float:
        return max(checkpoints(trunk), default=0.0)

    cells = {cell.label: cell for cell in further_cells(settings, spend, ended, trained)}
    if not cells:
        raise ExperimentError(f"--spend {spend:g}: less than the smallest cell of {settings.name} takes")
    planned = {cell.trunk.label for cell in own}
    candidates = pd.DataFrame(
        {
            "cell": label,
            "params": float(cell.trunk.model.parameters()),
            "tokens": float(cell.images * cell.trunk.model.tokens),
            "flops": cell.train_flops,
            "planned": cell.trunk.label in planned,
        }
        for label, cell in cells.items()
    )
    sizes = {cell.trunk.label: cell.trunk for cell in cells.values()}.values()
    there = [(float(trunk.model.parameters()), flops) for trunk in sizes for flops in checkpoints(trunk)]
    rows = pd.DataFrame(columns=[*COLUMNS, target], dtype=float)
    if ended:
        rows = prepare(pd.DataFrame(ended), FitOptions(target=(target,))).frame
    own_share = settings.optim.decay_fraction if settings.optim.schedule == "wsd" else 1.0
    trunks = Trunks(pd.DataFrame(there, columns=["params", "flops"]), own_share)
    advice = advise_on(rows, target, candidates, question, spend, trunks=trunks, prior=prior)
    added = [cells[label] for label in advice.cells["cell"]]
    return advice, grid_settings(ended, added, min(settings.grid.budgets))


def _ended(
    settings: "Experiment", store: "Store", cells: Sequence["Cell"]
) -> tuple["Study | None", list[dict[str, Any]]]:
    """The study, where it has been begun, and the rows of its cells that have ended: those of its own recipe."""
    from sweeps.study import Study, study_table

    if not store.study(settings.name).record.exists():
        return None, []
    study = Study.of(settings, store, cells)
    found = study_table(store, settings.name, study.recipe)
    if found is not None and found.others:
        typer.echo(
            f"left out: {found.others} cells of {settings.name} that were trained by other recipes than this one; "
            "--set names what differs from the file, as for the sweep",
            err=True,
        )
    return study, [row for row in found.rows if not row.get("variant")] if found is not None else []


def _extending(experiment: str, overrides: list[str], name: str, grid: dict[str, Any], out: Path) -> str:
    """An experiment that differs from another one in its cells, and in what --set says."""
    from varscale.config.text import write_yaml
    from varscale.config.yaml import as_extended, overridden

    heading = f"# Cells of {name}, and those that `varscale advise` added.\n"
    changes = overridden({}, overrides)
    grid = changes.get("grid", {}) | grid
    extended = as_extended(experiment, out.parent)
    return heading + write_yaml({"extends": extended, **changes, "name": f"{name}-advised", "grid": grid})


def _exponents(text: str) -> dict[str, float]:
    """Those of N and D, such as 0.3,0.3."""
    if not text:
        return {}
    try:
        alpha, beta = (float(each) for each in text.split(","))
    except ValueError:
        alpha = beta = 0.0
    from analysis.checks.advice import PRIOR_EXPONENTS

    least, most = PRIOR_EXPONENTS
    if not (least <= alpha <= most and least <= beta <= most):
        raise ExperimentError(
            f"--prior {text[:100]}: expected two exponents from {least:g} to {most:g}, such as 0.35,0.37"
        )
    return {"alpha": alpha, "beta": beta}


def _print(advice: "Advice", target: str, prior: str) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE)
    names = [name for name in ("cell", "params", "tokens", "flops") if name in advice.cells.columns]
    for name in names:
        table.add_column(name, justify="left" if name == "cell" else "right", no_wrap=True)
    for _, row in advice.cells.sort_values(["params", "flops"]).iterrows():
        table.add_row(*(str(row[name]) if name == "cell" else f"{row[name]:.3g}" for name in names))
    console = Console()
    console.print(table)
    question, size = advice.question, advice.question.size
    of = f"the best size at {question.flops:.3g} FLOPs" if size else target
    if question.point is not None:
        of += f" of {question.point[0]:.3g} parameters after {question.point[1]:.3g} tokens"
    elif not size:
        of += f" at {question.flops:.3g} FLOPs"

    def width(of_interval: float) -> str:
        if of_interval > 1000:
            return "more than a factor of 1000"
        return f"a factor of {1 + of_interval:.3g}" if size or of_interval > 1 else f"{100 * of_interval:.2g}%"

    if advice.value is not None:
        now = f"{advice.value:.4g} now"
        if prior:
            typer.echo(f"--prior {prior} has no effect: the {advice.runs} runs give a law", err=True)
    else:
        now = f"by the prior and {_count(advice.runs, 'run')}, too few for a law" if advice.runs else "by the prior"
    if advice.odd:
        typer.echo(f"outlying-rows: {advice.odd}", err=True)
    these = "this cell" if len(advice.cells) == 1 else f"these {len(advice.cells)} cells"
    lines = [
        f"{of}: {now}, 95% interval {width(advice.width)} wide",
        f"with {these}, {advice.flops:.3g} FLOPs: {width(advice.expected)} expected",
    ]
    if advice.plain is not None:
        plain, cells = advice.plain, _count(len(advice.plain.cells), "cell")
        lines.append(f"a plain grid of {cells}, {plain.flops:.3g} FLOPs: {width(plain.width)} expected")
    lines.append(f"averaged over {' and '.join(advice.laws)}; a run scatters by {100 * advice.noise:.2g}%")
    console.print("\n".join(lines), highlight=False)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
