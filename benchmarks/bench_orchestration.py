"""What orchestration costs: 1,000 cells that do nothing, and its share of a real sweep.

The cells are planned, run by worker processes, recorded and delivered to MLflow's SQLite store as always; only a trunk
writes empty checkpoints at once, and a branch a short curve and a result. Tokenizer and tokens are there before.
"""

import io
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.measuring import Goal, Options, Report
from sweeps.executors.base import Graph, Listener
from sweeps.executors.local import LocalExecutor
from sweeps.grid import grid_cells
from sweeps.jobs.base import Job
from sweeps.jobs.training import BranchJob, TrunkJob
from sweeps.orchestrator import Orchestrator
from sweeps.plan import plan_of, print_plan
from sweeps.study import Study
from sweeps.view import SweepView
from varscale.config import Experiment
from varscale.config.yaml import changed, load_experiment
from varscale.numerics.machine import MachineShares, Share, processors
from varscale.store.atomic import write_atomically
from varscale.store.curves import CurvePoint, curve_line
from varscale.store.layout import Store
from varscale.store.records import Result, RunIdentity
from varscale.tokenizer.training import encode_tokens, train_tokenizer
from varscale.tracking import Forwarder, runs_table

POINTS = 5
"""Of an idle run's curves."""
TINY: dict[str, Any] = {
    "name": "idle",
    "data.image_size": 8,
    "data.validation_images": 32,
    "tokenizer.patch_nums": [1, 2, 4],
    "tokenizer.vocab_size": 16,
    "tokenizer.latent_channels": 4,
    "tokenizer.base_channels": 4,
    "tokenizer.channel_multipliers": [1, 1],
    "tokenizer.accept": True,  # it is hardly trained
    "tokenizer.training.images": 160,
    "tokenizer.training.batch_size": 8,
    "tokenizer.training.warmup_images": 16,
    "model.width_per_depth": 4,
    "model.head_dim": 4,
    "grid.depths": [4, 5],
    "grid.min_steps": 5,
    "runtime.compile": "off",
}
BUDGETS = 10
"""Cells of a trunk."""


def run(options: Options) -> Report:
    """Measure both."""
    columns = ("part", "seconds", "processor seconds of the orchestrating process")
    report = Report("orchestration", "Orchestration: what it takes beside the runs themselves", columns)
    _idle_cells(options, report, 20 if options.quick else 1000)
    _real_sweep(options, report)
    return report


class IdleExecutor(LocalExecutor):
    """The local executor, with jobs in the place of trunks and branches that do nothing."""

    def run(self, jobs: Sequence[Job], listener: Listener, retries: int = 2) -> Graph:
        return super().run([_idle(job) for job in jobs], listener, retries)


@dataclass(frozen=True)
class IdleTrunk(TrunkJob):
    """Writes its checkpoints, without content."""

    def run(self, share: Share, report: Any) -> None:
        RunIdentity(name=self.trunk.title, role="trunk", params=self.trunk.parameters()).write(self.files.identity)
        for images in self.milestones:
            write_atomically(self.files.milestone(images), b"")
        self.files.metrics.write_bytes(_curve(self.milestones[-1]))


@dataclass(frozen=True)
class IdleBranch(BranchJob):
    """Writes a curve and a result."""

    def run(self, share: Share, report: Any) -> None:
        cell, files = self.cell, self.files
        RunIdentity(name=cell.title, role="cell", params=cell.parameters()).write(files.identity)
        files.metrics.write_bytes(_curve(cell.images))
        report(cell.images, cell.images)
        figures = {"loss": 2 + 1e3 / cell.budget_flops**0.3, "error": 0.5, "wall_seconds": 0.0}
        row = {"run": files.folder.name, **cell.parameters(), **figures, "unigram_entropy": 9.0, "epochs": 1.0}
        numbers = {name: float(value) for name, value in row.items() if type(value) in (int, float)}
        row |= {"fingerprint": files.fingerprint, "status": "finished"}
        Result(fingerprint=files.fingerprint, status="finished", time=time.time(), metrics=numbers, row=row).write(
            files.result
        )


