"""What runs on a node: the jobs of one unit, one after another, until all are done or a signal asks to stop."""

import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeps.executors.base import Graph, JobCrashed, Listener, portable
from sweeps.executors.local import redirect_output
from sweeps.executors.slurm.records import Failure, UnitFiles, UnitState
from sweeps.executors.slurm.tasks import Tasks, scontrol, slurm_id, wait_for_the_end
from sweeps.jobs.base import Job
from varscale.errors import UserError
from varscale.numerics.machine import Share, processors

_WRITE_SECONDS = 1.0
_EARLY_SECONDS = 60.0
"""How much earlier than asked for Slurm may signal that the time limit comes near."""
_MOST_BARREN = 3


@dataclass(frozen=True)
class RunUnit:
    """Runs a unit; submitit sends this to the node."""

    folder: str
    index: int
    minutes: float
    """The time limit."""
    signal_seconds: float

    def __call__(self) -> None:
        """Run what is not done yet.

        Raises:
            JobCrashed: Something failed: Slurm then holds back what waits for this unit.
        """
        from varscale.training.interruption import STOP, Interrupted

        STOP.listen()
        started, files = time.monotonic(), UnitFiles(Path(self.folder), self.index)
        jobs = files.jobs()
        tasks = Tasks.of_slurm(f"{files.folder.name}-{files.index}")
        share = Share(_threads(jobs), peers=tasks.peers)
        if not tasks.peers.leads:
            tasks.follow(jobs, share)
            return
        state = _StateFile(files)
        graph = Graph(jobs, state, retries=0)
        try:
            while job := next(graph.candidates(), None):
                STOP.check()
                _run(job, graph, share, state, tasks)
            tasks.end()
        except Interrupted:
            preempted = time.monotonic() - started < 60 * self.minutes - self.signal_seconds - _EARLY_SECONDS
            if state.close_stopped(STOP.signal, preempted=preempted) >= _MOST_BARREN:
                state.fail_all(f"{_MOST_BARREN} times no step was made within the time limit, {self.minutes:g} minutes")
                raise JobCrashed("the time limit is too short") from None
            wait_for_the_end(requeue=STOP.signal == "SIGUSR2")
            raise JobCrashed("it was asked to stop") from None
        state.close()
        if graph.failed or state.failures:
            raise JobCrashed("; ".join(reason for _, reason in graph.failed) or "failed")


@dataclass(frozen=True)
class CallAgain:
    """Calls the varscale command again, on a node, after a study's jobs have ended."""

    command: tuple[str, ...]
    folder: str

    def __call__(self) -> None:
        """Call it; its output goes to Slurm's log."""
        subprocess.run([sys.executable, "-m", "varscale.cli", *self.command], cwd=self.folder, check=True)


def _run(job: Job, graph: Graph, share: Share, state: "_StateFile", tasks: Tasks) -> None:
    from varscale.training.interruption import Interrupted

    graph.start(job)
    try:
        if not job.done():
            job.write()
            redirect_output(job.files.log)
            tasks.begin(job)
            job.run(share, lambda done, total: state.progress(job, done, total))
    except Interrupted:
        raise
    except Exception as error:
        if not isinstance(error, UserError):
            with suppress(OSError):
                traceback.print_exc()
        told = portable(error)
        state.failures[job.key] = Failure.of(told)
        graph.fail(job, told)
    else:
        graph.succeed(job)


class _StateFile(Listener):
    """Listens to the unit's graph, and writes how far it is, now and then, from a thread of its own."""

    def __init__(self, files: UnitFiles) -> None:
        before = UnitState.read(files.state)  # of the same unit, before it was requeued
        self.failures: dict[str, Failure] = {}
        self.advanced = False
        """Whether any job reported progress beyond where it began."""
        self._files, self._ended = files, list(before.ended) if before else []
        self._running, self._done, self._total = "", 0, 0
        self._first: int | None = None
        self._stopped, self._over, self._barren = "", False, before.barren if before else 0
        self._changed, self._closing = threading.Event(), threading.Event()
        self._write()
        threading.Thread(target=self._keep, daemon=True).start()

    def started(self, job: Job) -> None:
        """A job begins."""
        self._running, self._done, self._total, self._first = job.key, 0, 0, None
        _show_name(f"{job.experiment.name} {job.key}")
        self._changed.set()

    def progress(self, job: Job, done: int, total: int) -> None:
        """A job is at `done` of `total` images."""
        self._first = done if self._first is None else self._first
        self.advanced = self.advanced or done > self._first
        self._done, self._total = done, total
        self._changed.set()

    def ended(self, job: Job, state: str) -> None:
        """A job is over."""
        self._running = ""
        if state == "done":
            self.advanced = True
            self._ended.append(job.key)
        self._changed.set()

    def note(self, text: str) -> None:
        """Goes to the log."""
        print(text, file=sys.stderr)

    def fail_all(self, reason: str) -> None:
        """Nothing of the unit can be done like this."""
        failure = Failure(kind="UserError", reason=reason, final=True)
        keys = [job.key for job in self._files.jobs()]
        self.failures |= {key: failure for key in keys if key not in self._ended}
        self._stopped = ""
        self._write()

    def close(self) -> None:
        """All is over."""
        self._closing.set()
        self._over = True
        self._write()

    def close_stopped(self, by: str, *, preempted: bool) -> int:
        """A signal ended this turn; how many turns before had their whole time and made no step, this one included."""
        self._closing.set()
        self._stopped, self._barren = by, 0 if self.advanced else self._barren + (not preempted)
        self._write()
        return self._barren

    def _keep(self) -> None:
        from varscale.training.interruption import STOP

        while not self._closing.wait(_WRITE_SECONDS):
            if STOP.signal:  # a run that waits, for a lock or a compiler, may not come to its next step in time
                self._stopped = STOP.signal
            if self._changed.is_set() or self._stopped:
                self._changed.clear()
                with suppress(OSError):
                    self._write()

    def _write(self) -> None:
        UnitState(
            slurm_job=slurm_id(),
            node=socket.gethostname(),
            running=self._running,
            done=self._done,
            total=self._total,
            ended=list(self._ended),
            failures=dict(self.failures),
            stopped=self._stopped,
            barren=self._barren,
            over=self._over,
        ).write(self._files.state)


def _show_name(name: str) -> None:
    """Let squeue show what runs now; a site that forbids it shows the array's name."""
    scontrol("update", f"JobId={slurm_id()}", f"JobName={name}")


def _threads(jobs: Sequence[Job]) -> int:
    stated: Any = jobs[0].experiment.runtime.threads if jobs else 0
    return int(stated or os.environ.get("SLURM_CPUS_PER_TASK") or processors())
