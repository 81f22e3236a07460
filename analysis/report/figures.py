"""The figures of a result, at the width of a paper's column; `drawing.py` says how they look."""

import re
from dataclasses import replace

from analysis.report.comparison_figure import groups
from analysis.report.curve_figures import against, against_compute, isoflop
from analysis.report.drawing import Drawing
from analysis.report.evaluation_figures import against_guidance, against_loss, sizes
from analysis.report.fit_figures import clouds, contour, holdout, residuals
from analysis.report.published import published
from analysis.results import LawsResult
from analysis.tables.evaluations import LIKELIHOOD, is_evaluation


def draw_all(result: LawsResult) -> list[Drawing]:
    """Every figure that the result has data for."""
    drawings = []
    main, error, evaluations = _targets(result)
    for target, stem in {main: "loss", error: "error"}.items():
        for key, group in _keys(result, target):
            drawings += _of_group(group, _against_compute(result, key, group, target, f"{stem}_vs_compute"))
    for target in evaluations:
        for key, group in _keys(result, target):
            drawings += _of_group(group, _of_evaluation(result, key, group, target))
    for settings in dict.fromkeys(curve.settings for curve in result.guidance):
        drawings.append(against_guidance(result, settings, "quality_vs_guidance"))
    for group in result.sizes:
        drawings += _of_group(group, [sizes(result, group, f"best_sizes{_suffix(group)}")])
    for key, group in _keys(result, main):
        drawings += _of_group(group, _of_one_target(result, key, group, main))
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
    others = sorted({e.x for e in result.fits if e.fitted.law.is_curve} - {"flops", "params", LIKELIHOOD})
    drawings += [
        against(result, target, x, f"loss_vs{_suffix(x)}{suffix}", group)
        for x in others
        if result.entries(target, x, group)
    ]
    if key in result.grids:
        drawings.append(isoflop(result, result.grids[key], target, f"isoflop{suffix}"))
    surface = next(
        (e for e in result.fits if e.target == target and e.fitted.law.is_surface and e.group == group), None
    )
    if surface is not None:
        drawings.append(contour(result, surface, f"contour{suffix}"))
    drawings.append(residuals(result, result.main(target, group), f"residuals{suffix}"))
    if key in result.checks:
        drawings.append(holdout(result, key, target, f"holdout{suffix}"))
    drawings.append(clouds(result, result.main(target, group), f"clouds{suffix}"))
    return drawings


def _of_evaluation(result: LawsResult, key: str, group: str, target: str) -> list[Drawing]:
    """FID or the like, beside loss: against compute, loss and size, and its IsoFLOP sets."""
    stem, suffix = _suffix(target)[1:], _suffix(group)
    drawings = _against_compute(result, key, group, target, f"{stem}_vs_compute")
    if result.entries(target, LIKELIHOOD, group):
        drawings.append(against_loss(result, target, f"{stem}_vs_loss{suffix}", group))
    if result.entries(target, "params", group):
        drawings.append(against(result, target, "params", f"{stem}_vs_parameters{suffix}", group))
    if key in result.grids and any(each.sizes > 1 for each in result.grids[key].minima):
        drawings.append(isoflop(result, result.grids[key], target, f"isoflop_{stem}{suffix}"))
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


def _targets(result: LawsResult) -> tuple[str, str, list[str]]:
    """The first target that is no token error, the first that is one ("" for none), and evaluations beside them.

    An evaluation or an error comes first only where there is nothing else. Of several guidances the commonest is drawn.
    """
    losses = [name for name in result.table.targets if "error" not in name]
    error = next((name for name in result.table.targets if "error" in name), "")
    main = next((name for name in losses if not is_evaluation(name)), losses[0] if losses else error)
    return main, error, [name for name in losses if is_evaluation(name) and name != main and "_guidance_" not in name]


def _keys(result: LawsResult, target: str) -> list[tuple[str, str]]:
    """Name of the grid and group of a target, for each group."""
    found = sorted({entry.group for entry in result.fits if entry.target == target})
    return [(f"{target} [{group}]" if group else target, group) for group in found]


def _suffix(text: str) -> str:
    """What a group or column adds to a file's name."""
    return "_" + re.sub(r"[^\w.-]+", "_", text)[:60] if text else ""


def _against_compute(result: LawsResult, key: str, group: str, target: str, name: str) -> list[Drawing]:
    name += _suffix(group)
    if key in result.grids:
        return [against_compute(result, key, group, target, name)]
    return [against(result, target, "flops", name, group)] if result.entries(target, "flops", group) else []
