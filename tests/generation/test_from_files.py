"""Sampling from a finished cell's files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import cell_of_steps, ignore, little_experiment, make_inputs

from varscale.generation.from_files import draw
from varscale.generation.sampling import sample
from varscale.kernels.building import SWITCH
from varscale.store.layout import ExperimentFiles, RunFiles
from varscale.store.weights import load_var
from varscale.tokenizer.storage import load_tokenizer
from varscale.training.runs import record_divergence, train_cell


def test_a_picture_of_each_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")  # runs set it; put back afterwards
    inputs = make_inputs(tmp_path)
    files = ExperimentFiles(tmp_path / "runs", "small")
    kept = files.tokenizer("tokenizer-print").tokenizer_checkpoint
    kept.parent.mkdir(parents=True)
    kept.write_bytes(inputs.tokenizer.read_bytes())
    cell = cell_of_steps(little_experiment(), 2)
    run = files.cell(cell.name, "print")
    train_cell(cell, None, run, inputs, ignore)

    out = tmp_path / "pictures" / "samples.png"
    for _ in range(2):  # the same again: only the seed decides
        draw(run.folder, [2, 0], 3, 1.5, 0, 0.0, 7, out)
        image_HW3 = np.asarray(Image.open(out)) / 255
    expected = sample(load_var(run.weights), load_tokenizer(kept), torch.tensor([2, 2, 2, 0, 0, 0]), seed=7).images
    assert image_HW3.shape == (4 + 2 * 100, 4 + 3 * 100, 3)  # 8 px shown at 96, 4 px between
    shown_B = [
        image_HW3[row : row + 96 : 12, column : column + 96 : 12] for row in (4, 104) for column in (4, 104, 204)
    ]
    assert np.allclose(np.stack(shown_B), expected.permute(0, 2, 3, 1), atol=0.01)

    with pytest.raises(ValueError, match="label"):
        draw(run.folder, [7], 1, 1.5, 0, 0.0, 0, out)
    with pytest.raises(FileNotFoundError, match="no finished cell"):
        draw(tmp_path, [0], 1, 1.5, 0, 0.0, 0, out)
    diverged = RunFiles(files.root / "cells" / "diverged")
    record_divergence(cell, diverged, inputs, "the training loss is nan")
    with pytest.raises(ValueError, match="this cell diverged"):
        draw(diverged.folder, [0], 1, 1.5, 0, 0.0, 0, out)
