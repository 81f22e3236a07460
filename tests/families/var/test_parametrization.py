"""What mup and complete-p change, against the tables of their papers, folded weights and a coordinate check."""

import math
from typing import Any

import pytest
import torch
from small_models import make_tokenizer, var_config, var_inputs

from benchmarks.coordinates import DEPTH, WIDTH, mean_coordinates, scaled_config
from varscale.errors import ExperimentError
from varscale.families.base import TokenSpace
from varscale.families.var.config import VARConfig, VARSection
from varscale.families.var.family import VARFamily
from varscale.families.var.transformer import VAR
from varscale.generation.sampling import sample
from varscale.official.state_dicts import export_var

SPACE = TokenSpace(patch_nums=(1, 2, 3), vocab_size=32, latent_channels=4, num_classes=5)
BASE = {"base_width": 8, "base_depth": 2}


def described(depth: int, **settings: Any) -> VARConfig:
    return VARSection(width_per_depth=4, head_dim=8, **settings).describe(SPACE, depth)


def scaled(parametrization: str = "complete-p", **changes: Any) -> VARConfig:
    """Four times as wide as the base and twice as deep."""
    base = {"base_width": 8, "base_head_channels": 8, **({"base_depth": 2} if parametrization != "mup" else {})}
    sizes = {"depth": 4, "width": 32, "heads": 4}
    return var_config(**{**sizes, **base, "parametrization": parametrization, "adaln_gamma_init": 1.0, **changes})


def test_nothing_is_said_of_it_under_the_papers() -> None:
    """So that fingerprints, and files, are what they were before there were others."""
    assert described(4, **BASE) == described(4)
    assert not {"parametrization", *BASE, "base_head_channels"} & described(4).model_dump().keys()
    assert not {"parametrization", *BASE} & VARSection().model_dump().keys()


