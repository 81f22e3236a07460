"""What a trained VAR attends to, and which tokens its predictions can depend on.

Letters in tensor names: B images, D depth, H heads, K scales, L all tokens of an image, C width, V vocabulary, J joint
channels of queries, keys and values (3·C).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varscale.families.models import evaluating
from varscale.families.shared.attention import block_causal_mask, level_of_tokens
from varscale.families.shared.blocks import Attention, Block
from varscale.families.var.transformer import VAR
from varscale.kernels.attend import scaled_queries_keys
from varscale.numerics.randomness import uniform
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


def attention_shares(var: VAR, tokenizer: MultiScaleTokenizer, tokens: Sequence[Tensor], labels_B: Tensor) -> Tensor:
    """Which share of its attention each scale pays to each scale, by layer and head: (D, H, K, K), rows add up to 1.

    The mean over a scale's tokens and over the images, while all tokens of an image are predicted at once.

    Args:
        var: The model.
        tokenizer: The tokenizer whose tokens it was trained on.
        tokens: K int64 tensors (B, p²), coarse to fine.
        labels_B: int64, each 0 … num_classes.
    """
    of_images = []
    with evaluating(var, tokenizer):
        inputs_BMc = tokenizer.next_scale_inputs(tokens)
        for inputs_1Mc, label_1 in zip(inputs_BMc.split(1), labels_B.split(1), strict=True):  # memory: H·L² an image
            with _recorded(var) as recorded_HKK:
                var(label_1, inputs_1Mc)
            of_images.append(torch.stack(recorded_HKK).cpu())
    return torch.stack(of_images).mean(0)


def dependence(
    var: VAR, tokenizer: MultiScaleTokenizer, tokens: Sequence[Tensor], labels_B: Tensor, seed: int = 0
) -> Tensor:
    """How much the logits of each scale change when all tokens of one scale are replaced: the largest, (K, K).

    Row: which scale was replaced. Where the columns up to and including that scale are 0, no scale sees a later one,
    and the tokens of a scale don't see each other, so that all of them are predicted in one pass.

    Args:
        var: The model.
        tokenizer: The tokenizer whose tokens it was trained on; of two codes at least.
        tokens: K int64 tensors (B, p²), coarse to fine.
        labels_B: int64, each 0 … num_classes.
        seed: Of the other tokens.
    """
    changes_KK = []
    index_B = torch.arange(len(labels_B), device=labels_B.device)
    with evaluating(var, tokenizer):
        logits_BLV = var(labels_B, tokenizer.next_scale_inputs(tokens))
        for scale, tokens_BM in enumerate(tokens):
            drawn_BM = uniform(seed, "replacing", scale, index_B, tokens_BM.shape[1])
            others = [*tokens]
            others[scale] = (tokens_BM + 1 + (drawn_BM * (tokenizer.vocab_size - 1)).long()) % tokenizer.vocab_size
            change_BLV = (var(labels_B, tokenizer.next_scale_inputs(others)) - logits_BLV).abs()
            changes_KK.append([float(part.max()) for part in change_BLV.split(var.config.groups, dim=1)])
    return torch.tensor(changes_KK)


@contextmanager
def _recorded(var: VAR) -> Iterator[list[Tensor]]:
    """The shares (H, K, K) of every layer that runs within, by hooks: with these the blocks run one by one."""
    shares: list[Tensor] = []
    device = var.level_KC.device
    mask_LL = block_causal_mask(var.config.patch_nums, device)
    member_LK = F.one_hot(level_of_tokens(var.config.patch_nums, device)).float()

    def record(module: nn.Module, arguments: tuple[Any, ...], _: Tensor) -> None:
        attention, x_BLC = cast(Attention, module), cast(Tensor, arguments[0])
        joint_BL2Hd = attention.joint(x_BLC, arguments[3]).unflatten(2, (3, attention.heads, -1))[:, :, :2]
        scaled = scaled_queries_keys(joint_BL2Hd, attention.scale(), attention.logit_factor)
        queries_BHLd, keys_BHLd = (x_BLHd.transpose(1, 2) for x_BLHd in scaled)
        weights_HLL = (queries_BHLd @ keys_BHLd.transpose(-1, -2) + mask_LL).softmax(-1).mean(0)
        shares.append((member_LK / member_LK.sum(0)).T @ weights_HLL @ member_LK)

    with ExitStack() as hooks:
        for block in cast("list[Block]", list(var.blocks)):
            # a block with a hook doesn't run as a part of one operator for all blocks
            hooks.callback(block.register_forward_pre_hook(lambda *_: None).remove)
            hooks.callback(block.attention.register_forward_hook(record).remove)
        yield shares
