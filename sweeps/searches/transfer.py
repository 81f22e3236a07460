"""`varscale tune --transfer`: the same rates at several sizes, under several parametrizations.

Optuna keeps the trials, so that its dashboard shows them, but proposes none: they are a fixed grid. One size after the
other is trained by a sweep of its own.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from sweeps.grid import check_lengths
from sweeps.searches.plan import RATE, shown
from sweeps.searches.search import Sweep
from sweeps.searches.transfer_fit import Transfer, Valley, fit_transfer, fit_valley
from sweeps.study import Study
from varscale.config import Experiment
from varscale.config.search import TransferConfig
from varscale.config.section import PARAMETRIZATIONS
from varscale.config.yaml import changed
from varscale.errors import ExperimentError
from varscale.store.fingerprint import fingerprint
from varscale.store.layout import Store
from varscale.training.cells import Cell, Trunk

PARAMETRIZATION, DEPTH, SEED = "model.parametrization", "depth", "seed"


@dataclass(frozen=True)
class TransferPlan:
    """What is trained: parametrizations × sizes × rates × seeds, all for the same number of steps."""

    experiment: Experiment

    metrics = ("loss",)

    @property
    def name(self) -> str:
        """Of the study that the cells are of, and Optuna's."""
        return f"{self.experiment.name}-transfer"

    @property
    def settings(self) -> TransferConfig:
        """The experiment's."""
        return self.experiment.search.transfer

    @property
    def depths(self) -> tuple[int, ...]:
        """Sizes, rising."""
        return tuple(sorted(self.settings.depths or self.experiment.grid.depths))

    @property
    def rates(self) -> tuple[float, ...]:
        """Base rates, rising: the centre, to six digits, times powers of √2, so that a wider grid has the same ones."""
        centre, count = self.settings.centre or self.experiment.optim.lr, self.settings.rates
        return tuple(float(f"{centre * 2 ** ((place - count // 2) / 2):.6g}") for place in range(count))

    @property
    def trials(self) -> tuple[dict[str, Any], ...]:
        """Values of every trial, size by size."""
        return tuple(
            {PARAMETRIZATION: parametrization, DEPTH: depth, RATE: rate, SEED: seed}
            for depth in self.depths
            for parametrization in self.settings.parametrizations
            for rate in self.rates
            for seed in self.settings.seeds
        )

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """What is varied, as Optuna calls it; choices may not change from call to call, ranges may."""
        seeds = self.settings.seeds
        return {
            PARAMETRIZATION: CategoricalDistribution(PARAMETRIZATIONS),
            DEPTH: IntDistribution(self.depths[0], self.depths[-1]),
            RATE: FloatDistribution(self.rates[0], self.rates[-1], log=True),
            SEED: IntDistribution(min(seeds), max(seeds)),
        }

    @cached_property
    def fingerprint(self) -> str:
        """Identity of what all trials have in common; which of them there are may grow, but none below the base."""
        kept = self.experiment.model_dump(mode="json", include={"data", "tokenizer", "model", "optim"})
        del kept["optim"]["lr"]
        return fingerprint(kind="transfer", **kept, steps=self.settings.steps, base=self._base_size)

    def check(self) -> None:
        """Raise `ExperimentError` where a size, a parametrization or a length can't be; names the setting."""
        if len(self.depths) < 2:
            raise ExperimentError("search.transfer.depths: one size; rates carry over from one to another")
        model = self.experiment.model
        if "parametrization" not in type(model).model_fields and self.settings.parametrizations != ("paper",):
            raise ExperimentError(
                f"search.transfer.parametrizations: models of family {model.family} have the paper's alone; set it to "
                "[paper]"
            )
        check_lengths([self.cell(values) for values in self.trials], 1)

    def cell(self, values: Mapping[str, Any]) -> Cell:
        """What a trial trains."""
        parametrization, depth = values[PARAMETRIZATION], values[DEPTH]
        settings = {RATE: values[RATE], **self._scaled(parametrization)}
        experiment = changed(self.base, settings, f"search.transfer: {parametrization}")
        variant = f"{parametrization}-{shown(values[RATE])}"
        of_image = Trunk(experiment, depth, values[SEED], 1.0, variant).flops_per_image
        budget = float(self.settings.steps * experiment.optim.batch_size * of_image)
        return Trunk(experiment, depth, values[SEED], budget, variant).cell(budget)

    @cached_property
    def base(self) -> Experiment:
        """Without what these cells have no use for."""
        settings = {"name": self.name, "grid.variants": [], "evaluation.samples_per_class": 0}
        return changed(self.experiment, {**settings, "evaluation.fidelity": None}, "search.transfer")

    def _scaled(self, parametrization: str) -> dict[str, Any]:
        """The model's settings under a parametrization; families that know only the paper's have none."""
        if parametrization == getattr(self.experiment.model, "parametrization", "paper"):
            return {}
        fields = {"parametrization": parametrization, **self._base_size}
        return {f"model.{name}": value for name, value in fields.items()}

    @cached_property
    def _base_size(self) -> dict[str, Any]:
        """Where parametrizations are scaled from: the smallest of the sizes, unless the model says otherwise."""
        own = self.experiment.model.model_dump(mode="json")
        smallest = Trunk(self.base, self.depths[0], 0, 1.0).model
        base = {"base_width": smallest.columns().get("width"), "base_depth": smallest.depth}
        return {name: own.get(name, value) for name, value in base.items()}


