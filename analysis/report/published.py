"""VAR's published laws beside ours."""

import numpy as np
from matplotlib.figure import Figure

from analysis.report.drawing import BLUE, INK, VERMILION, Drawing, legend_below, log_axis, render
from analysis.results import LawsResult

# Tian et al. 2024, figure 5: reducible loss = cross-entropy minus the authors' entropy, N in billions (all parameters).
VAR_PUBLISHED = {"all scales, loss - 5.0": (2.5, 0.20), "last scale, loss - 4.5": (2.0, 0.23)}


def published(result: LawsResult) -> list[Drawing]:
    """Our reducible loss beside VAR's published laws, on total parameters; empty without a fitted or pinned offset."""
    target = result.table.targets[0]
    surface = result.find("chinchilla", target) or result.find("power-offset", target)
    rows = next((entry.rows for entry in result.fits if entry.target == target and entry.x == "params"), None)
    if surface is None or rows is None:
        return []
    offset = surface.fitted.parameters["E"]
    reducible = rows[target].to_numpy(dtype=float) - offset

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        usable = reducible > 0
        values = rows["params"].to_numpy(dtype=float)
        axes.plot(values[usable], reducible[usable], "o-", color=BLUE, label=f"here, loss - {offset:.3g}")
        reach = np.geomspace(1.8e7, 2e9, 30)
        for (text, (scale, exponent)), colour in zip(VAR_PUBLISHED.items(), (INK, VERMILION), strict=True):
            axes.plot(reach, (scale * reach / 1e9) ** -exponent, "--", color=colour, label=f"VAR, {text}")
        log_axis(axes, "x", counts=True)
        log_axis(axes, "y")
        axes.set(xlabel="parameters (all)", ylabel="reducible loss (nats a token)")
        legend_below(figure, axes, columns=2)

    caption = (
        "Reducible loss against all parameters: VAR's published laws (other data and tokenizer; the offsets are the "
        f"authors') and the runs here, with the offset {offset:.4g} of {surface.name}."
    )
    return [render("published", caption, draw, height=2.9)]
