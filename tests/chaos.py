"""Random events over many small grids, here and on a real Slurm: nothing may be lost, doubled or changed.

Each grid is swept, disturbed by some events, and called again, as a user would, until it is done. Then it must equal an
undisturbed sweep, to the bit. Equal seeds draw equal events; when within a sweep they happen depends on the machine.
"""

import argparse
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from chaos_events import (
    BETWEEN_CALLS,
    BUDGETS,
    DEPTHS,
    MOST_SECONDS,
    SIGNALS,
    WHILE_IT_RUNS,
    Deck,
    Grid,
    events_on_slurm,
    send,
)
from one_box import ON_SLURM, OneBox, write_site
from requirements import require_program, shared_path
from toy_sweep import cell_folder, delivered, numbers_of, results, varscale, wait_for


class Campaign:
    """All grids, what happened to them, and what was lost."""

    def __init__(self, events: int, seed: int, base: Path) -> None:
        self.chance, self.base = random.Random(seed), base
        self._most, self._began = events, time.monotonic()
        self.counts: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        """Calls that were needed after each kind of event."""
        self.lost: list[str] = []
        self.grids = 0
        self.quiet = Grid(base / "undisturbed", BUDGETS, random.Random(0))

    @property
    def left(self) -> int:
        return self._most - self.counts.total()

    def say(self, text: str) -> None:
        print(f"{self.counts.total():4} of {self._most}  {time.monotonic() - self._began:6.0f} s  {text}", flush=True)

    def sweep(self, box: OneBox | None, deck: Deck, between: Deck | None, most: int) -> None:
        """One grid, disturbed by so many events, or by as many as there is time for."""
        self.grids += 1
        where = f"grid {self.grids} ({'here' if box is None else 'Slurm'})"
        budgets = BUDGETS if self.chance.random() < 0.5 else (BUDGETS[0], BUDGETS[-1])
        options = () if box is None else ON_SLURM
        grid = Grid(self.base / f"grid-{self.grids}", budgets, self.chance, *options)
        at_once, pack_minutes = self.chance.choice((1, 2, 4)), self.chance.choice((0, 30))
        write_site(grid.folder, signal_seconds=55, at_once=at_once, pack_minutes=pack_minutes)
        happened: list[tuple[str, int]] = []
        most = min(most, self.left)
        try:
            while len(happened) < most and (grid.alive or not grid.done):
                if name := self._disturb(grid, deck, between):
                    happened.append((name, grid.calls))
                    self.counts[name] += 1
                    self.say(f"{where}, call {grid.calls}, {grid.cells} cells: {name}")
            grid.finish()
            if box is not None:
                with suppress(AssertionError):
                    wait_for(lambda: not box.queue(), 240, interval=0.2)
                assert not box.queue(), "Slurm jobs are left"
            check(grid, self.quiet)
        except Exception as error:
            self.lost.append(f"{grid.folder}: {type(error).__name__}: {error}")
            self.say(f"LOST: {self.lost[-1]}")
            send(SIGNALS["SIGKILL"], "all its processes", grid)
            if box is not None:
                box.run("scancel", "--me")
        else:
            self.say(f"{where} is whole: {grid.cells} cells after {grid.calls} calls")
            shutil.rmtree(grid.folder)
        for (name, calls), (_, later) in pairwise([*happened, ("", grid.calls)]):
            self.calls[name] += later - calls

    def _disturb(self, grid: Grid, deck: Deck, between: Deck | None) -> str | None:
        """Let something happen; None: it wasn't possible."""
        if not grid.alive:
            if grid.calls and between and grid.chance.random() < 0.5:
                return between.play(grid)
            grid.call()
        before = grid.bytes_of_curves()
        if grid.chance.random() < 0.75:  # to start takes longer than to train, and is hit otherwise
            grid.wait(MOST_SECONDS, lambda: grid.bytes_of_curves() > before)
        return None if grid.wait(grid.chance.uniform(0, 6)) else deck.play(grid)

    def table(self) -> str:
        lines = [f"{name:40}  {count:5}  {self.calls[name]:13}" for name, count in sorted(self.counts.items())]
        head, total = f"{'event':40}  times  further calls", (self.counts.total(), self.calls.total())
        return "\n".join([head, *lines, f"{'all':40}  {total[0]:5}  {total[1]:13}"])


