"""Kinds of a section are found by their folders, and a new folder is all that a new kind needs."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, ValidationError
from small_experiment import SMALL

from varscale.config.data import DATA_KINDS
from varscale.config.kinds import Kinds
from varscale.config.section import Section
from varscale.config.yaml import sets, validate
from varscale.errors import ExperimentError
from varscale.families.base import FAMILY_KINDS

SHAPE = """
from typing import Literal
from varscale.config.section import Few, Section

class {name}Section(Section):
    kind: Literal["{kind}"] = "{kind}"
    {field}: Few = 3

SECTION = {name}Section
"""


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kinds[Section]]:
    for kind, field in (("circle", "radius"), ("square", "side")):
        folder = tmp_path / "shapes_of_a_test" / kind
        folder.mkdir(parents=True)
        (folder / "config.py").write_text(SHAPE.format(name=kind.title(), kind=kind, field=field))
        (folder / "__init__.py").touch()
    (tmp_path / "shapes_of_a_test" / "base.py").write_text("raise RuntimeError('no kind')")
    monkeypatch.syspath_prepend(tmp_path)
    yield Kinds("kind", "shapes_of_a_test", default="square")
    for name in [name for name in sys.modules if name.startswith("shapes_of_a_test")]:
        del sys.modules[name]


def test_a_folder_is_a_kind(shapes: Kinds[Section]) -> None:
    class Drawing(BaseModel):
        shape: Annotated[Section, shapes]

    assert list(shapes.sections) == ["circle", "square"]
    drawn = Drawing.model_validate({"shape": {"kind": "circle", "radius": 5}})
    assert drawn.model_dump() == {"shape": {"kind": "circle", "radius": 5}}
    assert Drawing.model_validate(drawn.model_dump()) == drawn
    assert Drawing.model_validate({"shape": {"side": 7}}).model_dump() == {"shape": {"kind": "square", "side": 7}}
    assert Drawing(shape=shapes.sections["circle"]()).shape.model_dump() == {"kind": "circle", "radius": 3}
    with pytest.raises(ValidationError, match="side"):
        Drawing.model_validate({"shape": {"kind": "circle", "side": 5}})
    assert "CircleSection" in Drawing.model_json_schema()["$defs"]


def test_the_kinds_of_an_experiment() -> None:
    assert {"cifar10", "folder", "parquet", "rings"} <= set(DATA_KINDS.sections)
    assert "var" in FAMILY_KINDS.sections
    assert validate(SMALL, "x").model.family == "var"  # the default


@pytest.mark.parametrize(
    ("section", "value", "expected"),
    [
        ("data", 5, "x: data: expected a section of keys, got 5"),
        ("data", None, "x: data: expected a section of keys, got None"),
        ("data", {}, "x: data.kind: missing; one of cifar10, folder, parquet, rings"),
        ("data", {"kind": None}, "x: data.kind: missing; one of cifar10, folder, parquet, rings"),
        ("data", {"kind": ["rings"]}, "x: data.kind: \"['rings']\" is none of cifar10, folder, parquet, rings"),
        ("data", {"kind": 5}, "x: data.kind: '5' is none of cifar10, folder, parquet, rings"),
        ("model", [], "x: model: expected a section of keys, got []"),
        (
            "model",
            {"family": "va"},
            "x: model.family: 'va' is none of diffusion, masked, raster, var; did you mean var?",
        ),
        ("model", {"width_per_dept": 3}, "x: model.width_per_dept: unknown key; did you mean width_per_depth?"),
        ("model", {"head_dim": True}, "x: model.head_dim: input should be a valid integer, got True"),
    ],
)
def test_mistakes_name_the_key_as_it_is_written(section: str, value: object, expected: str) -> None:
    with pytest.raises(ExperimentError) as caught:
        validate({**SMALL, section: value}, "x")
    assert str(caught.value).startswith(expected)


def test_an_override_of_the_kind_sets_its_section() -> None:
    assert sets("data.kind=folder", "data.train_path")
    assert sets("model.family=var", "model.head_dim")
    assert sets("optim=3", "optim.lr")
    assert not sets("optim.lr=3", "optim.lr_batch_size")
    assert not sets("data.seed=3", "data.train_path")


def test_sections_of_sources_need_no_experiment_to_be_imported() -> None:
    """Nor anything heavy; in whichever order modules are imported."""
    for module in ("varscale.data.sources.rings.config", "varscale.families.var.config", "varscale.config.data"):
        code = f"import sys, {module}; print('varscale.config.experiment' in sys.modules, 'torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["False", "False"]
