"""The verb that says which cells to train next."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varscale.cli.options import RUNS, RunsDir, check_new_output, load, open_store
from varscale.errors import ExperimentError
from varscale.store.atomic import write_atomically

if TYPE_CHECKING:
    from analysis.checks.advice import Advice, Question
    from varscale.store.layout import Store


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
    runs: Annotated[list[Path] | None, typer.Option(help="A table of runs instead of an experiment's.")] = None,
    params: Annotated[str | None, typer.Option(metavar="COLUMN", help="Of the table: parameters.")] = None,
    flops: Annotated[str | None, typer.Option(metavar="COLUMN", help="Of the table: training FLOPs.")] = None,
    tokens: Annotated[str | None, typer.Option(metavar="COLUMN", help="Of the table: training tokens.")] = None,
    tokens_from_flops: Annotated[float | None, typer.Option(help="C = k N D with this k gives the third.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write an experiment with the study's cells and these; of a table, a CSV file.")
    ] = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Say which cells, within a given compute, would narrow a prediction's interval (or a best size's) most."""
    if (experiment is None) == (not runs):
        raise typer.BadParameter("give an EXPERIMENT or --runs FILE, one of them")
    if (predict is None) == (budget is None):
        raise typer.BadParameter("--predict flops=1e21 or --budget 1e21 says what is to be known better, one of them")
    if experiment is not None and (params or flops or tokens or tokens_from_flops is not None):
        raise typer.BadParameter("--params, --flops, --tokens and --tokens-from-flops are of a table, --runs FILE")
    assumed = _exponents(prior)
    if out is not None:
        check_new_output(out)
    from analysis.checks.advice import advise as advise_on
    from analysis.checks.advice import positive, question_of, table_candidates
    from analysis.options import FitOptions
    from analysis.tables.reading import read_runs
    from analysis.tables.table import prepare

    question = question_of(predict, budget)
    positive("--spend", spend)
    if runs:
        options = FitOptions(
            params=params, flops=flops, tokens=tokens, target=(target,), tokens_from_flops=tokens_from_flops
        )
        rows = prepare(read_runs(runs), options).frame
        advice = advise_on(rows, target, table_candidates(rows, spend), question, spend, prior=assumed)
        _print(advice, target)
        if out is not None:
            write_atomically(out, advice.cells.to_csv(index=False).encode())
        return
    _advise_study(str(experiment), open_store(runs_dir, writing=False), target, question, spend, assumed, out)


def _advise_study(
    experiment: str,
    store: "Store",
    target: str,
    question: "Question",
    spend: float,
    prior: dict[str, float],
    out: Path | None,
) -> None:
    import pandas as pd

    from analysis.checks.advice import advise as advise_on
    from analysis.options import FitOptions
    from analysis.tables.table import prepare
    from sweeps.grid import further_cells, grid_cells, grid_settings
    from sweeps.study import study_table
    from varscale.config.yaml import changed

    settings = load(experiment, None)
    found = study_table(store, settings.name)
    trained = [row for row in found.rows if not row.get("variant")] if found is not None else []
    rows = pd.DataFrame(columns=["params", "tokens", "flops", target], dtype=float)
    if trained:
        rows = prepare(pd.DataFrame(trained), FitOptions(target=(target,))).frame
        # the smallest budget sets the warm-up of all cells
        settings = changed(settings, {"grid.budgets": grid_settings(trained, [])["budgets"]}, experiment)
    planned = set() if trained else {cell.trunk.label for cell in grid_cells(settings)}
    cells = {cell.label: cell for cell in further_cells(settings, spend, trained)}
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
    if not cells:
        raise ExperimentError(f"--spend {spend:g}: less than the smallest cell of {settings.name} takes")
    advice = advise_on(rows, target, candidates, question, spend, own_share=settings.optim.decay_fraction, prior=prior)
    _print(advice, target)
    if out is not None:
        added = [cells[label] for label in advice.cells["cell"]]
        write_atomically(out, _extending(experiment, settings.name, grid_settings(trained, added), out).encode())
        typer.echo(f"{out}: varscale sweep {out} trains them")


def _extending(experiment: str, name: str, grid: dict[str, Any], out: Path) -> str:
    """An experiment that differs from another one in its cells."""
    from varscale.config.text import write_yaml
    from varscale.config.yaml import as_extended

    heading = f"# Cells of {name}, and those that `varscale advise` added.\n"
    return heading + write_yaml(
        {"name": f"{name}-advised", "extends": as_extended(experiment, out.parent), "grid": grid}
    )


def _exponents(text: str) -> dict[str, float]:
    """Those of N and D, such as 0.3,0.3."""
    if not text:
        return {}
    try:
        alpha, beta = (float(each) for each in text.split(","))
    except ValueError:
        alpha = beta = 0.0
    if not (0.01 <= alpha <= 2 and 0.01 <= beta <= 2):
        raise ExperimentError(f"--prior {text[:100]}: expected two exponents from 0.01 to 2, such as 0.35,0.37")
    return {"alpha": alpha, "beta": beta}


def _print(advice: "Advice", target: str) -> None:
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

    now = "by the prior alone" if advice.value is None else f"{advice.value:.4g} now"
    lines = [
        f"{of}: {now}, 95% interval {width(advice.width)} wide",
        f"with these {len(advice.cells)} cells, {advice.flops:.3g} FLOPs: {width(advice.expected)} expected",
    ]
    if advice.plain is not None:
        plain = advice.plain
        lines.append(
            f"a plain grid of {len(plain.cells)} cells, {plain.flops:.3g} FLOPs: {width(plain.width)} expected"
        )
    lines.append(f"averaged over {' and '.join(advice.laws)}; a run scatters by {100 * advice.noise:.2g}%")
    console.print("\n".join(lines), highlight=False)
