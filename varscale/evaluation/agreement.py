"""Whether images show what was asked for: the class, or what their captions say, of which rings are counted by colour
and all else is found among other captions.

Letters: N images, b images of a batch, J questions (how many rings of each colour, and which background where there
are several), A answers to choose from, F features, D numbers of a caption's embedding, M captions to choose from,
C classes.
"""

from collections.abc import Iterator

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import RidgeCV
from torch import Tensor
from torch.nn import functional as F

from varscale.config import DataSection
from varscale.data.sources.of_experiment import training_source, validation_source
from varscale.data.sources.rings.source import RingsSource
from varscale.errors import CheckpointError
from varscale.evaluation.extractors import RingsClassifier
from varscale.evaluation.plan import described_images
from varscale.numerics.device import best_device
from varscale.store.fingerprint import fingerprint
from varscale.store.layout import RunKey, Store
from varscale.store.weights import fill, load_tensors, save_tensors

RINGS_COUNTER = "rings-counter"
COUNTER_TRAINING = {"images": 76_800, "batch_size": 64, "lr": 4e-3, "width": 64, "seed": 0}
"""Of the network that counts rings by colour: part of its identity."""
CHOICES = 100
"""Captions among which an image's own is to be found."""
FEWEST_OF_A_CLASS = 10
"""Real images that a class needs, for it to be told by their features."""
RIDGES = np.logspace(-2, 2, 9)
"""Strengths of the regression from features to embeddings, as shares of the features' mean variance."""


class RingsCounter:
    """Counts the rings of each colour and tells the background: the classifier of rings, with more questions."""

    def __init__(self, data: DataSection, store: Store) -> None:
        """From the store, or trained on real images in a minute and kept there."""
        source = training_source(data, int(COUNTER_TRAINING["images"]))
        assert isinstance(source, RingsSource)
        style = source.style
        self.questions = style.colours + bool(style.backgrounds)
        self.answers = 1 + max(style.max_rings, style.backgrounds)
        identity = fingerprint(kind=RINGS_COUNTER, data=described_images(data), **COUNTER_TRAINING)
        files = store.run(RunKey("evaluations", RINGS_COUNTER, identity))
        with torch.random.fork_rng():
            torch.manual_seed(int(COUNTER_TRAINING["seed"]))
            self.network = RingsClassifier(int(COUNTER_TRAINING["width"]), 1, self.questions * self.answers)
        files.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(files.lock):
            try:
                tensors, _ = load_tensors(files.weights, RINGS_COUNTER, identity)
                fill(self.network, tensors, files.weights)
            except CheckpointError:
                self._train(source)
                described = {"kind": RINGS_COUNTER, "fingerprint": identity}
                save_tensors(files.weights, self.network.state_dict(), described)
        self.network.to(best_device()).eval()

    @torch.no_grad()
    def seen(self, images_b3ss: Tensor) -> Tensor:
        """Rings of each colour, and last the background where there are several, int64 (b, J), of uint8 images."""
        return self._logits(images_b3ss.to(best_device())).argmax(-1).cpu()

    def drawn(self, source: RingsSource, index_b: NDArray[np.int64]) -> Tensor:
        """The same of a source's images, as they were drawn."""
        return torch.from_numpy(source.what_is_drawn(index_b)[:, : self.questions])

    def _logits(self, images_b3ss: Tensor) -> Tensor:
        logits_bJA: Tensor = self.network(images_b3ss)[1].unflatten(1, (self.questions, self.answers))
        return logits_bJA

    def _train(self, source: RingsSource) -> None:
        batch, peak = int(COUNTER_TRAINING["batch_size"]), float(COUNTER_TRAINING["lr"])
        steps = int(COUNTER_TRAINING["images"]) // batch
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=peak)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps)
        with torch.enable_grad():
            for start in range(0, steps * batch, batch):
                index_b = np.arange(start, start + batch)
                images_b3ss = torch.from_numpy(source.load_batch(index_b, np.zeros_like(index_b))[0])
                logits_bJA = self._logits(images_b3ss)
                optimizer.zero_grad()
                F.cross_entropy(logits_bJA.flatten(0, 1), self.drawn(source, index_b).flatten()).backward()
                optimizer.step()
                schedule.step()


