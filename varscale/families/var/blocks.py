"""The transformer block of VAR: self-attention and feed-forward, both modulated by the class (AdaLN).

Tian et al. 2024, section 3.2; the modulation is DiT's (Peebles and Xie 2023), with gates that begin near zero.

Letters in tensor names: B batch, L tokens, M tokens being added to a cache, C width, H heads, d channels of a head,
J joint channels of queries, keys and values (3·C), X channels of a cache's rows.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varscale.families.var.attention import block_causal_attention, query_slices, scale_bounds, sliced_attention
from varscale.families.var.config import VARConfig
from varscale.kernels import pointwise
from varscale.kernels.attention import available, native_attention, native_attention_to_all

NORM_EPSILON = 1e-6
INITIAL_SCALE = 4.0
LARGEST_SCALE = 100.0


class KeyValueCache:
    """What one block keeps of the tokens sampled so far, in memory set aside once for all of them."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.length = 0
        self.rows_BLX: Tensor | None = None

    def append(self, rows_BMX: Tensor) -> Tensor:
        """Add the next tokens' rows (keys and values, and what else the kernel wants); returns all so far."""
        if self.rows_BLX is None:  # only now are batch and precision known
            self.rows_BLX = rows_BMX.new_empty(len(rows_BMX), self.tokens, rows_BMX.shape[2])
        begin, self.length = self.length, self.length + rows_BMX.shape[1]
        self.rows_BLX[:, begin : self.length] = rows_BMX
        return self.rows_BLX[:, : self.length]


