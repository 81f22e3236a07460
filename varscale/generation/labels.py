"""Classes as people write them: numbers, names, or none."""

import csv
import unicodedata
from collections import Counter
from collections.abc import Sequence

from varscale.errors import ExperimentError

NO_CLASS = "none"
_NAMES_SHOWN = 10


def labels_of(option: str, text: str, num_classes: int, names: Sequence[str], *, keywords: str = "") -> list[int]:
    """Labels of classes, such as `0,1`, `cat,dog` or `none`; one whose name has a comma stands in quotation marks.

    Where all names are numbers, numbers are names: of class folders 1 … 12, `12` is the last. Everywhere else a number
    that is no class's name is a label. A class whose name is `none`, or several have, is meant by its number alone.

    Args:
        option: How the text is named in messages.
        text: What was written.
        num_classes: Labels are 0 … num_classes - 1, and num_classes is no class.
        names: Of the classes, in the order of their labels; may be unknown, and then empty.
        keywords: What else may be written, for messages.

    Raises:
        ExperimentError: There is no such class, or there are several; the message has the range and the names.
    """
    counts = Counter(map(_composed, names))
    known = {_composed(name): label for label, name in enumerate(names)}
    numbered = bool(names) and all(map(_is_number, names))
    by_number = (
        {int(name): label for label, name in enumerate(names)} if numbered else dict(enumerate(range(num_classes)))
    )
    labels = []
    for part in next(csv.reader([text], skipinitialspace=True), []):
        name = _composed(part.strip())
        if counts[name] > 1:
            alike = ", ".join(str(label) for label, other in enumerate(names) if _composed(other) == name)
            raise ExperimentError(f"{option} {part[:100]}: several classes have this name; say a label: {alike}")
        label = num_classes if name == NO_CLASS else known.get(name)
        if label is None and _is_number(name):
            label = by_number.get(int(name))
        if label is None:
            called = f", whose names are {_some(names)}" if names else ""
            raise ExperimentError(
                f"{option} {part[:100]}: no such class; expected {keywords}{NO_CLASS} (no class), or classes: "
                f"labels must lie in 0 … {num_classes - 1}{called}"
            )
        labels.append(label)
    return labels


def in_words(labels: Sequence[int], names: Sequence[str]) -> str:
    """Labels with the names of their classes."""
    words = [f"{label} ({names[label]})" if label < len(names) else f"{label} (no class)" for label in labels]
    return _some(words)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def _some(words: Sequence[str]) -> str:
    return ", ".join(words[:_NAMES_SHOWN]) + (f", … ({len(words)} in all)" if words[_NAMES_SHOWN:] else "")


def _composed(name: str) -> str:
    """Of the two forms in which Unicode writes accents, the shorter."""
    return unicodedata.normalize("NFC", name)
