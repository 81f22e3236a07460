"""How long an image takes at each size, from what a sweep has trained so far: what its time left is estimated from.

Small transformers take far longer for a FLOP than large ones, so a share of the FLOPs is no share of the time.
"""

from collections import defaultdict

import numpy as np


class Pace:
    """Seconds an image by size, a size being its training FLOPs an image."""

    def __init__(self) -> None:
        self._images: defaultdict[int, int] = defaultdict(int)
        self._seconds: defaultdict[int, float] = defaultdict(float)

    def add(self, flops_per_image: int, images: int, seconds: float) -> None:
        """A worker trained so many images of this size in so many seconds."""
        self._images[flops_per_image] += images
        self._seconds[flops_per_image] += seconds

    @property
    def sizes(self) -> frozenset[int]:
        """The sizes that were measured."""
        return frozenset(size for size, seconds in self._seconds.items() if seconds > 0 and self._images[size] > 0)

    def seconds(self, flops_per_image: int) -> float:
        """An image of this size: as measured, or between the sizes measured.

        Beyond them a larger size takes more in proportion to its FLOPs and a smaller one as long as the smallest
        measured, since little of that is arithmetic. Where nothing is measured, FLOPs stand for seconds.
        """
        known = sorted(self.sizes)
        if not known:
            return float(flops_per_image)
        measured = [self._seconds[size] / self._images[size] for size in known]
        return float(np.interp(flops_per_image, known, measured)) * max(1.0, flops_per_image / known[-1])
