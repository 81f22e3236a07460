"""Checkpoint files of FoundationVision/VAR in and out of ours."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from varscale.errors import CheckpointError
from varscale.families.storage import load_model, save_model
from varscale.families.var.transformer import VAR
from varscale.official.state_dicts import export_tokenizer, export_var, load_var
from varscale.official.state_dicts import load_tokenizer as load_official_tokenizer
from varscale.store.atomic import replaced
from varscale.store.weights import load_tensors
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.tokenizer.storage import KIND, load_tokenizer, save_tokenizer

_THEIRS = "a checkpoint of FoundationVision/VAR (vae_*.pth or var_*.pth)"
_SAFETENSORS_START = b"{"
"""A safetensors file is a length of 8 bytes, then JSON."""


def import_checkpoint(checkpoint: Path, out: Path, patch_nums: Sequence[int], tokenizer: Path | None) -> None:
    """Write our file of a reference checkpoint.

    Args:
        checkpoint: `vae_*.pth` or `var_*.pth`.
        out: File to write.
        patch_nums: Sides of a tokenizer's token maps, which no tensor tells.
        tokenizer: Our file of the tokenizer that a `var_*.pth` belongs to.

    Raises:
        CheckpointError: the file isn't one of the reference's, or the tokenizer is not given.
    """
    state = _read_state(checkpoint)
    fingerprint = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16]
    if "quantize.embedding.weight" in state:
        save_tokenizer(out, _tokenizer_of(checkpoint, state, patch_nums), fingerprint)
        return
    if tokenizer is None:
        raise CheckpointError(f"{checkpoint}: a transformer; name its imported tokenizer by --tokenizer")
    belonging = load_tokenizer(tokenizer)
    with _only_theirs(checkpoint):
        var = load_var(state, belonging)
    save_model(out, var, fingerprint)


def read_tokenizer(path: Path, patch_nums: Sequence[int]) -> MultiScaleTokenizer:
    """A finished tokenizer from a file of ours or the reference's `vae_*.pth`, whatever the file's name.

    Raises:
        CheckpointError: the file is neither, or incomplete.
    """
    with _opened(path) as file:
        ours = file.read(9)[8:] == _SAFETENSORS_START
    return load_tokenizer(path) if ours else _tokenizer_of(path, _read_state(path), patch_nums)


def export_checkpoint(model: Path, out: Path) -> None:
    """Write the reference's checkpoint of our tokenizer or transformer file."""
    if load_tensors(model)[1].get("kind") == KIND:
        state = export_tokenizer(load_tokenizer(model))
    elif isinstance(var := load_model(model), VAR):
        state = export_var(var)
    else:
        raise CheckpointError(f"{model}: a model of the family {var.config.family}, which the reference doesn't have")
    with replaced(out) as temporary:
        torch.save(state, temporary)


def _tokenizer_of(path: Path, state: dict[str, torch.Tensor], patch_nums: Sequence[int]) -> MultiScaleTokenizer:
    with _only_theirs(path):
        return load_official_tokenizer(state, patch_nums)


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    """The file's tensors by name; code in it is refused, not run.

    Raises:
        CheckpointError: it is anything but tensors by name.
    """
    try:
        # given a path, torch.load goes by its suffix; and it warns of what is refused anyway
        with _opened(path) as file, warnings.catch_warnings(action="ignore"):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception:  # unpickling random bytes raises anything: KeyError, IndexError, AttributeError, …
        # torch's own message says how to load, and so run, whatever is in the file, which nobody should
        raise CheckpointError(f"{path}: not {_THEIRS}, or a damaged one") from None
    by_name = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"
        for name, tensor in state.items()
    )
    if not by_name or not {"quantize.embedding.weight", "word_embed.weight"} & state.keys():
        raise CheckpointError(f"{path}: not {_THEIRS}: neither a tokenizer's tensors nor a transformer's")
    checked: dict[str, torch.Tensor] = state
    return checked


def _opened(path: Path) -> BinaryIO:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError(None, "not a file")
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; expected {_THEIRS}") from None


@contextmanager
def _only_theirs(path: Path) -> Iterator[None]:
    """Name a file whose tensors aren't the reference's: what they are instead decides what fails."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{path}: not {_THEIRS}: {' '.join(str(error).split())[:300]}") from None
