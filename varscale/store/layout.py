"""Where things lie under the runs folder; nothing else knows it.

    runs/tokenizers/<name>-<fingerprint>/   weights.safetensors, reconstructions.png
    runs/tokens/<name>-<fingerprint>/       summary.json, and a token store a split: train/, validation/
    runs/trunks/<name>-<fingerprint>/       images-<n>.ckpt, where branches start
    runs/cells/<name>-<fingerprint>/        weights.safetensors, samples.png
    runs/evaluations/<name>-<fingerprint>/  pieces/ while it is under way
    runs/studies/<study>/                   study.json, execution.json, mlflow/, slurm/, laws/{laws.json, …}
    runs/searches/<name>/                   journal.log (Optuna's), search.json, trials.csv, best.yaml, report.md, *.png
    runs/forecasts/                         predictions that were written down before their run
    runs/mlflow.db                          MLflow's store, unless another one is named

All studies share the first five. The folder of a run (a tokenizer, tokens, a trunk, a cell, an evaluation) has job.json
and run.json (written first), run.log, metrics.jsonl, last.ckpt while the run is under way, and result.json (written
last); `.<folder>.lock` beside it is held while a process writes there.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock

from varscale.errors import ExperimentError

Kind = Literal["tokenizers", "tokens", "trunks", "cells", "evaluations"]
KINDS: tuple[Kind, ...] = ("tokenizers", "tokens", "trunks", "cells", "evaluations")
DEFAULT_RUNS = Path("runs")


@dataclass(frozen=True)
class RunKey:
    """What names a run's folder: its kind, a readable name, and its fingerprint."""

    kind: Kind
    name: str
    fingerprint: str

    @property
    def folder(self) -> str:
        """The folder's name, unique within its kind."""
        return f"{self.name}-{self.fingerprint}"


@dataclass(frozen=True)
class Store:
    """A runs folder."""

    runs: Path = DEFAULT_RUNS

    def run(self, key: RunKey) -> "RunFiles":
        """Files of a run."""
        return RunFiles(self.runs / key.kind / key.folder)

    def tokens(self, key: RunKey) -> "TokenFiles":
        """Files of a pair of token stores."""
        return TokenFiles(self.runs / key.kind / key.folder)

    def study(self, name: str) -> "StudyFiles":
        """Files of a study."""
        return StudyFiles(self.runs / "studies" / name)

    def search(self, name: str) -> "SearchFiles":
        """Files of a search for hyperparameters."""
        return SearchFiles(self.runs / "searches" / name)

    def studies(self) -> "list[StudyFiles]":
        """Files of every study that was begun, in the order of their names."""
        return [StudyFiles(path.parent) for path in sorted((self.runs / "studies").glob("*/study.json"))]

    def begun(self, kind: Kind) -> "list[RunFiles]":
        """Files of every run of a kind that was begun, in the order of their folders' names."""
        return [RunFiles(path.parent) for path in sorted((self.runs / kind).glob("*/run.json"))]

    @property
    def tracking_uri(self) -> str:
        """MLflow's store unless another one is named: one SQLite file for all studies."""
        return f"sqlite:///{(self.runs / 'mlflow.db').resolve()}"

    @property
    def forecasts(self) -> Path:
        """Folder of predictions that were written down before their run."""
        return self.runs / "forecasts"

    @property
    def tracking_lock(self) -> Path:
        """Held while a process delivers to MLflow."""
        return self.runs / ".mlflow.lock"

    def old_studies(self) -> list[str]:
        """Studies that an earlier version wrote, each in a folder of its own directly under the runs folder."""
        found = {path.parent.name for path in self.runs.glob("*/numerics.json")}
        found |= {path.parents[1].name for path in self.runs.glob("*/sweeps/*.sweep.json")}
        return sorted(found - {*KINDS, "studies"})

    def check(self, *, writing: bool = True) -> None:
        """Raise `ExperimentError` where the runs folder can't be one: a file, or a folder without access."""
        below = [self.runs / name for name in (*KINDS, "studies")]
        for path in (self.runs, *below):
            if path.exists() and not path.is_dir():
                raise ExperimentError(f"--runs-dir {path}: a file; name a folder")
        parent = next(folder for folder in (self.runs.absolute(), *self.runs.absolute().parents) if folder.exists())
        for folder in (parent, *below):
            if writing and folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                raise ExperimentError(f"--runs-dir {self.runs}: {folder} can't be written to; name another one")


