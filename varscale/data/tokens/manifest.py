"""What a token store's manifest says, and how its files are named, hashed and checked.

A store is a folder of shards and `manifest.json`, which is written last. A shard is a NumPy file of one view of up to
`shard_images` consecutive images, one row an image: its label, then its L tokens, scale by scale. While a store is
written, `progress.json` lists the shards that are finished.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from varscale.errors import TokenStoreError

SCHEMA = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
LOCK = "writer.lock"


@dataclass(frozen=True)
class Shard:
    """One file of a store."""

    file: str
    """Name within the store's folder."""
    view: int
    """Which view of the images."""
    first_image: int
    """Index of the first row's image."""
    images: int
    """Rows."""
    bytes: int
    """Size of the file."""
    blake2b: str
    """Checksum of the file, 32 hexadecimal digits."""


@dataclass(frozen=True)
class Manifest:
    """What is in a token store."""

    tokenizer: str
    """Fingerprint of the tokenizer."""
    data: str
    """Fingerprint of the images."""
    patch_nums: tuple[int, ...]
    """Side of each scale's token map."""
    vocab_size: int
    """Tokens are 0 … vocab_size - 1."""
    num_classes: int
    """Labels are 0 … num_classes - 1."""
    num_images: int
    """Images, each with `views` rows."""
    views: int
    """Views of each image."""
    shard_images: int
    """Images of a full shard."""
    procedural: bool
    """Whether the images are in no particular order and more of them can be added."""
    undecodable: dict[str, str] = field(default_factory=dict)
    """Images that did not decode → why; others stand in for them."""
    shards: tuple[Shard, ...] = ()
    """View by view, in the order of the images."""

    @property
    def tokens_per_image(self) -> int:
        """L, tokens of an image over all scales."""
        return sum(side * side for side in self.patch_nums)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Unsigned type of the shards' numbers: two bytes where tokens and labels fit, else four."""
        return np.dtype("<u2" if max(self.vocab_size, self.num_classes) <= 2**16 else "<u4")

    def shard_file(self, view: int, number: int, images: int) -> str:
        """Name of a shard; it holds the rows' number, so that a store that grows never overwrites a file in use."""
        return f"view-{view:03d}-shard-{number:06d}-images-{images}.npy"

    def planned_shards(self) -> list[tuple[int, int, int]]:
        """(view, number, images) of every shard that the store must have, in order."""
        counts = [
            min(self.shard_images, self.num_images - first) for first in range(0, self.num_images, self.shard_images)
        ]
        return [(view, number, images) for view in range(self.views) for number, images in enumerate(counts)]

    def difference_from(self, other: "Manifest") -> str | None:
        """The key in which they differ and both values; None if both hold the same tokens as far as both go."""
        keys = ["tokenizer", "data", "patch_nums", "vocab_size", "num_classes", "shard_images", "procedural"]
        if not self.procedural:
            keys.append("num_images")
        for key in keys:
            mine, others = getattr(self, key), getattr(other, key)
            if mine != others:
                return f"{key}: {_text(mine)}, expected {_text(others)}"
        return None

    def to_json(self) -> dict[str, Any]:
        """The manifest as a JSON object."""
        return {"schema": SCHEMA, "dtype": self.dtype.name, **asdict(self)}


def read_manifest(path: Path) -> Manifest | None:
    """The manifest or progress file at `path`, or None where there is no such file.

    Raises:
        TokenStoreError: If the file is damaged or of another schema; the message names file and key.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise TokenStoreError(f"{path}: not readable ({error}); delete it to encode the store again") from None
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        found = values.get("schema") if isinstance(values, dict) else None
        raise TokenStoreError(f"{path}: schema: {found}, expected {SCHEMA}; delete it to encode the store again")
    try:
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        del values["schema"], values["dtype"]
        return Manifest(**{**values, "patch_nums": tuple(values["patch_nums"]), "shards": shards})
    except (TypeError, KeyError, AttributeError) as error:
        raise TokenStoreError(f"{path}: damaged ({error}); delete it to encode the store again") from None


def checksum(content: bytes) -> str:
    """BLAKE2b of a shard, 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def check_shard(folder: Path, number: int, shard: Shard, *, contents: bool) -> None:
    """Compare a shard's size, and if asked its checksum, with the manifest.

    Raises:
        TokenStoreError: If the file is missing, of another size or damaged; the message names file and shard.
    """
    path = folder / shard.file
    advice = "encode the store again; intact shards are kept"
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise TokenStoreError(f"{path}: shards[{number}] is missing; encode the store again") from None
    if size != shard.bytes:
        raise TokenStoreError(f"{path}: shards[{number}]: {size} bytes, expected {shard.bytes}; {advice}")
    if contents:
        found = checksum(path.read_bytes())
        if found != shard.blake2b:
            raise TokenStoreError(f"{path}: shards[{number}]: checksum {found}, expected {shard.blake2b}; {advice}")


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
