"""What every family must give, checked for several models of each; a new family adds its models to `models`.

Letters: B batch, L tokens of an image.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from small_models import PAPER, counted_by_module, kept_bytes, tokenizer_for, var_config
from tiny_family import TINY_CHANGES, TinyDescription, tiny_registered
from tiny_training import (
    PATCH_NUMS,
    assert_same_run,
    cell_of_steps,
    files_of,
    ignore,
    little_experiment,
    make_inputs,
)
from torch import Tensor
from torch.nn import functional as F

from sweeps.grid import grid_cells
from varscale.config import Experiment
from varscale.config.yaml import validate
from varscale.errors import ExperimentError
from varscale.families.base import FAMILY_KINDS, ModelDescription, SamplingOptions, TokenSpace
from varscale.families.diffusion.config import DiTConfig
from varscale.families.masked.config import MaskedConfig
from varscale.families.models import FamilyModel, labels_after_dropout
from varscale.families.raster.config import RasterConfig
from varscale.families.storage import load_model, save_model
from varscale.families.var.config import VARConfig
from varscale.generation.from_files import Drawable, draw
from varscale.generation.sampling import sample, sample_with
from varscale.store.fingerprint import fingerprint
from varscale.store.records import read_result
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.training.cells import Trunk
from varscale.training.runs import train_cell, train_trunk

# a vocabulary whose size no other dimension has
SPACE: dict[str, Any] = {"patch_nums": (1, 2, 3), "vocab_size": 61, "latent_channels": 6, "num_classes": 16}
TOLD = {"width": 24, "heads": 3, "depth": 2, "text_width": 8}
VAR_CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide": {"width": 96, "heads": 2, "depth": 3},
    "shared AdaLN": {"shared_adaln": True},
    "unnormalised": {"normalise_queries_keys": False},
    "one scale": {"patch_nums": (3,)},
    "first scale of four tokens": {"patch_nums": (2, 4)},
    "scaled from a base": {"parametrization": "complete-p", "base_width": 12, "base_depth": 1, "base_head_channels": 4},
    "uneven mlp": {"mlp_ratio": 2.3, "drop_path_rate": 0.1},
    "modern": {"block": "modern", "width": 20, "heads": 2},
    "weighted": {"loss_weights": "nextflow"},
    "bits": {"classifier": "bits", "quantizer": "bitwise", "vocab_size": 2**7, "latent_channels": 7},
}
DIFFUSION_CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "patches of four, noise": {
        "patch_nums": (1, 2, 4),
        "patch_size": 2,
        "mlp_ratio": 2.3,
        "width": 26,
        "heads": 2,
        "prediction": "ddpm",
        "noise_schedule": "cosine",
    },
}
DESCRIPTIONS: dict[str, ModelDescription] = {
    **{f"var, {name}": var_config(**{**SPACE, "width": 24, "heads": 3, **changes})
       for name, changes in VAR_CHANGES.items()},
    **{f"{family}, plain": config(**{**SPACE, "patch_nums": (3,), "width": 24, "heads": 3, "depth": 2})
       for family, config in (("raster", RasterConfig), ("masked", MaskedConfig))},
    **{f"diffusion, {name}": DiTConfig(**{**SPACE, "width": 24, "heads": 3, "depth": 2, "sampling_steps": 5, **changes})
       for name, changes in DIFFUSION_CHANGES.items()},
    **{f"{family}, captions": config(**{**SPACE, **TOLD, "patch_nums": sides})
       for family, config, sides in (("var", VARConfig, (1, 2, 3)), ("raster", RasterConfig, (3,)),
                                     ("masked", MaskedConfig, (3,)), ("diffusion", DiTConfig, (3,)))},
    "tiny, captions": TinyDescription(**{**SPACE, "width": 16, "depth": 2, "text_width": 8}),
    **{f"tiny, {name}": TinyDescription(**{**SPACE, "width": 16, "depth": 2, **changes})
       for name, changes in TINY_CHANGES.items()},
}  # fmt: skip
FAMILIES = ("var", "raster", "masked", "diffusion", "tiny")


@pytest.fixture(autouse=True, scope="module")
def _tiny() -> Iterator[None]:
    with tiny_registered():
        yield


@pytest.fixture(params=DESCRIPTIONS)
def description(request: pytest.FixtureRequest) -> ModelDescription:
    return DESCRIPTIONS[request.param]


@pytest.fixture(params=FAMILIES)
def plain(request: pytest.FixtureRequest) -> ModelDescription:
    """One model of each family."""
    return DESCRIPTIONS[f"{request.param}, plain"]


@pytest.fixture(params=FAMILIES)
def described(request: pytest.FixtureRequest) -> ModelDescription:
    """A model of each family that is told captions."""
    return DESCRIPTIONS[f"{request.param}, captions"]


def build(description: ModelDescription) -> FamilyModel:
    torch.manual_seed(0)
    return description.implementation().build(description)


def batch_of(description: ModelDescription, images: int = 16) -> dict[str, Tensor]:
    """Random tokens, or latents; each image has a class of its own."""
    generator = torch.Generator().manual_seed(1)
    side = description.patch_nums[-1]
    return {
        "tokens_BL": torch.randint(description.vocab_size, (images, description.tokens), generator=generator),
        "latents_BChw": torch.randn(images, description.latent_channels, side, side, generator=generator),
        "labels_B": torch.arange(images) % description.num_classes,
        "sample_index_B": torch.arange(images),
        **({"text_BD": captions(description, images)} if description.text_width else {}),
    }


def captions(description: ModelDescription, images: int) -> Tensor:
    """Embeddings, one of an image's own."""
    assert description.text_width is not None
    embeddings_BD = torch.randn(images, description.text_width, generator=torch.Generator().manual_seed(2))
    return F.normalize(embeddings_BD)


