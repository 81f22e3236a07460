"""`varscale advise` on studies whose results are made up, and on experiments and tables."""

import json
from pathlib import Path

import pytest
from command_calls import Call
from fake_runs import begun_run, study_cell, write_result, write_study
from pandas import read_csv

from sweeps.grid import grid_cells
from varscale.config.yaml import load_experiment
from varscale.store.layout import RunFiles, Store

OVER = ("--predict", "flops=1e14", "--spend", "6e12")


@pytest.fixture
def trained(tmp_path: Path) -> set[str]:
    """The cells of depths 12, 16 and 20 of rings, with losses from a law."""
    store, experiment = Store(tmp_path / "runs"), load_experiment("rings", ["grid.depths=[12,16,20]"])
    cells, runs = grid_cells(experiment), []
    for cell in cells:
        name, counts = f"d{cell.trunk.depth}-c{cell.budget_flops:.3e}-s0".replace("+", ""), cell.parameters()
        run = begun_run(store, "cells", name, f"{cell.steps:016x}", cell.title)
        wobble = 1 + 0.004 * ((7 * cell.steps) % 5 - 2)
        loss = (1.5 + 30 * counts["params_total"] ** -0.35 + 60 * counts["tokens_seen"] ** -0.33) * wobble
        write_result(run, 1.8e9, row={"run": run.folder.name, **counts, **cell.labels(), "loss": loss}, loss=loss)
        runs.append(study_cell(run, **cell.labels()))
    write_study(store, "rings", runs)
    return {cell.label for cell in cells}


def test_of_a_study_with_results(call: Call, trained: set[str]) -> None:
    made = call("advise", "rings", *OVER, "--out", "more/rings-more.yaml")
    assert made.code == 0, made.error
    assert "FLOPs: " in made.output
    assert "a plain grid of" in made.output
    assert "by the prior" not in made.output
    written = load_experiment("more/rings-more.yaml")
    assert written.name == "rings-advised"
    cells = {cell.label: cell for cell in grid_cells(written)}
    assert trained < set(cells)
    added = [cells[label] for label in set(cells) - trained]
    assert all(cell.label in made.output for cell in added)
    assert len({cell.trunk.warmup_images for cell in cells.values() if cell.trunk.depth == 12}) == 1
    assert {cell.trunk.smallest_budget for cell in added} == {3.447e11}


def test_before_there_are_results_and_of_another_file(call: Call) -> None:
    Path("mine.yaml").write_text("name: mine\nextends: rings\ngrid: {depths: [8, 12], budgets: [4e11]}\n")
    made = call("advise", "mine.yaml", *OVER, "--prior", "0.3,0.4", "--out", "next.yaml")
    assert made.code == 0, made.error
    assert "by the prior alone" in made.output
    assert Path("next.yaml").read_text().count("extends: mine.yaml") == 1
    cells = grid_cells(load_experiment("next.yaml"))
    assert all(cell.label in made.output for cell in cells)
    assert made.output.count("d8-s0") + made.output.count("d12-s0") <= len(cells)


def test_of_a_table(call: Call) -> None:
    rows = [(n, c, 1.5 + 30 * n**-0.3 + 60 * (c / 6 / n) ** -0.3) for n in (1e6, 3e6, 1e7) for c in (1e15, 4e15, 2e16)]
    lines = [f"{n},{c},{loss * (1 + 0.002 * ((7 * at) % 5 - 2))}" for at, (n, c, loss) in enumerate(rows)]
    Path("runs.csv").write_text("\n".join(["N,C,loss", *lines]))
    columns = ("--runs", "runs.csv", "--params", "N", "--flops", "C", "--tokens-from-flops", "6")
    made = call("advise", *columns, "--budget", "1e18", "--spend", "4e16", "--out", "cells.csv")
    assert made.code == 0, made.error
    assert "the best size at 1e+18 FLOPs: " in made.output
    assert "a factor of" in made.output
    written = read_csv("cells.csv")
    assert f"with these {len(written)} cells" in made.output
    assert written["flops"].sum() <= 4e16


def test_mistakes(call: Call, tmp_path: Path) -> None:
    assert "one of them" in call("advise", "--spend", "1e13", "--budget", "1e14").error
    assert "one of them" in call("advise", "rings", "--spend", "1e13").error
    assert "expected two exponents" in call("advise", "rings", *OVER, "--prior", "0.3").error
    assert "less than the smallest cell of rings" in call("advise", "rings", "--budget", "1e14", "--spend", "1e3").error
    assert "advice is for a compute" in call("advise", "rings", "--predict", "loss=3", "--spend", "1e13").error
    assert "expected FLOPs above 0" in call("advise", "rings", "--budget", "1e14", "--spend", "-1").error
    assert "--out" in call("advise", "rings", *OVER, "--out", tmp_path).error
    assert "up to 1e+60" in call("advise", "rings", "--budget", "1e300", "--spend", "1e13").error
    assert "of a table, --runs FILE" in call("advise", "rings", *OVER, "--params", "N").error
    Path("mine.yaml").write_text("name: mine\nextends: rings\n")
    assert "is there already" in call("advise", "mine.yaml", *OVER, "--out", "mine.yaml").error
    assert Path("mine.yaml").read_text() == "name: mine\nextends: rings\n"


def test_diverged_cells_and_other_recipes(call: Call, trained: set[str]) -> None:
    """A cell that diverged isn't advised again, and a study that has nothing but variants has no results yet."""
    store = Store(Path("runs"))
    folders = sorted(Path("runs/cells").glob("d12-*"))
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        (folder / "result.json").unlink()
        write_result(RunFiles(folder), 1.8e9, status="diverged", row={**result["row"], "status": "diverged"})
    made = call("advise", "rings", *OVER)
    assert made.code == 0, made.error
    assert "with these " in made.output
    assert not any(label in made.output for label in trained)
    assert "e+" not in made.output.partition("wide")[2].replace("e+12 FLOPs", "")  # two sizes tell next to nothing
    write_study(store, "rings", [study_cell(RunFiles(folders[0]), variant="slow", experiment="rings")])
    made = call("advise", "rings", *OVER)
    assert made.code == 0, made.error
    assert "by the prior alone" in made.output
