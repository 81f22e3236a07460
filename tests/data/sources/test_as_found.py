"""Image folders as people have them: what they hold is found, and what is wrong is said."""

import io
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from varscale.config.data import PicturesSection
from varscale.data.sources import survey as looking
from varscale.data.sources.decoded import EncodedSource
from varscale.data.sources.folder.config import FolderSection
from varscale.data.sources.folder.source import FolderSource
from varscale.data.sources.of_experiment import data_identity, training_source
from varscale.data.transforms import Crop
from varscale.errors import DataError

GENERATOR = np.random.default_rng(0)


def photo(width: int = 48, height: int = 40) -> Image.Image:
    return Image.fromarray(GENERATOR.integers(0, 255, (height, width, 3), dtype=np.uint8))


def encoded(picture: Image.Image | None = None, form: str = "png", **options: Any) -> bytes:
    stream = io.BytesIO()
    (picture or photo()).save(stream, form, **options)
    return stream.getvalue()


def folders(root: Path, classes: Sequence[str] = ("cat", "dog"), count: int = 4) -> FolderSection:
    """`count` training and 2 validation pictures a class."""
    for split, number in (("train", count), ("val", 2)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                (root / split / name / f"{i:03d}.png").write_bytes(encoded())
    return section(root, num_classes=len(classes))


def section(root: Path, **changes: Any) -> FolderSection:
    paths = {"train_path": str(root / "train"), "validation_path": str(root / "val")}
    return FolderSection(**{"image_size": 16, "num_classes": 2, **paths, **changes})


def opened(data: PicturesSection) -> EncodedSource:
    source = training_source(data, 1)
    assert isinstance(source, EncodedSource)
    return source


def test_hidden_and_system_files_are_never_data(tmp_path: Path) -> None:
    data = folders(tmp_path)
    before = data_identity(data)
    for hidden in (
        ".ipynb_checkpoints",
        "@eaDir",
        "__MACOSX",
        ".git",
        "$RECYCLE.BIN",
        "cat/@eaDir",
        "cat/.thumbs/deep",
    ):
        (tmp_path / "train" / hidden).mkdir(parents=True)
        (tmp_path / "train" / hidden / "000.png").write_bytes(encoded())
    for path in list((tmp_path / "train").glob("*/0*.png")):
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(120))
    for name in (".DS_Store", "cat/Thumbs.db", "dog/desktop.ini", "dog/.hidden.png"):
        (tmp_path / "train" / name).write_bytes(bytes(64))
    after = data_identity(data)
    assert after == before
    line = next(line for line in after.summary if "passed over" in line)
    assert "._* (AppleDouble) (8)" in line
    assert "@eaDir (2)" in line


def test_files_that_are_no_images_links_pipes_and_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folders(tmp_path)
    cat = tmp_path / "train" / "cat"
    (cat / "photo.GIF").write_bytes(encoded(form="gif"))
    (cat / "notes").write_text("none")
    (cat / "CAMERA.JPEG").write_bytes(encoded(form="jpeg"))
    (cat / "Ünïcödé 名前 (1).PNG").write_bytes(encoded())
    (cat / "deeper" / "still").mkdir(parents=True)
    (cat / "deeper" / "still" / "a.png").write_bytes(encoded())
    (cat / "deeper" / "back").symlink_to(cat)
    (cat / "link_to_nothing.png").symlink_to("/nowhere/x.png")
    (cat / "link.png").symlink_to(Path("..") / "dog" / "001.png")
    (cat / "circle").symlink_to("circle")
    (cat / "circle.png").symlink_to("circle.png")
    (tmp_path / "train" / "eel").symlink_to(tmp_path / "train" / "dog")
    (tmp_path / "val" / "eel").symlink_to(tmp_path / "val" / "dog")
    (tmp_path / "train" / "loose.png").write_bytes(encoded())
    os.mkfifo(cat / "pipe.png")
    monkeypatch.chdir(cat)
    socket.socket(socket.AF_UNIX).bind("socket.png")
    identity = data_identity(data.model_copy(update={"num_classes": 3}))
    text = "\n".join(identity.summary)
    assert "16 images in 3 classes of 4 (dog) to 8 (cat)" in text
    assert (
        "4 pictures left out: a link to nothing: cat/circle.png, cat/link_to_nothing.png; not a file, but a pipe, "
        "a socket or a " in text
    )
    assert "(links to a folder above) (1)" in text
    assert ".gif (1)" in text
    assert "(without a suffix) (2)" in text
    assert "images beside the class folders belong to no class and are left out: 1, such as loose.png" in text


