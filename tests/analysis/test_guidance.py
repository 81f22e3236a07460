"""FID against guidance: the best by a parabola, and further evaluations of a run that are no further runs."""

import json

import numpy as np
import pandas as pd
import pytest
from planted_tables import evaluation_table

from analysis.grids.guidance import best_guidance
from analysis.options import FitOptions
from analysis.pipeline import fit_laws
from analysis.report.figures import draw_all
from analysis.report.html import render
from analysis.tables.table import prepare

GUIDANCES = (1.5, 0.0, 0.5, 1.0, 2.0, 3.0)
QUICK = FitOptions(law=("power",), bootstrap_draws=50, holdout=False)


def long_table(guidances=GUIDANCES, depths=(4, 6, 8, 12)):
    """Each cell's FID and MIND at its best are the planted ones, and their logarithms are parabolas in guidance.

    The larger a model, the more guidance it wants.
    """
    first = evaluation_table(depths=depths)
    best = 0.8 + 0.1 * first["depth"]
    rows = []
    for guidance in guidances:
        grown = np.exp(0.3 * (guidance - best) ** 2)
        each = first.assign(guidance=guidance, extractor="inception", image_precision=0.5 + 0.1 * guidance)
        each["image_recall"] = 0.9 - 0.1 * guidance
        for name in ("fid", "fid_low", "fid_high", "mind", "mind_low", "mind_high"):
            each[name] = first[name] * grown
        rows.append(each.drop(columns=[name for name in first if name.startswith("evaluation_")]))
    return pd.concat(rows).sort_index(kind="stable").reset_index(drop=True)


def test_a_parabola_in_the_logarithm_is_recovered():
    x = pd.Series([0.0, 0.5, 1.0, 2.0, 4.0])
    found = best_guidance(x, 3.0 * np.exp(0.7 * (x - 1.3) ** 2))
    assert found.guidance == pytest.approx(1.3)
    assert found.value == pytest.approx(3.0)
    assert (found.lowest_at, found.bracketed) == (1.0, True)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_lies_between_the_neighbours_of_the_lowest(seed):
    random = np.random.default_rng(seed)
    x = pd.Series(np.sort(random.uniform(0, 5, 7)))
    y = pd.Series(random.lognormal(size=7))
    found = best_guidance(x, y)
    place = int(y.argmin())
    assert found.lowest_at == x[place]
    if place in (0, 6):
        assert (found.guidance, found.value, found.bracketed) == (x[place], y[place], False)
    else:
        assert x[place - 1] < found.guidance < x[place + 1]
        assert 0 < found.value <= y[place] * (1 + 1e-9)
        coefficients = np.polyfit(x[place - 1 : place + 2], np.log(y[place - 1 : place + 2]), 2)
        assert found.guidance == pytest.approx(-coefficients[1] / (2 * coefficients[0]))


@pytest.mark.parametrize("lowest", [-0.001, 0.0])
def test_values_without_a_logarithm_are_taken_as_they_are(lowest):
    """KID, an unbiased estimate, may be below 0."""
    found = best_guidance(pd.Series([0.0, 1.0, 3.0]), pd.Series([0.004, lowest, 0.002]))
    assert (found.guidance, found.value, found.lowest_at, found.bracketed) == (1.0, lowest, 1.0, True)


def test_equal_values_and_few_values():
    assert best_guidance(pd.Series([0.0, 1.0, 2.0]), pd.Series([2.0, 2.0, 2.0])).bracketed is False
    flat = best_guidance(pd.Series([0.0, 1.0, 2.0, 3.0]), pd.Series([3.0, 2.0, 2.0, 3.0]))
    assert flat.guidance == pytest.approx(1.5)
    assert best_guidance(pd.Series([0.0, 1.0]), pd.Series([2.0, 1.0])) is None
    assert best_guidance(pd.Series([0.0, 1.0, 2.0]), pd.Series([2.0, np.nan, 1.0])) is None


def test_curves_are_in_laws_json_report_and_figure():
    result = fit_laws(long_table(), QUICK)
    curves = json.loads(json.dumps(result.as_json()))["guidance"]
    assert len(curves) == 20
    for curve in curves:
        assert [point["guidance"] for point in curve["points"]] == sorted(GUIDANCES)
        assert curve["points"][5]["image_precision"] == pytest.approx(0.8)
        expected = 0.8 + 0.1 * curve["sizes"]["depth"]
        assert curve["best"]["fid"] == {
            "guidance": pytest.approx(expected),
            "value": pytest.approx(100 * curve["best"]["mind"]["value"]),
            "lowest_at": pytest.approx(min(GUIDANCES, key=lambda each: abs(each - expected))),
            "bracketed": True,
        }
    (drawing,) = [each for each in draw_all(result) if each.name == "quality_vs_guidance"]
    assert "20 cells (extractor = inception)" in drawing.caption
    html = render(result, [])
    assert "<h2>Guidance</h2>" in html
    assert "0.5 → 0.8" in html
    assert "an end of the range: not bracketed" not in html
    below = render(fit_laws(long_table((0.0, 0.5, 1.0)), QUICK), [])
    assert "an end of the range: not bracketed" in below


