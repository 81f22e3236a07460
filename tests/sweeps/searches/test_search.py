"""How searches run, end, and what they write; with played sweeps."""

import json
import math
from itertools import pairwise
from pathlib import Path

import optuna
import pandas as pd
import pytest
from filelock import FileLock
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from optuna.trial import TrialState
from played_search import Played, bowl, plan, search
from toy_sweep import toy_experiment

from sweeps.orchestrator import Outcome
from sweeps.searches.plan import SearchPlan
from sweeps.searches.report import label_sparsely, write_report
from sweeps.searches.search import Confirmation, Search
from sweeps.searches.storage import open_search
from sweeps.study import Study
from varscale.config.yaml import load_experiment
from varscale.errors import ExperimentError, TokenizerRejected
from varscale.store.layout import Store
from varscale.training.cells import Cell


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
