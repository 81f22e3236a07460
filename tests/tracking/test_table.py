import math

import pandas
import pytest
from fake_runs import START, append_points, begun_run, finished_cell, study_cell, write_result, write_study

from varscale.errors import TrackingError
from varscale.store.layout import Store
from varscale.tracking import deliver_all, runs_table


def test_the_table_equals_the_rows_of_the_results(store: Store) -> None:
    """With their types and the provenance, under the study's labels; longer than one of MLflow's tags."""
    rows, cells = [], []
    for seed, budget in enumerate((1e12, 2e12, 4e12)):
        run = begun_run(
            store, "cells", f"d12-c{budget:.0e}-s{seed}".replace("+", ""), f"{seed:016d}", "title", lr=3e-3 / 7
        )
        append_points(run, 0, 2)
        row = {
            **{"run": f"d12-s{seed}", "family": "var", "depth": 12, "width": 24, "seed": seed, "steps": 2**53 + 1},
            **{"train_flops": budget * 0.999, "images_seen": 640 + seed, "lr": 3e-3 / 7, "shared": True},
            **{"loss": 3.1 + seed / 3, "tokenizer": "1e12345678901234", "comment": "None", "precision": "float32"},
            **{f"loss_scale_{scale}": 2.0 / 3 + seed + scale for scale in range(400)},
        }
        provenance = {"threads": 1, "device": "cpu", "compiled": False, "torch": "2.14", "wall_seconds": 12.5}
        write_result(run, START + 3, row=row, provenance=provenance, loss=row["loss"], lr=0.1)
        labels = {"experiment": "rings", "variant": "", "budget_flops": budget}
        cells.append(study_cell(run, **labels))
        names = {"fingerprint": run.fingerprint, "status": "finished"}
        rows.append({**names, **row, **provenance, **labels})
    write_study(store, "rings", cells)
    assert deliver_all(store, store.tracking_uri).problem == ""
    table = runs_table(store.tracking_uri, "rings").sort_values("run", ignore_index=True)
    pandas.testing.assert_frame_equal(table, pandas.DataFrame(rows), check_exact=True, check_like=True)
    assert "train_loss" not in table
    assert table.attrs == {"missing": (), "others": 0}


def test_the_table_is_of_the_latest_recipe(store: Store) -> None:
    budgets = (1e12, 2e12, 4e12)
    first, second, third = (finished_cell(store, 12, budget) for budget in budgets)
    absent = begun_run(store, "cells", "d12-c8e12-s0", "absent", "absent")
    both = [study_cell(second, recipe="two"), study_cell(second, budget_flops=2.5e12)]
    cells = [study_cell(first), study_cell(third, recipe="two"), *both, study_cell(absent)]
    write_study(store, "rings", cells)
    assert deliver_all(store, store.tracking_uri).problem == ""
    table = runs_table(store.tracking_uri, "rings")
    assert sorted(table["budget_flops"]) == [1e12, 2.5e12]
    assert table.attrs == {"missing": ("d12 · 8e12 FLOPs · seed 0",), "others": 1}
    write_study(store, "rings", cells, recipe="two")
    assert deliver_all(store, store.tracking_uri).problem == ""
    table = runs_table(store.tracking_uri, "rings")
    assert sorted(table["budget_flops"]) == [2e12, 4e12]
    assert table.attrs == {"missing": (), "others": 1}


def test_a_cell_that_diverged_is_a_row_without_a_loss(store: Store) -> None:
    run = begun_run(store, "cells", "d20-c1e12-s0", "diverged", "d20", depth=20)
    append_points(run, 0, 2)
    write_result(run, START + 3, status="diverged", row={"depth": 20, "train_flops": 1.5e11, "loss": None})
    write_study(store, "rings", [finished_cell(store, 12, 1e12), run])
    deliver_all(store, store.tracking_uri)
    table = runs_table(store.tracking_uri, "rings").set_index("depth")
    assert table["status"].to_dict() == {12: "finished", 20: "diverged"}
    assert math.isnan(table.loc[20, "loss"])
    assert table["loss"].dtype == "float64"


def test_a_store_that_does_not_answer_is_named() -> None:
    with pytest.raises(TrackingError, match=r"^MLflow at http://127.0.0.1:9: "):
        runs_table("http://127.0.0.1:9", "rings")


def test_an_unknown_study_is_named(store: Store) -> None:
    with pytest.raises(TrackingError, match="no finished cell of a study 'absent'"):
        runs_table(store.tracking_uri, "absent")
