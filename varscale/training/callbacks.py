"""Callbacks of every training run: checkpoints, schedule, divergence, throughput, progress."""

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from varscale.errors import Diverged
from varscale.training.interruption import STOP, Interrupted
from varscale.training.schedules import Schedule


class Checkpoints(Callback):
    """Saves `last.ckpt` at least every `seconds`, and a milestone after each of the given numbers of images.

    Files are written beside their place and renamed, so a reader or a killed process never leaves half a checkpoint.
    After a request to stop (`interruption`) it saves once more and raises `Interrupted`. What is due is decided by the
    first process of a run and shared, since all of them take part in saving.
    """

    def __init__(self, last: Path, seconds: float, milestones: Mapping[int, Path]) -> None:
        self._last = last
        self._seconds = seconds
        self._milestones = milestones
        self._saved = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning has installed its handlers of signals just now."""
        STOP.listen_on()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save what is due after the step before, whose metrics are written by now."""
        if stop := self._save_due(trainer, pl_module):
            raise Interrupted(f"{stop} was received")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what is due after the last step."""
        self._save_due(trainer, pl_module)

    def _save_due(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """The signal that asked to stop, or ""."""
        milestone, stop = self._milestones.get(pl_module.images_seen), STOP.signal
        reached = milestone is not None and not milestone.exists()
        due = bool(stop) or time.monotonic() - self._saved >= self._seconds
        if trainer.world_size > 1:
            reached, due, stop = trainer.strategy.broadcast((reached, due, stop))
        if milestone is not None and reached:
            _save(trainer, milestone)
        if due:
            _save(trainer, self._last)
            self._saved = time.monotonic()
        return stop


class ScheduleCallback(Callback):
    """Sets the learning rate of every step, and the weight decay of parameter groups marked `decays`, from images seen.

    `rate` and `decays` of a group are factors on them (`ParameterGroup`); checkpoints of earlier versions have no
    `rate`, and True for 1. Nothing else is kept in checkpoints.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Set the rates of the coming step."""
        images = pl_module.images_seen
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._schedule.lr(images) * group.get("rate", 1.0)
                if group.get("decays"):
                    group["weight_decay"] = self._schedule.decay(images) * group["decays"]


class ProgressCallback(Callback):
    """Tells a listener how far the run is, in images, a few times a second at most."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self._report = report
        self._told = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Report, unless just done."""
        if time.monotonic() - self._told > 0.3:
            self._told = time.monotonic()
            self._report(pl_module.images_seen)


class Throughput(Callback):
    """Images a second, the share of the measured matrix-multiply peak that uses, and the share of waiting for data.

    Logged for the steps since the last logged point; `figures` has them for the whole run, its first step (which may
    compile) left out.
    """

    def __init__(
        self,
        batch_size: int,
        every_steps: int,
        executed_flops_per_image: float,
        peak_flops: float,
        waited_seconds: Callable[[], float],
    ) -> None:
        """Count from the second step on, and log every so many steps.

        Utilisation is left out where its peak, FLOPs a second, is not a number. `waited_seconds` gives the time spent
        waiting for data so far.
        """
        self._batch_size = batch_size
        self._every = every_steps
        self._flops = executed_flops_per_image
        self._peak = peak_flops
        self._waited_seconds = waited_seconds
        self._last: tuple[float, float] | None = None
        self._window = _Window()
        self._whole = _Window()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log at every `every_steps`-th step."""
        before, self._last = self._last, (time.perf_counter(), self._waited_seconds())
        if before is None:
            return
        for window in (self._window, self._whole):
            window.images += self._batch_size
            window.seconds += self._last[0] - before[0]
            window.waited += self._last[1] - before[1]
        if pl_module.images_seen // self._batch_size % self._every == 0:
            pl_module.log_dict(self._of(self._window))
            self._window = _Window()

    @property
    def figures(self) -> dict[str, float]:
        """Over the whole run; empty where it had less than two steps."""
        return self._of(self._whole) if self._whole.images else {}

    def _of(self, window: "_Window") -> dict[str, float]:
        images_per_second = window.images / window.seconds
        figures = {"images_per_second": images_per_second, "data_wait_share": window.waited / window.seconds}
        if math.isfinite(self._peak):  # a single run may not have measured it
            figures["utilisation"] = images_per_second * self._flops / self._peak
        return figures


@dataclass
class _Window:
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0


def check_finite(number: torch.Tensor, images: int, name: str = "training loss") -> None:
    """Raise `Diverged` when a number, such as the loss, is not finite."""
    value = float(number.detach())
    if not math.isfinite(value):
        raise Diverged(f"the {name} is {value} after {images} images")


def _save(trainer: Trainer, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    trainer.save_checkpoint(temporary)
    if trainer.is_global_zero:
        if path.is_dir():  # no checkpoint of ours, and no file replaces a folder
            shutil.rmtree(path)
        temporary.replace(path)
    trainer.strategy.barrier()
