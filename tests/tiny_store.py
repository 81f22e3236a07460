"""Small token stores of rings, with an encoder that needs no training."""

import json
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


BAD_MANIFESTS: dict[str, Any] = {
    "empty": b"",
    "half": b'{"schema": 2, "tokenizer_fi',
    "zeros": bytes(200),
    "no text": b"\xff\xfe\x00",
    "a list": [],
    "a number": 5,
    "missing keys": {},
    "deep": b"[" * 100_000,
    "deep object": b'{"shards":' * 50_000,
    **{
        f"{'.'.join(map(str, keys))} {value!r}"[:60]: (keys, value)
        for keys, value in [
            (("schema",), 1),
            (("schema",), "2"),
            (("tokenizer_fingerprint",), 5),
            (("data_fingerprint",), None),
            (("patch_nums",), "124"),
            (("patch_nums",), []),
            (("patch_nums", 1), -2),
            (("patch_nums", 1), 2**70),
            (("vocab_size",), 0),
            (("vocab_size",), "500"),
            (("vocab_size",), 500.5),
            (("num_classes",), True),
            (("num_images",), -50),
            (("num_images",), 10**30),
            (("num_images",), float("nan")),
            (("num_images",), 1000),
            (("views",), 0),
            (("shard_images",), 0),
            (("procedural",), "yes"),
            (("undecodable",), ["a"]),
            (("undecodable",), {"a": 5}),
            (("shards",), {}),
            (("shards",), []),
            (("shards", 0), "view-000-shard-000000-images-16.npy"),
            (("shards", 0), {}),
            (("shards", 1, "file"), 5),
            (("shards", 1, "file"), ""),
            (("shards", 1, "file"), "view-000-shard-000000-images-16.npy"),
            (("shards", 1, "file"), "view-000-shard-000001-images-15.npy"),
            (("shards", 1, "view"), 1),
            (("shards", 1, "first_image"), 17),
            (("shards", 1, "first_image"), 0),
            (("shards", 1, "images"), 2**50),
            (("shards", 1, "bytes"), -1),
            (("shards", 1, "bytes"), float("inf")),
            (("shards", 1, "blake2b"), "G" * 32),
            (("shards", 1, "more"), 1),
        ]
    },
}
"""What a manifest can be that isn't one: the file's content, or the place of one value and what stands there."""


def spoil_manifest(path: Path, name: str) -> None:
    """Write `BAD_MANIFESTS[name]` over a manifest or a progress file."""
    bad = BAD_MANIFESTS[name]
    if isinstance(bad, tuple):
        keys, value = bad
        content = json.loads(path.read_text())
        place = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        bad = content
    path.write_bytes(bad if isinstance(bad, bytes) else json.dumps(bad).encode())
