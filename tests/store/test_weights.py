"""Model files: what is loaded is what was saved, and wrong files are named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from varscale.families.var.transformer import VAR
from varscale.store.weights import load_model, load_tokenizer, load_var, save_model
from varscale.tokenizer.autoencoder import MultiScaleTokenizer


def tokenizer(**changes: object) -> MultiScaleTokenizer:
    torch.manual_seed(1)
    settings = {"channel_multipliers": (1, 2), "residual_blocks": 1, "attention": True, "norm_groups": 2}
    return MultiScaleTokenizer((1, 2, 4), 16, 4, 4, **(settings | changes))  # type: ignore[arg-type]


def transformer(**changes: object) -> VAR:
    torch.manual_seed(2)
    return VAR((1, 2, 4), 16, 4, 3, 2, 8, 2, **({"adaln_gamma_init": 0.3} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes", [{}, {"attention": False, "phi_count": 2, "phi_ratio": 0.3, "commitment_weight": 0.5}]
)
def test_a_tokenizer_comes_back(tmp_path: Path, changes: dict[str, object]) -> None:
    saved = tokenizer(**changes).eval()
    save_model(tmp_path / "tokenizer", saved, "print-a")
    loaded = load_tokenizer(tmp_path / "tokenizer", "print-a")
    images_B3HW = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        ours, theirs = saved(images_B3HW), loaded(images_B3HW)
    assert torch.equal(ours.reconstruction_B3HW, theirs.reconstruction_B3HW)
    assert torch.equal(ours.quantizer_loss, theirs.quantizer_loss)
    assert not loaded.training


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared_adaln": True, "mlp_ratio": 2.0},
        {"normalise_queries_keys": False, "drop_path_rate": 0.2},
    ],
)
def test_a_transformer_comes_back(tmp_path: Path, changes: dict[str, object]) -> None:
    saved = transformer(**changes).eval()
    save_model(tmp_path / "var", saved, "print-a")
    loaded = load_var(tmp_path / "var", "print-a")
    labels_B, inputs_BMc = torch.tensor([0, 3]), torch.randn(2, 20, 4)
    with torch.no_grad():
        assert torch.equal(saved(labels_B, inputs_BMc), loaded(labels_B, inputs_BMc))
    assert loaded.drop_path_rates == pytest.approx(saved.drop_path_rates)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


def test_wrong_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_model(path, transformer(), "print-a")
    with pytest.raises(ValueError, match="model: fingerprint is print-a, expected print-b"):
        load_var(path, "print-b")
    with pytest.raises(ValueError, match="model: holds a transformer, expected a tokenizer"):
        load_tokenizer(path)
    whole = path.read_bytes()
    for kept in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"model: not a readable \.safetensors file"):
            load_model(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="model: damaged: its checksum is not"):
        load_model(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="model: not a model of varscale"):
        load_model(path)
    with pytest.raises(ValueError, match="absent: no such file"):
        load_model(tmp_path / "absent")
    save_model(path, tokenizer(), "print-a")
    with pytest.raises(ValueError, match="holds a tokenizer, expected a transformer"):
        load_var(path)
