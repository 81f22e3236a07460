"""Sampling images from VAR, scale after scale, with a key-value cache and classifier-free guidance.

Tian et al. 2024, section 3.2 and appendix; the guidance grows linearly over the scales, as in the reference code.

Letters in tensor names: B batch, K scales, M tokens of one scale, C width, c latent channels, V vocabulary.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from varscale.families.var.transformer import VAR
from varscale.numerics.randomness import uniform
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


class Sample(NamedTuple):
    """Sampled images.

    Attributes:
        images: float32 (B, 3, H, W) in [0, 1].
        tokens: K int64 tensors (B, p²), coarse to fine.
    """

    images: Tensor
    tokens: list[Tensor]


def sample(
    var: VAR,
    tokenizer: MultiScaleTokenizer,
    labels: Tensor,
    cfg: float = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    seed: int = 0,
    *,
    use_cache: bool = True,
    sample_indices: Tensor | None = None,
) -> Sample:
    """Sample one image a label.

    An image depends on its label, the seed and its own index alone, not on the batch that it is drawn in (to rounding).

    Args:
        var: The transformer.
        tokenizer: The tokenizer whose tokens it was trained on.
        labels: int64 (B,), each 0 … num_classes; num_classes stands for "no class".
        cfg: Guidance at the last scale; scale k of K has cfg·k/(K - 1). 0 samples without.
        top_k: Keep the k likeliest tokens; 0 keeps all, 1 is greedy.
        top_p: Keep the likeliest tokens that together have this probability; 0 keeps all.
        seed: Of the noise.
        use_cache: Keep keys and values of earlier scales. Without, all scales are computed anew each time: the same
            logits to rounding.
        sample_indices: int64 (B,), each image's number for the noise; 0 … B - 1 unless given.

    Raises:
        ValueError: If an argument is out of range, or the transformer doesn't fit the tokenizer.
    """
    _check(var, tokenizer, labels, cfg, top_k, top_p)
    indices_B = torch.arange(len(labels)) if sample_indices is None else sample_indices
    indices_B = indices_B.to(labels.device)
    with torch.no_grad(), evaluating(var, tokenizer), torch.compiler.set_stance("force_eager"):
        predictor = ScalePredictor(var, labels, cfg, use_cache=use_cache)
        tokens: list[Tensor] = []
        features_hat_BChw, inputs_BMc = None, None
        for k in range(len(var.patch_nums)):
            logits_BMV = predictor.predict(inputs_BMc)
            uniform_BM = uniform(seed, "sampling", k, indices_B, logits_BMV.shape[1])
            tokens.append(draw(logits_BMV, uniform_BM, top_k=top_k, top_p=top_p))
            features_hat_BChw, inputs_BMc = tokenizer.quantizer.accumulate(features_hat_BChw, tokens[-1], k)
        assert features_hat_BChw is not None
        images_B3HW = tokenizer.decode_features(features_hat_BChw).float()
        return Sample(images_B3HW.add(1).mul(0.5), tokens)


class ScalePredictor:
    """The guided logits of one scale after the other, each from the inputs that the scale before it made."""

    def __init__(self, var: VAR, labels_B: Tensor, cfg: float, *, use_cache: bool = True) -> None:
        """Start at the first scale.

        Args:
            var: The transformer.
            labels_B: int64 classes.
            cfg: Guidance at the last scale; with 0 the branch without class is not computed.
            use_cache: Keep keys and values of the scales done.
        """
        self.var = var
        self.batch = len(labels_B)
        self.cfg = cfg
        self.scale = 0
        if cfg > 0:
            labels_B = torch.cat((labels_B, torch.full_like(labels_B, var.num_classes)))
        self.condition_BC, self.modulation = var.condition(labels_B)
        self.embedded_BMC = self.condition_BC.new_empty(len(labels_B), 0, var.width)
        self.caches = var.new_caches() if use_cache else None

    def predict(self, inputs_BMc: Tensor | None) -> Tensor:
        """Guided logits (B, M, V) of the next scale.

        Args:
            inputs_BMc: From `MultiScaleQuantizer.accumulate`; None at the first scale.
        """
        begin, end = self.var.scale_bounds[self.scale]
        if inputs_BMc is None:
            x_BMC = self.var.first_input(self.condition_BC)
        else:
            x_BMC = self.var.embed(inputs_BMc).repeat(len(self.condition_BC) // self.batch, 1, 1)
        x_BMC = x_BMC + self.var.place_embedding(begin, end)
        if self.caches is None:
            x_BMC = self.embedded_BMC = torch.cat((self.embedded_BMC, x_BMC), dim=1)
        x_BMC = self.var.transform(x_BMC, self.modulation, caches=self.caches)[:, begin - end :]
        guidance = self.cfg * self.scale / max(len(self.var.patch_nums) - 1, 1)
        self.scale += 1
        if guidance == 0:  # the branch without class was needed for its keys and values, but not its logits
            return self.var.logits(x_BMC[: self.batch], self.condition_BC[: self.batch])
        conditional_BMV, unconditional_BMV = self.var.logits(x_BMC, self.condition_BC).chunk(2)
        return (1 + guidance) * conditional_BMV - guidance * unconditional_BMV


def draw(logits_BMV: Tensor, uniform_BM: Tensor, *, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Draw tokens (B, M) by inverting the distribution function at uniform numbers in [0, 1).

    Args:
        logits_BMV: Logits.
        uniform_BM: float32.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Of these, leave out the least likely as long as what is left out has together a probability of at most
            1 - p; the likeliest always stays. 0 keeps all.
    """
    order_BMV = None
    if 0 < top_k < logits_BMV.shape[-1]:
        logits_BMV, order_BMV = logits_BMV.topk(top_k, dim=-1)
    elif top_p:
        logits_BMV, order_BMV = logits_BMV.sort(dim=-1, descending=True)
    probability_BMV = logits_BMV.softmax(dim=-1)
    distribution_BMV = probability_BMV.cumsum(dim=-1)
    last_BM1 = torch.full_like(uniform_BM, logits_BMV.shape[-1] - 1, dtype=torch.int64).unsqueeze(-1)
    if top_p:  # the likeliest come first; the last one kept has less than p before it
        before_BMV = distribution_BMV - probability_BMV
        last_BM1 = ((before_BMV < top_p).sum(dim=-1, keepdim=True) - 1).clamp_min(0)
    threshold_BM1 = uniform_BM.unsqueeze(-1) * distribution_BMV.gather(-1, last_BM1)
    # rounding may lift the threshold to the whole sum
    place_BM1 = torch.searchsorted(distribution_BMV, threshold_BM1, right=True).minimum(last_BM1)
    return (place_BM1 if order_BMV is None else order_BMV.gather(-1, place_BM1)).squeeze(-1)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode within; afterwards each part of the models is in the mode it was in."""
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _check(var: VAR, tokenizer: MultiScaleTokenizer, labels: Tensor, cfg: float, top_k: int, top_p: float) -> None:
    for name in ("patch_nums", "vocab_size", "latent_channels"):
        if getattr(var, name) != getattr(tokenizer, name):
            raise ValueError(
                f"the transformer has {name} {getattr(var, name)}, but the tokenizer {getattr(tokenizer, name)}"
            )
    if labels.ndim != 1 or len(labels) == 0 or labels.is_floating_point():
        raise ValueError(f"labels must be a list of integers, not {labels.dtype} of shape {tuple(labels.shape)}")
    smallest, largest = int(labels.min()), int(labels.max())
    if smallest < 0 or largest > var.num_classes:
        raise ValueError(
            f"labels must lie in 0 … {var.num_classes - 1} ({var.num_classes} for no class), not {smallest} … {largest}"
        )
    if not 0 <= cfg < float("inf") or top_k < 0 or not 0 <= top_p <= 1:
        raise ValueError(f"cfg {cfg} and top_k {top_k} must be finite and at least 0, and top_p {top_p} in [0, 1]")
