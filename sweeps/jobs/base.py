"""What every job of a study can say: what it needs and takes, how to run and, from files alone, whether it is done.

Each can be written to a file and run by itself: `varscale run-job FILE`. Worker processes import this package; torch is
imported when a job runs.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, FiniteFloat, JsonValue

from sweeps.study import Study
from varscale.config import Experiment
from varscale.config.section import RunResources
from varscale.numerics.machine import Share
from varscale.store.layout import RunFiles, Store, StudyFiles, TokenFiles
from varscale.store.records import PlainName, Record
from varscale.training.cells import Cell, Trunk
from varscale.training.interruption import Report

JobKind = Literal["tokenizer", "tokens", "execution", "trunk", "branch", "reference", "evaluation"]


@dataclass(frozen=True)
class Resources:
    """What a job takes."""

    whole_machine: bool = False
    """Whether it uses all processors (or the GPU) alone; otherwise a worker's share."""
    run: RunResources = field(default_factory=RunResources)
    """Devices, nodes and time."""


class JobRecord(Record):
    """A job as a file (job.json)."""

    job: JobKind
    experiment: dict[str, JsonValue]
    """Settings, a variant's changes made."""
    runs: str
    """The runs folder."""
    tokenizer: PlainName
    tokens: PlainName
    train_images: int = Field(default=1, ge=1)
    sizes: list[tuple[int, int, FiniteFloat, int]] = Field(default_factory=list)
    """Depth, seed, smallest budget and images of each trunk, to decide how to execute them."""
    depth: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)
    smallest_budget: FiniteFloat = 1.0
    variant: str = ""
    milestones: list[int] = Field(default_factory=list)
    budget: FiniteFloat = 1.0
    from_trunk: bool = False
    subject: Literal["cell", "real", "reconstructed"] = "cell"
    """What an evaluation measures."""


@dataclass(frozen=True)
class StudyPlace:
    """Where a study's jobs find their inputs and leave their outputs."""

    store: Store
    study: StudyFiles
    tokenizer: RunFiles
    tokens: TokenFiles

    @classmethod
    def of(cls, study: Study) -> "StudyPlace":
        """Of a study."""
        return cls(study.store, study.files, study.tokenizer, study.tokens)

    def trunk(self, trunk: Trunk) -> RunFiles:
        """A trunk's files."""
        return self.store.run(trunk.key(self.tokens.fingerprint))

    def cell(self, cell: Cell) -> RunFiles:
        """A cell's files."""
        return self.store.run(cell.key(self.tokens.fingerprint))


@dataclass(frozen=True)
class Job(ABC):
    """One piece of a study's work; it can be sent to another process."""

    experiment: Experiment
    place: StudyPlace

    kind: ClassVar[JobKind]
    """What a `JobRecord` calls such jobs."""

    @property
    def key(self) -> str:
        """What tells it from the other jobs of its study, and what `needs` names; its kind where there is one alone."""
        return self.kind

    @property
    def title(self) -> str:
        """For people: the key, unless a job says more."""
        return self.key

    @property
    @abstractmethod
    def files(self) -> RunFiles:
        """Where it writes."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Keys of the jobs whose work it starts from."""
        return ()

    @property
    def starts_within(self) -> tuple[str, ...]:
        """Which of these need not have ended: it starts as soon as it is `ready`."""
        return ()

    @property
    def resources(self) -> Resources:
        """What it takes of the machine."""
        return Resources()

    @property
    def flops(self) -> float:
        """Of itself and the longest of what waits for it; the longest way to go begins first."""
        return 0.0

    @property
    def images(self) -> tuple[int, int]:
        """The first and the last image of its run."""
        return 0, 0

    @property
    def flops_per_image(self) -> int:
        """Training FLOPs of an image; 0: it trains no model of the grid."""
        return 0

    @abstractmethod
    def done(self) -> bool:
        """Whether its work is there, from files alone."""

    def ready(self) -> bool:
        """Whether what it starts from is there, from files alone."""
        return True

    @abstractmethod
    def run(self, share: Share, report: Report) -> None:
        """Do it, in this process."""

    def outcome(self) -> str:
        """What it came to, for people, from files alone; "" where there is nothing to say."""
        return ""

    def described(self) -> dict[str, Any]:
        """Its own fields of a `JobRecord`."""
        return {}

    @property
    def record(self) -> JobRecord:
        """What it takes to run it in another process."""
        place = self.place
        return JobRecord(
            job=self.kind,
            experiment=self.experiment.model_dump(mode="json"),
            runs=str(place.store.runs.absolute()),
            tokenizer=place.tokenizer.folder.name,
            tokens=place.tokens.folder.name,
            **self.described(),
        )

    def write(self) -> Path:
        """Write it down where it writes its files."""
        self.record.write(self.files.job)
        return self.files.job


def trunk_fields(trunk: Trunk) -> dict[str, Any]:
    """A trunk's fields of a `JobRecord`."""
    return {
        "depth": trunk.depth,
        "seed": trunk.seed,
        "smallest_budget": trunk.smallest_budget,
        "variant": trunk.variant,
    }


def set_threads(share: Share) -> None:
    """Let torch use the processors of a worker's share."""
    import torch

    torch.set_num_threads(share.threads)
