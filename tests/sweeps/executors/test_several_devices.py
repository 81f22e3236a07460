"""Runs on several devices, here two processes each: the numbers of one device, its files, and what may go wrong."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_sweep import Finished, toy_experiment, varscale, wait_for

from sweeps.executors.base import Graph
from sweeps.executors.here import HereExecutor
from sweeps.executors.local import LocalExecutor
from sweeps.feasible import check_machine
from sweeps.grid import grid_cells
from sweeps.jobs.graph import single_jobs, study_jobs
from sweeps.single import study_of_one
from sweeps.study import Study
from varscale.errors import ExperimentError
from varscale.numerics.machine import MachineShares, Share
from varscale.store.curves import read_curve
from varscale.store.layout import Store
from varscale.store.records import read_result

GRID = {"depths": [2, 3], "budgets": [2e7, 6e7]}  # whose smallest is that of the whole sweep: it sets the warm-up
TWO = {"ddp": {"devices": 2}, "fsdp2": {"devices": 2, "sharded": True}}
SHARES = MachineShares(2, 0, Share(1), Share(2))


class Heard:
    """A listener that keeps notes and ends."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.states: dict[str, str] = {}

    def started(self, job: Any) -> None: ...

    def progress(self, job: Any, done: int, total: int) -> None: ...

    def ended(self, job: Any, state: str) -> None:
        self.states[job.key] = state

    def note(self, text: str) -> None:
        self.notes.append(text)

    def refresh(self) -> None: ...


@pytest.fixture(scope="module")
def workers() -> Iterator[LocalExecutor]:
    executor = LocalExecutor(SHARES)
    yield executor
    executor.stop()


def copied(finished: Finished, folder: Path, *parts: str) -> Path:
    """A runs folder with parts of the sweep that one device carried out."""
    for part in ("tokenizers", "tokens", *parts):
        shutil.copytree(finished.runs / part, folder / part)
    return folder


def study_of(runs: Path, **sections: Any) -> Study:
    experiment = toy_experiment(**{"grid": GRID, **sections})
    return Study.of(experiment, Store(runs), grid_cells(experiment))


def sweep(workers: LocalExecutor, study: Study) -> tuple[Heard, Graph]:
    heard = Heard()
    return heard, workers.run(study_jobs(study, study.missing), heard, retries=1)


def losses(study: Study) -> list[float]:
    return [row["loss"] for row in study.rows()]


def losses_of_one(finished: Finished) -> list[float]:
    return losses(study_of(finished.runs))


@pytest.mark.parametrize("way", TWO)
def test_two_devices_reach_what_one_does(workers: LocalExecutor, finished: Finished, tmp_path: Path, way: str) -> None:
    """Trunks and branches; and one device goes on from the two's checkpoints."""
    study = study_of(copied(finished, tmp_path), resources=TWO[way])
    heard, graph = sweep(workers, study)
    assert graph.failed == []
    assert heard.notes == []
    assert losses(study) == pytest.approx(losses_of_one(finished), rel=1e-4)
    assert {row["devices"] for row in study.rows()} == {2}
    assert_same_curves(study, study_of(finished.runs))
    shutil.rmtree(tmp_path / "cells")
    alone = study_of(tmp_path)
    assert sweep(workers, alone)[1].failed == []
    assert losses(alone) == pytest.approx(losses_of_one(finished), rel=1e-4)
    assert {row["devices"] for row in alone.rows()} == {1}
    assert_same_curves(alone, study_of(finished.runs))


def assert_same_curves(study: Study, other: Study) -> None:
    points = 0
    for cell in study.cells:
        ours, theirs = (list(read_curve(each.cell_files(cell).metrics)) for each in (study, other))
        assert [point.images for point in ours] == [point.images for point in theirs]
        points += len(ours)
        for one, another in zip(ours, theirs, strict=True):
            for name in ("train_loss", "train_error", "gradient_norm", "lr"):
                assert one.metrics.get(name) == pytest.approx(another.metrics.get(name), rel=1e-3)
    assert points


