"""Shares of attention, and the proof that no scale sees a later one."""

import pytest
import torch
from small_models import PATCH_NUMS, make_var, tokenizer_for
from torch import Tensor
from torch.nn import functional as F

from varscale.evaluation.attention import attention_shares, dependence
from varscale.families.shared.blocks import modulate
from varscale.families.var.transformer import VAR
from varscale.tokenizer.autoencoder import MultiScaleTokenizer

SCALES = len(PATCH_NUMS)
SIZES = [side**2 for side in PATCH_NUMS]
LABELS = torch.tensor([1, 5])


@pytest.fixture
def models() -> tuple[VAR, MultiScaleTokenizer]:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        var = make_var(head_init=1.0, adaln_gamma_init=1.0, adaln_init=1.0).eval()
    return var, tokenizer_for(var.config)


@pytest.fixture
def tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(32, (2, size), generator=generator) for size in SIZES]


def test_without_preference_a_share_is_a_number_of_tokens(
    models: tuple[VAR, MultiScaleTokenizer], tokens: list[Tensor]
) -> None:
    for name, parameter in models[0].named_parameters():
        if name.endswith("log_scale_H"):
            parameter.data.fill_(-30)
    expected = [[size / sum(SIZES[: row + 1]) if column <= row else 0.0 for column, size in enumerate(SIZES)]
                for row in range(SCALES)]  # fmt: skip
    shares = attention_shares(*models, tokens, LABELS)
    torch.testing.assert_close(shares, torch.tensor(expected).expand(2, 2, SCALES, SCALES))


def test_shares_of_the_first_layer(models: tuple[VAR, MultiScaleTokenizer], tokens: list[Tensor]) -> None:
    """By the formula of attention, a query and a key at a time."""
    var, tokenizer = models
    block = var.blocks[0]
    with torch.no_grad():
        condition, activated = var.condition(LABELS)
        x = torch.cat((var.first_input(condition), var.embed(tokenizer.next_scale_inputs(tokens))), 1)
        x = x + var.place_embedding(0, sum(SIZES))
        _, _, scale, _, shift, _ = block.modulation(activated).unflatten(1, (6, 1, -1)).unbind(1)
        joint = F.linear(modulate(x, scale, shift), block.attention.queries_keys_values.weight)
        queries, keys, _ = joint.unflatten(2, (3, 2, 8)).unbind(2)
        queries = queries + block.attention.query_bias_C.view(2, 8)
        factor = block.attention.log_scale_H.exp()
    level = [scale for scale, size in enumerate(SIZES) for _ in range(size)]
    expected = torch.zeros(2, SCALES, SCALES)
    for head in range(2):
        for image in range(2):
            for i, mine in enumerate(level):
                seen = [j for j, other in enumerate(level) if other <= mine]
                likeness = [F.cosine_similarity(queries[image, i, head], keys[image, j, head], dim=0) for j in seen]
                for j, share in zip(seen, (torch.stack(likeness) * factor[head]).softmax(0), strict=True):
                    expected[head, mine, level[j]] += share / SIZES[mine] / 2
    torch.testing.assert_close(attention_shares(var, tokenizer, tokens, LABELS)[0], expected, atol=1e-5, rtol=0)


def test_looking_changes_nothing(models: tuple[VAR, MultiScaleTokenizer], tokens: list[Tensor]) -> None:
    inputs = models[1].next_scale_inputs(tokens)
    before = models[0](LABELS, inputs)
    attention_shares(*models, tokens, LABELS)
    assert torch.equal(models[0](LABELS, inputs), before)
    assert not any(block._forward_pre_hooks for block in models[0].blocks)


def test_no_scale_sees_a_later_one_or_itself(models: tuple[VAR, MultiScaleTokenizer], tokens: list[Tensor]) -> None:
    changes = dependence(*models, tokens, LABELS)
    assert changes.tril().max() < 1e-5
    assert all(changes[row, column] > 1e-3 for row in range(SCALES) for column in range(row + 1, SCALES))


def test_a_model_that_sees_later_scales_is_found_out(
    models: tuple[VAR, MultiScaleTokenizer], tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(SIZES)
    monkeypatch.setattr("varscale.families.shared.transformer.block_causal_mask", lambda *_: torch.zeros(size, size))
    monkeypatch.setenv("VARSCALE_NATIVE", "0")
    assert dependence(*models, tokens, LABELS).tril().max() > 1e-3
