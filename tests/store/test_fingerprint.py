"""Fingerprints: of any settings, of tokenizers and of tokens."""

import io
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_training import little_experiment

from varscale.data.sources.folder.config import FolderSection
from varscale.data.sources.of_experiment import data_identity
from varscale.data.sources.parquet.config import ParquetSection
from varscale.errors import DataError, ExperimentError
from varscale.numerics.machine import processors
from varscale.store import fingerprint as fingerprints
from varscale.store.fingerprint import fingerprint, tokenizer_fingerprint, tokens_fingerprint

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
settings = st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), values, max_size=6)


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@given(settings)
def test_key_order_does_not_matter(given_settings: dict[str, Any]) -> None:
    assert fingerprint(**given_settings) == fingerprint(**reordered(given_settings))


@given(settings, st.from_regex(r"[A-Z]{1,4}", fullmatch=True), values)
def test_any_further_setting_matters(given_settings: dict[str, Any], key: str, value: Any) -> None:
    assert fingerprint(**given_settings) != fingerprint(**given_settings, **{key: value})


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_the_last_bit_matters(value: float) -> None:
    assert fingerprint(lr=value) != fingerprint(lr=math.nextafter(value, math.inf))


def test_a_fingerprint_is_the_same_in_another_process() -> None:
    code = "from varscale.store.fingerprint import fingerprint; print(fingerprint(lr=3e-4, depths=(2, 3), name='ä'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == fingerprint(name="ä", depths=[2, 3], lr=0.0003)
    assert len(other) == 16


def test_code_that_changes_numbers_changes_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(lr=1.0)
    monkeypatch.setattr(fingerprints, "NUMERICS_VERSION", fingerprints.NUMERICS_VERSION + 1)
    assert fingerprint(lr=1.0) != before


def prints(**sections: dict[str, Any]) -> tuple[str, str]:
    """Fingerprints of the tokenizer and of its tokens."""
    experiment = little_experiment(**sections)
    data = data_identity(experiment.data)
    tokenizer = tokenizer_fingerprint(experiment, data)
    return tokenizer, tokens_fingerprint(data, tokenizer)


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
    ],
)
def test_what_changes_the_tokenizer_changes_both(sections: dict[str, Any]) -> None:
    assert not set(prints(**sections)) & set(prints())


def test_latents_are_another_store_than_tokens() -> None:
    data = data_identity(little_experiment().data)
    assert tokens_fingerprint(data, "print") != tokens_fingerprint(data, "print", latents=True)
    assert tokens_fingerprint(data, "print") == tokens_fingerprint(data, "print", latents=False)


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
    assert tokens_fingerprint(first, "") != tokens_fingerprint(second, "")


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
    assert tokens_fingerprint(before, "") != tokens_fingerprint(after, "")


def test_training_and_validation_must_be_of_the_same_classes_and_apart(tmp_path: Path) -> None:
    data = folders(tmp_path, 1)
    with pytest.raises(DataError, match=r"validation_path: .*train is the training set's folder, too"):
        data_identity(data.model_copy(update={"validation_path": data.train_path}))
    (tmp_path / "validation" / "b").rename(tmp_path / "validation" / "c")
    with pytest.raises(DataError, match="differ in their class folders, such as b: labels would mean different"):
        data_identity(data)
    (tmp_path / "validation" / "c" / "image.bmp").rename(tmp_path / "validation" / "c" / "image.xyz")
    with pytest.raises(DataError, match="validation/c: no images, ending in one of"):
        data_identity(data)


def test_files_of_training_are_no_validation_files(tmp_path: Path) -> None:
    """A folder in Hugging Face's layout holds the files of all splits."""
    Image.new("RGB", (8, 8)).save(picture := io.BytesIO(), "png")
    for split in ("train", "test"):
        table = pa.table(
            {"image": [picture.getvalue()], "label": [0]}, pa.schema({"image": pa.binary(), "label": pa.int64()})
        )
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
        {"optim": {"precision": "bfloat16"}},
        {"runtime": {"workers": 3, "threads": 2, "tokenizer_threads": 2, "compile": "on"}},
        {"tokenizer": {"accept": True}},
        {"tokenizer": {"encode_batch_size": 64}},
        {"tokenizer": {"training": {"micro_batch": 4}}},
        {"evaluation": {"batch_size": 3}},
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


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system ties no process to processors")
def test_processors_are_those_that_the_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert processors() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert processors() == len(allowed)
