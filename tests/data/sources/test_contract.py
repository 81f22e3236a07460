"""What every source of images must do, and that a new one needs nothing but itself: one is defined here."""

import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_experiment import SMALL

from varscale.config import Experiment
from varscale.config.data import DATA_KINDS, DataSection, Split
from varscale.config.section import PathText
from varscale.config.text import write_yaml
from varscale.config.yaml import load_experiment, validate
from varscale.data.sources.base import ImageSource, Indices, Labels, Pixels, digest
from varscale.data.sources.of_experiment import data_identity, training_source, validation_source
from varscale.errors import ExperimentError

SIDE = 32
CLASSES = 2


class StripesSection(DataSection):
    """Arrays of pixels, a source of which no other file knows."""

    kind: Literal["stripes"] = "stripes"
    """Source of the images."""
    path: PathText
    """Folder of train.npy and validation.npy."""

    places = frozenset({"path"})

    def open(self, split: Split, images: int | None) -> ImageSource:
        return StripesSource(Path(self.path) / f"{split}.npy", self.num_classes)


class StripesSource(ImageSource):
    varies = False

    def __init__(self, path: Path, num_classes: int) -> None:
        self.name, self.num_classes, self.undecodable = str(path), num_classes, {}
        self.pixels_N3ss = np.load(path)
        self.image_size = self.pixels_N3ss.shape[-1]

    @property
    def fingerprint(self) -> str:
        return digest([self.pixels_N3ss.tobytes()])

    def __len__(self) -> int:
        return len(self.pixels_N3ss)

    def load_batch(self, indices: Indices, views: Indices) -> tuple[Pixels, Labels]:
        index_B = np.asarray(indices, dtype=np.int64)
        return self.pixels_N3ss[index_B], index_B % self.num_classes


def pictures(seed: int, count: int = 12, side: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def rings(root: Path, seed: int) -> dict[str, Any]:
    return {"max_rings": CLASSES, "seed": seed}


def folder(root: Path, seed: int) -> dict[str, Any]:
    for number, split in enumerate(("train", "validation")):
        for place, pixels in enumerate(pictures(2 * seed + number)):
            path = root / split / "ab"[place % CLASSES] / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(pixels))
    return {"train_path": str(root / "train"), "validation_path": str(root / "validation")} | CROPPED


def parquet(root: Path, seed: int) -> dict[str, Any]:
    for number, split in enumerate(("train", "test")):
        images = [{"bytes": png(pixels), "path": None} for pixels in pictures(2 * seed + number)]
        table = pa.table({"img": images, "label": [place % CLASSES for place in range(len(images))]})
        pq.write_table(table, root / f"{split}.parquet", row_group_size=5)
    paths = {"train_path": str(root / "train.parquet"), "validation_path": str(root / "test.parquet")}
    return {**paths, "image_column": "img"} | CROPPED


