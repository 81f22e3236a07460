"""Sweeps that are played: losses come from a bowl with a known bottom, so a hundred trials take a second."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toy_sweep import toy_experiment

from sweeps.orchestrator import Outcome
from sweeps.searches.plan import SearchPlan
from sweeps.searches.search import Search
from sweeps.searches.storage import open_search
from sweeps.study import Study
from varscale.store.layout import Store
from varscale.training.cells import Cell

SPACE = {
    "optim.lr": {"low": 1e-4, "high": 1.0, "log": True},
    "optim.betas": {"choices": [[0.9, 0.95], [0.8, 0.99]]},
    "model.width_per_depth": {"low": 2, "high": 6},
}
BEST_RATE = 0.05


def plan(**search: Any) -> SearchPlan:
    return SearchPlan(toy_experiment(search={"space": SPACE, "budgets": [2e7, 4e7], **search}))


def bowl(cell: Cell) -> float:
    """Least at a rate of 0.05, the second betas and width 5; the first budget is worse by one."""
    optim, model = cell.trunk.experiment.optim, cell.trunk.experiment.model
    loss = math.log10(optim.lr / BEST_RATE) ** 2 + 0.1 * (optim.betas == (0.9, 0.95))
    width = model.model_dump()["width_per_depth"]
    return loss + 0.05 * (width - 5) ** 2 + (cell.budget_flops < 4e7) + 1e-3 * cell.trunk.seed


class Played:
    """Stands for sweeps: trains nothing, and remembers what it was given."""

    def __init__(self, loss: Callable[[Cell], float | None] = bowl) -> None:
        self.cells: list[Cell] = []
        self._loss = loss

    def __call__(self, study: Study) -> Outcome:
        assert len({cell.label for cell in study.cells}) == len(study.cells)
        rows = []
        for cell in study.cells:
            loss = self._loss(cell)  # may end the search
            self.cells.append(cell)
            found = {"status": "finished", "loss": loss} if loss != math.inf else {"status": "diverged"}
            if loss is not None:
                rows.append({**cell.labels(), "seed": cell.trunk.seed, "train_flops": cell.train_flops, **found})
        return Outcome(rows, {}, len(rows))

    def of(self, number: int) -> list[float]:
        """Budgets at which a trial was trained."""
        return [
            cell.budget_flops for cell in self.cells if cell.trunk.variant == f"trial-{number}" and not cell.trunk.seed
        ]


@contextmanager
def search(runs: Path, own: SearchPlan, sweep: Played, storage: str | None = None) -> Iterator[Search]:
    store = Store(runs)
    with open_search(own, store.search("toy"), storage) as optuna_study:
        yield Search(own, store, optuna_study, sweep, lambda line: None)
