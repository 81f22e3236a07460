"""How often runs saw their data: a column `epochs`, or tokens over unique tokens."""

import numpy as np
import pandas as pd

from analysis.errors import TableError
from analysis.tables.roles import numbers
from analysis.tables.table import RunsTable
from analysis.tables.units import UNIQUE_TOKENS

_APART = 1.25
"""Factor between a column of epochs and tokens over unique tokens that no rounding makes."""


def ratio(table: RunsTable, frame: pd.DataFrame, above: str, below: str) -> "pd.Series[float]":
    """A role's values over another column's, which are in its own unit, or else in the role's.

    Raises:
        TableError: the column holds no numbers.
    """
    values, unit = numbers(frame, below, counts=True), table.units.get(below) or table.units.get(above)
    return frame[above] / (unit.values(values) if unit else values)


def epochs(table: RunsTable) -> "pd.Series[float]":
    """How often each row's data were seen, missing where the table doesn't say."""
    if "epochs" in table.frame.columns:
        return pd.to_numeric(table.frame["epochs"], errors="coerce")
    return _by_tokens(table)


def contradiction(table: RunsTable) -> str:
    """That a column of epochs isn't tokens over unique tokens, in a line; empty where it is, or one of them missing."""
    if table.is_sweep or "epochs" not in table.frame.columns:
        return ""
    apart = float((epochs(table) / _by_tokens(table)).median())
    if not apart > 0 or max(apart, 1 / apart) < _APART:
        return ""
    data = table.unit_of_data
    return (
        f"column 'epochs' is {apart:.3g} times {data} over {UNIQUE_TOKENS!r}: which of them says how often data were "
        f"seen? Laws of repeated data take 'epochs'; without that column they take {data} over unique ones"
    )


def _by_tokens(table: RunsTable) -> "pd.Series[float]":
    frame = table.frame
    if not {"tokens", UNIQUE_TOKENS} <= set(frame.columns):
        return pd.Series(np.nan, index=frame.index)
    try:
        return ratio(table, frame, "tokens", UNIQUE_TOKENS)
    except TableError:
        return pd.Series(np.nan, index=frame.index)
