"""Sweeps through the command, from nothing and called again; plan, status and dashboard."""

import json
import resource
import shutil
import signal
import socket
import statistics
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from command_calls import NOWHERE, Call
from fake_runs import finished_cell, write_study
from filelock import FileLock
from mlflow_stores import free_port
from safetensors.torch import load_file
from toy_sweep import Finished, cell_folder, child_seconds, numbers_of, results, toy_experiment, varscale, write_toy

from sweeps.grid import grid_cells
from varscale import tracking
from varscale.numerics.machine import Share
from varscale.store.layout import Store
from varscale.tracking import deliver_all, runs_table

CELLS = {depth: grid_cells(toy_experiment(grid={"depths": [depth]})) for depth in (2, 3)}


def modification_times(root: Path) -> dict[Path, int]:
    files = (path for path in root.rglob("*") if path.is_file() and not path.name.endswith("mlflow.json"))
    return {path: path.stat().st_mtime_ns for path in files}


def test_sweep_from_nothing(finished: Finished) -> None:
    *_, laws_json, report_html = finished.process.stdout.splitlines()
    assert laws_json == "runs/studies/toy/laws/laws.json"
    assert report_html == "runs/studies/toy/laws/report.html"
    assert json.loads((finished.folder / laws_json).read_text())["fits"]
    assert "<html" in (finished.folder / report_html).read_text()
    table = pd.read_csv(finished.study / "laws" / "runs.csv")
    assert sorted(table["fingerprint"]) == sorted(row["fingerprint"] for row in results(finished.runs).values())
    assert len(table) == 8
    assert [line for line in finished.process.stderr.splitlines() if not line.endswith(" s so far)")] == []  # busy
    assert not list(finished.runs.glob("*/*/last.ckpt"))
    everybodys = [path for path in finished.runs.rglob("*") if path.stat().st_mode & 0o002]
    assert not everybodys, "what everybody can write to"
    assert {path.name for path in finished.runs.glob("*/*/.*")} == {".record.lock", ".sweep.lock"}


def test_mlflow_has_what_the_files_have(finished: Finished) -> None:
    tracked = runs_table(f"sqlite:///{finished.runs / 'mlflow.db'}", "toy").set_index("fingerprint")
    for row in results(finished.runs).values():
        del row["run"]  # its name for people there
        assert tracked.loc[row.pop("fingerprint"), list(row)].to_dict() == row
    table = pd.read_csv(finished.study / "laws" / "runs.csv")
    roles = {"flops", "tokens", "params", "budget", "row", "run_id"}  # what the fit adds
    assert {*tracked.columns, "fingerprint"} == {*table.columns} - roles


def test_second_call_trains_nothing(copy: Path, finished: Finished) -> None:
    before, seconds = modification_times(copy / "cells"), child_seconds()
    process = varscale("sweep", finished.yaml, cwd=copy.parent)
    assert process.returncode == 0
    assert process.stdout.splitlines()[-2:] == finished.process.stdout.splitlines()[-2:]
    assert modification_times(copy / "cells") == before
    assert "training" not in process.stdout
    assert child_seconds() - seconds < 20


def test_another_study_takes_tokenizer_tokens_and_cells_that_are_there(
    call: Call, copy: Path, finished: Finished, tmp_path: Path
) -> None:
    parts = ("tokenizers", "tokens", "studies/toy")
    before = [modification_times(copy / part) for part in parts]
    result = call("sweep", write_toy(tmp_path, name="study", grid={"depths": [1, 2]}))
    assert result.code == 0, result.error
    assert "training the tokenizer" not in result.output
    assert [modification_times(copy / part) for part in parts] == before
    new = results(copy).keys() - results(finished.runs).keys()
    assert {results(copy)[name]["depth"] for name in new} == {1}
    table = pd.read_csv(copy / "studies" / "study" / "laws" / "runs.csv")
    assert list(table["depth"]) == [1] * 4 + [2] * 4
    assert call("sample", copy / "cells" / min(new), "--labels", "0", "--out", tmp_path / "sample.png").code == 0


