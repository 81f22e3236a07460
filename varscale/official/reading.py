"""Files of weights as other people have them: which of the reference's models one holds, or why it can't be read.

The reference's own training writes both models, with what belongs to them, into one file (`ar-ckpt-*.pth`). Others nest
a state dict under a name, write the prefixes of a wrapper (DistributedDataParallel, torch.compile, FSDP) or of a module
that holds the model (Lightning), or keep an averaged copy beside it. All of it comes down to a dictionary in
the file and a prefix of its keys: a model's place is both, joined by dots.
"""

import re
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from varscale.errors import CheckpointError

THEIRS = "a checkpoint of FoundationVision/VAR (vae_*.pth or var_*.pth)"
SIGNS: dict[str, Literal["tokenizer", "transformer"]] = {
    "quantize.embedding.weight": "tokenizer",
    "word_embed.weight": "transformer",
}
"""The key that tells each model."""
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of keys that wrappers add, at any place."""
TRAINING_ONLY = {"tokenizer": ("loss.", "discriminator.", "model_ema.", "n_averaged"), "transformer": ("n_averaged",)}
"""What trainings keep beside a model: VQGAN's losses, its averages under names without dots, and a count."""
TOP = "top"
"""The place of a model whose keys stand in the file's outermost dictionary, without a prefix."""
DEEPEST = 8
_START = 512
"""Bytes that tell what a file is."""


@dataclass(frozen=True)
class StoredModel:
    """A model that was found in a file."""

    kind: Literal["tokenizer", "transformer"]
    state: dict[str, Tensor]
    """Tensors by the reference's names."""
    fault: str = ""
    """Why they can't be a model's."""


@dataclass(frozen=True)
class Contents:
    """What a file holds."""

    models: dict[str, StoredModel]
    """By place, such as `trainer.var_wo_ddp`."""
    patch_nums: frozenset[tuple[int, ...]]
    """All that it says about the sides of token maps, outside of tensors."""

    def chosen(self, kind: str | None, path: Path, entry: str | None = None) -> StoredModel:
        """The only model of a kind (None: a transformer, or without one a tokenizer), or the one at the place `entry`.

        Raises:
            CheckpointError: There is none, there are several, or it holds something else than tensors.
        """
        place = self._place(kind, path) if entry is None else entry
        if place not in self.models:
            raise CheckpointError(f"{path}: --entry {place}: there is none; it has {', '.join(self.models)}")
        if self.models[place].fault:
            raise CheckpointError(f"{path}: not {THEIRS}: {self.models[place].fault}")
        return self.models[place]

    def _place(self, kind: str | None, path: Path) -> str:
        kinds = {model.kind for model in self.models.values()}
        kind = kind or ("transformer" if "transformer" in kinds else "tokenizer")
        places = [place for place, model in self.models.items() if model.kind == kind]
        if not places:
            raise CheckpointError(f"{path}: holds a {next(iter(kinds))}, expected a {kind}")
        if len(places) > 1:
            listed = ", ".join(places[:5])
            raise CheckpointError(f"{path}: holds {len(places)} {kind}s ({listed}); import one by --entry {places[0]}")
        return places[0]


def read_contents(path: Path) -> Contents:
    """The models in a file of PyTorch or in a .safetensors file, whatever its name; code in it is refused, not run.

    Raises:
        CheckpointError: It can't be read, or holds no model of the reference; says what it is, and what to do.
    """
    with opened(path) as file:
        start = file.read(_START)
        _refuse_other_files(path, start)
        file.seek(0)
        stored = _safetensors(path) if start[8:9] == b"{" else _pytorch(path, file, start)
    models: dict[str, StoredModel] = {}
    patch_nums: set[tuple[int, ...]] = set()
    for place, dictionary in _dictionaries(stored):
        models.update(_models(place, dictionary))
        patch_nums.update(_stated_patch_nums(dictionary))
    if not models:
        names = [str(name)[:40] for name in stored][:3] if isinstance(stored, Mapping) else [type(stored).__name__]
        held = f"neither a tokenizer's tensors nor a transformer's (it has {', '.join(names) or 'nothing'})"
        raise CheckpointError(f"{path}: not {THEIRS}: {held}")
    return Contents(models, frozenset(patch_nums))


def is_ours(path: Path) -> bool:
    """Whether it is a .safetensors file that varscale wrote, whatever its name.

    Raises:
        CheckpointError: It can't be opened.
    """
    with opened(path) as file:
        if file.read(9)[8:] != b"{":
            return False
    try:
        with safe_open(path, framework="pt") as tensors:
            return "varscale" in (tensors.metadata() or {})
    except (SafetensorError, OSError):
        return False


