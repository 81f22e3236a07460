"""How well a tokenizer reconstructs images and uses its codebook."""

import torch
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from varscale.evaluation.codebook import CodebookUsage
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


class ReconstructionMeter(nn.Module):
    """PSNR, SSIM and code usage of images that went through tokens and back, and what one mean picture would give."""

    sum_3HW: Tensor
    squares: Tensor
    images: int

    def __init__(self, scales: int, vocab_size: int, *, bits: int = 0) -> None:
        super().__init__()
        self.psnr = PeakSignalNoiseRatio(data_range=2.0)
        self.ssim = StructuralSimilarityIndexMeasure(data_range=2.0)
        self.usage = CodebookUsage(scales, vocab_size, bits=bits)
        self.register_buffer("sum_3HW", torch.zeros((), dtype=torch.float64))
        self.register_buffer("squares", torch.zeros((), dtype=torch.float64))
        self.images = 0

    @torch.no_grad()
    def update(self, tokenizer: MultiScaleTokenizer, images_B3HW: Tensor) -> None:
        """Encode and decode a batch of images in [-1, 1]."""
        tokens = tokenizer.encode(images_B3HW)
        reconstruction_B3HW = tokenizer.decode(tokens)
        self.psnr.update(reconstruction_B3HW, images_B3HW)
        self.ssim.update(reconstruction_B3HW, images_B3HW)
        self.usage.update(tokens)
        exact_B3HW = images_B3HW.double()
        self.sum_3HW = self.sum_3HW + exact_B3HW.sum(0)
        self.squares += exact_B3HW.square().sum()
        self.images += len(images_B3HW)

    def compute(self) -> dict[str, float]:
        """PSNR (dB), SSIM, mean squared error on [-1, 1], usage and perplexity over all scales and of each.

        `mean_picture_error` is the mean squared error of answering every image with the mean of all of them.
        """
        psnr = float(self.psnr.compute())
        mean_3HW = self.sum_3HW / self.images
        variance = self.squares / self.images / mean_3HW.numel() - mean_3HW.square().mean()
        return {
            "psnr": psnr,
            "ssim": float(self.ssim.compute()),
            "mean_squared_error": 4.0 * 10 ** (-psnr / 10),  # the data range is 2
            "mean_picture_error": max(0.0, float(variance)),
            **self.usage.compute(),
        }
