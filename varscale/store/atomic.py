"""Files that appear whole or not at all. Every file under the runs folder is written through here."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically; see `replaced`."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically; see `replaced`."""
    with replaced(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which then takes its place at once; it is deleted where writing fails.

    A reader, or a crash, sees the old content or the new, never half of it. The file has the mode that the process's
    umask gives.

    Raises:
        OSError: The file can't be written; the error names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    except OSError as error:
        error.filename = str(path)
        raise
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "rb+") as file:
            yield temporary
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # a temporary file is made for its owner alone
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def _umask() -> int:
    """The process's umask, read without changing it where the system shows it."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("Umask:")[2].split()[0], 8)
    except (OSError, IndexError, ValueError):
        mask = os.umask(0o077)
        os.umask(mask)
        return mask
