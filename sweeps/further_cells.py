"""Cells that a study could have as well, and the grid that has them. Pure."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from sweeps.grid import check_lengths
from varscale.config import Experiment
from varscale.errors import ExperimentError
from varscale.training.cells import Cell, Trunk

_APART = 1.15
"""Ratio of sizes that might be added to a grid."""


def further_cells(
    experiment: Experiment,
    spend: float,
    ended: Iterable[Mapping[str, Any]] = (),
    trained: Callable[[Trunk], float] = lambda trunk: 0.0,
) -> tuple[Cell, ...]:
    """Cells that the experiment's grid could have: sizes up to twice its largest, as far as `spend` FLOPs more go.

    Sizes lie about a seventh apart, beside those of the grid and of a runs table's rows; budgets a factor of √2, from
    the smallest one. Cells that a grid would refuse are left out, and those of the rows (`ended`), the diverged among
    them. What a trunk has been `trained` for already, in FLOPs, is not spent again.
    """
    grid, points = experiment.grid, {(int(row["depth"]), float(row["budget_flops"])) for row in ended}
    own = {*grid.depths, *(depth for depth, _ in points)}
    steps = range(int(math.log(2 * max(own) / min(own)) / math.log(_APART)) + 1)
    depths = own | {2 * round(min(own) * _APART**step / 2) for step in steps}
    smallest, found = min(grid.budgets), []
    for depth in sorted(depths):
        trunk = Trunk(experiment, depth, grid.seeds[0], smallest)
        for budget in _ladder(smallest, spend + trained(trunk)):
            with suppress(ExperimentError):
                check_lengths([cell := trunk.cell(budget)], grid.min_steps)
                if (depth, budget) not in points:
                    found.append(cell)
    return tuple(found)


def grid_settings(ended: Iterable[Mapping[str, Any]], added: Iterable[Cell], smallest: float) -> dict[str, Any]:
    """The fields of a grid that has the cells of a runs table's rows and further ones, and no others.

    Its depths and budgets are what the sizes of the recipe's smallest budget, which sets the warm-up, share at one
    seed; the rest are variants. Where no cell is of that budget, the smallest size's is added.
    """
    points = [
        (int(row.get("seed", 0)), int(row["depth"]), float(row["budget_flops"]))
        for row in ended
        if not row.get("variant")
    ]
    points += [(cell.trunk.seed, cell.trunk.depth, cell.budget_flops) for cell in added]
    if smallest not in {budget for *_, budget in points}:
        points.append((*min(points)[:2], smallest))
    budgets: dict[tuple[int, int], set[float]] = {}
    for seed, depth, budget in points:
        budgets.setdefault((seed, depth), set()).add(budget)
    first = Counter(seed for (seed, _), own in budgets.items() if smallest in own).most_common(1)[0][0]
    shared_by = {(seed, depth) for (seed, depth), own in budgets.items() if seed == first and smallest in own}
    common = set.intersection(*(budgets[each] for each in shared_by))
    shared = {budget for budget in common if budget >= smallest}
    variants = [
        {"name": f"d{depth}-s{seed}", "depths": [depth], "budgets": rest, "seeds": [seed]}
        for (seed, depth), own in sorted(budgets.items())
        if (rest := sorted(own - (shared if (seed, depth) in shared_by else set())))
    ]
    depths = sorted(depth for _, depth in shared_by)
    return {"depths": depths, "budgets": sorted(shared), "seeds": [first], "variants": variants}


def _ladder(least: float, most: float) -> list[float]:
    """Budgets a factor of √2 apart, with four digits as they are written."""
    count = max(0, int(2 * math.log2(most / least)) + 1) if most >= least else 0
    return [float(f"{least * 2 ** (step / 2):.4g}") for step in range(count)]
