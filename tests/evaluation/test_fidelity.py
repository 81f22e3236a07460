"""From images to FID and its like: torch-fidelity's own reference value, what must be ordered, and bad input."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from requirements import shared_path
from small_experiment import SMALL
from torch import Tensor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from varscale.config import Experiment
from varscale.config.section import FeatureExtractor, FidelityConfig
from varscale.config.yaml import validate
from varscale.data.sources.parquet.source import ParquetSource
from varscale.data.transforms import Crop
from varscale.errors import CheckpointError, DataError, ExperimentError
from varscale.evaluation.distances import frechet
from varscale.evaluation.extractors import Extractor, FeatureSet, open_extractor
from varscale.evaluation.fidelity import fid, inception_score, measure
from varscale.evaluation.plan import RINGS_TRAINING, FidelityPlan
from varscale.numerics.machine import processors
from varscale.store.layout import Store


def experiment(**fidelity: object) -> Experiment:
    return validate({**SMALL, "evaluation": {"fidelity": {"samples": 300, **fidelity}}}, "a test")


def plan_of(settings: Experiment) -> FidelityPlan:
    plan = FidelityPlan.of(settings)
    assert plan is not None
    return plan


def batches(images: Tensor) -> Iterator[Tensor]:
    return iter(images.split(100))


@pytest.fixture(scope="module")
def rings(tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    """The classifier of rings, trained."""
    settings = experiment()
    return open_extractor(plan_of(settings), settings.data, Store(tmp_path_factory.mktemp("runs")))


def ring_images(count: int, split: str = "validation") -> Tensor:
    source = experiment().data.open(split, count)
    return torch.from_numpy(source.load_batch(range(count), [0] * count)[0])


def noise(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)


# CIFAR-10 with Inception


def cifar(split: str, count: int) -> Iterator[Tensor]:
    """The first `count` of the 5,000 images that torch-fidelity's regression test chooses."""
    source = ParquetSource(
        shared_path(f"data/cifar10/{split}.parquet"), Crop(32, 1.0, False), image_column="img", num_classes=10
    )
    chosen = np.sort(np.random.RandomState(2020).choice(len(source), 5000, replace=False))[:count]
    for indices in np.array_split(chosen, count // 50):
        yield torch.from_numpy(source.load_batch(indices, [0] * len(indices))[0])


@pytest.fixture(scope="module")
def inception() -> Extractor:
    weights = str(shared_path("assets/inception_fid_2048.pth"))
    settings = FidelityConfig(extractor="inception-v3-compat", weights=weights)
    return open_extractor(FidelityPlan(settings, "inception-v3-compat:test", "", ""), experiment().data, Store())


def cifar_features(extractor: Extractor, count: int) -> tuple[FeatureSet, FeatureSet]:
    return extractor.features(cifar("train", count)), extractor.features(cifar("test", count))


@pytest.mark.timeout(1200)
def test_fid_of_500_images_of_cifar10(inception: Extractor) -> None:
    train, test = cifar_features(inception, 500)
    assert fid(train, test) == pytest.approx(75.8789, abs=1e-2)
    ours = frechet(train.features_ND, test.features_ND)(torch.arange(500))
    assert ours == pytest.approx(75.8789, abs=1e-2)
    with pytest.raises(CheckpointError, match="has no classifier"):  # the weights' `fc` head is zeros
        inception_score(train)


@pytest.mark.fid
@pytest.mark.timeout(3600)
def test_fid_of_5000_images_of_cifar10(inception: Extractor) -> None:
    torch.set_num_threads(processors())  # it runs alone; all others share the machine
    train, test = cifar_features(inception, 5000)
    assert fid(train, test) == pytest.approx(10.3233274, abs=1e-4)


# rings with their classifier


def test_distances_are_ordered(rings: Extractor) -> None:
    """Real against real is nearest, then real images with noise among them, then noise."""
    real = ring_images(1200)
    reference = rings.features(batches(real[:600]))
    mixed = real[600:].clone()
    mixed[:60] = noise(60)
    figures = [
        measure(rings.features(batches(images)), reference, draws=10) for images in (real[600:], mixed, noise(600))
    ]
    for name in ("fid", "mind", "kid", "fid_extrapolated"):
        half, some, nothing = (figure[name] for figure in figures)
        assert half < some < nothing, name
    for name in ("image_precision", "image_recall"):
        assert figures[0][name] > 0.8 > 0.2 > figures[2][name], name
    for figure in figures:
        for name in ("fid", "mind", "kid", "image_precision", "image_recall", "inception_score"):
            assert figure[f"{name}_low"] <= figure[name] <= figure[f"{name}_high"]
    assert figures[0]["fid_high"] < figures[1]["fid_low"], "the intervals tell them apart"


def test_every_feature_counts(rings: Extractor) -> None:
    """Of images not trained on, too, no direction of the features has much more variance than another.

    As they come out of the network, one direction has nine tenths of it, and FID looked at that one alone.
    """
    features_ND = rings.features(batches(ring_images(2000))).features_ND.double().numpy()
    assert features_ND.shape == (2000, RINGS_TRAINING["features"])
    assert np.abs(features_ND.mean(0)).max() < 0.15
    variances = np.linalg.eigvalsh(np.cov(features_ND.T))
    assert 0.5 < variances.min() <= variances.max() < 1.5


def test_inception_score_does_not_depend_on_the_order(rings: Extractor) -> None:
    """Sorted by class, splits of one class each would have a score of 1."""
    source = experiment().data.open("validation", 900)
    pixels, labels = source.load_batch(range(900), [0] * 900)
    images = torch.from_numpy(pixels)
    by_class = images[torch.from_numpy(np.argsort(labels, kind="stable"))]
    shuffled, ordered = (inception_score(rings.features(batches(each))) for each in (images, by_class))
    assert ordered == pytest.approx(shuffled, rel=0.02)
    assert 2 < ordered <= 3


def test_the_classifier_is_trained_once_and_is_the_same_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RINGS_TRAINING, "images", 640)
    settings, images = experiment(), ring_images(8)
    here, elsewhere = (open_extractor(plan_of(settings), settings.data, Store(tmp_path / name)) for name in "ab")
    (weights,) = (tmp_path / "a").glob("evaluations/rings-classifier-*/weights.safetensors")
    before = weights.stat().st_mtime_ns
    again = open_extractor(plan_of(settings), settings.data, Store(tmp_path / "a"))
    assert weights.stat().st_mtime_ns == before
    features = [each.features([images]).features_ND for each in (here, elsewhere, again)]
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])
    weights.write_bytes(weights.read_bytes()[:1000])  # damaged: trained anew
    mended = open_extractor(plan_of(settings), settings.data, Store(tmp_path / "a"))
    assert torch.equal(mended.features([images]).features_ND, features[0])


