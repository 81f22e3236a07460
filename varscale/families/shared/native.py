"""Transformers whose blocks can run as one operator on a CPU: whether they do, and how they are modulated then.

Letters in tensor names: D blocks, B batch, L tokens, C width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from varscale.kernels.blocks import fits


def run_as_one(x_BLC: Tensor, blocks: Sequence[nn.Module], heads: int, hidden: int, *, normalised: bool) -> bool:
    """Whether `native_blocks` can take these tokens through all blocks, and nothing else is to happen at their calls.

    `normalised`: queries and keys are given length 1.
    """
    if x_BLC.device.type != "cpu" or x_BLC.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling() or not fits(x_BLC.shape[2], hidden, heads, normalised=normalised):
        return False
    return all(_plain(block) for block in blocks)


def modulations(projections: Sequence[nn.Module], condition_BC: Tensor) -> Tensor:
    """Each block's own modulation (D, B, 6, C), by its linear layer: all in one product."""
    weight_DJC = torch.stack([projection.get_parameter("weight") for projection in projections])
    bias_DJ = torch.stack([projection.get_parameter("bias") for projection in projections])
    rows_DBC = condition_BC.expand(len(projections), -1, -1)
    modulation_DB6C: Tensor = torch.baddbmm(bias_DJ.unsqueeze(1), rows_DBC, weight_DJC.mT).unflatten(2, (6, -1))
    return modulation_DB6C


def _plain(block: nn.Module) -> bool:
    """Whether a call does what `forward` says and nothing else: no compilation, no sharding, no hook."""
    return block._compiled_call_impl is None and not (block._forward_hooks or block._forward_pre_hooks)
