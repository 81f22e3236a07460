"""Worker processes on this machine: long-lived, one for each device, so that blocks are compiled once.

They are forks of one process that has imported torch and Lightning and done nothing else: that takes seconds of a
processor, which several workers, and a worker in the place of a dead one, need not spend again.
"""

import multiprocessing
import os
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from sweeps.executors.base import Executor, Graph, JobCrashed, Listener, portable
from sweeps.jobs.base import Job
from varscale.errors import UserError
from varscale.numerics.machine import MachineShares, Peers, Share

FAREWELL_SECONDS = 15.0
SIGN_OF_LIFE_SECONDS = 5.0
LONGEST_TEMPORARY = 70
"""Characters of the path of the folder for temporary files, beyond which workers are no forks."""
LONGEST_SILENCE_SECONDS = 120.0
"""A worker that says nothing for so long (it was stopped, or hangs in a driver) is ended and replaced."""


@dataclass(frozen=True)
class Progress:
    """A worker's job is at `done` of `total` images; or the worker just lives."""

    done: int = -1
    total: int = -1


@dataclass(frozen=True)
class Ended:
    """A worker's job is over."""

    error: Exception | None = None


@dataclass
class Worker:
    """A process that takes one job at a time."""

    number: int
    process: Any
    connection: Connection
    heard: float = field(default_factory=time.monotonic)
    """When it last said anything, of `time.monotonic`."""
    job: Job | None = None


class LocalExecutor(Executor):
    """`workers` processes that take one job at a time, or a part of one; with GPUs, worker i sees GPU i only."""

    def __init__(self, shares: MachineShares) -> None:
        self._shares = shares
        # the first process listens at a socket, whose path has little more than a hundred characters
        self._forks = len(tempfile.gettempdir()) < LONGEST_TEMPORARY
        self._context = multiprocessing.get_context("forkserver" if self._forks else "spawn")
        self._context.set_forkserver_preload(["sweeps.executors.forked"])
        self._workers: list[Worker] = []
        self._meeting_places = tempfile.TemporaryDirectory(prefix="varscale-", ignore_cleanup_errors=True)
        self._meetings = 0
        self._turn = threading.RLock()  # `stop` may come from another thread than `run`
        self._stopped = False

    def run(self, jobs: Sequence[Job], listener: Listener, retries: int = 2) -> Graph:
        """Run the graph, until `stop`; the processes are started with the first job, and kept.

        Raises:
            ExperimentError: A job takes more devices than there are workers.
        """
        for job in jobs:
            self._shares.check_run(job.title, job.resources.run)
        graph = Graph(jobs, listener, retries)
        self._stopped = False
        useful = min(self._shares.workers, sum(job.resources.run.devices for job in jobs))
        self._workers += [self._start(number) for number in range(len(self._workers), useful)]
        while not (graph.over or self._stopped):
            with self._turn:
                self._hand_out(graph)
                for worker, event in self._events(0.5):
                    self._tell(graph, listener, worker, event)
            listener.refresh()
        return graph

    def stop(self) -> None:
        """End all workers; what they were doing goes on from its last checkpoint another time."""
        self._stopped = True
        with self._turn:
            workers, self._workers = self._workers, []
            for worker in workers:
                if worker.job is not None and worker.job.resources.run.processes > 1:
                    worker.process.kill()  # asked to end, it would wait for the others to take its next step
                elif worker.job is not None:
                    worker.process.terminate()
                else:
                    with suppress(OSError):
                        worker.connection.send(None)  # let it end by itself, and tidy up
            for worker in workers:
                _end(worker.process)
                worker.connection.close()

    def _hand_out(self, graph: Graph) -> None:
        """Give idle workers jobs; one that takes several, or the whole machine, waits until they are idle."""
        while idle := [worker for worker in self._workers if worker.job is None]:
            running = [worker.job for worker in self._workers if worker.job is not None]
            if any(job.resources.whole_machine for job in running):
                return
            startable = (job for job in graph.candidates() if not (job.resources.whole_machine and running))
            job = next(startable, None)
            if job is None or job.resources.run.devices > len(idle):
                return
            self._submit(idle[: job.resources.run.devices], job)
            graph.start(job)

    def _submit(self, workers: Sequence[Worker], job: Job) -> None:
        share = self._shares.whole if job.resources.whole_machine else self._shares.worker
        self._meetings += 1
        meeting = str(Path(self._meeting_places.name) / str(self._meetings))
        for rank, worker in enumerate(workers):
            if not worker.process.is_alive():
                self._replace(worker)
            worker.job = job
            own = share if len(workers) == 1 else replace(share, peers=Peers(rank, len(workers), meeting))
            with suppress(OSError):  # it died just now: `_events` will say so
                worker.connection.send((job, own))

    def _events(self, timeout: float) -> Iterator[tuple[Worker, Progress | Ended]]:
        """What happened, waiting at most `timeout` seconds for the first."""
        ready = wait([worker.connection for worker in self._workers], timeout)
        for worker in self._workers:
            if worker.connection in ready:
                try:
                    event: Progress | Ended = worker.connection.recv()
                    worker.heard = time.monotonic()
                    yield worker, event
                except (EOFError, OSError):  # between messages, or within one
                    _end(worker.process)
                    code = worker.process.exitcode
                    self._replace(worker)
                    yield worker, Ended(JobCrashed(f"its process ended with exit code {code}"))
            elif time.monotonic() - worker.heard > LONGEST_SILENCE_SECONDS:
                worker.process.kill()
                worker.process.join()
                self._replace(worker)
                silence = f"{LONGEST_SILENCE_SECONDS:.0f} seconds"
                yield worker, Ended(JobCrashed(f"its process gave no sign of life for {silence} and was ended"))

    def _tell(self, graph: Graph, listener: Listener, worker: Worker, event: Progress | Ended) -> None:
        """Pass on what happened to a worker's job, which is over when all that take part are done, or one failed."""
        if worker.job is None:
            return
        if isinstance(event, Progress):
            if event.done >= 0:
                listener.progress(worker.job, event.done, event.total)
            return
        job, worker.job = worker.job, None
        others = [each for each in self._workers if each.job is job]
        if event.error is not None:
            for other in others:  # they wait for the one that failed
                other.job = None
                other.process.kill()
                other.process.join()
                self._replace(other)
            graph.fail(job, event.error)
        elif not others:
            graph.succeed(job)

    def _replace(self, worker: Worker) -> None:
        """A new process in the place of a dead one; what the old one was doing is the caller's to settle."""
        worker.connection.close()
        fresh = self._start(worker.number)
        worker.process, worker.connection, worker.heard = fresh.process, fresh.connection, fresh.heard

    def _start(self, number: int) -> Worker:
        threads = str(self._shares.worker.threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "GOMP_SPINCOUNT": "20000",  # microseconds: threads that spin for long slow down all else on a busy machine
        }
        if gpus := self._shares.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = _visible_gpus(gpus)[number % gpus]
        resource_tracker.ensure_running()  # starting it would let Ctrl-C through to the workers
        # the first process imports what this one would, and not what happens to lie in the current folder; Ctrl-C
        # reaches all processes of a terminal, and is the orchestrator's to handle
        imports = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
        ours, theirs = self._context.Pipe()
        process: Any = self._context.Process(target=_work, args=(theirs, environment), daemon=True)  # type: ignore[attr-defined]
        with changed_environment({**environment, **imports}), _interrupts_held_back():
            (forkserver.ensure_running if self._forks else process.start)()
        if self._forks:  # it waits for the first process's imports, and may be interrupted meanwhile
            process.start()
        theirs.close()
        return Worker(number, process, ours)


