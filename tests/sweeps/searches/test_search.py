"""Searches whose sweeps are played: losses come from a bowl with a known bottom, so a hundred trials take a second."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from filelock import FileLock
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from optuna.trial import TrialState
from toy_sweep import toy_experiment

from sweeps.grid import grid_cells
from sweeps.orchestrator import Outcome
from sweeps.searches.plan import SearchPlan
from sweeps.searches.proposals import learnt_values
from sweeps.searches.report import label_sparsely, write_report
from sweeps.searches.search import Confirmation, Search
from sweeps.searches.storage import open_search
from sweeps.study import Study
from varscale.config.yaml import load_experiment
from varscale.errors import ExperimentError, TokenizerRejected
from varscale.store.layout import Store
from varscale.training.cells import Cell

SPACE = {
    "optim.lr": {"low": 1e-4, "high": 1.0, "log": True},
    "optim.betas": {"choices": [[0.9, 0.95], [0.8, 0.99]]},
    "model.width_per_depth": {"low": 2, "high": 6},
}
BEST_RATE = 0.05


def plan(**search: Any) -> SearchPlan:
    return SearchPlan(toy_experiment(search={"space": SPACE, "budgets": [2e7, 4e7], **search}))


def bowl(cell: Cell) -> float:
    """Least at a rate of 0.05, the second betas and width 5; the first budget is worse by one."""
    optim, model = cell.trunk.experiment.optim, cell.trunk.experiment.model
    loss = math.log10(optim.lr / BEST_RATE) ** 2 + 0.1 * (optim.betas == (0.9, 0.95))
    width = model.model_dump()["width_per_depth"]
    return loss + 0.05 * (width - 5) ** 2 + (cell.budget_flops < 4e7) + 1e-3 * cell.trunk.seed


class Played:
    """Stands for sweeps: trains nothing, and remembers what it was given."""

    def __init__(self, loss: Callable[[Cell], float | None] = bowl) -> None:
        self.cells: list[Cell] = []
        self._loss = loss

    def __call__(self, study: Study) -> Outcome:
        assert len({cell.label for cell in study.cells}) == len(study.cells)
        rows = []
        for cell in study.cells:
            loss = self._loss(cell)  # may end the search
            self.cells.append(cell)
            found = {"status": "finished", "loss": loss} if loss != math.inf else {"status": "diverged"}
            if loss is not None:
                rows.append({**cell.labels(), "seed": cell.trunk.seed, "train_flops": cell.train_flops, **found})
        return Outcome(rows, {}, len(rows))

    def of(self, number: int) -> list[float]:
        """Budgets at which a trial was trained."""
        return [
            cell.budget_flops for cell in self.cells if cell.trunk.variant == f"trial-{number}" and not cell.trunk.seed
        ]


@contextmanager
def search(runs: Path, own: SearchPlan, sweep: Played, storage: str | None = None) -> Iterator[Search]:
    store = Store(runs)
    with open_search(own, store.search("toy"), storage) as optuna_study:
        yield Search(own, store, optuna_study, sweep, lambda line: None)


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


def test_a_trial_worse_than_the_median_is_not_trained_on(tmp_path: Path) -> None:
    played = Played()
    with search(tmp_path, plan(), played) as running:
        running.run(trials=25, parallel=2)
        ended = running.ended
    pruned = [trial.number for trial in ended if trial.state == TrialState.PRUNED]
    assert 3 < len(pruned) < 15
    assert all(number >= 5 for number in pruned)  # the first have no median to be compared with
    assert all(played.of(number) == [2e7] for number in pruned)
    assert all(played.of(trial.number) == [2e7, 4e7] for trial in ended if trial.state == TrialState.COMPLETE)


def test_killed_in_the_middle_nothing_is_lost_or_repeated(tmp_path: Path) -> None:
    """Trials that were under way go on with the values that they had."""
    calls = iter(range(10**6))

    def killed(cell: Cell) -> float:
        if next(calls) in (5, 13):
            raise KeyboardInterrupt
        return bowl(cell)

    played = Played(killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), search(tmp_path, plan(), played) as running:
            running.run(trials=12, parallel=3)
    with search(tmp_path, plan(), played) as running:
        begun = {trial.number: trial.params for trial in running.optuna_study.trials if not trial.state.is_finished()}
        done = {trial.number: trial.values for trial in running.ended}
        assert begun
        assert done
        running.run(trials=12, parallel=3)
        assert len(running.ended) == len(running.optuna_study.trials) == 12
        assert {number: running.optuna_study.trials[number].params for number in begun} == begun
        assert {number: running.optuna_study.trials[number].values for number in done} == done
    before = len(played.cells)
    with search(tmp_path, plan(), played) as running:
        running.run(trials=12, parallel=3)
    assert len(played.cells) == before


def test_half_a_line_at_the_journals_end_is_dropped(tmp_path: Path) -> None:
    with search(tmp_path, plan(), Played()) as running:
        running.run(trials=3, parallel=1)
    journal = Store(tmp_path).search("toy").journal
    journal.write_bytes(journal.read_bytes() + b'{"op_code":4,"work')
    with search(tmp_path, plan(), Played()) as running:
        running.run(trials=5, parallel=1)
        assert len(running.ended) == 5


def test_divergence_is_learnt_from_and_a_failure_is_not(tmp_path: Path) -> None:
    def rough(cell: Cell) -> float | None:
        rate = cell.trunk.experiment.optim.lr
        return math.inf if rate > 0.2 else None if rate < 1e-3 else bowl(cell)

    with search(tmp_path, plan(), Played(rough)) as running:
        running.run(trials=30, parallel=2)
        rates = [(trial.state, trial.params["optim.lr"]) for trial in running.ended]
        states = {state: [rate for of, rate in rates if of == state] for state in TrialState}
        outcomes = {trial.params["optim.lr"]: trial.user_attrs["outcome"] for trial in running.ended}
    assert all(outcomes[rate].startswith("diverged") for rate in states[TrialState.PRUNED] if rate > 0.2)
    assert all(rate <= 0.2 for rate in states[TrialState.COMPLETE])
    assert states[TrialState.FAIL]
    assert all(rate < 1e-3 for rate in states[TrialState.FAIL])


def test_each_tokenizer_is_swept_apart_and_an_unfit_one_ends_its_trials_alone(tmp_path: Path) -> None:
    """Numbers of scales, and sizes of the codebook; what is compared are then images."""
    space = {
        "tokenizer.patch_nums": {"choices": [[1, 2, 4], [1, 4]]},
        "tokenizer.vocab_size": {"choices": [8, 16, 32]},
    }
    settings = {"objective": "mind", "space": space, "budgets": [4e7], "confirmation_seeds": []}
    own = SearchPlan(toy_experiment(search=settings, evaluation={"fidelity": {"samples": 100}}))
    own.check()
    swept: list[tuple[int, tuple[int, ...]]] = []

    def sweep(study: Study) -> Outcome:
        (tokenizer,) = {cell.trunk.experiment.tokenizer for cell in study.cells}
        swept.append((tokenizer.vocab_size, tokenizer.patch_nums))
        if tokenizer.vocab_size == 32:
            raise TokenizerRejected("scales use a handful of codes")
        rows = [
            {**cell.labels(), "seed": 0, "status": "finished", "mind": len(tokenizer.patch_nums)}
            for cell in study.cells
        ]
        return Outcome(rows, {}, len(rows))

    store = Store(tmp_path)
    with open_search(own, store.search("toy"), None) as optuna_study:
        running = Search(own, store, optuna_study, sweep, lambda line: None)
        running.run(trials=14, parallel=4)
        unfit = [trial for trial in running.ended if trial.state == TrialState.PRUNED]
        assert {trial.params["tokenizer.vocab_size"] for trial in unfit} == {32}
        assert running.best is not None
        assert running.best.params["tokenizer.patch_nums"] == "[1, 4]"
    assert {vocabulary for vocabulary, _ in swept} == {8, 16, 32}
    with pytest.raises(TokenizerRejected), search(tmp_path / "other", plan(), Played(rejecting)) as running:
        running.run(trials=2, parallel=1)


def rejecting(cell: Cell) -> float:
    raise TokenizerRejected("reconstructions are no better than one mean picture")


def test_loss_against_flops(tmp_path: Path) -> None:
    own = plan(objective="loss-and-flops", budgets=[2e7, 3e7, 4e7, 6e7])
    rough = Played(lambda cell: math.inf if cell.trunk.experiment.optim.lr > 0.3 else bowl(cell))
    with search(tmp_path, own, rough) as running:
        running.run(trials=16, parallel=2)
        front = running.optuna_study.best_trials
        everything = [trial.values for trial in running.ended if trial.values is not None]
        assert 0 < len(running.ended) - len(everything) < 15  # diverged
        assert running.best is None
        assert running.confirm() is None
        lines = write_report(running, Store(tmp_path).search("toy"), "rings", None)
    dominated = [any(a < c and b < d for a, b in everything) for c, d in everything]
    undominated = {tuple(each) for each, worse in zip(everything, dominated, strict=True) if not worse}
    assert {tuple(trial.values) for trial in front} <= undominated
    assert len({trial.params["budget"] for trial in front}) >= 2
    assert sum(line.startswith("on the front, trial") for line in lines) == len(front)
    assert Store(tmp_path).search("toy").figure("front").stat().st_size > 5000


def test_new_seeds_decide_whether_the_best_is_better(tmp_path: Path) -> None:
    played = Played()
    with search(tmp_path, plan(), played) as running:
        running.run(trials=15, parallel=2)
        confirmation = running.confirm()
        assert confirmation is not None
        assert running.best is not None
        expected = bowl(SearchPlan.cells(running.plan, 0, running.plan.recipe, 0)[-1]) - running.best.value
        assert confirmation.gain == pytest.approx(expected)
    assert {cell.trunk.seed for cell in played.cells[-6:]} == {1, 2, 3}
    assert all(cell.budget_flops == 4e7 for cell in played.cells[-6:])


@pytest.mark.parametrize(("low", "high"), [(5e-4, 5e-3), (1e-3, 1e-1), (1e-6, 1.0)])
def test_labels_of_a_logarithmic_axis_have_room(low: float, high: float) -> None:
    """Slanted labels lie beside each other where their lines are further apart than they are high."""
    figure = Figure(figsize=(2.4, 3.0))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", xlim=(low, high))
    label_sparsely(axes)
    figure.canvas.draw()
    ticks = [tick.label1 for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    places = sorted(float(axes.transData.transform((float(label.get_text()), 1))[0]) for label in ticks)
    assert len(places) >= 3
    height = ticks[0].get_fontsize() * figure.dpi / 72
    assert min(after - before for before, after in pairwise(places)) * math.sin(math.radians(45)) > height
    assert not any(label.get_text() for label in axes.get_xticklabels(minor=True))


def test_verdicts() -> None:
    """Against Welch's interval worked out by hand: equal spreads, four degrees of freedom, t = 2.776."""
    noisy = Confirmation(best=(2.0, 2.1, 2.2), own=(2.05, 2.15, 2.25))
    error = math.sqrt(2 * 0.01 / 3) * 2.7764
    assert noisy.interval() == pytest.approx((0.05 - error, 0.05 + error), rel=1e-4)
    assert noisy.verdict("loss").startswith("the default is optimal within noise")
    assert "beat" in Confirmation((2.0, 2.01, 2.02), (2.5, 2.51, 2.52)).verdict("loss")
    assert "worse" in Confirmation((2.5, 2.51, 2.52), (2.0, 2.01, 2.02)).verdict("loss")


