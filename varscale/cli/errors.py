"""Errors are for people: one line for what they can mend, a traceback for the rest."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from analysis.errors import TableError
from varscale.errors import ExperimentError, UserError

MENDABLE = (UserError, TableError, OSError)
"""What a person who uses varscale can mend; printed as one line."""


@contextmanager
def mistakes_as_one_line() -> Iterator[None]:
    """For values and files of the user's that libraries refuse with a ValueError of their own."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, MENDABLE):
            raise
        raise ExperimentError(textwrap.shorten(str(error), 400, placeholder=" …")) from error
