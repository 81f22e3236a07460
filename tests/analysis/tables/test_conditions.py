"""The language of --where: what it means, row by row, and that nothing else than a condition is ever run."""

import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_tables import chinchilla_table

from analysis.errors import TableError
from analysis.options import FitOptions
from analysis.pipeline import fit_laws
from analysis.tables.conditions import meets

ROWS = pd.DataFrame(
    {
        "loss": [2.0, 3.0, 4.0, np.nan],
        "N": [10, 20, 30, 40],
        "Model Size": [1.0, 2.0, 3.0, 4.0],
        "status": ["ok", "crashed", "it's", None],
        "good": [True, False, True, False],
        "class": ["a", "b", "c", "d"],
        "µP": [1.0, 2.0, 3.0, 4.0],
        "day": pd.to_datetime(["2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04"]),
        "kind": pd.Categorical(["x", "y", "x", "y"]),
        "whole": pd.array([1, 2, 3, None], dtype="Int64"),
    }
)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("loss < 3", "1000"),
        ("loss <= 3", "1100"),
        ("3 < loss", "0010"),
        ("loss == 3", "0100"),
        ("loss != 3", "1010"),  # a missing value meets no condition
        ("not loss == 3", "1010"),
        ("~(loss < 3)", "0110"),
        ("not (loss < 3 or N > 35)", "0110"),
        ("loss < 3 or N > 35", "1001"),
        ("loss < 3.5 and N > 15", "0100"),
        ("loss < 3.5 & N > 15", "0100"),
        ("loss < 3 | N > 25", "1011"),
        ("2 < loss <= 4", "0110"),
        ("2.5 < loss < N", "0110"),
        ("`Model Size` >= 3", "0011"),
        ("`Model Size`*10 == N", "1111"),
        ("N / `Model Size` > 9 and N - 5 < 2 * 10", "1100"),
        ("-N < -25", "0011"),
        ("N ** 2 >= 4e2", "0111"),
        ("status == 'ok'", "1000"),
        ('status == "it\'s"', "0010"),
        (r"status == 'it\'s'", "0010"),
        ("status != 'ok'", "0110"),
        ("status in ['ok', 'crashed']", "1100"),
        ("status not in ('ok', 'crashed')", "0010"),
        ("N in [10, 40.0]", "1001"),
        ("N not in [-1]", "1111"),
        ("good", "1010"),
        ("not good", "0101"),
        ("good == True and N > 15", "0010"),
        ("`class` == 'b'", "0100"),
        ("µP > 3", "0001"),
        ("day > '2026-01-02'", "0011"),
        ("kind == 'x'", "1010"),
        ("whole > 1", "0110"),
        ("status == 'a & b | `c`'", "0000"),
        ("N > 99999999999999999999999999", "0000"),
        ("loss < 9**9**9", "1110"),
        ("  N\n> 15 ", "0111"),
    ],
)
def test_conditions_mean_what_they_say(condition, expected):
    found = meets(ROWS, condition)
    assert "".join(str(int(each)) for each in found) == expected
    assert found.index.equals(ROWS.index)


