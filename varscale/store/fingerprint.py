"""Identity: a fingerprint is a hash of what a paper would state about a run.

It covers the data, the tokenizer, the model, the optimisation, the schedule, the seed, the stated precision, the
version of the numerics and the fingerprints of the run's inputs. How a machine carried the run out (threads,
compilation, images at once, device, versions) changes rounding only: it is recorded in the result and is no part of a
fingerprint.
"""

import errno
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from varscale.config import Experiment
from varscale.errors import ExperimentError

NUMERICS_VERSION = 10
"""Raised when code changes results by more than rounding, or what checkpoints hold; part of every fingerprint."""


@dataclass(frozen=True)
class DataIdentity:
    """What the images of an experiment depend on, as JSON values for fingerprints."""

    training: dict[str, object]
    validation: dict[str, object]
    views: int = 1
    stored_images: int | None = None
    """Training images; None: they are procedural, as many as are needed. No part of a fingerprint."""
    summary: tuple[str, ...] = field(default=(), compare=False)
    """What a person should know of stored images before anything is trained, in lines."""
    captions: dict[str, object] = field(default_factory=dict)
    """What the embeddings of captions depend on; empty: none are stored."""


def fingerprint(**settings: Any) -> str:
    """A short hash of JSON values: the settings that change a run's results and the fingerprints of its inputs."""
    text = json.dumps({"numerics_version": NUMERICS_VERSION, **settings}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tokenizer_fingerprint(experiment: Experiment, data: DataIdentity) -> str:
    """Identity of the experiment's tokenizer: its settings and data, or the content of its checkpoint file.

    Raises:
        ExperimentError: A file that the settings name cannot be read.
    """
    settings = experiment.tokenizer
    if settings.checkpoint is not None:
        content = _content("tokenizer.checkpoint", settings.checkpoint)
        return fingerprint(kind="tokenizer", checkpoint=content, patch_nums=settings.patch_nums)
    described = settings.model_dump(
        mode="json", exclude={"accept": True, "encode_batch_size": True, "training": {"micro_batch"}}
    )
    backbone = settings.training.perceptual_weights_path
    if backbone is not None:  # what the file holds counts, not where it lies
        described["training"]["perceptual_weights_path"] = _content(
            "tokenizer.training.perceptual_weights_path", backbone
        )
    return fingerprint(kind="tokenizer", data=data.training, tokenizer=described)


def tokens_fingerprint(data: DataIdentity, tokenizer_fingerprint: str, *, latents: bool = False) -> str:
    """Identity of the stores of tokens, or of latents: the tokenizer's, and all images' with any captions."""
    images = {"data": data.training, "views": data.views, "validation": data.validation}
    images |= {"captions": data.captions} if data.captions else {}
    return fingerprint(kind="latents" if latents else "tokens", tokenizer=tokenizer_fingerprint, **images)


def file_digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        OSError: It can't be read, or isn't a file: a pipe would be waited for, a device has no end.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(key: str, path: str) -> str:
    """Hash of a file that a setting names."""
    try:
        return file_digest(Path(path))
    except OSError as error:
        raise ExperimentError(f"{key}: {path} cannot be read: {error.strerror}") from None
