"""Files of tensors: what is loaded is what was saved, and every other file is named in one line."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import make_var

from varscale.errors import CheckpointError
from varscale.families.storage import load_model, save_model
from varscale.store.weights import fill, load_tensors, save_tensors

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.c": torch.tensor(3, dtype=torch.int64),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
}


def saved(path: Path) -> Path:
    save_tensors(path, TENSORS, {"kind": "model", "fingerprint": "print-a", "more": "é"})
    return path


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    tensors, metadata = load_tensors(saved(tmp_path / "file"), "model", "print-a")
    assert metadata == {"kind": "model", "fingerprint": "print-a", "more": "é"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_every_changed_bit_is_noticed(tmp_path: Path) -> None:
    """Header, metadata and tensors; what changes nothing that is read, such as a space, may pass."""
    path = saved(tmp_path / "file")
    whole = path.read_bytes()
    expected = load_tensors(path)[1]
    for place in range(len(whole)):
        for bit in (1, 0x20, 0x80):
            changed = bytearray(whole)
            changed[place] ^= bit
            path.write_bytes(changed)
            try:
                tensors, metadata = load_tensors(path)
            except CheckpointError as error:
                message = str(error)
                assert message.startswith(f"{path}: ")
                assert "\n" not in message
            else:
                assert metadata == expected
                assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def _with_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        bytes(1000),
        os.urandom(1000),
        b"\xff" * 100,
        struct.pack("<Q", 2**60) + b"{}",
        _with_header(b"{}"),
        _with_header(b"[]"),
        _with_header(b'{"__metadata__": 5}'),
        _with_header(b'{"__metadata__": {"kind": "model"}}'),
        _with_header(b'{"a":' * 5000),
        _with_header(json.dumps({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}).encode()) + bytes(4),
        _with_header(json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()) + bytes(1),
        _with_header(json.dumps({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}).encode()) + bytes(4),
        _with_header(json.dumps({"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 4]}}).encode()) + bytes(4),
    ],
)  # fmt: skip
def test_any_other_content_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^{path}: not a [^\n]+$"):
        load_tensors(path)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "model")
    with pytest.raises(
        CheckpointError, match="model: fingerprint is print-a, expected print-b: it was made with other"
    ):
        load_tensors(path, "model", "print-b")
    with pytest.raises(CheckpointError, match="model: holds a model, expected a tokenizer"):
        load_tensors(path, "tokenizer")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"model: not a readable \.safetensors file"):
        load_tensors(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="model: damaged: its checksum is not"):
        load_tensors(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="model: not a model of varscale"):
        load_tensors(path)
    with pytest.raises(CheckpointError, match="absent: no such file"):
        load_tensors(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"not a readable \.safetensors file \(not a file\)"):
        load_tensors(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a file"):
        load_tensors(tmp_path / "pipe")


def test_a_checksum_covers_names_shapes_and_metadata(tmp_path: Path) -> None:
    """Moved to another name, bent into another shape, or with other metadata, the same bytes are not the same file."""
    path = saved(tmp_path / "file")
    metadata = {"kind": "model", "fingerprint": "print-a", "more": "é"}
    with (tmp_path / "file").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    checksum = json.loads(header["__metadata__"]["varscale"])["checksum"]
    tensors = load_file(path)
    for changed, described in (
        ({**tensors, "a": tensors["a"].reshape(3, 2)}, metadata),
        ({("A" if name == "a" else name): tensor for name, tensor in tensors.items()}, metadata),
        (tensors, {**metadata, "fingerprint": "print-b"}),
        (tensors, {**metadata, "new": ""}),
    ):
        save_file(changed, path, {"varscale": json.dumps({**described, "checksum": checksum})})
        with pytest.raises(CheckpointError, match="damaged"):
            load_tensors(path)


def test_a_model_takes_only_its_own_tensors(tmp_path: Path) -> None:
    right = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    with torch.device("meta"):
        model = torch.nn.Linear(3, 2)
    for wrong, message in (
        ({"weight": right["weight"]}, "bias is missing"),
        ({**right, "more": torch.zeros(1)}, "more is not one of the model's tensors"),
        ({**right, "bias": torch.zeros(3)}, r"bias is torch.float32 \(3,\), expected torch.float32 \(2,\)"),
        ({**right, "bias": torch.zeros(2, dtype=torch.float64)}, "bias is torch.float64"),
    ):
        with pytest.raises(CheckpointError, match=rf"file: {message}"):
            fill(model, wrong, Path("file"))
    fill(model, right, Path("file"))
    assert model(torch.ones(1, 3)).tolist() == [[3, 3]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared_adaln": True, "mlp_ratio": 2.0},
        {"normalise_queries_keys": False, "drop_path_rate": 0.2},
    ],
)
def test_a_transformer_comes_back(tmp_path: Path, changes: dict[str, object]) -> None:
    torch.manual_seed(2)
    saved = make_var((1, 2, 4), 16, 4, 3, 2, 8, 2, **({"adaln_gamma_init": 0.3} | changes)).eval()
    save_model(tmp_path / "var", saved, "print-a")
    loaded = load_model(tmp_path / "var", "print-a")
    labels_B, inputs_BMc = torch.tensor([0, 3]), torch.randn(2, 20, 4)
    with torch.no_grad():
        assert torch.equal(saved(labels_B, inputs_BMc), loaded(labels_B, inputs_BMc))
    assert loaded.config == saved.config
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"description": ""},
        {"description": "[]"},
        {"description": "5"},
        {"description": "{}"},
        {"description": '{"family": "unknown"}'},
        {"description": '{"family": ["var"]}'},
        {"description": '{"family": "var", "depth": 2}'},
        {"description": "[" * 100_000},
    ],
)
def test_a_description_that_is_none_is_named(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = tmp_path / "file"
    save_tensors(path, TENSORS, {"kind": "model", **metadata})
    with pytest.raises(
        CheckpointError, match=rf"^{path}: not a model that this version of varscale can build: [^\n]+$"
    ):
        load_model(path)
