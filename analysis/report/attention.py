"""A heat map of the attention that scales pay to scales, by layer and head."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.report.drawing import Drawing, render

MOST_NUMBERS = 10
"""Scales up to which the mean's shares are written into its map."""


def attention_map(shares: pd.DataFrame) -> Drawing:
    """The mean over layers and heads, and below it a map of every head of every layer.

    Args:
        shares: Columns layer, head, scale (which pays attention), to_scale and share; all but the last count from 1.
    """
    counts = [int(shares[name].max()) for name in ("layer", "head", "scale", "to_scale")]
    ordered = shares.sort_values(["layer", "head", "scale", "to_scale"])
    shares_DHKK = ordered["share"].to_numpy(dtype=float).reshape(counts)
    layers, heads, scales, _ = counts
    mosaic = np.full((heads * (scales + 1) - 1, layers * (scales + 1) - 1), np.nan)
    for layer, head in np.ndindex(layers, heads):
        top, left = head * (scales + 1), layer * (scales + 1)
        mosaic[top : top + scales, left : left + scales] = shares_DHKK[layer, head]
    tall = min(2.0, max(0.4, heads / layers))

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, height_ratios=(1, tall))
        mean = shares_DHKK.mean((0, 1))
        image = above.imshow(mean, vmin=0, vmax=1, cmap="viridis")
        ticks = np.arange(scales)
        above.set_xticks(ticks, ticks + 1)
        above.set_yticks(ticks, ticks + 1)
        above.set(xlabel="to the tokens of scale", ylabel="from those of scale", title="all layers and heads")
        if scales <= MOST_NUMBERS:
            for row, column in np.ndindex(mean.shape):
                shade = "black" if mean[row, column] > 0.6 else "white"
                above.text(column, row, f"{mean[row, column]:.2f}", ha="center", va="center", color=shade, fontsize=4)
        below.imshow(mosaic, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        middle = (scales - 1) / 2
        for set_ticks, count in ((below.set_xticks, layers), (below.set_yticks, heads)):
            every = max(1, count // 10)
            set_ticks(middle + (scales + 1) * np.arange(0, count, every), np.arange(1, count + 1, every))
        below.set(xlabel="layer", ylabel="head", title="each layer and head")
        for axes in (above, below):
            axes.grid(visible=False)
        figure.colorbar(image, ax=[above, below], label="share of attention", location="bottom", aspect=40)

    return render("attention", "The share of attention that each scale pays to each scale.", draw, 3.2 + 2.6 * tall)
