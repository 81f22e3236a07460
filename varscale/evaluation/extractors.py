"""What makes features of images: torch-fidelity's networks, and for rings a small classifier of our own.

Letters: N images, b images of a batch, D features, C classes, s side of an image in pixels.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from varscale.config import DataSection
from varscale.data.sources.of_experiment import training_source
from varscale.errors import CheckpointError, DataError
from varscale.evaluation.pieces import Tensors, joined
from varscale.evaluation.plan import INCEPTION, RINGS_CLASSIFIER, RINGS_TRAINING, FidelityPlan, where_from
from varscale.numerics.device import best_device
from varscale.store.layout import RunKey, Store
from varscale.store.weights import fill, load_tensors, save_tensors


@dataclass(frozen=True)
class FeatureSet:
    """Features of images, and what made them."""

    features_ND: Tensor
    """float32."""
    extractor: str
    """The extractor's identity."""
    image_size: int
    """Side of the images, pixels."""
    logits_NC: Tensor | None = None
    """What the extractor's classifier says, for Inception Score; None where it has none."""


@dataclass(frozen=True)
class Extractor:
    """A network that makes features of uint8 images."""

    identity: str
    """Its name, and the hash of its weights or of what they follow from."""
    network: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    """From uint8 (b, 3, s, s) to features (b, D) and logits (b, C)."""

    def features(self, batches: Iterable[Tensor]) -> FeatureSet:
        """Features of all images of the batches, uint8 (b, 3, s, s).

        Raises:
            DataError: There are no images, or they are not of one size, three channels and whole numbers of 8 bits.
        """
        return self.feature_set(joined([self.measured(images_b3ss) for images_b3ss in batches]))

    @torch.no_grad()
    def measured(self, images_b3ss: Tensor) -> dict[str, Tensor]:
        """Of one batch: `features` (b, D), `image_size` (1,), and `logits` (b, C) where there is a classifier."""
        shape = tuple(images_b3ss.shape)
        if images_b3ss.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
            raise DataError(f"images: expected uint8 (b, 3, s, s), got {images_b3ss.dtype} {shape}")
        features_bD, logits_bC = self.network(images_b3ss.to(best_device()))
        logits = {} if logits_bC is None else {"logits": logits_bC.float().cpu()}
        return {"features": features_bD.float().cpu(), "image_size": torch.tensor([shape[2]]), **logits}

    def feature_set(self, measured: Tensors) -> FeatureSet:
        """Of all batches, whose tensors are joined; raises as `features` does."""
        if not measured:
            raise DataError("images: there are none to measure")
        if len(sizes := measured["image_size"].unique().tolist()) > 1:
            raise DataError(f"images: expected one size, got sides of {sizes} pixels")
        return FeatureSet(measured["features"], self.identity, sizes[0], measured.get("logits"))


def open_extractor(plan: FidelityPlan, data: DataSection, store: Store) -> Extractor:
    """Load the extractor, or for rings train it once and keep it in the store.

    Raises:
        CheckpointError: The weights are of another kind, damaged, or can't be downloaded.
    """
    identity, (name, weights) = plan.extractor, (plan.extractor_name, plan.settings.weights)
    if name == RINGS_CLASSIFIER:
        return Extractor(identity, rings_classifier(data, identity, store))
    return Extractor(identity, _torch_fidelity(name, weights))


def _torch_fidelity(name: str, weights: str | None) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
    from torch_fidelity.utils import create_feature_extractor

    layer = FEATURE_EXTRACTORS_REGISTRY[name].get_default_feature_layer_for_metric("fid")
    wanted, classifies = [layer], False
    try:
        if weights is not None and not name.startswith("clip"):  # CLIP's are TorchScript
            # torch-fidelity reads files in a way that lets them run code; what passes here can't
            state = torch.load(weights, map_location="cpu", weights_only=True)
            classifies = name == INCEPTION and bool(state["fc.weight"].any())
        if name == INCEPTION and (classifies or weights is None):
            wanted.append("logits_unbiased")
        cuda = best_device().type == "cuda"
        network = create_feature_extractor(
            name, wanted, cuda=cuda, feature_extractor_weights_path=weights, verbose=False
        )
        _fuse(network)
        network.to(memory_format=torch.channels_last)
    except (
        AttributeError,
        EOFError,
        KeyError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        pickle.PickleError,
        SafetensorError,
    ) as error:
        place = f"{weights}: not weights of {name}" if weights else f"{name} can't be downloaded"
        reason = " ".join(str(error).split())[:150]
        raise CheckpointError(f"evaluation.fidelity.weights: {place} ({reason}); {where_from(name)}") from None

    def extract(images_b3ss: Tensor) -> tuple[Tensor, Tensor | None]:
        outputs = network.convert_features_tuple_to_dict(network(images_b3ss))
        return outputs[layer], outputs.get("logits_unbiased")

    return extract


