"""A class-conditional transformer that predicts an image's tokens map by map, each from the maps before it.

Tian et al. 2024, "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction", section 3.2,
where the maps are scales.

Letters in tensor names: B batch, K scales, L all tokens of an image, M tokens of some scales, C width, c latent
channels, V vocabulary, D depth.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varscale.families.models import FamilyModel, condition_embedding
from varscale.families.shared.attention import block_causal_mask, level_of_tokens, rotary_angles, scale_bounds
from varscale.families.shared.blocks import INITIAL_SCALE, LARGEST_SCALE, Block, modulate
from varscale.families.shared.description import TransformerDescription
from varscale.families.shared.native import modulations, run_as_one
from varscale.kernels.attend import KeyValueCache
from varscale.kernels.blocks import native_blocks
from varscale.kernels.linear import Linear, linear
from varscale.numerics.precision import without_autocast


class TokenTransformer(FamilyModel):
    """A transformer that predicts an image's tokens map by map: what VAR and others that are built like it share.

    `config.pass_sides` says which tokens are predicted at once. For VAR these are the scales, and where this class
    speaks of scales, other families have their own maps.
    """

    def __init__(self, config: TransformerDescription) -> None:
        """Build and initialise the model that `config` describes."""
        super().__init__()
        self.config: TransformerDescription = config
        self.scale_bounds = scale_bounds(config.pass_sides)
        self.first_tokens = self.scale_bounds[0][1]
        width = config.width
        self.word_embedding = Linear(config.latent_channels, width)
        self.class_embedding = condition_embedding(config, width)
        self.start_MC = nn.Parameter(torch.empty(self.first_tokens, width))
        self.position_LC = None if config.modern else nn.Parameter(torch.empty(config.tokens, width))
        self.level_KC = nn.Parameter(torch.empty(len(config.patch_nums), width))
        self.shared_modulation = Linear(width, 6 * width) if config.shared_adaln else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_modulation = Linear(width, 2 * width)
        self.head = Linear(width, config.outputs)
        self.initialise()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, as the reference does; to be called after a meta-device model was given memory.

        Matrices and embeddings are normal, cut at ±2, with deviation `init_std`; biases are zero; what feeds the
        residual stream is divided by √(2·depth). With the output layer times `head_init`, the first loss is ln V.

        Parametrizations scaled from a base leave tables, embeddings and the output layer the deviation that they have
        there, and what feeds the residual stream the base's divisor (the branches are divided instead).
        """
        config = self.config
        by_width = math.sqrt(1 / (3 * config.width))
        deviation = by_width if config.init_std is None else config.init_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=deviation, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.level_KC, std=deviation, generator=generator)
        for embedding in (self.start_MC, self.position_LC):  # these follow the width, whatever init_std says
            if embedding is not None:
                nn.init.trunc_normal_(embedding, std=by_width, generator=generator)
        self.head.weight.mul_(config.head_init)
        self.head_modulation.weight.mul_(config.adaln_init)
        for block in self._layers:
            self._initialise_block(block, generator)
        if config.growth.width != 1:
            offsets = [block.modulation_offset_6C for block in self._layers if block.modulation is None]
            tables = [self.start_MC, self.position_LC, self.level_KC, *offsets]
            for weight in (self.word_embedding.weight, *self.class_embedding.parameters(), self.head.weight, *tables):
                if weight is not None:
                    weight.mul_(math.sqrt(config.growth.width))

    def _initialise_block(self, block: Block, generator: torch.Generator | None) -> None:
        for bias in (block.attention.query_bias_C, block.attention.value_bias_C):
            nn.init.zeros_(bias)
        if block.attention.log_scale_H is not None:
            nn.init.constant_(block.attention.log_scale_H, math.log(INITIAL_SCALE))
        branches = 2 * (self.config.base_depth or self.config.depth)
        block.attention.projection.weight.div_(math.sqrt(branches))
        block.feedforward.contract.weight.div_(math.sqrt(branches))
        if block.modulation is None:
            offsets_6C = block.modulation_offset_6C
            nn.init.normal_(offsets_6C, std=self.config.width**-0.5, generator=generator)
            gates, others = offsets_6C[:2], offsets_6C[2:]
        else:
            weight = block.modulation.weight
            gates, others = weight[: 2 * self.config.width], weight[2 * self.config.width :]
        gates.mul_(self.config.adaln_gamma_init)
        others.mul_(self.config.adaln_init)

    def forward(self, labels_B: Tensor, inputs_BMc: Tensor, *, keep_D2B: Tensor | None = None) -> Tensor:
        """Predict all tokens at once from the true coarser scales (teacher forcing).

        Args:
            labels_B: int64 classes, num_classes for none; or captions (B, D), zeros for none.
            inputs_BMc: (B, L - p_1², c), from `next_scale_inputs`.
            keep_D2B: Stochastic-depth multipliers for each block, branch (attention, feed-forward) and sample, 0 or
                1/keep_probability; None for none.

        Returns:
            Logits (B, L, V), float32.
        """
        condition_BC, modulation = self.condition(labels_B)
        x_BLC = torch.cat((self.first_input(condition_BC), self.embed(inputs_BMc)), dim=1)
        x_BLC = x_BLC + self.place_embedding(0, x_BLC.shape[1])
        return self.logits(self.transform(x_BLC, modulation, keep_D2B=keep_D2B), condition_BC)

    def condition(self, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """A class's or caption's vector (B, C), and what modulates blocks: its SiLU (B, C), or (B, 6, C) if shared."""
        with without_autocast(labels_B.device):
            condition_BC = self.class_embedding(labels_B)
        activated_BC = F.silu(condition_BC)
        if self.shared_modulation is None:
            return condition_BC, activated_BC
        return condition_BC, self.shared_modulation(activated_BC).unflatten(1, (6, self.config.width))

    def modulations(self, modulation: Tensor) -> Tensor:
        """Each block's own modulation (D, B, 6, C), for many passes of the same labels; a shared one stays as it is."""
        if self.shared_modulation is not None:
            return modulation
        own_DBJ = torch.stack([block.modulation(modulation) for block in self._layers if block.modulation is not None])
        own_DB6C: Tensor = own_DBJ.unflatten(2, (6, self.config.width))
        return own_DB6C

    def first_input(self, condition_BC: Tensor) -> Tensor:
        """The first scale's input (B, p_1², C), without place embeddings: the class and the start position."""
        return condition_BC.unsqueeze(1) + self.start_MC

    def embed(self, inputs_BMc: Tensor) -> Tensor:
        """The inputs of later scales as float32 (B, M, C), also under autocast, without place embeddings."""
        with without_autocast(inputs_BMc.device):
            embedded_BMC: Tensor = self.word_embedding(inputs_BMc.to(self.word_embedding.weight.dtype))
            return embedded_BMC

    def place_embedding(self, begin: int, end: int) -> Tensor:
        """Sum of level and, where these are learned, position embeddings (end - begin, C) of a range of tokens."""
        level_L = level_of_tokens(self.config.patch_nums, self.level_KC.device)
        level_MC = F.embedding(level_L[begin:end], self.level_KC)
        return level_MC if self.position_LC is None else level_MC + self.position_LC[begin:end]

    def logits(self, x_BMC: Tensor, condition_BC: Tensor, *, guidance: float = 0.0) -> Tensor:
        """The output layer: float32 logits (B, M, V), also under autocast.

        Args:
            x_BMC: The residual stream.
            condition_BC: The class embedding.
            guidance: t > 0: of 2·B rows, the first half has a class and the second none, and the logits are
                (1 + t)·the first's - t·the second's. The head is linear, so it is applied once, to this mixture.
        """
        with without_autocast(x_BMC.device):
            # .float() does nothing unless sharding keeps the weights themselves in lower precision
            modulation_BC = linear(F.silu(condition_BC.float()), *_float32(self.head_modulation))
            scale_BC, shift_BC = modulation_BC.chunk(2, dim=1)
            centred = not self.config.modern
            normalised_BMC = modulate(x_BMC.float(), scale_BC.unsqueeze(1), shift_BC.unsqueeze(1), centred=centred)
            if guidance:
                conditional_BMC, unconditional_BMC = normalised_BMC.chunk(2)
                normalised_BMC = torch.lerp(unconditional_BMC, conditional_BMC, 1 + guidance)
            if self.config.growth.width != 1:
                normalised_BMC = normalised_BMC / self.config.growth.width
            return linear(normalised_BMC, *_float32(self.head))

    def new_caches(self) -> list[KeyValueCache]:
        """Empty key-value caches for `transform`, one a block."""
        return [KeyValueCache(self.config.tokens) for _ in range(self.config.depth)]

    def transform(
        self,
        x_BMC: Tensor,
        modulation: Tensor,
        *,
        keep_D2B: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """Pass embedded inputs through all blocks.

        Args:
            x_BMC: The first M tokens' embedded inputs; with caches, the next scale's only.
            modulation: From `condition` or `modulations`.
            keep_D2B: See `forward`.
            caches: From `new_caches`: hold the scales before these, and are extended.

        Returns:
            The residual stream (B, M, C), float32, for `logits`.
        """
        config, layers = self.config, self._layers
        natively = not config.modern and not (caches and torch.is_grad_enabled())
        normalised = config.normalise_queries_keys
        if natively and run_as_one(x_BMC, layers, config.heads, config.hidden, normalised=normalised):
            return self._by_native_kernel(x_BMC, modulation, keep_D2B, caches or ())
        mask_MM, angles_2Mr, tokens = None, None, x_BMC.shape[1]
        if caches is None and len(self.config.pass_sides) > 1:
            mask_MM = block_causal_mask(self.config.pass_sides, x_BMC.device)[:tokens, :tokens]
        if self.config.modern:
            begin = caches[0].length if caches else 0
            angles_2Lr = rotary_angles(self.config.patch_nums, self.config.head_channels, x_BMC.device)
            angles_2Mr = angles_2Lr[:, begin : begin + tokens]
        keeps = [None] * self.config.depth if keep_D2B is None else keep_D2B.to(x_BMC.dtype).unbind(0)
        for index, block in enumerate(self.blocks):
            cache = None if caches is None else caches[index]
            of_block = modulation[index] if modulation.ndim == 4 else modulation
            x_BMC = block(x_BMC, of_block, mask_MM, keeps[index], cache, angles_2Mr)
        return x_BMC

    @property
    def _layers(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def _by_native_kernel(
        self, x_BMC: Tensor, modulation: Tensor, keep_D2B: Tensor | None, caches: Sequence[KeyValueCache]
    ) -> Tensor:
        blocks = self._layers
        if modulation.ndim == 4:
            modulation_DB6C = modulation
        elif self.shared_modulation is None:
            projections = [block.modulation for block in blocks if block.modulation is not None]
            modulation_DB6C = modulations(projections, modulation)
        else:
            modulation_DB6C = modulation + torch.stack([block.modulation_offset_6C for block in blocks]).unsqueeze(1)
        if keep_D2B is not None:
            modulation_DB6C = _gated(modulation_DB6C, keep_D2B.to(x_BMC.dtype).transpose(1, 2).unsqueeze(3))
        if blocks[0].branch_factor != 1:
            modulation_DB6C = _gated(modulation_DB6C, blocks[0].branch_factor)
        tokens = x_BMC.shape[1]
        ends = [tokens] if caches else [end for _, end in self.scale_bounds if end <= tokens]
        weights = [weight for block in blocks for weight in block.weights()]
        normalised = self.config.normalise_queries_keys
        log_limit = math.log(LARGEST_SCALE)
        return native_blocks(x_BMC, modulation_DB6C, log_limit, ends, weights, caches, normalised=normalised)


def _gated(modulation_DB6C: Tensor, factor_DB21: Tensor | float) -> Tensor:
    """The modulation with the gates of both branches times a factor."""
    return torch.cat((modulation_DB6C[:, :, :2] * factor_DB21, modulation_DB6C[:, :, 2:]), dim=2)


def _float32(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight.float(), layer.bias.float()
