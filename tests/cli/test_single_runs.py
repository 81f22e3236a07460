"""Single runs, images and checkpoints through the command, on a finished little sweep."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import architecture
from command_calls import Call
from filelock import FileLock
from PIL import Image
from toy_sweep import Finished, cell_folder, numbers_of, results, write_toy

from varscale.config import RuntimeConfig
from varscale.numerics import machine
from varscale.store.layout import RunFiles
from varscale.store.records import Result
from varscale.store.weights import load_tensors
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.tokenizer.storage import save_tokenizer


def test_train_equals_the_cell_of_the_grid(call: Call, copy: Path, finished: Finished) -> None:
    """Without trunk and branch, in this process."""
    cell = cell_folder(copy, 2, 2e7)
    shutil.rmtree(cell)
    result = call("train", finished.yaml, "--depth", "2", "--budget", "2e7")
    assert result.code == 0
    assert result.output.splitlines()[-1] == f"runs/cells/{cell.name}/result.json"
    assert numbers_of(results(copy)[cell.name]) == numbers_of(results(finished.runs)[cell.name])


def test_a_cell_that_another_study_finished_is_not_trained_again(call: Call, copy: Path, finished: Finished) -> None:
    """However it would be carried out here: that is no part of what it is."""
    cell = cell_folder(copy, 2, 2e7)
    before = (cell / "result.json").stat().st_mtime_ns
    arguments = ("--depth", "2", "--budget", "2e7", "--set", "name=other", "--set", "runtime.compile=auto")
    result = call("train", finished.yaml, *arguments)
    assert result.output.splitlines()[-1] == f"runs/cells/{cell.name}/result.json"
    assert (cell / "result.json").stat().st_mtime_ns == before


def test_a_run_of_another_precision_is_another_cell(call: Call, copy: Path, finished: Finished) -> None:
    arguments = ("--depth", "2", "--budget", "2e7", "--set", "optim.precision=bfloat16")
    result = call("train", finished.yaml, *arguments)
    assert result.code == 0
    file = copy.parent / result.output.splitlines()[-1]
    assert json.loads(file.read_text())["row"]["precision"] == "bfloat16"
    assert file.parent.name not in results(finished.runs)
    assert call("status", finished.yaml).output.count("finished") == 8


def test_one_job_by_itself(call: Call, copy: Path, finished: Finished) -> None:
    """What a person repeats, and what a cluster's script calls."""
    cell = cell_folder(copy, 2, 2e7)
    job = (cell / "job.json").read_bytes()
    shutil.rmtree(cell)
    cell.mkdir()
    (cell / "job.json").write_bytes(job)
    assert str(copy).encode() not in job, "it was written in another runs folder, of which this is a copy"
    assert call("run-job", cell / "job.json").output.splitlines()[-1] == str(cell)
    assert numbers_of(results(copy)[cell.name]) == numbers_of(results(finished.runs)[cell.name])
    assert "done already" in call("run-job", cell / "job.json").output


def test_a_job_that_was_changed_is_refused(call: Call, copy: Path) -> None:
    job = cell_folder(copy, 2, 2e7) / "job.json"
    job.write_text(job.read_text().replace('"depth": 2', '"depth": 3'))
    refused = call("run-job", job)
    assert refused.code == 1
    assert str(job) in refused.error