@pytest.mark.parametrize("parametrization", ["mup", "complete-p"])
def test_at_the_base_all_are_the_papers(parametrization: str) -> None:
    assert described(2, parametrization=parametrization, **BASE) == described(2)
    larger = described(4, parametrization=parametrization, **BASE)
    assert larger != described(4)
    assert larger.growth == (2, 2 if parametrization == "complete-p" else 1)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"parametrization": "mup"}, "base_width: parametrization mup needs it"),
        ({"parametrization": "complete-p", "base_width": 8}, "base_depth: parametrization complete-p needs it"),
        ({"parametrization": "mup", "base_width": 20}, "model.base_width: 20 is more than the 16 of depth 4"),
        ({"parametrization": "complete-p", "base_width": 8, "base_depth": 6}, "model.base_depth: 6 is more than the 4"),
        ({"parametrization": "sp"}, "'paper', 'mup' or 'complete-p'"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises((ExperimentError, ValueError), match=problem):
        described(4, **settings)


@pytest.mark.parametrize(
    ("name", "mup", "complete"),
    [
        # rate, decay and epsilon, four times as wide and twice as deep
        ("blocks.0.attention.queries_keys_values.weight", (1 / 4, 1, 1 / 4), (1 / 4, 4, 1 / 8)),
        ("blocks.3.attention.projection.weight", (1 / 4, 1, 1 / 4), (1 / 4, 4, 1 / 8)),
        ("blocks.3.feedforward.contract.weight", (1 / 4, 1, 1 / 4), (1 / 4, 4, 1 / 8)),
        ("blocks.1.modulation.weight", (1 / 4, 1, 1 / 4), (1 / 4, 4, 1 / 8)),
        ("blocks.1.modulation.bias", (1, 0, 1 / 4), (1, 0, 1 / 8)),
        ("blocks.1.attention.log_scale_H", (1, 0, 1 / 4), (1, 0, 1 / 8)),
        ("head_modulation.weight", (1 / 4, 1, 1 / 4), (1 / 4, 4, 1 / 4)),
        ("word_embedding.weight", (1, 1, 1 / 4), (1, 1, 1 / 4)),
        ("class_embedding.weight", (1, 1, 1 / 4), (1, 1, 1 / 4)),
        ("position_LC", (1, 0, 1 / 4), (1, 0, 1 / 4)),
        ("head.weight", (1, 1, 1 / 4), (1, 1, 1 / 4)),
        ("head.bias", (1, 0, 1), (1, 0, 1)),
    ],
)
def test_factors_of_the_optimizer(name: str, mup: tuple[float, ...], complete: tuple[float, ...]) -> None:
    """Yang et al. 2022, table 8; Dey et al. 2025, table 1."""
    for parametrization, factors in (("mup", mup), ("complete-p", complete)):
        model = VAR(scaled(parametrization))
        groups = VARFamily().parameter_groups(model)
        assert sorted(n for group in groups for n in group.names) == sorted(n for n, _ in model.named_parameters())
        (own,) = [group for group in groups if name in group.names]
        assert (own.rate, own.decay, own.epsilon) == factors


@pytest.mark.parametrize("shared", [False, True])
def test_initial_deviations(shared: bool) -> None:
    """Of matrices they fall with the width; of all that a token or a class enters by they are the base's."""
    torch.manual_seed(0)
    wide = VAR(scaled(width=256, heads=32, shared_adaln=shared, adaln_init=1.0, head_init=1.0, vocab_size=64))
    base = math.sqrt(1 / (3 * 8))
    matrix = math.sqrt(1 / (3 * 256))
    block = wide.blocks[1]
    expected = {
        block.attention.queries_keys_values.weight: matrix,
        block.feedforward.contract.weight: matrix / math.sqrt(2 * 2),
        wide.head_modulation.weight: matrix,
        wide.word_embedding.weight: base,
        wide.class_embedding.weight: base,
        wide.position_LC: base,
        wide.head.weight: base,
    }
    if shared:
        expected[block.modulation_offset_6C] = 8**-0.5
    for weight, deviation in expected.items():
        assert float(weight.detach().std()) == pytest.approx(deviation, rel=0.12)


@pytest.mark.parametrize("native", [True, False])
def test_multipliers_are_those_of_weights(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the paper's kind whose output layer and branches are that much smaller computes and draws the same."""
    monkeypatch.setenv("VARSCALE_NATIVE", "1" if native else "0")
    torch.manual_seed(0)
    ours = VAR(scaled(drop_path_rate=0.3, head_init=1.0))
    folded = VAR(var_config(depth=4, width=32, heads=4, drop_path_rate=0.3))
    weights = dict(ours.state_dict())
    weights["head.weight"] = weights["head.weight"] / 4
    for name in weights:
        if ".projection." in name or ".contract." in name:
            weights[name] = weights[name] / 2
    folded.load_state_dict(weights)
    labels_B, inputs_BMc = var_inputs(ours)
    keep_D2B = torch.rand(4, 2, 2).round() / 0.7
    for keep in (None, keep_D2B):
        torch.testing.assert_close(
            ours(labels_B, inputs_BMc, keep_D2B=keep), folded(labels_B, inputs_BMc, keep_D2B=keep)
        )
    drawn = [sample(model.eval(), make_tokenizer(), labels_B, cfg=2.0, seed=3) for model in (ours, folded)]
    assert torch.equal(torch.cat(drawn[0].tokens, 1), torch.cat(drawn[1].tokens, 1))


def test_the_reference_can_not_have_such_a_model() -> None:
    with pytest.raises(ValueError, match="no factors of mup"):
        export_var(VAR(scaled("mup")))
    with pytest.raises(ValueError, match="no modern block"):
        export_var(VAR(var_config(block="modern")))


def test_logits_of_lengths_are_divided_by_channels() -> None:
    """0.25/√d at the base, and from there on by d; with normalised queries and keys cosines are logits at any width."""
    for channels in (8, 16, 32):
        config = scaled(heads=32 // channels, normalise_queries_keys=False)
        assert config.logit_factor / math.sqrt(channels) == pytest.approx(0.25 / math.sqrt(8) * 8 / channels)
    assert var_config(normalise_queries_keys=False).logit_factor == 0.25


@pytest.mark.parametrize("parametrization", ["mup", "complete-p"])
def test_coordinates_stay_over_eightfold_width(parametrization: str) -> None:
    for name, growth in grown(parametrization, WIDTH * 8, DEPTH).items():
        assert 0.5 < growth < 2, name


def test_coordinates_stay_over_eightfold_depth() -> None:
    """Within less than what they do under the paper's, or without complete-p's factor on the branches (1.7)."""
    for name, growth in grown("complete-p", WIDTH, DEPTH * 8).items():
        assert 0.85 < growth < 1.18, name


def grown(parametrization: str, width: int, depth: int) -> dict[str, float]:
    """Activations and updates against the base's."""
    small = mean_coordinates(scaled_config("paper", WIDTH, DEPTH))
    large = mean_coordinates(scaled_config(parametrization, width, depth))
    return {
        f"{kind} of {name}": getattr(large, kind)[name] / size
        for kind in ("activations", "updates")
        for name, size in getattr(small, kind).items()
    }


def test_under_the_papers_they_do_not() -> None:
    wide, deep = grown("paper", WIDTH * 8, DEPTH), grown("paper", WIDTH, DEPTH * 8)
    assert wide["updates of logits"] > 4
    assert wide["updates of feed-forward"] > 3
    assert deep["updates of stream"] > 1.25
