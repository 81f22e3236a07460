"""MaskGIT: its masks and schedules by themselves, and that decoding keeps what it has drawn.

Letters: B batch, L tokens of an image, V vocabulary, c latent channels.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from small_models import counted, make_var, tokenizer_for
from torch import Tensor

from varscale.families.base import SamplingOptions
from varscale.families.masked.config import MaskedConfig
from varscale.families.masked.family import MaskedFamily, MaskedTransformer, training_masks
from varscale.generation.sampling import sample_with

SIZES: dict[str, Any] = {"vocab_size": 32, "latent_channels": 4, "num_classes": 5, "depth": 2, "width": 16, "heads": 2}
LIVELY: dict[str, Any] = {"adaln_gamma_init": 1.0, "init_std": 0.3, "head_init": 1.0}
LABELS = torch.tensor([0, 4, 5])


def masked(side: int = 3, **changes: Any) -> MaskedTransformer:
    torch.manual_seed(0)
    return MaskedTransformer(MaskedConfig(patch_nums=(side,), **{**SIZES, **LIVELY, **changes})).eval()


def test_training_masks_follow_the_cosine() -> None:
    counts = training_masks(36, torch.arange(20_000), seed=3).sum(1).numpy()
    exact = np.ceil(36 * np.cos(np.pi / 2 * (np.arange(1_000_000) + 0.5) / 1_000_000))
    assert counts.min() == 1
    for limit in range(1, 37):
        assert (counts <= limit).mean() == pytest.approx((exact <= limit).mean(), abs=1e-3)
    assert masked(6).config.masked_share == pytest.approx(exact.mean() / 36, abs=1e-5)


def test_training_masks_are_at_any_place_and_the_samples_own() -> None:
    index_B = torch.arange(8_000)
    masks_BL = training_masks(9, index_B, seed=0)
    assert masks_BL.float().mean(0).tolist() == pytest.approx([masked().config.masked_share] * 9, abs=0.02)
    assert torch.equal(training_masks(9, index_B[500:600], seed=0), masks_BL[500:600])
    assert not torch.equal(training_masks(9, index_B, seed=1), masks_BL)


def test_samples_that_follow_each_other_have_different_shares() -> None:
    """Any eight of them have about the mean share: what is random is where."""
    counts_B = training_masks(256, torch.arange(10**12, 10**12 + 800), seed=5).sum(1)
    means = counts_B.view(-1, 8).float().mean(1) / 256
    assert float((means - masked(16).config.masked_share).abs().max()) < 0.1


@pytest.mark.parametrize(("side", "steps"), [(16, 8), (16, 12), (6, 8), (2, 12), (1, 8), (3, 9)])
def test_decoding_schedule(side: int, steps: int) -> None:
    counts, tokens = masked(side).config.masked_counts(steps), side**2
    assert counts[0] == tokens
    assert len(counts) == min(steps, tokens)
    assert all(0 < after < before for before, after in pairwise(counts))
    if tokens >= 36:
        assert list(counts[1:]) == [math.floor(tokens * math.cos(math.pi * s / 2 / steps)) for s in range(1, steps)]


def test_first_loss_is_that_of_guessing_masked_tokens() -> None:
    model = masked(6, head_init=0.02)
    batch = {"tokens_BL": torch.randint(32, (512, 36)), "labels_B": torch.arange(512) % 5}
    losses = MaskedFamily().losses(model, tokenizer_for(model.config), {**batch, "sample_index_B": torch.arange(512)})
    assert losses.loss_BL.mean().item() == pytest.approx(math.log(32), rel=0.01)
    assert torch.equal(losses.loss_BL > 0, training_masks(36, torch.arange(512), seed=0))
    assert losses.logits_BLV is None


def test_logits_see_all_tokens_that_are_not_masked_and_no_other() -> None:
    model, codes_BLc = masked(), torch.randn(3, 9, 4, requires_grad=True)
    masked_BL = torch.zeros(3, 9, dtype=torch.bool)
    masked_BL[:, [0, 4, 5]] = True
    logits_BLV = model(LABELS, codes_BLc, masked_BL=masked_BL)
    for place in (0, 4, 8):
        (gradient_BLc,) = torch.autograd.grad(logits_BLV[1, place].square().sum(), codes_BLc, retain_graph=True)
        assert torch.equal(gradient_BLc[1].abs().sum(1) > 0, ~masked_BL[1])


@pytest.mark.parametrize("block", ["var", "modern"])
def test_a_pass_without_known_tokens_is_that_of_a_var_of_one_scale(block: str) -> None:
    model, var = masked(block=block), make_var((3,), **{**SIZES, **LIVELY, "block": block})
    var.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(LABELS, torch.randn(3, 9, 4)), var(LABELS, torch.empty(3, 0, 4)))


@pytest.mark.parametrize("steps", [0, 3, 1])
def test_decoding_keeps_the_tokens_it_is_most_confident_of(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Gumbel noise: at each pass, as many as the schedule says, and never drawn again."""
    model = masked(confidence_temperature=0.0)
    passes: list[tuple[Tensor, Tensor, Tensor]] = []
    forward = model.forward

    def recorded(labels_B: Tensor, inputs_BLc: Tensor, **rest: Any) -> Tensor:
        passes.append((inputs_BLc, rest["masked_BL"], forward(labels_B, inputs_BLc, **rest)))
        return passes[-1][2]

    monkeypatch.setattr(model, "forward", recorded)
    tokenizer = tokenizer_for(model.config)
    (tokens_BL,) = sample_with(model, tokenizer, LABELS, SamplingOptions(1.5, steps=steps)).tokens
    assert [int(each.sum(1).unique()) for _, each, _ in passes] == list(model.config.masked_counts(steps))
    codes_BLc = tokenizer.quantizer.codebook_Vc[tokens_BL]
    for (_, before_BL, logits_BLV), (inputs_BLc, after_BL, _) in pairwise(passes):
        assert not (after_BL & ~before_BL).any()
        assert torch.equal(inputs_BLc[~after_BL], codes_BLc[~after_BL])
        drawn_BLc = inputs_BLc  # those drawn in the pass before are its inputs, masked again or not
        drawn_BL = (drawn_BLc.unsqueeze(2) == tokenizer.quantizer.codebook_Vc).all(-1).long().argmax(-1)
        share_BL = logits_BLV.softmax(-1).gather(-1, drawn_BL.unsqueeze(-1)).squeeze(-1)
        for image in range(3):
            kept = share_BL[image][before_BL[image] & ~after_BL[image]]
            dropped = share_BL[image][after_BL[image]]
            assert kept.min() >= dropped.max()


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("text_width", [None, 8])
def test_sampling_flops(text_width: int | None, guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = masked(sampling_steps=4, text_width=text_width)
    told = LABELS[:2] if text_width is None else torch.randn(2, text_width)
    monkeypatch.setattr("varscale.families.masked.family.pictures", lambda *_: torch.empty(0))
    tokenizer = tokenizer_for(model.config, phi_ratio=0.0)
    decoding = counted(lambda: tokenizer.quantizer.decode_features([torch.zeros(2, 9, dtype=torch.int64)]))
    measured = counted(lambda: sample_with(model, tokenizer, told, SamplingOptions(guidance)))
    assert measured - decoding == 2 * model.config.sampling_flops(guidance=guidance > 0)
