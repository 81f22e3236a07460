"""What a sweep takes of what was finished before, by itself or by another study of the runs folder."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from sweep_here import Sweeping
from toy_sweep import BUDGETS, Finished, cell_folder, numbers_of, results, start, toy_experiment, write_toy

from sweeps.jobs.preparation import ExecutionJob, TokenizerJob, TokensJob
from sweeps.jobs.training import TrunkJob
from sweeps.study import study_table
from varscale.store.layout import Store
from varscale.store.records import StudyRecord, TokensSummary


def test_finished_cells_are_not_trained_again(sweeping: Sweeping, finished: Finished) -> None:
    shutil.copytree(finished.runs / "cells", sweeping.runs / "cells")
    outcome = sweeping(toy_experiment())
    assert outcome.trained == 0
    assert len(outcome.rows) == 8
    assert not sweeping.executor.started  # no worker was started


def test_another_study_has_the_same_cells_under_its_own_name(sweeping: Sweeping, finished: Finished) -> None:
    """Also when it has fewer cells: a cell's identity does not know of the grid, the study's name or the budget's."""
    shutil.copytree(finished.runs / "cells", sweeping.runs / "cells")
    budgets = [2e7 * 1.001, 6e7 * 1.001]
    outcome = sweeping(toy_experiment(name="elsewhere", grid={"depths": [3], "budgets": budgets}))
    assert outcome.trained == 0
    assert [row["steps"] for row in outcome.rows] == [5, 16]
    assert [row["budget_flops"] for row in outcome.rows] == budgets
    assert {row["experiment"] for row in outcome.rows} == {"elsewhere"}
    ours = sweeping(toy_experiment())
    assert {row["experiment"] for row in ours.rows} == {"toy"}
    table = study_table(Store(sweeping.runs), "elsewhere")
    assert table is not None
    assert table.rows == outcome.rows
    assert len(list((sweeping.runs / "cells").glob("var-*"))) == 8


def test_what_a_machine_does_otherwise_is_no_other_cell(sweeping: Sweeping, finished: Finished) -> None:
    """Threads, compilation, parts of a step, evaluation and names change rounding or nothing: nothing is trained."""
    shutil.copytree(finished.runs / "cells", sweeping.runs / "cells")
    outcome = sweeping(
        toy_experiment(
            name="otherwise",
            runtime={"threads": 2, "workers": 2, "compile": "on", "micro_batch": 1, "tokenizer_threads": 2},
            evaluation={"batch_size": 5, "samples_per_class": 0, "guidance": 3.0},
        )
    )
    assert outcome.trained == 0


def test_a_new_study_takes_the_tokenizer_and_measures_for_itself(sweeping: Sweeping) -> None:
    outcome = sweeping(toy_experiment(name="apart", optim={"lr": 4e-3}, grid={"depths": [2], "budgets": [2e7]}))
    assert outcome.trained == 1
    assert not sweeping.executor.of(TokenizerJob)
    assert len(sweeping.executor.of(ExecutionJob)) == 1
    assert (sweeping.runs / "studies" / "apart" / "execution.json").exists()


def test_a_larger_grid_extends_trunks_and_tokens(sweeping: Sweeping, finished: Finished) -> None:
    """Its cells, and those of the smaller one, equal those of a sweep from nothing."""
    sweeping(toy_experiment(grid={"budgets": [2e7, 3e7]}))
    assert TokensSummary.read(next(sweeping.runs.glob("tokens/*")) / "summary.json") is not None
    outcome = sweeping(toy_experiment(grid={"budgets": list(BUDGETS)}))
    assert outcome.trained == 4
    assert all(min(job.milestones) > 2e7 / job.trunk.flops_per_image for job in sweeping.executor.of(TrunkJob))
    for name, row in results(sweeping.runs).items():
        assert numbers_of(row) == numbers_of(results(finished.runs)[name])


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_damaged_tokens_are_encoded_again(sweeping: Sweeping, finished: Finished, split: str, damage: str) -> None:
    (shard,) = sweeping.runs.glob(f"tokens/*/{split}/*.npy")
    shard.write_bytes(shard.read_bytes()[:1000])
    if damage == "deleted":
        shard.unlink()
    outcome = sweeping(toy_experiment(grid={"depths": [2], "budgets": [2e7]}))
    assert outcome.failed == {}
    assert len(sweeping.executor.of(TokensJob)) == 1
    (row,) = outcome.rows
    assert row["loss"] == json.loads((cell_folder(finished.runs, 2, 2e7) / "result.json").read_text())["row"]["loss"]


def test_a_damaged_tokenizer_is_made_anew(
    sweeping: Sweeping, finished: Finished, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = sweeping.runs.glob("tokenizers/*/weights.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    outcome = sweeping(toy_experiment(grid={"depths": [2], "budgets": [2e7]}))
    assert outcome.failed == {}
    assert len(sweeping.executor.of(TokenizerJob)) == 1
    assert str(path) in caplog.text
    assert path.read_bytes() == whole


def test_a_recipe_that_changes_leaves_the_earlier_cells_out(sweeping: Sweeping) -> None:
    grid = {"depths": [2], "budgets": [2e7, 3e7]}
    sweeping(toy_experiment(grid=grid))
    later = sweeping(toy_experiment(grid=grid, optim={"lr": 1e-4}))
    table = study_table(Store(sweeping.runs), "toy")
    assert table is not None
    assert table.rows == later.rows
    assert (table.missing, table.others) == ([], 2)


@pytest.mark.slow
def test_two_studies_begun_together_train_their_tokenizer_once(tmp_path: Path) -> None:
    """And their cells, which are the same: the second one waits at the lock of each run."""
    grid = {"depths": [2], "budgets": [2e7, 4e7]}
    paths = [write_toy(tmp_path / name, name=name, grid={**grid, "min_steps": 5}) for name in ("one", "two")]
    processes: list[subprocess.Popen[str]] = [start("sweep", path, cwd=tmp_path) for path in paths]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    runs = tmp_path / "runs"
    curves = list(runs.glob("*/*/metrics.jsonl"))
    assert len(list(runs.glob("tokenizers/*/result.json"))) == 1, outputs
    assert len(results(runs)) == 2
    for curve in curves:  # a run that was made twice would have its points twice
        images = [json.loads(line)["images"] for line in curve.read_text().splitlines()]
        assert images == sorted(set(images)), curve
    for name in ("one", "two"):
        record = StudyRecord.read(runs / "studies" / name / "study.json")
        assert record is not None
        assert {cell.folder for cell in record.cells} == set(results(runs))
