"""Measures a few real training steps of each size here, in the worker processes of a sweep side by side, in seconds."""

import itertools
import math
import statistics
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pydantic import FiniteFloat
from rich.console import Console
from rich.progress import Progress as ProgressBar

from sweeps.devices import Paces
from sweeps.executors.base import Listener
from sweeps.executors.local import LocalExecutor
from sweeps.jobs.base import Job, Resources, StudyPlace, set_threads
from sweeps.pace import Pace
from varscale.config import Experiment
from varscale.errors import SweepError
from varscale.numerics.machine import MachineShares, Share
from varscale.store.layout import RunFiles, RunKey, Store, TokenFiles
from varscale.store.records import Record
from varscale.training.cells import Cell, Trunk
from varscale.training.interruption import Report

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import LightningModule

_SECONDS = 1.5
"""Of each measurement, beyond its first step; one that has begun a step ends it."""
_PEAK_SECONDS = 0.5
"""A step gets no more images than this machine's peak would do in as many seconds, and is not tried where one image
takes more than six times as many: such sizes are estimated."""


class MeasuredSpeed(Record):
    """What a measurement came to."""

    size: int
    """Training FLOPs of an image."""
    seconds: FiniteFloat
    """For an image; 0: it would have taken too long."""


@dataclass(frozen=True)
class MeasuringJob(Job):
    """Takes some steps, and leaves a `MeasuredSpeed`."""

    number: int

    @property
    def key(self) -> str:
        """Its number."""
        return f"measurement {self.number}"

    @property
    def files(self) -> RunFiles:
        """In a temporary folder."""
        return self.place.store.run(RunKey("trunks", "measurement", str(self.number)))

    def done(self) -> bool:
        """Whether it was measured."""
        return self.files.result.exists()

    def write(self) -> Path:
        """It is not repeated."""
        self.files.folder.mkdir(parents=True, exist_ok=True)
        return self.files.job

    def run(self, share: Share, report: Report) -> None:
        """Do it."""
        set_threads(share)
        self.measure(share).write(self.files.result)

    @abstractmethod
    def measure(self, share: Share) -> MeasuredSpeed:
        """Take the steps."""


@dataclass(frozen=True)
class MeasuringTrunk(MeasuringJob):
    """Steps of one size."""

    trunk: Trunk
    compiled: bool

    @property
    def title(self) -> str:
        """For people."""
        return f"steps of {self.trunk.label}"

    def measure(self, share: Share) -> MeasuredSpeed:
        """Steps of an untrained model on random samples."""
        from varscale.families.models import random_batch
        from varscale.tokenizer.autoencoder import MultiScaleTokenizer
        from varscale.training.module import ModelModule

        trunk, model, optim = self.trunk, self.trunk.model, self.experiment.optim
        images = _images_of_a_step(trunk.flops_per_image, trunk.batch_size, optim.precision)
        if images == 0:
            return MeasuredSpeed(size=trunk.flops_per_image, seconds=0.0)
        module = ModelModule(
            model,
            optim.model_copy(update={"lr": 1e-9}),  # so that nothing can diverge
            MultiScaleTokenizer(self.experiment.tokenizer.architecture),
            compiled=self.compiled,
            images_at_once=min(images, trunk.images_at_once(share.memory_bytes())),
            log_every_steps=self.experiment.runtime.log_every_steps,
        )
        seconds = _seconds_of_an_image(module, random_batch(model, images), self.files, optim.precision)
        return MeasuredSpeed(size=trunk.flops_per_image, seconds=seconds)


@dataclass(frozen=True)
class MeasuringTokenizer(MeasuringJob):
    """Steps of the tokenizer: before images are quantized, since then, and since the adversarial term set in."""

    title = "steps of the tokenizer"
    resources = Resources(whole_machine=True)

    def measure(self, share: Share) -> MeasuredSpeed:
        """Steps of a tokenizer on random images, each part of its training weighted by its share."""
        import torch

        from varscale.tokenizer.module import TokenizerModule
        from varscale.tokenizer.shape import TokenizerShape
        from varscale.training.execution import check_memory

        settings, training = self.experiment.tokenizer, self.experiment.tokenizer.training
        shape = TokenizerShape(settings.architecture)
        size = shape.training_flops()
        images = _images_of_a_step(size, training.batch_size, "float32")
        if images == 0:
            return MeasuredSpeed(size=size, seconds=0.0)
        check_memory(shape.step_bytes(min(images, training.micro_batch or images)), "tokenizer.training.micro_batch")
        module = TokenizerModule(
            settings.architecture, training, log_every_steps=self.experiment.runtime.log_every_steps
        )
        batch = {"images_B3HW": torch.rand(images, 3, settings.image_size, settings.image_size) * 2 - 1}
        starts = {0.0, training.quantize_after, training.adversarial_start if training.adversarial_weight else 0.0}
        seconds = 0.0
        for start, end in itertools.pairwise([*sorted(starts), 1.0]):
            module.steps.fill_(math.ceil(start * training.steps))
            seconds += (end - start) * _seconds_of_an_image(module, batch, self.files, "float32")
        return MeasuredSpeed(size=size, seconds=seconds)


