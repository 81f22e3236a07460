"""Worker processes: their answers, their deaths, their logs and their ends."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from launcher_jobs import Act
from toy_sweep import wait_for

from sweeps.executors import local
from sweeps.executors.local import Event, Failed, Finished, LocalLauncher, Progress
from varscale.store.layout import RunFiles


@pytest.fixture(scope="module")
def launcher() -> Iterator[LocalLauncher]:
    launcher = LocalLauncher(workers=1, threads=3, gpus=0)
    yield launcher
    launcher.stop()


def do(launcher: LocalLauncher, job: Act, worker: int = 0) -> list[Event]:
    launcher.submit(worker, job)  # type: ignore[arg-type]
    events: list[Event] = []
    while worker not in launcher.idle:
        events += launcher.events(60)
    return events


def test_a_job_and_its_environment(launcher: LocalLauncher) -> None:
    progress, finished = do(launcher, Act("say"))
    assert progress == Progress(0, 1, 2)
    assert isinstance(finished, Finished)
    assert finished.value["OMP_NUM_THREADS"] == "3"
    assert os.environ.get("OMP_NUM_THREADS") != "3"  # this process's own is as before


def test_workers_share_out_the_gpus_that_the_user_left_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers on the second and fourth of a machine's GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    launcher = LocalLauncher(workers=3, threads=1, gpus=2)
    try:
        ends = [do(launcher, Act("say"), worker)[-1] for worker in range(3)]
    finally:
        launcher.stop()
    assert [end.value["CUDA_VISIBLE_DEVICES"] for end in ends if isinstance(end, Finished)] == ["1", "3", "1"]


def test_what_a_job_prints_is_in_its_log(launcher: LocalLauncher, tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "run")
    do(launcher, Act("say", files))
    do(launcher, Act("raise", files))
    text = files.log.read_text()
    assert "said on standard output" in text
    assert "said on standard error" in text
    assert "ArithmeticError: two" in text


def test_an_error_is_one_line_and_the_worker_lives(launcher: LocalLauncher) -> None:
    assert do(launcher, Act("raise"))[-1] == Failed(0, "ArithmeticError", "two lines")
    assert isinstance(do(launcher, Act("say"))[-1], Finished)


def test_a_worker_that_dies_is_replaced(launcher: LocalLauncher) -> None:
    assert do(launcher, Act("die"))[-1] == Failed(0, "WorkerDied", "its process ended with exit code -9")
    assert isinstance(do(launcher, Act("say"))[-1], Finished)


def test_a_worker_that_died_idle_is_replaced(launcher: LocalLauncher) -> None:
    process, _ = launcher._workers[0]
    os.kill(process.pid, signal.SIGINT)  # Ctrl-C is the orchestrator's
    assert isinstance(do(launcher, Act("say"))[-1], Finished)
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not process.is_alive(), seconds=10)
    assert isinstance(do(launcher, Act("say"))[-1], Finished)


def test_a_log_that_cannot_be_written_is_a_jobs_error(launcher: LocalLauncher, tmp_path: Path) -> None:
    """As on a full disk: the reason reaches the sweep, and the worker lives."""
    (tmp_path / "file").touch()
    failed = do(launcher, Act("say", RunFiles(tmp_path / "file" / "run")))[-1]
    assert isinstance(failed, Failed)
    assert failed.kind == "NotADirectoryError"
    assert isinstance(do(launcher, Act("say"))[-1], Finished)


def test_stop_ends_a_worker_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a driver's call: neither a message nor SIGTERM reaches it."""
    monkeypatch.setattr(local, "_FAREWELL_SECONDS", 0.2)
    launcher = LocalLauncher(workers=1, threads=1, gpus=0)
    do(launcher, Act("say"))
    process, _ = launcher._workers[0]
    os.kill(process.pid, signal.SIGSTOP)
    launcher.stop()
    assert not process.is_alive()


def test_stop_ends_the_workers_at_once() -> None:
    launcher = LocalLauncher(workers=1, threads=1, gpus=0)
    process, _ = launcher._workers[0]
    launcher.stop()
    assert not process.is_alive()
