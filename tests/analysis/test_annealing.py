"""Learning curves of several schedules: sums of rates against the paper's double sum, and one schedule from others."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis.errors import TableError
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
