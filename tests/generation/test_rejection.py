"""Rejection sampling: which images are kept, that batches and interruptions change nothing, and any classifier."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_models import make_tokenizer, make_var
from tiny_training import Killed, ignore, kill_at
from torch import Tensor, nn
from torchvision import models

from varscale.errors import CheckpointError, ExperimentError
from varscale.families.base import SamplingOptions
from varscale.generation.bulk import draw_collection, drawn_batches, labels_in_turn
from varscale.generation.collection import Collection
from varscale.generation.from_files import Drawable
from varscale.generation.rejection import Classifier, Rejection, open_classifier

OPTIONS = SamplingOptions(guidance=2.0, seed=3)
LABELS_N = labels_in_turn(range(5), 13)
OF = 3


@pytest.fixture(scope="module")
def drawable() -> Drawable:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(vocab_size=16, base_channels=8, norm_groups=4)
    model = make_var(vocab_size=16, adaln_gamma_init=1.0, init_std=0.3, head_init=1.0)
    return Drawable(Path("model"), model, tokenizer, "model", "tokenizer")


def brightness(images_b3HW: Tensor) -> Tensor:
    """Logits by which each class likes other channels bright."""
    likes_3C = torch.tensor([[1.0, 0, 0, 1, -1], [0, 1, 0, 1, -1], [0, 0, 1, 1, 2]])
    return images_b3HW.float().mean((2, 3)) @ likes_3C / 50


def rejection() -> Rejection:
    return Rejection(Classifier("brightness:0", brightness), OF)


def drawn(drawable: Drawable, labels_N: Tensor, batch_size: int, **how: Any) -> Tensor:
    return torch.cat(
        list(drawn_batches(drawable.model, drawable.tokenizer, labels_N, OPTIONS, batch_size=batch_size, **how))
    )


def test_of_each_images_candidates_the_likeliest_is_kept(drawable: Drawable) -> None:
    """By a plain loop over what is drawn without rejection; whatever the batch, and from wherever drawing goes on."""
    every = drawn(drawable, LABELS_N.repeat_interleave(OF), 64)
    expected, kept, of_all = [], [], []
    for i, label in enumerate(LABELS_N.tolist()):
        candidates = every[OF * i : OF * (i + 1)]
        probabilities = brightness(candidates).softmax(1)[:, label].tolist()
        expected.append(candidates[int(np.argmax(probabilities))])
        kept.append(max(probabilities))
        of_all += probabilities
    choice = rejection()
    images = drawn(drawable, LABELS_N, 64, rejection=choice)
    assert torch.equal(images, torch.stack(expected))
    assert choice.figures == pytest.approx(
        {"keep_rate": 1 / 3, "class_probability": np.mean(kept), "class_probability_of_all": np.mean(of_all)}
    )
    assert np.mean(kept) > np.mean(of_all)
    for batch_size, first in ((2, 0), (7, 4)):
        other = drawn(drawable, LABELS_N, batch_size, first=first, rejection=rejection())
        assert (other.int() - images[first:].int()).abs().max() <= 1  # rounding


def test_interrupted_and_resumed_is_the_same(drawable: Drawable, tmp_path: Path) -> None:
    def draw_into(name: str, progress: Any = ignore, choice: Rejection | None = None) -> None:
        collection = Collection.at(str(tmp_path / name))
        draw_collection(drawable, LABELS_N, OPTIONS, collection, progress, batch_size=9, rejection=choice)

    draw_into("whole.npz", choice=rejection())
    with pytest.raises(Killed):
        draw_into("resumed.npz", kill_at(6), rejection())
    with pytest.raises(ExperimentError, match=r"was begun with .* not"):
        draw_into("resumed.npz")
    draw_into("resumed.npz", choice=rejection())
    whole, resumed = (np.load(tmp_path / f"{name}.npz") for name in ("whole", "resumed"))
    assert np.array_equal(whole["arr_0"], resumed["arr_0"])
    assert whole["arr_1"].tolist() == LABELS_N.tolist()


@pytest.mark.parametrize("stored", ["nested.pth", "plain.safetensors"])
def test_a_model_of_torchvisions_with_weights_from_a_file(stored: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = models.shufflenet_v2_x0_5(weights=None, num_classes=5).eval()
    state, path = network.state_dict(), tmp_path / stored
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        nested = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
        torch.save(nested if path.stem == "nested" else state, path)
    classifier = open_classifier("shufflenet_v2_x0_5", str(path), place="--classifier")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    prepared = models.ShuffleNet_V2_X0_5_Weights.DEFAULT.transforms()
    with torch.no_grad():
        assert torch.allclose(classifier.network(pixels), network(prepared(pixels)), atol=1e-4)
    assert classifier.identity.startswith("shufflenet_v2_x0_5:")


class _Whole(nn.Module):
    def forward(self, images_b3HW: Tensor) -> Tensor:
        return images_b3HW.mean((2, 3))


def test_a_whole_model_of_a_file_and_other_classes(tmp_path: Path) -> None:
    path = tmp_path / "whole.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(_Whole()), path)
    choice = Rejection(open_classifier(None, str(path), place="--classifier"), 4)
    assert torch.allclose(choice.classifier.network(torch.full((1, 3, 4, 4), 51, dtype=torch.uint8)), torch.tensor(0.2))
    choice.check(3, 8, torch.tensor([0, 2]))
    with pytest.raises(ExperimentError, match=r"whole:\w+: tells 3 classes apart, and the model draws 5; expected"):
        choice.check(5, 8, torch.tensor([0]))
    with pytest.raises(CheckpointError, match=r"classifier large:0: takes no images of 2 × 2 pixels \("):
        Rejection(Classifier("large:0", lambda images_b3HW: nn.Conv2d(3, 3, 5)(images_b3HW.float())), 2).check(
            3, 2, torch.tensor([0])
        )
    with pytest.raises(ExperimentError, match="an image without class"):
        choice.check(3, 8, torch.tensor([0, 3]))


def test_what_is_no_classifier_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 torn")
    torch.save({"fc.weight": torch.zeros(5, 3)}, tmp_path / "other.pth")
    for name, weights, said in (
        ("resnet1000", "other.pth", "torchvision has no classifier resnet1000; expected resnet101"),
        ("fcn_resnet50", "other.pth", "torchvision has no classifier fcn_resnet50"),
        ("resnet18", "other.pth", r"other\.pth: not weights of torchvision's resnet18"),
        ("resnet18", "torn.pth", r"torn\.pth: not all of the file; expected a file of weights"),
        (None, "other.pth", r"other\.pth: not a model in TorchScript"),
        ("resnet18", "absent.pth", r"absent\.pth: No such file"),
        ("resnet18", None, "no weights; expected resnet101"),
        (None, None, "no classifier is named, and these images have none of their own"),
        ("rings-classifier", None, "rings-classifier takes no weights, and images of a rings experiment alone"),
    ):
        with pytest.raises((ExperimentError, CheckpointError), match=said) as caught:
            open_classifier(name, weights and str(tmp_path / weights), place="--classifier")
        assert len(str(caught.value).splitlines()) == 1
