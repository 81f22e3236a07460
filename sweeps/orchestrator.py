"""Runs a sweep on one machine: tokenizer, tokens, numerics, then trunks and branches on a pool of workers.

Everything that is finished is left alone, everything half-done goes on: the state is in the files, so the orchestrator
may be killed at any moment and called again.
"""

import math
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sweeps.jobs import CellJob, Job, NumericsJob, PeakJob, TokenizerJob, TokensJob, TrunkJob
from sweeps.launchers.local import Failed, Finished, LocalLauncher, Progress
from sweeps.plan import Plan, bytes_to_write, images_by_trunk, selected_cells, train_images
from sweeps.view import SweepView
from varscale.cells import Cell, Numerics
from varscale.config import Experiment
from varscale.data.manifest import MANIFEST, read_manifest
from varscale.files import ExperimentFiles, fingerprint
from varscale.identity import (
    DataIdentity,
    processors,
    store_numerics,
    stored_numerics,
    tokenizer_fingerprint,
    tokenizer_threads,
    tokens_fingerprint,
)
from varscale.tracking import Forwarder

_FINAL_ERRORS = {"DataError", "TokenStoreError", "ValueError", "ExperimentError"}
"""Errors that trying again would only repeat."""


MOST_EPOCHS = 4
"""Beyond as many passes, repeated data count for less than new data (Muennighoff et al. 2023)."""


class SweepError(RuntimeError):
    """Why a sweep can't go on; one line. What is finished is kept."""


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to."""

    rows: list[dict[str, Any]]
    """The runs table, a row a finished or diverged cell."""
    failed: dict[str, str]
    """Cells that crashed more often than `runtime.retries`: title → why."""
    trained: int
    """Cells trained by this call."""
    record: Any
    """MLflow's parent run, for `Forwarder.attach`."""


