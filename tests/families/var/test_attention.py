import math

import torch

from varscale.families.var import attention


def test_who_sees_whom() -> None:
    mask = attention.block_causal_mask((1, 2), torch.device("cpu"))
    hidden = -math.inf
    assert mask.tolist() == [[0.0] + [hidden] * 4] + [[0.0] * 5] * 4
    assert attention.scale_bounds((1, 2, 4)) == ((0, 1), (1, 5), (5, 21))
    assert attention.level_of_tokens((1, 2), torch.device("cpu")).tolist() == [0, 1, 1, 1, 1]
