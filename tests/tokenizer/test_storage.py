"""Tokenizers' files: what is loaded is what was saved."""

import json
from pathlib import Path

import pytest
import torch
from architectures import architecture

from varscale.errors import CheckpointError
from varscale.store.weights import save_tensors
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.tokenizer.storage import load_tokenizer, save_tokenizer


def tokenizer(**changes: object) -> MultiScaleTokenizer:
    torch.manual_seed(1)
    settings = {"channel_multipliers": (1, 2), "residual_blocks": 1, "attention": True, "norm_groups": 2}
    return MultiScaleTokenizer(architecture((1, 2, 4), 16, 4, 4, **(settings | changes)))


@pytest.mark.parametrize(
    "changes", [{}, {"attention": False, "phi_count": 2, "phi_ratio": 0.3, "commitment_weight": 0.5}]
)
def test_a_tokenizer_comes_back(tmp_path: Path, changes: dict[str, object]) -> None:
    saved = tokenizer(**changes).eval()
    save_tokenizer(tmp_path / "tokenizer", saved, "print-a")
    loaded = load_tokenizer(tmp_path / "tokenizer", "print-a")
    assert loaded.architecture == saved.architecture
    images_B3HW = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        ours, theirs = saved(images_B3HW), loaded(images_B3HW)
    assert torch.equal(ours.reconstruction_B3HW, theirs.reconstruction_B3HW)
    assert torch.equal(ours.quantizer_loss, theirs.quantizer_loss)
    assert not loaded.training
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (None, "not a tokenizer's architecture"),
        ("", "not a tokenizer's architecture"),
        ("[" * 100_000, "not a tokenizer's architecture"),
        ('{"patch_nums": 5}', "not a tokenizer's architecture"),
        ({"vocab_size": "16"}, "not a tokenizer's architecture"),
        ({"vocab_size": -1}, "not a tokenizer's architecture"),
        ({"base_channels": 2**80}, "not a tokenizer's architecture"),
        ({"unknown": 1}, "not a tokenizer's architecture"),
        ({"vocab_size": 17}, r"quantizer\.codebook_Vc is torch\.float32 \(16, 4\), expected torch\.float32 \(17, 4\)"),
        ({"residual_blocks": 2}, "is missing"),
        ({"attention": False}, "is not one of the model's tensors"),
    ],
)
def test_an_architecture_that_is_none_or_another_is_named(
    tmp_path: Path, described: str | dict[str, object] | None, message: str
) -> None:
    """With a right checksum, as only somebody who means it can write."""
    saved, path = tokenizer(), tmp_path / "tokenizer"
    if isinstance(described, dict):
        described = json.dumps(saved.architecture.model_dump(mode="json") | described)
    metadata = {"kind": "tokenizer", "fingerprint": "a"} | ({} if described is None else {"architecture": described})
    save_tensors(path, saved.state_dict(), metadata)
    with pytest.raises(CheckpointError, match=rf"^{path}: [^\n]*{message}[^\n]*$"):
        load_tokenizer(path)


def test_a_transformers_file_is_no_tokenizers(tmp_path: Path) -> None:
    save_tensors(tmp_path / "file", {}, {"kind": "model", "fingerprint": "a"})
    with pytest.raises(CheckpointError, match="file: holds a model, expected a tokenizer"):
        load_tokenizer(tmp_path / "file")
