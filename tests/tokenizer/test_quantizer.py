from fractions import Fraction

import pytest
import torch
from architectures import architecture
from torch import Tensor
from torch.nn import functional as F

from varscale.tokenizer.quantizer import MultiScaleQuantizer, phi_of_scales

PATCH_NUMS = (1, 2, 3, 5)


@pytest.fixture
def quantizer() -> MultiScaleQuantizer:
    torch.manual_seed(0)
    model = MultiScaleQuantizer(architecture(PATCH_NUMS, 32, 4))
    model.initialise_codes(torch.randn(200, 4))
    return model


def written_from_the_paper(
    model: MultiScaleQuantizer, features: Tensor, beta: float = 0.25, ratio: float = 0.5
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Algorithms 1 and 2 with plain interpolation and distances: tokens, inputs, features and loss."""
    side = features.shape[-1]
    residual, total = features.clone(), torch.zeros_like(features)
    tokens, inputs, loss = [], [], torch.zeros(())
    for k, p in enumerate(model.patch_nums):
        small = F.interpolate(residual, size=(p, p), mode="area")
        vectors = small.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
        nearest = torch.cdist(vectors, model.codebook_Vc).argmin(1).view(len(features), p * p)
        codes = model.codebook_Vc[nearest].permute(0, 2, 1).reshape(len(features), -1, p, p)
        if p != side:
            codes = F.interpolate(codes, size=(side, side), mode="bicubic")
        convolution = model.phi[model.phi_of_scale[k]]
        contribution = (1 - ratio) * codes + ratio * convolution(codes)
        residual, total = residual - contribution, total + contribution
        loss = loss + (1 + beta) * (total - features).square().mean() / len(model.patch_nums)
        tokens.append(nearest)
        if k + 1 < len(model.patch_nums):
            following = model.patch_nums[k + 1]
            inputs.append(F.interpolate(total, size=(following, following), mode="area").flatten(2).transpose(1, 2))
    return tokens, torch.cat(inputs, 1), total, loss


def test_follows_the_paper(quantizer: MultiScaleQuantizer) -> None:
    features = torch.randn(6, 4, 5, 5)
    with torch.no_grad():
        tokens, inputs, total, loss = written_from_the_paper(quantizer, features)
        output = quantizer(features)
    for ours, encoded, theirs in zip(output.tokens, quantizer.encode(features), tokens, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(encoded, theirs)
    torch.testing.assert_close(output.loss, loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output.features_hat_BChw, total, atol=1e-5, rtol=0)
    torch.testing.assert_close(quantizer.decode_features(tokens), total, atol=1e-5, rtol=0)
    torch.testing.assert_close(quantizer.next_scale_inputs(tokens), inputs, atol=1e-5, rtol=0)


def test_accumulating_scale_after_scale_gives_the_same_inputs(quantizer: MultiScaleQuantizer) -> None:
    tokens = quantizer.encode(torch.randn(3, 4, 5, 5))
    total, inputs = None, []
    for k, tokens_of_scale in enumerate(tokens):
        total, following = quantizer.accumulate(total, tokens_of_scale, k)
        if following is not None:
            inputs.append(following)
    torch.testing.assert_close(torch.cat(inputs, 1), quantizer.next_scale_inputs(tokens), atol=1e-6, rtol=0)
    torch.testing.assert_close(total, quantizer.decode_features(tokens), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_was_looked_up_is_what_codes_restart_with(
    quantizer: MultiScaleQuantizer, layout: torch.memory_format
) -> None:
    """The tokens of the vectors that are kept are those of the output, at the finest scale, too."""
    output = quantizer(torch.randn(6, 4, 5, 5).contiguous(memory_format=layout))
    for tokens_BL, vectors_Nc in zip(output.tokens, output.residuals, strict=True):
        distances_NV = torch.cdist(vectors_Nc, quantizer.codebook_Vc.detach())
        assert torch.equal(distances_NV.argmin(1), tokens_BL.flatten())


def test_gradients(quantizer: MultiScaleQuantizer) -> None:
    features = torch.randn(2, 4, 5, 5, requires_grad=True)
    weights = torch.randn(2, 4, 5, 5)
    output = quantizer(features)
    (gradient,) = torch.autograd.grad((output.features_hat_BChw * weights).sum(), features, retain_graph=True)
    torch.testing.assert_close(gradient, weights)  # straight through
    output.loss.backward()
    # β·mse alone reaches the features: d/df of β·(f - f_hat)²/n, averaged over scales
    sums, total = torch.zeros(2, 4, 5, 5), None
    for k, tokens in enumerate(output.tokens):
        total, _ = quantizer.accumulate(total, tokens, k)
        sums += total
    count = features.numel()
    expected = 0.25 * 2 * (features.detach() - sums / len(PATCH_NUMS)) / count
    assert features.grad is not None
    torch.testing.assert_close(features.grad, expected, atol=1e-6, rtol=0)
    assert all(parameter.grad is not None for parameter in quantizer.parameters())


def test_lookups_stay_float32_under_autocast(quantizer: MultiScaleQuantizer) -> None:
    features = torch.randn(8, 4, 5, 5)
    plain = quantizer(features)
    with torch.autocast("cpu", torch.bfloat16):
        cast = quantizer(features)
        inputs = quantizer.next_scale_inputs(plain.tokens)
    assert all(torch.equal(a, b) for a, b in zip(plain.tokens, cast.tokens, strict=True))
    assert torch.equal(plain.features_hat_BChw, cast.features_hat_BChw)
    assert torch.equal(inputs, quantizer.next_scale_inputs(plain.tokens))


@pytest.mark.parametrize("scales", [1, 2, 6, 10])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_each_scale_takes_the_phi_with_the_nearest_tick(scales: int, count: int) -> None:
    margin = Fraction(1, 3 * count) if count == 4 else Fraction(1, 2 * count)
    ticks = [margin + (1 - 2 * margin) * Fraction(i, max(count - 1, 1)) for i in range(count)]
    if count == 1:
        ticks = [margin]
    for k, chosen in enumerate(phi_of_scales(scales, count)):
        place = Fraction(k, max(scales - 1, 1))
        # a tie may go either way
        assert abs(ticks[chosen] - place) == min(abs(tick - place) for tick in ticks)


def test_phi_convolutions_that_no_scale_uses_are_frozen() -> None:
    quantizer = MultiScaleQuantizer(architecture((2, 4), 8, 3, phi_count=4))
    assert [phi.weight.requires_grad for phi in quantizer.phi] == [True, False, False, True]


def test_one_scale() -> None:
    quantizer = MultiScaleQuantizer(architecture((3,), 8, 2))
    tokens = quantizer.encode(torch.randn(2, 2, 3, 3))
    assert [tuple(t.shape) for t in tokens] == [(2, 9)]
    assert quantizer.next_scale_inputs(tokens).shape == (2, 0, 2)
    assert quantizer.accumulate(None, tokens[0], 0)[1] is None


def test_codes_are_taken_from_the_data() -> None:
    quantizer = MultiScaleQuantizer(architecture(PATCH_NUMS, 32, 4))
    vectors = torch.randn(100, 4)
    quantizer.initialise_codes(vectors)
    assert {tuple(code) for code in quantizer.codebook_Vc.tolist()} <= {tuple(vector) for vector in vectors.tolist()}
    assert len(quantizer.codebook_Vc.unique(dim=0)) == 32
    before = quantizer.codebook_Vc.detach().clone()
    quantizer.initialise_codes(vectors)
    assert torch.equal(before, quantizer.codebook_Vc)
    quantizer.initialise_codes(vectors[:5])
    assert len(quantizer.codebook_Vc.unique(dim=0)) == 32  # repeated with noise
    with pytest.raises(ValueError, match="at least 1, 4"):
        quantizer.initialise_codes(torch.randn(5, 3))


def test_only_dead_codes_restart(quantizer: MultiScaleQuantizer) -> None:
    before = quantizer.codebook_Vc.detach().clone()
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[3, 7, 20]] = True
    moved = quantizer.restart_codes(dead, torch.full((2, 4), 9.0))
    assert moved.nonzero().flatten().tolist() == [3, 7]
    assert (quantizer.codebook_Vc[moved] == 9).all()
    assert torch.equal(quantizer.codebook_Vc[~moved], before[~moved])


@pytest.mark.parametrize(
    ("patch_nums", "message"),
    [
        ((), r"must grow strictly, got \[\]"),
        ((0, 2), "greater than or equal to 1"),
        ((1, 3, 3), r"must grow strictly, got \[1, 3, 3\]"),
        ((1, 4, 2), r"must grow strictly, got \[1, 4, 2\]"),
    ],
)
def test_bad_patch_nums_are_named(patch_nums: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiScaleQuantizer(architecture(patch_nums, 8, 2))


def test_bad_sizes_are_named(quantizer: MultiScaleQuantizer) -> None:
    with pytest.raises(ValueError, match=r"vocab_size\s+Input should be greater than or equal to 2"):
        MultiScaleQuantizer(architecture(PATCH_NUMS, 0, 2))
    with pytest.raises(ValueError, match=r"need \(B, 4, 5, 5\)"):
        quantizer.encode(torch.randn(1, 4, 6, 6))
