"""VAR's classifiers of bits.

Letters: B batch, M tokens, d bits.
"""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from small_experiment import SMALL
from small_models import make_var, tokenizer_for, var_config
from torch import Tensor

from varscale.config.yaml import validate
from varscale.errors import ExperimentError
from varscale.families.base import SamplingOptions, TokenSpace
from varscale.families.masked.config import MaskedConfig
from varscale.families.raster.config import RasterConfig
from varscale.families.var.bits import bit_losses, draw_bits
from varscale.families.var.config import VARSection
from varscale.generation.sampling import sample, sample_with

BITS: dict[str, Any] = {"quantizer": "bitwise", "vocab_size": 2**5, "latent_channels": 5}


def test_the_loss_is_a_likelihood() -> None:
    """The probabilities of all 2^d tokens sum to 1."""
    logits_BMd = 3 * torch.randn(1, 7, 5)
    losses = [bit_losses(logits_BMd, torch.full((1, 7), token)).loss_BL for token in range(32)]
    torch.testing.assert_close(torch.stack(losses).neg().exp().sum(0), torch.ones(1, 7))
    likeliest = torch.stack(losses).argmin(0)
    assert not bool(bit_losses(logits_BMd, likeliest).wrong.any())
    assert bool(bit_losses(logits_BMd, likeliest ^ 4)._replace(weight_L=None).wrong.all())


def test_bits_are_drawn_as_likely_as_they_are() -> None:
    logits_BMd = torch.tensor([[[-1.0, 0.0, 2.0]]]).expand(1, 20_000, 3)
    uniform_BMd = ((torch.arange(20_000) + 0.5) / 20_000).view(1, -1, 1).expand(-1, -1, 3)
    for temperature in (1.0, 0.5):
        tokens_BM = draw_bits(logits_BMd, uniform_BMd, temperature=temperature)
        for bit, logit in enumerate((-1.0, 0.0, 2.0)):
            share = float(((tokens_BM >> bit) & 1).float().mean())
            assert share == pytest.approx(1 / (1 + math.exp(-logit / temperature)), abs=1e-3)
    assert draw_bits(logits_BMd, uniform_BMd, greedy=True).unique().tolist() == [4]


def test_the_output_layer_has_a_row_a_bit() -> None:
    """All that it saves, in parameters and in FLOPs."""
    sizes = {"width": 2048, "heads": 32, "latent_channels": 16, "vocab_size": 2**16, "quantizer": "bitwise"}
    tokens, bits = (var_config(**sizes, classifier=classifier) for classifier in ("tokens", "bits"))
    assert tokens.parameters() - bits.parameters() == 2049 * (2**16 - 16)
    assert bits.active_parameters() - bits.active_parameters(head=False) == 2049 * 16
    assert tokens.forward_flops() - bits.forward_flops() == 2 * bits.tokens * 2048 * (2**16 - 16)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return make_var(**BITS, classifier="bits", head_init=1.0, adaln_gamma_init=1.0, init_std=0.3)


def drawn(model: Any, **options: Any) -> Tensor:
    labels_B = torch.tensor([0, 1, 5, 2])
    sampled = sample_with(model, tokenizer_for(model.config), labels_B, SamplingOptions(seed=2, **options))
    return torch.cat(sampled.tokens, dim=1)


def test_sampling_with_and_without_a_cache_agree(model: Any) -> None:
    assert torch.equal(drawn(model), drawn(model, use_cache=False))
    assert not torch.equal(drawn(model), drawn(model, temperature=0.2))


def test_greedy_tokens_are_the_likeliest(model: Any) -> None:
    greedy_BL = drawn(model, top_k=1, guidance=0.0)
    assert torch.equal(greedy_BL, drawn(model, temperature=1e-6, guidance=0.0))
    tokenizer, labels_B = tokenizer_for(model.config), torch.tensor([0, 1, 5, 2])
    batch = {"tokens_BL": greedy_BL, "labels_B": labels_B, "sample_index_B": torch.arange(4)}
    assert not bool(model.config.implementation().losses(model, tokenizer, batch).wrong.any())


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.9}])
def test_cuts_among_tokens_are_refused(model: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"say nothing of these models: they choose each bit .* only top_k 1 has"):
        drawn(model, **options)


def test_the_smooth_mode_and_foreign_tokens_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="models that choose bits have no smooth mode"):
        drawn(model, smooth=True)
    foreign = tokenizer_for(var_config(**{**BITS, "quantizer": "codebook"}))
    with pytest.raises(ValueError, match="has quantizer bitwise, but the tokenizer codebook"):
        sample_with(model, foreign, torch.tensor([0]), SamplingOptions())


def test_families_of_tokens_read_bitwise_ones(model: Any) -> None:
    """Their output layers have a row a token; so may VAR's, whose smooth mode then mixes the corners."""
    sizes = {**BITS, "patch_nums": (3,), "num_classes": 3, "width": 16, "heads": 2, "depth": 2}
    for description in (RasterConfig(**sizes), MaskedConfig(**sizes), var_config(**BITS)):
        other = description.implementation().build(description)
        assert sample(other, tokenizer_for(description), torch.tensor([0, 1])).images.isfinite().all()
    smooth = sample_with(make_var(**BITS), tokenizer_for(model.config), torch.tensor([0]), SamplingOptions(smooth=True))
    assert smooth.images.isfinite().all()


def test_tokens_of_a_codebook_have_no_bits() -> None:
    space = TokenSpace(patch_nums=(1, 2), vocab_size=32, latent_channels=5, num_classes=3)
    section = VARSection(classifier="bits")
    with pytest.raises(
        ExperimentError, match=r"^model\.classifier: bits, but the tokens are of the quantizer codebook"
    ):
        section.describe(space, 2)
    with pytest.raises(ValidationError, match=r"set tokenizer\.quantizer to bitwise"):
        var_config(classifier="bits")
    described = section.describe(space.model_copy(update={"quantizer": "bitwise"}), 2)
    assert (described.outputs, described.draws) == (5, "bits")


@pytest.mark.parametrize("place", ["evaluation", "evaluation.fidelity"])
def test_an_experiment_with_cuts_among_tokens_is_refused(place: str) -> None:
    tokenizer = {**SMALL["tokenizer"], "quantizer": "bitwise", "latent_channels": 4, "vocab_size": 16}

    def checked(**cut: Any) -> None:
        evaluation = {"fidelity": cut} if "fidelity" in place else cut
        settings = {**SMALL, "tokenizer": tokenizer, "model": {"classifier": "bits"}, "evaluation": evaluation}
        validate(settings, "a test")

    for key, value in (("top_k", 3), ("top_p", 0.5)):
        with pytest.raises(ExperimentError, match=rf"{place}\.{key}: chooses among tokens, .* each bit"):
            checked(**{key: value})
    checked(top_k=1)
