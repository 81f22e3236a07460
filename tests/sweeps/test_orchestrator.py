"""What a sweep does when jobs crash, diverge or were done before; workers are replaced by calls in this process."""

import io
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console
from toy_sweep import BUDGETS, Finished, numbers_of, results, toy_experiment

from sweeps import orchestrator
from sweeps.jobs import CellJob, Job, NumericsJob, TokenizerJob, TokensJob, TrunkJob
from sweeps.launchers.local import Event, Failed, Progress
from sweeps.launchers.local import Finished as Done
from sweeps.orchestrator import Outcome, SweepError, run_sweep
from sweeps.view import SweepView
from varscale.config import Experiment
from varscale.config_files import ExperimentError
from varscale.files import ExperimentFiles, read_json

LR_TOO_HIGH = {"name": "wild", "depths": [2], "budgets": [2e7, 4e7], "settings": {"optim.lr": 1e30}}


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


def test_longest_way_first_and_branches_when_ready(sweeping: Sweeping, finished: Finished) -> None:
    outcome = sweeping(toy_experiment())
    assert outcome.failed == {}
    assert outcome.trained == 8
    assert [row["fingerprint"] for row in outcome.rows] == [
        row["fingerprint"]
        for row in sorted(results(finished.runs).values(), key=lambda row: (row["depth"], row["steps"]))
    ]
    for name, row in results(sweeping.runs).items():  # trained in this process, in another order
        assert numbers_of(row) == numbers_of(results(finished.runs)[name])
    assert not sweeping.launcher.of(TokenizerJob)
    assert not sweeping.launcher.of(TokensJob)
    trunks, cells = sweeping.launcher.of(TrunkJob), sweeping.launcher.of(CellJob)
    assert sorted(job.trunk.depth for job in trunks) == [2, 3]
    flops = [job.trunk.flops_per_image * job.milestones[-1] for job in trunks]
    assert flops == sorted(flops, reverse=True)
    assert len(cells) == 8
    for trunk in trunks:
        branches = [job.cell for job in cells if job.cell.trunk.depth == trunk.trunk.depth]
        assert trunk.milestones == tuple(sorted(cell.branch_images for cell in branches))
    ((key, folders),) = sweeping.forwarder.records
    assert key
    assert len(folders) == 1 + 2 + 8
    assert sweeping.forwarder.running  # the laws are still to come
    assert "8 of 8 cells, 100% of training" in sweeping.output


def test_finished_cells_are_not_trained_again(sweeping: Sweeping, finished: Finished) -> None:
    shutil.copytree(finished.root / "cells", sweeping.runs / "toy" / "cells")
    outcome = sweeping(toy_experiment())
    assert outcome.trained == 0
    assert len(outcome.rows) == 8
    assert not hasattr(sweeping.launcher, "_workers")  # no worker was started


def test_another_study_of_the_same_runs_folder_reuses_them(sweeping: Sweeping, finished: Finished) -> None:
    """Also when it has fewer cells: a cell's identity does not know of the grid."""
    shutil.copytree(finished.root / "cells", sweeping.runs / "toy" / "cells")
    shutil.copytree(sweeping.runs / "toy", sweeping.runs / "elsewhere", ignore=shutil.ignore_patterns("cells"))
    outcome = sweeping(toy_experiment(name="elsewhere", grid={"depths": [3], "budgets": [2e7, 6e7]}))
    assert outcome.trained == 0
    assert [row["steps"] for row in outcome.rows] == [5, 16]
    assert not (sweeping.runs / "elsewhere" / "cells").exists()
    ((_, folders),) = sweeping.forwarder.records
    assert {folder.parent.parent.name for folder in folders if folder.parent.name == "cells"} == {"toy"}


LEFT_OPEN = {"precision": "auto", "compile": "auto", "tokenizer_threads": 0}


