"""Models, tokenizers and modules in few words, all very small unless a test says otherwise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from architectures import architecture
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from varscale.config import OptimConfig
from varscale.families.base import ModelDescription
from varscale.families.var.config import VARConfig
from varscale.families.var.transformer import VAR
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.training.module import ModelModule

PAPER = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS = (1, 2, 3)


def var_config(
    patch_nums: tuple[int, ...] = PATCH_NUMS,
    vocab_size: int = 32,
    latent_channels: int = 4,
    num_classes: int = 5,
    depth: int = 2,
    width: int = 16,
    heads: int = 2,
    **changes: Any,
) -> VARConfig:
    """The description of a transformer."""
    return VARConfig(
        patch_nums=patch_nums, vocab_size=vocab_size, latent_channels=latent_channels, num_classes=num_classes,
        depth=depth, width=width, heads=heads, **changes,
    )  # fmt: skip


def make_var(*sizes: Any, **changes: Any) -> VAR:
    """The transformer of `var_config`."""
    return VAR(var_config(*sizes, **changes))


def var_inputs(var: VAR, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Labels, also of no class, and random inputs of the later scales."""
    labels_B = torch.arange(batch) % (var.config.num_classes + 1)
    return labels_B, torch.randn(batch, var.config.tokens - var.first_tokens, var.config.latent_channels)


def make_tokenizer(
    patch_nums: tuple[int, ...] = PATCH_NUMS, vocab_size: int = 32, latent_channels: int = 4, **changes: Any
) -> MultiScaleTokenizer:
    """An untrained tokenizer, always the same, whose codes differ."""
    little = {"base_channels": 4, "channel_multipliers": (1, 2), "residual_blocks": 1, "attention": False}
    settings: dict[str, Any] = {**little, "norm_groups": 2, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        tokenizer = MultiScaleTokenizer(architecture(patch_nums, vocab_size, latent_channels, **settings))
        if tokenizer.architecture.quantizer == "codebook":
            torch.nn.init.normal_(tokenizer.quantizer.codebook_Vc)
    return tokenizer.eval()


def tokenizer_for(description: ModelDescription, **changes: Any) -> MultiScaleTokenizer:
    """An untrained tokenizer whose tokens a model reads."""
    sizes = description.patch_nums, description.vocab_size, description.latent_channels
    return make_tokenizer(*sizes, quantizer=description.quantizer, **changes)


def make_module(description: ModelDescription, optim: dict[str, Any] | None = None, **settings: Any) -> ModelModule:
    """A model's training on the tokens of an untrained tokenizer."""
    return ModelModule(description, OptimConfig(**(optim or {})), tokenizer_for(description), **settings)


def counted(function: Callable[[], Any]) -> int:
    """FLOPs of a call with the math kernel."""
    return sum(counted_by_module(function)["Global"].values())


def counted_by_module(function: Callable[[], Any]) -> dict[str, dict[Any, int]]:
    """FLOPs of a call, by the module's class and the operator; all of them under `Global`."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_flop_counts()


@contextmanager
def kept_bytes(model: nn.Module, apart: Callable[[Tensor], bool] = lambda _: False) -> Iterator[dict[int, int]]:
    """Bytes of each memory, weights apart, that forward passes within keep for their backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not apart(tensor):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
