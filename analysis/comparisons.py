"""Which groups of a table are compared, and along what."""

from itertools import combinations

from analysis.checks.compare import INPUTS, Comparison, Side, compare
from analysis.checks.warnings import LawWarning
from analysis.errors import FitRefused, TableError
from analysis.options import FitOptions
from analysis.results import LawsResult
from analysis.tables.table import RunsTable

_MOST_PAIRED = 4


def comparisons(
    table: RunsTable, options: FitOptions, parts: dict[str, LawsResult]
) -> tuple[list[Comparison], list[LawWarning]]:
    """Pairs of groups (of those named, or of all), by power laws of compute: of many, the first with each other."""
    for name in options.compare:
        if name not in parts:
            raise TableError(f"--compare {name!r}: no such group; the groups are {', '.join(parts)}")
    names = options.compare or tuple(parts)
    pairs = list(combinations(names, 2))[: len(names) - 1 if len(names) > _MOST_PAIRED else None]
    found, refused = [], []
    for target in table.targets:
        for a, b in pairs:
            try:
                found.append(_compared(parts[a], parts[b], a, b, target, options))
            except FitRefused as refusal:
                refused.append(LawWarning("law-skipped", f"comparison of {a} and {b} by {target}: {refusal}"))
    return found, refused


def _compared(first: LawsResult, second: LawsResult, a: str, b: str, target: str, options: FitOptions) -> Comparison:
    """Two groups along compute, else along what both have a power law against.

    Raises:
        FitRefused: there is no such law, or one doesn't fall.
    """
    for x in dict.fromkeys((*INPUTS, *options.x)):
        sides = _side(first, a, target, x), _side(second, b, target, x)
        if sides[0] is not None and sides[1] is not None:
            return compare(target, sides[0], sides[1], x)
    if any(part.find("rising-power", target) for part in (first, second)):
        raise FitRefused("it rises; what is compared are values that fall, such as 1 less an accuracy")
    raise FitRefused("no power law of the same input was fitted to both (--law power)")


def _side(part: LawsResult, name: str, target: str, x: str) -> Side | None:
    entry = part.find("power", target, x)
    if entry is None:
        return None
    flops, values = (entry.rows[each].to_numpy(dtype=float) for each in (x, target))
    bent = part.find("power-offset", target, x) or part.find("power-floor", target, x)
    with_offset = (bent.fitted, bent.uncertainty) if bent is not None else None
    others = [each for each in INPUTS if each != x and each in entry.rows.columns]
    return Side(name, flops, values, entry.fitted, entry.uncertainty, with_offset, entry.rows[others].to_numpy(float).T)
