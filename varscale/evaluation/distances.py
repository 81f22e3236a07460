"""Measures of how far the features of drawn images are from those of real ones, where torch-fidelity 0.4 has none.

torch-fidelity gives FID, KID, precision, recall and Inception Score of two sets of features. Here are MIND, FID
extrapolated to infinitely many images, and bootstrap intervals. For the last two a measure is computed on many choices
of the same images, so each function prepares what all choices share and returns a `Measure`.

Letters: N images measured, M images of the reference, D features of an image, P directions, U different images chosen.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Measure = Callable[[Tensor], float]
"""Its value on the images of these rows, int64; a row may be named more than once."""

PROJECTIONS = 1000
"""Directions of MIND in the paper."""
_NEAREST = 32
"""Of which a bootstrap draw, where each is there once on average, has more than the few neighbours that are counted."""
_NORMAL_95 = 1.959964


def frechet(features_ND: Tensor, reference_MD: Tensor) -> Measure:
    """FID: |μ - μ'|² + tr Σ + tr Σ' - 2 tr (Σ Σ')^½, with unbiased covariances (Heusel et al. 2017).

    The same number as torch-fidelity's, which takes the eigenvalues of a matrix that is not symmetric each time: too
    slow for a bootstrap. The eigenvalues of Σ Σ' are here those of a symmetric matrix, of N × N where N < D.
    """
    few = len(features_ND) < features_ND.shape[1]
    reference_mean_D, reference_DD = _moments(reference_MD.double())
    features_ND = features_ND.double() - reference_mean_D
    trace = float(reference_DD.trace())
    if few:
        products_NN = features_ND @ reference_DD @ features_ND.T
    else:
        values_D, vectors_DD = torch.linalg.eigh(reference_DD)
        root_DD = (vectors_DD * values_D.clamp(min=0).sqrt()) @ vectors_DD.T

    def measure(rows: Tensor) -> float:
        if not few:
            mean_D, covariance_DD = _moments(features_ND[rows])
            own_trace, squares = covariance_DD.trace(), root_DD @ covariance_DD @ root_DD
        else:
            chosen_U, counts_U = rows.unique(return_counts=True)
            weight_U = counts_U.double() / len(rows)
            unbiased = len(rows) / (len(rows) - 1)
            mean_D = weight_U @ features_ND[chosen_U]
            own_trace = unbiased * (weight_U @ (features_ND[chosen_U] - mean_D).square().sum(1))
            # Σ = Xᵀ (W - wwᵀ) X, and W - wwᵀ = R Rᵀ with R = W^½ - w √wᵀ: the eigenvalues are those of Rᵀ X Σ' Xᵀ R
            root_UU = torch.diag(weight_U.sqrt()) - torch.outer(weight_U, weight_U.sqrt())
            squares = unbiased * (root_UU.T @ products_NN[chosen_U][:, chosen_U] @ root_UU)
        common = torch.linalg.eigvalsh((squares + squares.T) / 2).clamp(min=0).sqrt().sum()
        return float(mean_D.square().sum() + own_trace + trace - 2 * common)

    return measure


def mind(features_ND: Tensor, reference_MD: Tensor, *, projections: int = PROJECTIONS, seed: int = 2020) -> Measure:
    """MIND, the Monge Inception Distance (Berthet et al. 2026, arXiv 2605.06797): a sliced Wasserstein distance.

    3 D times the mean, over `projections` random unit directions, of the squared 2-Wasserstein distance between the
    two sets of projections; in one dimension that is the mean squared difference of the sorted numbers. Both sets must
    be of one size: as many images of the reference are taken, at random, as are measured, or with repetition where it
    has fewer. With one seed all sets are seen from the same directions.
    """
    generator = torch.Generator().manual_seed(seed)
    directions_DP = torch.randn(features_ND.shape[1], projections, generator=generator)
    directions_DP /= directions_DP.norm(dim=0)
    projected_PN = (features_ND.float() @ directions_DP).T.contiguous()
    reference_PM = (reference_MD.float() @ directions_DP).T.contiguous()
    order_M = torch.randperm(len(reference_MD), generator=generator)

    def measure(rows: Tensor) -> float:
        taken = order_M[torch.arange(len(rows)) % len(order_M)]
        difference = projected_PN[:, rows].sort(1).values - reference_PM[:, taken].sort(1).values
        return 3 * features_ND.shape[1] * float(difference.square().mean(1).double().mean())

    return measure


def kernel(features_ND: Tensor, reference_MD: Tensor) -> Measure:
    """KID of all images at once: the unbiased squared maximum mean discrepancy for the kernel (x·y / D + 1)³.

    torch-fidelity's value is the mean over random subsets of the same quantity (Bińkowski et al. 2018).
    """
    own_NN, cross_N = _kernel(features_ND, features_ND), _kernel(features_ND, reference_MD).mean(1)
    among_MM = _kernel(reference_MD, reference_MD)
    theirs = float((among_MM.sum() - among_MM.trace()) / (len(among_MM) * (len(among_MM) - 1)))

    def measure(rows: Tensor) -> float:
        count_N, n = torch.bincount(rows, minlength=len(own_NN)).double(), len(rows)
        own = (count_N @ own_NN @ count_N - count_N @ own_NN.diagonal()) / (n * (n - 1))
        return float(own + theirs - 2 * count_N @ cross_N / n)

    return measure


def precision(features_ND: Tensor, reference_MD: Tensor, *, neighbours: int = 3) -> Measure:
    """Share of the images that lie among the reference's neighbourhoods (Kynkäänniemi et al. 2019)."""
    radius_M = _radii(reference_MD, neighbours)
    within_N = (torch.cdist(features_ND, reference_MD) <= radius_M).any(1).double()
    return lambda rows: float(within_N[rows].mean())


def recall(features_ND: Tensor, reference_MD: Tensor, *, neighbours: int = 3) -> Measure:
    """Share of the reference that lies among the neighbourhoods of the images."""
    cross_MN, own_NN = torch.cdist(reference_MD, features_ND), torch.cdist(features_ND, features_ND)
    near_Nk = own_NN.topk(min(_NEAREST, len(own_NN)), largest=False)

    def measure(rows: Tensor) -> float:
        count_N = torch.bincount(rows, minlength=len(own_NN))
        # a neighbourhood ends where it has as many of the chosen, repetitions counted, the image itself among them
        last_N1 = (count_N[near_Nk.indices].cumsum(1) > neighbours).int().argmax(1, keepdim=True)
        radius_N = near_Nk.values.gather(1, last_N1)[:, 0].masked_fill(count_N == 0, -1)
        return float((cross_MN <= radius_N).any(1).double().mean())

    return measure


def interval(measure: Measure, value: float, images: int, *, draws: int, seed: int = 0) -> tuple[float, float]:
    """A 95% bootstrap interval of a value: how far it would move with other images drawn from the same model.

    The images are drawn anew with replacement, `draws` times, while the reference stays; the interval is the value
    ± 1.96 standard deviations of what the measure then gives. Not the quantiles themselves: a choice with repetitions
    has fewer different images, which moves distances up, as having fewer images does.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [measure(torch.randint(images, (images,), generator=generator)) for _ in range(draws)]
    deviation = _NORMAL_95 * float(np.std(drawn, ddof=1))
    return value - deviation, value + deviation


def extrapolated(measure: Measure, images: int, *, sizes: int = 8, seed: int = 0) -> float:
    """A distance as it would be with infinitely many images (Chong and Forsyth 2020, FID∞).

    It is computed on `sizes` random subsets of a quarter of the images up to all of them; FID is linear in 1/n to
    first order, and the intercept of a line of least squares is what is left at 1/n = 0. The reference stays as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = [math.ceil(number) for number in np.linspace(images / 4, images, sizes)]
    values = [measure(torch.randperm(images, generator=generator)[:number]) for number in numbers]
    return float(np.polynomial.Polynomial.fit(1 / np.array(numbers), values, 1).convert().coef[0])


def _moments(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    return features_ND.mean(0), torch.cov(features_ND.T)


def _kernel(first_ND: Tensor, second_MD: Tensor) -> Tensor:
    return (first_ND.double() @ second_MD.double().T / first_ND.shape[1] + 1) ** 3


def _radii(features_ND: Tensor, neighbours: int) -> Tensor:
    """Distance of each image to its nearest neighbours' last, itself not counted."""
    return torch.cdist(features_ND, features_ND).kthvalue(neighbours + 1).values
