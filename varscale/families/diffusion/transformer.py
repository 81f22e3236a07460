"""DiT: a transformer over patches of noisy latents that is told time and class by its normalisations (adaLN-zero).

Peebles and Xie 2023, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), section 3.2.

Letters in tensor names: B batch, L tokens, C width, P numbers of a patch, W waves of the time, h and w height and width
of the latents; in BChw, C is the latents' channels.
"""

import functools
import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varscale.families.diffusion.config import TIME_WAVES, DiTConfig
from varscale.families.models import LatentModel, condition_embedding
from varscale.families.shared.blocks import FeedForward, add_projected, modulate
from varscale.families.shared.native import modulations, run_as_one
from varscale.kernels.attend import attend
from varscale.kernels.blocks import native_blocks
from varscale.kernels.linear import Linear
from varscale.numerics.precision import without_autocast

LONGEST_WAVE = 10_000


class DiT(LatentModel):
    """The velocity, or the noise, of noisy latents."""

    def __init__(self, config: DiTConfig) -> None:
        """Build and initialise the model that `config` describes."""
        super().__init__(config.latent_channels)
        self.config: DiTConfig = config
        width = config.width
        self.patch_embedding = Linear(config.outputs, width)
        self.time_embedding = nn.Sequential(Linear(TIME_WAVES, width), nn.SiLU(), Linear(width, width))
        self.class_embedding = condition_embedding(config, width)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.head_modulation = Linear(width, 2 * width)
        self.head = Linear(width, config.outputs)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """As DiT does: what each block adds is zero at first, and so is the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedding in (self.class_embedding, self.time_embedding[0], self.time_embedding[2]):
            assert isinstance(embedding, nn.Linear | nn.Embedding)
            nn.init.normal_(embedding.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(("modulation.weight", "head.weight")):
                nn.init.zeros_(parameter)

    def forward(self, noisy_BChw: Tensor, moments_B: Tensor, labels_B: Tensor) -> Tensor:
        """What the model says of latents at a time.

        Args:
            noisy_BChw: Standardised latents with noise.
            moments_B: Times from 0 to 1000.
            labels_B: int64 classes, num_classes for none; or captions (B, D), zeros for none.

        Returns:
            Velocity or noise, float32 (B, C, h, w), also under autocast.
        """
        config = self.config
        condition_BC = self.time_embedding(_waves(moments_B, TIME_WAVES // 2)) + self.class_embedding(labels_B)
        activated_BC = F.silu(condition_BC)
        with without_autocast(noisy_BChw.device):
            x_BLC = self.patch_embedding(patches(noisy_BChw.float(), config.patch_size))
        x_BLC = x_BLC + _position_embedding(config.side, config.width, noisy_BChw.device)
        x_BLC = self._transform(x_BLC, activated_BC)
        with without_autocast(noisy_BChw.device):
            scale_BC, shift_BC = self.head_modulation(activated_BC.float()).chunk(2, dim=1)
            out_BLP = self.head(modulate(x_BLC.float(), scale_BC.unsqueeze(1), shift_BC.unsqueeze(1)))
        return unpatched(out_BLP, config.patch_size, noisy_BChw.shape[1])

    def _transform(self, x_BLC: Tensor, activated_BC: Tensor) -> Tensor:
        """Pass embedded patches through all blocks."""
        blocks = cast(list[DiTBlock], list(self.blocks))
        if run_as_one(x_BLC, blocks, self.config.heads, self.config.hidden, normalised=False):
            modulation_DB6C = modulations([block.modulation for block in blocks], activated_BC)
            weights = [weight for block in blocks for weight in block.weights()]
            return native_blocks(x_BLC, modulation_DB6C, math.inf, [x_BLC.shape[1]], weights, normalised=False)
        for block in blocks:
            x_BLC = block(x_BLC, activated_BC)
        return x_BLC


class DiTBlock(nn.Module):
    """x + γ₁·attention(modulated x), then x + γ₂·feed-forward(modulated x)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.modulation = Linear(width, 6 * width)
        self.queries_keys_values = Linear(width, 3 * width)
        self.projection = Linear(width, width)
        self.feedforward = FeedForward(width, config.hidden)

    def forward(self, x_BLC: Tensor, activated_BC: Tensor) -> Tensor:
        """Apply the block; the condition has passed its SiLU."""
        gates_B2C, scales_B2C, shifts_B2C = self.modulation(activated_BC).unflatten(1, (6, -1)).split(2, dim=1)
        branch_BLC = self._attention(modulate(x_BLC, scales_B2C[:, :1], shifts_B2C[:, :1]))
        x_BLC = add_projected(x_BLC, gates_B2C[:, :1], branch_BLC, self.projection)
        branch_BLC = self.feedforward(modulate(x_BLC, scales_B2C[:, 1:], shifts_B2C[:, 1:]))
        return add_projected(x_BLC, gates_B2C[:, 1:], branch_BLC, self.feedforward.contract)

    def _attention(self, x_BLC: Tensor) -> Tensor:
        """All tokens see each other; the block applies the last projection."""
        joint_BLJ = self.queries_keys_values(x_BLC)
        return attend(joint_BLJ, None, self.heads, (x_BLC.shape[1],), None, logit_factor=1.0)

    def weights(self) -> list[Tensor]:
        """All but the modulation's, as `native_blocks` takes them: without the bias of keys, which changes nothing."""
        joint, layers = self.queries_keys_values, (self.projection, self.feedforward.expand, self.feedforward.contract)
        width = joint.in_features
        query_bias_C, _, value_bias_C = joint.bias.split(width)
        log_scale_H = joint.bias.new_full((self.heads,), -0.5 * math.log(width / self.heads))
        rest = (parameter for layer in layers for parameter in (layer.weight, layer.bias))
        return [joint.weight, query_bias_C, value_bias_C, log_scale_H, *rest]


def patches(x_BChw: Tensor, size: int) -> Tensor:
    """The numbers of each patch, (B, L, P), row by row."""
    parts: Tensor = x_BChw.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return parts.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatched(x_BLP: Tensor, size: int, channels: int) -> Tensor:
    """The inverse of `patches`, of a square."""
    side = math.isqrt(x_BLP.shape[1])
    parts: Tensor = x_BLP.unflatten(2, (size, size, channels)).unflatten(1, (side, side))
    return parts.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _waves(places: Tensor, count: int) -> Tensor:
    """Cosines and sines of places at `count` frequencies from 1 to 1 / `LONGEST_WAVE`, in a last dimension."""
    steps = torch.arange(count, dtype=torch.float32, device=places.device)
    angles = places.float().unsqueeze(-1) * torch.exp(-math.log(LONGEST_WAVE) / max(count, 1) * steps)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@functools.lru_cache(maxsize=32)
def _position_embedding(side: int, width: int, device: torch.device) -> Tensor:
    """Waves of row and column (L, C), fixed; up to three channels that are left over are 0."""
    with torch.inference_mode(False):
        places = torch.arange(side, device="cpu")
        rows, columns = torch.meshgrid(places, places, indexing="ij")
        waves = torch.cat([_waves(each.flatten(), width // 4) for each in (rows, columns)], dim=1)
        return F.pad(waves, (0, width - waves.shape[1])).to(device)
