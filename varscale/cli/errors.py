"""Errors are for people: one line for what they can mend, a traceback for the rest."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

from varscale.errors import ExperimentError


def is_mendable(error: Exception) -> bool:
    """Whether an error is about what the user gave us, by its type's name: naming the types would import torch."""
    names = {kind.__name__ for kind in type(error).__mro__}
    mendable = {
        "ExperimentError",
        "DataError",
        "TokenStoreError",
        "TableError",
        "SweepError",
        "TrackingError",
        "Diverged",
    }
    return bool(names & (mendable | {"OSError"}))


@contextmanager
def mistakes_as_one_line(of_training: bool = False) -> Iterator[None]:
    """For files and values of the user's that libraries refuse with errors of many kinds (a training with fewer)."""
    kinds = (ValueError,) if of_training else (ValueError, RuntimeError, UnpicklingError)
    try:
        yield
    except kinds as error:
        if is_mendable(error):
            raise
        raise ExperimentError(textwrap.shorten(str(error), 400, placeholder=" …")) from error
