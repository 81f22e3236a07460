"""What IsoFLOP minima miss without any noise: a grid simulated on the fitted surface.

Parabolas in log N are biased where the surface is asymmetric (α and β differ), where the grid is wide or off-centre,
and all the more where it drifts with compute (Czech et al. 2026, arXiv 2603.22339).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from analysis.fitting.fit import Fit
from analysis.fitting.laws.base import Array
from analysis.grids.allocation import Allocation, Best, GridBias
from analysis.grids.isoflop import Minimum, minimum
from analysis.grids.parametric import best_sizes

_VALUE = "value without noise"


def grid_bias(
    found: Sequence[Minimum], cells: pd.DataFrame, surface: Fit, rows: pd.DataFrame, declared: float | None
) -> GridBias | None:
    """The bias of a method on a grid; None where no budget has a minimum, or the cells have no tokens.

    Args:
        found: the method's minima of the real values.
        cells: of the grid.
        surface: the fitted law of N and D.
        rows: those it was fitted to.
        declared: k where C = k·N·D was declared.
    """
    if "tokens" not in cells.columns:
        return None
    values = surface.predict(cells["params"].to_numpy(dtype=float), cells["tokens"].to_numpy(dtype=float))
    exact = dict(iter(cells.assign(**{_VALUE: values}).sort_values("params").groupby("budget")))
    budgets, flops, sizes = [], [], []
    for each in found:
        bowl = exact[each.budget]
        if each.params is not None and (again := minimum(bowl, _VALUE, each.budget, each.method)).params is not None:
            budgets.append(each.budget)
            flops.append(float(np.exp(np.log(bowl["flops"]).mean())))
            sizes.append(again.params)
    if not budgets:
        return None
    misses = np.log(np.array(sizes) / best_sizes(surface, rows, np.array(flops), declared)[0])
    exponent = _slope(np.log(flops), misses) if len(budgets) > 2 else None
    return GridBias(surface.law.name, tuple(budgets), tuple(np.expm1(misses).tolist()), exponent)


def holding(allocation: Allocation, bias: GridBias | None) -> Allocation:
    """The allocation with its bias, and with intervals that reach as far as the surface's own answer would lie."""
    if bias is None or bias.exponent is None:
        return replace(allocation, bias=bias)
    logs, misses = np.log(bias.budgets), np.log1p(bias.sizes)

    def at(each: Best) -> Best:
        miss = misses.mean() + bias.exponent * (np.log(each.budget) - logs.mean())
        return replace(
            each,
            params_ci95=_times(each.params_ci95, miss),
            tokens_ci95=None if each.tokens_ci95 is None else _times(each.tokens_ci95, -miss),
        )

    return replace(
        allocation,
        bias=bias,
        params_ci95=_plus(allocation.params_ci95, -bias.exponent),
        tokens_ci95=_plus(allocation.tokens_ci95, bias.exponent),
        best=tuple(map(at, allocation.best)),
    )


def _plus(interval: tuple[float, float] | None, shift: float) -> tuple[float, float] | None:
    return None if interval is None else (interval[0] + min(shift, 0.0), interval[1] + max(shift, 0.0))


def _times(interval: tuple[float, float], miss: float) -> tuple[float, float]:
    """An interval of a value that was found e^miss times too large, reaching to what is right."""
    return interval[0] * float(np.exp(min(-miss, 0.0))), interval[1] * float(np.exp(max(-miss, 0.0)))


def bias_text(bias: GridBias) -> str:
    """The bias in words, such as `a by +0.012, best sizes by up to +8%`."""
    exponent = f"a by {bias.exponent:+.4f}, " if bias.exponent is not None else ""
    return f"{exponent}best sizes by up to {bias.worst_size:+.1%}"


def _slope(x: Array, y: Array) -> float:
    return float(np.polyfit(x - x.mean(), y, 1)[0])
