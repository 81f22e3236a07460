"""Sampling from a finished cell's files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import cell_of_steps, files_of, ignore, little_experiment, make_inputs

from varscale.errors import CheckpointError, ExperimentError
from varscale.families.base import SamplingOptions
from varscale.families.storage import load_model
from varscale.generation.from_files import Drawable, draw
from varscale.generation.sampling import sample
from varscale.store.layout import RunFiles
from varscale.tokenizer.storage import load_tokenizer
from varscale.training.runs import record_divergence, train_cell


def test_a_picture_of_each_class(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "runs")
    cell = cell_of_steps(little_experiment(), 2)
    run = files_of(cell, inputs, tmp_path / "runs")
    train_cell(cell, None, run, inputs, ignore)

    out = tmp_path / "pictures" / "samples.png"
    for _ in range(2):  # the same again: only the seed decides
        draw(Drawable.load(run.folder), [2, 0], 3, SamplingOptions(seed=7), out)
        image_HW3 = np.asarray(Image.open(out)) / 255
    labels_B = torch.tensor([2, 2, 2, 0, 0, 0])
    expected = sample(load_model(run.weights), load_tokenizer(inputs.tokenizer.weights), labels_B, seed=7).images
    assert image_HW3.shape == (4 + 2 * 100, 4 + 3 * 100, 3)  # 8 px shown at 96, 4 px between
    shown_B = [
        image_HW3[row : row + 96 : 12, column : column + 96 : 12] for row in (4, 104) for column in (4, 104, 204)
    ]
    assert np.allclose(np.stack(shown_B), expected.permute(0, 2, 3, 1), atol=0.01)

    with pytest.raises(ValueError, match="label"):
        draw(Drawable.load(run.folder), [7], 1, SamplingOptions(), out)
    with pytest.raises(ExperimentError, match="no finished cell"):
        draw(Drawable.load(tmp_path), [0], 1, SamplingOptions(), out)
    diverged = RunFiles(run.folder.with_name("diverged-0"))
    record_divergence(cell, diverged, inputs, "the training loss is nan")
    with pytest.raises(ExperimentError, match="this cell diverged"):
        draw(Drawable.load(diverged.folder), [0], 1, SamplingOptions(), out)
    whole = run.weights.read_bytes()
    run.weights.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match=r"weights.safetensors: not a readable"):
        draw(Drawable.load(run.folder), [0], 1, SamplingOptions(), out)
    run.weights.write_bytes(whole)
    inputs.tokenizer.folder.rename(inputs.tokenizer.folder.with_name("rings-other"))
    with pytest.raises(ExperimentError, match="its tokenizer, tokenizer0, is not in this runs folder"):
        draw(Drawable.load(run.folder), [0], 1, SamplingOptions(), out)
