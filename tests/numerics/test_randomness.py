import zlib

import numpy as np
import pytest
import torch
from scipy import stats

from varscale.numerics.randomness import evenly_spread, gumbel, normal, permutation, sample_indices, uniform


def splitmix(value: np.uint64) -> np.uint64:
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def with_unsigned_integers(seed: int, stream: str, step: int, samples: list[int], draws: int) -> np.ndarray:
    key = np.uint64(0)
    for part in (seed, zlib.crc32(stream.encode()), step):
        key = splitmix(key ^ np.uint64(part % 2**64))
    table = np.empty((len(samples), draws), dtype=np.uint64)
    for row, sample in enumerate(samples):
        own = splitmix(key ^ np.uint64(sample))
        table[row] = [splitmix(own ^ np.uint64(draw)) for draw in range(draws)]
    return ((table >> np.uint64(40)).astype(np.float64) / 2**24).astype(np.float32)


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (7, 12), (2**40 + 3, 10**7), (-1, 5)])
def test_equals_unsigned_arithmetic(seed: int, step: int) -> None:
    samples = [0, 1, 5, 1000, 2**33 + 1]
    ours = uniform(seed, "label-dropout", step, torch.tensor(samples), 7)
    assert ours.dtype == torch.float32
    assert np.array_equal(ours.numpy(), with_unsigned_integers(seed, "label-dropout", step, samples, 7))


def test_values_never_change() -> None:
    # stored results depend on these numbers: raise numerics_version if they must change
    expected = [0.7655444145202637, 0.37549179792404175]
    assert uniform(7, "drop-path", 3, torch.tensor([5]), 2)[0].tolist() == pytest.approx(expected, abs=0)
    assert permutation(1, 2, 10).tolist() == [8, 3, 2, 5, 9, 4, 7, 0, 6, 1]


def test_is_uniform_and_independent() -> None:
    samples = torch.arange(20_000)
    numbers = uniform(3, "a", 1, samples, 4).double().numpy()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    others = {
        "draw": numbers[:, 1],
        "stream": uniform(3, "b", 1, samples, 1)[:, 0].double().numpy(),
        "step": uniform(3, "a", 2, samples, 1)[:, 0].double().numpy(),
        "seed": uniform(4, "a", 1, samples, 1)[:, 0].double().numpy(),
        "neighbour": np.roll(numbers[:, 0], 1),
    }
    for name, other in others.items():
        assert abs(np.corrcoef(numbers[:, 0], other)[0, 1]) < 4 / np.sqrt(20_000), name


def test_a_sample_does_not_depend_on_its_batch() -> None:
    whole = uniform(1, "crop", 9, torch.arange(64), 3)
    assert torch.equal(uniform(1, "crop", 9, torch.arange(32, 48), 3), whole[32:48])


def test_permutations_differ_by_epoch() -> None:
    orders = {tuple(permutation(0, epoch, 50)) for epoch in range(5)}
    assert len(orders) == 5
    assert all(sorted(order) == list(range(50)) for order in orders)


@pytest.mark.parametrize(("batch", "size"), [(8, 24), (7, 24), (30, 10), (1, 1)])
def test_each_epoch_takes_each_item_once(batch: int, size: int) -> None:
    steps = -(-4 * size // batch)
    taken = np.concatenate([sample_indices(5, step, batch, size) for step in range(steps)])
    for epoch in range(4):
        assert sorted(taken[epoch * size : (epoch + 1) * size]) == list(range(size))
    # a pure function: any step, in any order
    assert np.array_equal(sample_indices(5, steps - 1, batch, size), taken[-batch:])


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="dataset_size 0"):
        sample_indices(0, 0, 4, 0)


def test_normal_numbers_are_uniform_ones_inverted() -> None:
    samples_B = torch.arange(2000)
    ours, numbers = normal(3, "noise", 1, samples_B, 8), uniform(3, "noise", 1, samples_B, 8)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours, stats.norm.ppf(numbers.double() + 2.0**-25), rtol=1e-4, atol=1e-6)
    assert stats.kstest(ours.flatten().numpy(), "norm").pvalue > 0.01


def test_normal_numbers_are_finite_at_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([[0.0, 1 - 2.0**-24]])
    monkeypatch.setattr("varscale.numerics.randomness.uniform", lambda *_: ends)
    assert normal(0, "", 0, torch.arange(1), 2)[0].tolist() == pytest.approx(
        stats.norm.ppf([2.0**-25, 1 - 2.0**-25]), rel=1e-3
    )


def test_gumbel_noise_is_finite_at_the_ends_and_inverts_the_distribution() -> None:
    uniform = torch.tensor([0.0, 0.25, 0.5, 1 - 2.0**-24])
    expected = stats.gumbel_r.ppf([2.0**-25, 0.25, 0.5, 1 - 2.0**-24])
    assert gumbel(uniform).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [10, 37, 500])
@pytest.mark.parametrize("first", [0, 10**9])
def test_samples_that_follow_each_other_are_spread_evenly(count: int, first: int) -> None:
    numbers = evenly_spread(torch.arange(first, first + count)).numpy()
    # of random numbers, the largest distance from the uniform distribution is about .9 / sqrt(count)
    assert stats.kstest(numbers, "uniform").statistic < 2 / count
    golden = (5**0.5 - 1) / 2
    np.testing.assert_allclose(evenly_spread(torch.arange(9)), (np.arange(9) + 0.5) * golden % 1, atol=1e-8)
