"""The figures of a result, at the width of a paper's column; `drawing.py` says how they look."""

import re
from dataclasses import replace

from analysis.report.curve_figures import against, against_compute, groups, isoflop
from analysis.report.drawing import Drawing
from analysis.report.fit_figures import clouds, contour, holdout, residuals
from analysis.report.published import published
from analysis.results import LawsResult


def draw_all(result: LawsResult) -> list[Drawing]:
    """Every figure that the result has data for."""
    drawings = []
    for stem in ("loss", "error"):
        for key, group, target in _keys(result, stem):
            drawings += _of_group(group, _against_compute(result, key, group, target, f"{stem}_vs_compute"))
    for key, group, target in _keys(result, "loss"):
        drawings += _of_group(group, _of_one_target(result, key, group, target))
    if result.comparisons:
        drawings.append(groups(result))
    if result.options.published:
        drawings += published(result)
    return _named_apart(drawings)


def _of_one_target(result: LawsResult, key: str, group: str, target: str) -> list[Drawing]:
    """All but loss against compute."""
    drawings, suffix = [], _suffix(group)
    if result.entries(target, "params", group):
        drawings.append(against(result, target, "params", f"loss_vs_parameters{suffix}", group))
    others = sorted({entry.x for entry in result.fits} - {"flops", "params", "params, tokens"})
    drawings += [
        against(result, target, x, f"loss_vs{_suffix(x)}{suffix}", group)
        for x in others
        if result.entries(target, x, group)
    ]
    if key in result.grids:
        drawings.append(isoflop(result, result.grids[key], target, f"isoflop{suffix}"))
    surface = next((e for e in result.fits if e.target == target and len(e.inputs) == 2 and e.group == group), None)
    if surface is not None:
        drawings.append(contour(result, surface, f"contour{suffix}"))
    drawings.append(residuals(result, result.main(target, group), f"residuals{suffix}"))
    if key in result.checks:
        drawings.append(holdout(result, key, target, f"holdout{suffix}"))
    drawings.append(clouds(result, result.main(target, group), f"clouds{suffix}"))
    return drawings


def _of_group(group: str, drawings: list[Drawing]) -> list[Drawing]:
    """With captions that say which group they show."""
    return [each if group in each.caption else replace(each, caption=f"{group}. {each.caption}") for each in drawings]


def _named_apart(drawings: list[Drawing]) -> list[Drawing]:
    """No two files of one name, where groups' names differ only in what a file's name can't hold."""
    taken: dict[str, int] = {}
    named = []
    for drawing in drawings:
        taken[drawing.name] = taken.get(drawing.name, 0) + 1
        count = taken[drawing.name]
        named.append(drawing if count == 1 else replace(drawing, name=f"{drawing.name}_{count}"))
    return named


def _keys(result: LawsResult, stem: str) -> list[tuple[str, str, str]]:
    """Name of the grid, group and first target of a kind (token error, or anything else as loss), for each group."""
    names = [name for name in result.table.targets if ("error" in name) == (stem == "error")]
    if not names:
        return []
    found = sorted({entry.group for entry in result.fits if entry.target == names[0]})
    return [(f"{names[0]} [{group}]" if group else names[0], group, names[0]) for group in found]


def _suffix(text: str) -> str:
    """What a group or column adds to a file's name."""
    return "_" + re.sub(r"[^\w.-]+", "_", text)[:60] if text else ""


def _against_compute(result: LawsResult, key: str, group: str, target: str, name: str) -> list[Drawing]:
    name += _suffix(group)
    if key in result.grids:
        return [against_compute(result, key, group, target, name)]
    return [against(result, target, "flops", name, group)] if result.entries(target, "flops", group) else []
