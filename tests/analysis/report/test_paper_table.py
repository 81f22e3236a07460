"""The table of a paper: what stands side by side, what is said of it, and each form in which it is written."""

import csv
import io
import re

import numpy as np
import pandas as pd
import pytest

from analysis.report.paper_table import as_csv, as_latex, as_markdown, paper_table


def rows(**changes: object) -> pd.DataFrame:
    """Two models, the second with and without rejection."""
    names = ["VAR-d12", "VAR-d16", "VAR-d16"]
    frame = pd.DataFrame({"model": names, "fid": [4.0, 2.5, 2.25], "inception_score": [3.0, 3.5, 3.75]})
    frame = frame.assign(image_precision=[0.7, 0.8, 0.9], image_recall=0.5, params_total=[88e6, 2e8, 2e8])
    frame = frame.assign(sampling_passes=6, seconds_an_image=[0.02, 0.03, 0.12], device="cpu", threads=1)
    kept = ["all", "all", "1 of 4 by rings_classifier:12"]
    return frame.assign(images_kept=kept, extractor="rings_50%", samples=2048, guidance=0.0).assign(**changes)


def test_the_columns_of_the_paper() -> None:
    table = paper_table(rows())
    assert table.headings == ["model", "FID ↓", "IS ↑", "precision ↑", "recall ↑", "parameters", "steps", "time"]
    assert table.cells() == [
        ["VAR-d12", "4.00", "3.0", "0.70", "0.50", "88M", "6", "1"],
        ["VAR-d16", "2.50", "3.5", "0.80", "0.50", "200M", "6", "1.5"],
        ["VAR-d16-re", "2.25", "3.8", "0.90", "0.50", "200M", "6", "6"],
    ]
    said = " ".join(table.notes)
    assert "extractor rings_50%, samples 2048, guidance 0." in said
    assert "-re: 1 of 4 by rings_classifier:12 (rejection sampling)." in said
    assert "relative to VAR-d12's 0.02 s (cpu, 1 thread)" in said


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("extractor", ["a", "b", "b"]),
        ("samples", [2048, 5000, 5000]),
        ("guidance", [0.0, 0.0, 1.5]),
        ("reference_set", ["x", "x", "y"]),
    ],
)
def test_measures_that_do_not_compare_are_told_apart(name: str, values: list[object]) -> None:
    table = paper_table(rows(**{name: values}))
    assert name in table.headings
    assert [row[table.headings.index(name)] for row in table.cells()] == [
        f"{value:g}" if isinstance(value, int | float) else value for value in values
    ]
    assert f"compare only among rows alike in {name}." in " ".join(table.notes)


def test_times_of_several_machines_and_images_that_are_not_measured() -> None:
    table = paper_table(rows(device=["cpu", "H200", "H200"], fid=[4.0, np.nan, 2.25]))
    assert "Times were measured on 2 machines (cpu, 1 thread; H200, 1 thread), and don't compare." in table.notes[-1]
    assert any(note.startswith("1 of 3 rows are of images that are not measured") for note in table.notes)
    assert table.cells()[1][1] == "–"


def test_budgets_and_studies_become_columns_where_they_differ() -> None:
    table = paper_table(rows(budget_flops=[1e12, 1.95e12, 1.95e12], seed=0, experiment="rings"))
    assert table.headings[:2] == ["model", "budget"]
    assert [row[1] for row in table.cells()] == ["1e12", "1.95e12", "1.95e12"]


