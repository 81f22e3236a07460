import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from varscale.data.sources.base import SubsetSource
from varscale.data.sources.cifar10.source import Cifar10Source
from varscale.data.sources.decoded import check_labels
from varscale.data.sources.folder.source import FolderSource
from varscale.data.sources.parquet.source import ParquetSource
from varscale.data.transforms import Crop
from varscale.errors import DataError


def write_folder(root: Path, classes: dict[str, int], size: int = 12) -> None:
    generator = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")


def test_folder_gives_every_image_with_its_class(tmp_path):
    write_folder(tmp_path, {"cat": 3, "ant": 2, "bee": 4})
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    source = FolderSource(tmp_path, Crop(12, 1.0), num_classes=3)
    assert source.classes == ["ant", "bee", "cat"]
    assert source.labels.tolist() == [0] * 2 + [1] * 4 + [2] * 3
    for index in range(len(source)):
        pixels, label = source.load(index)
        stored = np.asarray(Image.open(source.picture_name(index)))
        np.testing.assert_array_equal(pixels, stored.transpose(2, 0, 1))
        assert source.classes[label] == Path(source.picture_name(index)).parent.name
    pixels_B3ss, labels_B = source.load_batch([8, 0], [0, 0])
    np.testing.assert_array_equal(pixels_B3ss[0], source.load(8)[0])
    assert labels_B.tolist() == [2, 0]


def test_missing_folder_names_the_nearest(tmp_path):
    write_folder(tmp_path / "pictures" / "train", {"a": 1})
    with pytest.raises(DataError, match=r"trian: no such file or folder; .*pictures has train$"):
        FolderSource(tmp_path / "pictures" / "trian", Crop(12))


def test_a_home_directory_that_is_not_known():
    for opened in (lambda path: FolderSource(path, Crop(12)), lambda path: ParquetSource(path, Crop(12))):
        with pytest.raises(DataError, match=r"^~nobody-here/train: the home directory ~nobody-here is not known"):
            opened("~nobody-here/train")


def test_wrong_level_and_empty_folders_are_explained(tmp_path):
    write_folder(tmp_path / "train", {"a": 1, "b": 1, "c": 1})
    (tmp_path / "val").mkdir()
    with pytest.raises(
        DataError, match=r"2 class folders \(train, val\), num_classes is 3; expected .*/<class>/<image>"
    ):
        FolderSource(tmp_path, Crop(12), num_classes=3)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file: a file; expected a folder .*/<class>/<image>"):
        FolderSource(tmp_path / "file", Crop(12))
    with pytest.raises(DataError, match=r"val: no images; expected .*\.png"):
        FolderSource(tmp_path / "val", Crop(12))


def test_damaged_pictures_are_named_and_left_out(tmp_path):
    write_folder(tmp_path, {"a": 4, "b": 2})
    whole = FolderSource(tmp_path, Crop(12, 1.0))
    expected = [whole.load(index)[0] for index in (0, 1, 4, 5)]
    broken = [tmp_path / "a" / "2.png", tmp_path / "a" / "3.png"]
    broken[0].write_bytes(broken[0].read_bytes()[:60])  # truncated
    broken[1].write_bytes(b"<html>not found</html>")
    source = FolderSource(tmp_path, Crop(12, 1.0), max_undecodable=2)
    pixels_B3ss, labels_B = source.load_batch(range(4), [0] * 4)
    np.testing.assert_array_equal(pixels_B3ss, expected)
    assert (len(source), labels_B.tolist(), source.undecodable) == (4, [0, 0, 1, 1], {})
    line = source.summary()[1]
    assert "2 pictures left out: cut short: a/2.png; a page of the web instead of the picture: a/3.png" in line
    with pytest.raises(DataError, match=r"2 of the 6 pictures looked at can't be used, data.max_undecodable is 1: cut"):
        FolderSource(tmp_path, Crop(12, 1.0), max_undecodable=1)


