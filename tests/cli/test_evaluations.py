"""`varscale evaluate`: what was trained is measured, in one call, and mistakes are one line."""

import json
from pathlib import Path

from command_calls import Call
from toy_sweep import Finished, cell_folder, write_toy

FIDELITY = {"samples": 120, "reference_images": 200, "bootstrap_draws": 3}


def test_a_study_and_a_cell(call: Call, copy: Path, finished: Finished, tmp_path: Path) -> None:
    grid = {"depths": [2], "budgets": [2e7, 3e7]}
    yaml = write_toy(tmp_path / "here", grid=grid, evaluation={"samples_per_class": 1, "fidelity": FIDELITY})
    cells = {path: path.stat().st_mtime_ns for path in copy.glob("cells/*/result.json")}
    measured = call("evaluate", yaml)
    assert measured.code == 0, measured.error
    paths = [Path(line) for line in measured.output.splitlines() if line.endswith("result.json")]
    assert len(paths) == 4
    assert all("fid" in json.loads(path.read_text())["metrics"] for path in paths)
    before = {path: path.stat().st_mtime_ns for path in paths}
    cell = cell_folder(copy, 2, 2e7)
    alone = call("evaluate", cell, "--samples", "120", "--guidance", "3")
    assert alone.code == 0, alone.error
    again = call("evaluate", yaml)
    assert again.code == 0
    assert {path: path.stat().st_mtime_ns for path in paths} == before
    assert {path: path.stat().st_mtime_ns for path in copy.glob("cells/*/result.json")} == cells


def test_mistakes(call: Call, copy: Path, finished: Finished) -> None:
    cell = cell_folder(copy, 2, 2e7)
    missing = call("evaluate", finished.yaml, "--extractor", "inception-v3-compat", "--weights", "absent.pth")
    assert missing.code == 1
    assert "absent.pth: No such file" in missing.error
    assert "6726825d" in missing.error
    for arguments, said in (
        ((finished.yaml, "--samples", "120", "--extractor", "none"), "evaluation.fidelity.extractor"),
        ((finished.yaml, "--guidance", "-1"), "evaluation.fidelity.guidance"),
        ((cell, "--set", "optim.lr=1"), "--set"),
        ((next(copy.glob("trunks/*/job.json")).parent,), "not a cell's folder"),
        (("no-such-experiment",), "no experiment"),
    ):
        refused = call("evaluate", *arguments)
        assert refused.code == 1, said
        assert said in refused.error
        assert len(refused.error.strip().splitlines()) == 1
