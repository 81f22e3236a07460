"""How much half of a scale's tokens tells about the other half: what predicting a scale in one pass leaves out.

A model that predicts all tokens of a scale at once takes them as independent of each other, given the scales before.
It has never seen tokens of the scale that it predicts, so it has no likelihood of one half given the other, and none
can be read off it. What is well defined is by how much a second pass could improve its predictions: a small network
learns to correct them in the second half of each scale, once with sight of the tokens of the first half and once
without; all else is the same. On images that neither has seen, the difference of the two losses estimates what the
halves tell about each other (their conditional mutual information). It is no bound: it falls short where the network
with sight has learnt too little, and goes too far where the one without has.

The halves are the two colours of a chess board, so that a token's neighbours are in the other half. A scale of one
token has no second half.

Letters in tensor names: B images, K scales, L all tokens of an image, V vocabulary, W width of the network.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varscale.data.loading import StepBatches
from varscale.evaluation.likelihood import token_losses
from varscale.families.base import TokenSpace
from varscale.families.models import evaluating, labels_of
from varscale.families.shared.attention import level_of_tokens
from varscale.families.var.transformer import VAR
from varscale.tokenizer.autoencoder import MultiScaleTokenizer

Predict = Callable[[Mapping[str, Tensor]], Tensor]
"""Logits (B, L, V) of a batch with `tokens_BL` and labels or captions, by the model that is looked at."""

_WIDTH, _BLOCKS, _HEADS = 64, 2, 4
_RATE = 2e-3


@dataclass(frozen=True)
class SecondHalf:
    """Mean losses over the tokens of one scale's second half, in nats a token, on images that were not trained on.

    Attributes:
        side: Tokens along a side of the scale.
        tokens: In its second half.
        model: Of the model as it is.
        without: Of its corrected predictions, without sight of the first half.
        seen: Of its corrected predictions, with sight of it.
        standard_error: Of without - seen, over images.
    """

    side: int
    tokens: int
    model: float
    without: float
    seen: float
    standard_error: float

    @property
    def gain(self) -> float:
        """What sight of the first half is worth, in nats a token."""
        return self.without - self.seen

    @property
    def half_width(self) -> float:
        """Of its 95% interval."""
        return 1.96 * self.standard_error


def second_halves(
    predict: Predict,
    training: StepBatches,
    validation: Iterable[Mapping[str, Tensor]],
    tokens: TokenSpace,
    seed: int = 0,
    device: torch.device | None = None,
) -> list[SecondHalf]:
    """Each scale of more than one token, coarse to fine.

    Args:
        predict: The model's logits; it is not changed.
        training: Batches to train the two networks on, each once.
        validation: Batches to measure on.
        tokens: Which tokens these are.
        seed: Of the networks' initial weights.
        device: Of the model, and of the networks; None: the processor.
    """
    second_L, steps = second_half(tokens.patch_nums), len(training)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        without = _Correction(tokens).to(device)
    seen = deepcopy(without)
    optimizer = torch.optim.AdamW([*without.parameters(), *seen.parameters()], _RATE, (0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, 20 * step / steps, 2 - 2 * step / steps)
    )
    for batch in training:
        tokens_BL, logits_BLV = batch["tokens_BL"].to(device), predict(batch)
        of_networks = (without(logits_BLV), seen(logits_BLV, tokens_BL))
        optimizer.zero_grad()
        torch.stack([token_losses(each_BLV, tokens_BL)[:, second_L] for each_BLV in of_networks]).mean().backward()
        optimizer.step()
        schedule.step()
    losses_BL3 = torch.cat(
        [_losses(predict(batch), batch["tokens_BL"].to(device), without, seen) for batch in validation]
    )
    return _by_scale(losses_BL3, tokens.patch_nums, second_L)


def predictions(model: VAR, tokenizer: MultiScaleTokenizer) -> Predict:
    """Those of a model that is neither trained nor run with dropout."""

    def predict(batch: Mapping[str, Tensor]) -> Tensor:
        device = model.level_KC.device
        with evaluating(model, tokenizer):
            tokens = batch["tokens_BL"].to(device).split(model.config.groups, 1)
            logits_BLV: Tensor = model(labels_of(batch, model.config).to(device), tokenizer.next_scale_inputs(tokens))
            return logits_BLV.float()

    return predict


def second_half(patch_nums: Sequence[int]) -> Tensor:
    """Which tokens are in the second half of their scale: the black squares of a chess board, bool (L,)."""
    boards = [torch.arange(side)[:, None] + torch.arange(side) for side in patch_nums]
    return torch.cat([board.flatten() % 2 == 1 for board in boards])


class _Correction(nn.Module):
    """Adds to the logarithms of a model's probabilities; tokens of one scale look at each other alone."""

    hidden_LL: Tensor
    first_L: Tensor

    def __init__(self, tokens: TokenSpace) -> None:
        super().__init__()
        level_L = level_of_tokens(tokens.patch_nums, torch.device("cpu"))
        self.read = nn.Sequential(nn.LayerNorm(tokens.vocab_size), nn.Linear(tokens.vocab_size, _WIDTH))
        self.token = nn.Embedding(tokens.vocab_size, _WIDTH)
        self.place_LW = nn.Parameter(0.02 * torch.randn(len(level_L), _WIDTH))
        block = nn.TransformerEncoderLayer(_WIDTH, _HEADS, 4 * _WIDTH, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, _BLOCKS, enable_nested_tensor=False)
        self.write = nn.Linear(_WIDTH, tokens.vocab_size)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)
        self.register_buffer("hidden_LL", level_L[:, None] != level_L[None, :])
        self.register_buffer("first_L", ~second_half(tokens.patch_nums))

    def forward(self, logits_BLV: Tensor, tokens_BL: Tensor | None = None) -> Tensor:
        """Corrected log-probabilities, with sight of the first halves of the tokens where they are given."""
        prior_BLV = logits_BLV.log_softmax(-1)
        x_BLW = self.read(prior_BLV) + self.place_LW
        if tokens_BL is not None:
            x_BLW = x_BLW + self.token(tokens_BL) * self.first_L[:, None]
        correction_BLV: Tensor = self.write(self.blocks(x_BLW, mask=self.hidden_LL))
        return prior_BLV + correction_BLV


@torch.no_grad()
def _losses(logits_BLV: Tensor, tokens_BL: Tensor, without: _Correction, seen: _Correction) -> Tensor:
    """Of the model, and of both corrections, (B, L, 3), float64."""
    predicted = (logits_BLV, without(logits_BLV), seen(logits_BLV, tokens_BL))
    return torch.stack([token_losses(each_BLV, tokens_BL) for each_BLV in predicted], -1).double().cpu()


def _by_scale(losses_BL3: Tensor, patch_nums: Sequence[int], second_L: Tensor) -> list[SecondHalf]:
    found = []
    sizes = [side**2 for side in patch_nums]
    parts = zip(patch_nums, losses_BL3.split(sizes, 1), second_L.split(sizes), strict=True)
    for side, part_BL3, black_L in parts:
        if not black_L.any():
            continue
        of_images_B3 = part_BL3[:, black_L].mean(1)
        difference_B = of_images_B3[:, 1] - of_images_B3[:, 2]
        error = float(difference_B.std()) / math.sqrt(len(difference_B))
        model, without, seen = of_images_B3.mean(0).tolist()
        found.append(SecondHalf(side, int(black_L.sum()), model, without, seen, error))
    return found
