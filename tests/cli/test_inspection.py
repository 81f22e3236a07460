"""`varscale inspect parallel` on a cell of a finished little sweep; `inspect attention` is tested with editing."""

import csv
from pathlib import Path

from command_calls import Call
from toy_sweep import cell_folder


def test_what_half_of_a_scale_is_worth(call: Call, copy: Path, tmp_path: Path) -> None:
    cell = cell_folder(copy, 2, 4e7)
    result = call("inspect", "parallel", cell, "--steps", "10", "--out", tmp_path / "halves.csv")
    assert result.code == 0, result.error
    assert result.output.splitlines()[-1] == str(tmp_path / "halves.csv")
    assert "nats an image that a second pass in each scale could use" in result.output
    with (tmp_path / "halves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["side"], row["tokens"]) for row in rows] == [("2", "2"), ("4", "8")]  # a single token has no half
    for row in rows:
        assert float(row["gain"]) == float(row["without"]) - float(row["seen"])

    refused = call("inspect", "parallel", cell, "--out", tmp_path / "halves.png")
    assert refused.error.endswith("halves.png: expected a name that ends in .csv")
    (cell / "job.json").unlink()
    alone = call("inspect", "parallel", cell, "--steps", "10", "--out", tmp_path / "halves.csv")
    assert "no job.json that says what it was trained on" in alone.error
