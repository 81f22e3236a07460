"""What carries out a graph of jobs: the interface of all executors, and the bookkeeping that they share."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from sweeps.jobs.base import Job
from sweeps.jobs.training import BranchJob, TrunkJob
from varscale.errors import Diverged, TokenizerRejected, UserError


class Listener:
    """Who is told what happens to jobs; of what a class that derives from it leaves out, it takes no notice."""

    def started(self, job: Job) -> None:
        """A job begins."""

    def progress(self, job: Job, done: int, total: int) -> None:
        """A job is at `done` of `total` images."""

    def ended(self, job: Job, state: str) -> None:
        """A job is over: "done", "diverged" or "failed"."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""

    def refresh(self) -> None:
        """Time has passed."""


class Executor(AbstractContextManager["Executor"], ABC):
    """Carries out graphs of jobs; at the end of a `with` block it is stopped."""

    @abstractmethod
    def run(self, jobs: Sequence[Job], listener: Listener, retries: int = 2) -> "Graph":
        """Run a graph until nothing of it is left.

        Args:
            jobs: The jobs; those that are done are left out.
            listener: Is told what happens.
            retries: How often a job that crashed is tried again.

        Returns:
            The graph as it ended, with what failed.
        """

    @abstractmethod
    def stop(self) -> None:
        """End what runs; it goes on from its last checkpoint another time."""

    def __exit__(self, *_: object) -> None:
        self.stop()


class JobCrashed(Exception):
    """A job ended by an error that is no person's mistake, or its process died.

    Attributes:
        final: Whether trying again would only repeat it.
    """

    def __init__(self, reason: str, final: bool = False) -> None:
        super().__init__(reason, final)
        self.final = final

    def __str__(self) -> str:
        return str(self.args[0])


def portable(error: Exception) -> Exception:
    """An error as it is told to another process, in one line; its class is kept where it decides what follows."""
    reason = " ".join(str(error).split())
    if isinstance(error, UserError):
        return type(error)(reason)
    return JobCrashed(reason or type(error).__name__, final=isinstance(error, ValueError))


class Graph:
    """Which jobs of a graph may start, are tried again, and are lost with what failed.

    Attributes:
        failed: Each job that failed for good, or was lost with one that did, and why.
    """

    def __init__(self, jobs: Sequence[Job], listener: Listener, retries: int) -> None:
        self.failed: list[tuple[Job, str]] = []
        self._listener, self._retries = listener, retries
        self._waiting = {job.key: job for job in jobs}
        self._running: dict[str, Job] = {}
        self._in_turn = {job.key: job for job in sorted(jobs, key=_turn)}
        self._attempts: Counter[str] = Counter()

    @property
    def over(self) -> bool:
        """Whether nothing runs and nothing can start."""
        return not self._running and next(self.candidates(), None) is None

    @property
    def left(self) -> tuple[Job, ...]:
        """What waits or runs."""
        return (*self._waiting.values(), *self._running.values())

    def is_running(self, job: Job) -> bool:
        """Whether it was started and has not ended."""
        return job.key in self._running

    def candidates(self) -> Iterator[Job]:
        """Jobs that may start now: those that take the whole machine, and then the longest way to go, first.

        They are found one by one, since whether a job is ready is looked up in files, and many may wait.
        """
        for key, job in self._in_turn.items():
            if key not in self._waiting:
                continue
            before = set(job.needs) - set(job.starts_within)
            if before.isdisjoint(self._waiting) and before.isdisjoint(self._running) and job.ready():
                yield job

    def start(self, job: Job) -> None:
        """A job starts."""
        self._running[job.key] = self._waiting.pop(job.key)
        self._listener.started(job)

    def succeed(self, job: Job) -> None:
        """A job ended well."""
        del self._running[job.key]
        self._listener.ended(job, "done")

    def resume(self, job: Job, attempts: int, error: Exception | None) -> None:
        """Take over how often a job failed before, and by what, if that was final."""
        if error is None and attempts <= self._retries:
            self._attempts[job.key] = attempts
            return
        self._attempts[job.key] = max(attempts - 1, self._retries)
        self.start(job)
        self.fail(job, error or JobCrashed(f"it failed {attempts} times"))

    def postpone(self, job: Job) -> None:
        """A job was interrupted, through no fault of its own: it waits again."""
        self._waiting[job.key] = self._running.pop(job.key)

    def fail(self, job: Job, error: Exception) -> None:
        """A job ended by an error: it is tried again, or lost with all that waits for it."""
        del self._running[job.key]
        self._attempts[job.key] += 1
        final = isinstance(error, UserError) or (isinstance(error, JobCrashed) and error.final)
        if not final and self._attempts[job.key] <= self._retries:
            self._listener.note(f"{job.title} failed ({error}); trying again")
            self._waiting[job.key] = job
            return
        diverged = isinstance(error, Diverged) and isinstance(job, TrunkJob | BranchJob)
        if not isinstance(error, TokenizerRejected):  # whoever ran the graph raises it again, and so it is printed
            self._listener.note(f"{job.title} {'diverged' if diverged else 'failed'}: {error}")
        for lost in (job, *self._lost_with(job)):
            if not diverged:
                self.failed.append((lost, str(error)))
            elif isinstance(lost, BranchJob):
                lost.diverged(str(error))
            self._listener.ended(lost, "diverged" if diverged else "failed")

    def _lost_with(self, job: Job) -> list[Job]:
        """Jobs that wait for one that will not be done, directly or not; they are no longer waited for."""
        lost: list[Job] = []
        keys = {job.key}
        waiting = self._waiting
        while found := [each for each in waiting.values() if keys & set(each.needs) and not _does_without(each, keys)]:
            lost += found
            keys |= {waiting.pop(each.key).key for each in found}
        return lost


def _turn(job: Job) -> tuple[bool, float]:
    return not job.resources.whole_machine, -job.flops


def _does_without(job: Job, keys: set[str]) -> bool:
    """Whether a job's start is there already although what makes it failed later on."""
    return not keys & (set(job.needs) - set(job.starts_within)) and job.ready()
