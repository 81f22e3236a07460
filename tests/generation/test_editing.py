"""Editing: what stays is the source's, what does not is drawn as always, and what is reported of it."""

from typing import Any

import pytest
import torch
from small_models import make_tokenizer, make_var
from torch import Tensor

from varscale.families.base import SamplingOptions
from varscale.families.var.transformer import VAR
from varscale.generation import edit
from varscale.generation.editing import kept_tokens, psnr_by_distance
from varscale.generation.pictures import scale_pictures
from varscale.generation.sampling import sample_with
from varscale.tokenizer.autoencoder import MultiScaleTokenizer

PATCH_NUMS = (1, 2, 3, 4)
SIDE = 8
LABELS = torch.tensor([0, 4, 5])


@pytest.fixture(scope="module")
def models() -> tuple[VAR, MultiScaleTokenizer]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make_var(PATCH_NUMS, head_init=1.0).eval(), make_tokenizer(PATCH_NUMS)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def mask_of(left: int, top: int, right: int, bottom: int) -> Tensor:
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


MASK = mask_of(2, 1, 7, 5)


def test_a_token_stays_when_less_than_half_of_it_is_masked() -> None:
    """Each pixel in parts that no border of a token cuts, counted one by one."""
    generator = torch.Generator().manual_seed(0)
    sides, masks = (1, 2, 3, 5, 7, 12), [torch.rand(12, 12, generator=generator) < share for share in (0.3, 0.5, 0.7)]
    for mask in [*masks, torch.zeros(12, 12).bool(), torch.ones(12, 12).bool()]:
        for side, kept in zip(sides, kept_tokens(mask, sides), strict=True):
            parts = mask.repeat_interleave(side, 0).repeat_interleave(side, 1)
            counts = [[int(cell.sum()) for cell in row.chunk(side, 1)] for row in parts.chunk(side, 0)]
            assert kept.view(side, side).tolist() == [[count * 2 < 144 for count in row] for row in counts]
    half = torch.zeros(12, 12).bool()
    half[:, :6] = True
    assert not kept_tokens(half, (1,))[0].item(), "half of its area is not less than half"
    assert [kept.all().item() for kept in kept_tokens(half, (1, 2), source_scales=1)] == [True, False]


@pytest.mark.parametrize("options", [{}, {"smooth": True}, {"guidance": 0.0, "top_k": 3}, {"use_cache": False}])
def test_what_stays_is_the_sources_at_every_scale(
    models: tuple[VAR, MultiScaleTokenizer], images: Tensor, options: dict[str, Any]
) -> None:
    edited = edit(*models, images, MASK, LABELS, SamplingOptions(**options))
    source = models[1].encode(images)
    drawn = 0
    for ours, theirs, kept in zip(edited.tokens, source, kept_tokens(MASK, PATCH_NUMS), strict=True):
        assert torch.equal(ours[:, kept], theirs[:, kept])
        drawn += int((ours != theirs).sum())
    assert drawn > 10
    if not options.get("smooth"):
        torch.testing.assert_close(edited.images, (models[1].decode(edited.tokens) + 1) / 2)


@pytest.mark.parametrize("options", [{}, {"smooth": True}])
def test_everything_masked_is_sampling_and_nothing_the_reconstruction(
    models: tuple[VAR, MultiScaleTokenizer], images: Tensor, options: dict[str, Any]
) -> None:
    settings = SamplingOptions(seed=5, **options)
    everything = edit(*models, images, mask_of(0, 0, SIDE, SIDE), LABELS, settings)
    sampled = sample_with(*models, LABELS, settings)
    assert all(torch.equal(*pair) for pair in zip(everything.tokens, sampled.tokens, strict=True))
    assert torch.equal(everything.images, sampled.images)

    nothing = edit(*models, images, mask_of(0, 0, 0, 0), LABELS, settings)
    assert all(torch.equal(*pair) for pair in zip(nothing.tokens, models[1].encode(images), strict=True))
    torch.testing.assert_close(nothing.images, (models[1].decode(models[1].encode(images)) + 1) / 2)
    torch.testing.assert_close(nothing.images, nothing.reconstructions)


