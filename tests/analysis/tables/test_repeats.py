"""Rows alike in N, C and D: told apart by what they differ in, reduced on request, not taken for seeds wrongly."""

import numpy as np
import pandas as pd
import pytest
from planted_tables import chinchilla_table, sweep_table

from analysis.errors import TableError
from analysis.grids.frontier import with_budgets
from analysis.options import FitOptions
from analysis.pipeline import fit_laws
from analysis.tables.cells import with_rows_reduced
from analysis.tables.repeats import best_rows, copies_between_groups, differing
from analysis.tables.table import prepare

ALIKE = ["params", "flops", "tokens"]
QUICK = {"holdout": False, "bootstrap_draws": 50}
RNG = np.random.default_rng(0)


def twice(repeats=2, **columns):
    """Each of 16 places `repeats` times, with columns made of the number of the repetition and the row's own place."""
    grid = chinchilla_table(sizes=4, budgets=4, noise=0).rename(columns={"N": "params", "C": "flops", "D": "tokens"})
    table = pd.concat([grid.assign(again=again) for again in range(repeats)], ignore_index=True)
    table = table.sort_values(["flops", "params"], kind="stable", ignore_index=True)
    again, place = table.pop("again").to_numpy(), np.arange(len(table))
    table["loss"] *= 1 + 0.02 * again + 0.001 * np.random.default_rng(1).standard_normal(len(table))
    return table.assign(row=place.astype(str), **{name: make(again, place) for name, make in columns.items()})


def found(table, **options):
    """The columns that are named."""
    differs = differing(table, ALIKE, ("loss",), ())
    return differs.columns if differs else ()


def times(again, place):
    return pd.Timestamp("2026-01-01") + pd.to_timedelta(place, unit="h")


SEED, RATE = {"seed": lambda a, p: a}, {"lr": lambda a, p: np.choose(a % 2, [1e-3, 3e-3])}
IDS = {
    "run": lambda a, p: [f"run-{each}" for each in p],
    "started": times,
    "number": lambda a, p: p,
    "note": lambda a, p: ["the same"] * len(p),
    "wall_time": lambda a, p: RNG.uniform(1, 2, len(p)),
    "train_loss": lambda a, p: 3 + 0.02 * a + RNG.uniform(0, 1e-3, len(p)),
    "hash": lambda a, p: [f"{each * 7919 % 65537:x}" for each in p],
}


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({}, ()),
        (SEED, ()),
        (IDS, ()),
        (SEED | IDS, ()),
        (RATE, ("lr",)),
        (RATE | IDS, ("lr",)),
        (RATE | {"seed": lambda a, p: 0 * a}, ("lr",)),
        (RATE | {"seed": lambda a, p: p}, ("lr",)),
        ({"kind": lambda a, p: np.where(a % 2, "bits", "nats")} | IDS, ("kind",)),
        ({"optimiser": lambda a, p: np.where(a % 2, None, "adam")}, ("optimiser",)),
        ({"fused": lambda a, p: a % 2 == 0}, ("fused",)),
        ({"peak lr": lambda a, p: 10 ** RNG.uniform(-4, -2, len(p))}, ("peak lr",)),
        ({"mystery": lambda a, p: RNG.uniform(0, 1, len(p))}, ("mystery",)),
        (SEED | {"mystery": lambda a, p: RNG.uniform(0, 1, len(p))}, ()),
        (SEED | {"host": lambda a, p: np.where(a % 2, "a", "b")}, ()),
        (SEED | {"cluster": lambda a, p: np.where(p % 3, "a", "b")}, ()),
        (SEED | {"cluster": lambda a, p: np.where(a % 2, "a", "b")}, ("cluster",)),
        (RATE | {"rate_name": lambda a, p: np.where(a % 2, "high", "low")}, ("lr",)),
    ],
)
def test_the_column_that_tells_rows_apart_is_named(columns, named):
    assert found(twice(**columns)) == named


