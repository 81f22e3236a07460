"""Questions about columns that may not be what they were taken for: FLOPs above all, and rows that are checkpoints."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from analysis.checks.warnings import LawWarning, table_warnings
from analysis.grids.frontier import with_budgets
from analysis.options import FitOptions
from analysis.tables.annealing import RATE_SCHEDULE, RATE_SUM
from analysis.tables.cells import mixed_rows
from analysis.tables.checkpoints import Curves, recognised
from analysis.tables.epochs import contradiction
from analysis.tables.experts import active_params
from analysis.tables.repeats import copies_between_groups
from analysis.tables.roles import ROLES, plain_name, some
from analysis.tables.table import RunsTable
from analysis.tables.units import NOUNS

_LARGEST_LOG = 90.0
"""No logarithm of a count is larger; 2^90 is 1.2e27."""
_LOGS_APART = 3.0
_DECIMAL = 30.0
"""A larger logarithm of FLOPs isn't decimal."""
_FALLS = 0.98
_UNLIKE, _FAR = 1.5, 2.5
"""Factors between groups of the same sizes, and of others, whose attention and embeddings count differently."""
_ODD = 5.0
_OPTIMA_APART = 1.5
"""Optima of one budget, by several methods, lie nearer together."""
_CONSTANTS = {"log10": np.log10(6.0), "ln": np.log(6.0), "log2": np.log2(6.0)}
_MOST_KINDS = 12
_ONE_PEAK = 1.05


def oddities(table: RunsTable, options: FitOptions) -> tuple[LawWarning, ...]:
    """What is odd about a table, whatever is made of it."""
    frame = with_budgets(table, options.checkpoints)
    mixed = mixed_rows(table, table.frame if frame is None else frame, options)
    found = table_warnings(table, frame, options.checkpoints)
    found += [LawWarning("mixed-rows", mixed.message)] if mixed else []
    return with_questions(table, options, [each for each in found if not each.code.startswith("few-")])


def with_questions(table: RunsTable, options: FitOptions, warnings: Sequence[LawWarning]) -> tuple[LawWarning, ...]:
    """Questions about the table, then the warnings; logarithms explain why units are unlikely."""
    asked = [LawWarning(code, text) for code, text in questions(table, options)]
    logarithms = any(each.code == "logarithms" for each in asked)
    return (*asked, *(each for each in warnings if not (logarithms and each.code == "unlikely-units")))


def questions(table: RunsTable, options: FitOptions) -> list[tuple[str, str]]:
    """What to ask about a table, each with its warning's code; a line each."""
    copies = copies_between_groups(table.frame, table.targets)
    found = [("copied-rows", copies)] if copies else []
    found += _same_column(table)
    logarithms = list(_logarithms(table))
    found += [("logarithms", text) for text in logarithms]
    found += [("odd-epochs", text)] if (text := contradiction(table)) else []
    found += _late_start(table)
    found += _several_peaks(table)
    found += _warming_up(table)
    found += [("not-optima", text) for text in _no_optima(table)]
    found += _checkpoints(table, options)
    if not logarithms:
        found += [("odd-flops", text) for text in (*_constant(table), *_falling(table), *_unlike(table))]
    return found


def _same_column(table: RunsTable) -> list[tuple[str, str]]:
    """Two roles of one column, or of columns that hold the same; a nominal budget may stand for FLOPs."""
    frame = table.frame
    roles = [role for role in ("params", "flops", "tokens") if role in frame.columns]
    found = []
    for place, first in enumerate(roles):
        for second in roles[place + 1 :]:
            if len(frame) > 1 and np.array_equal(frame[first], frame[second]):
                names = [table.columns.get(role, role) for role in (first, second)]
                which = (
                    f"column {names[0]!r}" if names[0] == names[1] else f"columns {names[0]!r} and {names[1]!r} alike"
                )
                text = f"{which} given for {NOUNS[first]} and for {NOUNS[second]}: is that meant?"
                found.append(("same-column", text.replace("alike given", "hold the same, given")))
    return found


def _late_start(table: RunsTable) -> list[tuple[str, str]]:
    """Runs whose learning rates are not known from their first step on."""
    late = tuple(each.name or "the table" for each in table.schedules if each.begins_late)
    text = (
        f"rows of {some(late)} begin long after the first step, before which the rate is taken for the first row's: "
        "after a warm-up or a peak that is missing, sums of rates are wrong; add rows of those steps and rates, "
        "without losses"
    )
    return [("late-start", text)] if late else []


def _several_peaks(table: RunsTable) -> list[tuple[str, str]]:
    """Runs fitted together that anneal from rates of several heights, for which the laws' forms are not the papers'."""
    if not table.schedules:
        return []
    peaks = table.frame[RATE_SCHEDULE].map(lambda number: table.schedules[int(number) - 1].peak)
    of_group = peaks.groupby(table.frame["group"] if table.has("group") else np.zeros(len(peaks)))
    if (of_group.max() <= _ONE_PEAK * of_group.min()).all():
        return []
    text = (
        f"rates fall from peaks of {peaks.min():.3g} to {peaks.max():.3g}: the law takes a loss to be higher by a "
        "constant times its peak, where the papers take runs of any peak to start alike; --where or --group takes "
        "runs of one peak together"
    )
    return [("several-peaks", text)]


