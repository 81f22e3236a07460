"""The best sizes by several targets, budget by budget: the size that is best by loss need not be the best by FID."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from analysis.grids.grid import TargetGrid


@dataclass(frozen=True)
class OptimalSize:
    """The best size at one budget by one target.

    Attributes:
        sizes: how many sizes have a value there.
        params: size of the best cell.
        value: the target of that cell.
        at_end: whether that is the smallest or largest of these sizes, beyond which there may be better ones.
        minimum: size at the minimum of the parabola; None where there is none.
        minimum_ci95: its interval.
    """

    sizes: int
    params: float
    value: float
    at_end: bool
    minimum: float | None = None
    minimum_ci95: tuple[float, float] | None = None


@dataclass(frozen=True)
class SizesAtBudget:
    """The best sizes at one budget, by target; the first target is the one that others are compared with."""

    budget: float
    targets: Mapping[str, OptimalSize]

    def ratio(self, target: str) -> float | None:
        """A target's best size over the first one's, both from parabolas, or both of cells where one has no minimum."""
        first, other = next(iter(self.targets.values())), self.targets.get(target)
        if other is None or other is first:
            return None
        if first.minimum is not None and other.minimum is not None:
            return other.minimum / first.minimum
        return other.params / first.params


def side_by_side(grids: Sequence[TargetGrid]) -> tuple[SizesAtBudget, ...]:
    """The best sizes at each budget where the first target and another one have two or more sizes each."""
    if len(grids) < 2:
        return ()
    by_target = {grid.target: _by_budget(grid) for grid in grids}
    first = grids[0].target
    found = []
    for budget in sorted(by_target[first]):
        targets = {target: sizes[budget] for target, sizes in by_target.items() if budget in sizes}
        if len(targets) > 1:
            found.append(SizesAtBudget(budget, targets))
    return tuple(found)


def _by_budget(grid: TargetGrid) -> dict[float, OptimalSize]:
    """The best sizes by one target, at budgets where it has two or more sizes."""
    minima = {each.budget: each for each in grid.minima}
    best = {
        budget: (params, value) for budget, params, value in grid.frontier[["budget", "params", grid.target]].to_numpy()
    }
    found = {}
    for label, rows in grid.cells[grid.cells[grid.target].notna()].groupby("budget"):
        budget, sizes = float(str(label)), rows["params"]
        if sizes.nunique() < 2:
            continue
        params, value = map(float, best[budget])
        ends = params in (sizes.min(), sizes.max())
        minimum = minima[budget]
        found[budget] = OptimalSize(sizes.nunique(), params, value, ends, minimum.params, minimum.params_ci95)
    return found
