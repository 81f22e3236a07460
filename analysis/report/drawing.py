"""How figures look: style, axes and their labels, and rendering to SVG and PNG.

Sizes and budgets have an order, so they are shaded from dark to light (viridis); things without an order use Okabe and
Ito's palette. In the report the same drawing is inlined with its ink set to the text colour, so that it reads on light
and dark.
"""

import html
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from analysis.fitting.laws.base import Array
from analysis.tables.roles import SWEEP_COLUMNS
from analysis.tables.table import RunsTable
from analysis.tables.units import NOUNS

COLUMN_INCHES = 3.4
MANY_POINTS = 60
MOST_NAMED = 2000
"""Points of a line that are named, or drawn one by one."""
LONGEST_LABEL = 32
"""Characters of an axis label; longer names are cut in the middle."""
INK = "#16181d"
ORANGE, BLUE, GREEN, VERMILION, PURPLE, SKY = "#e69f00", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
_STYLE: dict[str, Any] = {
    **{"font.size": 8, "font.family": "DejaVu Sans", "axes.titlesize": 8, "axes.labelsize": 8, "lines.linewidth": 1.1},
    **{"xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 6.5, "legend.title_fontsize": 6.5},
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    **{"xtick.minor.width": 0.4, "ytick.minor.width": 0.4, "grid.linewidth": 0.4, "lines.markersize": 3.5},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.unicode_minus": True},
    **{"grid.color": "#8a8f98", "grid.alpha": 0.25, "svg.fonttype": "path", "legend.frameon": False},
    **{"legend.handlelength": 1.4, "legend.labelspacing": 0.25, "legend.borderaxespad": 0.2},
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
}
LONGEST_NAME = 200
"""Characters of a run's name where one points at it."""
_NO_XML = re.compile("[^\t -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What an XML file can't hold."""
_NAMED = "named-"
"""Begins the identity of a line whose points have names; these follow, in hexadecimal numbers."""
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SWEEP_NAMES = {
    "loss": "loss ({unit})",
    "loss_last_scale": "loss, last scale ({unit})",
    "error": "token error, all scales",
    "error_last_scale": "token error, last scale",
}
EVALUATION_NAMES = {"fid": "FID", "mind": "MIND", "kid": "KID"}


@dataclass(frozen=True)
class Drawing:
    """One figure: a stable file name, a caption, and its renderings."""

    name: str
    caption: str
    svg: str
    inline_svg: str
    png: bytes


def label(table: RunsTable, column: str) -> str:
    """What an axis says: units where they are known, which for targets means a sweep's own columns."""
    text = _label(table, column)
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 10]} … {text[-7:]}"


def _label(table: RunsTable, column: str) -> str:
    if column == "flops":
        return "training compute (FLOPs)"
    if column in NOUNS and column in table.frame.columns and column not in table.targets:
        noun = table.units[column].noun if column in table.units else NOUNS[column]
        return f"training {noun}" if column == "tokens" else noun
    if column in table.units:
        return plain(f"{column} ({table.units[column].noun})")
    if column in EVALUATION_NAMES:
        return EVALUATION_NAMES[column]
    measure, best, _ = column.partition("_guidance_best")
    if measure in EVALUATION_NAMES and best:
        return f"{EVALUATION_NAMES[measure]} at the best guidance"
    own = table.columns.get("budget") == SWEEP_COLUMNS["budget"]
    return SWEEP_NAMES[column].format(unit=table.loss_unit) if own and column in SWEEP_NAMES else plain(column)


def plain(text: str) -> str:
    """The user's own text, without a meaning to matplotlib, where $ starts a formula."""
    return text.replace("$", r"\$")


def sentence(table: RunsTable, column: str) -> str:
    """A column's name at the start of a sentence."""
    text = _label(table, column).split(" (")[0]
    return text[0].upper() + text[1:]


def shades(count: int) -> Sequence[Any]:
    """Colours for things in order, dark to light."""
    return [mpl.colormaps["viridis"](value) for value in np.linspace(0.15, 0.86, max(count, 2))[:count]]


