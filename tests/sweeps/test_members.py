"""What members of a file compare by, and their runs tables as one."""

from pathlib import Path

import pytest
from fake_runs import finished_cell, write_study
from small_experiment import SMALL

from sweeps.members import check_comparable, members_table
from varscale.config.yaml import changed, validate
from varscale.errors import ExperimentError
from varscale.store.layout import Store

ONE = validate(SMALL, "a test")
FINER = changed(ONE, {"name": "finer", "tokenizer.patch_nums": [1, 2, 3, 4]}, "a test")
MEASURED = {"evaluation.fidelity": {"samples": 100}}


def test_losses_of_different_tokens_do_not_compare() -> None:
    check_comparable([ONE, changed(ONE, {"name": "faster", "optim.lr": 0.5}, "a test")])
    with pytest.raises(ExperimentError, match=r"evaluation\.fidelity: missing in small, finer; losses of different"):
        check_comparable([ONE, FINER])
    with pytest.raises(ExperimentError, match=r"evaluation\.fidelity: missing in finer"):
        check_comparable([changed(ONE, MEASURED, "a test"), FINER])
    check_comparable([changed(each, MEASURED, "a test") for each in (ONE, FINER)])


def test_tables_of_members_are_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write_study(store, "pair-a", [finished_cell(store, 8, 1e12)])
    write_study(store, "pair-b", [finished_cell(store, 12, 1e12), finished_cell(store, 12, 2e12)])
    table = members_table(store, {"a": "pair-a", "b": "pair-b", "c": "pair-c"})
    assert [(row["member"], row["depth"]) for row in table.rows] == [("a", 8), ("b", 12), ("b", 12)]
    assert table.missing == ["c: pair-c"]
