"""The transformer block of VAR: self-attention and feed-forward, both modulated by the class (AdaLN).

Tian et al. 2024, section 3.2; the modulation is DiT's (Peebles and Xie 2023), with gates that begin near zero. The
modern block has rotary positions, RMSNorm and SwiGLU instead (LlamaGen, Sun et al. 2024, section 3.1).

Letters in tensor names: B batch, L tokens, C width, H heads, J joint channels of queries, keys and values (3·C), F
hidden channels, r pairs of a head's channels that are turned.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varscale.families.shared.attention import rotated, scale_bounds
from varscale.families.shared.description import TransformerDescription
from varscale.kernels.attend import KeyValueCache, attend
from varscale.kernels.linear import Linear, linear

NORM_EPSILON = 1e-6
INITIAL_SCALE = 4.0
LARGEST_SCALE = 100.0


class Block(nn.Module):
    """One layer: x + γ₁·attention(modulated x), then x + γ₂·feed-forward(modulated x).

    All blocks of a model run the same code on the same shapes and hold nothing that differs but tensors, so that one
    compilation serves them all.
    """

    def __init__(self, config: TransformerDescription) -> None:
        """Build one block of the model that `config` describes."""
        super().__init__()
        width = config.width
        self.centred = not config.modern
        self.branch_factor = config.branch_factor
        self.attention = Attention(config)
        feedforward: type[FeedForward | GatedFeedForward] = GatedFeedForward if config.modern else FeedForward
        self.feedforward = feedforward(width, config.hidden)
        if config.shared_adaln:  # the modulation is the model's plus an offset, not a projection of the block's own
            self.modulation_offset_6C = nn.Parameter(torch.empty(6, width))
            self.modulation = None
        else:
            self.modulation = Linear(width, 6 * width)

    def forward(
        self,
        x_BLC: Tensor,
        condition: Tensor,
        mask_LL: Tensor | None,
        keep_2B: Tensor | None = None,
        cache: KeyValueCache | None = None,
        angles_2Lr: Tensor | None = None,
    ) -> Tensor:
        """Apply the block.

        Args:
            x_BLC: The residual stream.
            condition: SiLU of the class embedding (B, C), the shared modulation (B, 6, C), or the block's own (B, 6, C)
                where it was computed before (`TokenTransformer.modulations`).
            mask_LL: The block-causal mask; None where all are seen: with a cache, and where there is one map.
            keep_2B: Multipliers of the two branches for each sample (stochastic depth), or None.
            cache: Keys and values of earlier scales, extended by these tokens.
            angles_2Lr: The tokens' rotary positions (`rotary_angles`); None where positions are learned.

        Returns:
            The new residual stream (B, L, C).
        """
        if self.modulation is None:
            modulation_B6C = condition + self.modulation_offset_6C
        elif condition.ndim == 3:
            modulation_B6C = condition
        else:
            modulation_B6C = self.modulation(condition).unflatten(1, (6, -1))
        gates_B2C, scales_B2C, shifts_B2C = modulation_B6C.split(2, dim=1)
        if self.branch_factor != 1:
            gates_B2C = gates_B2C * self.branch_factor
        if keep_2B is not None:
            gates_B2C = gates_B2C * keep_2B.T.unsqueeze(2)
        modulated_BLC = modulate(x_BLC, scales_B2C[:, :1], shifts_B2C[:, :1], centred=self.centred)
        branch_BLC = self.attention(modulated_BLC, mask_LL, cache, angles_2Lr)
        x_BLC = add_projected(x_BLC, gates_B2C[:, :1], branch_BLC, self.attention.projection)
        branch_BLC = self.feedforward(modulate(x_BLC, scales_B2C[:, 1:], shifts_B2C[:, 1:], centred=self.centred))
        return add_projected(x_BLC, gates_B2C[:, 1:], branch_BLC, self.feedforward.contract)

    def weights(self) -> list[Tensor]:
        """All but the modulation's, as `native_blocks` takes them."""
        attention, feedforward = self.attention, self.feedforward
        layers = (attention.projection, feedforward.expand, feedforward.contract)
        joint, log_scale_H = attention.queries_keys_values.weight, attention.log_scale_H
        if log_scale_H is None:
            factor = attention.logit_factor / math.sqrt(joint.shape[1] / attention.heads)
            logarithms_H: Tensor = joint.new_full((attention.heads,), math.log(factor))
        else:
            logarithms_H = log_scale_H
        rest = (parameter for layer in layers for parameter in (layer.weight, layer.bias))
        return [joint, attention.query_bias_C, attention.value_bias_C, logarithms_H, *rest]


