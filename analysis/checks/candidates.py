"""What could be trained next: the cells that would extend a table, a plain grid of the same compute, what they cost."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from analysis.checks.design import Compute
from analysis.errors import TableError
from analysis.grids.flops_per_token import FlopsPerToken

COLUMNS = ["params", "tokens", "flops"]
FIRST_BUDGETS, FURTHER_BUDGETS = range(1, 7), range(1, 4)
"""How many a plain grid has: before there are runs, and where it extends a study."""
_RATIO = 2**0.5
_SIZES = 12
_MOST_SIZES = 10
"""Of a study whose budgets share their sizes; more are of scattered runs."""
_NEAR = 0.08
"""Sizes nearer to one another than this are one candidate."""
_SAME = 0.01
"""How much two runs of one cell, or a branch and its checkpoint, may differ: whole steps are taken."""
_ALIKE = 1e-3
"""The same, of the logarithms of parameters of one size."""


@dataclass(frozen=True)
class Trunks:
    """What runs of one size share; nothing, unless it is said.

    Attributes:
        checkpoints: from which trunks can go on, with params and flops.
        own_share: of a run's FLOPs that it shares with no other: its branch (`design.Compute`).
    """

    checkpoints: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["params", "flops"], dtype=float))
    own_share: float = 1.0

    def compute(self, cells: pd.DataFrame) -> Compute:
        """What cells cost."""
        size_K = np.unique(np.round(np.log(cells["params"].to_numpy(dtype=float)), 3), return_inverse=True)[1]
        flops_K = cells["flops"].to_numpy(dtype=float)
        branch_K, start_K = (1 - self.own_share) * flops_K, np.zeros(len(cells))
        for params, place in self.checkpoints[["params", "flops"]].to_numpy(dtype=float):
            own_K = np.abs(np.log(cells["params"].to_numpy(dtype=float) / params)) < _ALIKE
            start_K = np.where(own_K & (branch_K > place), np.maximum(start_K, place), start_K)
            start_K = np.where(own_K & (np.abs(branch_K - place) <= _SAME * place), np.inf, start_K)
        return Compute(flops_K, size_K, start_K, self.own_share)

    @property
    def longest(self) -> float:
        """FLOPs of the furthest checkpoint."""
        return float(self.checkpoints["flops"].max()) if len(self.checkpoints) else 0.0


def check_columns(rows: pd.DataFrame) -> None:
    """Raise `TableError` where the runs don't say parameters, tokens and FLOPs."""
    if missing := [name for name in COLUMNS if name not in rows.columns]:
        raise TableError(
            f"advice needs {' and '.join(missing)} of the runs, too; --tokens-from-flops 6 gives the third"
        )


def table_candidates(rows: pd.DataFrame, spend: float) -> pd.DataFrame:
    """Cells that could extend a table: its own sizes and others up to twice its largest, budgets up to what is spent.

    Raises:
        TableError: the table doesn't say parameters, tokens and FLOPs, or no budget of its own can be afforded.
    """
    check_columns(rows)
    if spend < (smallest := rows["flops"].min()):
        raise TableError(f"--spend {spend:g}: less than the smallest run of the table takes, {smallest:.3g} FLOPs")
    per_token, own = FlopsPerToken(rows), np.sort(rows["params"].unique())
    sizes = np.geomspace(own[0], 2 * own[-1], _SIZES)
    if len(own) <= _MOST_SIZES:
        apart = np.abs(np.log(sizes[:, None] / own)).min(axis=1)
        sizes = np.concatenate([own, sizes[apart > _NEAR]])
    budgets = smallest * _RATIO ** np.arange(int(np.log(spend / smallest) / np.log(_RATIO)) + 1)
    params, flops = (each.ravel() for each in np.meshgrid(np.sort(sizes), budgets))
    tokens = flops / (per_token(params) * params)
    seen = tokens >= rows["tokens"].min()
    return pd.DataFrame({"params": params[seen], "tokens": tokens[seen], "flops": flops[seen]})


def untrained(candidates: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Without those that have run."""
    if not len(rows):
        return candidates.reset_index(drop=True)
    logs_K2, logs_n2 = (np.log(each[["params", "flops"]].to_numpy(dtype=float)) for each in (candidates, rows))
    apart_Kn = np.abs(logs_K2[:, None] - logs_n2[None]).max(axis=2)
    kept: pd.DataFrame = candidates[apart_Kn.min(axis=1) > _SAME].reset_index(drop=True)
    return kept


def plain_grids(
    rows: pd.DataFrame, candidates: pd.DataFrame, spend: float, trunks: Trunks
) -> Iterator[tuple[pd.DataFrame, float]]:
    """Grids of the study's sizes, at budgets each twice the next, that cost what is to be spent; and their FLOPs.

    Before there are runs the sizes are those `planned`. Where each budget of the study has sizes of its own, they are
    those of the largest, growing as the square root of compute. A grid goes to no smaller budget, and has no shorter
    runs, than runs and candidates do.
    """
    given = rows if len(rows) else candidates[candidates["planned"]] if "planned" in candidates else candidates
    both = pd.concat([rows[COLUMNS], candidates[COLUMNS]]).astype(float)
    per_token, smallest, shortest = FlopsPerToken(both), both["flops"].min(), both["tokens"].min()
    sizes = np.sort(given["params"].unique())
    growth, last = 0.0, float(given["flops"].max())
    if len(sizes) > _MOST_SIZES:
        sizes = np.sort(given.loc[given["flops"] > 0.98 * last, "params"].unique())
        growth = 0.5

    def grid(largest: float, count: int) -> tuple[pd.DataFrame, float]:
        budgets = np.repeat(largest / 2.0 ** np.arange(count), len(sizes))
        params = np.tile(sizes, count) * (budgets / last) ** growth
        whole = pd.DataFrame({"params": params, "tokens": budgets / (per_token(params) * params), "flops": budgets})
        cells = whole[whole["tokens"] >= 0.99 * shortest].reset_index(drop=True)
        cost = trunks.compute(cells).of(range(len(cells))) if len(cells) else 0.0
        return cells, cost

    for count in FURTHER_BUDGETS if len(rows) else FIRST_BUDGETS:
        low, high = np.log(smallest * 2.0 ** (count - 1)), np.log(spend + trunks.longest)
        if low > high or grid(np.exp(low), count)[1] > spend:
            continue
        for _ in range(25):
            middle = (low + high) / 2
            low, high = (middle, high) if grid(np.exp(middle), count)[1] <= spend else (low, middle)
        cells, cost = grid(np.exp(low), count)
        if len(cells):
            yield cells, cost
