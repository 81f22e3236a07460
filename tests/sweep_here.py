"""A sweep whose jobs run in the test's own process, one after the other."""

import io
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from toy_sweep import Finished

from sweeps import orchestrator
from sweeps.executors.local import Event, Failed, Progress
from sweeps.executors.local import Finished as Done
from sweeps.jobs import Job
from sweeps.orchestrator import Outcome, run_sweep
from sweeps.view import SweepView
from varscale.config import Experiment
from varscale.store.layout import ExperimentFiles


class Forwarder:
    """Stands for MLflow's, which has tests of its own."""

    def __init__(self) -> None:
        self.finished: list[str] = []
        self.running: bool | None = None
        self.records: list[tuple[str, list[Path]]] = []

    def sweep(
        self, key: str, name: str, params: dict[str, Any], folders: list[Path], labels: dict[Path, dict[str, Any]]
    ) -> Path:
        self.labels = labels
        self.records.append((key, folders))
        return Path(key)

    def watch(self, folder: Path) -> None: ...

    def start(self) -> None:
        self.running = True

    def stop(self) -> None:
        self.running = False

    def finish(self, record: Path, status: str = "FINISHED") -> None:
        self.finished.append(status)


class Launcher:
    """Runs jobs here, one after the other; `break_job` may raise in a job's place."""

    def __init__(self, break_job: Callable[[Job, int], None]) -> None:
        self.jobs: list[Job] = []
        self._break = break_job
        self._waiting: dict[int, Job] = {}
        self._attempts: Counter[str] = Counter()

    def __call__(self, workers: int, threads: int, gpus: int) -> "Launcher":
        self._workers = workers
        return self

    @property
    def idle(self) -> list[int]:
        return [number for number in range(self._workers) if number not in self._waiting]

    def submit(self, worker: int, job: Job) -> None:
        assert worker not in self._waiting
        self.jobs.append(job)
        self._waiting[worker] = job

    def events(self, timeout: float) -> Iterator[Event]:
        worker, job = next(iter(self._waiting.items()))
        reported: list[Event] = []
        self._attempts[repr(job)] += 1
        try:
            self._break(job, self._attempts[repr(job)])
            value = job.run(lambda done, total: reported.append(Progress(worker, done, total)))
            last: Event = Done(worker, value)
        except Exception as error:
            last = Failed(worker, type(error).__name__, str(error))
        del self._waiting[worker]
        yield from (*reported, last)

    def stop(self) -> None: ...

    def of(self, kind: type) -> list[Any]:
        return [job for job in self.jobs if isinstance(job, kind)]


class Sweeping:
    """`run_sweep` in a runs folder, with what it printed."""

    def __init__(self, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs, self._monkeypatch = runs, monkeypatch
        self.output, self.forwarder = "", Forwarder()

    def __call__(
        self, experiment: Experiment, break_job: Callable[[Job, int], None] = lambda job, attempt: None
    ) -> Outcome:
        self.launcher = Launcher(break_job)
        self._monkeypatch.setattr(orchestrator, "LocalLauncher", self.launcher)
        console = Console(file=io.StringIO(), width=120, record=True)
        files = ExperimentFiles(self.runs, experiment.name)
        self.forwarder = Forwarder()
        try:
            return run_sweep(experiment, files, SweepView(console), self.forwarder)  # type: ignore[arg-type]
        finally:
            self.output = console.export_text()


@pytest.fixture
def sweeping(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweeping:
    """In a folder where tokenizer and tokens are made, and no cell."""
    for part in ("tokenizers", "tokens"):
        shutil.copytree(finished.root / part, tmp_path / "toy" / part)
    shutil.copy(finished.root / "numerics.json", tmp_path / "toy")
    return Sweeping(tmp_path, monkeypatch)
