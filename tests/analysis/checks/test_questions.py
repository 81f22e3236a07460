"""Questions about columns that may not be what they were taken for; clean tables raise none."""

import numpy as np
import pandas as pd
import pytest
from planted_tables import chinchilla_table, curve_table, evaluation_table, sweep_table

from analysis.checks.questions import oddities, questions
from analysis.checks.warnings import CODES
from analysis.errors import TableError
from analysis.options import FitOptions
from analysis.tables.table import prepare

GRID = chinchilla_table().rename(columns={"N": "params", "C": "flops", "D": "tokens"})


def asked(table, **options):
    chosen = FitOptions(**options)
    found = questions(prepare(table, chosen), chosen)
    assert {code for code, _ in found} <= set(CODES)
    assert not any("\n" in text for _, text in found)
    return dict(found)


def runs(sizes=(1e7, 1e8, 1e9), steps=8):
    """Checkpoints of a few runs, with training FLOPs."""
    rows = [
        (f"r{n:g}", n, s, s * 5e8, 6 * n * s * 5e8, 2 + 30 * (n * s) ** -0.1)
        for n in sizes
        for s in range(1, steps + 1)
    ]
    return pd.DataFrame(rows, columns=["run", "params", "step", "tokens", "flops", "loss"])


@pytest.mark.parametrize(
    "table",
    [
        GRID,
        sweep_table(seeds=3),
        evaluation_table(),
        curve_table().rename(columns={"C": "flops"}),
        chinchilla_table(noise=0).rename(columns={"N": "params", "D": "tokens"}),
    ],
)
def test_clean_tables_raise_no_question(table):
    assert not asked(table)


@pytest.mark.parametrize(("base", "log"), [("log10", np.log10), ("ln", np.log), ("log2", np.log2)])
def test_logarithms_are_recognised_and_a_unit_undoes_them(base, log):
    roles = ["params", "flops", "tokens"]
    table = GRID.assign(**{role: log(GRID[role]) for role in roles})
    text = asked(table)["logarithms"]
    assert "are these logarithms?" in text
    assert f"={base}" in text
    units = tuple(f"{role}={base}" for role in roles)
    assert not asked(table, units=units)
    np.testing.assert_allclose(prepare(table, FitOptions(units=units)).frame[roles], GRID[roles])
    alone = GRID.assign(flops=log(GRID["flops"]))[["flops", "loss"]]
    found = asked(alone)["logarithms"]
    assert f"--unit flops={base}" in found or (base == "log2" and "ln (or log10 or log2)" in found)
    mixed = asked(GRID.assign(flops=log(GRID["flops"])))["logarithms"]
    assert f"--unit flops={base}" in mixed


def test_small_numbers_far_apart_are_no_logarithms():
    assert not asked(pd.DataFrame({"params": [0.125, 0.35, 1.3, 2.7, 6.7], "loss": [5, 4, 3.5, 3, 2.8]}))


def test_flops_that_are_constant_within_runs_are_asked_about():
    table = runs()
    table["flops"] = 6 * table["params"] * 5e8
    for options in ({"run_id": "run", "checkpoints": True},):
        assert "constant within each of 3 runs" in asked(table, **options)["odd-flops"]
    assert not asked(runs(), run_id="run", checkpoints=True)
    named = asked(curve_table().rename(columns={"C": "flops/step"}), flops="flops/step")
    assert "as its name says?" in named["odd-flops"]


def test_flops_that_fall_while_tokens_rise_are_asked_about():
    table = runs()
    table.loc[5, "flops"] /= 2
    assert "at 1 of 24 rows (rows 6)" in asked(table, run_id="run", checkpoints=True)["odd-flops"]
    left = runs().assign(flops=runs()["flops"].to_numpy()[::-1])
    assert "FLOPs fall while tokens rise at one size" in asked(left.drop(columns=["run", "step"]))["odd-flops"]


@pytest.mark.parametrize("factor", [1e-15, 3.0, 1 / 3])
def test_flops_counted_otherwise_in_a_group_are_asked_about(factor):
    both = pd.concat([GRID.assign(family="a"), GRID.assign(family="b", flops=factor * GRID["flops"])])
    text = asked(both, group="family")["odd-flops"]
    assert f"6 in a, {6 * factor:.3g} in b" in text
    few = GRID.copy()
    few.loc[2:4, "flops"] *= 1000
    assert "6e+03 at 3 of them (rows 3, 4, 5)" in asked(few)["odd-flops"]


