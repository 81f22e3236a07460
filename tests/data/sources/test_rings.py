import hashlib
import math
import time
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from varscale.data.sources.rings.drawing import BACKGROUND, PALETTE, Style, render_rings, what_is_drawn
from varscale.data.sources.rings.source import RingsSource
from varscale.errors import DataError

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    mixed = (state + 0x9E3779B97F4A7C15) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return mixed ^ (mixed >> 31)


def rendered_pixel_by_pixel(seed: int, index: int, size: int, split: str) -> tuple[np.ndarray, int]:
    """One image in double precision with the true exponential, from Python's own integers."""
    split_key = splitmix64(splitmix64(seed % 2**64) + (1 if split == "train" else 2))
    key = splitmix64((split_key + index) & MASK)
    count = 1 + (splitmix64(key) >> 32) % 3
    image = np.tile(BACKGROUND.astype(float)[:, None, None], (1, size, size))
    for layer in range(count):
        bits = [splitmix64((key + 1 + 5 * layer + draw) & MASK) for draw in range(5)]
        uniform = [(word >> 40) / 2**24 for word in bits]
        radius = 0.16 + (0.30 - 0.16) * uniform[0]
        width = 0.045
        x, y = (radius + (1 - 2 * radius) * value for value in uniform[2:4])
        colour = PALETTE[(bits[4] >> 32) % 4].astype(float)
        for row in range(size):
            for column in range(size):
                distance = math.hypot((row + 0.5) / size - y, (column + 0.5) / size - x) - radius
                opacity = math.exp(-0.5 * (distance / width) ** 2)
                image[:, row, column] += opacity * (colour - image[:, row, column])
    return image * 255, count - 1


def test_first_output_of_splitmix64_is_the_published_one():
    assert splitmix64(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("split", ["train", "validation"])
def test_images_equal_a_rendering_pixel_by_pixel(split):
    images, labels = render_rings(7, [0, 5, 123_456_789_012], 16, split=split)
    for position, index in enumerate([0, 5, 123_456_789_012]):
        expected, label = rendered_pixel_by_pixel(7, index, 16, split)
        assert labels[position] == label
        # Three layers whose profiles are each within 0.005 of the exponential, and half a grey level of rounding.
        assert np.abs(images[position] - expected).max() < 0.5 + 3 * 0.005 * 255


def test_bytes_are_the_same_on_every_machine():
    images, labels = render_rings(0, np.arange(500), 32)
    digest = hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    assert digest == "037d505b696f89b139f55d34935bf634c33695b042dd04ee11bf7fcb56589b51"


@hypothesis_settings(max_examples=25)
@given(st.integers(-(2**63), 2**64), st.lists(st.integers(0, 2**62), max_size=80), st.integers(0, 80))
def test_an_image_does_not_depend_on_its_company(seed, indices, cut):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together, labels = render_rings(seed, np.array(indices, dtype=np.int64), 8)
        first, first_labels = render_rings(seed, np.array(indices[:cut], dtype=np.int64), 8)
        second, second_labels = render_rings(seed, np.array(indices[cut:], dtype=np.int64), 8)
    np.testing.assert_array_equal(together, np.concatenate([first, second]))
    np.testing.assert_array_equal(labels, np.concatenate([first_labels, second_labels]))


def test_no_image_repeats_within_or_across_splits_and_seeds():
    seen = set()
    for seed in (0, 1):
        for split in ("train", "validation"):
            images, _ = render_rings(seed, np.arange(3000), 32, split=split)
            seen.update(hashlib.sha256(image.tobytes()).digest() for image in images)
    assert len(seen) == 12_000


def test_labels_count_the_rings_and_are_evenly_spread():
    _, labels = render_rings(3, np.arange(30_000), 1, style=(style := Style(min_rings=2, max_rings=5)))
    assert style.num_classes == 4
    np.testing.assert_allclose(np.bincount(labels) / labels.size, 0.25, atol=0.015)  # six standard errors


def test_one_ring_shows_its_colour_on_the_circle_and_the_background_elsewhere():
    images, labels = render_rings(
        1, np.arange(200), 64, style=Style(max_rings=1, radius=(0.25, 0.25), width=(0.03, 0.03), colours=1)
    )
    assert labels.max() == 0
    red = images[:, 0].astype(float) / 255
    np.testing.assert_allclose(red.max(axis=(1, 2)), PALETTE[0, 0], atol=0.03)
    np.testing.assert_allclose(red.min(axis=(1, 2)), BACKGROUND[0], atol=0.005)
    # The mass of a ring is its circumference times the integral of the Gaussian across it.
    mass = ((red - BACKGROUND[0]) / (PALETTE[0, 0] - BACKGROUND[0])).mean(axis=(1, 2))
    np.testing.assert_allclose(mass.max(), 2 * math.pi * 0.25 * 0.03 * math.sqrt(2 * math.pi), rtol=0.02)


def test_backgrounds_are_of_other_colours_than_rings():
    """The corners that rings don't reach have the background's hue, and each background comes as often as another."""
    style = Style(max_rings=2, radius=(0.2, 0.2), width=(0.03, 0.03), colours=3, backgrounds=4)
    images, labels = render_rings(5, np.arange(3000), 12, style=style)
    drawn = what_is_drawn(5, np.arange(3000), "train", style)
    np.testing.assert_array_equal(drawn[:, :3].sum(1), labels + 1)
    np.testing.assert_allclose(np.bincount(drawn[:, 3]) / 3000, 0.2, atol=0.045)  # six standard errors
    for background in range(1, 5):
        rings = drawn[drawn[:, 3] == background, :3].sum(0)
        shares = rings / rings.sum()
        others = [colour for colour in range(3) if colour + 1 != background]
        np.testing.assert_allclose(shares[others], 1 / len(others), atol=0.1)
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].astype(float)
    bare = (np.ptp(corners, axis=2) == 0).all(1)
    assert bare.mean() > 0.3
    for corner, background in zip(corners[bare, :, 0], drawn[bare, 3], strict=True):
        if background:
            np.testing.assert_allclose(
                corner / corner.max(), PALETTE[background - 1] / PALETTE[background - 1].max(), atol=0.01
            )
        else:
            np.testing.assert_allclose(corner / 255, BACKGROUND, atol=0.005)


