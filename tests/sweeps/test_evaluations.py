"""Cells' images are measured by jobs of their own, within a sweep and after it, and nothing is trained for that."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sweep_here import Sweeping
from toy_sweep import Finished, results, toy_experiment

from sweeps.grid import grid_cells
from sweeps.jobs.base import Job, JobRecord
from sweeps.jobs.evaluation import EvaluationJob, ReferenceJob, evaluation_jobs
from sweeps.jobs.graph import read_job
from sweeps.jobs.training import BranchJob
from sweeps.study import Study, study_table
from varscale.config import Experiment
from varscale.errors import Diverged, ExperimentError
from varscale.evaluation import subjects
from varscale.evaluation.plan import RINGS_TRAINING
from varscale.store.layout import Store
from varscale.store.records import RunIdentity, read_result

FIDELITY: dict[str, Any] = {"samples": 120, "reference_images": 200, "bootstrap_draws": 3, "guidance": 1.5}
FIGURES = ("fid", "kid", "mind", "image_precision", "image_recall")


def measured(**fidelity: Any) -> Experiment:
    grid = {"depths": [2], "budgets": [2e7, 3e7]}
    return toy_experiment(grid=grid, evaluation={"fidelity": {**FIDELITY, **fidelity}})


@pytest.fixture(autouse=True)
def _a_classifier_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RINGS_TRAINING, "images", 640)


@pytest.fixture
def with_cells(sweeping: Sweeping, finished: Finished) -> Sweeping:
    """All cells are trained already."""
    shutil.copytree(finished.runs / "cells", sweeping.runs / "cells")
    return sweeping


def count(sweeping: Sweeping, pattern: str) -> int:
    return len(list(sweeping.runs.glob(pattern)))


def test_a_sweep_measures_its_cells_and_the_floors(sweeping: Sweeping) -> None:
    """From cells that are not trained; a second sweep does nothing."""
    outcome = sweeping(measured())
    assert outcome.failed == {}
    assert outcome.trained == 2
    assert len(sweeping.executor.of(EvaluationJob)) == 4
    for row in outcome.rows:
        for name in (*FIGURES, "fid_low", "fid_high", "fid_extrapolated"):
            assert isinstance(row[name], float), name
        for name in FIGURES:
            assert isinstance(row[f"{name}_floor"], float), name
            assert isinstance(row[f"r{name}"], float), name
        for name in ("class_agreement", "class_agreement_real", "class_agreement_reconstructed"):
            assert 0 < row[name] < 1, name
        assert row["class_agreement_real"] > 0.6, "the extractor was trained to tell the two classes"
        assert row["fid_floor"] < row["fid"]
        assert row["fid_floor_low"] < row["fid_floor"] < row["fid_floor_high"]
        assert (row["samples"], row["guidance"]) == (120, 1.5)
        assert row["extractor"].startswith("rings-classifier:")
        assert row["reference_set"].startswith("train-200-")
    table = study_table(Store(sweeping.runs), "toy")
    assert table is not None
    assert table.rows == outcome.rows
    assert count(sweeping, "evaluations/reference-*/weights.safetensors") == 1, "the reference is passed once"
    again = sweeping(measured())
    assert not sweeping.executor.started
    assert again.rows == outcome.rows


def test_measuring_trains_nothing(with_cells: Sweeping) -> None:
    before = {path: path.stat().st_mtime_ns for path in with_cells.runs.glob("cells/*/*")}
    assert "fid" not in with_cells(measured().model_copy(update={"evaluation": toy_experiment().evaluation})).rows[0]
    outcome = with_cells(measured())
    assert outcome.trained == 0
    reference, *evaluations = with_cells.executor.jobs
    assert isinstance(reference, ReferenceJob)
    assert with_cells.executor.of(EvaluationJob) == evaluations
    assert "fid" in outcome.rows[0]
    assert {path: path.stat().st_mtime_ns for path in with_cells.runs.glob("cells/*/*")} == before


def test_other_settings_are_other_figures_and_never_mixed(with_cells: Sweeping) -> None:
    """A cell's first row has the settings of the latest sweep; each other way of measuring it has its own row."""
    first = with_cells(measured())
    stronger = with_cells(measured(guidance=4.0))
    assert len(with_cells.executor.of(EvaluationJob)) == 2, "the floors are the same"
    assert [row["guidance"] for row in stronger.rows] == [4.0, 1.5, 4.0, 1.5]
    assert [row for row in stronger.rows if row["guidance"] == 1.5] == first.rows
    assert stronger.rows[0]["fid"] != first.rows[0]["fid"]
    assert stronger.rows[0]["fid_floor"] == first.rows[0]["fid_floor"]
    wider = measured(guidance=2.0).model_copy(update={"grid": toy_experiment(grid={"depths": [3]}).grid})
    with_cells(wider)
    table = study_table(Store(with_cells.runs), "toy")
    assert table is not None
    shown = {(row["depth"], row["guidance"]) for row in table.rows}
    assert shown == {(2, 1.5), (2, 4.0), (3, 2.0)}, "cells of earlier sweeps were not measured so"


