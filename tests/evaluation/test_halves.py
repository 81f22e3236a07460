"""What half of a scale tells about the other, on tokens whose mutual information is known."""

import math

import pytest
import torch
from torch import Tensor

from varscale.evaluation.halves import second_half, second_halves
from varscale.families.base import TokenSpace

CODES = 4
SIDES = (1, 2, 3)
TOKENS = TokenSpace(patch_nums=SIDES, vocab_size=CODES, latent_channels=4, num_classes=2)


def batches(count: int, noise: float, seed: int) -> list[dict[str, Tensor]]:
    """The scale of side 2 has one colour in all places, but for its second half at random with this probability."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        tokens_BL = torch.randint(CODES, (64, 14), generator=generator)
        drawn_BL = torch.rand(64, 14, generator=generator)
        for place in (2, 3, 4):
            kept_B = (drawn_BL[:, place] >= noise) if second_half(SIDES)[place] else torch.ones(64, dtype=torch.bool)
            tokens_BL[:, place] = torch.where(kept_B, tokens_BL[:, 1], tokens_BL[:, place])
        found.append({"tokens_BL": tokens_BL, "labels_B": torch.zeros(64, dtype=torch.int64)})
    return found


def uniform(batch: dict[str, Tensor]) -> Tensor:
    """All that a model of independent tokens can know of these."""
    return torch.zeros(*batch["tokens_BL"].shape, CODES)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_gain_is_the_mutual_information(noise: float) -> None:
    """Of a colour and a copy of it that is drawn anew with some probability: ln 4 less the entropy of the copy."""
    two, three = second_halves(uniform, batches(150, noise, 1), batches(30, noise, 2), TOKENS)
    wrong = noise / CODES
    right = 1 - 3 * wrong
    entropy = -sum(p * math.log(p) for p in (right, wrong, wrong, wrong) if p)
    assert (two.side, two.tokens, three.side, three.tokens) == (2, 2, 3, 4)
    assert two.model == pytest.approx(math.log(CODES), abs=1e-6)
    assert two.without == pytest.approx(math.log(CODES), abs=0.02)
    assert two.gain == pytest.approx(math.log(CODES) - entropy, abs=0.03)
    assert abs(three.gain) < 0.01 + 3 * three.standard_error  # its tokens know nothing of each other


def test_halves_are_the_colours_of_a_chess_board() -> None:
    black_L = second_half((1, 2, 3))
    assert black_L.tolist() == [False] + [False, True, True, False] + [False, True] * 4 + [False]


def test_the_model_is_not_trained() -> None:
    weights = torch.zeros(CODES, requires_grad=True)
    second_halves(lambda batch: uniform(batch) + weights.detach(), batches(3, 1.0, 1), batches(1, 1.0, 2), TOKENS)
    assert weights.grad is None
