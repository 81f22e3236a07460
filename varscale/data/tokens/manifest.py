"""What a token store's manifest says, and how its files are named, hashed and checked.

A store is a folder of shards and `manifest.json`, which is written last. A shard is a NumPy file of one view of up to
`shard_images` consecutive images, one row an image: its label, then its L tokens, scale by scale. A store of latents
has rows of two fields, `label` and `latents`, the latter float16 (c, h, w). While a store is written, `progress.json`
lists the shards that are finished.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from varscale.errors import TokenStoreError

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
LOCK = "writer.lock"

_Count = Annotated[int, Field(ge=1, le=2**40)]
_CountOrZero = Annotated[int, Field(ge=0, le=2**40)]
_Numbers32Bit = Annotated[int, Field(ge=1, le=2**32)]


class RowType(NamedTuple):
    """What an image's row is made of: numbers of a type, and so many of them."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @classmethod
    def of(
        cls, patch_nums: tuple[int, ...], *, vocab_size: int, num_classes: int, latent_channels: int | None
    ) -> "RowType":
        """A label and tokens, of two bytes where all of both fit, else of four; or a label and latents."""
        if latent_channels is not None:
            side = patch_nums[-1]
            return cls(np.dtype([("label", "<u4"), ("latents", "<f2", (latent_channels, side, side))]), ())
        dtype = np.dtype("<u2" if max(vocab_size, num_classes) <= 2**16 else "<u4")
        return cls(dtype, (1 + sum(side * side for side in patch_nums),))

    def rows(self, images: int) -> NDArray[Any]:
        """Of so many images, still without content."""
        return np.empty((images, *self.shape), self.dtype)

    @property
    def bytes(self) -> int:
        """Of a row."""
        return self.rows(1).nbytes


class ShardRows(NamedTuple):
    """Which images a shard holds, and so its name; the fields are those of `Shard`."""

    file: str
    view: int
    first_image: int
    images: int


class Shard(BaseModel):
    """One file of a store."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    file: str
    """Name within the store's folder; always the one that `Manifest.shard_rows` gives."""
    view: _CountOrZero
    """Which view of the images."""
    first_image: _CountOrZero
    """Index of the first row's image."""
    images: _Count
    """Rows."""
    bytes: _Count
    """Size of the file."""
    blake2b: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """Checksum of the file, 32 hexadecimal digits."""


