"""Delivers runs to MLflow while they are being written, without ever holding them up."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import filelock

from varscale.store.layout import ExperimentFiles, absolute
from varscale.tracking.delivery import Delivery, OutOfTimeError
from varscale.tracking.records import SweepRecord, pending_metrics, read_record, run_folders
from varscale.tracking.store import Store, check_tracking_uri, first_line

LONGEST_BACKOFF = 60.0


@dataclass(frozen=True)
class ForwarderState:
    """What the forwarder still has to do."""

    pending: int
    """Numbers in the files of watched runs that MLflow was not given."""
    problem: str
    """Why the last delivery failed, one line; empty where it didn't."""


class Forwarder:
    """Delivers the runs of one experiment to MLflow while they write their files."""

    def __init__(self, tracking_uri: str, files: ExperimentFiles, notify: Callable[[str], None] | None = None) -> None:
        """Check the URI; neither MLflow is imported nor the store touched.

        Args:
            tracking_uri: `sqlite:///path`, `http(s)://host:port` or another database's URI.
            files: Layout of the experiment, whose name is the MLflow experiment's.
            notify: Called with a line when the store stops or starts answering; default: this module's logger.

        Raises:
            TrackingError: The URI can't work.
        """
        check_tracking_uri(tracking_uri)
        self._uri = tracking_uri
        self._files = files
        self._notify = notify or logging.getLogger(__name__).warning
        self._watched: dict[Path, None] = {}
        self._delivery: Delivery | None = None
        self._delivering = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._problem = ""

    def sweep(
        self,
        key: str,
        name: str,
        params: Mapping[str, Any],
        run_folders: Iterable[Path],
        labels: Mapping[Path, dict[str, Any]] = MappingProxyType({}),
    ) -> Path:
        """Make `run_folders` (tokenizer, trunks, cells) children of a parent run, and watch them.

        The sweep is written down in `sweeps/<key>.sweep.json`, so that it can be rebuilt; the same key later is the
        same parent run, continued. Runs that an older sweep lists stay that sweep's; this one lists their MLflow ids,
        and `labels`, what cells of another plan have otherwise in this one.

        Returns:
            The record's file, a handle for `attach` and `finish`.
        """
        file = self._files.sweep(key)
        old = read_record(file)
        folders = [absolute(folder) for folder in run_folders]
        runs = tuple(dict.fromkeys([*(old.runs if old else ()), *map(self._relative, folders)]))
        created = old.created if old else time.time()
        others = (read_record(path) for path in self._files.sweep_records() if path != file)
        if any(other is not None and other.name == name for other in others):
            name = f"{name} · {key[:4]}"
        attachments = old.attachments if old else ()
        labels_here = {self._relative(folder): label for folder, label in labels.items()}
        SweepRecord(file, name, created, dict(params), runs, labels_here, attachments).write()
        for folder in folders:
            self.watch(folder)
        return file

    def watch(self, folder: Path) -> None:
        """Deliver this run's files from now on; they need not exist yet."""
        self._watched[absolute(folder)] = None

    def attach(self, sweep: Path, paths: Iterable[Path]) -> None:
        """Show files (law figures, laws.json, report) as artifacts of a sweep's parent run, again when they change."""
        if record := read_record(sweep):
            new = [str(path.resolve()) for path in paths]
            replace(record, attachments=tuple(dict.fromkeys([*record.attachments, *new]))).write()

    def finish(self, sweep: Path, status: str = "FINISHED") -> None:
        """Note that a sweep ended: FINISHED, FAILED or KILLED; its trunks, which have no result, end with it."""
        if record := read_record(sweep):
            replace(record, status=status, ended=time.time()).write()

    def deliver(self, seconds: float = 20.0) -> bool:
        """Deliver what is new, for about `seconds` at most; True when nothing is left.

        Never raises: a store that does not answer ends this call, and the next one tries again.
        """
        deadline = time.monotonic() + seconds
        with self._delivering:
            lock = filelock.FileLock(self._files.tracking_lock)
            try:
                self._files.runs.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=min(2.0, seconds))
            except (filelock.Timeout, OSError):
                return False  # another process delivers from these files right now
            try:
                return self._guarded(lambda: self._deliver(deadline))
            finally:
                lock.release()

    def start(self, interval_seconds: float = 5.0) -> None:
        """Deliver every few seconds in a background thread, which also prepares the store."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, args=(interval_seconds,), name="mlflow", daemon=True)
        self._thread.start()

    def stop(self, seconds: float = 15.0) -> int:
        """End the thread and deliver the rest, for `seconds` at most; numbers left, with a notice saying so."""
        deadline = time.monotonic() + seconds
        self._stopping.set()
        last = threading.Thread(target=self._last_delivery, args=(deadline,), daemon=True)
        last.start()
        last.join(max(0.0, deadline - time.monotonic()))
        state = self.state
        if state.pending or self._problem or last.is_alive():
            what = f"{state.pending} points" if state.pending else "states and pictures"
            self._notify(
                f"{what} not delivered to MLflow at {self._uri} ({self._problem or 'out of time'}); nothing is lost: "
                f"`varscale dashboard` with the same runs folder and tracking URI delivers them later"
            )
        return state.pending

    @property
    def state(self) -> ForwarderState:
        """What is pending, read from the files."""
        pending = sum(pending_metrics(folder, self._uri) for folder in list(self._watched))
        return ForwarderState(pending, self._problem)

    def _run(self, interval: float) -> None:
        wait = interval
        while not self._stopping.is_set():
            self.deliver()
            wait = min(2 * wait, max(interval, LONGEST_BACKOFF)) if self._problem else interval
            self._stopping.wait(wait)

    def _last_delivery(self, deadline: float) -> None:
        if self._thread is not None:
            self._thread.join()
        while not self.deliver(max(0.0, deadline - time.monotonic())) and not self._problem:
            if time.monotonic() >= deadline:
                return
            time.sleep(0.1)

    def _deliver(self, deadline: float) -> bool:
        if self._delivery is None:
            self._delivery = Delivery(Store(self._uri), self._uri, self._files.runs)
        try:
            self._delivery.deliver(list(self._watched), deadline)
        except OutOfTimeError:
            return False
        return True

    def _guarded(self, action: Callable[[], bool]) -> bool:
        """Run `action`; on any failure remember why, say so once, and return False."""
        try:
            complete = action()
        except Exception as error:
            line = first_line(error)
            if not self._problem:
                self._notify(f"MLflow at {self._uri}: {line}. The run goes on; MLflow gets its data later")
            self._problem, self._delivery = line, None
            return False
        if self._problem:
            self._notify(f"MLflow at {self._uri} takes data again")
            self._problem = ""
        return complete

    def _relative(self, folder: Path) -> str:
        return absolute(folder).relative_to(absolute(self._files.runs)).as_posix()


def deliver_all(
    runs: Path, tracking_uri: str, *, seconds: float = 600.0, notify: Callable[[str], None] | None = None
) -> ForwarderState:
    """Deliver everything under the runs folder: what earlier sweeps could not, or all of it to a fresh store.

    Args:
        runs: Folder of experiments, `--runs-dir`.
        tracking_uri: The store.
        seconds: Time to give up after.
        notify: As for `Forwarder`.

    Raises:
        TrackingError: The URI can't work.
    """
    deadline = time.monotonic() + seconds
    forwarder = Forwarder(tracking_uri, ExperimentFiles(runs, ""), notify)
    for folder in run_folders(runs):
        forwarder.watch(folder)
    while not forwarder.deliver(deadline - time.monotonic()):
        if forwarder.state.problem or time.monotonic() >= deadline:
            break
        time.sleep(0.2)  # another process delivers from the same folder right now
    state = forwarder.state
    if state.pending and not state.problem and notify is not None:
        notify(f"{state.pending} points are not delivered to {tracking_uri} yet after {seconds:.0f} s: call again")
    return state
