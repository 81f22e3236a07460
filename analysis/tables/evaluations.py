"""Values of evaluations, such as FID: their floors and intervals, and evaluations that differ kept apart.

A column `fid` may have companions: `fid_low` and `fid_high`, its 95% interval, and `fid_floor`, what real images have
against real images. Rows whose evaluations differ in a setting (extractor, reference set, number of images, guidance)
don't compare. A column of the table holds only those of one setting; others get columns of their own, or are left out.
"""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.tables.roles import LABELS, ROLES, plain_name, some

LIKELIHOOD = "exp(-loss)"
"""Column with the geometric mean of a token's probability, one over the perplexity: it rises where loss falls."""
RECONSTRUCTIONS = "rfid"
"""Column with the FID of the tokenizer's reconstructions."""
EVALUATORS = ("evaluator", "extractor", "reference_set", "samples", "sample_count", "n_samples", "num_samples")
GUIDANCES = ("guidance", "cfg", "cfg_scale")
_EVALUATORS = (*EVALUATORS, "evaluation_extractor", "evaluation_reference", "evaluation_samples")
_GUIDANCES = (*GUIDANCES, "evaluation_guidance")
_COMPANIONS = ("low", "high", "floor")
_NAMES = re.compile(r"(fid|kid|mind)(?![a-z])")
_LARGEST_LOSS = 100.0
"""A larger loss isn't in nats a token, and has no perplexity."""
_ROWS = 3
"""Fewer rows of a guidance are no law."""
_SAME_FLOOR = 1.05


def is_evaluation(target: str) -> bool:
    """Whether a column holds FID, KID or MIND, by its name: `fid`, `FID-50k`, `mind`."""
    return _NAMES.match(plain_name(target)) is not None


def companions(frame: pd.DataFrame, targets: Sequence[str]) -> list[str]:
    """The columns that belong to targets that are evaluations: intervals, floors, the tokenizer's own FID."""
    names = [f"{target}_{each}" for target in targets if is_evaluation(target) for each in _COMPANIONS]
    names += [RECONSTRUCTIONS] if "fid" in targets else []
    return [name for name in names if name in frame.columns and name not in targets]


def settings(frame: pd.DataFrame, targets: Sequence[str]) -> "pd.Series[str]":
    """How each row was evaluated, as text; the same text for all rows where no target is an evaluation."""
    columns = _named(frame, (*_EVALUATORS, *_GUIDANCES))
    return _texts(frame, columns if any(map(is_evaluation, targets)) else [])


def settings_by_target(frame: pd.DataFrame, targets: Sequence[str]) -> dict[str, dict[str, str]]:
    """How the values of each evaluation among the targets were made: each setting's values, and the floor."""
    found = {}
    for target in filter(is_evaluation, targets):
        rows = frame[frame[target].notna()]
        columns = _named(frame, (*_EVALUATORS, *_GUIDANCES))
        found[target] = {name: some(tuple(_texts(rows, [name]).unique())) for name in columns}
        floor = measured_floor(frame, target)
        found[target] |= {} if floor is None else {f"{target}_floor": f"{floor:.6g}"}
    return found


def measured_floor(frame: pd.DataFrame, target: str) -> float | None:
    """The floor of a target: the median of its column; None where none was measured."""
    floors = _floors(frame, target)
    return float(np.median(floors)) if len(floors) else None


def kept_apart(
    frame: pd.DataFrame, targets: Sequence[str], loss: str = ""
) -> tuple[pd.DataFrame, list[str], list[tuple[str, str]]]:
    """Evaluations of one setting a column, by blank values and further columns.

    Of extractors, reference sets and numbers of images the one with most rows is kept. A guidance with fewer rows than
    the commonest gets columns of its own, such as `fid_guidance_2`; where cells were evaluated at several,
    `fid_guidance_best` holds each one's lowest value. A run's further rows then hold another evaluation, no other loss.

    Args:
        frame: rows with their roles and targets.
        targets: the columns to fit.
        loss: the target that is a loss in nats a token, if there is one.

    Returns:
        The frame, its targets, and what was left out or kept apart, each with the code of its warning.
    """
    found: list[tuple[str, str]] = []
    if not any(map(is_evaluation, targets)):
        return frame, list(targets), found
    frame = frame.copy()
    if loss and not is_evaluation(loss) and frame[loss].max() <= _LARGEST_LOSS:
        frame[LIKELIHOOD] = np.exp(-frame[loss])
    others = [target for target in targets if not is_evaluation(target)]
    alike = [name for name in (*ROLES, *LABELS, *others) if name in frame.columns]
    made = frame[alike].assign(settings=settings(frame, targets))
    again = made.duplicated(alike) & ~made.duplicated()
    frame.loc[again, others] = np.nan
    every = list(targets)
    for target in targets:
        if is_evaluation(target):
            missing = frame["row"][frame[target].isna()]
            if len(missing):
                message = f"{target}: {len(missing)} rows without a value are left out of its fits"
                found.append(("rows-excluded", f"{message} (rows {_rows(missing)})"))
            found += _of_one_evaluator(frame, target)
            further, said = _of_one_guidance(frame, target)
            every[every.index(target) + 1 : every.index(target) + 1] = further
            found += said
            floors = _floors(frame, target)
            if len(floors) and floors.max() > _SAME_FLOOR * floors.min():
                message = f"{target}: its measured floors go from {floors.min():.4g} to {floors.max():.4g}"
                found.append(("mixed-evaluators", f"{message}; laws are held at their median, {np.median(floors):.4g}"))
    return frame, every, found


