"""Counts of attention pairs against sums in closed form."""

import pytest

from benchmarks.bench_complexity import WAYS, attention_pairs, fitted_exponent


@pytest.mark.parametrize("side", [1, 2, 8, 32])
def test_raster_order_is_the_sum_over_all_prefixes(side: int) -> None:
    tokens, passes = side**2, WAYS["raster, cache"][0](side)
    assert attention_pairs(passes, cache=True) == tokens * (tokens + 1) // 2
    assert attention_pairs(passes, cache=False) == tokens * (tokens + 1) * (2 * tokens + 1) // 6


@pytest.mark.parametrize("side", [1, 2, 8, 32])
def test_scales_of_ratio_two_are_a_geometric_sum(side: int) -> None:
    passes = WAYS["scales × 2, cache"][0](side)
    ends = [(4 ** (step + 1) - 1) // 3 for step in range(len(passes))]
    assert attention_pairs(passes, cache=True) == sum(4**step * end for step, end in enumerate(ends))
    assert attention_pairs(passes, cache=False) == sum(end**2 for end in ends)


def test_exponents_are_those_of_the_leading_terms() -> None:
    expected = {"raster, no cache": 6, "raster, cache": 4, "scales × 2, no cache": 4, "scales × 2, cache": 4,
                "scales + 1, no cache": 7, "scales + 1, cache": 6}  # fmt: skip
    for way, exponent in expected.items():
        passes, cache = WAYS[way]
        pairs = [attention_pairs(passes(side), cache=cache) for side in (64, 128, 256)]
        assert fitted_exponent((64, 128, 256), pairs) == pytest.approx(exponent, abs=0.06), way
