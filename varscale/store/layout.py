"""File layout under `runs/<experiment>/`, atomic writes, and nothing else knows either.

runs/<experiment>/
numerics.json                     precision, threads and compilation of the whole sweep
tokenizers/<fingerprint>/         tokenizer.safetensors, reconstructions.png
tokens/<fingerprint>/             summary.json, and a token store a split: train/, validation/
trunks/d12-s0-<fingerprint>/      images-<n>.ckpt (where branches start)
cells/d12-c1e12-s0-<fingerprint>/ weights.safetensors, samples.png
sweeps/<fingerprint>.sweep.json   a sweep's cells
laws/                             laws.json, report.html, *.svg, *.png, runs.csv, fitted.json

Every run's folder has run.json (written first), run.log, metrics.jsonl, last.ckpt while it is under way, and
result.json (written last); .<folder>.lock beside it is held while a process writes there. `varscale.tracking.records`
adds how far each run was delivered to MLflow.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

NUMERICS_VERSION = 7
"""Raised when a change of code changes results; part of every fingerprint."""


def fingerprint(**settings: Any) -> str:
    """A short hash of settings (JSON values) that change a run's numbers and of its inputs' fingerprints."""
    text = json.dumps({"numerics_version": NUMERICS_VERSION, **settings}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ExperimentFiles:
    """Paths of one experiment's files."""

    runs: Path
    experiment: str

    @classmethod
    def holding(cls, run: "RunFiles") -> "ExperimentFiles":
        """Of the experiment that a run belongs to."""
        root = run.folder.parent.parent
        return cls(root.parent, root.name)

    @property
    def root(self) -> Path:
        """Folder of the experiment."""
        return self.runs / self.experiment

    @property
    def numerics(self) -> Path:
        """The sweep's stored decision on precision, threads and compilation."""
        return self.root / "numerics.json"

    @property
    def numerics_lock(self) -> Path:
        """Held while they are written."""
        return self.root / ".numerics.lock"

    @property
    def laws(self) -> Path:
        """Folder of fits, figures and report."""
        return self.root / "laws"

    @property
    def tracking_uri(self) -> str:
        """MLflow's default store: one SQLite file for all experiments under `runs`."""
        return f"sqlite:///{(self.runs / 'mlflow.db').resolve()}"

    @property
    def sweep_lock(self) -> Path:
        """Held while a sweep of the experiment runs."""
        return self.root / ".sweep.lock"

    @property
    def tracking_lock(self) -> Path:
        """Held while a process delivers to MLflow."""
        return self.runs / ".mlflow.lock"

    @property
    def laws_state(self) -> Path:
        """Which results the laws of the last sweep were fitted to."""
        return self.laws / "fitted.json"

    def tokenizer(self, print_: str) -> "RunFiles":
        """Files of a tokenizer, under another experiment of the same runs folder where only that one finished it."""
        found = map(RunFiles, self._here_or_elsewhere("tokenizers", print_))
        return next((run for run in found if run.has_tokenizer(print_)), RunFiles(self.root / "tokenizers" / print_))

    def tokens(self, print_: str, images: int) -> "TokenFiles":
        """Files of the token stores; without own, those of another experiment that hold as many training images.

        Only those: a store that grows replaces files, and the other experiment's sweep may be reading them.
        """
        own = TokenFiles(self.root / "tokens" / print_)
        others = map(TokenFiles, self._here_or_elsewhere("tokens", print_))
        return own if own.folder.exists() else next((files for files in others if files.images >= images), own)

    def trunk(self, name: str, print_: str) -> "RunFiles":
        """Files of a trunk."""
        return RunFiles(self.root / "trunks" / f"{name}-{print_}")

    def cell(self, name: str, print_: str) -> "RunFiles":
        """Files of a cell."""
        return RunFiles(self.root / "cells" / f"{name}-{print_}")

    def finished_cell(self, print_: str) -> "RunFiles | None":
        """A cell's files if it is finished, here or under another experiment of the same runs folder."""
        found = map(RunFiles, self._here_or_elsewhere("cells", f"*-{print_}"))
        return next((run for run in found if run.finished(print_)), None)

    def all_runs(self, kind: Literal["trunks", "cells"]) -> "list[RunFiles]":
        """Files of every trunk or cell that was begun."""
        return [RunFiles(path.parent) for path in sorted((self.root / kind).glob("*/run.json"))]

    def others(self) -> "list[ExperimentFiles]":
        """The other experiments of the same runs folder whose numerics are decided."""
        found = (path.parent.name for path in sorted(self.runs.glob(f"*/{self.numerics.name}")))
        return [ExperimentFiles(self.runs, name) for name in found if name != self.experiment]

    def sweep(self, print_: str) -> Path:
        """Record of a sweep."""
        return self.root / "sweeps" / f"{print_}.sweep.json"

    def sweep_records(self) -> list[Path]:
        """The records of all sweeps."""
        return sorted((self.root / "sweeps").glob("*.sweep.json"))

    def _here_or_elsewhere(self, kind: str, name: str) -> Iterator[Path]:
        """Folders of that name under this experiment, then under the others."""
        yield from (self.root / kind).glob(name)
        yield from sorted(self.runs.glob(f"*/{kind}/{name}"))