def test_several_guidances_are_an_evaluation_each(with_cells: Sweeping) -> None:
    with_cells(measured())
    before = {path: path.stat().st_mtime_ns for path in with_cells.runs.glob("evaluations/*/result.json")}
    several = measured(guidance=[3, 0, 1.5])
    outcome = with_cells(several)
    jobs = with_cells.executor.of(EvaluationJob)
    assert [job.plan.guidance for job in jobs] == [3.0, 3.0, 0.0, 0.0], "what was measured at one guidance is found"
    assert len({job.title for job in jobs}) == len({job.key for job in jobs}) == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [row["guidance"] for row in outcome.rows] == [3.0, 0.0, 1.5] * 2
    for rows in (outcome.rows[:3], outcome.rows[3:]):
        assert len({row["fid"] for row in rows}) == 3
        assert {row["fid_floor"] for row in rows} == {outcome.rows[0]["fid_floor"]}
        figures = (*FIGURES, "inception_score")
        of_images = {*figures, *(f"{name}_{end}" for name in figures for end in ("low", "high"))}
        of_images |= {"guidance", "fid_extrapolated"}
        assert {frozenset((name, row[name]) for name in row.keys() - of_images) for row in rows} == {
            frozenset((name, rows[0][name]) for name in rows[0].keys() - of_images)
        }, "they differ in nothing else"
    for job in jobs:
        read = read_job(job.files.job)
        assert read.files.folder == job.files.folder.absolute()


@pytest.mark.parametrize(
    "wrong", [-1, [1.5, -0.1], [1.5, 1.5], [], [float("inf")], [float("nan")], "much", [[1.0]], True]
)
def test_guidances_that_are_none(wrong: Any) -> None:
    with pytest.raises(ExperimentError, match=r"evaluation\.fidelity\.guidance") as caught:
        measured(guidance=wrong)
    assert "\n" not in str(caught.value)


def test_evaluations_that_the_settings_never_asked_for_are_in_the_table(with_cells: Sweeping) -> None:
    """Those of `varscale evaluate` with other settings, or of an experiment without the section."""
    with_cells(measured(guidance=3.0, top_k=5))
    with_cells(measured(samples=150))
    plain = with_cells(toy_experiment(grid={"depths": [2], "budgets": [2e7, 3e7]}))
    assert not with_cells.executor.started
    shown = [(row["guidance"], row["samples"], row["top_k"], row["fid_floor"]) for row in plain.rows]
    floors = {row["samples"]: row["fid_floor"] for row in plain.rows}
    assert floors[120] != floors[150]
    assert shown == [(1.5, 150, 0, floors[150]), (3.0, 120, 5, floors[120])] * 2
    more_draws = with_cells(measured(samples=150, bootstrap_draws=4))
    assert len(with_cells.executor.of(EvaluationJob)) == 4
    assert len(more_draws.rows) == 4, "bootstrap draws are no other way of measuring"


def test_an_evaluation_of_nobody_is_named_and_left_out(with_cells: Sweeping, caplog: pytest.LogCaptureFixture) -> None:
    outcome = with_cells(measured())
    path = next(with_cells.runs.glob("evaluations/*-g1.5-*/run.json"))
    identity = RunIdentity.read(path)
    assert identity is not None
    identity.model_copy(update={"params": {"subject": "cell"}}).write(path)
    table = study_table(Store(with_cells.runs), "toy")
    assert table is not None
    assert sum("fid" in row for row in table.rows) == len(outcome.rows) - 1
    assert "whose evaluation this is can't be told" in caplog.text


def test_the_best_cell_of_each_budget(sweeping: Sweeping, finished: Finished) -> None:
    shutil.copytree(finished.runs / "cells", sweeping.runs / "cells")
    study = Study.of(toy_experiment(), Store(sweeping.runs), grid_cells(toy_experiment()))
    results = {cell.label: result for cell in study.cells if (result := study.result(cell)) is not None}
    losses = {label: result.metrics["loss"] for label, result in results.items()}
    best = study.best_cells()
    assert [cell.budget_flops for cell in best] == [2e7, 3e7, 4e7, 6e7]
    for cell in best:
        alike = [each.label for each in study.cells if each.budget_flops == cell.budget_flops]
        assert losses[cell.label] == min(losses[label] for label in alike)


