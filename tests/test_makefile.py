"""When `make` makes, updates or keeps .venv: with a stand-in for Python that records what it is asked to do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from requirements import require_program

ROOT = Path(__file__).resolve().parents[1]

STAND_IN = """#!/bin/bash
# A Python whose environments are copies of this script; FAIL_PIP makes its pip fail after half the work.
echo "$*" >> "$CALLS"
case "$*" in
  "--version") echo "Python 3.0" ;;
  "-m venv --clear .venv") rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip install"*) [ -z "$FAIL_PIP" ] || { echo "no network today"; exit 1; } ;;
esac
"""


class Checkout:
    def __init__(self, folder: Path, calls: Path) -> None:
        self.folder, self.calls = folder, calls

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        python = self.folder / "stand-in"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        return subprocess.run(
            ["make", *arguments],
            cwd=self.folder,
            env={**environment, "PYTHON": str(python), "CALLS": str(self.calls), "FAIL_PIP": "", **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def made(self) -> bool:
        return "venv --clear" in self.calls.read_text()

    @property
    def installed(self) -> bool:
        return "-m pip install" in self.calls.read_text()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    require_program("make")
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "stand-in").write_text(STAND_IN)
    (folder / "stand-in").chmod(0o755)
    return Checkout(folder, tmp_path / "calls")


@pytest.mark.parametrize("target", ["setup", ".venv"])
def test_a_missing_environment_is_made_once(checkout: Checkout, target: str) -> None:
    assert checkout.make(target).returncode == 0
    assert checkout.made
    assert "-m pip install --progress-bar off --disable-pip-version-check -c constraints.txt -e .[dev]" in (
        checkout.calls.read_text()
    )
    assert checkout.make(target).returncode == 0
    assert not checkout.made
    assert not checkout.installed


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_stale_environment_is_brought_up_to_date(checkout: Checkout, name: str) -> None:
    checkout.make("setup")
    later = (checkout.folder / ".venv/.stamp").stat().st_mtime + 5
    os.utime(checkout.folder / name, (later, later))
    checkout.make("setup")
    assert checkout.installed
    assert not checkout.made


def test_an_interrupted_setup_is_repaired(checkout: Checkout) -> None:
    failed = checkout.make("setup", FAIL_PIP="1")
    assert failed.returncode != 0
    assert "no network today" in failed.stderr
    assert checkout.make("setup").returncode == 0
    assert checkout.made


def test_an_interrupted_update_is_repaired(checkout: Checkout) -> None:
    checkout.make("setup")
    later = (checkout.folder / ".venv/.stamp").stat().st_mtime + 5
    os.utime(checkout.folder / "pyproject.toml", (later, later))
    assert checkout.make("setup", FAIL_PIP="1").returncode != 0
    assert checkout.make("setup").returncode == 0
    assert checkout.made


def test_a_moved_or_broken_environment_is_made_again(checkout: Checkout) -> None:
    checkout.make("setup")
    checkout.folder = checkout.folder.rename(checkout.folder.with_name("moved"))
    checkout.make("setup")
    assert checkout.made
    (checkout.folder / ".venv/bin/python").unlink()  # as when the system's Python was replaced
    checkout.make("setup")
    assert checkout.made


def test_without_a_usable_python_it_says_what_is_missing(checkout: Checkout) -> None:
    failed = checkout.make("setup", "PYTHON=")
    assert failed.returncode != 0
    assert "no Python of 3.11 or later" in failed.stderr


def test_a_python_that_does_not_run_is_passed_over(checkout: Checkout, tmp_path: Path) -> None:
    """As pyenv's shims do, whose command exists for versions that aren't chosen."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python3").write_text("#!/bin/sh\necho 'command not found' >&2; exit 127\n")
    shutil.copy(checkout.folder / "stand-in", programs / "python3.13")
    for program in programs.iterdir():
        program.chmod(0o755)
    makefile = checkout.folder / "Makefile"
    makefile.write_text(makefile.read_text() + "\nshow-python:\n\t@echo '$(PYTHON)'\n")
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    shown = subprocess.run(
        ["make", "-s", "show-python"], cwd=checkout.folder, env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "python3.13"


def test_help_lists_every_target_and_needs_no_environment(checkout: Checkout) -> None:
    shown = checkout.make("help").stdout
    assert checkout.calls.read_text() == ""
    for target in ("setup", "sweep", "test", "test-coverage", "chaos", "bench", "dashboard", "clean", "help"):
        assert f"make {target} " in shown
    assert checkout.make().stdout == shown


def test_sweep_passes_its_variables_on(checkout: Checkout) -> None:
    shown = checkout.make("-n", "sweep", "DEPTHS=12,16,20", "EXPERIMENT=cifar10", "ARGS=--dry-run").stdout
    assert '.venv/bin/varscale sweep "cifar10" --depths "12,16,20" --dry-run' in shown
    assert "--depths" not in checkout.make("-n", "sweep").stdout
    assert '.venv/bin/varscale sweep "rings"' in checkout.make("-n", "sweep").stdout


def test_clean_keeps_environment_and_runs(checkout: Checkout) -> None:
    checkout.make("setup")
    kept = checkout.folder / "runs" / "rings" / "result.json"
    gone = [checkout.folder / "dist" / "x.whl", checkout.folder / "varscale" / "__pycache__" / "x.pyc"]
    for path in (kept, *gone):
        path.parent.mkdir(parents=True)
        path.touch()
    assert checkout.make("clean").returncode == 0
    assert kept.exists()
    assert (checkout.folder / ".venv").is_dir()
    assert not any(path.exists() for path in gone)
