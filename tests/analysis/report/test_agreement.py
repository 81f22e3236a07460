"""One fit, four outputs: the terminal, laws.json, runs.csv and report.html give the same numbers, warnings and rows."""

import io
import json
import re
from html import unescape

import numpy as np
import pandas as pd
import pytest
from planted_tables import chinchilla_table, curve_table, evaluation_table, sweep_table
from requirements import shared_path
from rich.console import Console

from analysis.checks.warnings import CODES
from analysis.options import FitOptions
from analysis.pipeline import fit_laws
from analysis.report.html import render
from analysis.report.terminal import terminal_summary

FOUR_DIGITS = 5.1e-4
"""Rounding to four significant digits changes a number by no more."""
QUICK = {"bootstrap_draws": 50}


def families():
    one, other = sweep_table(seeds=2), sweep_table(seed=3).assign(run=lambda t: t["run"] + "-b")
    return pd.concat([one.assign(family="var"), other.assign(family="<ar> & co")], ignore_index=True)


def accuracies():
    table = chinchilla_table(sizes=5, budgets=5).rename(columns={"N": "params", "C": "flops", "D": "tokens"})
    return table.assign(accuracy=lambda rows: 100 * (1.1 - rows["loss"] / 5), seed=np.arange(len(table)) % 2)


def scattered():
    """Runs of all sizes at any compute, most of them beaten by smaller ones."""
    rng = np.random.default_rng(0)
    flops, excess = np.geomspace(1e18, 1e21, 40), 1 + 0.2 * rng.random(40) * (np.arange(40) % 3 > 0)
    return pd.DataFrame({"flops": flops, "loss": (1.7 + 2 * (flops / 1e18) ** -0.2) * excess})


TABLES = {
    "sweep": (lambda: sweep_table(budgets=5, seeds=3, noise=0.01), FitOptions(target=("loss",), **QUICK)),
    "fid": (
        lambda: evaluation_table(budgets=4, noise=0.05).assign(mind=lambda rows: rows["mind"] / 100, mind_floor=4e-4),
        FitOptions(target=("loss", "mind"), allocate=(1e11, 1e12), where=("depth > 3",), **QUICK),
    ),
    "groups": (families, FitOptions(target=("loss",), group="family", predict=("flops=1e12", "params=1e5"), **QUICK)),
    "language": (
        lambda: chinchilla_table(sizes=5, budgets=4, noise=0.01),
        FitOptions(
            params="N",
            flops="C",
            tokens="D",
            predict=("flops=1e22", "params=1e10,tokens=2e11"),
            allocate=(1e22,),
            holdout_where="C > 5e20",
            **QUICK,
        ),
    ),
    "pinned": (lambda: curve_table(noise=0.02), FitOptions(flops="C", offset=1.6, predict=("C=1e24",), **QUICK)),
    "accuracy": (accuracies, FitOptions(target=("accuracy",), allocate=(1e22,), predict=("flops=1e30",), **QUICK)),
    "unanswered": (
        lambda: curve_table().rename(columns={"C": "flops"}),
        FitOptions(predict=("params=1e9", "tokens=1e10"), allocate=(1e22,), **QUICK),
    ),
    "scattered": (scattered, FitOptions(where=("flops > 2e18",), **QUICK)),
    "published": (
        lambda: pd.read_csv(shared_path("laws/epoch_chinchilla.csv")),
        FitOptions(
            params="Model Size",
            flops="Training FLOP",
            tokens_from_flops=6.0,
            law=("chinchilla",),
            holdout=False,
            drop_highest=5,
            **QUICK,
        ),
    ),
}


@pytest.fixture(scope="module", params=list(TABLES))
def outputs(request):
    """The terminal's text, laws.json, the sections of report.html, runs.csv."""
    make, options = TABLES[request.param]
    result = fit_laws(make(), options)
    console = Console(file=io.StringIO(), width=400)
    console.print(terminal_summary(result))
    laws = json.loads(json.dumps(result.as_json(), allow_nan=False))
    runs = pd.read_csv(io.StringIO(result.table.measured.to_csv(index=False)))
    return console.file.getvalue(), laws, sections(render(result, [])), runs


def sections(html):
    """Text of a report by heading, and the rows of the tables there: of each cell its lines."""
    _, *parts = re.split("<h2>(.*?)</h2>", html)
    return {heading: (text(body), rows(body)) for heading, body in zip(parts[::2], parts[1::2], strict=True)}


def text(html):
    return unescape(re.sub("<[^>]*>", "", html.replace("<sup>", "^")))


def rows(html):
    cells = (re.findall("<td.*?</td>", row, re.DOTALL) for row in re.findall("<tr><td.*?</tr>", html, re.DOTALL))
    return [[[text(line) for line in re.findall("<span[^>]*>(.*?)</span>", cell)] for cell in row] for row in cells]


def numbers(shown):
    """The numbers in a text, in order."""
    found = re.findall(r"(?<![\w.^])[+-]?(?:\d[\d,]*\.?\d*(?:e[+-]?\d+)?|∞)", shown.replace("−", "-"))
    return [float(each.replace(",", "").replace("∞", "inf")) for each in found]


