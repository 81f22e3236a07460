"""Parquet files as people have them: labels and images in many forms, shards in folders, nulls, captions."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from varscale.config.data import PicturesSection
from varscale.data.sources.decoded import EncodedSource
from varscale.data.sources.of_experiment import data_identity, training_source
from varscale.data.sources.parquet.config import ParquetSection
from varscale.data.sources.parquet.source import ParquetSource
from varscale.data.transforms import Crop
from varscale.errors import DataError


def encoded() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(stream, "png")
    return stream.getvalue()


def opened(data: PicturesSection) -> EncodedSource:
    source = training_source(data, 1)
    assert isinstance(source, EncodedSource)
    return source


def parquet(root: Path, images: Any, labels: Any, train: str = "train.parquet", **changes: Any) -> ParquetSection:
    """32 rows a split; images and labels are of a row, or columns."""
    for file in (train, train.replace("train", "test")):
        columns = {
            name: pa.array([make(row) for row in range(32)]) if callable(make) else make
            for name, make in (("image", images), ("label", labels))
        }
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), root / file)
    paths = {"train_path": str(root / train), "validation_path": str(root / train.replace("train", "test"))}
    return ParquetSection(**{"image_size": 16, "num_classes": 4, **paths, **changes})


PICTURE = encoded()


def struct(row: int) -> dict[str, Any]:
    return {"bytes": PICTURE, "path": f"{row}.png"}


def test_labels_as_found(tmp_path: Path) -> None:
    def labels(name: str, make: Any, **changes: Any) -> tuple[list[int], tuple[str, ...]]:
        source = opened(parquet(tmp_path / name, struct, make, **changes))
        return source.labels[:4].tolist(), source.class_names

    assert labels("float", lambda row: float(row % 4)) == ([0, 1, 2, 3], ())
    assert labels("bool", lambda row: bool(row % 2), num_classes=2) == ([0, 1, 0, 1], ("false", "true"))
    assert labels("text", lambda row: ["dog", "cat"][row % 2], num_classes=2) == ([1, 0, 1, 0], ("cat", "dog"))
    assert labels("digits", lambda row: str(8 + row % 4)) == ([0, 1, 2, 3], ("8", "9", "10", "11"))
    words = pa.DictionaryArray.from_arrays(pa.array([row % 2 for row in range(32)], pa.int32()), pa.array(["b", "a"]))
    assert labels("dictionary", words, num_classes=2) == ([1, 0, 1, 0], ("a", "b"))
    assert labels("shifted", lambda row: row % 4 + 1, first_label=1) == ([0, 1, 2, 3], ())
    assert labels("unlabelled", lambda row: -1, label_column=None, num_classes=1) == ([0] * 4, ())

    def refused(name: str, make: Any, message: str, **changes: Any) -> None:
        with pytest.raises(DataError, match=message):
            data_identity(parquet(tmp_path / name, struct, make, **changes))

    refused("from_one", lambda row: row % 4 + 1, r"labels begin at 1 .*data.first_label=1 makes them 0 … 3")
    refused("minus_one", lambda row: -1, r"all labels are -1, which stands for no label .*label_column=null")
    refused("some_minus", lambda row: row % 4 - 1, r"row 0, column label: label -1 is outside 0 … 3")
    refused("fraction", lambda row: row / 2, r"row 1: label is 0\.5; expected a whole number")
    refused("many", lambda row: str(row % 3), r"'label' names 3 classes \(0, 1, 2\), num_classes is 4")
    refused("lists", lambda row: [1], "expected whole numbers, text or booleans")


def test_text_labels_of_validation_are_classes_of_training(tmp_path: Path) -> None:
    data = parquet(tmp_path, struct, lambda row: "abc"[row % 3], num_classes=3)
    for words, expected in ((["c", "a"], [2, 0]), (["d", "a"], None)):
        table = pa.table({"image": [struct(0), struct(1)], "label": words})
        pq.write_table(table, data.validation_path)
        if expected is None:
            with pytest.raises(
                DataError, match=r"test\.parquet row 0, column label: 'd' is no class of the training set"
            ):
                data_identity(data)
        else:
            assert data.open("validation", None).load_batch([0, 1], [0, 0])[1].tolist() == expected


def test_names_of_classes_that_hugging_face_writes(tmp_path: Path) -> None:
    info = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    for metadata, expected in ((json.dumps(info), ("cat", "dog")), ("{broken", ()), (json.dumps({"info": []}), ())):
        table = pa.table({"image": [struct(0), struct(1)], "label": [0, 1]})
        pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "a.parquet")
        assert ParquetSource(tmp_path / "a.parquet", Crop(16), num_classes=2).class_names == expected


def test_images_as_found(tmp_path: Path) -> None:
    def count(name: str, make: Any) -> tuple[int, list[str]]:
        source = opened(parquet(tmp_path / name, make, lambda row: row % 4))
        source.load_batch(range(len(source)), [0] * len(source))
        assert source.undecodable == {}
        return len(source), source.summary()[1:]

    assert count("list", lambda row: [struct(row)]) == (32, [])
    assert count("bytes", lambda row: [encoded()]) == (32, [])
    rows, (line,) = count("null", lambda row: None if row % 8 == 0 else struct(row))
    assert (rows, line) == (28, "  4 pictures left out: no image (null): row 0, row 8, row 16, row 24")
    rows, (line,) = count("several", lambda row: [struct(row)] * (2 if row == 3 else 1))
    assert (rows, line) == (31, "  1 picture left out: a list of 2 images; expected one: row 3")
    for name, make in (
        ("path", lambda row: {"bytes": None, "path": f"images/{row}.png"}),
        ("text", lambda row: f"images/{row}.png"),
    ):
        with pytest.raises(
            DataError, match=r"none of the 32 .* no such file, beginning at .*: row 0 \(images/0\.png\)"
        ):
            count(name, make)
        (tmp_path / name / "images").mkdir()
        for row in range(32):
            (tmp_path / name / "images" / f"{row}.png").write_bytes(encoded())
        assert count(name, make) == (32, [])
    with pytest.raises(DataError, match=r"none of the 32 .* an address on the web, not an image; download it first"):
        count("web", lambda row: f"https://example.org/{row}.png")
    with pytest.raises(DataError, match=r"image_column: 'image' is int64; expected binary"):
        count("numbers", lambda row: row)


def test_shards_in_folders_and_patterns(tmp_path: Path) -> None:
    for train in ("data/train-0.parquet", "data/train-1.parquet", "default/train/0000.parquet", ".cache/train.parquet"):
        parquet(tmp_path, struct, lambda row: row % 4, train)

    def rows(path: str) -> int:
        return len(ParquetSource(tmp_path / path, Crop(16), num_classes=4))

    assert rows("data/train-*.parquet") == 64
    assert rows("default/train") == 32
    assert rows("default") == 64  # as no file lies straight in it
    assert rows("*/train/*.parquet") == 32
    assert rows("**/train*.parquet") == 64
    assert rows("*/train") == 32
    with pytest.raises(DataError, match=r"nowhere/\*/a\.parquet|nowhere: no such file or folder"):
        rows("nowhere/*/a.parquet")
    with pytest.raises(DataError, match=r"default/\*/tset\.parquet: no Parquet files; .*default has test, train"):
        rows("default/*/tset.parquet")


def test_nulls_of_large_parquet_sets_are_found_by_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varscale.data.sources.parquet.source.DECODED_BYTES", 0)
    monkeypatch.setattr("varscale.data.sources.parquet.source.GROUPS_LOOKED_AT", 2)
    images = [None if row == 13 else struct(0) for row in range(40)]
    pq.write_table(pa.table({"image": images, "label": [0] * 40}), tmp_path / "a.parquet", row_group_size=4)
    source = ParquetSource(tmp_path / "a.parquet", Crop(16), num_classes=1)
    assert source.survey.left_out == {13: "no image (null)"}
    assert np.count_nonzero(source.survey.sizes_N2[:, 0]) == 11


def test_captions_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [struct(0)], "label": [0], "text": ["a cat"]}), tmp_path / "a.parquet")
    assert "column 'text' holds captions" in ParquetSource(tmp_path / "a.parquet", Crop(16)).summary()[-1]


def written(file: Path, labels: Any, images: Any = None, names: list[str] | None = None) -> Path:
    columns = {"image": [struct(row) for row in range(4)] if images is None else images, "label": labels}
    table = pa.table({name: values for name, values in columns.items() if values is not None})
    if names is not None:
        described = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(described)})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)
    return file


def test_rows_without_a_label_are_left_out(tmp_path: Path) -> None:
    for name, labels, expected in (
        ("number", [1, None, 0, 1], [1, 0, 1]),
        ("float", [1.0, float("nan"), 0.0, 1.0], [1, 0, 1]),
        ("text", ["b", None, "a", "b"], [1, 0, 1]),
        ("truth", [True, None, False, True], [1, 0, 1]),
    ):
        source = ParquetSource(written(tmp_path / f"{name}.parquet", labels), Crop(16), num_classes=2)
        assert source.labels.tolist() == expected
        assert "  1 picture left out: no label (null): row 1" in source.summary()


def test_classes_in_the_names_of_folders(tmp_path: Path) -> None:
    written(tmp_path / "label=sea%20lion" / "0.parquet", None)
    written(tmp_path / "label=cat" / "0.PARQUET", None)
    source = ParquetSource(tmp_path, Crop(16), num_classes=2)
    assert (source.class_names, source.labels.tolist()) == (("cat", "sea lion"), [0] * 4 + [1] * 4)
    written(tmp_path / "label=dog" / "0.parquet", [0, 1, 0, 1])  # its own column counts
    with pytest.raises(DataError, match=r"label=dog/0\.parquet: column label has numbers, but in .* text"):
        ParquetSource(tmp_path, Crop(16))


@pytest.mark.parametrize("labels", [(["a", "b", "a", "b"], [0, 1, 0, 1]), ([0, 1, 0, 1], ["a", "b", "a", "b"])])
def test_shards_of_which_some_have_text_are_refused(labels: tuple[Any, Any], tmp_path: Path) -> None:
    for number, each in enumerate(labels):
        written(tmp_path / f"{number}.parquet", each)
    with pytest.raises(DataError, match=r"1\.parquet: column label has (numbers|text), but in .*0\.parquet"):
        ParquetSource(tmp_path, Crop(16))


def test_names_that_disagree(tmp_path: Path) -> None:
    train = written(tmp_path / "train.parquet", [0, 1, 0, 1], names=["cat", "dog"])
    test = written(tmp_path / "test.parquet", [0, 1, 0, 0], names=["dog", "cat"])
    data = ParquetSection(train_path=str(train), validation_path=str(test), image_size=16, num_classes=2)
    with pytest.raises(DataError, match="name their classes otherwise: label 0 is 'dog' and 'cat'"):
        data_identity(data)
    source = ParquetSource(written(train, [0, 1, 2, 2], names=["cat", "dog"]), Crop(16), num_classes=4)
    assert source.class_names == ()
    assert source.summary()[1:] == [
        "  no pictures of 1 of the classes: label 3",
        "  the file names 2 classes of column 'label', which are not used: num_classes 4, first_label 0",
    ]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (None, [0, 1, 2**63, 1], "row 2: label is 9223372036854775808; expected the number of a class"),
        (None, [0.0, np.inf, 1.0, 1.0], "row 1: label is inf; expected a whole number"),
        ([{"path": 1}] * 4, [0] * 4, "image_column: 'image' is struct"),
        (["data:image/png;base64,iVBORw0"] * 4, [0] * 4, "text that names no file, perhaps a picture in base64"),
        (["iVBORw0" * 1000] * 4, [0] * 4, "text that names no file, perhaps a picture in base64"),
        (pa.array([], pa.binary()), pa.array([], pa.int64()), "no rows"),
    ],
)
def test_values_that_no_label_and_no_image_can_have(images: Any, labels: Any, message: str, tmp_path: Path) -> None:
    column = pa.array(labels, pa.uint64() if 2**63 in labels else None) if isinstance(labels, list) else labels
    with pytest.raises(DataError, match=f"a.parquet.*{message}"):
        ParquetSource(written(tmp_path / "a.parquet", column, images), Crop(16), num_classes=2)


def test_images_in_dictionaries_and_lists_of_lists(tmp_path: Path) -> None:
    words = pa.DictionaryArray.from_arrays(pa.array([0, 0, 0, 0], pa.int8()), pa.array([PICTURE]))
    for name, images in (("dictionary", words), ("lists", [[[PICTURE]]] * 4)):
        source = ParquetSource(written(tmp_path / f"{name}.parquet", [0] * 4, images), Crop(16), num_classes=1)
        assert len(source) == 4


def test_what_lies_under_the_name_of_a_table(tmp_path: Path) -> None:
    file = written(tmp_path / "a.parquet", [0] * 4)
    half = file.read_bytes()[:400]
    for content, message in (
        (half, "cut short"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer instead of the table"),
        (b"<!DOCTYPE html>", "a page of the web instead of the table"),
        (b"", "empty"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"not a readable Parquet file: {message}"):
            ParquetSource(file, Crop(16))
    table = pa.table([pa.array([PICTURE]), pa.array([PICTURE]), pa.array([0])], names=["image", "image", "label"])
    pq.write_table(table, file)
    with pytest.raises(DataError, match="two columns are named 'image'; rename one"):
        ParquetSource(file, Crop(16))
