"""Cells that a grid could have as well, what they cost, and the grid that has them."""

import numpy as np
import pytest

from analysis.checks.design import Compute
from sweeps.costs import size_costs
from sweeps.grid import check_lengths, further_cells, grid_cells, grid_settings
from varscale.config.yaml import changed, load_experiment

RINGS = load_experiment("rings", ["grid.depths=[12,16]", "grid.budgets=[3.447e11,6.894e11]"])


def test_further_cells_are_valid_and_reach_what_may_be_spent() -> None:
    cells = further_cells(RINGS, 2e12, [{"depth": 9, "budget_flops": 1e12}])
    check_lengths(cells, RINGS.grid.min_steps)
    assert {cell.label for cell in grid_cells(RINGS)} < {cell.label for cell in cells}
    assert 1.3e12 < max(cell.budget_flops for cell in cells) <= 2e12
    depths = {cell.trunk.depth for cell in cells}
    assert {9, 12, 16} < depths
    assert 26 <= max(depths) <= 32
    long = changed(RINGS, {"grid.min_steps": 2000}, "here")
    assert 0 < len(further_cells(long, 2e12)) < len(cells)
    assert further_cells(RINGS, 1e11) == ()


def test_a_grid_of_any_cells_has_these_and_no_others() -> None:
    trained = [{"depth": cell.trunk.depth, "budget_flops": cell.budget_flops} for cell in grid_cells(RINGS)]
    trained.append({"depth": 12, "budget_flops": 3.447e11, "variant": "lr-half"})
    rng = np.random.default_rng(0)
    for _ in range(5):
        cells = further_cells(RINGS, 3e12)
        added = [cells[place] for place in rng.choice(len(cells), 7, replace=False)]
        made = changed(RINGS, {"grid": grid_settings(trained, added)}, "here")
        assert {cell.label for cell in grid_cells(made)} == {cell.label for cell in (*grid_cells(RINGS), *added)}


def test_a_grid_of_several_seeds_has_each_at_its_own() -> None:
    """Added cells aren't trained once a seed, and those of another seed than 0 stay of that seed."""
    several = changed(RINGS, {"grid.seeds": (3, 1)}, "here")
    cells = grid_cells(several)
    trained = [
        {"depth": cell.trunk.depth, "budget_flops": cell.budget_flops, "seed": cell.trunk.seed} for cell in cells[:-1]
    ]
    added = further_cells(several, 3e12)[-3:]
    made = changed(several, {"grid": grid_settings(trained, added)}, "here")
    assert {cell.label for cell in grid_cells(made)} == {cell.label for cell in (*cells[:-1], *added)}


def test_what_cells_cost_is_what_the_plan_says() -> None:
    """But for whole steps, with a trunk that each size shares."""
    cells = grid_cells(changed(RINGS, {"grid.budgets": (3.447e11, 9.75e11, 1.95e12)}, "here"))
    sizes = np.array([(12, 16).index(cell.trunk.depth) for cell in cells])
    compute = Compute(np.array([cell.train_flops for cell in cells]), sizes, np.zeros(2), RINGS.optim.decay_fraction)
    planned = sum((size.trunk_images + size.branch_images) * size.trunk.flops_per_image for size in size_costs(cells))
    assert compute.of(range(len(cells))) == pytest.approx(planned, rel=2e-3)
