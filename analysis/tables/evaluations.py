"""Values of evaluations, such as FID: their floors and intervals, and evaluations that differ kept apart.

A column `fid` may have companions: `fid_low` and `fid_high`, its 95% interval, and `fid_floor`, what real images have
against real images. Rows whose evaluations differ in a setting (extractor, reference set, number of images, guidance)
don't compare. A column of the table holds only those of one setting.
Rows that agree in all but that are one run, evaluated in several ways: it becomes one row.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from analysis.errors import TableError
from analysis.options import DEFAULT_TARGETS
from analysis.tables.roles import LABELS, ROLES, plain_name, some

LIKELIHOOD = "exp(-loss)"
"""Column with the geometric mean of a token's probability, one over the perplexity: it rises where loss falls."""
RECONSTRUCTIONS = "rfid"
"""Column with the FID of the tokenizer's reconstructions."""
EVALUATORS = (
    *("evaluator", "extractor", "reference_set", "samples", "sample_count", "n_samples", "num_samples"),
    *("guidance_schedule", "top_k", "top_p", "sampling_seed", "images_kept"),
)
GUIDANCES = ("guidance", "cfg", "cfg_scale")
_EVALUATORS = (*EVALUATORS, "evaluation_extractor", "evaluation_reference", "evaluation_samples")
_GUIDANCES = (*GUIDANCES, "evaluation_guidance")
_COMPANIONS = ("low", "high", "floor")
_NAMES = re.compile(r"(fid|kid|mind)(?![a-z])")
_OTHER_NAMES = ("image_precision", "image_recall", "inception_score")
"""Of images, too, but better the higher they are."""
_BEST = "_guidance_best"
_LARGEST_LOSS = 100.0
"""A larger loss isn't in nats a token, and has no perplexity."""
_ROWS = 3
"""Fewer rows of a guidance are no law, and fewer guidances no curve."""
_SAME_FLOOR = 1.05


def is_evaluation(target: str) -> bool:
    """Whether a column holds FID, KID or MIND, by its name: `fid`, `FID-50k`, `mind`."""
    return _NAMES.match(plain_name(target)) is not None


def comparable_targets(runs: pd.DataFrame) -> tuple[str, ...]:
    """The targets in which all runs of sweeps of several experiments compare; none named: in all targets.

    Losses and errors do on the same tokens, and in the same unit; FID and its like do whatever drew the images.

    Raises:
        TableError: no target does.
    """
    read = [name for name in ("tokenizer_fingerprint", "latents_fingerprint", "loss_unit") if name in runs.columns]
    if (runs[read].nunique(dropna=False) <= 1).all():
        return ()
    measured = runs.columns[runs.notna().any()]
    found = tuple(name for name in DEFAULT_TARGETS if is_evaluation(name) and name in measured)
    if not found:
        raise TableError("losses of different tokens don't compare, and no run's images were measured")
    return found


def companions(frame: pd.DataFrame, targets: Sequence[str]) -> list[str]:
    """The columns that belong to targets that are evaluations: intervals, floors, the tokenizer's own FID."""
    names = [f"{target}_{each}" for target in targets if is_evaluation(target) for each in _COMPANIONS]
    names += [RECONSTRUCTIONS] if "fid" in targets else []
    return [name for name in names if name in frame.columns and name not in targets]


def measured_floor(frame: pd.DataFrame, target: str) -> float | None:
    """The floor of a target: the median of its column; None where none was measured."""
    floors = _floors(frame, target)
    return float(np.median(floors)) if len(floors) else None


@dataclass(frozen=True)
class Apart:
    """A table whose evaluations are kept apart.

    Attributes:
        frame: one row a run.
        targets: the columns to fit.
        settings: how the values of each evaluation among them were made: each setting's values, and the floor.
        found: what was left out or kept apart, each with the code of its warning.
    """

    frame: pd.DataFrame
    targets: tuple[str, ...]
    settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    found: tuple[tuple[str, str], ...] = ()


def runs(frame: pd.DataFrame, targets: Sequence[str]) -> "pd.Series[int]":
    """A number for each row, the same for rows of one run that was evaluated in several ways.

    They agree in their roles and labels and in all targets that are no evaluations, and differ in how they were
    evaluated. Rows that don't are copies, or runs of their own.
    """
    alike = [
        name for name in dict.fromkeys((*ROLES, *LABELS, *targets)) if name in frame.columns and not _of_images(name)
    ]
    keys = frame[alike].assign(settings=_texts(frame, setting_columns(frame)))
    keys["copy"] = keys.groupby(list(keys.columns), dropna=False).cumcount()
    numbers: pd.Series[int] = keys.groupby([*alike, "copy"], dropna=False, sort=False).ngroup()
    return numbers


