"""Runs a search: asks Optuna for settings, lets a sweep train them, and tells Optuna what came of it.

What is decided lies in result files and in Optuna's storage, so a search may be killed at any moment and called again:
trials that were under way go on from their checkpoints, and finished ones are neither lost nor repeated.
"""

import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from sweeps.orchestrator import Outcome
from sweeps.searches.plan import SearchPlan, shown
from sweeps.searches.proposals import propose
from sweeps.study import Study
from varscale.errors import ExperimentError, TokenizerRejected
from varscale.store.layout import Store
from varscale.training.cells import Cell

Key = TypeVar("Key", bound=Hashable)
Sweep = Callable[[Study], Outcome]
"""Trains and measures a study's cells; what is done is not done again."""


@dataclass(frozen=True)
class Confirmation:
    """The best settings and the experiment's own, trained again with seeds that chose neither."""

    best: tuple[float, ...]
    own: tuple[float, ...]

    @property
    def gain(self) -> float:
        """How much lower the best settings' mean is."""
        return math.fsum(self.own) / len(self.own) - math.fsum(self.best) / len(self.best)

    def interval(self) -> tuple[float, float]:
        """Its 95% interval, by Welch's t (the two may scatter differently)."""
        from scipy.stats import ttest_ind

        interval = ttest_ind(self.own, self.best, equal_var=False).confidence_interval()
        return float(interval.low), float(interval.high)

    def verdict(self, metric: str) -> str:
        """What that means, one sentence."""
        low, high = self.interval()
        way = "lower" if self.gain >= 0 else "higher"
        interval = f"95% interval of the gain {low:.4g} to {high:.4g}"
        found = f"{metric} is {way} by {abs(self.gain):.4g} over {len(self.best)} new seeds ({interval})"
        if low > 0:
            return f"the best settings beat the experiment's own by more than noise: {found}"
        if high < 0:
            return f"the best settings are worse than the experiment's own, so keep those: {found}"
        return f"the default is optimal within noise: with the best settings {found}"


