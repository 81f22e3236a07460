"""Trunks and branches on a pool of workers: what may start, what is tried again, what is lost with what failed."""

from collections import Counter
from typing import Any

from sweeps.executors.local import Failed, Finished, LocalLauncher, Progress
from sweeps.jobs import FINAL_ERRORS, CellJob, Job, TrunkJob
from sweeps.plan import Plan
from sweeps.view import SweepView


class Pool:
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
            from varscale.training.runs import record_divergence

            record_divergence(lost.cell, lost.files, self._inputs, reason)
            self._view.finished(lost, "diverged")

    def _crashed(self, job: Job, event: Failed) -> None:
        title = _title(job)
        self._attempts[title] += 1
        if event.kind not in FINAL_ERRORS and self._attempts[title] <= self._retries:
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
