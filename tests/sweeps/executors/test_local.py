"""Worker processes: what they are given, their answers, their deaths, their logs and their ends."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launcher_jobs import Act
from toy_sweep import ROOT, environment, toy_experiment, wait_for

from sweeps.executors import local
from sweeps.executors.base import Graph
from sweeps.executors.local import LocalExecutor
from sweeps.jobs.base import Job, StudyPlace
from varscale.numerics.machine import MachineShares, Share
from varscale.store.layout import RunFiles, Store, TokenFiles


class Told:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.started_jobs: list[str] = []
        self.progress_of: list[tuple[str, int, int]] = []
        self.states: dict[str, str] = {}
        self.notes: list[str] = []

    def started(self, job: Job) -> None:
        self.started_jobs.append(job.key)

    def progress(self, job: Job, done: int, total: int) -> None:
        self.progress_of.append((job.key, done, total))

    def ended(self, job: Job, state: str) -> None:
        self.states[job.key] = state

    def note(self, text: str) -> None:
        self.notes.append(text)

    def refresh(self) -> None: ...


def shares(workers: int = 1, threads: int = 3, gpus: int = 0) -> MachineShares:
    return MachineShares(workers, gpus, Share(threads), Share(5))


def act(folder: Path, what: str = "say", **fields: Any) -> Act:
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder)
    place = StudyPlace(store, store.study("toy"), RunFiles(folder / "t"), TokenFiles(folder / "k"))
    return Act(toy_experiment(), place, what, folder, **fields)


def said(job: Act) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(job.files.result.read_text())
    return content


@pytest.fixture(scope="module")
def executor() -> Iterator[LocalExecutor]:
    executor = LocalExecutor(shares())
    yield executor
    executor.stop()


def do(executor: LocalExecutor, *jobs: Job, retries: int = 0) -> tuple[Told, Graph]:
    told = Told()
    return told, executor.run(jobs, told, retries)


def test_a_job_its_environment_and_its_log(executor: LocalExecutor, tmp_path: Path) -> None:
    job = act(tmp_path / "a")
    told, graph = do(executor, job)
    assert graph.failed == []
    assert (told.started_jobs, told.progress_of, told.states) == (["a"], [("a", 1, 2)], {"a": "done"})
    assert said(job)["OMP_NUM_THREADS"] == "3"
    assert said(job)["threads"] == 3
    assert os.environ.get("OMP_NUM_THREADS") != "3"  # this process's own is as before
    assert "said on standard output" in job.files.log.read_text()
    assert "said on standard error" in job.files.log.read_text()


def test_jobs_wait_for_what_they_need_and_the_whole_machine_is_for_one(tmp_path: Path) -> None:
    executor = LocalExecutor(shares(workers=2))
    first, second = act(tmp_path / "first"), act(tmp_path / "second", needs=("first",))
    alone = act(tmp_path / "alone", whole=True, needs=("second",))
    try:
        told, graph = do(executor, alone, second, first)
    finally:
        executor.stop()
    assert graph.failed == []
    assert told.started_jobs == ["first", "second", "alone"]
    assert said(alone)["threads"] == 5
    assert said(first)["began"] < said(second)["began"] < said(alone)["began"]


def test_workers_share_out_the_gpus_that_the_user_left_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers on the second and fourth of a machine's GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    executor = LocalExecutor(shares(workers=3, gpus=2))
    jobs = [act(tmp_path / name, "meet") for name in ("a", "b", "c")]
    try:
        do(executor, *jobs)
    finally:
        executor.stop()
    assert [said(job)["CUDA_VISIBLE_DEVICES"] for job in jobs] == ["1", "3", "1"]


def test_what_workers_are_forks_of_asks_nothing_of_a_gpu() -> None:
    """CUDA can't be used in a fork of a process that has begun to."""
    script = """
import torch
def refuse(*arguments): raise SystemExit("CUDA was asked for")
torch._C._cuda_getDeviceCount = torch._C._cuda_init = refuse
import sweeps.executors.forked
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=environment(), cwd=ROOT)


def test_workers_import_nothing_from_the_current_folder(tmp_path: Path) -> None:
    """A researcher's folder may well have a file of that name."""
    (tmp_path / "lightning.py").write_text("from pathlib import Path; Path('imported').touch()")
    script = f"""
import sys
from pathlib import Path
sys.path += {[str(ROOT / "tests"), str(Path(__file__).parent)]!r}
from test_local import LocalExecutor, act, do, shares
executor = LocalExecutor(shares())
do(executor, act(Path({str(tmp_path)!r}) / "a"))
executor.stop()
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=environment(), cwd=tmp_path)
    assert (tmp_path / "a" / "result.json").exists()
    assert not (tmp_path / "imported").exists()


def test_a_long_path_of_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would not fit into a socket's address."""
    (long := tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    executor = LocalExecutor(shares())
    job = act(tmp_path / "a")
    try:
        do(executor, job)
    finally:
        executor.stop()
    assert said(job)["OMP_NUM_THREADS"] == "3"


def test_an_error_is_one_line_with_a_traceback_in_the_log(executor: LocalExecutor, tmp_path: Path) -> None:
    job = act(tmp_path / "a", "raise")
    told, graph = do(executor, job, retries=1)
    assert graph.failed == [(job, "two lines")]
    assert told.started_jobs == ["a", "a"]
    assert told.notes == ["the job a failed (two lines); trying again", "the job a failed: two lines"]
    assert "ArithmeticError: two" in job.files.log.read_text()
    assert do(executor, act(tmp_path / "b"))[1].failed == []  # the worker lives


@pytest.mark.parametrize(("what", "reason"), [("refuse", "images are missing"), ("diverge", "the loss is nan")])
def test_errors_that_a_person_mends_are_not_tried_again(
    executor: LocalExecutor, tmp_path: Path, what: str, reason: str
) -> None:
    """They keep their class on the way from the worker; what needs the job is lost with it."""
    job = act(tmp_path / "a", what)
    after = act(tmp_path / "b", needs=("a",))
    told, graph = do(executor, job, after, retries=5)
    assert graph.failed == [(job, reason), (after, reason)]
    assert told.started_jobs == ["a"]
    assert "Traceback" not in job.files.log.read_text()


def test_a_worker_that_dies_is_replaced(executor: LocalExecutor, tmp_path: Path) -> None:
    told, graph = do(executor, act(tmp_path / "a", "die"), retries=1)
    assert graph.failed == []
    assert told.notes == ["the job a failed (its process ended with exit code -9); trying again"]


def test_a_worker_that_gives_no_sign_of_life_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was stopped, or hangs in a driver."""
    monkeypatch.setattr(local, "LONGEST_SILENCE_SECONDS", 10.0)
    executor = LocalExecutor(shares())
    try:
        told, graph = do(executor, act(tmp_path / "a", "stop"), retries=1)
    finally:
        executor.stop()
    assert graph.failed == []
    assert told.notes == [
        "the job a failed (its process gave no sign of life for 10 seconds and was ended); trying again"
    ]


def test_a_worker_that_died_idle_is_replaced(executor: LocalExecutor, tmp_path: Path) -> None:
    do(executor, act(tmp_path / "a"))
    process = executor._workers[0].process
    os.kill(process.pid, signal.SIGINT)  # Ctrl-C is the orchestrator's
    assert do(executor, act(tmp_path / "b"))[1].failed == []
    assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not process.is_alive(), seconds=10)
    assert do(executor, act(tmp_path / "c"))[1].failed == []


def test_a_log_that_cannot_be_written_is_a_jobs_error(executor: LocalExecutor, tmp_path: Path) -> None:
    """As on a full disk: the reason reaches the sweep, and the worker lives."""
    (tmp_path / "a" / "run.log").mkdir(parents=True)
    ((_, reason),) = do(executor, act(tmp_path / "a"))[1].failed
    assert "run.log" in reason
    assert do(executor, act(tmp_path / "b"))[1].failed == []


@pytest.mark.parametrize("stopped", [False, True], ids=["busy", "stuck"])
def test_stop_ends_workers_whatever_they_do(tmp_path: Path, stopped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is stuck, which neither a message nor SIGTERM reaches."""
    monkeypatch.setattr(local, "FAREWELL_SECONDS", 0.5)
    executor, job, told = LocalExecutor(shares()), act(tmp_path / "a", "wait"), Told()
    before = set(multiprocessing.active_children())
    running = threading.Thread(target=executor.run, args=([job], told), daemon=True)
    running.start()
    wait_for(lambda: told.progress_of, seconds=120)
    process = executor._workers[0].process
    if stopped:
        os.kill(process.pid, signal.SIGSTOP)
    executor.stop()
    assert not process.is_alive()
    running.join(30)
    assert not running.is_alive()
    assert set(multiprocessing.active_children()) == before  # none is started in the place of those that ended
