"""Tables as people draw them in text: Markdown, columns aligned by spaces, rulers of dashes, frames of lines."""

import csv
import io
import re

from analysis.errors import TableError

_BARS = str.maketrans(dict.fromkeys("│┃║", "|"))
_FRAME = " \t\r\n|:+-=_" + "".join(map(chr, range(0x2500, 0x2580)))
_STROKES = ("--", "==", "__", "──", "━━", "══")
_MARKDOWN_RULER = re.compile(r"\s*\|?(\s*:?-+:?\s*\|)+(\s*:?-+:?\s*)?")
_EMPHASIS = re.compile(r"\*\*|`")


def first_block(text: str) -> str:
    """The first table of a Markdown document: its first lines that follow each other and have a bar."""
    lines = text.splitlines(keepends=True)
    start = next((place for place, line in enumerate(lines) if "|" in line), 0)
    end = next((place for place, line in enumerate(lines[start:], start) if "|" not in line), len(lines))
    return "".join(lines[start:end])


def without_rulers(lines: list[str]) -> list[str]:
    """The lines that hold something: none of dashes, equals signs or frames alone."""
    filled = [line for line in lines if line.strip()]
    return [
        line
        for place, line in enumerate(filled)
        if (line.strip(_FRAME) or not any(stroke in line for stroke in _STROKES))
        and not (place == 1 and len(line) < 10_000 and _MARKDOWN_RULER.fullmatch(line.rstrip()))
    ]


def as_csv(lines: list[str], separators: tuple[str, ...]) -> tuple[str, str] | None:
    """A drawn table as comma-separated text, and what it was; None where `separators` stand between its columns.

    Args:
        lines: the table's lines, blank ones and rulers left out.
        separators: what else separates columns.

    Raises:
        TableError: columns are separated by spaces, and a row has more or fewer values than the header has names.
    """
    lines = [line.translate(_BARS) for line in lines]
    framed = [line.strip() for line in lines if line.strip().startswith("|")]
    if framed and (lines[0].strip().startswith("|") or not any(sign in lines[0] for sign in separators)):
        rows = [[cell.strip() for cell in _EMPHASIS.sub("", line.strip("|")).split("|")] for line in framed]
        return _written(rows), "read as a table with bars between its columns"
    if not lines or any(sign in lines[0] for sign in separators) or len(lines[0].split()) < 2:
        return None
    for pattern in (r"\s{2,}", r"\s+"):
        rows = [re.split(pattern, line.strip()) for line in lines]
        odd = next((place for place, row in enumerate(rows) if len(row) != len(rows[0])), None)
        if odd is None and len(rows[0]) > 1:
            return _written(rows), "columns are separated by spaces"
    if all(len(line.split()) == 1 for line in lines[1:]):
        return None  # one column, whose name has several words
    count, names = len(lines[odd or 0].split()), len(lines[0].split())
    raise TableError(
        f"columns seem to be separated by spaces, but row {odd} below the header has {count} values for {names} names; "
        "write - for a missing value, or separate columns by commas"
    )


def _written(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()