@dataclass
class TransferRun:
    """The trials, as far as this call drives them."""

    plan: TransferPlan
    store: Store
    optuna_study: optuna.Study
    sweep: Sweep
    say: Callable[[str], None]

    def run(self) -> None:
        """Train what is left, the smallest size first. What failed in an earlier call is tried again."""
        there = {
            _point(trial) for trial in self.optuna_study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL
        }
        for values in self.plan.trials:
            if frozenset(values.items()) not in there:
                self.optuna_study.enqueue_trial(values)
        for depth in self.plan.depths:
            trials = self._left(depth)
            if trials:
                self.say(f"depth {depth}: {len(trials)} of {len(self.plan.trials)} trials")
                self._train(trials)

    def valleys(self) -> dict[str, dict[int, Valley]]:
        """Of each parametrization, the parabola at each size, of all rates that this call or an earlier one tried.

        Raises:
            ExperimentError: Too many runs of a size failed or diverged.
        """
        runs: dict[tuple[str, int], dict[tuple[float, int], float]] = {}
        for trial in self.optuna_study.get_trials(deepcopy=False):
            if trial.state.is_finished():
                values = dict(_point(trial))
                if values.keys() != self.plan.distributions.keys():
                    continue  # of somebody else's
                own = runs.setdefault((values[PARAMETRIZATION], values[DEPTH]), {})
                if trial.value is not None:
                    own[values[RATE], values[SEED]] = trial.value
                else:  # diverged; or failed, unless another try did not
                    own.setdefault((values[RATE], values[SEED]), math.inf)
        found: dict[str, dict[int, Valley]] = {}
        for parametrization in self.plan.settings.parametrizations:
            for depth in self.plan.depths:
                own = runs.get((parametrization, depth), {})
                points = [
                    (math.log2(rate), own.get((rate, seed), math.inf), seed)
                    for rate in sorted({rate for rate, _ in own})
                    for seed in self.plan.settings.seeds
                ]
                try:
                    valley = fit_valley(*zip(*points, strict=True))
                except ValueError as error:
                    raise ExperimentError(f"{parametrization}, depth {depth}: {error}") from None
                found.setdefault(parametrization, {})[depth] = valley
        return found

    def _left(self, depth: int) -> list[Trial]:
        """A size's trials that wait, or were under way when an earlier call ended, begun."""
        wanted = {frozenset(values.items()) for values in self.plan.trials if values[DEPTH] == depth}
        study, states = self.optuna_study, (TrialState.RUNNING, TrialState.WAITING)
        left = study.get_trials(deepcopy=False, states=states)
        return [self._begun(trial) for trial in left if _point(trial) in wanted]

    def _begun(self, trial: FrozenTrial) -> Trial:
        """A certain trial as `ask` gives the first one that waits."""
        if trial.state == TrialState.WAITING:
            self.optuna_study._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        begun = Trial(self.optuna_study, trial._trial_id)
        for name, distribution in self.plan.distributions.items():
            begun._suggest(name, distribution)
        return begun

    def _train(self, trials: list[Trial]) -> None:
        """A model that two parametrizations have in common, as at the base, is trained once."""
        cells = {trial: self.plan.cell(trial.params) for trial in trials}
        empty = Study.of(self.plan.base, self.store, ())
        unique = {empty.cell_files(cell).folder: cell for cell in reversed(cells.values())}
        self.sweep(Study.of(self.plan.base, self.store, tuple(unique.values())))
        for trial, cell in cells.items():
            result = empty.result(cell)
            loss = None if result is None or result.status == "diverged" else float(result.metrics["loss"])
            state = TrialState.FAIL if result is None else TrialState.PRUNED if loss is None else TrialState.COMPLETE
            trial.set_user_attr("outcome", "failed" if result is None else result.status)
            self.optuna_study.tell(trial, loss, state)


def _point(trial: FrozenTrial) -> frozenset[tuple[str, Any]]:
    """The values of a trial, whether it waits or has begun."""
    return frozenset({**trial.system_attrs.get("fixed_params", {}), **trial.params}.items())


def transfers(valleys: Mapping[str, Mapping[int, Valley]]) -> dict[str, Transfer]:
    """What sizes do under each parametrization; a doubling of size is one of the depth."""
    return {
        name: fit_transfer({math.log2(depth): valley for depth, valley in own.items()}) for name, own in valleys.items()
    }
