"""Two processes with half of each batch each: what one process with the whole batch gets."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import make_inputs

from varscale.kernels.building import SWITCH

pytestmark = pytest.mark.filterwarnings("ignore")
SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distributed")
    make_inputs(path)
    return path


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each of the two processes had in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", SWITCH: "0"}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)],
            env={**os.environ, **torchrun, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """The transformer, trained by this process only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "0")
        patch.syspath_prepend(str(SCRIPT.parent))
        from two_processes import train_model

        return train_model(folder, 0, 1, "auto")


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=2e-4), name


@pytest.mark.parametrize("way", ["model", "sharded", "model in parts", "sharded in parts"])
def test_the_transformer_learns_the_same(ranks: list[dict[str, Any]], alone: dict[str, Any], way: str) -> None:
    """By DDP and by FSDP2: label dropout, stochastic depth, clipping and AdamW see the whole batch."""
    assert alone["losses"][0] > alone["losses"][-1]
    for rank in ranks:
        assert rank[way]["sharded"] == way.startswith("sharded")
        assert rank[way]["losses"] == pytest.approx(alone["losses"], rel=2e-5)
        assert rank[way]["norm"] == pytest.approx(alone["norm"], rel=1e-3)
        if rank[way]["weights"]:  # gathered on the first process only
            assert_close(rank[way]["weights"], alone["weights"])
    assert ranks[0][way]["weights"]


def test_validation_covers_every_image_once(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """The ranks' shares, 20 images in batches of 7, add up to the 40 images that one process measures."""
    assert alone["figures"]["validation_images"] == 40
    for rank in ranks:
        assert rank["model"]["figures"] == pytest.approx(alone["figures"], rel=2e-4, abs=2e-3)
        assert rank["model"]["figures"]["validation_images"] == 40


@pytest.mark.parametrize("way", ["tokenizer", "tokenizer in parts", "adversarial"])
def test_the_tokenizers_of_all_processes_stay_equal(ranks: list[dict[str, Any]], way: str) -> None:
    """Codes start and restart as the same vectors, in the averages and the moments too."""
    first, second = (rank[way] for rank in ranks)
    assert first["moved"] == second["moved"]
    assert sum(first["moved"]) > 0
    for part in ("weights", "moments"):
        assert first[part].keys() == second[part].keys()
        for name, tensor in first[part].items():
            if not name.startswith("meter."):  # sums over a process's own images
                assert torch.equal(tensor, second[part][name]), name


def test_the_tokenizer_in_parts_learns_the_same(ranks: list[dict[str, Any]]) -> None:
    whole, parts = ranks[0]["tokenizer"], ranks[0]["tokenizer in parts"]
    assert whole["moved"] == parts["moved"]
    assert_close(parts["weights"], whole["weights"])
