"""The token store: every view of every image, encoded once, memory-mapped. `varscale.data.tokens.writer` writes it.

A store holds tokens, or the latents before quantization, for models that read these.

Sample s of a store of N images is view s // N of image s % N, so samples 0 … N - 1 are each image once.

Letters: B batch, L tokens of an image over all scales, p side of a scale's token map, V vocabulary, c channels of the
latents, C the same of a batch, h and w their height and width.
"""

import errno
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from varscale.data.sources.base import Indices
from varscale.data.tokens.captions import StoredCaptions
from varscale.data.tokens.manifest import MANIFEST, PROGRESS, Manifest, check_shard, read_manifest
from varscale.errors import TokenStoreError
from varscale.numerics.bits import bit_entropy, bits_of

Verify = Literal["auto", "sizes"]
VERIFY_BYTES = 512 * 2**20
"""Stores up to this size have their checksums compared on opening (about a second)."""


class TokenBatch(NamedTuple):
    """Tokens and labels of some samples."""

    tokens_BL: torch.Tensor
    """int64, scale by scale."""
    labels_B: torch.Tensor
    """int64."""


class LatentBatch(NamedTuple):
    """Latents and labels of some samples."""

    latents_BChw: torch.Tensor
    """float32, as the tokenizer has them before it quantizes."""
    labels_B: torch.Tensor
    """int64."""


