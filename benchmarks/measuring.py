"""Timing several ways of the same work in turns, and what a benchmark reports."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from varscale.numerics.machine import device_name, processors
from varscale.training.cells import Execution

Cell = str | float | int


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    quick: bool
    """Only show that everything runs: the least work, and numbers that mean little."""
    threads: int
    """CPU threads."""
    folder: Path
    """Where benchmarks may write; deleted afterwards."""

    def rounds(self, usual: int) -> int:
        """How often each way has its turn."""
        return 1 if self.quick else usual

    def execution(self, *, compiled: bool = False) -> Execution:
        """How the runs are carried out: each has the whole memory."""
        return Execution(compiled, self.threads)


@dataclass(frozen=True)
class Goal:
    """A stated goal and what was measured."""

    text: str
    """What is asked for, with its number."""
    measured: str
    """The number found."""
    met: bool


@dataclass
class Report:
    """A benchmark's results."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figure: str | None = None
    """An SVG, written beside the tables as `<name>.svg`."""


def in_turns(works: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every work once a round, back and forth, so that a machine that slows down slows all of them.

    Args:
        works: Each does its work and returns a speed (or any other number).
        rounds: How often; before these, one unmeasured round warms up.

    Returns:
        The numbers of each work, a round each.
    """
    measured: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        order = list(works) if number % 2 else list(works)[::-1]
        for name in order:
            value = works[name]()
            if number:
                measured[name].append(value)
    return measured


def median_ratio(ours: list[float], other: list[float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(mine / yours for mine, yours in zip(ours, other, strict=True))


def rate(work: Callable[[], object], count: int, repeats: int) -> float:
    """How many of `count` a second, when `work` does that many and is repeated."""
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    return repeats * count / (time.perf_counter() - started)


def machine(threads: int) -> dict[str, Any]:
    """What the numbers depend on; the load tells whether others used the machine meanwhile."""
    return {
        "device": device_name(),
        "cores": processors(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
