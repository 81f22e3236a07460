import pytest
import torch
from architectures import architecture
from small_models import PAPER, counted, kept_bytes, make_tokenizer, make_var, var_config
from torch import Tensor
from torch.nn import functional as F

from varscale.config.tokenizer import TokenizerArchitecture
from varscale.families.shared.predictor import ScalePredictor
from varscale.families.var.transformer import VAR
from varscale.kernels.building import SWITCH
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.tokenizer.shape import TokenizerShape

VARS = {
    "narrow": {"depth": 3, "width": 24, "heads": 3},
    "wide": {"depth": 2, "width": 128, "heads": 2, "mlp_ratio": 2.5},
    "shared": {"depth": 2, "width": 48, "heads": 4, "shared_adaln": True},
    "unnormalised": {"depth": 2, "width": 48, "heads": 4, "normalise_queries_keys": False},
    "many tokens": {"depth": 1, "width": 24, "heads": 3, "patch_nums": (2, 4, 8)},
    "modern": {"depth": 2, "width": 40, "heads": 4, "block": "modern"},
    "one scale": {"depth": 1, "width": 24, "heads": 3, "patch_nums": (3,)},
}
TOKENIZERS = {
    "plain": {},
    "deep": {"channel_multipliers": (1, 2, 2), "residual_blocks": 2, "phi_count": 1},
    "without attention": {"attention": False, "channel_multipliers": (1, 1)},
    "bitwise": {"quantizer": "bitwise", "vocab_size": 2**6},
    "bitwise without a penalty": {"quantizer": "bitwise", "vocab_size": 2**6, "entropy_weight": 0.0},
    "large maps": {"patch_nums": (1, 33, 36), "channel_multipliers": (1,)},
}


def var_of(name: str) -> VAR:
    return make_var(**{"vocab_size": 40, "latent_channels": 6, **VARS[name]})


def tokenizer_of(name: str) -> MultiScaleTokenizer:
    sizes = {"patch_nums": (1, 2, 4), "vocab_size": 40, "latent_channels": 6, "base_channels": 8, "norm_groups": 4}
    return MultiScaleTokenizer(TokenizerArchitecture(**(sizes | {"channel_multipliers": (1, 2)} | TOKENIZERS[name])))


@pytest.mark.parametrize(
    ("depth", "active"), [(12, 88_183_696), (16, 205_690_112), (20, 398_710_416), (30, 1_335_497_476)]
)
def test_active_parameters_of_the_paper(depth: int, active: int) -> None:
    shape = var_config(PAPER, 4096, 32, 1000, depth, 64 * depth, depth)
    assert shape.active_parameters() == active
    assert shape.active_parameters(head=False) == active - (64 * depth + 1) * 4096


