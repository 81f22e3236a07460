import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from requirements import shared_path

from varscale.data.loading import ImageBatches
from varscale.data.sources.parquet.labels import LabelColumn
from varscale.data.sources.parquet.source import ParquetSource
from varscale.data.transforms import Crop
from varscale.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 12, 12, 3), dtype=np.uint8)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write(path, images=None, labels=None, row_group_size=4):
    images = [{"bytes": png(p), "path": None} for p in PIXELS] if images is None else images
    labels = list(range(10)) if labels is None else labels
    pq.write_table(pa.table({"image": images, "label": labels}), path, row_group_size=row_group_size)
    return path


def check_all(source, count=10):
    assert len(source) == count
    for index in np.random.default_rng(1).permutation(count):
        pixels, label = source.load(int(index))
        np.testing.assert_array_equal(pixels, PIXELS[index % 10].transpose(2, 0, 1))
        assert label == index % 10


def test_struct_binary_and_path_columns(tmp_path):
    check_all(ParquetSource(write(tmp_path / "a.parquet"), Crop(12, 1.0), num_classes=10))
    check_all(ParquetSource(write(tmp_path / "b.parquet", [png(p) for p in PIXELS]), Crop(12, 1.0)))
    for number, pixels in enumerate(PIXELS):
        (tmp_path / f"{number}.png").write_bytes(png(pixels))
    paths = [{"bytes": None, "path": f"{number}.png"} for number in range(10)]
    schema = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(paths, schema), "label": list(range(10))})
    pq.write_table(table, tmp_path / "c.parquet")
    check_all(ParquetSource(tmp_path / "c.parquet", Crop(12, 1.0)))


def test_folder_and_pattern_of_files_with_a_small_cache(tmp_path):
    for name in ("train-0", "train-1", "test-0"):
        write(tmp_path / f"{name}.parquet")
    check_all(ParquetSource(tmp_path, Crop(12, 1.0), cache_bytes=1), 30)
    pattern = ParquetSource(tmp_path / "train-*.parquet", Crop(12, 1.0))
    check_all(pattern, 20)
    assert pattern.picture_name(13) == f"{tmp_path / 'train-1.parquet'} row 3"


def test_training_reads_each_row_group_a_few_times_an_epoch(tmp_path, monkeypatch):
    """Not once for each of its images, where a data set is larger than the memory kept."""
    images = [{"bytes": png(PIXELS[number % 10]), "path": None} for number in range(400)]
    write(tmp_path / "a.parquet", images, [number % 10 for number in range(400)], row_group_size=10)
    held = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).total_byte_size * 8
    source = ParquetSource(tmp_path / "a.parquet", Crop(12, 1.0), cache_bytes=held)
    orders = [source.order(seed, epoch, 400) for seed in range(2) for epoch in range(2)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(400))
        assert len(np.unique(order[:40] // 10)) == 4  # whole groups, from anywhere
        assert (np.diff(order[:40]) == 1).sum() < 8  # shuffled throughout
    assert len({order.tobytes() for order in orders}) == 4
    reads, read = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, n, **kwargs: reads.append(n) or read(self, n, **kwargs)
    )
    for _ in ImageBatches(source, seed=0, batch_size=16, start_step=0, num_steps=25, workers=2):
        pass
    assert 40 <= len(reads) < 60


def test_real_cifar10():
    source = ParquetSource(shared_path("data/cifar10/test.parquet"), Crop(32, 1.0), image_column="img", num_classes=10)
    assert len(source) == 10_000
    assert np.bincount(source.labels).tolist() == [1000] * 10
    pixels_B3ss, labels_B = source.load_batch(range(500), [0] * 500)
    assert labels_B[:5].tolist() == [3, 8, 8, 0, 6]  # cat, ship, ship, aeroplane, frog: CIFAR-10's known first rows
    np.testing.assert_allclose(pixels_B3ss.mean((0, 2, 3)) / 255, [0.4914, 0.4822, 0.4465], atol=0.02)
    assert source.undecodable == {}


def test_missing_columns_name_the_nearest(tmp_path):
    file = write(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: image_column: no column 'img'; the file has image"):
        ParquetSource(file, Crop(12), image_column="img")
    with pytest.raises(DataError, match=r"label_column: no column 'lable'; the file has label"):
        ParquetSource(file, Crop(12), labels=LabelColumn("lable"))


def test_columns_of_another_type_are_explained(tmp_path):
    file = write(tmp_path / "a.parquet", labels=[[n] for n in range(10)])
    with pytest.raises(DataError, match=r"label_column: 'label' is list<.*>; expected whole numbers"):
        ParquetSource(file, Crop(12))
    with pytest.raises(DataError, match=r"image_column: 'label' is list<.*>; expected binary"):
        ParquetSource(file, Crop(12), image_column="label")


def test_wrong_and_missing_labels_name_the_row(tmp_path):
    file = write(tmp_path / "a.parquet", labels=[0, 1, 2, 3, 4, 12, -1, 0, 0, 0])
    with pytest.raises(DataError, match=r"a\.parquet row 5, column label: label 12 is outside 0 … 9"):
        ParquetSource(file, Crop(12), num_classes=10)
    file = write(tmp_path / "b.parquet", labels=[0, None, 2, 3, 4, 1, 1, 0, 0, 0])
    assert "1 picture left out: no label (null): row 1" in ParquetSource(file, Crop(12)).summary()[1]
    file = write(tmp_path / "c.parquet", labels=[None] * 10)
    with pytest.raises(DataError, match=r"c\.parquet: label is null in all rows"):
        ParquetSource(file, Crop(12))


def test_missing_files_and_other_formats(tmp_path):
    (tmp_path / "test.parquet").write_bytes(b"PAR1 but nothing more")
    with pytest.raises(DataError, match=r"test\.parquet: not a readable Parquet file"):
        ParquetSource(tmp_path / "test.parquet", Crop(12))
    with pytest.raises(DataError, match=r"tset\.parquet: no such file or folder; .* has test\.parquet"):
        ParquetSource(tmp_path / "tset.parquet", Crop(12))
    with pytest.raises(DataError, match=r"train-\*\.parquet: no Parquet files; .* has test\.parquet"):
        ParquetSource(tmp_path / "train-*.parquet", Crop(12))


def test_rows_that_do_not_decode_are_named_and_left_out(tmp_path):
    images = [png(p) for p in PIXELS]
    images[4] = images[4][:50]
    images[8] = None
    source = ParquetSource(write(tmp_path / "a.parquet", images), Crop(12, 1.0))
    assert source.labels.tolist() == [0, 1, 2, 3, 5, 6, 7, 9]
    for index, row in enumerate(source.labels.tolist()):
        np.testing.assert_array_equal(source.load(index)[0], PIXELS[row].transpose(2, 0, 1))
        assert source.picture_name(index) == f"{tmp_path / 'a.parquet'} row {row}"
    np.testing.assert_array_equal(np.sort(source.order(0, 0, 8)), np.arange(8))
    assert "2 pictures left out: cut short: row 4; no image (null): row 8" in source.summary()[1]


def test_fingerprint_follows_content(tmp_path):
    first = ParquetSource(write(tmp_path / "a.parquet"), Crop(12)).fingerprint
    assert ParquetSource(tmp_path / "a.parquet", Crop(12)).fingerprint == first
    changed = [png(p) for p in PIXELS[::-1]]
    assert ParquetSource(write(tmp_path / "a.parquet", changed), Crop(12)).fingerprint != first