def cifar10(root: Path, seed: int) -> dict[str, Any]:
    (root / "cifar-10-batches-py").mkdir()
    for number, name in enumerate([*(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch"]):
        data = pictures(10 * seed + number, 4, 32).reshape(4, -1)
        content = pickle.dumps({"data": data, "labels": [0, 1, 1, 0]})
        (root / "cifar-10-batches-py" / name).write_bytes(content)
    (root / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return {"path": str(root)} | CROPPED


def stripes(root: Path, seed: int) -> dict[str, Any]:
    for number, split in enumerate(("train", "validation")):
        np.save(root / f"{split}.npy", pictures(2 * seed + number, side=SIDE).transpose(0, 3, 1, 2))
    return {"path": str(root)}


CROPPED = {"resize_ratio": 1.125, "views": 2}
DATA_SETS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "rings": rings, "folder": folder, "parquet": parquet, "cifar10": cifar10, "stripes": stripes,
}  # fmt: skip
"""Kind → writes a tiny data set of two classes into an empty folder and returns the settings that describe it."""


@pytest.fixture(scope="module", autouse=True)
def _stripes_are_known() -> Iterator[None]:
    DATA_KINDS.add(StripesSection)
    Experiment.model_rebuild(force=True)
    yield
    del DATA_KINDS.sections["stripes"]
    Experiment.model_rebuild(force=True)


@pytest.fixture(autouse=True)
def _any_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision knows the checksums of the real one."""
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)


@pytest.fixture(params=sorted({*DATA_KINDS.sections, "stripes"}))
def kind(request: pytest.FixtureRequest) -> str:
    assert request.param in DATA_SETS, f"a tiny data set of kind {request.param} is missing here"
    return str(request.param)


def experiment(kind: str, root: Path, seed: int = 0, **changes: Any) -> Experiment:
    root.mkdir()
    common = {"kind": kind, "image_size": SIDE, "num_classes": CLASSES, "validation_images": 4}
    data = {**common, **DATA_SETS[kind](root, seed), **changes}
    return validate({**SMALL, "data": data}, "a test")


def pixels_of(source: ImageSource, count: int = 12) -> bytes:
    return source.load_batch(range(count), [0] * count)[0].tobytes()


def test_images_are_what_they_say(kind: str, tmp_path: Path) -> None:
    data = experiment(kind, tmp_path / "a").data
    assert isinstance(data, DATA_KINDS.sections[kind])
    for source in (training_source(data, 10), validation_source(data)):
        assert isinstance(source, ImageSource)
        assert (source.image_size, source.num_classes, source.undecodable) == (SIDE, CLASSES, {})
        assert source.procedural == data.procedural
        assert source.name
        count = min(len(source), 12)
        pixels_B3ss, labels_B = source.load_batch(np.arange(count), np.zeros(count, dtype=np.int64))
        assert (pixels_B3ss.shape, pixels_B3ss.dtype) == ((count, 3, SIDE, SIDE), np.uint8)
        assert (labels_B.shape, labels_B.dtype) == ((count,), np.int64)
        assert set(labels_B.tolist()) == {0, 1}
        np.testing.assert_array_equal(source.labels_of(np.arange(count)), labels_B)
        assert len({image.tobytes() for image in pixels_B3ss}) == count
    assert len(training_source(data, 10)) >= 10
    assert len(validation_source(data)) == 4


def test_an_image_depends_on_its_index_and_view_alone(kind: str, tmp_path: Path) -> None:
    data = experiment(kind, tmp_path / "a").data
    source, again = training_source(data, 10), training_source(data, 10)
    wanted = [(index, view) for view in (0, 1, 5) for index in (7, 0, 9, 7)]
    indices, views = (list(part) for part in zip(*wanted, strict=True))
    pixels_B3ss, labels_B = source.load_batch(indices, views)
    np.testing.assert_array_equal(source.labels_of(indices), labels_B)
    for row, (index, view) in reversed(list(enumerate(wanted))):
        pixels_3ss, label = again.load(index, view)
        np.testing.assert_array_equal(pixels_B3ss[row], pixels_3ss)
        assert (label, type(label)) == (labels_B[row], int)
    views_differ = any((pixels_B3ss[row] != pixels_B3ss[row + 4]).any() for row in range(4))
    assert views_differ == source.varies
    with ThreadPoolExecutor(4) as pool:
        for together in pool.map(lambda _: source.load_batch(indices, views), range(8)):
            np.testing.assert_array_equal(together[0], pixels_B3ss)


def test_an_epoch_takes_every_image_once(kind: str, tmp_path: Path) -> None:
    source = training_source(experiment(kind, tmp_path / "a").data, 10)
    size = min(len(source), 4096)
    orders = [source.order(seed, epoch, size) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(size))
    assert len({order.tobytes() for order in orders}) == 3


def test_identity_is_what_the_images_are(kind: str, tmp_path: Path) -> None:
    """Wherever they lie, and whatever else is the same."""
    known = experiment(kind, tmp_path / "a").data
    identity = data_identity(known)
    shutil.copytree(tmp_path / "a", tmp_path / "moved" / "b")
    paths = {name: str(tmp_path / "moved" / "b" / Path(getattr(known, name)).relative_to(tmp_path / "a"))
             for name in known.places}  # fmt: skip
    moved = known.model_copy(update=paths)
    assert data_identity(moved) == identity
    assert training_source(moved, 10).fingerprint == training_source(known, 10).fingerprint
    assert data_identity(known.model_copy(update={"max_undecodable": 3})) == identity
    fewer = data_identity(known.model_copy(update={"validation_images": 3}))
    assert fewer.training == identity.training
    assert fewer.validation != identity.validation
    other = experiment(kind, tmp_path / "c", seed=1).data
    assert pixels_of(training_source(other, 12)) != pixels_of(training_source(known, 12))
    assert data_identity(other).training != identity.training


def test_splits_differ(kind: str, tmp_path: Path) -> None:
    data = experiment(kind, tmp_path / "a").data
    train, validation = training_source(data, 4), validation_source(data)
    assert pixels_of(train, 4) != pixels_of(validation, 4)
    assert train.fingerprint != validation.fingerprint


def test_experiments_travel(kind: str, tmp_path: Path) -> None:
    """As files, and to worker processes."""
    known = experiment(kind, tmp_path / "a")
    (tmp_path / "copy.yaml").write_text(write_yaml(known.model_dump(mode="json")), encoding="utf-8")
    assert load_experiment(str(tmp_path / "copy.yaml")) == known
    assert pickle.loads(pickle.dumps(known)) == known


def test_mistakes_are_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"^a test: data\.image_siz: unknown key; did you mean image_size"):
        experiment(kind, tmp_path / "a", image_siz=3)
    with pytest.raises(ExperimentError, match=r"^a test: data\.num_classes: .* a valid integer, got 'two'"):
        experiment(kind, tmp_path / "b", num_classes="two")
    with pytest.raises(ExperimentError, match=f"'{kind}s' is none of .*{kind}.*; did you mean {kind}"):
        validate({**SMALL, "data": {**SMALL["data"], "kind": f"{kind}s"}}, "a test")


def test_a_training_set_is_no_validation_set(tmp_path: Path) -> None:
    data = experiment("stripes", tmp_path / "a").data
    shutil.copy(tmp_path / "a" / "train.npy", tmp_path / "a" / "validation.npy")
    with pytest.raises(ValueError, match=r"validation\.npy: the validation images are the training images"):
        data_identity(data)
