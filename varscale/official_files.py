"""Checkpoint files of FoundationVision/VAR in and out of ours."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from varscale.models.storage import load_model, load_tokenizer, save_model
from varscale.models.var import VAR
from varscale.official import export_tokenizer, export_var, load_var
from varscale.official import load_tokenizer as load_official_tokenizer


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
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    print_ = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16]
    if "quantize.embedding.weight" in state:
        imported = load_official_tokenizer(state, patch_nums)
        save_model(out, imported, print_)
        return
    if tokenizer is None:
        raise ValueError(f"{checkpoint}: a transformer; name its imported tokenizer by --tokenizer")
    var = load_var(state, load_tokenizer(tokenizer))
    save_model(out, var, print_)


def export_checkpoint(model: Path, out: Path) -> None:
    """Write the reference's checkpoint of our tokenizer or transformer file."""
    loaded = load_model(model)
    state = export_var(loaded) if isinstance(loaded, VAR) else export_tokenizer(loaded)
    torch.save(state, out)
