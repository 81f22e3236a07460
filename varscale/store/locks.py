"""Locks that processes hold while they write; the system releases them when a process dies."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def held_alone(path: Path, otherwise: Exception) -> Iterator[None]:
    """Hold a lock, or raise `otherwise` where another process does."""
    try:
        held = FileLock(path).acquire(timeout=0)
    except Timeout:
        raise otherwise from None
    with held:
        yield
