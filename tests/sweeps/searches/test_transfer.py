"""Rates across sizes: the fits against planted parabolas, and runs whose sweeps are played."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from fake_runs import write_result
from toy_sweep import toy_experiment

from sweeps.orchestrator import Outcome
from sweeps.searches.storage import open_search
from sweeps.searches.transfer import TransferPlan, TransferRun, transfers
from sweeps.searches.transfer_fit import Valley, fit_transfer, fit_valley
from sweeps.searches.transfer_report import write_transfer
from sweeps.study import Study
from varscale.config.yaml import load_experiment
from varscale.errors import ExperimentError
from varscale.store.layout import Store
from varscale.training.cells import Cell

RATES = np.repeat(np.arange(7) / 2 - 8, 2)
SEEDS = [0, 1] * 7


def planted(best: float, curvature: float = 0.1, noise: float = 0.0, seed: int = 0) -> Valley:
    """Losses of a parabola, the second seed's 0.05 above, seven rates √2 apart."""
    scatter = np.random.default_rng(seed).normal(0, noise, len(RATES)) if noise else 0
    losses = 2 + curvature * (RATES - best) ** 2 + 0.05 * np.array(SEEDS) + scatter
    return fit_valley(list(RATES), list(losses), SEEDS)


def test_a_parabola_is_found_as_it_was_planted() -> None:
    valley = planted(-6.37)
    assert valley.best == pytest.approx(-6.37)
    assert valley.curvature == pytest.approx(0.1)
    assert valley.lowest == pytest.approx(2.025)
    assert valley.interval == pytest.approx((-6.37, -6.37), abs=1e-5)
    assert valley.excess(-5.87) == pytest.approx(0.1 * 0.25)


@pytest.mark.parametrize("noise", [0.004, 0.02, 0.04])
@pytest.mark.parametrize("sizes", [(1.0, 2.0), (1.0, 2.0, 2.6, 3.0)], ids=["two sizes", "four sizes"])
def test_intervals_hold_what_was_planted_as_often_as_they_say(sizes: tuple[float, ...], noise: float) -> None:
    """The minimum, and the drift of minima that move by a third a doubling, wherever noise leaves two of them."""
    held, drifts = [], []
    for draw in range(400):
        valleys = {
            size: planted(-5.9 - size / 3, noise=noise, seed=len(sizes) * draw + place)
            for place, size in enumerate(sizes)
        }
        inside = [valley.interval[0] < -5.9 - size / 3 < valley.interval[1]
                  for size, valley in valleys.items() if valley.interval is not None]  # fmt: skip
        held += inside
        transfer = fit_transfer(valleys)
        if transfer.drift_interval is not None:
            drifts.append(transfer.drift_interval[0] < -1 / 3 < transfer.drift_interval[1])
    assert len(drifts) > 250
    assert 0.925 < np.mean(held) < 0.975
    assert np.mean(drifts) > 0.935


def test_what_is_lost_is_what_the_largest_sizes_parabola_says() -> None:
    transfer = fit_transfer({1.0: planted(-6.25), 3.0: planted(-6.75, curvature=0.2)})
    assert transfer.drift == pytest.approx(-0.25)
    assert transfer.lost == pytest.approx(0.2 * 0.25)
    far = fit_transfer({1.0: planted(-5.5), 3.0: planted(-7.5)})  # beyond where the parabola was fitted
    assert far.lost == pytest.approx(0.1 * 4)


def test_no_minimum_where_the_best_rate_is_the_last_or_noise_hides_it() -> None:
    assert planted(-9.0).interval is None
    assert planted(-4.0).interval is None
    assert planted(-4.0).best == -5.0
    assert planted(-6.5, curvature=0.001, noise=0.05).interval is None
    unknown = fit_transfer({1.0: planted(-9.0), 2.0: planted(-6.5), 3.0: planted(-4.0)})
    assert (unknown.drift, unknown.lost) == (None, None)


