"""Training curves on disk: metrics.jsonl, one point a line, appended while a run goes on."""

import json
import os
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import NamedTuple


class CurvePoint(NamedTuple):
    """One line of a run's curves."""

    time: float
    """Unix seconds."""
    images: int
    """Images seen."""
    metrics: dict[str, float]


def curve_line(point: CurvePoint) -> bytes:
    """A point as a line of the file."""
    return (json.dumps(point._asdict()) + "\n").encode()


def parse_point(line: bytes) -> CurvePoint | None:
    """The point in a line; None where the line is damaged."""
    try:
        content = json.loads(line)
        time, images = float(content["time"]), int(content["images"])
        # truth values, texts and None are no numbers
        values = ((name, value) for name, value in content["metrics"].items() if type(value) in (int, float))
        point = CurvePoint(time, images, {name: float(value) for name, value in values if isfinite(value)})
        return point if 0 <= time < 1e11 and 0 <= images < 2**62 else None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def read_curve(path: Path) -> Iterator[CurvePoint]:
    """The points of a file, damaged lines left out; none where there is no file."""
    try:
        with path.open("rb") as file:
            yield from (point for line in file if (point := parse_point(line)) is not None)
    except OSError:
        return


def mend_curve(path: Path) -> int:
    """Cut a torn last line (of a killed process, or a full disk); the images of the last point, or -1."""
    if not path.exists():
        return -1
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    points = (parse_point(line) for line in reversed(content[:whole].splitlines()))
    return next((point.images for point in points if point is not None), -1)