def si(value: float) -> str:
    """Powers of ten for budgets, SI letters for counts below 10¹³."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size <= value < 1000 * size and value < 1e13:
            return f"{value / size:.3g}{letter}"
    if not 0 < value < np.inf:
        return f"{value:g}"
    exponent = int(np.floor(np.log10(value)))
    return f"{value / 10.0**exponent:.3g}e{exponent}" if exponent >= 3 else f"{value:.3g}"


def size_name(rows: pd.DataFrame) -> str:
    """What a legend calls the size of some cells: its depth where that is known."""
    depth = rows["depth"].iloc[0] if "depth" in rows.columns else np.nan
    size = si(float(rows["params"].iloc[0]))
    return f"depth {depth:g}, {size}" if np.isfinite(depth) else f"{size} parameters"


def power_of_ten(value: float) -> str:
    """A number such as 2×10⁹. Plain text: matplotlib takes milliseconds for every formula."""
    exponent = int(np.floor(np.log10(value) + 1e-9))
    mantissa = f"{value / 10.0**exponent:.3g}"
    power = "10" + str(exponent).translate(_RAISED)
    return power if mantissa == "1" else f"{mantissa}×{power}"


def log_axis(axes: Axes, which: str, counts: bool = False) -> None:
    """A logarithmic axis with at least two labelled ticks, however short it is; counts are written as 20k, 3M."""
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    decades = np.log10(high / low)
    if decades < 2.2:
        steps = (1.0, 2.0, 5.0) if decades < 1.5 else (1.0, 3.0)
        axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    elif decades > 6:
        axis.set_major_locator(LogLocator(numticks=6))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: si(value) if counts or 0.01 <= value < 1e4 else power_of_ten(value))
    )


def value_axis(axes: Axes, values: "pd.Series[float]") -> None:
    """Logarithmic where values span a factor of three, linear otherwise (a short log axis has no ticks)."""
    low, high = float(values.min()), float(values.max())
    if high / low > 3:
        log_axis(axes, "y")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
        if high >= 1e4:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value) if value > 0 else f"{value:g}"))
        margin = 0.08 * max(high - low, 1e-3 * high)
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, low - 6 * margin), min(top, high + 4 * margin))


def points(axes: Axes, x: Array, y: Array, name: str, names: Sequence[str]) -> None:
    """Runs as points, smaller where there are many, and as pixels where there are very many."""
    many = len(x) > MANY_POINTS
    size = 1.8 if many else 3.2
    line = axes.plot(x, y, "o", color=BLUE, ms=size, alpha=0.8, label=name, zorder=3, rasterized=len(x) > MOST_NAMED)
    named(line, names)


def named(lines: Sequence[Line2D], names: Sequence[str]) -> None:
    """The points of a line get the names of runs, which a page shows, with the values, where one points at them."""
    (line,) = lines
    if len(names) <= MOST_NAMED:
        xy = zip(*(np.asarray(values, dtype=float) for values in line.get_data()), strict=True)
        plain_names = (_NO_XML.sub(" ", name)[:LONGEST_NAME] for name in names)
        texts = [f"{name}: {x:.5g}, {y:.5g}" for name, (x, y) in zip(plain_names, xy, strict=True)]
        line.set_gid(_NAMED + json.dumps(texts).encode().hex())


def run_names(table: RunsTable, rows: pd.DataFrame) -> list[str]:
    """What the runs of some rows are called; of rows that seeds were averaged over, all of them."""
    if "row" not in rows.columns:
        return [""] * len(rows)
    ids = table.measured["run_id"] if "run_id" in table.measured.columns else pd.Series(dtype=object)
    called = dict(zip(table.measured["row"].astype(str), ids.astype(str).where(ids.notna(), ""), strict=False))
    return [
        ", ".join(called.get(row) or f"row {row}" for row in dict.fromkeys(joined.split("+")))
        for joined in rows["row"].astype(str)
    ]


def legend_below(figure: Figure, axes: Axes, title: str | None = None, columns: int = 3) -> None:
    """A legend under the axes, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    for count in range(min(columns, len(labels)), 0, -1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=count, title=title)
        if count == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def render(name: str, caption: str, draw: Callable[[Figure], None], height: float) -> Drawing:
    """Draws a figure one column wide and `height` inches high, in every format."""
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with mpl.rc_context(style):
        figure = Figure(figsize=(COLUMN_INCHES, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        engine = figure.get_layout_engine()
        if engine is not None:  # laid out once, rather than by every savefig
            engine.execute(figure)
            figure.set_layout_engine("none")
        vector, pixels = io.StringIO(), io.BytesIO()
        figure.savefig(vector, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(pixels, format="png", dpi=300, facecolor="white", pil_kwargs={"compress_level": 3})
    svg = _with_names(vector.getvalue())
    return Drawing(name, caption, _on_white(svg), _for_inlining(svg, name), pixels.getvalue())


def _with_names(svg: str) -> str:
    """The points of each line that was `named`, with their names as titles."""
    parts = re.split(rf'id="{_NAMED}([0-9a-f]+)"', svg)
    written = [parts[0]]
    for place, (names, rest) in enumerate(zip(parts[1::2], parts[2::2], strict=True)):
        texts = json.loads(bytes.fromhex(names))
        indent = re.search(r"\n *(?=<g $)", parts[2 * place])
        here, group_end, after = rest.partition(f"{indent[0] if indent else ''}</g>\n")
        if here.count("<use ") == len(texts):  # none lies outside of the figure
            pieces = re.split(r"(<use [^>]*/>)", here)
            titled = zip(texts, pieces[1::2], strict=True)
            pieces[1::2] = [f"<g><title>{html.escape(text, quote=False)}</title>{use}</g>" for text, use in titled]
            here = "".join(pieces)
        written += [f'id="{_NAMED}{place}"', here, group_end, after]
    return "".join(written)


def _on_white(svg: str) -> str:
    return re.sub(r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="white"/>', svg, count=1)


def _for_inlining(svg: str, name: str) -> str:
    """The bare element: ids of its own, the page's text colour for ink, sized by the page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = body.replace(INK, "currentColor")
    for size in ("width", "height"):
        body = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", body, count=1)
    return re.sub(r"<svg", f'<svg role="img" aria-label="{name.replace("_", " ")}"', body, count=1)