def test_a_new_study_computes_as_the_one_whose_cells_it_takes(
    sweeping: Sweeping, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement of its own, or another number of processors, might choose otherwise, and train them again."""
    monkeypatch.setattr("sweeps.decided.processors", lambda: 3)
    shutil.copytree(finished.root / "cells", sweeping.runs / "toy" / "cells")
    outcome = sweeping(toy_experiment(name="taking", grid={"depths": [3]}, runtime=LEFT_OPEN))
    assert outcome.trained == 0
    assert sweeping.launcher.jobs == []
    assert (sweeping.runs / "taking" / "numerics.json").exists()


@pytest.mark.parametrize("content", [None, "{", '{"precision": "float32"}'])
def test_a_study_that_takes_no_cells_measures_but_takes_the_tokenizer(
    sweeping: Sweeping, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    """Also where what it was begun with can't be read any more."""

    def refuse(job: Job, attempt: int) -> None:
        if isinstance(job, NumericsJob):
            raise ValueError("measured")

    monkeypatch.setattr("sweeps.decided.processors", lambda: 3)
    if content is not None:
        (sweeping.runs / "apart").mkdir()
        (sweeping.runs / "apart" / "numerics.json").write_text(content)
    with pytest.raises(SweepError, match="numerics: measured"):
        sweeping(toy_experiment(name="apart", optim={"lr": 4e-3}, runtime=LEFT_OPEN), refuse)
    assert not sweeping.launcher.of(TokenizerJob)
    assert "differ from those that the study was begun with" not in sweeping.output


def test_a_larger_grid_extends_trunks_and_tokens(sweeping: Sweeping, finished: Finished) -> None:
    """Its cells, and those of the smaller one, equal those of a sweep from nothing."""
    sweeping(toy_experiment(grid={"budgets": [2e7, 3e7]}))
    summary = read_json(next(sweeping.runs.glob("toy/tokens/*")) / "summary.json")
    assert summary is not None
    outcome = sweeping(toy_experiment(grid={"budgets": list(BUDGETS)}))
    assert outcome.trained == 4
    assert all(min(job.milestones) > 2e7 / job.trunk.flops_per_image for job in sweeping.launcher.of(TrunkJob))
    for name, row in results(sweeping.runs).items():
        assert numbers_of(row) == numbers_of(results(finished.runs)[name])


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_damaged_tokens_are_encoded_again(sweeping: Sweeping, finished: Finished, split: str, damage: str) -> None:
    (shard,) = sweeping.runs.glob(f"toy/tokens/*/{split}/*.npy")
    shard.write_bytes(shard.read_bytes()[:1000])
    if damage == "deleted":
        shard.unlink()
    outcome = sweeping(toy_experiment(grid={"depths": [2], "budgets": [2e7]}))
    assert outcome.failed == {}
    assert len(sweeping.launcher.of(TokensJob)) == 1
    (row,) = outcome.rows
    assert row["loss"] == next(
        each["loss"] for each in results(finished.runs).values() if (each["depth"], each["budget_flops"]) == (2, 2e7)
    )


def test_a_damaged_tokenizer_is_named_before_anything_is_trained(sweeping: Sweeping) -> None:
    (path,) = sweeping.runs.glob("toy/tokenizers/*/tokenizer.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SweepError, match=rf"not a readable .* \(without {path.parent} the sweep trains it anew\)"):
        sweeping(toy_experiment())
    assert sweeping.launcher.jobs == []
    shutil.rmtree(path.parent)
    assert sweeping(toy_experiment(grid={"depths": [2], "budgets": [2e7]})).failed == {}


def test_a_reused_cell_has_the_budget_that_is_asked_for(sweeping: Sweeping, finished: Finished) -> None:
    shutil.copytree(finished.root / "cells", sweeping.runs / "toy" / "cells")
    budgets = [budget * 1.001 for budget in BUDGETS]
    outcome = sweeping(toy_experiment(grid={"budgets": budgets}))
    assert outcome.trained == 0
    assert sorted({row["budget_flops"] for row in outcome.rows}) == budgets


def test_a_tokenizer_is_not_trained_again_because_it_was_not_measured(
    sweeping: Sweeping, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    from varscale.training import tokenizer_run

    shutil.rmtree(sweeping.runs / "toy" / "tokenizers")
    experiment = toy_experiment(grid={"depths": [2], "budgets": [2e7]}, runtime={"retries": 0})
    with monkeypatch.context() as broken:
        broken.setattr(tokenizer_run, "save_pictures", lambda *_: (_ for _ in ()).throw(OSError("no picture")))
        with pytest.raises(SweepError, match="no picture"):
            sweeping(experiment)
    with monkeypatch.context() as trained:
        trained.setattr(tokenizer_run, "_fit", lambda *_: pytest.fail("trained again"))
        outcome = sweeping(experiment)
    assert outcome.rows[0]["loss"] in {row["loss"] for row in results(finished.runs).values()}


def test_a_run_waits_for_another_that_writes_its_files(tmp_path: Path) -> None:
    from varscale.files import RunFiles
    from varscale.training.tokenizer_run import train_tokenizer

    files = RunFiles(tmp_path / "tokenizer")
    files.folder.mkdir()
    waiting = Thread(target=train_tokenizer, args=(toy_experiment(), files, "print", lambda done, total: None))
    with FileLock(files.lock):
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive()
        assert not files.identity.exists()
    waiting.join(60)
    assert files.finished("print")


def test_a_crash_is_tried_again(sweeping: Sweeping, finished: Finished) -> None:
    def crash_twice(job: Job, attempt: int) -> None:
        if isinstance(job, TrunkJob | CellJob) and attempt <= 2:
            raise RuntimeError(f"attempt {attempt}")

    outcome = sweeping(toy_experiment(grid={"depths": [3]}), crash_twice)
    assert outcome.failed == {}
    assert "trunk d3-s0 failed (attempt 2); trying again from its last checkpoint" in sweeping.output
    assert {row["loss"] for row in outcome.rows} == {
        row["loss"] for row in results(finished.runs).values() if row["depth"] == 3
    }


@pytest.mark.parametrize(
    ("retries", "error", "attempts"), [(2, RuntimeError, 3), (0, RuntimeError, 1), (2, ValueError, 1)]
)
def test_a_cell_that_always_crashes_fails_alone(
    sweeping: Sweeping, retries: int, error: type[Exception], attempts: int
) -> None:
    def crash(job: Job, attempt: int) -> None:
        if isinstance(job, CellJob) and job.cell.budget_flops == 3e7:
            raise error("out of [memory]")

    outcome = sweeping(toy_experiment(grid={"depths": [3]}, runtime={"retries": retries}), crash)
    assert outcome.failed == {"depth 3 · 3e07 FLOPs · seed 0": "out of [memory]"}
    assert outcome.trained == 3
    assert [row["budget_flops"] for row in outcome.rows] == [2e7, 4e7, 6e7]
    assert len([job for job in sweeping.launcher.of(CellJob) if job.cell.budget_flops == 3e7]) == attempts
    assert "failed: out of [memory]" in sweeping.output


def test_a_trunk_that_always_crashes_takes_its_cells_along(sweeping: Sweeping) -> None:
    def crash(job: Job, attempt: int) -> None:
        if isinstance(job, TrunkJob) and job.trunk.depth == 2:
            raise RuntimeError("no")

    outcome = sweeping(toy_experiment(), crash)
    assert set(outcome.failed) == {f"depth 2 · {budget:.3g} FLOPs · seed 0".replace("e+", "e") for budget in BUDGETS}
    assert {row["depth"] for row in outcome.rows} == {3}
    assert "4 of 8 cells, 100% of training" in sweeping.output
    (row,) = [line for line in sweeping.output.splitlines() if "d2-s0" in line and "trunk" not in line]
    assert row.count("failed") == 5
    again = sweeping(toy_experiment())
    assert again.failed == {}
    assert again.trained == 4


@pytest.mark.parametrize("kind", [TokenizerJob, TokensJob])
def test_without_inputs_nothing_is_trained(sweeping: Sweeping, kind: type) -> None:
    for part in ("tokenizers", "tokens"):
        shutil.rmtree(sweeping.runs / "toy" / part)

    def crash(job: Job, attempt: int) -> None:
        if isinstance(job, kind):
            raise RuntimeError("no")

    stage = {TokenizerJob: "tokenizer", TokensJob: "tokens"}[kind]
    with pytest.raises(SweepError, match=f"^{stage}: no$"):
        sweeping(toy_experiment(runtime={"retries": 1}), crash)
    assert len(sweeping.launcher.of(kind)) == 2
    assert sweeping.launcher.of(TrunkJob) == []


def test_a_diverging_tokenizer_is_not_tried_again(sweeping: Sweeping) -> None:
    experiment = toy_experiment()
    training = experiment.tokenizer.training.model_dump() | {"lr": 1e30, "quantize_after": 0.0}
    with pytest.raises(SweepError, match=r"^tokenizer: the training loss is (nan|inf) after"):
        sweeping(toy_experiment(tokenizer={"training": training}))
    assert len(sweeping.launcher.of(TokenizerJob)) == 1


def test_diverged_cells_end_and_the_rest_goes_on(sweeping: Sweeping) -> None:
    experiment = toy_experiment(grid={"depths": [3], "variants": [LR_TOO_HIGH]})
    outcome = sweeping(experiment)
    assert outcome.failed == {}
    assert [(row["variant"], row["status"]) for row in outcome.rows] == [("", "finished")] * 4 + [
        ("wild", "diverged")
    ] * 2
    assert all("loss" not in row for row in outcome.rows[4:])
    assert "trunk d2-s0-wild diverged: the training loss is" in sweeping.output
    (row,) = [line for line in sweeping.output.splitlines() if "d2-s0-wild" in line and "trunk" not in line]
    assert row.count("diverged") == 3
    assert "6 of 6 cells, 100% of training" in sweeping.output
    again = sweeping(experiment)
    assert again.trained == 0
    assert again.rows == outcome.rows


def test_a_branch_that_diverges_ends_alone(sweeping: Sweeping, monkeypatch: pytest.MonkeyPatch) -> None:
    from varscale.training.callbacks import Diverged

    def diverge(job: Job, attempt: int) -> None:
        if isinstance(job, CellJob) and job.cell.budget_flops == 4e7:
            raise Diverged("the training loss is nan after 40 images")

    outcome = sweeping(toy_experiment(grid={"depths": [3]}), diverge)
    assert [row["status"] for row in outcome.rows] == ["finished", "finished", "diverged", "finished"]
    result = read_json(next(sweeping.runs.glob("toy/cells/d3-c4e07-*/result.json")))
    assert result is not None
    assert result["reason"] == "the training loss is nan after 40 images"


def test_two_sweeps_of_one_experiment(sweeping: Sweeping) -> None:
    with FileLock(sweeping.runs / "toy" / ".sweep.lock"), pytest.raises(SweepError, match="another sweep of this"):
        sweeping(toy_experiment())
    assert sweeping.launcher.jobs == []
    assert sweeping.forwarder.running is None


def test_settings_that_cannot_work_start_nothing(sweeping: Sweeping) -> None:
    with pytest.raises(ExperimentError, match=r"4 of the cells have fewer than grid\.min_steps = 20 steps"):
        sweeping(toy_experiment(grid={"depths": [3], "min_steps": 20}))
    assert sweeping.launcher.jobs == []
    assert sweeping.forwarder.running is None


def test_interrupted_sweep_is_marked_as_such(sweeping: Sweeping) -> None:
    def interrupt(job: Job, attempt: int) -> None:
        if isinstance(job, CellJob):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweeping(toy_experiment(), interrupt)
    assert sweeping.forwarder.finished == ["KILLED"]
    assert sweeping.forwarder.running is False
