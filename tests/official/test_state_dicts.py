"""Parity with the reference implementation at a tiny size; the numbers are described in fixtures/parity."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import architecture
from small_models import make_var
from torch import Tensor
from torch.nn import functional as F

from varscale.families.var.transformer import VAR
from varscale.generation.sampling import sample
from varscale.official import export_tokenizer, export_var, load_tokenizer, load_var
from varscale.tokenizer.autoencoder import MultiScaleTokenizer

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"


def seeded_weights(shapes: dict[str, list[int]], seed: int) -> dict[str, Tensor]:
    spec = importlib.util.spec_from_file_location("seeded_weights", PARITY / "seeded_weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    weights: dict[str, Tensor] = module.seeded_weights(shapes, seed)
    return weights


@pytest.fixture(scope="module")
def reference() -> SimpleNamespace:
    """The stored numbers, the weights behind them, and our models made from these."""
    with np.load(PARITY / "reference_d2.npz") as file:
        numbers = {name: torch.from_numpy(file[name]) for name in file.files}
    shapes = json.loads((PARITY / "reference_d2.keys.json").read_text())
    seed = int(numbers["seed"])
    tokenizer_state, var_state = seeded_weights(shapes["vae"], seed), seeded_weights(shapes["var"], seed + 1)
    tokenizer = load_tokenizer(tokenizer_state, numbers["patch_nums"].tolist())
    return SimpleNamespace(
        **numbers,
        shapes=shapes,
        tokenizer_state=tokenizer_state,
        var_state=var_state,
        tokenizer_model=tokenizer,
        var_model=load_var(var_state, tokenizer),
    )


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours.detach().double(), theirs.double(), atol=tolerance, rtol=0)


def split(tokens_BL: Tensor, patch_nums: tuple[int, ...]) -> list[Tensor]:
    return list(tokens_BL.long().split([side**2 for side in patch_nums], 1))


def test_tokenizer(reference: SimpleNamespace) -> None:
    tokenizer: MultiScaleTokenizer = reference.tokenizer_model
    assert sum(p.numel() for p in tokenizer.parameters()) == int(reference.n_params_vae)
    assert tokenizer.vocab_size == int(reference.vocab_size)
    with torch.no_grad():
        close(tokenizer.features(reference.images), reference.features)
        tokens = tokenizer.encode(reference.images)
        assert torch.equal(torch.cat(tokens, 1), reference.tokens.long())
        close(tokenizer.quantizer.decode_features(tokens), reference.f_hat)
        close(tokenizer.next_scale_inputs(tokens), reference.var_input)
        close(tokenizer.decode(tokens), reference.reconstruction)
        close(tokenizer(reference.images).quantizer_loss, reference.vq_loss, 1e-5)


@pytest.mark.parametrize("native", [True, False])
def test_transformer(reference: SimpleNamespace, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setenv("VARSCALE_NATIVE", "0")
    var: VAR = reference.var_model
    assert sum(p.numel() for p in var.parameters()) == int(reference.n_params_var)
    with torch.no_grad():
        logits = var(reference.labels, reference.var_input)
        close(logits, reference.logits)
        loss = F.cross_entropy(logits.flatten(0, 1), reference.tokens.long().flatten())
        close(loss, reference.cross_entropy, 1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_sampling(reference: SimpleNamespace, use_cache: bool) -> None:
    tokenizer = reference.tokenizer_model
    drawn = sample(reference.var_model, tokenizer, reference.labels, cfg=1.5, top_k=1, use_cache=use_cache)
    assert torch.equal(torch.cat(drawn.tokens, 1), reference.greedy_cfg1p5_tokens.long())
    close(drawn.images, reference.greedy_cfg1p5_image)


def test_exports_hold_the_reference_keys_shapes_and_values(reference: SimpleNamespace) -> None:
    for exported, shapes, weights in (
        (export_tokenizer(reference.tokenizer_model), reference.shapes["vae"], reference.tokenizer_state),
        (export_var(reference.var_model), reference.shapes["var"], reference.var_state),
    ):
        assert {name: list(tensor.shape) for name, tensor in exported.items()} == shapes
        assert all(torch.equal(exported[name], tensor) for name, tensor in weights.items())
    mask = export_var(reference.var_model)["attn_bias_for_masking"]
    assert mask[0, 0, 1].tolist() == [0.0] * 5 + [-torch.inf] * 25
    buffers = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
    assert {name for name in export_var(reference.var_model) if not name.endswith(buffers)} == set(reference.var_state)


@pytest.mark.parametrize("phi_count", [1, 2, 4])
@pytest.mark.parametrize("attention", [True, False])
def test_any_tokenizer_survives_the_round_trip(phi_count: int, attention: bool) -> None:
    tokenizer = MultiScaleTokenizer(
        architecture(
            (1, 2, 4),
            16,
            4,
            32,
            channel_multipliers=(1, 3),
            residual_blocks=1,
            phi_count=phi_count,
            attention=attention,
        )
    )
    state = export_tokenizer(tokenizer)
    assert ("quantize.quant_resi.qresi.weight" in state) == (phi_count == 1)
    again = load_tokenizer(state, (1, 2, 4))
    assert again.architecture == tokenizer.architecture
    assert_same_weights(tokenizer, again)


def test_phi_of_each_scale_as_a_plain_list() -> None:
    tokenizer = MultiScaleTokenizer(architecture((1, 2, 4), 16, 4, 32, channel_multipliers=(1,), phi_count=3))
    state = {name.replace("qresi_ls.", ""): tensor for name, tensor in export_tokenizer(tokenizer).items()}
    assert_same_weights(tokenizer, load_tokenizer(state, (1, 2, 4)))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("normalise", [True, False])
def test_any_transformer_survives_the_round_trip(shared: bool, normalise: bool) -> None:
    tokenizer = MultiScaleTokenizer(architecture((1, 2), 16, 4, 32, channel_multipliers=(1,)))
    var = make_var((1, 2), 16, 4, 7, 3, 64, 1, mlp_ratio=2.5, shared_adaln=shared, normalise_queries_keys=normalise)
    state = export_var(var)
    assert ("shared_ada_lin.1.weight" in state) == shared
    assert ("blocks.1.attn.scale_mul_1H11" in state) == normalise
    again = load_var(state, tokenizer, drop_path_rate=0.1)
    assert_same_weights(var, again)
    labels, inputs = torch.tensor([0, 7]), torch.randn(2, 4, 4)
    assert torch.equal(var(labels, inputs), again(labels, inputs))


def test_loaded_weights_are_copies(reference: SimpleNamespace) -> None:
    var = load_var(reference.var_state, reference.tokenizer_model)
    with torch.no_grad():
        var.head.bias.add_(1)
    assert not torch.equal(var.head.bias, reference.var_state["head.bias"])
    assert var.head.bias.requires_grad


def test_bad_checkpoints_are_explained(reference: SimpleNamespace) -> None:
    tokenizer, state = reference.tokenizer_model, dict(reference.var_state)
    del state["blocks.1.ffn.fc2.bias"]
    with pytest.raises(ValueError, match=r"lacks 1 keys: blocks\.1\.ffn\.fc2\.bias"):
        load_var(state, tokenizer)
    state = reference.var_state | {"blocks.0.extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"does not: blocks\.0\.extra"):
        load_var(state, tokenizer)
    state = reference.var_state | {"pos_1LC": torch.zeros(1, 29, 128)}
    with pytest.raises(ValueError, match=r"pos_1LC has shape \(1, 29, 128\); the model needs \(1, 30, 128\)"):
        load_var(state, tokenizer)
    with pytest.raises(ValueError, match=r"no quantize\.embedding\.weight"):
        load_tokenizer(reference.var_state, (1, 2, 3, 4))
    narrow = make_var((1, 2), 16, 4, 7, 1, 12, 2, normalise_queries_keys=False)
    other = MultiScaleTokenizer(architecture((1, 2), 16, 4, 32, channel_multipliers=(1,)))
    with pytest.raises(ValueError, match="number of heads"):
        load_var(export_var(narrow), other)
    assert_same_weights(narrow, load_var(export_var(narrow), other, heads=2))


def test_what_the_reference_cannot_express_is_refused() -> None:
    tokenizer = MultiScaleTokenizer(architecture((1, 2), 16, 4, 8, channel_multipliers=(1,), norm_groups=4))
    with pytest.raises(ValueError, match="norm_groups 32; a tokenizer with 4"):
        export_tokenizer(tokenizer)
    bits: dict[str, Any] = {"quantizer": "bitwise", "vocab_size": 16, "latent_channels": 4}
    tokenizer = MultiScaleTokenizer(architecture((1, 2), base_channels=32, channel_multipliers=(1,), **bits))
    with pytest.raises(ValueError, match="quantizer codebook; a tokenizer with bitwise cannot be exported"):
        export_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="no classifier of bits"):
        export_var(make_var(**bits, classifier="bits"))
    with pytest.raises(ValueError, match="told classes, not captions"):
        export_var(make_var(text_width=8))


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