def check(grid: Grid, quiet: Grid) -> None:
    """Compare with the undisturbed sweep of all budgets; an AssertionError names what differs."""
    grid.bring_back_mlflow()
    sync = varscale("sync", cwd=grid.folder)
    assert sync.returncode == 0, f"MLflow has not got everything: {sync.stdout} {sync.stderr}"
    own = {cell_folder(quiet.runs, depth, budget).name for depth in DEPTHS for budget in grid.budgets}
    ours, theirs = results(grid.runs), results(quiet.runs)
    assert set(ours) == own, "other cells"
    for name in own:
        assert numbers_of(ours[name]) == numbers_of(theirs[name]), f"{name} has other numbers"
        times = len(grid.written[name])
        assert times <= 1 + grid.damaged[name], f"{name} was trained to its end {times} times"
    found, expected = delivered(grid.folder), delivered(quiet.folder)
    known = {point for curve in expected.values() for point in curve}
    others = {name.rpartition("-")[2] for name in set(theirs) - own}
    assert set(found) == set(expected) - others, "MLflow has other runs"
    for run, curve in found.items():
        steps = [step for step, _ in curve]
        assert steps == sorted(set(steps)), f"MLflow's curve of {run} has doubled points"
        assert set(expected[run]) <= set(curve) <= known, f"MLflow's curve of {run} is another one"
        longer = len(curve) > len(expected[run])  # where its trunk's checkpoint was damaged, a branch trains all of it
        assert not longer or grid.damaged["checkpoint"], f"MLflow's curve of {run} has more points"
    with suppress(AssertionError):
        wait_for(lambda: not _processes(grid.folder), 60, interval=0.2)
    assert not _processes(grid.folder), "processes are left"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.disable(logging.WARNING)  # of files that were damaged on purpose
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, and calls inherit that
    base = Path(tempfile.mkdtemp(prefix="varscale-chaos-"))
    print(f"{given.events} events, seed {given.seed}, in {base}; an undisturbed sweep first", flush=True)
    campaign = Campaign(given.events, given.seed, base)
    campaign.quiet.finish()
    here, between = Deck(WHILE_IT_RUNS, campaign.chance), Deck(BETWEEN_CALLS, campaign.chance)
    box = _slurm(base / "slurm")
    on_slurm = Deck(events_on_slurm(box), campaign.chance) if box is not None else None
    try:
        while campaign.left > 0:
            if box is not None and on_slurm is not None and campaign.grids % 2:
                campaign.sweep(box, on_slurm, None, campaign.chance.randrange(3, 6))
            else:
                campaign.sweep(None, here, between, campaign.chance.randrange(5, 9))
    finally:
        if box is not None:
            box.stop()
    print(campaign.table())
    if campaign.lost:
        print(f"seed {given.seed}; lost, and kept under {base}:", *campaign.lost, sep="\n")
        return 1
    shutil.rmtree(base)
    print(f"{campaign.grids} grids, nothing lost")
    return 0


def _slurm(folder: Path) -> OneBox | None:
    """A running one-machine Slurm; None, and a line, where it can't be."""
    try:
        for program in ("sbatch", "srun", "slurmctld", "slurmd"):
            require_program(program)
        box = OneBox(folder, shared_path("slurm/one-box-slurm.sh"))
    except pytest.skip.Exception as reason:
        print(f"{reason}: all grids are swept here", flush=True)
        return None
    box.start()
    os.environ["SLURM_CONF"] = box.environment["SLURM_CONF"]
    return box


def _processes(folder: Path) -> list[int]:
    """Those that work in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (path / "cwd").readlink().is_relative_to(folder):
                found.append(int(path.name))
    return found


if __name__ == "__main__":
    sys.exit(main())
