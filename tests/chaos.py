"""Random events over many small grids, here and on a real Slurm: nothing may be lost, doubled or changed.

Each grid is swept, disturbed by some events, and called again, as a user would, until it is done. Then it must equal an
undisturbed sweep, to the bit. `make chaos ARGS='--events 10 --seed 3'`; equal seeds draw equal events, whose moments
within a sweep depend on the machine.
"""

import argparse
import logging
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from one_box import ON_SLURM, OneBox, running, write_site
from requirements import require_program, shared_path
from toy_sweep import cell_folder, command, delivered, environment, group_members, numbers_of, results, write_toy

from varscale.store.curves import read_curve
from varscale.store.layout import RunFiles
from varscale.store.records import StudyRecord, read_result

DEPTHS, BUDGETS = (2, 3), (2e8, 3e8, 4e8, 6e8)
MOST_CALLS = 40
"""Of a grid; after so many it will never be done."""
LONGEST_SECONDS = 400.0
"""Of a call; later it hangs."""
SIGNALS = {
    "SIGKILL": (signal.SIGKILL,),
    "SIGTERM": (signal.SIGTERM,),
    "SIGHUP": (signal.SIGHUP,),
    "SIGINT": (signal.SIGINT,),
    "SIGINT twice": (signal.SIGINT, signal.SIGINT),
    "SIGSTOP, SIGCONT": (signal.SIGSTOP, signal.SIGCONT),
    "SIGSTOP, SIGKILL": (signal.SIGSTOP, signal.SIGKILL),
}
FILES = {
    "checkpoint": "*/*/*.ckpt",
    "result": "*/*/result.json",
    "token manifest": "tokens/*/*/manifest.json",
    "token shard": "tokens/*/*/*.npy",
    "tokenizer": "tokenizers/*/weights.safetensors",
}


class LostError(Exception):
    """Something that a sweep must keep is lost, doubled or changed."""


