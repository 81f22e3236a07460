"""Trunks and cells: branches, resuming, milestones, results, and checkpoints that don't belong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import (
    TOKENS,
    Killed,
    cell_of_steps,
    checkpoint_every,
    ignore,
    kill_at,
    little_experiment,
    make_inputs,
    points,
    report_every_step,
)

from varscale.errors import Diverged
from varscale.kernels.building import SWITCH
from varscale.store.layout import RunFiles, read_json, write_json
from varscale.store.weights import load_var
from varscale.training import runs as model_run
from varscale.training.cells import Cell
from varscale.training.runs import Inputs, train_cell, train_trunk

RUNS_TABLE = {
    "run experiment family depth width heads seed variant budget_flops train_flops flops_per_image params_total "
    "params_active images_seen tokens_seen steps batch_size lr unique_images epochs loss loss_last_scale loss_scale_1 "
    "loss_scale_2 loss_scale_3 loss_per_image loss_standard_error error error_last_scale error_scale_1 error_scale_2 "
    "error_scale_3 unigram_entropy validation_images warmup_images tokenizer fingerprint status wall_seconds precision "
    "compiled threads"
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    report_every_step(monkeypatch)
    monkeypatch.setenv(SWITCH, "1")  # runs set it; put back afterwards


def weights(files: RunFiles) -> dict[str, torch.Tensor]:
    return load_var(files.weights).state_dict()


def assert_same(first: RunFiles, second: RunFiles) -> None:
    """Equal weights and results to the bit."""
    ours, theirs = weights(first), weights(second)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    rows = []
    for files in (first, second):
        row: dict[str, Any] = (files.read_result() or {})["row"]
        rows.append({name: value for name, value in row.items() if "seconds" not in name and "per_second" not in name})
    rows = [{k: v for k, v in row.items() if k not in ("utilisation", "data_wait_share")} for row in rows]
    assert rows[0] == rows[1]


@pytest.fixture(scope="module")
def straight(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cell, RunFiles]:
    """A cell of 20 steps without a trunk, never interrupted."""
    cell = cell_of_steps(little_experiment(), 20)
    files = RunFiles(tmp_path_factory.mktemp("straight"))
    train_cell(cell, None, files, inputs, ignore)
    return cell, files


def test_branch_is_a_separate_run_of_the_same_schedule(
    inputs: Inputs, straight: tuple[Cell, RunFiles], tmp_path: Path
) -> None:
    cell, alone = straight
    trunk, branch = RunFiles(tmp_path / "trunk"), RunFiles(tmp_path / "branch")
    # the branch starts where the trunk ends: Lightning once took all of its batches for done
    train_trunk(cell.trunk, [cell.branch_images], trunk, inputs, ignore)
    seen: list[int] = []
    train_cell(cell, trunk, branch, inputs, lambda done, total: seen.append(done))
    assert seen == list(range(cell.branch_images + 8, cell.images + 1, 8))
    assert_same(alone, branch)
    started = torch.load(trunk.milestone(cell.branch_images), weights_only=True)["state_dict"]
    assert any(not torch.equal(value, started[f"var.{name}"]) for name, value in weights(branch).items())


def test_milestones_lie_where_the_branches_start(inputs: Inputs, tmp_path: Path) -> None:
    experiment = little_experiment()
    cells = [cell_of_steps(experiment, steps, smallest=10) for steps in (10, 15, 20)]
    trunk = cells[0].trunk
    files = RunFiles(tmp_path)
    milestones = [cell.branch_images for cell in cells]
    assert milestones == [8 * 8, 12 * 8, 16 * 8]
    train_trunk(trunk, milestones, files, inputs, ignore)
    for images in milestones:
        checkpoint = torch.load(files.milestone(images), weights_only=True)
        assert int(checkpoint["state_dict"]["steps"]) * 8 == images
    assert sorted(path.name for path in files.folder.glob("*.ckpt")) == sorted(f"images-{n}.ckpt" for n in milestones)
    # a budget added in between starts from the milestone before it, and gives the run that it would always have given
    added = cell_of_steps(experiment, 17, smallest=10)
    seen: list[int] = []
    train_trunk(trunk, [*milestones, added.branch_images], files, inputs, lambda done, total: seen.append(done))
    assert seen == [104, 112]
    straight = RunFiles(tmp_path / "straight")
    train_trunk(trunk, [added.branch_images], straight, inputs, ignore)
    ours, theirs = (
        torch.load(run.milestone(added.branch_images), weights_only=True)["state_dict"] for run in (files, straight)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kills", [[(3, 3)], [(2, 7), (4, 12), (1, 13)]])
def test_a_trunk_goes_on_to_the_bit(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: list[tuple[int, int]]
) -> None:
    """Checkpoints after every so many steps; killed at some step; then whole."""
    cell = cell_of_steps(little_experiment(), 20)
    files, whole = RunFiles(tmp_path / "killed"), RunFiles(tmp_path / "whole")
    train_trunk(cell.trunk, [cell.branch_images], whole, inputs, ignore)
    for every, last in kills:
        checkpoint_every(monkeypatch, every)
        with pytest.raises(Killed):
            train_trunk(cell.trunk, [cell.branch_images], files, inputs, kill_at(last * 8))
    train_trunk(cell.trunk, [cell.branch_images], files, inputs, ignore)
    assert not files.last_checkpoint.exists()
    ours, theirs = (torch.load(run.milestone(cell.branch_images), weights_only=True) for run in (files, whole))
    assert all(torch.equal(ours["state_dict"][name], theirs["state_dict"][name]) for name in theirs["state_dict"])
    for name, moments in theirs["optimizer_states"][0]["state"].items():
        assert all(torch.equal(ours["optimizer_states"][0]["state"][name][key], moments[key]) for key in moments)


@pytest.mark.parametrize("kills", [[(4, 7), (3, 18)], [(5, 5), (5, 10), (5, 15)]], ids=["between", "at a point"])
def test_a_cell_goes_on_to_the_bit_with_every_point_once(
    inputs: Inputs,
    straight: tuple[Cell, RunFiles],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kills: list[tuple[int, int]],
) -> None:
    """Killed between points, or after a step whose point is not yet written and after which a checkpoint is due."""
    cell, whole = straight
    files = RunFiles(tmp_path)
    for every, last in kills:
        checkpoint_every(monkeypatch, every)
        with pytest.raises(Killed):
            train_cell(cell, None, files, inputs, kill_at(last * 8))
    assert files.last_checkpoint.exists()
    with files.metrics.open("a") as torn:
        torn.write('{"time": 17')
    train_cell(cell, None, files, inputs, ignore)
    assert not files.last_checkpoint.exists()
    assert_same(whole, files)
    assert [point["images"] for point in points(files)] == [40, 80, 120, 160]  # every 5 steps of 8 images
    assert [p["metrics"]["train_loss"] for p in points(files)] == [p["metrics"]["train_loss"] for p in points(whole)]


def test_killed_after_the_last_step(inputs: Inputs, straight: tuple[Cell, RunFiles], tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The last checkpoint already is the end: only measuring and writing the result are left."""
    cell, whole = straight
    files = RunFiles(tmp_path)
    checkpoint_every(monkeypatch, 1)
    with monkeypatch.context() as patch:
        patch.setattr(model_run, "_evaluate", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train_cell(cell, None, files, inputs, ignore)
    assert files.read_result() is None
    seen: list[int] = []
    train_cell(cell, None, files, inputs, lambda done, total: seen.append(done))
    assert seen == []
    assert_same(whole, files)


def test_a_finished_cell_is_not_trained_again(inputs: Inputs, straight: tuple[Cell, RunFiles]) -> None:
    cell, files = straight
    before = files.result.read_bytes()
    train_cell(cell, None, files, inputs, kill_at(8))
    assert files.result.read_bytes() == before


def test_results_are_the_runs_table(inputs: Inputs, straight: tuple[Cell, RunFiles]) -> None:
    cell, files = straight
    result = files.read_result() or {}
    row = result["row"]
    assert set(" ".join(RUNS_TABLE).split()) <= set(row)
    assert row["steps"] == 20
    assert row["images_seen"] == 160
    assert row["tokens_seen"] == 160 * TOKENS
    assert row["train_flops"] == pytest.approx(160 * row["flops_per_image"])
    assert row["params_total"] == sum(tensor.numel() for tensor in weights(files).values())
    assert row["loss_per_image"] == pytest.approx(row["loss"] * TOKENS)
    assert row["loss"] == pytest.approx((row["loss_scale_1"] + 4 * row["loss_scale_2"] + 16 * row["loss_scale_3"]) / 21)
    assert (row["unique_images"], row["epochs"], row["validation_images"]) == (400, 0.4, 40)
    assert (row["status"], row["fingerprint"]) == ("finished", cell.fingerprint("tokens-print", inputs.numerics))
    assert result["metrics"] == {name: value for name, value in row.items() if isinstance(value, int | float)}
    assert (read_json(files.identity) or {})["role"] == "cell"


def test_learning_rates_of_the_run(straight: tuple[Cell, RunFiles]) -> None:
    """Warm-up of 5 steps, stable to step 16, decay to step 20; points are after steps 5, 10, 15, 20."""
    rates = [point["metrics"]["lr"] for point in points(straight[1])]
    assert rates == pytest.approx([5e-3, 5e-3, 5e-3, 5e-3 / 4])


def test_loss_that_is_not_finite_ends_the_run(inputs: Inputs, tmp_path: Path) -> None:
    cell = cell_of_steps(little_experiment(optim={"lr": 1e30, "grad_clip": 1e30}), 20)
    files = RunFiles(tmp_path)
    with pytest.raises(Diverged, match=r"the training loss is (nan|inf) after [0-9]+ images"):
        train_cell(cell, None, files, inputs, ignore)
    assert files.read_result() is None
    model_run.record_divergence(cell, files, inputs, "the training loss is nan")
    row = (files.read_result() or {})["row"]
    assert row["status"] == "diverged"
    assert "loss" not in row


def test_a_last_step_that_overflows_is_noticed(inputs: Inputs, tmp_path: Path) -> None:
    """No step follows that would."""
    cell = cell_of_steps(little_experiment(optim={"lr": 1e30, "grad_clip": 1e30, "warmup_fraction": 0.0}), 1)
    with pytest.raises(Diverged, match="after the last step the validation loss is"):
        train_cell(cell, None, RunFiles(tmp_path), inputs, ignore)


def test_a_checkpoint_of_other_settings_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    cell = cell_of_steps(little_experiment(), 20)
    trunk, files = RunFiles(tmp_path / "trunk"), RunFiles(tmp_path / "cell")
    train_trunk(cell.trunk, [cell.branch_images], trunk, inputs, ignore)
    other = cell_of_steps(little_experiment(optim={"grad_clip": 1.0}), 20)
    with pytest.raises(ValueError, match=r"images-128.ckpt: checkpoint of fingerprint [0-9a-f]+, expected [0-9a-f]+"):
        train_cell(other, trunk, files, inputs, ignore)
    trunk.milestone(cell.branch_images).rename(files.last_checkpoint)
    with pytest.raises(ValueError, match=r"last.ckpt: checkpoint of fingerprint"):
        train_cell(cell, trunk, files, inputs, ignore)
    files.last_checkpoint.unlink()
    with pytest.raises(ValueError, match=r"images-128.ckpt: the trunk's checkpoint is missing"):
        train_cell(cell, trunk, files, inputs, ignore)


def test_a_torn_checkpoint_is_named(inputs: Inputs, tmp_path: Path) -> None:
    cell = cell_of_steps(little_experiment(), 20)
    trunk, files = RunFiles(tmp_path / "trunk"), RunFiles(tmp_path / "cell")
    train_trunk(cell.trunk, [cell.branch_images], trunk, inputs, ignore)
    path = trunk.milestone(cell.branch_images)
    whole = path.read_bytes()
    for content in (b"", b"no checkpoint", whole[:1000], whole[:-100]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"images-128.ckpt: not a readable checkpoint"):
            train_cell(cell, trunk, files, inputs, ignore)
    middle = len(whole) // 2  # among the tensors
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match=r"images-128.ckpt: damaged \(its part .*\); delete it"):
        train_cell(cell, trunk, files, inputs, ignore)


def test_summary_may_be_missing(inputs: Inputs, straight: tuple[Cell, RunFiles]) -> None:
    """A store that someone brought along has no summary: the row says so by empty fields."""
    summary = inputs.tokens.summary
    kept = read_json(summary) or {}
    summary.unlink()
    try:
        row = model_run.cell_result(straight[0], inputs, "f" * 16, "finished", {}, 1.0, [])["row"]
    finally:
        write_json(summary, kept)
    assert (row["unique_images"], row["epochs"], row["unigram_entropy"]) == (None, None, None)


def test_samples_are_drawn(inputs: Inputs, tmp_path: Path) -> None:
    cell = cell_of_steps(little_experiment(evaluation={"samples_per_class": 2}), 2)
    files = RunFiles(tmp_path)
    train_cell(cell, None, files, inputs, ignore)
    assert (files.read_result() or {})["pictures"] == ["samples.png"]
    assert files.picture("samples").read_bytes().startswith(b"\x89PNG")
