"""What speaks against a tokenizer, on figures that were made up or measured on tokenizers that failed."""

from typing import Any

import pytest

from varscale.config import TokenizerConfig
from varscale.evaluation.verdict import tokenizer_faults

SETTINGS = TokenizerConfig(
    patch_nums=(1, 2, 3, 4), vocab_size=256, latent_channels=8, base_channels=32, training={"quantize_after": 0.0}
)
HELPS_TRAINING = ["tokenizer.training.quantize_after 0.2", "a lower tokenizer.training.lr (now 0.0003)",
                  "more tokenizer.training.images (now 64,000)"]  # fmt: skip
SMALLER = "a smaller tokenizer.vocab_size (now 256)"


def figures(error: float, *perplexities: float, usage: float = 0.9, **changes: float) -> dict[str, float]:
    """Of images whose mean picture is off by 0.2, and of a training set of 90,000 vectors."""
    by_scale = {f"codebook_perplexity_scale_{k}": value for k, value in enumerate(perplexities, start=1)}
    measured = {"mean_squared_error": error, "mean_picture_error": 0.2, "codebook_usage": usage}
    return {**measured, "feature_vectors": 90_000.0, **by_scale, **changes}


def faults(measured: dict[str, float], settings: TokenizerConfig = SETTINGS) -> list[str]:
    return [fault.what for fault in tokenizer_faults(measured, settings)]


FIT = {
    "a good one": figures(0.01, 40, 120, 150, 170),
    "one code says what all images have in common": figures(0.06, 1.0, 90, 150, 170),
    "images of two colours": figures(0.0001, 2.0, 1.0, 1.0, 1.0, usage=0.01),
    "images that are all alike": figures(0.001, 1, 1, 1, 1, mean_picture_error=0.0),
    "not measured by an earlier version": {"psnr": 3.0},
    "as many vectors as codes": figures(0.01, 40, 120, 150, 170, feature_vectors=256.0),
}


@pytest.mark.parametrize("name", FIT)
def test_fit_for_use(name: str) -> None:
    assert faults(FIT[name]) == []


def test_a_collapsed_tokenizer() -> None:
    """The one of `shared/images/README.md`: its error, its mean picture's, its first scale."""
    collapsed = figures(0.2178, 1.07, 8.0, 15.0, 20.0, mean_picture_error=0.2159)
    first, second = tokenizer_faults(collapsed, SETTINGS)
    assert first.what == (
        "reconstructions are no better than one mean picture (mean squared error 0.2178, the mean picture's 0.2159)"
    )
    assert second.what == "scales use a handful of codes (perplexity 1.07 at scale 1)"
    assert list(first.helps) == HELPS_TRAINING
    assert list(second.helps) == [*HELPS_TRAINING, SMALLER]


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (figures(0.19, 40, 120, 150, 170), "reconstructions are hardly better than one mean picture"),
        (figures(0.06, 40, 2.5, 150, 1.2), "scales use a handful of codes (perplexity 2.50 at scale 2, 1.20 at"),
        (figures(0.06, 4, 8, 9, 9, usage=0.04), "4.0% of the codes that the images could use are used"),
        (figures(0.01, 40, 120, 150, 170, feature_vectors=255.0), "there are 256 codes, and 255 vectors in the"),
    ],
)  # fmt: skip
def test_one_fault_each(measured: dict[str, float], expected: str) -> None:
    (found,) = faults(measured)
    assert found.startswith(expected)


def test_bitwise_tokens_are_judged_by_their_bits() -> None:
    """Most corners stay empty, and none is learnt, so neither speaks against them."""
    bitwise = SETTINGS.model_copy(update={"quantizer": "bitwise", "vocab_size": 2**16, "latent_channels": 16})
    assert faults(figures(0.06, 4, 8, 9, 9, usage=0.01, feature_vectors=1000.0, bit_entropy=0.9), bitwise) == []
    (collapsed,) = tokenizer_faults(figures(0.06, 4, 8, 9, 9, usage=0.01, bit_entropy=0.2), bitwise)
    assert collapsed.what == "bits hardly change (an entropy of 0.20 of 1 bit)"
    assert collapsed.helps[-1] == "a larger tokenizer.entropy_weight (now 0.01)"
    assert faults(figures(0.01, 4, 8, 9, 9, bit_entropy=0.2), bitwise) == []  # simple images need no more
    (few,) = faults(figures(0.06, 40, 2.5, 150, 170, bit_entropy=0.9), bitwise)
    assert few.startswith("scales use a handful of codes (perplexity 2.50 at scale 2)")


def test_a_small_codebook_needs_fewer_codes() -> None:
    measured = figures(0.06, 2.5, 2.5, 2.5, 2.5)
    assert faults(measured)
    assert not faults(measured, SETTINGS.model_copy(update={"vocab_size": 8}))


def test_what_helps_fits_the_settings() -> None:
    def helps(**changes: Any) -> set[str]:
        settings = SETTINGS.model_copy(update=changes)
        return {text for fault in tokenizer_faults(figures(0.3, 1, 1, 1, 1), settings) for text in fault.helps}

    assert helps() == {*HELPS_TRAINING, SMALLER}
    unquantized = SETTINGS.training.model_copy(update={"quantize_after": 0.2})
    assert helps(training=unquantized) == {*HELPS_TRAINING[1:], SMALLER}
    assert helps(checkpoint="vae.pth") == {"a tokenizer.checkpoint that was trained on such images", ""}
