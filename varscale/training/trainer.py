"""Lightning trainers as every run of varscale uses them."""

import logging
import os
import shutil
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import TorchCheckpointIO
from torch.utils.data import DataLoader, IterableDataset

from varscale.data.loading import Batch
from varscale.store.layout import RunFiles
from varscale.training.distributed import ALONE, Team
from varscale.training.metrics_file import MetricsFile

FINGERPRINT_KEY = "varscale_fingerprint"

_log = logging.getLogger(__name__)

_EXPECTED_WARNINGS = (
    "You defined a `validation_step` but have no `val_dataloader`",  # evaluated once, after training
    ".*does not have many workers",  # batches come from memory-mapped tokens or loader threads
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    ".*Your `IterableDataset` has `__len__` defined",
)


def make_trainer(
    files: RunFiles, batch_size: int, callbacks: Sequence[Callback], *, precision: str, team: Team = ALONE
) -> Trainer:
    """A trainer that logs to the run's metrics file and leaves checkpoints to our callbacks.

    A step takes `batch_size` images on all devices together; `precision` is that of matrix products.
    """
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    return Trainer(
        accelerator="auto",
        devices=1,
        num_nodes=team.peers.count,  # each process sees its own device only, as on a node of its own
        strategy=team.strategy(),
        use_distributed_sampler=False,
        max_epochs=1,  # the data ends where the run ends
        max_steps=-1,
        precision="bf16-mixed" if precision == "bfloat16" else "32-true",
        logger=MetricsFile(files.metrics, batch_size),
        callbacks=list(callbacks),
        plugins=[team.environment(), DirectCheckpoints()],
        log_every_n_steps=1,  # the modules choose which steps they log
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


class DirectCheckpoints(TorchCheckpointIO):
    """Writes to the file itself: Lightning's own goes whole through memory and the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the file through to the disk; a half-written one is its caller's to replace."""
        with Path(path).open("wb") as file:  # torch's own writer does not say why it fails
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # PyTorch ends the file even where it could not be written, and fails again
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())


class Continuation(Callback):
    """Signs checkpoints with the run's fingerprint, and makes a run that goes on from one count from zero.

    Lightning would restore its count of batches within the epoch, and skip as many; our batches begin at the
    checkpoint's step, and a branch's would all be skipped. How many steps were taken is the modules' buffer `steps`.
    """

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sign the checkpoint."""
        checkpoint[FINGERPRINT_KEY] = self._fingerprint

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Forget Lightning's progress."""
        checkpoint.pop("loops", None)


def usable_checkpoint(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """A checkpoint of the run with this fingerprint, its tensors mapped from the file.

    None where there is no such file or, with a warning that names it, where it can't be used: torn, damaged (its
    checksums are compared) or written by a run of other settings. The run is then made anew from what lies before it.
    """
    if not path.exists():
        return None
    try:
        if path.is_dir():
            raise ValueError("it is a folder")
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # loading alone does not compare checksums
        if damaged is not None:
            raise ValueError(f"its part {damaged} is damaged")
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = checkpoint[FINGERPRINT_KEY]
        if found != fingerprint:
            raise ValueError(f"it was written by another run, {found}")
        int(checkpoint["state_dict"]["steps"])
    except Exception as error:  # bytes at random make torch and zipfile raise anything: KeyError, NotImplementedError
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        _log.warning("%s: not a usable checkpoint (%s); the run is made anew from what lies before it", path, reason)
        return None
    return checkpoint


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint that is not needed any more, and whatever else may lie in its place."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


class Loader(DataLoader[Batch]):
    """Batches as they come, made in the training process (they are lookups), and how long a run waited for them.

    Attributes:
        seconds: Spent in all calls for the next batch so far, PyTorch's part included.
    """

    def __init__(self, batches: IterableDataset[Batch]) -> None:
        super().__init__(batches, batch_size=None)
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator is as good as PyTorch's iterator
        started = time.perf_counter()
        for batch in super().__iter__():
            self.seconds += time.perf_counter() - started
            yield batch
            started = time.perf_counter()
