"""Records on disk: what can't be used counts as absent, is named, and reaches no file outside its folder."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from varscale.store.curves import CurvePoint, curve_line, mend_curve, parse_point, read_curve
from varscale.store.layout import RunFiles
from varscale.store.records import (
    Record,
    Result,
    RunIdentity,
    StudyCell,
    StudyRecord,
    TokensSummary,
    read_result,
)

FINGERPRINT = "0123456789abcdef"
RESULT = Result(
    fingerprint=FINGERPRINT,
    status="finished",
    time=1.8e9,
    metrics={"loss": 2.5},
    row={"run": "a", "loss": 2.5, "epochs": None, "compiled": True},
    provenance={"device": "a processor", "threads": 2},
    pictures=("samples.png",),
)
CELL = StudyCell(folder="cell-a", trunk="trunk-a", title="a cell", labels={"budget_flops": 1e12}, recipe="r")
STUDY = StudyRecord(
    study="toy", created=1.8e9, settings={"name": "toy"}, tokenizer="t", tokens="k", recipe="r", cells=(CELL,)
)
RECORDS = [RESULT, RunIdentity(name="a", role="cell", params={"depth": 2}), STUDY]
RECORDS.append(TokensSummary(images=5, unigram_entropy=1.5))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_records_come_back(record: Record, tmp_path: Path) -> None:
    record.write(tmp_path / "record.json")
    assert type(record).read(tmp_path / "record.json") == record


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
@pytest.mark.parametrize(
    "content",
    ["", "{", "[1, 2]", "5", "{}", "null", '"text"', "[" * 5000, '{"checksum": 5}', "NaN", "\x00\x00", "{\ud800"],
    ids=range(12),
)
def test_what_is_no_record_is_absent_and_named(
    record: Record, content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with caplog.at_level(logging.WARNING):
        assert type(record).read(path) is None
        assert type(record).read(path) is None
    (message,) = [entry.getMessage() for entry in caplog.records]  # said once
    assert str(path) in message
    assert "\n" not in message


def test_absent_files_are_not_spoken_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Result.read(tmp_path / "absent.json") is None
    (tmp_path / "file").touch()
    assert Result.read(tmp_path / "file" / "below.json") is None
    assert caplog.text == ""
    (tmp_path / "folder").mkdir()
    assert Result.read(tmp_path / "folder") is None
    assert "folder" in caplog.text


@given(place=st.integers(min_value=0), bit=st.integers(0, 7))
def test_no_changed_bit_is_read_as_something_else(
    place: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.json"
    RESULT.write(path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)
    assert Result.read(path) in (None, RESULT)  # blanks and the case of an escape may differ


def changed(record: Record, **changes: Any) -> dict[str, Any]:
    """A file's content with other values and the checksum that belongs to them: hostile, not damaged."""
    from varscale.store.records import _checksum

    content = record.model_dump(mode="json") | changes
    return {"checksum": _checksum(content), **content}


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "a/b", "..", ".", "", "a\\b", "a\x00b"])
def test_names_are_plain_names(name: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for record, changes in (
        (RESULT, {"pictures": [name]}),
        (STUDY, {"tokenizer": name}),
        (STUDY, {"tokens": name}),
        (STUDY, {"study": name}),
        (STUDY, {"cells": [CELL.model_dump() | {"folder": name}]}),
        (STUDY, {"cells": [CELL.model_dump() | {"trunk": name}]}),
    ):
        path.write_text(json.dumps(changed(record, **changes)))
        assert type(record).read(path) is None, changes


@pytest.mark.parametrize(
    "changes",
    [
        {"row": 5},
        {"row": {"a": [1]}},
        {"metrics": {"loss": "2.5"}},
        {"metrics": {"loss": None}},
        {"status": "done"},
        {"status": None},
        {"time": "now"},
        {"pictures": "a.png"},
        {"fingerprint": 5},
    ],
    ids=str,
)
def test_values_of_other_types_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(changed(RESULT, **changes)))
    assert Result.read(path) is None


def test_a_digit_changed_in_a_loss_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "result.json"
    RESULT.write(path)
    path.write_text(path.read_text().replace("2.5", "2.4"))
    assert Result.read(path) is None
    assert "does not match its checksum" in caplog.text


def test_a_result_belongs_to_its_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = RunFiles(tmp_path / f"cell-{FINGERPRINT}"), RunFiles(tmp_path / "cell-of-another")
    RESULT.write(ours.result)
    RESULT.write(theirs.result)
    assert read_result(ours) == RESULT
    assert read_result(theirs) is None
    assert "belongs to another run" in caplog.text


# --------------------------------------------------------------------------------------------------------- curves


POINT = CurvePoint(1.8e9, 32, {"train_loss": 2.5})


def test_points_come_back() -> None:
    assert parse_point(curve_line(POINT)) == POINT


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"5",
        b"[]",
        b"{}",
        b'{"time": 1, "images": 2}',
        b'{"time": 1, "images": 2, "metrics": 3}',
        b'{"time": 1, "images": 2, "metrics": [1]}',
        b'{"time": "x", "images": 2, "metrics": {}}',
        b'{"time": 1, "images": "x", "metrics": {}}',
        b'{"time": 1, "images": -1, "metrics": {}}',
        b'{"time": NaN, "images": 1, "metrics": {}}',
        b'{"time": 1e400, "images": 1, "metrics": {}}',
        b'{"time": 1, "images": 1e400, "metrics": {}}',
        b'{"time": 1, "images": 1' + b"0" * 5000 + b', "metrics": {}}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
    ids=range(17),
)
def test_damaged_points_are_left_out(line: bytes, tmp_path: Path) -> None:
    assert parse_point(line) is None
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(curve_line(POINT) + line + b"\n" + curve_line(POINT._replace(images=64)))
    assert [point.images for point in read_curve(path)] == [32, 64]


def test_numbers_that_are_none_are_left_out() -> None:
    line = b'{"time": 1, "images": 2, "metrics": {"a": NaN, "b": "x", "c": 1, "d": true, "e": null, "f": [1]}}'
    assert parse_point(line) == CurvePoint(1.0, 2, {"c": 1.0})


def test_a_torn_last_line_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert mend_curve(path) == -1
    whole = curve_line(POINT)
    path.write_bytes(whole + whole[:10])
    assert mend_curve(path) == 32
    assert path.read_bytes() == whole
    path.write_bytes(whole[:10])
    assert mend_curve(path) == -1
    assert path.read_bytes() == b""