def test_pictures_damaged_later_are_counted_and_random_ones_stand_in(tmp_path, caplog):
    write_folder(tmp_path, {"a": 40, "b": 40})
    source = FolderSource(tmp_path, Crop(12, 1.0), max_undecodable=2)
    everything = {source.load(index)[0].tobytes(): int(source.labels[index]) for index in range(80)}
    strict = FolderSource(tmp_path, Crop(12, 1.0), max_undecodable=1)
    broken = source.files[20:22]
    for file in broken:
        file.write_bytes(b"")
    loaded = [source.load(index) for index in (20, 21, 20)]
    assert [everything[pixels.tobytes()] for pixels, _ in loaded] == [label for _, label in loaded]
    assert loaded[0][0].tobytes() == loaded[2][0].tobytes()  # a function of the index
    assert loaded[0][0].tobytes() != loaded[1][0].tobytes()  # as one and the same neighbour would be
    assert set(source.undecodable) == {str(file) for file in broken}
    assert len(caplog.records) == 2
    assert f"{broken[0]} does not decode" in caplog.text
    assert "(2 so far, at most 2)" in caplog.text
    with pytest.raises(DataError, match=r"2 images do not decode, max_undecodable is 1; the last is .*\.png"):
        strict.load_batch([20, 21], [0, 0])


def test_nothing_decodes(tmp_path):
    write_folder(tmp_path, {"a": 2})
    for file in (tmp_path / "a").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 2 pictures looked at can be used: empty: a/0\.png, a/1\.png"):
        FolderSource(tmp_path, Crop(12))


def test_fingerprint_follows_content_and_cropping(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 1})
    first = FolderSource(tmp_path, Crop(12, 1.0)).fingerprint
    assert FolderSource(tmp_path, Crop(12, 1.0)).fingerprint == first
    assert FolderSource(tmp_path, Crop(12, 1.125)).fingerprint != first
    with (tmp_path / "a" / "0.png").open("ab") as file:
        file.write(b"more")
    assert FolderSource(tmp_path, Crop(12, 1.0)).fingerprint != first


def test_cifar10_as_torchvision_downloads_it(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    data = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    labels = [3, 0, 9, 1, 5, 2]
    for number in range(1, 6):
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps({"data": data, "labels": labels}))
    (folder / "test_batch").write_bytes(pickle.dumps({"data": data[:2], "labels": labels[:2]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    source = Cifar10Source(tmp_path, Crop(32, 1.0))
    assert len(source) == 30
    np.testing.assert_array_equal(source.load(8)[0], data[2].reshape(3, 32, 32))
    assert source.load(8)[1] == 9
    assert len(Cifar10Source(tmp_path, Crop(32), train=False)) == 2


def test_missing_cifar10_says_how_to_get_it(tmp_path):
    with pytest.raises(DataError, match=r"no intact cifar-10-batches-py inside .*download=True"):
        Cifar10Source(tmp_path, Crop(32))


def test_labels_out_of_range_name_the_first_and_count_the_rest():
    with pytest.raises(DataError, match=r"row 1: label 7 is outside 0 … 4 \(num_classes 5\); so are 1 more"):
        check_labels(np.array([0, 7, 4, -1]), 5, lambda row: f"row {row}")
    check_labels(np.array([0, 4]), 5, str)


def test_a_subset_is_spread_evenly(tmp_path):
    write_folder(tmp_path, {"a": 6, "b": 6, "c": 6})
    source = FolderSource(tmp_path, Crop(12, 1.0))
    subset = SubsetSource(source, 6)
    _, labels_B = subset.load_batch(range(6), [0] * 6)
    assert labels_B.tolist() == [0, 0, 1, 1, 2, 2]
    assert subset.load(5)[0].tobytes() == source.load(15)[0].tobytes()
    with pytest.raises(DataError, match="19 images asked for, it has 18"):
        SubsetSource(source, 19)
