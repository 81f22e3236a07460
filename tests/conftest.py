"""Every test runs on one torch thread, so that results and timings don't depend on the machine's width."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MPLBACKEND", "agg")
sys.path.insert(0, str(Path(__file__).parent))  # for requirements.py

from toy_sweep import finished  # noqa: F401  # a fixture of sweeps' and the command's tests

import varscale  # noqa: F401  # repairs torchvision before any test imports lightning or torchmetrics
