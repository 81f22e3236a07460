"""How far images are from real ones: FID, KID, precision, recall and Inception Score by torch-fidelity, and MIND.

Letters: N images measured, M images of the reference, D features.
"""

import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from varscale.errors import CheckpointError, DataError
from varscale.evaluation import distances
from varscale.evaluation.distances import Measure, extrapolated, interval
from varscale.evaluation.extractors import FeatureSet
from varscale.evaluation.plan import FEWEST_IMAGES

_KID_SUBSET, _KID_SUBSETS = 1000, 20
_SPLITS = 10
_PROJECTIONS_OF_DRAWS = 100
"""How much MIND varies with the images takes fewer directions to see than MIND itself."""


def measure(drawn: FeatureSet, reference: FeatureSet, *, draws: int) -> dict[str, float]:
    """All figures of a set of images, each with a 95% bootstrap interval as `…_low` and `…_high`.

    `fid` is against all of the reference, and so is `fid_extrapolated`, to infinitely many images, without interval.
    `kid`, `mind`, `image_precision` and `image_recall` are against as many images of the reference as are measured,
    evenly spread. `inception_score` is there where the extractor has a classifier. `draws`: of the bootstrap.

    Raises:
        DataError: Fewer than 100 images, or the two sets' features don't compare.
    """
    _check(drawn, reference)
    features_ND, images = drawn.features_ND, len(drawn.features_ND)
    nearest_ND = _spread(reference.features_ND, images)
    frechet = distances.frechet(features_ND, reference.features_ND)
    smallest = min(images, len(nearest_ND))
    kid = kid_features_to_metric(
        features_ND,
        nearest_ND,
        kid_subset_size=min(_KID_SUBSET, smallest),
        kid_subsets=_KID_SUBSETS if smallest > _KID_SUBSET else 1,
        verbose=False,
    )
    shares = prc_features_to_metric(features_ND, nearest_ND, verbose=False)
    mind = distances.mind(features_ND, nearest_ND)(torch.arange(images))
    found: dict[str, tuple[float, Measure]] = {
        "fid": (fid(drawn, reference), frechet),
        "kid": (kid[KEY_METRIC_KID_MEAN], distances.kernel(features_ND, nearest_ND)),
        "mind": (mind, distances.mind(features_ND, nearest_ND, projections=_PROJECTIONS_OF_DRAWS)),
        "image_precision": (shares[KEY_METRIC_PRECISION], distances.precision(features_ND, nearest_ND)),
        "image_recall": (shares[KEY_METRIC_RECALL], distances.recall(features_ND, nearest_ND)),
    }
    if drawn.logits_NC is not None:
        logits_NC = drawn.logits_NC
        found["inception_score"] = (inception_score(drawn), lambda rows: _score(logits_NC[rows]))
    figures = {"fid_extrapolated": extrapolated(frechet, images)}
    for name, (value, of_rows) in found.items():
        low, high = interval(of_rows, value, images, draws=draws)
        figures |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return figures


def fid(drawn: FeatureSet, reference: FeatureSet) -> float:
    """FID alone, by torch-fidelity."""
    statistics = [fid_features_to_statistics(each.features_ND) for each in (drawn, reference)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def inception_score(drawn: FeatureSet) -> float:
    """Inception Score over 10 splits; the images are shuffled first, since sorted by class it would mean nothing.

    Raises:
        CheckpointError: The extractor has no classifier, or its weights have none.
    """
    if drawn.logits_NC is None:
        raise CheckpointError(
            f"Inception Score: {drawn.extractor} has no classifier (an `fc` head that is not all zeros); it needs "
            "Inception's whole weights"
        )
    return _score(drawn.logits_NC)


def _score(logits_NC: Tensor) -> float:
    return float(isc_features_to_metric(logits_NC, splits=_SPLITS, shuffle=True)[KEY_METRIC_ISC_MEAN])


def _spread(features_MD: Tensor, count: int) -> Tensor:
    """`count` of the images, or all where there are fewer, evenly spread: sorted by class they stay balanced."""
    count = min(count, len(features_MD))
    return features_MD[torch.arange(count) * len(features_MD) // count]


def _check(drawn: FeatureSet, reference: FeatureSet) -> None:
    for what, features_ND in (("images to measure", drawn.features_ND), ("reference", reference.features_ND)):
        if len(features_ND) < FEWEST_IMAGES:
            raise DataError(
                f"{what}: {len(features_ND)} are too few for any distance; expected {FEWEST_IMAGES} or more"
            )
        if not features_ND.isfinite().all():
            raise DataError(f"{what}: the extractor gives numbers that are not finite")
    if drawn.extractor != reference.extractor:
        raise DataError(f"reference: its features are {reference.extractor}'s, those measured {drawn.extractor}'s")
    if drawn.image_size != reference.image_size:
        sizes = f"{reference.image_size} pixels, those measured {drawn.image_size}"
        raise DataError(f"reference: its images have sides of {sizes}; expected one size")