def test_what_is_written(tmp_path: Path) -> None:
    files = Store(tmp_path).search("toy")
    with search(tmp_path, plan(), Played()) as running:
        running.run(trials=20, parallel=2)
        best = running.best
        assert best is not None
        lines = write_report(running, files, "rings", running.confirm())
    assert len(pd.read_csv(files.trials)) == 20
    summary = json.loads(files.summary.read_text())
    assert summary["best"]["trial"] == best.number
    assert sum(summary["trials"].values()) == 20
    assert len(summary["confirmation"]["best"]) == 3
    winner = load_experiment(str(files.best))  # extends the shipped one
    assert winner.optim.lr == best.params["optim.lr"]
    assert winner.optim.betas == tuple(json.loads(best.params["optim.betas"]))
    assert winner.grid == load_experiment("rings").grid
    page = files.report.read_text()
    assert all(line in page for line in lines)
    assert page.count("\n| ") == 22
    for name in ("history", "slice", "intermediate"):
        assert files.figure(name).stat().st_size > 5000
        assert f"({name}.png)" in page


@pytest.mark.parametrize(
    ("search_settings", "problem"),
    [
        (
            {"space": {"optim.rate": {"low": 1e-4, "high": 1e-2}}},
            "search.space.optim.rate: optim.rate: unknown key",
        ),
        ({"space": {"grid.depths": {"choices": [2, 3]}}}, "only fields of optim, model and tokenizer, and depth"),
        ({"space": {"optim.lr": {"low": 1e-4, "high": 1e-3}}}, "the experiment's own 0.005 is not inside"),
        (
            {"space": {"optim.lr": {"low": 0.0, "high": 1.0}}},
            "search.space.optim.lr: optim.lr: input should be greater than 0",
        ),
        ({"space": {"tokenizer.vocab_size": {"choices": [16, 32]}}}, "losses of different tokens don't compare"),
        ({"objective": "fid"}, "set evaluation.fidelity"),
        ({"budgets": [1e5]}, "search.budgets: 1 of the cells"),
        (
            {"space": {"optim.batch_size": {"choices": [4, 4000]}}},
            "search.space.optim.batch_size: 4000: search.budgets: ",
        ),
        ({"space": {"optim.lr": {"choices": [1e-3, 2e-3]}}}, "the experiment's own 0.005 is not inside"),
        ({"space": {"depth": {"low": 2.0, "high": 3.5}}}, "search.space.depth: search.depth: input should be a valid"),
        ({"space": {"depth": {"choices": [2, "x"]}}}, "input should be a valid integer, got 'x'"),
        ({"space": {"depth": {"choices": [2, True]}}}, "input should be a valid integer, got True"),
        ({"space": {"depth": {"choices": [2, 3.0]}}}, "search.space.depth: expected whole numbers, such as 12"),
        ({"space": {"depth": {"low": 2, "high": 5000}}}, "less than or equal to 1024"),
        ({"space": {"budget": {"choices": [2e7, 3e7]}}}, "search.space.budget: only fields of"),
        ({"space": {"model.parametrization": {"choices": ["paper", "[1"]}}}, "or 'complete-p', got '[1'"),
    ],
)
def test_mistakes_are_named_before_anything_runs(search_settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ExperimentError) as raised:
        plan(**search_settings).check()
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