def _end(process: Any) -> None:
    """Wait for a process that should end by itself; then end it, even one that is stuck in a driver."""
    process.join(FAREWELL_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()


def _visible_gpus(count: int) -> list[str]:
    """Names of the GPUs that this process sees: a scheduler, or a user, may have left it some of the machine's."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(count)]


def _work(connection: Connection, environment: dict[str, str]) -> None:
    """A worker's life: jobs one after the other, until the orchestrator is gone."""
    os.environ.clear()  # it was the forked process's, as it stood when that was started
    os.environ.update(environment)
    jobs: queue.SimpleQueue[tuple[Job, Share] | None] = queue.SimpleQueue()
    sending = threading.Lock()

    def send(event: Progress | Ended) -> None:
        with sending, suppress(OSError):  # where the orchestrator is gone, `_receive` ends the process
            connection.send(event)

    threading.Thread(target=_receive, args=(connection, jobs), daemon=True).start()
    threading.Thread(target=_live, args=(send,), daemon=True).start()
    while True:
        taken = jobs.get()
        if taken is None:
            return
        job, share = taken
        try:
            if share.peers.leads:
                job.write()
            redirect_output(job.files.log)
            job.run(share, lambda done, total: send(Progress(done, total)))
        except Exception as error:
            if not isinstance(error, UserError):
                with suppress(OSError):  # on a full disk the log is full, too
                    traceback.print_exc()
            send(Ended(portable(error)))
        else:
            send(Ended())


def _live(send: Any) -> None:
    while True:
        time.sleep(SIGN_OF_LIFE_SECONDS)
        send(Progress())


def _receive(connection: Connection, jobs: "queue.SimpleQueue[tuple[Job, Share] | None]") -> None:
    """Pass jobs on; when the orchestrator ends, however it ends, end at once."""
    try:
        while True:
            jobs.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)


def redirect_output(path: Path) -> None:
    """Let a job's output, of libraries in C too, go to its log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits until the end here, and never reaches processes started meanwhile: they inherit the mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def changed_environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Within it these variables of the environment have other values, or (None) none."""
    before = {name: os.environ.get(name) for name in values}
    _set_variables(values)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
