"""Whatever the table and the flags: laws, or an error of one line, never a traceback."""

import json
import math
import tempfile
import warnings
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from analysis.errors import TableError
from analysis.fitting.laws.registry import LAWS
from analysis.grids.frontier import FRONTIERS
from analysis.options import FitOptions
from analysis.pipeline import fit_laws
from analysis.report.html import render
from analysis.report.terminal import terminal_summary
from analysis.tables.reading import read_runs
from analysis.tables.repeats import REDUCTIONS

NAMES = (
    *("params", "flops", "tokens", "budget", "seed", "group", "run_id", "loss", "error", "fid", "fid_floor", "mind"),
    *(
        "epochs",
        "unique_tokens",
        "N",
        "C",
        "D",
        "width",
        "lr",
        "kind",
        "run",
        "step",
        "file",
        "row",
        "source row",
        "source params",
        "status",
    ),
    *("variant", "guidance", "samples", "precision", "params_total", "train_flops", "tokens_seen", "budget_flops", ""),
)
NUMBERS = st.one_of(
    st.sampled_from([1.0, 2.0, 3.0, 0.5, 1e6, 1e9, 1e18, 6e18, 1e21]),
    st.floats(1e-3, 1e24),
    st.integers(1, 30).map(lambda power: 10.0**power),
)
ODD = st.sampled_from(
    [
        0.0,
        -1.0,
        math.nan,
        math.inf,
        -math.inf,
        1e-300,
        1e300,
        None,
        "",
        "-",
        "—",
        "NA",
        "text",
        "1.3B",
        "1,300",
        "7e8 x",
        True,
        [1],
        {"a": 1},
        10**40,
    ]
)


TEXTS = ("kind", "run", "run_id", "group", "file", "status", "variant", "precision")


@st.composite
def columns(draw, rows, sane, name):
    """One column's values: a few levels, a law's inputs, labels, texts, or whatever people leave in tables."""
    kinds = ["levels", "levels", "numbers", "growing"]
    kinds = ["labels", "labels", "levels", "growing"] if name in TEXTS else kinds
    kind = draw(st.sampled_from(kinds if sane else [*kinds, "labels", "constant", "suffixes", "odd", "odd"]))
    if kind == "levels":
        levels = st.sampled_from([1.0, 2.0, 1e7, 1e8, 1e9, 1e18, 1e19])
        values = draw(st.lists(levels, min_size=rows, max_size=rows))
    elif kind == "growing":
        start, factor = draw(st.sampled_from([1.0, 2.5, 1e7, 1e18])), draw(st.sampled_from([0.7, 1.001, 1.5, 10.0]))
        values = [start * factor**place for place in range(rows)]
    elif kind == "labels":
        values = draw(st.lists(st.sampled_from(["a", "a", "b", "run 3", None, ""]), min_size=rows, max_size=rows))
    elif kind == "constant":
        values = [draw(st.one_of(NUMBERS, ODD))] * rows
    elif kind == "suffixes":
        values = draw(
            st.lists(st.sampled_from(["125m", "1.3 B", "300k", "1e9", "—", ""]), min_size=rows, max_size=rows)
        )
    else:
        values = draw(st.lists(NUMBERS, min_size=rows, max_size=rows))
    if kind == "odd" and rows:
        for place in draw(st.lists(st.integers(0, rows - 1), max_size=3)):
            values[place] = draw(ODD)
    return values


@st.composite
def tables(draw, sane):
    """Rows with any of the names that mean something here, or others; now and then two columns of one name."""
    rows = draw(st.integers(0 if not sane else 4, 16))
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=9, unique=sane or draw(st.integers(0, 9)) > 0))
    needed = draw(st.sampled_from([["flops"], ["params"], ["params", "tokens"], ["params", "flops"], ["width"]]))
    names = list(dict.fromkeys([*names, *needed, "loss"])) if sane else names
    made = [pd.Series(draw(columns(rows, sane, name)), dtype=object) for name in names]
    table = pd.concat(made, axis="columns", keys=names).infer_objects()
    if sane and draw(st.integers(0, 3)):
        law = [2 + 5 * draw(st.sampled_from([0.8, 0.9])) ** place for place in range(rows)]
        table["loss"] = draw(st.permutations(law)) if draw(st.integers(0, 3)) == 0 else law
    return table


