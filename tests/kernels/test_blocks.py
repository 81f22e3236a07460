import math

import pytest
import torch
from requirements import require_program
from torch import Tensor
from torch.nn import functional as F

from varscale.families.shared.attention import block_causal_mask
from varscale.kernels import blocks
from varscale.kernels.attend import KeyValueCache

PATCH_NUMS, ENDS, LOG_LIMIT = (1, 2, 3), (1, 5, 14), math.log(100)


@pytest.fixture(autouse=True)
def _compiler() -> None:
    require_program("c++")
    assert blocks.fits(24, 96, 3)


def arguments(width: int, hidden: int, heads: int) -> list[Tensor]:
    """The residual stream, the modulation of two blocks, and the ten weights of each."""
    torch.manual_seed(0)
    weights = []
    for _ in range(2):
        shapes = [(width, width), (hidden, width), (width, hidden)]
        weights += [torch.randn(3 * width, width) / width**0.5, torch.randn(width), torch.randn(width)]
        weights += [torch.linspace(1.0, 5.0, heads)]  # the last is beyond the limit
        weights += [
            part for out, inputs in shapes for part in (torch.randn(out, inputs) / inputs**0.5, torch.randn(out))
        ]
    return [torch.randn(3, ENDS[-1], width), torch.randn(2, 3, 6, width), *weights]


def plain(x: Tensor, modulation: Tensor, *weights: Tensor, normalised: bool = True) -> Tensor:
    for index in range(2):
        x = plain_block(x, modulation[index], *weights[10 * index : 10 * index + 10], normalised=normalised)
    return x


def plain_block(x: Tensor, modulation: Tensor, *weights: Tensor, normalised: bool) -> Tensor:
    joint_weight, query_bias, value_bias, log_scale, *layers = weights
    gates, scales, shifts = modulation.split(2, dim=1)
    mask = block_causal_mask(PATCH_NUMS, torch.device("cpu")).to(x.dtype)
    normal = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scales[:, :1]) + shifts[:, :1]
    bias = torch.cat((query_bias, torch.zeros_like(query_bias), value_bias))
    joint = F.linear(normal, joint_weight, bias).unflatten(2, (3, len(log_scale), -1)).permute(2, 0, 3, 1, 4)
    queries, keys = (F.normalize(each, dim=-1) if normalised else each for each in joint[:2])
    factors = log_scale.clamp_max(LOG_LIMIT).exp()[:, None, None]
    attention = torch.softmax(factors * queries @ keys.transpose(2, 3) + mask, dim=-1) @ joint[2]
    x = x + gates[:, :1] * F.linear(attention.transpose(1, 2).flatten(2), *layers[:2])
    normal = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scales[:, 1:]) + shifts[:, 1:]
    hidden = F.gelu(F.linear(normal, *layers[2:4]), approximate="tanh")
    return x + gates[:, 1:] * F.linear(hidden, *layers[4:])


def ours(x: Tensor, modulation: Tensor, *weights: Tensor, normalised: bool = True) -> Tensor:
    return blocks.native_blocks(x, modulation, LOG_LIMIT, ENDS, weights, normalised=normalised)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("width", "hidden", "heads"), [(8, 16, 1), (24, 96, 3), (40, 80, 5), (32, 128, 2)])
def test_equal_to_plain_operators(width: int, hidden: int, heads: int, normalised: bool) -> None:
    x, modulation, *weights = arguments(width, hidden, heads)
    if not normalised:
        for log_scale in weights[3::10]:
            log_scale.sub_(math.log(100))  # of products of lengths near √d
    inputs = [tensor.requires_grad_() for tensor in (x, modulation, *weights)]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, exact = ours(*inputs, normalised=normalised), plain(*exact_inputs, normalised=normalised)
    torch.testing.assert_close(out.double(), exact, atol=1e-4, rtol=1e-4)
    with torch.no_grad():  # keeps nothing for a backward pass
        assert torch.equal(ours(*inputs, normalised=normalised), out)
    weights = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weights).sum(), inputs)
    exact_gradients = torch.autograd.grad((exact * weights).sum(), exact_inputs)
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        assert (gradient - expected).abs().max() < 1e-3 * expected.abs().max().clamp_min(1e-2)


@pytest.mark.parametrize(("width", "hidden", "heads"), [(8, 16, 1), (24, 96, 3)])
@pytest.mark.parametrize("rows_at_once", [1, 9, 1000])
def test_scale_after_scale_with_a_cache(
    width: int, hidden: int, heads: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "ROWS_AT_ONCE", rows_at_once)
    x, modulation, *weights = arguments(width, hidden, heads)
    exact = plain(x.double(), modulation.double(), *(weight.double() for weight in weights))
    caches = [KeyValueCache(ENDS[-1]) for _ in range(2)]
    begin = 0
    with torch.no_grad():
        whole = ours(x, modulation, *weights)
        for end in ENDS:
            out = blocks.native_blocks(x[:, begin:end], modulation, LOG_LIMIT, [end - begin], weights, caches)
            torch.testing.assert_close(out.double(), exact[:, begin:end], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(out, whole[:, begin:end], atol=1e-5, rtol=1e-5)
            begin = end
    assert [cache.length for cache in caches] == [ENDS[-1]] * 2


def test_a_sample_is_the_same_in_any_batch() -> None:
    """To the bit: what sampling in bulk counts on."""
    x, modulation, *weights = arguments(24, 96, 3)
    with torch.no_grad():
        whole = ours(x.repeat(40, 1, 1), modulation.repeat(1, 40, 1, 1), *weights)
        for sample in range(3):
            alone = ours(x[sample : sample + 1], modulation[:, sample : sample + 1], *weights)
            assert all(torch.equal(each, alone[0]) for each in whole[sample::3])


@pytest.mark.parametrize(("width", "hidden", "heads"), [(24, 96, 3), (32, 128, 2)])
def test_the_same_bits_on_any_number_of_threads(width: int, hidden: int, heads: int) -> None:
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        inputs = [tensor.requires_grad_() for tensor in arguments(width, hidden, heads)]
        out = ours(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    torch.set_num_threads(before)
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_left_to_the_library_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not blocks.fits(20, 80, 5)  # no whole vectors
    assert not blocks.fits(256, 1024, 4)
    monkeypatch.setenv("VARSCALE_NATIVE", "0")
    assert not blocks.fits(24, 96, 3)
