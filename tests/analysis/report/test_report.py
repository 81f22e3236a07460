"""Figures and report: whole, self-contained, stable, and readable where a browser shows them."""

import json
import os
import re
import stat
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html import unescape

import pandas as pd
import pytest
from planted_tables import chinchilla_table, curve_table, evaluation_table, sweep_table
from requirements import require_program
from rich.console import Console

from analysis.checks.warnings import CODES
from analysis.options import FitOptions
from analysis.pipeline import fit_laws
from analysis.report.answers import answers
from analysis.report.drawing import label
from analysis.report.figures import draw_all
from analysis.report.html import render
from analysis.report.sentences import number
from analysis.report.terminal import terminal_summary
from analysis.report.writing import write
from analysis.tables.evaluations import LIKELIHOOD
from analysis.tables.table import mixtures, prepare

CHINCHILLA = FitOptions(
    params="N", flops="C", tokens="D", law=("chinchilla", "power"), bootstrap_draws=50, holdout=False
)


@pytest.fixture(scope="module")
def result():
    one, other = (
        sweep_table(depths=(3, 4, 6, 8), budgets=6, seeds=2),
        sweep_table(depths=(3, 4, 6, 8), budgets=6, seed=3),
    )
    other["run"] += "-b"
    table = pd.concat([one.assign(family="var"), other.assign(family="<ar>")])
    targets = ("loss", "error")
    options = FitOptions(
        title="Two families & more", group="family", target=targets, published=True, bootstrap_draws=100
    )
    return fit_laws(table, options)


@pytest.fixture(scope="module")
def drawings(result):
    return draw_all(result)


def test_svgs_are_well_formed_and_stable(result, drawings):
    assert len({drawing.name for drawing in drawings}) == len(drawings)
    for drawing, again in zip(drawings, draw_all(result), strict=True):
        ElementTree.fromstring(drawing.svg)
        assert drawing.svg == again.svg
        assert drawing.png.startswith(b"\x89PNG")


def test_report_needs_nothing_else_and_repeats_no_id(result, drawings):
    html = render(result, drawings)
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', html)
    assert "@import" not in html
    (script,) = re.findall(r"<script\b(.*?)</script>", html, flags=re.DOTALL)
    assert script.startswith(">"), "written into the page, not loaded from elsewhere"
    assert not re.search(r"fetch|XMLHttp|WebSocket|import|//[a-z]|eval|innerHTML|cookie", script)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert "Two families &amp; more" in html
    assert "&lt;ar&gt;" in html
    for word in ("SHA-256", "Objective", "Intervals", "Left out", "Held out", "Schedule", "seed 0"):
        assert word in html


ENDS = ("[2.1e3, 4e3]", "[10, 20]", "–", "[−1, 2]", "[9, 11]", "[1,900, 2,000]")
INTERVALS = f"""<table id="intervals"><thead><tr><th>95%</th></tr></thead>
<tbody>{"".join(f"<tr><td><span>{each}</span></td></tr>" for each in ENDS)}</tbody></table></main>"""