def test_fewer_cells_than_a_law_needs(call: Call, copy: Path, finished: Finished) -> None:
    """The sweep's results are there all the same, and the message is short."""
    shutil.rmtree(copy / "studies" / "toy" / "laws")
    result = call("sweep", finished.yaml, "--depths", "3", "--set", "grid.budgets=[2e7, 3e7]")
    assert result.code == 1
    (line,) = result.error.splitlines()
    assert line.startswith("varscale: 2 cells are in runs/studies/toy/laws/runs.csv, but no law could be fitted: ")
    assert len(line) < 400
    table = pd.read_csv(copy / "studies" / "toy" / "laws" / "runs.csv")
    assert list(table["steps"]) == [5, 8]


def test_training_goes_on_without_mlflow(copy: Path, tmp_path: Path, finished: Finished) -> None:
    """What could not be delivered is delivered later, from the files."""
    shutil.rmtree(copy / "cells")
    for path in (*copy.glob("mlflow.db*"), *copy.rglob("*mlflow.json")):
        path.unlink()
    arguments = ("--set", "grid.budgets=[2e7, 4e7]", "--tracking-uri", NOWHERE)
    process = varscale("sweep", finished.yaml, *arguments, cwd=tmp_path)
    assert "Traceback" not in process.stderr + process.stdout
    assert f"not delivered to MLflow at {NOWHERE}" in process.stdout.replace("\n", " ")
    rows = results(copy)
    assert len(rows) == 4
    for name, row in rows.items():
        assert numbers_of(row) == numbers_of(results(finished.runs)[name])
    uri = f"sqlite:///{tmp_path / 'later.db'}"
    assert deliver_all(Store(copy), uri).pending == 0
    tracked = runs_table(uri, "toy").set_index("fingerprint")
    assert {print_: tracked.loc[print_, "loss"] for print_ in tracked.index} == {
        row["fingerprint"]: row["loss"] for row in rows.values()
    }


def test_no_space_on_disk(copy: Path, tmp_path: Path, finished: Finished) -> None:
    """Files may not grow beyond a limit: one clear line a failure, and the next call goes on."""
    for part in ("trunks", "cells", "studies"):
        shutil.rmtree(copy / part)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    arguments = (
        "sweep",
        finished.yaml,
        "--depths",
        "2",
        "--set",
        "grid.budgets=[2e7, 4e7]",
        "--set",
        "runtime.retries=0",
    )
    process = varscale(*arguments, cwd=tmp_path, before=limit)
    assert process.returncode == 1
    assert "Traceback" not in process.stderr + process.stdout
    failed = [line for line in process.stdout.splitlines() if line.startswith("failed: depth 2")]
    assert len(failed) == 2
    assert all("File too large" in line or "no space" in line for line in failed), failed
    again = varscale(*arguments, cwd=tmp_path)
    assert "failed" not in again.stdout
    rows = results(copy)
    assert len(rows) == 2
    for name, row in rows.items():
        assert numbers_of(row) == numbers_of(results(finished.runs)[name])


