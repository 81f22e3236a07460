import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from varscale.kernels import linear as kernel
from varscale.kernels.linear import Linear, linear


@pytest.fixture(autouse=True)
def _by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on processors where it gains nothing."""
    monkeypatch.setattr(kernel, "_halves_vectors", lambda: True)


@pytest.mark.parametrize("shape", [(5,), (2, 7), (3, 2, 4), (0,), (2, 0)])
@pytest.mark.parametrize("biased", [True, False])
def test_equals_the_definition(shape: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, 12), torch.randn(20, 12), *([torch.randn(20)] if biased else [])]
    weights, results = torch.randn(*shape, 20), []
    for dtype, function in ((torch.float64, F.linear), (torch.float32, linear)):
        given = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        out: Tensor = function(*given)
        gradients = torch.autograd.grad((out * weights.to(dtype)).sum(), given)
        with torch.no_grad():
            assert torch.equal(function(*given), out)
        results.append([out, *gradients])
    for exact, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-5)


def test_views_are_read_as_they_are() -> None:
    """Transposed, every other, and expanded tensors: none of them may be taken for contiguous memory."""
    x, weight = torch.randn(6, 4, 10).transpose(0, 1)[:, ::2, :8], torch.randn(8, 5).T
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    expanded = torch.randn(1, 8).expand(3, 8)
    torch.testing.assert_close(linear(expanded, weight), F.linear(expanded, weight))
    summed = torch.randn(3, 8, requires_grad=True)
    linear(summed, weight).sum().backward()  # its gradient is one number, expanded
    assert summed.grad is not None
    torch.testing.assert_close(summed.grad, weight.sum(0).expand(3, 8))


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    layer, x = Linear(4, 3), torch.randn(2, 4)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.full((3,), 2.0))


def test_counts_flops() -> None:
    x, layer = torch.randn(2, 5, 4, requires_grad=True), Linear(4, 3)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * 4 * 3


def test_leaves_other_precisions_to_the_library() -> None:
    layer, x = Linear(4, 3), torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer.double()(x.double()), F.linear(x.double(), layer.weight, layer.bias))
