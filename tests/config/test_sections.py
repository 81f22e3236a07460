"""The experiment's own rules: documentation, immutability, bounds, and consistency between sections."""

import copy
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from small_experiment import SMALL

from varscale.config import Experiment, GridConfig, ModelConfig, OptimConfig, Section, TokenizerConfig


def experiment_with(section: str, **settings: Any) -> Experiment:
    values = copy.deepcopy(SMALL)
    values[section].update(settings)
    return Experiment.model_validate(values)


def sections(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {schema["title"]: schema, **schema["$defs"]}


def test_every_field_and_section_is_documented() -> None:
    found = sections(Experiment.model_json_schema())
    assert {model.__name__ for model in Section.__subclasses__()} - {"ImageData", "TokenizerArchitecture"} <= set(found)
    undocumented = [
        f"{title}.{field}"
        for title, section in found.items()
        for field, details in section["properties"].items()
        if len(details.get("description", "")) < 5
    ]
    assert undocumented == []
    assert [title for title, section in found.items() if not section.get("description")] == []


def test_sections_are_immutable_and_closed() -> None:
    experiment = Experiment.model_validate(SMALL)
    with pytest.raises(ValidationError, match="frozen"):
        experiment.optim.lr = 1.0  # type: ignore[misc]
    for model in (Experiment, *Section.__subclasses__()):
        assert issubclass(model, BaseModel)
        assert model.model_config["frozen"]
        assert model.model_config["extra"] == "forbid"


@pytest.mark.parametrize("patch_nums", [[], [1, 2, 2, 4], [2, 1, 4], [4, 4]])
def test_patch_nums_must_grow(patch_nums: list[int]) -> None:
    with pytest.raises(ValidationError, match="patch_nums: must grow strictly"):
        experiment_with("tokenizer", patch_nums=patch_nums)


@pytest.mark.parametrize("patch_nums", [[1, 2], [1, 2, 3], [1, 2, 4, 8]])
def test_patch_nums_must_end_at_the_latent_size(patch_nums: list[int]) -> None:
    with pytest.raises(ValidationError, match=rf"ends at {patch_nums[-1]}, but 32 px over 8 .* is 4"):
        experiment_with("tokenizer", patch_nums=patch_nums)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("grid", "depths", [0]),
        ("grid", "depths", [-3]),
        ("grid", "depths", []),
        ("grid", "depths", [2, 2]),
        ("grid", "depths", [2.5]),
        ("grid", "depths", [True]),
        ("grid", "budgets", [0.0]),
        ("grid", "budgets", [float("inf")]),
        ("grid", "seeds", [2**31]),
        ("optim", "lr", 0),
        ("optim", "lr", float("nan")),
        ("optim", "lr", True),
        ("optim", "lr", "3e-4"),
        ("optim", "decay_fraction", 1.0),
        ("optim", "betas", [0.9]),
        ("model", "label_dropout", 1.1),
        ("tokenizer", "norm_groups", 24),
        ("tokenizer", "channel_multipliers", []),
        ("tokenizer", "training", {"perceptual_weight": 1.0}),
        ("data", "validation_images", None),
        ("data", "resize_ratio", 1.125),
        ("data", "horizontal_flip", True),
    ],
)
def test_impossible_values_are_errors(section: str, field: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        experiment_with(section, **{field: value})


def test_whole_numbers_may_be_written_as_floats() -> None:
    assert experiment_with("tokenizer", training={"images": 1e6}).tokenizer.training.images == 1_000_000


def test_tokens_per_image_of_the_paper() -> None:
    paper = {256: ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 680), 512: ((1, 2, 3, 4, 6, 9, 13, 18, 24, 32), 2240)}
    for patch_nums, tokens in paper.values():
        tokenizer = TokenizerConfig(patch_nums=patch_nums, vocab_size=4096, latent_channels=32, base_channels=160)
        assert tokenizer.tokens_per_image == tokens
        assert tokenizer.latent_size == patch_nums[-1]


@pytest.mark.parametrize("depth", [6, 16, 20, 24, 30, 36])
def test_depth_derives_the_papers_sizes(depth: int) -> None:
    model = ModelConfig()
    assert model.width(depth) == 64 * depth
    assert model.heads(depth) == depth
    assert model.drop_path_rate(depth) == pytest.approx(0.1 * depth / 24)


def test_peak_rate_grows_with_the_batch() -> None:
    assert OptimConfig(lr=1e-4, batch_size=768, lr_batch_size=256).peak_lr == pytest.approx(3e-4)


def test_a_variant_needs_a_name_that_fits_a_folder() -> None:
    with pytest.raises(ValidationError, match="pattern"):
        GridConfig(depths=(2,), budgets=(1e12,), variants=({"name": "a/b", "depths": [2], "budgets": [1e12]},))