def cache_folder() -> Path:
    """Folder of what can be found out again: $VARSCALE_CACHE, or varscale in $XDG_CACHE_HOME or in ~/.cache.

    It may not exist, and may not be one that can be written to.
    """
    if named := os.environ.get("VARSCALE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "varscale"  # noqa: PTH111  # raises nothing


class _Below:
    """A path below the folder of what it belongs to."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, files: "StudyFiles | RunFiles | SearchFiles", kind: type | None = None) -> Path:
        return files.folder / self._name


@dataclass(frozen=True)
class StudyFiles:
    """Paths of what belongs to one study."""

    folder: Path

    record = _Below("study.json")
    """Its settings, and its cells with their nominal budgets."""
    execution = _Below("execution.json")
    """How this machine carries out its runs."""
    record_lock = _Below(".record.lock")
    lock = _Below(".sweep.lock")
    """Held while a sweep of the study runs."""
    laws = _Below("laws")
    """Folder of fits, figures and report."""
    slurm = _Below("slurm")
    """Folder of what was submitted to Slurm: a folder a job array, with its script, logs and state."""
    fitted = _Below("laws/fitted.json")
    """Which results the laws of the last sweep were fitted to."""

    @property
    def name(self) -> str:
        """The study's name."""
        return self.folder.name

    def delivery(self, kind: str, folder: str) -> Path:
        """How far a run, or the study itself, was delivered to MLflow."""
        return self.folder / "mlflow" / f"{kind}-{folder}.json"


@dataclass(frozen=True)
class SearchFiles:
    """Paths of what belongs to one search; its trials are cells of a study of their own."""

    folder: Path

    journal = _Below("journal.log")
    """Optuna's storage, unless another one is named."""
    lock = _Below(".search.lock")
    """Held while the search runs."""
    summary = _Below("search.json")
    """What it came to."""
    trials = _Below("trials.csv")
    """A row a trial."""
    best = _Below("best.yaml")
    """The experiment with the best settings."""
    report = _Below("report.md")
    """For people, with the figures beside it."""

    def figure(self, name: str) -> Path:
        """A picture."""
        return self.folder / f"{name}.png"


@dataclass(frozen=True)
class RunFiles:
    """Paths of one run's files."""

    folder: Path

    job = _Below("job.json")
    """How to repeat the run: `varscale run-job FILE`."""
    identity = _Below("run.json")
    """Who the run is: its name, role and parameters; written first."""
    metrics = _Below("metrics.jsonl")
    """Points of the training curves, one JSON object a line, appended."""
    result = _Below("result.json")
    """Final numbers; written last."""
    last_checkpoint = _Below("last.ckpt")
    """Where an interrupted run goes on."""
    log = _Below("run.log")
    """What the run printed."""
    weights = _Below("weights.safetensors")
    """The finished model's weights and description."""
    pieces = _Below("pieces")
    """Folder of what an evaluation that is under way has measured; see `piece`."""

    @property
    def fingerprint(self) -> str:
        """The run's identity, which ends its folder's name."""
        return self.folder.name.rpartition("-")[2]

    @property
    def lock(self) -> Path:
        """Held while a process writes here."""
        return self.folder.with_name(f".{self.folder.name}.lock")

    def locked(self) -> FileLock:
        """The same, to be held in a `with` block, which waits for other processes; the folder is made for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.lock)

    @property
    def milestones(self) -> list[Path]:
        """A trunk's checkpoints where branches start."""
        return sorted(self.folder.glob("images-*.ckpt"))

    def milestone(self, images: int) -> Path:
        """A trunk's checkpoint after `images` images, where a branch starts."""
        return self.folder / f"images-{images}.ckpt"

    def piece(self, first: int) -> Path:
        """What an evaluation has measured of some images, the first of which has this index."""
        return self.pieces / f"images-{first}.safetensors"

    def picture(self, name: str) -> Path:
        """A PNG that the run made."""
        return self.folder / f"{name}.png"


class TokenFiles(RunFiles):
    """Paths of the token stores that one tokenizer made of an experiment's images."""

    train = _Below("train")
    """Folder of the training store."""
    validation = _Below("validation")
    """Folder of the validation store."""
    summary = _Below("summary.json")
    """Images of the training store and their unigram entropy; written last."""

    @property
    def bytes(self) -> int:
        """Bytes of the shards that are written, those of unfinished stores too."""
        return sum(path.stat().st_size for path in self.folder.glob("*/*.npy"))
