"""Pictures of all kinds become what a viewer shows, in bounded memory."""

import io
import os
import resource
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps

from varscale.data.pictures import as_shown, is_animated
from varscale.data.transforms import Crop, resize_shorter_side, uniform_draws

NOISE = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)


def stored(picture: Image.Image, form: str, **options: object) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    stream.seek(0)
    return Image.open(stream)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["jpeg", "png", "tiff", "webp"])
def test_turned_pictures_are_shown_upright(turn: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"quality": 95} if form == "jpeg" else {"lossless": True} if form == "webp" else {}
    expected = ImageOps.exif_transpose(stored(Image.fromarray(NOISE), form, exif=exif, **options))
    shown = as_shown(stored(Image.fromarray(NOISE), form, exif=exif, **options))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(expected))
    assert shown.size == ((40, 48) if turn > 4 else (48, 40))


def test_broken_exif_data_are_ignored() -> None:
    for broken in (
        b"Exif\x00\x00II*\x00\xff\xff\xff\x7f",
        b"Exif\x00\x00",
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x09",
    ):
        assert as_shown(stored(Image.fromarray(NOISE), "jpeg", exif=broken)).size == (48, 40)


def red_under_transparency() -> Image.Image:
    pixels = np.zeros((40, 48, 4), np.uint8)
    pixels[..., 0] = 255
    pixels[10:30, 10:30, 3] = 255
    pixels[:5, :, 3] = 51  # a fifth
    return Image.fromarray(pixels, "RGBA")


def test_transparent_parts_show_the_background() -> None:
    for picture in (
        red_under_transparency(),
        stored(red_under_transparency(), "png"),
        stored(red_under_transparency(), "tiff"),
    ):
        shown = np.asarray(as_shown(picture, background=(0, 100, 255)))
        assert shown[20, 20].tolist() == [255, 0, 0]
        assert shown[35, 40].tolist() == [0, 100, 255]
        assert shown[2, 2].tolist() == [51, 80, 204]
    grey = stored(Image.fromarray(np.asarray(red_under_transparency())[..., [0, 3]], "LA"), "png")
    assert np.asarray(as_shown(grey))[35, 40].tolist() == [255, 255, 255]
    palette = Image.fromarray(NOISE).quantize(8)
    indices = np.asarray(palette)
    shown = np.asarray(as_shown(stored(palette, "png", transparency=3), background=(1, 2, 3)))
    assert (shown[indices == 3] == (1, 2, 3)).all()
    np.testing.assert_array_equal(shown[indices != 3], np.asarray(palette.convert("RGB"))[indices != 3])


def test_opaque_pictures_keep_their_pixels() -> None:
    opaque = Image.fromarray(np.dstack([NOISE, np.full((40, 48), 255, np.uint8)]), "RGBA")
    for picture in (
        opaque,
        Image.fromarray(NOISE),
        Image.fromarray(NOISE).convert("1"),
        Image.fromarray(NOISE).convert("CMYK"),
    ):
        np.testing.assert_array_equal(np.asarray(as_shown(picture)), np.asarray(picture.convert("RGB")))


def test_first_frame_of_what_moves() -> None:
    frames = [Image.fromarray(np.full_like(NOISE, shade)) for shade in (10, 100, 200)]
    for form, options in (("gif", {}), ("png", {}), ("webp", {"lossless": True}), ("tiff", {})):
        moving = stored(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert is_animated(moving)
        assert np.asarray(as_shown(moving)).max() <= 11
    photograph = stored(frames[0], "mpo", save_all=True, append_images=frames[1:])
    assert not is_animated(photograph)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_pictures_are_scaled_on_request(dtype: type) -> None:
    values = (np.arange(40 * 48).reshape(40, 48) * 2).astype(dtype)
    values[0, :2] = 5000, 100
    picture = stored(Image.fromarray(values), "tiff")
    shown = np.asarray(as_shown(picture, levels=(100, 3100)))
    expected = (np.clip((values.astype(float) - 100) / 3000, 0, 1) * 255).round()
    assert np.abs(shown - expected[..., None]).max() <= 1
    assert shown[0, 0].tolist() == [255] * 3
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        as_shown(stored(Image.fromarray(values), "tiff"))


@pytest.mark.parametrize("size", [(5, 600), (600, 5), (90, 2000)])
def test_of_strips_only_the_crop_is_made(size: tuple[int, int]) -> None:
    """It is the crop of the whole strip resized, to rounding, where Lanczos's overshoot leaves no pixel's range."""
    noise = np.random.default_rng(1).integers(90, 166, (*size[::-1], 3), dtype=np.uint8)
    picture, crop = Image.fromarray(noise), Crop(32, 1.125, seed=3)
    whole = np.asarray(resize_shorter_side(picture, 36)).transpose(2, 0, 1).astype(int)
    for view in range(3):
        down, across, _ = uniform_draws(3, 7, view)
        top, left = int(down * (whole.shape[1] - 31)), int(across * (whole.shape[2] - 31))
        expected = whole[:, top : top + 32, left : left + 32]
        assert np.abs(crop.apply(picture, 7, view) - expected).max() <= 2


def grown_by(work: Callable[[], None]) -> int:
    """Megabytes by which a process's memory grows at most."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            work()
            os.write(writing, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as result:
        return int(result.read()) // 1000


def test_no_picture_takes_more_than_500_megabytes() -> None:
    large, strip = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (12_000, 11_000), "red").save(large, "jpeg")  # 528 MB decoded
    Image.new("RGB", (1, 60_000), "red").save(strip, "png")

    def load() -> None:
        for stream in (large, strip):
            pixels = Crop(256, 1.125).apply(Image.open(stream), 0, 0)
            assert pixels[0].min() > 250
            assert pixels[1:].max() < 5

    assert grown_by(load) < 500
    bomb = stored(Image.new("1", (13_000, 13_000)), "png")
    with pytest.raises(ValueError, match="too large: decoding takes more than 500 MB"):
        as_shown(bomb)
