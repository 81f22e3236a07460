"""Whether images show what was asked for: their class, or what their captions say."""

from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from small_experiment import SMALL

from varscale.config.yaml import validate
from varscale.data.sources.of_experiment import validation_source
from varscale.data.sources.rings.source import RingsSource
from varscale.evaluation import agreement
from varscale.evaluation.agreement import RingsAgreement, class_agreement, retrieval
from varscale.store.layout import Store


@pytest.mark.parametrize("backgrounds", [0, 2])
def test_rings_are_counted_by_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backgrounds: int) -> None:
    """Real images agree with their own captions, background included, and hardly with others'; the counter is kept."""
    monkeypatch.setitem(agreement.COUNTER_TRAINING, "images", 3_200)
    section = {
        **SMALL["data"],
        "max_rings": 1,
        "num_classes": 1,
        "colours": 2,
        "backgrounds": backgrounds,
        "image_size": 16,
    }
    data = validate(
        {**SMALL, "data": section, "tokenizer": {**SMALL["tokenizer"], "patch_nums": [1, 2]}}, "a test"
    ).data
    source = validation_source(data)
    assert isinstance(source, RingsSource)
    images = torch.from_numpy(source.load_batch(range(64), [0] * 64)[0])
    figures = {}
    asked = {"own": {"image_N": torch.arange(64)}, "others": {"image_N": torch.arange(64).roll(1)}}
    asked |= {"one ring": {"label_N": torch.zeros(64)}, "two rings": {"label_N": torch.ones(64)}}
    for name, what in asked.items():
        judged = RingsAgreement(data, Store(tmp_path), **what)
        passed = torch.cat(list(judged.watched(iter(images.split(20)))))
        assert torch.equal(passed, images)
        figures[name] = judged.figures(real=iter(images.split(16)), black=iter([images * 0]))
        monkeypatch.setattr(agreement.RingsCounter, "_train", lambda *_: pytest.fail("trained again"))
    assert figures["own"]["text_agreement"] == figures["own"]["text_agreement_real"] > 0.95
    drawn = source.what_is_drawn(range(64))
    same = (drawn == np.roll(drawn, 1, 0)).all(1).mean()
    assert figures["others"]["text_agreement"] == pytest.approx(same, abs=0.05)  # by chance
    assert figures["others"]["text_agreement_black"] < 0.7
    assert figures["one ring"]["class_agreement"] == figures["own"]["class_agreement"] > 0.95
    assert figures["two rings"]["class_agreement"] < 0.05
    assert "text_agreement" not in figures["two rings"]  # nothing was said of colours


@pytest.mark.parametrize("common", [0.5, 0.9])
def test_classes_are_told_as_well_as_can_be(common: float) -> None:
    """Two normal classes a distance d apart, of any covariance: the best rule is right in Φ(d / 2) of images. One of
    them has most of the real images, and says no more for it."""
    random = np.random.default_rng(0)
    mixing_FF = torch.from_numpy(random.normal(size=(20, 20))).float()
    apart_F = torch.zeros(20)
    apart_F[0] = 2.0

    def features(label_N: torch.Tensor) -> torch.Tensor:
        noise_NF = torch.from_numpy(random.normal(size=(len(label_N), 20))).float()
        return (noise_NF + label_N[:, None] * apart_F) @ mixing_FF

    real_N = torch.from_numpy(random.random(8000) > common).long()
    asked_N = torch.arange(8000) % 2
    real = features(real_N), real_N
    share = class_agreement(features(asked_N), asked_N, real)
    assert share == pytest.approx(NormalDist().cdf(1.0), abs=0.015)
    always_the_first = class_agreement(features(torch.zeros(8000)), asked_N, real)
    assert always_the_first == pytest.approx(0.5, abs=0.02)


def test_classes_are_told_by_fewer_images_than_features() -> None:
    """As in small sets of one's own pictures, whose covariance is singular; and chance where nothing tells classes."""
    random = np.random.default_rng(0)
    means_CF = 2 * torch.from_numpy(random.normal(size=(4, 300))).float()
    real_N, asked_N = torch.arange(100) % 4, torch.arange(400) % 4

    def features(label_N: torch.Tensor, noise: float) -> torch.Tensor:
        return means_CF[label_N] + noise * torch.from_numpy(random.normal(size=(len(label_N), 300))).float()

    real = features(real_N, 6.0), real_N
    assert (class_agreement(features(asked_N, 6.0), asked_N, real) or 0) > 0.85
    assert class_agreement(features(asked_N, 1e4), asked_N, real) == pytest.approx(0.25, abs=0.1)


def test_a_class_of_few_real_images_is_not_judged() -> None:
    """Nor does it keep the others from being judged."""
    real_N = torch.tensor([0] * 10 + [1] * 10 + [2] * 9)
    real = torch.nn.functional.one_hot(real_N, 3).float() + 0.01 * torch.randn(29, 3), real_N
    for asked, expected in (([0, 1, 1], 1.0), ([0, 1, 2], None), ([0, 3], None)):
        features_NF = torch.nn.functional.one_hot(torch.tensor(asked).clamp(max=2), 3).float()
        assert class_agreement(features_NF, torch.tensor(asked), real) == expected
    of_one_class = real[0][:10], real[1][:10]
    assert class_agreement(real[0][:5], real_N[:5], of_one_class) is None  # it is the only answer


def test_retrieval_finds_captions_by_features() -> None:
    """Features that tell captions linearly, with noise; and features that tell nothing, which is chance."""
    random = np.random.default_rng(0)

    def rows(*shape: int) -> Any:
        return torch.from_numpy(random.normal(size=shape)).float()

    mixing_DF = rows(16, 40)
    embeddings_MD = torch.nn.functional.normalize(rows(150, 16))
    real_ND, drawn_ND = embeddings_MD[:100].repeat(5, 1), embeddings_MD[50:].repeat(4, 1)
    real = real_ND @ mixing_DF + 0.1 * rows(500, 40), real_ND
    told = retrieval(drawn_ND @ mixing_DF + 0.1 * rows(400, 40), drawn_ND, real, choices=100)
    assert told["text_retrieval"] > 0.9
    assert told["text_retrieval_chance"] == 0.01
    nothing = retrieval(rows(400, 40), drawn_ND, real, choices=100)
    assert nothing["text_retrieval"] < 0.05
    assert retrieval(rows(4, 40), drawn_ND[:4], real) == {}  # fewer captions than there are to choose from


def test_retrieval_is_as_sure_as_real_pairs_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many features as images, and much noise: of all strengths the one that serves images that it never saw."""
    random = np.random.default_rng(0)
    embeddings_ND = torch.nn.functional.normalize(torch.from_numpy(random.normal(size=(900, 16))))
    signal_NF = embeddings_ND.numpy() @ random.normal(size=(16, 500))
    features_NF = torch.from_numpy(signal_NF + 5 * random.normal(size=(900, 500)))
    pairs, others = (features_NF[:500], embeddings_ND[:500]), (features_NF[500:], embeddings_ND[500:])
    found = retrieval(*others, pairs)["text_retrieval"]
    shares = []
    for strength in agreement.RIDGES:
        with monkeypatch.context() as context:
            context.setattr(agreement, "RIDGES", np.array([strength]))
            shares.append(retrieval(*others, pairs)["text_retrieval"])
    assert min(shares) < 0.6 * max(shares)
    assert found > 0.9 * max(shares)