# bad input


def test_no_images_and_ten_images(rings: Extractor) -> None:
    with pytest.raises(DataError, match="there are none"):
        rings.features([])
    reference = rings.features(batches(ring_images(200)))
    few = rings.features([ring_images(10)])
    with pytest.raises(DataError, match=r"10 are too few .* expected 100 or more"):
        measure(few, reference, draws=2)
    with pytest.raises(DataError, match="reference: 10 are too few"):
        measure(reference, few, draws=2)
    with pytest.raises(ExperimentError, match=r"evaluation\.fidelity\.samples.*greater than or equal to 100"):
        experiment(samples=10)


def test_sets_that_do_not_compare(rings: Extractor) -> None:
    reference = rings.features(batches(ring_images(200)))
    features = reference.features_ND
    with pytest.raises(DataError, match="sides of 32 pixels, those measured 24"):
        measure(FeatureSet(features, reference.extractor, 24), reference, draws=2)
    with pytest.raises(DataError, match="those measured other:1's"):
        measure(FeatureSet(features, "other:1", 32), reference, draws=2)
    with pytest.raises(DataError, match="not finite"):
        measure(FeatureSet(features / 0, reference.extractor, 32), reference, draws=2)


def test_images_of_the_wrong_kind(rings: Extractor) -> None:
    with pytest.raises(DataError, match="expected uint8"):
        rings.features([ring_images(4).float()])
    with pytest.raises(DataError, match="expected uint8"):
        rings.features([ring_images(4)[:, :1]])
    with pytest.raises(DataError, match=r"sides of \[16, 32\]"):
        rings.features([ring_images(4), ring_images(4)[..., :16, :16]])


def test_weights_that_cannot_be_used(tmp_path: Path) -> None:
    """Missing, half a file, another network's, and a file that would run code: one line each, before any training."""
    settings = experiment(extractor="inception-v3-compat", weights=str(tmp_path / "absent.pth"))
    with pytest.raises(CheckpointError, match=r"absent\.pth: No such file.*weights-inception-2015-12-05.*6726825d"):
        FidelityPlan.of(settings)
    with pytest.raises(CheckpointError, match="takes no file for dinov2-vit-s-14"):
        FidelityPlan.of(experiment(extractor="dinov2-vit-s-14", weights=str(tmp_path / "absent.pth")))
    whole, half, code, torn = (tmp_path / name for name in ("whole.pth", "half.pth", "code.pth", "torn.safetensors"))
    torch.save({"weight": torch.zeros(1000)}, whole)
    half.write_bytes(whole.read_bytes()[:1000])
    torch.save({"fc.weight": print}, code)
    torn.write_bytes(whole.read_bytes()[:100])
    for file in (whole, half, code, torn):
        with pytest.raises(CheckpointError) as caught:
            FidelityPlan.of(experiment(extractor="inception-v3-compat", weights=str(file)))
        assert f"{file}: not weights of inception-v3-compat" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
    torch.save({"Mixed_7c.branch_pool.conv.weight": torch.zeros(1000)}, whole)  # told only by opening it
    chosen = experiment(extractor="inception-v3-compat", weights=str(whole))
    with pytest.raises(CheckpointError, match=r"whole\.pth: not weights of inception-v3-compat \("):
        open_extractor(plan_of(chosen), chosen.data, Store(tmp_path))


def test_the_classifier_measures_rings_alone() -> None:
    with pytest.raises(ExperimentError, match="takes no weights"):
        FidelityPlan.of(experiment(extractor="rings-classifier", weights="some.pth"))


def test_every_extractor_of_torch_fidelity_can_be_named() -> None:
    assert set(get_args(FeatureExtractor)) == {*FEATURE_EXTRACTORS_REGISTRY, "rings-classifier"}


# what evaluations are told apart by


def test_what_differs_is_another_evaluation() -> None:
    keys = {
        plan_of(experiment(**change)).key("cell", None).fingerprint
        for change in (
            {},
            {"samples": 301},
            {"guidance": 2.0},
            {"guidance_schedule": "constant"},
            {"top_k": 5},
            {"seed": 1},
            {"reference": "validation"},
            {"reference_images": 400},
        )
    }
    assert len(keys) == 8
    usual = plan_of(experiment(guidance_schedule="ramp")).key("cell", None).fingerprint
    assert usual in keys, "what was usual before there was a choice is the same evaluation"
    same = plan_of(experiment(batch_size=7))
    assert same.key("cell", None) == plan_of(experiment()).key("cell", None), "a batch is no part of a figure"


def test_floors_do_not_depend_on_how_images_are_drawn() -> None:
    first, second = (plan_of(experiment(guidance=guidance)).key("real", None) for guidance in (1.0, 3.0))
    assert first == second
