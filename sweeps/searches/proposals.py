"""Which settings a search tries next.

Optuna's Gaussian process learns only from trials that were trained to their end, and from a sampler that begins anew in
each call would come what it proposed before. So proposals are asked of a study in memory, made of what is known of all
trials: one that was pruned counts with the value that it would probably have reached, one that diverged with the worst.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from sweeps.searches.plan import SearchPlan

FIRST_BY_CHANCE = 6
"""Trials before the Gaussian process or Parzen's estimators propose any."""
_ASKED, _DRAWN = 3, 500


def propose(plan: SearchPlan, trials: Sequence[FrozenTrial], number: int) -> list[dict[str, Any]]:
    """Settings of the next trials.

    Args:
        plan: The search.
        trials: Those that there are, in any state.
        number: How many are proposed, to be trained at once; they keep apart from each other and from running ones.

    Returns:
        Settings that no trial has; fewer where the space has no more.
    """
    known = optuna.create_study(sampler=_sampler(plan, len(trials)), directions=["minimize"] * len(plan.metrics))
    values, proposed = learnt_values(trials), list[dict[str, Any]]()
    for trial in trials:
        if trial.number in values:
            known.add_trial(
                optuna.trial.create_trial(
                    params=trial.params, distributions=plan.distributions, values=values[trial.number]
                )
            )
        elif not trial.state.is_finished():
            known.enqueue_trial(plan.inside({**trial.system_attrs.get("fixed_params", {}), **trial.params}))
            known.ask(plan.distributions)
    tried = [trial.params for trial in (*trials, *known.get_trials(deepcopy=False))]
    for _ in range(number):
        new = next((settings for settings in _candidates(plan, known) if settings not in tried), None)
        if new is None:
            break
        tried.append(new)
        proposed.append(new)
    return proposed


def _candidates(plan: SearchPlan, known: optuna.Study) -> Iterator[dict[str, Any]]:
    """What the sampler says, and if it insists on what was tried, as it may where there are choices only, chance."""
    for _ in range(_ASKED):
        yield known.ask(plan.distributions).params
    chance = optuna.create_study(sampler=RandomSampler(len(known.trials)))
    for _ in range(_DRAWN):
        yield chance.ask(plan.distributions).params


def learnt_values(trials: Sequence[FrozenTrial]) -> dict[int, list[float]]:
    """What each trial, by its number, is taken to be worth; none for those that failed or run."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    values = {trial.number: list(trial.values) for trial in complete}
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    for trial in pruned:
        if trial.intermediate_values:
            budget, reached = max(trial.intermediate_values.items())
            changes = [
                other.values[0] - other.intermediate_values[budget]
                for other in complete
                if budget in other.intermediate_values
            ]
            values[trial.number] = [reached + (float(np.median(changes)) if changes else 0.0)]
    if values:
        worst = np.max(list(values.values()), axis=0).tolist()
        values |= {trial.number: worst for trial in pruned if trial.number not in values}
    return values


def _sampler(plan: SearchPlan, trials: int) -> BaseSampler:
    """The search's, with a seed of its own for each number of trials: the same one would repeat its proposals."""
    search = plan.experiment.search
    seed = int(np.random.SeedSequence((search.seed, trials)).generate_state(1)[0])
    if search.sampler == "random":
        return RandomSampler(seed)
    if search.sampler == "tpe":
        return TPESampler(seed=seed, n_startup_trials=FIRST_BY_CHANCE)
    return GPSampler(seed=seed, n_startup_trials=FIRST_BY_CHANCE)
