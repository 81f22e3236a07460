"""Jobs for worker processes, which import them by this module's name."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from varscale.store.layout import RunFiles


@dataclass(frozen=True)
class Act:
    """Does one thing: `say`, `raise` or `die`."""

    what: str
    files: RunFiles | None = None

    def run(self, report: Callable[[int, int], None]) -> Any:
        report(1, 2)
        if self.what == "raise":
            raise ArithmeticError("two\n  lines")
        if self.what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        print("said on standard output")
        print("said on standard error", file=sys.stderr)
        return {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
