"""Mixtures of experts: how many of a model's parameters a token uses."""

import re

import pandas as pd

from analysis.errors import TableError
from analysis.tables.roles import numbers, plain_name
from analysis.tables.table import RunsTable

ACTIVE_SHARE = "active_share"
_ACTIVE = re.compile(r"(n|num|params?|parameters?|model|size)_activ(e|ated)|activ(e|ated)_(n|params?|parameters?|size)")


def active_params(table: RunsTable) -> "pd.Series[float] | None":
    """Each row's parameters that a token uses, by a column of them or of their share; None where no column says so.

    These are what training FLOPs, 6·N·D, are counted with.
    """
    frame = table.frame
    if "params" not in frame.columns or table.is_sweep:
        return None
    for name in frame.columns:
        own, plain = name == table.columns.get("params"), plain_name(str(name))
        if own or not (plain == ACTIVE_SHARE or _ACTIVE.fullmatch(plain)):
            continue
        try:
            values = numbers(frame, name, counts=plain != ACTIVE_SHARE)
        except TableError:
            continue
        if plain == ACTIVE_SHARE:
            return frame["params"] * values
        return table.units["params"].values(values) if "params" in table.units else values
    return None
