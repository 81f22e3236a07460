"""Finished tokenizers as files: the averaged weights and the architecture that they belong to."""

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError

from varscale.config.tokenizer import TokenizerArchitecture
from varscale.errors import CheckpointError
from varscale.store.weights import fill, load_tensors, save_tensors, stored_metadata
from varscale.tokenizer.autoencoder import MultiScaleTokenizer

KIND = "tokenizer"


def save_tokenizer(path: Path, tokenizer: MultiScaleTokenizer, tokenizer_fingerprint: str) -> None:
    """Write a tokenizer and the fingerprint of the run that made it; atomically.

    Raises:
        OSError: it can't be written; names the file.
    """
    architecture = tokenizer.architecture.model_dump_json()
    metadata = {"kind": KIND, "architecture": architecture, "fingerprint": tokenizer_fingerprint}
    save_tensors(path, tokenizer.state_dict(), metadata)


def load_tokenizer(path: Path, tokenizer_fingerprint: str | None = None) -> MultiScaleTokenizer:
    """Rebuild a saved tokenizer, in evaluation mode; without a fingerprint, that of any run.

    Raises:
        CheckpointError: the file is missing, damaged or foreign, or was made by a run of another fingerprint.
    """
    tensors, metadata = load_tensors(path, KIND, tokenizer_fingerprint)
    with torch.device("meta"):
        tokenizer = MultiScaleTokenizer(_architecture(path, metadata))
    fill(tokenizer, tensors, path)
    return tokenizer.eval()


def stored_architecture(path: Path) -> TokenizerArchitecture:
    """What a saved tokenizer is made of, without its weights.

    Raises:
        CheckpointError: the file is missing or no tokenizer.
    """
    return _architecture(path, stored_metadata(path, KIND))


def _architecture(path: Path, metadata: Mapping[str, str]) -> TokenizerArchitecture:
    try:
        return TokenizerArchitecture.model_validate_json(metadata.get("architecture", ""))
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: not a tokenizer's architecture: {first['loc']}: {first['msg']}") from None
