"""Sampling from a finished cell's files."""

from collections.abc import Sequence
from pathlib import Path

import torch

from varscale.generation.pictures import save_pictures
from varscale.generation.sampling import sample
from varscale.numerics.device import best_device
from varscale.store.layout import ExperimentFiles, RunFiles
from varscale.store.weights import load_var
from varscale.tokenizer.storage import load_tokenizer


def draw(
    run: Path, classes: Sequence[int], count: int, guidance: float, top_k: int, top_p: float, seed: int, out: Path
) -> None:
    """Sample `count` images of each class into one picture, a row a class.

    Raises:
        FileNotFoundError: the folder holds no finished cell.
        ValueError: the cell diverged, or a class or a sampling parameter is out of range.
    """
    files = RunFiles(run.resolve())
    row = (files.read_result() or {}).get("row")
    if row is None:
        raise FileNotFoundError(f"{run}: no finished cell (result.json is missing); `varscale status` lists them")
    if row["status"] != "finished":
        raise ValueError(f"{run}: this cell {row['status']}: it has no weights to sample from")
    experiment, device = ExperimentFiles.holding(files), best_device()
    tokenizer = load_tokenizer(experiment.tokenizer(row["tokenizer"]).tokenizer_checkpoint, row["tokenizer"]).to(device)
    var = load_var(files.weights, row["fingerprint"]).to(device)
    labels_B = torch.tensor(classes, device=device).repeat_interleave(count)
    drawn = sample(var, tokenizer, labels_B, cfg=guidance, top_k=top_k, top_p=top_p, seed=seed)
    save_pictures(drawn.images, out, count)