def test_rates_at_which_a_run_diverged_are_left_out() -> None:
    losses = 2 + 0.1 * (RATES + 6.5) ** 2
    losses[-1] = math.inf
    valley = fit_valley(list(RATES), list(losses), SEEDS)
    assert valley.best == pytest.approx(-6.5)
    assert valley.excess(-5.0) == math.inf
    losses[4:] = math.inf
    with pytest.raises(ValueError, match="2 rates at which all runs ended"):
        fit_valley(list(RATES), list(losses), SEEDS)


# ------------------------------------------------------------------------------------------------------- runs

TRANSFER = {"depths": [2, 4], "steps": 10, "rates": 7}


def plan(**transfer: Any) -> TransferPlan:
    return TransferPlan(toy_experiment(search={"transfer": {**TRANSFER, **transfer}}))


def falling(cell: Cell) -> float:
    """The best rate is the highest, so no size has a minimum."""
    return 5 - math.log2(cell.trunk.experiment.optim.lr) / 10


def valley_of(cell: Cell) -> float:
    """The paper's best rate falls by half a doubling from depth 2 to 4; the others' stays at 5e-3."""
    model = cell.trunk.model.model_dump()
    best = math.log2(5e-3) - (0.5 if "parametrization" not in model and cell.trunk.depth == 4 else 0)
    rate = math.log2(cell.trunk.experiment.optim.lr)
    return 3 + 0.1 * (rate - best) ** 2 + 0.01 * cell.trunk.seed + 1e-4 * math.sin(1e4 * rate)


class PlayedCells:
    """Stands for sweeps: writes results, and remembers whose."""

    def __init__(self, most: int = 10**6, loss: Callable[[Cell], float | None] = valley_of) -> None:
        """The loss of a cell that diverges is infinite, of one that fails None."""
        self.cells: list[Cell] = []
        self.most, self.loss = most, loss

    def __call__(self, study: Study) -> Outcome:
        for cell in study.cells:
            files = study.cell_files(cell)
            if study.result(cell) is None:
                if len(self.cells) == self.most:
                    raise KeyboardInterrupt
                self.cells.append(cell)
                if (loss := self.loss(cell)) is not None:
                    files.folder.mkdir(parents=True)
                    write_result(files, 1.0, status="finished" if loss < math.inf else "diverged", loss=min(loss, 9.0))
        return Outcome([], {}, 0)


def run(runs: Path, own: TransferPlan, played: Callable[[Study], Outcome]) -> list[str]:
    store = Store(runs)
    with open_search(own, store.search(own.name), None) as optuna_study:
        running = TransferRun(own, store, optuna_study, played, lambda line: None)
        running.run()
        tried = [trial.params for trial in optuna_study.trials]
        assert all(values in tried for values in own.trials)
        return write_transfer(running, store.search(own.name))


def summary(runs: Path) -> dict[str, Any]:
    """What the numbers' file says; in it are no numbers that JSON hasn't."""

    def fail(name: str) -> None:
        raise AssertionError(name)

    text = Store(runs).search("toy-transfer").summary.read_text()
    found: dict[str, Any] = json.loads(text, parse_constant=fail)
    return found


