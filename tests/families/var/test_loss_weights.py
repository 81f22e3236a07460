"""Weights of scales in VAR's training loss, against plain computations.

Letters: B batch, L tokens of an image.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from scipy import stats
from small_models import PAPER, make_module, make_var, tokenizer_for, var_config
from torch.utils.data import DataLoader

from varscale.errors import ExperimentError
from varscale.families.base import TokenSpace
from varscale.families.models import random_batch
from varscale.families.var.config import VARSection
from varscale.families.var.loss_weights import LossWeights, token_weights

RINGS = (1, 2, 3, 6)


@pytest.mark.parametrize("patch_nums", [PAPER, RINGS, (5,)])
@pytest.mark.parametrize("weights", ["uniform", "infinity", "nextflow", "hmar"])
def test_a_token_weighs_one_on_average(patch_nums: tuple[int, ...], weights: LossWeights) -> None:
    weight_K = np.array(token_weights(patch_nums, weights))
    assert (weight_K * np.square(patch_nums)).sum() == pytest.approx(sum(side**2 for side in patch_nums))


def test_the_named_weights_follow_their_sources() -> None:
    sides = np.array(PAPER)
    shares = {
        "uniform": sides**2,
        "infinity": sides,  # a token weighs one over its scale's side
        "nextflow": sides**2 / (sides**2.0) ** 0.9,
        "hmar": stats.norm.pdf(stats.zscore(sides / 16, ddof=1)[::-1]),
    }
    for name, share_K in shares.items():
        found_K = np.array(token_weights(PAPER, name)) * sides**2 / 680
        np.testing.assert_allclose(found_K, share_K / share_K.sum(), rtol=1e-12)


@pytest.mark.parametrize("weights", ["uniform", "infinity", "nextflow", "hmar"])
def test_the_documents_shares(weights: LossWeights) -> None:
    share = sum(weight * side**2 for weight, side in zip(token_weights(PAPER, weights), PAPER[:5], strict=False)) / 680
    document = (Path(__file__).resolve().parents[3] / "docs" / "families.md").read_text()
    row = next(line for line in document.splitlines() if line.startswith(f"| `{weights}` |"))
    assert f"| {share:.0%} |" in row


def test_of_numbers_only_the_ratios_count() -> None:
    assert token_weights(RINGS, (2.0, 2.0, 2.0, 2.0)) == (1.0, 1.0, 1.0, 1.0)
    assert token_weights((1, 3), (1.0, 0.0)) == (10.0, 0.0)


def gradients_after_a_step(weights: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Of a step with a rate of about 0; and what was logged of it."""
    description = var_config(loss_weights=weights, head_init=1.0, label_dropout=0.0)
    module = make_module(description, {"lr": 1e-30, "batch_size": 6, "grad_clip": 1e9}, log_every_steps=1)
    torch.manual_seed(3)
    batch = random_batch(description, 6)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1
    )
    trainer.fit(module, DataLoader([batch], batch_size=None))
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in module.model.named_parameters()
        if parameter.grad is not None
    }
    return gradients, {name: float(value) for name, value in trainer.logged_metrics.items()}


def test_a_step_follows_the_weighted_loss_and_logs_the_plain_one() -> None:
    """The gradient is linear in the weights, so that scale by scale they add up to that of the mean over all tokens."""
    uniform, logged = gradients_after_a_step("uniform")
    alone = [gradients_after_a_step([float(scale == other) for other in range(3)]) for scale in range(3)]
    for name, gradient in uniform.items():
        parts = sum(share * each[name] for share, (each, _) in zip((1 / 14, 4 / 14, 9 / 14), alone, strict=True))
        torch.testing.assert_close(parts, gradient, atol=1e-6, rtol=1e-4)
    losses = {name: value for name, value in logged.items() if "loss" in name}
    assert losses.keys() == {"train_loss", "train_loss_last_scale", *(f"train_loss_scale_{k}" for k in (1, 2, 3))}
    for _, figures in alone:
        assert {name: figures[name] for name in losses} == pytest.approx(losses)


def test_likelihoods_are_the_same_whatever_the_weights() -> None:
    torch.manual_seed(0)
    plain, weighted = make_var(), make_var(loss_weights="hmar")
    weighted.load_state_dict(plain.state_dict())
    batch, tokenizer = random_batch(plain.config, 4), tokenizer_for(plain.config)
    ours, theirs = (
        model.config.implementation().losses(model, tokenizer, batch).loss_BL for model in (plain, weighted)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ([1, -1, 1], r"numbers must be from 0 to 1e\+06"),
        ([0, 0, 0], "one of them above 0"),
        ([], "one of them above 0"),
        ([1, float("nan"), 1], "numbers must be"),
        ([True, 1, 1], "numbers must be"),
        ("hamr", "expected uniform, infinity, nextflow, hmar or a list of numbers, got 'hamr'"),
        (2, "expected uniform, .* or a list of numbers, got 2"),
    ],
)
def test_weights_that_say_nothing(weights: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        VARSection(loss_weights=weights)


def test_as_many_numbers_as_scales() -> None:
    space = TokenSpace(patch_nums=RINGS, vocab_size=61, latent_channels=6, num_classes=16)
    problem = r"^model\.loss_weights: 3 numbers, but there are 4 scales, \[1, 2, 3, 6\]"
    with pytest.raises(ExperimentError, match=problem):
        VARSection(loss_weights=(1, 2, 3)).describe(space, 2)
    assert VARSection(loss_weights=(1, 2, 3, 4)).describe(space, 2).model_dump()["loss_weights"] == (1.0, 2.0, 3.0, 4.0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("weights", ["hmar", (1.0, 2.0, 3.0)])
def test_weights_are_written_as_they_are_read(weights: LossWeights) -> None:
    description = var_config(loss_weights=weights)
    assert type(description).model_validate_json(description.model_dump_json()) == description
    assert description.model_dump(mode="json")["loss_weights"] in (weights, [1.0, 2.0, 3.0])
    assert "loss_weights" not in var_config().model_dump()
