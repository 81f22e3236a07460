"""A Lightning logger that appends points to a run's metrics.jsonl: the truth that MLflow is a view of."""

import errno
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from varscale.store.curves import CurvePoint, curve_line, mend_curve


class MetricsFile(Logger):
    """Appends a point a line; step counts become images by `batch_size`.

    A run that goes on from a checkpoint repeats steps, to the bit; their points are already in the file and are not
    written again, so a reader that has read up to some byte never has to go back. A torn last line (a killed process,
    a full disk) is removed on opening.
    """

    def __init__(self, path: Path, batch_size: int) -> None:
        super().__init__()
        self._path = path
        self._batch_size = batch_size
        self._written = mend_curve(path)

    @property
    def name(self) -> str:
        """The run's folder name."""
        return self._path.parent.name

    @property
    def version(self) -> str:
        """Unused by this logger."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one point; `step` is the number of steps taken since the run's start, which the modules log."""
        images = (step or 0) * self._batch_size
        values = {name: float(value) for name, value in metrics.items() if name not in ("epoch", "step")}
        if not values or images <= self._written:
            return
        line = curve_line(CurvePoint(time.time(), images, values))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:  # one write a line: a reader sees whole lines or a torn last one
            if os.write(file.fileno(), line) < len(line):
                raise OSError(errno.ENOSPC, "no space left for metrics", str(self._path))
        self._written = images

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: parameters are in the run's run.json."""