HOSTILE = [
    "@pd.io.common.os.system('touch {mark}') == 0",
    "@__builtins__",
    "__import__('os').system('touch {mark}') == 0",
    "loss.map(print) == 0",
    "loss.values.tofile('{mark}') == 0",
    "loss.to_csv('{mark}') == 0",
    "().__class__.__base__.__subclasses__() == 0",
    "open('{mark}', 'w') == 0",
    "eval('1') == 1",
    "exec('1') == 1",
    "[x for x in loss] == 0",
    "(lambda: 1)() == 1",
    "lambda: 1",
    "(loss := 3) == 3",
    "loss[0] == 1",
    "loss[(open('{mark}', 'w'))] == 1",
    "f'{{loss}}' == 'a'",
    'f\'{{open("{mark}", "w")}}\' == status',
    "{{1: 2}} == 1",
    "loss if loss else N",
    "loss is None",
    "loss == None",
    "loss == ...",
    "loss == b'a'",
    "loss == 1j",
    "*loss",
    "await loss",
    "import os",
    "loss < 3; N > 3",
    "loss = 3",
    "del loss",
    "`loss`.__class__ == 1",
    "`open('{mark}', 'w')` == 1",
    "`a` + `b` == 1",
    "status * 999999999 == 'a'",
    "'a' * 999999999 == status",
    "'a' + 'b' == status",
    "status < 3",
    "status == 3 < loss",
    "loss == 'low'",
    "loss in 'abc'",
    "loss in loss",
    "loss in [loss]",
    "loss in [[1]]",
    "N @ N == 1",
    "N << 3 == 1",
    "(loss < 3) + 1 == 1",
    "(loss < 3) < 1",
    "loss",
    "status",
    "1 < 2",
    "True",
    "3",
    "'text'",
    "",
    "   ",
    "`",
    "`loss",
    "'",
    "loss <",
    "loss < 3)",
    "loss < \x00",
    "loss <\ud800 3",
    "lss < 3",
    "Model Size > 3",
    "loss # < 3",
    "\\",
    "(" * 3000 + "loss < 3" + ")" * 3000,
    "(" * 450 + "loss < 3" + ")" * 450,
    "not " * 200 + "good",
    "~" * 900 + "good",
    "-" * 900 + "N < 3",
    "N" + "**N" * 300 + " > 1",
    "N" + "+N" * 450 + " > 1",
    "loss" + ".a" * 450 + " > 1",
    "N > 1 and " * 100_000 + "N > 1",
    "N" + "[0]" * 300 + " > 1",
    "N > " + "1" * 100_000,
]


@pytest.mark.parametrize("condition", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("flag", ["--where", "--holdout-where"])
def test_what_is_no_condition_is_refused_in_one_line_and_never_run(condition, flag, tmp_path):
    mark = tmp_path / "mark"
    condition = condition.replace("{mark}", str(mark)).replace("{{", "{").replace("}}", "}")
    start = time.perf_counter()
    with pytest.raises(TableError) as caught:
        meets(ROWS, condition, flag)
    assert time.perf_counter() - start < 2
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert str(caught.value).startswith(f"{flag} ")
    assert not mark.exists()


def test_both_flags_run_no_code(tmp_path):
    mark = tmp_path / "mark"
    code = f"@pd.io.common.os.system('touch {mark}') == 0"
    for options in ({"where": (code,)}, {"holdout_where": code}):
        with pytest.raises(TableError, match="where"):
            fit_laws(chinchilla_table(), FitOptions(params="N", flops="C", tokens="D", **options))
    assert not mark.exists()


def test_errors_say_what_would_be_right():
    with pytest.raises(TableError, match=r"--where 'los < 3': the table has no column 'los'; did you mean 'loss'"):
        meets(ROWS, "los < 3")
    with pytest.raises(TableError, match="names with spaces or signs in `backticks`"):
        meets(ROWS, "Model Size > 3")
    with pytest.raises(TableError, match="is not a condition that is true or false for each row"):
        meets(ROWS, "loss")


@given(st.text(max_size=60) | st.text(alphabet="loss N<>=()&|~!'`\"[],.@*+-/01e:{}\\# andotri\n", max_size=60))
def test_any_text_is_a_condition_or_one_clear_line(text):
    try:
        found = meets(ROWS, text)
    except TableError as error:
        found, message = meets(ROWS, "N > 0"), str(error)
    else:
        message = ""
    assert "\n" not in message
    assert found.dtype == bool
    assert len(found) == len(ROWS)


numbers = st.floats(-5, 5).map(lambda value: round(value, 1))
comparisons = st.tuples(st.sampled_from("ab"), st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), numbers).map(
    lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
)
conditions = st.recursive(
    comparisons,
    lambda inner: (
        st.tuples(inner, st.sampled_from(["and", "or", "&", "|"]), inner).map(lambda three: f"({' '.join(three)})")
        | inner.map(lambda each: f"(not {each})")
    ),
    max_leaves=8,
)


@given(conditions, st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5))
def test_without_missing_values_conditions_are_those_of_python(condition, rows):
    found = meets(pd.DataFrame(rows, columns=["a", "b"]), condition)
    python = condition.replace("&", "and").replace("|", "or")
    assert list(found) == [bool(eval(python, {"a": a, "b": b})) for a, b in rows]  # written by this test