def test_published_rows_are_marked_and_have_sources() -> None:
    """Table 1 of VAR's paper, by cells copied by hand: VAR's parameters and costs, some others, names of systems."""
    table = paper_table(pd.DataFrame(), published=True)
    named = {row[0].removesuffix("†"): row for row in table.cells()}
    assert all(row[0].endswith("†") for row in table.cells())
    for depth, parameters, cost in ((16, "310M", "0.4"), (20, "600M", "0.5"), (24, "1B", "0.6"), (30, "2B", "1")):
        assert (named[f"VAR-d{depth}"][5], named[f"VAR-d{depth}"][7]) == (parameters, cost)
    assert named["VAR-d30-re"][1:5] == ["1.73", "350.2", "0.82", "0.60"]
    assert (named["VQGAN-re"][1], named["L-DiT-7B"][7], named["VQ-VAE-2"][2]) == ("5.20", ">45", "~45")
    systems = "BigGAN GigaGAN StyleGAN-XL ADM CDM LDM-4-G DiT-XL/2 L-DiT-3B MaskGIT VQ-VAE-2 VQGAN ViT-VQGAN"
    assert {*systems.split(), "RCG (cond.)", "RQ-Transformer"} <= named.keys()
    assert all("2404.02905v2, table 1; system: " in source for source in table.frame["source"])
    assert paper_table(rows(), published=True).cells()[3:] == table.cells()
    assert [row[0] for row in paper_table(rows(), published=True).cells()[:3]] == ["VAR-d12", "VAR-d16", "VAR-d16-re"]


def test_csv_has_the_numbers() -> None:
    read = list(csv.DictReader(io.StringIO(as_csv(paper_table(rows(), published=True)))))
    assert float(read[1]["FID"]) == 2.5
    assert read[1]["parameters"] == "200000000"
    assert {row["published"] for row in read} == {"False", "True"}


def test_all_forms_have_the_same_numbers() -> None:
    table = paper_table(rows(guidance=[0.0, 1.5, 1.5], budget_flops=[1e12, 1.95e12, 3e12]))
    plain = [re.sub(" [↓↑]$", "", name) for name in table.headings]
    pipes = [line.strip("| ").split(" | ") for line in as_markdown(table).splitlines() if line.startswith("| VAR")]
    latex = [line.removesuffix(r" \\").split(" & ") for line in as_latex(table).splitlines() if line.startswith("VAR")]
    assert pipes == latex == table.cells()
    for row, cells in zip(csv.DictReader(io.StringIO(as_csv(table))), pipes, strict=True):
        assert row["model"] == cells[0]
        for name, shown in list(zip(plain, cells, strict=True))[1:]:
            digits = {"FID": 0.005, "IS": 0.05, "precision": 0.005, "recall": 0.005}.get(name, 0.005 * float(row[name]))
            value = float(shown.removesuffix("M")) * (1e6 if shown.endswith("M") else 1)
            assert value == pytest.approx(float(row[name]), abs=digits * 1.001)


def test_markdown_has_as_many_cells_everywhere() -> None:
    lines = [line for line in as_markdown(paper_table(rows(), published=True)).splitlines() if line.startswith("|")]
    assert {line.replace(r"\|", "").count("|") for line in lines} == {9}
    assert len(lines) == 2 + 3 + 26


def test_latex_is_well_formed() -> None:
    """Environments close in order, each row has a cell a column, and no sign stands unescaped that means something."""
    text = as_latex(paper_table(rows(model=["a_b | c & c%", '#1 {x} "', r"50$ ~^\ <·>"]), published=True))
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert not opened
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)
    assert columns is not None
    body = text[columns.end() : text.index(r"\end{tabular}")].strip().splitlines()
    assert body[0] == r"\hline"
    for line in body:
        assert line == r"\hline" or line.endswith(r" \\")
        assert line == r"\hline" or len(re.findall(r"(?<!\\)&", line)) == len(columns[1]) - 1
    assert not {'"', "|"} & {*text}  # which the usual encoding prints as other signs
    bare = re.sub(r"\$(\\\w+|<|>)\$", "", text)  # the only formulas
    assert not re.search(r"(?<!\\)[$%#_^~]|[<>]", bare)
    depth = 0
    for sign in re.sub(r"\\[{}]", "", bare):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    assert depth == 0
    assert text.isascii()