@pytest.mark.parametrize(
    ("workers", "threads", "gpus", "expected"),
    [
        (0, 0, 0, (8, 0, (1, 8))),
        (2, 0, 0, (2, 0, (4, 2))),
        (16, 0, 0, (16, 0, (1, 16))),
        (0, 3, 0, (8, 0, (3, 8))),
        (0, 0, 4, (4, 4, (2, 1))),
        (6, 0, 4, (6, 4, (1, 2))),
    ],
)
def test_shares(
    workers: int, threads: int, gpus: int, expected: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "processors", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    shares = machine.MachineShares.of(RuntimeConfig(workers=workers, threads=threads))
    workers_gpus = shares.workers, shares.gpus
    threads_sharing = [(share.threads, share.workers_a_device) for share in (shares.worker, shares.whole)]
    assert (*workers_gpus, *threads_sharing) == (*expected, (8, 1)), "what has the machine to itself uses all of it"


def test_tokenizer_and_tokens_alone(call: Call, finished: Finished, tmp_path: Path) -> None:
    """Equal to those of the sweep."""
    result = call("tokenize", finished.yaml)
    assert result.code == 0
    (folder,) = tmp_path.glob("runs/tokens/*[!k]")
    assert result.output.splitlines() == [str(folder.relative_to(tmp_path))]
    theirs = finished.runs / "tokens" / folder.name
    shards = [path.relative_to(folder) for path in folder.rglob("*.npy")]
    assert len(shards) == 2
    assert all((folder / shard).read_bytes() == (theirs / shard).read_bytes() for shard in shards)
    again = call("train-tokenizer", finished.yaml)
    (result_file,) = tmp_path.glob("runs/tokenizers/*/result.json")
    assert again.output.splitlines() == [str(result_file.relative_to(tmp_path))]


def test_nothing_goes_on_from_an_unfit_tokenizer_unless_told_to(call: Call, copy: Path, tmp_path: Path) -> None:
    (files,) = map(RunFiles, copy.glob("tokenizers/*[!k]"))
    result = Result.read(files.result)
    assert result is not None
    figures = result.metrics | {"mean_picture_error": result.metrics["mean_squared_error"]}
    result.model_copy(update={"metrics": figures}).write(files.result)
    yaml = write_toy(tmp_path, tokenizer={"accept": False})
    train = ("train", yaml, "--depth", "2", "--budget", "2.5e7")
    for command in (train, ("tokenize", yaml), ("train-tokenizer", yaml)):
        stopped = call(*command)
        assert stopped.code == 1
        (line,) = stopped.error.splitlines()
        assert line.startswith(f"varscale: runs/tokenizers/{files.folder.name}: no model should be trained on this")
    assert len(results(copy)) == 8
    accepted = call(*train, "--set", "tokenizer.accept=true")
    assert accepted.code == 0, accepted.error
    cell = Result.read(Path(accepted.output.splitlines()[-1]))
    assert cell is not None
    assert str(cell.row["tokenizer_faults"]).startswith("reconstructions are no better than one mean picture")


def test_sample(call: Call, copy: Path) -> None:
    cell = cell_folder(copy, 2, 6e7)
    arguments = ("sample", cell, "--labels", "0,1", "--count", "3", "--top-k", "8", "--top-p", "0.9")
    assert call(*arguments, "--out", "new/a.png", "--seed", "1").output == "new/a.png\n"
    call(*arguments, "--out", "b.png", "--seed", "1")
    call(*arguments, "--out", "c.png", "--seed", "2")
    width, height = Image.open("new/a.png").size  # a row a class
    assert width > height > 2 * 8
    assert Path("new/a.png").read_bytes() == Path("b.png").read_bytes() != Path("c.png").read_bytes()


def test_sample_many(call: Call, copy: Path) -> None:
    cell = cell_folder(copy, 2, 6e7)
    options = ("--count", "7", "--batch", "3", "--seed", "1", "--temperature", "0.9", "--guidance-schedule", "constant")
    assert call("sample", cell, *options, "--out", "new/pictures").output == "new/pictures\n"
    assert len(list(Path("new/pictures").glob("*.png"))) == 7
    labels = [row.split(",")[1] for row in Path("new/pictures/labels.csv").read_text().splitlines()]
    assert labels == ["label", *"0101010"]
    before = Path("new/pictures/000000.png").stat().st_mtime_ns
    assert call("sample", cell, *options, "--out", "new/pictures/").code == 0  # it is there already
    assert Path("new/pictures/000000.png").stat().st_mtime_ns == before
    with FileLock("new/.pictures.lock"):
        alone = call("sample", cell, *options, "--out", "new/pictures/")
    assert (alone.code, len(alone.error.strip().splitlines())) == (1, 1)
    assert "another process draws into it" in alone.error
    other = call("sample", cell, *options, "--out", "new/pictures", "--smooth")
    assert other.error == (
        "varscale: --out new/pictures: was begun with smooth False, not True; name another, or go on with the same"
    )

    assert call("sample", cell, *options, "--out", "of-cell.npz", "--labels", "1").code == 0
    (tokenizer,) = copy.glob("tokenizers/*/weights.safetensors")
    files = (cell / "weights.safetensors", "--tokenizer", tokenizer)
    assert call("sample", *files, *options, "--out", "of-files.npz", "--labels", "1").code == 0
    assert Path("of-cell.npz").read_bytes() == Path("of-files.npz").read_bytes()
    assert np.load("of-cell.npz")["arr_1"].tolist() == [1] * 7
    call("sample", *files, "--labels", "1", "--out", "picture.png")
    call("sample", cell, "--labels", "1", "--out", "same.png")
    assert Path("picture.png").read_bytes() == Path("same.png").read_bytes()


def test_sample_with_the_training_images_labels(call: Call, copy: Path) -> None:
    cell = cell_folder(copy, 2, 6e7)
    assert call("sample", cell, "--count", "50", "--labels", "as-training", "--out", "some.npz").code == 0
    labels = np.load("some.npz")["arr_1"]
    trained_on = np.concatenate([np.load(shard)[:, 0] for shard in copy.glob("tokens/*/train/view-000-*.npy")])
    expected = np.bincount(trained_on) * 50 / len(trained_on)
    assert np.abs(np.bincount(labels) - expected).max() < 1
    assert labels.tolist() not in ([0, 1] * 25, sorted(labels.tolist()))
    (cell / "job.json").unlink()
    refused = call("sample", cell, "--count", "50", "--labels", "as-training", "--out", "other.npz")
    assert refused.error.endswith("no job.json that says what it was trained on; name the classes")


def test_official_checkpoints_there_and_back(call: Call, copy: Path) -> None:
    """The toy's transformer, and a tokenizer that has the reference's fixed settings."""
    tokenizer = Path("tokenizer.safetensors")
    save_tokenizer(
        tokenizer, MultiScaleTokenizer(architecture((1, 2, 4), 16, 4, 32, channel_multipliers=(1, 1))), "fingerprint"
    )
    weights = cell_folder(copy, 3, 6e7) / "weights.safetensors"
    for ours, theirs, back in ((tokenizer, "vae.pth", "vae.safetensors"), (weights, "var.pth", "var.safetensors")):
        assert call("export-official", ours, theirs).output == f"{theirs}\n"
        needed = () if back.startswith("vae") else ("--tokenizer", "vae.safetensors")
        assert call("import-official", theirs, back, "--patch-nums", "1,2,4", *needed).output == f"{back}\n"
        first, second = load_tensors(ours)[0], load_tensors(Path(back))[0]
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    states = {name: torch.load(f"{name}.pth", weights_only=True) for name in ("vae", "var")}
    both = {"trainer": {"var_wo_ddp": states["var"], "vae_local": states["vae"]}}
    torch.save(both, "ar-ckpt-last.pth")
    written = call("import-official", "ar-ckpt-last.pth", "both.safetensors").output
    assert written == "both-tokenizer.safetensors\nboth.safetensors\n"
