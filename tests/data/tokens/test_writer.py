import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from tiny_store import BAD_MANIFESTS, PATCH_NUMS, brightness_encoder, spoil_manifest, store_of_rings

from varscale.data.sources.folder.source import FolderSource
from varscale.data.sources.rings.source import RingsSource
from varscale.data.tokens import writer as token_writer
from varscale.data.tokens.manifest import LOCK, MANIFEST, PROGRESS
from varscale.data.tokens.store import TokenStore
from varscale.data.transforms import Crop, to_model_range
from varscale.errors import DataError, TokenStoreError

FORK = multiprocessing.get_context("fork")


class CountingEncoder:
    """The tiny encoder, counting its calls; `before` is called with that count."""

    def __init__(self, before=None):
        self.calls = 0
        self.before = before

    def __call__(self, images):
        self.calls += 1
        if self.before:
            self.before(self.calls)
        return brightness_encoder(images)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != LOCK}


def in_child(function, *arguments):
    """Run in a forked process; returns its exit code, negative for a signal."""

    def run():
        torch.set_num_threads(1)  # OpenMP's threads don't survive a fork
        function(*arguments)

    child = FORK.Process(target=run)
    child.start()
    child.join(60)
    return child.exitcode


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    store_of_rings(folder)
    return contents(folder)


def folder_source(root, count=10, **changes):
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for number in range(count // 2):
            pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return FolderSource(root, Crop(8, 1.125), **changes)


def test_progress_and_a_second_call_encodes_nothing(tmp_path):
    seen = []
    store_of_rings(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 50) for done in (8, 16, 24, 32, 40, 48, 50)]
    assert sorted(contents(tmp_path)) == [
        MANIFEST,
        *(f"view-000-shard-{n:06d}-images-{count}.npy" for n, count in enumerate((16, 16, 16, 2))),
    ]
    encoder = CountingEncoder()
    store_of_rings(tmp_path, encode=encoder)
    assert encoder.calls == 0


def test_loading_threads_change_nothing(tmp_path, uninterrupted):
    store_of_rings(tmp_path, workers=3)
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("killed_at", [1, 3, 4, 7])
def test_killed_while_encoding(tmp_path, uninterrupted, killed_at):
    encoder = CountingEncoder(lambda calls: kill_self() if calls == killed_at else None)
    assert in_child(lambda: store_of_rings(tmp_path, encode=encoder)) == -signal.SIGKILL
    with pytest.raises(TokenStoreError, match=r"manifest\.json is missing"):
        TokenStore.open(tmp_path)
    resumed = CountingEncoder()
    store_of_rings(tmp_path, encode=resumed)
    assert resumed.calls == 7 - (killed_at - 1) // 2 * 2  # two batches a shard
    assert contents(tmp_path) == uninterrupted