class Grid:
    """A toy grid in a folder of its own, and the call that sweeps it, if one runs."""

    def __init__(self, folder: Path, budgets: Sequence[float], chance: random.Random, *options: str) -> None:
        self.folder, self.runs, self.study = folder, folder / "runs", folder / "runs" / "studies" / "toy"
        self.budgets, self.chance, self._options = budgets, chance, options
        self.process: subprocess.Popen[bytes] | None = None
        self.calls = 0
        self.written: defaultdict[str, set[int]] = defaultdict(set)
        """When each cell's result was written."""
        self.damaged: Counter[str] = Counter()
        """How often each cell's result was damaged: so often it may be made again."""
        write_toy(
            folder,
            grid={"depths": list(DEPTHS), "budgets": list(budgets)},
            evaluation={"samples_per_class": 0},
            runtime={
                "checkpoint_seconds": chance.choice((0.05, 0.5, 2.0)),
                "workers": chance.choice((1, 2)),
                "log_every_steps": 20,
            },
        )

    def call(self, *options: str, before: Callable[[], object] | None = None) -> None:
        self.bring_back_mlflow()
        if self.calls >= MOST_CALLS:
            raise LostError(f"it is not done after {self.calls} calls")
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
    def finished_cells(self) -> int:
        return sum(read_result(RunFiles(path)) is not None for path in self.runs.glob("cells/*"))

    @property
    def done(self) -> bool:
        record = StudyRecord.read(self.study / "study.json")
        whole = self.finished_cells == len(DEPTHS) * len(self.budgets)
        return whole and record is not None and record.status == "FINISHED"

    def wait(self, seconds: float) -> bool:
        """Until the call ends, or so long; whether it has ended."""
        limit = time.monotonic() + seconds
        while self.alive and time.monotonic() < limit:
            time.sleep(0.05)
            for path in self.runs.glob("cells/*/result.json"):
                self.written[path.parent.name].add(path.stat().st_mtime_ns)
        return not self.alive

    def wait_until_it_trains(self) -> None:
        before, limit = self._bytes_of_curves(), time.monotonic() + LONGEST_SECONDS
        while self._bytes_of_curves() == before and not self.wait(0.1) and time.monotonic() < limit:
            pass

    def _bytes_of_curves(self) -> int:
        return sum(path.stat().st_size for path in self.runs.glob("*/*/metrics.jsonl"))

    def finish(self) -> None:
        while True:
            if not self.wait(LONGEST_SECONDS):
                raise LostError("a call doesn't end")
            if self.done:
                return
            time.sleep(1)
            self.call()

    def move_mlflow_away(self) -> None:
        _move(self.runs / "mlflow.db", self.folder / "away.db")

    def bring_back_mlflow(self) -> None:
        if (self.folder / "away.db").exists():
            _move(self.folder / "away.db", self.runs / "mlflow.db")

    def check(self, quiet: "Grid") -> None:
        """Compare with the undisturbed sweep of all budgets.

        Raises:
            LostError: Something differs.
        """
        self.bring_back_mlflow()
        sync = subprocess.run(command("sync"), cwd=self.folder, env=environment(), capture_output=True, text=True)
        _same("MLflow", sync.returncode, 0, sync.stdout + sync.stderr)
        own = {cell_folder(quiet.runs, depth, budget).name for depth in DEPTHS for budget in self.budgets}
        ours, theirs = results(self.runs), results(quiet.runs)
        _same("cells", set(ours), own)
        for name in own:
            _same(f"the row of {name}", numbers_of(ours[name]), numbers_of(theirs[name]))
            if len(self.written[name]) > 1 + self.damaged[name]:
                raise LostError(f"{name} was trained to its end {len(self.written[name])} times")
        others = {name.rpartition("-")[2] for name in set(theirs) - own}
        _same("MLflow's curves", delivered(self.folder), _without(delivered(quiet.folder), others))
        _same("the curves", self._curves(), _without(quiet._curves(), others))
        _until("processes are left", lambda: not _processes(self.folder))

    def _curves(self) -> dict[str, list[tuple[int, float]]]:
        return {
            RunFiles(path.parent).fingerprint: sorted(
                {(point.images, point.metrics.get("train_loss", 0.0)) for point in read_curve(path)}
            )
            for path in self.runs.glob("*/*/metrics.jsonl")
        }


Event = Callable[[Grid], bool]
"""Does something to a grid; whether it could."""


def send(numbers: Sequence[signal.Signals], whom: str, grid: Grid) -> bool:
    assert grid.process is not None
    pids = [grid.process.pid] if whom == "the call" else group_members(grid.process.pid)
    if whom == "a worker":
        workers = [pid for pid in pids if "spawn_main" in _words(pid)]
        pids = [grid.chance.choice(workers)] if workers else []
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
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a disk would that rots
    if path.name == "result.json":
        grid.damaged[path.parent.name] += 1
    return True


WHILE_IT_RUNS: dict[str, Event] = {
    f"{name} to {whom}": partial(send, numbers, whom)
    for name, numbers in SIGNALS.items()
    for whom in ("a worker", "the call", "all its processes")
} | {"MLflow's database locked": lock_mlflow}
BETWEEN_CALLS: dict[str, Event] = {
    f"{name} {'truncated' if truncate else 'with a flipped bit'}": partial(damage, pattern, truncate)
    for name, pattern in FILES.items()
    for truncate in (True, False)
} | {"MLflow's database away during a call": call_without_mlflow, "full disk during a call": call_on_a_full_disk}


def on_a_running_job(box: OneBox, act: Callable[[str], object]) -> Event:
    """Do something to one of the grid's jobs that run."""

    def event(grid: Grid) -> bool:
        jobs = sorted(state.slurm_job for state in running(grid.study).values() if box.node_of(state.slurm_job))
        if not jobs:
            return False
        try:
            act(grid.chance.choice(jobs))
        except AssertionError:  # its process is not there yet
            return False
        return True

    return event


