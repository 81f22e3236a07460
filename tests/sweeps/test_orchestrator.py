"""What a sweep does when jobs crash, diverge or are called again; workers are replaced by calls in this process."""

import shutil
from pathlib import Path
from threading import Thread

import pytest
from filelock import FileLock
from sweep_here import Sweeping
from toy_sweep import BUDGETS, Finished, cell_folder, numbers_of, results, toy_experiment

from sweeps.jobs.base import Job
from sweeps.jobs.preparation import ExecutionJob, TokenizerJob, TokensJob
from sweeps.jobs.training import BranchJob, TrunkJob
from varscale.errors import ExperimentError, SweepError
from varscale.store.records import Result, StudyRecord

LR_TOO_HIGH = {"name": "wild", "depths": [2], "budgets": [2e7, 4e7], "settings": {"optim.lr": 1e30}}


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
    assert not sweeping.executor.of(TokenizerJob)
    assert not sweeping.executor.of(TokensJob)
    trunks, cells = sweeping.executor.of(TrunkJob), sweeping.executor.of(BranchJob)
    assert sorted(job.trunk.depth for job in trunks) == [2, 3]
    flops = [job.trunk.flops_per_image * job.milestones[-1] for job in trunks]
    assert flops == sorted(flops, reverse=True)
    assert len(cells) == 8
    for trunk in trunks:
        branches = [job.cell for job in cells if job.cell.trunk.depth == trunk.trunk.depth]
        assert trunk.milestones == tuple(sorted(cell.branch_images for cell in branches))
    record = StudyRecord.read(sweeping.runs / "studies" / "toy" / "study.json")
    assert record is not None
    assert record.status == "FINISHED"
    assert sorted(cell.folder for cell in record.cells) == sorted(results(finished.runs))
    assert sweeping.forwarder.running  # the laws are still to come
    assert "8 of 8 cells, 100% of training" in sweeping.output


def test_a_tokenizer_is_not_trained_again_because_it_was_not_measured(
    sweeping: Sweeping, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:

    from varscale.tokenizer import training as tokenizer_training

    shutil.rmtree(sweeping.runs / "tokenizers")
    experiment = toy_experiment(grid={"depths": [2], "budgets": [2e7]}, runtime={"retries": 0})
    with monkeypatch.context() as broken:
        broken.setattr(tokenizer_training, "save_pictures", lambda *_: (_ for _ in ()).throw(OSError("no picture")))
        with pytest.raises(SweepError, match="no picture"):
            sweeping(experiment)
    with monkeypatch.context() as trained:
        trained.setattr(tokenizer_training, "_train", lambda *_: pytest.fail("trained again"))
        outcome = sweeping(experiment)
    assert outcome.rows[0]["loss"] in {row["loss"] for row in results(finished.runs).values()}


def test_a_run_waits_for_another_that_writes_its_files(tmp_path: Path) -> None:
    from varscale.store.layout import RunFiles
    from varscale.store.records import read_result
    from varscale.tokenizer.training import train_tokenizer

    files = RunFiles(tmp_path / "tokenizer-print")
    files.folder.mkdir()
    waiting = Thread(target=train_tokenizer, args=(toy_experiment(), files, lambda done, total: None))
    with FileLock(files.lock):
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive()
        assert not files.identity.exists()
    waiting.join(60)
    assert read_result(files) is not None


def test_a_crash_is_tried_again(sweeping: Sweeping, finished: Finished) -> None:
    def crash_twice(job: Job, attempt: int) -> None:
        if isinstance(job, TrunkJob | BranchJob) and attempt <= 2:
            raise RuntimeError(f"attempt {attempt}")

    outcome = sweeping(toy_experiment(grid={"depths": [3]}), crash_twice)
    assert outcome.failed == {}
    assert "trunk d3-s0 failed (attempt 2); trying again" in sweeping.output
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
        if isinstance(job, BranchJob) and job.cell.budget_flops == 3e7:
            raise error("out of [memory]")

    outcome = sweeping(toy_experiment(grid={"depths": [3]}, runtime={"retries": retries}), crash)
    assert outcome.failed == {"depth 3 · 3e07 FLOPs · seed 0": "out of [memory]"}
    assert outcome.trained == 3
    assert [row["budget_flops"] for row in outcome.rows] == [2e7, 4e7, 6e7]
    assert len([job for job in sweeping.executor.of(BranchJob) if job.cell.budget_flops == 3e7]) == attempts
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


@pytest.mark.parametrize("kind", [TokenizerJob, TokensJob, ExecutionJob])
def test_without_inputs_nothing_is_trained(sweeping: Sweeping, kind: type) -> None:
    for part in ("tokenizers", "tokens"):
        shutil.rmtree(sweeping.runs / part)

    def crash(job: Job, attempt: int) -> None:
        if isinstance(job, kind):
            raise RuntimeError("no")

    stage = {TokenizerJob: "tokenizer", TokensJob: "tokens", ExecutionJob: "execution"}[kind]
    with pytest.raises(SweepError, match=f"^{stage}: no$"):
        sweeping(toy_experiment(runtime={"retries": 1}), crash)
    assert len(sweeping.executor.of(kind)) == 2
    assert sweeping.executor.of(TrunkJob) == []


def test_a_diverging_tokenizer_is_not_tried_again(sweeping: Sweeping) -> None:
    experiment = toy_experiment()
    training = experiment.tokenizer.training.model_dump() | {"lr": 1e30, "quantize_after": 0.0}
    with pytest.raises(SweepError, match=r"^tokenizer: the training loss is (nan|inf) after"):
        sweeping(toy_experiment(tokenizer={"training": training}))
    assert len(sweeping.executor.of(TokenizerJob)) == 1


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
    from varscale.errors import Diverged

    def diverge(job: Job, attempt: int) -> None:
        if isinstance(job, BranchJob) and job.cell.budget_flops == 4e7:
            raise Diverged("the training loss is nan after 40 images")

    outcome = sweeping(toy_experiment(grid={"depths": [3]}), diverge)
    assert [row["status"] for row in outcome.rows] == ["finished", "finished", "diverged", "finished"]
    result = Result.read(cell_folder(sweeping.runs, 3, 4e7) / "result.json")
    assert result is not None
    assert result.reason == "the training loss is nan after 40 images"


def test_two_sweeps_of_one_study(sweeping: Sweeping) -> None:
    folder = sweeping.runs / "studies" / "toy"
    folder.mkdir(parents=True)
    with FileLock(folder / ".sweep.lock"), pytest.raises(SweepError, match="another sweep of this study"):
        sweeping(toy_experiment())
    assert sweeping.executor.jobs == []
    assert sweeping.forwarder.running is None


def test_settings_that_cannot_work_start_nothing(sweeping: Sweeping) -> None:
    with pytest.raises(ExperimentError, match=r"4 of the cells have fewer than grid\.min_steps = 20 steps"):
        sweeping(toy_experiment(grid={"depths": [3], "min_steps": 20}))
    assert sweeping.executor.jobs == []
    assert sweeping.forwarder.running is None


def test_interrupted_sweep_is_marked_as_such(sweeping: Sweeping) -> None:
    def interrupt(job: Job, attempt: int) -> None:
        if isinstance(job, BranchJob):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweeping(toy_experiment(), interrupt)
    record = StudyRecord.read(sweeping.runs / "studies" / "toy" / "study.json")
    assert record is not None
    assert record.status == "KILLED"
    assert sweeping.forwarder.running is False
