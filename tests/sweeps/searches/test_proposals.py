"""What a search tries: the recipe first, then what the sampler says of all that is known, nothing twice."""

import math
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from played_search import SPACE, Played, bowl, plan, search
from toy_sweep import toy_experiment

from sweeps.grid import grid_cells
from sweeps.searches.proposals import learnt_values
from varscale.training.cells import Cell


def test_the_first_trial_is_the_recipe_and_a_cell_of_the_grid(tmp_path: Path) -> None:
    """Which the sweep may have trained."""
    own, played = plan(), Played()
    with search(tmp_path, own, played) as running:
        running.run(trials=1, parallel=2)
    grid = {
        cell.key("tokens").fingerprint
        for cell in grid_cells(toy_experiment(grid={"budgets": [2e7, 4e7], "depths": [2]}))
    }
    assert {cell.key("tokens").fingerprint for cell in played.cells} == grid
    assert all(cell.trunk.experiment.name == "toy-search" for cell in played.cells)


def test_values_are_inside_and_of_their_kind(tmp_path: Path) -> None:
    played = Played()
    with search(tmp_path, plan(), played) as running:
        running.run(trials=18, parallel=3)
        params = [trial.params for trial in running.ended]
    assert {type(each["model.width_per_depth"]) for each in params} == {int}
    widths = {each["model.width_per_depth"] for each in params}
    assert len(widths) > 2
    assert widths <= {2, 3, 4, 5, 6}
    assert {each["optim.betas"] for each in params} == {"[0.9, 0.95]", "[0.8, 0.99]"}
    assert {cell.trunk.experiment.optim.betas for cell in played.cells} == {(0.9, 0.95), (0.8, 0.99)}
    assert all(1e-4 <= each["optim.lr"] <= 1 for each in params)


def test_a_search_is_better_than_chance(tmp_path: Path) -> None:
    """At the same number of trials, over three seeds each; with pruning, from which it learns, too."""

    def found(sampler: str, seed: int) -> float:
        own = plan(sampler=sampler, seed=seed, confirmation_seeds=[])
        with search(tmp_path / f"{sampler}{seed}", own, Played()) as running:
            running.run(trials=18, parallel=2)
            assert running.best is not None
            return float(running.best.value) - 1e-3 * seed

    searched, chance = ([found(sampler, seed) for seed in range(3)] for sampler in ("gp", "random"))
    assert sorted(searched)[1] < 0.5 * sorted(chance)[1]


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random"])
def test_a_search_that_goes_on_tries_nothing_twice(sampler: str, tmp_path: Path) -> None:
    """A sampler that began again with the search's seed would propose what it proposed first."""
    for trials in (3, 5, 7):
        with search(tmp_path, plan(sampler=sampler), Played()) as running:
            running.run(trials=trials, parallel=2)
            rates = [trial.params["optim.lr"] for trial in running.ended]
    assert len(set(rates)) == 7


@pytest.mark.parametrize("sampler", ["gp", "random"])
def test_a_space_of_few_settings_is_tried_once_and_ends(sampler: str, tmp_path: Path) -> None:
    space = {"model.width_per_depth": {"low": 2, "high": 5}, "optim.betas": SPACE["optim.betas"]}
    with search(tmp_path, plan(space=space, sampler=sampler), Played()) as running:
        running.run(trials=20, parallel=3)
        tried = [tuple(trial.params.values()) for trial in running.ended]
    assert len(tried) == len(set(tried)) == 8


def test_what_a_trial_that_was_not_trained_to_its_end_counts_for(tmp_path: Path) -> None:
    """A pruned one with what others gained from there on, one that diverged with the worst; a failed one not at all."""

    def rough(cell: Cell) -> float | None:
        number = int(cell.trunk.variant.removeprefix("trial-"))
        return math.inf if number == 1 else None if number == 2 else bowl(cell) + (number in (7, 8))

    with search(tmp_path, plan(sampler="random"), Played(rough)) as running:
        running.run(trials=9, parallel=1)
        ended = {trial.number: trial for trial in running.ended}
        worth = learnt_values(running.ended)
    complete = {number: trial.value for number, trial in ended.items() if trial.state == TrialState.COMPLETE}
    stopped = [number for number, trial in ended.items() if 2e7 in trial.intermediate_values and number not in complete]
    assert stopped
    assert {number: worth[number] for number in complete} == {number: [value] for number, value in complete.items()}
    for number in stopped:
        assert worth[number][0] == pytest.approx(ended[number].intermediate_values[2e7] - 1)  # as the bowl has it
    assert worth[1] == [max(value for number, (value,) in worth.items() if number != 1)]
    assert 2 not in worth


@pytest.mark.parametrize(
    ("enqueued", "outcome"),
    [
        ({"optim.lr": 50.0}, "optim.lr: 50.0 is not inside search.space.optim.lr"),
        ({"optim.lr": -1.0}, "optim.lr: -1.0 is not inside search.space.optim.lr"),
        ({"optim.betas": "[0.5, 0.5]"}, "optim.betas: '[0.5, 0.5]' is not inside search.space.optim.betas"),
        ({"optim.lr": 0.02, "else": 1}, None),
    ],
)
def test_what_others_enqueue_is_tried_or_said_to_be_outside(
    tmp_path: Path, enqueued: dict[str, Any], outcome: str | None
) -> None:
    with search(tmp_path, plan(), Played()) as running:
        running.run(trials=2, parallel=1)
        running.optuna_study.enqueue_trial(enqueued)
        running.run(trials=4, parallel=2)
        _, _, theirs, after = running.ended
    assert after.state in (TrialState.COMPLETE, TrialState.PRUNED)
    if outcome is None:
        assert theirs.params.keys() == SPACE.keys()
        assert theirs.params["optim.lr"] == 0.02
    else:
        assert theirs.state == TrialState.FAIL
        assert theirs.user_attrs["outcome"] == outcome


def test_a_call_that_ended_amid_a_trials_settings(tmp_path: Path) -> None:
    """Optuna stores them one after the other, so a kill may leave a trial with some of them."""
    with search(tmp_path, plan(), Played()) as running:
        running.run(trials=1, parallel=1)
        running.optuna_study.enqueue_trial({"optim.lr": 0.02, "model.width_per_depth": 3, "optim.betas": "[0.8, 0.99]"})
        running.optuna_study.ask().suggest_float("optim.lr", 1e-4, 1.0, log=True)
        running.optuna_study.ask()  # and one with none, of which nobody said what it should be
    with search(tmp_path, plan(), Played()) as running:
        running.run(trials=4, parallel=2)
        _, enqueued, bare, _ = running.ended
    assert enqueued.params == {"optim.lr": 0.02, "model.width_per_depth": 3, "optim.betas": "[0.8, 0.99]"}
    assert bare.params.keys() == SPACE.keys()
