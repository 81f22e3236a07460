"""`varscale tune` with real runs: what it trains, writes and delivers, and what a kill leaves."""

import json
import os
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
from command_calls import NOWHERE, Call
from toy_sweep import Finished, results, start, varscale, wait_for, write_toy

from varscale.config.yaml import load_experiment

SEARCH = {
    "budgets": [2e7, 4e7],
    "space": {"optim.lr": {"low": 1e-3, "high": 5e-2, "log": True}, "model.width_per_depth": {"low": 2, "high": 4}},
    "confirmation_seeds": [1, 2],
}


def prepared(folder: Path, finished: Finished) -> Path:
    """With the tokenizer, tokens and cells that a sweep of the same experiment has made."""
    for part in ("tokenizers", "tokens", "trunks", "cells"):
        shutil.copytree(finished.runs / part, folder / "runs" / part)
    return write_toy(folder, search=SEARCH)


def test_a_search_from_start_to_end(call: Call, finished: Finished, tmp_path: Path) -> None:
    path = prepared(tmp_path, finished)
    before = set(results(tmp_path / "runs"))
    found = call("tune", path, "--trials", "4", "--parallel", "2")
    assert found.code == 0, found.error
    assert "trial 0: loss" in found.output
    folder = tmp_path / "runs" / "searches" / "toy"
    assert found.output.splitlines()[-2:] == ["runs/searches/toy/best.yaml", "runs/searches/toy/report.md"]
    trials = pd.read_csv(folder / "trials.csv")
    assert len(trials) == 4
    trained = results(tmp_path / "runs")
    ended = trials[trials["state"] == "COMPLETE"]
    losses = {(row["lr"], row["loss"]) for row in trained.values() if row["seed"] == 0}
    rates = ended["params_optim.lr"] * 4 / 4  # of 4 images a step, as the base rate is
    assert set(zip(rates, ended["value_loss"], strict=True)) <= losses
    recipe = [row for name, row in trained.items() if name in before and row["depth"] == 2]
    assert trials["value_loss"][0] in [row["loss"] for row in recipe]  # its cells were there, and not trained again
    winner = load_experiment(str(folder / "best.yaml"))
    assert winner.optim.lr == json.loads((folder / "search.json").read_text())["best"]["settings"]["optim.lr"]

    again = call("tune", path, "--trials", "4", "--parallel", "2")
    assert again.code == 0, again.error
    assert results(tmp_path / "runs") == trained
    assert "trial 0" not in again.output


def test_trials_are_in_mlflow_under_their_search(call: Call, finished: Finished, tmp_path: Path) -> None:
    import mlflow

    path = prepared(tmp_path, finished)
    assert call("tune", path, "--trials", "2", "--set", "search.confirmation_seeds=[]").code == 0
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'toy-search'")
    runs = client.search_runs([experiment.experiment_id], "tags.role = 'cell'")
    assert {run.data.params["variant"] for run in runs} == {"trial-0", "trial-1"}
    assert all(run.info.status == "FINISHED" for run in runs)
    assert len({run.data.params["lr"] for run in runs}) == 2
    tried = {run.data.params["variant"]: float(run.data.params["optim.lr"]) for run in runs}  # before any scaling
    trials = pd.read_csv(tmp_path / "runs" / "searches" / "toy" / "trials.csv").set_index("number")
    assert tried == {f"trial-{number}": rate for number, rate in trials["params_optim.lr"].items()}


@pytest.mark.slow
def test_killed_it_goes_on(finished: Finished, tmp_path: Path) -> None:
    """By kill -9, with all its processes, in the middle of the second trial."""
    path = prepared(tmp_path, finished)
    arguments = ("tune", path, "--trials", "3", "--parallel", "1", "--tracking-uri", NOWHERE)
    before = len(results(tmp_path / "runs"))
    process = start(*arguments, cwd=tmp_path)
    wait_for(lambda: len(results(tmp_path / "runs")) > before, process=process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/cells/*/result.json")}
    done = varscale(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(pd.read_csv(tmp_path / "runs" / "searches" / "toy" / "trials.csv")) == 3
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_mistakes(call: Call, finished: Finished, tmp_path: Path) -> None:
    path = prepared(tmp_path, finished)
    nothing = call("tune", path, "--set", "search.space.optim.rate.low=1", "--set", "search.space.optim.rate.high=2")
    assert nothing.code == 1
    assert not (tmp_path / "runs" / "searches").exists()
    unknown = call("tune", path, "--trials", "0")
    assert unknown.code == 2
    assert "--trials" in unknown.error
    objective = call("tune", path, "--set", "search.objective=fid")
    assert "search.objective: fid, but nothing measures it" in objective.error
    small = call("tune", path, "--transfer", "--set", "search.transfer.steps=1")
    assert small.code == 1
    assert "leaves no whole step" in small.error
    for ignored in (("--trials", "10"), ("--launcher", "slurm", "--parallel", "4")):
        refused = call("tune", path, "--transfer", *ignored)
        assert refused.code == 2
        assert f"{ignored[-2]}: --transfer" in refused.error


@pytest.mark.slow
def test_rates_across_sizes_from_start_to_end(call: Call, finished: Finished, tmp_path: Path) -> None:
    """Under two parametrizations, whose models are the same at the base: twelve of them are trained once."""
    path = prepared(tmp_path, finished)
    before = len(results(tmp_path / "runs"))
    transfer = {"parametrizations": ["paper", "complete-p"], "depths": [2, 3], "steps": 20, "rates": 6}
    done = call("tune", path, "--transfer", "--parallel", "2", "--set", f"search.transfer={json.dumps(transfer)}")
    assert done.code == 0, done.error
    assert len(results(tmp_path / "runs")) == before + 3 * 12
    assert done.output.splitlines()[-1] == "runs/searches/toy-transfer/report.md"
    table = pd.read_csv(tmp_path / "runs" / "searches" / "toy-transfer" / "trials.csv")
    assert len(table) == 4 * 12
    assert set(table["state"]) <= {"COMPLETE", "PRUNED"}
