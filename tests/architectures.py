"""Tokenizers' architectures in few words."""

from typing import Any

from varscale.config.tokenizer import TokenizerArchitecture


def architecture(
    patch_nums: tuple[int, ...], vocab_size: int, latent_channels: int, base_channels: int = 32, **rest: Any
) -> TokenizerArchitecture:
    """The four sizes that have no default (the quantizer needs no `base_channels`), and what else is said."""
    sizes = {"vocab_size": vocab_size, "latent_channels": latent_channels, "base_channels": base_channels}
    return TokenizerArchitecture(patch_nums=patch_nums, **sizes, **rest)
