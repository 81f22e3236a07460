"""Images from a trained model of any family."""

import torch
from torch import Tensor

from varscale.families.base import ModelDescription, SamplingOptions, cut_without_meaning
from varscale.families.models import FamilyModel, Sample
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


def sample(
    model: FamilyModel,
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
    """Draw one image a label.

    An image depends on its label, the seed and its own index alone, not on the batch that it is drawn in (to rounding).

    Args:
        model: A model of any family, such as `VAR`.
        tokenizer: The tokenizer whose tokens it was trained on.
        labels: int64 (B,), each 0 … num_classes; num_classes stands for "no class". Of a model that is told captions,
            their embeddings, float32 (B, D); zeros stand for "no caption".
        cfg: Classifier-free guidance. For VAR that of the last scale: scale k of K has cfg·k/(K - 1). 0: without.
        top_k: Keep the k likeliest tokens; 0 keeps all, 1 is greedy.
        top_p: Keep the likeliest tokens that together have this probability; 0 keeps all.
        seed: Of the noise.
        use_cache: Keep keys and values of earlier tokens. Without, all are computed anew each time: the same logits to
            rounding.
        sample_indices: int64 (B,), each image's number for the noise; 0 … B - 1 unless given.

    Raises:
        ValueError: An argument is out of range, or the model doesn't fit the tokenizer.
    """
    options = SamplingOptions(cfg, top_k, top_p, seed, use_cache)
    return sample_with(model, tokenizer, labels, options, sample_indices)


def sample_with(
    model: FamilyModel,
    tokenizer: MultiScaleTokenizer,
    labels: Tensor,
    options: SamplingOptions,
    sample_indices: Tensor | None = None,
) -> Sample:
    """`sample` with all options."""
    check_sampling(model.config, tokenizer, labels, options)
    indices_B = torch.arange(len(labels)) if sample_indices is None else sample_indices
    return model.config.implementation().sample(model, tokenizer, labels, options, indices_B.to(labels.device))


def check_sampling(
    config: ModelDescription, tokenizer: MultiScaleTokenizer, labels: Tensor, options: SamplingOptions
) -> None:
    """Raise `ValueError` where a model can't be sampled so: foreign tokenizer, labels out of range, no such option."""
    for name in ("patch_nums", "vocab_size", "latent_channels", "quantizer"):
        ours, theirs = getattr(config, name), getattr(tokenizer.architecture, name)
        if ours != theirs:
            raise ValueError(f"the transformer has {name} {ours}, but the tokenizer {theirs}")
    if options.smooth and not config.implementation().can_smooth:
        raise ValueError(f"models of family {config.family} have no smooth mode")
    if config.draws == "bits" and (why := cut_without_meaning("bits", options.top_k, options.top_p)):
        raise ValueError(f"top_k {options.top_k} and top_p {options.top_p:g} say nothing of these models: {why}")
    if options.smooth and config.draws == "bits":
        raise ValueError("models that choose bits have no smooth mode: it mixes codes by the probabilities of tokens")
    if options.steps and not config.implementation().can_choose_steps:
        raise ValueError(f"models of family {config.family} draw in {config.sampling_passes()} passes: leave out steps")
    if config.reads == "latents" and (options.top_k or options.top_p or options.temperature != 1):
        raise ValueError(f"models of family {config.family} choose no tokens: top_k, top_p and temperature say nothing")
    if config.text_width is not None:
        if labels.ndim != 2 or labels.shape[1] != config.text_width or not labels.is_floating_point():
            raise ValueError(
                f"this model was told captions: expected their embeddings, float (B, {config.text_width}), not "
                f"{labels.dtype} of shape {tuple(labels.shape)}"
            )
        return
    if labels.ndim != 1 or len(labels) == 0 or labels.is_floating_point():
        raise ValueError(f"labels must be a list of integers, not {labels.dtype} of shape {tuple(labels.shape)}")
    smallest, largest = int(labels.min()), int(labels.max())
    if smallest < 0 or largest > config.num_classes:
        raise ValueError(
            f"labels must lie in 0 … {config.num_classes - 1} ({config.num_classes} for no class), not "
            f"{smallest} … {largest}"
        )
