"""The verb that makes the table of a paper."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from varscale.cli.laws import study_and_members
from varscale.cli.options import RUNS, RunsDir, check_new_output, open_store
from varscale.errors import ExperimentError
from varscale.store.atomic import write_atomically

if TYPE_CHECKING:
    import pandas as pd

    from analysis.report.paper_table import PaperTable

_SUFFIXES: dict[str, Literal["csv", "markdown", "latex"]] = {".csv": "csv", ".md": "markdown", ".tex": "latex"}


def table(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="EXPERIMENT|CELL …", help="Experiments, and finished cells' folders: a row for each."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Add the published rows of VAR's table 1, from BigGAN to VAR.")
    ] = False,
    where: Annotated[
        list[str] | None, typer.Option(help="Condition on rows, such as 'depth == 16' or 'guidance == 1.5'.")
    ] = None,
    form: Annotated[
        Literal["csv", "markdown", "latex"] | None,
        typer.Option("--format", help="How it is written; default: as --out's name says, .csv, .md or .tex."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default: the terminal.")] = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Make the table of papers on image models: FID, IS, precision, recall, parameters, steps, time of each cell."""
    if not what and not published:
        raise typer.BadParameter("give an EXPERIMENT, cells' folders, or --published")
    if out is not None:
        if form is None and out.suffix not in _SUFFIXES:
            raise ExperimentError(f"--out {out}: expected a name that ends in .csv, .md or .tex, or --format")
        check_new_output(out)
    from analysis.report.paper_table import as_csv, as_latex, as_markdown, paper_table

    made = paper_table(_measured(what or [], where or [], runs_dir), published=published)
    form = form or (_SUFFIXES[out.suffix] if out is not None else None)
    if form is None:
        _print(made)
        return
    if form == "csv":  # has no place for what one must know to compare rows
        for note in made.notes:
            typer.echo(note, err=True)
    text = {"csv": as_csv, "markdown": as_markdown, "latex": as_latex}[form](made)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_atomically(out, text.encode())
        typer.echo(out)


def _measured(what: list[str], where: list[str], runs_dir: str) -> "pd.DataFrame":
    import pandas as pd

    from analysis.errors import TableError
    from analysis.tables.conditions import meets
    from sweeps.measured import ListedCell, measured_rows

    cells: list[ListedCell] = []
    for each in what:
        path = Path(each)
        if path.is_dir() and (path.name != each or (path / "job.json").is_file()):  # else a study of a folder's name
            cells.append(ListedCell.at(path))
        else:
            store = open_store(runs_dir, writing=False)
            study, members = study_and_members(each, store)
            for name in members.values() or [study]:
                cells += ListedCell.of_study(store, name)
    unique: dict[Path, ListedCell] = {}
    for cell in cells:  # named twice, such as by its folder and by its study, it is one row all the same
        unique.setdefault(cell.files.folder.resolve(), cell)
    rows = pd.DataFrame(measured_rows([*unique.values()]))
    if what and rows.empty:
        raise ExperimentError(f"{', '.join(what)[:100]}: none of its cells is finished; `varscale sweep` trains them")
    for condition in where:
        rows = rows[meets(rows, condition)]
    if what and rows.empty:
        raise TableError(f"--where {where[-1]!r}: no row meets it")
    return rows


def _print(made: "PaperTable") -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for place, heading in enumerate(made.headings):
        shown.add_column(heading, justify="right" if place else "left", overflow="fold")
    for published, row in zip(made.frame["published"], made.cells(), strict=True):
        shown.add_row(*map(Text, row), style="dim" if published else "")
    console = Console()
    console.print(shown, *map(Text, made.notes), sep="\n")
