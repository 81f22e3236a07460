"""`varscale fit-laws` on a finished little sweep, and the laws at the end of a sweep."""

import json
from pathlib import Path

import pandas as pd
import pytest
from command_calls import ONE_QUICK_LAW, Call
from toy_sweep import BUDGETS, Finished, cell_folder, varscale, write_toy


def test_laws_are_the_same_from_files_mlflow_and_tables(
    call: Call, copy: Path, finished: Finished, tmp_path: Path
) -> None:
    csv = finished.study / "laws" / "runs.csv"
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
    assert result.output.splitlines()[-1] == "runs/studies/toy/laws/report.html"


def test_laws_are_fitted_again_where_they_are_missing_or_others(call: Call, copy: Path, finished: Finished) -> None:
    laws = copy / "studies" / "toy" / "laws"
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
    """Of the latest sweep's, from files and from MLflow."""
    arguments = ("--depths", "2", "--set", "optim.lr=1e-4")
    assert varscale("sweep", finished.yaml, *arguments, cwd=copy.parent).returncode == 0
    for source in ((), ("--from-mlflow",)):
        fitted = call("fit-laws", finished.yaml, *ONE_QUICK_LAW, *source)
        assert fitted.code == 0, fitted.error
        table = pd.read_csv(copy / "studies" / "toy" / "laws" / "runs.csv")
        assert list(table["depth"]) == [2] * 4
        assert set(table["lr"]) == {1e-4}
        assert "left out: 8 cells of toy that were trained by other recipes than the latest" in fitted.error


def test_cells_of_another_study_have_the_budgets_of_this_one(
    call: Call, copy: Path, finished: Finished, tmp_path: Path
) -> None:
    """They are the same runs, planned for a little less; two budgets where there is one make another frontier."""
    budgets = [1.001 * budget for budget in BUDGETS]
    other = write_toy(tmp_path, name="other", grid={"budgets": budgets})
    before = {path.name for path in (copy / "cells").iterdir()}
    swept = varscale("sweep", other, cwd=copy.parent)
    assert swept.returncode == 0, swept.stdout
    assert {path.name for path in (copy / "cells").iterdir()} == before
    for source in ((), ("--from-mlflow",)):
        assert call("fit-laws", other, *ONE_QUICK_LAW, *source).code == 0
        table = pd.read_csv(copy / "studies" / "other" / "laws" / "runs.csv")
        assert sorted(table["budget_flops"]) == sorted(2 * budgets)
        assert set(table["experiment"]) == {"other"}


def test_laws_say_which_cells_are_missing(call: Call, copy: Path, finished: Finished) -> None:
    (cell_folder(copy, 2, 6e7) / "result.json").unlink()
    fitted = call("fit-laws", "toy", *ONE_QUICK_LAW)
    assert fitted.code == 0
    assert "missing: 1 cells of toy have no result: depth 2 · 6e07 FLOPs · seed 0" in fitted.error
    (warning,) = (each for each in laws_warnings(copy) if each["code"] == "missing-runs")
    assert "1 of 8 runs have no result" in warning["message"]


def laws_warnings(runs: Path) -> list[dict[str, str]]:
    laws = json.loads((runs / "studies" / "toy" / "laws" / "laws.json").read_text())
    return list(laws["warnings"])


def test_a_folder_that_cannot_be_written_is_found_before_the_fit(
    call: Call, copy: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("fitted all the same")

    monkeypatch.setattr("analysis.pipeline.fit_laws", never)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "laws" / "laws.json").mkdir(parents=True)
    for out in (tmp_path / "file", tmp_path / "file" / "laws", tmp_path / "laws", "x" * 300, "/proc/laws"):
        result = call("fit-laws", finished.yaml, *ONE_QUICK_LAW, "--out", out)
        assert result.code not in (0, None)
        assert "laws can't be written here" in " ".join(result.error.split()), result
