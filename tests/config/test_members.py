"""Several experiments in one file: what each member is, how it is named, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from small_experiment import SMALL

from varscale.config.text import write_yaml
from varscale.config.yaml import as_extended, load_experiment, name_of, parts_of, shipped_experiments
from varscale.errors import ExperimentError

MEMBERS = {"plain": {}, "one-scale": {"tokenizer": {"patch_nums": [4]}, "model": {"family": "raster"}}}


@pytest.fixture
def pair(tmp_path: Path) -> str:
    """A file of two members that extends another."""
    (tmp_path / "base.yaml").write_text(write_yaml(SMALL), encoding="utf-8")
    return write(tmp_path / "pair.yaml", name="pair", extends="base.yaml", optim={"lr": 0.5}, members=MEMBERS)


def write(path: Path, **settings: Any) -> str:
    path.write_text(write_yaml(settings), encoding="utf-8")
    return str(path)


def test_members_share_what_the_file_says_and_state_what_differs(pair: str, tmp_path: Path) -> None:
    assert parts_of(pair) == (f"{pair}:plain", f"{pair}:one-scale")
    assert name_of(pair) == "pair"
    base = load_experiment(str(tmp_path / "base.yaml"))
    optim = base.optim.model_copy(update={"lr": 0.5})
    plain, other = map(load_experiment, parts_of(pair))
    assert plain == base.model_copy(update={"name": "pair-plain", "optim": optim})
    assert (other.name, other.model.family, other.tokenizer.patch_nums) == ("pair-one-scale", "raster", (4,))
    assert (other.optim, other.data, other.grid) == (optim, base.data, base.grid)
    assert load_experiment(f"{pair}:plain", ["optim.lr=0.25"]).optim.lr == 0.25
    assert parts_of(f"{pair}:plain") == (f"{pair}:plain",)
    assert parts_of("rings") == ("rings",)


def test_a_member_can_be_extended(pair: str, tmp_path: Path) -> None:
    extends = as_extended(f"{pair}:one-scale", tmp_path)
    assert extends == "pair.yaml:one-scale"
    top = load_experiment(write(tmp_path / "top.yaml", name="top", extends=extends, grid={"depths": [4]}))
    assert (top.name, top.model.family, top.grid.depths) == ("top", "raster", (4,))
    assert as_extended("studies/families:var", tmp_path) == "studies/families:var"


def test_shipped_files_of_several_experiments_share_their_images() -> None:
    """Or nothing that is measured would compare."""
    joint = [name for name in shipped_experiments() if parts_of(name) != (name,)]
    assert "studies/families" in joint
    for name in joint:
        parts = [load_experiment(part) for part in parts_of(name)]
        assert len({part.data for part in parts}) == 1
        assert len({part.evaluation.fidelity for part in parts}) == 1
        assert len({part.grid.budgets for part in parts}) == 1


@pytest.mark.parametrize(
    ("named", "changes", "message"),
    [
        ("", {}, "pair.yaml: holds several experiments; name one of them, such as .*pair.yaml:plain$"),
        (":plane", {}, "no such member; did you mean plain.; its members are plain, one-scale"),
        (":plain", {"members": None}, "pair.yaml: members: expected names with what each changes"),
        (":plain", {"members": {"plain": 3}}, "pair.yaml: members.plain: expected sections that it changes"),
        (
            ":plain",
            {"members": {"Plain": {}}},
            "pair.yaml: members: 'Plain': expected lower-case letters, digits and -",
        ),
        (":plain", {"name": None}, "pair.yaml: name: missing; a file with members states the name of their study"),
        (":plain", {"members": {"plain": {"optim": {"rate": 1}}}}, "pair.yaml: optim.rate: unknown key"),
    ],
)
def test_what_is_wrong_is_named(pair: str, tmp_path: Path, named: str, changes: dict[str, Any], message: str) -> None:
    settings = {"name": "pair", "extends": "base.yaml", "members": MEMBERS, **changes}
    write(Path(pair), **settings)
    with pytest.raises(ExperimentError, match=message):
        load_experiment(pair + named)


def test_an_experiment_without_members_has_none() -> None:
    with pytest.raises(ExperimentError, match=r"rings\.yaml:var: no such member; it has no members"):
        load_experiment("rings:var")
