"""VAR: a class-conditional transformer that predicts the next scale of an image's tokens.

Tian et al. 2024, "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction", section 3.2.
All tokens of a scale are predicted at once, from the scales before it.

Letters in tensor names: B batch, K scales, L all tokens of an image, M tokens of some scales, C width, c latent
channels, V vocabulary, D depth.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varscale.families.var.attention import block_causal_mask, level_of_tokens, scale_bounds
from varscale.families.var.blocks import INITIAL_SCALE, Block, modulate
from varscale.kernels.attend import KeyValueCache
from varscale.numerics.precision import without_autocast
from varscale.tokenizer.quantizer import validated_patch_nums

MOST_COMPILATIONS = 128
"""Of the block in one process: sizes of a sweep, each for whole and last parts of a step; beyond, PyTorch fails."""


class VAR(nn.Module):
    """Next-scale transformer over the tokens of a `MultiScaleTokenizer`."""

    def __init__(
        self,
        patch_nums: Sequence[int],
        vocab_size: int,
        latent_channels: int,
        num_classes: int,
        depth: int,
        width: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        shared_adaln: bool = False,
        normalise_queries_keys: bool = True,
        adaln_gamma_init: float = 1e-3,
        adaln_init: float = 0.5,
        head_init: float = 0.02,
        init_std: float = -1.0,
    ) -> None:
        """Build and initialise the model.

        Args:
            patch_nums: Side of each scale's token map, strictly growing.
            vocab_size: Number of codes V of the tokenizer.
            latent_channels: Channels c of its latents.
            num_classes: Classes 0 … num_classes - 1; the label num_classes stands for "no class".
            depth: Number of blocks D.
            width: Channels C of a token.
            heads: Attention heads; must divide the width.
            mlp_ratio: Hidden channels of the feed-forward layers, as a multiple of the width.
            drop_path_rate: Stochastic depth of the last block; the others' rates grow linearly from 0.
            shared_adaln: One modulation for all blocks plus an offset for each (the paper's 512 px model).
            normalise_queries_keys: Unit queries and keys with a learned scale a head; else a fixed scale 0.25/√d.
            adaln_gamma_init: Factor on the initial weights that make the gates γ.
            adaln_init: Factor on the initial weights that make scales and shifts.
            head_init: Factor on the initial weights of the output layer.
            init_std: Standard deviation of the initial weights; negative means √(1/(3C)).

        Raises:
            ValueError: If a size is not positive, patch_nums don't grow, or heads don't divide the width.
        """
        super().__init__()
        self.patch_nums = validated_patch_nums(patch_nums)
        sizes = {
            "vocab_size": vocab_size,
            "latent_channels": latent_channels,
            "num_classes": num_classes,
            "depth": depth,
            "width": width,
            "heads": heads,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of heads {heads}")
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must lie in [0, 1), not {drop_path_rate}")
        self.vocab_size, self.latent_channels, self.num_classes = vocab_size, latent_channels, num_classes
        self.depth, self.width, self.heads, self.mlp_ratio = depth, width, heads, mlp_ratio
        self.shared_adaln, self.normalise_queries_keys = shared_adaln, normalise_queries_keys
        self.drop_path_rates = tuple(drop_path_rate * index / max(depth - 1, 1) for index in range(depth))
        self.adaln_gamma_init, self.adaln_init, self.head_init = adaln_gamma_init, adaln_init, head_init
        self.init_std = init_std if init_std >= 0 else math.sqrt(1 / (3 * width))
        self.scale_bounds = scale_bounds(self.patch_nums)
        self.tokens = self.scale_bounds[-1][1]
        self.first_tokens = self.scale_bounds[0][1]

        self.word_embedding = nn.Linear(latent_channels, width)
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.start_MC = nn.Parameter(torch.empty(self.first_tokens, width))
        self.position_LC = nn.Parameter(torch.empty(self.tokens, width))
        self.level_KC = nn.Parameter(torch.empty(len(self.patch_nums), width))
        self.shared_modulation = nn.Linear(width, 6 * width) if shared_adaln else None
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                round(width * mlp_ratio),
                patch_nums=self.patch_nums,
                shared_adaln=shared_adaln,
                normalise_queries_keys=normalise_queries_keys,
            )
            for _ in range(depth)
        )
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, vocab_size)
        self.initialise()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, as the reference does; to be called after a meta-device model was given memory.

        Matrices and embeddings are normal, cut at ±2, with deviation `init_std`; biases are zero; what feeds the
        residual stream is divided by √(2·depth). With the output layer times `head_init`, the first loss is ln V.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=self.init_std, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.level_KC, std=self.init_std, generator=generator)
        for embedding in (self.start_MC, self.position_LC):  # these follow the width, whatever init_std says
            nn.init.trunc_normal_(embedding, std=math.sqrt(1 / (3 * self.width)), generator=generator)
        self.head.weight.mul_(self.head_init)
        self.head_modulation.weight.mul_(self.adaln_init)
        for block in self.blocks:
            assert isinstance(block, Block)
            self._initialise_block(block, generator)

    def _initialise_block(self, block: Block, generator: torch.Generator | None) -> None:
        for bias in (block.attention.query_bias_C, block.attention.value_bias_C):
            nn.init.zeros_(bias)
        if block.attention.log_scale_H is not None:
            nn.init.constant_(block.attention.log_scale_H, math.log(INITIAL_SCALE))
        block.attention.projection.weight.div_(math.sqrt(2 * self.depth))
        block.feedforward.contract.weight.div_(math.sqrt(2 * self.depth))
        if block.modulation is None:
            offsets_6C = block.modulation_offset_6C
            nn.init.normal_(offsets_6C, std=self.width**-0.5, generator=generator)
            gates, others = offsets_6C[:2], offsets_6C[2:]
        else:
            weight = block.modulation.weight
            gates, others = weight[: 2 * self.width], weight[2 * self.width :]
        gates.mul_(self.adaln_gamma_init)
        others.mul_(self.adaln_init)

    def forward(self, labels_B: Tensor, inputs_BMc: Tensor, *, keep_D2B: Tensor | None = None) -> Tensor:
        """Predict all tokens at once from the true coarser scales (teacher forcing).

        Args:
            labels_B: int64 classes, num_classes for none.
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
        """The class embedding (B, C), and what blocks are modulated by: its SiLU (B, C), or (B, 6, C) if shared."""
        condition_BC = self.class_embedding(labels_B)
        activated_BC = F.silu(condition_BC)
        if self.shared_modulation is None:
            return condition_BC, activated_BC
        return condition_BC, self.shared_modulation(activated_BC).unflatten(1, (6, self.width))

    def first_input(self, condition_BC: Tensor) -> Tensor:
        """The first scale's input (B, p_1², C), without place embeddings: the class and the start position."""
        return condition_BC.unsqueeze(1) + self.start_MC

    def embed(self, inputs_BMc: Tensor) -> Tensor:
        """The inputs of later scales as float32 (B, M, C), also under autocast, without place embeddings."""
        with without_autocast(inputs_BMc.device):
            embedded_BMC: Tensor = self.word_embedding(inputs_BMc.to(self.word_embedding.weight.dtype))
            return embedded_BMC

    def place_embedding(self, begin: int, end: int) -> Tensor:
        """Sum of level and position embeddings (end - begin, C) of a range of tokens."""
        level_L = level_of_tokens(self.patch_nums, self.position_LC.device)
        return F.embedding(level_L[begin:end], self.level_KC) + self.position_LC[begin:end]

    def logits(self, x_BMC: Tensor, condition_BC: Tensor) -> Tensor:
        """The output layer: float32 logits (B, M, V), also under autocast."""
        with without_autocast(x_BMC.device):
            # .float() does nothing unless sharding keeps the weights themselves in lower precision
            modulation_BC = F.linear(F.silu(condition_BC.float()), *_float32(self.head_modulation))
            scale_BC, shift_BC = modulation_BC.chunk(2, dim=1)
            normalised_BMC = modulate(x_BMC.float(), scale_BC.unsqueeze(1), shift_BC.unsqueeze(1))
            return F.linear(normalised_BMC, *_float32(self.head))

    def new_caches(self) -> list[KeyValueCache]:
        """Empty key-value caches for `transform`, one a block."""
        return [KeyValueCache(self.tokens) for _ in range(self.depth)]

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
            modulation: From `condition`.
            keep_D2B: See `forward`.
            caches: From `new_caches`: hold the scales before these, and are extended.

        Returns:
            The residual stream (B, M, C), float32, for `logits`.
        """
        mask_MM = None
        if caches is None:
            mask_MM = block_causal_mask(self.patch_nums, x_BMC.device)[: x_BMC.shape[1], : x_BMC.shape[1]]
        keeps = [None] * self.depth if keep_D2B is None else keep_D2B.to(x_BMC.dtype).unbind(0)
        for index, block in enumerate(self.blocks):
            x_BMC = block(x_BMC, modulation, mask_MM, keeps[index], None if caches is None else caches[index])
        return x_BMC

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the blocks in place: one compilation serves all of them, and state-dict keys stay as they are."""
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False, backend=backend, recompile_limit=MOST_COMPILATIONS)

    def parameter_names_without_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: biases, and place, start, scale and offset tables."""
        special = ("start_MC", "position_LC", "level_KC", "log_scale_H", "modulation_offset_6C")
        return {name for name, parameter in self.named_parameters() if parameter.ndim == 1 or name.endswith(special)}


def _float32(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    return linear.weight.float(), linear.bias.float()
