"""Many images from one model, a batch at a time.

Letters in tensor names: N images in all, b images of a batch, C classes.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from varscale.families.base import SamplingOptions
from varscale.families.models import FamilyModel
from varscale.generation.collection import Collection, CollectionRecord
from varscale.generation.from_files import Drawable
from varscale.generation.rejection import Rejection
from varscale.generation.sampling import check_sampling, sample_with
from varscale.numerics.randomness import permutation
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.training.interruption import Report


def draw_collection(
    drawable: Drawable,
    labels_N: Tensor,
    options: SamplingOptions,
    collection: Collection,
    progress: Report,
    *,
    batch_size: int = 64,
    rejection: Rejection | None = None,
    captions: Sequence[str] = (),
) -> None:
    """Draw one image a label into a folder of PNGs, an .npz or a .parquet; an interrupted call is gone on with.

    Where `captions` are given, `labels_N` are their embeddings, and the captions are written in place of labels.
    Memory doesn't grow with the number of images, and at most one batch is lost when the process is killed.

    Raises:
        ExperimentError: The collection was begun with other options.
        ValueError: A label or an option is out of range.
        OSError: It can't be written.
    """
    check_sampling(drawable.model.config, drawable.tokenizer, labels_N, options)
    labels, names_N = labels_N.numpy(), np.array(captions) if captions else labels_N.numpy()
    batch_size, chosen = kept_at_once(batch_size, rejection), ""
    if rejection is not None:
        chosen = f"1 of {rejection.candidates} by {rejection.classifier.identity}"
    record = CollectionRecord(
        model=drawable.model_checksum,
        tokenizer=drawable.tokenizer_checksum,
        images=len(labels),
        labels=hashlib.blake2b(labels.tobytes(), digest_size=8).hexdigest(),
        batch_size=batch_size,
        chosen=chosen,
        **asdict(options),
    )
    done = collection.begin(record)
    progress(done, len(labels))
    models, candidates = (drawable.model, drawable.tokenizer), rejection.candidates if rejection else 1
    drawn = batch_size * candidates
    batches = drawn_batches(*models, labels_N, options, batch_size=drawn, first=done, rejection=rejection)
    for images_b3HW in batches:
        end = done + len(images_b3HW)
        collection.add(done, images_b3HW.permute(0, 2, 3, 1).contiguous().cpu().numpy(), names_N[done:end])
        done = end
        progress(done, len(labels))
    collection.finish(names_N)


def drawn_batches(
    model: FamilyModel,
    tokenizer: MultiScaleTokenizer,
    labels_N: Tensor,
    options: SamplingOptions,
    *,
    batch_size: int = 64,
    first: int = 0,
    rejection: Rejection | None = None,
) -> Iterator[Tensor]:
    """The images of labels `first` … N - 1, in order: uint8 (b, 3, H, W), on the model's device.

    With `rejection` each is chosen among several, and `batch_size` of these are drawn at once.

    Image i depends on its label, the options and i alone (to rounding), not on its batch or on where drawing began.
    On a GPU matrix products are bfloat16.
    """
    device = next(model.parameters()).device
    candidates, at_once = rejection.candidates if rejection else 1, kept_at_once(batch_size, rejection)
    for start in range(first, len(labels_N), at_once):
        labels_b = labels_N[start : start + at_once].to(device)
        indices_bM = torch.arange(start * candidates, (start + len(labels_b)) * candidates)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            drawn = sample_with(model, tokenizer, labels_b.repeat_interleave(candidates, dim=0), options, indices_bM)
        pixels_bM3HW = drawn.images.mul(255).round().to(torch.uint8)
        yield pixels_bM3HW if rejection is None else pixels_bM3HW[rejection.choose(pixels_bM3HW, labels_b)]


def kept_at_once(batch_size: int, rejection: Rejection | None) -> int:
    """How many images are kept of so many that are drawn at once; at least one, however many candidates it has."""
    return batch_size if rejection is None else max(1, batch_size // rejection.candidates)


def labels_in_turn(classes: Sequence[int] | Tensor, count: int) -> Tensor:
    """`count` labels, int64 (N,), or embeddings (N, D): one after the other, again and again."""
    labels = torch.as_tensor(classes)
    return labels[torch.arange(count) % len(labels)]


def labels_in_proportion(counts_C: NDArray[np.int64], count: int, seed: int) -> Tensor:
    """`count` labels, int64 (N,), of which each class has its share as exactly as whole numbers can, in random order.

    What the shares rounded down leave over goes to the classes with the largest remainders (Hamilton's method).
    """
    shares_C, remainders_C = np.divmod(counts_C * count, counts_C.sum())
    largest = np.argsort(-remainders_C, kind="stable")[: count - shares_C.sum()]
    shares_C[largest] += 1
    labels_N = np.repeat(np.arange(len(counts_C)), shares_C)
    return torch.from_numpy(labels_N[permutation(seed, 0, count)])