def test_trials_are_a_grid_of_equal_lengths() -> None:
    own = plan()
    own.check()
    cells = [own.cell(values) for values in own.trials]
    assert len(cells) == 3 * 2 * 7 * 2
    assert {cell.steps for cell in cells} == {10}
    assert own.rates[3] == pytest.approx(5e-3)
    assert [high / low for low, high in zip(own.rates, own.rates[1:], strict=False)] == pytest.approx(
        [2**0.5] * 6, rel=1e-5
    )
    assert len({cell.key("tokens").fingerprint for cell in cells}) == (3 + 1) * 14  # at the base all are the paper's
    assert {cell.trunk.model.model_dump().get("base_width") for cell in cells} == {None, 8}


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    """Killed in the middle, too: what is done is not done again."""
    played = PlayedCells(most=20)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, plan(), played)
    played.most = 10**6
    files = Store(tmp_path).search("toy-transfer")
    with open_search(plan(), files, None) as optuna_study:  # of somebody else's, which say nothing
        optuna_study.add_trial(optuna.trial.create_trial(value=0.1))
    lines = run(tmp_path, plan(), played)
    assert len(played.cells) == 4 * 14
    assert len(pd.read_csv(files.trials)) == 84 + 1
    assert files.figure("transfer").stat().st_size > 10_000
    assert [line.partition(":")[0] for line in lines] == ["paper", "mup", "complete-p"]
    page = files.report.read_text()
    assert page.count("\n| ") == 2 + 6
    assert all(line in page for line in lines)
    found = summary(tmp_path)
    assert found["transfers"]["paper"]["drift"] == pytest.approx(-0.5, abs=0.02)
    assert found["transfers"]["paper"]["lost"] == pytest.approx(0.1 * 0.25, rel=0.05)
    assert found["transfers"]["complete-p"]["drift"] == pytest.approx(0, abs=0.02)
    assert found["sizes"]["mup"]["4"]["best_rate"] == pytest.approx(5e-3, rel=0.02)


@pytest.mark.parametrize("centre", [2e-2, 5e-3, 1.7e-3, 3.3e-4])
@pytest.mark.parametrize("steps", range(-6, 7))
def test_a_wider_grid_has_the_narrower_ones_rates(centre: float, steps: int) -> None:
    """To the bit, also about another of its rates, as it is written or as it is computed."""
    narrow = plan(centre=centre).rates
    for other in (centre * math.sqrt(2) ** steps, centre * 2 ** (steps / 2)):
        assert set(narrow) <= set(plan(centre=other, rates=20).rates)
    assert set(narrow) <= set(plan(centre=centre, rates=8).rates)


def test_a_study_grows_and_keeps_what_is_there(tmp_path: Path) -> None:
    """By rates, sizes, seeds and parametrizations, also from a call that was killed."""
    runs, played = tmp_path, PlayedCells(most=20)
    with pytest.raises(KeyboardInterrupt):
        run(runs, plan(parametrizations=["paper"], rates=6), played)
    played.most = 10**6
    run(runs, plan(parametrizations=["paper", "mup"], rates=8, depths=[2, 4, 6], seeds=[0, 1, 2]), played)
    assert len(played.cells) == len({cell.key("tokens").fingerprint for cell in played.cells}) == (1 + 2 * 2) * 8 * 3
    assert set(summary(runs)["sizes"]["paper"]) == {"2", "4", "6"}
    assert {len(valley["losses"]) for valley in summary(runs)["sizes"]["mup"].values()} == {8}
    before = len(played.cells)
    run(runs, plan(parametrizations=["mup"]), played)  # narrower again: nothing is trained, all rates count
    assert len(played.cells) == before
    assert {len(valley["losses"]) for valley in summary(runs)["sizes"]["mup"].values()} == {8}
    with pytest.raises(ExperimentError, match="begun with other settings"):
        run(runs, plan(depths=[1, 2, 4]), played)  # another base, so other models of the same name


