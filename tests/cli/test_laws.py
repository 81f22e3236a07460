"""`varscale fit-laws` on a finished little sweep, and the laws at the end of a sweep."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
from command_calls import ONE_QUICK_LAW, Call
from toy_sweep import Finished, varscale


def test_laws_are_the_same_from_files_mlflow_and_tables(
    call: Call, copy: Path, finished: Finished, tmp_path: Path
) -> None:
    csv = finished.root / "laws" / "runs.csv"
    uri = f"sqlite:///{finished.runs / 'mlflow.db'}"
    columns = ("--params", "params_total", "--flops", "train_flops")
    sources = {
        "files": (finished.yaml,),
        "mlflow": (finished.yaml, "--from-mlflow", "--tracking-uri", uri),
        "table": ("--runs", csv, "--budget-column", "budget_flops", *columns),
    }
    exponents = {}
    for name, arguments in sources.items():
        result = call("fit-laws", *arguments, *ONE_QUICK_LAW, "--x", "flops", "--out", tmp_path / name)
        assert result.code == 0, result
        assert result.output.splitlines()[-2:] == [str(tmp_path / name / file) for file in ("laws.json", "report.html")]
        (fit,) = json.loads((tmp_path / name / "laws.json").read_text())["fits"]
        exponents[name] = fit["parameters"]
    assert exponents["files"] == exponents["mlflow"] == exponents["table"]


def test_laws_need_results_and_no_yaml(call: Call, copy: Path, finished: Finished) -> None:
    result = call("fit-laws", "toy", *ONE_QUICK_LAW)
    assert result.code == 0, result.error
    assert result.output.splitlines()[-1] == "runs/toy/laws/report.html"


def test_laws_are_fitted_again_where_they_are_missing_or_others(call: Call, copy: Path, finished: Finished) -> None:
    laws = copy / "toy" / "laws"
    assert "nothing is new" in call("sweep", finished.yaml).output
    whole = (laws / "runs.csv").read_text()
    for spoil in (lambda: (laws / "report.html").unlink(), lambda: call("fit-laws", finished.yaml, *ONE_QUICK_LAW)):
        spoil()
        result = call("sweep", finished.yaml)
        assert result.code == 0
        assert "nothing is new" not in result.output
        assert (laws / "report.html").exists()
        assert (laws / "runs.csv").read_text() == whole


def test_laws_are_of_one_recipe(call: Call, copy: Path, finished: Finished) -> None:
    """Of the latest sweep's, from files and from MLflow; a copy of the folder tells no other times."""
    arguments = ("--depths", "2", "--set", "optim.lr=1e-4")
    assert varscale("sweep", finished.yaml, *arguments, cwd=copy.parent).returncode == 0
    theirs = {path.name for path in (finished.root / "sweeps").iterdir()}
    (latest,) = (path for path in (copy / "toy" / "sweeps").glob("*.sweep.json") if path.name not in theirs)
    os.utime(latest, (1, 1))
    for source in ((), ("--from-mlflow",)):
        fitted = call("fit-laws", finished.yaml, *ONE_QUICK_LAW, *source)
        assert fitted.code == 0, fitted.error
        table = pd.read_csv(copy / "toy" / "laws" / "runs.csv")
        assert list(table["depth"]) == [2] * 4
        assert set(table["lr"]) == {1e-4}
        if not source:
            assert "left out: 8 cells in runs/toy of other settings than the latest sweep's" in fitted.error


def test_laws_leave_out_cells_of_another_tokenizer(call: Call, copy: Path, finished: Finished) -> None:
    (source,) = (copy / "toy" / "cells").glob("d2-c2e07-*")
    foreign = Path(shutil.copytree(source, source.with_name("d2-c2e07-s0-foreign")))
    result = json.loads((foreign / "result.json").read_text())
    result["row"] |= {"tokenizer": "another", "fingerprint": "foreign", "run": "foreign"}
    (foreign / "result.json").write_text(json.dumps(result))
    fitted = call("fit-laws", finished.yaml, *ONE_QUICK_LAW)
    assert fitted.code == 0
    assert "left out: 1 cells" in fitted.error
    assert "foreign" not in (copy / "toy" / "laws" / "runs.csv").read_text()
