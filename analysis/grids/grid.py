"""What the grid of cells says about one target: cells, frontier, minima, and how the best size grows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import pandas as pd

from analysis.errors import FitRefused
from analysis.fitting.fit import Fit
from analysis.fitting.intervals import Uncertainty
from analysis.grids.allocation import Allocation, beyond_sizes, from_frontier, from_minima
from analysis.grids.bowls import METHODS
from analysis.grids.frontier import SeedNoise, cells, envelope, seed_noise
from analysis.grids.grid_bias import grid_bias, holding
from analysis.grids.isoflop import Minimum, minima
from analysis.grids.parametric import from_law


@dataclass(frozen=True)
class TargetGrid:
    """Everything about one target that needs cells at common budgets.

    Attributes:
        target: the column.
        cells: one row a (budget, size), averaged over seeds.
        frontier: the best cell of each budget.
        minima: of the parabola, one a budget; maxima where the target rises.
        noise: between seeds, where runs were repeated.
        other_minima: of the other methods.
        rises: whether more is better, as of an accuracy, so that the best cells are the highest.
    """

    target: str
    cells: pd.DataFrame
    frontier: pd.DataFrame
    minima: tuple[Minimum, ...]
    noise: SeedNoise | None
    other_minima: Mapping[str, tuple[Minimum, ...]] = field(default_factory=dict)
    rises: bool = False

    @property
    def best_end(self) -> str:
        """Which of the sizes is best at every budget, "smallest" or "largest"; empty where neither is."""
        sizes, best = self.cells["params"], self.frontier["params"]
        if sizes.nunique() < 2:
            return ""
        return "smallest" if (best == sizes.min()).all() else "largest" if (best == sizes.max()).all() else ""


def build_grid(
    frame: pd.DataFrame, target: str, targets: tuple[str, ...], seed: int, rises: bool = False
) -> TargetGrid:
    """The grid of one target, from rows with budgets (`frontier.with_budgets`); `rises`: more is better."""
    grid_cells = cells(frame, targets)
    noise = seed_noise(frame[frame[target].notna()], target)
    hung = grid_cells.assign(**{target: -grid_cells[target]}) if rises else grid_cells
    found = {method: tuple(minima(hung, target, method, noise, seed)) for method in METHODS}
    if rises:
        found = {method: tuple(map(_turned, each)) for method, each in found.items()}
    first = found.pop(METHODS[0])
    return TargetGrid(target, grid_cells, envelope(grid_cells, target, rises), first, noise, found, rises)


def _turned(found: Minimum) -> Minimum:
    """The maximum of values whose negatives have this minimum."""
    value = None if found.value is None else -found.value
    return replace(found, value=value, coefficients=tuple(-each for each in found.coefficients))


def allocations(
    grid: TargetGrid | None,
    surfaces: Iterable[tuple[Fit, Uncertainty, pd.DataFrame]],
    at: tuple[float, ...],
    declared: float | None,
) -> tuple[Allocation, ...]:
    """Approaches 1, 2 and 3 side by side, each refused by name where it can't be used.

    Args:
        grid: the cells of a target, if its table is a grid.
        surfaces: laws of N and D fitted to the target, with their rows.
        at: budgets at which the best size is worked out.
        declared: k where C = k·N·D was declared.
    """
    found = []
    surfaces = list(surfaces)
    if grid is not None:
        try:
            found.append(from_frontier(grid.frontier, grid.cells, at))
        except FitRefused as refusal:
            found.append(Allocation("envelope", len(grid.frontier), refused=str(refusal)))
        for method, minima_found in ((METHODS[0], grid.minima), *grid.other_minima.items()):
            try:
                found.append(from_minima(list(minima_found), at))
                if surfaces:
                    law, _, rows = surfaces[0]
                    measured = grid.cells[grid.cells[grid.target].notna()]
                    bias = grid_bias(minima_found, measured, law, rows, declared)
                    found[-1] = holding(found[-1], bias)
            except FitRefused as refusal:
                found.append(Allocation(f"isoflop-{method}", len(minima_found), refused=str(refusal)))
    if grid is not None:
        sizes = grid.cells["params"].to_numpy(dtype=float)
        found = [beyond_sizes(each, sizes) for each in found]
    parametric = (
        beyond_sizes(from_law(fitted, uncertainty, rows, at, declared), rows["params"].to_numpy(dtype=float))
        for fitted, uncertainty, rows in surfaces
        if rows["flops"].nunique() > 1
    )
    return (*found, *parametric)
