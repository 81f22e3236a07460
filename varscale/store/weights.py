"""Finished models as safetensors files that carry the arguments of their constructor."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from varscale.families.var.transformer import VAR
from varscale.store.layout import replaced
from varscale.tokenizer.autoencoder import MultiScaleTokenizer

_CLASSES: dict[str, type[MultiScaleTokenizer] | type[VAR]] = {"tokenizer": MultiScaleTokenizer, "var": VAR}


def save_model(path: Path, model: MultiScaleTokenizer | VAR, fingerprint: str) -> None:
    """Write a model's weights with what is needed to rebuild it; atomically.

    Args:
        path: File to write.
        model: Tokenizer or transformer.
        fingerprint: Identity of the run that made it.

    Raises:
        OSError: it can't be written; names the file.
    """
    kind = next(name for name, kind in _CLASSES.items() if isinstance(model, kind))
    arguments = _var_arguments(model) if isinstance(model, VAR) else _tokenizer_arguments(model)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"kind": kind, "arguments": json.dumps(arguments), "fingerprint": fingerprint}
    metadata["blake2b"] = _checksum(tensors)
    with replaced(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # a full disk, too
            raise OSError(f"{path}: {error}") from None


def load_tokenizer(path: Path, expected_fingerprint: str | None = None) -> MultiScaleTokenizer:
    """Rebuild a saved tokenizer; see `load_model`."""
    model = load_model(path, expected_fingerprint)
    if not isinstance(model, MultiScaleTokenizer):
        raise ValueError(f"{path}: holds a transformer, expected a tokenizer")
    return model


def load_var(path: Path, expected_fingerprint: str | None = None) -> VAR:
    """Rebuild a saved transformer; see `load_model`."""
    model = load_model(path, expected_fingerprint)
    if not isinstance(model, VAR):
        raise ValueError(f"{path}: holds a tokenizer, expected a transformer")
    return model


def load_model(path: Path, expected_fingerprint: str | None = None) -> MultiScaleTokenizer | VAR:
    """Rebuild a saved model, in evaluation mode.

    Raises:
        ValueError: the file is missing, damaged or foreign, or was made by a run of another fingerprint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable .safetensors file ({error})") from None
    if metadata.get("kind") not in _CLASSES:
        raise ValueError(f"{path}: not a model of varscale; `varscale import-official` reads the reference's")
    if expected_fingerprint not in (None, metadata["fingerprint"]):
        raise ValueError(
            f"{path}: fingerprint is {metadata['fingerprint']}, expected {expected_fingerprint}: "
            "it was made with other settings; delete the file to make it anew"
        )
    if metadata["blake2b"] != _checksum(state):
        raise ValueError(f"{path}: damaged: its checksum is not the one that was written; delete it to make it anew")
    with torch.device("meta"):
        model = _CLASSES[metadata["kind"]](**json.loads(metadata["arguments"]))
    model.load_state_dict(state, assign=True)
    return model.eval()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _tokenizer_arguments(tokenizer: MultiScaleTokenizer) -> dict[str, Any]:
    names = ["patch_nums", "vocab_size", "latent_channels", "base_channels", "channel_multipliers"]
    names += ["residual_blocks", "attention", "norm_groups"]
    quantizer = tokenizer.quantizer
    return {
        **{name: getattr(tokenizer, name) for name in names},
        "phi_count": len(quantizer.phi),
        "phi_ratio": quantizer.phi_ratio,
        "commitment_weight": quantizer.commitment_weight,
    }


def _var_arguments(var: VAR) -> dict[str, Any]:
    names = ["patch_nums", "vocab_size", "latent_channels", "num_classes", "depth", "width", "heads", "mlp_ratio"]
    names += ["shared_adaln", "normalise_queries_keys"]
    return {**{name: getattr(var, name) for name in names}, "drop_path_rate": var.drop_path_rates[-1]}
