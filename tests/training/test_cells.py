"""Cells: what a budget buys, where branches leave, and what makes a cell another cell."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_experiment import SMALL

from varscale.config import Experiment
from varscale.config.yaml import validate
from varscale.errors import ExperimentError
from varscale.training.cells import Numerics, Trunk, grid_cells

NUMERICS: dict[str, Any] = {
    "precision": "float32",
    "compiled": False,
    "native_kernels": True,
    "threads": 1,
    "tokenizer_threads": 2,
}


def experiment(**changes: Any) -> Experiment:
    """SMALL with dotted fields changed."""
    settings: dict[str, Any] = copy.deepcopy(SMALL)
    settings["optim"] = {"batch_size": 8, "lr_batch_size": 8}
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            settings.setdefault(section, {})[field] = value
        else:
            settings[section] = value
    return validate(settings, "a test")


@given(depth=st.integers(1, 40), budget=st.floats(1e8, 1e18), batch=st.integers(1, 1024))
def test_steps_fill_the_budget(depth: int, budget: float, batch: int) -> None:
    trunk = Trunk(experiment(optim__batch_size=batch), depth, 0, budget)
    cell = trunk.cell(budget)
    step = trunk.flops_per_image * batch
    assert cell.steps * step <= budget < (cell.steps + 1) * step
    assert cell.images == cell.steps * batch
    assert cell.parameters()["train_flops"] <= budget


@given(steps=st.integers(1, 10_000), fraction=st.floats(0.01, 0.99))
def test_branches_leave_at_whole_steps(steps: int, fraction: float) -> None:
    trunk = Trunk(experiment(optim__decay_fraction=fraction), 2, 0, 1e12)
    cell = trunk.cell(float(steps * trunk.flops_per_image * 8))
    assert cell.steps == steps
    assert cell.branch_images + cell.decay_images == cell.images
    assert cell.branch_images % 8 == 0
    assert abs(cell.decay_images - fraction * cell.images) <= 4


def test_flops_are_three_forward_passes() -> None:
    trunk = Trunk(experiment(), 3, 0, 1e12)
    assert trunk.flops_per_image == 3 * trunk.shape.forward_flops()


def test_warm_up_belongs_to_the_smallest_budget() -> None:
    cells = grid_cells(experiment(grid__budgets=[4e12, 1e12, 2e12]))
    for depth in (2, 3):
        of_depth = [cell for cell in cells if cell.trunk.depth == depth]
        assert [cell.budget_flops for cell in of_depth] == [1e12, 2e12, 4e12]
        assert all(cell.trunk == of_depth[0].trunk for cell in of_depth)  # one trunk a size
        assert of_depth[0].trunk.warmup_images == round(0.1 * of_depth[0].steps) * 8


def fingerprint(numerics: dict[str, Any] | None = None, tokens: str = "t", seed: int = 0, **changes: Any) -> str:
    cell = Trunk(experiment(**changes), 2, seed, 1e12).cell(2e12)
    return cell.fingerprint(tokens, Numerics(**(NUMERICS | (numerics or {}))))


@pytest.mark.parametrize(
    "changes",
    [
        {"numerics": {"precision": "bfloat16"}},
        {"numerics": {"compiled": True}},
        {"numerics": {"native_kernels": False}},
        {"numerics": {"threads": 2}},
        {"tokens": "other"},
        {"seed": 1},
        {"optim__lr": 3e-4},
        {"optim__batch_size": 16},
        {"optim__betas": [0.9, 0.99]},
        {"optim__weight_decay": 0.1},
        {"optim__grad_clip": 1.0},
        {"optim__warmup_fraction": 0.2},
        {"optim__decay_fraction": 0.3},
        {"optim__final_lr_ratio": 0.1},
        {"optim__schedule": "linear"},
        {"model__width_per_depth": 32},
        {"model__head_dim": 8},
        {"model__mlp_ratio": 2.0},
        {"model__drop_path_at_depth_24": 0.2},
        {"model__label_dropout": 0.2},
        {"model__shared_adaln": True},
        {"model__normalise_queries_keys": False},
        {"model__adaln_init": 0.1},
        {"model__adaln_gamma_init": 0.1},
        {"model__head_init": 0.1},
        {"data__validation_images": 128},
    ],
)
def test_what_changes_numbers_changes_the_fingerprint(changes: dict[str, Any]) -> None:
    assert fingerprint(**changes) != fingerprint()


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "renamed"},
        {"runtime": {"workers": 3, "retries": 0, "checkpoint_seconds": 1.0, "log_every_steps": 3}},
        {"evaluation__samples_per_class": 1},
        {"evaluation__guidance": 3.0},
        {"grid__depths": [2, 3, 4]},
        {"grid__budgets": [1e12, 2e12, 8e12]},
        {"grid__min_steps": 10},
        {"optim__lr": 2e-4, "optim__lr_batch_size": 16},  # the same rate
        {"numerics": {"tokenizer_threads": 1}},  # in the tokenizer's fingerprint, hence the tokens'
    ],
)
def test_what_does_not_change_numbers_does_not(changes: dict[str, Any]) -> None:
    assert fingerprint(**changes) == fingerprint()


def test_trunks_of_one_size_are_shared() -> None:
    numerics = Numerics(**NUMERICS)
    base, other_end = experiment(), experiment(optim__final_lr_ratio=0.1)
    trunks = [Trunk(settings, 2, 0, 1e12) for settings in (base, other_end)]
    assert trunks[0].fingerprint("t", numerics) == trunks[1].fingerprint("t", numerics)
    assert trunks[0].cell(2e12).fingerprint("t", numerics) != trunks[0].cell(4e12).fingerprint("t", numerics)


VARIANT = {"name": "fast", "depths": [3], "budgets": [2e12], "seeds": [0, 1], "settings": {"optim.lr": 0.002}}


def test_variants_are_further_cells() -> None:
    cells = grid_cells(experiment(grid__variants=[VARIANT]))
    assert [(cell.trunk.depth, cell.trunk.variant, cell.trunk.seed) for cell in cells] == [
        (2, "", 0),
        (3, "", 0),
        (3, "fast", 0),
        (3, "fast", 1),
    ]
    assert cells[2].parameters()["lr"] == pytest.approx(0.002)
    assert cells[1].parameters()["lr"] == pytest.approx(1e-4)
    assert cells[2].trunk.warmup_images == cells[1].trunk.warmup_images  # of the grid's smallest budget
    assert "fast" in cells[2].name
    assert "fast" in cells[2].title
    assert len({cell.name for cell in cells}) == 4


def test_a_variant_that_changes_nothing_is_the_cell_itself() -> None:
    cells = grid_cells(experiment(grid__variants=[VARIANT | {"settings": {}, "budgets": [1e12], "seeds": [0]}]))
    assert [cell.name for cell in cells] == [cell.name for cell in grid_cells(experiment())]


def test_too_small_budgets_say_what_is_needed() -> None:
    with pytest.raises(ExperimentError, match=r"grid.min_steps = 200") as caught:
        grid_cells(experiment(grid__budgets=[1e10, 1e12]))
    message = str(caught.value)
    trunk = Trunk(experiment(), 3, 0, 1e10)
    assert "1 of the cells have fewer" in message
    assert "depth 3 at 1e+10 FLOPs has" in message
    needed = float(message.rsplit("needs ", 1)[1].split()[0])
    assert trunk.steps(needed) >= 200
    assert trunk.steps(needed) <= 203


def test_warm_up_must_end_before_the_decay() -> None:
    with pytest.raises(ExperimentError, match=r"optim.warmup_fraction"):
        grid_cells(experiment(optim__warmup_fraction=0.9))


def test_grids_need_branches() -> None:
    with pytest.raises(ExperimentError, match=r"optim.schedule"):
        grid_cells(experiment(optim__schedule="linear"))