def same(shown, values):
    """Whether a text shows just these numbers, to four digits; what laws.json can't hold is infinite."""
    values = [np.inf if each is None else each for each in values]
    return numbers(shown) == pytest.approx(values, rel=FOUR_DIGITS)


def test_laws(outputs):
    terminal, laws, report, _ = outputs
    table, said = report["Laws"][1], [line for line in terminal.splitlines() if line.partition(":")[0] not in CODES]
    in_terminal = re.findall(r"\S+ = (\S+ (?:\[.*?\]|\(pinned\)))", "\n".join(said))
    for fit, (target, _, law, count, parameters, r, objective, starts) in zip(laws["fits"], table, strict=True):
        assert target == [each for each in (fit["target"], fit["group"]) if each]
        assert law[0].startswith(fit["law"])
        assert same(count[0], [fit["data"]["n_runs"]])
        assert same(objective[0], [fit["objective"]["value"]])
        assert same(starts[0], [fit["starts"]["agreeing"], fit["starts"]["count"]])
        assert r[0] == ("–" if fit["pearson_r"] is None else f"{fit['pearson_r']:.4f}")
        for line, (name, value) in zip(parameters, fit["parameters"].items(), strict=True):
            pinned = name == "E" and fit["offset_pinned"] is not None
            assert same(line.partition(" = ")[2], [value] if pinned else [value, *fit["ci95"][name]])
            if name not in ("A", "B"):  # whose size depends on units
                assert line.partition(" = ")[2] == in_terminal.pop(0)
    assert not in_terminal


def test_predictions(outputs):
    terminal, laws, report, _ = outputs
    expected = [(fit, each) for fit in laws["fits"] for each in fit["predictions"]]
    for (fit, each), (law, place, *shown) in zip(expected, report.get("Predictions", ("", []))[1], strict=True):
        assert law == [fit["name"]]
        assert numbers(place[0])[: len(each["at"])] == pytest.approx([*each["at"].values()], rel=FOUR_DIGITS)
        values = [each["value"], *each["curve_ci95"], *each["new_run_ci95"]]
        assert same(" ".join(line for cell in shown for line in cell), values)
        if re.search(rf"^at .*{re.escape(place[0])}", terminal, re.MULTILINE):
            assert re.search(r"\s+".join(map(re.escape, (cell[0] for cell in shown))), terminal)


def test_best_sizes(outputs):
    terminal, laws, report, runs = outputs
    images = "images_seen" in runs.columns  # which people count, whatever a sweep fits
    of_each = (runs["images_seen"] / runs["tokens_seen"]).median() if images else 1.0
    first = laws["fits"][0]["target"]
    table = iter(report.get("Best size and data for a budget", ("", []))[1])
    for name, found in laws["allocation"].items():
        for each in found:
            approach, a, b, budgets, sizes, tokens, remark = next(table)
            assert approach == [each["approach"]]
            if each["refused"]:
                assert remark == [f"refused: {each['refused']}"]
                continue
            assert same(" ".join(a), [each["params_exponent"], *each["params_ci95"]])
            assert b == ["–"] or same(" ".join(b), [each["tokens_exponent"], *each["tokens_ci95"]])
            assert same(" ".join(budgets), [best["budget"] for best in each["best"]])
            values = [number for best in each["best"] for number in (best["params"], *best["params_ci95"])]
            assert same(" ".join(sizes), values)
            if name == first:
                for best, interval in zip(sizes[::2], sizes[1::2], strict=True):
                    assert best in terminal
                    assert interval in terminal
            far = [best for best in each["best"] if best["beyond"] != 1]
            for best, said in zip(far, remark, strict=False):
                end = "largest" if best["beyond"] > 1 else "smallest"
                assert re.fullmatch(rf"(\S+) FLOPs: (\S+) × the {end} size", said)
                assert same(said, [best["budget"], best["beyond"]])
                assert name != first or said.partition(": ")[2] in terminal
            if tokens != ["–", "–"]:
                values = [number for best in each["best"] for number in (best["tokens"], *best["tokens_ci95"])]
                assert same(" ".join(tokens), [of_each * number for number in values])
    assert next(table, None) is None


def test_the_largest_budget(outputs):
    terminal, laws, report, _ = outputs
    said = [line for line in terminal.splitlines() if line.startswith("Prediction ")]
    for each, line in zip(laws["predictions"], said, strict=True):
        assert line in report["The largest budget, predicted from the smaller ones"][0]
        assert f"best {each['name']} at" in line
        shown = numbers(line.partition(" at ")[2])
        values = [each["budget"], each["n_budgets"], each["predicted"], *each["ci95"], each["observed"], each["error"]]
        assert shown[: len(values)] == pytest.approx(values, rel=FOUR_DIGITS)
        assert (" held: " in line) == each["held"]
        assert ("(inside)" in line) == each["inside"]


