"""All laws, by id. The ids and the names of the parameters stand in laws.json, and stay."""

import itertools
from collections.abc import Sequence

from analysis.fitting.laws.base import Law
from analysis.fitting.laws.broken_power import BrokenPower
from analysis.fitting.laws.data_constrained import DataConstrained, ExcessParameters
from analysis.fitting.laws.multi_power import MultiPower
from analysis.fitting.laws.of_losses import OfLoss
from analysis.fitting.laws.power_sums import Term, power_sum
from analysis.tables.annealing import RATE_LEFT, RATE_SCHEDULE, RATE_SUM

_E, _A, _RISING = Term("E"), Term("A", "alpha"), Term("A", "alpha", sign=1.0)
_X, _N_AND_D = ("x",), ("params", "tokens")

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        power_sum("power", "A·x^-α", _X, _A, legend="power, {power}"),
        power_sum("rising-power", "A·x^α", _X, _RISING, legend="power, {power}"),
        power_sum("power-offset", "E + A·x^-α", _X, _E, _A, legend="{E} + A·{power}"),
        power_sum("chinchilla", "E + A·N^-α + B·D^-β", _N_AND_D, _E, _A, Term("B", "beta", 1)),
        power_sum("chinchilla-tied", "E + A·N^-α + B·D^-α", _N_AND_D, _E, _A, Term("B", "alpha", 1)),
        power_sum(  # Abnar et al. 2025 (arXiv 2501.12370): X = 1 - S, S the share of experts that are not used
            *("sparse-mixture", "E + A·N^-α + B·D^-β + C·X^λ + F·X^-δ·N^-γ", ("params", "active_share", "tokens")),
            *(_E, _A, Term("B", "beta", 2)),
            *(Term("C", "lambda", 1, sign=1.0), Term("F", "delta", 1, times=(("gamma", 0),))),
        ),
        BrokenPower(
            *("broken-power", "A·x^-α·(1 + x/B)^(α-β)", _X, ("A", "B", "alpha", "beta")),
            legend="broken, {power} bending at {B}",
        ),
        power_sum("power-logit", "odds y/(1-y) = A·x^-α", _X, _A, link="logit", legend="odds, {power}"),
        power_sum("power-floor", "E + A·x^-α, E ≥ 0", _X, _E, _A, legend="{E} + A·{power}"),
        DataConstrained(
            "data-constrained",
            "E + A·N^-α + B·D'^-β, D' = U·(1 + R·(1 - e^(-(D/U-1)/R)))",
            (*_N_AND_D, "epochs"),
            ("E", "A", "B", "R", "alpha", "beta"),
            ratios=(("epochs", "tokens", "unique_tokens"),),
        ),
        ExcessParameters(
            "data-constrained-excess",
            "E + A·N'^-α + B·D'^-β, D' = U·(1 + R·(1 - e^(-(D/U-1)/R))), "
            "N' = V·(1 + R_N·(1 - e^(-(N/V-1)/R_N))) of N > V, α·A·V^-α = β·B·U^-β",
            (*_N_AND_D, "epochs"),
            ("E", "A", "B", "R", "R_N", "alpha", "beta"),
            ratios=(("epochs", "tokens", "unique_tokens"),),
        ),
        power_sum(  # Tissue et al. 2024, in the form that `tables.annealing` explains
            *(
                "annealing",
                "E + A·S^-α + C·R, S the sum of rates, R their area left to anneal",
                ("rate_left", "rate_sum"),
            ),
            *(_E, Term("A", "alpha", 1), Term("C", input=0, fixed=1.0)),
        ),
        MultiPower(
            "multi-power",
            "E + A·S^-α + B·(rate + Σ_k drop_k·(1 + C·rate_k^-γ·S_k)^-β), S the sum of rates, S_k that since drop k",
            ("rate_schedule", "rate_sum"),
            ("E", "A", "B", "C", "alpha", "beta", "gamma"),
        ),
        OfLoss("loss-to-error", "A·(1 - e^(-k·(x-x0)))", _X, ("A", "x0", "k")),
        OfLoss("loss-to-error-sigmoid", "E + A/(1 + e^(-k·(x-x0)))", _X, ("E", "A", "x0", "k"), form="logistic"),
        OfLoss("loss-to-loss", "E + A·(x-x0)^α", _X, ("E", "A", "x0", "alpha"), form="power"),
    )
}


def columns_taken(laws: Sequence[str]) -> list[str]:
    """The columns that each of these laws takes, or that its inputs follow from; sums of rates if one takes them."""
    each = [{*LAWS[name].inputs, *(below for _, _, below in LAWS[name].ratios)} for name in laws]
    of_rates = {RATE_SUM, RATE_LEFT, RATE_SCHEDULE}.intersection(itertools.chain(*each))
    return sorted(set.intersection(*each) | of_rates) if each else []
