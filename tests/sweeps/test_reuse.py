"""What a sweep takes of what was finished before, by itself or by another study of the runs folder."""

import shutil

import pytest
from sweep_here import Sweeping
from toy_sweep import BUDGETS, Finished, numbers_of, results, toy_experiment

from sweeps.jobs import Job, NumericsJob, TokenizerJob, TokensJob, TrunkJob
from varscale.errors import SweepError
from varscale.store.layout import read_json


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