def run_sweep(experiment: Experiment, files: ExperimentFiles, view: SweepView, forwarder: Forwarder) -> Outcome:
    """Train every cell that has no result yet, and collect the runs table.

    The forwarder is started once the settings were found right, and left running for what follows, unless this raises.

    Raises:
        ExperimentError: settings that can't work, before anything is trained.
        SweepError: the tokenizer or the tokens can't be made, or another sweep of this experiment is running.
    """
    from varscale.data.experiment_sources import data_identity

    cells = selected_cells(experiment)
    data = data_identity(experiment.data)
    files.root.mkdir(parents=True, exist_ok=True)
    _check_space(files, cells)
    lock = FileLock(files.root / ".sweep.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SweepError(f"{files.root}: another sweep of this experiment is running; wait for it or stop it") from None
    with lock:
        sweep = _Sweep(experiment, files, cells, data, view, forwarder)
        forwarder.start()
        try:
            return sweep.run()
        except BaseException:
            forwarder.stop()
            raise


class _Sweep:
    def __init__(
        self,
        experiment: Experiment,
        files: ExperimentFiles,
        cells: tuple[Cell, ...],
        data: DataIdentity,
        view: SweepView,
        forwarder: Forwarder,
    ) -> None:
        self._experiment, self._files, self._cells = experiment, files, cells
        self._view, self._forwarder = view, forwarder
        self._tokenizer_threads = tokenizer_threads(experiment, files)
        self._tokenizer = tokenizer_fingerprint(experiment, data, self._tokenizer_threads)
        self._tokens = tokens_fingerprint(data, self._tokenizer)
        self._launcher: LocalLauncher | None = None
        self._numerics = stored_numerics(experiment, files)

    def run(self) -> Outcome:
        plan = self._plan(self._numerics) if self._numerics else None
        record = None
        trained = 0
        failed: dict[str, str] = {}
        try:
            if plan is None or plan.missing:
                gpus, runtime = _gpus(), self._experiment.runtime  # asked only now: it imports torch
                workers = runtime.workers or gpus or processors()
                self._threads = runtime.threads or max(1, processors() // workers)
                self._launcher = LocalLauncher(workers, self._threads, gpus)
                self._prepare_inputs()
                plan = self._plan(self._numerics or self._measure_numerics())
                record = self._record(plan)
                trained = len(plan.missing)
                failed = self._train(plan)
        except BaseException:
            if record is not None:
                self._forwarder.finish(record, "KILLED")
            raise
        finally:
            if self._launcher is not None:
                self._launcher.stop()
        record = record or self._record(plan)
        rows = [row for cell in plan.cells if (row := plan.row(cell)) is not None]
        for remark in _remarks(rows):
            self._view.note(remark)
        return Outcome(rows, failed, trained - len(failed), record)

    def _plan(self, numerics: Numerics) -> Plan:
        return Plan(self._experiment, self._files, self._cells, self._tokens, numerics)

    def _record(self, plan: Plan) -> Any:
        """The sweep in MLflow: its parent run and the runs below it."""
        folders = [self._files.tokenizer(self._tokenizer).folder]
        folders += dict.fromkeys(plan.trunk_files(cell.trunk).folder for cell in plan.cells)
        folders += [plan.cell_files(cell).folder for cell in plan.cells]
        key = fingerprint(kind="sweep", cells=sorted(plan.cell_fingerprint(cell) for cell in plan.cells))
        depths = ",".join(str(depth) for depth in sorted({cell.trunk.depth for cell in plan.cells}))
        name = f"{self._experiment.name} · depths {depths} · {len(plan.cells)} cells"
        params = {"cells": len(plan.cells), "depths": depths, "tokenizer": self._tokenizer}
        return self._forwarder.sweep(key, name, params, folders)

    def _prepare_inputs(self) -> None:
        from varscale.training.tokenizer_run import tokens_ready

        tokenizer = self._files.tokenizer(self._tokenizer)
        self._forwarder.watch(tokenizer.folder)
        if not tokenizer.finished(self._tokenizer):
            self._alone(
                "tokenizer", TokenizerJob(self._experiment, tokenizer, self._tokenizer, self._tokenizer_threads)
            )
        folder, images = self._files.tokens(self._tokens), train_images(self._cells)
        if not tokens_ready(folder, images):
            job = TokensJob(self._experiment, tokenizer, self._tokenizer, folder, images, self._tokenizer_threads)
            self._alone("tokens", job)
            self._note_undecodable(folder)

    def _note_undecodable(self, folder: Path) -> None:
        for split in ("train", "validation"):
            manifest = read_manifest(folder / split / MANIFEST)
            names = list(manifest.undecodable) if manifest is not None else []
            if names:
                more = ", …" if len(names) > 3 else ""
                self._view.note(
                    f"{len(names)} {split} images do not decode, and their neighbours stand in for them: "
                    f"{', '.join(names[:3])}{more}"
                )

    def _measure_numerics(self) -> Numerics:
        job = NumericsJob(tuple(images_by_trunk(self._cells)), self._threads, self._tokenizer_threads)
        numerics, seconds = self._alone("numerics", job)
        store_numerics(self._files, numerics, seconds)
        assert isinstance(numerics, Numerics)
        return numerics

    def _alone(self, stage: str, job: Job) -> Any:
        """Run one job with the machine to itself, and wait for it; crashes are retried."""
        assert self._launcher is not None
        attempts = 0
        self._launcher.submit(0, job)
        while True:
            for event in self._launcher.events(1.0):
                match event:
                    case Progress():
                        self._view.stage(stage, event.done, event.total)
                    case Finished():
                        self._view.stage_done(stage)
                        return event.value
                    case Failed():
                        attempts += 1
                        if event.kind in _FINAL_ERRORS | {"Diverged"} or attempts > self._experiment.runtime.retries:
                            raise SweepError(f"{stage}: {event.message}")
                        self._view.note(f"{stage} failed ({event.message}); trying again")
                        self._launcher.submit(0, job)
            self._view.stage(stage, None, None)

    def _train(self, plan: Plan) -> dict[str, str]:
        from varscale.training.model_run import Inputs

        peak = self._alone("peak", PeakJob(plan.numerics))
        inputs = Inputs(
            self._files.tokenizer(self._tokenizer).tokenizer_checkpoint,
            self._tokenizer,
            self._files.tokens(self._tokens),
            self._tokens,
            plan.numerics,
            peak,
        )
        assert self._launcher is not None
        return _Pool(plan, inputs, self._launcher, self._view, self._experiment.runtime.retries).run()


class _Pool:
    """Hands trunks and branches to workers, the longest way to go first."""

    def __init__(self, plan: Plan, inputs: Any, launcher: LocalLauncher, view: SweepView, retries: int) -> None:
        self._plan, self._inputs, self._launcher, self._view, self._retries = plan, inputs, launcher, view, retries
        self._waiting: list[Job] = [
            CellJob(cell, plan.trunk_files(cell.trunk), plan.cell_files(cell), inputs) for cell in plan.missing
        ]
        for trunk, milestones in plan.trunks().values():
            files = plan.trunk_files(trunk)
            if any(not files.milestone(images).exists() for images in milestones):
                self._waiting.append(TrunkJob(trunk, milestones, files, inputs))
        self._running: dict[int, Job] = {}
        self._attempts: Counter[str] = Counter()
        self._failed: dict[str, str] = {}

    def run(self) -> dict[str, str]:
        """Until nothing is left; the cells that failed for good, and why."""
        self._view.begin(self._plan)
        while self._waiting or self._running:
            self._submit()
            if not self._running:
                break
            for event in self._launcher.events(0.5):
                if event.worker in self._running:
                    self._handle(event)
            self._view.refresh()
        self._view.end()
        return self._failed

    def _submit(self) -> None:
        for worker in self._launcher.idle:
            ready = [job for job in self._waiting if _ready(job)]
            if not ready:
                return
            job = max(ready, key=_cost_to_go)
            self._waiting.remove(job)
            self._running[worker] = job
            self._launcher.submit(worker, job)
            self._view.started(job)

    def _handle(self, event: Progress | Finished | Failed) -> None:
        job = self._running[event.worker]
        if isinstance(event, Progress):
            self._view.progress(job, event.done)
            return
        del self._running[event.worker]
        if isinstance(event, Finished):
            self._view.finished(job)
        elif event.kind == "Diverged":
            self._diverged(job, event.message)
        else:
            self._crashed(job, event)

    def _diverged(self, job: Job, reason: str) -> None:
        """End the cell, or every cell whose branch point the trunk did not reach."""
        self._view.note(f"{_title(job)} diverged: {reason}")
        self._view.finished(job, "diverged")
        for lost in self._dependents(job):
            from varscale.training.model_run import record_divergence

            record_divergence(lost.cell, lost.files, self._inputs, reason)
            self._view.finished(lost, "diverged")

    def _crashed(self, job: Job, event: Failed) -> None:
        title = _title(job)
        self._attempts[title] += 1
        if event.kind not in _FINAL_ERRORS and self._attempts[title] <= self._retries:
            self._view.note(f"{title} failed ({event.message}); trying again from its last checkpoint")
            self._waiting.append(job)
            return
        self._view.note(f"{title} failed: {event.message}")
        self._view.finished(job, "failed")
        for lost in self._dependents(job):
            self._failed[lost.cell.title] = event.message
            self._view.finished(lost, "failed")

    def _dependents(self, job: Job) -> list[CellJob]:
        """The cell itself, or the cells whose checkpoint a trunk did not make; they are no longer waited for."""
        if isinstance(job, CellJob):
            return [job]
        lost = [
            waiting
            for waiting in self._waiting
            if isinstance(waiting, CellJob) and waiting.trunk == getattr(job, "files", None) and not _ready(waiting)
        ]
        self._waiting = [waiting for waiting in self._waiting if waiting not in lost]
        return lost


def _check_space(files: ExperimentFiles, cells: Iterable[Cell]) -> None:
    needed, free = bytes_to_write(cells), shutil.disk_usage(files.root).free
    if free < needed:
        raise SweepError(
            f"{files.root}: the sweep writes up to {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; "
            "free some space, or choose another --runs-dir"
        )


def _remarks(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader of the table must know: cells that learnt nothing about images, and repeated data."""
    unlearnt = [row["run"] for row in rows if row.get("loss", 0.0) >= (row["unigram_entropy"] or math.inf)]
    repeated = [row["run"] for row in rows if (row["epochs"] or 0.0) > MOST_EPOCHS]
    remarks = []
    if unlearnt:
        remarks.append(
            f"{len(unlearnt)} cells are no better than the tokens' frequencies at each position "
            f"({rows[0]['unigram_entropy']:.3f} nats a token): {', '.join(unlearnt)}; a law should not rest on them"
        )
    if repeated:
        remarks.append(f"{len(repeated)} cells saw their images more than {MOST_EPOCHS} times: {', '.join(repeated)}")
    return remarks


def _ready(job: Job) -> bool:
    if not isinstance(job, CellJob) or job.trunk is None:
        return True
    return job.files.last_checkpoint.exists() or job.trunk.milestone(job.cell.branch_images).exists()


def _cost_to_go(job: Job) -> float:
    """FLOPs until the end of what hangs on a job: for a trunk, itself and its longest branch."""
    if isinstance(job, TrunkJob):
        return job.trunk.flops_per_image * job.milestones[-1] * 1.25
    assert isinstance(job, CellJob)
    return job.cell.trunk.flops_per_image * job.cell.decay_images


def _title(job: Job) -> str:
    if isinstance(job, CellJob):
        return job.cell.title
    assert isinstance(job, TrunkJob)
    return f"trunk {job.trunk.name}"


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
