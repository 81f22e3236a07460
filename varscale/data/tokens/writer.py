"""Encoding a token store: shard by shard, each finished one kept whatever happens next.

Letters: B batch, s side of an image in pixels, p side of a scale's token map, c channels, h and w height and width of
latents.
"""

import errno
import io
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from varscale.config.tokenizer import SHARD_IMAGES
from varscale.data.loading import load_ahead
from varscale.data.sources.base import ImageSource, Labels, Pixels
from varscale.data.tokens import manifest as manifests
from varscale.data.tokens.manifest import MANIFEST, PROGRESS, Manifest, Shard, ShardRows
from varscale.data.tokens.store import TokenStore
from varscale.data.transforms import to_model_range
from varscale.errors import TokenStoreError
from varscale.store.atomic import write_atomically, write_json

Encode = Callable[[torch.Tensor], Sequence[torch.Tensor]]
"""Images float32 (B, 3, s, s) in [-1, 1], on the CPU, to one int64 (B, p²) a scale, or to latents (B, c, h, w)."""

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_HEADER_BYTES = 128  # of a NumPy file
_SPARE_BYTES = 2**20  # manifest, progress file and what the file system adds
_log = logging.getLogger(__name__)


def encode_store(
    directory: str | Path,
    source: ImageSource,
    encode: Encode,
    *,
    patch_nums: Sequence[int],
    vocab_size: int,
    tokenizer_fingerprint: str,
    latent_channels: int | None = None,
    views: int = 1,
    shard_images: int = SHARD_IMAGES,
    batch_size: int = 256,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """Encode every view of every image of a source once, and open the result.

    Goes on where an interrupted call stopped, at the first unfinished shard; a finished store is opened as it is, and
    extended when it has fewer images (procedural sources) or views than asked for; damaged shards are made anew, and so
    is a store whose manifest is damaged, with a warning.
    Shards are the same, to the byte, however often the work was interrupted and whether the store grew: every batch has
    `batch_size` rows, the last of a shard filled up by repeating its last image.

    Args:
        directory: The store's folder, one for a tokenizer, a data set and a split.
        source: The images.
        encode: The tokenizer's encoder; called without gradients.
        patch_nums: Side of each scale's token map.
        vocab_size: Tokens must be below it.
        tokenizer_fingerprint: Names the tokenizer.
        latent_channels: Channels of the latents, where these are stored; None: tokens are.
        views: Views of each image, more than 1 only where views differ.
        shard_images: Images of a shard, a multiple of batch_size.
        batch_size: Images encoded at once.
        workers: Threads that load images meanwhile; 0 loads between batches.
        progress: Called after every batch with the samples finished and in all, those of earlier calls included.

    Raises:
        TokenStoreError: If the folder holds another store, the disk is full, or the encoder's tokens are not as
            described.
        DataError: If too many images do not decode.
        ValueError: If an argument is out of its range.
    """
    directory = Path(directory)
    if shard_images % batch_size:
        raise ValueError(f"shard_images: {shard_images} is not a multiple of batch_size {batch_size}")
    if views < 1 or (views > 1 and not source.varies):
        raise ValueError(f"views: {views}, but all views of {source.name} are the same; expected 1")
    wanted = Manifest(
        schema=2,
        tokenizer_fingerprint=tokenizer_fingerprint,
        data_fingerprint=source.fingerprint,
        patch_nums=tuple(patch_nums),
        vocab_size=vocab_size,
        latent_channels=latent_channels,
        num_classes=source.num_classes,
        class_names=source.class_names,
        num_images=len(source),
        views=views,
        shard_images=shard_images,
        procedural=source.procedural,
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            _StoreWriter(directory, source, encode, wanted, batch_size, workers, progress).run()
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise TokenStoreError(
            f"{directory}: no space left for the token store ({error.strerror}); finished shards are kept, free some "
            "space and call again"
        ) from None
    return TokenStore.open(directory, tokenizer_fingerprint, num_images=len(source), views=views)


@dataclass
class _StoreWriter:
    """One call of `encode_store`, with the store locked."""

    directory: Path
    source: ImageSource
    encode: Encode
    wanted: Manifest
    batch_size: int
    workers: int
    progress: Callable[[int, int], None] | None
    finished: dict[str, Shard] = field(default_factory=dict, init=False)
    """By the names of their files."""
    done: int = field(default=0, init=False)
    """Samples of them."""

    def run(self) -> None:
        """Encode what is missing or damaged and write the manifest."""
        old = self._read(MANIFEST)
        for earlier in filter(None, (old, self._read(PROGRESS))):
            self._adopt(earlier)
        if old is not None and self._covers(old):
            return
        for leftover in self.directory.glob(".*.npy.*"):  # of a writer that was killed
            leftover.unlink()
        if old is not None:  # a finished store never shrinks
            num_images, views = max(self.wanted.num_images, old.num_images), max(self.wanted.views, old.views)
            self.wanted = self.wanted.model_copy(update={"num_images": num_images, "views": views})
        missing = [rows for rows in self.wanted.planned_shards() if rows.file not in self.finished]
        self._check_space(missing)
        self.done = self.wanted.num_images * self.wanted.views - sum(rows.images for rows in missing)
        with closing(load_ahead(self._load, self._batches(missing), self.workers)) as loaded:
            for rows in missing:
                self.finished[rows.file] = self._write_shard(rows, loaded)
                write_json(self.directory / PROGRESS, self._manifest().to_json())
        kept = self._manifest()
        write_json(self.directory / MANIFEST, kept.to_json())
        (self.directory / PROGRESS).unlink(missing_ok=True)
        names = {shard.file for shard in kept.shards}
        for file in self.directory.glob("view-*.npy"):
            if file.name not in names:  # the last, shorter shard of before the store grew
                file.unlink()

    def _read(self, name: str) -> Manifest | None:
        """The manifest or progress file, checked to be of the same store; None where it is absent or damaged."""
        path = self.directory / name
        try:
            found = manifests.read_manifest(path)
        except TokenStoreError as error:
            _log.warning("all shards are made anew: %s", error)
            return None
        if found is not None and (difference := found.difference_from(self.wanted)):
            raise TokenStoreError(f"{path}: {difference}; it is another token store, use or delete its folder")
        return found

    def _covers(self, manifest: Manifest) -> bool:
        """Whether a finished store holds all that is wanted."""
        return (
            manifest.num_images >= self.wanted.num_images
            and manifest.views >= self.wanted.views
            and all(shard.file in self.finished for shard in manifest.shards)
        )

    def _adopt(self, earlier: Manifest) -> None:
        """Keep the finished shards of an earlier call whose checksums are found right."""
        for number, shard in enumerate(earlier.shards):
            try:
                manifests.check_shard(self.directory, number, shard, contents=True)
            except TokenStoreError as error:
                _log.warning("a shard is made anew: %s", error)
            else:
                self.finished[shard.file] = shard
        self.source.undecodable.update(earlier.undecodable)

    def _check_space(self, missing: Sequence[ShardRows]) -> None:
        needed = sum(_HEADER_BYTES + rows.images * self.wanted.row_type.bytes for rows in missing) + _SPARE_BYTES
        free = shutil.disk_usage(self.directory).free
        if missing and needed > free:
            raise TokenStoreError(
                f"{self.directory}: the token store needs {needed / 1e6:,.0f} MB more, the disk has "
                f"{free / 1e6:,.0f} MB free; free some space or choose another folder"
            )

    def _batches(self, shards: Sequence[ShardRows]) -> Iterator[tuple[int, range]]:
        """View and images of every batch, shard after shard."""
        for rows in shards:
            images = range(rows.first_image, rows.first_image + rows.images)
            for start in range(0, rows.images, self.batch_size):
                yield rows.view, images[start : start + self.batch_size]

    def _load(self, batch: tuple[int, range]) -> tuple[Pixels, Labels]:
        view, images = batch
        return self.source.load_batch(images, [view] * len(images))

    def _write_shard(self, rows: ShardRows, loaded: Iterator[tuple[Pixels, Labels]]) -> Shard:
        numbers, holds_latents = self.wanted.row_type.rows(rows.images), self.wanted.latent_channels is not None
        for start in range(0, rows.images, self.batch_size):
            pixels_B3ss, labels_B = next(loaded)
            part = numbers[start : start + self.batch_size]
            encoded = self._encode_batch(pixels_B3ss)
            if holds_latents:
                part["label"], part["latents"] = labels_B, self._checked_latents(encoded)[: len(part)]
            else:
                part[:, 0], part[:, 1:] = labels_B, self._checked_tokens(encoded)[: len(part)]
            self.done += len(part)
            if self.progress is not None:
                self.progress(self.done, self.wanted.num_images * self.wanted.views)
        stream = io.BytesIO()
        np.save(stream, numbers, allow_pickle=False)
        content = stream.getvalue()
        write_atomically(self.directory / rows.file, content)
        return Shard(**rows._asdict(), bytes=len(content), blake2b=manifests.checksum(content))

    def _encode_batch(self, pixels_B3ss: Pixels) -> list[torch.Tensor]:
        """What the encoder gives for a batch, filled up."""
        missing = self.batch_size - len(pixels_B3ss)
        filled = np.concatenate([pixels_B3ss, np.repeat(pixels_B3ss[-1:], missing, axis=0)])
        with torch.no_grad():
            return [encoded.detach().cpu() for encoded in self.encode(to_model_range(filled))]

    def _checked_tokens(self, scales: Sequence[torch.Tensor]) -> NDArray[np.int64]:
        """Tokens (B, L)."""
        shapes = [tuple(tokens.shape) for tokens in scales]
        expected = [(self.batch_size, side * side) for side in self.wanted.patch_nums]
        if shapes != expected:
            raise TokenStoreError(f"the encoder's tokens have the shapes {shapes}; patch_nums ask for {expected}")
        tokens_BL = torch.cat(list(scales), dim=1).numpy().astype(np.int64)
        if tokens_BL.min() < 0 or tokens_BL.max() >= self.wanted.vocab_size:
            raise TokenStoreError(
                f"the encoder's tokens go from {tokens_BL.min()} to {tokens_BL.max()}; "
                f"vocab_size {self.wanted.vocab_size} asks for 0 … {self.wanted.vocab_size - 1}"
            )
        return tokens_BL

    def _checked_latents(self, encoded: Sequence[torch.Tensor]) -> NDArray[np.float16]:
        """Latents (B, c, h, w)."""
        expected = [(self.batch_size, *self.wanted.row_type.dtype["latents"].shape)]
        if (shapes := [tuple(latents.shape) for latents in encoded]) != expected:
            raise TokenStoreError(f"the encoder's latents have the shapes {shapes}, expected {expected}")
        if not encoded[0].half().isfinite().all():
            raise TokenStoreError(
                f"the encoder's latents are not all finite, or beyond ±{torch.finfo(torch.float16).max:g}; train "
                "another tokenizer"
            )
        return encoded[0].half().numpy()

    def _manifest(self) -> Manifest:
        """What is finished, in order."""
        planned = self.wanted.planned_shards()
        shards = tuple(self.finished[rows.file] for rows in planned if rows.file in self.finished)
        undecodable = dict(sorted(self.source.undecodable.items()))
        return self.wanted.model_copy(update={"undecodable": undecodable, "shards": shards})


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the store's lock, once another process lets go of it; the system releases it when its owner dies."""
    lock = FileLock(directory / manifests.LOCK)
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        _log.warning("%s: another process is encoding this token store; waiting for it", directory)
        held = lock.acquire()
    with held:
        yield
