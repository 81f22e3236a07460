"""What a machine can't hold, or not get done in a year, is refused before anything runs; all else is let through."""

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_sweep import toy_experiment

from sweeps import feasible
from sweeps.feasible import YEAR_SECONDS, check_evaluations, check_machine
from sweeps.grid import grid_cells
from sweeps.study import Study
from varscale.config import Experiment, RuntimeConfig
from varscale.config.yaml import changed, load_experiment
from varscale.errors import ExperimentError
from varscale.numerics import machine
from varscale.numerics.machine import MachineShares
from varscale.store.layout import Store
from varscale.tokenizer.shape import TokenizerShape


@pytest.fixture(autouse=True)
def _two_processors_and_16_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "machine_bytes", lambda: 16.0 * 2**30)
    for module in (machine, feasible):
        monkeypatch.setattr(module, "processors", lambda: 2)


def check(experiment: Experiment, folder: Path) -> None:
    study = Study.of(experiment, Store(folder), grid_cells(experiment))
    check_machine(study, MachineShares.of(experiment.runtime), study.missing)


def test_what_is_shipped_and_what_is_small_is_let_through(tmp_path: Path) -> None:
    check(toy_experiment(), tmp_path)
    check(load_experiment("rings"), tmp_path)


FIDELITY = {"evaluation.fidelity": {"samples": 2**24, "batch_size": 2**24}}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"runtime.workers": 4096}, r"runtime\.workers \(--workers\): 4096 processes .* expected at most 64"),
        ({"runtime.threads": 4096}, r"runtime\.threads: 4096, but this machine has 2 processors"),
        ({"runtime.tokenizer_threads": 4096}, r"runtime\.tokenizer_threads: 4096"),
        ({"tokenizer.base_channels": 2**14}, r"tokenizer\.training\.micro_batch: .*16\.0 GiB here"),
        ({"tokenizer.training.batch_size": 2**24}, r"tokenizer\.training\.micro_batch"),
        (
            {"tokenizer.vocab_size": 2**24, "tokenizer.latent_channels": 2**10, "grid.budgets": [1e13]},
            r"grid\.depths: for a step of one image",
        ),
        (
            {"model.width_per_depth": 4096, "grid.depths": [23], "grid.budgets": [1e18]},
            r"grid\.depths: .*depth 23 needs",
        ),
        ({"runtime.micro_batch": 2**24, "optim.batch_size": 2**24, "grid.budgets": [1e18]}, r"runtime\.micro_batch"),
        (
            {"evaluation.batch_size": 2**24, "data.validation_images": 2**24},
            r"evaluation\.batch_size: this takes at least 21\.0 GiB at once",
        ),
        (
            {"evaluation.samples_per_class": 2**16, "evaluation.sample_classes": 2**24}
            | {"data.max_rings": 1024, "data.num_classes": 1024},
            r"evaluation\.samples_per_class",
        ),
        (FIDELITY, r"evaluation\.fidelity\.batch_size"),
        ({"grid.budgets": [1e30]}, r"grid\.budgets: this takes at least 2\.61e\+13 years here"),
        (
            {"tokenizer.training.images": 2**40, "tokenizer.base_channels": 256},
            r"tokenizer\.training\.images: this takes at least \d+ years",
        ),
        ({"tokenizer.training.images": 1e12}, r"tokenizer\.training\.images: this takes at least 3\.96 years"),
        ({"data.validation_images": 2**40, "tokenizer.base_channels": 256}, r"data\.validation_images: .* years"),
    ],
    ids=str,
)
def test_what_can_not_be_is_refused(settings: dict[str, Any], key: str, tmp_path: Path) -> None:
    experiment = changed(toy_experiment(), settings, "a test")
    with pytest.raises(ExperimentError, match=key) as caught:
        check(experiment, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_year_is_let_through_and_two_are_not(tmp_path: Path) -> None:
    """Of one size: its images are encoded and trained on, at 2 · 4e11 FLOPs a second."""

    def study(budget: float) -> Experiment:
        return toy_experiment(optim={"batch_size": 2**16}, grid={"depths": [2], "budgets": [budget]})

    (cell,) = grid_cells(study(1e15))
    encoded = TokenizerShape(toy_experiment().tokenizer.architecture).encode_flops()
    flops_of_image = cell.trunk.model.executed_training_flops() + encoded
    budget = 2 * 4e11 * YEAR_SECONDS / flops_of_image * cell.trunk.flops_per_image
    check(study(0.99 * budget), tmp_path)
    with pytest.raises(ExperimentError, match=r"grid\.budgets: this takes at least 2 years"):
        check(study(2 * budget), tmp_path)


def test_evaluations_by_themselves(tmp_path: Path) -> None:
    """Of cells that are trained, however long that took."""
    experiment = changed(toy_experiment(grid={"budgets": [1e29]}), {"evaluation.fidelity": {}}, "a test")
    drawn = [(cell, 0.0) for cell in grid_cells(experiment)]
    shares = MachineShares.of(RuntimeConfig())
    check_evaluations(experiment, drawn, shares)
    many = changed(experiment, FIDELITY, "a test")
    with pytest.raises(ExperimentError, match=r"evaluation\.fidelity\.batch_size"):
        check_evaluations(many, drawn, shares)


def test_processes_on_gpus_are_held_by_these(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.Share, "memory_bytes", lambda _: 8.0 * 2**30)
    MachineShares.of(RuntimeConfig(workers=32)).check()
    MachineShares(64, 2, machine.Share(), machine.Share()).check()
    with pytest.raises(ExperimentError, match=r"128 processes take at least 32\.0 GiB, and there are 16\.0 GiB"):
        MachineShares(128, 2, machine.Share(), machine.Share()).check()