class Attention(nn.Module):
    """Multi-head self-attention with biases on queries and values only."""

    def __init__(self, config: TransformerDescription) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.heads, self.logit_factor = heads, config.logit_factor
        self.ends = tuple(end for _, end in scale_bounds(config.pass_sides))
        self.queries_keys_values = Linear(width, 3 * width, bias=False)
        self.query_bias_C = nn.Parameter(torch.empty(width))
        self.value_bias_C = nn.Parameter(torch.empty(width))
        self.log_scale_H = nn.Parameter(torch.empty(heads)) if config.normalise_queries_keys else None
        self.projection = Linear(width, width)

    def forward(
        self, x_BLC: Tensor, mask_LL: Tensor | None, cache: KeyValueCache | None, angles_2Lr: Tensor | None = None
    ) -> Tensor:
        """Attend to all tokens that the mask shows, or to all cached ones; the block applies the last projection."""
        joint_BLJ, scale_H = self.joint(x_BLC, angles_2Lr), self.scale()
        return attend(joint_BLJ, scale_H, self.heads, self.ends, mask_LL, cache, logit_factor=self.logit_factor)

    def joint(self, x_BLC: Tensor, angles_2Lr: Tensor | None) -> Tensor:
        """Queries, keys and values (B, L, J) of the tokens, in their places."""
        joint_BLJ = linear(x_BLC, self.queries_keys_values.weight, self.joint_bias())
        return joint_BLJ if angles_2Lr is None else rotated(joint_BLJ, self.heads, angles_2Lr)

    def scale(self) -> Tensor | None:
        """Each head's factor on the logits, float32 (H,); None where queries and keys keep their length."""
        return None if self.log_scale_H is None else self.log_scale_H.float().clamp_max(math.log(LARGEST_SCALE)).exp()

    def joint_bias(self) -> Tensor:
        """Of queries, keys (none) and values, (J,)."""
        return torch.cat((self.query_bias_C, torch.zeros_like(self.query_bias_C), self.value_bias_C))


class FeedForward(nn.Module):
    """Two linear layers around a GELU (tanh approximation, as in the reference weights)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = Linear(width, hidden)
        self.contract = Linear(hidden, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """(B, L, C) to the hidden channels; the block applies the second layer."""
        hidden_BLF: Tensor = self.expand(x_BLC)
        if torch.compiler.is_compiling():  # the same function, without the slow tanh
            return hidden_BLF * torch.sigmoid(1.5957691216057308 * hidden_BLF * (1 + 0.044715 * hidden_BLF**2))
        return F.gelu(hidden_BLF, approximate="tanh")


class GatedFeedForward(nn.Module):
    """SwiGLU (Shazeer 2020), without biases: half of the first layer gates the other half."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = Linear(width, 2 * hidden, bias=False)
        self.contract = Linear(hidden, width, bias=False)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """(B, L, C) to the hidden channels; the block applies the last layer."""
        joined_BLF: Tensor = self.expand(x_BLC)
        gate_BLF, value_BLF = joined_BLF.chunk(2, dim=-1)
        return F.silu(gate_BLF) * value_BLF


def modulate(x_BLC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor, *, centred: bool = True) -> Tensor:
    """norm(x)·(1 + scale) + shift, by LayerNorm or, not centred, RMSNorm, without parameters of its own."""
    normalise = F.layer_norm if centred else F.rms_norm
    normalised_BLC = normalise(x_BLC, x_BLC.shape[-1:], eps=NORM_EPSILON)
    return torch.addcmul(shift_B1C, normalised_BLC, 1.0 + scale_B1C)


def add_projected(x_BLC: Tensor, gate_B1C: Tensor, branch_BLF: Tensor, projection: nn.Linear) -> Tensor:
    """The residual connection: x plus gate·projection(branch)."""
    return torch.addcmul(x_BLC, gate_B1C, projection(branch_BLF))