def at_several_guidances(frame: pd.DataFrame, targets: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each run that was evaluated at three or more guidances, and otherwise alike.

    Args:
        frame: rows of which a run has one for each way in which it was evaluated.
        targets: the columns to fit.

    Returns:
        How the rows were evaluated apart from guidance, in words, and the rows in order of `guidance`, one for each.
    """
    guidances = _named(frame, _GUIDANCES)
    if not guidances:
        return []
    columns = _named(frame, _EVALUATORS)
    rows = frame.assign(guidance=pd.to_numeric(frame[guidances[0]], errors="coerce"))
    rows = rows[rows["guidance"].notna() & rows[list(targets)].notna().any(axis="columns")]
    by = [runs(frame, targets)[rows.index], _texts(rows, columns)]
    found = []
    for _, group in rows.groupby(by, sort=False):
        ordered = group.drop_duplicates("guidance").sort_values("guidance")
        if len(ordered) >= _ROWS:
            said = [f"{name} = {_shown(ordered[name].iloc[0])}" for name in columns]
            found.append((", ".join(said), ordered))
    return found


def kept_apart(frame: pd.DataFrame, targets: Sequence[str], loss: str = "") -> Apart:
    """Evaluations of one setting a column, by blank values and further columns, and one row a run.

    Of extractors, reference sets, numbers of images and guidances the one of most runs is kept; where cells were
    evaluated at several guidances, `fid_guidance_best` holds each one's lowest value.

    Args:
        frame: rows with their roles and targets; a run has one for each way in which it was evaluated.
        targets: the columns to fit.
        loss: the target that is a loss in nats a token, if there is one.
    """
    numbers = runs(frame, targets)
    if not any(map(_of_images, targets)):
        return Apart(frame[~numbers.duplicated()].reset_index(drop=True), tuple(targets))
    frame = frame.copy()
    if any(map(is_evaluation, targets)) and loss and not is_evaluation(loss) and frame[loss].max() <= _LARGEST_LOSS:
        frame[LIKELIHOOD] = np.exp(-frame[loss])
    every, found = list(targets), []
    for target in filter(_of_images, targets):
        missing = frame["row"][(frame[target].groupby(numbers).transform("count") == 0) & ~numbers.duplicated()]
        if len(missing):
            message = f"{target}: {len(missing)} rows without a value are left out of its fits"
            found.append(("rows-excluded", f"{message} (rows {_rows(missing)})"))
        found += _of_one_evaluator(frame, target, numbers)
        further, said = _of_one_guidance(frame, target)
        every[every.index(target) + 1 : every.index(target) + 1] = further
        found += said
        floors = _floors(frame, target)
        if len(floors) and floors.max() > _SAME_FLOOR * floors.min():
            message = f"{target}: its measured floors go from {floors.min():.4g} to {floors.max():.4g}"
            found.append(("mixed-evaluators", f"{message}; laws are held at their median, {np.median(floors):.4g}"))
    settings = {target: _described(frame, target) for target in every if is_evaluation(target)}
    return Apart(_one_row_a_run(frame, every, numbers), tuple(every), settings, tuple(found))


def _described(frame: pd.DataFrame, target: str) -> dict[str, str]:
    rows = frame[frame[target].notna()]
    floor = measured_floor(frame, target)
    described = {name: some(tuple(_texts(rows, [name]).unique())) for name in setting_columns(frame)}
    return described | ({} if floor is None else {f"{target}_floor": f"{floor:.6g}"})


def _one_row_a_run(frame: pd.DataFrame, targets: Sequence[str], numbers: "pd.Series[int]") -> pd.DataFrame:
    """The first row of each run, with the values that its other rows have of evaluations."""
    first = ~numbers.duplicated()
    if first.all():
        return frame
    rows = frame[first].copy()
    measured = [target for target in targets if _of_images(target)]
    for name in (*measured, *companions(frame, measured)):
        rows[name] = frame[name].groupby(numbers).first().loc[numbers[first]].to_numpy()
    return rows.reset_index(drop=True)


def _of_one_evaluator(frame: pd.DataFrame, target: str, numbers: "pd.Series[int]") -> list[tuple[str, str]]:
    """Blanks the values of all but the commonest extractor, reference set and number of images."""
    has_value = frame[target].notna()
    columns = _named(frame, _EVALUATORS)
    varied = [name for name in columns if _texts(frame[has_value], [name]).nunique() > 1]
    if not varied:
        return []
    texts = _texts(frame, varied)
    once = ~pd.DataFrame({"run": numbers, "texts": texts}).duplicated()
    commonest = _by_count(texts[has_value & once])[0]
    other = has_value & (texts != commonest)
    _keep(frame, target, target, ~other)
    message = f"{target}: fitted to the rows of {', '.join(varied)} = {commonest}, of which there are most"
    return [("mixed-evaluators", f"{message}; {other.sum()} others are left out (rows {_rows(frame['row'][other])})")]


def _of_one_guidance(frame: pd.DataFrame, target: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Leaves the commonest guidance in the column, and puts each cell's lowest value into one of its own."""
    columns = _named(frame, _GUIDANCES)
    has_value = frame[target].notna()
    texts = _texts(frame, columns)
    levels = _by_count(texts[has_value])
    if len(levels) < 2:
        return [], []
    name, best = f"{target}{_BEST}", _best_of_each_cell(frame, target)
    fitted = is_evaluation(target) and best.sum() >= _ROWS
    if fitted:
        _keep(frame, target, name, best)
    others = frame["row"][has_value & (texts != levels[0])]
    _keep(frame, target, target, texts == levels[0])
    message = f"{target}: fitted to the rows of {', '.join(columns)} = {levels[0]}, of which there are most"
    message += f", and apart from these to each cell's lowest value, as {name}" if fitted else ""
    message += f"; {len(others)} rows have another guidance (rows {_rows(others)})"
    return [name] if fitted else [], [("mixed-evaluators", message)]


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
    if name == "fid" and RECONSTRUCTIONS in frame.columns:
        frame[RECONSTRUCTIONS] = frame[RECONSTRUCTIONS].where(rows)


def _floors(frame: pd.DataFrame, target: str) -> "pd.Series[float]":
    name = f"{target}_floor"
    if name not in frame.columns:
        return pd.Series(dtype=float)
    floors: pd.Series[float] = frame.loc[frame[target].notna(), name]
    return floors[np.isfinite(floors) & (floors > 0)]


def _of_images(target: str) -> bool:
    """Whether a column measures images, so that values of different settings don't compare."""
    return is_evaluation(target) or plain_name(target).startswith(_OTHER_NAMES)


def setting_columns(frame: pd.DataFrame) -> list[str]:
    """The columns that say how images were drawn and measured."""
    return _named(frame, (*_EVALUATORS, *_GUIDANCES))


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
