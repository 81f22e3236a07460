"""FID and the like: laws above a measured floor, against loss too, and evaluations that differ never in one fit."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from planted_tables import evaluation_table, quality_curve, sweep_table

from analysis.errors import TableError
from analysis.options import FitOptions
from analysis.pipeline import fit_laws
from analysis.report.figures import draw_all
from analysis.report.html import render
from analysis.report.writing import write
from analysis.tables.evaluations import LIKELIHOOD, comparable_targets, is_evaluation

CURVE = FitOptions(flops="C", target=("fid",), bootstrap_draws=50)
SWEEP = FitOptions(target=("loss", "fid"), law=("power", "power-floor"), bootstrap_draws=50, holdout=False)


def entry(result, name):
    (found,) = [each for each in result.fits if each.name == name]
    return found


def messages(result, code):
    return [each.message for each in result.warnings if each.code == code]


def test_planted_law_is_recovered_with_the_floor_held_and_free():
    result = fit_laws(quality_curve(), CURVE)
    held = entry(result, "fid against flops: power-floor, floor held")
    free = entry(result, "fid against flops: power-floor, floor free")
    assert [each.fitted.law.name for each in result.fits] == ["power", "power-floor", "power-floor"]
    assert held.fitted.offset == 3.0
    assert free.fitted.offset is None
    for each in (held, free):
        assert each.fitted.parameters["E"] == pytest.approx(3.0, rel=1e-4)
        assert each.fitted.parameters["alpha"] == pytest.approx(0.35, rel=1e-4)
        assert each.fitted.predict(np.array([1e17]))[0] == pytest.approx(3 + 60 * 100**-0.35, rel=1e-4)
    fits = json.loads(json.dumps(result.as_json()))["fits"]
    assert [each["offset_pinned"] for each in fits if each["law"] == "power-floor"] == [3.0, None]
    assert result.main("fid") is held


def test_a_held_floor_gives_the_narrower_interval_under_noise():
    widths = []
    for name in ("floor held", "floor free"):
        found = entry(fit_laws(quality_curve(noise=0.02), CURVE), f"fid against flops: power-floor, {name}")
        low, high = found.uncertainty.ci95["alpha"]
        assert low <= 0.35 <= high
        widths.append(high - low)
    assert widths[0] < 0.7 * widths[1]


@pytest.mark.parametrize("floors", [None, np.nan, 0.0])
def test_without_a_measured_floor_there_is_one_free_fit(floors):
    table = quality_curve().drop(columns="fid_floor")
    if floors is not None:
        table["fid_floor"] = floors
    result = fit_laws(table, CURVE)
    found = entry(result, "fid against flops: power-floor")
    assert found.fitted.offset is None
    assert found.fitted.parameters["E"] == pytest.approx(3.0, rel=1e-4)


def test_an_offset_that_was_asked_for_takes_the_place_of_the_measured_floor():
    result = fit_laws(quality_curve(), FitOptions(**{**vars(CURVE), "offset": 2.0, "law": ("power-floor",)}))
    assert [each.fitted.offset for each in result.fits] == [2.0]


def test_fid_against_loss_is_a_power_of_the_perplexity():
    table = quality_curve()
    table["fid"] = 3.0 + 1e-4 * np.exp(3.2 * table["loss"])
    result = fit_laws(table, FitOptions(flops="C", target=("loss", "fid"), bootstrap_draws=50))
    for which in ("held", "free"):
        found = entry(result, f"fid against {LIKELIHOOD}: power-floor, floor {which}").fitted.parameters
        assert found == pytest.approx({"E": 3.0, "A": 1e-4, "alpha": 3.2}, rel=2e-3)
    assert not result.entries("loss", LIKELIHOOD)


@pytest.mark.parametrize("losses", [{}, {"loss": 2000.0}, {"loss": np.nan}])
def test_no_law_against_a_loss_that_is_missing_or_no_loss_a_token(losses):
    table = quality_curve().drop(columns="loss").assign(**losses)
    result = fit_laws(table, FitOptions(flops="C", target=("fid", *losses), bootstrap_draws=50, law=("power",)))
    assert {each.x for each in result.fits if each.target == "fid"} == {"flops"}


def test_a_sweep_has_laws_of_fid_and_mind_unasked_and_every_check_that_loss_has(tmp_path):
    losses = ["loss_last_scale", "error", "error_last_scale"]
    table = evaluation_table(depths=(4, 6, 8), noise=0.002).drop(columns=losses)  # too few sizes for surfaces
    result = fit_laws(table, FitOptions(bootstrap_draws=50))
    assert result.table.targets == ("loss", "fid", "mind")
    names = {each.name for each in result.fits}
    for target in ("fid", "mind"):
        assert f"{target} against flops: power-floor, floor held" in names
        assert f"{target} against flops: power-floor, floor free" in names
        assert f"{target} against params: power-floor, floor held" in names
        assert f"{target} against {LIKELIHOOD}: power-floor, floor held" in names
        held = entry(result, f"{target} against flops: power-floor, floor held")
        assert len(held.rows) == 5  # the frontier
        excess = held.rows[target] - table[f"{target}_floor"].iloc[0]
        slope = np.polyfit(np.log(held.rows["flops"]), np.log(excess), 1)[0]
        assert held.fitted.parameters["alpha"] == pytest.approx(-slope, rel=0.1)
        assert result.checks[target].n_budgets == 4
    assert not any(name.startswith("loss") and "floor" in name for name in names)
    written = write(result, tmp_path)
    content = json.loads(written.laws_json.read_text())
    assert content["schema"] == 1
    stated = {"evaluation_extractor": "inception", "evaluation_reference": "train-3f2a", "evaluation_samples": "5000"}
    stated |= {"evaluation_guidance": "1.5", "mind_floor": "0.04"}
    assert content["table"]["evaluations"]["mind"] == stated
    assert "evaluation_reference = train-3f2a" in written.report_html.read_text()
    assert {each["target"] for each in content["predictions"]} >= {"loss", "fid", "mind"}
    stems = {path.stem for path in written.figures}
    for target in ("fid", "mind"):
        assert {f"{target}_vs_{x}" for x in ("compute", "loss", "parameters")} <= stems
    assert {"loss_vs_compute", "best_sizes"} <= stems


@pytest.mark.parametrize(("floor", "named"), [(3.0, "real images, 3"), (1e-4, "↓ real images, 0.0001")])
def test_a_floor_far_below_the_values_does_not_press_them_together(floor, named):
    """It is named below an axis that the values fill."""
    table = quality_curve()
    drawing, *_ = draw_all(fit_laws(table.assign(fid_floor=floor), CURVE))
    assert drawing.name == "loss_vs_compute"  # that of the main target, here FID
    assert f"<!-- {named} -->" in drawing.svg
    assert "arrows where far below: real images" in drawing.caption


def test_optimal_sizes_that_differ_are_side_by_side_in_laws_json_and_report():
    table = evaluation_table(depths=(3, 4, 6, 8, 12, 16), ratio=2.0)
    result = fit_laws(table, SWEEP)
    found = json.loads(json.dumps(result.as_json()))["best_sizes"]
    assert len(found) == 5
    smallest = table["params_total"].min()
    for place, each in enumerate(found):
        best = 3 * smallest * 2 ** (0.5 * place)
        assert each["group"] is None
        assert each["targets"]["loss"]["minimum"] == pytest.approx(best, rel=1e-3)
        assert each["targets"]["fid"]["minimum"] == pytest.approx(2 * best, rel=1e-3)
        assert each["targets"]["fid"]["sizes"] == 6
    assert all(each.ratio("fid") == pytest.approx(2.0, rel=2e-3) for each in result.sizes[""])
    html = render(result, [])
    assert "Best size by loss and by other measures" in html
    assert "best N by fid" in html


def test_sizes_of_budgets_with_one_value_are_not_compared():
    """Where FID was measured for the best cell of each budget only."""
    table = evaluation_table()
    best = table.groupby("budget_flops")["loss"].idxmin()
    table.loc[~table.index.isin(best), ["fid", "mind"]] = np.nan
    result = fit_laws(table, SWEEP)
    assert result.sizes == {}
    assert "Best size by loss" not in render(result, [])
    assert len(entry(result, "fid against flops: power-floor, floor held").rows) == 5
    (message,) = [each for each in messages(result, "rows-excluded") if each.startswith("fid")]
    assert message.startswith("fid: 20 rows without a value are left out of its fits (rows ")
    assert len(result.table.frame) == len(table)


@pytest.mark.parametrize(
    ("name", "other"),
    [("evaluation_extractor", "dinov2"), ("evaluation_reference", "test"), ("evaluation_samples", 1000),
     ("evaluation_samples", np.nan), ("Extractor", "dinov2")],
)  # fmt: skip
def test_values_of_other_settings_are_left_out_and_said(name, other):
    table = evaluation_table(depths=(4, 6))
    chosen = table.index % 5 == 0
    table["Extractor"] = table["evaluation_extractor"]
    table[name] = table[name].mask(chosen, other) if not isinstance(other, int) else np.where(chosen, other, 5000)
    table.loc[chosen, "fid"] *= 3
    result = fit_laws(table, SWEEP)
    left = table[~chosen].groupby("budget_flops")["fid"]
    np.testing.assert_allclose(entry(result, "fid against flops: power-floor, floor held").rows["fid"], left.min())
    assert set(entry(result, f"fid against {LIKELIHOOD}: power").rows["fid"]) == set(table.loc[~chosen, "fid"])
    own = [each for each in messages(result, "mixed-evaluators") if each.startswith("fid: fitted to")]
    assert len(own) == 1
    assert f"{chosen.sum()} others are left out" in own[0]
    assert name in own[0]


def test_the_commonest_guidance_is_fitted_and_apart_from_it_each_cells_best():
    """A long table: every cell at two guidances, the second better for large models only."""
    first = evaluation_table(depths=(4, 6, 8))
    middle = first["params_total"].median()
    second = first.assign(evaluation_guidance=2.5)
    second["fid"] *= np.where(first["params_total"] < middle, 1.3, 0.8)
    second["fid_floor"] = first["fid_floor"] = 2.0
    second = second.drop(index=[0, 1])
    result = fit_laws(pd.concat([first, second]), SWEEP)
    assert result.table.targets == ("loss", "fid", "fid_guidance_best")
    frame = result.table.frame
    keys = ["params_total", "budget_flops"]
    truth = pd.concat([first, second]).groupby(keys)["fid"].min()
    best = frame[frame["fid_guidance_best"].notna()].set_index(keys)["fid_guidance_best"]
    assert len(best) == len(second)
    np.testing.assert_allclose(best, truth.loc[best.index])
    held = entry(result, "fid_guidance_best against flops: power-floor, floor held")
    assert set(held.rows["fid_guidance_best"]) <= set(truth)
    assert held.fitted.offset == 2.0
    assert set(entry(result, "fid against flops: power").rows["fid"]) <= set(first["fid"])
    alone = entry(fit_laws(first, SWEEP), "loss against flops: power")
    assert entry(result, "loss against flops: power").fitted.parameters == pytest.approx(alone.fitted.parameters)
    assert frame["loss"].notna().sum() == len(first)
    (message,) = messages(result, "mixed-evaluators")
    assert "to each cell's lowest value, as fid_guidance_best" in message
    assert f"{len(second)} rows have another guidance" in message


def test_rows_of_a_rare_guidance_are_named():
    table = evaluation_table(depths=(4, 6))
    table.loc[[3, 7], "evaluation_guidance"] = 9.0
    result = fit_laws(table, SWEEP)
    assert result.table.targets == ("loss", "fid")
    assert any("2 rows have another guidance (rows 4, 8)" in each for each in messages(result, "mixed-evaluators"))


def test_run_ids_that_repeat_without_another_evaluation_are_refused_still():
    table = evaluation_table()
    with pytest.raises(TableError, match="run ids must be unique"):
        fit_laws(pd.concat([table, table.iloc[:1]]), SWEEP)


@pytest.mark.parametrize("share", [1.5, 100.0])
def test_values_below_their_floor_are_a_warning(share, tmp_path):
    table = quality_curve()
    table["fid_floor"] = share * table["fid"].min()
    result = fit_laws(table, CURVE)
    (message,) = messages(result, "below-floor")
    assert "values are not above the measured floor" in message
    assert [each.fitted.offset for each in result.fits] == [None, None]
    write(result, tmp_path)


def test_floors_that_differ_are_said():
    table = quality_curve(noise=0.01)
    table["fid_floor"] = [2.0] * 7 + [3.0] * 7
    result = fit_laws(table, CURVE)
    assert entry(result, "fid against flops: power-floor, floor held").fitted.offset == 2.5
    assert any("floors go from 2 to 3" in each for each in messages(result, "mixed-evaluators"))


def test_missing_values_of_every_kind_leave_the_rest_standing(tmp_path):
    table = evaluation_table(depths=(4, 6))
    table.loc[::4, "fid"] = np.nan
    table.loc[1::3, ["fid_low", "fid_floor"]] = np.nan
    table["mind"] = np.nan
    result = fit_laws(table, FitOptions(law=("power-floor",), bootstrap_draws=50, holdout=False))
    assert "mind" not in result.table.targets
    assert entry(result, "fid against flops: power-floor, floor held").fitted.offset == 4.0
    write(result, tmp_path)
    asked = fit_laws(table, FitOptions(target=("loss", "mind"), law=("power",), bootstrap_draws=50, holdout=False))
    assert "mind: no row has a value" in messages(asked, "law-skipped")


def test_a_table_without_evaluations_is_left_as_it_is():
    table = sweep_table().assign(guidance=[1.0, 2.0] * 10)
    result = fit_laws(table, FitOptions(target=("loss",), bootstrap_draws=50, holdout=False))
    assert result.table.evaluations == ()
    assert LIKELIHOOD not in result.table.frame.columns
    assert result.as_json()["best_sizes"] == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [("fid", True), ("FID-50k", True), ("mind_2000", True), ("kid", True), ("fidelity", False), ("rfid", False),
     ("mindless", False), ("loss", False)],
)  # fmt: skip
def test_which_names_are_evaluations(name, expected):
    assert is_evaluation(name) == expected


def two_families(floor, worse=2.0):
    """Frontiers of FID above one floor, of which the second is `worse` times farther from it at any compute."""
    flops = np.geomspace(1e12, 1e14, 5)
    curves = {"a": 1.0, "b": worse}
    return pd.concat(
        pd.DataFrame({"C": flops, "fid": floor + scale * 8 * (flops / 1e12) ** -0.5, "fid_floor": floor, "kind": name})
        for name, scale in curves.items()
    )


def test_compute_at_matched_fid_knows_the_measured_floor():
    """To halve what is above the floor takes 2 ** (1 / 0.5) times the compute, wherever the floor is."""
    options = FitOptions(flops="C", group="kind", target=("fid",), bootstrap_draws=50, holdout=False)
    for floor in (0.5, 4.0):
        (found,) = fit_laws(two_families(floor), options).comparisons
        assert found.compute_ratio == pytest.approx(1 / 4, rel=0.15)
    ((found,), (reverse,)) = (
        fit_laws(two_families(0.5), replace(options, compare=names)).comparisons for names in (("a", "b"), ("b", "a"))
    )
    assert (found.a, reverse.a) == ("a", "b")
    assert reverse.compute_ratio == pytest.approx(4, rel=0.15)


def test_what_compares_across_tokenizers_and_families():
    one = pd.DataFrame({"tokenizer_fingerprint": ["x"], "loss_unit": ["nats a token"], "loss": 3.0, "fid": 2.0})
    assert comparable_targets(pd.concat([one, one])) == ()
    for other in ({"tokenizer_fingerprint": ["y"]}, {"loss_unit": ["squared error"]}, {"latents_fingerprint": ["z"]}):
        assert comparable_targets(pd.concat([one, one.assign(**other)])) == ("fid",)
        with pytest.raises(TableError, match="losses of different tokens don't compare"):
            comparable_targets(pd.concat([one, one.assign(**other)]).assign(fid=np.nan))


def test_groups_are_drawn_in_one_figure():
    table = two_families(0.5).assign(mind=lambda rows: 1.1 * rows["fid"])
    options = FitOptions(flops="C", group="kind", target=("fid", "mind"), bootstrap_draws=50, compare=("b", "a"))
    result = fit_laws(table, options)
    (figure,) = [drawing for drawing in draw_all(result) if drawing.name == "comparison"]
    assert figure.caption.startswith("FID and MIND of each group's frontier")
    assert "the compute that b needs to match each other group" in figure.caption


def test_of_many_groups_the_first_is_compared_with_each_other():
    table = pd.concat([two_families(0.5).assign(kind=lambda rows, n=n: rows["kind"] + str(n)) for n in range(3)])
    result = fit_laws(table, FitOptions(flops="C", group="kind", target=("fid",), bootstrap_draws=50, holdout=False))
    assert [(each.a, each.b) for each in result.comparisons] == [
        ("a0", name) for name in ("a1", "a2", "b0", "b1", "b2")
    ]
