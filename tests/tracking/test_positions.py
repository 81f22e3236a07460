import json
from pathlib import Path

from varscale.tracking.positions import Position, new_points, read_position, write_position


def line(images: int, time: float = 1.5, **metrics: float) -> bytes:
    return json.dumps({"time": time, "images": images, "metrics": metrics}).encode() + b"\n"


def follow(file: Path, position: Position) -> list[tuple[int, dict[str, float]]]:
    """What a forwarder would deliver; the position moves on."""
    found = []
    for point in new_points(file, position):
        found.append((point.images, point.metrics))
        position.offset, position.checksum = point.end, point.checksum
        position.steps.update(dict.fromkeys(point.metrics, point.images))
    return [entry for entry in found if entry[1]]


def test_torn_last_line_waits_for_its_end(tmp_path: Path) -> None:
    file, position = tmp_path / "metrics.jsonl", Position()
    whole = line(32, a=1.0) + line(64, a=2.0)
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        complete = whole[:cut].count(b"\n")
        assert len(follow(file, Position())) == complete
    assert follow(file, position) == [(32, {"a": 1.0}), (64, {"a": 2.0})]
    assert follow(file, position) == []
    file.write_bytes(whole + line(96, a=3.0))
    assert follow(file, position) == [(96, {"a": 3.0})]


def test_points_that_a_resumed_run_repeats_are_not_new(tmp_path: Path) -> None:
    file, position = tmp_path / "metrics.jsonl", Position()
    file.write_bytes(line(32, a=1.0) + line(64, a=2.0))
    assert len(follow(file, position)) == 2
    with file.open("ab") as stream:
        stream.write(line(64, time=9.0, a=2.0) + line(64, time=9.0, b=5.0) + line(96, time=10.0, a=3.0))
    assert follow(file, position) == [(64, {"b": 5.0}), (96, {"a": 3.0})]


def test_a_file_that_was_shortened_and_grew_again_is_read_over(tmp_path: Path) -> None:
    file, position = tmp_path / "metrics.jsonl", Position()
    file.write_bytes(line(32, a=1.0) + line(64, a=2.0))
    follow(file, position)
    file.write_bytes(line(32, a=1.0))
    assert follow(file, position) == []
    file.write_bytes(line(32, a=1.0) + line(64, time=1e9, a=2.0) + line(96, time=1e9 + 1, a=3.0))
    assert follow(file, position) == [(96, {"a": 3.0})]


def test_an_unreadable_line_is_passed_over(tmp_path: Path) -> None:
    file, position = tmp_path / "metrics.jsonl", Position()
    broken = [
        b"{\n",
        b"[1]\n",
        b'{"time": "x", "images": 1, "metrics": {}}\n',
        b'{"time": 1, "images": 2}\n',
        b"\xff\n",
    ]
    file.write_bytes(b"".join(broken) + line(32, a=1.0))
    assert follow(file, position) == [(32, {"a": 1.0})]
    assert position.offset == file.stat().st_size


def test_only_numbers_are_metrics(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"time": 1, "images": 2, "metrics": {"a": 1, "b": null, "c": true, "d": "x", "e": NaN}}\n')
    [point] = new_points(file, Position())
    assert list(point.metrics) == ["a"]


def test_positions_of_several_stores_share_a_file(tmp_path: Path) -> None:
    state = tmp_path / "mlflow" / "cells-abc.json"
    write_position(state, "http://one", Position(run_id="1", offset=5, steps={"a": 3}))
    write_position(state, "http://two", Position(run_id="2"))
    assert read_position(state, "http://one") == Position(run_id="1", offset=5, steps={"a": 3})
    assert read_position(state, "http://two").run_id == "2"
    assert read_position(state, "http://three") == Position()


def test_a_damaged_file_of_positions_counts_as_absent(tmp_path: Path) -> None:
    state = tmp_path / "cells-abc.json"
    write_position(state, "http://one", Position(run_id="1", offset=51))
    good = state.read_text()
    for damaged in ("{torn", '{"stores": []}', "5", good.replace("51", "52"), good.replace('"1"', '"2"')):
        assert damaged != good
        state.write_text(damaged)
        assert read_position(state, "http://one") == Position()
    write_position(state, "http://one", Position(run_id="3"))
    assert read_position(state, "http://one").run_id == "3"
