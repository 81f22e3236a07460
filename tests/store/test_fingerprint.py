"""Fingerprints of tokenizers and tokens, and the numerics that a study is held to."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_training import NUMERICS, little_experiment

from varscale.data.sources.folder.config import FolderSection
from varscale.data.sources.of_experiment import data_identity
from varscale.data.sources.parquet.config import ParquetSection
from varscale.errors import DataError, ExperimentError
from varscale.store.fingerprint import (
    agrees,
    processors,
    store_numerics,
    stored_numerics,
    tokenizer_fingerprint,
    tokens_fingerprint,
)
from varscale.store.layout import ExperimentFiles


def prints(threads: int = 2, **sections: dict[str, Any]) -> tuple[str, str]:
    """Fingerprints of the tokenizer and of its tokens."""
    experiment = little_experiment(**sections)
    data = data_identity(experiment.data)
    tokenizer = tokenizer_fingerprint(experiment, data, threads)
    return tokenizer, tokens_fingerprint(experiment, data, tokenizer)


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"seed": 1}},
        {"data": {"width": [0.1, 0.1]}},
        {"data": {"colours": 5}},
        {"tokenizer": {"vocab_size": 32}},
        {"tokenizer": {"phi_ratio": 0.4}},
        {"tokenizer": {"training": {"lr": 1e-3}}},
        {"tokenizer": {"training": {"seed": 1}}},
        {"tokenizer": {"training": {"restart_usage": 0.2}}},
        {"threads": 1},
    ],
)
def test_what_changes_the_tokenizer_changes_both(sections: dict[str, Any]) -> None:
    assert not set(prints(**sections)) & set(prints())


def test_where_images_lie_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor, for the tokenizer, how many views of each are encoded."""
    data = folders(tmp_path / "here", 9)
    moved = shutil.copytree(tmp_path / "here", tmp_path / "there")
    monkeypatch.chdir(moved)
    elsewhere = data.model_copy(update={"train_path": "train", "validation_path": "validation"})
    assert data_identity(data) == data_identity(elsewhere)
    views = [data.model_copy(update={"resize_ratio": 1.25, "views": count}) for count in (2, 4)]
    first, second = map(data_identity, views)
    assert first.training == second.training
    assert tokens_fingerprint(little_experiment(), first, "") != tokens_fingerprint(little_experiment(), second, "")


def folders(root: Path, shade: int) -> FolderSection:
    """Two black images to train on and two of this shade to validate."""
    for split, value in (("train", 0), ("validation", shade)):
        for label in "ab":
            (root / split / label).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (value,) * 3).save(root / split / label / "image.bmp")
    paths = {"train_path": str(root / "train"), "validation_path": str(root / "validation")}
    return FolderSection(kind="folder", image_size=8, num_classes=2, **paths)


def test_other_validation_images_change_the_tokens_alone(tmp_path: Path) -> None:
    """Files of the same names and sizes with other pixels."""
    before, after = (data_identity(folders(tmp_path, shade)) for shade in (1, 2))
    assert before.training == after.training
    experiment = little_experiment()
    assert tokens_fingerprint(experiment, before, "") != tokens_fingerprint(experiment, after, "")


def test_images_encoded_at_once_change_the_tokens_alone() -> None:
    """By rounding; training the tokenizer encodes nothing."""
    few, many = prints(), prints(tokenizer={"encode_batch_size": 64})
    assert few[0] == many[0]
    assert few[1] != many[1]


def test_training_and_validation_must_be_of_the_same_classes_and_apart(tmp_path: Path) -> None:
    data = folders(tmp_path, 1)
    with pytest.raises(DataError, match=r"validation_path: .*train is the training set's folder, too"):
        data_identity(data.model_copy(update={"validation_path": data.train_path}))
    (tmp_path / "validation" / "b").rename(tmp_path / "validation" / "c")
    with pytest.raises(DataError, match="differ in their class folders, such as b: labels would mean different"):
        data_identity(data)
    (tmp_path / "validation" / "c" / "image.bmp").rename(tmp_path / "validation" / "c" / "image.xyz")
    with pytest.raises(DataError, match="validation/c: no images; they end in one of"):
        data_identity(data)


