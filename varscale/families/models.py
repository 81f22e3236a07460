"""What the models of all families share: their base class, samples, the choice of tokens, and evaluation mode.

Letters in tensor names: B batch, M tokens, V vocabulary, C and c channels, h and w height and width, of latents.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varscale.families.base import ModelDescription, TokenSpace
from varscale.kernels.linear import Linear
from varscale.numerics.randomness import gumbel, uniform
from varscale.tokenizer.autoencoder import MultiScaleTokenizer

DECODED_PIXELS = 2**22
"""Of all images that a GPU decodes at once."""
DECODED_PIXELS_ON_CPU = 2**16
"""Of all that a processor decodes at once: 64 images of 32 pixels a side, or one of 256."""


class FamilyModel(nn.Module):
    """A model of any family; it is built from `config` alone."""

    config: ModelDescription


class LatentModel(FamilyModel):
    """A model that reads latents, and keeps each channel's mean and deviation over the training set with its weights.

    Within it latents are standardised by these.
    """

    latent_mean_c: Tensor
    latent_deviation_c: Tensor

    def __init__(self, channels: int) -> None:
        """Until `set_statistics` says otherwise, latents are standardised already."""
        super().__init__()
        self.register_buffer("latent_mean_c", torch.zeros(channels))
        self.register_buffer("latent_deviation_c", torch.ones(channels))

    def set_statistics(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        """Take over mean and deviation of each channel."""
        self.latent_mean_c.copy_(torch.tensor(mean))
        self.latent_deviation_c.copy_(torch.tensor(deviation))

    def standardised(self, latents_BChw: Tensor) -> Tensor:
        """Latents of the tokenizer as the model has them."""
        return (latents_BChw - self.latent_mean_c.view(-1, 1, 1)) / self.latent_deviation_c.view(-1, 1, 1)

    def restored(self, standardised_BChw: Tensor) -> Tensor:
        """Latents of the model as the tokenizer has them."""
        return standardised_BChw * self.latent_deviation_c.view(-1, 1, 1) + self.latent_mean_c.view(-1, 1, 1)


class Sample(NamedTuple):
    """Sampled images.

    Attributes:
        images: float32 (B, 3, H, W) in [0, 1].
        tokens: K int64 tensors (B, p²), coarse to fine; none where the model draws latents.
    """

    images: Tensor
    tokens: list[Tensor]


class GivenTokens(NamedTuple):
    """Tokens of an image that are to stay as they are while the others are drawn.

    Attributes:
        tokens: K int64 tensors, (B, p²), or (1, p²) for all images.
        kept: K bool tensors of such a shape: which of them stay.
    """

    tokens: Sequence[Tensor]
    kept: Sequence[Tensor]


def random_batch(model: ModelDescription, images: int) -> dict[str, Tensor]:
    """A batch of random samples such as a model reads, for measurements of its speed."""
    if model.reads == "latents":
        side = model.patch_nums[-1]
        samples = {"latents_BChw": torch.randn(images, model.latent_channels, side, side)}
    else:
        samples = {"tokens_BL": torch.randint(model.vocab_size, (images, model.tokens))}
    if model.text_width is not None:
        samples["text_BD"] = F.normalize(torch.randn(images, model.text_width))
    return {
        **samples,
        "labels_B": torch.randint(model.num_classes, (images,)),
        "sample_index_B": torch.arange(images),
    }


def labels_of(batch: Mapping[str, Tensor], space: TokenSpace) -> Tensor:
    """What models are told of a batch: labels, int64 (B,), or captions, float32 (B, D)."""
    return batch["labels_B"] if space.text_width is None else batch["text_BD"]


def labels_after_dropout(batch: Mapping[str, Tensor], probability: float, space: TokenSpace, seed: int) -> Tensor:
    """The same of a training batch, where some are replaced by "no class" or "no caption", which guidance needs."""
    labels_B = labels_of(batch, space)
    if probability == 0:
        return labels_B
    dropped_B = uniform(seed, "label_dropout", 0, batch["sample_index_B"], 1)[:, 0] < probability
    if labels_B.ndim == 2:
        return labels_B.masked_fill(dropped_B.unsqueeze(1), 0)
    return labels_B.masked_fill(dropped_B, space.num_classes)


def with_unconditional(labels_B: Tensor, space: TokenSpace) -> Tensor:
    """Labels or captions, then as many of "no class" or "no caption"."""
    return torch.cat((labels_B, torch.full_like(labels_B, 0 if labels_B.ndim == 2 else space.num_classes)))


def condition_embedding(space: TokenSpace, width: int) -> nn.Embedding | nn.Linear:
    """What makes a vector of C numbers of each label: a table, or of captions a projection.

    "No caption" is zeros, and so becomes the projection's bias: a vector that is learned, as that of "no class" is.
    """
    if space.text_width is not None:
        return Linear(space.text_width, width)
    return nn.Embedding(space.num_classes + 1, width)


def draw(
    logits_BMV: Tensor, uniform_BM: Tensor, *, top_k: int = 0, top_p: float = 0.0, temperature: float = 1.0
) -> Tensor:
    """Draw tokens (B, M) by inverting the distribution function at uniform numbers in [0, 1).

    Args:
        logits_BMV: Logits.
        uniform_BM: float32.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Of these, leave out the least likely as long as what is left out has together a probability of at most
            1 - p; the likeliest always stays. 0 keeps all.
        temperature: What the logits are divided by first.
    """
    logits_BMV, order_BMV = _likeliest_first(logits_BMV, top_k, top_p, temperature)
    probability_BMV = logits_BMV.softmax(dim=-1)
    distribution_BMV = probability_BMV.cumsum(dim=-1)
    last_BM1 = _last_kept(probability_BMV, distribution_BMV, top_p)
    threshold_BM1 = uniform_BM.unsqueeze(-1) * distribution_BMV.gather(-1, last_BM1)
    # rounding may lift the threshold to the whole sum
    place_BM1 = torch.searchsorted(distribution_BMV, threshold_BM1, right=True).minimum(last_BM1)
    return (place_BM1 if order_BMV is None else order_BMV.gather(-1, place_BM1)).squeeze(-1)


def smooth_weights(
    logits_BMV: Tensor, uniform_BMV: Tensor, progress: float, *, top_k: int = 0, top_p: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """Weights (B, M, V) of the codes that are mixed: a Gumbel softmax that sharpens from scale to scale.

    FoundationVision/VAR, `autoregressive_infer_cfg` with `more_smooth`: logits times 1 + progress, tau =
    max(0.27·(1 - 0.95·progress), 0.005).

    Args:
        logits_BMV: Logits.
        uniform_BMV: float32 multiples of 2^-24 in [0, 1).
        progress: From 0 at the first scale to 1 at the last.
        top_k: See `draw`.
        top_p: See `draw`.
        temperature: See `draw`.
    """
    sorted_BMV, order_BMV = _likeliest_first(logits_BMV, top_k, top_p, temperature)
    if top_p:
        probability_BMV = sorted_BMV.softmax(dim=-1)
        last_BM1 = _last_kept(probability_BMV, probability_BMV.cumsum(dim=-1), top_p)
        beyond_BMV = torch.arange(sorted_BMV.shape[-1], device=sorted_BMV.device) > last_BM1
        sorted_BMV = sorted_BMV.masked_fill(beyond_BMV, -torch.inf)
    tau = max(0.27 * (1 - 0.95 * progress), 0.005)
    gumbel_BMV = gumbel(uniform_BMV[..., : sorted_BMV.shape[-1]])
    weights_BMV = ((sorted_BMV * (1 + progress) + gumbel_BMV) / tau).softmax(dim=-1)
    return weights_BMV if order_BMV is None else torch.zeros_like(logits_BMV).scatter(-1, order_BMV, weights_BMV)


def _likeliest_first(logits_BMV: Tensor, top_k: int, top_p: float, temperature: float) -> tuple[Tensor, Tensor | None]:
    """Logits by temperature: the k likeliest or, where top_p needs it, all in order, with the tokens that they are."""
    if temperature != 1:
        logits_BMV = logits_BMV / temperature
    if 0 < top_k < logits_BMV.shape[-1]:
        values_BMV, order_BMV = logits_BMV.topk(top_k, dim=-1)
        return values_BMV, order_BMV
    if top_p:
        values_BMV, order_BMV = logits_BMV.sort(dim=-1, descending=True)
        return values_BMV, order_BMV
    return logits_BMV, None


def _last_kept(probability_BMV: Tensor, distribution_BMV: Tensor, top_p: float) -> Tensor:
    """The last place that may be drawn, (B, M, 1): where the likeliest come first, the last with less than p before."""
    if top_p:
        return (((distribution_BMV - probability_BMV) < top_p).sum(dim=-1, keepdim=True) - 1).clamp_min(0)
    return torch.full_like(probability_BMV[..., :1], probability_BMV.shape[-1] - 1, dtype=torch.int64)


def pictures(tokenizer: MultiScaleTokenizer, features_hat_BChw: Tensor) -> Tensor:
    """The images in [0, 1], float32 (B, 3, H, W), that features, quantized or not, stand for.

    They are decoded in parts: the decoder's memory, at the images' resolution, is many times the transformer's. With
    the channels next to each other a processor took two thirds of the time (64 images of 24 or 32 pixels a side).
    """
    pixels = tokenizer.image_size**2
    at_once = max(1, (DECODED_PIXELS_ON_CPU if features_hat_BChw.device.type == "cpu" else DECODED_PIXELS) // pixels)
    images = [
        tokenizer.decode_features(part.contiguous(memory_format=torch.channels_last)).float()
        for part in features_hat_BChw.split(at_once)
    ]
    return torch.cat(images).contiguous().add_(1).mul_(0.5)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and nothing compiled within; afterwards each part is in the mode it was in.

    Drawing passes tensors of many shapes, and compiling for each would cost more than it gains.
    """
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in before:
            module.training = training