@dataclass(frozen=True)
class RunFiles:
    """Paths of one run's files (tokenizer, trunk or cell)."""

    folder: Path

    @property
    def identity(self) -> Path:
        """Who the run is: name, role, fingerprint, parameters; written first."""
        return self.folder / "run.json"

    @property
    def metrics(self) -> Path:
        """Points of the curves, one JSON object a line, appended."""
        return self.folder / "metrics.jsonl"

    @property
    def result(self) -> Path:
        """Final numbers; written last."""
        return self.folder / "result.json"

    @property
    def last_checkpoint(self) -> Path:
        """Where an interrupted run goes on."""
        return self.folder / "last.ckpt"

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.folder / "run.log"

    @property
    def lock(self) -> Path:
        """Held while a process writes here."""
        return self.folder.with_name(f".{self.folder.name}.lock")

    @property
    def tokenizer_checkpoint(self) -> Path:
        """A finished tokenizer's EMA weights and shape."""
        return self.folder / "tokenizer.safetensors"

    @property
    def weights(self) -> Path:
        """A finished cell's weights and shape."""
        return self.folder / "weights.safetensors"

    @property
    def milestones(self) -> list[Path]:
        """A trunk's checkpoints where branches start."""
        return sorted(self.folder.glob("images-*.ckpt"))

    def milestone(self, images: int) -> Path:
        """A trunk's checkpoint after `images` images, where a branch starts."""
        return self.folder / f"images-{images}.ckpt"

    def picture(self, name: str) -> Path:
        """A PNG that the run made."""
        return self.folder / f"{name}.png"

    def read_result(self) -> dict[str, Any] | None:
        """The result, or None where there is none."""
        return read_json(self.result)

    def has_tokenizer(self, print_: str) -> bool:
        """Whether a finished tokenizer with this fingerprint is there."""
        return self.finished(print_) and self.tokenizer_checkpoint.exists()

    def finished(self, print_: str) -> bool:
        """Whether a result with this fingerprint was written."""
        result = self.read_result()
        return result is not None and result.get("fingerprint") == print_


class TokenFiles(RunFiles):
    """Paths of the token stores that one tokenizer made of an experiment's images."""

    @property
    def train(self) -> Path:
        """Folder of the training store."""
        return self.folder / "train"

    @property
    def validation(self) -> Path:
        """Folder of the validation store."""
        return self.folder / "validation"

    @property
    def summary(self) -> Path:
        """Images of the training store and their unigram entropy; written last."""
        return self.folder / "summary.json"

    @property
    def images(self) -> int:
        """Images of the finished training store."""
        return int((read_json(self.summary) or {}).get("images") or 0)

    @property
    def bytes(self) -> int:
        """Bytes of the shards that are written, those of unfinished stores too."""
        return sum(path.stat().st_size for path in self.folder.glob("*/*.npy"))


def absolute(path: Path) -> Path:
    """From the root, and no link followed: a run belongs to the folder that it was reached by."""
    return Path(os.path.abspath(path))  # noqa: PTH100  # Path.absolute keeps `..`


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where the file is absent or torn."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: bad JSON or bad UTF-8
        return None
    return value if isinstance(value, dict) else None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never half of it.

    Raises:
        OSError: it can't be written; names the file.
    """
    with replaced(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which then takes its place at once; deleted where writing fails.

    Raises:
        OSError: it can't be written; names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "rb+") as file:
            yield temporary
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
