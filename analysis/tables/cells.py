"""Rows of one cell, alike in N, C and D: what they are, and one row of each where that is asked for."""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from analysis.options import FitOptions
from analysis.tables.evaluations import runs
from analysis.tables.repeats import Differing, differing, reduced
from analysis.tables.roles import LABELS, ROLES, column
from analysis.tables.table import Exclusion, RunsTable, hash_rows


def mixed_rows(
    table: RunsTable, rows: pd.DataFrame, options: FitOptions, taken: Sequence[str] = ()
) -> Differing | None:
    """In what rows alike in N, C and D differ, repetitions aside; of a run's checkpoints that are alike one counts.

    Args:
        table: a checked table.
        rows: its rows, with their `budget` where budgets are known.
        options: what was asked for.
        taken: columns that every law asked for takes, such as the share of experts that a token uses.
    """
    alike = _alike(rows, options, taken)
    rows = rows.drop_duplicates(["run_id", *alike]) if options.checkpoints else rows
    return differing(rows, alike, table.targets, table.columns.values(), table.is_sweep)


def with_rows_reduced(
    table: RunsTable, rows: pd.DataFrame, options: FitOptions, taken: Sequence[str] = ()
) -> RunsTable:
    """The table with one row for all that are alike in N, C, D and all else that tells rows apart, but for `by`.

    Args:
        table: a checked table.
        rows: its rows, with their `budget` where budgets are known.
        options: what `reduce` takes, over which columns.
        taken: columns that every law asked for takes.

    Raises:
        TableError: there is no such column.
    """
    labels = {source: role for role, source in table.columns.items() if role in LABELS}
    over = [labels.get(name) or column(rows, name) for name in options.by]
    alike = [*_alike(rows, options, taken), *(["run_id"] if options.checkpoints else [])]
    found = differing(rows, alike, table.targets, table.columns.values(), table.is_sweep, over)
    further = list(found.columns) if found else []
    over = over or further or ["seed"]
    alike += [name for name in ("seed", *further) if name in rows.columns and name not in over]
    kept = reduced(rows, alike, over, options.reduce, table.targets)[list(table.frame.columns)]
    what = f"reduce {options.reduce} over {', '.join(over)}"
    exclusions, notes, measured = table.exclusions, table.notes, kept
    if options.reduce in ("mean", "median"):
        notes = (*notes, f"{what}: {len(rows)} rows became {len(kept)}")
    elif len(kept) < len(rows):
        exclusions = (*exclusions, Exclusion(what, tuple(rows["row"][~rows.index.isin(kept.index)].astype(str))))
        evaluated = runs(table.measured, table.targets)  # a run has a row for each way in which it was evaluated
        measured = table.measured[evaluated.isin(evaluated[table.measured["row"].isin(kept["row"])])]
    used = [name for name in (*ROLES, *LABELS, *table.targets) if name in measured.columns]
    return replace(
        table,
        frame=kept.reset_index(drop=True),
        measured=measured.reset_index(drop=True),
        sha256=hash_rows(measured[used]),
        filters=(*table.filters, what),
        exclusions=exclusions,
        notes=notes,
    )


def _alike(rows: pd.DataFrame, options: FitOptions, taken: Sequence[str]) -> list[str]:
    """What makes rows one cell: budget and size where budgets are known, else N, C and D as far as they are.

    So does what the laws take beside these (`taken`).
    """
    roles = ("budget", "params") if {"budget", "params"} <= set(rows.columns) else ("params", "flops", "tokens")
    others = [name for name in (*options.x, *taken) if name not in ROLES]
    return [name for name in dict.fromkeys((*roles, *others, "group")) if name in rows.columns]
