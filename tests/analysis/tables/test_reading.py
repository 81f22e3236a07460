"""Files as people have them: encodings, separators, comments, compression, nesting; what was guessed is recorded."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
from planted_tables import chinchilla_table, sweep_table

from analysis.errors import TableError
from analysis.options import FitOptions
from analysis.tables.reading import read_runs
from analysis.tables.table import prepare

MAPPED = FitOptions(params="N", flops="C", tokens="D", loss="loss")
TABLE = chinchilla_table(sizes=4, budgets=4)


def semicolons(table):
    text = table.to_csv(index=False, sep=";", decimal=",")
    assert ";" in text
    return text.encode()


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("bom.csv", b"\xef\xbb\xbf" + TABLE.to_csv(index=False).encode(), None),
        ("excel.csv", TABLE.to_csv(index=False).encode("utf-16"), None),
        ("semicolons.csv", semicolons(TABLE), "a comma is read as a decimal comma"),
        ("bars.txt", TABLE.to_csv(index=False, sep="|").encode(), None),
        ("comments.csv", b"# made by hand\n" + TABLE.to_csv(index=False).encode(), "1 lines that start with #"),
        ("packed.csv.gz", gzip.compress(TABLE.to_csv(index=False).encode()), None),
        ("latin.csv", TABLE.assign(who="Zo\xeb").to_csv(index=False).encode("latin-1"), "read as Latin-1"),
        ("spaces.csv", TABLE.to_csv(index=False).replace(",", " , ").encode(), None),
        ("sep.csv", b"sep=;\r\n" + semicolons(TABLE), "a comma is read as a decimal comma"),
        ("macintosh.csv", TABLE.to_csv(index=False, lineterminator="\r").encode(), None),
        ("colours.csv", TABLE.assign(colour="#faebdd").to_csv(index=False).encode(), None),
        ("columns.json", json.dumps({name: TABLE[name].tolist() for name in TABLE}).encode(), None),
    ],
)
def test_files_of_many_kinds_hold_the_same_runs(name, content, note, tmp_path):
    (tmp_path / name).write_bytes(content)
    table = prepare(read_runs([tmp_path / name]), MAPPED)
    np.testing.assert_allclose(table.frame[["params", "flops", "tokens", "loss"]], TABLE[["N", "C", "D", "loss"]])
    assert any(note in each for each in table.notes) if note else not [each for each in table.notes if name in each]


def test_records_may_lack_keys_and_nest(tmp_path):
    records = [{"config": {"N": row.N, "D": row.D}, "loss": row.loss} for row in TABLE.itertuples()]
    del records[2]["loss"]
    (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, records)))
    table = prepare(read_runs([tmp_path / "runs.jsonl"]), FitOptions(params="config.N", tokens="config.D"))
    assert [(each.reason, each.rows) for each in table.exclusions] == [("no value in loss", ("3",))]


@pytest.mark.parametrize("backend", ["numpy_nullable", "pyarrow"])
def test_columns_of_every_kind_of_number(backend, tmp_path):
    TABLE.convert_dtypes(dtype_backend=backend).to_parquet(tmp_path / "runs.parquet")
    first = prepare(read_runs([tmp_path / "runs.parquet"]), MAPPED).frame
    np.testing.assert_allclose(first["loss"], TABLE["loss"])
    odd = TABLE.convert_dtypes(dtype_backend=backend)
    odd["N"] = TABLE["N"].round().astype("int64").map("{:,}".format)
    odd["C"] = TABLE["C"].astype("category")
    odd["D"] = TABLE["D"].map(" {!r} ".format)
    odd.index = [0] * len(odd)
    second = prepare(odd, MAPPED).frame
    np.testing.assert_allclose(second[["params", "flops", "tokens"]], TABLE[["N", "C", "D"]], rtol=1e-6)


@pytest.mark.parametrize(
    ("column", "text", "message"),
    [
        ("loss", "3,141", "not a number in row 1 .3,141.; write decimals with a point"),
        ("N", "20.000.000", r"row 1 \(20.000.000\); write decimals with a point and thousands without separators"),
        ("N", "70B", r"row 1 \(70B\)"),
        ("loss", "diverged", r"row 1 \(diverged\); leave such out by --where \"loss != 'diverged'\""),
    ],
)
def test_a_comma_or_letter_whose_meaning_is_not_certain_is_refused(column, text, message):
    table = TABLE.astype({column: object})
    table.loc[0, column] = text
    with pytest.raises(TableError, match=message):
        prepare(table, MAPPED)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("N,loss,loss\n1,2,3\n", "two columns named 'loss'"),
        ("N,loss\nrun1,1e8,3\n", "the header has 2 columns, but the first row has 3 values"),
        ("N,loss,N \n1,2,3\n", "two columns named 'N'"),
        (",".join(map(str, range(1_000_000))) + "\n1\n", "1,000,000 columns; a table of runs has at most 10,000"),
        ("", "can't be read|has no rows"),
        ("N,loss\n", "has no rows"),
        ("PK\x03\x04\0\0[Content_Types].xml\r", "this is no text; save a sheet of Excel as .csv"),
        ('N,loss\n"1,2\n', "can't be read|not a number|has no rows"),
    ],
)
def test_files_that_pandas_would_misread_are_refused(content, message, tmp_path):
    (tmp_path / "runs.csv").write_text(content)
    with pytest.raises(TableError, match=message) as caught:
        prepare(read_runs([tmp_path / "runs.csv"]), FitOptions(params="N"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["runs.csv.gz", "runs.jsonl.xz", "runs.json", "runs.parquet"])
def test_broken_files_are_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x00\x01 nothing that can be read {")
    with pytest.raises(TableError, match=name):
        read_runs([tmp_path / name])


def test_files_that_differ_in_their_columns_say_so(tmp_path):
    TABLE.to_csv(tmp_path / "a.csv", index=False)
    TABLE.assign(row="x", seed=1).to_csv(tmp_path / "b.csv", index=False)
    runs = read_runs([tmp_path / "a.csv", tmp_path / "b.csv"])
    assert runs.attrs["notes"] == ("a.csv has no column 'source row', 'seed'",)
    assert len(prepare(runs, MAPPED).frame) == 2 * len(TABLE)


def test_names_that_mean_something_here_neither_filter_nor_group_a_foreign_table():
    own = {"status": ["ok", "crashed"], "variant": ["a", "b"], "group": ["x", "y"], "budget": ["low", "high"]}
    own |= {"row": [1, 1], "depth": ["deep", "flat"], "params": ["{}", "[]"], "epochs": ["1 of 3", "2 of 3"]}
    table = TABLE.assign(**{name: pair * (len(TABLE) // 2) for name, pair in own.items()})
    kept = prepare(table, MAPPED)
    assert len(kept.frame) == len(TABLE)
    assert not kept.has("group")
    assert not kept.has("budget")
    assert list(kept.frame["source params"]) == list(table["params"])
    said = " ".join(kept.own)
    assert all(f"'{name}'" in said for name in ("status", "variant", "group", "budget", "params"))
    sweep = sweep_table(depths=(4, 6), budgets=3)
    assert len(prepare(sweep.assign(status=["finished"] * 5 + ["diverged"]), FitOptions()).frame) == 5
    assert prepare(sweep, FitOptions()).own == ()


def test_swapped_names_stay_swapped():
    table = TABLE.rename(columns={"N": "tokens", "D": "params"})
    kept = prepare(table, FitOptions(params="tokens", tokens="params", flops="C")).frame
    np.testing.assert_allclose(kept[["params", "tokens"]], TABLE[["N", "D"]])
    grouped = prepare(TABLE.assign(params=1.0), FitOptions(params="N", flops="C", group="params")).frame
    np.testing.assert_allclose(grouped["params"], TABLE["N"])


def test_columns_called_params_flops_and_tokens_are_found_and_checked():
    table = TABLE.rename(columns={"N": "params", "C": "flops", "D": "tokens"})
    kept = prepare(table, FitOptions())
    assert kept.columns == {"params": "params", "flops": "flops", "tokens": "tokens"}
    assert "column 'tokens' is taken for tokens by its name" in kept.notes
    with pytest.raises(TableError, match="column 'tokens': values must be positive"):
        prepare(table.assign(tokens=-1.0), FitOptions())


def test_a_nominal_budget_stands_in_for_missing_flops():
    kept = prepare(TABLE, FitOptions(params="N", budget="C"))
    np.testing.assert_allclose(kept.frame["flops"], TABLE["C"])


@pytest.mark.parametrize(
    ("unit", "role", "factor", "noun"),
    [
        ("params=M", "params", 1e6, "parameters"),
        ("params=1e9", "params", 1e9, "parameters"),
        ("params=billions", "params", 1e9, "parameters"),
        ("flops=PFLOP", "flops", 1e15, "FLOPs"),
        ("flops=gflops", "flops", 1e9, "FLOPs"),
        ("flops=PFLOP/s-days", "flops", 8.64e19, "FLOPs"),
        ("flops=PF-days", "flops", 8.64e19, "FLOPs"),
        ("tokens=images", "tokens", 1.0, "images"),
        ("tokens=B tokens", "tokens", 1e9, "tokens"),
        ("tokens=M images seen", "tokens", 1e6, "images seen"),
        ("loss=nats a token", "loss", 1.0, "nats a token"),
    ],
)
def test_units_scale_roles_and_name_axes(unit, role, factor, noun):
    kept = prepare(TABLE, FitOptions(params="N", flops="C", tokens="D", units=(unit,)))
    source = {"params": "N", "flops": "C", "tokens": "D", "loss": "loss"}[role]
    np.testing.assert_allclose(kept.frame[role], TABLE[source] * factor)
    assert kept.units[role].noun == noun


@pytest.mark.parametrize("unit", ["params=dozens", "flops=PS", "tokens=7 bags", "params", "budget=M", "los=nats"])
def test_units_that_mean_nothing_are_refused(unit):
    with pytest.raises(TableError, match=r"--unit|did you mean 'loss'"):
        prepare(TABLE, FitOptions(params="N", flops="C", tokens="D", units=(unit,)))


def test_columns_of_any_name_are_filtered_and_fitted():
    table = TABLE.rename(columns={"N": "Größe [10⁶] (µP)", "loss": "loss %", "C": "throughput/total_gflops"})
    options = FitOptions(params="Größe [10⁶] (µP)", loss="loss %", flops="throughput/total_gflops", tokens="D")
    assert len(prepare(table, options).frame) == len(TABLE)
    for condition in ("`loss %` < 9", "`throughput/total_gflops` > 1", "`Größe [10⁶] (µP)` > 1"):
        assert len(prepare(table, FitOptions(**{**options.__dict__, "where": (condition,)})).frame) == len(TABLE)
    assert len(prepare(pd.DataFrame({0: TABLE["N"], 1: TABLE["loss"]}), FitOptions(params="0", loss="1")).frame)


def test_two_columns_of_one_name_are_refused_in_every_kind_of_file(tmp_path):
    (tmp_path / "runs.json").write_text(json.dumps([{"N": 1, " N": 2, "loss": 3}]))
    pd.DataFrame({"N": [1.0], "N ": [2.0], "loss": [3.0]}).to_parquet(tmp_path / "runs.parquet")
    for name in ("runs.json", "runs.parquet"):
        with pytest.raises(TableError, match="two columns named 'N'"):
            read_runs([tmp_path / name])


def test_columns_without_a_name_are_read():
    """An index that pandas wrote beside the table has none."""
    assert len(prepare(TABLE.assign(**{"": 1.0}), MAPPED).frame) == len(TABLE)
    with pytest.raises(TableError, match="no column ''"):
        prepare(TABLE, FitOptions(params="", loss="loss"))


DRAWN = {
    "markdown.md": "# Runs\nAll, here:\n\n| N | loss |\n|:--|--:|\n| 125m | **3.9** |\n| 1.3B | - |\n| 6.7 b | 3.0 |\n",
    "bare.txt": "N | loss\n- | -\n125m | 3.9\n1.3B | —\n6.7 b | 3.0\n",
    "framed.txt": "+---+---+\n| N | loss |\n+===+===+\n| 125m | 3.9 |\n| 1.3B | NA |\n| 6.7B | 3.0 |\n+---+---+\n",
    "boxes.txt": "┏━━━┳━━━┓\n┃ N ┃ loss ┃\n┡━━━╇━━━┩\n│ 125M │ 3.9 │\n│ 1.3B │ │\n│ 6.7bn │ 3.0 │\n└───┴───┘\n",
    "aligned.txt": "N        loss\n-------  ----\n125 m    3.9\n1.3 B    -\n6.7 b    3.0\n",
    "words.csv": "N loss\n125m 3.9\n1.3B NA\n6.7B 3.0\n",
    "tabs.csv": "N\tloss\n125m\t3.9\n1.3B\t–\n6.7 billion\t3.0\n",
    "points.csv": "N;loss\n125,000,000;3.9\n1,300,000,000;-\n6,700,000,000;3.0\n",
    "powers.csv": "N,loss\n1.25x10^8,3.9\n1.3×10⁹,n/a\n6.7*10**9,3.0\n",
    "mixed.csv": "N,loss\n125m,3.9\n1.3e9,?\n6.7B,3.0\n",
}


@pytest.mark.parametrize("name", DRAWN)
def test_tables_as_people_draw_them(name, tmp_path):
    (tmp_path / name).write_text(DRAWN[name], encoding="utf-8")
    table = prepare(read_runs([tmp_path / name]), FitOptions(params="N"))
    np.testing.assert_allclose(table.frame["params"], [1.25e8, 6.7e9])
    assert list(table.frame["loss"]) == [3.9, 3.0]
    assert [(each.reason, each.rows) for each in table.exclusions] == [("no value in loss", ("2",))]


def test_rows_that_do_not_fit_their_header_are_named(tmp_path):
    (tmp_path / "odd.txt").write_text("N D loss\n1 2 3\n4 5\n")
    with pytest.raises(TableError, match="row 2 below the header has 2 values for 3 names"):
        read_runs([tmp_path / "odd.txt"])
    (tmp_path / "one.csv").write_text("training loss\n3\n2\n")
    assert list(read_runs([tmp_path / "one.csv"])["training loss"]) == [3, 2]


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["1,300", "900", "12,500"], [1300, 900, 12500]),
        (["1,300M", "900M", "2B"], [1.3e9, 9e8, 2e9]),
        (["300k", "1e9", "2 G"], [3e5, 1e9, 2e9]),
        (["125M params", "1.3B params", "7T"], [1.25e8, 1.3e9, 7e12]),
        (["NA", "—", "8b"], [np.nan, np.nan, 8e9]),
        (["~1.3B", "1e21 FLOPs", "300 B tokens"], [1.3e9, 1e21, 3e11]),
        (["20 000 000", "1_300_000", "2'500'000", "1\u202f000"], [2e7, 1.3e6, 2.5e6, 1e3]),
        (["45.2%", "7 %", "1e−1%"], [0.452, 0.07, 1e-3]),
    ],
)
def test_counts_as_people_write_them(texts, values):
    from analysis.tables.roles import numbers

    np.testing.assert_allclose(numbers(pd.DataFrame({"N": texts, "row": "1"}), "N", counts=True), values)


def test_a_table_whose_loss_has_another_name_is_asked_for_it():
    with pytest.raises(TableError, match="name the column to fit, by --loss or --target; columns: flops, bpb"):
        prepare(pd.DataFrame({"flops": [1e18, 1e19], "bpb": [1.1, 1.0]}), FitOptions())


def test_a_suffix_that_was_forgotten_is_not_taken_for_twenty_parameters():
    table = pd.DataFrame({"N": ["20", "0.125B", "1.3B", "7B"], "loss": [3.9, 3.4, 3.0, 2.8]})
    with pytest.raises(TableError, match=r"not a number in row 1 \(20\); give all of the column's numbers a suffix"):
        prepare(table, FitOptions(params="N"))


def test_conditions_see_numbers_that_were_written_as_texts():
    table = pd.DataFrame({"N": ["125m", "350m", "1.3b"], "loss": ["3.9", "3.4", "diverged"]})
    kept = prepare(table, FitOptions(params="N", where=("N < 1e9", "loss != 'diverged'")))
    assert list(kept.frame["params"]) == [1.25e8, 3.5e8]
    assert "column 'N': numbers are read from texts, such as 1.25e+08 from '125m'" in kept.notes


def test_files_are_named_by_a_column_and_found_by_a_pattern(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        TABLE.assign(file="own").to_csv(tmp_path / folder / "runs.csv", index=False)
    runs = read_runs([str(tmp_path / "*" / "runs.csv"), tmp_path / "a" / "runs.csv"])
    assert list(runs["file"].unique()) == ["a/runs.csv", "b/runs.csv"]
    assert set(runs["source file"]) == {"own"}
    assert len(runs) == 2 * len(TABLE)
    kept = prepare(runs, FitOptions(params="N", group="file"))
    assert set(kept.frame["group"]) == {"a/runs.csv", "b/runs.csv"}
    with pytest.raises(TableError, match="no file matches"):
        read_runs([tmp_path / "c*.csv"])


def test_any_two_of_n_d_and_c_give_the_third():
    whole = TABLE.rename(columns={"N": "params", "C": "flops", "D": "tokens"})
    for missing in ("params", "flops", "tokens"):
        kept = prepare(whole.drop(columns=missing), FitOptions(tokens_from_flops=6)).frame
        np.testing.assert_allclose(kept[missing], whole[missing])
    with pytest.raises(TableError, match="needs two of the columns"):
        prepare(whole[["params", "loss"]], FitOptions(tokens_from_flops=6))


def test_a_target_may_have_the_name_of_a_role():
    table = TABLE.rename(columns={"C": "flops", "N": "params"})
    assert prepare(table, FitOptions(target=("params",))).targets == ("params",)
    kept = prepare(table.assign(N=table["flops"]), FitOptions(params="N", target=("params",)))
    np.testing.assert_allclose(kept.frame["source params"], table["params"])
    assert prepare(table, FitOptions(target=("params",), params="params")).targets == ("params",)  # against FLOPs
    with pytest.raises(TableError, match="no law can be fitted to what it is fitted against"):
        prepare(table, FitOptions(target=("params",), x=("params",)))
    with pytest.raises(TableError, match="--x group: the name means something else here"):
        prepare(table.assign(group=1.0), FitOptions(x=("group",)))
