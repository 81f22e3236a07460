"""What a person sees while a sweep runs, on a terminal and in a log."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from toy_sweep import toy_experiment

from sweeps import view
from sweeps.costs import size_costs
from sweeps.grid import grid_cells
from sweeps.jobs.base import StudyPlace
from sweeps.jobs.evaluation import evaluation_jobs
from sweeps.jobs.preparation import TokenizerJob
from sweeps.jobs.training import BranchJob, TrunkJob
from sweeps.study import Study
from sweeps.view import SweepView
from varscale.config import Experiment
from varscale.store.layout import Store
from varscale.store.records import Result
from varscale.training.cells import Cell


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(view, "time", clock)
    return clock


def log() -> Console:
    return Console(file=io.StringIO(), width=100, record=True, force_terminal=False)


def terminal() -> Console:
    return Console(file=io.StringIO(), width=100, record=True, force_terminal=True)


def make_study(runs: Path, experiment: Experiment) -> Study:
    return Study.of(experiment, Store(runs), grid_cells(experiment))


def jobs_of(study: Study) -> tuple[list[TrunkJob], list[BranchJob]]:
    place = StudyPlace.of(study)
    trunks = [TrunkJob(study.experiment, place, size.trunk, size.milestones) for size in size_costs(study.cells)]
    return trunks, [BranchJob(study.experiment, place, cell) for cell in study.cells]


def finish(study: Study, cell: Cell, loss: float | None) -> None:
    files, status = study.cell_files(cell), "diverged" if loss is None else "finished"
    metrics = {} if loss is None else {"loss": loss}
    Result(fingerprint=files.fingerprint, status=status, time=1.0, metrics=metrics).write(files.result)


@pytest.mark.parametrize("console", [log(), terminal()], ids=["log", "terminal"])
@pytest.mark.parametrize("grid", [{"depths": [2], "budgets": [2e7]}, {"seeds": [0, 1]}], ids=["one cell", "seeds"])
def test_a_sweep_from_begin_to_end(console: Console, grid: dict[str, object], tmp_path: Path) -> None:
    study, shown = make_study(tmp_path, toy_experiment(grid=grid)), SweepView(console)
    trunks, cells = jobs_of(study)
    shown.begin(study, [*trunks, *cells])
    for job in (*trunks, *cells):
        shown.started(job)
        shown.refresh()
        shown.progress(job, 12, 0)
        if isinstance(job, BranchJob):
            finish(study, job.cell, 1.5 + job.cell.steps)
        shown.ended(job, "done")
    shown.end()
    text = console.export_text(clear=True)
    assert f"{len(cells)} of {len(cells)} cells, 100% of training FLOPs" in text
    for cell in study.cells:
        assert f"{1.5 + cell.steps:.4f}" in text
        assert cell.trunk.label in text


def test_states_of_cells(tmp_path: Path) -> None:
    console = log()
    study, shown = make_study(tmp_path, toy_experiment(grid={"depths": [2]})), SweepView(console)
    (trunk,), cells = jobs_of(study)
    shown.begin(study, [trunk, *cells])
    shown.started(trunk)
    shown.progress(trunk, trunk.milestones[-1] // 2, 0)
    finish(study, cells[0].cell, 2.3456789)
    finish(study, cells[1].cell, None)
    shown.ended(cells[2], "failed")
    shown.end()
    (row,) = [line for line in console.export_text().splitlines() if "d2-s0" in line]
    assert row.split() == ["d2-s0", "50%", "2.3457", "diverged", "failed", "·"]


def test_time_left_is_of_the_work_that_is_left(tmp_path: Path, clock: Clock) -> None:
    """Half of the FLOPs in 20 seconds leave another 20, whichever jobs they were in."""
    console = log()
    study, shown = make_study(tmp_path, toy_experiment(grid={"depths": [2]})), SweepView(console)
    (trunk,), cells = jobs_of(study)
    flops = trunk.trunk.flops_per_image
    total = flops * (trunk.milestones[-1] + sum(job.cell.decay_images for job in cells))
    shown.begin(study, [trunk, *cells])
    shown.started(trunk)
    shown.progress(trunk, 0, 0)
    images = trunk.milestones[-1] // 8 * 4
    shown.progress(trunk, images, 0)
    clock.now += 20
    shown.refresh()
    share = flops * images / total
    assert f"{share:.0%} of training FLOPs, 20 s passed, {round(20 / share - 20)} s left" in console.export_text()


def test_time_left_of_a_sweep_that_goes_on(tmp_path: Path, clock: Clock) -> None:
    """What an earlier call did is no measure of this machine's speed."""
    console = log()
    study, shown = make_study(tmp_path, toy_experiment(grid={"depths": [2], "budgets": [6e7]})), SweepView(console)
    (trunk,), (cell,) = jobs_of(study)
    branch, end = cell.cell.branch_images, cell.cell.images
    shown.begin(study, [trunk, cell])
    shown.started(trunk)
    shown.progress(trunk, branch - 20, 0)  # from the last checkpoint
    clock.now += 20
    shown.progress(trunk, branch, 0)
    shown.refresh()
    assert f"20 s passed, {end - branch} s left" in console.export_text()