def _of_one_evaluator(frame: pd.DataFrame, target: str) -> list[tuple[str, str]]:
    """Blanks the values of all but the commonest extractor, reference set and number of images."""
    has_value = frame[target].notna()
    columns = _named(frame, _EVALUATORS)
    varied = [name for name in columns if _texts(frame[has_value], [name]).nunique() > 1]
    if not varied:
        return []
    texts = _texts(frame, varied)
    commonest = _by_count(texts[has_value])[0]
    other = has_value & (texts != commonest)
    _keep(frame, target, target, ~other)
    message = f"{target}: fitted to the rows of {', '.join(varied)} = {commonest}, of which there are most"
    return [("mixed-evaluators", f"{message}; {other.sum()} others are left out (rows {_rows(frame['row'][other])})")]


def _of_one_guidance(frame: pd.DataFrame, target: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Leaves the commonest guidance in the column, and gives others columns of their own."""
    columns = _named(frame, _GUIDANCES)
    has_value = frame[target].notna()
    texts = _texts(frame, columns)
    levels = _by_count(texts[has_value])
    if len(levels) < 2:
        return [], []
    further, few = [], []
    for level in levels[1:]:
        rows = has_value & (texts == level)
        if rows.sum() >= _ROWS:
            further.append(f"{target}_guidance_{level}")
            _keep(frame, target, further[-1], rows)
        else:
            few += frame["row"][rows].tolist()
    best = _best_of_each_cell(frame, target)
    if best.sum() >= _ROWS:
        further.append(f"{target}_guidance_best")
        _keep(frame, target, further[-1], best)
    _keep(frame, target, target, texts == levels[0])
    message = f"{target}: holds the rows of {', '.join(columns)} = {levels[0]}"
    message += f"; others are fitted apart, as {', '.join(further)}" if further else ""
    message += f"; too few for a law: rows {some(tuple(map(str, few)))}" if few else ""
    return further, [("mixed-evaluators", message)]


def _best_of_each_cell(frame: pd.DataFrame, target: str) -> "pd.Series[bool]":
    """The row with the lowest value of each cell that has several."""
    cell = [name for name in (*ROLES, *LABELS) if name in frame.columns]
    values = frame[frame[target].notna()].groupby(cell, dropna=False)[target]
    places = values.idxmin()[values.size() > 1]
    return pd.Series(frame.index.isin(places), index=frame.index)


def _keep(frame: pd.DataFrame, source: str, name: str, rows: "pd.Series[bool]") -> None:
    """A column and its companions with the values of some rows of another, blank elsewhere."""
    frame[name] = frame[source].where(rows)
    for each in _COMPANIONS:
        if f"{source}_{each}" in frame.columns:
            frame[f"{name}_{each}"] = frame[f"{source}_{each}"].where(rows)


def _floors(frame: pd.DataFrame, target: str) -> "pd.Series[float]":
    name = f"{target}_floor"
    if name not in frame.columns:
        return pd.Series(dtype=float)
    floors: pd.Series[float] = frame.loc[frame[target].notna(), name]
    return floors[np.isfinite(floors) & (floors > 0)]


def _named(frame: pd.DataFrame, names: tuple[str, ...]) -> list[str]:
    return [each for each in frame.columns if plain_name(each) in names]


def _texts(frame: pd.DataFrame, columns: list[str]) -> "pd.Series[str]":
    """What several columns hold, as one text a row; blank for no columns."""
    rows = zip(*(map(_shown, frame[name]) for name in columns), strict=True) if columns else [()] * len(frame)
    return pd.Series([", ".join(row) for row in rows], index=frame.index, dtype=object)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)[:40]


def _by_count(texts: "pd.Series[str]") -> list[str]:
    """Distinct texts, those of most rows first, then those that come first."""
    return [
        str(text) for text in texts.groupby(texts, sort=False).size().sort_values(ascending=False, kind="stable").index
    ]


def _rows(rows: "pd.Series[str]") -> str:
    return some(tuple(rows.astype(str)))