def test_a_shard_damaged_after_a_kill_is_made_anew(tmp_path, uninterrupted):
    encoder = CountingEncoder(lambda calls: kill_self() if calls == 5 else None)
    assert in_child(lambda: store_of_rings(tmp_path, encode=encoder)) == -signal.SIGKILL
    first = next(tmp_path.glob("view-000-shard-000000-*.npy"))
    first.write_bytes(first.read_bytes()[:-5])
    store_of_rings(tmp_path)
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("step", ["before", "half", "after"])
@pytest.mark.parametrize("killed_at", range(9))  # four shards, each with a progress file, then the manifest
def test_killed_while_writing(tmp_path, uninterrupted, step, killed_at):
    real, writes = token_writer.write_atomically, []

    def write(path, content):
        if len(writes) == killed_at:
            if step == "half":
                (path.parent / f".{path.name}.abc").write_bytes(content[: len(content) // 2])
            if step == "after":
                real(path, content)
            kill_self()
        writes.append(path)
        real(path, content)

    def work():
        token_writer.write_atomically = write
        token_writer.write_json.__globals__["write_atomically"] = write
        store_of_rings(tmp_path)

    assert in_child(work) == -signal.SIGKILL
    store_of_rings(tmp_path)
    left = {name: content for name, content in contents(tmp_path).items() if name in uninterrupted}
    assert left == uninterrupted
    harmless = {PROGRESS, f".{PROGRESS}.abc", f".{MANIFEST}.abc"}
    assert set(contents(tmp_path)) - set(left) <= harmless


def test_two_writers_encode_once(tmp_path):
    log = tmp_path / "calls"
    log.mkdir()

    def before(calls):
        (log / f"{os.getpid()}-{calls}").touch()
        time.sleep(0.03)

    def work():
        torch.set_num_threads(1)
        store = store_of_rings(tmp_path / "store", encode=CountingEncoder(before))
        os._exit(0 if len(store) == 50 else 1)

    writers = [FORK.Process(target=work) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    with FileLock(tmp_path / "store" / LOCK, timeout=0):  # released
        assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(list(log.iterdir())) == 7


def test_another_writer_is_waited_for(tmp_path, caplog):
    lock = FileLock(tmp_path / LOCK)
    lock.acquire()
    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.WARNING):
        store = pool.submit(store_of_rings, tmp_path)
        until = time.monotonic() + 60
        while "another process is encoding this token store; waiting for it" not in caplog.text:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert not store.done()
        lock.release()
        assert len(store.result(60)) == 50


def test_disk_full_while_writing(tmp_path, uninterrupted):
    message = tmp_path / "message"

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (800, 800))  # the shard of 18 images has 920 bytes
        try:
            store_of_rings(tmp_path / "store", 18, shard_images=32)
        except TokenStoreError as error:
            message.write_text(str(error))

    store_of_rings(tmp_path / "store", 16, shard_images=32)
    before = contents(tmp_path / "store")
    assert in_child(work) == 0
    assert "no space left for the token store (File too large); finished shards are kept" in message.read_text()
    assert contents(tmp_path / "store") == before
    assert len(store_of_rings(tmp_path / "store", 18, shard_images=32)) == 18


def test_disk_too_small_is_said_before_starting(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    encoder = CountingEncoder()
    with pytest.raises(TokenStoreError, match=r"needs 1 MB more, the disk has 0 MB free"):
        store_of_rings(tmp_path, encode=encoder)
    assert encoder.calls == 0


def test_growing_gives_the_same_bytes_as_starting_large(tmp_path, uninterrupted):
    store_of_rings(tmp_path, 20)
    small = TokenStore.open(tmp_path)
    before = small.tokens(range(20)).tokens_BL
    encoder = CountingEncoder()
    store_of_rings(tmp_path, 50, encode=encoder)
    assert encoder.calls == 5  # the first shard of 16 is kept, the one of 4 is replaced
    assert contents(tmp_path) == uninterrupted
    torch.testing.assert_close(small.tokens(range(20)).tokens_BL, before)  # an open reader is not disturbed

    assert len(store_of_rings(tmp_path, 20)) == 20  # asked for fewer: nothing is lost
    assert contents(tmp_path) == uninterrupted


def test_growth_interrupted_keeps_the_old_store(tmp_path, uninterrupted):
    store_of_rings(tmp_path, 20)
    encoder = CountingEncoder(lambda calls: kill_self() if calls == 4 else None)
    assert in_child(lambda: store_of_rings(tmp_path, 50, encode=encoder)) == -signal.SIGKILL
    assert len(TokenStore.open(tmp_path)) == 20
    store_of_rings(tmp_path, 50)
    assert contents(tmp_path) == uninterrupted


def test_damaged_and_missing_shards_are_made_anew(tmp_path, uninterrupted):
    first, _, third, _ = (tmp_path / shard.file for shard in store_of_rings(tmp_path).manifest.shards)
    first.unlink()
    third.write_bytes(third.read_bytes()[:-1] + b"x")
    with pytest.raises(TokenStoreError, match=r"shards\[0\] is missing; encode the store again"):
        TokenStore.open(tmp_path)
    encoder = CountingEncoder()
    store_of_rings(tmp_path, encode=encoder)
    assert encoder.calls == 4
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("name", BAD_MANIFESTS)
@pytest.mark.parametrize("file", [MANIFEST, PROGRESS])
def test_a_damaged_manifest_is_named_and_its_store_made_anew(tmp_path, uninterrupted, caplog, file, name):
    store_of_rings(tmp_path)
    if file == PROGRESS:
        (tmp_path / MANIFEST).rename(tmp_path / PROGRESS)
    spoil_manifest(tmp_path / file, name)
    encoder = CountingEncoder()
    store_of_rings(tmp_path, encode=encoder)
    assert contents(tmp_path) == uninterrupted
    finished_or_not = ("shards []", "num_images 1000")  # a progress file doesn't list all shards
    if file == MANIFEST or not name.startswith(finished_or_not):
        assert encoder.calls == 7
        (warning,) = caplog.messages
        assert warning.startswith(f"all shards are made anew: {tmp_path / file}: damaged (")


@pytest.mark.parametrize("file", [MANIFEST, PROGRESS])
@pytest.mark.parametrize("name", ["absolute", "../victim.npy", "inside/victim.npy", "./inside.npy", ".", "", "a\0b"])
def test_files_that_a_hostile_manifest_names_are_left_alone(tmp_path, uninterrupted, file, name):
    """A shard that didn't fit its checksum used to be deleted, wherever its name pointed to."""
    folder = tmp_path / "store"
    (folder / "inside").mkdir(parents=True)
    victims = [tmp_path / "victim.npy", folder / "inside" / "victim.npy", folder / "inside.npy"]
    for victim in victims:
        victim.write_bytes(b"precious")
    store_of_rings(folder)
    if file == PROGRESS:
        (folder / MANIFEST).rename(folder / PROGRESS)
    content = json.loads((folder / file).read_text())
    content["shards"][1]["file"] = str(victims[0]) if name == "absolute" else name
    (folder / file).write_text(json.dumps(content))
    if file == MANIFEST:
        with pytest.raises(TokenStoreError, match=rf"{MANIFEST}: damaged \(shards\[1\]\.file: .*, expected 'view-000"):
            TokenStore.open(folder)
    store_of_rings(folder)
    assert [victim.read_bytes() for victim in victims] == [b"precious"] * 3
    assert (folder / MANIFEST).read_bytes() == uninterrupted[MANIFEST]


def test_views_come_view_by_view(tmp_path):
    source = folder_source(tmp_path / "images")
    encoder = CountingEncoder()
    store = store_of_rings(tmp_path / "store", source=source, views=2)
    for view in range(2):
        for image in range(10):
            pixels, label = source.load(image, view)
            tokens_BL, labels_B = store.tokens([view * 10 + image])
            expected = torch.cat(brightness_encoder(to_model_range(pixels[None])), dim=1)
            torch.testing.assert_close(tokens_BL, expected, atol=0, rtol=0)
            assert labels_B.item() == label
    three = store_of_rings(tmp_path / "store", source=source, views=3, encode=encoder)
    assert (three.views, encoder.calls) == (3, 2)
    assert store_of_rings(tmp_path / "store", source=source, views=2).views == 2


def test_views_that_cannot_differ_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"views: 2, but all views of rings .* are the same"):
        store_of_rings(tmp_path, views=2)


def test_undecodable_images_survive_an_interruption(tmp_path):
    images = tmp_path / "images"
    source = folder_source(images, 40, max_undecodable=2)
    strict = FolderSource(images, Crop(8), max_undecodable=1)
    for name in ("0", "19"):  # after they were looked at
        (images / "a" / f"{name}.png").write_bytes(b"")
    encoder = CountingEncoder(lambda calls: kill_self() if calls == 3 else None)
    assert in_child(lambda: store_of_rings(tmp_path / "store", source=source, encode=encoder)) == -signal.SIGKILL
    store = store_of_rings(tmp_path / "store", source=source)
    assert set(store.manifest.undecodable) == {str(images / "a" / f"{name}.png") for name in ("0", "19")}

    with pytest.raises(DataError, match="2 images do not decode, max_undecodable is 1"):
        store_of_rings(tmp_path / "other", source=strict)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_fingerprint": "tokenizer-b"}, "tokenizer_fingerprint: tokenizer-a, expected tokenizer-b"),
        ({"vocab_size": 512}, "vocab_size: 500, expected 512"),
        ({"patch_nums": (1, 4)}, "patch_nums: 1,2,4, expected 1,4"),
        ({"source": RingsSource(50, 8, seed=1)}, r"data_fingerprint: \w+, expected \w+"),
    ],
)
def test_the_folder_of_another_store_is_refused(tmp_path, changes, message):
    store_of_rings(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(TokenStoreError, match=rf"{tmp_path}/{MANIFEST}: {message}; it is another token store"):
        store_of_rings(tmp_path, **changes)
    assert contents(tmp_path) == before


def test_encoders_of_other_shapes_or_vocabularies_are_refused(tmp_path):
    with pytest.raises(TokenStoreError, match=r"shapes \[\(8, 1\), .*patch_nums ask for \[\(8, 1\), \(8, 9\)\]"):
        store_of_rings(tmp_path / "a", patch_nums=(1, 3))
    with pytest.raises(TokenStoreError, match=r"tokens go from 500 to 500; vocab_size 500 asks for 0 … 499"):
        store_of_rings(tmp_path / "b", encode=lambda x: [torch.full((len(x), p * p), 500) for p in PATCH_NUMS])


def test_shards_are_whole_batches(tmp_path):
    with pytest.raises(ValueError, match="shard_images: 16 is not a multiple of batch_size 5"):
        store_of_rings(tmp_path, batch_size=5)


def test_the_encoder_sees_images_in_model_range_without_gradients(tmp_path):
    seen = []

    def encode(images):
        seen.append((images.shape, images.dtype, float(images.min()), float(images.max()), torch.is_grad_enabled()))
        return brightness_encoder(images)

    store_of_rings(Path(tmp_path), 4, encode=encode)
    shape, dtype, low, high, gradients = seen[0]
    assert (shape, dtype, gradients) == ((8, 3, 8, 8), torch.float32, False)  # filled up to the whole batch
    assert -1 <= low < -0.5
    assert 0 < high <= 1
