"""Experiments that extend others: what is merged, what is replaced, and which file an error names."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_experiment import SMALL

from varscale.config.text import write_yaml
from varscale.config.yaml import load_experiment, shipped_experiments
from varscale.errors import ExperimentError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With base.yaml, which says everything."""
    write(tmp_path / "base.yaml", SMALL)
    return tmp_path


def write(path: Path, settings: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(write_yaml(settings), encoding="utf-8")
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ExperimentError) as caught:
        load_experiment(str(path), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_only_what_differs_is_stated(folder: Path) -> None:
    changes = {
        "name": "small-but-fast",
        "extends": "base.yaml",
        "optim": {"lr": 0.5},
        "tokenizer": {"training": {"lr": 0.25}, "patch_nums": [1, 4]},
        "by_depth": {16: {"optim.lr": 0.125}},
    }
    base = load_experiment(str(folder / "base.yaml"))
    experiment = load_experiment(str(write(folder / "fast.yaml", changes)))
    assert experiment.name == "small-but-fast"
    assert experiment.optim == base.optim.model_copy(update={"lr": 0.5})
    assert experiment.tokenizer.patch_nums == (1, 4)  # a list is replaced as a whole
    assert experiment.tokenizer.training == base.tokenizer.training.model_copy(update={"lr": 0.25})
    assert experiment.by_depth == {16: {"optim.lr": 0.125}}
    assert (experiment.data, experiment.model, experiment.grid) == (base.data, base.model, base.grid)


def test_what_is_searched_is_replaced_as_a_whole(folder: Path) -> None:
    """Another family has other settings to search."""
    lr, width = {"low": 0.1, "high": 1.0}, {"choices": [8, 16]}
    write(folder / "one.yaml", {"extends": "base.yaml", "search": {"depth": 3, "space": {"optim.lr": lr}}})
    path = write(folder / "two.yaml", {"extends": "one.yaml", "search": {"space": {"model.width_per_depth": width}}})
    assert load_experiment(str(path)).search.space.keys() == {"model.width_per_depth"}
    assert load_experiment(str(path)).search.depth == 3


def test_several_levels_each_from_where_it_lies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "studies" / "one.yaml", {"extends": "../base.yaml", "optim": {"lr": 0.1, "batch_size": 8}})
    write(
        folder / "two.yaml", {"extends": "studies/one.yaml", "optim": {"lr": 0.2}, "by_depth": {3: {"optim.lr": 1.0}}}
    )
    top = write(folder / "three.yaml", {"extends": str(folder / "two.yaml"), "by_depth": {4: {"optim.lr": 2.0}}})
    monkeypatch.chdir("/")
    experiment = load_experiment(str(top), ["optim.grad_clip=3"])
    assert (experiment.optim.lr, experiment.optim.batch_size, experiment.optim.grad_clip) == (0.2, 8, 3)
    assert experiment.by_depth == {3: {"optim.lr": 1.0}, 4: {"optim.lr": 2.0}}


def test_a_shipped_experiment_is_extended_by_name(tmp_path: Path) -> None:
    (tmp_path / "rings").write_text("not this one")
    experiment = load_experiment(str(write(tmp_path / "mine.yaml", {"name": "mine", "extends": "rings"})))
    assert experiment == load_experiment("rings").model_copy(update={"name": "mine"})


def test_the_study_of_rings_adds_cells_to_rings() -> None:
    rings, study = load_experiment("rings"), load_experiment("studies/rings-law")
    assert {variant.name for variant in study.grid.variants} == {"seed-noise", "lr-half", "lr-double"}
    grid = study.grid.model_copy(update={"variants": ()})
    assert study.model_copy(update={"name": "rings", "grid": grid}) == rings
    assert len(shipped_experiments()["studies/rings-law"].read_text(encoding="utf-8").splitlines()) < 30


def test_another_kind_replaces_the_section(folder: Path) -> None:
    write(folder / "base.yaml", {**SMALL, "data": {**SMALL["data"], "colours": 2}})
    same = {"extends": "base.yaml", "data": {"kind": "rings", "seed": 3}, "model": {"family": "var", "mlp_ratio": 2.0}}
    experiment = load_experiment(str(write(folder / "same.yaml", same)))
    assert (experiment.data.seed, experiment.data.model_dump()["colours"]) == (3, 2)
    assert (experiment.model.mlp_ratio, experiment.model.width_per_depth) == (2.0, 16)
    other = {"kind": "cifar10", "path": "data", "image_size": 32, "num_classes": 10}
    experiment = load_experiment(str(write(folder / "other.yaml", {"extends": "base.yaml", "data": other})))
    assert experiment.data.validation_images is None
    del other["num_classes"]
    assert "other.yaml: data.num_classes: missing" in error_of(
        write(folder / "other.yaml", {"extends": "base.yaml", "data": other})
    )


