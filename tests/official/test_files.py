"""Checkpoint files: anything but a checkpoint of the reference is refused in one line, and code in it is never run."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import architecture

from varscale.errors import CheckpointError
from varscale.official import export_tokenizer
from varscale.official.files import export_checkpoint, import_checkpoint, read_tokenizer
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.tokenizer.storage import load_tokenizer, save_tokenizer

PATCH_NUMS = (1, 2)


class Touch:
    """Unpickled as code, it would make a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self._path),)


def tokenizer() -> MultiScaleTokenizer:
    torch.manual_seed(0)
    return MultiScaleTokenizer(architecture(PATCH_NUMS, 16, 4, 32, channel_multipliers=(1, 1)))


def stored(content: Any, **settings: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **settings)
    return file.getvalue()


def archive(**files: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as writer:
        for name, content in files.items():
            writer.writestr(name.replace("__", "/").replace("_pkl", ".pkl"), content)
    return file.getvalue()


def junk(executed: Path) -> dict[str, bytes]:
    generator = torch.Generator().manual_seed(0)
    state = export_tokenizer(tokenizer())
    whole, old = stored(state), stored(state, _use_new_zipfile_serialization=False)
    hostile = {"quantize.embedding.weight": torch.ones(2, 2), "code": Touch(executed)}
    random = {
        f"random {number}": bytes(torch.randint(256, (2000,), generator=generator).tolist()) for number in range(20)
    }
    flips = {}
    for name, content in (("flipped", whole), ("flipped old", old)):
        places = torch.randint(min(3000, len(content)), (60,), generator=generator).tolist()
        for place in places:
            changed = bytearray(content)
            changed[place] ^= 0xFF
            flips[f"{name} {place}"] = bytes(changed)
    key = "quantize.embedding.weight"
    return {
        **random,
        **flips,
        "empty": b"",
        "one byte": b"\x80",
        "looks like ours": b"12345678{" + bytes(100),
        "text": b"experiment: rings\n",
        "pickle protocol and junk": b"\x80\x02" + bytes(range(256)),
        **{f"truncated at {count}": whole[:count] for count in (10, 100, len(whole) // 2, len(whole) - 1)},
        **{f"old, truncated at {count}": old[:count] for count in (10, 100, len(old) // 2, len(old) - 1)},
        "empty archive": archive(),
        "archive of something else": archive(a=b"b"),
        "archive with junk in it": archive(a__data_pkl=b"junk", a__version=b"3"),
        "pickle of a dictionary": pickle.dumps({key: 1}),
        "pickle with code": pickle.dumps(hostile),
        "checkpoint with code": stored(hostile),
        "old checkpoint with code": stored(hostile, _use_new_zipfile_serialization=False),
        "nothing": stored(None),
        "a tensor": stored(torch.ones(2)),
        "a list": stored([torch.ones(2)]),
        "an empty dictionary": stored({}),
        "other tensors": stored({"weight": torch.ones(2)}),
        "numbers by name": stored({key: 5}),
        "numbers beside": stored({**state, "step": 5}),
        "tensors by number": stored({key: torch.ones(2, 2), 5: torch.ones(2)}),
        "a tensor without axes": stored({**state, key: torch.tensor(1.0)}),
        "an empty codebook": stored({**state, key: torch.ones(0, 4)}),
        "no channels": stored({**state, "encoder.conv_in.weight": torch.ones(0, 3, 3, 3)}),
        "without values": stored({**state, key: torch.ones(16, 4, device="meta")}),
        "sparse": stored({**state, key: torch.ones(16, 4).to_sparse()}),
        "only the codebook": stored({key: torch.ones(16, 4)}),
        "a transformer's input only": stored({"word_embed.weight": torch.ones(2)}),
    }


def test_junk_is_refused_in_one_line(tmp_path: Path) -> None:
    """A flip that hits nothing but a time or a weight gives a tokenizer all the same: only our own files have sums."""
    executed, path, out = tmp_path / "executed", tmp_path / "file.pth", tmp_path / "out.safetensors"
    save_tokenizer(tmp_path / "ours", tokenizer(), "print")
    for name, content in junk(executed).items():
        path.write_bytes(content)
        for read in (
            lambda: read_tokenizer(path, PATCH_NUMS),
            lambda: import_checkpoint(path, out, PATCH_NUMS, tmp_path / "ours"),
        ):
            try:
                read()
            except CheckpointError as error:
                message = str(error)
                assert message.startswith(f"{path}: "), name
                assert "\n" not in message, name
                assert len(message) < 1000, name
                assert "weights_only" not in message, name
            else:
                assert name.startswith("flipped"), name
        assert not executed.exists(), name


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("absent", "No such file"), ("", "not a file"), ("pipe", "not a file")):
        expected = f"{message}.*; expected a checkpoint of FoundationVision/VAR"
        with pytest.raises(CheckpointError, match=expected):
            read_tokenizer(tmp_path / name, PATCH_NUMS)
        with pytest.raises(CheckpointError, match=expected):
            import_checkpoint(tmp_path / name, tmp_path / "out", PATCH_NUMS, None)


def test_a_tokenizer_there_and_back(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "ours", tokenizer(), "print")
    export_checkpoint(tmp_path / "ours", tmp_path / "vae.pth")
    import_checkpoint(tmp_path / "vae.pth", tmp_path / "back", PATCH_NUMS, None)
    first, second = load_tokenizer(tmp_path / "ours"), load_tokenizer(tmp_path / "back")
    assert first.architecture == second.architecture
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)
    with pytest.raises(CheckpointError, match="patch_nums"):
        import_checkpoint(tmp_path / "vae.pth", tmp_path / "back", (2, 1), None)
