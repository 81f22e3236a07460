"""Cells: what a budget buys, where branches leave, and what makes a cell another cell."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel
from small_experiment import SMALL

from sweeps.grid import grid_cells
from varscale.config import EvaluationConfig, Experiment, OptimConfig, RuntimeConfig, TokenizerConfig
from varscale.config.search import SearchConfig
from varscale.config.section import ResourcesConfig
from varscale.config.tokenizer import TokenizerTraining
from varscale.config.yaml import changed, validate
from varscale.data.sources.of_experiment import data_identity
from varscale.data.sources.rings.config import RingsSection
from varscale.errors import ExperimentError
from varscale.families.var.config import VARSection
from varscale.store import fingerprint as identity
from varscale.store.fingerprint import tokenizer_fingerprint, tokens_fingerprint
from varscale.training.cells import Cell, Trunk


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
    assert trunk.flops_per_image == 3 * trunk.model.forward_flops()


def test_warm_up_belongs_to_the_smallest_budget() -> None:
    cells = grid_cells(experiment(grid__budgets=[4e12, 1e12, 2e12]))
    for depth in (2, 3):
        of_depth = [cell for cell in cells if cell.trunk.depth == depth]
        assert [cell.budget_flops for cell in of_depth] == [1e12, 2e12, 4e12]
        assert all(cell.trunk == of_depth[0].trunk for cell in of_depth)  # one trunk a size
        assert of_depth[0].trunk.warmup_images == round(0.1 * of_depth[0].steps) * 8


# ------------------------------------------------------------------------------------------------- fingerprints

BITWISE = {"tokenizer.quantizer": "bitwise", "tokenizer.latent_channels": 4, "tokenizer.vocab_size": 16}
SCIENTIFIC: dict[str, dict[str, Any]] = {
    "data.image_size": {"data.image_size": 64, "tokenizer.channel_multipliers": [1, 1, 1, 1, 2]},
    "data.num_classes": {"data.num_classes": 4, "data.max_rings": 4},
    "data.validation_images": {"data.validation_images": 128},
    "data.seed": {"data.seed": 1},
    "data.min_rings": {"data.num_classes": 2, "data.min_rings": 2},
    "data.max_rings": {"data.num_classes": 2, "data.max_rings": 2},
    "data.radius": {"data.radius": [0.1, 0.3]},
    "data.width": {"data.width": [0.1, 0.1]},
    "data.colours": {"data.colours": 5},
    "data.backgrounds": {"data.backgrounds": 1},
    "tokenizer.patch_nums": {"tokenizer.patch_nums": [1, 3, 4]},
    "tokenizer.vocab_size": {"tokenizer.vocab_size": 32},
    "tokenizer.latent_channels": {"tokenizer.latent_channels": 4},
    "tokenizer.base_channels": {"tokenizer.base_channels": 64},
    "tokenizer.channel_multipliers": {"tokenizer.channel_multipliers": [1, 1, 1, 3]},
    "tokenizer.residual_blocks": {"tokenizer.residual_blocks": 1},
    "tokenizer.attention": {"tokenizer.attention": False},
    "tokenizer.norm_groups": {"tokenizer.norm_groups": 16},
    "tokenizer.phi_count": {"tokenizer.phi_count": 1},
    "tokenizer.phi_ratio": {"tokenizer.phi_ratio": 0.4},
    "tokenizer.commitment_weight": {"tokenizer.commitment_weight": 0.5},
    "tokenizer.quantizer": BITWISE,
    "tokenizer.entropy_weight": {**BITWISE, "tokenizer.entropy_weight": 0.2},
    "tokenizer.checkpoint": {"tokenizer.checkpoint": __file__},  # by what the file holds
    "tokenizer.training.images": {"tokenizer.training.images": 128_000},
    "tokenizer.training.batch_size": {"tokenizer.training.batch_size": 32},
    "tokenizer.training.lr": {"tokenizer.training.lr": 1e-3},
    "tokenizer.training.betas": {"tokenizer.training.betas": [0.9, 0.99]},
    "tokenizer.training.weight_decay": {"tokenizer.training.weight_decay": 0.1},
    "tokenizer.training.grad_clip": {"tokenizer.training.grad_clip": 2.0},
    "tokenizer.training.warmup_images": {"tokenizer.training.warmup_images": 6400},
    "tokenizer.training.final_lr_ratio": {"tokenizer.training.final_lr_ratio": 0.1},
    "tokenizer.training.ema_decay": {"tokenizer.training.ema_decay": 0.9},
    "tokenizer.training.l1_weight": {"tokenizer.training.l1_weight": 0.1},
    "tokenizer.training.l2_weight": {"tokenizer.training.l2_weight": 0.1},
    "tokenizer.training.perceptual_weight": {
        "tokenizer.training.perceptual_weight": 0.5,
        "tokenizer.training.perceptual_weights_path": __file__,
    },
    "tokenizer.training.perceptual_weights_path": {"tokenizer.training.perceptual_weights_path": __file__},
    "tokenizer.training.adversarial_weight": {"tokenizer.training.adversarial_weight": 0.5},
    "tokenizer.training.adversarial_start": {"tokenizer.training.adversarial_start": 0.5},
    "tokenizer.training.discriminator_channels": {"tokenizer.training.discriminator_channels": 32},
    "tokenizer.training.quantize_after": {"tokenizer.training.quantize_after": 0.3},
    "tokenizer.training.restart_every_steps": {"tokenizer.training.restart_every_steps": 20},
    "tokenizer.training.restart_usage": {"tokenizer.training.restart_usage": 0.2},
    "tokenizer.training.seed": {"tokenizer.training.seed": 1},
    "model.mlp_ratio": {"model.mlp_ratio": 2.0},
    "model.block": {"model.block": "modern"},
    "data.captions": {"data.captions": {"encoder": "words"}},
    "model.condition": {"model.condition": "text", "data.captions": {"encoder": "words"}},
    "model.loss_weights": {"model.loss_weights": "nextflow"},
    "model.classifier": {**BITWISE, "model.classifier": "bits"},
    "model.label_dropout": {"model.label_dropout": 0.2},
    "model.shared_adaln": {"model.shared_adaln": True},
    "model.normalise_queries_keys": {"model.normalise_queries_keys": False},
    "model.adaln_init": {"model.adaln_init": 0.1},
    "model.adaln_gamma_init": {"model.adaln_gamma_init": 0.1},
    "model.head_init": {"model.head_init": 0.1},
    "model.width_per_depth": {"model.width_per_depth": 32},
    "model.head_dim": {"model.head_dim": 8},
    "model.drop_path_at_depth_24": {"model.drop_path_at_depth_24": 0.2},
    "model.parametrization": {"model.parametrization": "mup", "model.base_width": 16},
    "model.base_width": {"model.parametrization": "mup", "model.base_width": 8},
    "model.base_depth": {"model.parametrization": "complete-p", "model.base_width": 16, "model.base_depth": 1},
    "optim.lr": {"optim.lr": 3e-4},
    "optim.lr_batch_size": {"optim.lr_batch_size": 16},
    "optim.batch_size": {"optim.batch_size": 16},
    "optim.lr_batch_rule": {"optim.lr_batch_rule": "sqrt", "optim.batch_size": 32},
    "optim.lr_horizon": {"optim.lr_horizon": 1000},
    "optim.lr_horizon_exponent": {"optim.lr_horizon": 1000, "optim.lr_horizon_exponent": 0.5},
    "optim.precision": {"optim.precision": "bfloat16"},
    "optim.betas": {"optim.betas": [0.9, 0.99]},
    "optim.weight_decay": {"optim.weight_decay": 0.1},
    "optim.final_weight_decay": {"optim.final_weight_decay": 0.1},
    "optim.grad_clip": {"optim.grad_clip": 1.0},
    "optim.schedule": {"optim.schedule": "linear"},
    "optim.warmup_fraction": {"optim.warmup_fraction": 0.2},
    "optim.decay_fraction": {"optim.decay_fraction": 0.3},
    "optim.final_lr_ratio": {"optim.final_lr_ratio": 0.1},
}
"""What a paper would state: each makes another cell."""

OTHERS: dict[str, Any] = {
    "data.max_undecodable": 3,
    "tokenizer.accept": True,
    "tokenizer.encode_batch_size": 64,
    "tokenizer.training.micro_batch": 16,
    "optim.epochs": 3.0,  # of a single run; its length counts
    "evaluation.batch_size": 7,
    "evaluation.samples_per_class": 1,
    "evaluation.sample_classes": 1,
    "evaluation.guidance": 3.0,
    "evaluation.top_k": 5,
    "evaluation.top_p": 0.5,
    "evaluation.fidelity": {"samples": 100},
    "runtime.compile": "on",
    "runtime.micro_batch": 3,
    "runtime.threads": 3,
    "runtime.tokenizer_threads": 3,
    "runtime.workers": 3,
    "runtime.log_every_steps": 3,
    "runtime.checkpoint_seconds": 3.0,
    "runtime.retries": 0,
    "resources.devices": 2,
    "resources.nodes": 2,
    "resources.sharded": True,
    "resources.hours": 3.0,
    "resources.by_parameters": {1e3: {"devices": 2}},
    "search.objective": "loss-and-flops",
    "search.depth": 3,
    "search.budgets": [1e12],
    "search.space": {"optim.lr": {"low": 1e-4, "high": 1e-2}},
    "search.sampler": "random",
    "search.seed": 9,
    "search.confirmation_seeds": [4, 5],
    "search.transfer": {"steps": 7},
    "name": "renamed",
    "grid.depths": [2, 3, 4],
    "grid.budgets": [1e12, 2e12, 8e12],
    "grid.seeds": [0, 1],
    "grid.min_steps": 10,
    "grid.variants": [{"name": "more", "depths": [3], "budgets": [2e12], "settings": {"optim.lr": 1.0}}],
    "by_depth": {2: {"optim.lr": 1.0}},
}
"""What changes no result of a cell, or its rounding only."""

ELSEWHERE = {"data.kind", "model.family", "data.views", "data.resize_ratio", "data.horizontal_flip"}
"""Another kind is another description; the last three are of stored images only, below."""


def print_of(experiment: Experiment, seed: int = 0) -> str:
    data = data_identity(experiment.data)
    tokens = tokens_fingerprint(data, tokenizer_fingerprint(experiment, data))
    return Trunk(experiment, 2, seed, min(experiment.grid.budgets)).cell(2e12).key(tokens).fingerprint


def altered(changes: dict[str, Any], seed: int = 0) -> str:
    return print_of(changed(experiment(), changes, "a test"), seed)


def test_every_setting_is_said_to_be_scientific_or_not() -> None:
    """A new field of a section belongs into one of the lists above."""
    sections: dict[str, type[BaseModel]] = {
        "data": RingsSection,
        "tokenizer": TokenizerConfig,
        "tokenizer.training": TokenizerTraining,
        "model": VARSection,
        "optim": OptimConfig,
        "evaluation": EvaluationConfig,
        "runtime": RuntimeConfig,
        "resources": ResourcesConfig,
        "search": SearchConfig,
    }
    fields = {f"{name}.{field}" for name, section in sections.items() for field in section.model_fields}
    fields |= Experiment.model_fields.keys() | {f"grid.{name}" for name in type(experiment().grid).model_fields}
    fields -= {*sections, "grid"}
    assert fields == {*SCIENTIFIC, *OTHERS, *ELSEWHERE}
    assert not SCIENTIFIC.keys() & OTHERS.keys()


@pytest.mark.parametrize("name", SCIENTIFIC)
def test_what_a_paper_would_state_changes_the_fingerprint(name: str) -> None:
    assert altered(SCIENTIFIC[name]) != altered({})


def test_no_two_scientific_settings_are_the_same_cell() -> None:
    assert len({altered(changes) for changes in SCIENTIFIC.values()}) == len(SCIENTIFIC)


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_changes_it(name: str) -> None:
    assert altered({name: OTHERS[name]}) == altered({})


def test_crops_of_stored_images_change_it(tmp_path: Path) -> None:
    """But not where the images lie."""
    for place in ("here", "there"):
        for split, shade in (("train", 0), ("validation", 9)):
            for label in "abc":
                (tmp_path / place / split / label).mkdir(parents=True)
                Image.new("RGB", (48, 32), (shade,) * 3).save(tmp_path / place / split / label / "image.bmp")

    def stored(place: str, **changes: Any) -> str:
        paths = {f"{split}_path": str(tmp_path / place / split) for split in ("train", "validation")}
        data = {"kind": "folder", "image_size": 32, "num_classes": 3, **paths, **changes}
        return print_of(experiment(data=data))

    assert stored("here") == stored("there") == stored("here", max_undecodable=3)
    prints = [stored("here", **change) for change in
              ({}, {"views": 2}, {"resize_ratio": 1.25}, {"horizontal_flip": True}, {"seed": 1})]  # fmt: skip
    assert len(set(prints)) == 5


def test_the_seed_and_the_numerics_version_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = altered({})
    assert altered({}, seed=1) != before
    monkeypatch.setattr(identity, "NUMERICS_VERSION", identity.NUMERICS_VERSION + 1)
    assert altered({}) != before


def test_only_the_rate_that_is_used_counts() -> None:
    assert altered({"optim.lr": 2e-4, "optim.lr_batch_size": 16}) == altered({})


def test_nominal_budgets_and_names_of_variants_do_not_count() -> None:
    trunk = Trunk(experiment(), 2, 0, 1e12)
    step = trunk.flops_per_image * trunk.batch_size
    exact, more = (trunk.cell(float(300 * step + rest)) for rest in (0, step // 2))
    assert exact.steps == more.steps == 300
    assert exact.key("t") == more.key("t")
    assert trunk.cell(301.0 * step).key("t") != exact.key("t")

    def variant(name: str, **settings: Any) -> Cell:
        described = {"name": name, "depths": [3], "budgets": [2e12], "settings": settings}
        return grid_cells(experiment(grid__variants=[described]))[-1]

    first, second = (variant(name, **{"optim.lr": 0.002}) for name in ("fast", "quick"))
    assert (first.trunk.variant, second.trunk.variant) == ("fast", "quick")
    assert first.key("t") == second.key("t")
    assert first.trunk.key("t") == second.trunk.key("t")
    unchanged = variant("same", **{"optim.lr": 1e-4})
    assert unchanged.key("t") == Trunk(experiment(), 3, 0, 1e12).cell(2e12).key("t")


def test_trunks_of_one_size_are_shared() -> None:
    base, other_end = experiment(), experiment(optim__final_lr_ratio=0.1)
    trunks = [Trunk(settings, 2, 0, 1e12) for settings in (base, other_end)]
    assert trunks[0].key("t") == trunks[1].key("t")
    assert trunks[0].cell(2e12).key("t") != trunks[1].cell(2e12).key("t")
    assert trunks[0].cell(2e12).key("t") != trunks[0].cell(4e12).key("t")
    assert trunks[0].key("t") != trunks[0].key("other")
    assert trunks[0].key("t").kind == "trunks"
    assert trunks[0].cell(2e12).key("t").kind == "cells"


# -------------------------------------------------------------------------------------------------------- grids

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
    assert "fast" in cells[2].label
    assert "fast" in cells[2].title
    assert len({cell.label for cell in cells}) == 4


def test_a_variant_that_changes_nothing_is_the_cell_itself() -> None:
    cells = grid_cells(experiment(grid__variants=[VARIANT | {"settings": {}, "budgets": [1e12], "seeds": [0]}]))
    assert [cell.label for cell in cells] == [cell.label for cell in grid_cells(experiment())]


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