def test_rates_without_all_seeds_are_left_out_and_failures_are_tried_again(tmp_path: Path) -> None:
    """A run of each of the two lowest rates fails, and of the highest one diverges."""
    own, failing = plan(parametrizations=["paper"]), True

    def loss(cell: Cell) -> float | None:
        place = own.rates.index(cell.trunk.experiment.optim.lr)
        if (cell.trunk.depth, cell.trunk.seed) == (4, 1):
            if place < 2 and failing:
                return None
            if place == 6:
                return math.inf
        return valley_of(cell)

    lines = run(tmp_path, own, PlayedCells(loss=loss))
    assert "paper, depth 4: without 1.77e-03, 2.50e-03, 1.41e-02, where not all runs ended" in lines[-1]
    found = summary(tmp_path)["sizes"]["paper"]
    assert [len(found[depth]["losses"]) for depth in ("2", "4")] == [7, 4]
    assert found["4"]["left_out"] == pytest.approx([own.rates[0], own.rates[1], own.rates[6]], rel=1e-5)

    failing, played = False, PlayedCells(loss=loss)
    lines = run(tmp_path, own, played)
    assert len(played.cells) == 2
    assert "paper, depth 4: without 1.41e-02, where" in lines[-1]
    assert len(summary(tmp_path)["sizes"]["paper"]["4"]["losses"]) == 6


def test_what_has_no_number_is_null(tmp_path: Path) -> None:
    """The largest size diverges at the smallest's best rate and above."""
    own = plan(parametrizations=["paper"])

    def loss(cell: Cell) -> float:
        rate = cell.trunk.experiment.optim.lr
        best = {2: 7.5e-3, 4: 2.7e-3}[cell.trunk.depth]
        if cell.trunk.depth == 4 and rate > 6e-3:
            return math.inf
        return 3 + 0.1 * math.log2(rate / best) ** 2 + 1e-4 * math.sin(1e4 * rate)

    (line, _) = run(tmp_path, own, PlayedCells(loss=loss))
    assert "costs the largest unknown (not all runs of the largest size ended at that rate)" in line
    assert summary(tmp_path)["transfers"]["paper"]["lost"] is None


def test_sizes_without_a_minimum_are_said_to_have_none(tmp_path: Path) -> None:
    (line,) = run(tmp_path, plan(parametrizations=["paper"]), PlayedCells(loss=falling))
    assert "a doubling of size unknown" in line
    assert Store(tmp_path).search("toy-transfer").report.read_text().count("at the edge of those tried") == 2


def test_a_size_of_which_nothing_ended_is_named(tmp_path: Path) -> None:
    class Failing(PlayedCells):
        def __call__(self, study: Study) -> Outcome:
            return Outcome([], {}, 0)

    with pytest.raises(ExperimentError, match="paper, depth 2: 0 rates at which all runs ended"):
        run(tmp_path, plan(parametrizations=["paper"]), Failing())


def test_a_base_that_the_experiment_states_stays() -> None:
    own = TransferPlan(toy_experiment(model={"base_width": 4, "base_depth": 1}, search={"transfer": TRANSFER}))
    cells = [own.cell(values) for values in own.trials]
    scaled = {cell.trunk.model.model_dump().get("base_width") for cell in cells if "mup" in cell.trunk.variant}
    assert scaled == {4}


@pytest.mark.parametrize(
    ("transfer", "problem"),
    [
        ({"rates": 3}, "greater than or equal to 5"),
        ({"parametrizations": ["mup", "mup"]}, "parametrizations: repeated values"),
        ({"parametrizations": ["standard"]}, "'paper', 'mup' or 'complete-p'"),
        ({"seeds": [0]}, "at least 2 items"),
        ({"depths": [2]}, "at least 2 items"),
        ({"steps": 1}, "leaves no whole step"),
    ],
)
def test_mistakes_are_named(transfer: dict[str, Any], problem: str) -> None:
    with pytest.raises(ExperimentError, match=problem) as raised:
        plan(**transfer).check()
    assert "\n" not in str(raised.value)


def test_families_without_parametrizations_are_named() -> None:
    with pytest.raises(ExperimentError, match=r"family diffusion have the paper's alone; set it to \[paper\]"):
        TransferPlan(load_experiment("studies/rings-diffusion")).check()


def test_transfers_are_by_doublings_of_the_depth() -> None:
    valleys = {"paper": {4: planted(-6.0), 16: planted(-7.0)}}
    assert transfers(valleys)["paper"].drift == pytest.approx(-0.5)