def test_the_same_images_whatever_the_batch(with_cells: Sweeping, tmp_path: Path) -> None:
    first = with_cells(measured())
    shutil.rmtree(with_cells.runs / "evaluations")
    second = with_cells(measured(batch_size=17))
    assert [row["fid"] for row in second.rows] == pytest.approx([row["fid"] for row in first.rows], rel=1e-3)


def test_an_evaluation_that_fails_loses_nothing(with_cells: Sweeping) -> None:
    def break_job(job: Job, attempt: int) -> None:
        if isinstance(job, EvaluationJob) and job.cell is not None and job.cell.budget_flops == 2e7:
            raise MemoryError("no room")

    outcome = with_cells(measured(), break_job)
    assert list(outcome.failed.values()) == ["no room"]
    assert len(outcome.rows) == 2
    assert sum("fid" in row for row in outcome.rows) == 1


def test_a_cell_that_diverged_is_not_measured(sweeping: Sweeping) -> None:
    def break_job(job: Job, attempt: int) -> None:
        if isinstance(job, BranchJob) and job.cell.budget_flops == 2e7:
            raise Diverged("step 3")

    outcome = sweeping(measured(), break_job)
    assert outcome.failed == {}
    assert [("fid" in row) for row in outcome.rows] == [False, True]
    sweeping(measured())
    assert not sweeping.executor.started


def test_a_job_by_itself(with_cells: Sweeping) -> None:
    """Each kind is read back from its file to the same folder."""
    with_cells(measured())
    study = Study.of(measured(), Store(with_cells.runs), grid_cells(measured()))
    jobs = evaluation_jobs(study, all_of_them=True)
    assert len(jobs) == 4
    for job in jobs:
        read = read_job(job.files.job)
        assert isinstance(read, EvaluationJob)
        assert (read.key, read.files.folder) == (job.key, job.files.folder.absolute())
        assert read.done()
    (reference,) = with_cells.executor.of(ReferenceJob)
    assert with_cells.executor.jobs.index(reference) < min(map(with_cells.executor.jobs.index, jobs))
    assert reference.resources.whole_machine
    assert read_job(reference.files.job).done()
    moved = with_cells.runs.rename(with_cells.runs.with_name("moved"))
    link = moved.with_name("cell")
    link.symlink_to(moved / "evaluations" / reference.files.folder.name)
    assert read_job(link / "job.json").place.store.runs.resolve() == moved.resolve(), "not where it once was"
    moved.rename(with_cells.runs)
    record = JobRecord.read(jobs[-1].files.job)
    assert record is not None
    experiment = dict(record.experiment) | {"evaluation": {}}
    record.model_copy(update={"experiment": experiment}).write(jobs[-1].files.job)
    with pytest.raises(ValueError, match=r"evaluation\.fidelity: missing"):
        read_job(jobs[-1].files.job)


def test_images_are_drawn_as_the_settings_say(with_cells: Sweeping, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of each class, at this guidance, which may be the same at all scales."""
    asked: list[list[int]] = []
    drawn, schedules = subjects.drawn_batches, list[str]()

    def draw(model: Any, tokenizer: Any, labels_N: Any, options: Any, **rest: Any) -> Any:
        asked.append(labels_N.bincount().tolist())
        schedules.append(options.guidance_schedule)
        assert options.guidance == 1.5
        return drawn(model, tokenizer, labels_N, options, **rest)

    monkeypatch.setattr(subjects, "drawn_batches", draw)
    ramp = with_cells(measured())
    constant = with_cells(measured(guidance_schedule="constant"))
    assert asked == [[60, 60]] * 4
    assert schedules == ["ramp"] * 2 + ["constant"] * 2
    assert [row["guidance_schedule"] for row in constant.rows] == ["constant", "ramp"] * 2
    assert [row for row in constant.rows if row["guidance_schedule"] == "ramp"] == ramp.rows


def test_few_images_warn(with_cells: Sweeping, caplog: pytest.LogCaptureFixture) -> None:
    with_cells(measured())
    assert "samples: 120 are few" in caplog.text


def test_a_result_says_what_it_is(with_cells: Sweeping) -> None:
    with_cells(measured())
    study = Study.of(measured(), Store(with_cells.runs), grid_cells(measured()))
    for job in evaluation_jobs(study, all_of_them=True):
        identity = json.loads(job.files.identity.read_text())
        assert identity["role"] == "evaluation"
        assert identity["params"]["subject"] == job.subject
        result = read_result(job.files)
        assert result is not None
        assert set(FIGURES) <= set(result.metrics)
        if job.cell is not None:
            assert result.row["fingerprint"] == identity["params"]["of"] == study.cell_files(job.cell).fingerprint
        elif job.subject == "reconstructed":
            assert result.row["tokenizer_fingerprint"] == identity["params"]["of"] == study.tokenizer.fingerprint
        else:
            assert identity["params"]["of"] == ""
    assert results(with_cells.runs)
