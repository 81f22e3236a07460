"""Loss and error of token prediction against NumPy, whatever the batches.

Letters: B batch, L tokens of an image, V vocabulary.
"""

import math

import numpy as np
import pytest
import torch

from varscale.evaluation.likelihood import TokenPrediction, token_losses
from varscale.families.base import TokenLosses

PATCH_NUMS = (1, 2, 3)


def draw(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits_BLV = 3 * torch.randn(images, 14, 11, generator=generator)
    return logits_BLV, torch.randint(0, 11, (images, 14), generator=generator)


def measured(logits_BLV: torch.Tensor, tokens_BL: torch.Tensor, batch: int) -> dict[str, float]:
    metric = TokenPrediction([side**2 for side in PATCH_NUMS])
    for logits_bLV, tokens_bL in zip(logits_BLV.split(batch), tokens_BL.split(batch), strict=True):
        metric.update(TokenLosses(token_losses(logits_bLV, tokens_bL), tokens_bL, logits_bLV))
    return metric.compute()


def test_without_likelihood_there_is_a_loss_alone() -> None:
    metric, loss_BL = TokenPrediction([4], has_likelihood=False), torch.rand(20, 4)
    metric.update(TokenLosses(loss_BL))
    figures = metric.compute()
    assert figures["loss"] == pytest.approx(float(loss_BL.mean()))
    assert figures["loss_standard_error"] == pytest.approx(float(loss_BL.mean(1).std()) / math.sqrt(20), rel=1e-5)
    assert figures.keys() == {"loss", "loss_standard_error", "validation_images"}, "of one group alone"


def test_figures_equal_numpy() -> None:
    logits_BLV, tokens_BL = draw(50)
    figures = measured(logits_BLV, tokens_BL, 50)
    values, tokens = logits_BLV.double().numpy(), tokens_BL.numpy()
    log_total = np.log(np.exp(values).sum(-1))
    loss_BL = log_total - np.take_along_axis(values, tokens[..., None], -1)[..., 0]
    wrong_BL = values.argmax(-1) != tokens
    assert figures["loss"] == pytest.approx(loss_BL.mean(), rel=1e-6)
    assert figures["error"] == pytest.approx(wrong_BL.mean(), rel=1e-12)
    assert figures["loss_per_image"] == pytest.approx(loss_BL.sum(1).mean(), rel=1e-6)
    spread = loss_BL.mean(1).std(ddof=1) / math.sqrt(50)
    assert figures["loss_standard_error"] == pytest.approx(spread, rel=1e-5)
    assert figures["validation_images"] == 50
    for scale, (begin, end) in enumerate([(0, 1), (1, 5), (5, 14)], start=1):
        assert figures[f"loss_scale_{scale}"] == pytest.approx(loss_BL[:, begin:end].mean(), rel=1e-6)
        assert figures[f"error_scale_{scale}"] == pytest.approx(wrong_BL[:, begin:end].mean(), rel=1e-12)
    assert figures["loss_last_scale"] == figures["loss_scale_3"]
    assert figures["error_last_scale"] == figures["error_scale_3"]


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_batches_do_not_show(batch: int) -> None:
    logits_BLV, tokens_BL = draw(50)
    assert measured(logits_BLV, tokens_BL, batch) == pytest.approx(measured(logits_BLV, tokens_BL, 50), rel=1e-12)


def test_a_single_image_has_no_spread() -> None:
    assert measured(*draw(1), 1)["loss_standard_error"] == 0


def test_bfloat16_logits_are_measured_in_float32() -> None:
    logits_BLV, tokens_BL = draw(20)
    rounded_BLV = logits_BLV.bfloat16()
    assert measured(rounded_BLV, tokens_BL, 20) == measured(rounded_BLV.float(), tokens_BL, 20)