class CalibrationView(Listener):
    """Shows how far a calibration is, and about how long it still takes."""

    def __init__(self, console: Console, total: int) -> None:
        self._bar = ProgressBar(console=console, transient=True)
        self._task = self._bar.add_task("measuring steps of each size", total=total)

    def __enter__(self) -> "CalibrationView":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def ended(self, job: Job, state: str) -> None:
        """A measurement is over."""
        self._bar.advance(self._task)


def calibrate(experiment: Experiment, cells: Sequence[Cell], store: Store, console: Console) -> Paces:
    """Measure the tokenizer and each size that fits (imports torch).

    Raises:
        ExperimentError: The machine can't hold so many processes.
        SweepError: A measurement failed.
    """
    from varscale.training.execution import ExecutionRecord

    shares = MachineShares.of(experiment.runtime)
    shares.check()
    decided = ExecutionRecord.read(store.study(experiment.name).execution)
    usable = decided is not None and decided.allowed(experiment.runtime)
    compiled = decided.compiled if decided is not None and usable else experiment.runtime.compile == "on"
    sizes = {cell.trunk.flops_per_image: cell.trunk for cell in cells if cell.trunk.fits(shares.worker.memory_bytes())}
    with TemporaryDirectory(prefix="varscale-") as folder:
        temporary = Store(Path(folder))
        files = temporary.run(RunKey("tokenizers", "none", "0"))
        place = StudyPlace(temporary, temporary.study(experiment.name), files, TokenFiles(files.folder))
        jobs: list[MeasuringJob] = []
        if experiment.tokenizer.checkpoint is None:
            jobs.append(MeasuringTokenizer(experiment, place, 0))
        for _, trunk in sorted(sizes.items()):  # each beside itself: workers that train slow each other down
            jobs += [
                MeasuringTrunk(trunk.experiment, place, len(jobs) + copy, trunk, compiled)
                for copy in range(shares.workers)
            ]
        with LocalExecutor(shares) as executor, CalibrationView(console, len(jobs)) as view:
            graph = executor.run(jobs, view, retries=0)
        for job, reason in graph.failed:
            raise SweepError(f"--calibrate: {job.title}: {reason}")
        models, tokenizers = Pace(), Pace()
        for job in jobs:
            speed = MeasuredSpeed.read(job.files.result)
            if speed is not None and speed.seconds > 0:
                (tokenizers if isinstance(job, MeasuringTokenizer) else models).add(speed.size, 1, speed.seconds)
    how = f"{shares.workers} at once, {'compiled' if compiled else 'eager'}"
    return Paces(
        models, tokenizers, f"of a few steps of each size, measured now, {how}; ~ is estimated from these by FLOPs"
    )


def _images_of_a_step(flops_per_image: int, batch_size: int, precision: str) -> int:
    """As many as a step has, or as take a moment; 0: not even one."""
    from varscale.training.execution import measure_matmul_peak

    at_peak = _PEAK_SECONDS * measure_matmul_peak(precision) / flops_per_image
    return min(batch_size, max(int(at_peak), int(6 * at_peak >= 1)))


def _seconds_of_an_image(
    module: "LightningModule", batch: "dict[str, torch.Tensor]", files: RunFiles, precision: str
) -> float:
    """Of steps as a run takes them: the median, the first step left out."""
    from lightning.pytorch import Callback
    from torch.utils.data import IterableDataset

    from varscale.numerics.device import deterministic
    from varscale.training.trainer import Loader, make_trainer

    ends: list[float] = []

    class StepEnds(Callback):
        def on_train_batch_end(self, *_: object) -> None:
            ends.append(time.perf_counter())  # a step looks at its loss, so a GPU has done its work by then

    class RepeatedBatch(IterableDataset["dict[str, torch.Tensor]"]):
        def __iter__(self) -> "Iterator[dict[str, torch.Tensor]]":
            while len(ends) < 2 or ends[-1] < ends[0] + _SECONDS:
                yield batch

    images = len(next(iter(batch.values())))
    trainer = make_trainer(files, images, [StepEnds()], precision=precision)
    with deterministic():
        trainer.fit(module, Loader(RepeatedBatch()))
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(ends)) / images
