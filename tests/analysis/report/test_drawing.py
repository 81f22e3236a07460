"""Figures: nothing is cut off, and nothing stands over something else."""

import io
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from analysis.options import FitOptions
from analysis.pipeline import fit_laws
from analysis.report.drawing import log_axis
from analysis.report.figures import draw_all


def test_what_is_long_or_many_stays_inside_its_figure():
    """A legend of long formulas, a target of a long name, and more budgets than have room for their names."""
    name = "fid50k of guidance 1.5 by torch-fidelity against the reference set imagenet256"
    flops = np.geomspace(1e17, 1e20, 12)
    table = pd.DataFrame({"C": flops, name: 3.54321e-5 + 20 * (flops / 1e17) ** -0.3})
    result = fit_laws(table, FitOptions(flops="C", target=(name,), law=("power", "power-offset"), bootstrap_draws=100))
    for drawing in draw_all(result):
        pixels = np.asarray(Image.open(io.BytesIO(drawing.png)).convert("L"))
        edges = np.concatenate([pixels[:3].ravel(), pixels[-3:].ravel(), pixels[:, :3].ravel(), pixels[:, -3:].ravel()])
        assert edges.min() > 250, drawing.name  # nothing is cut off


@pytest.mark.parametrize("low", [1e-9, 1e-4, 1.0, 3e12])
def test_ticks_of_a_logarithmic_axis_stand_apart(low):
    """However many decades it has, as where a ratio of compute is not known within powers of ten."""
    for decades in (0.7, 1.4, 2, 4, 6, 8, 12):
        figure = Figure(figsize=(3.4, 1))
        axes = figure.subplots()
        axes.plot([low, low * 10**decades], [0, 1])
        log_axis(axes, "x")
        figure.draw_without_rendering()
        first, last = axes.get_xlim()
        boxes = [
            tick.label1.get_window_extent()
            for tick in axes.xaxis.get_major_ticks()
            if first <= tick.get_loc() <= last and tick.label1.get_text()
        ]
        assert len(boxes) >= 2, decades
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes)), decades
