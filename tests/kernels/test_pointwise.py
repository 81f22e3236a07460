from collections.abc import Callable

import pytest
import torch
from requirements import require_program
from torch import Tensor
from torch.nn import functional as F

from varscale.kernels import pointwise

Functions = tuple[Callable[..., Tensor], Callable[..., Tensor]]

CASES: dict[str, Functions] = {
    "modulate": (
        pointwise.modulate,
        lambda x, scale, shift: F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift,
    ),
    "bias_gelu": (pointwise.bias_gelu, lambda x, bias: F.gelu(x + bias, approximate="tanh")),
    "gated_add": (pointwise.gated_add, lambda x, branch, bias, gate: x + gate * (branch + bias)),
}


def arguments(name: str, channels: int) -> list[Tensor]:
    torch.manual_seed(0)
    rows = torch.randn(2, 3, 5, channels) * 3
    # as in a block: one row of a (B, 6, C) tensor for each sample
    scale, shift = torch.randn(3, 6, channels).split(1, dim=1)[:2]
    return {
        "modulate": [rows[0], scale, shift],
        "bias_gelu": [rows[0], torch.randn(channels)],
        "gated_add": [rows[0], rows[1], torch.randn(channels), scale],
    }[name]


@pytest.fixture(autouse=True)
def _compiler() -> None:
    require_program("c++")
    assert pointwise.usable(torch.zeros(1))


@pytest.mark.parametrize("channels", [1, 7, 16, 48])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_plain_operators(name: str, channels: int) -> None:
    ours, plain = CASES[name]
    inputs = [tensor.requires_grad_() for tensor in arguments(name, channels)]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, exact = ours(*inputs), plain(*exact_inputs)
    torch.testing.assert_close(out.double(), exact, atol=2e-5, rtol=1e-5)
    weights = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weights).sum(), inputs)
    exact_gradients = torch.autograd.grad((exact * weights).sum(), exact_inputs)
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_same_bits_on_any_number_of_threads_and_any_layout(name: str) -> None:
    function, before = CASES[name][0], torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        inputs = [tensor.requires_grad_() for tensor in arguments(name, 24)]
        strided = [torch.stack((tensor, tensor), -1)[..., 0] for tensor in inputs] if threads == 2 else inputs
        out = function(*strided)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    torch.set_num_threads(before)
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_gelu_far_out() -> None:
    x = torch.tensor([[[-100.0, -10.0, -5.0, 0.0, 10.0, 100.0]]])
    out = pointwise.bias_gelu(x, torch.zeros(6))
    torch.testing.assert_close(out, F.gelu(x, approximate="tanh"), atol=1e-6, rtol=1e-6)


def test_left_to_the_library_elsewhere() -> None:
    assert not pointwise.usable(torch.zeros(1, dtype=torch.bfloat16))
    assert not pointwise.usable(torch.zeros(1), torch.zeros(1, device="meta"))
