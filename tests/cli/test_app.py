"""The verbs together: help, and packages that shadow ours."""

import subprocess
import sys
from pathlib import Path

import pytest
from command_calls import Call
from toy_sweep import child_seconds, environment

HEAVY = ("torch", "pandas", "scipy", "matplotlib", "mlflow", "lightning")
VERBS = (
    *("sweep", "plan", "status", "train", "train-tokenizer", "tokenize", "sample", "fit-laws", "dashboard"),
    *("import-official", "export-official"),
)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom varscale.cli import main\nsys.argv = ['varscale', '--help']\n"
        f"try:\n    main()\nfinally:\n    print([name for name in {HEAVY} if name in sys.modules])"
    )
    seconds = []
    for _ in range(3):  # of processor time: other processes' work is not counted
        before = child_seconds()
        process = subprocess.run(
            [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
        )
        seconds.append(child_seconds() - before)
    assert process.stdout.splitlines()[-1] == "[]"
    for verb in VERBS:
        assert f" {verb} " in process.stdout
    assert min(seconds) < 1


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(call: Call, verb: str) -> None:
    result = call(verb, "--help")
    assert result.code == 0
    assert f"varscale {verb}" in result.output


def test_packages_of_other_projects_are_noticed(tmp_path: Path) -> None:
    """A folder `sweeps` in the current one would be imported in place of ours."""
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "__init__.py").touch()
    process = subprocess.run(
        [sys.executable, "-m", "varscale.cli", "--help"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("varscale: its package 'sweeps' is shadowed by ")
