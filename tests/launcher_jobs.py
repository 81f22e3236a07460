"""Jobs for worker processes, which import them by this module's name."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeps.jobs.base import Job, Resources
from varscale.errors import DataError, Diverged
from varscale.numerics.machine import Share
from varscale.store.layout import RunFiles


@dataclass(frozen=True)
class Act(Job):
    """Does one thing: `say`, `raise`, `diverge`, `refuse`, `die`, `stop`, `wait` or `meet`."""

    what: str
    folder: Path
    needs: tuple[str, ...] = ()
    whole: bool = False

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def title(self) -> str:
        return f"the job {self.folder.name}"

    @property
    def files(self) -> RunFiles:
        return RunFiles(self.folder)

    @property
    def resources(self) -> Resources:
        return Resources(self.whole)

    def done(self) -> bool:
        return self.files.result.exists()

    def described(self) -> dict[str, Any]:
        return {}

    def write(self) -> Path:
        return self.files.job

    def run(self, share: Share, report: Callable[[int, int], None]) -> None:
        report(1, 2)
        print("said on standard output")
        print("said on standard error", file=sys.stderr)
        match self.what:
            case "raise":
                raise ArithmeticError("two\n  lines")
            case "diverge":
                raise Diverged("the loss is nan")
            case "refuse":
                raise DataError("images are missing")
            case "die" if not self.files.last_checkpoint.exists():
                self.files.last_checkpoint.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop" if not self.files.last_checkpoint.exists():
                self.files.last_checkpoint.touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            case "wait":
                time.sleep(600)
            case "meet":  # two others, so that each has a worker of its own
                (self.folder / "here").touch()
                while len(list(self.folder.parent.glob("*/here"))) < 3:
                    time.sleep(0.01)
        names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        said = {name: os.environ.get(name) for name in names} | {"threads": share.threads, "pid": os.getpid()}
        self.files.result.write_text(json.dumps({**said, "began": time.time()}))
