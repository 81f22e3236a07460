"""Checkpoints, rates, throughput and divergence, each with the least of a trainer."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from varscale.errors import Diverged
from varscale.training.callbacks import Checkpoints, ProgressCallback, ScheduleCallback, Throughput, check_finite
from varscale.training.schedules import Schedule
from varscale.training.trainer import Loader


class Module:
    """What callbacks know of a module."""

    def __init__(self) -> None:
        self.images_seen = 0
        self.logged: list[dict[str, float]] = []

    def log_dict(self, values: dict[str, float]) -> None:
        self.logged.append(values)


class Saving:
    """A trainer that only saves."""

    world_size = 1
    is_global_zero = True

    def __init__(self) -> None:
        self.saved: list[Path] = []
        self.strategy = SimpleNamespace(barrier=lambda: None)

    def save_checkpoint(self, path: Path) -> None:
        self.saved.append(path)
        path.write_text("weights")


def test_milestones_once_and_last_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    last, milestone = tmp_path / "last.ckpt", tmp_path / "run" / "images-24.ckpt"
    checkpoints, trainer, module = Checkpoints(last, 10.0, {24: milestone}), Saving(), Module()
    for step in range(1, 6):
        clock[0], module.images_seen = 4.0 * step, 8 * step
        checkpoints.on_train_batch_start(trainer, module)
        assert milestone.exists() == (step >= 3)
        assert last.exists() == (step >= 3)  # 12 seconds
    assert len(trainer.saved) == 2
    assert all(path.name.startswith(".") and not path.exists() for path in trainer.saved)  # written aside, renamed
    again = Checkpoints(last, 1e9, {24: milestone})
    module.images_seen = 24
    again.on_train_batch_start(trainer, module)
    assert len(trainer.saved) == 2  # the milestone is there
    Checkpoints(last, 1e9, {24: tmp_path / "end.ckpt"}).on_train_end(trainer, module)
    assert (tmp_path / "end.ckpt").exists()


def test_folders_of_sharded_checkpoints_are_replaced(tmp_path: Path) -> None:
    class SavingFolders(Saving):
        def save_checkpoint(self, path: Path) -> None:
            path.mkdir()
            (path / f"shard-{len(self.saved)}").touch()
            self.saved.append(path)

    trainer, checkpoints = SavingFolders(), Checkpoints(tmp_path / "last.ckpt", -1.0, {})
    for _ in range(3):
        checkpoints.on_train_batch_start(trainer, Module())
    assert [path.name for path in tmp_path.rglob("*")] == ["last.ckpt", "shard-2"]


def test_rates_are_set_from_images_seen() -> None:
    """A decay that begins at 0 grows too."""
    schedule = Schedule("linear", 1.0, 10, 0, 1000, final_ratio=0.1, weight_decay=0.0, final_weight_decay=0.08)
    matrix, bias = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    groups = [{"params": [matrix], "decays": True}, {"params": [bias], "decays": False}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    module = Module()
    for images in (0, 500, 990):
        module.images_seen = images
        trainer: Any = SimpleNamespace(optimizers=[optimizer])
        ScheduleCallback(schedule).on_train_batch_start(trainer, module)
        decayed, plain = optimizer.param_groups
        assert decayed["lr"] == plain["lr"] == schedule.lr(images)
        assert decayed["weight_decay"] == schedule.decay(images)
        assert plain["weight_decay"] == 0


def test_factors_of_groups_are_on_what_the_schedule_says() -> None:
    """A group as a checkpoint of an earlier version has it has no `rate`, and `decays: True`."""
    tensors = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": tensors[:1], "rate": 0.25, "decays": 4.0}, {"params": tensors[1:], "decays": True}]
    optimizer = torch.optim.AdamW(groups)
    trainer: Any = SimpleNamespace(optimizers=[optimizer])
    ScheduleCallback(Schedule("wsd", 1e-2, 10, weight_decay=0.05)).on_train_batch_start(trainer, Module())
    found = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [(0.25e-2, 0.2), (1e-2, 0.05)]


def test_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 8 images: 3 s of work after 1 s of waiting, logged every 2 steps."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    waited = [0.0]
    throughput, module = Throughput(8, 2, 10.0, 100.0, lambda: waited[0]), Module()
    trainer: Any = None
    assert throughput.figures == {}
    for step in range(6):
        waited[0] += 1 if step else 100
        clock[0] += 4 if step else 103
        module.images_seen += 8
        throughput.on_train_batch_end(trainer, module)
    assert len(module.logged) == 3
    for logged in (*module.logged, throughput.figures):  # the first step is left out: it may compile
        assert logged["images_per_second"] == pytest.approx(2)
        assert logged["utilisation"] == pytest.approx(2 * 10 / 100)
        assert logged["data_wait_share"] == pytest.approx(0.25)


def test_without_a_measured_peak_there_is_no_utilisation() -> None:
    """A number that is none would make the run's result unreadable."""
    throughput, module = Throughput(8, 1, 10.0, math.nan, lambda: 0.0), Module()
    trainer: Any = None
    for _ in range(2):
        module.images_seen += 8
        throughput.on_train_batch_end(trainer, module)
    assert throughput.figures.keys() == module.logged[0].keys() == {"images_per_second", "data_wait_share"}


def test_waiting_is_all_of_a_loaders_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch does with a batch counts, what is done with it afterwards doesn't."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class Batches(IterableDataset[dict[str, torch.Tensor]]):
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            for number in range(4):
                clock[0] += 2
                yield {"number": torch.tensor(number)}

    loader = Loader(Batches())
    convert = loader.collate_fn
    monkeypatch.setattr(loader, "collate_fn", lambda batch: (clock.__setitem__(0, clock[0] + 1), convert(batch))[1])
    for batch in loader:
        clock[0] += 10
        assert loader.seconds == 3 * (int(batch["number"]) + 1)


def test_progress_is_told_a_few_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told, module = [100.0], list[int](), Module()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = ProgressCallback(told.append)
    for _ in range(10):
        clock[0] += 0.1
        module.images_seen += 1
        progress.on_train_batch_end(None, module)
    assert 2 <= len(told) <= 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_divergence(value: float) -> None:
    check_finite(torch.tensor(3.0), 8)
    with pytest.raises(Diverged, match="after 8 images"):
        check_finite(torch.tensor(value), 8)
