"""`make bench` with the least work: everything runs and is written down. Nothing is asserted about speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_measurement_is_printed_and_written(tmp_path: Path) -> None:
    names = ("training", "sampling", "bulk", "data", "utilisation", "paper")
    done = bench("--quick", "--threads", "1", "--runs-dir", str(tmp_path), *names)

    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert written["machine"]["threads"] == 1
    assert [report["name"] for report in written["benchmarks"]] == list(names)
    markdown = (tmp_path / "bench" / "bench.md").read_text()
    for report in written["benchmarks"]:
        assert report["rows"]
        assert report["title"] in markdown
        for goal in report["goals"]:
            assert goal["text"] in done.stdout.replace("\n", " ")


def test_cells_that_do_nothing_are_all_recorded_and_delivered(tmp_path: Path) -> None:
    done = bench("orchestration", "--quick", "--threads", "1", "--runs-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (report,) = json.loads((tmp_path / "bench" / "bench.json").read_text())["benchmarks"]
    assert report["goals"][0]["text"].startswith("20 cells that do nothing")
    assert report["goals"][0]["measured"].endswith(" s, 20 in MLflow")
    assert len(report["goals"]) == 3


def test_what_needs_a_gpu_says_so_without_one(tmp_path: Path) -> None:
    done = bench("paper", "--runs-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "no GPU here: not measured." in done.stdout
    (report,) = json.loads((tmp_path / "bench" / "bench.json").read_text())["benchmarks"]
    assert report["rows"] == []


def test_an_unknown_name_is_one_clear_error(tmp_path: Path) -> None:
    done = bench("trainign", "--runs-dir", str(tmp_path))
    assert done.returncode == 2
    assert "no benchmark 'trainign'" in done.stderr
