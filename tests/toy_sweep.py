"""A sweep so small that all of it, through the command and its worker processes, takes seconds; and how to call it."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from sweeps.grid import grid_cells
from varscale.config import Experiment
from varscale.config.yaml import validate

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = (2e7, 3e7, 4e7, 6e7)
TOY: dict[str, Any] = {
    "name": "toy",
    "data": {"kind": "rings", "image_size": 8, "num_classes": 2, "max_rings": 2, "validation_images": 32},
    "tokenizer": {
        "patch_nums": [1, 2, 4],
        "vocab_size": 16,
        "latent_channels": 4,
        "base_channels": 4,
        "channel_multipliers": [1, 1],
        "residual_blocks": 1,
        "attention": False,
        "norm_groups": 2,
        "accept": True,  # 20 steps are too few to beat one mean picture
        "training": {"images": 160, "batch_size": 8, "lr": 5e-3, "warmup_images": 16, "quantize_after": 0.2},
    },
    "model": {"width_per_depth": 4, "head_dim": 4, "drop_path_at_depth_24": 1.0, "adaln_gamma_init": 0.1},
    "optim": {"lr": 5e-3, "lr_batch_size": 4, "batch_size": 4, "warmup_fraction": 0.2},
    "grid": {"depths": [2, 3], "budgets": list(BUDGETS), "min_steps": 5},
    "evaluation": {"samples_per_class": 1, "batch_size": 32},
    "runtime": {
        "checkpoint_seconds": 0.001,  # after every step
        "compile": "off",
        "log_every_steps": 2,
        "threads": 1,
        "tokenizer_threads": 1,
        "workers": 1,
    },
}
"""Cells of 5 to 49 steps, a tokenizer of 20."""


def toy_settings(**sections: Any) -> dict[str, Any]:
    """Plain values of the toy experiment; `sections` changes fields of whole sections, or a value beside them."""
    merged = {**TOY, **{name: value for name, value in sections.items() if not isinstance(value, dict)}}
    changes = {name: value for name, value in sections.items() if isinstance(value, dict)}
    return merged | {name: {**merged.get(name, {}), **change} for name, change in changes.items()}


def toy_experiment(**sections: Any) -> Experiment:
    return validate(toy_settings(**sections), "a test")


def write_toy(folder: Path, **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "toy.yaml"
    path.write_text(json.dumps(toy_settings(**sections)))
    return path


def environment() -> dict[str, str]:
    hidden = ("MLFLOW_TRACKING_URI",)
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONFAULTHANDLER": "1"}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "varscale.cli", *map(str, arguments)]


def varscale(
    *arguments: str | Path, cwd: Path, timeout: float = 240, before: Callable[[], object] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run the command in a folder; `before` runs in the new process first."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        preexec_fn=before,  # nothing but limits is set there
    )


def start(*arguments: str | Path, cwd: Path) -> "subprocess.Popen[str]":
    """Start the command as a process group of its own."""
    return subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def group_members(group: int) -> list[int]:
    """Processes of a group, zombies apart."""
    return list(_parents(group))


def workers(group: int) -> list[int]:
    """Workers among them: forks of a process, started by the sweep's, which shares their command line."""
    parents = _parents(group)
    servers = [pid for pid in parents if b"forkserver" in _command_line(pid)]
    return [pid for pid in servers if parents[pid] in servers]


def _parents(group: int) -> dict[int, int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    return parents


def _command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def wait_for(
    condition: Callable[[], Any],
    seconds: float = 120,
    process: "subprocess.Popen[str] | None" = None,
    interval: float = 0.002,
) -> None:
    """Look every `interval` seconds until something is so; fails when it takes too long, or the process ends first."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it never came to be"
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(interval)


def child_seconds() -> float:
    """Processor time of the processes that this one started and that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def results(runs: Path) -> dict[str, dict[str, Any]]:
    """Runs-table rows of finished cells, by folder name."""
    paths = sorted((runs / "cells").glob("*/result.json"))
    return {path.parent.name: json.loads(path.read_text())["row"] for path in paths}


def delivered(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Each run's training curve in MLflow, by fingerprint."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'toy'")
    return {
        run.data.tags["fingerprint"]: [
            (point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train_loss")
        ]
        for run in client.search_runs([experiment.experiment_id])
        if "fingerprint" in run.data.tags
    }


def cell_folder(runs: Path, depth: int, budget: float) -> Path:
    """The folder of the toy's cell of this size and nominal budget."""
    (cell,) = grid_cells(toy_experiment(grid={"depths": [depth], "budgets": [budget]}))
    (name,) = [name for name, row in results(runs).items() if (row["depth"], row["steps"]) == (depth, cell.steps)]
    return runs / "cells" / name


def numbers_of(row: dict[str, Any]) -> dict[str, Any]:
    """What must be equal to the bit however a cell came about; not how long it took or what it is part of."""
    apart = (
        "wall_seconds",
        "images_per_second",
        "utilisation",
        "data_wait_share",
        "experiment",
        "unique_images",
        "epochs",
    )
    return {name: value for name, value in row.items() if name not in apart}


def errors(process: "subprocess.CompletedProcess[str]") -> Sequence[str]:
    """Lines on standard error, those of Python's warnings apart."""
    return [line for line in process.stderr.splitlines() if line.strip()]


@dataclass(frozen=True)
class Finished:
    """A toy sweep that ran through the command, uninterrupted, from nothing."""

    folder: Path
    yaml: Path
    process: "subprocess.CompletedProcess[str]"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def study(self) -> Path:
        return self.runs / "studies" / "toy"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One for all processes of pytest-xdist: a test that changes anything in it takes a copy.

    Its user's umask lets everybody write.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    said = folder / "said.json"
    with FileLock(f"{folder}.lock"):
        if not said.exists():
            process = varscale("sweep", write_toy(folder), cwd=folder, before=partial(os.umask, 0))
            assert process.returncode == 0, process.stdout + process.stderr
            said.write_text(json.dumps([process.stdout, process.stderr]))
    return Finished(folder, folder / "toy.yaml", subprocess.CompletedProcess([], 0, *json.loads(said.read_text())))
