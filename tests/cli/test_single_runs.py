"""Single runs, images and checkpoints through the command, on a finished little sweep."""

import shutil
from pathlib import Path

import pytest
import torch
from architectures import architecture
from command_calls import Call
from PIL import Image
from sweeps.shares import shares
from toy_sweep import Finished, numbers_of, results, write_toy

from varscale.config import RuntimeConfig
from varscale.store.layout import read_json
from varscale.store.weights import load_tensors
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.tokenizer.storage import save_tokenizer


def test_train_equals_the_cell_of_the_grid(call: Call, copy: Path, finished: Finished) -> None:
    """Without trunk and branch, in this process."""
    (cell,) = (copy / "toy" / "cells").glob("d2-c2e07-*")
    shutil.rmtree(cell)
    result = call("train", finished.yaml, "--depth", "2", "--budget", "2e7")
    assert result.code == 0
    assert result.output.splitlines()[-1] == f"runs/toy/cells/{cell.name}/result.json"
    assert numbers_of(results(copy)[cell.name]) == numbers_of(results(finished.runs)[cell.name])


def test_a_cell_that_another_study_finished_is_not_trained_again(call: Call, copy: Path, finished: Finished) -> None:
    (cell,) = (copy / "toy" / "cells").glob("d2-c2e07-*")
    arguments = ("--depth", "2", "--budget", "2e7", "--set", "name=other", "--set", "runtime.compile=auto")
    assert call("train", finished.yaml, *arguments).output.splitlines()[-1] == f"runs/toy/cells/{cell.name}/result.json"


def test_a_run_in_other_numerics_leaves_the_studys_alone(call: Call, copy: Path, finished: Finished) -> None:
    """Else none of its finished cells would count."""
    arguments = ("--depth", "2", "--budget", "2e7", "--set", "runtime.precision=bfloat16")
    result = call("train", finished.yaml, *arguments)
    assert result.code == 0
    assert read_json(copy.parent / result.output.splitlines()[-1])["row"]["precision"] == "bfloat16"
    assert (copy / "toy" / "numerics.json").read_bytes() == (finished.root / "numerics.json").read_bytes()
    assert call("status", finished.yaml).output.count("finished") == 8


def test_a_single_run_takes_a_workers_share_of_the_machine(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It decides for the whole study: with all threads of the machine, the sweep's workers would each start as many."""
    monkeypatch.setattr("sweeps.shares.processors", lambda: 4)
    toy = write_toy(tmp_path, runtime={"threads": 0, "workers": 0}, grid={"depths": [2]})
    assert call("train", toy, "--depth", "2", "--budget", "2e7").code == 0
    assert (read_json(tmp_path / "runs" / "toy" / "numerics.json") or {})["threads"] == 1


@pytest.mark.parametrize(
    ("workers", "threads", "gpus", "expected"),
    [
        (0, 0, 0, (8, 0, 1, 8)),
        (2, 0, 0, (2, 0, 4, 2)),
        (16, 0, 0, (16, 0, 1, 16)),
        (0, 3, 0, (8, 0, 3, 8)),
        (0, 0, 4, (4, 4, 2, 1)),
        (6, 0, 4, (6, 4, 1, 2)),
    ],
)
def test_shares(
    workers: int, threads: int, gpus: int, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeps.shares.processors", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert shares(RuntimeConfig(workers=workers, threads=threads)) == expected


def test_tokenizer_and_tokens_alone(call: Call, finished: Finished, tmp_path: Path) -> None:
    """Equal to those of the sweep."""
    result = call("tokenize", finished.yaml)
    assert result.code == 0
    (folder,) = tmp_path.glob("runs/toy/tokens/*")
    assert result.output.splitlines() == [str(folder.relative_to(tmp_path))]
    theirs = finished.root / "tokens" / folder.name
    shards = [path.relative_to(folder) for path in folder.rglob("*.npy")]
    assert len(shards) == 2
    assert all((folder / shard).read_bytes() == (theirs / shard).read_bytes() for shard in shards)
    again = call("train-tokenizer", finished.yaml)
    (result_file,) = tmp_path.glob("runs/toy/tokenizers/*/result.json")
    assert again.output.splitlines() == [str(result_file.relative_to(tmp_path))]


def test_sample(call: Call, copy: Path) -> None:
    (cell,) = (copy / "toy" / "cells").glob("d2-c6e07-*")
    arguments = ("sample", cell, "--labels", "0,1", "--count", "3", "--top-k", "8", "--top-p", "0.9")
    assert call(*arguments, "--out", "new/a.png", "--seed", "1").output == "new/a.png\n"
    call(*arguments, "--out", "b.png", "--seed", "1")
    call(*arguments, "--out", "c.png", "--seed", "2")
    width, height = Image.open("new/a.png").size  # a row a class
    assert width > height > 2 * 8
    assert Path("new/a.png").read_bytes() == Path("b.png").read_bytes() != Path("c.png").read_bytes()


def test_official_checkpoints_there_and_back(call: Call, copy: Path) -> None:
    """The toy's transformer, and a tokenizer that has the reference's fixed settings."""
    tokenizer = Path("tokenizer.safetensors")
    save_tokenizer(
        tokenizer, MultiScaleTokenizer(architecture((1, 2, 4), 16, 4, 32, channel_multipliers=(1, 1))), "fingerprint"
    )
    (weights,) = (copy / "toy" / "cells").glob("d3-c6e07-*/weights.safetensors")
    for ours, theirs, back in ((tokenizer, "vae.pth", "vae.safetensors"), (weights, "var.pth", "var.safetensors")):
        assert call("export-official", ours, theirs).output == f"{theirs}\n"
        needed = () if back.startswith("vae") else ("--tokenizer", "vae.safetensors")
        assert call("import-official", theirs, back, "--patch-nums", "1,2,4", *needed).output == f"{back}\n"
        first, second = load_tensors(ours)[0], load_tensors(Path(back))[0]
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
