"""Checkpoint files of FoundationVision/VAR in and out of ours."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import ValidationError

from varscale.errors import CheckpointError
from varscale.families.storage import load_model, save_model
from varscale.families.var.config import VARConfig
from varscale.families.var.transformer import VAR
from varscale.official.reading import THEIRS, Contents, StoredModel, is_ours, read_contents
from varscale.official.state_dicts import HEAD_CHANNELS, export_tokenizer, export_var, load_var, scales_of_levels
from varscale.official.state_dicts import load_tokenizer as load_official_tokenizer
from varscale.store.atomic import replaced
from varscale.store.weights import load_tensors
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.tokenizer.storage import KIND, load_tokenizer, save_tokenizer

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
"""The reference's at 256 pixels: what is taken where neither the file nor the user says anything."""


def import_checkpoint(
    checkpoint: Path,
    out: Path,
    patch_nums: Sequence[int] | None = None,
    tokenizer: Path | None = None,
    *,
    entry: str | None = None,
    depth: int | None = None,
) -> list[Path]:
    """Write our file of one of the reference's models; of a file that holds both, also the tokenizer's, beside it.

    Args:
        checkpoint: `vae_*.pth`, `var_*.pth` or `ar-ckpt-*.pth`, or what others make of them; see `read_contents`.
        out: File to write.
        patch_nums: Sides of the token maps, which a tokenizer's tensors don't tell; None: what the file says.
        tokenizer: File, ours or the reference's, of the tokenizer that a transformer belongs to.
        entry: Place of the model, in a file of several.
        depth: Blocks of a transformer that doesn't have as many as the reference has at its width.

    Returns:
        The files that were written, `out` last.

    Raises:
        CheckpointError: The file isn't one of the reference's, is incomplete, or contradicts what was said of it.
    """
    contents = read_contents(checkpoint)
    model = contents.chosen(None, checkpoint, entry)
    with checkpoint.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    said = None if patch_nums is None else tuple(patch_nums)
    if model.kind == "tokenizer":
        if tokenizer is not None:
            raise CheckpointError(f"{checkpoint}: holds a tokenizer, not a transformer; leave out --tokenizer")
        sides = said or _stated(checkpoint, contents) or _usual_patch_nums(checkpoint, model)
        save_tokenizer(out, _tokenizer_of(checkpoint, model, sides), fingerprint)
        return [out]
    belonging, beside = _tokenizer_for(checkpoint, contents, model, said, tokenizer), None
    with _only_theirs(checkpoint):
        var = load_var(model.state, belonging)
    _check_depth(checkpoint, var.config, depth)
    if tokenizer is None:
        beside = out.with_name(f"{out.stem}-tokenizer{out.suffix}")
        save_tokenizer(beside, belonging, fingerprint)
    save_model(out, var, fingerprint)
    return [out] if beside is None else [beside, out]


def read_tokenizer(path: Path, patch_nums: Sequence[int]) -> MultiScaleTokenizer:
    """A finished tokenizer from a file of ours or from one of the reference's, whatever the file's name.

    Args:
        path: The file; one that holds a transformer, too, is fine.
        patch_nums: Sides of the token maps, for the reference's.

    Raises:
        CheckpointError: The file is neither, or incomplete.
    """
    if is_ours(path):
        return load_tokenizer(path)
    return _tokenizer_of(path, read_contents(path).chosen("tokenizer", path), patch_nums)


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


def _tokenizer_of(path: Path, model: StoredModel, patch_nums: Sequence[int]) -> MultiScaleTokenizer:
    with _only_theirs(path):
        return load_official_tokenizer(model.state, patch_nums)


def _tokenizer_for(
    path: Path, contents: Contents, model: StoredModel, said: tuple[int, ...] | None, file: Path | None
) -> MultiScaleTokenizer:
    """A transformer's tokenizer, from a file of its own or from the same file."""
    with _only_theirs(path):
        trained = scales_of_levels(model.state)
    if trained and said and said != trained:
        raise _other_scales(path, trained, f"--patch-nums says {_listed(said)}")
    sides = trained or said or _stated(path, contents)
    if file is not None:
        tokenizer = read_tokenizer(file, sides or PATCH_NUMS)
        if sides and sides != tokenizer.patch_nums:
            raise _other_scales(path, sides, f"{file} has {_listed(tokenizer.patch_nums)}")
        return tokenizer
    if all(other.kind == "transformer" for other in contents.models.values()):
        raise CheckpointError(f"{path}: a transformer; name its imported tokenizer by --tokenizer")
    return _tokenizer_of(path, contents.chosen("tokenizer", path), sides or PATCH_NUMS)


def _stated(path: Path, contents: Contents) -> tuple[int, ...] | None:
    """The sides of token maps that a file states beside its tensors."""
    stated = sorted(contents.patch_nums)
    if len(stated) > 1:
        listed = " and ".join(map(_listed, stated[:3]))
        raise CheckpointError(f"{path}: states several patch_nums, {listed}; say by --patch-nums which are meant")
    return stated[0] if stated else None


def _usual_patch_nums(path: Path, model: StoredModel) -> tuple[int, ...]:
    """The reference's at 256 pixels, if the file has counted its codes at as many scales."""
    counted = model.state.get("quantize.ema_vocab_hit_SV")
    if counted is not None and counted.ndim == 2 and len(counted) != len(PATCH_NUMS):
        raise CheckpointError(f"{path}: has {len(counted)} scales; say by --patch-nums how large their token maps are")
    return PATCH_NUMS


def _other_scales(path: Path, sides: Sequence[int], other: str) -> CheckpointError:
    cure = f"import both with --patch-nums {_listed(sides)}"
    return CheckpointError(f"{path}: was trained with patch_nums {_listed(sides)}, but {other}; {cure}")


def _check_depth(path: Path, config: VARConfig, depth: int | None) -> None:
    """A file that lacks the last blocks has the tensors of a whole model, but not the shape of the reference's."""
    if depth not in (None, config.depth):
        raise CheckpointError(f"{path}: has {config.depth} blocks, but --depth says {depth}")
    usual = config.heads if config.width == HEAD_CHANNELS * config.heads else config.depth
    if depth is None and (config.depth != usual or config.width % config.depth):
        expected = f"{usual}" if usual != config.depth else "a number that divides it"
        raise CheckpointError(
            f"{path}: has {config.depth} blocks of width {config.width}, where the reference has {expected}: the last "
            f"may be missing; get the whole file, or say --depth {config.depth} if there are no more"
        )


def _listed(patch_nums: Sequence[int]) -> str:
    return ",".join(map(str, patch_nums))


@contextmanager
def _only_theirs(path: Path) -> Iterator[None]:
    """Name a file whose tensors aren't the reference's: what they are instead decides what fails."""
    try:
        yield
    except Exception as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}, not {first['input']!s:.50}"
        raise CheckpointError(f"{path}: not {THEIRS}: {' '.join(reason.split())[:300]}") from None
