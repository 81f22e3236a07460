"""Checkpoint files of FoundationVision/VAR in and out of ours."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch

from varscale.families.var.transformer import VAR
from varscale.official.state_dicts import export_tokenizer, export_var, load_var
from varscale.official.state_dicts import load_tokenizer as load_official_tokenizer
from varscale.store.layout import replaced
from varscale.store.weights import load_model, load_tokenizer, save_model
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


def import_checkpoint(checkpoint: Path, out: Path, patch_nums: Sequence[int], tokenizer: Path | None) -> None:
    """Write our file of a reference checkpoint.

    Args:
        checkpoint: `vae_*.pth` or `var_*.pth`.
        out: File to write.
        patch_nums: Sides of a tokenizer's token maps, which no tensor tells.
        tokenizer: Our file of the tokenizer that a `var_*.pth` belongs to.

    Raises:
        ValueError: keys are missing, left over or misshapen, or the tokenizer is not given.
    """
    state = _read_state(checkpoint)
    print_ = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16]
    if "quantize.embedding.weight" in state:
        imported = load_official_tokenizer(state, patch_nums)
        save_model(out, imported, print_)
        return
    if tokenizer is None:
        raise ValueError(f"{checkpoint}: a transformer; name its imported tokenizer by --tokenizer")
    var = load_var(state, load_tokenizer(tokenizer))
    save_model(out, var, print_)


def read_tokenizer(path: Path, patch_nums: Sequence[int]) -> MultiScaleTokenizer:
    """A finished tokenizer from a file of ours or the reference's `vae_*.pth`, whatever the file's name.

    Raises:
        ValueError: the file is neither, or incomplete.
    """
    with path.open("rb") as file:
        ours = file.read(9)[8:] == b"{"  # a safetensors file is a length of 8 bytes, then JSON
    return load_tokenizer(path) if ours else load_official_tokenizer(_read_state(path), patch_nums)


def export_checkpoint(model: Path, out: Path) -> None:
    """Write the reference's checkpoint of our tokenizer or transformer file."""
    loaded = load_model(model)
    state = export_var(loaded) if isinstance(loaded, VAR) else export_tokenizer(loaded)
    with replaced(out) as temporary:
        torch.save(state, temporary)


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    try:
        with path.open("rb") as file:  # given a path, torch.load goes by its suffix
            state: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        # of what isn't tensors alone, torch says how to load it all the same, which nobody should
        reason = "" if isinstance(error, UnpicklingError) else f" ({str(error).splitlines()[0]})"
        raise ValueError(f"{path}: not a checkpoint of FoundationVision/VAR{reason}") from None
    if not isinstance(state, dict) or not {"quantize.embedding.weight", "word_embed.weight"} & state.keys():
        raise ValueError(f"{path}: not a checkpoint of FoundationVision/VAR: neither a tokenizer's nor a transformer's")
    return state
