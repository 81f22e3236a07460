"""Images in bulk: what is written, and that it is the same however it is drawn and interrupted."""

import os
import resource
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from requirements import shared_path
from small_models import make_tokenizer, make_var
from tiny_training import Killed, ignore, kill_at
from torch import Tensor

from varscale.data.sources.parquet.source import ParquetSource
from varscale.data.transforms import Crop
from varscale.errors import ExperimentError
from varscale.families.base import SamplingOptions
from varscale.families.storage import save_model
from varscale.generation import bulk
from varscale.generation.bulk import draw_collection, drawn_batches, labels_in_proportion, labels_in_turn
from varscale.generation.collection import Collection
from varscale.generation.from_files import Drawable
from varscale.generation.sampling import sample, sample_with
from varscale.tokenizer.storage import save_tokenizer

COUNT, BATCH = 23, 5
OPTIONS = SamplingOptions(guidance=2.0, top_p=0.95, seed=3)
OUTS = ("pictures", "images.npz", "images.parquet")


@pytest.fixture(scope="module")
def drawable(tmp_path_factory: pytest.TempPathFactory) -> Drawable:
    """Models whose tokens differ from image to image, read from files."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = make_tokenizer(vocab_size=16, base_channels=8, norm_groups=4)
    save_tokenizer(folder / "tokenizer.safetensors", tokenizer, "tokenizer0")
    var = make_var(vocab_size=16, adaln_gamma_init=1.0, init_std=0.3, head_init=1.0)
    save_model(folder / "model.safetensors", var, "model0")
    return Drawable.load(folder / "model.safetensors", folder / "tokenizer.safetensors")


@pytest.fixture(scope="module")
def expected(drawable: Drawable) -> Any:
    """All images drawn at once."""
    labels = [i % 5 for i in range(COUNT)]
    images = sample(drawable.model, drawable.tokenizer, torch.tensor(labels), 2.0, 0, 0.95, 3).images
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()


def draw_into(out: Path, drawable: Drawable, progress: Any = ignore, **changes: Any) -> None:
    options = SamplingOptions(**{"guidance": 2.0, "top_p": 0.95, "seed": 3, **changes})
    labels_N = labels_in_turn(range(5), COUNT)
    draw_collection(drawable, labels_N, options, Collection.at(str(out)), progress, batch_size=BATCH)


def read_back(out: Path) -> tuple[Any, list[int]]:
    """Images (N, H, W, 3) and labels, by other libraries than wrote them where there are any."""
    if out.suffix == ".npz":
        with np.load(out) as arrays:
            assert arrays.files == ["arr_0", "arr_1"]
            assert arrays["arr_1"].dtype == np.int64
            return arrays["arr_0"], arrays["arr_1"].tolist()
    if out.suffix == ".parquet":
        source = ParquetSource(out, Crop(6, resize_ratio=1.0, random=False), image_column="img")
        images, labels = source.load_batch(range(COUNT), [0] * COUNT)
        return images.transpose(0, 2, 3, 1), labels.tolist()
    rows = [row.split(",") for row in (out / "labels.csv").read_text().splitlines()]
    assert rows.pop(0) == ["file", "label"]
    assert [name for name, _ in rows] == sorted(path.name for path in out.glob("*.png"))
    return np.stack([np.asarray(Image.open(out / name)) for name, _ in rows]), [int(label) for _, label in rows]


@pytest.mark.parametrize("name", OUTS)
def test_every_image_and_label_is_written(name: str, drawable: Drawable, expected: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / name
    draw_into(out, drawable)
    images, labels = read_back(out)
    assert images.dtype == np.uint8
    assert labels == [i % 5 for i in range(COUNT)]
    assert np.abs(images.astype(int) - expected).max() <= 1  # rounding
    assert [path.name for path in out.parent.iterdir()] == [name]  # no parts are left
    assert len({image.tobytes() for image in images}) > COUNT / 2


def test_parquet_has_the_schema_of_hugging_face(drawable: Drawable, tmp_path: Path) -> None:
    draw_into(tmp_path / "images.parquet", drawable)
    theirs = pq.read_schema(shared_path("data/cifar10/test.parquet"))
    assert pq.read_schema(tmp_path / "images.parquet").equals(theirs.remove_metadata())


@pytest.mark.parametrize("name", OUTS)
@pytest.mark.parametrize("reached", [0, 10, COUNT])
def test_interrupted_and_resumed_is_the_same(name: str, reached: int, drawable: Drawable, tmp_path: Path) -> None:
    draw_into(tmp_path / "whole" / name, drawable)
    out = tmp_path / "resumed" / name
    with pytest.raises(Killed):
        draw_into(out, drawable, kill_at(reached))
    with pytest.raises(ExperimentError, match=r"was begun with guidance 2\.0, not 3\.0"):
        draw_into(out, drawable, guidance=3.0)
    reports: list[int] = []
    draw_into(out, drawable, lambda done, _: reports.append(done))
    assert reports[0] == reached
    whole, resumed = (read_back(tmp_path / kind / name) for kind in ("whole", "resumed"))
    assert np.array_equal(whole[0], resumed[0])
    assert whole[1] == resumed[1]
    if out.is_dir():  # a finished folder keeps its record
        draw_into(out, drawable, kill_at(10))
        with pytest.raises(ExperimentError, match="was begun with seed 3, not 4"):
            draw_into(out, drawable, seed=4)
    else:
        with pytest.raises(ExperimentError, match="there is such a file already"):
            draw_into(out, drawable)


@pytest.mark.parametrize("name", OUTS[:2])
def test_a_killed_process_loses_at_most_one_batch(name: str, drawable: Drawable, tmp_path: Path) -> None:
    """Killed while it writes a batch: half a file is there under another name, and is not taken for a whole one."""
    script = """
