"""What was measured of images so far, kept in files meanwhile, so that an interrupted evaluation goes on from there."""

import logging
import shutil
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from varscale.errors import CheckpointError
from varscale.store.layout import RunFiles
from varscale.store.weights import load_tensors, save_tensors

SECONDS = 10.0
"""Between two pieces: what a killed process loses, beside the batch that it was at."""
_KIND = "piece"
_log = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]
"""What was measured of a batch, or of several, by name; `features` has a row an image."""


class Pieces:
    """What an evaluation has measured, in batches; its folder must be locked.

    Attributes:
        images: How many were measured. The next batch to `add` begins with the image of this index.
    """

    def __init__(self, files: RunFiles, made_by: str) -> None:
        """Read what an interrupted evaluation left, up to the first piece that is missing or can't be used.

        Args:
            files: The evaluation's.
            made_by: Fingerprint of all that the tensors depend on; pieces of another one are not used.
        """
        self._files, self._made_by = files, made_by
        self._batches: list[Tensors] = []
        self.images = 0
        while (path := files.piece(self.images)).exists():
            try:
                self._take(load_tensors(path, _KIND, made_by)[0])
            except CheckpointError:
                _log.warning("%s: damaged, or of other settings; from here on images are measured again", path)
                break
        self._written, self._time = len(self._batches), time.monotonic()

    def add(self, batch: Tensors) -> None:
        """Keep what was measured of a batch; it is in a file within about `SECONDS`."""
        self._take(batch)
        if time.monotonic() - self._time >= SECONDS:
            piece = joined(self._batches[self._written :])
            first = self.images - len(piece["features"])
            save_tensors(self._files.piece(first), piece, {"kind": _KIND, "fingerprint": self._made_by})
            self._written, self._time = len(self._batches), time.monotonic()

    def tensors(self) -> dict[str, Tensor]:
        """Of all batches; empty where there is none."""
        return joined(self._batches)

    def _take(self, batch: Tensors) -> None:
        self._batches.append(batch)
        self.images += len(batch["features"])


def joined(batches: Sequence[Tensors]) -> dict[str, Tensor]:
    """What was measured of several batches, one after the other."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in (batches[0] if batches else ())}


def remove_pieces(files: RunFiles) -> None:
    """Once an evaluation's result stands, nothing goes on from them."""
    shutil.rmtree(files.pieces, ignore_errors=True)
