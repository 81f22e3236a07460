"""Measures between sets of features against plain computations, closed forms and torch-fidelity's and torchmetrics'.

Letters: N images measured, M of the reference, D features.
"""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from varscale.evaluation import distances
from varscale.evaluation.distances import extrapolated, frechet, interval, kernel, mind, precision, recall


def normal(count: int, dimensions: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(count, dimensions, generator=generator)


def every(features: Tensor) -> Tensor:
    return torch.arange(len(features))


def plain_frechet(features: Tensor, reference: Tensor) -> float:
    """As the paper writes it, by scipy's square root of a matrix."""
    first, second = features.double().numpy(), reference.double().numpy()
    covariance_1, covariance_2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    common = scipy.linalg.sqrtm(covariance_1 @ covariance_2).real
    apart = ((first.mean(0) - second.mean(0)) ** 2).sum()
    return float(apart + np.trace(covariance_1 + covariance_2 - 2 * common))


@pytest.mark.parametrize("count", [200, 12], ids=["many images", "fewer images than features"])
def test_frechet(count: int) -> None:
    features, reference = normal(count, 16, 0, 0.3, 1.4), normal(300, 16, 1)
    measured = frechet(features, reference)(every(features))
    statistics = [fid_features_to_statistics(each.double()) for each in (features, reference)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert measured == pytest.approx(theirs, abs=1e-4)
    if count > 16:
        assert measured == pytest.approx(plain_frechet(features, reference), abs=1e-8)
    moments = [torch.from_numpy(statistic[name]) for statistic in statistics for name in ("mu", "sigma")]
    assert measured == pytest.approx(float(_compute_fid(*moments)), abs=1e-4), "torchmetrics' too"


@pytest.mark.parametrize("count", [80, 12], ids=str)
@pytest.mark.parametrize("name", ["frechet", "mind", "kernel", "precision", "recall"])
def test_a_choice_of_rows_is_those_images(name: str, count: int) -> None:
    """With repetitions: the shortcut of a bootstrap gives what the images themselves give."""
    measure_of = getattr(distances, name)
    features, reference = normal(count, 16, 0, 0.2), normal(90, 16, 1)
    rows = torch.randint(count, (count,), generator=torch.Generator().manual_seed(3))
    chosen = features[rows]
    assert measure_of(features, reference)(rows) == pytest.approx(
        measure_of(chosen, reference)(every(chosen)), abs=1e-6
    )


def test_mind_against_sorting_by_hand() -> None:
    """With as many directions as the paper takes, and 1-D distances by scipy's optimal transport."""
    features, reference = normal(7, 3, 0, 0.5), normal(7, 3, 1)
    generator = torch.Generator().manual_seed(11)
    directions = torch.randn(3, 5, generator=generator)
    total = 0.0
    for direction in (directions / directions.norm(dim=0)).T:
        first, second = (features @ direction).tolist(), (reference @ direction).tolist()
        cost = (np.array(first)[:, None] - np.array(second)[None, :]) ** 2
        total += cost[scipy.optimize.linear_sum_assignment(cost)].mean()
    measured = mind(features, reference, projections=5, seed=11)(every(features))
    assert measured == pytest.approx(3 * 3 * total / 5, rel=1e-5)


def test_mind_of_a_shift() -> None:
    """Seen from a unit direction u a set moved by s is moved by u·s, whose mean square is |s|² / D."""
    features = normal(60, 8, 0)
    shift = torch.arange(8.0)
    measured = mind(features + shift, features, projections=20_000)(every(features))
    assert measured == pytest.approx(3 * float(shift.square().sum()), rel=0.05)
    assert mind(features, features)(every(features)) == 0


def test_mind_takes_as_many_images_of_the_reference() -> None:
    features = normal(300, 8, 0)
    larger, smaller = normal(2000, 8, 1), normal(250, 8, 2)
    same, fewer, far = (
        mind(features, reference)(every(features)) for reference in (larger, smaller, normal(300, 8, 3, shift=1.0))
    )
    assert max(same, fewer) < 0.1 * far


def test_kernel_distance() -> None:
    features, reference = normal(40, 6, 0, 0.4), normal(40, 6, 1)
    measured = kernel(features, reference)(every(features))
    total = 0.0
    first, second = features.double(), reference.double()
    for i in range(40):
        for j in range(40):
            if i != j:
                own = (first[i] @ first[j] / 6 + 1) ** 3 + (second[i] @ second[j] / 6 + 1) ** 3
                total += float(own) / (40 * 39)
            total -= 2 * float((first[i] @ second[j] / 6 + 1) ** 3) / 1600
    assert measured == pytest.approx(total, rel=1e-9)
    theirs = kid_features_to_metric(features, reference, kid_subset_size=40, kid_subsets=1, verbose=False)
    assert measured == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-4)
    assert measured == pytest.approx(float(poly_mmd(features.double(), reference.double())), rel=1e-4)


def test_precision_and_recall() -> None:
    features, reference = normal(50, 4, 0, 0.8), normal(60, 4, 1)

    def share(images: Tensor, others: Tensor) -> float:
        """Of the images that are as near to one of the others as that is to its third neighbour."""
        points = others.double().tolist()
        third = [sorted(math.dist(point, each) for each in points)[3] for point in points]
        inside = [
            any(math.dist(image, point) <= radius for point, radius in zip(points, third, strict=True))
            for image in images.double().tolist()
        ]
        return sum(inside) / len(inside)

    theirs = prc_features_to_metric(features, reference, verbose=False)
    assert precision(features, reference)(every(features)) == pytest.approx(share(features, reference))
    assert recall(features, reference)(every(features)) == pytest.approx(share(reference, features))
    assert theirs["precision"] == pytest.approx(share(features, reference))
    assert theirs["recall"] == pytest.approx(share(reference, features))
    assert 0 < theirs["recall"] < 1


def test_the_interval_of_a_mean_is_the_usual_one() -> None:
    values = normal(400, 1, 0).flatten()
    low, high = interval(lambda rows: float(values[rows].mean()), float(values.mean()), 400, draws=2000, seed=1)
    error = float(values.std()) / 20
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.06)
    assert (low + high) / 2 == pytest.approx(float(values.mean()), abs=1e-9)
    again = interval(lambda rows: float(values[rows].mean()), float(values.mean()), 400, draws=2000, seed=1)
    assert again == (low, high)


def test_the_interval_covers_what_other_images_give() -> None:
    """FID of 200 other images of the same model lies within most of the time, although resampling moves FID up."""
    reference = normal(2000, 6, 1)
    features = normal(200, 6, 2, 0.2)
    value = frechet(features, reference)(every(features))
    low, high = interval(frechet(features, reference), value, 200, draws=60)
    others = [normal(200, 6, seed, 0.2) for seed in range(100, 140)]
    elsewhere = [frechet(other, reference)(every(other)) for other in others]
    assert np.std(elsewhere) == pytest.approx((high - low) / 2 / 1.96, rel=0.4)


def test_extrapolation_finds_the_intercept() -> None:
    assert extrapolated(lambda rows: 3 + 40 / len(rows), 500) == pytest.approx(3.0)


def test_extrapolated_distance_of_equal_distributions_is_near_zero() -> None:
    features, reference = normal(1000, 12, 0), normal(60_000, 12, 1)
    measure = frechet(features, reference)
    value = measure(every(features))
    assert abs(extrapolated(measure, 1000)) < 0.3 * value
