"""Units that a table's columns probably have, and what is counted with them; clean tables raise no question."""

import pytest
from planted_tables import chinchilla_table

from analysis.checks.warnings import table_warnings
from analysis.options import FitOptions
from analysis.tables.table import prepare


def said(table, **options):
    """The messages about a table alone, by code."""
    return {each.code: each.message for each in table_warnings(prepare(table, FitOptions(**options)), None, False)}


@pytest.mark.parametrize(
    ("role", "name", "factor", "unit"),
    [
        ("params", "params (M)", 1e6, "M"),
        ("params", "size_in_millions", 1e6, "millions"),
        ("tokens", "tokens [B]", 1e9, "B"),
        ("flops", "compute (PF-days)", 8.64e19, "PF-days"),
        ("flops", "FLOPs (1e18)", 1e18, "1e18"),
        ("flops", "EFLOPs", 1e18, "EFLOPs"),
    ],
)
def test_a_unit_in_a_columns_name_is_asked_about(role, name, factor, unit):
    table = chinchilla_table().rename(columns={"N": "params", "C": "flops", "D": "tokens"})
    table = table.assign(**{role: table[role] / factor}).rename(columns={role: name})
    assert f"say --unit '{role}={unit}'" in said(table, **{role: name})["unlikely-units"]
    assert "unlikely-units" not in said(table, **{role: name, "units": (f"{role}={unit}",)})
    counted = table.assign(**{name: table[name] * factor})
    assert "unlikely-units" not in said(counted, **{role: name})


def test_sizes_that_no_model_has_for_their_compute_or_data_are_asked_about():
    table = chinchilla_table().assign(N=lambda rows: rows["N"] / 1e6).drop(columns="D")
    for more in ({}, {"tokens_from_flops": 6.0}):
        assert "tokens a parameter; say units" in said(table, params="N", flops="C", **more)["unlikely-units"]
        assert "unlikely-units" not in said(table, params="N", flops="C", units=("params=M",), **more)


def test_epochs_follow_from_unique_tokens():
    table = chinchilla_table().assign(unique_tokens=lambda rows: rows["D"] / 6e9)
    mapped = {"params": "N", "flops": "C", "tokens": "D"}
    assert "many-epochs" not in said(table.assign(unique_tokens=table["D"] / 3), **mapped)
    table["D"] /= 1e9
    assert "6.0 times" in said(table, units=("tokens=B",), **mapped)["many-epochs"]
