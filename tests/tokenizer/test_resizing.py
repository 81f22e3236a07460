import pytest
import torch
from torch.nn import functional as F

from varscale.tokenizer import resizing


@pytest.mark.parametrize(("small", "large"), [(1, 8), (3, 8), (6, 8), (5, 16), (13, 16), (24, 32), (4, 4)])
def test_equals_interpolate(small: int, large: int) -> None:
    few, many = torch.randn(2, 3, small, small), torch.randn(2, 3, large, large)
    up = F.interpolate(few, size=(large, large), mode="bicubic") if small != large else few
    down = F.interpolate(many, size=(small, small), mode="area")
    torch.testing.assert_close(resizing.resize(few, large, "bicubic"), up, atol=2e-6, rtol=0)
    torch.testing.assert_close(resizing.resize(many, small, "area"), down, atol=2e-6, rtol=0)


def test_gradient_equals_that_of_interpolate() -> None:
    maps = torch.randn(2, 3, 5, 5, dtype=torch.float32, requires_grad=True)
    weights = torch.randn(2, 3, 8, 8)
    (ours,) = torch.autograd.grad((resizing.resize(maps, 8, "bicubic") * weights).sum(), maps)
    (theirs,) = torch.autograd.grad((F.interpolate(maps, size=(8, 8), mode="bicubic") * weights).sum(), maps)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_matrices_made_in_inference_mode_serve_training_later() -> None:
    with torch.inference_mode():
        resizing.resize(torch.randn(1, 1, 7, 7), 9, "bicubic")
    maps = torch.randn(1, 1, 7, 7, requires_grad=True)
    resizing.resize(maps, 9, "bicubic").sum().backward()
    assert maps.grad is not None


def test_large_maps_take_the_library_path() -> None:
    few = torch.randn(1, 1, 40, 40)
    assert resizing.LARGEST_RESIZING_MATRIX < 40**2 * 64**2
    expected = F.interpolate(few, size=(64, 64), mode="bicubic")
    assert torch.equal(resizing.resize(few, 64, "bicubic"), expected)