def test_flops_a_token_that_change_with_size_are_no_question():
    """Attention and embeddings: from 10·N·D at the smallest size to 6.5·N·D at the largest; families of other sizes."""
    sizes = GRID["params"]
    ratio = 6.5 + 3.5 * (sizes / sizes.min()) ** -0.5
    table = GRID.assign(flops=ratio * sizes * GRID["tokens"], family=np.where(sizes < sizes.median(), "s", "l"))
    assert not asked(table, group="family")


@pytest.mark.parametrize("shares", [np.geomspace(0.02, 1, 6), [0.001, 0.004]])
@pytest.mark.parametrize("column", ["active_share", "Active Params"])
def test_flops_of_mixtures_are_those_of_active_parameters(column, shares):
    grid = pd.MultiIndex.from_product(
        [np.geomspace(1e8, 1e10, 4), shares, np.geomspace(1e9, 1e11, 4)], names=["params", "active_share", "tokens"]
    )
    table = grid.to_frame(index=False).assign(kind=lambda rows: np.where(rows["active_share"] < 0.1, "moe", "dense"))
    table["Active Params"] = table["params"] * table["active_share"]
    table = table.assign(flops=6 * table["Active Params"] * table["tokens"], loss=2 + table["tokens"] ** -0.1)
    table = table.drop(columns={"active_share", "Active Params"} - {column})
    assert not asked(table)
    assert "unlikely-units" not in {each.code for each in oddities(prepare(table, FitOptions()), FitOptions())}
    table.loc[[3, 7], "flops"] *= 1000
    text = asked(table.drop(columns="kind"))["odd-flops"]
    assert "N the active parameters, is 6 at most rows, but 6e+03 at 2 of them (rows 4, 8)" in text


def test_one_column_for_two_roles_is_asked_about():
    assert "is that meant?" in asked(GRID, params="tokens", tokens="tokens")["same-column"]
    assert "hold the same" in asked(GRID.assign(copy=GRID["params"]), tokens="copy")["same-column"]
    assert "tokens" not in prepare(GRID, FitOptions(params="tokens")).columns  # found by name only where it is free


@pytest.mark.parametrize("named", ["run", "model", "params", "step", "file"])
def test_checkpoints_are_recognised_without_the_flag(named):
    table = runs().assign(lr=lambda rows: 1e-3 * (1 - rows["step"] / 20))
    if named == "file":
        table = table.rename(columns={"run": "file"}).drop(columns="step")
        table.attrs["sources"] = ("a.csv", "b.csv")
    elif named == "params":
        table = table.drop(columns="run")
    elif named == "model":
        table = table.rename(columns={"run": "model"})
    elif named == "step":
        table = table[table["params"] == 1e8].drop(columns=["run", "params"])
    text = asked(table)["checkpoints"]
    assert "'lr' changes along them" in text
    assert (f"--checkpoints --run-id {named}" in text) == (named != "step")
    if named == "run":
        assert "checkpoints" in asked(table.sample(frac=1, random_state=0))
        assert "checkpoints" not in asked(table.assign(run=range(len(table))).drop(columns="step"))


@pytest.mark.parametrize("named", ["run", "file"])
def test_runs_that_went_on_from_earlier_checkpoints_are_recognised(named):
    parts = [part for _, part in runs(steps=20).groupby("run")]
    table = pd.concat([pd.concat([part[:12], part[8:]]) for part in parts], ignore_index=True)
    table = table.rename(columns={"run": named})
    table.attrs["sources"] = ("a.csv", "b.csv")
    assert f"--checkpoints --run-id {named}" in asked(table)["checkpoints"]


def test_blank_run_ids_are_left_out_where_rows_are_checkpoints():
    table = runs()
    table.loc[2, "run"] = None
    kept = prepare(table, FitOptions(run_id="run", checkpoints=True))
    assert [(each.reason, each.rows) for each in kept.exclusions] == [("no value in run_id", ("3",))]
    with pytest.raises(TableError, match="run ids must be unique"):
        prepare(table, FitOptions(run_id="run"))


def test_sizes_of_runs_are_no_best_sizes():
    assert (
        "'params' has several values at the same compute" in asked(GRID, target=("params",), x=("flops",))["not-optima"]
    )
    best = GRID.groupby("flops", as_index=False)["params"].median()
    twice = pd.concat([best, best.assign(params=1.2 * best["params"])])  # by two methods
    assert not asked(twice, target=("params",), x=("flops",))