@st.composite
def choices(draw, names, sane):
    """Any flags; columns are mostly those of the table, and what can't be met is asked for of odd tables."""
    column = st.sampled_from(names if sane else [*names, *names, "absent", "params", "flops"])
    texts = [name for name in names if name in TEXTS] or names
    odd = 0 if sane else 1

    def several(values, most=2):
        return st.lists(st.sampled_from(values), min_size=1, max_size=most).map(tuple)

    flags = {
        **dict.fromkeys(("params", "flops", "tokens", "budget", "seed_column", "loss"), column),
        **dict.fromkeys(("run_id", "group"), st.sampled_from(texts)),
        **dict.fromkeys(("target", "x", "by"), several(names)),
        "reduce": st.sampled_from(REDUCTIONS),
        "compare": st.just(("a", "b")),
        "law": several([*LAWS, *["lore"] * odd], 3),
        "objective": st.sampled_from(["huber", "lad", "lsq", "lsq-log"]),
        "drop_highest": st.integers(-odd, 4),
        "tokens_from_flops": st.sampled_from([6.0, 1e-6, *[0.0] * odd]),
        "offset": st.sampled_from([0.5, 1.0, *[1e9, -1.0] * odd]),
        "predict": several(["flops=1e22", "params=1e9,tokens=2e10", *["N=3", "flops"] * odd]),
        "allocate": several([1e18, 1e22, *[0.0] * odd]),
        "units": several(["flops=log10", "params=M", "tokens=ln", "flops=1e15", "loss=nats"]),
        "where": several(["loss < 4", "flops > 1e18", "kind == 'a'", "`` > 1"]),
        "holdout_where": st.sampled_from(["flops > 1e18", "params >= 1e8", "loss < 3"]),
        "checkpoints": st.just(True),
        "frontier": st.sampled_from([*FRONTIERS, "all", *["best"] * odd]),
        "annealing_horizon": st.sampled_from([20.0, *[0.5] * odd]),
        "published": st.just(True),
    }
    chosen = {
        name: draw(flags[name]) for name in draw(st.lists(st.sampled_from(sorted(flags)), max_size=5, unique=True))
    }
    if draw(st.integers(0, 3)):  # few laws are fast
        chosen.setdefault(
            "law", (draw(st.sampled_from(["power", "power-offset", "chinchilla", "power-floor"])), "power")
        )
    if sane:  # what needs something else gets it
        chosen |= {"reduce": "min"} if "by" in chosen else {}
        chosen |= {"group": draw(flags["group"])} if "compare" in chosen else {}
        chosen |= {"run_id": draw(flags["run_id"])} if "checkpoints" in chosen else {}
        chosen |= {"law": ("annealing",)} if "annealing_horizon" in chosen else {}
    return {"bootstrap_draws": 50, "holdout": draw(st.integers(0, 3)) == 0} | chosen


def outcome(data, through_a_file=False):
    """What is said of a drawn table: the error, or the warnings of a result that can be written and shown."""
    sane = data.draw(st.integers(0, 3)) > 0
    table = data.draw(tables(sane))
    options = FitOptions(**data.draw(choices(list(dict.fromkeys(table.columns)), sane)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if through_a_file:
                with tempfile.TemporaryDirectory() as folder:
                    table.to_csv(Path(folder) / "runs.csv", index=False)
                    table = read_runs([Path(folder) / "runs.csv"])
            result = fit_laws(table, options)
        except TableError as error:
            return str(error)
        json.dumps(result.as_json(), allow_nan=False)
        assert render(result, [])
        with Path("/dev/null").open("w") as nowhere:
            Console(file=nowhere).print(terminal_summary(result))
    return "".join(warning.message for warning in result.warnings)


QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=10, derandomize=True, **QUICK)
@given(st.data())
def test_any_table_and_any_flags_give_laws_or_one_line(data):
    assert "\n" not in outcome(data)


@pytest.mark.coverage
@pytest.mark.timeout(3600)
@settings(max_examples=2000, **QUICK)
@given(st.data())
def test_two_thousand_tables_give_laws_or_one_line(data):
    assert "\n" not in outcome(data, through_a_file=data.draw(st.booleans()))
