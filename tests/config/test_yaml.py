"""Experiments as files: every mistake gives one line that names file (or override) and key."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_experiment import SMALL

from varscale.config import Experiment
from varscale.config.text import write_yaml
from varscale.config.yaml import (
    changed,
    load_experiment,
    parts_of,
    shipped_experiments,
    validate,
)
from varscale.errors import ExperimentError
from varscale.families.var.config import VARConfig
from varscale.training.cells import Trunk


@pytest.fixture
def small_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(write_yaml(SMALL), encoding="utf-8")
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ExperimentError) as caught:
        load_experiment(str(path), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------ shipped files


@pytest.mark.parametrize("name", [part for name in sorted(shipped_experiments()) for part in parts_of(name)])
def test_shipped_experiments_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    experiment = load_experiment(name)
    assert experiment.name == Path(name).name.replace(":", "-")
    path = tmp_path / "copy.yaml"
    path.write_text(write_yaml(experiment.model_dump(mode="json")), encoding="utf-8")
    assert load_experiment(str(path)) == experiment


def test_the_experiments_of_the_readme_are_shipped() -> None:
    assert {"rings", "cifar10", "imagenet256", "imagenet512"} <= set(shipped_experiments())


@pytest.mark.parametrize(
    ("name", "patch_nums"),
    [
        ("imagenet256", (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
        ("imagenet512", (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)),
    ],
)
def test_imagenet_has_the_papers_settings(name: str, patch_nums: tuple[int, ...]) -> None:
    experiment = load_experiment(name)
    tokenizer, model, optim, data = experiment.tokenizer, experiment.model, experiment.optim, experiment.data
    assert tokenizer.patch_nums == patch_nums
    assert (tokenizer.vocab_size, tokenizer.latent_channels, tokenizer.base_channels) == (4096, 32, 160)
    d16, d24 = (Trunk(experiment, depth, seed=0, smallest_budget=1e18).model for depth in (16, 24))
    assert (d16.columns(), model.label_dropout) == ({"width": 1024, "heads": 16}, 0.1)
    assert isinstance(d24, VARConfig)
    assert d24.drop_path_rate == pytest.approx(0.1)
    assert (optim.betas, optim.weight_decay, optim.grad_clip, optim.batch_size) == ((0.9, 0.95), 0.05, 2.0, 768)
    assert (data.resize_ratio, data.horizontal_flip, data.num_classes) == (1.125, False, 1000)


PAPER_RECIPES = {  # depth: base rate, batch, final rate, final weight decay, AdaLN-gamma initialisation, epochs
    16: ("imagenet256", 1e-4, 768, 0.1, None, 1e-3, 200),
    20: ("imagenet256", 1e-4, 768, 0.1, None, 1e-3, 250),
    24: ("imagenet256", 8e-5, 768, 0.01, None, 1e-4, 350),
    30: ("imagenet256", 8e-5, 1024, 0.01, 0.08, 1e-5, 350),
    36: ("imagenet512", 8e-5, 768, 0.01, 0.08, 5e-6, 350),
}


@pytest.mark.parametrize("depth", PAPER_RECIPES)
def test_single_runs_have_the_recipe_of_their_depth(depth: int) -> None:
    name, lr, batch_size, final_lr, final_decay, gamma, epochs = PAPER_RECIPES[depth]
    experiment = load_experiment(name)
    run = changed(experiment, experiment.by_depth[depth], name)
    assert (run.optim.lr, run.optim.lr_batch_size, run.optim.batch_size) == (lr, 256, batch_size)
    assert (run.optim.final_lr_ratio, run.optim.final_weight_decay) == (final_lr, final_decay)
    assert (run.optim.schedule, run.optim.epochs, run.optim.warmup_fraction) == ("linear", epochs, 0.02)
    assert (run.model.adaln_gamma_init, run.model.shared_adaln) == (gamma, depth == 36)
    assert experiment.optim.schedule == "wsd"  # grids share one recipe


@pytest.mark.parametrize("name", ["rings", "cifar10", "imagenet256", "imagenet512"])
def test_every_cell_of_a_shipped_grid_has_enough_steps(name: str) -> None:
    """By the matrix products of the transformer counted here by hand, not by varscale.families.var.config."""
    experiment = load_experiment(name)
    tokens, optim, grid = experiment.tokenizer.tokens_per_image, experiment.optim, experiment.grid
    for depth in grid.depths:
        width = experiment.model.width_per_depth * depth
        blocks = depth * (24 * width**2 * tokens + 4 * width * tokens**2)
        head = 2 * width * experiment.tokenizer.vocab_size * tokens
        steps = min(grid.budgets) / (3 * (blocks + head)) / optim.batch_size
        assert steps >= 1.01 * grid.min_steps, f"depth {depth}: {steps:.0f} steps"


# ------------------------------------------------------------------------------------------------- finding files


def test_a_misspelt_name_gets_the_nearest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"no experiment 'imagenet25'; did you mean imagenet256\?; shipped are"):
        load_experiment("imagenet25")
    with pytest.raises(ExperimentError, match=r"no experiment 'rings-law'; did you mean studies/rings-law\?"):
        load_experiment("rings-law")
    (tmp_path / "cifar10").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_experiment("cifar10").name == "cifar10"  # a folder of that name doesn't hide it


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such experiment file"),
        (b"", "expected a mapping"),
        (b"- a\n- b\n", "expected a mapping"),
        (b"name: [unclosed\n", "not a YAML file"),
        (b"name: \xff\xfe\n", "not a YAML file"),
        (b"name: a\noptim: {lr: 1e-3, lr: 1e-4}\n", "key 'lr' is given twice"),
    ],
)
def test_files_that_are_no_experiment(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    if content is not None:
        path.write_bytes(content)
    message = error_of(path)
    assert message.startswith(str(path))
    assert expected in message


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1e-3", "optim.lrr: unknown key; did you mean lr?"),
        ("optin.lr=1e-3", "optin: unknown key; did you mean optim?"),
        ("tokenizer.training.imgs=5", "tokenizer.training.imgs: unknown key; did you mean images?"),
        ("data.imagesize=32", "data.imagesize: unknown key; did you mean image_size?"),
        ("data.image_colum=img", "data.image_colum: unknown key; did you mean image_size?"),  # rings have no column
        ("data={kind: parquet, image_colum: a}", "data.image_colum: unknown key; did you mean image_column?"),
        ("data.kind=ring", "data.kind: 'ring' is none of cifar10, folder, parquet, rings; did you mean rings?"),
        ("data.kind=folder", "data.train_path: missing"),
        ("data.image_size=big", "data.image_size: input should be a valid integer"),
        ("data.validation_images=null", "data.validation_images: procedural rings need a number"),
        ("grid.depths=[2,0]", "grid.depths.1: input should be greater than or equal to 1, got 0"),
        ("grid.depths=12", "grid.depths: expected a list, such as [12, 16], got 12"),
        ("grid.variants=[{nam: a}]", "grid.variants.0.nam: unknown key; did you mean name?"),
        ("optim=fast", "optim: expected a section of keys, got 'fast'"),
        ("optim.lr=fast", "optim.lr: input should be a valid number, got 'fast'"),
        ("optim.lr=", "optim.lr: input should be a valid number, got None"),
        ("optim.schedule=step", "optim.schedule: input should be 'wsd', 'cosine' or 'linear', got 'step'"),
        ("tokenizer.patch_nums=[1,2,2,4]", "tokenizer.patch_nums: must grow strictly, got [1, 2, 2, 4]"),
        ("tokenizer.patch_nums=[1,2,8]", "tokenizer.patch_nums: ends at 8, but 32 px over 8"),
        ("name=a b", "name: string should match pattern"),
    ],
)
def test_a_bad_override_is_named(small_yaml: Path, override: str, expected: str) -> None:
    message = error_of(small_yaml, override)
    assert expected in message
    if "missing" not in expected and "optin" not in expected:  # those lie beside the overridden key
        assert f"--set {override}: " in message


def test_a_bad_value_in_the_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(write_yaml({**SMALL, "optim": {"lr_": 1, "grad_clip": "much"}}), encoding="utf-8")
    message = error_of(path, "optim.batch_size=16")
    assert f"{path}: optim.lr_: unknown key; did you mean lr?" in message
    assert f"{path}: optim.grad_clip: input should be a valid number, got 'much'" in message


@pytest.mark.parametrize("precision", ["float32", "auto", "nonsense"])
def test_precision_has_moved_into_the_recipe(tmp_path: Path, small_yaml: Path, precision: str) -> None:
    advice = "runtime.precision: precision is now part of the recipe: write optim.precision: float32 (or bfloat16)"
    override = f"runtime.precision={precision}"
    assert error_of(small_yaml, override) == f"--set {override}: {advice}"
    old = tmp_path / "old.yaml"
    old.write_text(write_yaml({**SMALL, "runtime": {"threads": 1, "precision": precision}}), encoding="utf-8")
    assert error_of(old) == f"{old}: {advice}"


def test_every_shipped_experiment_states_its_precision() -> None:
    shipped = {name: load_experiment(name) for name in ("rings", "cifar10", "imagenet256", "imagenet512")}
    stated = {name: experiment.optim.precision for name, experiment in shipped.items()}
    assert stated == {"rings": "float32", "cifar10": "float32", "imagenet256": "bfloat16", "imagenet512": "bfloat16"}
    for name in shipped:
        assert "  precision: " in shipped_experiments()[name].read_text(encoding="utf-8")


def test_many_mistakes_are_still_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(write_yaml({**SMALL, **{f"key{number}": 1 for number in range(2000)}}), encoding="utf-8")
    message = error_of(path)
    assert message.endswith("; and 1995 more")
    assert len(message) < 1000
    path.write_text(write_yaml({**SMALL, "k" * 50_000: 1, "name": "a b" * 10_000}), encoding="utf-8")
    assert len(error_of(path)) < 1000


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "a" * 5000 + ".yaml", "/dev/zero", "", "."])
def test_names_that_are_no_file(name: str) -> None:
    with pytest.raises(ExperimentError, match=r"no experiment|no such experiment file"):
        load_experiment(name)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    assert error_of(path) == f"{path}: not a YAML file: {2**40} bytes, too long for an experiment"


def test_overrides_of_any_depth_are_one_line(small_yaml: Path) -> None:
    message = error_of(small_yaml, f"optim.{'a.' * 3000}b=1", f"optim.{'a.' * 3000}c=1")
    assert "optim.a: unknown key" in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    "override", ["optim.lr", "=3", "optim.lr=[1", "optim.lr=" + "[" * 3000, "optim.lr=!!python/name:os"]
)
def test_malformed_overrides(small_yaml: Path, override: str) -> None:
    assert error_of(small_yaml, override).startswith(f"--set {override}"[:200])


def test_an_override_below_a_value(small_yaml: Path) -> None:
    assert "name is a value, not a section" in error_of(small_yaml, "name.first=x")


def test_a_missing_kind_lists_the_kinds() -> None:
    data = {key: value for key, value in SMALL["data"].items() if key != "kind"}
    with pytest.raises(ExperimentError, match=r"^x: data.kind: missing; one of cifar10, folder, parquet, rings$"):
        validate({**SMALL, "data": data}, "x")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"by_depth": {16: {"optim.lrr": 1}}}, "x: by_depth.16: optim.lrr: unknown key; did you mean lr?"),
        ({"by_depth": {16: {"optim.lr": "a"}}}, "x: by_depth.16: optim.lr: input should be a valid number"),
        ({"by_depth": {16: {"data.seed": 1}}}, "x: by_depth.16: data.seed: only fields of model and optim"),
        ({"by_depth": {0: {}}}, "x: by_depth.0"),
    ],
)
def test_recipes_by_depth_are_checked_when_read(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ExperimentError, match=re.escape(expected)):
        validate({**SMALL, **settings}, "x")


def test_variants_are_checked_when_read() -> None:
    variant = {"name": "fast", "depths": [2], "budgets": [1e12], "settings": {"optim.lrs": 1.0}}
    with pytest.raises(ExperimentError, match=r"x: grid.variants.fast: optim.lrs: unknown key; did you mean"):
        validate({**SMALL, "grid": {**SMALL["grid"], "variants": [variant]}}, "x")


# ------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("1e12", 1e12), ("1E+3", 1e3), ("5.e-1", 0.5), (".5e1", 5.0), ("0.25", 0.25), ("2", 2.0)],
)
def test_overrides_come_before_validation(small_yaml: Path, text: str, value: float) -> None:
    experiment = load_experiment(str(small_yaml), [f"optim.lr={text}", "grid.depths=[3, 4]", "optim.epochs=null"])
    assert experiment.optim.lr == value
    assert experiment.grid.depths == (3, 4)
    assert experiment.optim.epochs is None
    assert experiment.optim.batch_size == 768


def test_the_last_of_equal_overrides_counts(small_yaml: Path) -> None:
    assert load_experiment(str(small_yaml), ["optim.lr=1", "optim.lr=2"]).optim.lr == 2


def test_an_override_may_open_a_section(small_yaml: Path) -> None:
    assert load_experiment(str(small_yaml), ["evaluation.top_k=900"]).evaluation.top_k == 900


@pytest.mark.parametrize("choice", ["on", "off", "auto"])
def test_on_and_off_are_words(small_yaml: Path, choice: str) -> None:
    assert load_experiment(str(small_yaml), [f"runtime.compile={choice}"]).runtime.compile == choice


@given(
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True),
    lr=st.floats(1e-12, 1e6),
    budgets=st.lists(st.floats(1e6, 1e26), min_size=1, max_size=5, unique=True),
    flag=st.booleans(),
)
def test_any_experiment_survives_yaml(
    tmp_path_factory: pytest.TempPathFactory, name: str, lr: float, budgets: list[float], flag: bool
) -> None:
    experiment = Experiment.model_validate(
        {
            **SMALL,
            "name": name,  # also names that look like numbers: 1e5, 007, 1.5
            "optim": {"lr": lr},
            "model": {"width_per_depth": 16, "head_dim": 16, "shared_adaln": flag},
            "grid": {"depths": [2], "budgets": budgets},
            "by_depth": {16: {"optim.lr": lr}},
        }
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(write_yaml(experiment.model_dump(mode="json")), encoding="utf-8")
    assert load_experiment(str(path)) == experiment


def test_changed_leaves_the_original_alone() -> None:
    experiment = Experiment.model_validate(SMALL)
    other = changed(experiment, {"optim.lr": 0.5, "model.mlp_ratio": 2.0}, "test")
    assert (other.optim.lr, other.model.mlp_ratio) == (0.5, 2.0)
    assert experiment == Experiment.model_validate(SMALL)
    with pytest.raises(ExperimentError, match=r"test: optim.learning_rate: unknown key"):
        changed(experiment, {"optim.learning_rate": 0.5}, "test")
