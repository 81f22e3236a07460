"""Tensors and what they belong to, in safetensors files that notice every changed bit."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from varscale.errors import CheckpointError
from varscale.store.atomic import replaced

_DESCRIPTION = "varscale"
_METADATA = TypeAdapter(dict[str, str])


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata with a checksum over both; atomically.

    Raises:
        OSError: it can't be written; names the file.
    """
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # one text, because safetensors writes several in no particular order: equal models have equal files
    described = json.dumps({"checksum": _checksum(kept, metadata), **metadata}, sort_keys=True)
    with replaced(path) as temporary:
        try:
            save_file(kept, temporary, {_DESCRIPTION: described})
        except SafetensorError as error:  # a full disk, too
            raise OSError(f"{path}: {error}") from None


def load_tensors(
    path: Path, kind: str | None = None, expected_fingerprint: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata that `save_tensors` wrote, with this `kind` and `fingerprint` where they are given.

    Raises:
        CheckpointError: there is no such file, it isn't, bit for bit, one that `save_tensors` wrote, or it is of
            another kind or fingerprint.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("not a file")
        with safe_open(path, framework="pt") as file:
            description = (file.metadata() or {}).get(_DESCRIPTION)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        metadata = _METADATA.validate_json(description or "{}")
        written = metadata.pop("checksum", None)
        found = _checksum(tensors, metadata)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # random bytes raise whatever they lead to: KeyError, NotImplementedError, …
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: not a readable .safetensors file ({reason})") from None
    if description is None:
        raise CheckpointError(f"{path}: not a model of varscale; `varscale import-official` reads the reference's")
    if written != found:
        raise CheckpointError(
            f"{path}: damaged: its checksum is not the one that was written; delete it to make it anew"
        )
    if kind not in (None, metadata.get("kind")):
        raise CheckpointError(f"{path}: holds a {metadata.get('kind')}, expected a {kind}")
    if expected_fingerprint not in (None, metadata.get("fingerprint")):
        raise CheckpointError(
            f"{path}: fingerprint is {metadata.get('fingerprint')}, expected {expected_fingerprint}: "
            "it was made with other settings; delete the file to make it anew"
        )
    return tensors, metadata


def stored_metadata(path: Path, kind: str | None = None) -> dict[str, str]:
    """What a file of `save_tensors` says of its tensors, without reading these; `checksum` is among it, not compared.

    Raises:
        CheckpointError: There is no such file, `save_tensors` did not write it, or it holds another kind.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _METADATA.validate_json((file.metadata() or {})[_DESCRIPTION])
        found = {"checksum": metadata["checksum"], **metadata}
    except Exception:  # random bytes raise whatever they lead to
        raise CheckpointError(f"{path}: not a readable .safetensors file of varscale") from None
    if kind is not None and found.get("kind") != kind:
        raise CheckpointError(f"{path}: holds a {found.get('kind')}, expected a {kind}")
    return found


def fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give a model, which may be on the meta device, its weights from a file.

    Raises:
        CheckpointError: names, shapes or types are not the model's; names the file and the first that differs.
    """
    expected = model.state_dict()
    if differing := sorted(expected.keys() ^ tensors.keys()):
        place = "missing" if differing[0] in expected else "not one of the model's tensors"
        raise CheckpointError(f"{path}: {differing[0]} is {place}")
    for name, tensor in tensors.items():
        found, wanted = (f"{each.dtype} {tuple(each.shape)}" for each in (tensor, expected[name]))
        if found != wanted:
            raise CheckpointError(f"{path}: {name} is {found}, expected {wanted}")
    model.load_state_dict(tensors, assign=True)


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    described = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    total = hashlib.blake2b(json.dumps([dict(metadata), described], sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        total.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