class TokenStore:
    """Reads a finished token store. Safe to use from several processes and threads.

    Attributes:
        directory: The store's folder.
        manifest: What is in it, as far as this reader uses it.
        num_images: Images N.
        views: Views of each image.
        num_samples: N · views.
        patch_nums: Side of each scale's token map.
        tokens_per_image: L.
        vocab_size: V; tokens are 0 … V - 1.
        num_classes: Labels are 0 … num_classes - 1.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self.num_images, self.views = manifest.num_images, manifest.views
        self.num_samples = manifest.num_images * manifest.views
        self.patch_nums, self.tokens_per_image = manifest.patch_nums, manifest.tokens_per_image
        self.vocab_size, self.num_classes = manifest.vocab_size, manifest.num_classes
        _allow_open_files(len(manifest.shards))
        self._shards = [_map_shard(directory, manifest, number) for number in range(len(manifest.shards))]

    @classmethod
    def open(
        cls,
        directory: str | Path,
        expected_tokenizer_fingerprint: str | None = None,
        *,
        num_images: int | None = None,
        views: int | None = None,
        verify: Verify = "auto",
    ) -> Self:
        """Open a finished store, or the part of it that a smaller store would have.

        Args:
            directory: The store's folder.
            expected_tokenizer_fingerprint: Tokenizer that the tokens must come from.
            num_images: Use the first images only (procedural sources, or all); None: all.
            views: Use the first views only; None: all.
            verify: Compare every shard's size ("sizes"), and in stores of up to `VERIFY_BYTES` its checksum ("auto").

        Raises:
            TokenStoreError: If the store is missing, unfinished, damaged, too small or of other settings.
        """
        directory = Path(directory)
        manifest = read_manifest(directory / MANIFEST)
        if manifest is None:
            state = "unfinished" if (directory / PROGRESS).exists() else "no token store"
            raise TokenStoreError(f"{directory}: {state} ({MANIFEST} is missing); encode it first")
        if expected_tokenizer_fingerprint not in (None, manifest.tokenizer_fingerprint):
            found = f"tokenizer_fingerprint: {manifest.tokenizer_fingerprint}"
            raise TokenStoreError(f"{directory / MANIFEST}: {found}, expected {expected_tokenizer_fingerprint}")
        manifest = _restricted(directory, manifest, num_images or manifest.num_images, views or manifest.views)
        contents = verify == "auto" and sum(shard.bytes for shard in manifest.shards) <= VERIFY_BYTES
        for number, shard in enumerate(manifest.shards):
            check_shard(directory, number, shard, contents=contents)
        return cls(directory, manifest)

    def __len__(self) -> int:
        return self.num_samples

    def __reduce__(self) -> tuple[type[Self], tuple[Path, Manifest]]:
        """Worker processes map the files themselves instead of being sent their contents."""
        return type(self), (self.directory, self.manifest)

    def tokens(self, sample_indices: Indices | torch.Tensor) -> TokenBatch:
        """Tokens (B, L) and labels (B,) of samples 0 … num_samples - 1, in the order asked for.

        Raises:
            IndexError: If a sample is out of range.
        """
        rows = self._rows(sample_indices)
        tokens_BL = np.ascontiguousarray(rows[:, 1:], dtype=np.int64)
        return TokenBatch(torch.from_numpy(tokens_BL), torch.from_numpy(rows[:, 0].astype(np.int64)))

    def batch(self, sample_indices: Indices | torch.Tensor) -> dict[str, torch.Tensor]:
        """What models take of such samples: `samples` under its names and, where there are any, captions as `text_BD`.

        Raises:
            IndexError: If a sample is out of range.
        """
        batch: dict[str, torch.Tensor] = self.samples(sample_indices)._asdict()
        if self.captions is not None:
            batch["text_BD"] = self.captions.of_images(torch.as_tensor(sample_indices) % self.num_images)
        return batch

    def samples(self, sample_indices: Indices | torch.Tensor) -> TokenBatch | LatentBatch:
        """What the store holds of such samples.

        Raises:
            IndexError: If a sample is out of range.
        """
        if self.manifest.latent_channels is None:
            return self.tokens(sample_indices)
        rows = self._rows(sample_indices)
        latents_BChw = torch.from_numpy(rows["latents"].astype(np.float32))
        return LatentBatch(latents_BChw, torch.from_numpy(rows["label"].astype(np.int64)))

    @cached_property
    def captions(self) -> StoredCaptions | None:
        """The images' captions; None where the store was made without.

        Raises:
            TokenStoreError: Their file is damaged, or has those of fewer images.
        """
        captions = StoredCaptions.read(self.directory)
        if captions is not None and len(captions.index_N) < self.num_images:
            raise TokenStoreError(
                f"{self.directory}: captions of {len(captions.index_N)} images, expected {self.num_images}; encode the "
                "store again"
            )
        return captions

    def labels(self) -> NDArray[np.int64]:
        """Of all samples, in order (num_samples,); tokens and latents are not read."""
        column: Any = (..., 0) if self.manifest.latent_channels is None else "label"
        parts = [
            rows[column][: self.num_images - shard.first_image]
            for rows, shard in zip(self._shards, self.manifest.shards, strict=True)
        ]
        return np.concatenate(parts).astype(np.int64)

    def _rows(self, sample_indices: Indices | torch.Tensor) -> NDArray[Any]:
        sample_B = np.asarray(sample_indices, dtype=np.int64)
        if sample_B.size and (sample_B.min() < 0 or sample_B.max() >= self.num_samples):
            raise IndexError(f"{self.directory}: samples are 0 … {self.num_samples - 1}")
        view_B, image_B = np.divmod(sample_B, self.num_images)
        shard_B, row_B = np.divmod(image_B, self.manifest.shard_images)
        shard_B += view_B * self.manifest.shards_per_view
        rows = self.manifest.row_type.rows(sample_B.size)
        if sample_B.size and (shard_B == shard_B[0]).all():
            np.take(self._shards[shard_B[0]], row_B, axis=0, out=rows, mode="clip")
        else:
            for position, (shard, row) in enumerate(zip(shard_B.tolist(), row_B.tolist(), strict=True)):
                rows[position] = self._shards[shard][row]
        return rows

    def batches(self, batch_size: int) -> Iterator[TokenBatch | LatentBatch]:
        """All samples in order, the last batch as small as it comes."""
        for first in range(0, self.num_samples, batch_size):
            yield self.samples(np.arange(first, min(first + batch_size, self.num_samples)))


def unigram_entropy(store: TokenStore) -> float:
    """Entropy of the marginal distribution of the tokens at each position, nats a token; the mean over all positions.

    No model that ignores labels and other tokens can have a lower loss on these samples.
    """
    length, vocab_size = store.tokens_per_image, store.vocab_size
    counts = np.zeros(length * vocab_size, dtype=np.int64)
    offset_L = np.arange(length, dtype=np.int64) * vocab_size
    rows_at_once = max(1, 2**24 // length)  # 128 MiB of 64-bit numbers
    for batch in store.batches(rows_at_once):
        assert isinstance(batch, TokenBatch)
        counts += np.bincount((batch.tokens_BL.numpy() + offset_L).ravel(), minlength=counts.size)
    shares_LV = counts.reshape(length, vocab_size) / store.num_samples
    logarithms_LV = np.log(shares_LV, out=np.zeros_like(shares_LV), where=shares_LV > 0)
    return float(torch.from_numpy(-(shares_LV * logarithms_LV).sum(axis=1)).mean())


def unigram_bit_entropy(store: TokenStore, bits: int) -> float:
    """Entropy of each bit at each position by itself, summed over a token's bits, nats; the mean over all positions.

    What `unigram_entropy` is for models that predict tokens, this is for those that predict each bit by itself.
    """
    set_Ld = torch.zeros(store.tokens_per_image, bits, dtype=torch.int64)
    for batch in store.batches(max(1, 2**24 // (store.tokens_per_image * bits))):
        assert isinstance(batch, TokenBatch)
        set_Ld += bits_of(batch.tokens_BL, bits).sum(0)
    return float(bit_entropy(set_Ld.double() / store.num_samples).sum(1).mean())


@dataclass(frozen=True)
class ChannelStatistics:
    """Of each channel of the latents."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    """Standard deviation; 1 where a channel always has the same value."""


def channel_statistics(store: TokenStore) -> ChannelStatistics:
    """Over all samples and places of a store of latents, in double precision."""
    channels, side = store.manifest.latent_channels or 0, store.patch_nums[-1]
    sums_2c = torch.zeros(2, channels, dtype=torch.float64)
    for batch in store.batches(max(1, 2**22 // (channels * side**2))):
        assert isinstance(batch, LatentBatch)
        latents_BChw = batch.latents_BChw.double()
        sums_2c += torch.stack((latents_BChw.sum((0, 2, 3)), latents_BChw.square().sum((0, 2, 3))))
    mean_c, square_c = sums_2c / (store.num_samples * side**2)
    deviation_c = (square_c - mean_c.square()).clamp_min(0).sqrt()
    constant_c = deviation_c <= 1e-6 * mean_c.abs()  # to rounding
    return ChannelStatistics(tuple(mean_c.tolist()), tuple(deviation_c.masked_fill(constant_c, 1.0).tolist()))


def _restricted(directory: Path, manifest: Manifest, num_images: int, views: int) -> Manifest:
    """The manifest of the first images and views; raises `TokenStoreError` where the store has fewer."""
    path, held = directory / MANIFEST, manifest.num_images
    if num_images > held or views > manifest.views:
        needed = f"needed {num_images} × {views}; encode it again to extend it"
        raise TokenStoreError(f"{path}: {held} images × {manifest.views} views, {needed}")
    if num_images < held and not manifest.procedural:
        raise TokenStoreError(f"{path}: num_images: {held}, expected {num_images}")
    shards = tuple(shard for shard in manifest.shards if shard.view < views and shard.first_image < num_images)
    return manifest.model_copy(update={"num_images": num_images, "views": views, "shards": shards})


def _allow_open_files(count: int) -> None:
    """Raise this process's limit, often 1,024, as far as the system lets it: each mapped shard is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and 2 * count > soft:
        wanted = soft + 2 * count
        allowed = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def _map_shard(directory: Path, manifest: Manifest, number: int) -> NDArray[Any]:
    shard = manifest.shards[number]
    place = f"{directory / shard.file}: shards[{number}]"
    try:
        rows = np.load(directory / shard.file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        too_many = isinstance(error, OSError) and error.errno == errno.EMFILE
        more_files = f"let a process open {len(manifest.shards)} files more (ulimit -n)"
        advice = more_files if too_many else "encode the store again"
        raise TokenStoreError(f"{place}: not readable ({error}); {advice}") from None
    expected = (shard.images, *manifest.row_type.shape)
    if rows.shape != expected or rows.dtype != manifest.row_type.dtype:
        raise TokenStoreError(f"{place}: {rows.dtype} {rows.shape}, expected {manifest.row_type.dtype} {expected}")
    return np.asarray(rows)  # a plain array over the mapped file: indexing it is much faster than a memmap's