def test_a_full_disk_refuses_only_what_is_missing(
    call: Call, copy: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is trained; a finished sweep's laws need no room for its runs."""
    usage = shutil.disk_usage(copy)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    assert call("sweep", finished.yaml).code == 0
    cell = cell_folder(copy, 2, 2e7)
    shutil.rmtree(cell)
    result = call("sweep", finished.yaml)
    assert result.code == 1
    assert "runs: the sweep writes up to" in result.error
    assert not cell.exists()


def test_depths_restrict_variants_too(call: Call, tmp_path: Path) -> None:
    variant = {"name": "twice", "depths": [2, 3], "budgets": [2e7], "settings": {"optim.lr": 1e-2}}
    path = write_toy(tmp_path, grid={"budgets": [2e7, 3e7], "variants": [variant]})
    output = call("plan", path, "--depths", "3", "--cells").output
    assert output.count("d3-s0") == 3
    assert "d2-s0" not in output


@pytest.mark.parametrize(("arguments", "rows"), [(("plan", "--cells"), 4), (("plan",), 2), (("sweep", "--dry-run"), 2)])
def test_plan_writes_nothing(
    call: Call, tmp_path: Path, finished: Finished, arguments: tuple[str, ...], rows: int
) -> None:
    """A line a cell, or a line a size and another in the drawing."""
    result = call(*arguments, finished.yaml, "--depths", "3,4", "--set", "optim.batch_size=2")
    assert result.code == 0
    assert result.output.count("d3-s0") == result.output.count("d4-s0") == rows
    assert "d2-s0" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_plan_knows_the_hours_of_sizes_that_ran(call: Call, finished: Finished) -> None:
    """As fast as their trunks were; those of another size are marked."""
    output = call("plan", finished.yaml, "--runs-dir", finished.runs, "--depths", "1,2,3", "--cells").output
    (row,) = [line for line in output.splitlines() if "196" in line.split()]  # a path may hold the number too
    (curves,) = finished.runs.glob(f"trunks/*{row.split()[0]}-*/metrics.jsonl")
    points = [json.loads(line)["metrics"] for line in curves.read_text().splitlines()]
    rate = statistics.median(point["images_per_second"] for point in points if "images_per_second" in point)
    assert float(row.split()[-1]) == pytest.approx(196 / rate / 3600, rel=0.06)
    marked = [line.split()[0] for line in output.splitlines() if " ~" in line and "-s0" in line]
    assert marked == ["d1-s0"] * 4


def test_plan_and_result_show_the_tokenizer_apart(call: Call, finished: Finished) -> None:
    (row,) = [
        line.split() for line in call("plan", finished.yaml, "--cells").output.splitlines() if "tokenizer" in line
    ]
    folder = next(path.parent for path in finished.runs.glob("tokenizers/*/weights.safetensors"))
    weights = load_file(folder / "weights.safetensors")
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    parameters = sum(tensor.numel() for name, tensor in weights.items() if tensor.is_floating_point())
    assert row[1] == f"{parameters:,}"
    assert float(row[2]) == pytest.approx(metrics["train_flops"], rel=0.005)
    assert metrics["train_flops"] > 160 * 3 * metrics["decode_flops"] > 160 * 3 * metrics["encode_flops"] / 2 > 0


def test_plan_of_a_finished_study(call: Call, finished: Finished) -> None:
    output = call("plan", finished.yaml, "--runs-dir", finished.runs).output
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
    assert (rows["tokenizer"][-1], rows["tokens"][-1]) == ("yes", "yes")
    assert "Left to do: 0 of 8 cells, 0 FLOPs." in output
    drawn = [line for line in output.splitlines() if line.startswith("d") and "images" in line]
    assert [line.count("●") for line in drawn] == [4, 4]
    assert "Hours are of what was trained in" in output


def test_plan_counts_what_is_left(call: Call, copy: Path, finished: Finished) -> None:
    """A branch from a checkpoint that is there; and two with the part of their trunk that is gone."""
    for budget in (3e7, 4e7, 6e7):
        shutil.rmtree(cell_folder(copy, 2, budget) if budget > 3e7 else cell_folder(copy, 3, budget))
    trunk = next((copy / "trunks").glob("var-d2-*"))
    milestones = sorted(trunk.glob("images-*.ckpt"), key=lambda path: int(path.stem.removeprefix("images-")))
    for path in milestones[2:]:
        path.unlink()
    small, large = (toy_cells[0].trunk for toy_cells in (CELLS[2], CELLS[3]))
    images = [cell.branch_images for cell in CELLS[2]]
    assert [path.name for path in milestones] == [f"images-{seen}.ckpt" for seen in images]
    left = (images[3] - images[1] + sum(cell.decay_images for cell in CELLS[2][2:])) * small.flops_per_image
    left += CELLS[3][1].decay_images * large.flops_per_image
    output = call("plan", finished.yaml, "--set", "evaluation.samples_per_class=0").output
    (line,) = [line for line in output.splitlines() if line.startswith("Left to do: 3 of 8 cells, ")]
    evaluated = 32 * (2 * small.model.forward_flops() + large.model.forward_flops())
    assert float(line.split(", ")[1].split()[0]) == pytest.approx(left + evaluated, rel=0.005)
    drawn = [line for line in output.splitlines() if line.startswith("d") and "images" in line]
    assert [(line.count("●"), line.count("┬")) for line in drawn] == [(2, 2), (3, 1)]


def test_plan_for_a_named_device(call: Call, finished: Finished) -> None:
    """Hours by hand: executed FLOPs at half of an A100's 19.5 TFLOP/s in float32."""
    arguments = ("--device", "a100", "--utilisation", "0.5", "--workers", "4")
    output = call("plan", finished.yaml, "--depths", "3", *arguments).output
    (row,) = [line.split() for line in output.splitlines() if "d3-s0" in line and "images" not in line]
    cells = CELLS[3]
    images = cells[-1].branch_images + sum(cell.decay_images for cell in cells)
    seconds = images * cells[0].trunk.model.executed_training_flops() / (0.5 * 19.5e12)
    assert float(row[-3]) == pytest.approx(seconds / 3600, rel=0.06)
    assert "GPU-hours" in output
    assert "4 workers: " in output
    assert "computed, not measured" in output
    assert "utilisation of 0.5" in output
    default = call("plan", finished.yaml, "--device", "a100").output
    assert "utilisation of 0.3" in default
    assert "Devices of a run" not in default
    several = ("--set", "resources.devices=4", "--set", "resources.sharded=true")
    output = " ".join(call("plan", finished.yaml, "--device", "a100", *several).output.split())
    assert "Devices of a run: d2-s0 4 (sharded), d3-s0 4 (sharded);" in output


def test_plan_without_data_says_what_is_not_known(call: Call) -> None:
    output = call("plan", "imagenet256", "--device", "h200").output
    assert "Not known: epochs, tokens, " in output
    assert "data/imagenet/train" in output
    assert "Not counted: FLOPs of LPIPS and the discriminator" in output
    assert output.count("d30-s0") == 2
    assert "These can't run" not in output


def test_sizes_that_do_not_fit_are_named_before_anything_runs(
    call: Call, tmp_path: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Share, "memory_bytes", lambda _: 1e3)
    assert "These can't run: grid.depths: for a step of one image depth 2 needs " in call("plan", finished.yaml).output
    result = call("sweep", finished.yaml)
    assert result.code == 1
    (line,) = result.error.splitlines()
    assert line.startswith("varscale: grid.depths: for a step of one image depth 2 needs 0.0 GiB, depth 3 needs ")
    assert not (tmp_path / "runs" / "tokenizers").exists()


def test_plan_measures_a_few_steps(call: Call, finished: Finished) -> None:
    output = call("plan", finished.yaml, "--depths", "2", "--calibrate").output
    (row,) = [line.split() for line in output.splitlines() if "d2-s0" in line and "images" not in line]
    assert float(row[-3]) > 0  # exact: without ~
    (row,) = [line.split() for line in output.splitlines() if line.startswith(" tokenizer")]
    assert float(row[-3]) > 0
    assert "measured now, 1 at once, eager" in output


def test_status(call: Call, copy: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (cell_folder(copy, 2, 2e7), cell_folder(copy, 3, 4e7), *(copy / "trunks").glob("var-d3-*")):
        shutil.rmtree(folder)
    result = call("status", finished.yaml)
    assert result.code == 0
    text = result.output
    assert text.count("finished") == 6
    assert text.count("ready to branch") == 1
    assert text.count("not begun") == 1
    for row in results(copy).values():
        assert f"{row['loss']:.4f}" in text
    monkeypatch.setenv("COLUMNS", "40")
    narrow = call("status", finished.yaml).output
    for log in [*(copy / "cells").glob("*/run.log"), *(copy / "trunks").glob("var-d2-*/run.log")]:
        assert f" {log.relative_to(copy.parent)} " in narrow, "whole, to be copied"


def test_status_before_anything_ran(call: Call, finished: Finished) -> None:
    assert call("status", finished.yaml).output.count("not begun") == 8


def test_status_of_a_new_study_knows_what_it_would_take(call: Call, copy: Path, tmp_path: Path) -> None:
    other = write_toy(tmp_path, name="other")
    assert call("status", other).output.count("finished") == 8
    assert not (copy / "studies" / "other").exists()


def test_status_without_data_or_anything_begun(call: Call, copy: Path) -> None:
    result = call("status", "cifar10")
    assert result.code == 0
    assert "not begun" in result.output


def test_a_second_sweep_of_a_study(call: Call, copy: Path, finished: Finished) -> None:
    with FileLock(Store(copy).study("toy").lock):
        result = call("sweep", finished.yaml)
    assert result.code == 1
    assert result.error == "varscale: runs/studies/toy: another sweep of this study is running; wait for it or stop it"


def test_dashboard_of_a_dead_server(call: Call, copy: Path) -> None:
    """Whatever listens on this machine's port, which it doesn't need."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        result = call("dashboard", "--tracking-uri", NOWHERE, "--port", str(other.getsockname()[1]))
    assert result.code == 1
    assert result.output.startswith(f"MLflow at {NOWHERE}: ")
    assert len(result.output.splitlines()) == 1
    assert "Traceback" not in result.output + result.error


def test_an_experiment_deleted_in_mlflow_does_not_shut_the_dashboard_of_others(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "runs")
    cells = {name: [finished_cell(store, depth, 1e12)] for name, depth in (("gone", 12), ("here", 16))}
    for name in cells:
        write_study(store, name, cells[name])
    assert call("sync").output == "MLflow has everything\n"
    client = mlflow.MlflowClient(store.tracking_uri)
    gone, here = (client.get_experiment_by_name(name).experiment_id for name in cells)
    client.delete_experiment(gone)
    for name in cells:
        write_study(store, name, [*cells[name], finished_cell(store, 20, 1e12)])
    monkeypatch.setattr(tracking, "serve_dashboard", lambda uri, port: 0)
    opened = call("dashboard", "--port", str(free_port()))
    reason, address = opened.output.splitlines()
    assert opened.code == 0
    assert "the experiment 'gone' was deleted in MLflow: `mlflow experiments restore --experiment-id" in reason
    assert f"/#/experiments/{here}/" in address
    assert sorted(runs_table(store.tracking_uri, "here")["depth"]) == [16, 20]
    synced = call("sync")
    assert (synced.code, synced.output.splitlines()) == (1, [reason])
    client.restore_experiment(gone)
    assert call("sync").code == 0
    assert sorted(runs_table(store.tracking_uri, "gone")["depth"]) == [12, 20]


def write_members(folder: Path, toy: Path, **members: dict[str, object]) -> Path:
    path = folder / "pair.yaml"
    path.write_text(json.dumps({"name": "pair", "extends": str(toy), "members": members}))
    return path


def test_members_of_a_file_are_swept_and_compared(call: Call, copy: Path, finished: Finished, tmp_path: Path) -> None:
    """Cells that another study has trained already; their losses are of the same tokens, and compare."""
    pair = write_members(tmp_path, finished.yaml, **{f"d{depth}": {"grid": {"depths": [depth]}} for depth in (3, 2)})
    swept = call("sweep", pair)
    assert swept.code == 0, swept.error
    assert swept.output.splitlines()[-1] == "runs/studies/pair/laws/report.html"
    laws = json.loads((copy / "studies" / "pair" / "laws" / "laws.json").read_text())
    assert {fit["group"] for fit in laws["fits"]} == {"d2", "d3"}
    assert {(each["target"], each["a"], each["b"]) for each in laws["comparisons"]} >= {("loss", "d3", "d2")}
    assert set(pd.read_csv(copy / "studies" / "pair" / "laws" / "runs.csv")["member"]) == {"d2", "d3"}
    assert results(copy).keys() == results(finished.runs).keys()
    assert "nothing is new" in call("sweep", pair).output

    fitted = call("fit-laws", pair, "--law", "power", "--bootstrap-draws", "50", "--out", tmp_path / "again")
    assert fitted.code == 0, fitted.error
    again = json.loads((tmp_path / "again" / "laws.json").read_text())
    assert {each["b"] for each in again["comparisons"]} == {"d2"}
    status = call("status", pair).output
    assert "pair-d2 in runs/studies/pair-d2" in status
    assert "pair-d3 in runs/studies/pair-d3" in status
    planned = call("plan", pair).output
    assert planned.index("pair-d3 on ") < planned.index("pair-d2 on ")
    refused = call("fit-laws", pair, "--from-mlflow")
    assert (refused.code, "name a member, such as" in refused.error) == (2, True)


def test_members_that_nothing_compares_are_refused_before_they_are_trained(
    call: Call, finished: Finished, tmp_path: Path
) -> None:
    pair = write_members(tmp_path, finished.yaml, one={}, two={"tokenizer": {"patch_nums": [1, 4]}})
    result = call("sweep", pair)
    assert result.code == 1
    assert result.error.startswith("varscale: evaluation.fidelity: missing in pair-one, pair-two")
    assert not (tmp_path / "runs").exists()
    named = call("train", pair, "--depth", "2")
    assert "holds several experiments; name one of them, such as" in named.error