def test_two_guidances_and_other_settings_are_no_curve():
    table = long_table((1.5, 2.0, 3.0))
    table.loc[table["guidance"] == 2.0, "extractor"] = "dinov2"
    result = fit_laws(table, QUICK)
    assert result.guidance == ()
    assert "<h2>Guidance</h2>" not in render(result, [])
    assert fit_laws(long_table(), FitOptions(target=("loss",), law=("power",), bootstrap_draws=50)).guidance == ()


def test_best_sizes_by_loss_and_by_fid_at_one_guidance_and_at_each_cells_best():
    table = long_table(depths=(3, 4, 6, 8, 12, 16))
    result = fit_laws(table, FitOptions(target=("loss", "fid"), law=("power",), bootstrap_draws=50, holdout=False))
    assert result.table.targets == ("loss", "fid", "fid_guidance_best")
    for each in result.sizes[""]:
        assert list(each.targets) == ["loss", "fid", "fid_guidance_best"]
        assert {size.sizes for size in each.targets.values()} == {6}
    html = render(result, [])
    for name in ("loss", "fid", "fid_guidance_best"):
        assert f"best N by {name}<" in html
    alone = table[table["guidance"] == 1.5]
    expected = fit_laws(alone, FitOptions(target=("loss", "fid"), law=("power",), bootstrap_draws=50, holdout=False))
    for each, other in zip(result.sizes[""], expected.sizes[""], strict=True):
        assert each.targets["loss"] == other.targets["loss"]
        assert each.targets["fid"] == other.targets["fid"]


def test_a_further_row_is_no_further_run():
    """Not for laws of loss, seeds, cells, warnings or the number of runs, whatever is fitted."""
    table = long_table()
    first = table[table["guidance"] == 1.5]
    for options in (QUICK, FitOptions(**{**vars(QUICK), "target": ("loss",)})):
        several = table.copy()
        several.attrs["missing"] = ("one",)
        long, short = fit_laws(several, options), fit_laws(first, options)
        assert len(long.table.frame) == len(short.table.frame) == 20
        for name in ("loss against flops: power", "loss against params: power"):
            own, other = (next(each for each in result.fits if each.name == name) for result in (long, short))
            assert own.fitted.parameters == other.fitted.parameters
        pd.testing.assert_frame_equal(
            long.grids["loss"].cells[["budget", "params", "loss", "runs", "flops"]],
            short.grids["loss"].cells[["budget", "params", "loss", "runs", "flops"]],
        )
        assert long.grids["loss"].noise is None
        warnings = {each.code for each in long.warnings}
        assert "repeated-rows" not in warnings
        assert next(each.message for each in long.warnings if each.code == "missing-runs").startswith("1 of 21 runs")
        assert "100 rows are further evaluations of runs that other rows have" in long.table.notes
        assert len(long.table.measured) == 120


def test_dropping_the_highest_losses_drops_runs():
    table = long_table()
    kept = prepare(table, FitOptions(drop_highest=3)).frame
    once = prepare(table[table["guidance"] == 1.5], FitOptions(drop_highest=3)).frame
    assert set(kept["run_id"]) == set(once["run_id"])
    assert len(kept) == 17


def test_the_setting_of_most_runs_is_kept_not_that_of_most_rows():
    """Every cell with 2,048 images at one guidance; the best of each budget with 5,000 at six."""
    table = long_table(depths=(4, 6))
    every = table[table["guidance"] == 1.5].assign(samples=2048)
    best = table[table["run"].isin(every.loc[every.groupby("budget_flops")["loss"].idxmin(), "run"])]
    result = fit_laws(pd.concat([every, best.assign(samples=5000)]), QUICK)
    assert set(result.table.frame["fid"].dropna()) == set(every["fid"])
    assert result.table.settings["fid"]["samples"] == "2048"
    assert len(result.guidance) == 5
    assert all("samples = 5000" in curve.settings for curve in result.guidance)


def test_precision_of_several_guidances_is_kept_apart_too():
    table = long_table()
    table.loc[table["guidance"] == 0.0, "image_precision"] = 0.9
    result = fit_laws(table, FitOptions(target=("loss", "image_precision"), law=("power",), bootstrap_draws=50))
    assert set(result.table.frame["image_precision"]) == {0.5 + 0.1 * 1.5}
    assert result.table.targets == ("loss", "image_precision")
