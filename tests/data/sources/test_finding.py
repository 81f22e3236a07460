"""What is found in folders and Parquet files without being told; and parts of the training set that are held out."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from varscale.config.data import PicturesSection
from varscale.data.sources.decoded import EncodedSource
from varscale.data.sources.finding import find_data
from varscale.data.sources.folder.config import FolderSection
from varscale.data.sources.of_experiment import data_identity, training_source, validation_source
from varscale.data.sources.parquet.config import ParquetSection
from varscale.errors import DataError


def picture(number: int, side: int = 20) -> bytes:
    pixels_hw3 = np.random.default_rng(number).integers(0, 255, (side, side + number % 3, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels_hw3).save(stream, "png")
    return stream.getvalue()


def folder(root: Path, count: int, *, first: int = 0) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        (root / f"{number:03d}.png").write_bytes(picture(number))


def table(file: Path, count: int, first: int = 0, **columns: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": picture(number), "path": None} for number in range(first, first + count)]
    pq.write_table(pa.table({"img": images, **columns}), file, row_group_size=4)


def test_split_folders_and_their_classes(tmp_path: Path) -> None:
    for split, count, first in (("train", 6, 0), ("val", 3, 50)):
        folder(tmp_path / split / "cat", count, first=first)
        folder(tmp_path / split / "dog", count, first=first + 100)
    found = find_data(tmp_path)
    paths = {"train_path": str(tmp_path / "train"), "validation_path": str(tmp_path / "val")}
    assert found.settings == {"kind": "folder", "num_classes": 2, **paths}
    assert found.validation is not None
    assert (len(found.train), len(found.validation), found.remarks) == (12, 6, ())
    assert found.shorter_side() == 20


def test_a_split_of_other_classes_is_not_used_and_said(tmp_path: Path) -> None:
    folder(tmp_path / "train" / "cat", 4)
    folder(tmp_path / "train" / "dog", 4, first=10)
    folder(tmp_path / "test", 4, first=20)  # unlabelled, as of a contest
    found = find_data(tmp_path)
    assert (found.settings["train_path"], found.settings["validation_path"]) == (str(tmp_path / "train"), None)
    assert found.validation is None
    assert "test: 0 class folders" in found.remarks[0]


def test_a_class_of_trains_is_no_split(tmp_path: Path) -> None:
    folder(tmp_path / "train", 4)
    assert find_data(tmp_path).settings["train_path"] == str(tmp_path / "train")  # alone it is one
    for name in ("bus", "car"):
        folder(tmp_path / name, 4, first=10)
    found = find_data(tmp_path)
    assert (found.settings["train_path"], found.settings["num_classes"]) == (str(tmp_path), 3)


def test_pictures_straight_in_a_folder_are_one_class(tmp_path: Path) -> None:
    folder(tmp_path, 5)
    found = find_data(tmp_path)
    assert found.settings == {
        "kind": "folder", "num_classes": 1, "train_path": str(tmp_path), "validation_path": None
    }  # fmt: skip


def test_parquet_files_named_by_their_splits(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", 12, label=[0, 1, 2] * 4)
    table(tmp_path / "test.parquet", 6, 50, label=[0, 1, 2] * 2)
    paths = {"train_path": str(tmp_path / "train.parquet"), "validation_path": str(tmp_path / "test.parquet")}
    wanted = {"kind": "parquet", "image_column": "img", "label_column": "label", "first_label": 0, "num_classes": 3}
    assert find_data(tmp_path).settings == find_data(tmp_path / "train.parquet").settings == {**wanted, **paths}
    alone = find_data(tmp_path / "test.parquet")
    assert (alone.settings["train_path"], alone.validation) == (str(tmp_path / "test.parquet"), None)


def test_shards_become_a_pattern_or_a_folder(tmp_path: Path) -> None:
    for shard in range(2):
        table(tmp_path / "a" / f"train-0000{shard}.parquet", 4, 10 * shard, label=[1, 2, 2, 1])
    table(tmp_path / "a" / "validation-00000.parquet", 4, 50, label=[1, 2, 2, 1])
    found = find_data(tmp_path / "a")
    assert found.settings["train_path"] == str(tmp_path / "a" / "train-0000*.parquet")
    assert (found.settings["first_label"], found.settings["num_classes"], len(found.train)) == (1, 2, 8)
    for shard in range(2):
        table(tmp_path / "b" / "train" / f"{shard}.parquet", 4, 10 * shard)
        table(tmp_path / "b" / "val" / f"{shard}.parquet", 2, 50 + 10 * shard)
    found = find_data(tmp_path / "b")
    assert found.settings["train_path"] == str(tmp_path / "b" / "train")
    assert found.validation is not None
    assert (len(found.train), len(found.validation), found.settings["label_column"]) == (8, 4, None)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [([f"a picture of {number}" for number in range(8)], "has 8 values"), ([-1] * 8, "stands for no label"),
     ([0.5] * 8, "expected a whole number"), ([None] * 8, "null")],
)  # fmt: skip
def test_columns_that_are_no_labels(labels: list[Any], reason: str, tmp_path: Path) -> None:
    table(tmp_path / "data.parquet", 8, label=labels)
    found = find_data(tmp_path / "data.parquet")
    assert (found.settings["label_column"], found.settings["num_classes"]) == (None, 1)
    assert reason in found.remarks[0]


def test_what_holds_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        find_data(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        find_data(tmp_path / "nowhere")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    for path in (tmp_path, tmp_path / "broken.parquet"):
        with pytest.raises(DataError, match="not a readable Parquet file"):
            find_data(path)
    pq.write_table(pa.table({"caption": ["a"], "size": [1]}), tmp_path / "broken.parquet")
    with pytest.raises(DataError, match="no column of images"):
        find_data(tmp_path)


@pytest.fixture(params=["folder", "parquet"])
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> PicturesSection:
    """20 pictures without a validation split, of which 4 are held out."""
    common: dict[str, Any] = {"num_classes": 1, "image_size": 16, "validation_path": None, "validation_images": 4}
    if request.param == "folder":
        folder(tmp_path / "all", 20)
        return FolderSection(train_path=str(tmp_path / "all"), **common)
    table(tmp_path / "all.parquet", 20)
    return ParquetSection(train_path=str(tmp_path / "all.parquet"), image_column="img", label_column=None, **common)


def test_held_out_pictures_are_all_others(whole: PicturesSection) -> None:
    train, validation = training_source(whole, 1), validation_source(whole)
    pixels = [[source.load(index)[0].tobytes() for index in range(len(source))] for source in (train, validation)]
    assert [len(set(each)) for each in pixels] == [16, 4]
    assert not {*pixels[0]} & {*pixels[1]}
    assert len({*pixels[0], *pixels[1]}) == 20
    assert sorted(train.order(0, 0, 16).tolist()) == list(range(16))
    identity = data_identity(whole)
    assert identity.stored_images == 16
    assert not [line for line in identity.summary if "too" in line]  # none in both
    five = data_identity(whole.model_copy(update={"validation_images": 5}))
    assert (five.stored_images, five.training != identity.training) == (15, True)


def test_a_cap_takes_pictures_from_everywhere(whole: PicturesSection) -> None:
    capped = whole.model_copy(update={"training_images": 4})
    train = training_source(capped, 1)
    assert isinstance(train, EncodedSource)
    assert len(train) == 4
    assert train.kept_N.tolist() == [1, 6, 11, 16]  # every fifth, from the first, is held out
    everything, identity = training_source(whole, 1), data_identity(capped)
    assert train.fingerprint not in (everything.fingerprint, validation_source(whole).fingerprint)
    assert (identity.stored_images, identity.validation) == (4, data_identity(whole).validation)


def test_parts_that_there_are_not(whole: PicturesSection) -> None:
    with pytest.raises(DataError, match="training_images: 17 asked for"):
        training_source(whole.model_copy(update={"training_images": 17}), 1)
    with pytest.raises(DataError, match="20 can't be held out of the 20"):
        validation_source(whole.model_copy(update={"validation_images": 20}))
    with pytest.raises(ValueError, match="validation_images must say"):
        type(whole)(**{**whole.model_dump(), "validation_images": None})


def test_split_folders_by_the_words_of_their_names(tmp_path: Path) -> None:
    for split, first in (("training_set", 0), ("test-images", 50)):
        for name in ("cat", "dog"):
            folder(tmp_path / "unpacked" / split / name, 3, first=first + 10 * (name == "dog"))
    found = find_data(tmp_path)
    assert found.validation is not None
    assert found.settings["train_path"] == str(tmp_path / "unpacked" / "training_set")
    assert found.settings["num_classes"] == 2


def test_a_folder_around_the_class_folders(tmp_path: Path) -> None:
    for name in ("train_station", "test_tube"):
        folder(tmp_path / "PetImages" / name, 3)
        folder(tmp_path / "PetImages" / "cat", 3, first=20)
    found = find_data(tmp_path)
    assert (found.settings["train_path"], found.settings["num_classes"]) == (str(tmp_path / "PetImages"), 3)
    folder(tmp_path, 1, first=40)  # with pictures beside it, it is a class
    assert find_data(tmp_path).settings["num_classes"] == 1


def test_tables_in_folders_of_any_depth(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("test", 50)):
        for name in ("cat", "dog"):
            table(tmp_path / "data [1]" / "default" / f"split={split}" / f"label={name}" / "0.parquet", 4, first)
    found = find_data(tmp_path)
    assert found.validation is not None
    assert (found.settings["num_classes"], len(found.train)) == (2, 8)
    for number, split in enumerate(("train", "train", "test")):
        table(tmp_path / "flat [1]" / f"{split}-{number}.parquet", 4, 10 * number)
    found = find_data(tmp_path / "flat [1]")
    assert (len(found.train), found.validation and len(found.validation)) == (8, 4)


def test_labels_that_begin_anywhere_and_names_without_pictures(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", 8, label=[5, 6] * 4)
    settings = find_data(tmp_path / "a.parquet").settings
    assert (settings["first_label"], settings["num_classes"]) == (5, 2)
    table(tmp_path / "b.parquet", 30, label=[None] * 11 + [0] * 19)
    found = find_data(tmp_path / "b.parquet")
    assert found.settings["label_column"] is None
    assert found.remarks == ("no labels: 'label' is null in 11 rows",)
