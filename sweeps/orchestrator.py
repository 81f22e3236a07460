"""Runs a sweep on one machine: tokenizer, tokens, numerics, then trunks and branches on a pool of workers.

Everything that is finished is left alone, everything half-done goes on: the state is in the files, so the orchestrator
may be killed at any moment and called again.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from filelock import FileLock, Timeout

from sweeps.decided import decided
from sweeps.executors.local import Failed, Finished, LocalLauncher, Progress
from sweeps.jobs import FINAL_ERRORS, Job, NumericsJob, PeakJob, TokenizerJob, TokensJob
from sweeps.plan import Plan, bytes_of_runs, bytes_of_tokens, images_by_trunk, train_images
from sweeps.pool import Pool
from sweeps.shares import shares
from sweeps.view import SweepView
from varscale.config import Experiment
from varscale.data.tokens.manifest import MANIFEST, read_manifest
from varscale.errors import SweepError
from varscale.store.fingerprint import DataIdentity, store_numerics, stored_numerics
from varscale.store.layout import ExperimentFiles, TokenFiles, fingerprint
from varscale.tracking import Forwarder
from varscale.training.cells import Cell, Numerics, grid_cells

MOST_EPOCHS = 4
"""Beyond as many passes, repeated data count for less than new data (Muennighoff et al. 2023)."""


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
    from varscale.data.sources.of_experiment import data_identity

    cells = grid_cells(experiment)
    data = data_identity(experiment.data)
    files.root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(files.sweep_lock)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SweepError(f"{files.root}: another sweep of this experiment is running; wait for it or stop it") from None
    with lock:
        sweep = _Sweep(experiment, files, cells, data, view, forwarder)
        sweep.check_space()
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
        known = decided(experiment, files, cells, data)
        self._numerics, self._tokenizer_threads, self._tokenizer, self._tokens = known
        self._launcher: LocalLauncher | None = None
        self._train_images = train_images(cells, data)
        self._token_files = files.tokens(self._tokens, self._train_images)

    def check_space(self) -> None:
        """Raise `SweepError` when what is still missing will not fit on the disk."""
        plan = self._plan(self._numerics) if self._numerics else None
        missing = plan.missing if plan else self._cells
        needed = bytes_of_runs(missing, [cell for cell in missing if plan is None or not plan.has_checkpoint(cell)])
        needed += max(0, bytes_of_tokens(self._experiment, self._train_images) - self._token_files.bytes)
        free = shutil.disk_usage(self._files.root).free
        if free < needed:
            raise SweepError(
                f"{self._files.root}: the sweep writes up to {needed / 2**30:.1f} GiB more and {free / 2**30:.1f} GiB "
                "are free; free some space, or choose another --runs-dir"
            )

    def run(self) -> Outcome:
        if self._numerics:
            store_numerics(self._files, self._experiment.runtime, self._numerics, {})
        plan = self._plan(self._numerics) if self._numerics else None
        record = None
        trained = 0
        failed: dict[str, str] = {}
        try:
            if plan is None or plan.missing:
                self._shares = shares(self._experiment.runtime)  # asked only now: it imports torch
                self._launcher = LocalLauncher(self._shares.workers, self._shares.threads, self._shares.gpus)
                self._prepare_inputs()
                plan = self._plan(self._numerics or self._measure_numerics())
                for trunk, _ in plan.trunks().values():  # a size may be new to a study whose numerics were decided
                    trunk.check_memory(plan.numerics)
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
        params = {"cells": len(plan.cells), "depths": depths, "tokenizer": self._tokenizer, "recipe": plan.recipe}
        labels = {plan.cell_files(cell).folder: each for cell in plan.cells if (each := plan.labels(cell))}
        return self._forwarder.sweep(key, name, params, folders, labels)

    def _prepare_inputs(self) -> None:
        from varscale.tokenizer.storage import load_tokenizer
        from varscale.tokenizer.training import tokens_ready

        tokenizer = self._files.tokenizer(self._tokenizer)
        self._forwarder.watch(tokenizer.folder)
        if not tokenizer.has_tokenizer(self._tokenizer):
            self._alone(
                "tokenizer", TokenizerJob(self._experiment, tokenizer, self._tokenizer, self._tokenizer_threads)
            )
        try:
            load_tokenizer(tokenizer.tokenizer_checkpoint, self._tokenizer)
        except ValueError as error:
            raise SweepError(f"{error} (without {tokenizer.folder} the sweep trains it anew)") from None
        tokens, images = self._token_files, self._train_images
        if not tokens_ready(tokens, images):
            job = TokensJob(self._experiment, tokenizer, self._tokenizer, tokens, images, self._tokenizer_threads)
            self._alone("tokens", job)
            self._note_undecodable(tokens)

    def _note_undecodable(self, tokens: TokenFiles) -> None:
        for folder in (tokens.train, tokens.validation):
            manifest = read_manifest(folder / MANIFEST)
            names = list(manifest.undecodable) if manifest is not None else []
            if names:
                more = ", …" if len(names) > 3 else ""
                self._view.note(
                    f"{len(names)} {folder.name} images do not decode, and their neighbours stand in for them: "
                    f"{', '.join(names[:3])}{more}"
                )

    def _measure_numerics(self) -> Numerics:
        trunks = tuple(images_by_trunk(self._cells))
        if stored_numerics(self._files) is not None:
            self._view.note(
                "precision, compilation or threads differ from those that the study was begun with: what was trained "
                "with those doesn't count"
            )
        job = NumericsJob(trunks, self._shares.threads, self._tokenizer_threads, self._shares.workers_a_device)
        numerics, seconds = self._alone("numerics", job)
        assert isinstance(numerics, Numerics)
        return store_numerics(self._files, self._experiment.runtime, numerics, seconds, replacing=True)

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
                        if event.kind in FINAL_ERRORS | {"Diverged"} or attempts > self._experiment.runtime.retries:
                            raise SweepError(f"{stage}: {event.message}")
                        self._view.note(f"{stage} failed ({event.message}); trying again")
                        self._launcher.submit(0, job)
            self._view.stage(stage, None, None)

    def _train(self, plan: Plan) -> dict[str, str]:
        from varscale.training.runs import Inputs

        peak = self._alone("peak", PeakJob(plan.numerics))
        inputs = Inputs(
            self._files.tokenizer(self._tokenizer).tokenizer_checkpoint,
            self._tokenizer,
            self._token_files,
            self._tokens,
            plan.numerics,
            peak,
        )
        assert self._launcher is not None
        return Pool(plan, inputs, self._launcher, self._view, self._experiment.runtime.retries).run()


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
