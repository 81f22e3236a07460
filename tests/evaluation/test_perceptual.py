"""LPIPS with weights from a file against torchmetrics' own arrangement of the same backbone."""

from pathlib import Path

import pytest
import torch
from torch import nn

from varscale.evaluation.perceptual import load_lpips


@pytest.fixture(scope="module")
def features() -> nn.Sequential:
    """The layers of torchvision's VGG-16 before its (large, unused) classifier, with random weights."""
    from torchvision.models import vgg16  # varscale, imported above, repairs torchvision on some machines

    with torch.device("meta"):
        model: nn.Sequential = vgg16(weights=None).features
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.03)
    return model.eval()


def test_equals_the_definition(features: nn.Sequential, tmp_path: Path) -> None:
    """Zhang et al. 2018, equation 1, computed from torchvision's own layers and torchmetrics' linear weights."""
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    torch.save(state, tmp_path / "vgg16.pth")
    lpips = load_lpips(tmp_path / "vgg16.pth")
    torch.manual_seed(4)
    first_B3HW, second_B3HW = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)

    expected = torch.zeros(2)
    x, y = (first_B3HW - shift) / scale, (second_B3HW - shift) / scale
    weights = [lin.get_parameter("model.1.weight") for lin in lpips.get_submodule("lins").children()]
    layers_done = 0
    for number, layer in enumerate(features):
        x, y = layer(x), layer(y)
        if number in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
            x_unit, y_unit = (v / (v.square().sum(1, keepdim=True) + 1e-8).sqrt() for v in (x, y))
            distance = (x_unit - y_unit).square() * weights[layers_done].view(1, -1, 1, 1)
            expected += distance.sum(1).mean((1, 2))
            layers_done += 1
    assert torch.allclose(lpips(first_B3HW, second_B3HW).flatten(), expected, rtol=1e-4)
    assert float(lpips(first_B3HW, first_B3HW).abs().max()) == 0
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    names = ("absent.pth", "text.pth", "empty.pth", "foreign.pth", "list.pth", "torn.safetensors")
    absent, text, empty, foreign, listed, torn = (tmp_path / name for name in names)
    text.write_text("not a state dict")
    torn.write_text("of another kind, by its name")
    empty.touch()
    torch.save({"weight": torch.zeros(2)}, foreign)
    torch.save([1, 2], listed)
    for path in (absent, text, empty, foreign, listed, torn):
        with pytest.raises(ValueError, match=f"{path.name}: not torchvision's VGG-16 weights"):
            load_lpips(path)
