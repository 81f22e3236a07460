import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from tiny_store import store_of_rings
from torch.utils.data import DataLoader

from varscale.data.loading import (
    ORDER_WINDOW,
    EvaluationBatches,
    ImageBatches,
    StepBatches,
    load_ahead,
    take,
    whole_windows,
)
from varscale.data.sources.rings.source import RingsSource
from varscale.numerics.randomness import permutation


class Views:
    """A source whose pixels say which image and view they are."""

    name, image_size, num_classes, procedural, varies, fingerprint = "views", 8, 100, False, True, "views"
    class_names = ()

    def __init__(self, count):
        self.count = count
        self.undecodable = {}
        self.order = permutation

    def __len__(self):
        return self.count

    def load_batch(self, indices, views):
        values = np.asarray(indices) * 8 + np.asarray(views)
        pixels = np.broadcast_to(values[:, None, None, None], (len(values), 3, 8, 8))
        return pixels.astype(np.uint8), np.asarray(indices, dtype=np.int64)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of_rings(tmp_path_factory.mktemp("store"), 48)


def steps(**changes):
    return {"seed": 3, "batch_size": 8, "start_step": 0, "num_steps": 6} | changes


def same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], atol=0, rtol=0)


def test_an_epoch_takes_every_image_once():
    for epoch in range(3):
        # 20 images, batches of 8: epochs begin in the middle of a batch
        taken = [take(1, step, 8, 20, procedural=False) for step in range(8)]
        images = np.concatenate([part.image_B for part in taken])
        epochs = np.concatenate([part.epoch_B for part in taken])
        np.testing.assert_array_equal(np.sort(images[epochs == epoch]), np.arange(20))
        samples = np.concatenate([part.sample_index_B for part in taken])
        np.testing.assert_array_equal(samples, np.arange(64))


def test_seeds_and_epochs_are_ordered_differently():
    orders = {take(seed, step, 20, 20, procedural=False).image_B.tobytes() for seed in range(3) for step in range(3)}
    assert len(orders) == 9


def test_procedural_order_does_not_depend_on_the_number_of_images():
    for step in (0, 3, 31):
        few, many = (take(5, step, 256, windows * ORDER_WINDOW, procedural=True) for windows in (2, 7))
        np.testing.assert_array_equal(few.image_B, many.image_B)
        assert (few.epoch_B == 0).all()
    images = [take(5, step, 256, 2 * ORDER_WINDOW, procedural=True) for step in range(64)]
    counts = Counter(np.concatenate([part.image_B for part in images]).tolist())
    assert len(counts) == 2 * ORDER_WINDOW
    assert set(counts.values()) == {2}
    assert {int(part.epoch_B[0]) for part in images} == {0, 1}
    assert whole_windows(1) == whole_windows(ORDER_WINDOW) == ORDER_WINDOW
    assert whole_windows(ORDER_WINDOW + 1) == 2 * ORDER_WINDOW


def test_steps_are_stateless(store):
    whole = list(StepBatches(store, **steps(num_steps=12)))
    resumed = list(StepBatches(store, **steps(start_step=5, num_steps=7)))
    for left, right in zip(whole[5:], resumed, strict=True):
        same(left, right)
    assert len(StepBatches(store, **steps())) == 6
    labels = torch.cat([batch["labels_B"] for batch in whole[:6]])
    expected = store.tokens(range(48)).labels_B
    assert Counter(labels.tolist()) == Counter(expected.tolist())


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_step(store, world_size):
    for step, whole in enumerate(StepBatches(store, **steps())):
        shares = [
            StepBatches(store, **steps(), rank=rank, world_size=world_size).batch(step) for rank in range(world_size)
        ]
        same(whole, {key: torch.cat([share[key] for share in shares]) for key in whole})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_keeps_the_order(store, workers):
    batches = StepBatches(store, **steps())
    loaded = DataLoader(
        batches, batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None
    )
    for left, right in zip(loaded, batches, strict=True):
        same(left, right)


