"""Many images from one model, a batch at a time.

Letters in tensor names: N images in all, b images of a batch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from varscale.families.base import SamplingOptions
from varscale.families.models import FamilyModel
from varscale.generation.sampling import sample
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


def drawn_batches(
    model: FamilyModel,
    tokenizer: MultiScaleTokenizer,
    labels_N: Tensor,
    options: SamplingOptions,
    *,
    batch_size: int = 64,
    first: int = 0,
) -> Iterator[Tensor]:
    """The images of labels `first` … N - 1, in order: uint8 (b, 3, H, W).

    Image i depends on its label, the options and i alone (to rounding), not on its batch or on where drawing began.
    """
    for start in range(first, len(labels_N), batch_size):
        labels_b = labels_N[start : start + batch_size]
        drawn = sample(
            model,
            tokenizer,
            labels_b,
            options.guidance,
            options.top_k,
            options.top_p,
            options.seed,
            use_cache=options.use_cache,
            sample_indices=torch.arange(start, start + len(labels_b)),
        )
        yield drawn.images.mul(255).round().to(torch.uint8)
