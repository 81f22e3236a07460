"""Figures of one fit: its surface, residuals, draws, and the budgets predicted from smaller ones."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.grids.parametric import best_sizes
from analysis.report.drawing import (
    BLUE,
    INK,
    VERMILION,
    Drawing,
    label,
    legend_below,
    log_axis,
    named,
    points,
    power_of_ten,
    render,
    run_names,
    sentence,
)
from analysis.results import FitEntry, LawsResult

MOST_TICKS = 5
"""Budgets that have room side by side."""


def contour(result: LawsResult, entry: FitEntry, name: str) -> Drawing:
    """The parametric surface over N and D, the runs, and the best size for each budget."""
    rows = entry.rows
    many = len(rows) > 2000

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        params, tokens = (np.geomspace(rows[each].min() / 1.5, rows[each].max() * 1.5, 90) for each in entry.inputs)
        mesh_params, mesh_tokens = np.meshgrid(params, tokens)
        surface = entry.fitted.predict(mesh_params.ravel(), mesh_tokens.ravel()).reshape(mesh_params.shape)
        shading = axes.contourf(params, tokens, surface, levels=14, cmap="viridis")
        bar = figure.colorbar(shading, ax=axes, pad=0.02)
        bar.set_label(label(result.table, entry.target))
        runs = axes.plot(
            *(rows["params"], rows["tokens"], "o"),
            color="white",
            mec=INK,
            mew=0.2 if many else 0.5,
            ms=1.5 if many else 3.2,
            label="runs",
            rasterized=many,
        )
        named(runs, run_names(result.table, rows))
        if "flops" in rows.columns:
            budgets = np.geomspace(rows["flops"].min() / 10, rows["flops"].max() * 10, 40)
            best_params, best_tokens = best_sizes(entry.fitted, rows, budgets, result.options.tokens_from_flops)
            inside = (best_params > params[0]) & (best_params < params[-1])
            inside &= (best_tokens > tokens[0]) & (best_tokens < tokens[-1])
            if inside.sum() > 1:
                places = best_params[inside], best_tokens[inside]
                axes.plot(*places, color=VERMILION, lw=1.6, label="best size for a budget")
        log_axis(axes, "x", counts=True)
        log_axis(axes, "y", counts=True)
        axes.set(xlabel=label(result.table, "params"), ylabel=label(result.table, "tokens"))
        axes.grid(visible=False)
        legend_below(figure, axes)

    caption = (
        f"The surface of {entry.fitted.law.name} over {label(result.table, 'params')} and "
        f"{label(result.table, 'tokens')}, with the runs and the best size for each budget."
    )
    return render(name, caption, draw, height=3.0)


def residuals(result: LawsResult, entry: FitEntry, name: str) -> Drawing:
    """Relative residuals of a law against size and compute."""
    wanted = ("params", "flops") if len(entry.inputs) > 1 else (entry.x,)
    places = [each for each in wanted if each in entry.rows.columns] or list(entry.inputs)

    def draw(figure: Figure) -> None:
        axes_row = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
        values = entry.fitted.predict(*(entry.rows[each].to_numpy(dtype=float) for each in entry.inputs))
        percent = 100 * (entry.fitted.y_n / values - 1)
        for axes, place in zip(axes_row, places, strict=True):
            axes.axhline(0, color=INK, lw=0.6)
            points(axes, entry.rows[place].to_numpy(dtype=float), percent, "", run_names(result.table, entry.rows))
            log_axis(axes, "x", counts=place == "params")
            axes.set(xlabel=label(result.table, place).split(" (")[0])
        axes_row[0].set(ylabel="residual (%)")

    return render(name, f"Residuals of {entry.name}: observed over fitted, minus one.", draw, height=2.1)


def holdout(result: LawsResult, key: str, target: str, name: str) -> Drawing:
    """Each budget predicted from the smaller ones, as the error relative to what was observed."""
    checks = result.forecasts[key].rolled

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        places = np.arange(len(checks))
        observed = np.array([check.observed for check in checks])
        middle = 100 * np.array([check.error for check in checks]) / observed
        low, high = (100 * (np.array([check.ci95[side] for check in checks]) / observed - 1) for side in (0, 1))
        baseline = 100 * np.array([check.baseline_error for check in checks]) / observed
        axes.axhline(0, color=INK, lw=0.6)
        bars = [middle - low, high - middle]
        axes.errorbar(places, middle, bars, fmt="D", color=BLUE, ms=4, lw=1, capsize=2.5, label="law")
        axes.plot(places + 0.12, baseline, "_", color=VERMILION, ms=9, mew=2, label="no change")
        shown = slice(None, None, -(-len(checks) // MOST_TICKS))
        names = [f"{power_of_ten(check.budget)}\nfrom {check.n_budgets}" for check in checks]
        axes.set_xticks(places[shown], names[shown])
        axes.set_xlim(-0.6, len(checks) - 0.4)
        axes.set(xlabel="budget (FLOPs), and from how many smaller ones", ylabel="error (%)")
        axes.grid(axis="x", visible=False)
        legend_below(figure, axes)

    caption = (
        f"Rolling forward: each budget's best {sentence(result.table, target).lower()} predicted from the smaller "
        "budgets alone, with the 95% interval for a new run; beside it what the next smaller budget's value, taken "
        "as it is, would be off by."
    )
    return render(name, caption, draw, height=2.5)


def clouds(result: LawsResult, entry: FitEntry, name: str) -> Drawing:
    """The draws of the bootstrap: how two parameters vary together."""
    names = list(entry.fitted.law.parameters)
    first = "alpha" if "alpha" in names else names[-1]
    second = next(each for each in ("beta", "E", "A") if each in entry.fitted.problem.free)
    places = names.index(first), names.index(second)
    drawn_SP = entry.fitted.problem.natural(entry.uncertainty.draws.theta_SP[:1500])
    symbol = {"beta": "β", "alpha": "α"}

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        x, y = drawn_SP[:, places[0]], drawn_SP[:, places[1]]
        wide = second == "A" and np.ptp(np.log(entry.uncertainty.ci95["A"])) > np.log(10)
        if wide:
            axes.set_yscale("log")
        axes.plot(x, y, ".", color=BLUE, ms=2, alpha=0.35, rasterized=True)
        point = entry.fitted.parameters[first], entry.fitted.parameters[second]
        axes.plot(*point, "+", color=VERMILION, ms=10, mew=1.6)
        for interval, line in zip((entry.uncertainty.ci95[first], entry.uncertainty.ci95[second]), "xy", strict=True):
            for edge in interval:
                (axes.axvline if line == "x" else axes.axhline)(edge, color=INK, lw=0.6, ls=":")
        low, high = np.quantile(drawn_SP[:, places], [0.005, 0.995], axis=0)
        span = np.maximum(high - low, 1e-9)
        intervals = np.array([entry.uncertainty.ci95[first], entry.uncertainty.ci95[second]])
        axes.set_xlim(min(low[0], intervals[0, 0]) - 0.1 * span[0], max(high[0], intervals[0, 1]) + 0.1 * span[0])
        if not wide:
            axes.set_ylim(min(low[1], intervals[1, 0]) - 0.1 * span[1], max(high[1], intervals[1, 1]) + 0.1 * span[1])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set(xlabel=symbol.get(first, first), ylabel=symbol.get(second, second))

    which = f"{entry.uncertainty.method} for {entry.name}"
    caption = f"Draws of the {which}, with the fit (cross) and the 95% intervals (dotted)."
    return render(name, caption, draw, height=2.4)