@dataclass
class Search:
    """One search, as far as this call drives it."""

    plan: SearchPlan
    store: Store
    optuna_study: optuna.Study
    sweep: Sweep
    say: Callable[[str], None]

    def run(self, trials: int, parallel: int) -> None:
        """Go on until so many trials have ended, `parallel` at once; the first is the experiment's own recipe."""
        if not self.optuna_study.trials:
            self.optuna_study.enqueue_trial(self.plan.recipe)
        self._check_origin()
        began, before = time.monotonic(), len(self.ended)
        while (ended := len(self.ended)) < trials:
            if ended > before:
                left = (time.monotonic() - began) / (ended - before) * (trials - ended)
                self.say(f"{ended} of {trials} trials, {_best_line(self.best, self.plan)}; about {_minutes(left)} left")
            batch = self._under_way(parallel) or self._asked(min(parallel, trials - ended))
            if not batch:
                self.say(f"the space has no other settings than those of the {ended} trials")
                return
            self._batch(batch)

    def _check_origin(self) -> None:
        """Raise `ExperimentError` where a trial with a value has other settings than the space's."""
        for trial in self.ended:
            tried, space = trial.params.keys(), self.plan.distributions.keys()
            if trial.state != TrialState.FAIL and not tried == space == self.plan.inside(trial.params).keys():
                raise ExperimentError(
                    f"trial {trial.number} of {self.plan.name!r} has settings that are not of search.space: it came "
                    "from elsewhere, and its value does not compare; begin under another name: "
                    f"--set name={self.plan.experiment.name}-2"
                )

    def confirm(self) -> Confirmation | None:
        """Train the best settings and the experiment's own with further seeds.

        None where they are the same, where there are several objectives or fewer than two seeds, or where a run failed.
        """
        seeds, best = self.plan.experiment.search.seeds_to_confirm, self.best
        if best is None or best.number == 0 or len(seeds) < 2:
            return None
        listed = ", ".join(map(str, seeds))
        self.say(f"training trial {best.number} and the experiment's own settings with seeds {listed}")
        cells = {
            (number, seed): self.plan.cells(number, values, seed)[-1]
            for number, values in ((best.number, best.params), (0, self.plan.recipe))
            for seed in seeds
        }
        measured = self._train(cells)
        if len(measured) < len(cells):
            return None
        return Confirmation(*(tuple(measured[number, seed][0] for seed in seeds) for number in (best.number, 0)))

    @property
    def ended(self) -> list[FrozenTrial]:
        """Trials that are over, in whatever way."""
        return [trial for trial in self.optuna_study.get_trials(deepcopy=False) if trial.state.is_finished()]

    @property
    def best(self) -> FrozenTrial | None:
        """The best trial that was trained to its end; None: there is none, or no single objective."""
        complete = [trial for trial in self.ended if trial.state == TrialState.COMPLETE]
        return self.optuna_study.best_trial if complete and len(self.plan.metrics) == 1 else None

    def _under_way(self, most: int) -> list[Trial]:
        """Trials that an earlier call began."""
        running = self.optuna_study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [Trial(self.optuna_study, trial._trial_id) for trial in running[:most]]

    def _asked(self, number: int) -> list[Trial]:
        """New trials; those that wait already come first, such as the experiment's own recipe."""
        trials = self.optuna_study.get_trials(deepcopy=False)
        waiting = sum(trial.state == TrialState.WAITING for trial in trials)
        proposed = propose(self.plan, trials, max(0, number - waiting))
        for settings in proposed:
            self.optuna_study.enqueue_trial(settings)
        return [self.optuna_study.ask() for _ in range(min(number, waiting + len(proposed)))]

    def _settle(self, trial: Trial) -> None:
        """Give a trial a value of each setting, where an earlier call did not come that far.

        Raises:
            ExperimentError: It was enqueued with one that is not of the space.
        """
        given = self._stored(trial).system_attrs.get("fixed_params", {})
        for key, distribution in self.plan.distributions.items():
            if key in given and key not in self.plan.inside(given):
                raise ExperimentError(f"{key}: {given[key]!r:.50} is not inside search.space.{key}")
            trial._suggest(key, distribution)

    def _batch(self, trials: Sequence[Trial]) -> None:
        """Train trials up to each budget in turn; after each, those that are worse than the median end."""
        cells: dict[Trial, list[Cell]] = {}
        for trial in trials:
            try:
                self._settle(trial)
                cells[trial] = self.plan.cells(trial.number, trial.params, self.plan.experiment.search.seed)
            except ExperimentError as error:  # each value is possible, but not all together
                self._end(trial, TrialState.FAIL, str(error))
        for step in range(max(map(len, cells.values()), default=0)):
            now = {trial: own[step] for trial, own in cells.items()}
            measured = self._train(now)
            for trial, cell in now.items():
                if trial not in measured:
                    self._end(trial, TrialState.FAIL, "failed")
                elif not all(map(math.isfinite, measured[trial])):  # the sampler learns from it, not from a failure
                    self._end(trial, TrialState.PRUNED, "diverged, or its tokenizer was rejected")
                else:
                    self._tell(trial, cell, measured[trial], last=step == len(cells[trial]) - 1)
            cells = {trial: own for trial, own in cells.items() if not self._stored(trial).state.is_finished()}

    def _tell(self, trial: Trial, cell: Cell, values: Sequence[float], *, last: bool) -> None:
        found = f"{self.plan.metrics[0]} {values[0]:.4f} at {cell.budget_flops:.3g} FLOPs".replace("e+", "e")
        if len(values) == 1:
            step = round(cell.budget_flops)
            if step not in self._stored(trial).intermediate_values:  # an earlier call may have come that far
                trial.report(values[0], step)
            if not last and trial.should_prune():
                self._end(trial, TrialState.PRUNED, f"{found}, worse than the median")
                return
        if last:
            self._end(trial, TrialState.COMPLETE, found, values)

    def _end(self, trial: Trial, state: TrialState, reason: str, values: Sequence[float] | None = None) -> None:
        trial.set_user_attr("outcome", reason)
        self.optuna_study.tell(trial, values, state)
        tried = ", ".join(f"{key} {shown(value)}" for key, value in trial.params.items())
        self.say(f"trial {trial.number}: {reason}" + (f" ({tried})" if tried else ""))

    def _train(self, cells: Mapping[Key, Cell]) -> dict[Key, tuple[float, ...]]:
        """What the plan's metrics are of each cell, infinite where it is of no use; those that failed are left out.

        Raises:
            TokenizerRejected: The tokenizer that all trials share is unfit.
        """
        measured: dict[Key, tuple[float, ...]] = {}
        for study in self._studies(cells.values()):
            try:
                outcome = self.sweep(study)
            except TokenizerRejected as rejected:
                if not any(name.startswith("tokenizer.") for name in self.plan.space):
                    raise
                self.say(str(rejected))
                measured |= {key: (math.inf,) for key, cell in cells.items() if cell in study.cells}
                continue
            rows = {_identity(row): row for row in reversed(outcome.rows)}  # a cell's first row is its own
            for key, cell in cells.items():
                row = rows.get((cell.trunk.variant, cell.trunk.seed, cell.budget_flops))
                if row is not None and row.get("status") == "diverged":
                    measured[key] = (math.inf,)
                elif row is not None and all(row.get(metric) is not None for metric in self.plan.metrics):
                    measured[key] = tuple(float(row[metric]) for metric in self.plan.metrics)
        return measured

    def _studies(self, cells: Iterable[Cell]) -> list[Study]:
        """The cells by their tokenizers, of which a study has one."""
        studies: dict[str, Study] = {}
        for cell in cells:
            study = Study.of(cell.trunk.experiment, self.store, (cell,))
            earlier = studies.setdefault(study.tokenizer.fingerprint, study)
            if earlier is not study:
                studies[study.tokenizer.fingerprint] = replace(earlier, cells=(*earlier.cells, cell))
        return list(studies.values())

    def _stored(self, trial: Trial) -> FrozenTrial:
        return self.optuna_study.get_trials(deepcopy=False)[trial.number]


def _identity(row: Mapping[str, Any]) -> tuple[str, int, float]:
    return row["variant"], row["seed"], row["budget_flops"]


def _best_line(best: FrozenTrial | None, plan: SearchPlan) -> str:
    return f"best {plan.metrics[0]} {best.value:.4f} (trial {best.number})" if best is not None else "none complete"


def _minutes(seconds: float) -> str:
    return f"{max(1, round(seconds / 60))} min"
