"""Every test runs on one torch thread and with the kernels that were given, whatever others in its process left."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MPLBACKEND", "agg")
sys.path.insert(0, str(Path(__file__).parent))  # for requirements.py

from one_box import one_box  # noqa: F401  # a fixture of tests on Slurm
from sweep_here import sweeping  # noqa: F401  # a fixture of sweeps' tests
from toy_sweep import finished  # noqa: F401  # a fixture of sweeps' and the command's tests

_CACHE = tempfile.TemporaryDirectory(prefix="varscale-cache-")
os.environ["VARSCALE_CACHE"] = _CACHE.name  # of this process and those that it starts
hypothesis_settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis_settings.load_profile("untimed")
_KERNELS = os.environ.get("VARSCALE_NATIVE")
_FIRST = ("sweeps", "tracking", "evaluation", "cli", "generation", "training", "tokenizer", "data", "benchmarks")
"""Folders with files that take minutes. They are handed out first, so that no worker ends alone with one of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of `_FIRST` before all others (needs `--no-loadscope-reorder`, or those with most tests are first)."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(_FIRST)}
    items.sort(key=lambda item: min((ranks[each] for each in item.path.parents if each in ranks), default=len(ranks)))


@pytest.fixture(autouse=True)
def _kernels_as_given() -> Iterator[None]:
    """A run switches kernels for its whole process; the next test's may want others."""
    yield
    if _KERNELS is None:
        os.environ.pop("VARSCALE_NATIVE", None)
    else:
        os.environ["VARSCALE_NATIVE"] = _KERNELS
