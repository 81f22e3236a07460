"""Learning curves of several schedules: sums of rates against the paper's double sum, and one schedule from others."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.errors import TableError
from analysis.fitting.laws.base import Problem
from analysis.fitting.laws.registry import LAWS
from analysis.options import FitOptions
from analysis.pipeline import fit_laws
from analysis.report.figures import draw_all
from analysis.report.html import render
from analysis.tables.annealing import RATE_LEFT, RATE_SUM, rate_sums
from analysis.tables.reading import read_runs
from analysis.tables.table import prepare

PEAK, STEPS, MOMENTUM = 3e-4, 6000, 0.999
TRUE = {"L0": 2.9, "A": 0.5, "C": 0.5, "alpha": 0.6}
OPTIONS = FitOptions(law=("annealing",), bootstrap_draws=50, holdout=False)
STEP = np.arange(1, STEPS + 1)
SCHEDULES = {
    "constant": np.full(STEPS, PEAK),
    "cosine": PEAK * (0.55 + 0.45 * np.cos(np.pi * STEP / STEPS)),
    "wsd": PEAK * np.clip((STEPS - STEP) / 1200, 0.1, 1.0),
}


def areas(rates):
    """S1 and S2 as Tissue et al. 2024 define them: step by step, from the peak."""
    momentum, area, found = 0.0, 0.0, []
    for before, rate in zip([rates[0], *rates], rates, strict=False):
        momentum = MOMENTUM * momentum + before - rate
        area += momentum
        found.append(area)
    return np.cumsum(rates), np.array(found)


def curve(name, every=50, noise=0.001):
    """A run's checkpoints by the paper's law."""
    sums, annealed = areas(SCHEDULES[name])
    loss = TRUE["L0"] + TRUE["A"] * sums ** -TRUE["alpha"] - TRUE["C"] * annealed
    rng = np.random.default_rng(list(SCHEDULES).index(name))
    table = pd.DataFrame({"run": name, "step": STEP, "lr": SCHEDULES[name], "loss": loss})
    table["loss"] *= 1 + noise * rng.standard_normal(STEPS)
    return table[(STEP % every == 0) & (STEP >= 300)]


def curves(*names):
    return pd.concat([curve(name) for name in names], ignore_index=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sums_at_checkpoints_are_those_of_every_step(schedule):
    rates = SCHEDULES[schedule]
    sums, annealed = areas(rates)
    at = np.sort(np.random.default_rng(0).choice(STEPS, 150, replace=False))
    at = np.unique([0, *at, STEPS - 1200 - 1, STEPS - 120 - 1])  # where the straight lines of wsd meet
    summed, left = rate_sums(at + 1.0, rates[at])
    tolerance = 2e-4 if schedule == "cosine" else 1e-9  # bent between checkpoints
    np.testing.assert_allclose(summed, sums[at], rtol=tolerance)
    np.testing.assert_allclose(PEAK / (1 - MOMENTUM) - left, annealed[at], atol=tolerance * PEAK / (1 - MOMENTUM))


def test_a_warm_up_is_no_annealing():
    step = np.arange(1.0, 101)
    warm = np.minimum(step / 40, 1.0)
    summed, left = rate_sums(step, warm, horizon=20)
    np.testing.assert_allclose(summed, np.cumsum(warm))
    np.testing.assert_allclose(left, 20.0)


def test_a_schedule_is_predicted_from_two_others():
    table = curves(*SCHEDULES)
    options = FitOptions(
        law=("annealing",), run_id="run", checkpoints=True, bootstrap_draws=200, holdout_where="run == 'wsd'"
    )
    result = fit_laws(table, options)
    (entry,) = result.fits
    (check,) = (each for each in entry.holdout if each.name.startswith("where"))
    assert (check.n_fitted, check.n_held) == (230, 115)
    assert check.mean_percent < 0.12  # the noise of a row is 0.1%
    assert min(check.baselines.values()) > 3 * check.mean_percent
    offset = check.parameters["E"] + check.parameters["C"] * PEAK / (1 - MOMENTUM)
    found = check.parameters | {"L0": offset}
    assert {name: found[name] for name in TRUE} == pytest.approx(TRUE, rel=0.03)
    assert any("'lr' follow 'step' within each 'run', with λ = 0.999" in note for note in result.table.notes)
    assert "rate_left" in render(result, draw_all(result))


def test_a_planned_schedule_is_predicted_at_its_sums():
    summed, left = rate_sums(STEP.astype(float), SCHEDULES["wsd"])
    at = f"rate_left={left[-1]},rate_sum={summed[-1]}"
    (entry,) = fit_laws(curves("constant", "cosine"), FitOptions(law=("annealing",), predict=(at,))).fits
    sums, annealed = areas(SCHEDULES["wsd"])
    exact = TRUE["L0"] + TRUE["A"] * sums[-1] ** -TRUE["alpha"] - TRUE["C"] * annealed[-1]
    assert entry.predictions[0].prediction.value == pytest.approx(exact, rel=0.002)
    constant = TRUE["L0"] + TRUE["A"] * (PEAK * STEPS) ** -TRUE["alpha"]
    assert constant > 1.01 * exact  # five times what the prediction may be off by


MULTI_POWER = {"E": 2.6, "A": 0.5, "B": 400.0, "C": 2.0, "alpha": 0.5, "beta": 0.6, "gamma": 0.6}
FURTHER = {
    "constant": np.full(STEPS, PEAK),
    "two stages": np.where(STEP > 3000, 0.3 * PEAK, PEAK),
    "three stages": PEAK * np.select([STEP > 4500, STEP > 2000], [0.1, 0.4], 1.0),
    "cosine": SCHEDULES["cosine"],
    "linear to nothing": PEAK * np.clip((STEPS - STEP) / 1500, 0.0, 1.0),
    "up again": np.where((STEP > 2000) & (STEP <= 4000), 0.3 * PEAK, PEAK),
}


def multi_power(rates, at):
    """The loss at some steps as Luo et al. 2025 define it, step by step; no rate before the first one."""
    p, sums = MULTI_POWER, np.cumsum(rates)
    drops, falls = -np.diff(rates), np.flatnonzero(np.diff(rates)) + 1
    values = p["E"] + p["B"] * PEAK + p["A"] * sums[at] ** -p["alpha"]
    for place, step in enumerate(at):
        behind = falls[(falls <= step) & (rates[falls] > 0)]
        reach = p["C"] * rates[behind] ** -p["gamma"] * (sums[step] - sums[behind - 1])
        values[place] -= p["B"] * (drops[behind - 1] * (1 - (1 + reach) ** -p["beta"])).sum()
    return values


def further_curves(*names, every=50):
    """Every step's rate, the loss at some of them."""
    at = np.flatnonzero((STEP % every == 0) & (STEP >= 300))
    tables = []
    for name in names:
        loss = np.full(STEPS, np.nan)
        loss[at] = multi_power(FURTHER[name], at)
        tables.append(pd.DataFrame({"run": name, "step": STEP, "lr": FURTHER[name], "loss": loss}))
    return pd.concat(tables, ignore_index=True)


