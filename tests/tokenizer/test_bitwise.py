"""The bitwise quantizer, against brute force over all corners and plain formulas."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import architecture
from pydantic import ValidationError
from small_models import make_tokenizer
from tiny_training import sections
from torch.nn import functional as F

from varscale.tokenizer.bitwise import BitwiseQuantizer
from varscale.tokenizer.module import TokenizerModule
from varscale.tokenizer.storage import load_tokenizer, save_tokenizer

PATCH_NUMS = (1, 2, 3, 5)
BITS = 4


def quantizer(**changes: Any) -> BitwiseQuantizer:
    torch.manual_seed(0)
    return BitwiseQuantizer(architecture(PATCH_NUMS, 2**BITS, BITS, quantizer="bitwise", **changes))


def test_each_token_is_the_nearest_corner() -> None:
    """Algorithms 1 and 2 of VAR with the 2^d corners of each scale's cube as codes."""
    model = quantizer(entropy_weight=0.0)
    model.magnitude_K.data = torch.tensor([0.9, 0.6, 0.4, 0.2])
    features_BChw = torch.randn(6, BITS, 5, 5)
    corners_Vc = torch.tensor([corner[::-1] for corner in itertools.product([-1.0, 1.0], repeat=BITS)])
    residual, total, loss = features_BChw.clone(), torch.zeros_like(features_BChw), 0.0
    output, encoded = model(features_BChw), model.encode(features_BChw)
    for k, p in enumerate(PATCH_NUMS):
        codes_Vc = corners_Vc * model.magnitude_K[k].detach()
        assert torch.equal(model.codebook(k), codes_Vc)
        vectors = F.interpolate(residual, size=(p, p), mode="area").permute(0, 2, 3, 1).reshape(-1, BITS)
        tokens_BL = torch.cdist(vectors, codes_Vc).argmin(1).view(6, -1)
        assert torch.equal(tokens_BL, output.tokens[k])
        assert torch.equal(tokens_BL, encoded[k])
        codes = codes_Vc[tokens_BL].permute(0, 2, 1).reshape(6, BITS, p, p)
        codes = codes if p == 5 else F.interpolate(codes, size=(5, 5), mode="bicubic")
        contribution = 0.5 * codes + 0.5 * model.phi[model.phi_of_scale[k]](codes)
        residual, total = residual - contribution.detach(), total + contribution.detach()
        loss += 1.25 * float((total - features_BChw).square().mean()) / len(PATCH_NUMS)
    torch.testing.assert_close(output.features_hat_BChw, total, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode_features(encoded), total, atol=1e-5, rtol=0)
    assert float(output.loss.detach()) == pytest.approx(loss, rel=1e-5)


def test_codes_begin_on_the_unit_sphere() -> None:
    assert quantizer().codebook(2).norm(dim=1).tolist() == pytest.approx([1.0] * 2**BITS)


def test_magnitudes_of_the_data_are_the_best_for_its_signs() -> None:
    model, features_BChw = quantizer(), 3 * torch.randn(8, BITS, 5, 5)
    model.initialise_magnitudes(features_BChw)
    vectors = features_BChw.mean((2, 3))
    tried = torch.linspace(0.5, 2, 31) * model.magnitude_K[0].detach()
    errors = [float((vectors - vectors.sign() * magnitude).square().sum()) for magnitude in tried]
    assert errors.index(min(errors)) == 10  # the one that was found
    assert bool((model.magnitude_K > 0).all())


def test_the_penalty_wants_decided_and_balanced_bits() -> None:
    model = quantizer(entropy_weight=2.0)
    sure = torch.full((3, BITS), 50.0)
    assert model._penalty(sure, 0).tolist() == pytest.approx(0.0, abs=1e-5)  # decided, but always the same
    balanced = torch.cat((sure, -sure))
    assert model._penalty(balanced, 0).tolist() == pytest.approx(-2.0 * 0.6931472, rel=1e-4)
    doubtful = torch.zeros(6, BITS)
    assert model._penalty(doubtful, 0).tolist() == pytest.approx(0.0, abs=1e-5)


def test_the_penalty_reaches_the_features() -> None:
    """Without the commitment nothing else does; the straight-through gradient is the reconstruction's."""
    features_BChw = torch.randn(2, BITS, 5, 5, requires_grad=True)
    for weight in (0.1, 0.0):
        loss = quantizer(commitment_weight=0.0, entropy_weight=weight)(features_BChw).loss
        (gradient,) = torch.autograd.grad(loss, features_BChw, materialize_grads=True)
        assert bool((gradient != 0).all() if weight else (gradient == 0).all())


def test_a_training_fits_magnitudes_when_it_begins_to_quantize() -> None:
    described, training = sections(
        {"images": 32, "batch_size": 8, "warmup_images": 0, "quantize_after": 0.5, "restart_every_steps": 1},
        quantizer="bitwise",
    )
    module = TokenizerModule(described, training)
    before = module.tokenizer.quantizer.magnitude_K.detach().clone()
    assert torch.equal(before, torch.full((3,), 0.5))
    images_B3HW = torch.rand(8, 3, 8, 8) * 2 - 1
    module._initialise_codes(images_B3HW)
    vectors = module.tokenizer.features(images_B3HW).detach().mean((2, 3))
    fitted = module.tokenizer.quantizer.magnitude_K.detach()
    assert float(fitted[0]) == pytest.approx(float(vectors.abs().mean()), rel=1e-5)
    assert torch.equal(module.averaged.quantizer.magnitude_K, fitted)
    output = module.tokenizer(images_B3HW)
    module._keep_codes_alive(None, output.tokens, output.residuals)  # it has no codes that could be moved
    assert int(module.usage_V.sum()) == 0


def test_a_file_gives_the_tokenizer_back(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(PATCH_NUMS, 2**BITS, BITS, quantizer="bitwise")
    save_tokenizer(tmp_path / "tokenizer", tokenizer, "print-a")
    again = load_tokenizer(tmp_path / "tokenizer", "print-a")
    assert again.architecture == tokenizer.architecture
    images_B3HW = torch.rand(2, 3, 10, 10) * 2 - 1
    for ours, theirs in zip(tokenizer.encode(images_B3HW), again.encode(images_B3HW), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"vocab_size": 32}, r"vocab_size: 32, but with the quantizer bitwise latent_channels 4 .* it is 16 \(2\^4\)"),
        ({"vocab_size": 2**17, "latent_channels": 17}, "latent_channels: 17, but .* stored in 16 bits at most"),
        ({"quantizer": "codebook", "entropy_weight": 0.2}, "entropy_weight: only the quantizer bitwise"),
        ({"quantizer": "binary"}, "'codebook' or 'bitwise'"),
    ],
)
def test_settings_that_make_no_bits(changes: dict[str, Any], problem: str) -> None:
    settings = {"patch_nums": PATCH_NUMS, "vocab_size": 16, "latent_channels": 4, "quantizer": "bitwise"}
    with pytest.raises(ValidationError, match=problem):
        architecture(**(settings | changes))
