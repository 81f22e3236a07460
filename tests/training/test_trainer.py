"""Checkpoints that a run can go on from, and all others."""

import logging
import pickle
import resource
import signal
from pathlib import Path

import pytest
import torch

from varscale.training.trainer import FINGERPRINT_KEY, DirectCheckpoints, usable_checkpoint

CONTENT = {FINGERPRINT_KEY: "print-a", "state_dict": {"weight": torch.arange(50.0), "steps": torch.tensor(3)}}


def test_a_checkpoint_of_the_run_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "last.ckpt"
    assert usable_checkpoint(path, "print-a") is None
    torch.save(CONTENT, path)
    found = usable_checkpoint(path, "print-a")
    assert found is not None
    assert torch.equal(found["state_dict"]["weight"], torch.arange(50.0))
    assert caplog.messages == []
    assert usable_checkpoint(path, "print-b") is None
    assert caplog.messages == [
        f"{path}: not a usable checkpoint (it was written by another run, print-a); "
        "the run is made anew from what lies before it"
    ]


def test_changed_bits_are_never_used_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(CONTENT, path)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 9):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x21]) + whole[place + 1 :])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = usable_checkpoint(path, "print-a")
        if found is None:
            refused += 1
            (message,) = caplog.messages
            assert message.startswith(f"{path}: ")
            assert "\n" not in message
        else:  # times, padding and the like
            assert torch.equal(found["state_dict"]["weight"], torch.arange(50.0))
            assert int(found["state_dict"]["steps"]) == 3
    assert refused > 30


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps({FINGERPRINT_KEY: "print-a"}), None])
def test_other_files_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None) -> None:
    path = tmp_path / "last.ckpt"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    assert usable_checkpoint(path, "print-a") is None
    assert caplog.text.count("not a usable checkpoint") == 1


def test_a_full_disk_is_named_wherever_it_ends_the_file(tmp_path: Path) -> None:
    """PyTorch's own complaint, about a position in the file, stood before it at one place of five."""
    whole = torch.zeros(3000)
    checkpoint = {"state": [part.view(10, 10) for part in whole.split(100)], "weights": [torch.zeros(700)] * 5}
    path = tmp_path / "a.ckpt"
    DirectCheckpoints().save_checkpoint(checkpoint, path)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in range(50, path.stat().st_size, 311):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(OSError, match="File too large"):
                DirectCheckpoints().save_checkpoint(checkpoint, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