def test_multi_power_losses_are_those_of_the_papers_sum_over_steps():
    """Within half a step: a drop is taken for one along its step, not at its beginning."""
    table = prepare(further_curves(*FURTHER), FitOptions(law=("multi-power",)))
    law = LAWS["multi-power"].along(table.schedules)
    problem = Problem.of(law, tuple(table.frame[name].to_numpy() for name in law.inputs))
    values = {name: np.array([MULTI_POWER[name]]) for name in ("alpha", "beta", "gamma")}
    theta_P = [
        MULTI_POWER[name]
        if name in values
        else np.log(MULTI_POWER[name]) - np.ravel(law.shift(problem, name, values))[0]
        for name in problem.free
    ]
    found = np.exp(problem.evaluate(np.array([theta_P]))[0][0])
    np.testing.assert_allclose(found, table.frame["loss"], rtol=2e-4)


def test_a_multi_power_law_predicts_schedules_of_another_shape():
    table = further_curves("constant", "two stages", "three stages", "linear to nothing")
    rng = np.random.default_rng(0)
    table["loss"] *= 1 + 0.0005 * rng.standard_normal(len(table))
    result = fit_laws(
        table,
        FitOptions(
            law=("multi-power",), run_id="run", checkpoints=True, bootstrap_draws=50,
            holdout_where="run == 'linear to nothing'", predict=("rate_schedule=1,rate_sum=3.6",),
        ),
    )  # fmt: skip
    (entry,) = result.fits
    (check,) = (each for each in entry.holdout if each.name.startswith("where"))
    assert check.mean_percent < 0.06  # the noise of a row is 0.05%
    assert min(check.baselines.values()) > 5 * check.mean_percent
    assert entry.fitted.parameters["E"] + entry.fitted.parameters["B"] * PEAK == pytest.approx(2.72, rel=0.01)
    constant = 2.72 + MULTI_POWER["A"] * 3.6 ** -MULTI_POWER["alpha"]
    assert entry.predictions[0].prediction.value == pytest.approx(constant, rel=0.002)
    assert any("rate_schedule is 1 'constant', 2 'two stages'" in note for note in result.table.notes)
    render(result, draw_all(result))


