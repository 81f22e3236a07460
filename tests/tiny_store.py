"""Small token stores of rings, with an encoder that needs no training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from varscale.data.sources.rings.source import RingsSource
from varscale.data.tokens.store import TokenStore
from varscale.data.tokens.writer import encode_store

PATCH_NUMS = (1, 2, 4)
VOCAB_SIZE = 500


def brightness_encoder(images_B3HW: torch.Tensor, patch_nums: Sequence[int] = PATCH_NUMS) -> list[torch.Tensor]:
    """The mean brightness of each cell of each scale's grid as a token 0 … VOCAB_SIZE - 1."""
    grey_B1HW = (images_B3HW.double().mean(1, keepdim=True) + 1) / 2
    return [(F.adaptive_avg_pool2d(grey_B1HW, side) * (VOCAB_SIZE - 1)).long().flatten(1) for side in patch_nums]


def store_of_rings(directory: Path, num_images: int = 50, **changes: Any) -> TokenStore:
    """A store of `num_images` rings of 8 × 8 pixels in shards of 16, batches of 8, or with what `changes` says."""
    settings: dict[str, Any] = {
        "source": RingsSource(num_images, 8),
        "encode": brightness_encoder,
        "patch_nums": PATCH_NUMS,
        "vocab_size": VOCAB_SIZE,
        "tokenizer_fingerprint": "tokenizer-a",
        "shard_images": 16,
        "batch_size": 8,
        "workers": 0,
    }
    return encode_store(directory, **(settings | changes))