def test_losses_of_different_units_do_not_compare() -> None:
    space = {"model.prediction": {"choices": ["flow", "ddpm"]}}
    changes = [f"search.space={space}", "model.sampler=null"]
    problem = "search.space.model.prediction: losses in squared error of velocity and in squared error of noise, linear"
    with pytest.raises(ExperimentError, match=problem):
        SearchPlan(load_experiment("studies/rings-diffusion", changes)).check()


@pytest.mark.parametrize(
    ("search_settings", "problem"),
    [
        (
            {"space": {"optim.lr": {"low": 0.1, "high": 0.1}}},
            "search.space.optim.lr.low: an empty range from 0.1 to 0.1; low must be below high",
        ),
        (
            {"space": {"optim.lr": {"low": 0.0, "high": 0.1, "log": True}}},
            "search.space.optim.lr.low: 0; a range of factors (log: true) begins above 0",
        ),
        ({"space": {"optim.lr": {"choices": [0.1]}}}, "search.space.optim.lr.choices: tuple should have at least 2"),
        ({"space": {"optim.lr": {"choices": [0.1, 0.1]}}}, "search.space.optim.lr.choices: repeated values in"),
        ({"space": {"optim.lr": {"high": 0.1}}}, "search.space.optim.lr.low: missing"),
        ({"space": {"optim.lr": {"low": 0.1, "high": 1, "lg": True}}}, "optim.lr.lg: unknown key; did you mean log?"),
        ({"space": {"optim.lr": {"low": "a", "high": 1}}}, "optim.lr.low: expected a number between -1e30 and 1e30"),
        ({"space": {"optim.lr": 5}}, "search.space.optim.lr: expected a section of keys, got 5"),
        ({"budgets": [4e7, 2e7]}, "search.budgets: [40000000.0, 20000000.0]; each must be larger"),
        ({"confirmation_seeds": [0, 1]}, "search.confirmation_seeds: 0 is the seed that chooses the best; name others"),
    ],
)
def test_sections_that_make_no_sense(search_settings: dict[str, Any], problem: str) -> None:
    """One thing is said of each, although a setting may be varied in two ways."""
    with pytest.raises(ExperimentError) as raised:
        plan(**search_settings)
    assert problem in str(raised.value)
    assert str(raised.value).count("search.") == 1


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


