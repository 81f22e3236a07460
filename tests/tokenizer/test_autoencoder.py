import pytest
import torch
from architectures import architecture

from varscale.tokenizer.autoencoder import MultiScaleTokenizer


def small(**changes: object) -> MultiScaleTokenizer:
    torch.manual_seed(0)
    settings = {"channel_multipliers": (1, 2, 2), "norm_groups": 4, "residual_blocks": 1} | changes
    return MultiScaleTokenizer(architecture((1, 2, 4), 16, 4, 8, **settings))


def test_reference_size() -> None:
    with torch.device("meta"):
        tokenizer = MultiScaleTokenizer(architecture((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 4096, 32, 160))
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == 108_948_355
    assert (tokenizer.architecture.downsampling, tokenizer.image_size) == (16, 256)


@pytest.mark.parametrize("attention", [True, False])
def test_tokens_decode_to_the_training_reconstruction(attention: bool) -> None:
    tokenizer = small(attention=attention)
    tokenizer.quantizer.initialise_codes(torch.randn(64, 4))
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    output = tokenizer(images)
    tokens = tokenizer.encode(images)
    assert [tuple(t.shape) for t in tokens] == [(3, 1), (3, 4), (3, 16)]
    assert all(torch.equal(a, b) for a, b in zip(tokens, output.tokens, strict=True))
    torch.testing.assert_close(tokenizer.decode(tokens), output.reconstruction_B3HW.clamp(-1, 1), atol=1e-5, rtol=0)
    assert [tuple(r.shape) for r in output.residuals] == [(3, 4), (12, 4), (48, 4)]


def test_every_parameter_learns() -> None:
    tokenizer = small(phi_count=3)
    output = tokenizer(torch.rand(2, 3, 16, 16))
    (output.reconstruction_B3HW.square().mean() + output.quantizer_loss).backward()
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())


def test_attention_can_be_left_out() -> None:
    with_it = sum(p.numel() for p in small().parameters())
    without = sum(p.numel() for p in small(attention=False).parameters())
    one = 4 * 16 * 17 + 2 * 16
    # encoder: 1 level block + middle; decoder: 2 level blocks + middle
    assert with_it - without == 5 * one


def test_built_on_the_meta_device_then_filled() -> None:
    source = small()
    with torch.device("meta"):
        copy = MultiScaleTokenizer(
            architecture((1, 2, 4), 16, 4, 8, channel_multipliers=(1, 2, 2), norm_groups=4, residual_blocks=1)
        )
    copy.to_empty(device="cpu")
    copy.load_state_dict(source.state_dict())
    images = torch.rand(1, 3, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(source.encode(images), copy.encode(images), strict=True))


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="norm_groups: 3 does not divide 8 channels"):
        small(norm_groups=3)
    with pytest.raises(ValueError, match=r"need \(B, 3, 16, 16\)"):
        small().encode(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="residual_blocks"):
        small(residual_blocks=0)
