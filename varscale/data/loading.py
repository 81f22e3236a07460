"""Batches for training and evaluation: what a step takes is a pure function of (seed, step).

So an interrupted run, a branch and any split over processes see the same samples. Every image is taken once before any
is taken again. The iterables yield dictionaries of tensors; Lightning's trainer takes them as they are, and so does
`DataLoader(batch_size=None)` with any number of workers.

Letters: B batch (of this rank), L tokens of an image over all scales.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from varscale.data.sources.base import ImageSource, Labels, Pixels
from varscale.data.tokens.store import TokenStore
from varscale.data.transforms import to_model_range
from varscale.numerics.randomness import Order, epoch_order, sample_indices

Batch = dict[str, torch.Tensor]
Item = TypeVar("Item")
Result = TypeVar("Result")

ORDER_WINDOW = 4096
"""Procedural images are taken window by window, shuffled within: so the order stays the same when the source grows."""


class Take(NamedTuple):
    """What a step takes, on all ranks together."""

    image_B: NDArray[np.int64]
    """Index of each image."""
    epoch_B: NDArray[np.int64]
    """How often each image was taken before."""
    sample_index_B: NDArray[np.int64]
    """Place of each sample in the whole run, step · batch_size + place in the batch: names its random numbers."""


def take(
    seed: int, step: int, batch_size: int, num_images: int, *, procedural: bool, order: Order = epoch_order
) -> Take:
    """What step `step` takes: each image once an epoch, in an order that depends on (seed, epoch).

    Procedural images come window by window of `ORDER_WINDOW`, so that a run takes the same images from a larger source
    (sizes: `whole_windows`); the last, incomplete window of a larger source is not used.
    """
    window = min(num_images, ORDER_WINDOW) if procedural else num_images
    sample_index_B = step * batch_size + np.arange(batch_size, dtype=np.int64)
    within_B = np.asarray(sample_indices(seed, step, batch_size, window, order), dtype=np.int64)
    epoch_B, window_B = np.divmod(sample_index_B // window, num_images // window)
    return Take(window_B * window + within_B, epoch_B, sample_index_B)


def whole_windows(num_images: int) -> int:
    """The size of a procedural source that holds num_images: a whole number of windows."""
    return -(-num_images // ORDER_WINDOW) * ORDER_WINDOW


@dataclass(kw_only=True, eq=False)
class _Steps(IterableDataset[Batch]):
    """Steps start_step … start_step + num_steps - 1 of a run, this rank's share of each."""

    seed: int
    """Seed of the order."""
    batch_size: int
    """Samples a step, over all ranks."""
    start_step: int
    """First step, counted from the start of the run."""
    num_steps: int
    """Number of steps."""
    rank: int = 0
    """This process."""
    world_size: int = 1
    """Number of processes, a divisor of batch_size."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank: {self.rank} is outside 0 … {self.world_size - 1}")
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise ValueError(f"batch_size: {self.batch_size} does not split evenly over {self.world_size} processes")

    def __len__(self) -> int:
        return self.num_steps

    def _my_steps(self) -> range:
        return _of_this_worker(range(self.start_step, self.start_step + self.num_steps))

    def _take(self, step: int, num_images: int, procedural: bool, order: Order = epoch_order) -> Take:
        whole = take(self.seed, step, self.batch_size, num_images, procedural=procedural, order=order)
        return Take(*(np.split(part, self.world_size)[self.rank] for part in whole))


@dataclass(eq=False)
class StepBatches(_Steps):
    """Training batches of a store's samples, with their `sample_index_B`, int64 (place in the whole run).

    Epoch e takes view e modulo the store's views, so no view of an image is taken twice before every image was.
    """

    store: TokenStore
    """The tokens, or latents."""

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batch, self._my_steps())

    def batch(self, step: int) -> Batch:
        """This rank's share of one step."""
        store = self.store
        taken = self._take(step, store.num_images, store.manifest.procedural)
        samples = store.batch(taken.epoch_B % store.views * store.num_images + taken.image_B)
        return {**samples, "sample_index_B": torch.from_numpy(taken.sample_index_B)}


@dataclass(eq=False)
class ImageBatches(_Steps):
    """Training batches of images: `images_B3HW` float32 in [-1, 1], `labels_B` and `sample_index_B` int64.

    Epoch e takes view e of each image.
    """

    source: ImageSource
    """The images."""
    workers: int = field(default=1, kw_only=True)
    """Threads that load images while the trainer works; 0 loads when asked."""

    def __iter__(self) -> Iterator[Batch]:
        # an epoch's order is worked out here, once, and what waits are bytes, a quarter of the numbers made of them
        order = functools.lru_cache(maxsize=2)(self.source.order)
        takes = (self._take_images(step, order) for step in self._my_steps())
        return itertools.starmap(_image_batch, load_ahead(self._load, takes, self.workers))

    def batch(self, step: int) -> Batch:
        """This rank's share of one step."""
        return _image_batch(*self._load(self._take_images(step, self.source.order)))

    def _take_images(self, step: int, order: Order) -> Take:
        return self._take(step, len(self.source), self.source.procedural, order)

    def _load(self, taken: Take) -> tuple[Take, Pixels, Labels]:
        return taken, *self.source.load_batch(taken.image_B, taken.epoch_B)


class EvaluationBatches(IterableDataset[Batch]):
    """Every sample of a store exactly once, in order, with its `sample_index_B`, split over the ranks.

    The ranks' shares, and the last batch, can be smaller than the others.
    """

    def __init__(self, store: TokenStore, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        first, self._stop = (part * store.num_samples // world_size for part in (rank, rank + 1))
        self.store, self._starts = store, range(first, self._stop, batch_size)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Batch]:
        for start in _of_this_worker(self._starts):
            sample_B = torch.arange(start, min(start + self._starts.step, self._stop))
            yield {**self.store.batch(sample_B), "sample_index_B": sample_B}


def load_ahead(load: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result]:
    """`map(load, items)` in order, where `workers` threads load the next items meanwhile; 0 loads when asked."""
    if workers == 0:
        yield from map(load, items)
        return
    left = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="load") as pool:
        waiting: deque[Future[Result]] = deque(pool.submit(load, item) for item in islice(left, workers + 1))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(load, item) for item in islice(left, 1))
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _of_this_worker(steps: range) -> range:
    """All steps, or those of this DataLoader worker: it asks its workers in turn, so the order is kept."""
    worker = get_worker_info()
    return steps if worker is None else steps[worker.id :: worker.num_workers]


def _image_batch(taken: Take, pixels_B3ss: Pixels, labels_B: Labels) -> Batch:
    return {
        "images_B3HW": to_model_range(pixels_B3ss),
        "labels_B": torch.from_numpy(labels_B),
        "sample_index_B": torch.from_numpy(taken.sample_index_B),
    }
