"""What is written about a search: its trials as a table, figures, the winner as an experiment, and a page."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from sweeps.searches.plan import shown
from sweeps.searches.search import Confirmation, Search
from varscale.config.text import write_yaml
from varscale.config.yaml import as_extended
from varscale.store.atomic import write_atomically
from varscale.store.layout import SearchFiles


def write_report(search: Search, files: SearchFiles, extends: str, confirmation: Confirmation | None) -> list[str]:
    """Write all of it; what it came to, for people, a line each.

    The experiment with the winning settings extends the searched one, `extends`, as that was named.
    """
    plan, study = search.plan, search.optuna_study
    study.trials_dataframe().to_csv(files.trials, index=False)
    front = [search.best] if search.best else study.best_trials if len(plan.metrics) > 1 else []
    lines = [_ended_line(search)]
    lines += [f"{_of_front(trial, plan.metrics)}: {_values(trial)}" for trial in front if trial is not None]
    if confirmation is not None:
        lines.append(confirmation.verdict(plan.metrics[0]))
    elif search.best is not None and search.best.number == 0:
        lines.append("the experiment's own settings are the best of the search")
    figures = {name: path for name, draw in _FIGURES.items() if (path := _drawn(name, draw, search, files)) is not None}
    if search.best is not None:
        winner = {"extends": as_extended(extends, files.folder), "name": f"{plan.experiment.name}-tuned"}
        files.best.write_text(write_yaml({**winner, **plan.best_settings(search.best.params)}))
    write_atomically(files.summary, json.dumps(_summary(search, confirmation), indent=1).encode())
    files.report.write_text(_page(search, lines, figures, files))
    return lines


def _ended_line(search: Search) -> str:
    states = [trial.state for trial in search.ended]
    counts = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    parts = [f"{states.count(state)} {word}" for word, state in counts.items() if states.count(state)]
    return f"{len(states)} trials: {', '.join(parts)}"


def _of_front(trial: FrozenTrial, metrics: tuple[str, ...]) -> str:
    found = ", ".join(f"{metric} {value:.5g}" for metric, value in zip(metrics, trial.values, strict=True))
    return f"{'best' if len(metrics) == 1 else 'on the front'}, trial {trial.number}, {found}"


def _values(trial: FrozenTrial) -> str:
    return ", ".join(f"{key} = {shown(value)}" for key, value in trial.params.items())


def _summary(search: Search, confirmation: Confirmation | None) -> dict[str, Any]:
    best, plan = search.best, search.plan
    summary: dict[str, Any] = {
        "schema": 1,
        "search": plan.name,
        "fingerprint": plan.fingerprint,
        "objective": plan.experiment.search.objective,
        "budgets": list(plan.budgets),
        "trials": {state.name.lower(): sum(trial.state == state for trial in search.ended) for state in TrialState},
        "best": {"trial": best.number, "value": best.value, "settings": best.params} if best is not None else None,
        "confirmation": None,
    }
    if confirmation is not None:
        low, high = confirmation.interval()
        values = {"best": list(confirmation.best), "own": list(confirmation.own)}
        summary["confirmation"] = {**values, "gain": confirmation.gain, "ci95": [low, high]}
    return summary


_plots = optuna.visualization.matplotlib
_FIGURES: dict[str, tuple[str, Callable[[optuna.Study, list[str]], Any]]] = {
    "history": (
        "Each trial, and the best so far",
        lambda study, metrics: _plots.plot_optimization_history(study, target_name=metrics[0]),
    ),
    "importance": (
        "How much each setting matters",
        lambda study, metrics: _plots.plot_param_importances(study, target_name=metrics[0]),
    ),
    "slice": (
        "Each setting against the objective",
        lambda study, metrics: _plots.plot_slice(study, target_name=metrics[0]),
    ),
    "intermediate": (
        "Trials at rising budgets",
        lambda study, metrics: _plots.plot_intermediate_values(study),
    ),
    "front": (
        "Loss against training FLOPs",
        lambda study, metrics: _plots.plot_pareto_front(study, target_names=metrics),
    ),
}
"""Optuna's own figures; what each needs of a study differs, and one that can't be drawn is left out."""


def _drawn(name: str, figure: tuple[str, Any], search: Search, files: SearchFiles) -> Path | None:
    import matplotlib as mpl
    from matplotlib import pyplot

    study, metrics = search.optuna_study, list(search.plan.metrics)
    complete = [trial for trial in search.ended if trial.state == TrialState.COMPLETE]
    if (len(metrics) > 1) != (name == "front") or len(complete) < 2:
        return None
    path = files.figure(name)
    with warnings.catch_warnings(), mpl.rc_context({"savefig.bbox": "tight", "savefig.dpi": 120}):
        warnings.simplefilter("ignore")
        try:
            figure[1](study, metrics)
        except (ValueError, RuntimeError):  # such as the importance of settings that never varied
            return None
        drawn = pyplot.gcf()
        if name == "slice":
            drawn.set_size_inches(max(6.0, 3.6 * len(search.plan.space)), 4.0)
        if name == "intermediate":
            budgets = search.plan.budgets
            drawn.axes[0].set(xlabel="training FLOPs", ylabel=metrics[0])
            drawn.axes[0].set_xticks(budgets, [_flops(budget) for budget in budgets])
        for axes in drawn.axes:
            _restyle(axes, keep_legend=name in ("history", "front"))
        drawn.suptitle("")
        drawn.savefig(path)
        pyplot.close("all")
    return path


def _restyle(axes: Any, *, keep_legend: bool) -> None:
    """On white, and without a title, which the page has."""
    from matplotlib.ticker import MaxNLocator

    axes.set_facecolor("white")
    axes.grid(color="#e2e4e8", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("left", "bottom"):
        axes.spines[side].set(visible=True, color="#16181d", linewidth=0.6)
    axes.tick_params(colors="#16181d")
    if axes.get_xscale() == "log":
        label_sparsely(axes)
    if axes.get_xlabel() == "Trial":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if (legend := axes.get_legend()) is not None:
        legend.get_frame().set(facecolor="white", edgecolor="none")
        if not keep_legend:  # it names every trial, or the only objective
            legend.remove()
    axes.set_title("")
    axes.set_title("", loc="left")


def label_sparsely(axes: Any) -> None:
    """Numbers such as 0.002 at a logarithmic axis: Optuna's labels of all ticks lie over each other."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelrotation=45)


def _page(search: Search, lines: list[str], figures: dict[str, Path], files: SearchFiles) -> str:
    plan = search.plan
    ended = sorted(search.ended, key=lambda trial: (trial.values is None, trial.values or [], trial.number))
    header = ["trial", "outcome", *plan.space]
    rows = [
        [
            str(trial.number),
            str(trial.user_attrs.get("outcome", "")),
            *(shown(trial.params.get(key)) for key in plan.space),
        ]
        for trial in ended
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))
    pictures = "\n\n".join(
        f"## {_FIGURES[name][0]}\n\n![{_FIGURES[name][0]}]({path.name})" for name, path in figures.items()
    )
    budgets = ", ".join(map(_flops, plan.budgets))
    about = f"One model a trial, compared at {budgets} training FLOPs; {plan.metrics[0]} is minimised."
    found = "\n".join(f"- {line}" for line in lines)
    return f"# Search {plan.name}\n\n{about}\n\n{found}\n\n{pictures}\n\n## Trials, the best first\n\n{table}\n"


def _flops(budget: float) -> str:
    return f"{budget:.3g}".replace("e+", "e")
