"""Import rules: which package knows which, what stays light, and torchvision beside a CPU build of torch."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from toy_sweep import child_seconds

import analysis
import sweeps
import varscale

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "torchvision", "lightning", "pandas", "scipy", "matplotlib", "mlflow", "optuna", "pyarrow"}
PACKAGES = [
    name
    for package in (varscale, sweeps, analysis)
    for name in (
        package.__name__,
        *(m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.") if m.ispkg),
    )
]
LIGHT_MODULES = [
    "varscale.families.var.config",
    "varscale.cli",
    "varscale.config",
    "varscale.config.yaml",
    "varscale.store.layout",
    "sweeps.orchestrator",
]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_rules_hold() -> None:
    lint_imports = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([str(lint_imports), "--no-cache"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", [*PACKAGES, *LIGHT_MODULES])
def test_these_import_nothing_heavy(module: str) -> None:
    loaded = python(f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})").split()
    assert HEAVY.intersection(loaded) == set()


def test_help_answers_within_a_second() -> None:
    command, times = [sys.executable, "-m", "varscale.cli"], []
    for _ in range(3):  # processor time, and the best of three: other processes may be busy
        before = child_seconds()
        done = subprocess.run([*command, "--help"], capture_output=True, cwd=ROOT, check=True)
        times.append(child_seconds() - before)
    assert b"sweep" in done.stdout
    assert min(times) < 1.0
