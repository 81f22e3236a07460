"""A plain VAR in PyTorch, written directly from the paper, and its training step: what ours is held against.

Tian et al. 2024, "Visual Autoregressive Modeling", section 3.2 and appendix B. Nothing is fused or compiled: a dense
float mask, normalisation and modulation as they are written, the inputs of each scale by a chain of `F.interpolate`,
PyTorch's AdamW as it comes. Parameters have the names of `varscale.families.var.transformer`, so that weights can be
copied.

Letters in tensor names: B batch, K scales, L all tokens of an image, M tokens of some scales, C width, c latent
channels, h and w latent height and width, H heads, d channels of a head, V vocabulary.
"""

import math
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varscale.families.var.transformer import VAR
from varscale.tokenizer.quantizer import MultiScaleQuantizer

AttentionBy = Literal["products", "library"]
"""Two matrix products and a softmax, or PyTorch's `scaled_dot_product_attention` (as the reference has it)."""


class PlainAttention(nn.Module):
    def __init__(self, width: int, heads: int, by: AttentionBy) -> None:
        super().__init__()
        self.heads, self.by = heads, by
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.query_bias_C = nn.Parameter(torch.zeros(width))
        self.value_bias_C = nn.Parameter(torch.zeros(width))
        self.log_scale_H = nn.Parameter(torch.full((heads,), math.log(4.0)))
        self.projection = nn.Linear(width, width)

    def forward(self, x_BLC: Tensor, mask_LL: Tensor | None, cache: list[Tensor] | None = None) -> Tensor:
        queries_BLC, keys_BLC, values_BLC = self.queries_keys_values(x_BLC).chunk(3, dim=2)
        queries_BHLd = self._by_head(queries_BLC + self.query_bias_C)
        keys_BHLd = self._by_head(keys_BLC)
        values_BHLd = self._by_head(values_BLC + self.value_bias_C)
        scale_H11 = self.log_scale_H.clamp_max(math.log(100.0)).exp()[:, None, None]
        queries_BHLd = F.normalize(queries_BHLd, dim=3) * scale_H11
        keys_BHLd = F.normalize(keys_BHLd, dim=3)
        if cache is not None:  # as the reference does; every token sees all before it
            if cache:
                keys_BHLd, values_BHLd = torch.cat((cache[0], keys_BHLd), 2), torch.cat((cache[1], values_BHLd), 2)
            cache[:] = keys_BHLd, values_BHLd
        if self.by == "library":
            mask_LL = None if mask_LL is None else mask_LL.to(queries_BHLd.dtype)
            out_BHLd = F.scaled_dot_product_attention(
                queries_BHLd, keys_BHLd.to(queries_BHLd.dtype), values_BHLd.to(queries_BHLd.dtype), mask_LL, scale=1.0
            )
        else:
            weights_BHLL = queries_BHLd @ keys_BHLd.transpose(2, 3)
            weights_BHLL = weights_BHLL if mask_LL is None else weights_BHLL + mask_LL
            out_BHLd = torch.softmax(weights_BHLL, dim=3) @ values_BHLd
        return cast(Tensor, self.projection(out_BHLd.transpose(1, 2).flatten(2)))

    def _by_head(self, x_BLC: Tensor) -> Tensor:
        return x_BLC.unflatten(2, (self.heads, -1)).transpose(1, 2)


class PlainFeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return cast(Tensor, self.contract(F.gelu(self.expand(x_BLC), approximate="tanh")))


class PlainBlock(nn.Module):
    """x + γ₁·attention(modulated x), then x + γ₂·feed-forward(modulated x), modulated by a linear layer of its own."""

    def __init__(self, width: int, heads: int, hidden: int, by: AttentionBy) -> None:
        super().__init__()
        self.attention = PlainAttention(width, heads, by)
        self.feedforward = PlainFeedForward(width, hidden)
        self.normalise = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self, x_BLC: Tensor, condition_BC: Tensor, mask_LL: Tensor | None, cache: list[Tensor] | None = None
    ) -> Tensor:
        parts_B1C = self.modulation(F.silu(condition_BC)).unsqueeze(1).chunk(6, dim=2)
        gate1_B1C, gate2_B1C, scale1_B1C, scale2_B1C, shift1_B1C, shift2_B1C = parts_B1C
        modulated_BLC = self.normalise(x_BLC) * (1 + scale1_B1C) + shift1_B1C
        x_BLC = x_BLC + gate1_B1C * self.attention(modulated_BLC, mask_LL, cache)
        return x_BLC + gate2_B1C * self.feedforward(self.normalise(x_BLC) * (1 + scale2_B1C) + shift2_B1C)


