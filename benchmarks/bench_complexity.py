"""How attention grows with an image's side: next-token prediction in raster order, and next-scale prediction.

The VAR paper (arXiv 2404.02905, section 3.3 and its appendix) says O(n⁶) against O(n⁴). Both are counted here pass by
pass, with and without a cache of keys and values, so that the exponents can be read off instead of believed.

Letter: n side of the token map, in tokens.
"""

import io
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from benchmarks.measuring import Options, Report, in_turns, rate
from varscale.config.tokenizer import TokenizerArchitecture
from varscale.families.models import FamilyModel
from varscale.families.raster.config import RasterConfig
from varscale.families.var.config import VARConfig
from varscale.generation.sampling import sample
from varscale.tokenizer.autoencoder import MultiScaleTokenizer

DEPTH, WIDTH = 16, 1024
SIDES = (4, 8, 16, 32, 64, 128, 256)
FITTED = 4
"""Exponents are fitted at so many of the largest sides, where the largest term dominates."""

TIMED_SIDES = (4, 8, 16)
"""Latency is measured apart, at sizes that two processors draw in seconds."""

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
    for side in sides[:1] if options.quick else TIMED_SIDES:
        report.notes.append(_latency(side, options.rounds(5)))
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


def _latency(side: int, rounds: int) -> str:
    """Seconds that one image takes, in raster order and by scales that double, with a cache."""
    shape = {"vocab_size": 512, "latent_channels": 8, "num_classes": 10, "depth": 4, "width": 64, "heads": 4}
    descriptions = {
        "raster order": RasterConfig(patch_nums=(side,), **shape),
        "scales × 2": VARConfig(patch_nums=tuple(doubling(side)), **shape),
    }
    works: dict[str, Callable[[], float]] = {}
    for way, description in descriptions.items():
        torch.manual_seed(0)
        model = description.implementation().build(description).eval()
        architecture = TokenizerArchitecture(
            patch_nums=description.patch_nums, vocab_size=512, latent_channels=8, base_channels=8, norm_groups=8,
            channel_multipliers=(1,), residual_blocks=1, attention=False,
        )  # fmt: skip
        tokenizer = MultiScaleTokenizer(architecture).eval()
        works[way] = _draws(model, tokenizer)
    seconds = {way: statistics.median(values) for way, values in in_turns(works, rounds).items()}
    shown = ", ".join(f"{way} {value:.3g} s" for way, value in seconds.items())
    return f"latency of one image of {side} × {side} tokens (depth 4, width 64, a cache, a small decoder): {shown}."


def _draws(model: FamilyModel, tokenizer: MultiScaleTokenizer) -> Callable[[], float]:
    return lambda: 1 / rate(lambda: sample(model, tokenizer, torch.tensor([3]), cfg=0.0), 1, 1)


def _figure(sides: Sequence[int], pairs: Mapping[str, Sequence[int]]) -> str:
    import matplotlib
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
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "complexity"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue().decode()
