"""`edit` and `reconstruct` through the command: files in, files out, and one line for what is wrong."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from command_calls import Call
from PIL import Image
from small_models import make_tokenizer, make_var

from varscale.families.raster.config import RasterConfig
from varscale.families.raster.family import RasterTransformer
from varscale.families.storage import save_model
from varscale.tokenizer.storage import save_tokenizer

SIDE = 8
TOKENIZER = Path("runs/tokenizers/rings-print/weights.safetensors")
SHOWN = 96
"""Pixels a side of an image in a picture of several, with 4 between them."""


@pytest.fixture
def model(call: Call) -> list[str | Path]:
    """An untrained model's file and its tokenizer's, as arguments, and pictures beside them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        var = make_var((1, 2, 4), num_classes=2, head_init=1.0)
    save_model(Path("model.safetensors"), var, "print")
    TOKENIZER.parent.mkdir(parents=True)
    save_tokenizer(TOKENIZER, make_tokenizer((1, 2, 4)), "print")
    pixels = np.random.default_rng(0).integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("source.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(mask).save("left.png")
    Image.fromarray(mask // 255).save("of-ones.png")
    Image.new("L", (SIDE, SIDE)).save("black.png")
    Image.fromarray(np.stack([np.full_like(mask, 255), mask], axis=-1)).save("painted.png")  # white on transparent
    Image.fromarray(mask).crop((0, 0, 5, 5)).save("small.png")
    Image.new("RGB", (20, 10)).save("large.png")
    return ["model.safetensors", "--tokenizer", TOKENIZER]


def pixels(name: str) -> np.ndarray:
    return np.asarray(Image.open(name))


def test_edit(call: Call, model: list[str | Path]) -> None:
    options = ("--label", "1", "--count", "2", "--seed", "3")
    result = call("edit", *model, "source.png", "--mask", "left.png", *options, "--show-scales", "--out", "new/a.png")
    assert (result.code, result.error) == (0, "")
    lines = result.output.splitlines()
    assert lines[-1] == "new/a.png"
    assert "edited and reconstruction" in lines[0]
    with Path("new/a-psnr.csv").open() as file:
        bands = list(csv.DictReader(file))
    assert [(row["nearest"], row["farthest"], row["pixels"]) for row in bands] == [
        ("0", "0", "32"),
        ("1", "2", "16"),
        ("3", "4", "16"),
    ]
    assert len(lines) == 2 + len(bands)
    assert pixels("new/a.png").shape == (4 + SHOWN + 4, 4 + 5 * (SHOWN + 4), 3)
    assert pixels("new/a-scales.png").shape == (4 + 3 * (SHOWN + 4), 4 + 3 * (SHOWN + 4), 3)
    assert not np.array_equal(pixels("new/a-0.png"), pixels("new/a-1.png"))
    assert np.array_equal(pixels("new/a.png")[4:100:12, 4:100:12], pixels("source.png"))

    call("edit", *model, "source.png", "--box", "0,0,4,8", *options, "--out", "b.png")
    call("edit", *model, "source.png", "--box", "4,0,8,8", "--outside", *options, "--out", "c.png")
    call("edit", *model, "source.png", "--mask", "of-ones.png", *options, "--out", "d.png")
    call("edit", *model, "source.png", "--mask", "painted.png", *options, "--out", "f.png")
    assert all(Path("new/a-1.png").read_bytes() == Path(f"{name}-1.png").read_bytes() for name in "bcdf")
    call("edit", *model, "source.png", "--mask", "left.png", "--composite", *options, "--out", "e.png")
    assert np.array_equal(pixels("e-0.png")[:, 4:], pixels("source.png")[:, 4:])
    assert np.array_equal(pixels("e-0.png")[:, :4], pixels("new/a-0.png")[:, :4])


def test_all_of_a_picture_drawn_anew_is_a_sample(call: Call, model: list[str | Path]) -> None:
    call("edit", *model, "source.png", "--box", "0,0,8,8", "--label", "1", "--seed", "3", "--out", "edit.png")
    call("sample", *model, "--labels", "1", "--count", "4", "--seed", "3", "--out", "sampled.png")
    assert np.array_equal(pixels("edit.png")[:, 3 * (SHOWN + 4) :], pixels("sampled.png"))
    call("sample", *model, "--labels", "1", "--count", "4", "--seed", "3", "--show-scales", "--out", "scales.png")
    last = pixels("scales.png")[:, 2 * (SHOWN + 4) + 4 :]
    for number in range(4):
        row, column = (slice(4 + n * (SHOWN + 4), 4 + n * (SHOWN + 4) + SHOWN) for n in (number, number))
        assert np.array_equal(last[row, :SHOWN], pixels("sampled.png")[4 : 4 + SHOWN, column])


def test_reconstruct(call: Call, model: list[str | Path]) -> None:
    outputs = []
    for place in (TOKENIZER, TOKENIZER.parent):
        result = call("reconstruct", place, "source.png", "source.png", "--out", "a.png")
        assert result.code == 0, result.error
        outputs.append((result.output, Path("a.png").read_bytes()))
    assert outputs[0] == outputs[1]
    assert outputs[0][0].splitlines()[0].startswith("source.png: PSNR ")
    assert pixels("a.png").shape == (4 + 2 * (SHOWN + 4), 4 + 2 * (SHOWN + 4), 3)
    assert call("reconstruct", TOKENIZER, "source.png", "--show-scales").output.endswith("reconstructions.png\n")
    assert pixels("reconstructions.png").shape == (4 + SHOWN + 4, 4 + 4 * (SHOWN + 4), 3)


MISTAKES = {
    "say by --mask FILE or by --box": ["source.png"],
    "what is drawn anew (one of both)": ["source.png", "--mask", "left.png", "--box", "0,0,4,4"],
    "small.png: 5 × 5 pixels, where 8 × 8 are needed": ["source.png", "--mask", "small.png"],
    "black.png: an empty mask: it has no white": ["source.png", "--mask", "black.png"],
    "--box 0,0,8,8: an empty mask: all of it is kept": ["source.png", "--box", "0,0,8,8", "--outside"],
    "covers less than half of every token": ["source.png", "--box", "1,1,2,2"],
    "--box 0,0,9,8: expected left,top,right,bottom": ["source.png", "--box", "0,0,9,8"],
    "--box 4,0,4,8: expected left,top,right,bottom": ["source.png", "--box", "4,0,4,8"],
    "--box 0,0,8: expected left,top,right,bottom": ["source.png", "--box", "0,0,8"],
    "large.png: 20 × 10 pixels, where 8 × 8 are needed": ["large.png", "--box", "0,0,4,4"],
    "gone.png: no such file": ["gone.png", "--box", "0,0,4,4"],
    "pipe.png: not a file": ["pipe.png", "--box", "0,0,4,4"],
    "page.png: not a picture that can be read (a page of the web": ["page.png", "--box", "0,0,4,4"],
    "text.png: not a picture that can be read": ["text.png", "--box", "0,0,4,4"],
    "--label 3: no such class; expected none (no class)": ["source.png", "--box", "0,0,4,4", "--label", "3"],
    "--label cat: no such class": ["source.png", "--box", "0,0,4,4", "--label", "cat"],
    "--label 0,1: expected one class": ["source.png", "--box", "0,0,4,4", "--label", "0,1"],
    "--source-scales 3: the model has 3 scales": ["source.png", "--box", "0,0,4,4", "--source-scales", "3"],
    "--out a.jpg: expected a name that ends in .png": ["source.png", "--box", "0,0,4,4", "--out", "a.jpg"],
    "--smooth: its mixed codes": ["source.png", "--box", "0,0,4,4", "--smooth", "--show-scales"],
    "guidance (cfg) must be finite": ["source.png", "--box", "0,0,4,4", "--guidance", "-1"],
}


def test_a_file_of_others_is_sent_to_import_official(call: Call, model: list[str | Path]) -> None:
    for verb in (["sample"], ["edit", "--box", "0,0,4,4"]):
        picture = ["source.png"] if verb[0] == "edit" else []
        refused = call(verb[0], "source.png", *picture, *verb[1:])
        assert refused.error.startswith("varscale: source.png: no .safetensors file; `varscale import-official`")


def test_mistakes_are_named_before_anything_is_loaded(
    call: Call, model: list[str | Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varscale.generation.from_files.load_model", None)
    monkeypatch.setattr("varscale.generation.edited_files.load_tokenizer", None)
    Path("text.png").write_text("no picture")
    Path("page.png").write_text("<!doctype html>")
    os.mkfifo("pipe.png")
    for message, arguments in MISTAKES.items():
        result = call("edit", *model, *arguments)
        (line,) = result.error.splitlines()
        assert result.code == 1, message
        assert message in line
    assert "large.png: 20 × 10 pixels" in call("reconstruct", TOKENIZER, "large.png").error
    assert not Path("edit.png").exists()
    sizes = {"vocab_size": 32, "latent_channels": 4, "num_classes": 2, "depth": 1, "width": 8, "heads": 1}
    save_model(Path("raster.safetensors"), RasterTransformer(RasterConfig(patch_nums=(4,), **sizes)), "print")
    refused = call("edit", "raster.safetensors", *model[1:], "source.png", "--mask", "left.png")
    assert refused.error == "varscale: raster.safetensors: models of family raster can't edit images"
    many = call("sample", *model, "--count", "3", "--show-scales", "--out", "many.npz")
    assert many.error.endswith("--show-scales: only for one picture, a .png")


def test_inspect_attention(call: Call, model: list[str | Path]) -> None:
    result = call("inspect", "attention", *model, "--count", "3", "--out", "map.png")
    assert result.code == 0, result.error
    changed, seen, out = result.output.splitlines()
    assert changed.startswith("with a scale's tokens replaced")
    assert seen == "no scale sees a later one, nor its own tokens: each of the 3 is predicted in one pass"
    assert out == "map.png"
    assert pixels("map.png").shape[1] == 1020
    with Path("map.csv").open() as file:
        shares = list(csv.DictReader(file))
    assert len(shares) == 2 * 2 * 3 * 3
    assert list(shares[0]) == ["layer", "head", "scale", "to_scale", "share"]
    assert all(float(row["share"]) == 0 for row in shares if row["to_scale"] > row["scale"])
    assert call("inspect", "attention", *model, "--out", "map.svg").code == 0
    assert Path("map.svg").read_text().startswith("<?xml")
    refused = call("inspect", "attention", *model, "--out", "map.jpg")
    assert refused.error == "varscale: --out map.jpg: expected a name that ends in .png or .svg"