def _fuse(network: nn.Module) -> None:
    """Let convolutions do what the normalisation after them does, as Inception has them; only rounding differs.

    With it, and with channels last, Inception takes two thirds of the time on CPUs.
    """
    layer: Any  # torch-fidelity's, which share no class
    for layer in network.modules():
        if isinstance(getattr(layer, "conv", None), nn.Conv2d) and isinstance(
            getattr(layer, "bn", None), nn.BatchNorm2d
        ):
            layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()


class RingsClassifier(nn.Module):
    """A small network that counts rings. Its features are its layers' mean activations, whitened.

    As they are, the last layer's have 94% of their variance in one direction, all that a Fréchet distance sees.

    Letter: L mean activations.
    """

    mean_L: Tensor
    whitening_LD: Tensor

    def __init__(self, width: int, features: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 5, 2, 2), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.third, self.last = nn.Conv2d(2 * width, 2 * width, 3, 2, 1), nn.Linear(2 * width, classes)
        self.register_buffer("mean_L", torch.zeros(5 * width))
        self.register_buffer("whitening_LD", torch.zeros(5 * width, features))

    def forward(self, images_b3ss: Tensor) -> tuple[Tensor, Tensor]:
        """Features (b, D) and logits (b, classes) of uint8 images."""
        activations_bL = self._activations(images_b3ss)
        logits_bC = self.last(activations_bL[:, -self.last.in_features :])
        return (activations_bL - self.mean_L) @ self.whitening_LD, logits_bC

    @torch.no_grad()
    def whiten(self, batches: Iterable[Tensor]) -> None:
        """From now on features are the first principal components of these images, each of variance 1."""
        activations_NL = torch.cat([self._activations(images_b3ss) for images_b3ss in batches]).double()
        variance_L, directions_LL = torch.linalg.eigh(torch.cov(activations_NL.T))
        variance_L.clamp_(min=1e-6 * float(variance_L[-1]))  # less is rounding, not to be scaled up
        self.mean_L.copy_(activations_NL.mean(0))
        self.whitening_LD.copy_((directions_LL / variance_L.sqrt())[:, -self.whitening_LD.shape[1] :])

    def _activations(self, images_b3ss: Tensor) -> Tensor:
        hidden, means = images_b3ss.float() / 127.5 - 1, []
        for layer in (self.first, self.second, self.third):
            hidden = F.silu(layer(hidden))
            means.append(hidden.mean((2, 3)))
        return torch.cat(means, 1)


def rings_classifier(data: DataSection, identity: str, store: Store) -> RingsClassifier:
    """From the store, or trained on rings with cross-entropy in seconds."""
    files = store.run(RunKey("evaluations", RINGS_CLASSIFIER, identity.rpartition(":")[2]))
    settings = RINGS_TRAINING
    with torch.random.fork_rng():
        torch.manual_seed(int(settings["seed"]))
        classifier = RingsClassifier(int(settings["width"]), int(settings["features"]), data.num_classes)
    with files.locked():
        try:
            tensors, _ = load_tensors(files.weights, RINGS_CLASSIFIER, identity)
            fill(classifier, tensors, files.weights)
        except CheckpointError:
            _train(classifier, data)
            save_tensors(files.weights, classifier.state_dict(), {"kind": RINGS_CLASSIFIER, "fingerprint": identity})
    return classifier.to(best_device()).eval()


def _train(classifier: RingsClassifier, data: DataSection) -> None:
    images, batch = int(RINGS_TRAINING["images"]), int(RINGS_TRAINING["batch_size"])
    source = training_source(data, images)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, images, batch):
            pixels_b3ss, labels_b = source.load_batch(range(start, start + batch), [0] * batch)
            yield torch.from_numpy(pixels_b3ss), torch.from_numpy(labels_b)

    optimizer = torch.optim.AdamW(classifier.parameters(), lr=float(RINGS_TRAINING["lr"]))
    with torch.enable_grad():
        for images_b3ss, labels_b in batches():
            _, logits_bC = classifier(images_b3ss)
            optimizer.zero_grad()
            F.cross_entropy(logits_bC, labels_b).backward()
            optimizer.step()
    classifier.whiten(images_b3ss for images_b3ss, _ in batches())
