"""`varscale forecast` on studies whose results are made up."""

import json
from pathlib import Path

import pytest
from command_calls import Call
from fake_runs import finished_cell, study_cell, write_study

from varscale.store.layout import Store
from varscale.store.records import StudyRecord

DEPTHS, BUDGETS = (8, 12, 16), (1e9, 2e9, 4e9, 8e9)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "runs")
    write_study(store, "rings", [finished_cell(store, depth, budget) for depth in DEPTHS for budget in BUDGETS])
    return store


def test_forecast_then_train_then_check(call: Call, store: Store) -> None:
    made = call("forecast", "rings", "--flops", "1.6e10")
    assert made.code == 0, made.error
    path = Path(made.output.splitlines()[-1])
    assert path.parent == Path("runs/forecasts")
    (loss,) = [each for each in json.loads(path.read_text())["values"] if each["target"] == "loss"]
    true = 3 + 30 * 16**-0.4
    assert loss["value"] == pytest.approx(true, rel=0.01)
    assert "no run of 1.6e+10 FLOPs yet: rings" in call("forecast", "check").output

    cells = [finished_cell(store, depth, budget) for depth in DEPTHS for budget in (*BUDGETS, 1.6e10)]
    write_study(store, "rings", cells)
    checked = call("forecast", "check")
    assert checked.code == 0, checked.error
    assert "made after its run" in checked.output  # the made-up cells ended long ago
    assert call("forecast", "rings", "--flops", "1.6e10").error.count("are there already") == 1


def test_runs_of_another_recipe_are_no_outcome(call: Call, store: Store) -> None:
    """Although the study's latest sweep is of that one."""
    assert call("forecast", "rings", "--flops", "1.6e10").code == 0
    earlier = StudyRecord.load(store.study("rings").record).cells
    other = [study_cell(finished_cell(store, 12, 1.6e10), recipe="two", experiment="rings")]
    write_study(store, "rings", [*earlier, *other], recipe="two")
    assert "no run of 1.6e+10 FLOPs yet: rings" in call("forecast", "check").output
    same = [study_cell(finished_cell(store, 16, 1.6e10), experiment="rings")]
    write_study(store, "rings", [*earlier, *other, *same], recipe="two")
    checked = call("forecast", "check")
    assert "no run" not in checked.output
    assert f"{3 + 30 * 16**-0.4 + 0.08:.4g}" in checked.output


def test_of_a_table_and_its_check(call: Call, tmp_path: Path) -> None:
    rows = [
        (n, c, 2 + 100 * c**-0.1 + 1e-3 * abs(n - 2e6) / 1e6)
        for n in (1e6, 2e6, 4e6)
        for c in (1e15, 4e15, 1.6e16, 6.4e16)
    ]
    header = "params,flops,loss\n"
    Path("runs.csv").write_text(header + "".join(f"{n},{c},{loss}\n" for n, c, loss in rows))
    made = call("forecast", "--runs", "runs.csv", "--flops", "2.56e17")
    assert made.code == 0, made.error
    Path("later.csv").write_text(header + f"2e6,2.56e17,{2 + 100 * 2.56e17**-0.1}\n")
    checked = call("forecast", "check", "--runs", "later.csv")
    assert "1 of 1 inside their 95% interval" in checked.output
    path = Path(made.output.splitlines()[-1])
    path.write_text(path.read_text().replace("2.56e+17", "2.6e+17"))
    path.with_name("bytes.json").write_bytes(b"\xff\xfe")
    left_out = call("forecast", "check", "--runs", "later.csv").error
    assert "changed after it was made; it doesn't count" in left_out
    assert "left out: runs/forecasts/bytes.json: no forecast" in left_out


def made_of(call: Call, name: str, *columns: str, header: str = "params,flops,loss") -> Path:
    """A forecast from a table of three sizes at four budgets."""
    sizes, budgets = (1e6, 2e6, 4e6), (1e15, 4e15, 1.6e16, 6.4e16)
    rows = [f"{n},{c},{2 + 100 * c**-0.1 + 1e-9 * abs(n - 2e6)}" for n in sizes for c in budgets]
    Path(name).write_text("\n".join([header, *rows]))
    made = call("forecast", "--runs", name, "--flops", "2.56e17", *columns)
    assert made.code == 0, made.error
    return Path(made.output.splitlines()[-1])


