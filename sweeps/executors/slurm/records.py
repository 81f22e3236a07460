"""What lies in a study's folder slurm/: a folder for each array of jobs that was submitted, with what became of it.

    slurm/<campaign>-<number>/units.json     the jobs of each element, and which elements they wait for
    slurm/<campaign>-<number>/state-<i>.json how far element i is, written by the process that runs it
    slurm/<campaign>-<number>/…              submitit's script, pickles and logs

A campaign is one call of the command, with all that it led to; jobs that crashed in it are counted together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from sweeps.executors.base import JobCrashed
from sweeps.jobs.base import Job, JobRecord
from sweeps.jobs.graph import job_of
from varscale.errors import Diverged, TokenizerRejected, UserError
from varscale.store.records import Record

_ERRORS: dict[str, type[UserError]] = {error.__name__: error for error in (Diverged, TokenizerRejected, UserError)}
"""Those whose class decides what follows, the more special ones first."""


class UnitRecord(Record):
    """One element of an array."""

    keys: list[str]
    """Of its jobs."""
    jobs: list[JobRecord]
    needs: list[str] = Field(default_factory=list)
    """Names of the units that it waits for."""


class ArrayRecord(Record):
    """An array of Slurm, written before it is submitted."""

    campaign: str
    name: str
    """As squeue shows it."""
    units: list[UnitRecord]


class SubmittedRecord(Record):
    """Written once Slurm has taken an array."""

    ids: list[str]
    """Slurm's, of each element."""


class Failure(Record):
    """Why a job failed on a node."""

    kind: str
    """Its class, of those that decide what follows."""
    reason: str
    final: bool
    """Whether trying again would only repeat it."""

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """Of an error as `portable` tells it."""
        kind = next((name for name, known in _ERRORS.items() if isinstance(error, known)), JobCrashed.__name__)
        final = kind in _ERRORS or (isinstance(error, JobCrashed) and error.final)
        return cls(kind=kind, reason=str(error), final=final)

    def error(self) -> Exception:
        """The error again."""
        return _ERRORS[self.kind](self.reason) if self.kind in _ERRORS else JobCrashed(self.reason, self.final)


class UnitState(Record):
    """How far an element is."""

    slurm_job: str
    node: str
    running: str = ""
    """Key of the job that runs."""
    done: int = 0
    """Its images."""
    total: int = 0
    ended: list[str] = Field(default_factory=list)
    """Keys of the jobs that ended well."""
    failures: dict[str, Failure] = Field(default_factory=dict)
    """Keys of those that didn't."""
    stopped: str = ""
    """The signal that asked it to stop."""
    barren: int = 0
    """How often, one after the other, its time limit came before any of its jobs did a step."""
    over: bool = False


@dataclass(frozen=True)
class UnitFiles:
    """An element of an array, by its files."""

    folder: Path
    """The array's."""
    index: int

    @property
    def name(self) -> str:
        """Unique within a study."""
        return f"{self.folder.name}:{self.index}"

    @property
    def state(self) -> Path:
        """What its process writes."""
        return self.folder / f"state-{self.index}.json"

    def record(self) -> UnitRecord | None:
        """Its jobs; None: its array's record can't be read."""
        array = ArrayRecord.read(array_file(self.folder))
        return None if array is None or self.index >= len(array.units) else array.units[self.index]

    def jobs(self) -> list[Job]:
        """Its jobs, as they were submitted."""
        record = self.record()
        return [] if record is None else [job_of(job, array_file(self.folder)) for job in record.jobs]


def array_file(folder: Path) -> Path:
    """The array's record."""
    return folder / "units.json"


def submitted_file(folder: Path) -> Path:
    """The record that Slurm has it."""
    return folder / "submitted.json"


def last_jobs(slurm: Path) -> dict[str, str]:
    """Slurm's id of the job that each key was submitted in last, and its node where it began."""
    found: dict[str, str] = {}
    for folder, array in arrays(slurm):
        submitted = SubmittedRecord.read(submitted_file(folder))
        if submitted is None or len(submitted.ids) != len(array.units):
            continue
        for index, unit in enumerate(array.units):
            state = UnitState.read(UnitFiles(folder, index).state)
            told = submitted.ids[index] if state is None else f"{submitted.ids[index]} on {state.node}"
            if state is not None and state.stopped:
                told += f", stopped by {state.stopped}"
            found |= dict.fromkeys(unit.keys, told)
    return found


def arrays(slurm: Path) -> Iterator[tuple[Path, ArrayRecord]]:
    """All arrays of a study, oldest first."""
    for path in sorted(slurm.glob("*/units.json")):
        record = ArrayRecord.read(path)
        if record is not None:
            yield path.parent, record
