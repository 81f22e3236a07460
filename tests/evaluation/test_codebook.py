"""Codebook usage against NumPy's histograms."""

import numpy as np
import pytest
import torch

from varscale.evaluation.codebook import CodebookUsage, count_codes


def perplexity(tokens: np.ndarray, vocab_size: int) -> float:
    share = np.bincount(tokens.ravel(), minlength=vocab_size) / tokens.size
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def test_usage_and_perplexity() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randint(0, 40, (6, side * side), generator=generator) for side in (1, 3, 5)] for _ in range(2)]
    metric = CodebookUsage(3, 64)
    for tokens in batches:
        metric.update(tokens)
    figures = metric.compute()
    for scale in range(3):
        together = np.concatenate([tokens[scale].numpy() for tokens in batches])
        possible = min(together.size, 64)
        usage = len(np.unique(together)) / possible
        assert figures[f"codebook_usage_scale_{scale + 1}"] == pytest.approx(usage)
        assert figures[f"codebook_perplexity_scale_{scale + 1}"] == pytest.approx(perplexity(together, 64))
    everything = np.concatenate([scale.numpy().ravel() for tokens in batches for scale in tokens])
    assert figures["codebook_usage"] == pytest.approx(len(np.unique(everything)) / 64)
    assert figures["codebook_perplexity"] == pytest.approx(perplexity(everything, 64))


def test_a_scale_of_few_tokens_can_use_all_it_can() -> None:
    metric = CodebookUsage(1, 1000)
    metric.update([torch.arange(12).view(3, 4)])
    assert metric.compute()["codebook_usage_scale_1"] == 1.0
    assert metric.compute()["codebook_perplexity_scale_1"] == pytest.approx(12)


def test_how_evenly_bits_are_set() -> None:
    metric = CodebookUsage(2, 8, bits=3)
    tokens = [torch.tensor([[0b001], [0b011], [0b001], [0b011]]), torch.tensor([[0b111, 0b000, 0b100, 0b000]])]
    metric.update(tokens)

    def entropy(*shares: float) -> float:
        """The mean over bits, in bits."""
        logs = [-sum(p * np.log2(p) for p in (share, 1 - share) if p) for share in shares]
        return float(np.mean(logs))

    figures = metric.compute()
    assert figures["bit_entropy_scale_1"] == pytest.approx(entropy(1, 1 / 2, 0), abs=1e-5)
    assert figures["bit_entropy_scale_2"] == pytest.approx(entropy(1 / 4, 1 / 4, 1 / 2), abs=1e-5)
    assert figures["bit_entropy"] == pytest.approx(entropy(5 / 8, 3 / 8, 2 / 8), abs=1e-5)
    assert "bit_entropy" not in CodebookUsage(2, 8).compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_measured_is_not_a_crash() -> None:
    assert CodebookUsage(1, 8).compute()["codebook_usage"] == 0


def test_counts() -> None:
    counts_KV = count_codes([torch.tensor([[2]]), torch.tensor([[0, 0, 1, 2]])], 4)
    assert counts_KV.tolist() == [[0, 0, 1, 0], [2, 1, 1, 0]]