def test_values_from_elsewhere_are_not_compared(tmp_path: Path) -> None:
    with search(tmp_path, plan(), Played()) as running:
        running.run(trials=1, parallel=1)
        running.optuna_study.add_trial(optuna.trial.create_trial(value=0.1))
        with pytest.raises(ExperimentError, match="trial 1 of 'toy-search' has settings that are not"):
            running.run(trials=3, parallel=1)


@pytest.mark.parametrize("seed", [0, 2])
def test_the_winner_is_confirmed_with_seeds_that_did_not_choose_it(tmp_path: Path, seed: int) -> None:
    played = Played()
    with search(tmp_path, plan(seed=seed), played) as running:
        running.run(trials=6, parallel=2)
        assert running.confirm() is not None
    assert {cell.trunk.seed for cell in played.cells} == {seed, seed + 1, seed + 2, seed + 3}


def test_a_search_without_a_section_is_of_the_rate() -> None:
    own = SearchPlan(toy_experiment())
    own.check()
    assert list(own.space) == ["optim.lr"]
    assert own.budgets == (2e7,)
    assert own.distributions["optim.lr"] == optuna.distributions.FloatDistribution(5e-3 / 8, 5e-3 * 8, log=True)


@pytest.mark.parametrize("content", [b"not a journal\n", b'{"op_code": 99, "worker_id": "a"}\n', b"\x00\x01\n"])
def test_a_storage_that_is_none(tmp_path: Path, content: bytes) -> None:
    files = Store(tmp_path).search("toy")
    files.folder.mkdir(parents=True)
    files.journal.write_bytes(content)
    with pytest.raises(ExperimentError, match="can't use this storage"), search(tmp_path, plan(), Played()):
        pass


def test_a_database_that_can_not_be_opened_and_one_that_can(tmp_path: Path) -> None:
    nowhere = f"sqlite:///{tmp_path}/none/there.db"
    with pytest.raises(ExperimentError, match="can't use"), search(tmp_path, plan(), Played(), nowhere):
        pass
    with search(tmp_path, plan(), Played(), f"sqlite:///{tmp_path}/there.db") as running:
        running.run(trials=2, parallel=1)
    assert not Store(tmp_path).search("toy").journal.exists()
    with search(tmp_path, plan(), Played(), f"sqlite:///{tmp_path}/there.db") as running:
        assert len(running.ended) == 2


def test_a_search_of_other_settings_or_of_another_call_is_refused(tmp_path: Path) -> None:
    with search(tmp_path, plan(), Played()) as running:
        running.run(trials=1, parallel=1)
        with pytest.raises(ExperimentError, match="another `varscale tune`"), search(tmp_path, plan(), Played()):
            pass
    with pytest.raises(ExperimentError, match="begun with other settings"), search(tmp_path, plan(depth=3), Played()):
        pass
    with FileLock(Store(tmp_path).search("toy").lock):  # it is free again
        pass