def events_on_slurm(box: OneBox, chance: random.Random) -> dict[str, Event]:
    def preempt(slurm_job: str) -> None:
        box.preempt(box.node_of(slurm_job))
        names = {("urgent", "RUNNING")}
        _until("an urgent job doesn't start", lambda: names & {(each["name"], each["state"]) for each in box.queue()})

    def end_of_time(slurm_job: str) -> None:
        box.hold_until_the_time_limit(slurm_job)
        _until("a time limit doesn't come", lambda: not box.node_of(slurm_job), 120)
        box.run("scontrol", "update", f"JobId={slurm_job}", "TimeLimit=60")

    def node(slurm_job: str) -> None:
        name = box.node_of(slurm_job)
        box.kill_node(name)
        time.sleep(chance.uniform(1, 25))  # Slurm notices after ten seconds
        box.revive_node(name)

    def controller(grid: Grid) -> bool:
        box.stop_controller()
        time.sleep(grid.chance.uniform(1, 15))
        box.start_controller()
        return True

    def detach(grid: Grid) -> bool:
        send([signal.SIGINT], "the call", grid)
        if not grid.wait(60):
            raise LostError("a call doesn't end by SIGINT")
        grid.call("--detach")
        if not grid.wait(120):
            raise LostError("a detached call doesn't return")
        with suppress(LostError):  # in half the cases the last job does the rest
            _until("", lambda: not box.queue(), grid.chance.choice((20, 300)))
        return True

    return {
        "preempted by an urgent job": on_a_running_job(box, preempt),
        "scontrol requeue": on_a_running_job(box, lambda job: box.run("scontrol", "requeue", job)),
        "scancel of a run": on_a_running_job(box, lambda job: box.run("scancel", job)),
        "scancel of an array": on_a_running_job(box, lambda job: box.run("scancel", job.partition("_")[0])),
        "a node's daemon killed and revived": on_a_running_job(box, node),
        "SIGKILL to a run's process": on_a_running_job(box, box.kill_run),
        "time limit reached": on_a_running_job(box, end_of_time),
        "SIGKILL to the call": partial(send, SIGNALS["SIGKILL"], "all its processes"),
        "Slurm's controller away": controller,
        "detached": detach,
    }


class Deck:
    """All kinds of events in a random order, again and again, so that none is forgotten."""

    def __init__(self, kinds: Mapping[str, Event], chance: random.Random) -> None:
        self._kinds, self._chance, self._left = kinds, chance, list[str]()

    def play(self, grid: Grid) -> str | None:
        """The first that is possible now, if any is."""
        for fresh in (False, True):
            if fresh:
                more = self._chance.sample(sorted(self._kinds), len(self._kinds))
                self._left += [name for name in more if name not in self._left]
            for name in self._left:
                if self._kinds[name](grid):
                    self._left.remove(name)
                    return name
        return None


