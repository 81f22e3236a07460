"""Drawing images from a finished cell's files."""

import glob
from collections.abc import Sequence
from pathlib import Path

import torch

from varscale.errors import ExperimentError
from varscale.families.base import SamplingOptions
from varscale.families.storage import load_model
from varscale.generation.pictures import save_pictures
from varscale.generation.sampling import sample
from varscale.numerics.device import best_device
from varscale.store.layout import RunFiles
from varscale.store.records import read_result
from varscale.tokenizer.storage import load_tokenizer


def draw(run: Path, classes: Sequence[int], count: int, options: SamplingOptions, out: Path) -> None:
    """Draw `count` images of each class into one picture, a row a class.

    Raises:
        ExperimentError: The folder holds no finished cell, or the cell diverged.
        CheckpointError: Weights are missing or damaged.
        ValueError: A class is out of range.
    """
    files, device = RunFiles(run.resolve()), best_device()
    result = read_result(files)
    if result is None or not result.row:
        raise ExperimentError(f"{run}: no finished cell (result.json); `varscale status` lists them")
    if result.status != "finished":
        raise ExperimentError(f"{run}: this cell {result.status}: it has no weights to draw images from")
    fingerprint = str(result.row["tokenizer_fingerprint"])
    folders = files.folder.parent.with_name("tokenizers").glob(f"*-{glob.escape(fingerprint)}")
    tokenizer_files = next(map(RunFiles, folders), None)
    if tokenizer_files is None:
        raise ExperimentError(f"{run}: its tokenizer, {fingerprint}, is not in this runs folder")
    tokenizer = load_tokenizer(tokenizer_files.weights, fingerprint).to(device)
    model = load_model(files.weights, files.fingerprint).to(device)
    labels_B = torch.tensor(classes, device=device).repeat_interleave(count)
    drawn = sample(model, tokenizer, labels_B, options.guidance, options.top_k, options.top_p, options.seed)
    save_pictures(drawn.images, out, count)
