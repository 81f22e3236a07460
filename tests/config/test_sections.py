"""The experiment's own rules: documentation, immutability, bounds, and consistency between sections."""

import copy
import inspect
import re
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from small_experiment import SMALL

import varscale
from varscale.config import Experiment, GridConfig, OptimConfig, Section, TokenizerConfig
from varscale.config.text import write_yaml
from varscale.config.yaml import load_experiment
from varscale.errors import ExperimentError
from varscale.families.base import FAMILY_KINDS, TokenSpace
from varscale.families.var.config import VARSection
from varscale.store import fingerprint as fingerprints
from varscale.store.fingerprint import fingerprint


def experiment_with(section: str, **settings: Any) -> Experiment:
    values = copy.deepcopy(SMALL)
    values[section].update(settings)
    return Experiment.model_validate(values)


def all_sections(base: type[Section] = Section) -> list[type[Section]]:
    """Every section that an experiment can hold: not what is derived from them, such as a model's description."""
    subclasses = [section for child in base.__subclasses__() for section in [child, *all_sections(child)]]
    return [
        section
        for section in subclasses
        if not inspect.isabstract(section)
        and section.__module__.startswith("varscale.")
        and Path(inspect.getfile(section)).is_relative_to(Path(varscale.__file__).parent)
        if not section.__subclasses__() and not issubclass(section, TokenSpace)
    ]


