"""How attention grows with an image's side: next-token prediction in raster order, and next-scale prediction.

The VAR paper (arXiv 2404.02905, section 3.3 and its appendix) says O(n⁶) against O(n⁴). Both are counted here pass by
pass, with and without a cache of keys and values, so that the exponents can be read off instead of believed.

Letter: n side of the token map, in tokens.
"""

import io
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.measuring import Options, Report

DEPTH, WIDTH = 16, 1024
SIDES = (4, 8, 16, 32, 64, 128, 256)
FITTED = 4
"""Exponents are fitted at so many of the largest sides, where the largest term dominates."""

Passes = Callable[[int], Sequence[int]]
"""From n to the tokens that each pass draws."""

WAYS: dict[str, tuple[Passes, bool]] = {
    "raster, no cache": (lambda side: [1] * side**2, False),
    "raster, cache": (lambda side: [1] * side**2, True),
    "scales × 2, no cache": (lambda side: [each**2 for each in doubling(side)], False),
    "scales × 2, cache": (lambda side: [each**2 for each in doubling(side)], True),
    "scales + 1, no cache": (lambda side: [each**2 for each in range(1, side + 1)], False),
    "scales + 1, cache": (lambda side: [each**2 for each in range(1, side + 1)], True),
}


def run(options: Options) -> Report:
    sides = SIDES[:FITTED] if options.quick else SIDES
    report = Report(
        "complexity",
        f"Attention pairs and FLOPs of drawing one image of n × n tokens: depth {DEPTH}, width {WIDTH}, no guidance",
        ("way", "n", "passes", "tokens", "attention pairs", "FLOPs"),
    )
    pairs: dict[str, list[int]] = {}
    for way, (passes, cache) in WAYS.items():
        for side in sides:
            drawn = passes(side)
            pairs.setdefault(way, []).append(attention_pairs(drawn, cache=cache))
            report.rows.append((way, side, len(drawn), sum(drawn), pairs[way][-1], float(flops(drawn, cache=cache))))
        exponent = fitted_exponent(sides[-FITTED:], pairs[way][-FITTED:])
        report.notes.append(
            f"{way}: attention pairs grow as n^{exponent:.2f} from n = {sides[-FITTED]} to {sides[-1]}."
        )
    report.figure = _figure(sides, pairs)
    return report


def attention_pairs(passes: Sequence[int], *, cache: bool) -> int:
    """Pairs of a query and a key over all passes, a layer and head: without a cache each pass computes all so far."""
    total = seen = 0
    for added in passes:
        seen += added
        total += (added if cache else seen) * seen
    return total


def flops(passes: Sequence[int], *, cache: bool) -> int:
    """Of a transformer's blocks: 24·C² a row and 4·C a pair; input, modulation and output layer are left out."""
    rows = sum(passes) if cache else sum(itertools.accumulate(passes))
    return DEPTH * (24 * WIDTH**2 * rows + 4 * WIDTH * attention_pairs(passes, cache=cache))


def doubling(side: int) -> list[int]:
    """Sides 1, 2, 4 … up to a power of two."""
    return [2**step for step in range(side.bit_length())]


def fitted_exponent(sides: Sequence[int], values: Sequence[int]) -> float:
    """The slope of least squares in logarithms."""
    return float(np.polyfit(np.log(sides), np.log(np.array(values, dtype=float)), 1)[0])


def _figure(sides: Sequence[int], pairs: Mapping[str, Sequence[int]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (way, values) in enumerate(pairs.items()):
        exponent = fitted_exponent(sides[-FITTED:], values[-FITTED:])
        axes.loglog(
            sides, values, marker="o", markersize=3, color=f"C{number // 2}", linestyle="-" if number % 2 else "--",
            label=f"{way}: $n^{{{exponent:.2f}}}$",
        )  # fmt: skip
    axes.set_xticks(sides, [str(side) for side in sides], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("side n of the token map")
    axes.set_ylabel("attention pairs of one image, a layer and head")
    axes.legend(fontsize="small", frameon=False)
    written = io.BytesIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue().decode()