def opened(path: Path) -> BinaryIO:
    """The file, to be read.

    Raises:
        CheckpointError: There is none, or it is something else.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError(None, "not a file")
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; expected {THEIRS}") from None


def _refuse_other_files(path: Path, start: bytes) -> None:
    """What a download leaves under a checkpoint's name when it does not bring the checkpoint."""
    text = start.decode("utf-8-sig", errors="replace").strip()
    if not start:
        found = "an empty file; download it again"
    elif text.startswith("version https://git-lfs"):
        size = re.search(r"^size (\d+)$", text, re.MULTILINE)
        stands_for = f" that stands for {int(size[1]):,} bytes" if size else ""
        found = f"a Git LFS pointer{stands_for}, not the file itself; fetch that by `git lfs pull`, or download it"
    elif re.match(r"<[!?a-z]", text, re.IGNORECASE):
        found = "a web page; download the file itself (on Hugging Face its address has /resolve/, not /blob/)"
    elif (
        start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"(\xb5/\xfd"))
        or start[257:262] == b"ustar"
    ):
        found = "a packed archive; unpack it, and import the file within"
    elif text.isascii() and "".join(text.split()).isprintable():
        found = f"a text that begins with {text[:40]!r}; download the file again"
    else:
        return
    raise CheckpointError(f"{path}: not {THEIRS}: {found}")


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            ours = "varscale" in (file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except Exception as error:  # random bytes raise whatever they lead to
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: not {THEIRS}: a damaged or half .safetensors file ({reason})") from None
    if ours:
        raise CheckpointError(f"{path}: varscale's own file already; it can be used as it is")
    return tensors


def _pytorch(path: Path, file: BinaryIO, start: bytes) -> Any:
    try:
        if start.startswith(b"PK"):
            _refuse_other_archives(path, file)
        # given a path, torch.load goes by its suffix; and it warns of what is refused anyway
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # unpickling random bytes raises anything: KeyError, IndexError, AttributeError, …
        # torch's own message says how to load, and so run, whatever is in the file, which nobody should
        refused = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
        if refused is None:
            raise CheckpointError(f"{path}: not {THEIRS}, or a damaged one; download it again") from None
        held = f"besides tensors it holds {refused[1].rstrip('.')}, which would have to be run, and never is"
        cure = "where it was made, save the tensors alone: torch.save(model.state_dict(), 'var.pth')"
        raise CheckpointError(f"{path}: not {THEIRS}: {held}; {cure}") from None


def _refuse_other_archives(path: Path, file: BinaryIO) -> None:
    if not zipfile.is_zipfile(file):  # its end is missing
        size = path.stat().st_size
        raise CheckpointError(f"{path}: not {THEIRS}: cut short after {size:,} bytes; download it again")
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
            held = "a model in TorchScript, which is code; where it was made, save the state_dict() of its module"
            raise CheckpointError(f"{path}: not {THEIRS}: {held}")
        _refuse_damaged_records(path, archive)
    if not any(name.rpartition("/")[2] == "data.pkl" for name in names):
        held = ", ".join(name[:40] for name in names[:3]) or "nothing"
        raise CheckpointError(f"{path}: not {THEIRS}: a zip archive of something else ({held})")
    file.seek(0)


def _refuse_damaged_records(path: Path, archive: zipfile.ZipFile) -> None:
    """Compare checksums, which torch doesn't; where none of them is right, they were not written."""
    records = [entry for entry in archive.infolist() if not entry.is_dir()]
    damaged = [entry.filename for entry in records if not _is_whole(archive, entry)]
    if 0 < len(damaged) < len(records):
        listed = ", ".join(name[:60] for name in damaged[:3])
        raise CheckpointError(
            f"{path}: not {THEIRS}, or a damaged one: {len(damaged)} of {len(records)} records are not what was "
            f"written, such as {listed}; download it again"
        )


def _is_whole(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(entry) as record:
            while record.read(2**20):
                pass
    except (zipfile.BadZipFile, EOFError, zlib.error):
        return False
    return True


def _dictionaries(stored: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """All dictionaries of a file with their places, each once: one may hold itself. Lists count by their places."""
    seen: set[int] = set()
    waiting = [("", stored, 0)]
    while waiting:
        place, found, depth = waiting.pop(0)
        if id(found) in seen or not isinstance(found, Mapping | list | tuple):
            continue
        seen.add(id(found))
        if isinstance(found, Mapping):
            yield place, found
        if depth < DEEPEST:
            named: Iterable[tuple[Any, Any]] = found.items() if isinstance(found, Mapping) else enumerate(found)
            within = ((f"{place}.{name}".removeprefix("."), value) for name, value in named)
            waiting += [(name, value, depth + 1) for name, value in within if isinstance(value, Mapping | list | tuple)]


def _models(place: str, dictionary: Mapping[Any, Any]) -> dict[str, StoredModel]:
    """The models whose keys stand in one dictionary of a file."""
    plain = [(_without_wrappers(name), value) for name, value in dictionary.items()]
    prefixes = {
        name.removesuffix(sign): kind
        for name, value in plain
        for sign, kind in SIGNS.items()
        if isinstance(value, Tensor) and (name == sign or name.endswith(f".{sign}"))
    }
    found = {}
    for prefix, kind in prefixes.items():
        others = tuple(other for other in prefixes if len(other) > len(prefix))
        state: dict[str, Tensor] = {}
        fault = ""
        for name, value in plain:
            own = name.removeprefix(prefix)
            if not name.startswith(prefix) or name.startswith(others) or own.startswith(TRAINING_ONLY[kind]):
                continue
            if not isinstance(value, Tensor) or value.device.type != "cpu":
                fault = f"{name[:60]} ({type(value).__name__}) is no tensor with values, among the model's tensors"
            elif own in state:
                fault = f"{name[:60]} is there with a wrapper's prefix and without"
            else:
                state[own] = value
        found[f"{place}.{prefix}".strip(".") or TOP] = StoredModel(kind, state, fault)
    return found


def _without_wrappers(name: Any) -> str:
    return ".".join(part for part in str(name).split(".") if part not in WRAPPERS)


def _stated_patch_nums(dictionary: Mapping[Any, Any]) -> Iterator[tuple[int, ...]]:
    """As the reference's trainer and its arguments have them."""
    for name in ("patch_nums", "v_patch_nums"):
        sides = dictionary.get(name)
        if isinstance(sides, list | tuple) and sides and all(type(side) is int and side > 0 for side in sides):
            yield tuple(sides)
    text = dictionary.get("pn")
    if isinstance(text, str) and re.fullmatch(r"\d{1,4}([_-]\d{1,4})+", text):
        yield tuple(map(int, re.split("[_-]", text)))
