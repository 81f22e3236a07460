"""A real Slurm of a few nodes on this machine, and what its users, urgent jobs and failures do to a sweep."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from requirements import require_program, shared_path

from sweeps.executors.slurm.records import UnitState, arrays

SITE = {"cpus": 1, "poll_seconds": 0.5, "grace_seconds": 2, "pack_minutes": 0}
ON_SLURM = ("--launcher", "slurm", "--site", "sites.yaml")


def write_site(folder: Path, **settings: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sites.yaml").write_text(json.dumps({"onebox": {**SITE, **settings}}))


NODES = ("n1", "n2")


class OneBox:
    """Two nodes with the partitions main (preempted) and urgent."""

    def __init__(self, folder: Path, script: Path) -> None:
        self.folder, self._script = folder, script
        port = 20_000 + os.getpid() % 600 * 20  # below those that the system gives away
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PORT": str(port)}

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["bash", self._script, self.folder, "2"], env=self.environment, check=True, timeout=120)

    def stop(self) -> None:
        self.run("scancel", "--me")
        time.sleep(1)
        subprocess.run(["bash", self._script, "stop", self.folder], env=self.environment, check=True, timeout=60)

    def run(self, *command: str, input: str | None = None) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, input=input, check=False
        )
        return done.stdout

    def stop_controller(self) -> None:
        """Jobs go on; nothing answers squeue."""
        process = int((self.folder / "slurmctld.pid").read_text())
        os.kill(process, signal.SIGTERM)
        while Path(f"/proc/{process}/cwd").exists():  # not a zombie's
            time.sleep(0.1)

    def start_controller(self) -> None:
        """It remembers the queue."""
        subprocess.run(["/usr/sbin/slurmctld"], env=self.environment, check=True)

    def preempt(self, node: str, seconds: int = 2) -> None:
        """Somebody's urgent job takes a whole node."""
        script = f"#!/bin/bash\nsleep {seconds}\n"
        options = ["--partition=urgent", f"--nodelist={node}", "--exclusive", "--output=/dev/null"]
        self.run("sbatch", "--job-name=urgent", *options, input=script)

    def kill_run(self, slurm_job: str) -> None:
        """As the system does when memory runs out."""
        os.kill(_process_of(slurm_job), signal.SIGKILL)

    def kill_node(self, node: str) -> None:
        """Its daemon dies, its processes live on until Slurm notices."""
        os.kill(int((self.folder / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)

    def revive_node(self, node: str) -> None:
        subprocess.run(["/usr/sbin/slurmd", "-N", node], env=self.environment, check=True)

    def hold_until_the_time_limit(self, slurm_job: str) -> None:
        """Cut a job's time limit to a minute, and stop its process, however fast: Slurm wakes it to tell it."""
        os.kill(_process_of(slurm_job), signal.SIGSTOP)
        self.run("scontrol", "update", f"JobId={slurm_job}", "TimeLimit=1")

    def hold(self, slurm_job: str) -> int:
        """Stop its process, which SIGCONT wakes: so it is still there when somebody looks, however fast it is."""
        process = _process_of(slurm_job)
        os.kill(process, signal.SIGSTOP)
        return process

    def queue(self) -> list[dict[str, str]]:
        """What is queued or runs."""
        names = ("id", "state", "node", "name")
        lines = self.run("squeue", "--noheader", "--array", "--format=%i|%T|%N|%j").splitlines()
        return [dict(zip(names, line.split("|"), strict=True)) for line in lines]

    def node_of(self, slurm_job: str) -> str:
        return next((each["node"] for each in self.queue() if each["id"] == slurm_job), "")


def _process_of(slurm_job: str) -> int:
    """The process that runs a job's unit."""
    array, _, task = slurm_job.partition("_")
    wanted = {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={task}"} if task else {f"SLURM_JOB_ID={array}"}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            names = set((folder / "environ").read_bytes().decode(errors="replace").split("\0"))
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if wanted <= names and "submitit.core._submit" in words and Path(words[0]).name.startswith("python"):
                return int(folder.name)
    raise AssertionError(f"no process of Slurm job {slurm_job}")


def running(study: Path) -> dict[str, UnitState]:
    """Jobs that run, by key, and how far they are."""
    found: dict[str, UnitState] = {}
    for folder, array in arrays(study / "slurm"):
        for index in range(len(array.units)):
            state = UnitState.read(folder / f"state-{index}.json")
            if state is not None and state.running and not state.stopped:
                found[state.running] = state
    return found


@pytest.fixture(scope="module")
def one_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneBox]:
    for program in ("sbatch", "srun", "slurmctld", "slurmd"):
        require_program(program)
    box = OneBox(tmp_path_factory.mktemp("slurm"), shared_path("slurm/one-box-slurm.sh"))
    box.start()
    before: Any = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = box.environment["SLURM_CONF"]
    try:
        yield box
    finally:
        box.stop()
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
