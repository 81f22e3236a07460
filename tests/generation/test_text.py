"""A cell that is told captions, from the token store to pictures of texts."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_training import cell_of_steps, files_of, ignore, little_experiment, make_inputs
from typer.testing import CliRunner

from varscale.cli.app import app
from varscale.data.captions import open_encoder
from varscale.data.loading import EvaluationBatches, StepBatches
from varscale.data.sources.rings.source import RingsSource
from varscale.data.tokens.captions import FILE, StoredCaptions, write_captions
from varscale.data.tokens.store import TokenStore
from varscale.errors import DataError, ExperimentError, TokenStoreError
from varscale.evaluation import subjects
from varscale.evaluation.agreement import retrieval
from varscale.evaluation.extractors import Extractor
from varscale.evaluation.plan import FidelityPlan, as_stored
from varscale.evaluation.subjects import CEILING_IMAGES, Evaluated, evaluate
from varscale.families.base import SamplingOptions
from varscale.generation.from_files import Drawable, draw
from varscale.generation.sampling import sample
from varscale.store.layout import RunFiles, Store
from varscale.store.records import read_result
from varscale.tokenizer.storage import load_tokenizer
from varscale.training.runs import Inputs, train_cell

TOLD: dict[str, Any] = {"data": {"captions": {"width": 64}}, "model": {"condition": "text"}}


def told_inputs(folder: Path) -> Inputs:
    """Those of a study whose token stores have captions."""
    inputs, settings = make_inputs(folder), little_experiment(**TOLD).data.captions
    assert settings is not None
    write_captions(inputs.tokens.train, RingsSource(400, 8, "train"), settings)
    write_captions(inputs.tokens.validation, RingsSource(40, 8, "validation"), settings)
    return inputs


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFiles]:
    """A cell of two steps that is told captions, and one that is told classes."""
    folder, found = tmp_path_factory.mktemp("told") / "runs", {}
    inputs = told_inputs(folder)
    for name, changes in {"text": TOLD, "class": {}}.items():
        changes = {**changes, "evaluation": {"samples_per_class": 1, "sample_classes": 5}}
        cell = cell_of_steps(little_experiment(**changes), 2)
        found[name] = files_of(cell, inputs, folder)
        train_cell(cell, None, found[name], inputs, ignore)
    return found


def test_batches_have_the_captions_of_their_images(tmp_path: Path) -> None:
    inputs = told_inputs(tmp_path)
    store, source = TokenStore.open(inputs.tokens.train), RingsSource(400, 8, "train")
    settings = little_experiment(**TOLD).data.captions
    assert settings is not None
    expected_ND = torch.from_numpy(open_encoder(settings).embed(source.captions()))
    evaluated = torch.cat([batch["text_BD"] for batch in EvaluationBatches(store, batch_size=64)])
    assert torch.equal(evaluated, expected_ND)
    step = StepBatches(store, seed=3, batch_size=8, start_step=0, num_steps=60).batch(55)  # the second epoch
    pixels = {image.tobytes(): index for index, image in enumerate(store.tokens(range(400)).tokens_BL.numpy())}
    places = [pixels[tokens.tobytes()] for tokens in step["tokens_BL"].numpy()]
    near_B = (step["text_BD"] == expected_ND[places]).all(1)
    assert near_B.sum() >= 6  # few of 400 images have the same tokens as another
    captions = store.captions
    assert captions is not None
    assert len(set(captions.texts)) == len(captions.texts) < 40
    assert captions.texts_of(torch.arange(400)) == source.captions()


def test_captions_grow_with_a_store_and_are_made_anew_when_damaged(tmp_path: Path) -> None:
    settings = little_experiment(**TOLD).data.captions
    assert settings is not None
    write_captions(tmp_path, RingsSource(20, 8), settings)
    first = StoredCaptions.read(tmp_path)
    write_captions(tmp_path, RingsSource(50, 8), settings)
    grown = StoredCaptions.read(tmp_path)
    assert first is not None
    assert grown is not None
    assert torch.equal(grown.of_images(torch.arange(20)), first.of_images(torch.arange(20)))
    write_captions(tmp_path, RingsSource(20, 8), settings)  # never shrinks
    assert len(StoredCaptions.read_required(tmp_path).index_N) == 50
    embeddings_UD = grown.embeddings_UD.clone()  # what was read is mapped from the file
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-9])
    with pytest.raises(TokenStoreError, match=r"captions\.safetensors: .*; encode the store again"):
        StoredCaptions.read(tmp_path)
    write_captions(tmp_path, RingsSource(50, 8), settings)
    assert torch.equal(StoredCaptions.read_required(tmp_path).embeddings_UD, embeddings_UD)
    with pytest.raises(TokenStoreError, match="no captions; encode the store again"):
        StoredCaptions.read_required(tmp_path / "none")


def test_text_decides_what_is_drawn(cells: dict[str, RunFiles], tmp_path: Path) -> None:
    run = cells["text"]
    result = read_result(run)
    assert result is not None
    assert result.captions is not None
    assert result.captions.shown == tuple(dict.fromkeys(RingsSource(40, 8, "validation").captions()))[:5]
    drawable = Drawable.load(run.folder)
    told_BD = drawable.embedded(["one red ring", "none"])
    assert not told_BD[1].any()
    draw(drawable, told_BD, 2, SamplingOptions(seed=7), tmp_path / "a.png")
    images = [sample(drawable.model, drawable.tokenizer, told_BD[[place]], seed=7).images for place in (0, 1)]
    assert not torch.equal(*images)
    assert (tmp_path / "a.png").exists()


def test_a_text_decides_what_is_drawn_into_a_picture(cells: dict[str, RunFiles], tmp_path: Path) -> None:
    """With everything masked it is what `sample` draws for that text, and none is another picture."""
    drawable = Drawable.load(cells["text"].folder)
    side = drawable.tokenizer.image_size
    Image.new("RGB", (side, side)).save(tmp_path / "source.png")
    pictures = {}
    for text in ("two red rings", "none", None):
        out = tmp_path / f"{text}.png"
        command = ["edit", str(cells["text"].folder), str(tmp_path / "source.png"), "--box", f"0,0,{side},{side}"]
        command += ["--text", text] if text is not None else []
        told = CliRunner().invoke(app, [*command, "--count", "1", "--seed", "7", "--guidance", "99", "--out", str(out)])
        assert told.exit_code == 0, told.output
        pictures[text] = np.array(Image.open(out.with_name(f"{text}-0.png")))
    assert np.array_equal(pictures[None], pictures["none"])
    assert not np.array_equal(pictures[None], pictures["two red rings"])
    drawn = sample(drawable.model, drawable.tokenizer, drawable.embedded(["two red rings"]), 99, seed=7).images
    assert np.array_equal(pictures["two red rings"], (drawn[0] * 255).round().byte().permute(1, 2, 0).numpy())


def test_many_images_say_what_they_were_drawn_for(cells: dict[str, RunFiles], tmp_path: Path) -> None:
    texts = ["two red rings, on green", "one blue ring"]
    options = [part for text in texts for part in ("--text", text)]
    for out in ("many", "a.npz", "a.parquet"):
        command = ["sample", str(cells["text"].folder), *options, "--count", "3", "--out", str(tmp_path / out)]
        told = CliRunner().invoke(app, command)
        assert told.exit_code == 0, told.output
    wanted = [texts[0], texts[1], texts[0]]
    with (tmp_path / "many" / "labels.csv").open() as file:
        assert [row["caption"] for row in csv.DictReader(file)] == wanted
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["arr_1"].tolist() == wanted
    assert pq.read_table(tmp_path / "a.parquet").column("caption").to_pylist() == wanted


def test_retrieval_is_beside_what_real_images_and_reconstructions_reach(
    cells: dict[str, RunFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the tokenizer's share no model on it can be: here an untrained one, and pixels as features."""
    data = {"captions": {"width": 64}, "max_rings": 3, "backgrounds": 5, "validation_images": 300}
    fidelity = {"samples": 256, "reference_images": 400}
    told = little_experiment(data=data, model=TOLD["model"], evaluation={"fidelity": fidelity})
    plan, settings, store = FidelityPlan.of(told), told.data.captions, Store(tmp_path)
    assert plan is not None
    assert settings is not None
    inputs = make_inputs(tmp_path)
    reference, held_out = (
        as_stored(told.data).open(split, count) for split, count in (("train", 400), ("validation", 300))
    )
    write_captions(inputs.tokens.train, reference, settings)
    write_captions(inputs.tokens.validation, held_out, settings)
    pixels = Extractor(plan.extractor, lambda images_b3ss: (images_b3ss.flatten(1).float() / 255, None))
    monkeypatch.setattr(subjects, "open_extractor", lambda *_: pixels)
    what = Evaluated("cell", "a cell", told.data, inputs.tokenizer, cells["text"], captions=inputs.tokens)
    files = store.run(plan.key("cell", cells["text"]))
    evaluate(plan, what, files, store, ignore)
    result = read_result(files)
    assert result is not None

    tokenizer = load_tokenizer(inputs.tokenizer.weights, inputs.tokenizer.fingerprint)
    images_N3ss = torch.from_numpy(held_out.load_batch(range(CEILING_IMAGES), [0] * CEILING_IMAGES)[0])
    with torch.no_grad():
        decoded_N3ss = tokenizer.decode(tokenizer.encode(images_N3ss / 127.5 - 1))
    shown = {"real": images_N3ss, "reconstructed": ((decoded_N3ss + 1) * 127.5).round().to(torch.uint8)}
    encoder = open_encoder(settings)
    asked_ND = torch.from_numpy(encoder.embed(held_out.captions()[:CEILING_IMAGES]))
    seen_NF = pixels.features([torch.from_numpy(reference.load_batch(range(400), [0] * 400)[0])]).features_ND
    pairs = seen_NF, torch.from_numpy(encoder.embed(reference.captions()[:400]))
    for name, images in shown.items():
        share = retrieval(pixels.features([images]).features_ND, asked_ND, pairs)["text_retrieval"]
        assert result.row[f"text_retrieval_{name}"] == pytest.approx(share, abs=0.005)
    assert result.row["text_retrieval_real"] > 5 * result.row["text_retrieval_chance"]
    assert result.row["text_retrieval_reconstructed"] < result.row["text_retrieval_real"] / 2


def test_mistakes(cells: dict[str, RunFiles], tmp_path: Path) -> None:
    text, classes = Drawable.load(cells["text"].folder), Drawable.load(cells["class"].folder)
    with pytest.raises(ExperimentError, match="was told classes, not captions; name classes by --labels"):
        classes.embedded(["a"])
    with pytest.raises(DataError, match=r"--text: an empty text"):
        text.embedded(["a", " "])
    for arguments, message in {
        ("text", "sample", "--labels", "0"): "was told captions, not classes; say by --text what to draw",
        ("class", "sample", "--text", "a"): "was told classes, not captions; name classes by --labels",
        ("text", "sample", "--candidates", "4"): "--candidates: classifiers choose by class",
        ("text", "edit", "--label", "0"): "was told captions, not classes; say by --text what to draw",
        ("class", "edit", "--text", "a"): "was told classes, not captions; name a class by --label",
    }.items():
        name, verb, *options = arguments
        picture = ["never-read.png", "--box", "0,0,4,4"] if verb == "edit" else []
        command = [verb, str(cells[name].folder), *picture, *options, "--out", str(tmp_path / "a.png")]
        error = CliRunner().invoke(app, command).exception
        assert isinstance(error, ExperimentError)
        assert message in str(error)