class PlainVAR(nn.Module):
    """The transformer, with the frozen codebook and φ convolutions that make each scale's inputs."""

    def __init__(self, like: VAR, quantizer: MultiScaleQuantizer, by: AttentionBy, label_dropout: float) -> None:
        """Build the model of the same shape as one of ours, with its weights.

        Args:
            like: The shape and the weights; with AdaLN of its own in each block and normalised queries and keys.
            quantizer: Codebook and φ convolutions.
            by: How attention is computed.
            label_dropout: Probability that a label is replaced by "no class".
        """
        super().__init__()
        config = like.config
        self.patch_nums, self.num_classes, self.label_dropout = config.patch_nums, config.num_classes, label_dropout
        width = config.width
        self.word_embedding = nn.Linear(config.latent_channels, width)
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)
        self.start_MC = nn.Parameter(torch.empty(like.first_tokens, width))
        self.position_LC = nn.Parameter(torch.empty(config.tokens, width))
        self.level_KC = nn.Parameter(torch.empty(len(config.patch_nums), width))
        self.blocks = nn.ModuleList(PlainBlock(width, config.heads, config.hidden, by) for _ in range(config.depth))
        self.normalise = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, config.vocab_size)
        self.load_state_dict(like.state_dict())  # before the buffers below, which ours has elsewhere

        level_L = torch.cat([torch.full((side * side,), k) for k, side in enumerate(config.patch_nums)])
        mask_LL = torch.where(level_L[:, None] >= level_L[None, :], 0.0, -torch.inf)
        self.register_buffer("level_L", level_L)
        self.register_buffer("mask_LL", mask_LL)
        self.register_buffer("codebook_Vc", quantizer.codebook_Vc.detach().clone())
        for k, index in enumerate(quantizer.phi_of_scale):
            convolution = quantizer.phi[index]
            assert isinstance(convolution, nn.Conv2d)
            assert convolution.bias is not None
            self.register_buffer(f"phi_weight_{k}", convolution.weight.detach().clone())
            self.register_buffer(f"phi_bias_{k}", convolution.bias.detach().clone())
        self.phi_ratio = quantizer.phi_ratio

    level_L: Tensor
    mask_LL: Tensor
    codebook_Vc: Tensor

    def loss(self, tokens_BL: Tensor, labels_B: Tensor) -> Tensor:
        """Mean cross-entropy of all tokens, teacher-forced, nats a token."""
        dropped_B = torch.rand(len(labels_B), device=labels_B.device) < self.label_dropout
        logits_BLV = self(labels_B.masked_fill(dropped_B, self.num_classes), self.next_scale_inputs(tokens_BL))
        return F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten())

    def forward(self, labels_B: Tensor, inputs_BMc: Tensor) -> Tensor:
        """Logits (B, L, V) of all tokens from the true coarser scales, or of the first scales from a prefix."""
        condition_BC = self.class_embedding(labels_B)
        start_BMC = condition_BC.unsqueeze(1) + self.start_MC
        x_BLC = torch.cat((start_BMC, self.word_embedding(inputs_BMc)), dim=1)
        tokens = x_BLC.shape[1]
        x_BLC = x_BLC + self.level_KC[self.level_L[:tokens]] + self.position_LC[:tokens]
        mask_LL = self.mask_LL[:tokens, :tokens]
        for block in self.blocks:
            x_BLC = block(x_BLC, condition_BC, mask_LL)
        return self._logits(x_BLC, condition_BC)

    @torch.no_grad()
    def next_scale_inputs(self, tokens_BL: Tensor) -> Tensor:
        """The inputs (B, L - p_1², c) of scales 2 … K (algorithm 2, one scale after the other)."""
        features_hat_BChw, inputs, begin = self._zeros(len(tokens_BL)), [], 0
        for k, patch_num in enumerate(self.patch_nums[:-1]):
            features_hat_BChw = features_hat_BChw + self._contribution(tokens_BL[:, begin : begin + patch_num**2], k)
            begin += patch_num**2
            inputs.append(self._resized(features_hat_BChw, self.patch_nums[k + 1]))
        return torch.cat(inputs, dim=1)

    @torch.no_grad()
    def sample(self, labels_B: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
        """Features (B, c, h, w) to decode, and all tokens, as the reference's `autoregressive_infer_cfg` draws them."""
        both_B = torch.cat((labels_B, torch.full_like(labels_B, self.num_classes)))
        condition_BC, batch = self.class_embedding(both_B), len(labels_B)
        place_LC = self.level_KC[self.level_L] + self.position_LC
        features_hat_BChw, tokens, begin = self._zeros(batch), [], 0
        x_BMC = condition_BC.unsqueeze(1) + self.start_MC
        caches: list[list[Tensor]] = [[] for _ in self.blocks]
        for k, patch_num in enumerate(self.patch_nums):
            end = begin + patch_num**2
            x_BMC = x_BMC + place_LC[begin:end]
            for block, cache in zip(self.blocks, caches, strict=True):
                x_BMC = block(x_BMC, condition_BC, None, cache)
            conditional_BMV, unconditional_BMV = self._logits(x_BMC, condition_BC).chunk(2)
            t = guidance * k / (len(self.patch_nums) - 1)
            probability_BMV = ((1 + t) * conditional_BMV - t * unconditional_BMV).softmax(dim=2)
            tokens_BM = torch.multinomial(probability_BMV.flatten(0, 1), 1).view(batch, -1)
            tokens.append(tokens_BM)
            features_hat_BChw = features_hat_BChw + self._contribution(tokens_BM, k)
            if end < len(self.level_L):
                inputs_BMc = self._resized(features_hat_BChw, self.patch_nums[k + 1])
                x_BMC = self.word_embedding(inputs_BMc).repeat(2, 1, 1)
            begin = end
        return features_hat_BChw, torch.cat(tokens, dim=1)

    def _logits(self, x_BLC: Tensor, condition_BC: Tensor) -> Tensor:
        scale_B1C, shift_B1C = self.head_modulation(F.silu(condition_BC)).unsqueeze(1).chunk(2, dim=2)
        logits_BLV: Tensor = self.head(self.normalise(x_BLC.float()) * (1 + scale_B1C) + shift_B1C)
        return logits_BLV.float()

    def _zeros(self, batch: int) -> Tensor:
        side = self.patch_nums[-1]
        return self.codebook_Vc.new_zeros(batch, self.codebook_Vc.shape[1], side, side)

    def _contribution(self, tokens_BM: Tensor, scale: int) -> Tensor:
        """What one scale's tokens add to the features."""
        patch_num, side = self.patch_nums[scale], self.patch_nums[-1]
        codes_BCpp = self.codebook_Vc[tokens_BM].transpose(1, 2).unflatten(2, (patch_num, patch_num))
        codes_BChw = codes_BCpp
        if patch_num < side:
            codes_BChw = F.interpolate(codes_BCpp, size=(side, side), mode="bicubic")
        weight, bias = self.get_buffer(f"phi_weight_{scale}"), self.get_buffer(f"phi_bias_{scale}")
        refined_BChw = F.conv2d(codes_BChw, weight, bias, padding=1)
        return (1 - self.phi_ratio) * codes_BChw + self.phi_ratio * refined_BChw

    def _resized(self, features_hat_BChw: Tensor, patch_num: int) -> Tensor:
        return F.interpolate(features_hat_BChw, size=(patch_num, patch_num), mode="area").flatten(2).mT


class PlainTraining:
    """Forward, backward, clip and AdamW, one after the other."""

    def __init__(self, model: PlainVAR, *, lr: float, weight_decay: float, grad_clip: float) -> None:
        self.model, self.grad_clip = model, grad_clip
        tables = ("start_MC", "position_LC", "level_KC", "log_scale_H")
        named = list(model.named_parameters())
        plain = {name for name, parameter in named if parameter.ndim == 1 or name.endswith(tables)}
        groups = [
            {"params": [parameter for name, parameter in named if name not in plain], "weight_decay": weight_decay},
            {"params": [parameter for name, parameter in named if name in plain], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))

    def step(self, batch: dict[str, Tensor]) -> float:
        """One step on `tokens_BL` and `labels_B`; the loss before it."""
        loss = self.model.loss(batch["tokens_BL"], batch["labels_B"])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()
