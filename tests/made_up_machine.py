"""A machine of a stated speed in place of a calibration, and pictures to draft experiments for."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sweeps.devices import Paces
from sweeps.grid import grid_cells
from sweeps.pace import Pace
from varscale.config import Experiment
from varscale.tokenizer.shape import TokenizerShape

TOKENIZER_SPEED, MODEL_SPEED, PEAK = 2e10, 1e10, 1e11
"""FLOPs a second, however small the models are."""


def write_pictures(folder: Path, count: int, side: int = 40) -> Path:
    """Squares that fade from one colour into another, with two discs."""
    folder.mkdir(parents=True)
    for number in range(count):
        generator = np.random.default_rng(number)
        top_3, bottom_3 = generator.integers(0, 255, (2, 3))
        fade_hw3 = top_3 + (bottom_3 - top_3) * np.linspace(0, 1, side)[:, None, None] * np.ones((1, side, 1))
        picture = Image.fromarray(fade_hw3.astype(np.uint8))
        for x, y, radius, *colour in generator.integers(
            (0, 0, side // 8, 0, 0, 0), (side, side, side // 3, 255, 255, 255), (2, 6)
        ).tolist():
            ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(colour))
        picture.save(folder / f"{number}.png")
    return folder


def speeds(experiment: Experiment, *_: object) -> Paces:
    models, tokenizers = Pace(), Pace()
    size = TokenizerShape(experiment.tokenizer.architecture).training_flops()
    tokenizers.add(size, 1, size / TOKENIZER_SPEED)
    for cell in grid_cells(experiment):
        models.add(cell.trunk.flops_per_image, 1, cell.trunk.flops_per_image / MODEL_SPEED)
    return Paces(models, tokenizers, "made up")