def test_frontiers(outputs):
    _, laws, report, _ = outputs
    table = iter(report.get("Frontier and IsoFLOP minima", ("", []))[1])
    for name, best in laws["frontier"].items():
        target = name.partition(" [")[0]
        for cell in best:
            (found,) = (
                each
                for each in laws["isoflop"][name]
                if (each["method"], each["budget"]) == ("parabola", cell["budget"])
            )
            budget, sizes, value, params, optimum, interval, there, remark = (" ".join(each) for each in next(table))
            shown = [cell["budget"], found["sizes"], cell[target], cell["params"]]
            assert same(" ".join((budget, sizes, value, params)), shown)
            assert remark == found["refused"]
            if not found["refused"]:
                ends = found["params_ci95"] or ()
                assert same(" ".join((optimum, interval, there)), [found["params"], *ends, found["value"]])
    assert next(table, None) is None


def test_warnings_and_rows(outputs):
    terminal, laws, report, runs = outputs
    text, _ = report["Warnings"]
    codes = [each["code"] for each in laws["warnings"]]
    for each in laws["warnings"]:
        assert f"{each['code']} {each['message']}" in text
    lines = [line for line in terminal.splitlines() if line.partition(":")[0] in codes]
    unanswered = [each["message"] for each in laws["warnings"] if each["code"] == "point-unused"]
    assert [line.partition(": ")[2] for line in lines if line.startswith("point-unused")] == unanswered
    lines = [line for line in lines if not line.startswith("point-unused")]
    assert [line.partition(":")[0] for line in lines] == [
        each for each in dict.fromkeys(codes) if each != "point-unused"
    ]
    for line in lines:
        code, _, message = line.partition(": ")
        more = re.search(r" \(and (\d+) more like it", message)
        assert codes.count(code) == 1 + (int(more[1]) if more else 0)
    for fit in laws["fits"]:
        own = {each["code"] for each in laws["warnings"] if each["fit"] == fit["name"]}
        assert own == set(fit["warnings"])
    table = laws["table"]
    assert f"{len(runs)} kept of {table['n_rows']}" in report["Data"][0]
    assert len(runs) == table["n_kept"]
    assert len(runs) + sum(len(each["rows"]) for each in table["exclusions"]) == table["n_rows"]
    assert table["sha256"] in report["Data"][0]
    assert all(note in report["Data"][0] for note in table["notes"])


def test_held_out_rows(outputs):
    terminal, laws, report, _ = outputs
    table = iter(report.get("Held out", ("", []))[1])
    checks = [(fit, check) for fit in laws["fits"] for check in fit["holdout"]]
    for fit, check in sorted(checks, key=lambda each: each[1]["name"].startswith("roll")):
        cells = [cell[0] for cell in next(table)]
        assert cells[0] == fit["name"]
        if check["name"].startswith("roll"):
            assert check["name"] == f"roll forward {cells[1]}"
            shown, found = cells[2:5], [check["n_fitted"], check["mean_percent"], check["baselines"].get("no change")]
            assert numbers(cells[5]) == pytest.approx([*check["parameters"].values()], rel=FOUR_DIGITS)
        else:
            assert cells[1] == check["name"]
            baselines = [check["baselines"].get(name) for name in ("no change", "power law", "nearest run")]
            found = [check["n_fitted"], check["n_held"], check["mean_percent"], check["worst_percent"]]
            shown, found = cells[2:], [*found, check["noise_units"], *baselines]
        known = [each for each in found if each is not None]
        assert numbers(" ".join(shown)) == pytest.approx(known, abs=0.0051, rel=FOUR_DIGITS)
        if check["name"].startswith("where"):
            assert re.search(rf"{check['n_held']}\s+{cells[3]}\s+{cells[4]}", terminal)
    assert next(table, None) is None


def test_groups(outputs):
    terminal, laws, _, _ = outputs
    said = [line for line in terminal.splitlines() if " needs × " in line]
    for each, line in zip(laws["comparisons"], said, strict=True):
        assert line.startswith(f"{each['a']} against {each['b']} ({each['target']})")
        values = [each["exponent_difference"], *each["exponent_ci95"]]
        if each["loss_ratio"] is not None:
            values += [each["loss_ratio"], *(each["loss_ratio_ci95"] or ()), each["matched_budgets"]]
        values += [each["compute_ratio"], *each["compute_ratio_ci95"], each["at_flops"]]
        assert numbers(line.partition("exponent ")[2]) == pytest.approx(
            values, rel=6e-3
        )  # three digits of a difference


def test_best_sizes_by_several_measures(outputs):
    _, laws, report, _ = outputs
    table = [
        row for row in report.get("Best size by loss and by other measures", ("", []))[1] if row[0][0] != "a (N ∝ C^a)"
    ]
    for each, (budget, *cells) in zip(laws["best_sizes"], table, strict=True):
        assert same(budget[0], [each["budget"]])
        for found, shown in zip(each["targets"].values(), cells, strict=False):
            cell, minimum = [found["params"], found["sizes"]], [found["minimum"], *(found["minimum_ci95"] or ())]
            assert same(" ".join(shown), [*(minimum if found["minimum"] else ()), *cell])