def sections(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {schema["title"]: schema, **schema["$defs"]}


def test_every_field_and_section_is_documented() -> None:
    found = sections(Experiment.model_json_schema())
    assert {model.__name__ for model in all_sections()} <= set(found)
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
        experiment.optim.lr = 1.0
    for model in all_sections():
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
        ("tokenizer", "checkpoint", "a\0b"),
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
    space = TokenSpace(patch_nums=(1, 2), vocab_size=16, latent_channels=4, num_classes=10)
    model = VARSection().describe(space, depth)
    assert (model.width, model.heads) == (64 * depth, depth)
    assert model.drop_path_rate == pytest.approx(0.1 * depth / 24)


def test_the_choice_of_a_block_leaves_fingerprints_of_before_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values are of the code before there was a choice, and of its numerics version."""
    monkeypatch.setattr(fingerprints, "NUMERICS_VERSION", 9)
    space = TokenSpace(patch_nums=(1, 2, 3), vocab_size=61, latent_channels=6, num_classes=16)
    section = VARSection()
    assert fingerprint(model=section.describe(space, 4).model_dump(mode="json")) == "fcd7df6c7a53d935"
    assert fingerprint(model=section.model_dump(mode="json")) == "d49bcc6ab5a87b77"


@pytest.mark.parametrize("family", ["raster", "masked"])
def test_a_family_that_the_tokenizer_can_not_feed(family: str) -> None:
    with pytest.raises(
        ValidationError, match=rf"{family} reads tokens of one scale, .* has 3, \[1, 2, 4\]: set it to \[4\]"
    ):
        Experiment.model_validate({**SMALL, "model": {"family": family}})
    tokenizer = {**SMALL["tokenizer"], "patch_nums": [4]}
    assert Experiment.model_validate({**SMALL, "model": {"family": family}, "tokenizer": tokenizer})
    space = TokenSpace(patch_nums=(1, 2, 4), vocab_size=61, latent_channels=6, num_classes=16)
    with pytest.raises(ValidationError, match=f"models of family {family} read tokens of one scale"):
        FAMILY_KINDS.sections[family]().describe(space, 3)


def test_heads_too_narrow_for_rotary_positions_are_named() -> None:
    space = TokenSpace(patch_nums=(1, 2, 4), vocab_size=61, latent_channels=6, num_classes=16)
    with pytest.raises(ExperimentError, match=r"model\.block: modern needs heads of 4 channels at least"):
        VARSection(block="modern", width_per_depth=2, head_dim=2).describe(space, 3)


def test_peak_rate_grows_with_the_batch() -> None:
    assert OptimConfig(lr=1e-4, batch_size=768, lr_batch_size=256).peak_lr == pytest.approx(3e-4)


def test_peak_rate_as_the_root_of_the_batch_and_by_the_length() -> None:
    """Marin's recipe: √(B/B0)·(T0/T)^0.3; a sixteenth of the horizon asks for 16^0.3 times the rate."""
    optim = OptimConfig(lr=1e-4, batch_size=1024, lr_batch_size=256, lr_batch_rule="sqrt", lr_horizon=160_000)
    assert optim.peak_lr == pytest.approx(2e-4)
    assert optim.horizon_factor(10_000) == pytest.approx(16**0.3)
    assert optim.horizon_factor(160_000) == 1
    assert OptimConfig().horizon_factor(10_000) == 1
    assert not {"lr_batch_rule", "lr_horizon", "lr_horizon_exponent"} & OptimConfig().model_dump().keys()


def test_a_variant_needs_a_name_that_fits_a_folder() -> None:
    with pytest.raises(ValidationError, match="pattern"):
        GridConfig(depths=(2,), budgets=(1e12,), variants=({"name": "a/b", "depths": [2], "budgets": [1e12]},))


# ------------------------------------------------------------------------------------------------------- bounds


def unbounded(schema: dict[str, Any], place: str, defined: dict[str, Any]) -> list[str]:
    """Places of a JSON schema at which a value may be as large, as long or as many as it likes."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return unbounded(
            defined[name], f"{place}:{name}", {key: value for key, value in defined.items() if key != name}
        )
    if "enum" in schema or "const" in schema:
        return []
    found = []
    for choice in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        found += unbounded(choice, place, defined)
    match schema.get("type"):
        # le and lt: what pydantic writes of bounds on values that a function has seen before
        case "integer" | "number" if not {"maximum", "exclusiveMaximum", "le", "lt"} & schema.keys():
            found.append(place)
        case "string" if "maxLength" not in schema:
            found.append(place)
        case "array":
            found += [] if "maxItems" in schema else [place]
            for number, item in enumerate(schema.get("prefixItems", [schema.get("items", {})])):
                found += unbounded(item, f"{place}.{number}", defined)
        case "object" if "properties" in schema:
            for name, field in schema["properties"].items():
                found += unbounded(field, f"{place}.{name}", defined)
        case "object":
            found += [] if "maxProperties" in schema else [place]
    return found


def test_every_field_has_an_upper_bound() -> None:
    """But for the values of by_depth and of variants, which are those of other fields."""
    schema = Experiment.model_json_schema()
    assert unbounded(schema, "", schema["$defs"]) == []
    loose = TypeAdapter(dict[str, list[int] | None]).json_schema()  # the test itself would find them
    assert unbounded(loose, "loose", {}) == ["loose"]
    assert unbounded(loose["additionalProperties"], "loose", {}) == ["loose", "loose.0"]


@pytest.mark.parametrize("model", all_sections())
def test_no_field_is_left_out_of_the_schema(model: type[Section]) -> None:
    assert set(model.model_json_schema()["properties"]) == set(model.model_fields)


HUGE = [
    10**40,
    1e40,
    float("inf"),
    -(10**40),
    "a" * 10_000,
    list(range(2000)),
    {f"a{n}": 1 for n in range(2000)},
]


@pytest.mark.parametrize("huge", HUGE, ids=lambda value: repr(value)[:20])
def test_no_number_is_beyond_sense(huge: Any) -> None:
    """Whatever field it is given to; fields that are texts or sections refuse numbers anyway."""
    for model in all_sections():
        for name in model.model_fields:
            adapter = TypeAdapter(Annotated[model.model_fields[name].rebuild_annotation(), None])
            with pytest.raises(ValidationError):
                adapter.validate_python(huge)


@pytest.mark.parametrize(
    "override",
    [
        "tokenizer.base_channels=1099511627776",
        "tokenizer.vocab_size=4294967296",
        "tokenizer.training.images=1e13",
        "grid.depths=[1000000000]",
        "grid.budgets=[1e40]",
        "grid.budgets=[.inf]",
        "grid.min_steps=1e15",
        "runtime.threads=1099511627776",
        "runtime.workers=500000000000",
        "runtime.retries=1e9",
        "model.width_per_depth=65536",
        "data.image_size=100000",
        "data.num_classes=1e9",
        "evaluation.batch_size=1e12",
        "by_depth={1000000000: {}}",
    ],
)
def test_what_no_machine_holds_is_one_line(tmp_path: Path, override: str) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(write_yaml(SMALL), encoding="utf-8")
    with pytest.raises(ExperimentError) as caught:
        load_experiment(str(path), [override])
    assert re.fullmatch(
        rf"--set .*: {re.escape(override.partition('=')[0])}[^\n]*(less than|finite)[^\n]*", str(caught.value)
    )


def test_the_number_of_cells_has_a_bound() -> None:
    """Each list is short, but not all of them together, nor a variant's times the others."""
    many = tuple(range(1, 65))
    fields: dict[str, Any] = {"depths": many, "budgets": [float(each) for each in many], "seeds": many}
    with pytest.raises(ValidationError, match="budgets: 262144 cells, with all depths, seeds and variants; at most"):
        GridConfig(**fields)
    variant = {"name": "a", **fields}
    with pytest.raises(ValidationError, match="262145 cells"):
        GridConfig(depths=(1,), budgets=(1.0,), variants=(variant,))


def test_the_largest_study_of_ten_years_is_within_bounds() -> None:
    settings = copy.deepcopy(SMALL)
    settings["data"].update(image_size=4096, validation_images=10**9)
    settings["tokenizer"].update(
        patch_nums=[2**k for k in range(10)], vocab_size=2**20, base_channels=1024, training={"images": 10**12}
    )
    settings["model"] = {"width_per_depth": 512, "head_dim": 256}
    settings["optim"] = {"batch_size": 2**20, "lr": 1e-7, "epochs": 1000}
    settings["grid"] = {"depths": [512], "budgets": [1e29]}
    settings["runtime"] = {"threads": 2048, "workers": 2048, "checkpoint_seconds": 1e6}
    Experiment.model_validate(settings)
