"""The JSON files under the runs folder: one validated kind a class, each with a checksum over its content.

A file that is absent gives None. So does one that can't be used (torn, edited, of another kind): it is named in a
warning, counts as not written, and is made anew by what writes it. Nothing that a file says reaches outside its
folder, because file names in it are plain names.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError

from varscale.store.atomic import write_json
from varscale.store.layout import RunFiles, TokenFiles

LARGEST_FILE = 256 * 2**20
"""Bytes; a larger file is none of ours."""

_log = logging.getLogger(__name__)
_named: set[tuple[Path, int]] = set()


def _plain(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError("expected a plain name without folders")
    return name


PlainName = Annotated[str, AfterValidator(_plain)]
"""A file's or folder's name within the folder that the record lies in or speaks of."""
Scalar = str | bool | int | FiniteFloat | None
Row = dict[str, Scalar]


class Record(BaseModel):
    """A JSON file with a checksum."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The record in a file; None where it is absent or, with a warning that names it, can't be used."""
        try:
            return cls.load(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            _warn(path, why_unusable(error))
            return None

    @classmethod
    def load(cls, path: Path) -> Self:
        """The record in a file.

        Raises:
            OSError: It is absent or can't be read.
            ValueError: It is damaged, edited or of another kind.
        """
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError("too large to be written by varscale")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("expected a JSON object")
            if content.pop("checksum", None) != _checksum(content):
                raise ValueError("its content does not match its checksum")
            return cls.model_validate_json(json.dumps(content))
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        content = self.model_dump(mode="json")
        write_json(path, {"checksum": _checksum(content), **content})


class RunIdentity(Record):
    """Who a run is (run.json)."""

    name: str
    """For people."""
    role: Literal["tokenizer", "tokens", "trunk", "cell", "evaluation"]
    params: dict[str, JsonValue] = Field(default_factory=dict)
    """What describes the run, under the names of the runs table."""


class CaptionsRecord(BaseModel):
    """What embeds the captions that a cell is told."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    settings: dict[str, JsonValue]
    """The experiment's `data.captions`."""
    identity: str
    """The encoder's name and the hash of its weights."""
    shown: tuple[str, ...]
    """Of the rows of the picture of samples."""


class Result(Record):
    """What a run came to (result.json)."""

    fingerprint: str
    status: Literal["finished", "diverged"]
    time: FiniteFloat
    """When it ended, Unix seconds."""
    metrics: dict[str, FiniteFloat] = Field(default_factory=dict)
    """Numbers for dashboards."""
    row: Row = Field(default_factory=dict)
    """A cell's columns of the runs table, but for those that each study that contains it gives (its nominal budget)."""
    provenance: Row = Field(default_factory=dict)
    """How a machine carried it out: device, threads, compilation, versions. Rows of the table have it, too."""
    pictures: tuple[PlainName, ...] = ()
    """PNG files beside this one."""
    class_names: tuple[str, ...] = ()
    """Of a cell, the name of each label, where the training images' labels have names."""
    captions: Annotated[CaptionsRecord | None, Field(exclude_if=lambda captions: captions is None)] = None
    """Of a cell that is told captions."""
    reason: str = ""
    """Why it diverged."""


class TokensSummary(Record):
    """What a finished pair of token stores holds (summary.json)."""

    images: Annotated[int, Field(ge=1)]
    """Training images."""
    unigram_entropy: FiniteFloat | None = None
    """Entropy of the training tokens when only their position is known, nats a token; None: the stores hold latents."""
    unigram_bit_entropy: FiniteFloat | None = None
    """The same of each bit by itself, summed over a token's bits; None: they are not bitwise."""
    latent_mean: tuple[FiniteFloat, ...] = ()
    """Of each channel of the training latents."""
    latent_deviation: tuple[FiniteFloat, ...] = ()
    """Their standard deviation."""


class FittedLaws(Record):
    """What the laws of a sweep were fitted to (fitted.json); laws that are others, or gone, are fitted again."""

    fitted: str
    """Fingerprint of the rows."""
    laws: dict[str, str]
    """Hashes of the laws and their report, by file."""


class StudyCell(BaseModel):
    """A cell as one study sees it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    folder: PlainName
    """Its folder among the cells."""
    trunk: PlainName
    """Its trunk's folder among the trunks."""
    title: str
    """For people."""
    labels: Row
    """Columns of the runs table that are the study's: its name, the variant, the nominal budget."""
    recipe: str
    """Fingerprint of what all cells of a law have in common."""
    evaluations: tuple[PlainName, ...] = ()
    """Folders among the evaluations of those that the study's own settings ask for; others of the cell come after."""


class StudyRecord(Record):
    """A study (study.json): its settings and its cells."""

    study: PlainName
    created: FiniteFloat
    """Unix seconds."""
    settings: dict[str, Any]
    """The experiment as it was last swept."""
    tokenizer: PlainName
    """Folder among the tokenizers."""
    tokens: PlainName
    """Folder among the token stores."""
    recipe: str
    """Of the latest sweep: cells of other recipes are left out of the laws."""
    cells: tuple[StudyCell, ...]
    """Of all sweeps, the latest recipe's and others'."""
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"] = "RUNNING"
    ended: FiniteFloat | None = None
    """Unix seconds."""

    @property
    def current(self) -> tuple[StudyCell, ...]:
        """The cells of the latest recipe."""
        return tuple(cell for cell in self.cells if cell.recipe == self.recipe)


def read_result(files: RunFiles) -> Result | None:
    """A run's result; None where it has none that can be used."""
    result = Result.read(files.result)
    if result is not None and result.fingerprint != files.fingerprint:
        _warn(files.result, f"it belongs to another run, {result.fingerprint}")
        return None
    return result


def encoded_images(files: TokenFiles) -> int:
    """Images of a finished training store; 0 where there is none."""
    summary = TokensSummary.read(files.summary)
    return 0 if summary is None else summary.images


def _checksum(content: dict[str, Any]) -> str:
    """Hash of a JSON object, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def why_unusable(error: Exception) -> str:
    """Why a file can't be used, in short."""
    text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else getattr(error, "strerror", None) or error
    return " ".join(str(text).split())[:200]


def _warn(path: Path, why: str) -> None:
    """Say once that a file can't be used, and again when it was written anew and still can't be."""
    stamp = path.stat().st_mtime_ns if path.exists() else 0
    if (path, stamp) not in _named:
        _named.add((path, stamp))
        _log.warning("%s: damaged (%s); it counts as not written", path, why)
