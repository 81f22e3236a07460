"""What `make chaos` does to small grids: a grid with the call that sweeps it, and all kinds of events by name."""

import os
import random
import resource
import signal
import sqlite3
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

from one_box import OneBox, running
from toy_sweep import command, environment, group_members, wait_for, workers, write_toy

from varscale.store.layout import RunFiles
from varscale.store.records import StudyRecord, read_result

DEPTHS, BUDGETS = (2, 3), (2e8, 4e8, 6e8)
MOST_CALLS, MOST_SECONDS = 40, 400.0
"""Of a grid, and of a call: beyond, it will never be done."""
SIGNALS = {
    name: tuple(signal.Signals[number] for number in name.split(", "))
    for name in ["SIGKILL", "SIGTERM", "SIGHUP", "SIGINT", "SIGINT, SIGINT", "SIGSTOP, SIGCONT", "SIGSTOP, SIGKILL"]
}
FILES = {
    "checkpoint": "*/*/*.ckpt",
    "result": "*/*/result.json",
    "token manifest": "tokens/*/*/manifest.json",
    "token shard": "tokens/*/*/*.npy",
    "tokenizer": "tokenizers/*/weights.safetensors",
}


class Grid:
    """A toy grid in a folder of its own, and the call that sweeps it, if one runs."""

    def __init__(self, folder: Path, budgets: Sequence[float], chance: random.Random, *options: str) -> None:
        self.folder, self.runs, self.study = folder, folder / "runs", folder / "runs" / "studies" / "toy"
        self.budgets, self.chance, self.calls, self._options = budgets, chance, 0, options
        self.process: subprocess.Popen[bytes] | None = None
        self.written: defaultdict[str, set[int]] = defaultdict(set)
        """When each cell's result was written."""
        self.damaged: Counter[str] = Counter()
        """How often each cell's result was damaged, so often it may be made again; and any "checkpoint"."""
        runtime = {"checkpoint_seconds": chance.choice((0.05, 0.5, 2.0)), "workers": chance.choice((1, 2))}
        write_toy(
            folder,
            grid={"depths": list(DEPTHS), "budgets": list(budgets)},
            evaluation={"samples_per_class": 0},
            runtime=runtime | {"log_every_steps": 20},
        )

    def call(self, *options: str, before: Callable[[], object] | None = None) -> None:
        """Start a sweep; `before` runs in its process first."""
        self.bring_back_mlflow()
        assert self.calls < MOST_CALLS, "it was called too often"
        self.calls += 1
        with (self.folder / "calls.log").open("ab") as log:
            self.process = subprocess.Popen(
                command("sweep", "toy.yaml", *self._options, *options),
                cwd=self.folder,
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=before,
            )

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def cells(self) -> int:
        """Finished ones."""
        return sum(read_result(RunFiles(path)) is not None for path in self.runs.glob("cells/*"))

    @property
    def done(self) -> bool:
        record = StudyRecord.read(self.study / "study.json")
        return record is not None and record.status == "FINISHED" and self.cells == len(DEPTHS) * len(self.budgets)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Until the call ends, or something is so, or so long; whether it has ended."""
        limit = time.monotonic() + seconds
        while self.alive and time.monotonic() < limit and not until():
            time.sleep(0.05)
            for path in self.runs.glob("cells/*/result.json"):
                self.written[path.parent.name].add(path.stat().st_mtime_ns)
        return not self.alive

    def finish(self) -> None:
        """Call it until it is done."""
        while True:
            assert self.wait(MOST_SECONDS), "a call doesn't end"
            if self.done:
                return
            time.sleep(1)
            self.call()

    def move_mlflow_away(self) -> None:
        _move(self.runs / "mlflow.db", self.folder / "away.db")

    def bring_back_mlflow(self) -> None:
        if (self.folder / "away.db").exists():
            _move(self.folder / "away.db", self.runs / "mlflow.db")

    def bytes_of_curves(self) -> int:
        return sum(path.stat().st_size for path in self.runs.glob("*/*/metrics.jsonl"))


Event = Callable[[Grid], bool]
"""Does something to a grid; whether it could."""


def send(numbers: Sequence[signal.Signals], whom: str, grid: Grid) -> bool:
    assert grid.process is not None
    pids = [grid.process.pid] if whom == "the call" else group_members(grid.process.pid)
    if whom == "a worker":
        there = workers(grid.process.pid)
        pids = [grid.chance.choice(there)] if there else []
    for number in numbers:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(grid.chance.uniform(0.05, 1.5) if len(numbers) > 1 else 0)
    return bool(pids)


def lock_mlflow(grid: Grid) -> bool:
    if not (path := grid.runs / "mlflow.db").exists():
        return False
    with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(grid.chance.uniform(1, 8))
    return True


def call_without_mlflow(grid: Grid) -> bool:
    grid.call(before=grid.move_mlflow_away)
    return True


def call_on_a_full_disk(grid: Grid) -> bool:
    most = grid.chance.choice((3_000, 30_000, 100_000))

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    grid.call(before=limit)
    return True


def damage(pattern: str, truncate: bool, grid: Grid) -> bool:
    paths = sorted(path for path in grid.runs.glob(pattern) if path.stat().st_size)
    if not paths:
        return False
    path = grid.chance.choice(paths)
    before, content = path.stat(), bytearray(path.read_bytes())
    place = grid.chance.randrange(len(content))
    if truncate:
        del content[place:]
    else:
        content[place] ^= 1 << grid.chance.randrange(8)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as when a disk rots
    grid.damaged[path.parent.name] += path.name == "result.json"
    grid.damaged["checkpoint"] += path.suffix == ".ckpt"
    return True


WHILE_IT_RUNS: dict[str, Event] = {
    f"{name} to {whom}": partial(send, numbers, whom)
    for name, numbers in SIGNALS.items()
    for whom in ("a worker", "the call", "all its processes")
} | {"MLflow's database locked": lock_mlflow}
BETWEEN_CALLS: dict[str, Event] = {
    f"{name} {how}": partial(damage, pattern, how == "truncated")
    for name, pattern in FILES.items()
    for how in ("truncated", "with a flipped bit")
} | {"MLflow's database away during a call": call_without_mlflow, "full disk during a call": call_on_a_full_disk}


def events_on_slurm(box: OneBox) -> dict[str, Event]:
    def to_a_job(act: Callable[[str, random.Random], object], grid: Grid) -> bool:
        jobs = sorted(state.slurm_job for state in running(grid.study).values() if box.node_of(state.slurm_job))
        with suppress(AssertionError):  # it has no process yet, or the end of its time or the urgent job didn't come
            if jobs:
                act(grid.chance.choice(jobs), grid.chance)
                return True
        return False

    def preempt(job: str, _: random.Random) -> None:
        box.preempt(box.node_of(job))
        wait_for(lambda: "urgent RUNNING" in [f"{each['name']} {each['state']}" for each in box.queue()], interval=0.2)

    def reach_time_limit(job: str, _: random.Random) -> None:
        box.hold_until_the_time_limit(job)
        wait_for(lambda: not box.node_of(job), interval=0.2)
        box.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")

    def kill_node(job: str, chance: random.Random) -> None:
        box.kill_node(node := box.node_of(job))
        time.sleep(chance.uniform(1, 25))  # Slurm notices after ten seconds
        box.revive_node(node)

    def restart_controller(grid: Grid) -> bool:
        box.stop_controller()
        time.sleep(grid.chance.uniform(1, 15))
        box.start_controller()
        return True

    def detach(grid: Grid) -> bool:
        send(SIGNALS["SIGINT"], "the call", grid)
        assert grid.wait(60), "a call doesn't end by SIGINT"
        grid.call("--detach")
        assert grid.wait(120), "a detached call doesn't return"
        with suppress(AssertionError):  # in half the cases the last job does all the rest
            wait_for(lambda: not box.queue(), grid.chance.choice((20, 300)), interval=0.2)
        return True

    to_jobs: dict[str, Callable[[str, random.Random], object]] = {
        "preempted by an urgent job": preempt,
        "scontrol requeue": lambda job, _: box.run("scontrol", "requeue", job),
        "scancel of a run": lambda job, _: box.run("scancel", job),
        "scancel of an array": lambda job, _: box.run("scancel", job.partition("_")[0]),
        "a node's daemon killed and revived": kill_node,
        "SIGKILL to a run's process": lambda job, _: box.kill_run(job),
        "time limit reached": reach_time_limit,
    }
    return {name: partial(to_a_job, act) for name, act in to_jobs.items()} | {
        "SIGKILL to the call": partial(send, SIGNALS["SIGKILL"], "all its processes"),
        "Slurm's controller away": restart_controller,
        "detached call": detach,
    }


class Deck:
    """All kinds of events in a random order, again and again, so that none is forgotten."""

    def __init__(self, kinds: Mapping[str, Event], chance: random.Random) -> None:
        self._kinds, self._chance, self._left = kinds, chance, list[str]()

    def play(self, grid: Grid) -> str | None:
        """The first that is possible now, if any is."""
        for _ in range(2):
            for name in self._left:
                if self._kinds[name](grid):
                    self._left.remove(name)
                    return name
            more = self._chance.sample(sorted(self._kinds), len(self._kinds))
            self._left += [name for name in more if name not in self._left]
        return None


def _move(source: Path, target: Path) -> None:
    """Of SQLite, with what a killed transaction left beside it."""
    for suffix in ("", "-journal"):
        own, other = (path.with_name(path.name + suffix) for path in (source, target))
        other.unlink(missing_ok=True)
        if own.exists():
            own.replace(other)