def test_dark_backgrounds_are_as_they_were_before_there_were_others():
    """Their fingerprint, written down before there was a choice; images with others have the same places and widths."""
    assert RingsSource(10, 24).fingerprint == "601d207e1b9eeb86230854a5713dcdf6"
    coloured = RingsSource(10, 24, style=Style(backgrounds=1))
    assert coloured.fingerprint != RingsSource(10, 24).fingerprint
    dark = coloured.what_is_drawn(range(10))[:, -1] == 0
    assert 0 < dark.sum() < 10
    np.testing.assert_array_equal(
        coloured.load_batch(range(10), [0] * 10)[0][dark], RingsSource(10, 24).load_batch(range(10), [0] * 10)[0][dark]
    )


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"image_size": 0}, "image_size"),
        ({"split": "test"}, "split"),
        ({"indices": [-1]}, "indices"),
        ({"indices": [0.5]}, "indices"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        render_rings(**({"seed": 0, "indices": [0], "image_size": 8} | arguments))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"min_rings": 0}, "min_rings"),
        ({"min_rings": 4}, "max_rings"),
        ({"radius": (0.3, 0.2)}, "radius"),
        ({"radius": (0.3, 0.6)}, "radius"),
        ({"width": (0.0, 0.1)}, "width"),
        ({"colours": 9}, "colours"),
        ({"backgrounds": 9}, "backgrounds"),
        ({"backgrounds": 1, "colours": 1}, "colours"),
    ],
)
def test_styles_out_of_range_are_named(settings, word):
    with pytest.raises(DataError, match=word):
        Style(**settings)


def test_rings_are_the_same_however_many_there_are():
    small, large = RingsSource(10, 16, seed=3), RingsSource(10_000, 16, seed=3)
    np.testing.assert_array_equal(small.load(7)[0], large.load(7)[0])
    assert small.fingerprint == large.fingerprint
    assert small.fingerprint != RingsSource(10, 16, seed=4).fingerprint
    assert small.fingerprint != RingsSource(10, 16, seed=3, split="validation").fingerprint
    assert small.num_classes == 3


def test_training_and_validation_rings_are_disjoint():
    train = {image.tobytes() for image in RingsSource(300, 16).load_batch(range(300), [0] * 300)[0]}
    validation = {
        image.tobytes() for image in RingsSource(300, 16, split="validation").load_batch(range(300), [0] * 300)[0]
    }
    assert len(train) == len(validation) == 300
    assert not train & validation


def test_bad_ring_settings_are_data_errors():
    with pytest.raises(DataError, match="min_rings"):
        RingsSource(10, 16, style=Style(min_rings=4, max_rings=3))
    with pytest.raises(DataError, match="num_images: 0"):
        RingsSource(0, 16)


def test_renders_five_thousand_small_images_a_second():
    start = time.process_time()
    render_rings(0, np.arange(5000), 32)
    assert time.process_time() - start < 1.0
