"""The bitwise multi-scale quantizer: each channel of what the coarser scales left over becomes one bit, its sign.

Han et al. 2024, "Infinity" (arXiv 2412.04431), section 3.2, with the binary spherical quantization of Zhao et al. 2024
(arXiv 2406.07548): a token's code is one of the 2^d corners of a cube, and no codebook is looked up or learnt.
Upsampling and φ are VAR's.

Letters in tensor names: K scales, N vectors (B·p²), c latent channels, which are the d bits of a token, V = 2^d.
"""

import torch
from torch import Tensor, nn

from varscale.config.tokenizer import TokenizerArchitecture
from varscale.numerics.bits import bit_entropy, bits_of, tokens_of
from varscale.tokenizer.quantizer import MultiScaleQuantizer

SHARPNESS = 4.0
"""Of soft bits: σ(4·x/a) is the probability of a rather than -a by squared distances in units of the magnitude a."""


class BitwiseQuantizer(MultiScaleQuantizer):
    """Quantizes what the coarser scales left over, scale after scale, to signs times the scale's magnitude.

    Infinity's codes have the magnitude 1/√d at all scales. Here each scale learns its own, which begins there or, after
    a training without quantization, at the mean absolute value of what is quantized, the best for signs.
    """

    def _make_codes(self, architecture: TokenizerArchitecture) -> None:
        self.entropy_weight = architecture.entropy_weight
        magnitude = self.latent_channels**-0.5
        self.magnitude_K = nn.Parameter(torch.full((len(self.patch_nums),), magnitude))

    def codes(self, tokens: Tensor, scale: int) -> Tensor:
        """The codes of a scale's tokens, float32 (…, c)."""
        signs = 2.0 * bits_of(tokens, self.latent_channels) - 1.0
        return signs * self.magnitude_K[scale].float()

    def codebook(self, scale: int) -> Tensor:
        """All codes of a scale, float32 (V, c)."""
        return self.codes(torch.arange(self.vocab_size, device=self.magnitude_K.device), scale)

    @torch.no_grad()
    def initialise_magnitudes(self, features_BChw: Tensor) -> None:
        """Fit each scale's magnitude to what the coarser scales leave over of these features."""
        residual_BChw = self._checked(features_BChw.float())
        for k in range(len(self.patch_nums)):
            vectors_Nc = self._vectors(residual_BChw, k)
            self.magnitude_K[k] = vectors_Nc.abs().mean()
            residual_BChw = residual_BChw - self._contribution(
                self._nearest(vectors_Nc).view(len(residual_BChw), -1), k
            )

    def _nearest(self, vectors_Nc: Tensor) -> Tensor:
        return tokens_of(vectors_Nc > 0)

    def _first_residual(self, features_BChw: Tensor) -> Tensor:
        return features_BChw  # with its gradient, which the penalty needs

    def _penalty(self, vectors_Nc: Tensor, scale: int) -> Tensor | None:
        """Each bit's entropy should be small for each vector, and large over all: mean H(p) - H(mean p), nats a bit."""
        if not self.entropy_weight:
            return None
        magnitude = self.magnitude_K[scale].detach().abs().clamp_min(1e-6)
        probability_Nc = torch.sigmoid(SHARPNESS * vectors_Nc / magnitude)
        doubt, spread = bit_entropy(probability_Nc).mean(), bit_entropy(probability_Nc.mean(0)).mean()
        return self.entropy_weight * (doubt - spread)
