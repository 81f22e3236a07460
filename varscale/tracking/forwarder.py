"""Delivers studies to MLflow while their runs are being written, without ever holding them up."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import filelock

from varscale.store.layout import Store, StudyFiles
from varscale.store.records import StudyRecord
from varscale.tracking.client import MLflowStore, first_line, is_rejection
from varscale.tracking.delivery import Delivery, OutOfTimeError, members
from varscale.tracking.positions import pending_metrics, read_position
from varscale.tracking.uris import check_tracking_uri, masked

LONGEST_BACKOFF = 60.0


@dataclass(frozen=True)
class ForwarderState:
    """What the forwarder still has to do."""

    pending: int
    """Numbers in the files of the studies' runs that MLflow was not given."""
    problem: str
    """Why the last delivery failed, one line; empty where it didn't."""
    answers: bool = True
    """Whether the store answers: if so, all else was delivered, and a problem is what it refused."""


class Forwarder:
    """Delivers a study to MLflow while its runs write their files."""

    def __init__(
        self, tracking_uri: str, store: Store, study: str | None, notify: Callable[[str], None] | None = None
    ) -> None:
        """Check the URI; neither MLflow is imported nor the store touched.

        Args:
            tracking_uri: `sqlite:///path`, `http(s)://host:port` or another database's URI.
            store: The runs folder.
            study: The study's name, which is the MLflow experiment's; its study.json may be written later. None: all
                studies of the runs folder.
            notify: Called with a line when MLflow stops or starts answering; default: this module's logger.

        Raises:
            TrackingError: The URI can't work.
        """
        check_tracking_uri(tracking_uri)
        self._uri, self._place = tracking_uri, masked(tracking_uri)
        self._store, self._study = store, study
        self._notify = notify or logging.getLogger(__name__).warning
        self._delivery: Delivery | None = None
        self._delivering = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._problem, self._answers = "", True
        self._waits = False

    def deliver(self, seconds: float = 20.0) -> bool:
        """Deliver what is new, for about `seconds` at most; True when nothing was left.

        Never raises: a store that does not answer ends this call, and the next one tries again.
        """
        deadline, self._waits = time.monotonic() + seconds, False
        lock = filelock.FileLock(self._store.tracking_lock)
        with self._delivering:
            try:
                self._store.runs.mkdir(parents=True, exist_ok=True)
                with lock.acquire(timeout=max(0.0, min(2.0, seconds))):
                    return self._deliver(deadline)
            except filelock.Timeout:  # another process delivers from these files right now
                self._waits = True
            except OSError as error:
                self._failed(f"{self._store.tracking_lock}: {error.strerror or error}", answers=False)
        return False

    def deliver_until(self, deadline: float) -> bool:
        """Deliver until nothing is left (then True), something fails, or `deadline` (of `time.monotonic`) passed."""
        said = False
        while not (complete := self.deliver(deadline - time.monotonic())):
            if self._problem or time.monotonic() >= deadline:
                break
            if self._waits and not said:
                self._notify(f"another process delivers to MLflow from {self._store.runs} right now; waiting for it")
                said = True
            time.sleep(0.1)
        return complete

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
                f"{what} not delivered to MLflow at {self._place} ({self._problem or 'out of time'}); nothing is lost: "
                f"`varscale dashboard` with the same runs folder and tracking URI delivers them later"
            )
        return state.pending

    @property
    def state(self) -> ForwarderState:
        """What is pending, read from the files."""
        pending = 0
        for study in self._studies():
            record = StudyRecord.read(study.record)
            for kind, run, _ in members(self._store, record) if record else ():
                pending += pending_metrics(run, read_position(study.delivery(kind, run.folder.name), self._place))
        return ForwarderState(pending, self._problem, self._answers)

    def _studies(self) -> list[StudyFiles]:
        return self._store.studies() if self._study is None else [self._store.study(self._study)]

    def _run(self, interval: float) -> None:
        wait = interval
        while not self._stopping.is_set():
            self.deliver()
            wait = min(2 * wait, max(interval, LONGEST_BACKOFF)) if self._problem else interval
            self._stopping.wait(wait)

    def _last_delivery(self, deadline: float) -> None:
        if self._thread is not None:
            self._thread.join()
        self.deliver_until(deadline)

    def _deliver(self, deadline: float) -> bool:
        try:
            self._delivery = self._delivery or Delivery(
                MLflowStore(self._uri, self._store.runs), self._place, self._store
            )
            self._delivery.deliver(self._studies(), deadline)
            complete = True
        except OutOfTimeError:
            complete = False
        except Exception as error:
            self._failed(first_line(error, self._uri), answers=is_rejection(error))
            return False
        if self._problem:
            self._notify(f"MLflow at {self._place} takes data again")
            self._problem, self._answers = "", True
        return complete

    def _failed(self, line: str, *, answers: bool) -> None:
        """Remember why a delivery failed, and say so once."""
        if not self._problem:
            self._notify(f"MLflow at {self._place}: {line}. The run goes on; MLflow gets its data later")
        self._problem, self._answers, self._delivery = line, answers, None


def deliver_all(
    store: Store, tracking_uri: str, seconds: float = 600.0, notify: Callable[[str], None] | None = None
) -> ForwarderState:
    """Deliver all studies of a runs folder: what sweeps could not, or everything to a fresh store.

    Where another process delivers from the same folder, this waits for it, and says so. It gives up after `seconds`.

    Raises:
        TrackingError: The URI can't work.
    """
    forwarder = Forwarder(tracking_uri, store, None, notify)
    complete = forwarder.deliver_until(time.monotonic() + seconds)
    state = forwarder.state
    # what a run wrote since a complete delivery is for whoever trains it
    if state.pending and not complete and not state.problem and notify is not None:
        notify(f"{state.pending} points are not delivered to {masked(tracking_uri)} yet after {seconds:.0f} s")
    return state
