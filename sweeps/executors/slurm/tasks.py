"""The tasks of one job of Slurm, a device each: the first runs the jobs of a unit, the others take part in its runs."""

import os
import subprocess
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sweeps.executors.local import redirect_output
from sweeps.jobs.base import Job
from varscale.numerics.machine import Peers, Share

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_FAREWELL_SECONDS = 60.0
_LONGEST_WAIT_SECONDS = 3600.0
"""For the end that Slurm announced."""


class Tasks:
    """This process and the others of its job; the first one leads."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self._begun = 0

    @classmethod
    def of_slurm(cls, unit: str) -> "Tasks":
        """Those of a unit, by Slurm's environment; from here on this process sees its own GPU only."""
        count = int(os.environ.get("SLURM_NTASKS", "1"))
        if count == 1:
            return cls(Peers())
        gpus, local = os.environ.get("CUDA_VISIBLE_DEVICES", ""), int(os.environ["SLURM_LOCALID"])
        if "," in gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[local]
        if os.environ["SLURM_NNODES"] == "1":
            turn = os.environ.get("SLURM_RESTART_COUNT", "0")  # a turn that was killed leaves its file behind
            meeting = str(Path(tempfile.gettempdir()) / f"varscale-{unit}-{turn}")
        else:  # at the node of the script, and of the first task; below the ports that systems give to anyone
            port = 20_000 + int(os.environ["SLURM_JOB_ID"]) % 12_000
            meeting = f"{os.environ['SLURM_LAUNCH_NODE_IPADDR']}:{port}"
        return cls(Peers(int(os.environ["SLURM_PROCID"]), count, meeting))

    def begin(self, job: Job) -> None:
        """Let the others take part in a run, where it takes several devices."""
        if job.resources.run.processes > 1:
            self._tell(job.key)

    def end(self) -> None:
        """Let the others end, and wait until they do: the meeting may end with this process."""
        if self.peers.count == 1:
            return
        self._tell("")
        until = time.monotonic() + _FAREWELL_SECONDS
        while self._meeting.add("ended", 0) < self.peers.count - 1 and time.monotonic() < until:
            time.sleep(0.05)
        if self.peers.on_one_machine:
            Path(self.peers.meeting).unlink(missing_ok=True)

    def follow(self, jobs: Sequence[Job], share: Share) -> None:
        """Take part in what the first one begins, until it ends."""
        from varscale.training.interruption import Interrupted

        by_key = {job.key: job for job in jobs}
        while key := self._meeting.get(self._next()).decode():
            redirect_output(by_key[key].files.log)
            try:
                by_key[key].run(share, lambda done, total: None)
            except Interrupted:
                wait_for_the_end(requeue=False)
            except Exception:  # the first one's run fails for the same reason, or because this one left it
                traceback.print_exc()
        self._meeting.add("ended", 1)

    def _tell(self, key: str) -> None:
        self._meeting.set(self._next(), key)

    def _next(self) -> str:
        self._begun += 1
        return f"next-{self._begun}"

    @property
    def _meeting(self) -> "Store":
        from varscale.training.distributed import meet

        return meet(self.peers)


def slurm_id() -> str:
    """This process's job of Slurm, as scontrol takes it."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def wait_for_the_end(*, requeue: bool) -> None:
    """Ask Slurm for another turn, and wait until it ends this one; a job that ended by itself gets no other.

    After SIGTERM Slurm knows already what it will do: preempt, requeue or cancel.
    """
    if requeue:
        scontrol("requeue", slurm_id())
    time.sleep(_LONGEST_WAIT_SECONDS)


def scontrol(*arguments: str) -> None:
    """Call scontrol, which a site may forbid."""
    with suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(["scontrol", *arguments], check=False, timeout=60, capture_output=True)
