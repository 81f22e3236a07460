"""Worker processes on this machine: long-lived, one a device, so that torch is imported and blocks compiled once."""

import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from sweeps.jobs import Job, log_file


@dataclass(frozen=True)
class Progress:
    """A worker's job is at `done` of `total` images."""

    worker: int
    done: int
    total: int


@dataclass(frozen=True)
class Finished:
    """A worker's job ended well."""

    worker: int
    value: Any


@dataclass(frozen=True)
class Failed:
    """A worker's job raised an error, or the worker died."""

    worker: int
    kind: str
    message: str


Event = Progress | Finished | Failed

_FAREWELL_SECONDS = 15.0


class LocalLauncher:
    """`workers` processes that take one job at a time; with GPUs, worker i sees GPU i only."""

    def __init__(self, workers: int, threads: int, gpus: int) -> None:
        self._threads, self._gpus = threads, gpus
        self._context = multiprocessing.get_context("spawn")
        self._workers = [self._start(number) for number in range(workers)]
        self._busy: dict[int, Job] = {}

    @property
    def idle(self) -> list[int]:
        """Workers without a job."""
        return [number for number in range(len(self._workers)) if number not in self._busy]

    def submit(self, worker: int, job: Job) -> None:
        """Give an idle worker a job."""
        process, connection = self._workers[worker]
        if not process.is_alive():
            self._workers[worker] = process, connection = self._start(worker)
        self._busy[worker] = job
        with suppress(OSError):  # it died just now: `events` will say so
            connection.send(job)

    def events(self, timeout: float) -> Iterator[Event]:
        """What happened, waiting at most `timeout` seconds for the first."""
        ready = wait([connection for _, connection in self._workers], timeout)
        for number, (process, connection) in enumerate(self._workers):
            if connection not in ready:
                continue
            try:
                event: Event = connection.recv()
            except (EOFError, OSError):  # between messages, or within one
                _end(process)
                self._workers[number] = self._start(number)
                if number not in self._busy:
                    continue
                event = Failed(number, "WorkerDied", f"its process ended with exit code {process.exitcode}")
            if not isinstance(event, Progress):
                self._busy.pop(number, None)
            yield event

    def stop(self) -> None:
        """End all workers; what they were doing goes on from its last checkpoint another time."""
        for number, (process, connection) in enumerate(self._workers):
            if number in self._busy:
                process.terminate()
            else:
                with suppress(OSError):
                    connection.send(None)  # let it end by itself, and tidy up
        for process, connection in self._workers:
            _end(process)
            connection.close()

    def _start(self, number: int) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(number, theirs), daemon=True)
        environment = {
            "OMP_NUM_THREADS": str(self._threads),
            "MKL_NUM_THREADS": str(self._threads),
            "GOMP_SPINCOUNT": "20000",  # microseconds: threads that spin for long slow down all else on a busy machine
        }
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = _visible_gpus(self._gpus)[number % self._gpus]
        # the environment is read by libraries when the new process imports them; Ctrl-C reaches all processes of a
        # terminal, and is the orchestrator's to handle
        with _environment(environment), _interrupts_held_back():
            process.start()
        theirs.close()
        return process, ours


def _end(process: Any) -> None:
    """Wait for a process that should end by itself; then end it, even one that is stuck in a driver."""
    process.join(_FAREWELL_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()


def _visible_gpus(count: int) -> list[str]:
    """Names of the GPUs that this process sees: a scheduler, or a user, may have left it some of the machine's."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(count)]


def _work(number: int, connection: Connection) -> None:
    """A worker's life: jobs one after the other, until the orchestrator is gone."""
    jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, jobs), daemon=True).start()
    import varscale.training.runs  # noqa: F401  # while the first job is being prepared

    while True:
        job = jobs.get()
        if job is None:
            return
        try:
            _redirect_output(log_file(job))
            value = job.run(lambda done, total: connection.send(Progress(number, done, total)))
        except Exception as error:
            with suppress(OSError):  # on a full disk the log is full, too
                traceback.print_exc()
            connection.send(Failed(number, type(error).__name__, " ".join(str(error).split())))
        else:
            connection.send(Finished(number, value))


def _receive(connection: Connection, jobs: "queue.SimpleQueue[Job | None]") -> None:
    """Pass jobs on; when the orchestrator ends, however it ends, end at once."""
    try:
        while True:
            jobs.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)


def _redirect_output(path: Path | None) -> None:
    """Let a job's output, of libraries in C too, go to its log."""
    target = Path(os.devnull) if path is None else path
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("ab") as file:
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
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
