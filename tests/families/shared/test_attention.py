import math

import pytest
import torch

from varscale.families.shared import attention


def test_who_sees_whom() -> None:
    mask = attention.block_causal_mask((1, 2), torch.device("cpu"))
    hidden = -math.inf
    assert mask.tolist() == [[0.0] + [hidden] * 4] + [[0.0] * 5] * 4
    assert attention.scale_bounds((1, 2, 4)) == ((0, 1), (1, 5), (5, 21))
    assert attention.level_of_tokens((1, 2), torch.device("cpu")).tolist() == [0, 1, 1, 1, 1]


def test_products_of_rotated_queries_and_keys_depend_on_how_far_places_are_apart() -> None:
    """The same query and key at all places of one map; beyond whole pairs of pairs channels stay as they are."""
    joint_1LJ = torch.randn(1, 1, 3 * 2 * 10, generator=torch.Generator().manual_seed(0)).expand(1, 9, -1)
    angles_2Lr = attention.rotary_angles((3,), 10, torch.device("cpu"))
    turned_1LJ = attention.rotated(joint_1LJ, 2, angles_2Lr)
    queries, keys, values = turned_1LJ[0].unflatten(1, (3, 2, 10)).unbind(1)
    plain = joint_1LJ[0].unflatten(1, (3, 2, 10))
    assert torch.equal(values, plain[:, 2])
    assert torch.equal(queries[..., 8:], plain[:, 0, :, 8:])
    products = torch.einsum("lhd,mhd->lm", queries, keys)
    offsets: dict[tuple[int, int], list[float]] = {}
    for own in range(9):
        for other in range(9):
            apart = own // 3 - other // 3, own % 3 - other % 3
            offsets.setdefault(apart, []).append(products[own, other].item())
    assert all(max(each) - min(each) < 1e-4 for each in offsets.values())
    assert len({round(each[0], 4) for each in offsets.values()}) == 25
    torch.testing.assert_close(products.diagonal(), torch.einsum("lhd,lhd->l", plain[:, 0], plain[:, 1]))


def test_rotary_places_are_the_middles_on_the_finest_map() -> None:
    cosines, sines = attention.rotary_angles((1, 2, 4), 4, torch.device("cpu"))
    angles = torch.atan2(sines, cosines)  # of a row and a column, at frequency 1
    assert angles[0].tolist() == pytest.approx([2.0, 2.0])
    assert angles[1:5].flatten().tolist() == pytest.approx([1, 1, 1, 3, 3, 1, 3, 3])
    assert angles[5 + 6].tolist() == pytest.approx([1.5, 2.5])