def test_epochs_take_the_next_view(tmp_path):
    def first_pixel(images):
        return [((images[:, 0, :1, 0] + 1) * 127.5).round().long()]

    store = store_of_rings(tmp_path, source=Views(24), views=2, encode=first_pixel, patch_nums=(1,), vocab_size=256)
    batches = list(StepBatches(store, **steps(num_steps=12)))
    values = torch.cat([batch["tokens_BL"][:, 0] for batch in batches])
    for epoch in range(4):
        views = values[epoch * 24 : (epoch + 1) * 24] % 8
        assert (views == epoch % 2).all()
        images = values[epoch * 24 : (epoch + 1) * 24] // 8
        assert sorted(images.tolist()) == list(range(24))


@pytest.mark.parametrize("workers", [0, 3])
def test_image_batches(workers):
    source = Views(24)
    batches = list(ImageBatches(source, **steps(num_steps=9), workers=workers))
    for step, batch in enumerate(batches):
        taken = take(3, step, 8, 24, procedural=False)
        values = ((batch["images_B3HW"][:, 0, 0, 0] + 1) * 127.5).round().long().numpy()
        np.testing.assert_array_equal(values, taken.image_B * 8 + step // 3)
        np.testing.assert_array_equal(batch["labels_B"].numpy(), taken.image_B)
        np.testing.assert_array_equal(batch["sample_index_B"].numpy(), taken.sample_index_B)
    assert batches[0]["images_B3HW"].dtype == torch.float32
    halves = [ImageBatches(source, **steps(), rank=rank, world_size=2).batch(4) for rank in range(2)]
    same(batches[4], {key: torch.cat([half[key] for half in halves]) for key in halves[0]})


def test_image_batches_of_rings_and_their_tokens_agree(store):
    images = ImageBatches(RingsSource(48, 8), **steps()).batch(2)
    tokens = StepBatches(store, **steps()).batch(2)
    torch.testing.assert_close(images["labels_B"], tokens["labels_B"])
    torch.testing.assert_close(images["sample_index_B"], tokens["sample_index_B"])


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_takes_every_sample_once(store, world_size):
    parts = [EvaluationBatches(store, batch_size=7, rank=rank, world_size=world_size) for rank in range(world_size)]
    samples = [batch["sample_index_B"] for part in parts for batch in part]
    assert torch.cat(samples).tolist() == list(range(48))
    assert [len(part) for part in parts] == [len(list(part)) for part in parts]
    loaded = DataLoader(parts[0], batch_size=None, num_workers=2, multiprocessing_context="fork")
    for left, right in zip(loaded, parts[0], strict=True):
        same(left, right)


def test_bad_splits_are_named(store):
    with pytest.raises(ValueError, match="batch_size: 8 does not split evenly over 3 processes"):
        StepBatches(store, **steps(), world_size=3)
    with pytest.raises(ValueError, match="rank: 2 is outside 0 … 1"):
        StepBatches(store, **steps(), rank=2, world_size=2)


def test_load_ahead_keeps_order_runs_ahead_and_passes_errors_on():
    started = []

    def load(item):
        started.append((item, threading.current_thread() is threading.main_thread()))
        time.sleep(0.01 * (item % 3))
        if item == 9:
            raise OSError("disk gone")
        return item * 2

    results = load_ahead(load, range(20), workers=3)
    assert next(results) == 0
    time.sleep(0.1)
    assert len(started) == 5  # one taken, four waiting
    assert not any(in_main for _, in_main in started)
    assert [next(results) for _ in range(8)] == [2, 4, 6, 8, 10, 12, 14, 16]
    with pytest.raises(OSError, match="disk gone"):
        next(results)
    assert len(started) < 20


def test_load_ahead_stops_when_no_longer_asked():
    started = []
    results = load_ahead(lambda item: started.append(item), range(1000), workers=2)
    next(results)
    results.close()
    count = len(started)
    time.sleep(0.05)
    assert len(started) == count < 10