def disturb(grid: Grid, deck: Deck, between: Deck | None, happened: Callable[[str], object], most: int) -> None:
    """Let `most` events happen to a grid, or as many as there is time for."""
    done = 0
    while done < most:
        if not grid.alive and grid.done:
            return
        name = None
        if not grid.alive and grid.calls and between and grid.chance.random() < 0.5:
            name = between.play(grid)
        elif not grid.alive:
            grid.call()
        if name is None:
            if grid.chance.random() < 0.6:  # starting takes longer than training does, and is hit otherwise
                grid.wait_until_it_trains()
            if not grid.wait(grid.chance.uniform(0, 6)):
                name = deck.play(grid)
        if name is not None:
            happened(name)
            done += 1


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
        """One grid."""
        self.grids += 1
        where = "here" if box is None else "Slurm"
        folder = self.base / f"grid-{self.grids}"
        inner = [budget for budget in BUDGETS[1:-1] if self.chance.random() < 0.5]
        options = () if box is None else ON_SLURM
        grid = Grid(folder, [BUDGETS[0], *inner, BUDGETS[-1]], self.chance, *options)
        if box is not None:
            at_once, pack = self.chance.choice((1, 2, 4)), self.chance.choice((0, 30))
            write_site(folder, signal_seconds=55, at_once=at_once, pack_minutes=pack)
        happened: list[tuple[str, int]] = []

        def note(name: str) -> None:
            happened.append((name, grid.calls))
            self.counts[name] += 1
            self.say(f"grid {self.grids} ({where}), call {grid.calls}, {grid.finished_cells} cells: {name}")

        try:
            disturb(grid, deck, between, note, min(most, self.left))
            grid.finish()
            if box is not None:
                _until("Slurm jobs are left", lambda: not box.queue(), 240)
            grid.check(self.quiet)
        except Exception as error:
            self.lost.append(f"{folder}: {type(error).__name__}: {error}")
            self.say(f"LOST: {self.lost[-1]}")
            send([signal.SIGKILL], "all its processes", grid)
            if box is not None:
                box.run("scancel", "--me")
        else:
            self.say(f"grid {self.grids} ({where}) is whole, {grid.finished_cells} cells after {grid.calls} calls")
            shutil.rmtree(folder)
        for (name, calls), (_, end) in pairwise([*happened, ("", grid.calls)]):
            self.calls[name] += end - calls

    def table(self) -> str:
        width = max(map(len, self.counts))
        lines = [f"{'event':{width}}  times  further calls"]
        lines += [f"{name:{width}}  {count:5}  {self.calls[name]:13}" for name, count in sorted(self.counts.items())]
        return "\n".join([*lines, f"{'all':{width}}  {self.counts.total():5}  {self.calls.total():13}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.disable(logging.WARNING)  # of files that were damaged on purpose
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, and calls inherit that
    base = Path(tempfile.mkdtemp(prefix="varscale-chaos-"))
    campaign = Campaign(given.events, given.seed, base)
    chance = campaign.chance
    print(f"{given.events} events, seed {given.seed}, in {base}; an undisturbed sweep first", flush=True)
    campaign.quiet.finish()
    box: OneBox | None = None
    try:
        for program in ("sbatch", "srun", "slurmctld", "slurmd"):
            require_program(program)
        box = OneBox(base / "slurm", shared_path("slurm/one-box-slurm.sh"))
        box.start()
        os.environ["SLURM_CONF"] = box.environment["SLURM_CONF"]
    except pytest.skip.Exception as reason:
        print(f"{reason}: all grids are swept here", flush=True)
    here, between = Deck(WHILE_IT_RUNS, chance), Deck(BETWEEN_CALLS, chance)
    on_slurm = Deck(events_on_slurm(box, chance), chance) if box is not None else None
    try:
        while campaign.left > 0:
            if box is not None and on_slurm is not None and campaign.grids % 2:
                campaign.sweep(box, on_slurm, None, chance.randrange(3, 6))
            else:
                campaign.sweep(None, here, between, chance.randrange(5, 9))
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


def _same(what: str, found: object, expected: object, note: str = "") -> None:
    if found == expected:
        return
    if isinstance(found, dict) and isinstance(expected, dict):
        key = next(key for key in {**found, **expected} if found.get(key) != expected.get(key))
        what, found, expected = f"{what}: {key}", found.get(key), expected.get(key)
    raise LostError(f"{what}: {found!s:.1000}, expected {expected!s:.1000} {note}")


def _until(what: str, condition: Callable[[], object], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            raise LostError(what)
        time.sleep(0.2)


def _without(items: Mapping[str, list[tuple[int, float]]], keys: set[str]) -> dict[str, list[tuple[int, float]]]:
    return {key: value for key, value in items.items() if key not in keys}


def _words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _processes(folder: Path) -> list[int]:
    """Those that work in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (path / "cwd").readlink().is_relative_to(folder):
                found.append(int(path.name))
    return found


def _move(source: Path, target: Path) -> None:
    """Of SQLite, with what a killed transaction left beside it."""
    for suffix in ("", "-journal"):
        own, other = (path.with_name(path.name + suffix) for path in (source, target))
        other.unlink(missing_ok=True)
        if own.exists():
            own.replace(other)


if __name__ == "__main__":
    sys.exit(main())
