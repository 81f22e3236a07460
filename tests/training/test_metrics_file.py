"""The metrics file: whole lines, each point once, torn ends mended."""

import json
from pathlib import Path
from typing import Any

import pytest

from varscale.training.metrics_file import MetricsFile


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_points(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsFile(path, 32)
    log.log_metrics({"epoch": 0.0}, 0)  # Lightning's own: nothing to write
    assert not path.exists()
    log.log_metrics({"loss": 1.5, "epoch": 0.0, "step": 3.0}, 3)
    log.log_metrics({"loss": 1.25}, 6)
    assert [(point["images"], point["metrics"]) for point in read(path)] == [(96, {"loss": 1.5}), (192, {"loss": 1.25})]
    assert read(path)[0]["time"] <= read(path)[1]["time"]
    assert log.name == "run"


@pytest.mark.parametrize("torn", ["", '{"time": 1', '{"time": 1.0, "images": 224, "metrics": {"loss": 9}}'])
def test_a_run_that_goes_on(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsFile(path, 32)
    for step in (3, 6):
        log.log_metrics({"loss": float(step)}, step)
    before = path.read_text()
    path.write_text(before + torn)  # the last one is whole but for its line's end: also written anew
    again = MetricsFile(path, 32)
    for step in (3, 6, 7):
        again.log_metrics({"loss": float(step)}, step)
    assert path.read_text().startswith(before)
    assert [point["images"] for point in read(path)] == [96, 192, 224]
    assert read(path)[-1]["metrics"] == {"loss": 7.0}


def test_a_damaged_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 1).log_metrics({"loss": 0.5}, 1)
    with path.open("ab") as file:
        file.write(b"\xff\xfe nothing\n")
    MetricsFile(path, 1).log_metrics({"loss": 0.25}, 2)
    assert [json.loads(line)["images"] for line in path.read_bytes().splitlines() if line.startswith(b"{")] == [1, 2]


def test_only_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"ti')
    MetricsFile(path, 1).log_metrics({"loss": 0.5}, 1)
    assert [point["images"] for point in read(path)] == [1]
