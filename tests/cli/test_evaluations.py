"""`varscale evaluate`: what was trained is measured, in one call, and mistakes are one line."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
from command_calls import ONE_QUICK_LAW, Call
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
    assert all({"fid", "class_agreement"} <= json.loads(path.read_text())["metrics"].keys() for path in paths)
    before = {path: path.stat().st_mtime_ns for path in paths}
    cell = cell_folder(copy, 2, 2e7)
    alone = call("evaluate", cell, "--samples", "120", "--guidance", "3", "--guidance-schedule", "constant")
    assert alone.code == 0, alone.error
    result = Path(alone.output.splitlines()[-1])
    assert result.is_relative_to(copy), "in the folder where the cell lies"
    row = json.loads(result.read_text())["row"]
    assert (row["guidance"], row["guidance_schedule"]) == (3, "constant")
    assert 0 <= row["class_agreement"] <= 1
    assert "class_agreement" in alone.output
    again = call("evaluate", yaml)
    assert again.code == 0
    assert {path: path.stat().st_mtime_ns for path in paths} == before
    assert {path: path.stat().st_mtime_ns for path in copy.glob("cells/*/result.json")} == cells


def test_rejection_beside_none_and_the_papers_table(call: Call, copy: Path, tmp_path: Path) -> None:
    """A cell is measured without and with rejection; both are rows of the table, which has a form for each use."""
    cell, fidelity = cell_folder(copy, 2, 2e7), ("--samples", "120", "--guidance", "3", "--candidates", "2")
    measured = call("evaluate", cell, *fidelity)
    assert measured.code == 0, measured.error
    rows = [line.split() for line in measured.output.splitlines() if line.strip().startswith("depth")]
    assert [len(row) for row in rows] == [17, 20], "keep rate and probabilities follow where there is a choice"
    assert rows[1][17] == "0.5"
    assert float(rows[1][18]) > float(rows[1][19])
    drawn = call("sample", cell, "--candidates", "2", "--count", "6", "--out", "images.npz")
    assert drawn.code == 0, drawn.error
    assert "kept 1 of 2 (keep rate 0.5)" in drawn.error
    with np.load(tmp_path / "images.npz") as arrays:
        assert len(arrays["arr_0"]) == 6
    shown = call("table", "toy", "--published", "--where", "depth == 2")
    assert shown.code == 0, shown.error
    names = [line.split()[0] for line in shown.output.splitlines() if line.strip()]
    assert names[2:7] == ["VAR-d2", "VAR-d2-re", "VAR-d2", "VAR-d2", "VAR-d2"]
    assert "BigGAN†" in names
    assert "rejection sampling" in shown.output
    written = call("table", cell, "--out", "table.tex")
    assert written.output == "table.tex\n"
    assert "table.tex: is there already" in call("table", cell, "--out", "table.tex").error
    assert (tmp_path / "table.tex").read_text().count("VAR-d2") == 3, "two rows, and what times are relative to"
    link = tmp_path / "linked"
    link.symlink_to(cell)
    as_csv = call("table", cell, link, cell, "--format", "csv")
    assert "rejection sampling" in as_csv.error
    read = pd.read_csv(io.StringIO(as_csv.output))
    assert list(read["model"]) == ["VAR-d2", "VAR-d2-re"]
    assert read["time"][0] == 1
    assert (read["steps"] == 3).all(), "one pass a scale"


def test_mistakes_about_tables(call: Call, copy: Path) -> None:
    Path("rings").mkdir()  # hides no study of that name
    for arguments, said in (
        ((), "give an EXPERIMENT"),
        (("toy", "--out", "table.docx"), "expected a name that ends in .csv, .md or .tex"),
        (("toy", "--where", "depth == 99"), "no row meets it"),
        (("toy", "--where", "height == 1"), "height"),
        (("no-such-experiment",), "no experiment"),
        (("rings",), "no study; run `varscale sweep rings` first"),
        ((next(copy.glob("tokenizers/[!.]*-*")),), "not a cell's folder"),
        ((copy,), "no finished cell's folder"),
    ):
        refused = call("table", *arguments)
        assert refused.code in (1, 2), said
        assert said in refused.error
        assert len(refused.error.strip().splitlines()) == 1


def test_several_guidances_of_the_best_cells_reach_the_laws(call: Call, copy: Path, tmp_path: Path) -> None:
    """Although the experiment has no `evaluation.fidelity`; each evaluation is a row, and the losses count once."""
    fidelity = [f"evaluation.fidelity.{name}={value}" for name, value in FIDELITY.items()]
    sets = [part for each in fidelity for part in ("--set", each)]
    yaml = write_toy(tmp_path / "here")
    measured = call("evaluate", yaml, "--cells", "best", "--guidance", "0,1.5,3", *sets)
    assert measured.code == 0, measured.error
    rows = [line.split() for line in measured.output.splitlines() if line.strip().startswith("depth")]
    assert len(rows) == 12, "four budgets, three guidances"
    assert [float(row[8]) for row in rows] == [0] * 4 + [1.5] * 4 + [3] * 4
    assert call("fit-laws", "toy", *ONE_QUICK_LAW).code == 0
    laws = copy / "studies" / "toy" / "laws"
    table, content = pd.read_csv(laws / "runs.csv"), json.loads((laws / "laws.json").read_text())
    assert table["fid"].notna().sum() == 12
    assert len(table) == 8 + 2 * 4
    assert content["seed_noise"] == {}
    assert not {"repeated-rows", "mixed-evaluators"} & {each["code"] for each in content["warnings"]}
    assert next(fit for fit in content["fits"] if fit["x"] == "flops")["data"]["n_runs"] == 4
    assert call("fit-laws", "toy", "--law", "power", "--bootstrap-draws", "50").code == 0
    content = json.loads((laws / "laws.json").read_text())
    assert len(content["guidance"]) == 4
    assert {len(curve["points"]) for curve in content["guidance"]} == {3}
    assert (laws / "quality_vs_guidance.png").exists()


def test_mistakes(call: Call, copy: Path, finished: Finished) -> None:
    cell = cell_folder(copy, 2, 2e7)
    missing = call("evaluate", finished.yaml, "--extractor", "inception-v3-compat", "--weights", "absent.pth")
    assert missing.code == 1
    assert "absent.pth: No such file" in missing.error
    assert "6726825d" in missing.error
    for arguments, said in (
        ((finished.yaml, "--samples", "120", "--extractor", "none"), "evaluation.fidelity.extractor"),
        ((finished.yaml, "--samples", "50"), "evaluation.fidelity.samples"),
        ((cell, "--samples", "50"), "evaluation.fidelity.samples"),
        ((finished.yaml, "--guidance", "-1"), "evaluation.fidelity.guidance"),
        ((finished.yaml, "--guidance", "1,1"), "evaluation.fidelity.guidance"),
        ((cell, "--guidance", "1,inf"), "evaluation.fidelity.guidance"),
        ((cell, "--guidance", ""), "--guidance: an empty value follows"),
        ((cell, "--guidance", "1,,2"), "--guidance '1,,2'"),
        ((finished.yaml, "--guidance", "high"), "--guidance 'high': expected numbers"),
        ((cell, "--cells", "best"), "--cells"),
        ((cell, "--candidates", "1"), "--candidates 1: expected 2 or more"),
        ((cell, "--candidates", "1000"), "evaluation.fidelity.candidates"),
        ((cell, "--classifier", "rings-classifier"), "--classifier: has nothing to choose"),
        ((cell, "--candidates", "2", "--classifier", "resnet18"), "no weights; expected resnet101"),
        ((cell, "--candidates", "2", "--classifier-weights", "absent.pth"), "absent.pth: No such file"),
        ((cell, "--set", "optim.lr=1"), "--set"),
        ((next(copy.glob("trunks/*/job.json")).parent,), "not a cell's folder"),
        (("no-such-experiment",), "no experiment"),
    ):
        refused = call("evaluate", *arguments)
        assert refused.code == 1, said
        assert said in refused.error
        assert len(refused.error.strip().splitlines()) == 1
