"""Says what a long fit is at. Steps are logged; who wants to see them says where they go."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

steps = logging.getLogger("analysis.steps")
steps.setLevel(logging.INFO)
steps.propagate = False
steps.addHandler(logging.NullHandler())


class _Latest(logging.Handler):
    """Keeps the last step alone."""

    text = "reading the table"

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


@contextmanager
def progress(say: Callable[[str], None], first: float = 5.0, every: float = 10.0) -> Iterator[None]:
    """Says what is under way, and since when, where it takes long.

    Args:
        say: takes a line of text; called from another thread.
        first: seconds before the first line; what is done sooner says nothing.
        every: seconds between further lines.
    """
    latest, done, began = _Latest(), threading.Event(), time.monotonic()

    def watch() -> None:
        wait = first
        while not done.wait(wait):
            say(f"{latest.text} ({time.monotonic() - began:.0f} s so far)")
            wait = every

    steps.addHandler(latest)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        steps.removeHandler(latest)
