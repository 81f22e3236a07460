"""Small made tables that each fooled or stopped a fit once, with the values that are right.

The law behind 01, 02, 07, 08 and 13 is L = 1.7 + 400·N^-.34 + 410·D^-.28, on whose frontier α is .34·.28/.62 = .1535.
"""

from pathlib import Path

import numpy as np
import pytest

from analysis.options import FitOptions
from analysis.pipeline import fit_laws
from analysis.tables.reading import read_runs

TABLES = Path(__file__).resolve().parents[1] / "fixtures" / "tables"
FRONTIER = {"E": 1.7, "alpha": 0.34 * 0.28 / 0.62}
SURFACE = {"E": 1.7, "alpha": 0.34, "beta": 0.28, "A": 400.0, "B": 410.0}


def fitted(*names, **options):
    chosen = FitOptions(holdout=False, bootstrap_draws=50, **options)
    return fit_laws(read_runs([TABLES / name for name in names]), chosen)


def said(result, code):
    return [each.message for each in result.warnings if each.code == code]


def assert_law(result, law, expected, x=None, rel=2e-3):
    entry = result.find(law, x=x)
    assert entry is not None
    found = {name: entry.fitted.parameters[name] for name in expected}
    assert found == pytest.approx(expected, rel=rel)


def test_01_two_learning_rates_of_one_seed():
    table, options = "01_two_rates.csv", {"law": ("power-offset",), "x": ("flops",)}
    (message,) = said(mixed := fitted(table, **options), "mixed-rows")
    assert "alike in C, N and seed differ in lr (0.001, 0.003), and their loss by 4%" in message
    assert mixed.grids["loss"].noise is None
    assert_law(mixed, "power-offset", FRONTIER)  # the best of a budget is the best
    hashes = set()
    for chosen in ({"reduce": "min"}, {"reduce": "min", "by": ("lr",)}, {"where": ("lr == 0.001",)}):
        law = ("chinchilla",) if "by" in chosen else ("power",)
        result = fitted(table, law=law, x=("flops",), **chosen)
        assert not said(result, "mixed-rows")
        assert result.grids["loss"].noise is None
        hashes.add(result.table.sha256)
        if "by" in chosen:
            assert_law(result, "chinchilla", SURFACE)
    assert len(hashes) == 1


def test_02_two_kinds_of_loss_in_one_column():
    options = {"law": ("power-offset", "chinchilla"), "x": ("flops",)}
    (message,) = said(fitted("02_two_losses.csv", law=("power",), x=("flops",)), "mixed-rows")
    assert "differ in kind (bits, nats), and their loss by 44%" in message
    result = fitted("02_two_losses.csv", where=("kind == 'nats'",), **options)
    assert_law(result, "power-offset", FRONTIER)
    assert_law(result, "chinchilla", SURFACE)


@pytest.mark.parametrize("holdout", [False, True])
def test_03_a_target_named_like_a_role(holdout):
    options = FitOptions(target=("params",), x=("flops",), law=("power",), holdout=holdout, bootstrap_draws=50)
    result = fit_laws(read_runs([TABLES / "03_optima.csv"]), options)
    assert_law(result, "rising-power", {"alpha": 0.5}, rel=0.02)


def test_04_seeds_without_sizes():
    result = fitted("04_width_and_seed.csv", x=("width",), law=("power-offset",))
    assert_law(result, "power-offset", {"E": 2.0, "A": 20.0, "alpha": 0.5}, rel=5e-3)


def test_06_decimal_logarithms():
    (message,) = said(fitted("06_log10.csv", law=("power",)), "logarithms")
    assert "are these logarithms? As 10^flops FLOPs would go from 1e+18 to 3e+20" in message
    assert_law(fitted("06_log10.csv", law=("power",), units=("flops=log10",)), "power", {"alpha": 0.05})


def test_07_flops_of_a_step():
    options = {"flops": "flops_per_step", "checkpoints": True, "run_id": "run", "law": ("power-offset",)}
    result = fitted("07_flops_a_step.csv", **options)
    (message,) = said(result, "odd-flops")
    assert "'flops_per_step' is constant within each of 5 runs" in message
    entry = result.find("power-offset", x="params")
    assert entry is not None
    assert list(entry.rows["step"]) == [8000] * 5
    assert entry.filters == ("the last row of each run",)
    assert_law(result, "power-offset", {"alpha": 0.34, "E": 1.7 + 410 * (8000 * 5e5) ** -0.28}, x="params")


def test_08_one_run_a_file():
    names = ("08_run_100M.csv", "08_run_300M.csv")
    (message,) = said(fitted(*names, law=("power",), x=("flops",)), "checkpoints")
    assert "within each of 2 values of 'file', and 'lr' changes along them" in message
    assert "--checkpoints --run-id file" in message
    curves = fitted(*names, law=("power",), x=("flops",), checkpoints=True, run_id="file")
    assert curves.fits[0].uncertainty.method == "case bootstrap by run"
    apart = fitted("08_*.csv", law=("power-offset",), group="file", x=("tokens",))
    for name, size in zip(names, (1e8, 3e8), strict=True):
        entry = next(each for each in apart.fits if each.group == name)
        assert entry.fitted.parameters["alpha"] == pytest.approx(0.28, rel=5e-3)
        assert entry.fitted.parameters["E"] == pytest.approx(1.7 + 400 * size**-0.34, rel=5e-3)


def test_13_any_two_of_n_d_and_c():
    result = fitted("13_n_and_d.csv", tokens_from_flops=6, law=("chinchilla",))
    assert_law(result, "chinchilla", SURFACE)
    assert "FLOPs are C = 6·N·D" in result.table.notes
    frame = result.table.frame
    np.testing.assert_allclose(frame["flops"], 6 * frame["params"] * frame["tokens"])


def test_14_numbers_with_suffixes():
    result = fitted("14_suffixes.csv", params="size", flops="flops", law=("power",))
    assert list(result.table.frame["params"]) == [1.25e8, 3.5e8, 1.3e9, 2.7e9]
    assert [(each.reason, each.rows) for each in result.table.exclusions] == [("no value in loss", ("5",))]


def test_15_columns_aligned_by_spaces():
    result = fitted("15_aligned.txt", params="params", flops="flops", law=("power-offset",))
    assert len(result.table.frame) == 5
    assert_law(result, "power-offset", FRONTIER, x="flops", rel=5e-3)
