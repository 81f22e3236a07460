"""The schedule of scales, and what codebooks images fill."""

from itertools import pairwise

import pytest

from varscale.config.text import read_yaml
from varscale.config.tokenizer import TokenizerArchitecture
from varscale.config.yaml import load_experiment
from varscale.errors import ExperimentError
from varscale.tokenizer.design import (
    architecture,
    fillable_codes,
    nearest_in_tokens,
    scale_sides,
    schedules,
    section_lines,
    usual_factor,
    variations,
)


def test_schedules_that_were_published_or_measured() -> None:
    for name in ("imagenet256", "cifar10", "rings"):
        sides = load_experiment(name).tokenizer.patch_nums
        assert scale_sides(sides[-1], len(sides)) == sides
    assert scale_sides(16) == load_experiment("imagenet256").tokenizer.patch_nums
    assert scale_sides(8) == load_experiment("cifar10").tokenizer.patch_nums


def test_every_schedule_grows_from_one_token_to_the_latent() -> None:
    for latent in range(2, 80):
        for scales in range(2, latent + 1):
            sides = scale_sides(latent, scales)
            assert (len(sides), sides[0], sides[-1]) == (scales, 1, latent)
            assert all(after > before for before, after in pairwise(sides))
    assert scale_sides(1) == (1,)


@pytest.mark.parametrize(("latent", "scales"), [(4, 5), (4, 1), (1, 2)])
def test_more_scales_than_sides_are_refused(latent: int, scales: int) -> None:
    with pytest.raises(ExperimentError, match=f"{scales} scales"):
        scale_sides(latent, scales)


def test_codes_that_images_fill() -> None:
    assert fillable_codes(40, 66, 24) == 64  # 2,640 vectors, 67 times 39
    assert fillable_codes(39, 64, 24) == 64  # just 39 each
    assert fillable_codes(38, 64, 24) == 32
    assert fillable_codes(1, 1, 24) == 2
    assert fillable_codes(10**9, 680, 256) == fillable_codes(None, 680, 256) == 4096


def test_the_papers_tokenizer_at_its_size() -> None:
    assert architecture(256) == load_experiment("imagenet256").tokenizer.architecture
    assert nearest_in_tokens(256, 680) == architecture(256)
    assert architecture(32) == load_experiment("cifar10").tokenizer.architecture


@pytest.mark.parametrize("size", [16, 24, 32, 64, 128, 256, 512])
def test_what_is_proposed_fits_the_images(size: int) -> None:
    for made in (architecture(size), *schedules(size), *(made for _, made in variations(architecture(size)))):
        assert made.image_size == size
        assert TokenizerArchitecture(**made.model_dump()) == made  # valid, the divisors of channels, too
    written = read_yaml("\n".join(section_lines(architecture(size, images=40), 40)))
    assert TokenizerArchitecture(**written["tokenizer"]) == architecture(size, images=40)


def test_sizes_that_no_tokenizer_halves_are_refused() -> None:
    for size in (30, 6, 33):
        with pytest.raises(ExperimentError, match="multiple of 4"):
            usual_factor(size)
    assert 4 * 85 < nearest_in_tokens(64, 400).tokens_per_image < 5 * 85
