"""A study's cells and what is missing of them, against numbers worked out by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
from toy_sweep import toy_experiment

from sweeps.costs import size_costs
from sweeps.grid import grid_cells
from sweeps.study import Study
from varscale.errors import ExperimentError
from varscale.store.fingerprint import DataIdentity
from varscale.store.layout import Store
from varscale.store.records import Result


def study_of(runs: Path, data: DataIdentity | None = None, **sections: Any) -> Study:
    experiment = toy_experiment(**sections)
    return Study(experiment, Store(runs), grid_cells(experiment), data or DataIdentity({}, {}))


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


def test_images_of_trunks_and_of_the_token_store(tmp_path: Path) -> None:
    cells = grid_cells(toy_experiment())
    for size in size_costs(cells):
        own = [cell for cell in cells if cell.trunk == size.trunk]
        assert size.all_images == max(cell.branch_images for cell in own) + sum(
            cell.images - cell.branch_images for cell in own
        )
    longest = max(int(6e7 // (4 * cell.trunk.flops_per_image)) * 4 for cell in cells)
    assert study_of(tmp_path).train_images == longest
    stored = DataIdentity({}, {}, stored_images=24)
    assert study_of(tmp_path, stored).train_images == 24  # however often they are seen


def test_bytes_to_write_are_of_what_is_not_there_yet(tmp_path: Path) -> None:
    """Four bytes a weight, and thrice as many with AdamW's moments: the run's last checkpoint, the next, its branch."""
    study = study_of(tmp_path)
    *_, cell = study.cells
    parameters, tokens = cell.trunk.model.parameters(), study.bytes_to_write([])
    assert tokens == (study.train_images + 32) * (21 + 1) * 2
    assert study.bytes_to_write([cell]) == tokens + (4 + 2 * 12 + 12) * parameters
    milestone = study.trunk_files(cell.trunk).milestone(cell.branch_images)
    milestone.parent.mkdir(parents=True)
    milestone.touch()
    assert study.bytes_to_write([cell]) == tokens + (4 + 2 * 12) * parameters


def test_cells_of_variants_come_after_the_grid_and_each_once() -> None:
    """Further seeds of the same recipe are cells like any other; those of the grid are not doubled."""
    seeds = {"name": "noise", "depths": [2], "budgets": [3e7, 4e7], "seeds": [1, 5]}
    faster = {"name": "lr-double", "depths": [3], "budgets": [6e7, 2e7], "settings": {"optim.lr": 1e-2}}
    cells = grid_cells(toy_experiment(grid={"budgets": [4e7, 2e7], "seeds": [0, 5], "variants": [seeds, faster]}))
    assert [cell.label for cell in cells] == [
        *("d2-s0-c2e07", "d2-s0-c4e07", "d2-s5-c2e07", "d2-s5-c4e07"),
        *("d3-s0-c2e07", "d3-s0-c4e07", "d3-s5-c2e07", "d3-s5-c4e07"),
        *("d2-s1-c3e07", "d2-s1-c4e07", "d2-s5-c3e07", "d3-s0-lr-double-c2e07", "d3-s0-lr-double-c6e07"),
    ]
    assert cells[-1].trunk.experiment.optim.peak_lr == pytest.approx(1e-2)
    assert len({cell.key("tokens").folder for cell in cells}) == len(cells)


def test_a_variant_that_changes_nothing_is_the_same_run() -> None:
    """So that the base cell beside a study's variants is not trained twice."""
    same = {"name": "same", "depths": [2], "budgets": [2e7], "settings": {"optim.lr": 5e-3}}
    *grid, twin = grid_cells(toy_experiment(grid={"variants": [same]}))
    assert twin.key("tokens") == grid[0].key("tokens")


def test_trunks_of_missing_cells_only(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    done = [cell for cell in study.cells if cell.trunk.depth == 2 or cell.budget_flops in (2e7, 6e7)]
    for cell in done:
        files = study.cell_files(cell)
        Result(fingerprint=files.fingerprint, status="finished", time=1.0).write(files.result)
    assert study.missing == tuple(cell for cell in study.cells if cell not in done)
    (size,) = size_costs(study.missing)
    assert size.trunk.depth == 3
    assert size.milestones == tuple(cell.branch_images for cell in study.cells[5:7])


def test_results_of_other_settings_don_t_count(tmp_path: Path) -> None:
    study = study_of(tmp_path, grid={"depths": [2], "budgets": [2e7]})
    (cell,) = study.cells
    Result(fingerprint="another", status="finished", time=1.0).write(study.cell_files(cell).result)
    assert study.missing == (cell,)


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


def test_one_advice_satisfies_every_size() -> None:
    """Although the cell that is named, the shortest, is of another size than the one that needs most."""
    deep = {"name": "deep", "depths": [5], "budgets": [6e7]}
    with pytest.raises(ExperimentError, match=r"depth 2 at 1e\+06 FLOPs has 0 and needs \S+; the smallest") as raised:
        grid_cells(toy_experiment(grid={"depths": [2], "budgets": [1e6], "min_steps": 17, "variants": [deep]}))
    needed = float(str(raised.value).rpartition("needs ")[2].removesuffix(" FLOPs"))
    settings: dict[str, Any] = {"depths": [2, 5], "min_steps": 17}
    assert min(cell.steps for cell in grid_cells(toy_experiment(grid={**settings, "budgets": [needed]}))) == 17
    with pytest.raises(ExperimentError, match="1 of the cells"):
        grid_cells(toy_experiment(grid={**settings, "budgets": [needed * 0.99]}))