def test_errors_name_the_file_of_the_value(folder: Path) -> None:
    base = {**SMALL, "optim": {"lr_": 1, "grad_clip": "much"}, "by_depth": {16: {"optim.lr": "a"}}}
    write(folder / "base.yaml", base)
    top = write(folder / "top.yaml", {"extends": "base.yaml", "optim": {"batch_size": 0}, "evaluatio": {}})
    message = error_of(top, "optim.epochs=many")
    by = f"{folder / 'base.yaml'} (extended by {top})"
    assert f"{by}: optim.lr_: unknown key; did you mean lr?" in message
    assert f"{by}: optim.grad_clip: input should be a valid number, got 'much'" in message
    assert f"; {top}: optim.batch_size: input should be greater than or equal to 1" in f"; {message}"
    assert f"; {top}: evaluatio: unknown key; did you mean evaluation?" in message
    assert "--set optim.epochs=many: optim.epochs: input should be a valid number" in message

    write(folder / "base.yaml", {**base, "optim": {}})
    fixed = write(folder / "top.yaml", {"extends": "base.yaml"})
    assert error_of(fixed).startswith(f"{by}: by_depth.16: optim.lr: input should be a valid number")
    write(folder / "top.yaml", {"extends": "base.yaml", "by_depth": {16: {"optim.lr": "b"}}})
    assert error_of(fixed).startswith(f"{top}: by_depth.16: optim.lr: input should be a valid number, got 'b'")


def test_a_check_of_several_values_names_where_the_first_was_written(folder: Path) -> None:
    top = write(folder / "top.yaml", {"extends": "base.yaml", "data": {"image_size": 64}})
    message = error_of(top)
    assert message == (
        f"{folder / 'base.yaml'} (extended by {top}): tokenizer.patch_nums: ends at 4, but 64 px over 8 "
        "(channel_multipliers has 4 entries) is 8"
    )


@pytest.mark.parametrize(
    ("extends", "expected"),
    [
        ("bas.yaml", "bas.yaml; shipped are"),
        ("ring", "did you mean rings?"),
        ("..", "no such file"),
        ("a" * 5000, "no such file"),
        ("a\0b", "no such file"),
        (5, "expected a shipped experiment's name or a file's path, got 5"),
        (["base.yaml"], "expected a shipped experiment's name or a file's path"),
    ],
)
def test_what_cannot_be_extended(folder: Path, extends: Any, expected: str) -> None:
    top = write(folder / "top.yaml", {"extends": extends})
    message = error_of(top)
    assert message.startswith(f"{top}: extends: ")
    assert expected in message
    assert len(message) < 600


def test_what_is_extended_must_be_an_experiment(folder: Path) -> None:
    (folder / "base.yaml").write_text("- a list")
    top = write(folder / "top.yaml", {"extends": "base.yaml"})
    assert f"{folder / 'base.yaml'}: expected a mapping" in error_of(top)


def test_circles_are_named(folder: Path) -> None:
    itself = write(folder / "itself.yaml", {"extends": "itself.yaml"})
    assert error_of(itself) == f"{itself}: extends: {itself}, which already extends {itself}: a circle"
    for name, extended in (("a", "b"), ("b", "c"), ("c", "../" + folder.name + "/b")):
        write(folder / f"{name}.yaml", {"extends": f"{extended}.yaml"})
    message = error_of(folder / "a.yaml")
    assert message.startswith(f"{folder / 'c.yaml'}: extends: ")
    assert message.endswith(f"b.yaml, which already extends {folder / 'c.yaml'}: a circle")


def test_an_override_extends_nothing(folder: Path) -> None:
    message = error_of(folder / "base.yaml", "extends=rings")
    assert message.startswith("--set extends=rings: only a file can extend another")


VALUES = st.recursive(
    st.integers(0, 3) | st.lists(st.integers(0, 3), max_size=2),
    lambda below: st.dictionaries(st.sampled_from("abc"), below, max_size=3),
    max_leaves=8,
)
SETTINGS = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)


def leaves(settings: Any, above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(settings, dict) or not settings:
        return {above: settings}
    return {place: value for key, below in settings.items() for place, value in leaves(below, (*above, key)).items()}


@given(SETTINGS, SETTINGS)
def test_a_merge_keeps_what_the_change_does_not_say(base: dict[str, Any], change: dict[str, Any]) -> None:
    from varscale.config.yaml import _merged

    files: dict[tuple[str, ...], str] = {}
    merged = leaves(_merged(_merged({}, base, "base", files), change, "change", files))
    said = {place: value for place, value in leaves(change).items() if value != {}}
    assert said.items() <= merged.items()
    for place, value in merged.items():
        if place not in said and value != {}:
            assert leaves(base)[place] == value
    for place in said:
        nearest = next(files[place[:end]] for end in range(len(place), 0, -1) if place[:end] in files)
        assert nearest == "change"
