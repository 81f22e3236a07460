"""Trunks and cells: branches, resuming, milestones, results, and checkpoints that don't belong."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import (
    TOKENS,
    Killed,
    cell_of_steps,
    checkpoint_every,
    files_of,
    ignore,
    kill_at,
    little_experiment,
    make_inputs,
    points,
    report_every_step,
)

from varscale.errors import Diverged
from varscale.families.storage import load_model
from varscale.store.layout import RunFiles
from varscale.store.records import RunIdentity, TokensSummary, read_result
from varscale.training import runs as model_run
from varscale.training.cells import Cell
from varscale.training.runs import Inputs, train_cell, train_trunk
from varscale.training.trainer import FINGERPRINT_KEY

RUNS_TABLE = {
    "run family depth width heads seed train_flops flops_per_image params_total "
    "params_active images_seen tokens_seen steps batch_size lr unique_images epochs loss loss_last_scale loss_scale_1 "
    "loss_scale_2 loss_scale_3 loss_per_image loss_standard_error error error_last_scale error_scale_1 error_scale_2 "
    "error_scale_3 unigram_entropy validation_images warmup_images tokenizer_fingerprint tokenizer_faults fingerprint "
    "status wall_seconds precision sampling_passes loss_unit"
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    report_every_step(monkeypatch)


def weights(files: RunFiles) -> dict[str, torch.Tensor]:
    return load_model(files.weights, files.fingerprint).state_dict()


def row_of(files: RunFiles) -> dict[str, Any]:
    result = read_result(files)
    assert result is not None
    return dict(result.row)


def assert_same(first: RunFiles, second: RunFiles) -> None:
    """Equal weights and results to the bit."""
    ours, theirs = weights(first), weights(second)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    rows = []
    for files in (first, second):
        row = row_of(files)
        rows.append({name: value for name, value in row.items() if "seconds" not in name and "per_second" not in name})
    rows = [{k: v for k, v in row.items() if k not in ("utilisation", "data_wait_share")} for row in rows]
    assert rows[0] == rows[1]


@pytest.fixture(scope="module")
def straight(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cell, RunFiles]:
    """A cell of 20 steps without a trunk, never interrupted."""
    cell = cell_of_steps(little_experiment(), 20)
    files = files_of(cell, inputs, tmp_path_factory.mktemp("straight"))
    train_cell(cell, None, files, inputs, ignore)
    return cell, files


def test_branch_is_a_separate_run_of_the_same_schedule(
    inputs: Inputs, straight: tuple[Cell, RunFiles], tmp_path: Path
) -> None:
    cell, alone = straight
    trunk, branch = files_of(cell.trunk, inputs, tmp_path), files_of(cell, inputs, tmp_path)
    # the branch starts where the trunk ends: Lightning once took all of its batches for done
    train_trunk(cell.trunk, [cell.branch_images], trunk, inputs, ignore)
    seen: list[int] = []
    train_cell(cell, trunk, branch, inputs, lambda done, total: seen.append(done))
    assert seen == list(range(cell.branch_images + 8, cell.images + 1, 8))
    assert_same(alone, branch)
    started = torch.load(trunk.milestone(cell.branch_images), weights_only=True)["state_dict"]
    assert any(not torch.equal(value, started[f"model.{name}"]) for name, value in weights(branch).items())


def test_under_a_cosine_budgets_share_the_warm_up_alone(inputs: Inputs, tmp_path: Path) -> None:
    experiment = little_experiment(optim={"schedule": "cosine", "warmup_fraction": 0.3})
    cells = [cell_of_steps(experiment, steps, smallest=10) for steps in (10, 16)]
    trunk = files_of(cells[0].trunk, inputs, tmp_path)
    assert [cell.branch_images for cell in cells] == [3 * 8, 3 * 8]
    train_trunk(cells[0].trunk, [3 * 8], trunk, inputs, ignore)
    alone, branch = files_of(cells[1], inputs, tmp_path / "alone"), files_of(cells[1], inputs, tmp_path)
    seen: list[int] = []
    train_cell(cells[1], trunk, branch, inputs, lambda done, total: seen.append(done))
    assert seen[0] == 4 * 8
    train_cell(cells[1], None, alone, inputs, ignore)
    assert_same(alone, branch)


def test_milestones_lie_where_the_branches_start(inputs: Inputs, tmp_path: Path) -> None:
    experiment = little_experiment()
    cells = [cell_of_steps(experiment, steps, smallest=10) for steps in (10, 15, 20)]
    trunk = cells[0].trunk
    files = files_of(trunk, inputs, tmp_path)
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
    straight = files_of(trunk, inputs, tmp_path / "straight")
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
    files, whole = (files_of(cell.trunk, inputs, tmp_path / name) for name in ("killed", "whole"))
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
    files = files_of(cell, inputs, tmp_path)
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
    assert [point.images for point in points(files)] == [40, 80, 120, 160]  # every 5 steps of 8 images
    assert [p.metrics["train_loss"] for p in points(files)] == [p.metrics["train_loss"] for p in points(whole)]


def test_killed_after_the_last_step(inputs: Inputs, straight: tuple[Cell, RunFiles], tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The last checkpoint already is the end: only measuring and writing the result are left."""
    cell, whole = straight
    files = files_of(cell, inputs, tmp_path)
    checkpoint_every(monkeypatch, 1)
    with monkeypatch.context() as patch:
        patch.setattr(model_run, "_evaluate", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train_cell(cell, None, files, inputs, ignore)
    assert read_result(files) is None
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
    result, row = read_result(files), row_of(files)
    assert result is not None
    # what a study calls the cell is in the study's record, since several studies may share it
    assert set(" ".join(RUNS_TABLE).split()) <= set(row)
    assert not {"experiment", "variant", "budget_flops"} & set(row)
    assert row["steps"] == 20
    assert row["images_seen"] == 160
    assert row["tokens_seen"] == 160 * TOKENS
    assert row["train_flops"] == pytest.approx(160 * row["flops_per_image"])
    assert row["params_total"] == sum(tensor.numel() for tensor in weights(files).values())
    assert row["loss_per_image"] == pytest.approx(row["loss"] * TOKENS)
    assert row["loss"] == pytest.approx((row["loss_scale_1"] + 4 * row["loss_scale_2"] + 16 * row["loss_scale_3"]) / 21)
    assert (row["unique_images"], row["epochs"], row["validation_images"]) == (400, 0.4, 40)
    assert (row["status"], row["fingerprint"]) == ("finished", cell.key(inputs.tokens.fingerprint).fingerprint)
    assert row["tokenizer_fingerprint"] == inputs.tokenizer.fingerprint
    assert result.metrics == {name: value for name, value in row.items() if isinstance(value, int | float)}
    identity = RunIdentity.read(files.identity)
    assert identity is not None
    assert identity.role == "cell"


def test_how_it_was_carried_out_is_recorded(inputs: Inputs, straight: tuple[Cell, RunFiles]) -> None:
    """Beside the row, and in no fingerprint."""
    result = read_result(straight[1])
    assert result is not None
    provenance = dict(result.provenance)
    assert provenance.pop("device")
    assert provenance.pop("torch") == torch.__version__
    assert {"varscale", "lightning"} <= provenance.keys()
    assert [provenance[name] for name in ("compiled", "threads", "images_at_once")] == [False, 1, 8]


def test_learning_rates_of_the_run(straight: tuple[Cell, RunFiles]) -> None:
    """Warm-up of 5 steps, stable to step 16, decay to step 20; points are after steps 5, 10, 15, 20."""
    rates = [point.metrics["lr"] for point in points(straight[1])]
    assert rates == pytest.approx([5e-3, 5e-3, 5e-3, 5e-3 / 4])


def test_loss_that_is_not_finite_ends_the_run(inputs: Inputs, tmp_path: Path) -> None:
    cell = cell_of_steps(little_experiment(optim={"lr": 1e12, "grad_clip": 1e12}), 20)
    files = files_of(cell, inputs, tmp_path)
    with pytest.raises(Diverged, match=r"the training loss is (nan|inf) after [0-9]+ images"):
        train_cell(cell, None, files, inputs, ignore)
    assert read_result(files) is None
    model_run.record_divergence(cell, files, inputs, "the training loss is nan")
    row = row_of(files)
    assert row["status"] == "diverged"
    assert "loss" not in row


def test_a_last_step_that_overflows_is_noticed(inputs: Inputs, tmp_path: Path) -> None:
    """No step follows that would."""
    cell = cell_of_steps(little_experiment(optim={"lr": 1e12, "grad_clip": 1e12, "warmup_fraction": 0.0}), 1)
    with pytest.raises(Diverged, match="after the last step the validation loss is"):
        train_cell(cell, None, files_of(cell, inputs, tmp_path), inputs, ignore)


def resaved(path: Path, **changes: Any) -> bytes:
    """A whole checkpoint with other content."""
    checkpoint = torch.load(path, weights_only=True)
    for name, value in changes.items():
        checkpoint.pop(name) if value is None else checkpoint.update({name: value})
    changed = path.with_name("changed")
    torch.save(checkpoint, changed)
    content = changed.read_bytes()
    changed.unlink()
    return content


@pytest.fixture(scope="module")
def milestone(inputs: Inputs, straight: tuple[Cell, RunFiles], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the trunk of `straight`, where its branch begins."""
    trunk = straight[0].trunk
    files = files_of(trunk, inputs, tmp_path_factory.mktemp("trunk"))
    train_trunk(trunk, [straight[0].branch_images], files, inputs, ignore)
    return files.milestone(straight[0].branch_images)


CHECKPOINTS = ["empty", "no checkpoint", "zeros", "head", "without end", "flip at 0", "flip at 100", "flip at 1/3",
               "flip at 1/2", "flip near the end", "another run's", "unsigned", "without steps", "a folder",
               "a pickled object"]  # fmt: skip


def spoil(path: Path, whole: Path, how: str) -> None:
    """Put something unusable in a checkpoint's place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if how == "a folder":
        path.mkdir()
        (path / "file").touch()
        return
    content = whole.read_bytes()
    places = {"flip at 0": 0, "flip at 100": 100, "flip at 1/3": len(content) // 3, "flip at 1/2": len(content) // 2,
              "flip near the end": len(content) - 30}  # fmt: skip
    if how in places:
        at = places[how]
        content = content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]
    others = {
        "empty": b"",
        "no checkpoint": b"no checkpoint",
        "zeros": bytes(5000),
        "head": content[:1000],
        "without end": content[:-100],
        "another run's": resaved(whole, **{FINGERPRINT_KEY: "0" * 16}),
        "unsigned": resaved(whole, **{FINGERPRINT_KEY: None}),
        "without steps": resaved(whole, state_dict={}),
        "a pickled object": resaved(whole, more=Path("code")),
    }
    path.write_bytes(others.get(how, content))


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_an_unusable_checkpoint_is_named_and_the_run_made_anew(
    inputs: Inputs,
    straight: tuple[Cell, RunFiles],
    milestone: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    """Of the cell itself, with its trunk's milestone before it; then the milestone, too."""
    cell, whole = straight
    for place in ("last.ckpt", milestone.name):
        files, trunk = (files_of(run, inputs, tmp_path / place) for run in (cell, cell.trunk))
        trunk.folder.mkdir(parents=True)
        if place == "last.ckpt":
            shutil.copy(milestone, trunk.folder)
            spoil(files.last_checkpoint, milestone, how)
        else:
            spoil(trunk.milestone(cell.branch_images), milestone, how)
        seen: list[int] = []
        caplog.clear()
        train_cell(cell, trunk, files, inputs, lambda done, total, seen=seen: seen.append(done))
        named = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(named) == 1
        assert f"{place}: not a usable checkpoint (" in named[0]
        assert "\n" not in named[0]
        assert len(seen) == (4 if place == "last.ckpt" else 20)
        assert_same(whole, files)
        assert not files.last_checkpoint.exists()


def test_without_its_trunks_milestone_a_branch_trains_the_whole_schedule(
    inputs: Inputs, straight: tuple[Cell, RunFiles], tmp_path: Path
) -> None:
    cell, whole = straight
    files, trunk = (files_of(run, inputs, tmp_path) for run in (cell, cell.trunk))
    seen: list[int] = []
    train_cell(cell, trunk, files, inputs, lambda done, total: seen.append(done))
    assert len(seen) == 20
    assert_same(whole, files)


def test_a_branch_starts_from_an_earlier_milestone_where_its_own_is_damaged(
    inputs: Inputs, straight: tuple[Cell, RunFiles], tmp_path: Path, milestone: Path
) -> None:
    """But never from one that lies beyond it."""
    cell, whole = straight
    files, trunk = (files_of(run, inputs, tmp_path) for run in (cell, cell.trunk))
    train_trunk(cell.trunk, [12 * 8, 18 * 8], trunk, inputs, ignore)
    spoil(trunk.milestone(cell.branch_images), milestone, "without end")
    seen: list[int] = []
    train_cell(cell, trunk, files, inputs, lambda done, total: seen.append(done))
    assert seen[0] == 13 * 8
    assert_same(whole, files)


@pytest.mark.parametrize("how", ["empty", "flip at 1/2", "another run's", "a folder"])
def test_a_trunk_is_made_anew_from_what_lies_before_a_damaged_checkpoint(
    inputs: Inputs, straight: tuple[Cell, RunFiles], milestone: Path, tmp_path: Path, how: str
) -> None:
    trunk, branch = straight[0].trunk, straight[0].branch_images
    files = files_of(trunk, inputs, tmp_path)
    train_trunk(trunk, [10 * 8], files, inputs, ignore)
    spoil(files.last_checkpoint, milestone, how)
    seen: list[int] = []
    train_trunk(trunk, [10 * 8, branch], files, inputs, lambda done, total: seen.append(done))
    assert seen[0] == 11 * 8
    ours, theirs = (torch.load(path, weights_only=True)["state_dict"] for path in (files.milestone(branch), milestone))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not files.last_checkpoint.exists()


def test_summary_may_be_missing(inputs: Inputs, straight: tuple[Cell, RunFiles]) -> None:
    """A store that someone brought along has no summary: the row says so by empty fields."""
    summary = inputs.tokens.summary
    kept = TokensSummary.read(summary)
    assert kept is not None
    summary.unlink()
    try:
        row = model_run._result(straight[0], straight[1], inputs, "finished", {}).row
    finally:
        kept.write(summary)
    assert (row["unique_images"], row["epochs"], row["unigram_entropy"]) == (None, None, None)


def test_samples_are_drawn(inputs: Inputs, tmp_path: Path) -> None:
    cell = cell_of_steps(little_experiment(evaluation={"samples_per_class": 2}), 2)
    files = files_of(cell, inputs, tmp_path)
    train_cell(cell, None, files, inputs, ignore)
    result = read_result(files)
    assert result is not None
    assert result.pictures == ("samples.png",)
    assert files.picture("samples").read_bytes().startswith(b"\x89PNG")