def test_at_one_rate_the_multi_power_law_is_a_power_of_the_sum():
    table = prepare(further_curves("constant", "two stages"), FitOptions(law=("multi-power",)))
    law = LAWS["multi-power"].along(table.schedules)
    sums = np.geomspace(0.1, 1.0, 5)
    problem = Problem.of(law, (np.ones(5), sums))
    theta_SP = np.random.default_rng(0).normal(0.3, 0.1, (3, 7))
    natural = (dict(zip(law.parameters, row, strict=True)) for row in problem.natural(theta_SP))
    expected = [p["E"] + p["B"] * PEAK + p["A"] * sums ** -p["alpha"] for p in natural]
    np.testing.assert_allclose(np.exp(problem.evaluate(theta_SP)[0]), expected, rtol=1e-9)


def test_runs_at_one_sum_of_rates_are_no_mixed_rows():
    """Both laws of rates at once, of which either takes what the other doesn't."""
    table = further_curves("constant", "two stages", "three stages")
    options = FitOptions(
        law=("annealing", "multi-power"), run_id="run", checkpoints=True, bootstrap_draws=50, holdout=False
    )
    result = fit_laws(table, options)
    assert len(result.fits) == 2
    assert "mixed-rows" not in {each.code for each in result.warnings}


def test_a_multi_power_law_needs_a_rate_that_falls():
    table = further_curves("constant").drop(columns="run")
    with pytest.raises(TableError, match="no run's learning rate falls"):
        fit_laws(table, FitOptions(law=("multi-power",)))


def test_images_need_no_horizon_for_the_multi_power_law():
    table = further_curves("constant", "two stages").rename(columns={"step": "images"})
    assert RATE_LEFT not in prepare(table, FitOptions(law=("multi-power",))).frame
    with pytest.raises(TableError, match="--annealing-horizon goes with --law annealing"):
        fit_laws(table, FitOptions(law=("multi-power",), annealing_horizon=9.0))


def test_rows_that_are_not_fitted_count_in_the_sums():
    whole = prepare(curves("cosine"), OPTIONS).frame
    sparse = curves("cosine").assign(loss=lambda rows: rows["loss"].where(rows["step"] % 500 == 0))
    part = prepare(sparse, FitOptions(law=("annealing",), where=("step > 2000",))).frame
    expected = whole[(whole["step"] % 500 == 0) & (whole["step"] > 2000)]
    np.testing.assert_allclose(part[[RATE_SUM, RATE_LEFT]], expected[[RATE_SUM, RATE_LEFT]])
    assert len(part) == 8


def test_rows_alone_in_their_run_are_left_out_and_named():
    table = pd.concat([curves("constant", "cosine"), curve("wsd").tail(1)], ignore_index=True)
    (left_out,) = prepare(table, OPTIONS).exclusions
    assert left_out.rows == ("231",)
    assert "the only row of its run" in left_out.reason