def as_shown(chromium, path):
    """The document as it stands after its scripts ran."""
    command = [
        *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--allow-file-access-from-files", f"--user-data-dir={path.parent / 'profile'}"),
        *("--virtual-time-budget=4000", "--window-size=1400,1000", "--dump-dom", path.as_uri()),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


PROBE = """<script>
const table = [...document.querySelectorAll("table")].find((each) => each.innerText.includes("Pearson"));
const rows = () => [...table.tBodies[0].rows].map((row) => row.cells[3].textContent);
const orders = [rows()];
const press = (event) => table.tHead.rows[0].cells[3].dispatchEvent(event);
press(new MouseEvent("click")); orders.push(rows());
press(new KeyboardEvent("keydown", { key: "Enter" })); orders.push(rows());
const intervals = document.querySelector("#intervals");
intervals.tHead.rows[0].cells[0].click();
const ends = [...intervals.tBodies[0].rows].map((row) => row.cells[0].textContent);
const point = document.querySelector("#loss_vs_compute_var title ~ use");
point.scrollIntoView({ block: "center" });
const box = point.getBoundingClientRect();
const hit = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
const title = hit.closest("g").querySelector("title");
const open = [...document.querySelectorAll("figure")].filter((each) => each.checkVisibility()).length;
const heading = getComputedStyle(table.tHead.rows[0].cells[3]).display;
document.title = JSON.stringify({ orders, hit: title && title.textContent, open, heading, ends });
</script></body>"""


def test_in_a_browser_tables_sort_points_tell_their_runs_and_six_figures_are_open(result, drawings, tmp_path):
    """On a desk and on a phone."""
    chromium = require_program("chromium")
    html = render(result, drawings).replace("</main>", INTERVALS)
    (tmp_path / "report.html").write_text(html.replace("</body>", PROBE))
    frames = "".join(
        f'<iframe src="report.html" style="width:{width}px;height:900px"></iframe>' for width in (1280, 390)
    )
    told = "[...document.querySelectorAll('iframe')].map((each) => each.contentDocument.title)"
    answer = f"<script>onload=()=>{{document.body.dataset.answer={told}.join('\\n')}}</script>"
    (tmp_path / "both.html").write_text(f"<body>{frames}{answer}</body>")
    answer = re.search(r'data-answer="([^"]*)"', as_shown(chromium, tmp_path / "both.html"))
    assert answer is not None
    for line in unescape(answer[1]).splitlines():
        found = json.loads(line)
        given, up, down = ([int(rows) for rows in order] for order in found["orders"])
        assert up == sorted(given)
        assert down == sorted(given, reverse=True)
        assert up != given
        assert re.fullmatch(r"d\d-b\d-s\d: [\d.e+]+, [\d.]+", found["hit"])
        assert found["open"] == 6
        assert found["heading"] != "none"
        assert found["ends"] == ["[−1, 2]", "[9, 11]", "[10, 20]", "[1,900, 2,000]", "[2.1e3, 4e3]", "–"]


def test_report_opens_in_a_browser_without_scrolling_sideways_on_a_phone(result, drawings, tmp_path):
    chromium = require_program("chromium")
    html = render(replace(result, options=replace(result.options, title="a_long_name_of_a_table" * 4)), drawings)
    probe = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    (tmp_path / "report.html").write_text(html.replace("</body>", probe))
    frame = '<iframe id="f" src="report.html" style="width:390px;height:900px"></iframe>'
    answer = "<script>onload=()=>{document.body.dataset.answer=f.contentDocument.title}</script>"
    (tmp_path / "phone.html").write_text(f"<body>{frame}{answer}</body>")
    page = as_shown(chromium, tmp_path / "phone.html")
    found = re.search(r'data-answer="(\d+) of (\d+)"', page)
    assert found is not None
    assert int(found[1]) <= int(found[2])


def test_terminal_summary_says_whether_the_prediction_held(result):
    console = Console(record=True, width=160, file=None)
    with console.capture() as captured:
        console.print(terminal_summary(result))
    text = captured.get()
    assert "Prediction held" in text or "Prediction did not hold" in text
    assert "[var]" in text
    assert "α = " in text


def test_names_of_groups_and_laws_at_a_floor_are_told_apart_in_the_terminal():
    """No name is cut, and what is predicted above a floor that was measured isn't what is above a free one."""
    table = sweep_table(depths=(3, 4, 6, 8), budgets=5).drop(columns="run")
    table = table.assign(fid=8 * table["loss"], fid_floor=2.0)
    groups = [table.assign(family=f"a-long-name-of-a-family-{place}") for place in (1, 2)]
    options = FitOptions(group="family", target=("fid",), bootstrap_draws=50, holdout=False, predict=("flops=1e12",))
    result = fit_laws(pd.concat(groups), options)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(terminal_summary(result))
    assert "…" not in captured.get().partition("predicted")[0]
    laws = [row[0][0] for row in answers(result)[0].rows]
    assert len(set(laws)) == len(laws)
    for place in (1, 2):
        for floor in ("held", "free"):
            assert f"fid [a-long-name-of-a-family-{place}], power-floor, floor {floor}" in laws


@pytest.mark.parametrize(("depths", "end"), [((12, 14, 16, 20), "smallest"), ((1, 2), "largest"), ((3, 6, 16), "")])
def test_sizes_that_stop_short_of_the_best_are_said_first(depths, end):
    result = fit_laws(sweep_table(depths=depths, budgets=5), FitOptions(bootstrap_draws=50, law=("power",)))
    html = render(result, [])
    console = Console(record=True, width=400, file=None)
    with console.capture() as captured:
        console.print(terminal_summary(result))
    sentence = f"loss: at every budget the {end} size of the grid is best"
    for text in (html[: html.index("<h2>")], captured.get()):
        assert (sentence in text) == bool(end), text
        assert ("at every budget" in text) == bool(end)


def test_the_terminal_says_how_well_the_rows_named_are_predicted():
    table = sweep_table(depths=(4,), budgets=9)[["train_flops", "params_total", "loss"]]
    condition = "train_flops > 3e11"
    result = fit_laws(table, FitOptions(law=("power",), x=("flops",), bootstrap_draws=50, holdout_where=condition))
    (check,) = [each for each in result.fits[0].holdout if each.name.startswith("where")]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(terminal_summary(result))
    shown = captured.get()
    assert f"rows where {condition}" in shown
    (row,) = [line.split() for line in shown.splitlines() if line.startswith("loss, power ")]
    assert row[2:] == ["2", f"{check.mean_percent:.2f}%", *row[4:]]
    assert (table["train_flops"] > 3e11).sum() == 2


def test_the_terminal_answers_what_was_asked_within_80_columns():
    """Values and intervals of the result itself; D in images, of which each has 130 tokens here."""
    table = sweep_table(depths=(3, 4, 6, 8), budgets=6)
    options = FitOptions(predict=("flops=1e12",), allocate=(1e12,), target=("loss",), bootstrap_draws=50, holdout=False)
    result = fit_laws(table, options)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(terminal_summary(result))
    text = captured.get()
    assert max(map(len, text.splitlines())) <= 80
    assert "at flops = 1e12 (beyond the data: flops × 12." in text
    for law in ("power-offset", "chinchilla"):
        entry = result.find(law)
        (asked,) = [each for each in entry.predictions if each.at["flops"] == 1e12]
        (line,) = [line for line in text.splitlines() if line.startswith(f"loss, {law}")]
        pairs = asked.prediction.curve_ci95, asked.prediction.new_run_ci95
        shown = [number(asked.prediction.value), *(f"[{number(low)}, {number(high)}]" for low, high in pairs)]
        assert " ".join(line.split()) == " ".join((f"loss, {law}", *shown))
    by_law = {each.approach: each for each in result.allocations["loss"]}
    (best,) = by_law["parametric chinchilla"].best
    (line,) = [line for line in text.splitlines() if line.startswith("parametric chinchilla")]
    assert line.split()[2:] == ["1e12", number(best.params), number(best.tokens / 130)]
    assert "best D (images)" in text
    html = render(result, [])
    assert html.index("at flops = 1e12") < html.index("<h2>Laws</h2>"), "the answer comes first"
    assert "best D (images)" in html
    assert "best D (tokens)" in render(fit_laws(chinchilla_table(budgets=4), CHINCHILLA), [])
    images = replace(CHINCHILLA, units=("tokens=images",), x=("tokens", "flops"))
    html = render(fit_laws(chinchilla_table(budgets=4), images), [])
    assert "best D (images)" in html
    assert "images D" in html
    assert "tokens D" not in html


def test_a_law_that_rises_is_not_drawn():
    """Sizes far too large for a budget: the larger the worse."""
    result = fit_laws(sweep_table(depths=(12, 14, 16, 20), budgets=5), FitOptions(bootstrap_draws=50))
    drawings = {drawing.name: drawing for drawing in draw_all(result)}
    assert "Line: the law" in drawings["loss_vs_compute"].caption
    assert drawings["loss_vs_parameters"].caption.endswith("No law is drawn: over these rows the values don't fall.")
    banded = {name for name, drawing in drawings.items() if "PolyCollection" in drawing.svg}  # a band, to matplotlib
    assert banded == {"loss_vs_compute", "error_vs_compute"}


def test_a_law_that_rises_with_compute_is_drawn_in_no_figure():
    """Alone, and of one of two groups."""
    good, bad = sweep_table(depths=(4, 6, 8), seed=1), sweep_table(depths=(4, 6, 8), seed=2)
    bad["loss"] = 10 / bad["loss"]
    bad["run"] += "-b"
    table = pd.concat([good.assign(family="good"), bad.assign(family="bad")])
    options = FitOptions(group="family", target=("loss",), bootstrap_draws=50)
    drawings = {drawing.name: drawing for drawing in draw_all(fit_laws(table, options))}
    assert "Line: the law" in drawings["loss_vs_compute_good"].caption
    assert "Line: the law" not in drawings["loss_vs_compute_bad"].caption


@pytest.mark.parametrize("group", ["", "family"])
def test_targets_may_have_brackets_in_their_names(group):
    table = sweep_table(depths=(12, 14, 16, 20), budgets=5).rename(columns={"loss": "loss [nats]"})
    other = sweep_table(depths=(12, 14, 16, 20), budgets=5, seed=1).rename(columns={"loss": "loss [nats]"})
    other["run"] += "-b"
    both = pd.concat([table.assign(family="a [x]"), other.assign(family="b")]) if group else table
    options = FitOptions(loss="loss [nats]", group=group or None, law=("power",), bootstrap_draws=50)
    result = fit_laws(both, options)
    html = render(result, draw_all(result))
    assert html.count(": at every budget the smallest size of the grid is best") == (2 if group else 1)


def test_a_surface_without_a_grid_is_drawn_too():
    table = chinchilla_table().sample(frac=0.5, random_state=0)
    table["C"] *= 1 + 0.1 * (table.index % 7)
    result = fit_laws(table, FitOptions(params="N", flops="C", tokens="D", bootstrap_draws=60))
    assert {"contour", "clouds", "residuals", "loss_vs_compute"} <= {drawing.name for drawing in draw_all(result)}


def test_names_that_mean_something_to_matplotlib_or_to_files_are_drawn_too(tmp_path):
    table = pd.concat([chinchilla_table(budgets=4).assign(kind=kind) for kind in ("US$ a $x_{", "US$ a $x [")])
    table = table.rename(columns={"loss": "cost $ of $\\frac"})
    options = FitOptions(
        params="N", flops="C", tokens="D", loss="cost $ of $\\frac", group="kind", law=("power",), bootstrap_draws=50
    )
    table["run"] = [f"<{i}> \x00 & ]]> \x1b " + 300 * "x" for i in range(len(table))]
    written = write(fit_laws(table, replace(options, run_id="run")), tmp_path)
    for path in written.figures:
        if path.suffix == ".svg":
            ElementTree.fromstring(path.read_text())
    assert len(set(written.figures)) == len(written.figures)
    assert all(path.is_file() for path in written.figures)


def test_report_states_units_and_where_n_c_and_d_come_from():
    table = chinchilla_table(budgets=4).assign(C=lambda rows: rows["C"] / 1e15).drop(columns="D")
    options = FitOptions(
        params="N",
        flops="C",
        units=("flops=PFLOP", "loss=nats a byte"),
        tokens_from_flops=6,
        law=("chinchilla",),
        bootstrap_draws=50,
    )
    result = fit_laws(table, options)
    html = render(result, [])
    for text in (
        "given as PFLOP: × 1e15",
        "loss in nats a byte",
        "tokens are D = C / (6·N)",
        "C: training FLOPs, column C",
    ):
        assert text in html
    assert result.as_json()["table"]["units"]["flops"]["factor"] == 1e15


def test_a_loss_that_is_no_likelihood_is_not_called_one():
    likely = evaluation_table()
    assert prepare(likely, FitOptions()).has(LIKELIHOOD)
    squares = prepare(likely.assign(loss_unit="squared error of velocity"), FitOptions())
    assert label(squares, "loss") == "loss (squared error of velocity)"
    assert not squares.has(LIKELIHOOD)
    likely = likely.assign(run=likely["run"] + "-b", loss_unit="nats a token")
    both = prepare(pd.concat([squares.measured, likely]), FitOptions())
    assert both.loss_unit == "nats a token or squared error of velocity"
    assert not both.has(LIKELIHOOD)
    assert [code for code, text in mixtures(both.frame) if "loss_unit" in text] == ["mixed-tokenizers"]


def test_every_warning_code_is_documented():
    from pathlib import Path

    text = (Path(__file__).parents[3] / "docs" / "laws.md").read_text()
    assert all(f"`{code}`" in text for code in CODES)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.34731, "0.3473"), (1e21, "1e21"), (88183696, "8.818e7"), (12345.6, "12,346"), (None, "–"), (float("inf"), "∞")],
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644)])
def test_files_honour_the_umask_and_replace_what_was_there(umask, mode, tmp_path):
    result = fit_laws(curve_table(), FitOptions(flops="C", law=("power",), bootstrap_draws=50))
    (tmp_path / "laws.json").write_text("old")
    before = os.umask(umask)
    try:
        written = write(result, tmp_path)
    finally:
        os.umask(before)
    paths = [written.laws_json, written.report_html, written.runs_csv, *written.figures]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {mode}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    result = fit_laws(curve_table(), FitOptions(flops="C", law=("power",), bootstrap_draws=50))
    (tmp_path / "laws.json").write_text("old")

    def full(path, target):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write(result, tmp_path)
    assert not caught.value.filename.endswith("partial")
    assert [path.name for path in tmp_path.iterdir()] == ["laws.json"]