class Manifest(BaseModel):
    """What is in a token store."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", use_attribute_docstrings=True)

    version: Literal[2] = Field(alias="schema")
    """Version of this format."""
    tokenizer_fingerprint: str
    """Fingerprint of the tokenizer."""
    data_fingerprint: str
    """Fingerprint of the images."""
    patch_nums: Annotated[tuple[Annotated[int, Field(ge=1, le=2**12)], ...], Field(min_length=1, max_length=2**12)]
    """Side of each scale's token map."""
    vocab_size: _Numbers32Bit
    """Tokens are 0 … vocab_size - 1."""
    num_classes: _Numbers32Bit
    """Labels are 0 … num_classes - 1."""
    class_names: tuple[str, ...] = ()
    """Name of each label; none: labels have no names, or the store is of an earlier version."""
    latent_channels: Annotated[int, Field(ge=1, le=2**14)] | None = None
    """Channels c of the latents that a store of latents holds; None: it holds tokens."""
    num_images: _Count
    """Images, each with `views` rows."""
    views: _Count
    """Views of each image."""
    shard_images: _Count
    """Images of a full shard."""
    procedural: bool
    """Whether the images are in no particular order and more of them can be added."""
    undecodable: dict[str, str] = {}
    """Images that did not decode while they were encoded → why; others, drawn at random, stand in for them."""
    shards: tuple[Shard, ...] = ()
    """View by view, in the order of the images."""

    @model_validator(mode="after")
    def _check_shards(self) -> Self:
        """A file is read, replaced and deleted by the name that stands here, so only the expected names may."""
        before = (0, -1)
        for index, shard in enumerate(self.shards):
            number = shard.first_image // self.shard_images
            expected = self.shard_rows(shard.view, number)
            for key in ("first_image", "images", "file"):
                found, right = getattr(shard, key), getattr(expected, key)
                if found != right:
                    raise ValueError(
                        f"shards[{index}].{key}: {repr(found)[:80]}, expected {right!r} from its other numbers"
                    )
            if shard.view >= self.views or (shard.view, number) <= before:
                raise ValueError(f"shards[{index}].view: {shard.view}, in image {shard.first_image}, is out of order")
            before = (shard.view, number)
        return self

    @property
    def tokens_per_image(self) -> int:
        """L, tokens of an image over all scales."""
        return sum(side * side for side in self.patch_nums)

    @property
    def row_type(self) -> RowType:
        """Of the shards' rows."""
        return RowType.of(
            self.patch_nums,
            vocab_size=self.vocab_size,
            num_classes=self.num_classes,
            latent_channels=self.latent_channels,
        )

    @property
    def shards_per_view(self) -> int:
        """Shards that a finished store has of each view."""
        return -(-self.num_images // self.shard_images)

    def shard_rows(self, view: int, number: int) -> ShardRows:
        """What the shard of that number within a view holds.

        Its name holds the number of rows, so that a store that grows never overwrites a file in use.
        """
        first = number * self.shard_images
        images = min(self.shard_images, self.num_images - first)
        return ShardRows(f"view-{view:03d}-shard-{number:06d}-images-{images}.npy", view, first, images)

    def planned_shards(self) -> list[ShardRows]:
        """Every shard that the store must have, in order."""
        return [self.shard_rows(view, number) for view in range(self.views) for number in range(self.shards_per_view)]

    def difference_from(self, other: "Manifest") -> str | None:
        """The key in which they differ and both values; None if both hold the same tokens as far as both go."""
        keys = ["tokenizer_fingerprint", "data_fingerprint", "patch_nums", "vocab_size", "latent_channels"]
        keys += ["num_classes", "shard_images"]
        for key in [*keys, "procedural", *([] if self.procedural else ["num_images"])]:
            values = getattr(self, key), getattr(other, key)
            if values[0] != values[1]:
                mine, others = (",".join(map(str, v)) if isinstance(v, tuple) else v for v in values)
                return f"{key}: {mine}, expected {others}"
        return None

    def to_json(self) -> dict[str, Any]:
        """The manifest as a JSON object; `dtype` is for readers that don't know the rule."""
        return {**self.model_dump(mode="json", by_alias=True), "dtype": str(self.row_type.dtype)}


def read_manifest(path: Path) -> Manifest | None:
    """The manifest or progress file at `path`, or None where there is no such file.

    Raises:
        TokenStoreError: If the file is damaged or of another schema; the message names file and key.
    """
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TokenStoreError(f"{path}: not readable ({error.strerror}); encode the store again") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        reason = " ".join(f"{key}: {first['msg']}".removeprefix(": Value error, ").split())[:300]
    else:
        expected = manifest.shards_per_view * manifest.views
        if path.name != MANIFEST or len(manifest.shards) == expected:
            return manifest
        reason = f"shards: {len(manifest.shards)}, expected {expected}"
    raise TokenStoreError(f"{path}: damaged ({reason}); encode the store again")


def class_names(directory: Path) -> tuple[str, ...]:
    """The names of the labels in a token store; none where it can't be read or does not say."""
    try:
        manifest = read_manifest(directory / MANIFEST)
    except TokenStoreError:
        return ()
    return manifest.class_names if manifest is not None else ()


def checksum(content: bytes) -> str:
    """BLAKE2b of a shard, 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def check_shard(folder: Path, number: int, shard: Shard, *, contents: bool) -> None:
    """Compare a shard's size, and if asked its checksum, with the manifest.

    Raises:
        TokenStoreError: If the file is missing, of another size or damaged; the message names file and shard.
    """
    path = folder / shard.file
    place, advice = f"{path}: shards[{number}]", "encode the store again; intact shards are kept"
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            raise TokenStoreError(f"{place}: {size} bytes, expected {shard.bytes}; {advice}")
        found = checksum(path.read_bytes()) if contents else shard.blake2b
    except FileNotFoundError:
        raise TokenStoreError(f"{place} is missing; encode the store again") from None
    except OSError as error:
        raise TokenStoreError(f"{place}: not readable ({error.strerror}); {advice}") from None
    if found != shard.blake2b:
        raise TokenStoreError(f"{place}: checksum {found}, expected {shard.blake2b}; {advice}")