def test_an_edit_depends_on_its_own_number_alone(models: tuple[VAR, MultiScaleTokenizer], images: Tensor) -> None:
    options = SamplingOptions(seed=2)
    together = edit(*models, images[:1], MASK, LABELS, options)
    for number in range(3):
        alone = edit(
            *models, images[:1], MASK, LABELS[number : number + 1], options, sample_indices=torch.tensor([number])
        )
        for several, one in zip(together.tokens, alone.tokens, strict=True):
            assert torch.equal(several[number : number + 1], one)
    same = edit(*models, images[:1], MASK, LABELS[:1].repeat(2), options)
    assert any(not torch.equal(*tokens) for tokens in same.tokens), "two edits of one picture have their own noise"


def test_first_scales_from_the_source(models: tuple[VAR, MultiScaleTokenizer], images: Tensor) -> None:
    everything = mask_of(0, 0, SIDE, SIDE)
    edited = edit(*models, images, everything, LABELS, SamplingOptions(), source_scales=2)
    source = models[1].encode(images)
    assert [torch.equal(*pair) for pair in zip(edited.tokens, source, strict=True)] == [True, True, False, False]


def test_what_does_not_fit_is_named(models: tuple[VAR, MultiScaleTokenizer], images: Tensor) -> None:
    options = SamplingOptions()
    with pytest.raises(ValueError, match=r"the mask has shape \(8, 9\), but the images have 8 pixels a side"):
        edit(*models, images, torch.ones(8, 9).bool(), LABELS, options)
    with pytest.raises(ValueError, match="labels must lie in 0 … 4"):
        edit(*models, images, MASK, LABELS + 1, options)
    with pytest.raises(ValueError, match="2 images, but 3 labels"):
        edit(*models, images[:2], MASK, LABELS, options)
    with pytest.raises(ValueError, match="images have shape"):
        edit(*models, images[..., :4], MASK, LABELS, options)


def test_likeness_by_distance() -> None:
    """Against the distance of each pixel from the nearest masked one, one by one."""
    generator = torch.Generator().manual_seed(4)
    first, second = torch.rand(2, 3, 9, 9, generator=generator), torch.rand(1, 3, 9, 9, generator=generator)
    mask = torch.zeros(9, 9).bool()
    mask[1, 2] = mask[2, 1] = True
    places = [(row, column) for row in range(9) for column in range(9)]
    masked = [(1, 2), (2, 1)]
    distance = torch.tensor([min(max(abs(r - a), abs(c - b)) for a, b in masked) for r, c in places]).view(9, 9)
    bands = psnr_by_distance([(first, second), (first, first)], mask, 2)
    assert [(band.nearest, band.farthest) for band in bands] == [(0, 0), (1, 2), (3, 4), (5, 8)]
    for band in bands:
        there = (distance >= band.nearest) & (distance <= band.farthest)
        error = (first - second)[..., there].square().mean()
        assert band.pixels == int(there.sum())
        assert band.psnr == (pytest.approx(-10 * error.log10().item(), rel=1e-5), float("inf"))
    assert sum(band.pixels for band in bands) == 81


def test_the_picture_after_each_scale(models: tuple[VAR, MultiScaleTokenizer]) -> None:
    drawn = sample_with(*models, LABELS, SamplingOptions())
    shown = scale_pictures(models[1], drawn.tokens).unflatten(0, (len(LABELS), len(PATCH_NUMS)))
    torch.testing.assert_close(shown[:, -1], drawn.images)
    for scale in range(len(PATCH_NUMS)):
        prefix = models[1].decode(drawn.tokens[: scale + 1])
        torch.testing.assert_close(shown[:, scale], (prefix + 1) / 2)
