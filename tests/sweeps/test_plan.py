"""A sweep's plan against numbers worked out by hand."""

import math
from pathlib import Path

import pytest
from toy_sweep import toy_experiment

from sweeps.plan import Plan, bytes_of_runs, images_by_trunk, train_images
from varscale.errors import ExperimentError
from varscale.store.fingerprint import DataIdentity
from varscale.store.layout import ExperimentFiles, write_json
from varscale.training.cells import Numerics, grid_cells

NUMERICS = Numerics("float32", False, False, 1, 1)


def by_hand(depth: int) -> int:
    """Training FLOPs of an image of 1 + 4 + 16 tokens: 6 × the weights that a token passes, and attention's."""
    width, tokens, latent, vocabulary = 4 * depth, 21, 4, 16
    token_weights = depth * (4 * width**2 + 2 * 4 * width**2) + width * vocabulary
    embedded = (tokens - 1) * latent * width
    image_weights = depth * 6 * width**2 + 2 * width**2  # AdaLN of the blocks and of the head
    attention = depth * 2 * tokens**2 * width
    return 3 * 2 * (tokens * token_weights + embedded + image_weights + attention)


@pytest.mark.parametrize("depth", [2, 3])
def test_flops_of_an_image(depth: int) -> None:
    cells = [cell for cell in grid_cells(toy_experiment()) if cell.trunk.depth == depth]
    assert cells[0].trunk.flops_per_image == pytest.approx(by_hand(depth), rel=0.02)


def test_steps_branch_points_and_warm_up() -> None:
    experiment = toy_experiment(optim={"warmup_fraction": 0.25, "decay_fraction": 0.2})
    for cell in grid_cells(experiment):
        flops = cell.trunk.flops_per_image
        steps = math.floor(cell.budget_flops / (4 * flops))
        assert (cell.steps, cell.images) == (steps, 4 * steps)
        assert cell.images - cell.branch_images == 4 * round(0.2 * steps)
        assert cell.trunk.warmup_images == 4 * round(0.25 * math.floor(2e7 / (4 * flops)))


def test_images_of_trunks_and_of_the_token_store() -> None:
    cells = grid_cells(toy_experiment())
    for trunk, images in images_by_trunk(cells):
        own = [cell for cell in cells if cell.trunk == trunk]
        assert images == max(cell.branch_images for cell in own) + sum(cell.images - cell.branch_images for cell in own)
    longest = max(int(6e7 // (4 * cell.trunk.flops_per_image)) * 4 for cell in cells)
    assert train_images(cells, DataIdentity({}, {})) == longest
    assert train_images(cells, DataIdentity({}, {}, stored_images=24)) == 24  # however often they are seen


def test_bytes_of_runs_are_those_that_are_not_there_yet() -> None:
    """Four bytes a weight, and thrice as many with AdamW's moments: the run's last checkpoint, the next, its branch."""
    *_, cell = grid_cells(toy_experiment())
    parameters = cell.trunk.shape.parameters()
    assert bytes_of_runs([cell], [cell]) == (4 + 2 * 12 + 12) * parameters
    assert bytes_of_runs([cell], []) == (4 + 2 * 12) * parameters
    assert bytes_of_runs([], []) == 0


def test_cells_of_variants_come_after_the_grid_and_each_once() -> None:
    """Further seeds of the same recipe are cells like any other; those of the grid are not doubled."""
    seeds = {"name": "noise", "depths": [2], "budgets": [3e7, 4e7], "seeds": [1, 5]}
    faster = {"name": "lr-double", "depths": [3], "budgets": [6e7, 2e7], "settings": {"optim.lr": 1e-2}}
    cells = grid_cells(toy_experiment(grid={"budgets": [4e7, 2e7], "seeds": [0, 5], "variants": [seeds, faster]}))
    assert [cell.name for cell in cells] == [
        *("d2-c2e07-s0", "d2-c4e07-s0", "d2-c2e07-s5", "d2-c4e07-s5"),
        *("d3-c2e07-s0", "d3-c4e07-s0", "d3-c2e07-s5", "d3-c4e07-s5"),
        *("d2-c3e07-s1", "d2-c4e07-s1", "d2-c3e07-s5", "d3-c2e07-s0-lr-double", "d3-c6e07-s0-lr-double"),
    ]
    assert cells[-1].trunk.experiment.optim.peak_lr == pytest.approx(1e-2)
    assert len({cell.fingerprint("tokens", NUMERICS) for cell in cells}) == len(cells)


def test_a_variant_that_changes_nothing_is_the_same_run() -> None:
    """So that the base cell beside a study's variants is not trained twice."""
    same = {"name": "same", "depths": [2], "budgets": [2e7], "settings": {"optim.lr": 5e-3}}
    *grid, twin = grid_cells(toy_experiment(grid={"variants": [same]}))
    assert twin.fingerprint("tokens", NUMERICS) == grid[0].fingerprint("tokens", NUMERICS)


def test_trunks_of_missing_cells_only(tmp_path: Path) -> None:
    experiment = toy_experiment()
    cells = grid_cells(experiment)
    files = ExperimentFiles(tmp_path, "toy")
    done = [cell for cell in cells if cell.trunk.depth == 2 or cell.budget_flops in (2e7, 6e7)]
    for cell in done:
        print_ = cell.fingerprint("tokens", NUMERICS)
        write_json(files.cell(cell.name, print_).result, {"fingerprint": print_, "status": "finished", "metrics": {}})
    plan = Plan(experiment, files, cells, "tokens", NUMERICS)
    assert plan.missing == tuple(cell for cell in cells if cell not in done)
    ((trunk, milestones),) = plan.trunks().values()
    assert trunk.depth == 3
    assert milestones == tuple(cell.branch_images for cell in cells[5:7])


def test_results_of_other_settings_don_t_count(tmp_path: Path) -> None:
    experiment = toy_experiment(grid={"depths": [2], "budgets": [2e7]})
    (cell,) = grid_cells(experiment)
    files = ExperimentFiles(tmp_path, "toy")
    print_ = cell.fingerprint("tokens", NUMERICS)
    write_json(files.cell(cell.name, print_).result, {"fingerprint": "another", "status": "finished", "metrics": {}})
    assert Plan(experiment, files, (cell,), "tokens", NUMERICS).missing == (cell,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"min_steps": 17},
            r"grid.budgets: 5 of the cells .* than grid.min_steps = 17 steps; depth 3 at 2e\+07 FLOPs has 5",
        ),
        ({"budgets": [1e3]}, r"grid.budgets: 2 of the cells .* depth 2 at 1e\+03 FLOPs has 0 and needs"),
    ],
)
def test_too_short_cells_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        grid_cells(toy_experiment(grid=changes))


def test_the_budget_that_is_asked_for_is_enough() -> None:
    with pytest.raises(ExperimentError) as raised:
        grid_cells(toy_experiment(grid={"depths": [3], "budgets": [2e7], "min_steps": 17}))
    needed = float(str(raised.value).rpartition("needs ")[2].removesuffix(" FLOPs"))
    (cell,) = grid_cells(toy_experiment(grid={"depths": [3], "budgets": [needed], "min_steps": 17}))
    assert cell.steps in (17, 18)