class RingsAgreement:
    """Shares of images that show what was asked for: the number of rings, and all that their captions say."""

    def __init__(
        self, data: DataSection, store: Store, *, image_N: Tensor | None = None, label_N: Tensor | None = None
    ) -> None:
        """Of images that are drawn, in this order, for the captions of these validation images, or for these labels."""
        source = validation_source(data)
        assert isinstance(source, RingsSource)
        self.counter, self.source = RingsCounter(data, store), source
        self.asked_NJ = None if image_N is None else self.counter.drawn(source, image_N.numpy())
        self.label_N = label_N
        self.seen: list[Tensor] = []

    def watched(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """The batches as they are, uint8 (b, 3, s, s); their rings are counted as they pass."""
        for images_b3ss in batches:
            self.seen.append(self.counter.seen(images_b3ss))
            yield images_b3ss

    def figures(self, **of_validation: Iterator[Tensor]) -> dict[str, float]:
        """Of the images that passed; and of others, by name, which are the first validation images in some form."""
        seen_NJ = torch.cat(self.seen)
        if self.asked_NJ is not None:
            figures = self._shares("", seen_NJ, self.asked_NJ)
        else:
            assert self.label_N is not None
            asked_N = self.label_N + self.source.style.min_rings
            figures = {"class_agreement": _share(self._numbers(seen_NJ) == asked_N)}
        for name, batches in of_validation.items():
            seen_NJ = torch.cat([self.counter.seen(images_b3ss) for images_b3ss in batches])
            figures |= self._shares(f"_{name}", seen_NJ, self.counter.drawn(self.source, np.arange(len(seen_NJ))))
        return figures

    def _shares(self, ending: str, seen_NJ: Tensor, drawn_NJ: Tensor) -> dict[str, float]:
        return {
            f"class_agreement{ending}": _share(self._numbers(seen_NJ) == self._numbers(drawn_NJ)),
            f"text_agreement{ending}": _share((seen_NJ == drawn_NJ).all(1)),
        }

    def _numbers(self, rings_NJ: Tensor) -> Tensor:
        """Rings of all colours, (N,)."""
        return rings_NJ[:, : self.source.style.colours].sum(1)


def class_agreement(features_NF: Tensor, label_N: Tensor, real: tuple[Tensor, Tensor]) -> float | None:
    """Share of images whose features are those of the class that was asked for.

    Classes are told by linear discriminants of real images' features, all classes being as likely. Their covariance is
    shrunk (Ledoit and Wolf, 2004), without which as many features as images would tell classes by these images' noise.

    Args:
        features_NF: Of the images.
        label_N: Classes that were asked for.
        real: Features of real images, and their classes.

    Returns:
        The share; None where some class that was asked for has fewer than `FEWEST_OF_A_CLASS` real images, or no other
        class has as many.
    """
    real_NF, real_label_N = (tensor.numpy() for tensor in real)
    counts_C = np.bincount(real_label_N, minlength=int(label_N.max()) + 1)
    if counts_C[label_N.numpy()].min() < FEWEST_OF_A_CLASS:
        return None
    known_N = counts_C[real_label_N] >= FEWEST_OF_A_CLASS
    classes = int((counts_C >= FEWEST_OF_A_CLASS).sum())
    if classes < 2:
        return None
    discriminants = LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage="auto", priors=np.full(classes, 1 / classes)
    ).fit(real_NF[known_N], real_label_N[known_N])
    return float((discriminants.predict(features_NF.numpy()) == label_N.numpy()).mean())


def retrieval(
    features_NF: Tensor, embeddings_ND: Tensor, real: tuple[Tensor, Tensor], *, choices: int = CHOICES
) -> dict[str, float]:
    """How often an image's own caption, of so many different ones, is the nearest to what its features say.

    What they say of captions is fitted to real pairs, by ridge regression of embeddings on features. Its strength is
    that of `RIDGES` which predicts real pairs best that are left out: too weak a one, of as many features as images,
    fits the real images' own noise, and says nothing of images that are less sharp.

    Args:
        features_NF: Of the drawn images.
        embeddings_ND: Of the captions that they were drawn for, of length 1.
        real: Features and embeddings of real images.
        choices: Captions to choose from, one of which is right.

    Returns:
        `text_retrieval`, the share, and `text_retrieval_chance`; nothing where there are fewer different captions.
    """
    different_MD = torch.unique(embeddings_ND, dim=0)
    if len(different_MD) < choices:
        return {}
    predicted_ND = _said(features_NF, *real)
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for predicted_D, own_D in zip(predicted_ND, embeddings_ND.double(), strict=True):
        order_M = torch.randperm(len(different_MD), generator=generator)[:choices]
        others_MD = different_MD[order_M].double()
        others_MD = others_MD[(others_MD != own_D).any(1)][: choices - 1]
        hits += int((others_MD @ predicted_D).max() < own_D @ predicted_D)
    return {"text_retrieval": hits / len(predicted_ND), "text_retrieval_chance": 1 / choices}


def _said(features_NF: Tensor, real_features_NF: Tensor, real_embeddings_ND: Tensor) -> Tensor:
    """Embeddings, less their mean, that features predict."""
    features, embeddings = real_features_NF.double().numpy(), real_embeddings_ND.double().numpy()
    size = features.var(axis=0).mean() * len(features)  # RidgeCV compares strengths by leaving out each image in turn
    regression = RidgeCV(RIDGES * size).fit(features, embeddings)
    return torch.from_numpy(regression.predict(features_NF.double().numpy()) - embeddings.mean(0))


def _share(agrees_N: Tensor) -> float:
    return float(agrees_N.double().mean())
