"""Cells that a grid could have as well, what they cost, and the grid that has them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.checks.candidates import Trunks
from analysis.checks.design import Compute
from sweeps.costs import size_costs
from sweeps.devices import Paces, this_machine
from sweeps.further_cells import further_cells, grid_settings
from sweeps.grid import check_lengths, grid_cells
from sweeps.plan import plan_of
from sweeps.study import Study
from varscale.config.yaml import changed, load_experiment
from varscale.store.layout import Store
from varscale.training.cells import Trunk

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
        made = changed(RINGS, {"grid": grid_settings(trained, added, min(RINGS.grid.budgets))}, "here")
        assert {cell.label for cell in grid_cells(made)} == {cell.label for cell in (*grid_cells(RINGS), *added)}


def test_a_grid_of_several_seeds_has_each_at_its_own() -> None:
    """Added cells aren't trained once a seed, and those of another seed than 0 stay of that seed."""
    several = changed(RINGS, {"grid.seeds": (3, 1)}, "here")
    cells = grid_cells(several)
    trained = [
        {"depth": cell.trunk.depth, "budget_flops": cell.budget_flops, "seed": cell.trunk.seed} for cell in cells[:-1]
    ]
    added = further_cells(several, 3e12)[-3:]
    made = changed(several, {"grid": grid_settings(trained, added, min(several.grid.budgets))}, "here")
    assert {cell.label for cell in grid_cells(made)} == {cell.label for cell in (*cells[:-1], *added)}


def test_the_warm_up_stays_that_of_the_recipe() -> None:
    """Whether or not a cell of its smallest budget is among those that have ended, or one of a smaller one is."""
    larger, smaller = [{"depth": 12, "budget_flops": 6.894e11}], [{"depth": 12, "budget_flops": 2e11}]
    for ended in (larger, larger + smaller, grid_cells(RINGS)):
        rows = [each if isinstance(each, dict) else {"depth": each.trunk.depth, **each.labels()} for each in ended]
        made = changed(RINGS, {"grid": grid_settings(rows, further_cells(RINGS, 2e12)[-2:], 3.447e11)}, "here")
        assert min(made.grid.budgets) == 3.447e11
        points = {(cell.trunk.depth, cell.budget_flops) for cell in grid_cells(made)}
        assert {(row["depth"], row["budget_flops"]) for row in rows} < points
        assert {cell.trunk.warmup_images for cell in grid_cells(made) if cell.trunk.depth == 12} == {
            grid_cells(RINGS)[0].trunk.warmup_images
        }


def test_a_trunk_that_is_there_goes_on_by_what_is_to_be_spent() -> None:
    largest = {
        depth: max(cell.budget_flops for cell in further_cells(RINGS, 2e12, [], _trained) if cell.trunk.depth == depth)
        for depth in (12, 16)
    }
    assert 7e12 < largest[12] <= 1e13
    assert largest[16] <= 2e12


def _trained(trunk: Trunk) -> float:
    return 8e12 if trunk.depth == 12 else 0.0


@pytest.mark.parametrize("there", [(), (0, 1), (1,), (0, 1, 2)])
def test_what_is_left_costs_what_the_plan_says(there: tuple[int, ...], tmp_path: Path) -> None:
    """A trunk goes on from the checkpoint before the first branch that it has none for: to the last one."""
    budgets = (3.447e11, 6.894e11, 1.379e12, 2.758e12)
    cells = grid_cells(changed(RINGS, {"grid.budgets": budgets, "grid.depths": (12,)}, "here"))
    study = Study.of(cells[0].trunk.experiment, Store(tmp_path / "runs"), cells)
    trunk, flops = study.trunk_files(cells[0].trunk), float(cells[0].trunk.flops_per_image)
    for place in there:
        trunk.folder.mkdir(parents=True, exist_ok=True)
        trunk.milestone(cells[place].branch_images).touch()
    assert study.checkpoints(cells[0].trunk) == tuple(cells[place].branch_images for place in there)
    plan = plan_of(study.experiment, study.store, cells, this_machine(study.experiment.runtime, Paces()))
    (left,) = plan.left.sizes
    params = float(cells[0].trunk.model.parameters())
    checkpoints = [(params, flops * images) for images in study.checkpoints(cells[0].trunk)]
    trunks = Trunks(pd.DataFrame(checkpoints, columns=["params", "flops"]), 0.2)
    frame = pd.DataFrame({"params": params, "flops": cell.train_flops} for cell in cells)
    expected = flops * (left.trunk_images + left.branch_images)
    assert trunks.compute(frame).of(range(len(cells))) == pytest.approx(expected, rel=5e-3)


def test_what_cells_cost_is_what_the_plan_says() -> None:
    """But for whole steps, with a trunk that each size shares."""
    cells = grid_cells(changed(RINGS, {"grid.budgets": (3.447e11, 9.75e11, 1.95e12)}, "here"))
    sizes = np.array([(12, 16).index(cell.trunk.depth) for cell in cells])
    flops = np.array([cell.train_flops for cell in cells])
    compute = Compute(flops, sizes, np.zeros(len(cells)), RINGS.optim.decay_fraction)
    planned = sum((size.trunk_images + size.branch_images) * size.trunk.flops_per_image for size in size_costs(cells))
    assert compute.of(range(len(cells))) == pytest.approx(planned, rel=2e-3)
