"""A sweep whose jobs run in the test's own process, one after the other."""

import io
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from toy_sweep import Finished

from sweeps.executors.base import Executor, Graph, Listener, portable
from sweeps.grid import grid_cells
from sweeps.jobs.base import Job
from sweeps.orchestrator import Orchestrator, Outcome
from sweeps.study import Study
from sweeps.view import SweepView
from varscale.config import Experiment
from varscale.numerics.machine import Share
from varscale.store.layout import Store


class Forwarder:
    """Stands for MLflow's, which has tests of its own."""

    running: bool | None = None

    def start(self) -> None:
        self.running = True

    def stop(self) -> None:
        self.running = False


class ExecutorHere(Executor):
    """Runs jobs here, one after the other; `break_job` may raise in a job's place."""

    def __init__(self, break_job: Callable[[Job, int], None]) -> None:
        self.jobs: list[Job] = []
        self.started = False
        self._break = break_job
        self._attempts: Counter[str] = Counter()

    def __call__(self) -> "ExecutorHere":
        self.started = True
        return self

    def run(self, jobs: Sequence[Job], listener: Listener, retries: int = 2) -> Graph:
        graph = Graph(jobs, listener, retries)
        while job := next(graph.candidates(), None):
            self.jobs.append(job)
            graph.start(job)
            self._attempts[job.key] += 1
            try:
                self._break(job, self._attempts[job.key])
                job.write()
                job.run(Share(), lambda done, total, job=job: listener.progress(job, done, total))
            except Exception as error:
                graph.fail(job, portable(error))
            else:
                graph.succeed(job)
            listener.refresh()
        return graph

    def stop(self) -> None: ...

    def of(self, kind: type) -> list[Any]:
        return [job for job in self.jobs if isinstance(job, kind)]


class Sweeping:
    """A sweep in a runs folder, with what it printed."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.output, self.forwarder = "", Forwarder()
        self.executor = ExecutorHere(lambda job, attempt: None)

    def __call__(
        self, experiment: Experiment, break_job: Callable[[Job, int], None] = lambda job, attempt: None
    ) -> Outcome:
        self.executor = ExecutorHere(break_job)
        console = Console(file=io.StringIO(), width=120, record=True)
        self.forwarder = Forwarder()
        try:
            study = Study.of(experiment, Store(self.runs), grid_cells(experiment))
            return Orchestrator(study, SweepView(console), self.forwarder).sweep(self.executor)
        finally:
            self.output = console.export_text()


@pytest.fixture
def sweeping(finished: Finished, tmp_path: Path) -> Sweeping:
    """In a folder where tokenizer and tokens are made, and no cell."""
    for part in ("tokenizers", "tokens"):
        shutil.copytree(finished.runs / part, tmp_path / part)
    return Sweeping(tmp_path)
