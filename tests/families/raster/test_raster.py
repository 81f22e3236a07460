"""Next-token prediction: who sees whom, and that tokens are drawn from what the whole pass says.

Letters: B batch, L tokens of an image, V vocabulary, c latent channels.
"""

from typing import Any

import pytest
import torch
from small_models import counted, tokenizer_for
from torch import Tensor

from varscale.families.base import SamplingOptions, TokenSpace
from varscale.families.raster.config import RasterConfig, RasterSection
from varscale.families.raster.family import RasterFamily, RasterTransformer, token_predictor
from varscale.generation.sampling import sample_with

LABELS = torch.tensor([0, 4, 5])
BLOCKS = ("var", "modern")


def raster(**changes: Any) -> RasterTransformer:
    sizes = {"patch_nums": (3,), "vocab_size": 32, "latent_channels": 4, "num_classes": 5, "depth": 2, "width": 16}
    lively = {"heads": 2, "adaln_gamma_init": 1.0, "init_std": 0.3, "head_init": 1.0}
    torch.manual_seed(0)
    return RasterTransformer(RasterConfig(**{**sizes, **lively, **changes})).eval()


def of_whole_pass(model: RasterTransformer, labels_B: Tensor, tokens_BL: Tensor) -> Tensor:
    """Logits (B, L, V) of all places at once, from the true tokens before each."""
    with torch.no_grad():
        logits_BLV: Tensor = model(labels_B, RasterFamily().inputs(model, tokenizer_for(model.config), tokens_BL))
    return logits_BLV


@pytest.mark.parametrize("block", BLOCKS)
def test_logits_see_the_tokens_before_and_no_other(block: str) -> None:
    model = raster(block=block)
    inputs_BMc = torch.randn(3, 8, 4, requires_grad=True)
    logits_BLV = model(LABELS, inputs_BMc)
    for place in range(9):
        (gradient_BMc,) = torch.autograd.grad(logits_BLV[0, place].square().sum(), inputs_BMc, retain_graph=True)
        assert (gradient_BMc[0].abs().sum(1) > 0).tolist() == [before < place for before in range(8)]
        assert (gradient_BMc[1:] == 0).all()


@pytest.mark.parametrize("settings", [{}, {"block": "modern"}, {"shared_adaln": True}])
@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_greedy_samples_are_the_likeliest_tokens_of_the_whole_pass(
    settings: dict[str, Any], native: str, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without the cache; guidance is the same at all places."""
    monkeypatch.setenv("VARSCALE_NATIVE", native)
    model = raster(**settings)
    tokenizer = tokenizer_for(model.config)
    options = SamplingOptions(guidance, top_k=1)
    (tokens_BL,) = sample_with(model, tokenizer, LABELS, options).tokens
    uncached = sample_with(model, tokenizer, LABELS, SamplingOptions(guidance, top_k=1, use_cache=False))
    assert torch.equal(uncached.tokens[0], tokens_BL)
    logits_BLV = of_whole_pass(model, LABELS, tokens_BL)
    if guidance:
        without_BLV = of_whole_pass(model, torch.full_like(LABELS, 5), tokens_BL)
        logits_BLV = (1 + guidance) * logits_BLV - guidance * without_BLV
    assert torch.equal(logits_BLV.argmax(-1), tokens_BL)
    assert len(tokens_BL.unique()) > 3  # they differ from place to place


def test_frequencies_of_samples_are_the_models_probabilities() -> None:
    """Four tokens of three codes: each of the 81 images about as often as the product of its tokens' probabilities."""
    model, draws = raster(patch_nums=(2,), vocab_size=3), 4000
    every_BL = torch.cartesian_prod(*[torch.arange(3)] * 4)
    labels_B = torch.zeros(81, dtype=torch.int64)
    logits_BLV = of_whole_pass(model, labels_B, every_BL).log_softmax(-1)
    expected_B = logits_BLV.gather(-1, every_BL.unsqueeze(-1)).squeeze(-1).sum(1).exp() * draws
    assert float(expected_B.sum()) == pytest.approx(draws, rel=1e-4)
    drawn = sample_with(model, tokenizer_for(model.config), torch.zeros(draws, dtype=torch.int64), SamplingOptions(0.0))
    counts_B = torch.bincount(drawn.tokens[0] @ torch.tensor([27, 9, 3, 1]), minlength=81)
    often_B = expected_B > 5
    chi_square = ((counts_B - expected_B).square() / expected_B)[often_B].sum()
    degrees = int(often_B.sum())
    assert degrees > 10
    assert float(chi_square) < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("settings", [{}, {"block": "modern"}, {"shared_adaln": True}, {"text_width": 8}])
def test_sampling_flops(settings: dict[str, Any], cache: bool, guidance: float) -> None:
    model = raster(**settings)
    told = torch.randn(2, 8) if "text_width" in settings else LABELS[:2]
    codes_21c = tokenizer_for(model.config).quantizer.codes(torch.zeros(2, 1, dtype=torch.int64), 0)

    def run() -> None:
        with torch.no_grad():
            predictor = token_predictor(model, told, guidance, use_cache=cache)
            for place in range(9):
                predictor.predict(codes_21c if place else None)

    assert counted(run) == 2 * model.config.sampling_flops(guidance=guidance > 0, cache=cache)


def test_executed_pairs_are_those_of_a_triangle() -> None:
    config = raster().config
    hidden = sum(other > own for own in range(9) for other in range(9))
    assert config.forward_flops() - config.executed_forward_flops() == 4 * 16 * 2 * hidden


def test_parameters_are_those_of_a_var_without_further_scales() -> None:
    """The paper's d16 for 256 px: no scales but the finest, so fewer places and levels, and one start position."""
    section = RasterSection()
    space = TokenSpace(patch_nums=(16,), vocab_size=4096, latent_channels=32, num_classes=1000)
    assert 310_283_520 - section.describe(space, 16).parameters() == 1024 * (680 - 256 + 10 - 1)
