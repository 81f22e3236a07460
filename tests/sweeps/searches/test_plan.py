"""What makes a search, and mistakes that are named before anything runs."""

from typing import Any

import optuna
import pytest
from played_search import plan
from toy_sweep import toy_experiment

from sweeps.searches.plan import SearchPlan
from varscale.config.yaml import load_experiment
from varscale.errors import ExperimentError


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


def test_a_search_without_a_section_is_of_the_rate() -> None:
    own = SearchPlan(toy_experiment())
    own.check()
    assert list(own.space) == ["optim.lr"]
    assert own.budgets == (2e7,)
    assert own.distributions["optim.lr"] == optuna.distributions.FloatDistribution(5e-3 / 8, 5e-3 * 8, log=True)