def _warming_up(table: RunsTable) -> list[tuple[str, str]]:
    """Rows of warm-ups, whose losses no law of learning rates describes."""
    if not table.schedules:
        return []
    ends = table.frame[RATE_SCHEDULE].map(lambda number: table.schedules[int(number) - 1].warm_sum)
    warming = table.frame["row"][table.frame[RATE_SUM] < ends].map(str)
    text = (
        f"{len(warming)} of {len(table.frame)} rows are of a warm-up (rows {some(tuple(warming))}): the law doesn't "
        "describe their losses; --where leaves them out, and their rates still count"
    )
    return [("warm-up-rows", text)] if len(warming) else []


def _no_optima(table: RunsTable) -> Iterator[str]:
    """Sizes or tokens that are to be fitted against compute, and are those of runs rather than the best ones."""
    frame = table.frame
    for role in ("params", "tokens"):
        if "flops" not in frame.columns or table.columns.get(role) not in table.targets:
            continue
        ends = frame.groupby("flops")[role].agg(["min", "max", "size"])
        several = ends[ends["size"] > 1]
        apart = float((several["max"] / several["min"]).median()) if len(several) else 1.0
        if 2 * several["size"].sum() > len(frame) and apart > _OPTIMA_APART:
            yield (
                f"column {table.columns[role]!r} has several values at the same compute, typically {apart:.3g} times "
                "apart: a fit to these is none to best sizes, of which a budget has one; --loss COLUMN finds them"
            )


def _logarithms(table: RunsTable) -> Iterator[str]:
    """Roles whose values no model has, a few units apart: logarithms that were taken for values."""
    frame = table.frame
    for role in ("params", "flops", "tokens"):
        if role not in table.columns or role in table.units:
            continue
        low, high, levels = frame[role].min(), frame[role].max(), frame[role].nunique()
        named = bool(set(plain_name(table.columns[role]).split("_")) & {"log", "log10", "lg", "ln"})
        near = low >= 2 and high < _LOGS_APART * low and levels >= 3
        if high > _LARGEST_LOG or not (named or near):
            continue
        base = _base(frame, role)
        to, shown = {"log10": ("10", 10.0), "ln": ("e", np.e), "log2": ("2", 2.0)}[base]
        others = " or ".join(each for each in _CONSTANTS if each != base)
        yield (
            f"column {table.columns[role]!r} goes from {low:.4g} to {high:.4g}: are these logarithms? As {to}^{role} "
            f"{NOUNS[role]} would go from {shown**low:.3g} to {shown**high:.3g}; then say --unit {role}={base} "
            f"(or {others}), else name their unit"
        )


def _base(frame: pd.DataFrame, role: str) -> str:
    """Which logarithm: the one with which C is 6·N·D, where all three are known; large ones are natural."""
    if {"params", "flops", "tokens"} <= set(frame.columns):
        off = {}
        for base, six in _CONSTANTS.items():
            logs = {
                each: frame[each] if frame[each].max() <= _LARGEST_LOG else np.log(frame[each]) / (np.log(6.0) / six)
                for each in ("params", "flops", "tokens")
            }
            off[base] = float((logs["flops"] - logs["params"] - logs["tokens"] - six).abs().median() / six)
        return min(off, key=lambda each: off[each])
    limit = _DECIMAL if role == "flops" else _DECIMAL / 2
    return "log10" if frame[role].max() <= limit else "ln"


def _checkpoints(table: RunsTable, options: FitOptions) -> list[tuple[str, str]]:
    """Rows that look like checkpoints, where nobody said so."""
    found = None if options.checkpoints else _curves(table)
    if found is None:
        return []
    rate = f", and {found.cooling!r} changes along them, so that most had not cooled down" if found.cooling else ""
    if found.runs:
        runs = table.columns.get(found.runs, found.runs)
        text = (
            f"{found.progress!r} grows within each of {found.count} values of {runs!r}{rate}: are these checkpoints of "
        )
        text += f"runs? Then say --checkpoints --run-id {runs}"
    else:
        text = f"{found.progress!r} grows from row to row{rate}: are these checkpoints of one run? Then they are not "
        text += "independent, and intervals are too narrow"
    return [("checkpoints", text)]