def test_two_settings_crossed_are_both_named_and_a_third_that_only_numbers_rows_is_not():
    table = twice(4, lr=lambda a, p: np.choose(a % 2, [1e-3, 3e-3]), batch_size=lambda a, p: 32 << (a // 2), **IDS)
    assert set(found(table)) == {"lr", "batch_size"}


def test_seeds_of_one_setting_still_tell_the_noise():
    """Two rates with three seeds each: the noise is that of the seeds, and the frontier the better rate's."""
    table = twice(6, lr=lambda a, p: np.choose(a // 3, [1e-3, 3e-3]), seed=lambda a, p: a % 3)
    table["loss"] = chinchilla_table(sizes=4, budgets=4, noise=0)["loss"].repeat(6).to_numpy() * np.where(
        table["lr"] == 1e-3, 1.0, 1.05
    )
    table["loss"] *= np.exp(0.002 * np.random.default_rng(2).standard_normal(len(table)))
    result = fit_laws(table, FitOptions(law=("power",), x=("flops",), **QUICK))
    (warning,) = [each for each in result.warnings if each.code == "mixed-rows"]
    assert "lr (0.001, 0.003)" in warning.message
    assert "\n" not in warning.message
    noise = result.grids["loss"].noise
    assert noise is not None
    assert noise.degrees_of_freedom == 32
    assert noise.relative == pytest.approx(0.002, rel=0.4)
    best = table[table["lr"] == 1e-3].groupby(["flops", "params"])["loss"].mean().groupby("flops").min()
    np.testing.assert_allclose(result.grids["loss"].frontier["loss"], best)


def test_how_much_values_differ_is_said():
    table = twice(**RATE)
    table["loss"] = np.where(table["lr"] == 1e-3, 3.0, np.where(table["flops"] > 5e20, 3.3, 3.06))
    differs = differing(table, ALIKE, ("loss",), ())
    assert differs is not None
    assert "32 rows alike in N, C and D differ in lr (0.001, 0.003), and their loss by 2%" in differs.message
    assert "2% to 10%" in differs.message


def test_the_best_of_a_cell_is_that_of_the_best_setting():
    rows = pd.DataFrame(
        {"budget": 1.0, "params": 1.0, "lr": [1, 1, 2, 2], "loss": [3.0, 3.2, 2.9, 3.4], "row": list("abcd")}
    )
    assert list(best_rows(rows, ["budget", "params"], ["lr"], "loss")["row"]) == ["a", "b"]


def after(table, **options):
    """The table as it is fitted."""
    chosen = FitOptions(**options)
    kept = prepare(table, chosen)
    cells = with_budgets(kept)
    return with_rows_reduced(kept, kept.frame if cells is None else cells, chosen)


@pytest.mark.parametrize(
    ("how", "by", "values"),
    [
        ("min", (), [2.0, 4.0]),
        ("mean", ("lr",), [2.5, 4.5]),
        ("median", (), [2.5, 4.5]),
        ("last", (), [2.0, 5.0]),
        ("last", ("step",), [3.0, 4.0]),
    ],
)
def test_reductions(how, by, values):
    table = pd.DataFrame(
        {"flops": [1e18, 1e18, 1e19, 1e19], "lr": [1, 2, 1, 2], "step": [9, 1, 2, 1], "loss": [3.0, 2.0, 4.0, 5.0]}
    )
    kept = after(table, reduce=how, by=by)
    assert list(kept.frame["loss"]) == values
    assert kept.filters == (f"reduce {how} over {', '.join(by or ('lr',))}",)
    assert len(kept.measured) == 2


def test_reduction_over_seeds_only_where_nothing_else_differs_or_when_asked():
    table = twice(4, lr=lambda a, p: np.choose(a // 2, [1e-3, 3e-3]), seed=lambda a, p: a % 2)
    assert len(after(table, reduce="min").frame) == 32
    assert len(after(table, reduce="mean", by=("lr", "seed")).frame) == 16
    assert len(after(table.drop(columns="lr"), reduce="mean").frame) == 16


def test_budgets_that_agree_within_a_hair_are_one():
    """Runs of another rate, whose FLOPs were measured a little higher."""
    table = twice(**RATE)
    table["flops"] *= np.where(table["lr"] == 1e-3, 1.0, 1.003)
    table["tokens"] *= np.where(table["lr"] == 1e-3, 1.0, 1.003)
    kept = after(table, reduce="min")
    assert len(kept.frame) == 16
    assert set(kept.frame["lr"]) == {1e-3}
    assert len(kept.exclusions[0].rows) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "max"}, "unknown --reduce 'max'; it takes min, mean, median, last"),
        ({"by": ("lr",)}, "--by lr needs --reduce"),
        ({"reduce": "min", "by": ("rate",)}, "no column 'rate'"),
    ],
)
def test_reductions_that_mean_nothing_are_refused(options, message):
    with pytest.raises(TableError, match=message):
        fit_laws(twice(**RATE), FitOptions(**options))


def test_a_sweeps_own_repetitions_are_known():
    """Its measured columns differ between seeds, too."""
    table = sweep_table(seeds=3)
    table["images_per_second"] = np.where(table["seed"] == 0, 80.0, 90.0)
    result = fit_laws(table, FitOptions(target=("loss",), law=("power",), x=("flops",), **QUICK))
    assert "mixed-rows" not in {each.code for each in result.warnings}
    assert result.grids["loss"].noise is not None


def test_rows_that_groups_share_are_copies():
    table = chinchilla_table(sizes=4, budgets=4).rename(columns={"N": "params", "C": "flops", "D": "tokens"})
    table["family"] = "a"
    other = table.assign(family="b", loss=1.01 * table["loss"])
    other.loc[3:5, "loss"] = table.loc[3:5, "loss"]
    both = prepare(pd.concat([table, other]), FitOptions(group="family"))
    text = copies_between_groups(both.frame, both.targets)
    assert "groups a and b share 3 rows word for word (rows 4=20, 5=21, 6=22)" in text
    assert not copies_between_groups(prepare(table, FitOptions(group="family")).frame, ("loss",))


@pytest.mark.parametrize(("x", "what"), [("params", "parameters"), ("tokens", "tokens"), ("width", "width")])
def test_groups_without_flops_are_compared_along_what_they_have(x, what):
    sizes = np.geomspace(1e7, 1e10, 8)
    tables = [
        pd.DataFrame({x: sizes, "loss": ratio * 30 * sizes**-0.1, "family": name})
        for name, ratio in (("a", 1.0), ("b", 1.02))
    ]
    options = FitOptions(group="family", x=(x,), law=("power",), **QUICK)
    result = fit_laws(pd.concat(tables), options)
    (comparison,) = result.comparisons
    assert comparison.along == x
    assert comparison.loss_ratio == pytest.approx(1 / 1.02)
    assert comparison.compute_ratio == pytest.approx(1.02**-10, rel=1e-6)
    from analysis.report.sentences import comparison_sentence

    assert f"the {what} to match b" in comparison_sentence(comparison)


def test_groups_that_cannot_be_compared_say_why():
    sizes = np.geomspace(1e7, 1e10, 8)
    table = pd.DataFrame({"flops": [*sizes, *sizes], "family": ["a"] * 8 + ["b"] * 8})
    table["loss"] = 1 + 30 * table["flops"] ** -0.1
    result = fit_laws(table, FitOptions(group="family", law=("power-offset",), **QUICK))
    assert not result.comparisons
    assert any("comparison of a and b by loss: no power law" in each.message for each in result.warnings)


def two_sets(ratio, sizes=(1e7, 1e8, 1e9), tokens=(1e9, 1e10, 1e11)):
    grid = pd.MultiIndex.from_product([sizes, tokens], names=["params", "tokens"]).to_frame(index=False)
    loss = 1.7 + 400 * grid["params"] ** -0.34 + 410 * grid["tokens"] ** -0.28
    return pd.concat([grid.assign(loss=loss * each, family=name) for name, each in (("a", 1.0), ("b", ratio))])


def test_groups_are_paired_at_the_same_tokens():
    """Of rows of one size that nearest in tokens is the pair, not the first."""
    options = FitOptions(group="family", x=("params",), law=("power",), **QUICK)
    table = pd.concat([rows if name == "a" else rows[::-1] for name, rows in two_sets(0.9).groupby("family")])
    (comparison,) = fit_laws(table, options).comparisons
    assert comparison.loss_ratio == pytest.approx(1 / 0.9)


def test_groups_without_compute_in_common_are_not_compared():
    curve = pd.DataFrame({"flops": np.geomspace(1e17, 1e22, 16)})
    curve["loss"] = 1.7 + 2 * (curve["flops"] / 1e17) ** -0.2
    curve["family"] = ["a"] * 8 + ["b"] * 8
    result = fit_laws(curve, FitOptions(group="family", law=("power",), **QUICK))
    assert not result.comparisons
    assert any("no compute in common (a ends at" in each.message for each in result.warnings)


def test_groups_whose_values_rise_say_that_they_are_not_compared():
    curve = pd.DataFrame({"flops": np.geomspace(1e17, 1e22, 8), "share": np.geomspace(0.1, 0.5, 8)})
    two = pd.concat([curve.assign(family=name) for name in "ab"])
    result = fit_laws(two, FitOptions(group="family", target=("share",), **QUICK))
    assert any("it rises; what is compared are values that fall" in each.message for each in result.warnings)


@pytest.mark.parametrize(("copies", "said"), [(True, True), (False, False)])
def test_copies_under_other_seeds_are_named(copies, said):
    rng, sizes = np.random.default_rng(0), np.geomspace(1e7, 1e10, 8)
    noise = rng.standard_normal((3, 8)) * (0.0 if copies else 0.003)
    tables = [
        pd.DataFrame({"params": sizes, "seed": seed, "loss": 30 * sizes**-0.1 * np.exp(noise[seed])})
        for seed in range(3)
    ]
    notes = prepare(pd.concat(tables), FitOptions()).notes
    assert ("under other seeds 16 rows repeat another row's values and are kept" in notes) == said