class Timeline(SweepView):
    """A view that adds up the time in which no job ran."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO(), width=160))
        self.running, self.idle, self.since = 0, 0.0, time.monotonic()

    def started(self, job: Job) -> None:
        self._count(1)
        super().started(job)

    def ended(self, job: Job, state: str) -> None:
        self._count(-1)
        super().ended(job, state)

    def _count(self, change: int) -> None:
        now = time.monotonic()
        self.idle += 0.0 if self.running else now - self.since
        self.running, self.since = self.running + change, now


def _idle_cells(options: Options, report: Report, number: int) -> None:
    store = Store(options.folder / "orchestration")
    experiment = _idle_experiment(number)
    study = Study.of(experiment, store, grid_cells(experiment))
    _prepare(study)
    forwarder = Forwarder(store.tracking_uri, store, experiment.name, notify=report.notes.append)
    began = time.monotonic()
    with _part(report, f"plan of {number:,} cells"):
        shares = MachineShares.of(experiment.runtime)
        _show_plan(experiment, store)
    with _part(report, f"workers' start, and {number:,} cells run and recorded"):
        outcome = Orchestrator(study, Timeline(), forwarder).sweep(lambda: IdleExecutor(shares))
    with _part(report, "the rest of the delivery to MLflow"):
        left = forwarder.stop(seconds=600)
    seconds = time.monotonic() - began
    there = len(runs_table(store.tracking_uri, experiment.name))
    done = outcome.trained == there == number and not left
    with _part(report, "varscale status, the command"):
        _status(experiment, store)
    status = report.rows[-1][1]
    text = f"{number:,} cells that do nothing are planned, run, recorded and delivered within 60 s"
    report.goals.append(Goal(text, f"{seconds:.1f} s, {there:,} in MLflow", done and seconds < 60))
    report.goals.append(Goal("status on them within 2 s", f"{status} s", isinstance(status, float) and status < 2))


def _real_sweep(options: Options, report: Report) -> None:
    """What of a sweep's wall time no run takes: time without any run, and what this process takes of the processors."""
    store = Store(options.folder / "orchestration")
    settings: dict[str, Any] = {"grid.depths": [12, 16, 20]}
    if options.quick:  # of the tokens that are there
        settings = {**TINY, "name": "toy", "grid.depths": [2], "grid.budgets": [4e7, 6e7]}
    experiment = changed(load_experiment("rings"), settings, "benchmarks")
    began, processor = time.monotonic(), _processor_seconds()
    study = Study.of(experiment, store, grid_cells(experiment))
    view, forwarder = Timeline(), Forwarder(store.tracking_uri, store, experiment.name, notify=report.notes.append)
    with _part(
        report, "a real sweep" if options.quick else "the sweep of make sweep DEPTHS=12,16,20, without its fits"
    ):
        Orchestrator(study, view, forwarder).sweep(lambda: LocalExecutor(MachineShares.of(experiment.runtime)))
        forwarder.stop(seconds=600)
    wall, idle = time.monotonic() - began, view.idle + time.monotonic() - view.since
    share = (idle + (_processor_seconds() - processor) / processors()) / wall
    report.notes.append(f"Of the real sweep, {idle:.1f} s passed without any run.")
    report.goals.append(Goal("orchestration takes at most 2% of a real sweep", f"{share:.2%}", share <= 0.02))


def _idle_experiment(cells: int) -> Experiment:
    plain = changed(load_experiment("rings"), TINY, "benchmarks")
    flops = grid_cells(changed(plain, {"grid.budgets": [1e12]}, "benchmarks"))[-1].trunk.flops_per_image
    budgets = [flops * plain.optim.batch_size * 30 * 1.3**number for number in range(BUDGETS)]
    seeds = list(range(cells // BUDGETS // len(plain.grid.depths)))
    return changed(plain, {"grid.budgets": budgets, "grid.seeds": seeds}, "benchmarks")


def _prepare(study: Study) -> None:
    train_tokenizer(study.experiment, study.tokenizer, lambda done, total: None)
    encode_tokens(study.experiment, study.tokenizer, study.tokens, study.train_images, lambda done, total: None)


def _show_plan(experiment: Experiment, store: Store) -> None:
    from sweeps.devices import planned_device

    device = planned_device(experiment, store, "this", None)
    print_plan(plan_of(experiment, store, grid_cells(experiment), device), Console(file=io.StringIO(), width=160))


def _status(experiment: Experiment, store: Store) -> None:
    path = store.runs / "idle.yaml"
    path.write_text(json.dumps(experiment.model_dump(mode="json")))
    command = [sys.executable, "-m", "varscale.cli", "status", str(path), "--runs-dir", str(store.runs)]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1])


def _idle(job: Job) -> Job:
    if isinstance(job, TrunkJob):
        return IdleTrunk(job.experiment, job.place, job.trunk, job.milestones)
    return IdleBranch(job.experiment, job.place, job.cell) if isinstance(job, BranchJob) else job


def _curve(images: int) -> bytes:
    times = [(time.time() - POINTS + number, images * (number + 1) // POINTS) for number in range(POINTS)]
    return b"".join(curve_line(CurvePoint(when, seen, {"train_loss": 3.0, "lr": 1e-3})) for when, seen in times)


@contextmanager
def _part(report: Report, name: str) -> Iterator[None]:
    began, processor = time.monotonic(), _processor_seconds()
    yield
    report.rows.append((name, round(time.monotonic() - began, 2), round(_processor_seconds() - processor, 2)))


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
