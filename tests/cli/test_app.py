"""The verbs together: help, and packages that shadow ours."""

import inspect
import io
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
from command_calls import Call
from toy_sweep import child_seconds, environment

from analysis.errors import TableError
from analysis.options import FitOptions
from varscale.cli import main
from varscale.cli.laws import fit_laws

HEAVY = ("torch", "pandas", "scipy", "matplotlib", "mlflow", "lightning")
VERBS = (
    *("sweep", "plan", "status", "train", "train-tokenizer", "tokenize", "sample", "fit-laws", "dashboard"),
    *(
        "run-job",
        "sync",
        "import-official",
        "export-official",
        "edit",
        "reconstruct",
        "inspect",
        "init",
        "design-tokenizer",
    ),
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


def test_every_choice_about_a_fit_is_an_option() -> None:
    """Parameters of `fit-laws` have the names and the defaults of `FitOptions`, which takes them by name."""
    options = inspect.signature(fit_laws).parameters
    for field in fields(FitOptions):
        none = field.default in ("", ()) or field.name == "title"
        assert options[field.name].default in ((None, "") if none else (field.default,)), field.name


def test_what_is_chosen_about_a_fit_reaches_it(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[FitOptions] = []

    def remember(table: object, options: FitOptions) -> None:
        seen.append(options)
        raise TableError("seen")

    monkeypatch.setattr("analysis.pipeline.fit_laws", remember)
    (tmp_path / "runs.csv").write_text("loss\n1\n")
    given = ("--budget", "1e3", "--budget", "2e3", "--budget-column", "b", "--unit", "flops=PFLOP", "--no-holdout")
    for arguments in ((), given, (*given[4:6], "--title", "a", "--offset", "0", "--law", "power", "--published")):
        assert "seen" in call("fit-laws", "--runs", "runs.csv", *arguments).error
    assert seen == [
        FitOptions(title="runs.csv"),
        FitOptions("runs.csv", budget="b", units=("flops=PFLOP",), allocate=(1e3, 2e3), holdout=False),
        FitOptions("a", budget="b", offset=0.0, law=("power",), published=True),
    ]


def test_several_tables_by_a_pattern_or_as_the_shell_expands_it(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def remember(table: pd.DataFrame, options: FitOptions) -> None:
        seen.append([options.title, *table["file"]])
        raise TableError("seen")

    monkeypatch.setattr("analysis.pipeline.fit_laws", remember)
    for name in ("a1.csv", "a2.csv", "b.csv"):
        (tmp_path / name).write_text("loss\n1\n")
    for given in (["a*.csv"], ["a1.csv", "a2.csv"], ["a1.csv", "--runs", "a2.csv"], ["./a1.csv", tmp_path / "a2.csv"]):
        assert "seen" in call("fit-laws", "--runs", *given, "--law", "power").error
    assert seen == [["a1.csv, a2.csv", "a1.csv", "a2.csv"]] * 4
    for others in (["a1.csv", "rings"], ["a1.csv", "gone.csv"]):
        assert "give an EXPERIMENT or --runs FILE, one of them" in call("fit-laws", "--runs", *others).error
    assert "one of them" in call("fit-laws", "rings", "toy").error


def test_a_terminal_that_knows_ascii_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows other signs in the place of those that it doesn't know, in tables and in messages."""
    monkeypatch.chdir(tmp_path)
    for arguments, status in ((["status", "rings"], 0), (["plan", "rings…"], 1)):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        monkeypatch.setattr(sys, "argv", ["varscale", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        print(ended.value.code or "", file=sys.stderr, flush=True)  # as Python does with a message
        sys.stdout.flush()
        shown = "".join(stream.buffer.getvalue().decode("ascii") for stream in streams)
        assert bool(ended.value.code) == bool(status)
        assert "?" in shown if status else "not begun" in shown
