"""The diffusion transformer against a plain one, its accounting of sampling, and a study of it from latents to images.

Letters: B batch, L tokens, c channels.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from requirements import require_program
from small_models import counted_by_module, tokenizer_for
from tiny_training import assert_same_run, cell_of_steps, files_of, ignore, little_experiment, make_inputs
from torch import Tensor
from torch.nn import functional as F

from sweeps.grid import grid_cells
from sweeps.jobs.base import StudyPlace
from sweeps.jobs.evaluation import EvaluationJob
from sweeps.study import Study
from varscale.config import Experiment
from varscale.config.yaml import validate
from varscale.data.sources.rings.source import RingsSource
from varscale.data.tokens.store import TokenStore
from varscale.data.transforms import to_model_range
from varscale.errors import ExperimentError
from varscale.evaluation.subjects import Evaluated, _reconstructed
from varscale.families.base import SamplingOptions, TokenSpace
from varscale.families.diffusion.config import DiffusionSection, DiTConfig
from varscale.families.diffusion.transformer import DiT, patches, unpatched
from varscale.families.storage import load_model
from varscale.generation.from_files import Drawable, draw
from varscale.generation.sampling import sample, sample_with
from varscale.store.layout import RunKey, Store
from varscale.store.records import TokensSummary, read_result
from varscale.tokenizer.storage import load_tokenizer
from varscale.tokenizer.training import encode_tokens, tokens_ready
from varscale.training.runs import Inputs, train_cell, train_trunk


def description(**changes: Any) -> DiTConfig:
    sizes: dict[str, Any] = {"patch_nums": (1, 2, 4), "vocab_size": 16, "latent_channels": 4, "num_classes": 3}
    return DiTConfig(**{**sizes, "depth": 2, "width": 16, "heads": 2, "patch_size": 2, **changes})


def lively(config: DiTConfig) -> DiT:
    """With weights that are not 0."""
    torch.manual_seed(0)
    model = DiT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def experiment(**model: Any) -> Experiment:
    settings = little_experiment(grid={"depths": [2], "budgets": [1e12]}).model_dump(mode="json")
    return validate({**settings, "model": {"family": "diffusion", "width_per_depth": 8, **model}}, "a test")


@torch.no_grad()
def plain_forward(model: DiT, noisy_BChw: Tensor, moments_B: Tensor, labels_B: Tensor) -> Tensor:
    """DiT's figure 3 and section 3.2, loop by loop, from the same weights."""
    config, size, batch = model.config, model.config.patch_size, len(labels_B)
    channels, side, width = noisy_BChw.shape[1], config.side, config.width
    table = noisy_BChw.new_zeros(batch, side * side, size * size * channels)
    for row in range(side):
        for column in range(side):
            patch = noisy_BChw[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
            table[:, row * side + column] = patch.permute(0, 2, 3, 1).reshape(batch, -1)
    angles = moments_B[:, None] * 10_000 ** (-torch.arange(128) / 128)
    condition = model.time_embedding(torch.cat((angles.cos(), angles.sin()), 1)) + model.class_embedding(labels_B)
    condition = condition * condition.sigmoid()
    quarter = 10_000 ** (-torch.arange(width // 4) / (width // 4))
    places = [
        torch.cat([(row * quarter).cos(), (row * quarter).sin(), (column * quarter).cos(), (column * quarter).sin()])
        for row in range(side)
        for column in range(side)
    ]
    x = table @ model.patch_embedding.weight.T + model.patch_embedding.bias + torch.stack(places)

    def normalised(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale[:, None]) + shift[:, None]

    for block in model.blocks:
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = block.modulation(condition).chunk(6, 1)
        joint = block.queries_keys_values(normalised(x, scale_1, shift_1))
        heads = []
        for query, key, value in zip(
            *(part.split(width // config.heads, 2) for part in joint.chunk(3, 2)), strict=True
        ):
            weights = (query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])).softmax(-1)
            heads.append(weights @ value)
        x = x + gate_1[:, None] * block.projection(torch.cat(heads, 2))
        hidden = F.gelu(block.feedforward.expand(normalised(x, scale_2, shift_2)), approximate="tanh")
        x = x + gate_2[:, None] * block.feedforward.contract(hidden)
    out = model.head(normalised(x, *model.head_modulation(condition).chunk(2, 1)))
    whole = torch.empty_like(noisy_BChw)
    for row in range(side):
        for column in range(side):
            patch = out[:, row * side + column].view(batch, size, size, channels).permute(0, 3, 1, 2)
            whole[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size] = patch
    return whole


@pytest.mark.parametrize("native", ["0", "1"])
def test_the_transformer_is_dit(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VARSCALE_NATIVE", native)
    model = lively(description())
    noisy_BChw, moments_B, labels_B = (
        torch.randn(3, 4, 4, 4),
        torch.tensor([0.0, 417.5, 999.0]),
        torch.tensor([0, 3, 1]),
    )
    expected = plain_forward(model, noisy_BChw, moments_B, labels_B)
    with torch.no_grad():
        torch.testing.assert_close(model(noisy_BChw, moments_B, labels_B), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(noisy_BChw, moments_B, labels_B), expected, atol=1e-4, rtol=1e-4)


def test_native_blocks_and_the_library_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    require_program("c++")
    model, noisy_BChw = lively(description()), torch.randn(3, 4, 4, 4)
    results = []
    for native in ("0", "1"):
        monkeypatch.setenv("VARSCALE_NATIVE", native)
        model.zero_grad()
        model(noisy_BChw, torch.tensor([0.0, 417.5, 999.0]), torch.tensor([0, 3, 1])).square().sum().backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("prediction", "variance"), [("flow", 2), ("ddpm", 1)])
@pytest.mark.parametrize("seed", [None, 0])
def test_the_first_loss_is_the_variance_of_what_is_predicted(prediction: Any, variance: int, seed: int | None) -> None:
    """The output is 0 at first: it misses noise of variance 1, or the difference of latents and noise."""
    config, images = description(prediction=prediction), 1000
    model = DiT(config)
    model.set_statistics([5.0, 0.0, -1.0, 2.0], [0.1, 1.0, 10.0, 0.5])
    batch = {
        "latents_BChw": model.restored(torch.randn(images, 4, 4, 4, generator=torch.Generator().manual_seed(0))),
        "labels_B": torch.zeros(images, dtype=torch.int64),
        "sample_index_B": torch.arange(images),
    }
    losses = config.implementation().losses(model, tokenizer_for(config), batch, seed)
    assert losses.loss_BL.shape == (images, 4)
    assert float(losses.loss_BL.mean().detach()) == pytest.approx(variance, rel=0.03)


@pytest.mark.parametrize("size", [1, 2])
def test_patches_are_put_back(size: int) -> None:
    x_BChw = torch.randn(2, 3, 4, 4)
    assert torch.equal(unpatched(patches(x_BChw, size), size, 3), x_BChw)


@pytest.mark.parametrize(
    ("prediction", "sampler", "passes"), [("flow", None, 3), ("flow", "heun", 6), ("ddpm", None, 3)]
)
def test_flops_of_sampling_are_those_of_its_passes(prediction: Any, sampler: Any, passes: int) -> None:
    config = description(prediction=prediction, sampler=sampler, sampling_steps=3)
    assert config.sampling_passes() == passes
    model, tokenizer, label = lively(config), tokenizer_for(config), torch.tensor([1])
    for guidance, branches in ((0.0, 1), (1.5, 2)):
        counts = counted_by_module(lambda guidance=guidance: sample(model, tokenizer, label, guidance))
        assert sum(counts["DiT"].values()) == config.sampling_flops(guidance=guidance > 0)
        assert config.sampling_flops(guidance=guidance > 0) == passes * branches * config.forward_flops()


def test_options_of_sampling() -> None:
    config = description(sampling_steps=3)
    model, tokenizer, label = lively(config), tokenizer_for(config), torch.tensor([1])
    counts = counted_by_module(lambda: sample_with(model, tokenizer, label, SamplingOptions(guidance=0, steps=7)))
    assert sum(counts["DiT"].values()) == 7 * config.forward_flops()
    for options in (SamplingOptions(top_k=5), SamplingOptions(top_p=0.5), SamplingOptions(temperature=0.9)):
        with pytest.raises(ValueError, match="models of family diffusion choose no tokens"):
            sample_with(model, tokenizer, label, options)
    with pytest.raises(ValueError, match="no smooth mode"):
        sample_with(model, tokenizer, label, SamplingOptions(smooth=True))


def test_guidance_moves_away_from_no_class() -> None:
    """One Euler step from the noise z is z + v without class + (1 + t)·(v with class - v without)."""
    config = description(sampling_steps=1)
    model, tokenizer = lively(config), tokenizer_for(config)
    label, none = torch.tensor([1]), torch.tensor([3])
    seen: list[Tensor] = []
    tokenizer.decode_features = lambda latents: seen.append(latents) or torch.zeros(len(latents), 3, 8, 8)
    for labels_B, guidance in ((label, 0.0), (none, 0.0), (label, 1.5)):
        sample(model, tokenizer, labels_B, guidance)
    conditional, unconditional, guided = seen
    torch.testing.assert_close(guided, unconditional + 2.5 * (conditional - unconditional))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"patch_size": 3}, r"model\.patch_size: 3 does not divide the side of the latents, 4"),
        ({"mlp_ratio": 0.01}, r"model\.mlp_ratio: 0\.01 leaves depth 2"),
    ],
)
def test_models_that_the_latents_do_not_allow(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        grid_cells(experiment(**model))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"sampler": "ddim"}, "ddim is for prediction ddpm; flow takes euler or heun"),
        ({"prediction": "ddpm", "sampler": "heun"}, "heun is for prediction flow; ddpm takes ddim or ancestral"),
        ({"noise_schedule": "cosine"}, "noise_schedule: only prediction ddpm has one"),
        (
            {"prediction": "ddpm", "time_distribution": "logit-normal"},
            "time_distribution: only prediction flow has one",
        ),
        ({"sampling_steps": 1001}, "sampling_steps"),
        ({"patch_size": 0}, "patch_size"),
    ],
)
def test_settings_that_say_nothing_together(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        experiment(**model)
    with pytest.raises(ValidationError):
        DiffusionSection(**model)


@pytest.mark.parametrize(("prediction", "default", "other"), [("flow", "euler", "heun"), ("ddpm", "ddim", "ancestral")])
def test_the_default_sampler_named_is_the_same_model(prediction: str, default: str, other: str) -> None:
    unnamed, named, another = (
        grid_cells(experiment(prediction=prediction, sampler=sampler))[0].key("tokens").fingerprint
        for sampler in (None, default, other)
    )
    assert unnamed == named != another
    assert description(prediction=prediction, sampler=default).solver == default


def test_choices_among_tokens_are_refused_before_training() -> None:
    settings = experiment().model_dump(mode="json")
    for section in ({"top_k": 9}, {"fidelity": {"top_p": 0.9}}):
        with pytest.raises(
            ExperimentError, match=r"evaluation\.(fidelity\.)?top_.: chooses among tokens, .* diffusion"
        ):
            validate({**settings, "evaluation": section}, "a test")


def test_a_depth_has_as_many_heads_as_fit() -> None:
    space = TokenSpace(patch_nums=(1, 4), vocab_size=16, latent_channels=4, num_classes=3)
    described = DiffusionSection(width_per_depth=8, head_dim=8).describe(space, 6)
    assert (described.width, described.heads, described.tokens, described.outputs) == (48, 6, 16, 4)


def test_models_of_latents_are_held_to_reconstructions_from_latents(tmp_path: Path) -> None:
    """Which are an evaluation of their own, beside that of the reconstructions from tokens."""
    fidelity = {"fidelity": {"samples": 100, "reference_images": 100}}
    settings = experiment().model_dump(mode="json") | {"evaluation": fidelity}
    folders = set()
    for family in ("diffusion", "var"):
        study = Study.of(validate({**settings, "model": {"family": family}}, "a test"), Store(tmp_path), ())
        assert study.fidelity is not None
        folders.add(EvaluationJob(study.experiment, StudyPlace.of(study), study.fidelity, "reconstructed").files.folder)
    assert len(folders) == 2
    files = make_inputs(tmp_path, 8).tokenizer
    tokenizer, pixels = load_tokenizer(files.weights), RingsSource(6, 8).load_batch(range(6), [0] * 6)[0]
    images = tokenizer.decode_features(tokenizer.features(to_model_range(pixels))).add(1).mul(127.5).round()
    what = Evaluated("reconstructed", "", study.experiment.data, files, latents=files)
    (found,) = _reconstructed(what, iter([torch.from_numpy(pixels)]))
    assert float((found.float() - images).abs().max()) <= 1
    assert what.of == {"latents_fingerprint": files.fingerprint}


def test_from_latents_to_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding, trunk, branch, result, weights and samples; the statistics go with the weights."""
    settings = experiment(prediction="flow", sampler="heun", sampling_steps=3)
    tokenizer = make_inputs(tmp_path).tokenizer
    tokens = Store(tmp_path).tokens(RunKey("tokens", "rings-latents", "latents0"))
    encode_tokens(settings, tokenizer, tokens, 64, ignore)
    assert tokens_ready(tokens, 64)
    inputs, cell = Inputs(tokenizer, tokens), cell_of_steps(settings, 20)
    trunk_files, files = files_of(cell.trunk, inputs, tmp_path), files_of(cell, inputs, tmp_path)
    train_trunk(cell.trunk, [cell.branch_images], trunk_files, inputs, ignore)
    train_cell(cell, trunk_files, files, inputs, ignore)
    assert_same_run(cell, files, inputs, tmp_path / "alone", monkeypatch)
    result = read_result(files)
    assert result is not None
    assert files.folder.name.startswith("diffusion-d2-")
    assert 0.1 < result.metrics["loss"] < 2
    assert not any(name.startswith(("error", "loss_per_image")) for name in result.row)
    assert (result.row["unigram_entropy"], result.row["latents_fingerprint"]) == (None, "latents0")
    model, summary = load_model(files.weights), TokensSummary.read(tokens.summary)
    assert isinstance(model, DiT)
    assert summary is not None
    torch.testing.assert_close(model.latent_deviation_c, torch.tensor(summary.latent_deviation))
    batch = TokenStore.open(tokens.validation).samples([0, 1])._asdict()
    standardised = model.standardised(batch["latents_BChw"])
    torch.testing.assert_close(model.restored(standardised), batch["latents_BChw"])
    drawable = Drawable.load(files.folder)
    draw(drawable, [0, 2], 2, SamplingOptions(), tmp_path / "samples.png")
    assert (tmp_path / "samples.png").exists()
    with pytest.raises(ExperimentError, match="--show-scales: models of family diffusion draw latents"):
        draw(drawable, [0], 1, SamplingOptions(), tmp_path / "scales.png", show_scales=True)
