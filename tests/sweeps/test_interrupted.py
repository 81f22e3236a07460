"""Sweeps that are interrupted, at any moment and in any way, end as if nothing had happened: equal to the bit."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_sweep import Finished, group_members, numbers_of, results, start, varscale, wait_for, workers, write_toy

SUB_GRID = {"grid": {"depths": [2, 3], "budgets": [2e7, 4e7], "min_steps": 5}}
"""Cells of the uninterrupted sweep, from shorter trunks: their numbers must be the same."""
Process = subprocess.Popen[str]


def kill_all(process: Process) -> None:
    """The power fails."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def kill_orchestrator(process: Process) -> None:
    """Its workers must end by themselves, at once: another call may follow."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not group_members(process.pid), seconds=10)
    process.communicate()


def press_ctrl_c(process: Process) -> None:
    """A terminal sends the signal to all processes of the group; nobody may take it for a crash."""
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    if "no law could be fitted" in output:  # on a busy machine it comes too late: four cells are soon trained
        assert process.returncode == 1
        return
    assert process.returncode == 130, output
    assert output.splitlines()[-1] == "varscale: interrupted; what is done is kept, call it again to go on"
    assert "Traceback" not in output
    assert "failed" not in output
    wait_for(lambda: not group_members(process.pid), seconds=10)


def kill_worker(process: Process) -> None:
    """Out of memory: the sweep goes on with another worker."""
    (worker,) = workers(process.pid)
    os.kill(worker, signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert "failed (its process ended with exit code -9); trying again" in output
    assert "Traceback" not in output


def lines(runs: Path, pattern: str) -> int:
    return sum(path.read_bytes().count(b"\n") for path in runs.glob(pattern))


def some(runs: Path, pattern: str) -> Callable[[], bool]:
    return lambda: any(True for _ in runs.glob(pattern))


def moments(runs: Path, chance: random.Random) -> list[Callable[[], bool]]:
    """Moments of a sweep's life in order, a little random."""
    steps, points = chance.randrange(3, 9), chance.randrange(1, 5)
    return [
        lambda: lines(runs, "tokenizers/*/metrics.jsonl") >= steps,
        some(runs, "tokens/*/validation/*.npy"),
        lambda: lines(runs, "trunks/*/metrics.jsonl") >= points,
        some(runs, "cells/*/last.ckpt"),
        some(runs, "cells/*/result.json"),
    ]


def assert_as_uninterrupted(runs: Path, finished: Finished) -> None:
    ours, theirs = results(runs), results(finished.runs)
    assert len(ours) == 4
    for name, row in ours.items():
        assert numbers_of(row) == numbers_of(theirs[name]), name
    curves = list(runs.glob("*/*/metrics.jsonl"))
    assert len(curves) >= 5  # of tokenizer, trunks and branches of two steps or more
    for curve in curves:
        points = [json.loads(line) for line in curve.read_text().splitlines()]
        images = [point["images"] for point in points]
        assert images == sorted(set(images)), curve
        whole = (finished.runs / curve.relative_to(runs)).read_text().splitlines()
        losses = {point["images"]: point["metrics"].get("train_loss") for point in map(json.loads, whole)}
        assert all(losses[point["images"]] == point["metrics"].get("train_loss") for point in points), curve


def live_through(folder: Path, interruptions: list[tuple[int, Callable[[Process], None]]], seed: int) -> int:
    """Interrupt a sweep at moments of its life, then let it finish; how often it was interrupted."""
    chance = random.Random(seed)
    path, runs = write_toy(folder, **SUB_GRID), folder / "runs"
    conditions = moments(runs, chance)
    done = 0
    for moment, interrupt in interruptions:
        if conditions[moment]() or len(results(runs)) == 4:  # the last interruption came a little late
            continue
        process = start("sweep", path, cwd=folder)
        wait_for(conditions[moment], process=process)
        time.sleep(chance.uniform(0, 0.03))
        interrupt(process)
        done += 1
    if len(results(runs)) < 4:
        assert "Traceback" not in varscale("sweep", path, cwd=folder).stderr
    return done


def test_interrupted_by_a_killed_orchestrator_and_a_killed_worker(finished: Finished, tmp_path: Path) -> None:
    assert live_through(tmp_path, [(0, kill_orchestrator), (3, kill_worker)], seed=1) >= 1
    assert_as_uninterrupted(tmp_path / "runs", finished)


@pytest.mark.slow
def test_interrupted_in_every_way(finished: Finished, tmp_path: Path) -> None:
    ways = [(0, kill_orchestrator), (1, kill_all), (2, press_ctrl_c), (3, kill_worker)]
    assert live_through(tmp_path, ways, seed=1) >= 3
    assert_as_uninterrupted(tmp_path / "runs", finished)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_killed_at_five_moments(finished: Finished, tmp_path: Path, seed: int) -> None:
    assert live_through(tmp_path, [(moment, kill_all) for moment in range(5)], seed) >= 3
    assert_as_uninterrupted(tmp_path / "runs", finished)
