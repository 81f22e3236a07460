"""Finished models as safetensors files that carry the arguments of their constructor."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from varscale.files import write_atomically
from varscale.models.autoencoder import MultiScaleTokenizer
from varscale.models.var import VAR

_CLASSES: dict[str, type[nn.Module]] = {"tokenizer": MultiScaleTokenizer, "var": VAR}


def save_model(path: Path, kind: str, model: nn.Module, arguments: Mapping[str, Any], fingerprint: str) -> None:
    """Write a model's weights with what is needed to rebuild it; atomically.

    Args:
        path: File to write.
        kind: `tokenizer` or `var`.
        model: Whose weights.
        arguments: Its constructor's arguments, JSON values.
        fingerprint: Identity of the run that made it.
    """
    metadata = {"kind": kind, "arguments": json.dumps(dict(arguments)), "fingerprint": fingerprint}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, save(tensors, metadata))


def load_tokenizer(path: Path, expected_fingerprint: str | None = None) -> MultiScaleTokenizer:
    """Rebuild a saved tokenizer; see `load_model`."""
    tokenizer = load_model(path, "tokenizer", expected_fingerprint)
    assert isinstance(tokenizer, MultiScaleTokenizer)
    return tokenizer


def load_var(path: Path, expected_fingerprint: str | None = None) -> VAR:
    """Rebuild a saved transformer; see `load_model`."""
    var = load_model(path, "var", expected_fingerprint)
    assert isinstance(var, VAR)
    return var


def load_model(path: Path, kind: str, expected_fingerprint: str | None = None) -> nn.Module:
    """Rebuild a saved model, in evaluation mode.

    Raises:
        ValueError: the file is torn, holds another kind, or was made by a run of another fingerprint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable model file ({error})") from None
    if metadata.get("kind") != kind:
        raise ValueError(f"{path}: holds a {metadata.get('kind', 'foreign')} model, expected {kind}")
    if expected_fingerprint not in (None, metadata["fingerprint"]):
        raise ValueError(
            f"{path}: fingerprint is {metadata['fingerprint']}, expected {expected_fingerprint}: "
            "it was made with other settings; delete the file to make it anew"
        )
    with torch.device("meta"):
        model = _CLASSES[kind](**json.loads(metadata["arguments"]))
    model.load_state_dict(state, assign=True)
    return model.eval()
