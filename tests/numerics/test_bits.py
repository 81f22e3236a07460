import numpy as np
import pytest
import torch

from varscale.numerics.bits import bit_entropy, bits_of, tokens_of


def test_bits_are_those_of_binary_numbers() -> None:
    tokens = torch.arange(2**10).view(2, -1)
    bits = bits_of(tokens, 10)
    assert bits.shape == (2, 512, 10)
    assert bits.dtype == torch.bool
    assert [int("".join("01"[bit] for bit in reversed(row)), 2) for row in bits.flatten(0, 1).tolist()] == [
        *range(1024)
    ]
    assert torch.equal(tokens_of(bits), tokens)


def test_entropy_of_a_bit() -> None:
    probability = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    entropy = bit_entropy(probability)
    expected = [0.0, -(0.1 * np.log(0.1) + 0.9 * np.log(0.9)), np.log(2), 0.0]
    assert entropy.tolist() == pytest.approx(expected, abs=1e-6)
    entropy.sum().backward()
    assert probability.grad is not None
    assert bool(probability.grad.isfinite().all())
