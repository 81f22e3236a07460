import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from varscale.data.transforms import Crop, resize_shorter_side, to_model_range, uniform_draws

reference = importlib.import_module("torchvision.transforms.functional")  # after varscale, which repairs its import


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@settings(max_examples=25)
@given(width=st.integers(5, 90), height=st.integers(5, 90), target=st.integers(8, 40))
def test_resize_is_torchvisions_lanczos(width, height, target):
    picture = noise(width, height)
    expected = reference.resize(picture, target, interpolation=reference.InterpolationMode.LANCZOS)
    np.testing.assert_array_equal(np.asarray(resize_shorter_side(picture, target)), np.asarray(expected))


def test_centre_crop_equals_pil_and_torchvision():
    picture = noise(50, 41)
    crop = Crop(32, 1.125, random=False)
    resized = picture.resize((int(36 * 50 / 41), 36), Image.Resampling.LANCZOS)
    expected = np.asarray(reference.center_crop(resized, 32)).transpose(2, 0, 1)
    for view in range(3):
        np.testing.assert_array_equal(crop.apply(picture, 5, view), expected)
    assert not crop.varies


def test_an_image_of_the_right_size_is_left_alone():
    picture = noise(32, 32)
    np.testing.assert_array_equal(Crop(32, 1.0).apply(picture, 3, 1), np.asarray(picture).transpose(2, 0, 1))


def test_random_crops_are_windows_of_the_resized_picture_and_depend_on_index_and_view_only():
    picture = noise(40, 36)
    resized = np.asarray(resize_shorter_side(picture, 36)).transpose(2, 0, 1)
    windows = {
        resized[:, top : top + 32, left : left + 32].tobytes(): (top, left) for top in range(5) for left in range(9)
    }
    crop = Crop(32, 1.125, seed=4)
    places = {(i, v): windows[crop.apply(picture, i, v).tobytes()] for i in range(40) for v in range(10)}
    assert {top for top, _ in places.values()} == set(range(5))
    assert {left for _, left in places.values()} == set(range(9))
    again = {(i, v): windows[Crop(32, seed=4).apply(picture, i, v).tobytes()] for v in range(10) for i in range(40)}
    assert places == again
    other_seed = [windows[Crop(32, seed=5).apply(picture, i, 0).tobytes()] for i in range(40)]
    assert other_seed != [places[i, 0] for i in range(40)]


def test_half_of_the_views_are_mirrored_when_flips_are_on():
    picture = noise(16, 16)
    plain, mirrored = (Crop(16, 1.0, flip=flip) for flip in (False, True))
    original = plain.apply(picture, 0, 0)
    flipped = 0
    for view in range(200):
        pixels = mirrored.apply(picture, 0, view)
        is_flipped = not np.array_equal(pixels, original)
        np.testing.assert_array_equal(pixels, original[:, :, ::-1] if is_flipped else original)
        flipped += is_flipped
    assert 70 < flipped < 130


def test_grey_and_transparent_pictures_become_three_channels():
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        assert Crop(8).apply(noise(20, 12).convert(mode), 0, 0).shape == (3, 8, 8)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_eight_bits_are_refused(mode):
    """Pillow would keep the lowest, and show nearly all of them white."""
    picture = Image.fromarray(np.full((20, 12), 1000, dtype=np.uint16)).convert(mode)
    with pytest.raises(ValueError, match=f"mode {mode}: more than 8 bits a channel"):
        Crop(8).apply(picture, 0, 0)


def test_draws_are_uniform_and_unrelated():
    draws = np.array([uniform_draws(1, index, view) for index in range(50) for view in range(50)])
    assert (draws >= 0).all()
    assert (draws < 1).all()
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=0.03)
    np.testing.assert_allclose(np.corrcoef(draws.T), np.eye(3), atol=0.08)


def test_model_range():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    expected = torch.arange(256, dtype=torch.float64).reshape(1, 1, 16, 16) / 127.5 - 1
    result = to_model_range(pixels)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("arguments", "key"), [((0, 1.0), "image_size"), ((32, 0.9), "resize_ratio")])
def test_settings_out_of_range_are_named(arguments, key):
    with pytest.raises(ValueError, match=key):
        Crop(*arguments)