def later_run(name: str, header: str = "flops,loss") -> str:
    Path(name).write_text(f"{header}\n2.56e17,{2 + 100 * 2.56e17**-0.1}\n")
    return name


def test_names_of_columns_are_remembered(call: Call) -> None:
    made_of(call, "own.csv", "--params", "N", "--flops-column", "C (FLOP)", "--loss", "nats", header="N,C (FLOP),nats")
    checked = call("forecast", "check", "--runs", later_run("later.csv", "C (FLOP),nats"))
    assert "1 of 1 inside their 95% interval" in checked.output
    assert max(map(len, checked.output.splitlines())) <= 80
    other = call("forecast", "check", "--runs", later_run("other.csv", "flops,nats"))
    assert "the table has no column 'C (FLOP)'" in other.error
    renamed = call("forecast", "check", "--runs", "other.csv", "--flops-column", "flops", "--where", "nats > 1")
    assert "1 of 1 inside their 95% interval" in renamed.output
    assert "compared with rows where nats > 1 alone" in renamed.output


def test_another_tables_runs_say_nothing_of_this_one(call: Call) -> None:
    first, _ = made_of(call, "one.csv"), made_of(call, "two.csv")
    asked = call("forecast", "check", "--runs", later_run("later.csv"))
    assert "forecasts of one.csv and of two.csv; --of NAME says whose runs later.csv has" in asked.error
    assert "1 of 1 inside" in call("forecast", "check", "--runs", "later.csv", "--of", "two.csv").output
    assert "no forecast of it" in call("forecast", "check", "--runs", "later.csv", "--of", "three.csv").error
    grown = call("forecast", "check", "--runs", later_run("one.csv"))
    assert "1 of 1 inside" in grown.output
    assert "of two.csv; --runs FILE names the table" in grown.error
    first.with_name("again.json").write_bytes(first.read_bytes())
    copied = call("forecast", "check", "--runs", "one.csv")
    assert "1 of 1 inside" in copied.output
    assert "a copy of again.json" in copied.error


def test_a_forecast_that_is_gone_is_missed(call: Call) -> None:
    """A miss can't be left out of the record, nor signed anew."""
    first, _ = made_of(call, "one.csv"), made_of(call, "two.csv")
    assert "gone" not in call("forecast", "check").error
    first.unlink()
    assert "made before it in this folder is gone, or was changed" in call("forecast", "check").error


def test_what_is_odd_about_a_table_is_said(call: Call) -> None:
    lines = ["params,flops,loss,kind"]
    for kind, factor in (("nats", 1.0), ("bits", 1.44)):
        for n in (1e6, 2e6, 4e6):
            lines += [f"{n},{c},{factor * (2 + 100 * c**-0.1)},{kind}" for c in (1e15, 4e15, 1.6e16, 6.4e16)]
    Path("mixed.csv").write_text("\n".join(lines))
    made = call("forecast", "--runs", "mixed.csv", "--flops", "1e18")
    assert "mixed-rows: " in made.error
    assert "kind (bits, nats)" in made.error
    nats = call("forecast", "--runs", "mixed.csv", "--flops", "1e18", "--where", "kind == 'nats'")
    assert "mixed-rows" not in nats.error
    assert len(list(Path("runs/forecasts").iterdir())) == 2  # within a second


def test_mistakes(call: Call, store: Store) -> None:
    assert "--flops names the budget" in call("forecast", "rings").error
    several = call("forecast", "studies/families", "--flops", "1e12").error
    assert "holds several experiments; name one of them, such as studies/families:" in several
    assert "one of them" in call("forecast").error
    assert "no forecasts" in call("forecast", "check").error
    for flops in ("-1", "1e300", "nan"):
        refused = call("forecast", "rings", "--flops", flops).error
        assert "expected training FLOPs above 0 and up to 1e+60" in refused
    assert "less than the largest budget of the runs" in call("forecast", "rings", "--flops", "1e6").error
    assert "--flops: check looks at all forecasts" in call("forecast", "check", "--flops", "1e12").error