def test_damaged_pictures_are_named_counted_and_left_out(tmp_path: Path) -> None:
    data = folders(tmp_path).model_copy(update={"max_undecodable": 11})
    cat = tmp_path / "train" / "cat"
    whole, large = encoded(), encoded(photo(300, 300), "jpeg", quality=90)
    broken = bytearray(encoded(photo(200, 200)))
    broken[60_000:60_100] = bytes(100)
    faults = {
        "cut.png": (whole[: len(whole) // 2], "cut short"),
        "cut.jpg": (large[: len(large) * 2 // 3], "cut short"),
        "half.jpg": (large[: len(large) // 2] + bytes(len(large) // 2), "cut short"),
        "script.png": (encoded(photo(), "eps"), "no picture of a known format"),
        "zero.png": (b"", "empty"),
        "zeros.png": (bytes(500), "nothing but zeros"),
        "text.png": (b"hello", "no picture of a known format"),
        "page.jpg": (b"\n<!DOCTYPE html><html>404</html>", "a page of the web instead of the picture"),
        "lfs.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
        "broken.png": (bytes(broken), "damaged"),
        "deep.png": (encoded(Image.fromarray(np.zeros((9, 9), np.uint16))), "mode I;16: more than 8 bits a channel"),
    }
    for name, (content, _) in faults.items():
        (cat / name).write_bytes(content)
    for name, size in (("strip.png", (1, 600)), ("banner.png", (400, 2)), ("pixel.png", (1, 1))):
        (cat / name).write_bytes(encoded(photo(*size)))
    identity = data_identity(data)
    line = next(line for line in identity.summary if "left out" in line)
    assert line.strip().startswith("11 pictures left out: ")
    for name, (_, reason) in faults.items():
        assert f"cat/{name}" in line
        assert reason in line
    source = opened(data)
    assert len(source) == 11
    assert source.load_batch(range(11), [0] * 11)[1].tolist() == [0] * 7 + [1] * 4
    with pytest.raises(
        DataError, match=r"11 of the 22 pictures looked at can't be used, data.max_undecodable is 8: .*cut"
    ):
        data_identity(data.model_copy(update={"max_undecodable": 8}))
    for path in cat.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"train/cat: none of its 18 pictures can be read"):
        opened(data.model_copy(update={"max_undecodable": 100}))


def test_special_pictures_are_said_once_and_part_of_the_identity(tmp_path: Path) -> None:
    data, cat = folders(tmp_path), tmp_path / "train" / "cat"
    plain = data_identity(data)
    assert data_identity(data.model_copy(update={"background": "black", "levels": (0.0, 1.0)})) == plain
    exif = Image.Exif()
    exif[0x0112] = 6
    (cat / "turned.jpg").write_bytes(encoded(form="jpeg", exif=exif))
    clear = photo().convert("RGBA")
    clear.putalpha(0)
    (cat / "clear.png").write_bytes(encoded(clear))
    (cat / "ink.jpg").write_bytes(encoded(photo().convert("CMYK"), "jpeg"))
    (cat / "moving.webp").write_bytes(encoded(form="webp", save_all=True, append_images=[photo()]))
    white, black = (data_identity(data.model_copy(update={"background": colour})) for colour in ("white", "black"))
    assert white.training != black.training
    text = "\n".join(white.summary)
    for mark in ("turned as their EXIF", "with transparent parts", "in CMYK", "with several frames"):
        assert f"1 picture {mark}" in text
    source = opened(data)
    pixels = source.load(next(i for i in range(len(source)) if source.picture_name(i).endswith("clear.png")))[0]
    assert pixels.min() == 255


def test_deep_pictures_stop_at_the_first_look_or_are_scaled(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("ct", "mr"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(8):
                values = GENERATOR.integers(0, 4096, (40, 48), dtype=np.uint16)
                values[:2] = (0,)
                values[-2:] = 4095
                (tmp_path / split / name / f"{i}.png").write_bytes(encoded(Image.fromarray(values)))
    data = section(tmp_path)
    with pytest.raises(
        DataError, match=r"none of the 16 .* can be used: mode I;16: more than 8 bits .*data.levels=\[0,4095\]"
    ):
        data_identity(data)
    source = opened(data.model_copy(update={"levels": (0.0, 4095.0)}))
    pixels = source.load_batch(range(16), [0] * 16)[0]
    assert 110 < pixels.mean() < 145
    assert pixels.std() > 30
    assert (
        data_identity(data.model_copy(update={"levels": (0.0, 4095.0)})).training
        != data_identity(data.model_copy(update={"levels": (0.0, 2000.0)})).training
    )


def test_numbers_that_are_none_are_no_levels(tmp_path: Path) -> None:
    for name, value in (("a", np.nan), ("b", np.inf)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tif").write_bytes(encoded(Image.fromarray(np.full((9, 9), value, np.float32)), "tiff"))
    with pytest.raises(DataError, match=r"none of the 2 .* more than 8 bits a channel: [^[]*; convert them to 8 bits$"):
        FolderSource(tmp_path, Crop(8))


def test_numbered_folders_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folders(tmp_path, [str(number) for number in range(1, 13)], count=1)
    source = FolderSource(tmp_path / "train", Crop(16), num_classes=12)
    assert source.class_names == tuple(str(number) for number in range(1, 13))
    assert [Path(source.picture_name(i)).parent.name for i in range(12)] == list(source.class_names)
    for name in ("007", "10", "9"):
        (tmp_path / "zeros" / name).mkdir(parents=True)
        (tmp_path / "zeros" / name / "a.png").write_bytes(encoded())
    assert FolderSource(tmp_path / "zeros", Crop(16)).class_names == ("007", "9", "10")


def test_classes_that_are_missing_alike_or_single(tmp_path: Path) -> None:
    data = folders(tmp_path / "a", ("a", "b", "A"), count=1)
    assert any(
        "differ in capital letters alone are different classes: A, a" in line for line in data_identity(data).summary
    )
    for path in (tmp_path / "a" / "val" / "b").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="val/b: no images, ending in one of"):
        data_identity(data)
    for split in ("train", "val"):
        (tmp_path / "b" / split).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "b" / split / f"{i}.png").write_bytes(encoded())
    one = section(tmp_path / "b", num_classes=1)
    assert "3 images in 1 class" in data_identity(one).summary[0]
    assert opened(one).class_names == ("images",)
    with pytest.raises(
        DataError, match=r"\(none\) and 3 images straight in it, num_classes is 2; .*; or say num_classes 1"
    ):
        data_identity(section(tmp_path / "b"))


def test_pictures_in_both_splits_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their pixels where all is decoded; else by their files."""
    data = folders(tmp_path)
    again = photo()
    (tmp_path / "train" / "cat" / "a.png").write_bytes(encoded(again))
    (tmp_path / "val" / "dog" / "b.bmp").write_bytes(encoded(again, "bmp"))
    (tmp_path / "val" / "dog" / "c.png").write_bytes((tmp_path / "train" / "dog" / "001.png").read_bytes())
    line = data_identity(data).summary[-1]
    assert line.startswith("validation pictures that are training pictures, too: 2: ")
    monkeypatch.setattr(looking, "DECODED_BYTES", 0)
    monkeypatch.setattr(looking, "DECODED_SAMPLE", 1)
    monkeypatch.setenv("VARSCALE_CACHE", str(tmp_path / "cache"))
    line = data_identity(data).summary[-1]
    assert line.startswith("validation pictures that are training pictures, too: 1: ")
    assert "dog/c.png" in line


def test_large_sets_are_looked_at_and_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Their headers and ends show most damage; what was found is remembered until a file changes."""
    data, cat = folders(tmp_path, count=40), tmp_path / "train" / "cat"
    whole = encoded(form="jpeg")
    (cat / "whole.jpg").write_bytes(whole + b"trailing bytes of a camera" * 10)
    (cat / "cut.jpg").write_bytes(encoded(photo(300, 300), "jpeg")[:-500])
    (cat / "padded.jpg").write_bytes(whole + bytes(500))
    large = io.BytesIO()
    Image.new("1", (16_000, 8_000)).save(large, "png")
    (cat / "large.png").write_bytes(large.getvalue())
    monkeypatch.setattr(looking, "DECODED_BYTES", 0)
    monkeypatch.setattr(looking, "DECODED_SAMPLE", 4)
    monkeypatch.setattr(looking, "_SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setenv("VARSCALE_CACHE", str(tmp_path / "cache"))
    decoded = []
    shown = Crop.shown
    monkeypatch.setattr(Crop, "shown", lambda crop, picture: decoded.append(picture) or shown(crop, picture))
    source = opened(data)
    assert len(source) == 82
    assert len(decoded) < 10
    assert "too large: decoding takes more than 500 MB of memory; make it smaller: cat/large.png" in source.summary()[1]
    assert "looked at 84 of 84 pictures" in caplog.text
    seen = len(decoded)
    assert opened(data).survey.left_out == source.survey.left_out
    assert len(decoded) == seen
    (cat / "cut.jpg").write_bytes(whole)
    assert len(opened(data)) == 83
    (tmp_path / "cache").rename(tmp_path / "elsewhere")

    def breaks(crop: Crop, picture: Image.Image) -> Image.Image:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(Crop, "shown", breaks)
        assert len(opened(data)) < 83
    assert len(opened(data)) == 83  # what may be gone the next time isn't remembered
    monkeypatch.setenv("VARSCALE_CACHE", "/proc/nowhere")  # can't be written to
    assert len(opened(data)) == 83


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("background", "octarine", "expected a colour"), ("levels", [5, 5], "expected the value of black, then a larger")],
)
def test_settings_out_of_range_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section(Path(), **{field: value})


def test_captions_in_capital_letters(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(encoded())
    (tmp_path / "cat" / "0.TXT").write_text("a cat\nsits")
    source = FolderSource(tmp_path, Crop(8))
    assert source.captions() == ["a cat sits"]
    assert "captions beside pictures (.txt): 1 of 1" in source.summary()[-1]
