"""What a grid of cells says beyond single fits: frontier, minima, the largest budget's check, best sizes."""

import pandas as pd

from analysis.errors import FitRefused
from analysis.frontier import cells, envelope, seed_noise
from analysis.isoflop import METHODS, minima
from analysis.largest_budget import roll_forward
from analysis.options import FitOptions
from analysis.parametric import Allocation, from_frontier, from_law, from_minima
from analysis.results import FitEntry, TargetGrid
from analysis.table import RunsTable
from analysis.traps import Caution

TEN_TIMES = 10.0
"""How far beyond the largest compute fitted the report looks."""


def build_grid(frame: pd.DataFrame, target: str, targets: tuple[str, ...], options: FitOptions) -> TargetGrid:
    """Everything about one target that needs cells at common budgets."""
    grid_cells = cells(frame, targets)
    frontier = envelope(grid_cells, target)
    noise = seed_noise(frame[frame[target].notna()], target)
    x, y, budgets = (frontier[name].to_numpy(dtype=float) for name in ("flops", target, "budget"))
    refused = ""
    rolled = []
    try:
        rolled = roll_forward(x, y, budgets, target, noise)
    except FitRefused as refusal:
        refused = str(refusal)
    found = {method: tuple(minima(grid_cells, target, method, noise, options.seed)) for method in METHODS}
    first = found.pop(METHODS[0])
    return TargetGrid(target, grid_cells, frontier, first, noise, tuple(rolled), refused, found)


def grid_cautions(target: str, grid: TargetGrid, first: bool) -> list[Caution]:
    """What the grid doesn't reach; the same for every target, so said of the first one only."""
    found = []
    refused = [each for each in grid.minima if each.refused]
    if refused and first:
        budgets = ", ".join(f"{each.budget:.3g}" for each in refused)
        message = f"{target}: no IsoFLOP minimum at {len(refused)} of {len(grid.minima)} budgets ({budgets} FLOPs)"
        found.append(Caution("isoflop-refused", f"{message}; {refused[-1].refused}"))
    sizes = grid.cells["params"]
    edge = grid.frontier[grid.frontier["params"].isin([sizes.min(), sizes.max()])]
    if len(edge) and sizes.nunique() > 1 and first:
        budgets = ", ".join(f"{each:.3g}" for each in edge["budget"])
        found.append(Caution("edge-optimum", f"{target}: the best size is at the edge of the grid at {budgets} FLOPs"))
    if grid.check and not grid.check.held:
        found.append(Caution("prediction-failed", f"{target}: the prediction of the largest budget did not hold"))
    return found


def allocations(
    target: str, table: RunsTable, grid: TargetGrid | None, fits: list[FitEntry], options: FitOptions
) -> tuple[Allocation, ...]:
    """Approaches 1, 2 and 3 side by side, each refused by name where it can't be used."""
    top = float(table.frame["flops"].max())
    at = options.allocate or (top, TEN_TIMES * top)
    found = []
    if grid is not None:
        try:
            found.append(from_frontier(grid.frontier, grid.cells, at))
        except FitRefused as refusal:
            found.append(Allocation("envelope", len(grid.frontier), refused=str(refusal)))
        for method, minima_found in ((METHODS[0], grid.minima), *grid.other_minima.items()):
            try:
                found.append(from_minima(list(minima_found), at, grid.other_minima["cubic"]))
            except FitRefused as refusal:
                found.append(Allocation(f"isoflop-{method}", len(minima_found), refused=str(refusal)))
    parametric = (
        from_law(entry.fitted, entry.uncertainty, entry.rows, at, options.tokens_from_flops)
        for entry in fits
        if entry.target == target and len(entry.inputs) == 2 and entry.rows["flops"].nunique() > 1
    )
    return (*found, *parametric)
