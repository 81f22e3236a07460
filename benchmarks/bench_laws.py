"""Speed of the law fitter: python benchmarks/bench_laws.py (make bench runs it).

On a table of 240 planted runs: the parametric fit with all starts (goal: under 1 s), 4,000 draws of the bootstrap
(under 5 s on two cores), a whole report (under 10 s), the command's help (under 1 s), and that no torch is imported on
the way. Prints a table; exits 1 if a goal is missed.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from analysis.fitting.bootstrap import case
from analysis.fitting.fit import fit
from analysis.options import FitOptions
from analysis.pipeline import fit_laws
from analysis.report.writing import write


def planted(rows: int = 240) -> pd.DataFrame:
    """Runs scattered over three decades of compute, with heavy-tailed noise."""
    rng = np.random.default_rng(0)
    flops = np.exp(rng.uniform(np.log(1e18), np.log(3e21), rows))
    params = (flops / 6) ** 0.5 * 0.2 * np.exp(rng.uniform(-1.2, 1.2, rows))
    tokens = flops / (6 * params)
    loss = 1.82 + 482 * params**-0.348 + 2085 * tokens**-0.366
    return pd.DataFrame({"N": params, "C": flops, "D": tokens, "loss": loss * np.exp(0.004 * rng.standard_t(3, rows))})


def sweep() -> pd.DataFrame:
    """A grid of 6 sizes and 6 budgets with the targets of a sweep."""
    table = planted(36)
    sizes, budgets = np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e18, 3e19, 6))
    table["params_total"], table["train_flops"] = sizes.ravel(), budgets.ravel()
    table["budget_flops"], table["tokens_seen"] = table["train_flops"], budgets.ravel() / (6 * sizes.ravel())
    table["loss"] = 1.82 + 482 * table["params_total"] ** -0.348 + 2085 * table["tokens_seen"] ** -0.366
    noise = np.random.default_rng(0).standard_t(3, (4, 36))
    loss = table["loss"]
    for row, (name, factor) in enumerate(
        {"loss": 1.0, "loss_last_scale": 1.05, "error": 0.2, "error_last_scale": 0.19}.items()
    ):
        table[name] = factor * loss * np.exp(0.004 * noise[row])
    return table.drop(columns=["N", "C", "D"])


def timed(work: Callable[[], object]) -> float:
    """Seconds of the quickest of three."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _command(*arguments: str, options: tuple[str, ...] = ()) -> str:
    """Runs varscale in a process of its own; what Python itself reports on standard error."""
    program = [sys.executable, *options, "-c", "from varscale.cli import main; main()"]
    return subprocess.run([*program, *arguments], check=True, capture_output=True, text=True).stderr


def _imports_torch(*arguments: str) -> bool:
    return re.search(r"\| +torch$", _command(*arguments, options=("-X", "importtime")), re.MULTILINE) is not None


def main() -> int:
    """Runs the measurements and says which goals were met."""
    runs = planted()
    inputs = runs["N"].to_numpy(), runs["D"].to_numpy()
    losses = runs["loss"].to_numpy()
    fitted = fit("chinchilla", inputs, losses)
    grid = sweep()
    with tempfile.TemporaryDirectory() as folder:
        results = [
            (
                f"chinchilla fit, 240 rows, {fitted.starts} starts",
                timed(lambda: fit("chinchilla", inputs, losses)),
                1.0,
            ),
            ("bootstrap, 4,000 draws of 240 rows", timed(lambda: case(fitted, 4000, 0)), 5.0),
            (
                "report of a 6 × 6 sweep, 4 targets, all figures",
                timed(lambda: write(fit_laws(grid, FitOptions()), Path(folder))),
                10.0,
            ),
            ("varscale fit-laws --help", timed(lambda: _command("fit-laws", "--help")), 1.0),
        ]
    table = Table("measurement", "seconds", "goal", "met")
    for name, seconds, goal in results:
        table.add_row(name, f"{seconds:.2f}", f"{goal:g}", "yes" if seconds < goal else "no")
    with tempfile.TemporaryDirectory() as folder:
        runs.to_csv(Path(folder, "runs.csv"))
        columns = ("--params", "N", "--flops", "C", "--tokens", "D")
        torch = _imports_torch("fit-laws", "--runs", f"{folder}/runs.csv", "--out", folder, *columns)
    table.add_row("torch imported", str(torch).lower(), "false", "no" if torch else "yes")
    Console().print(table)
    return 0 if all(seconds < goal for _, seconds, goal in results) and not torch else 1


if __name__ == "__main__":
    sys.exit(main())