def _constant(table: RunsTable) -> Iterator[str]:
    """FLOPs that stay the same within runs: those of a step, or of a whole run."""
    frame, name = table.frame, table.columns.get("flops")
    if name is None or name == table.columns.get("budget"):
        return
    runs = _runs(table)
    if runs is not None:
        sizes = frame.groupby(runs)["flops"].agg(["size", "nunique"])
        several = sizes[sizes["size"] > 1]
        targets = frame.groupby(runs)[table.targets[0]].nunique()[several.index]
        if len(several) and (several["nunique"] == 1).all() and (targets > 1).any():
            yield (
                f"column {name!r} is constant within each of {len(several)} runs of several rows: are these FLOPs of "
                "a step, or of a whole run? Those up to each row are needed (or tokens and --tokens-from-flops 6)"
            )
            return
    if set(plain_name(name).replace("/", "_per_").split("_")) & {"step", "iter", "iteration", "token", "second", "sec"}:
        yield f"column {name!r} is taken for training FLOPs: are they not those of a whole run, as its name says?"


def _falling(table: RunsTable) -> Iterator[str]:
    """FLOPs that fall while tokens rise, in a run or at one size."""
    frame, data = table.frame, table.unit_of_data
    if not table.has("flops", "tokens"):
        return
    runs = _runs(table)
    sizes = (runs, frame.get("params"), active_params(table), frame.get("group"))
    keys = [each for each in sizes if each is not None]
    if not keys:
        return
    ordered = frame.sort_values("tokens", kind="stable")
    before = ordered.groupby([each[ordered.index] for each in keys], dropna=False)[["flops", "tokens"]].shift()
    falls = (ordered["flops"] < _FALLS * before["flops"]) & (ordered["tokens"] * _FALLS > before["tokens"])
    if falls.any():
        rows = some(tuple(ordered["row"][falls].map(str)))
        where = "of a run" if runs is not None else "at one size"
        flops, tokens = (table.columns.get(role, role) for role in ("flops", "tokens"))
        yield (
            f"FLOPs fall while {data} rise {where} at {int(falls.sum())} of {len(frame)} rows (rows {rows}): "
            f"are {flops!r} training FLOPs, and {tokens!r} training {data}?"
        )


def _unlike(table: RunsTable) -> Iterator[str]:
    """FLOPs a parameter and token that differ between groups, or at a few rows, beyond what size explains."""
    frame = table.frame
    if table.is_sweep or not table.has("params", "flops", "tokens") or len(frame) < 4:
        return
    found, active = _unlike_at(table, frame["params"]), active_params(table)
    if found and active is not None:
        found = _unlike_at(table, active).replace("C / (N·D)", "C / (N·D), N the active parameters,")
    if found:
        yield found


def _unlike_at(table: RunsTable, params: "pd.Series[float]") -> str:
    """The same, where these are the parameters that FLOPs are counted with."""
    frame, data = table.frame, table.unit_of_data
    sizes = params.map(np.log)
    ratios = np.log(frame["flops"]) - sizes - np.log(frame["tokens"])
    for name in _kinds(table):
        kinds = frame[name].map(str)
        medians = ratios.groupby(kinds).median()
        within = (ratios - kinds.map(medians)).abs().median()
        overlapping = sizes.groupby(kinds).min().max() <= sizes.groupby(kinds).max().min()
        if np.ptp(medians) > max(np.log(_UNLIKE if overlapping else _FAR), 4 * within):
            each = ", ".join(f"{np.exp(value):.3g} in {kind[:40]}" for kind, value in list(medians.items())[:4])
            return f"C / (N·D) is {each} (column {name!r}): are FLOPs, parameters and {data} counted alike?"
    odd = (ratios - ratios.median()).abs() > np.log(_ODD)
    if not odd.any() or 4 * odd.sum() > len(frame):
        return ""
    rows = some(tuple(frame["row"][odd].map(str)))
    return (
        f"C / (N·D) is {np.exp(ratios.median()):.3g} at most rows, but {np.exp(ratios[odd].iloc[0]):.3g} at "
        f"{int(odd.sum())} of them (rows {rows}): are their FLOPs counted alike?"
    )


def _kinds(table: RunsTable) -> Sequence[str]:
    """Columns that may say how FLOPs were counted: groups, files, and texts of a few values."""
    roles = {*ROLES, *table.targets, "row", "run_id", "seed"}
    texts = [
        name
        for name in table.frame.columns
        if name not in roles and not pd.api.types.is_numeric_dtype(table.frame[name])
    ]
    first = [name for name in ("group", "file") if name in texts]
    return [
        name for name in dict.fromkeys((*first, *texts)) if 2 <= table.frame[name].map(str).nunique() <= _MOST_KINDS
    ]


def _runs(table: RunsTable) -> "pd.Series[str] | None":
    """Each row's run: by its id, or by the column that seems to name runs."""
    if "run_id" in table.frame.columns:
        return table.frame["run_id"].map(str)
    found = _curves(table)
    return table.frame[found.runs].map(str) if found and found.runs else None


def _curves(table: RunsTable) -> Curves | None:
    """The runs whose checkpoints rows seem to be; a sweep's rows are none."""
    return None if table.is_sweep else recognised(table.frame, len(table.sources) > 1)
