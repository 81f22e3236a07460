"""Runs a study: finds what is missing, and lets an executor carry out the jobs that make it.

Everything that is finished is left alone, everything half-done goes on: the state is in the files, so the orchestrator
may be killed at any moment and called again.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from sweeps.executors.base import Executor
from sweeps.executors.here import HereExecutor
from sweeps.jobs.base import Job
from sweeps.jobs.evaluation import EvaluationJob, ReferenceJob
from sweeps.jobs.graph import single_jobs, study_jobs
from sweeps.jobs.training import BranchJob, TrunkJob
from sweeps.study import Study
from sweeps.view import SweepView
from varscale.data.tokens.manifest import MANIFEST, read_manifest
from varscale.errors import SweepError
from varscale.evaluation.verdict import check_tokenizer
from varscale.store.layout import TokenFiles
from varscale.store.locks import held_alone
from varscale.training.cells import Cell

MOST_EPOCHS = 4
"""Beyond as many passes, repeated data count for less than new data (Muennighoff et al. 2023)."""


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to."""

    rows: list[dict[str, Any]]
    """The runs table of finished and diverged cells: a row each, and one more for each further evaluation of it."""
    failed: dict[str, str]
    """Cells, and evaluations, that crashed more often than `runtime.retries`: title → why."""
    trained: int
    """Cells trained by this call."""
    left: int = 0
    """Jobs that a scheduler goes on with after this call."""


class Deliverer(Protocol):
    """Delivers to MLflow beside the runs, such as `varscale.tracking.Forwarder`."""

    def start(self) -> object:
        """Begin, in the background."""

    def stop(self) -> object:
        """Deliver the rest, and end."""


class Orchestrator:
    """Runs one study at a time; what it does is shown by a view and delivered to MLflow."""

    def __init__(self, study: Study, view: SweepView, forwarder: Deliverer) -> None:
        self._study, self._view, self._forwarder = study, view, forwarder

    def sweep(self, executor: Callable[[], Executor]) -> Outcome:
        """Train every cell that has no result yet, and collect the runs table.

        The executor is made only when there is something to run, because that imports torch. The forwarder is started
        once the settings were found right, and left running for what follows, unless this raises.

        Raises:
            TokenizerRejected: The tokenizer's figures speak against it, and the settings don't accept it.
            SweepError: The disk is too small, the tokenizer or the tokens can't be made, or another sweep of this study
                is running.
        """
        study = self._study
        folder = study.files.folder
        folder.mkdir(parents=True, exist_ok=True)
        busy = SweepError(f"{folder}: another sweep of this study is running; wait for it or stop it")
        with held_alone(study.files.lock, busy):
            missing = study.missing
            self._check_space(missing)
            jobs = study_jobs(study, missing)
            running = executor() if jobs else None  # it refuses what can't be: nothing is written before
            if jobs:
                self._describe_data()
            study.record("RUNNING")
            self._forwarder.start()
            try:
                failed, left = self._run(running, jobs) if running is not None else ({}, 0)
            except BaseException:
                study.record("KILLED")
                self._forwarder.stop()
                raise
            study.record("RUNNING" if left else "FAILED" if failed else "FINISHED")
        rows = study.rows()
        for remark in _remarks(rows):
            self._view.note(remark)
        trained = sum(study.result(cell) is not None for cell in missing)
        return Outcome(rows, failed, trained, left)

    def single(self, executor: HereExecutor) -> None:
        """Train the study's one cell from start to end, in this process.

        Raises:
            SweepError: The disk is too small.
        """
        self._study.files.folder.mkdir(parents=True, exist_ok=True)
        self._check_space(self._study.missing)
        self._describe_data()
        self._study.record("RUNNING")
        self._forwarder.start()
        status = "KILLED"
        try:
            executor.run(single_jobs(self._study), self._view)
            status = "FINISHED"
        finally:
            self._study.record(status)
            self._forwarder.stop()

    def _run(self, running: Executor, jobs: Sequence[Job]) -> tuple[dict[str, str], int]:
        """What failed, and how many jobs are left to a scheduler."""
        check = partial(check_tokenizer, self._study.tokenizer, self._study.experiment.tokenizer)
        check()  # an earlier call may have stopped at it
        with running:
            self._view.begin(self._study, jobs)
            graph = running.run(jobs, self._view, self._study.experiment.runtime.retries)
            self._view.end()
        if any(job.key == "tokens" for job in jobs):
            self._note_undecodable(self._study.tokens)
        check()
        for job, reason in graph.failed:
            if not isinstance(job, TrunkJob | BranchJob | ReferenceJob | EvaluationJob):
                raise SweepError(f"{job.title}: {reason}")
        cells = {job.title: reason for job, reason in graph.failed if isinstance(job, BranchJob)}
        apart = [(job, reason) for job, reason in graph.failed if isinstance(job, EvaluationJob)]
        failed = cells | {job.title: reason for job, reason in apart if not job.cell or job.cell.title not in cells}
        return failed, len(graph.left)

    def _check_space(self, missing: Sequence[Cell]) -> None:
        """Raise `SweepError` when what is still missing will not fit on the disk."""
        if not missing:
            return
        needed, free = self._study.bytes_to_write(missing), shutil.disk_usage(self._study.store.runs).free
        if free < needed:
            raise SweepError(
                f"{self._study.store.runs}: the sweep writes up to {needed / 2**30:.1f} GiB more and "
                f"{free / 2**30:.1f} GiB are free; free some space, or choose another --runs-dir"
            )

    def _describe_data(self) -> None:
        for line in self._study.data.summary:
            self._view.note(line)

    def _note_undecodable(self, tokens: TokenFiles) -> None:
        for folder in (tokens.train, tokens.validation):
            manifest = read_manifest(folder / MANIFEST)
            names = list(manifest.undecodable) if manifest is not None else []
            if names:
                more = ", …" if len(names) > 3 else ""
                self._view.note(
                    f"{len(names)} {folder.name} images did not decode when they were encoded, and others, drawn at "
                    "random, stand in for them: "
                    f"{', '.join(names[:3])}{more}"
                )


def _remarks(table: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader of the table must know: poor tokenizers, cells that learnt nothing about images, repeated data."""
    rows = list({row["run"]: row for row in table}.values())
    unlearnt = [row["run"] for row in rows if row.get("loss", 0.0) >= (row["unigram_entropy"] or math.inf)]
    repeated = [row["run"] for row in rows if (row["epochs"] or 0.0) > MOST_EPOCHS]
    remarks = []
    if faults := next((row["tokenizer_faults"] for row in rows if row.get("tokenizer_faults")), ""):
        remarks.append(f"the tokenizer was accepted although {faults}; a law should not rest on it")
    if unlearnt:
        remarks.append(
            f"{len(unlearnt)} cells are no better than the tokens' frequencies at each position "
            f"({rows[0]['unigram_entropy']:.3f} nats a token): {', '.join(unlearnt)}; a law should not rest on them"
        )
    if repeated:
        remarks.append(f"{len(repeated)} cells saw their images more than {MOST_EPOCHS} times: {', '.join(repeated)}")
    return remarks
