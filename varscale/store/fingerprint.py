"""Fingerprints of a tokenizer and of the tokens it makes, and the numerics that a study is held to. No torch."""

import hashlib
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from filelock import FileLock

from varscale.config import Experiment, RuntimeConfig
from varscale.errors import ExperimentError
from varscale.store.layout import ExperimentFiles, fingerprint, read_json, write_json
from varscale.training.cells import Numerics


@dataclass(frozen=True)
class DataIdentity:
    """What images depend on, JSON values for fingerprints."""

    training: dict[str, object]
    validation: dict[str, object]
    views: int = 1
    stored_images: int | None = None
    """Training images; None: procedural, as many as are needed. No part of a fingerprint."""


def tokenizer_fingerprint(experiment: Experiment, data: DataIdentity, threads: int) -> str:
    """Identity of the experiment's tokenizer: its settings and data, or its checkpoint file's content.

    Args:
        experiment: The settings.
        data: `data_identity` of its data.
        threads: CPU threads of the tokenizer's run.

    Raises:
        ExperimentError: a file that the settings name cannot be read.
    """
    settings = experiment.tokenizer
    if settings.checkpoint is not None:
        content = _content("tokenizer.checkpoint", settings.checkpoint)
        return fingerprint(kind="tokenizer", checkpoint=content, patch_nums=settings.patch_nums)
    described = settings.model_dump(mode="json", exclude={"encode_batch_size"})
    backbone = settings.training.perceptual_weights_path
    if backbone is not None:  # what the file holds counts, not where it lies
        described["training"]["perceptual_weights_path"] = _content(
            "tokenizer.training.perceptual_weights_path", backbone
        )
    return fingerprint(kind="tokenizer", data=data.training, tokenizer=described, threads=threads)


def tokens_fingerprint(experiment: Experiment, data: DataIdentity, tokenizer: str) -> str:
    """Identity of the token stores: the tokenizer's and the images', and how many are encoded at once (rounding)."""
    images = {"data": data.training, "views": data.views, "validation": data.validation}
    batch_size = experiment.tokenizer.encode_batch_size
    return fingerprint(kind="tokens", tokenizer=tokenizer, encode_batch_size=batch_size, **images)


def stored_numerics(files: ExperimentFiles) -> Numerics | None:
    """What earlier runs of the study decided; None: nothing, or nothing that can be read."""
    stored = read_json(files.numerics) or {}
    names = [field.name for field in fields(Numerics)]
    return Numerics(**{name: stored[name] for name in names}) if set(names) <= stored.keys() else None


def agrees(numerics: Numerics, runtime: RuntimeConfig) -> bool:
    """Whether an experiment's settings allow these numerics."""
    return (
        runtime.compile in ("auto", "on" if numerics.compiled else "off")
        and runtime.threads in (0, numerics.threads)
        and runtime.tokenizer_threads in (0, numerics.tokenizer_threads)
    )


def store_numerics(
    files: ExperimentFiles,
    runtime: RuntimeConfig,
    numerics: Numerics,
    measured_seconds: dict[str, float],
    *,
    replacing: bool = False,
) -> Numerics:
    """Hold all later runs of the study to this choice, or to that of a run that was quicker.

    Args:
        files: The study's files.
        runtime: Its settings; a choice that they don't allow is left to the runs that made it.
        numerics: The choice.
        measured_seconds: What was measured for each way, seconds of the sweep.
        replacing: Store it in the place of one that the settings don't allow.

    Returns:
        What the run must compute with.
    """
    files.root.mkdir(parents=True, exist_ok=True)
    with FileLock(files.numerics_lock):
        stored = stored_numerics(files)
        if stored is not None and agrees(stored, runtime):
            return stored
        if stored is None or replacing:
            write_json(files.numerics, {**asdict(numerics), "estimated_sweep_seconds": measured_seconds})
        return numerics


def processors() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _content(key: str, path: str) -> str:
    """Hash of a file that a setting names."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ExperimentError(f"{key}: {path} cannot be read: {error.strerror}") from None