def test_files_of_training_are_no_validation_files(tmp_path: Path) -> None:
    """A folder in Hugging Face's layout holds the files of all splits."""
    for split in ("train", "test"):
        table = pa.table({"image": [b""], "label": [0]}, pa.schema({"image": pa.binary(), "label": pa.int64()}))
        pq.write_table(table, tmp_path / f"{split}-0.parquet")
    paths = {"train_path": str(tmp_path / "train-*.parquet"), "validation_path": str(tmp_path)}
    data = ParquetSection(kind="parquet", image_size=8, num_classes=1, **paths)
    with pytest.raises(DataError, match=r"validation_path: .*train-0.parquet is among the training files, too"):
        data_identity(data)
    data_identity(data.model_copy(update={"validation_path": str(tmp_path / "test-*.parquet")}))


def test_missing_validation_images_show_before_anything_is_trained(tmp_path: Path) -> None:
    data = folders(tmp_path, 1).model_copy(update={"validation_images": 3})
    with pytest.raises(DataError, match="validation"):
        data_identity(data)


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"mlp_ratio": 2.0}},
        {"optim": {"lr": 1.0}},
        {"grid": {"depths": [5]}},
        {"runtime": {"workers": 3, "precision": "bfloat16"}},
        {"data": {"max_undecodable": 3}},
    ],
)
def test_what_does_not_change_tokens_changes_neither(sections: dict[str, Any]) -> None:
    assert prints(**sections) == prints()


def test_other_validation_images_are_other_tokens() -> None:
    ours, theirs = prints(), prints(data={"validation_images": 50})
    assert ours[0] == theirs[0]
    assert ours[1] != theirs[1]


def test_files_count_by_what_they_hold(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.pth", "b.pth", "c.pth")]
    for path, content in zip(paths, ("same", "same", "other"), strict=True):
        path.write_text(content)
    for settings in (
        [{"checkpoint": str(path)} for path in paths],
        [{"training": {"perceptual_weight": 1.0, "perceptual_weights_path": str(path)}} for path in paths],
    ):
        first, same, other = (prints(tokenizer=change) for change in settings)
        assert first == same
        assert not set(first) & set(other)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("tokenizer.checkpoint", {"checkpoint": "absent.pth"}),
        (
            "tokenizer.training.perceptual_weights_path",
            {"training": {"perceptual_weight": 1.0, "perceptual_weights_path": "absent.pth"}},
        ),
    ],
)
def test_files_that_are_not_there_are_named(key: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ExperimentError, match=f"{key}: absent.pth cannot be read: No such file"):
        prints(tokenizer=settings)


def test_a_study_is_held_to_its_numerics(tmp_path: Path) -> None:
    """To the first that was stored, where runs measure at the same time; a run may compute otherwise for itself."""
    files, auto = ExperimentFiles(tmp_path, "small"), little_experiment().runtime
    assert stored_numerics(files) is None
    assert store_numerics(files, auto, NUMERICS, {"float32, eager": 3.0, "bfloat16, eager": 4.0}) == NUMERICS
    assert stored_numerics(files) == NUMERICS
    assert json.loads(files.numerics.read_text())["estimated_sweep_seconds"]["bfloat16, eager"] == 4.0
    other = replace(NUMERICS, precision="bfloat16")
    assert store_numerics(files, auto, other, {}) == NUMERICS
    wanted = auto.model_copy(update={"precision": "bfloat16"})
    assert store_numerics(files, wanted, other, {}) == other
    assert stored_numerics(files) == NUMERICS
    assert store_numerics(files, wanted, other, {}, replacing=True) == stored_numerics(files) == other


@pytest.mark.parametrize(
    ("runtime", "expected"),
    [
        ({"precision": "float32", "compile": "off", "threads": 1}, True),
        ({"precision": "bfloat16"}, False),
        ({"compile": "on"}, False),
        ({"threads": 2}, False),
        ({"workers": 4, "log_every_steps": 1}, True),
    ],
)
def test_settings_may_contradict(runtime: dict[str, Any], expected: bool) -> None:
    assert agrees(NUMERICS, little_experiment(runtime=runtime).runtime) == expected


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"precision": "float32"}'])
def test_a_torn_record_is_measured_anew(tmp_path: Path, content: str) -> None:
    files = ExperimentFiles(tmp_path, "small")
    files.numerics.parent.mkdir(parents=True)
    files.numerics.write_text(content)
    assert stored_numerics(files) is None
    assert store_numerics(files, little_experiment().runtime, NUMERICS, {}) == stored_numerics(files) == NUMERICS


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system ties no process to processors")
def test_processors_are_those_that_the_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert processors() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert processors() == len(allowed)
