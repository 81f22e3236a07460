"""The residual multi-scale quantizer: features of an image as a pyramid of tokens over one shared codebook.

Tian et al. 2024, "Visual Autoregressive Modeling", algorithms 1 (encoding) and 2 (reconstruction).

Letters in tensor names: B batch, K scales, c latent channels, h and w latent height and width, p side of a scale's
token map, N vectors (B·p²), V vocabulary, L all tokens of an image (the sum of p² over the scales).
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varscale.config.tokenizer import TokenizerArchitecture
from varscale.numerics.precision import full_float32
from varscale.tokenizer.resizing import resize


class QuantizerOutput(NamedTuple):
    """What one training pass of the quantizer gives."""

    features_hat_BChw: Tensor
    """The quantized features, float32; gradients pass straight through to the features."""
    loss: Tensor
    """Commitment and codebook loss, the mean over scales and elements; a scalar."""
    tokens: list[Tensor]
    """K int64 tensors (B, p²), the index of the nearest code at each place."""
    residuals: list[Tensor]
    """K float32 tensors (B·p², c), detached: the vectors that were looked up, for restarting dead codes."""


class MultiScaleQuantizer(nn.Module):
    """Quantizes what the coarser scales left over, scale after scale, with one codebook.

    Every lookup and every sum is float32, also under autocast and where TF32 is allowed.
    """

    def __init__(self, architecture: TokenizerArchitecture) -> None:
        """Build the codes and the φ convolutions."""
        super().__init__()
        self.patch_nums, self.latent_size = architecture.patch_nums, architecture.latent_size
        self.vocab_size, self.latent_channels = architecture.vocab_size, architecture.latent_channels
        self.phi_ratio, self.commitment_weight = architecture.phi_ratio, architecture.commitment_weight
        self._make_codes(architecture)
        self.phi = nn.ModuleList(
            nn.Conv2d(self.latent_channels, self.latent_channels, kernel_size=3, padding=1)
            for _ in range(architecture.phi_count)
        )
        self.phi_of_scale = phi_of_scales(len(self.patch_nums), architecture.phi_count)
        for index in set(range(architecture.phi_count)) - set(self.phi_of_scale):
            # no scale uses it; DistributedDataParallel would wait for its gradient
            self.phi[index].requires_grad_(False)

    def _make_codes(self, architecture: TokenizerArchitecture) -> None:
        self.codebook_Vc = nn.Parameter(torch.empty(self.vocab_size, self.latent_channels))
        nn.init.uniform_(self.codebook_Vc, -1.0 / self.vocab_size, 1.0 / self.vocab_size)

    def codes(self, tokens: Tensor, scale: int) -> Tensor:
        """The codes of a scale's tokens, float32 (…, c)."""
        return F.embedding(tokens.long(), self.codebook(scale))

    def codebook(self, scale: int) -> Tensor:
        """All codes of a scale, float32 (V, c); they are the same for all scales."""
        return self.codebook_Vc.float()

    def forward(self, features_BChw: Tensor) -> QuantizerOutput:
        """Quantize features, h = w = patch_nums[-1], for training (algorithm 1); every partial sum has a loss."""
        with full_float32(features_BChw.device):
            features_BChw = self._checked(features_BChw.float())
            target_BChw = features_BChw.detach()
            residual_BChw = self._first_residual(features_BChw)
            features_hat_BChw = torch.zeros_like(target_BChw)
            loss = features_BChw.new_zeros(())
            tokens, residuals = [], []
            for k in range(len(self.patch_nums)):
                vectors_Nc = self._vectors(residual_BChw, k)
                tokens_BL = self._nearest(vectors_Nc.detach()).view(len(features_BChw), -1)
                contribution_BChw = self._contribution(tokens_BL, k)
                features_hat_BChw = features_hat_BChw + contribution_BChw
                # not in place: the finest scale's vectors may be a view of it, which restarts of codes are taken from
                residual_BChw = residual_BChw - contribution_BChw.detach()
                commitment = F.mse_loss(features_hat_BChw.detach(), features_BChw)
                loss = loss + self.commitment_weight * commitment + F.mse_loss(features_hat_BChw, target_BChw)
                if (penalty := self._penalty(vectors_Nc, k)) is not None:
                    loss = loss + penalty
                tokens.append(tokens_BL)
                residuals.append(vectors_Nc.detach())
            straight_through_BChw = features_BChw + (features_hat_BChw.detach() - target_BChw)
            return QuantizerOutput(straight_through_BChw, loss / len(self.patch_nums), tokens, residuals)

    @torch.no_grad()
    def encode(self, features_BChw: Tensor) -> list[Tensor]:
        """The tokens of features: K int64 tensors (B, p²), coarse to fine (algorithm 1)."""
        with full_float32(features_BChw.device):
            residual_BChw = self._checked(features_BChw.float()).clone()
            tokens = []
            for k in range(len(self.patch_nums)):
                tokens.append(self._nearest(self._vectors(residual_BChw, k)).view(len(residual_BChw), -1))
                if k + 1 < len(self.patch_nums):
                    residual_BChw.sub_(self._contribution(tokens[-1], k))
            return tokens

    def decode_features(self, tokens: Sequence[Tensor]) -> Tensor:
        """The features that tokens stand for, float32 (B, c, h, w) (algorithm 2).

        A prefix of the scales is allowed: the result is then the partial sum after its last scale.
        """
        with full_float32(tokens[0].device):
            features_hat_BChw = self._contribution(tokens[0], 0)
            for k, tokens_BL in enumerate(tokens[1:], start=1):
                features_hat_BChw = features_hat_BChw + self._contribution(tokens_BL, k)
            return features_hat_BChw

    @torch.no_grad()
    def next_scale_inputs(self, tokens: Sequence[Tensor]) -> Tensor:
        """What the transformer sees at scales 2 … K: the partial sums, each resized to the scale it helps to predict.

        float32 (B, L - p_1², c), empty along the second axis when there is one scale. The last tokens aren't used.
        """
        batch, side, scales = len(tokens[0]), self.latent_size, len(self.patch_nums)
        if scales == 1:
            return torch.zeros(batch, 0, self.latent_channels, device=tokens[0].device)
        with full_float32(tokens[0].device):
            upsampled_KBChw = torch.stack([self._upsampled(tokens[k], k) for k in range(scales - 1)])
            # scales that share a φ are neighbours, so one convolution serves each group of them
            groups = []
            for index in dict.fromkeys(self.phi_of_scale[: scales - 1]):
                members = [k for k in range(scales - 1) if self.phi_of_scale[k] == index]
                group_BChw = upsampled_KBChw[members[0] : members[-1] + 1].flatten(0, 1)
                groups.append(self._refine(group_BChw, index))
            contribution_KBChw = torch.cat(groups).view(scales - 1, batch, self.latent_channels, side, side)
            # double precision as in `cumsum`, which on a GPU may give other bits each time
            features_hat = itertools.accumulate(contribution_KBChw.double())
            inputs = [
                resize(features_hat_BChw.float(), side, "area").flatten(2).transpose(1, 2)
                for features_hat_BChw, side in zip(features_hat, self.patch_nums[1:], strict=True)
            ]
            return torch.cat(inputs, dim=1)

    @torch.no_grad()
    def accumulate(self, features_hat_BChw: Tensor | None, tokens: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        """Add one scale's tokens to the running sum, as sampling does scale after scale.

        Args:
            features_hat_BChw: The sum so far; None before the first scale.
            tokens: int64 (B, p²), the tokens of this scale; or mixtures of codes in their place, float32 (B, p², c).
            scale: Which scale they are, from 0.

        Returns:
            The new sum (B, c, h, w); the transformer's input for the next scale (B, p_next², c), None after the last.
        """
        with full_float32(tokens.device):
            contribution_BChw = self._contribution(tokens, scale)
            new_BChw = contribution_BChw if features_hat_BChw is None else features_hat_BChw + contribution_BChw
            if scale + 1 == len(self.patch_nums):
                return new_BChw, None
            return new_BChw, resize(new_BChw, self.patch_nums[scale + 1], "area").flatten(2).transpose(1, 2)

    @torch.no_grad()
    def initialise_codes(self, vectors_Nc: Tensor, *, seed: int = 0) -> None:
        """Replace every code by a vector of the data, chosen by the seed; all processes must pass the same of both.

        Fewer than V vectors are repeated with a little noise.

        Raises:
            ValueError: If there is no vector, or its length is not c.
        """
        self._check_vectors(vectors_Nc)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(vectors_Nc), generator=generator)[: self.vocab_size]
        repeats = -(-self.vocab_size // len(chosen))
        codes_Vc = vectors_Nc[chosen.to(vectors_Nc.device)].float().repeat(repeats, 1)[: self.vocab_size]
        if repeats > 1:  # equal codes would never part: only the first of them is ever looked up
            noise_Vc = torch.randn(codes_Vc.shape, generator=generator).to(codes_Vc.device)
            codes_Vc = codes_Vc + 0.01 * codes_Vc.std(unbiased=False).clamp_min(1e-6) * noise_Vc
        self.codebook_Vc.copy_(codes_Vc)

    @torch.no_grad()
    def restart_codes(self, dead_V: Tensor, vectors_Nc: Tensor) -> Tensor:
        """Move dead codes (bool) onto vectors of the data, the i-th onto the i-th; when these run out, the rest stay.

        Returns:
            bool (V,): the codes that were moved, whose optimizer state and EMA copy the caller resets.
        """
        self._check_vectors(vectors_Nc)
        indices = dead_V.nonzero().flatten()[: len(vectors_Nc)]
        self.codebook_Vc[indices] = vectors_Nc[: len(indices)].to(self.codebook_Vc.dtype)
        moved_V = torch.zeros_like(dead_V)
        moved_V[indices] = True
        return moved_V

    def _check_vectors(self, vectors_Nc: Tensor) -> None:
        if vectors_Nc.ndim != 2 or len(vectors_Nc) == 0 or vectors_Nc.shape[1] != self.latent_channels:
            raise ValueError(
                f"codes need vectors of shape (at least 1, {self.latent_channels}), not {tuple(vectors_Nc.shape)}"
            )

    def _checked(self, features_BChw: Tensor) -> Tensor:
        expected = (self.latent_channels, self.latent_size, self.latent_size)
        if tuple(features_BChw.shape[1:]) != expected:
            raise ValueError(
                f"features have shape {tuple(features_BChw.shape)}, but patch_nums {self.patch_nums} and "
                f"{self.latent_channels} latent channels need (B, {', '.join(map(str, expected))})"
            )
        return features_BChw

    def _vectors(self, residual_BChw: Tensor, scale: int) -> Tensor:
        # the finest scale's map already has the latents' size: resizing would only copy it
        resized_BCpp = resize(residual_BChw, self.patch_nums[scale], "area")
        return resized_BCpp.permute(0, 2, 3, 1).reshape(-1, self.latent_channels).contiguous()

    def _first_residual(self, features_BChw: Tensor) -> Tensor:
        return features_BChw.detach()

    def _penalty(self, vectors_Nc: Tensor, scale: int) -> Tensor | None:
        """What a scale adds to the loss beside how far the partial sums are from the features."""
        return None

    def _nearest(self, vectors_Nc: Tensor) -> Tensor:
        codebook_Vc = self.codebook_Vc.detach().float()
        # |x - e|² without |x|², which does not change which code is nearest
        distance_NV = torch.addmm(codebook_Vc.square().sum(1), vectors_Nc, codebook_Vc.T, alpha=-2)
        return distance_NV.argmin(1)

    def _upsampled(self, tokens: Tensor, scale: int) -> Tensor:
        side, mixed = self.patch_nums[scale], tokens.is_floating_point()
        codes_BLc = tokens if mixed else self.codes(tokens, scale)
        codes_BCpp = codes_BLc.transpose(1, 2).reshape(len(tokens), self.latent_channels, side, side)
        return resize(codes_BCpp, self.latent_size, "bicubic")

    def _contribution(self, tokens: Tensor, scale: int) -> Tensor:
        return self._refine(self._upsampled(tokens, scale), self.phi_of_scale[scale])

    def _refine(self, upsampled_BChw: Tensor, phi_index: int) -> Tensor:
        # φ(h) = (1 - r)·h + r·conv(h): undoes some of what upsampling blurred
        return torch.lerp(upsampled_BChw, self.phi[phi_index](upsampled_BChw), self.phi_ratio)


def phi_of_scales(scales: int, phi_count: int) -> tuple[int, ...]:
    """Which φ convolution each scale uses: the one whose tick is nearest to k / (K - 1)."""
    # the reference spaces four φ closer to the ends than any other number of them
    margin = 1 / 3 / phi_count if phi_count == 4 else 1 / 2 / phi_count
    ticks = np.linspace(margin, 1 - margin, phi_count)
    return tuple(int(np.argmin(np.abs(ticks - k / max(scales - 1, 1)))) for k in range(scales))