class Block(nn.Module):
    """One layer: x + γ₁·attention(modulated x), then x + γ₂·feed-forward(modulated x).

    All blocks of a model run the same code on the same shapes and hold nothing that differs but tensors, so that one
    compilation serves them all.
    """

    def __init__(self, config: VARConfig) -> None:
        """Build one block of the model that `config` describes."""
        super().__init__()
        width = config.width
        self.attention = Attention(config)
        self.feedforward = FeedForward(width, config.hidden)
        if config.shared_adaln:  # the modulation is the model's plus an offset, not a projection of the block's own
            self.modulation_offset_6C = nn.Parameter(torch.empty(6, width))
            self.modulation = None
        else:
            self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self,
        x_BLC: Tensor,
        condition: Tensor,
        mask_LL: Tensor | None,
        keep_2B: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Apply the block.

        Args:
            x_BLC: The residual stream.
            condition: SiLU of the class embedding (B, C), or the shared modulation (B, 6, C).
            mask_LL: The block-causal mask; None with a cache, where all that was cached is seen.
            keep_2B: Multipliers of the two branches for each sample (stochastic depth), or None.
            cache: Keys and values of earlier scales, extended by these tokens.

        Returns:
            The new residual stream (B, L, C).
        """
        if self.modulation is None:
            modulation_B6C = condition + self.modulation_offset_6C
        else:
            modulation_B6C = self.modulation(condition).unflatten(1, (6, -1))
        gates_B2C, scales_B2C, shifts_B2C = modulation_B6C.split(2, dim=1)
        if keep_2B is not None:
            gates_B2C = gates_B2C * keep_2B.T.unsqueeze(2)
        branch_BLC = self.attention(modulate(x_BLC, scales_B2C[:, :1], shifts_B2C[:, :1]), mask_LL, cache)
        x_BLC = add_projected(x_BLC, gates_B2C[:, :1], branch_BLC, self.attention.projection)
        branch_BLC = self.feedforward(modulate(x_BLC, scales_B2C[:, 1:], shifts_B2C[:, 1:]))
        return add_projected(x_BLC, gates_B2C[:, 1:], branch_BLC, self.feedforward.contract)


class Attention(nn.Module):
    """Multi-head self-attention with biases on queries and values only."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.heads = heads
        self.slices = query_slices(config.patch_nums)
        self.ends = tuple(end for _, end in scale_bounds(config.patch_nums))
        self.head_channels = width // heads
        self.fixed_scale = 0.25 / math.sqrt(self.head_channels)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.query_bias_C = nn.Parameter(torch.empty(width))
        self.value_bias_C = nn.Parameter(torch.empty(width))
        self.log_scale_H = nn.Parameter(torch.empty(heads)) if config.normalise_queries_keys else None
        self.projection = nn.Linear(width, width)

    def forward(self, x_BLC: Tensor, mask_LL: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        """Attend to all tokens that the mask shows, or to all cached ones; the block applies the last projection."""
        bias_3C = torch.cat((self.query_bias_C, torch.zeros_like(self.query_bias_C), self.value_bias_C))
        joint_BLJ = F.linear(x_BLC, self.queries_keys_values.weight, bias_3C)
        if self._native(joint_BLJ):
            return self._by_native_kernel(joint_BLJ.float(), cache).to(joint_BLJ.dtype)
        return self._by_library_kernel(joint_BLJ, mask_LL, cache)

    def _by_native_kernel(self, joint_BLJ: Tensor, cache: KeyValueCache | None) -> Tensor:
        if cache is not None:
            return native_attention_to_all(cache.append(joint_BLJ), self._scale(), queries=joint_BLJ.shape[1])
        return native_attention(joint_BLJ, self._scale(), [end for end in self.ends if end <= joint_BLJ.shape[1]])

    def _by_library_kernel(self, joint_BLJ: Tensor, mask_LL: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        joint_BL3Hd = joint_BLJ.unflatten(2, (3, self.heads, -1))
        queries_keys_BL2Hd = self._scaled(joint_BL3Hd[:, :, :2]).to(joint_BLJ.dtype)
        queries_BLHd, keys_BLHd = queries_keys_BL2Hd.unbind(2)
        values_BLHd = joint_BL3Hd[:, :, 2]
        if cache is not None:
            rows_BLX = cache.append(torch.stack((keys_BLHd, values_BLHd), dim=2).flatten(2))
            keys_BLHd, values_BLHd = rows_BLX.unflatten(2, (2, self.heads, -1)).unbind(2)
        queries_BHLd, keys_BHLd, values_BHLd = (x.transpose(1, 2) for x in (queries_BLHd, keys_BLHd, values_BLHd))
        if mask_LL is None:
            out_BHLd = F.scaled_dot_product_attention(queries_BHLd, keys_BHLd, values_BHLd, scale=1.0)
        elif queries_BHLd.device.type == "cuda" and queries_BHLd.dtype != torch.float32:
            out_BHLd = sliced_attention(queries_BHLd, keys_BHLd, values_BHLd, mask_LL, self.slices)
        else:
            out_BHLd = block_causal_attention(queries_BHLd, keys_BHLd, values_BHLd, mask_LL)
        return out_BHLd.transpose(1, 2).flatten(2)

    def _native(self, joint_BLJ: Tensor) -> bool:
        # float32 inside, and even with bfloat16 around it faster than PyTorch's kernel with its slow backward pass
        on_cpu = joint_BLJ.device.type == "cpu" and joint_BLJ.dtype in (torch.float32, torch.bfloat16)
        return on_cpu and self.log_scale_H is not None and available(self.head_channels)

    def _scale(self) -> Tensor:
        assert self.log_scale_H is not None
        return self.log_scale_H.float().clamp_max(math.log(LARGEST_SCALE)).exp()

    def _scaled(self, queries_keys_BL2Hd: Tensor) -> Tensor:
        if self.log_scale_H is None:
            factor_2 = queries_keys_BL2Hd.new_tensor([self.fixed_scale, 1.0])
            return queries_keys_BL2Hd * factor_2[:, None, None]
        # float32 also under autocast: a scale of up to 100 magnifies rounding of the directions
        queries_keys_BL2Hd = queries_keys_BL2Hd.float()
        scale_H = self._scale()
        factor_2H1 = torch.stack((scale_H, torch.ones_like(scale_H))).unsqueeze(2)
        inverse_BL2H1 = queries_keys_BL2Hd.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()
        return queries_keys_BL2Hd * (inverse_BL2H1 * factor_2H1)


class FeedForward(nn.Module):
    """Two linear layers around a GELU (tanh approximation, as in the reference weights)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """(B, L, C) to the hidden channels; the block applies the second layer."""
        if not torch.is_autocast_enabled(x_BLC.device.type) and pointwise.usable(x_BLC, self.expand.weight):
            return pointwise.bias_gelu(F.linear(x_BLC, self.expand.weight), self.expand.bias)
        hidden_BLF: Tensor = self.expand(x_BLC)
        if torch.compiler.is_compiling():  # the same function, without the slow tanh
            return hidden_BLF * torch.sigmoid(1.5957691216057308 * hidden_BLF * (1 + 0.044715 * hidden_BLF**2))
        return F.gelu(hidden_BLF, approximate="tanh")


def modulate(x_BLC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
    """LayerNorm(x)·(1 + scale) + shift, the normalisation without parameters of its own."""
    if pointwise.usable(x_BLC, scale_B1C, shift_B1C):
        return pointwise.modulate(x_BLC, scale_B1C, shift_B1C)
    normalised_BLC = F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=NORM_EPSILON)
    return torch.addcmul(shift_B1C, normalised_BLC, 1.0 + scale_B1C)


def add_projected(x_BLC: Tensor, gate_B1C: Tensor, branch_BLF: Tensor, projection: nn.Linear) -> Tensor:
    """The residual connection: x plus gate·projection(branch)."""
    autocast = torch.is_autocast_enabled(x_BLC.device.type)
    if not autocast and pointwise.usable(x_BLC, gate_B1C, branch_BLF, projection.weight):
        return pointwise.gated_add(x_BLC, F.linear(branch_BLF, projection.weight), projection.bias, gate_B1C)
    return torch.addcmul(x_BLC, gate_B1C, projection(branch_BLF))