def lively(description: ModelDescription) -> tuple[FamilyModel, MultiScaleTokenizer]:
    """A model with weights as after a training, and its tokenizer."""
    model = build(description)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, tokenizer_for(description)


def test_every_registered_family_is_here() -> None:
    assert (
        {description.family for description in DESCRIPTIONS.values()} == set(FAMILIES) == FAMILY_KINDS.sections.keys()
    )


def test_sections_describe_models(plain: ModelDescription) -> None:
    section = FAMILY_KINDS.sections[plain.family]()
    for depth in (1, 5):
        described = section.describe(TokenSpace(**{**SPACE, "patch_nums": plain.patch_nums}), depth)
        assert isinstance(described, section.description)
        assert (described.family, described.depth, described.vocab_size) == (plain.family, depth, 61)


def test_parameters(description: ModelDescription) -> None:
    parameters = dict(build(description).named_parameters())
    assert description.parameters() == sum(parameter.numel() for parameter in parameters.values())
    active, headless = description.active_parameters(), description.active_parameters(head=False)
    assert 0 < headless < active <= description.parameters()
    if description.implementation().has_likelihood:
        assert active - headless == sum(p.numel() for p in parameters.values() if len(p) == description.outputs)


@pytest.mark.parametrize("native", [True, False])
def test_flops(description: ModelDescription, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model; making its inputs of tokens is the tokenizer's."""
    if not native:
        monkeypatch.setenv("VARSCALE_NATIVE", "0")
    model, tokenizer, batch = build(description), tokenizer_for(description), batch_of(description, 3)
    counts = counted_by_module(lambda: description.implementation().losses(model, tokenizer, batch))
    assert sum(counts[type(model).__name__].values()) == 3 * description.forward_flops()
    assert description.executed_forward_flops() <= description.forward_flops()
    assert description.training_flops() == 3 * description.forward_flops()
    assert description.executed_training_flops() == 3 * description.executed_forward_flops()


def test_groups_are_all_tokens(description: ModelDescription) -> None:
    assert sum(description.groups) == description.tokens
    assert all(group > 0 for group in description.groups)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("native", [False, True])
def test_memory_of_activations_to_within_a_third(
    description: ModelDescription, bfloat16: bool, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of weights in bfloat16, which do not grow with the images, are not activations; kernels may keep less."""
    if not native:
        monkeypatch.setenv("VARSCALE_NATIVE", "0")
    batch, images = batch_of(description, 16), 16
    model, tokenizer = build(description), tokenizer_for(description)

    def copied_weight(tensor: Tensor) -> bool:
        return tensor.dtype == torch.bfloat16 and len(tensor) not in (images, images * description.tokens)

    with kept_bytes(model, copied_weight) as kept, torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = description.implementation().losses(model, tokenizer, batch).loss_BL.mean()
    assert loss.isfinite()
    estimate = description.activation_bytes(images, element_bytes=2 if bfloat16 else 4)
    assert 0.75 < estimate / sum(kept.values()) < (2 if native else 4 / 3)


def test_state_in_memory_and_on_disk(plain: ModelDescription) -> None:
    assert plain.weights_bytes() == 4 * plain.parameters()
    assert plain.training_state_bytes() == 16 * plain.parameters()
    assert plain.checkpoint_bytes() == 12 * plain.parameters()


def test_the_first_loss_is_that_of_guessing(description: ModelDescription) -> None:
    family = description.implementation()
    losses = family.losses(build(description), tokenizer_for(description), batch_of(description), seed=0)
    assert losses.loss_BL.shape == (16, description.tokens)
    assert losses.loss_BL.dtype == torch.float32
    if family.has_likelihood:
        assert float(losses.loss_BL.mean().detach()) == pytest.approx(math.log(description.vocab_size), rel=0.02)
        assert losses.wrong.shape == losses.loss_BL.shape


def test_a_few_steps_learn_a_few_images_by_heart(description: ModelDescription) -> None:
    family, model, tokenizer, batch = (
        description.implementation(), build(description), tokenizer_for(description), batch_of(description),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    first = float(family.losses(model, tokenizer, batch).loss_BL.mean().detach())
    for _ in range(150):
        loss = family.losses(model, tokenizer, batch).loss_BL.mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert float(loss.detach()) < first / 2


def test_what_a_seed_drops_belongs_to_samples(plain: ModelDescription) -> None:
    """Parts of a batch have the losses that they have in the whole; an evaluation drops nothing."""
    family, (model, tokenizer), batch = plain.implementation(), lively(plain), batch_of(plain)
    whole = family.losses(model, tokenizer, batch, seed=1).loss_BL
    part = family.losses(model, tokenizer, {name: value[9:] for name, value in batch.items()}, seed=1).loss_BL
    torch.testing.assert_close(part, whole[9:])
    others = family.losses(model, tokenizer, {**batch, "sample_index_B": torch.arange(100, 116)}, seed=1).loss_BL
    evaluated = family.losses(model, tokenizer, batch).loss_BL
    assert not torch.allclose(whole, others)
    assert not torch.allclose(whole, evaluated)
    assert torch.equal(evaluated, family.losses(model, tokenizer, batch).loss_BL)


def test_a_file_gives_the_model_back(description: ModelDescription, tmp_path: Path) -> None:
    model, tokenizer = lively(description)
    save_model(tmp_path / "model", model, "print-a")
    again = load_model(tmp_path / "model", "print-a")
    assert type(again) is type(model)
    assert again.config == description
    assert not again.training
    batch, family = batch_of(description), description.implementation()
    with torch.no_grad():
        ours, theirs = (family.losses(each, tokenizer, batch).loss_BL for each in (model.eval(), again))
    assert torch.equal(ours, theirs)


def test_a_sample_is_the_same_alone_and_in_a_batch(description: ModelDescription) -> None:
    model, tokenizer = lively(description)
    labels_B = torch.tensor([0, 1, 16, 3, 4, 0])
    if description.text_width is not None:  # the third: no caption
        labels_B = captions(description, 5)[[0, 1, 2, 3, 4, 0]] * labels_B.ne(16).unsqueeze(1)
    whole = sample(model, tokenizer, labels_B, seed=3)
    sides = () if description.reads == "latents" else description.patch_nums
    assert [tokens.shape for tokens in whole.tokens] == [(6, side**2) for side in sides]
    assert whole.images.shape == (6, 3, *2 * (2 * description.patch_nums[-1],))
    assert 0 <= float(whole.images.min()) <= float(whole.images.max()) <= 1
    for index in (1, 5):
        alone = sample(model, tokenizer, labels_B[index : index + 1], seed=3, sample_indices=torch.tensor([index]))
        torch.testing.assert_close(alone.images[0], whole.images[index], atol=1e-4, rtol=0)
        for ours, all_of_them in zip(alone.tokens, whole.tokens, strict=True):
            assert torch.equal(ours[0], all_of_them[index])
    drawn_BN = torch.cat(whole.tokens, 1) if sides else whole.images.flatten(1)
    others = sample(model, tokenizer, labels_B, seed=4)
    assert not torch.equal(torch.cat(others.tokens, 1) if sides else others.images.flatten(1), drawn_BN)
    assert not torch.equal(drawn_BN[0], drawn_BN[5])  # the same label, another index


def test_a_caption_decides_what_is_drawn(described: ModelDescription) -> None:
    """And dropout replaces captions by none, whose vector is learned."""
    model, tokenizer = lively(described)
    told_BD = captions(described, 2)
    first, second, none = (
        sample(model, tokenizer, rows_BD, seed=3).images for rows_BD in (told_BD[:1], told_BD[1:], told_BD[:1] * 0)
    )
    assert not torch.equal(first, second)
    assert not torch.equal(first, none)
    batch = batch_of(described)
    assert torch.equal(labels_after_dropout(batch, 1.0, described, 0), torch.zeros(16, 8))
    kept_BD = labels_after_dropout(batch, 0.5, described, 0)
    dropped_B = (kept_BD == 0).all(1)
    assert 0 < int(dropped_B.sum()) < 16
    assert torch.equal(kept_BD[~dropped_B], batch["text_BD"][~dropped_B])
    for wrong in (torch.tensor([0]), torch.zeros(1, 9)):
        with pytest.raises(ValueError, match=r"was told captions: expected their embeddings, float \(B, 8\)"):
            sample(model, tokenizer, wrong)


def test_steps_are_refused_where_passes_are_given(plain: ModelDescription) -> None:
    model, tokenizer = lively(plain)
    options, label = SamplingOptions(steps=2), torch.tensor([0])
    if plain.implementation().can_choose_steps:
        sample_with(model, tokenizer, label, options)
    else:
        with pytest.raises(ValueError, match=f"family {plain.family} draw in {plain.sampling_passes()} passes"):
            sample_with(model, tokenizer, label, options)


def test_parameters_without_decay_are_the_models(description: ModelDescription) -> None:
    model = build(description)
    plain_names, names = description.implementation().names_without_decay(model), dict(model.named_parameters())
    assert plain_names < names.keys()
    assert {name for name, parameter in names.items() if parameter.ndim == 1} <= plain_names


def test_blocks_compile(plain: ModelDescription) -> None:
    torch._dynamo.reset()
    family, (model, tokenizer), batch = plain.implementation(), lively(plain), batch_of(plain)
    names = list(model.state_dict())
    expected = family.losses(model, tokenizer, batch, seed=0).loss_BL
    blocks = family.blocks(model)
    assert len(blocks) == plain.depth
    for block in blocks:
        block.compile(backend="eager", fullgraph=True, dynamic=False)
    near = {} if family.has_likelihood else {"rtol": 1e-5, "atol": 1e-5}  # squares of outputs far from 0
    torch.testing.assert_close(family.losses(model, tokenizer, batch, seed=0).loss_BL, expected, **near)
    assert list(model.state_dict()) == names


def other_value(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case tuple():
            return (*value, 99)
        case "var":
            return "modern"
        case "modern":
            return "var"
        case "uniform":
            return (1.0, 2.0)
        case str():
            return f"not {value}"
        case None:
            return 1
    raise AssertionError(value)


def test_a_description_is_what_its_json_says(description: ModelDescription) -> None:
    assert type(description).model_validate_json(description.model_dump_json()) == description
    with pytest.raises(ValidationError):
        type(description).model_validate({**description.model_dump(), "unknown": 1})
    prints = {fingerprint(model=description.model_dump(mode="json"))}
    fields = type(description).model_fields.keys() - {"family"}
    for name in fields:
        changed = description.model_copy(update={name: other_value(getattr(description, name))})
        prints.add(fingerprint(model=changed.model_dump(mode="json")))
    assert len(prints) == 1 + len(fields)
    with pytest.raises(ValidationError):
        description.depth = 3


def experiment_with(family: str, patch_nums: Sequence[int] = PATCH_NUMS) -> Experiment:
    grid, tokenizer = {"depths": [1, 2], "budgets": [1e9, 2e9], "min_steps": 5}, {"patch_nums": patch_nums}
    settings = little_experiment(grid=grid, tokenizer=tokenizer).model_dump(mode="json")
    narrow = {"width_per_depth": 8} if family in ("raster", "masked") else {}
    return validate({**settings, "model": {"family": family, **narrow}}, "a test")


def patch_nums_for(description: ModelDescription) -> tuple[int, ...]:
    return PATCH_NUMS if description.reads == "pyramid" else PATCH_NUMS[-1:]


def test_columns_are_in_the_runs_table(plain: ModelDescription) -> None:
    """Beside, not in the place of, what all families have."""
    trunk = Trunk(experiment_with(plain.family, patch_nums_for(plain)), 2, 0, 1e12)
    parameters, model = trunk.parameters(), trunk.model
    assert model.columns().items() <= parameters.items()
    assert parameters["family"] == plain.family
    assert parameters["params_total"] == model.parameters()
    assert parameters["sampling_passes"] == model.sampling_passes()
    assert parameters["depth"] == 2


@pytest.mark.parametrize("family", ["tiny", "raster", "masked"])
def test_a_new_family_goes_all_the_way(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experiment, grid, trunk, branch, result, file and samples know only what a family gives."""
    plain = DESCRIPTIONS[f"{family}, plain"]
    patch_nums = patch_nums_for(plain)
    experiment = experiment_with(family, patch_nums)
    cells = grid_cells(experiment)
    assert [cell.trunk.depth for cell in cells] == [1, 1, 2, 2]
    assert len({cell.key("t") for cell in cells}) == 4
    inputs = make_inputs(tmp_path, patch_nums=patch_nums)
    cell = cell_of_steps(experiment, 20)
    trunk_files, files = files_of(cell.trunk, inputs, tmp_path), files_of(cell, inputs, tmp_path)
    train_trunk(cell.trunk, [cell.branch_images], trunk_files, inputs, ignore)
    train_cell(cell, trunk_files, files, inputs, ignore)
    if family != "tiny":
        assert_same_run(cell, files, inputs, tmp_path / "alone", monkeypatch)
    result = read_result(files)
    assert result is not None
    assert result.row["family"] == family
    assert files.folder.name.startswith(f"{family}-d2-")
    assert ("error" in result.row) == plain.implementation().has_likelihood
    assert float(str(result.row["loss"])) < math.log(16)
    assert load_model(files.weights, files.fingerprint).config == cell.trunk.model
    draw(Drawable.load(files.folder), [0, 2], 2, SamplingOptions(), tmp_path / "samples.png")
    assert (tmp_path / "samples.png").exists()


@pytest.mark.parametrize(("family", "passes"), [("var", 10), ("raster", 256), ("masked", 8)])
def test_the_documents_figures_of_depth_16(family: str, passes: int) -> None:
    patch_nums = PAPER if family == "var" else PAPER[-1:]
    space = TokenSpace(patch_nums=patch_nums, vocab_size=4096, latent_channels=32, num_classes=1000)
    model = FAMILY_KINDS.sections[family]().describe(space, 16)
    cells = f"{model.tokens} | {passes} | {model.parameters():,} ({model.active_parameters():,}) | "
    cells += f"{model.training_flops():.2e} | {model.sampling_flops():.2e}"
    document = Path(__file__).resolve().parents[2] / "docs" / "families.md"
    assert f"| `{family}` | {cells}".replace("e+", "e") in document.read_text()


def test_an_unregistered_family_is_named() -> None:
    with pytest.raises(ExperimentError, match=r"model.family: 'tinny' is none of .*; did you mean tiny"):
        experiment_with("tinny")


def test_how_often_a_model_runs_to_draw_an_image() -> None:
    """Once a scale, once a token, and as often as masked decoding says."""
    settings = {**SPACE, "width": 24, "heads": 3, "depth": 2}
    assert var_config(**{**settings, "patch_nums": (1, 2, 4)}).sampling_passes() == 3
    assert RasterConfig(**{**settings, "patch_nums": (4,)}).sampling_passes() == 16
    assert MaskedConfig(**{**settings, "patch_nums": (4,)}).sampling_passes() == 8
    assert MaskedConfig(**{**settings, "patch_nums": (2,)}).sampling_passes() == 4