import os, signal, sys
from pathlib import Path
from varscale.store import atomic
sys.path.insert(0, sys.argv[1])
import test_bulk
from varscale.generation.from_files import Drawable
folder, before, written = Path(sys.argv[2]), atomic.os.fsync, []
def fsync(file):
    written.append(file)
    if len(written) == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    before(file)
atomic.os.fsync = fsync
files = folder / "model.safetensors", folder / "tokenizer.safetensors"
test_bulk.draw_into(Path(sys.argv[3]), Drawable.load(*files))
"""
    out, batches = tmp_path / name, 3
    files = 1 + (batches * BATCH + 2 if name == "pictures" else batches + 1)  # the record, and within the 4th batch
    arguments = (str(Path(__file__).parent), str(drawable.place.parent), str(out), str(files))
    killed = subprocess.run([sys.executable, "-c", script, *arguments], check=False, env=_environment())
    assert killed.returncode == -9
    reports: list[int] = []
    draw_into(out, drawable, lambda done, _: reports.append(done))
    assert reports == [15, 20, COUNT]
    whole = tmp_path / "whole" / name
    draw_into(whole, drawable)
    assert np.array_equal(read_back(out)[0], read_back(whole)[0])


def _environment() -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    return {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}


def test_the_same_tokens_alone_in_a_batch_of_64_cached_and_uncached(drawable: Drawable) -> None:
    labels = labels_in_turn(range(5), 64)
    whole = torch.cat(sample_with(drawable.model, drawable.tokenizer, labels, OPTIONS).tokens, 1)
    uncached = SamplingOptions(guidance=2.0, top_p=0.95, seed=3, use_cache=False)
    assert torch.equal(torch.cat(sample_with(drawable.model, drawable.tokenizer, labels, uncached).tokens, 1), whole)
    for index in range(0, 64, 9):
        for options in (OPTIONS, uncached):
            only = torch.tensor([index])
            alone = sample_with(drawable.model, drawable.tokenizer, labels[only], options, only)
            assert torch.equal(torch.cat(alone.tokens, 1)[0], whole[index])


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("first", [0, 11])
def test_batches_join_to_the_same_images(drawable: Drawable, expected: Any, batch_size: int, first: int) -> None:
    labels = labels_in_turn(range(5), COUNT)
    batches = drawn_batches(drawable.model, drawable.tokenizer, labels, OPTIONS, batch_size=batch_size, first=first)
    images = torch.cat(list(batches)).permute(0, 2, 3, 1).numpy()
    assert np.abs(images.astype(int) - expected[first:]).max() <= 1


@pytest.mark.parametrize("name", OUTS)
def test_memory_does_not_grow_with_the_count(
    name: str, drawable: Drawable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side, batch_size = 32, 8

    def batches(*_: Any, first: int, **__: Any) -> Iterator[Tensor]:
        for start in range(first, len(labels_N), batch_size):
            yield torch.full((min(batch_size, len(labels_N) - start), 3, side, side), 7, dtype=torch.uint8)

    monkeypatch.setattr(bulk, "drawn_batches", batches)
    peaks = []
    for count in (80, 80, 800):  # the first time also imports
        labels_N = labels_in_turn(range(5), count)
        tracemalloc.start()
        collection = Collection.at(str(tmp_path / f"{len(peaks)}-{name}"))
        draw_collection(drawable, labels_N, SamplingOptions(), collection, ignore, batch_size=batch_size)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    names_and_labels = 300 * 720  # of 720 more images
    assert peaks[2] < peaks[1] + names_and_labels
    assert 720 * side**2 * 3 > 5 * names_and_labels


@pytest.mark.parametrize("counts", [[5, 3, 2], [1, 1, 1, 997], [0, 7, 0, 3]])
@pytest.mark.parametrize("count", [1, 10, 101])
def test_labels_in_the_training_images_proportions(counts: list[int], count: int) -> None:
    labels = labels_in_proportion(np.array(counts), count, seed=1)
    assert len(labels) == count
    found = Counter(labels.tolist())
    for label, number in enumerate(counts):
        exact = count * number / sum(counts)
        assert abs(found[label] - exact) < 1
        assert number or not found[label]
    assert torch.equal(labels, labels_in_proportion(np.array(counts), count, seed=1))


def test_labels_of_all_training_images_are_theirs_in_another_order() -> None:
    labels = labels_in_proportion(np.array([30, 50, 20]), 100, seed=0)
    assert labels.bincount().tolist() == [30, 50, 20]
    assert labels.tolist() != sorted(labels.tolist())
    assert labels.tolist() != labels_in_proportion(np.array([30, 50, 20]), 100, seed=1).tolist()


def test_classes_in_turn() -> None:
    assert labels_in_turn([4, 0, 2], 7).tolist() == [4, 0, 2, 4, 0, 2, 4]


@pytest.mark.parametrize("name", OUTS)
def test_what_is_something_else_is_left_alone(name: str, drawable: Drawable, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ExperimentError, match=f"--out .*{name}: "):
        draw_into(tmp_path / name, drawable)
    assert (tmp_path / name).read_text() == "mine"


def test_a_folder_of_something_else_is_left_alone(drawable: Drawable, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(ExperimentError, match="a folder that holds something else"):
        draw_into(tmp_path, drawable)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_damaged_record_is_not_trusted(drawable: Drawable, tmp_path: Path) -> None:
    """A file's batches are drawn anew; in a folder that the user can see nothing is touched."""
    for name in ("pictures", "images.npz"):
        with pytest.raises(Killed):
            draw_into(tmp_path / name, drawable, kill_at(10))
    for record in tmp_path.rglob(".sampling.json"):
        record.write_text(record.read_text().replace('"seed": 3', '"seed": 4'))
    reports: list[int] = []
    draw_into(tmp_path / "images.npz", drawable, lambda done, _: reports.append(done))
    assert reports[0] == 0
    with pytest.raises(ExperimentError, match="holds something else"):
        draw_into(tmp_path / "pictures", drawable)


@pytest.mark.parametrize("name", OUTS)
def test_bad_labels_write_nothing(name: str, drawable: Drawable, tmp_path: Path) -> None:
    collection = Collection.at(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"labels must lie in 0 … 4"):
        draw_collection(drawable, torch.tensor([0, 7]), OPTIONS, collection, ignore)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", OUTS)
def test_a_full_disk_loses_nothing_that_was_drawn(name: str, drawable: Drawable, tmp_path: Path) -> None:
    """A limit on a file's size stands for it: the batches fit, and what joins them does not."""
    whole, out = tmp_path / "whole" / name, tmp_path / name
    draw_into(whole, drawable)
    if whole.is_dir():
        return  # nothing is joined
    limit = (whole.stat().st_size - 10, resource.RLIM_INFINITY)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    try:
        with pytest.raises(OSError, match=name):
            draw_into(out, drawable)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not out.exists()
    reports: list[int] = []
    draw_into(out, drawable, lambda done, _: reports.append(done))
    assert reports == [COUNT]
    assert np.array_equal(read_back(out)[0], read_back(whole)[0])
