"""What a search trains: each trial's cells, from the values that it tries. Pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from sweeps.grid import check_lengths
from varscale.config import Experiment
from varscale.config.search import SearchChoices, SearchRange
from varscale.config.section import Section
from varscale.config.yaml import changed
from varscale.errors import ExperimentError
from varscale.store.fingerprint import fingerprint
from varscale.training.cells import Cell, Trunk

SECTIONS = ("optim.", "model.", "tokenizer.")
DEPTH, BUDGET = "depth", "budget"
RATE, REACH = "optim.lr", 8.0
"""What is searched where nothing is said, and the factor to both sides."""

Dimension = SearchRange | SearchChoices


@dataclass(frozen=True)
class SearchPlan:
    """What the trials of an experiment's search are."""

    experiment: Experiment

    @property
    def name(self) -> str:
        """Of the search, and of the study that its trials are cells of."""
        return f"{self.experiment.name}-search"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Columns of the runs table that are minimised."""
        objective = self.experiment.search.objective
        return ("loss", "train_flops") if objective == "loss-and-flops" else (objective,)

    @property
    def budgets(self) -> tuple[float, ...]:
        """Training FLOPs at which trials are compared."""
        return self.experiment.search.budgets or (min(self.experiment.grid.budgets),)

    @cached_property
    def space(self) -> dict[str, Dimension]:
        """What is varied, of the trials' own budgets too where loss is weighed against FLOPs."""
        own = dict(self.experiment.search.space)
        if not own:
            rate = self.experiment.optim.lr
            own = {RATE: SearchRange(low=rate / REACH, high=rate * REACH, log=True)}
        if len(self.metrics) > 1 and len(self.budgets) > 1:
            own[BUDGET] = SearchChoices(choices=self.budgets)
        return own

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The same, as Optuna calls it."""
        own = self._own_values
        return {key: _distribution(dimension, own[key]) for key, dimension in self.space.items()}

    @property
    def recipe(self) -> dict[str, Any]:
        """The experiment's own values, which are the first trial."""
        return {key: _encoded(value) for key, value in self._own_values.items()}

    @cached_property
    def fingerprint(self) -> str:
        """Identity of what all trials have in common, and of the space: trials of another don't belong together."""
        search = self.experiment.search
        kept = self.experiment.model_dump(mode="json", include={"data", "tokenizer", "model", "optim"})
        own = search.model_dump(mode="json", include={"objective", "depth", "budgets", "space", "seed"})
        fidelity = self.experiment.evaluation.fidelity if self.metrics[0] in ("fid", "mind") else None
        return fingerprint(
            kind="search",
            **kept,
            search=own,
            smallest_budget=min(self.experiment.grid.budgets),
            fidelity=fidelity.model_dump(mode="json") if fidelity else None,
        )

    def check(self) -> None:
        """Whether every setting exists, every end of a range is possible, and the recipe lies inside.

        Raises:
            ExperimentError: Not so; names the setting.
        """
        search = self.experiment.search
        units: dict[str, str] = {}
        (own_cell, *_) = self.cells(0, self.recipe, search.seed)
        for key, dimension in self.space.items():
            place = f"search.space.{key}"
            if not key.startswith(SECTIONS) and key != DEPTH and (key != BUDGET or key in search.space):
                raise ExperimentError(f"{place}: only fields of optim, model and tokenizer, and depth, can be varied")
            if key.startswith("tokenizer.") and self.metrics[0] == "loss":
                raise ExperimentError(
                    f"{place}: losses of different tokens don't compare; set search.objective to fid or mind"
                )
            for value in dimension.ends():
                if key == DEPTH:
                    self._changed({"search.depth": value}, place)
                    if type(value) is not int:
                        raise ExperimentError(f"{place}: expected whole numbers, such as 12, got {value}")
                self._changed({key: _encoded(value)}, place)
                try:
                    (tried, *_) = self.cells(0, {**self.recipe, key: _encoded(value)}, search.seed)
                except ExperimentError as error:
                    raise ExperimentError(f"{place}: {value}: {error}") from None
                units[tried.trunk.model.loss_unit] = place
            if key not in self.inside(self.recipe):
                own = self._own_values[key]
                raise ExperimentError(f"{place}: the experiment's own {own} is not inside, and it is the first trial")
        if self.metrics[0] in ("fid", "mind") and self.experiment.evaluation.fidelity is None:
            raise ExperimentError(
                f"search.objective: {search.objective}, but nothing measures it; set evaluation.fidelity, such as "
                f"--set evaluation.fidelity.samples=2048"
            )
        others = units.keys() - {own_cell.trunk.model.loss_unit}
        if self.metrics[0] == "loss" and others:
            raise ExperimentError(
                f"{units[min(others)]}: losses in {own_cell.trunk.model.loss_unit} and in {min(others)} don't compare; "
                "set search.objective to fid or mind"
            )

    def inside(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the values that are of the space."""
        return {key: values[key] for key in self.distributions.keys() & values if self._contains(key, values[key])}

    def cells(self, number: int, values: Mapping[str, Any], seed: int) -> list[Cell]:
        """The cells of a trial, at rising budgets; they share a trunk.

        Raises:
            ExperimentError: The values make no model, or too short a run.
        """
        experiment = self._changed(values, f"trial {number}")
        depth = values.get(DEPTH, self._depth)
        tried = tuple((key, value) for key, value in values.items() if key not in (DEPTH, BUDGET))
        trunk = Trunk(experiment, depth, seed, min(self.experiment.grid.budgets), f"trial-{number}", tried)
        cells = [trunk.cell(budget) for budget in ([values[BUDGET]] if BUDGET in values else self.budgets)]
        check_lengths(
            cells, experiment.grid.min_steps, "search.budgets" if self.experiment.search.budgets else "grid.budgets"
        )
        return cells

    def best_settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Sections with the values in them, as an experiment states them that extends the searched one."""
        stated: dict[str, Any] = {}
        for key, value in values.items():
            if key == BUDGET:
                continue
            section, _, field = ("grid", "", "depths") if key == DEPTH else key.partition(".")
            target = stated.setdefault(section, {})
            *above, last = field.split(".")
            for part in above:
                target = target.setdefault(part, {})
            target[last] = [value] if key == DEPTH else _decoded(value)
        return stated

    def _contains(self, key: str, value: Any) -> bool:
        distribution = self.distributions[key]
        try:
            return bool(distribution._contains(distribution.to_internal_repr(value)))
        except ValueError:  # no number, none of the choices, or below the least factor
            return False

    @property
    def _depth(self) -> int:
        return self.experiment.search.depth or min(self.experiment.grid.depths)

    @cached_property
    def _base(self) -> Experiment:
        """Without what trials have no use for: variants, pictures, and measures of images that decide nothing."""
        settings: dict[str, Any] = {"name": self.name, "grid.variants": [], "evaluation.samples_per_class": 0}
        if self.metrics[0] in ("loss",):
            settings["evaluation.fidelity"] = None
        return changed(self.experiment, settings, "search")

    def _changed(self, values: Mapping[str, Any], source: str) -> Experiment:
        settings = {key: _decoded(value) for key, value in values.items() if key not in (DEPTH, BUDGET)}
        return changed(self._base, settings, source)

    @cached_property
    def _own_values(self) -> dict[str, Any]:
        """The experiment's own value of each setting that is varied."""
        found: dict[str, Any] = {}
        for key in self.space:
            if key in (DEPTH, BUDGET):
                found[key] = self._depth if key == DEPTH else self.budgets[-1]
                continue
            value: Any = self.experiment
            for part in key.split("."):
                if not isinstance(value, Section) or part not in type(value).model_fields:
                    first = _encoded(self.space[key].ends()[0])
                    self._changed({key: first}, f"search.space.{key}")  # names the nearest setting
                    raise ExperimentError(f"search.space.{key}: no such setting")
                value = getattr(value, part)
            found[key] = value.model_dump(mode="json") if isinstance(value, Section) else value
        return found


def shown(value: Any) -> str:
    """A tried value, for people."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _distribution(dimension: Dimension, own: Any) -> BaseDistribution:
    if isinstance(dimension, SearchChoices):
        return CategoricalDistribution([_encoded(choice) for choice in dimension.choices])
    if isinstance(own, int) and not isinstance(own, bool):
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(float(dimension.low), float(dimension.high), log=dimension.log)


def _encoded(value: Any) -> Any:
    """As Optuna keeps it: lists are texts."""
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value


def _decoded(value: Any) -> Any:
    if not isinstance(value, str) or value[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except ValueError:  # a text that begins so
        return value
