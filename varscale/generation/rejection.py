"""Rejection sampling: of several drawn images the one is kept that a classifier finds likeliest of its class.

Razavi et al. 2019 (arXiv 1906.00446); such rows of tables end in "-re". With M candidates, image i is one of the
images i·M … i·M + M - 1 that would be drawn without rejection of the same labels, each M times over, so it depends on
neither its batch nor where drawing began. Every image has as many candidates: each class keeps its share.

Letters in tensor names: b images kept of a batch, M candidates of each, C classes, H and W height and width.
"""

import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from varscale.config import DataSection
from varscale.errors import CheckpointError, ExperimentError
from varscale.evaluation.extractors import rings_classifier
from varscale.evaluation.plan import RINGS_CLASSIFIER, classifier_identity
from varscale.numerics.device import best_device
from varscale.store.layout import Store

_UNREADABLE = (
    *(AttributeError, EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError),
    *(pickle.PickleError, SafetensorError),
)
"""What torch raises for files that aren't what they should be."""


@dataclass(frozen=True)
class Classifier:
    """A network that tells the classes of images apart."""

    identity: str
    """Its name, and the hash of its weights or of what they follow from."""
    network: Callable[[Tensor], Tensor]
    """From uint8 (b, 3, H, W) to logits (b, C)."""


class Rejection:
    """The choice among candidates, and what it came to so far."""

    def __init__(self, classifier: Classifier, candidates: int) -> None:
        self.classifier, self.candidates = classifier, candidates
        self.probabilities: list[Tensor] = []
        """Of each batch, (b, 2): that of an image's own class, of the one that is kept and on average of all."""

    @property
    def chosen(self) -> int:
        """Images that were kept."""
        return sum(map(len, self.probabilities))

    def check(self, num_classes: int, image_size: int, labels: Tensor) -> None:
        """Try the classifier.

        Raises:
            ExperimentError: Its classes are others than the model's, or an image is to have no class.
            CheckpointError: It can't take such images.
        """
        if bool((labels == num_classes).any()):
            raise ExperimentError("rejection sampling: an image without class is likeliest of none; name classes")
        pixels_13ss = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=best_device())
        try:
            with torch.no_grad():
                logits = self.classifier.network(pixels_13ss)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-150:]
            shape = f"images of {image_size} × {image_size} pixels"
            raise CheckpointError(f"classifier {self.classifier.identity}: takes no {shape} ({reason})") from None
        classes = logits.shape[1] if isinstance(logits, Tensor) and logits.ndim == 2 else 0
        if classes != num_classes:
            raise ExperimentError(
                f"classifier {self.classifier.identity}: tells {classes} classes apart, and the model draws "
                f"{num_classes}; expected the model's classes in the order of its labels"
            )

    @torch.no_grad()
    def choose(self, pixels_bM3HW: Tensor, labels_b: Tensor) -> Tensor:
        """Rows to keep, int64 (b,): of the M images of each label, which follow each other, the likeliest.

        Args:
            pixels_bM3HW: uint8 (b · M, 3, H, W).
            labels_b: int64.
        """
        labels_bM = labels_b.repeat_interleave(self.candidates)
        logits_bMC = self.classifier.network(pixels_bM3HW).float()
        # logarithms: where the classifier is sure, probabilities are all 1
        logs_b_M = logits_bMC.log_softmax(1).gather(1, labels_bM[:, None]).view(-1, self.candidates)
        best_b = logs_b_M.argmax(1)
        self.probabilities.append(torch.stack([logs_b_M.max(1).values.exp(), logs_b_M.exp().mean(1)], 1).cpu())
        return torch.arange(len(labels_b), device=best_b.device) * self.candidates + best_b

    @property
    def figures(self) -> dict[str, float]:
        """The keep rate, and the mean probability of images' own classes among those kept and among all drawn."""
        kept, of_all = torch.cat(self.probabilities).double().mean(0).tolist()
        return {"keep_rate": 1 / self.candidates, "class_probability": kept, "class_probability_of_all": of_all}


def open_classifier(
    name: str | None, weights: str | None, data: DataSection | None = None, store: Store | None = None, *, place: str
) -> Classifier:
    """A classifier: torchvision's by its name with weights from a file, a file's in TorchScript, or the rings' own.

    torchvision's get images as its own weights of that name want them: scaled, cropped and normalised. A model in
    TorchScript gets float32 (b, 3, H, W) in [0, 1] and gives logits (b, C).

    Args:
        name: A model of torchvision's or `rings-classifier`; None: the rings' own, or what the file holds.
        weights: The file.
        data: What the model was trained on, where that is known.
        store: Where the classifier of rings is kept.
        place: The option or key, for messages.

    Raises:
        ExperimentError: There is no such classifier.
        CheckpointError: The file can't be read, or is of another kind.
    """
    identity = classifier_identity(name, weights, data, place)
    if weights is None:
        assert data is not None
        rings = rings_classifier(data, identity, store or Store())
        return Classifier(identity, lambda images_b3HW: rings(images_b3HW)[1])
    try:
        network = _scripted(weights) if name is None else _torchvision(name, Path(weights), place)
    except _UNREADABLE as error:
        if isinstance(error, ExperimentError):
            raise
        reason = " ".join(str(error).split())[:150]
        kind = "a model in TorchScript" if name is None else f"weights of torchvision's {name}"
        raise CheckpointError(f"{place}: {weights}: not {kind} ({reason})") from None
    return Classifier(identity, network)


def _scripted(weights: str) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # exported programs are no substitute: loading them unpickles
        network = torch.jit.load(weights, map_location=best_device()).eval()
    return lambda images_b3HW: network(images_b3HW.float() / 255)


def _torchvision(name: str, weights: Path, place: str) -> Callable[[Tensor], Tensor]:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ExperimentError(
            f"{place}: torchvision has no classifier {name}; expected resnet101, say, or {RINGS_CLASSIFIER}"
        )
    state = _state(weights)
    with torch.device("meta"):  # the output layer is the last
        classes = len(state[next(reversed(models.get_model(name, weights=None).state_dict()))])
    network = models.get_model(name, weights=None, num_classes=classes)
    network.load_state_dict(state)
    network.to(best_device(), memory_format=torch.channels_last).eval()
    prepared = models.get_model_weights(name).DEFAULT.transforms()
    return lambda images_b3HW: network(prepared(images_b3HW))


def _state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, also where they lie one level deep or were written by DistributedDataParallel."""
    stored: Any = (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    )
    stored = next((stored[name] for name in ("state_dict", "model") if isinstance(stored.get(name), dict)), stored)
    return {name.removeprefix("module."): tensor for name, tensor in stored.items()}
