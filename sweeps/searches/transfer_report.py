"""What is written about rates across sizes: one table, one figure."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sweeps.searches.report import label_sparsely
from sweeps.searches.transfer import TransferRun, transfers
from sweeps.searches.transfer_fit import REACH, Interval, Transfer, Valley
from varscale.store.atomic import write_atomically
from varscale.store.layout import SearchFiles

Valleys = Mapping[str, Mapping[int, Valley]]
HEADER = (
    "parametrization", "depth", "best rate", "lowest loss", "curvature", "drift a doubling of size",
    "lost with the smallest size's rate",
)  # fmt: skip


def write_transfer(run: TransferRun, files: SearchFiles) -> list[str]:
    """Write table, figure, trials and numbers; what it came to, for people, a line each.

    Raises:
        ExperimentError: Too few runs of a size ended.
    """
    valleys = run.valleys()
    found = transfers(valleys)
    run.optuna_study.trials_dataframe().to_csv(files.trials, index=False)
    _draw(valleys, found, files.figure("transfer"))
    settings = run.plan.settings
    summary = {
        "schema": 1,
        "transfer": run.plan.name,
        "fingerprint": run.plan.fingerprint,
        "steps": settings.steps,
        "sizes": {name: {depth: _numbers(valley) for depth, valley in own.items()} for name, own in valleys.items()},
        "transfers": {name: _finite(vars(transfer)) for name, transfer in found.items()},
    }
    write_atomically(files.summary, json.dumps(summary, indent=1, allow_nan=False).encode())
    rows = [HEADER, ["---"] * len(HEADER), *_rows(valleys, found)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    about = (
        f"{len(settings.seeds)} seeds at each base rate, {settings.steps} steps of "
        f"{run.plan.experiment.optim.batch_size} images at every size. A doubling of size is one of the depth. Drift "
        "and curvature are by doublings of the rate; brackets hold 95% intervals."
    )
    lines = [f"{name}: {_sentence(transfer)}" for name, transfer in found.items()] + _left_out(valleys)
    listed = "\n".join(f"- {line}" for line in lines)
    parts = (f"# Rates across sizes: {run.plan.name}", about, listed, table, "![Loss against rate](transfer.png)")
    files.report.write_text("\n\n".join(parts) + "\n")
    return lines


def _rows(valleys: Valleys, found: Mapping[str, Transfer]) -> list[list[str]]:
    rows = []
    for name, own in valleys.items():
        for depth, valley in own.items():
            last = [_drift(found[name]), _lost(found[name])] if depth == max(own) else ["", ""]
            rows.append([name, str(depth), _rate(valley), f"{valley.lowest:.4f}", f"{valley.curvature:.4f}", *last])
    return rows


def _left_out(valleys: Valleys) -> list[str]:
    return [
        f"{name}, depth {depth}: without {', '.join(f'{2**rate:.2e}' for rate in valley.left_out)}, where not all runs "
        "ended; the same command tries those again that failed, but not those that diverged"
        for name, own in valleys.items()
        for depth, valley in own.items()
        if valley.left_out
    ]


def _sentence(transfer: Transfer) -> str:
    drift, lost = _drift(transfer), _lost(transfer)
    return f"drift of the best rate a doubling of size {drift}; loss that the smallest size's costs the largest {lost}"


def _rate(valley: Valley) -> str:
    if valley.interval is None:
        edge = valley.best in (min(valley.tried), max(valley.tried))
        return f"{2**valley.best:.2e} ({'at the edge of those tried' if edge else 'no clear minimum'})"
    return f"{2**valley.best:.2e} [{2 ** valley.interval[0]:.2e}, {2 ** valley.interval[1]:.2e}]"


def _drift(transfer: Transfer) -> str:
    if transfer.drift is None:
        return "unknown (fewer than two sizes have a minimum)"
    return f"{transfer.drift:+.2f} {_interval(transfer.drift_interval, '+.2f')}"


def _lost(transfer: Transfer) -> str:
    if transfer.lost is None:
        return "unknown (no minimum at the smallest or the largest size)"
    if math.isinf(transfer.lost):
        return "unknown (not all runs of the largest size ended at that rate)"
    return f"{transfer.lost:.4f} {_interval(transfer.lost_interval, '.4f')}"


def _interval(interval: Interval | None, form: str) -> str:
    return "" if interval is None else f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def _numbers(valley: Valley) -> dict[str, Any]:
    ends = None if valley.interval is None else [2**end for end in valley.interval]
    return {
        "best_rate": 2**valley.best,
        "best_rate_ci95": ends,
        "lowest_loss": valley.lowest,
        "curvature": valley.curvature,
        "left_out": [float(f"{2**rate:.6g}") for rate in valley.left_out],
        "losses": {f"{2**rate:.6g}": loss for rate, loss in valley.tried.items()},
    }


def _finite(value: Any) -> Any:
    """The same, with None for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [_finite(each) for each in value]
    return value if value is None or math.isfinite(value) else None


def _draw(valleys: Valleys, found: Mapping[str, Transfer], path: Path) -> None:
    """A panel for each parametrization, and one of the best rates."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    depths = sorted({depth for own in valleys.values() for depth in own})
    colours = dict(zip(depths, mpl.colormaps["viridis"](np.linspace(0, 0.85, len(depths))), strict=True))
    figure, axes = pyplot.subplots(
        1, len(valleys) + 1, figsize=(3.6 * (len(valleys) + 1), 3.6), layout="constrained", squeeze=False
    )
    for panel, (name, own) in zip(axes[0], valleys.items(), strict=False):
        for depth, valley in own.items():
            rates = sorted(valley.tried)
            losses = [valley.tried[rate] - valley.lowest for rate in rates]
            panel.plot([2**rate for rate in rates], losses, ".", color=colours[depth], label=f"depth {depth}")
            if valley.interval is not None:
                near = np.linspace(valley.best - REACH, valley.best + REACH, 50)
                panel.plot(2**near, [valley.excess(rate) for rate in near], color=colours[depth], linewidth=1)
                panel.plot(2**valley.best, 0, "v", color=colours[depth], markersize=5)
        panel.set_xscale("log")
        panel.set(title=name, xlabel="base rate", ylabel="loss above the size's lowest")
    top = max(panel.get_ylim()[1] for panel in axes[0][:-1])
    for panel in axes[0][:-1]:
        panel.set_ylim(-0.03 * top, top)
        label_sparsely(panel)
    axes[0][0].legend(fontsize=8)
    last = axes[0][-1]
    for place, (name, own) in enumerate(valleys.items()):
        fitted = {depth: valley for depth, valley in own.items() if valley.interval is not None}
        x = np.array(list(fitted)) * 1.03 ** (place - (len(valleys) - 1) / 2)
        y = np.array([2**valley.best for valley in fitted.values()])
        ends = np.array([[2**end for end in valley.interval or ()] for valley in fitted.values()]).reshape(-1, 2)
        if fitted:
            last.errorbar(
                x, y, yerr=np.abs(ends.T - y), marker="o", markersize=4, capsize=2, linewidth=1, label=name
            )  # fmt: skip
    last.set_xscale("log", base=2)
    tried = [2**rate for own in valleys.values() for valley in own.values() for rate in valley.tried]
    last.set_ylim(min(tried), max(tried))
    last.set_yscale("log")
    last.set_xticks(depths, [str(depth) for depth in depths])
    last.set(title="best rate", xlabel="depth", ylabel="base rate")
    if last.get_legend_handles_labels()[0]:
        last.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