@pytest.mark.parametrize("way", TWO)
def test_two_devices_go_on_from_one_devices_checkpoints(
    workers: LocalExecutor, finished: Finished, tmp_path: Path, way: str
) -> None:
    study = study_of(copied(finished, tmp_path, "trunks"), resources=TWO[way])
    heard, graph = sweep(workers, study)
    assert graph.failed == []
    assert not [key for key in heard.states if key.startswith("trunk")]
    assert losses(study) == pytest.approx(losses_of_one(finished), rel=1e-4)


def test_large_models_only(workers: LocalExecutor, finished: Finished, tmp_path: Path) -> None:
    """One study has runs on one device beside runs on two."""
    sizes = sorted({cell.trunk.model.parameters() for cell in study_of(tmp_path).cells})
    study = study_of(copied(finished, tmp_path), resources={"by_parameters": {float(sizes[1]): {"devices": 2}}})
    assert sweep(workers, study)[1].failed == []
    assert {(row["depth"], row["devices"]) for row in study.rows()} == {(2, 1), (3, 2)}
    assert losses(study) == pytest.approx(losses_of_one(finished), rel=1e-4)


def test_a_killed_process_ends_the_others_and_the_run_goes_on(
    workers: LocalExecutor, finished: Finished, tmp_path: Path
) -> None:
    study = study_of(copied(finished, tmp_path), resources=TWO["ddp"], grid={**GRID, "depths": [3]})
    cell = study.cells[-1]
    killed: list[int] = []

    def kill() -> None:
        wait_for(study.trunk_files(cell.trunk).last_checkpoint.exists, 120)
        killed.append(workers._workers[1].process.pid)
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    heard, graph = sweep(workers, study)
    thread.join()
    assert killed
    assert graph.failed == []
    assert any("trying again" in note for note in heard.notes)
    assert losses(study) == pytest.approx(losses_of_one(finished)[2:], rel=1e-4)


def test_all_end_together_where_the_training_diverges(
    workers: LocalExecutor, finished: Finished, tmp_path: Path
) -> None:
    study = study_of(
        copied(finished, tmp_path),
        resources=TWO["ddp"],
        grid={**GRID, "depths": [2]},
        optim={"lr": 1e25, "grad_clip": 1e30},
    )
    _, graph = sweep(workers, study)
    for cell in study.cells:
        result = read_result(study.cell_files(cell))
        assert result is not None
        assert result.status == "diverged"
        assert "is nan after" in result.reason or "is inf after" in result.reason
    assert graph.failed == []


def test_a_single_run_and_a_job_by_itself(finished: Finished, tmp_path: Path) -> None:
    runs = copied(finished, tmp_path / "runs")
    experiment = toy_experiment(resources={"devices": 2}, runtime={"workers": 2})
    study = study_of_one(experiment, Store(runs), (2, 2e7, 0))
    HereExecutor(SHARES).run(single_jobs(study), Heard())
    (loss,) = losses(study)
    assert loss == pytest.approx(losses_of_one(finished)[0], rel=1e-4)
    files = study.cell_files(study.cells[0])
    files.result.unlink()
    said = varscale("run-job", files.job, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert losses(study) == [loss]


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"devices": 3}, "resources.devices: 3 devices can't share optim.batch_size = 4 images evenly at depth 2"),
        ({"devices": 4}, r"resources.devices: .* takes 4, and there are 2 workers \(runtime.workers\) here"),
        ({"devices": 2, "nodes": 2}, "resources.nodes: 2 nodes for .*: only with --launcher slurm"),
    ],
)
def test_what_a_machine_has_not_is_said_before_anything_runs(
    tmp_path: Path, finished: Finished, resources: dict[str, int], expected: str
) -> None:
    study = study_of(copied(finished, tmp_path), resources=resources)
    with pytest.raises(ExperimentError, match=expected):
        check_machine(study, SHARES, study.missing)


def test_memory_and_images_of_a_device() -> None:
    """A sharded model's state is divided; each device has its share of a step's images."""
    (one, *_), (two, *_), (sharded, *_) = (
        grid_cells(toy_experiment(resources=resources)) for resources in ({}, TWO["ddp"], TWO["fsdp2"])
    )
    state = one.trunk.model.training_state_bytes()
    assert one.trunk.step_bytes(1) == two.trunk.step_bytes(1) == sharded.trunk.step_bytes(1) + state / 2
    assert [cell.trunk.images_at_once(1e12) for cell in (one, two, sharded)] == [4, 2, 2]
