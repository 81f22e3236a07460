"""A scheduler's request to stop: its signals set a flag, and a run ends at its next step, after a checkpoint."""

import signal
from collections.abc import Callable
from types import FrameType

Report = Callable[[int, int], None]
"""Called with the images done and in all."""


class Interrupted(Exception):
    """A run ended early because its process was asked to stop; it goes on from its checkpoint another time."""


class StopRequest:
    """Whether this process was asked to stop. Nothing is asked of a process that doesn't `listen`."""

    def __init__(self) -> None:
        self._listening = False
        self._signal: signal.Signals | None = None

    def listen(self) -> None:
        """Take SIGTERM and SIGUSR2 (submitit's choice) as requests; again where a library took them for itself."""
        self._listening = True
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._note)

    def listen_on(self) -> None:
        """Take the signals back from Lightning, which installs a handler of its own when a training starts."""
        if self._listening:
            self.listen()

    @property
    def signal(self) -> str:
        """The first signal's name; "" before it came."""
        return self._signal.name if self._signal is not None else ""

    def check(self) -> None:
        """Raise `Interrupted` after a request."""
        if self._signal is not None:
            raise Interrupted(f"{self._signal.name} was received")

    def checked(self, report: Report) -> Report:
        """A listener to progress that raises `Interrupted` after a request: for work that needs no checkpoint."""

        def checking(done: int, total: int) -> None:
            self.check()
            report(done, total)

        return checking

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or signal.Signals(number)


STOP = StopRequest()
"""Of this process: signals are sent to processes."""
