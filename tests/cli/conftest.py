"""The command called in an empty folder, and a finished little sweep to call it on."""

import shutil
import sys
from pathlib import Path

import pytest
from command_calls import Call, Result
from toy_sweep import Finished

from varscale.cli import main


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["varscale", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        output, error = capsys.readouterr()
        code = ended.value.code
        return (
            Result(code, output, error)
            if isinstance(code, int)
            else Result(1 if code else 0, output, error + str(code))
        )

    return run


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished sweep's runs folder."""
    return Path(shutil.copytree(finished.runs, tmp_path / "runs"))