def test_time_left_counts_that_small_sizes_take_longer_for_a_flop(tmp_path: Path, clock: Clock) -> None:
    """Both sizes take as long for an image, whatever their FLOPs: the time left is the share of images left."""
    console = log()
    study, shown = make_study(tmp_path, toy_experiment(grid={"depths": [2, 3], "budgets": [6e7]})), SweepView(console)
    trunks, cells = jobs_of(study)
    total = sum(trunk.milestones[-1] for trunk in trunks) + sum(job.cell.decay_images for job in cells)
    shown.begin(study, [*trunks, *cells])
    for trunk in trunks:
        shown.started(trunk)
        shown.progress(trunk, 0, 0)
    clock.now += 10
    for trunk in trunks:
        shown.progress(trunk, 40, 0)
    shown.refresh()
    assert f"10 s passed, {round(10 * (total - 80) / 80)} s left" in console.export_text()


def test_trunks_that_are_done_are_no_work(tmp_path: Path) -> None:
    console = log()
    study, shown = make_study(tmp_path, toy_experiment(grid={"depths": [2], "budgets": [2e7]})), SweepView(console)
    (trunk,), (cell,) = jobs_of(study)
    trunk.files.folder.mkdir(parents=True)
    trunk.files.milestone(cell.cell.branch_images).touch()
    shown.begin(study, [job for job in (trunk, cell) if not job.done()])
    shown.started(cell)
    shown.progress(cell, (cell.cell.branch_images + cell.cell.images) // 2, 0)
    shown.end()
    text = console.export_text()
    assert "d2-s0   done" in text
    share = ((cell.cell.images - cell.cell.branch_images) // 2) / cell.cell.decay_images
    assert f"0 of 1 cells, {share:.0%} of training FLOPs" in text


def test_stages_say_how_long(clock: Clock) -> None:
    console = log()
    shown = SweepView(console)
    shown.stage("tokenizer", None, None)
    clock.now += 10
    shown.stage("tokenizer", 1_000, 5_000)
    clock.now += 20
    shown.stage("tokenizer", 2_000, 5_000)
    clock.now += 60
    shown.stage_done("tokenizer")
    lines = console.export_text().splitlines()
    assert lines == [
        "training the tokenizer … 0 s",
        "training the tokenizer: 2,000 of 5,000 images (40%, 1 min 00 s left)",
        "✓ training the tokenizer, 1 min 30 s",
    ]


def test_a_stage_that_failed_has_no_tick(clock: Clock, tmp_path: Path) -> None:
    console = log()
    shown, job = (
        SweepView(console),
        TokenizerJob(toy_experiment(), StudyPlace.of(make_study(tmp_path, toy_experiment()))),
    )
    shown.started(job)
    clock.now += 5
    shown.ended(job, "failed")
    assert "✗ training the tokenizer, 5 s" in console.export_text()


def test_evaluations_beside_training_are_counted(tmp_path: Path, clock: Clock) -> None:
    fidelity = {"samples": 100, "reference_images": 100}
    study, console = make_study(tmp_path, toy_experiment(evaluation={"fidelity": fidelity})), log()
    _, branches = jobs_of(study)
    evaluations = evaluation_jobs(study, all_of_them=True)
    shown = SweepView(console)
    shown.begin(study, [*branches, *evaluations])
    shown.started(branches[0])
    shown.started(evaluations[0])
    shown.ended(evaluations[0], "done")
    clock.now += 100
    shown.refresh()
    assert f"1 of {len(evaluations)} evaluations" in console.export_text()
    assert len(evaluations) == len(study.cells) + 2  # and two floors


def test_notes_are_shown_as_they_are() -> None:
    console, text = log(), "trunk failed ([enforce fail at file.cc] no [bold]space[/bold])"
    SweepView(console).note(text)
    assert console.export_text() == text + "\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3_599.6, "1 h 00 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert view._duration(seconds) == text