@pytest.mark.parametrize("name", VARS)
def test_parameters_of_transformers(name: str) -> None:
    var = var_of(name)
    assert var.config.parameters() == sum(p.numel() for p in var.parameters())


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", VARS)
def test_forward_flops_of_transformers(name: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setenv("VARSCALE_NATIVE", "0")
    var = var_of(name)
    inputs = torch.randn(3, var.config.tokens - var.first_tokens, 6)
    labels = torch.tensor([0, 1, 5])
    assert counted(lambda: var(labels, inputs)) == 3 * var.config.forward_flops()


def test_training_flops_are_three_times_forward() -> None:
    var = var_of("wide")
    inputs = torch.randn(2, 13, 6)
    shape = var.config
    measured = counted(lambda: var(torch.tensor([0, 1]), inputs).sum().backward())
    # the first layer's inputs need no gradient
    skipped = 2 * 2 * 13 * 6 * var.config.width
    assert measured == 2 * shape.training_flops() - skipped


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", VARS)
def test_sampling_flops(name: str, guidance: bool, cache: bool) -> None:
    var = var_of(name)
    quantizer = make_tokenizer(var.config.patch_nums, 40, 6, phi_count=1).quantizer
    steps: list[tuple[Tensor | None, int]] = [(None, 0)]
    total = None
    for k, side in enumerate(var.config.patch_nums[:-1]):
        total, following = quantizer.accumulate(total, torch.randint(40, (2, side**2)), k)
        steps.append((following, k + 1))

    def run() -> None:
        with torch.no_grad():
            predictor = ScalePredictor(var, torch.tensor([0, 1]), 1.5 if guidance else 0.0, use_cache=cache)
            for inputs, _ in steps:
                predictor.predict(inputs)

    assert counted(run) == 2 * var.config.sampling_flops(guidance=guidance, cache=cache)


def test_executed_flops_count_visible_pairs() -> None:
    shape = var_config((1, 2, 3), 40, 6, 5, 2, 24, 3)
    level = [0] + [1] * 4 + [2] * 9
    pairs = sum(other <= own for own in level for other in level)
    hidden = 14**2 - pairs
    assert shape.forward_flops() - shape.executed_forward_flops() == 4 * 24 * hidden * 2


def test_parameters_of_the_paper_tokenizer() -> None:
    assert TokenizerShape(architecture(PAPER, 4096, 32, 160)).parameters() == 108_948_355


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(name: str) -> None:
    tokenizer = tokenizer_of(name)
    shape = TokenizerShape(tokenizer.architecture)
    assert shape.parameters() == sum(p.numel() for p in tokenizer.parameters())
    images = torch.rand(2, 3, tokenizer.image_size, tokenizer.image_size)
    tokens = tokenizer.encode(images)
    assert counted(lambda: tokenizer.encode(images)) == 2 * shape.encode_flops()
    assert counted(lambda: tokenizer.decode(tokens)) == 2 * shape.decode_flops()
    assert counted(lambda: tokenizer(images)) == 2 * shape.forward_flops()


@pytest.mark.parametrize(("depth", "width"), [(4, 32), (2, 128)])
@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("element_bytes", [4, 2])
def test_activation_memory_is_right_to_a_third(
    monkeypatch: pytest.MonkeyPatch, depth: int, width: int, element_bytes: int, native: str
) -> None:
    """Copies of weights in bfloat16, which do not grow with the images, are not activations."""
    monkeypatch.setenv(SWITCH, native)
    var = make_var((1, 2, 3, 4), 64, 6, 5, depth, width, 2)

    def copied_weight(tensor: Tensor) -> bool:
        return tensor.dtype == torch.bfloat16 and tensor.shape[:1] not in ((8,), (8 * 30,))

    with kept_bytes(var, copied_weight) as kept, torch.autocast("cpu", torch.bfloat16, enabled=element_bytes == 2):
        logits = var(torch.zeros(8, dtype=torch.long), torch.randn(8, 29, 6))
        loss = F.cross_entropy(logits.flatten(0, 1), torch.zeros(8 * 30, dtype=torch.long))
    assert loss.isfinite()
    estimate = var.config.activation_bytes(8, element_bytes=element_bytes)
    whole = native == "1" and element_bytes == 4  # all blocks as one operator, which keeps less
    assert 0.75 < estimate / sum(kept.values()) < (2 if whole else 4 / 3)


@pytest.mark.parametrize("name", [*TOKENIZERS, "many channels"])
def test_activation_memory_of_tokenizers_is_right_to_a_third(name: str) -> None:
    if name == "many channels":
        tokenizer = MultiScaleTokenizer(architecture((1, 2, 4, 8), 64, 16, 32, channel_multipliers=(1, 1, 2, 2)))
    else:
        tokenizer = tokenizer_of(name)
    tokenizer.to(memory_format=torch.channels_last)  # as in training
    images = torch.rand(4, 3, tokenizer.image_size, tokenizer.image_size).contiguous(memory_format=torch.channels_last)
    with kept_bytes(tokenizer) as kept:
        output = tokenizer(images)
        loss = F.mse_loss(output.reconstruction_B3HW, images) + output.quantizer_loss
    assert loss.isfinite()
    assert 0.75 < TokenizerShape(tokenizer.architecture).activation_bytes(4) / sum(kept.values()) < 4 / 3


def test_training_state() -> None:
    var = var_of("narrow")
    optimizer = torch.optim.AdamW(var.parameters())
    var(torch.tensor([0]), torch.randn(1, 13, 6)).sum().backward()
    optimizer.step()
    moments = sum(tensor.numel() for state in optimizer.state.values() for tensor in state.values() if tensor.ndim > 0)
    held = sum(p.numel() * 2 for p in var.parameters()) + moments
    assert var.config.training_state_bytes() == 4 * held
    shape = TokenizerShape(architecture((1, 2), 8, 4, 8, norm_groups=4))
    assert shape.training_state_bytes() == 20 * shape.parameters()
    assert shape.training_flops() == 3 * shape.forward_flops()