def test_a_sweeps_own_metrics_are_curves(tmp_path):
    for name in ("constant", "cosine"):
        records = [
            {"images": 32 * row.step, "metrics": {"train_loss": row.loss, "lr": row.lr}}
            for row in curve(name).itertuples()
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    table = read_runs([tmp_path / "*" / "metrics.jsonl"])
    options = {"loss": "metrics.train_loss", "law": ("annealing",), "bootstrap_draws": 50, "holdout": False}
    with pytest.raises(TableError, match="column 'images' counts no steps: say by --annealing-horizon"):
        fit_laws(table, FitOptions(**options))
    (entry,) = fit_laws(table, FitOptions(annealing_horizon=32_000, **options)).fits
    assert entry.fitted.parameters["alpha"] == pytest.approx(TRUE["alpha"], rel=0.03)
    assert entry.fitted.parameters["C"] * 32 == pytest.approx(TRUE["C"], rel=0.03)


@pytest.mark.parametrize(
    ("changed", "options", "question"),
    [
        (lambda rows: rows.drop(columns="lr"), {}, "in a column such as 'lr' or 'learning_rate'; the table has run"),
        (lambda rows: rows.drop(columns="step"), {}, "in their order, by a column such as 'step'"),
        (lambda rows: rows.drop(columns="run"), {}, "the table has learning rates of .* at the same step, .*--run-id"),
        (lambda rows: rows.drop_duplicates("run"), {}, "each 'run' has one"),
        (lambda rows: rows.assign(lr=-1.0), {}, "must be numbers of 0 or more"),
        (lambda rows: rows.assign(size=rows["step"]), {"params": "size"}, "is one of a single size"),
        (lambda rows: rows.query("run == 'constant'"), {}, "all rows have the same rate_left"),
        (lambda rows: rows, {"annealing_horizon": 1.0}, "--annealing-horizon goes with --law annealing, and"),
        (lambda rows: rows, {"annealing_horizon": 9.0, "law": ("power",)}, "--annealing-horizon goes with"),
    ],
)
def test_what_is_missing_is_asked_for(changed, options, question):
    table = changed(curves("constant", "cosine"))
    with pytest.raises(TableError, match=question):
        fit_laws(table, FitOptions(**({"law": ("annealing",)} | options)))


def test_rates_before_the_first_rows_are_asked_for():
    late = fit_laws(curves("constant", "wsd"), replace(OPTIONS, run_id="run", checkpoints=True))
    assert any(each.code == "late-start" and "rows of constant, wsd" in each.message for each in late.warnings)
    assert "mixed-rows" not in {each.code for each in late.warnings}  # runs are alike up to where one of them decays
    early = pd.DataFrame({"step": STEP, "lr": PEAK}).query("step % 50 == 0 and step < 300")
    whole = pd.concat([curves("constant", "wsd"), *(early.assign(run=name) for name in ("constant", "wsd"))])
    whole = fit_laws(whole, replace(OPTIONS, run_id="run", checkpoints=True))
    assert "late-start" not in {each.code for each in whole.warnings}


@pytest.mark.parametrize("law", ["annealing", "multi-power"])
def test_several_peak_rates_are_said(law):
    high = curves("constant", "cosine").assign(lr=lambda rows: 3 * rows["lr"], run=lambda rows: "high " + rows["run"])
    both = pd.concat([curves("constant", "cosine"), high]).assign(peak=lambda rows: rows["run"].str.len() > 8)
    options = replace(OPTIONS, law=(law,), run_id="run", checkpoints=True)
    (text,) = (each.message for each in fit_laws(both, options).warnings if each.code == "several-peaks")
    assert "to 0.0009: " in text
    for chosen in ({"group": "peak"}, {"where": ("peak == False",)}):
        assert "several-peaks" not in {each.code for each in fit_laws(both, replace(options, **chosen)).warnings}


def test_rows_of_a_warm_up_are_said_and_may_be_left_out():
    early = STEP[STEP < 200][::10]
    warming = pd.DataFrame({"step": early, "lr": PEAK * early / 200, "loss": 8 - 4 * early / 200})
    table = pd.concat([curves("constant", "wsd"), *(warming.assign(run=name) for name in ("constant", "wsd"))])
    table = table.rename(columns={"step": "trainer/global_step", "lr": "train/learning_rate"})  # of Weights & Biases
    options = replace(OPTIONS, run_id="run", checkpoints=True)
    whole = fit_laws(table, options)
    messages = {each.code: each.message for each in whole.warnings}
    assert "36 of 270 rows are of a warm-up" in messages["warm-up-rows"]
    assert "draws of 2 runs say little" in messages["checkpoints"]
    left = fit_laws(table, replace(options, where=("`trainer/global_step` >= 200",)))
    assert "warm-up-rows" not in {each.code for each in left.warnings}
    assert left.fits[0].fitted.parameters["alpha"] > 1.5 * whole.fits[0].fitted.parameters["alpha"]
