"""What a worker process can be asked to do. Imported by workers; torch is imported when a job runs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varscale.config import Experiment
from varscale.store.layout import RunFiles, TokenFiles
from varscale.training.cells import Cell, Numerics, Trunk

if TYPE_CHECKING:
    from varscale.training.runs import Inputs

Report = Callable[[int, int], None]

FINAL_ERRORS = {"CheckpointError", "DataError", "TokenStoreError", "ValueError", "ExperimentError"}
"""Errors of a job that trying again would only repeat."""


@dataclass(frozen=True)
class TokenizerJob:
    """Train and measure the tokenizer."""

    experiment: Experiment
    files: RunFiles
    fingerprint: str
    threads: int

    def run(self, report: Report) -> None:
        """Do it."""
        from varscale.tokenizer.training import train_tokenizer

        _set_threads(self.threads)
        train_tokenizer(self.experiment, self.files, self.fingerprint, report)


@dataclass(frozen=True)
class TokensJob:
    """Encode the training and validation images."""

    experiment: Experiment
    tokenizer: RunFiles
    fingerprint: str
    files: TokenFiles
    train_images: int
    threads: int

    def run(self, report: Report) -> None:
        """Do it."""
        from varscale.tokenizer.training import encode_tokens

        _set_threads(self.threads)
        encode_tokens(self.experiment, self.tokenizer, self.fingerprint, self.files, self.train_images, report)


@dataclass(frozen=True)
class NumericsJob:
    """Choose precision and compilation by measurement."""

    trunks: tuple[tuple[Trunk, int], ...]
    threads: int
    tokenizer_threads: int
    workers_a_device: int

    def run(self, report: Report) -> tuple[Numerics, dict[str, float]]:
        """The choice, and the seconds that each way would take."""
        from varscale.training.execution import choose_numerics

        runtime = self.trunks[0][0].experiment.runtime
        return choose_numerics(self.trunks, runtime, self.threads, self.tokenizer_threads, self.workers_a_device)


@dataclass(frozen=True)
class PeakJob:
    """Measure the matrix-multiply peak of a worker."""

    numerics: Numerics

    def run(self, report: Report) -> float:
        """FLOPs a second."""
        from varscale.training.execution import measure_matmul_peak

        return measure_matmul_peak(self.numerics.precision, self.numerics.threads)


@dataclass(frozen=True)
class TrunkJob:
    """Train a trunk up to its last milestone."""

    trunk: Trunk
    milestones: tuple[int, ...]
    files: RunFiles
    inputs: "Inputs"

    def run(self, report: Report) -> None:
        """Do it."""
        from varscale.training.runs import train_trunk

        train_trunk(self.trunk, self.milestones, self.files, self.inputs, report)


@dataclass(frozen=True)
class CellJob:
    """Train a branch and measure it."""

    cell: Cell
    trunk: RunFiles | None
    files: RunFiles
    inputs: "Inputs"

    def run(self, report: Report) -> None:
        """Do it."""
        from varscale.training.runs import train_cell

        train_cell(self.cell, self.trunk, self.files, self.inputs, report)


Job = TokenizerJob | TokensJob | NumericsJob | PeakJob | TrunkJob | CellJob


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def log_file(job: Job) -> Path | None:
    """Where a job's output goes."""
    files: Any = getattr(job, "files", None)
    return files.log if files is not None else None
