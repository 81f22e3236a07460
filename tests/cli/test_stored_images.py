"""A study of stored images, in folders and in Parquet files, through the command."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from command_calls import Call
from PIL import Image
from toy_sweep import results, toy_settings, varscale, write_toy

from varscale.tracking import runs_table

SIZES = {"train": 24, "validation": 8}
ONE_SIZE = {"depths": [2]}
TWO_VIEWS = {"views": 2, "resize_ratio": 1.5, "image_size": 8, "num_classes": 2, "validation_images": None}


def pictures(split: str) -> list[Image.Image]:
    random = np.random.default_rng(len(split))
    return [Image.fromarray(random.integers(0, 256, (12, 15, 3), dtype=np.uint8)) for _ in range(SIZES[split])]


def write_folders(folder: Path) -> dict[str, Any]:
    for split in SIZES:
        for number, picture in enumerate(pictures(split)):
            place = folder / split / f"class-{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            picture.save(place / f"{number:02}.png")
    return {"kind": "folder"}


def write_parquet(folder: Path) -> dict[str, Any]:
    for split in SIZES:
        (folder / split).mkdir(parents=True)
        content = []
        for picture in pictures(split):
            buffer = io.BytesIO()
            picture.save(buffer, "png")
            content.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"image": content, "label": [number % 2 for number in range(len(content))]})
        pq.write_table(table, folder / split / "0.parquet")
    return {"kind": "parquet"}


def write_study(folder: Path, data: dict[str, Any], **sections: Any) -> Path:
    """The toy study of these images; each of its runs sees them several times."""
    paths = {f"{split}_path": str(folder / "images" / split) for split in SIZES}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(toy_settings(grid=ONE_SIZE, **sections) | {"data": data | paths}))
    return path


def test_a_sweep_of_stored_images(call: Call, tmp_path: Path) -> None:
    """Each view is encoded once, by the first call alone, however often it is trained on; classes keep their names."""
    study = write_study(tmp_path, TWO_VIEWS | write_folders(tmp_path / "images"))
    process = varscale("sweep", study, cwd=tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "24 images in 2 classes of 12 each, 15 × 12 pixels each" in " ".join(process.stdout.split())
    rows = results(tmp_path / "runs")
    assert {row["unique_images"] for row in rows.values()} == {SIZES["train"]}
    assert {row["validation_images"] for row in rows.values()} == {SIZES["validation"]}
    for row in rows.values():
        assert row["epochs"] == row["images_seen"] / SIZES["train"]
    longest = max(rows, key=lambda name: rows[name]["images_seen"])
    assert rows[longest]["epochs"] > 4
    cell = tmp_path / "runs" / "cells" / longest
    drawn = call("sample", cell, "--labels", "class-1,none", "--count", "1", "--out", tmp_path / "a.png")
    assert (drawn.code, "classes: 1 (class-1), 2 (no class)" in drawn.error) == (0, True)
    refused = call("sample", cell, "--labels", "class-2", "--out", tmp_path / "b.png")
    assert "labels must lie in 0 … 1, whose names are class-0, class-1" in refused.error

    (encoding_log,) = tmp_path.glob("runs/tokens/*/run.log")
    encoding_log.unlink()
    shutil.rmtree(tmp_path / "runs" / "cells" / longest)
    again = varscale("sweep", study, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert results(tmp_path / "runs")[longest]["loss"] == rows[longest]["loss"]
    assert not encoding_log.exists()


def test_a_single_run_takes_whole_passes_and_its_depths_recipe(call: Call, tmp_path: Path) -> None:
    study = write_study(
        tmp_path,
        TWO_VIEWS | write_parquet(tmp_path / "images"),
        optim={"schedule": "linear", "epochs": 2.5},
        by_depth={3: {"optim.lr": 1e-3}},
    )
    for depth, rate in ((2, 5e-3), (3, 1e-3)):
        assert call("train", study, "--depth", str(depth)).code == 0
        (row,) = (row for row in results(tmp_path / "runs").values() if row["depth"] == depth)
        assert (row["images_seen"], row["epochs"], row["lr"]) == (60, 2.5, rate)
        assert row["warmup_images"] == 0.2 * 60
    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    assert sorted(runs_table(uri, "toy")["depth"]) == [2, 3], "recipes of one experiment for its depths are one recipe"
    assert call("train", study, "--depth", "3", "--set", "optim.lr=2e-3").code == 0
    assert {row["lr"] for row in results(tmp_path / "runs").values() if row["depth"] == 3} == {1e-3, 2e-3}
    tracked = runs_table(uri, "toy")
    assert (list(tracked["depth"]), tracked.attrs["others"]) == ([3], 2)


def test_passes_have_no_meaning_without_stored_images(call: Call, tmp_path: Path) -> None:
    result = call("train", write_toy(tmp_path, optim={"epochs": 2.0}), "--depth", "2")
    assert result.code == 1
    assert "name a --budget in FLOPs" in result.error
    assert not (tmp_path / "runs").exists()
