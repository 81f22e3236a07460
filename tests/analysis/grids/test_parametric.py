"""The best size by a law of N and D, held against the likelihood of laws whose best size is another one."""

import numpy as np
import pytest
from planted_tables import chinchilla_table
from scipy.optimize import least_squares

from analysis.fitting.bootstrap import resample
from analysis.fitting.fit import fit
from analysis.fitting.intervals import from_draws, t_quantile
from analysis.grids.parametric import from_law


def squares(rows, budget, params, start):
    """Least sum of squared log residuals of E + A·N^-α + B·D^-β among laws whose best size at a budget is given."""
    logs_n, logs_d = np.log(rows["params"] / params), np.log(rows["tokens"] / (budget / 6 / params))

    def residuals(theta):
        offset, alpha, beta, height = theta
        slopes = np.exp(height)  # α·A·N^-α = β·B·D^-β at the best size
        curve = offset + slopes / alpha * np.exp(-alpha * logs_n) + slopes / beta * np.exp(-beta * logs_d)
        return np.log(curve / rows["loss"])

    bounds = [0.0, 0.01, 0.01, -20.0], [rows["loss"].min(), 2.0, 2.0, 5.0]
    return 2 * least_squares(residuals, start, bounds=bounds, x_scale=[0.1, 0.03, 0.03, 0.1]).cost


@pytest.mark.parametrize("seed", [0, 3])
def test_intervals_end_where_the_likelihood_ratio_does(seed):
    """Draws of all offsets alike had ends at 0.86 to 1.2 times that height, and lay too high or too low."""
    rows = chinchilla_table(sizes=5, budgets=5, noise=0.01, seed=seed)
    rows = rows.rename(columns={"N": "params", "C": "flops", "D": "tokens"})
    fitted = fit("chinchilla", (rows["params"].to_numpy(), rows["tokens"].to_numpy()), rows["loss"].to_numpy())
    uncertainty = from_draws(fitted, resample(fitted, 400, 0))
    degrees = len(rows) - 5
    for best in from_law(fitted, uncertainty, rows, (1e21, 1e22), declared=6.0).best:
        start = [fitted.parameters[name] for name in ("E", "alpha", "beta")] + [-2.0]
        among = np.geomspace(*best.params_ci95, 9)
        squares_M = np.array([squares(rows, best.budget, each, start) for each in among])
        heights = (squares_M[[0, -1]] / squares_M.min() - 1) / (t_quantile(degrees) ** 2 / degrees)
        assert heights == pytest.approx([1.0, 1.0], abs=0.1)
        assert best.tokens_ci95 == pytest.approx([best.budget / 6 / each for each in best.params_ci95[::-1]])
