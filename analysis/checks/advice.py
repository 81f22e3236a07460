"""Which cells to train next: what they would tell of a prediction, or of a budget's best size, before they are trained.

`design` searches among what `candidates` has; here are the laws, and what is known of their parameters. Letters: S
parameter vectors, K candidates, P parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.checks.candidates import COLUMNS, Trunks, check_columns, plain_grids, untrained
from analysis.checks.design import Beliefs, design, log_ratio
from analysis.checks.forecast import ASSUMED_NOISE
from analysis.checks.requests import BOUNDS, parse_point
from analysis.checks.warnings import outlying
from analysis.errors import FitRefused, TableError
from analysis.fitting.bootstrap import resample
from analysis.fitting.fit import Fit, fit
from analysis.fitting.intervals import Uncertainty, from_draws, predict, t_quantile
from analysis.fitting.laws.base import OFFSET, Array, Problem, is_exponent
from analysis.fitting.laws.registry import LAWS
from analysis.fitting.newton import Objective
from analysis.grids.flops_per_token import FlopsPerToken
from analysis.grids.frontier import seed_noise
from analysis.grids.parametric import from_law, minimise_over_sizes
from analysis.options import DEFAULT_TARGETS
from analysis.tables.repeats import seeds_of_cells

LAWS_AVERAGED = ("chinchilla", "chinchilla-tied")
"""The first one's interval is announced; the design has to serve both."""
PUBLISHED = {"E": 0.72, "A": 0.14, "B": 0.14, "alpha": 0.348, "beta": 0.366}
"""Exponents of Chinchilla's points (Besiroglu et al. 2024), and what the three terms are of the loss at 1e9 parameters
and 2e10 tokens: the prior where there are no runs, taken at the middle of the candidates."""
_SPREAD = {OFFSET: 0.5, "coefficient": 1.0, "exponent": 0.15}
"""Standard deviations of the prior: of logarithms of E and of the coefficients at the middle, and of exponents."""
PRIOR_EXPONENTS = 0.05, 2.0
"""That a prior can have. Those drawn around them are no lower, either."""
LOSSES = ("loss", "loss_last_scale")
"""A sweep's columns that the prior is of."""
_RISES = 0.3
"""Correlation of logarithms from which a target rises with compute."""
_THETAS = 8
_DRAWS = 400


@dataclass(frozen=True)
class Question:
    """What is to be known better: the value at a compute's best size, the value at a point, or the best size.

    Attributes:
        flops: the compute.
        size: whether it is the best size that is asked for.
        point: parameters and tokens, where the value at a point of them is asked for.
    """

    flops: float = 0.0
    size: bool = False
    point: tuple[float, float] | None = None


@dataclass(frozen=True)
class Plain:
    """A grid of the same compute (`candidates.plain_grids`), and the width that it promises."""

    cells: pd.DataFrame
    flops: float
    width: float


@dataclass(frozen=True)
class Advice:
    """Which cells to train, and what is expected of them.

    Widths are the 95% interval's upper over its lower end, minus one.

    Attributes:
        question: what is to be known better.
        value: the prediction, or the best size, as the runs have it now; None where the prior takes a fit's place,
            since there are too few runs for a law.
        runs: how many there are.
        width: of its interval now.
        cells: the candidates chosen, in order of use.
        flops: what they cost.
        expected: the width expected with them.
        plain: the plain grid, where one can be afforded.
        noise: standard deviation of a run's logarithm that this rests on.
        laws: averaged over.
        odd: which of the runs lie far above the law, and so widen its intervals; nothing: none.
    """

    question: Question
    value: float | None
    runs: int
    width: float
    cells: pd.DataFrame
    flops: float
    expected: float
    plain: Plain | None
    noise: float
    laws: tuple[str, ...]
    odd: str = ""


@dataclass(frozen=True)
class _Known:
    """A law, θ that may be true, and what runs and prior say of it."""

    fitted: Fit
    theta_SP: Array
    uncertainty: Uncertainty | None = None


def advise(
    rows: pd.DataFrame,
    target: str,
    candidates: pd.DataFrame,
    question: Question,
    spend: float,
    *,
    trunks: Trunks | None = None,
    prior: Mapping[str, float] | None = None,
) -> Advice:
    """The candidates that narrow the interval of what is asked for most, within compute.

    Args:
        rows: the runs, with params, tokens, flops and the target; may be empty.
        target: the column.
        candidates: what could be trained, with params, tokens and flops; those that are in `rows` are left out.
        question: what is to be known better.
        spend: FLOPs.
        trunks: what the cells of one size share; None: nothing.
        prior: exponents instead of the published ones, for too few runs.

    Raises:
        TableError: no candidate can be afforded, none tells anything, or the target is none that a law could be of.
    """
    check_columns(rows)
    candidates = untrained(candidates, rows)
    rows = rows[rows[target].notna()]
    if len(rows) > 3 and np.log(rows[target]).corr(np.log(rows["flops"])) > _RISES:
        raise TableError(f"--target {target}: it rises with compute; advice is for what falls, such as loss or error")
    if not len(candidates):
        raise TableError(f"--spend {spend:g}: there is no further cell to train for it")
    known = _laws(rows, target)
    if not known and target not in LOSSES and (target in DEFAULT_TARGETS or not len(rows)):
        few = f"{len(rows)} runs are too few for a law of it" if len(rows) else "there are no runs yet"
        raise TableError(f"--target {target}: {few}, and what is assumed instead is one of {' or '.join(LOSSES)}")
    known = known or [_prior(candidates, prior or {})]
    per_token = FlopsPerToken(pd.concat([rows[COLUMNS], candidates[COLUMNS]]).astype(float))
    noise = _noise(rows, target, known[0].uncertainty)
    start = [_beliefs(each, rows, candidates, question, per_token, noise) for each in known]
    trunks = trunks or Trunks()
    compute = trunks.compute(candidates)
    if (cheapest := compute.added([]).min()) > spend:
        raise TableError(f"--spend {spend:g}: no cell can be trained for it; the cheapest takes {cheapest:.3g} FLOPs")
    chosen = design(start, compute, spend)
    if not chosen:
        raise TableError(f"--spend {spend:g}: no cell within it narrows the interval")
    value, width = _now(known[0], rows, question, per_token, start[0])
    cells = candidates.iloc[chosen].reset_index(drop=True)

    def expected(frame: pd.DataFrame, places: Sequence[int]) -> float:
        beliefs = [_beliefs(each, rows, frame, question, per_token, noise) for each in known]
        ratio = np.exp(0.5 * log_ratio(beliefs, places))
        if known[0].uncertainty is not None:
            degrees = known[0].uncertainty.degrees_of_freedom
            ratio *= t_quantile(degrees + len(places)) / t_quantile(degrees)
        return float(np.expm1(np.log1p(width) * ratio))

    plain = [
        Plain(grid, flops, expected(grid, range(len(grid))))
        for grid, flops in plain_grids(rows, candidates, spend, trunks)
    ]
    return Advice(
        question=question,
        value=value,
        runs=len(rows),
        width=width,
        cells=cells,
        flops=compute.of(chosen),
        expected=expected(candidates, chosen),
        plain=min(plain, key=lambda each: each.width, default=None),
        noise=noise,
        laws=tuple(each.fitted.law.name for each in known),
        odd=outlying(known[0].fitted, rows) if value is not None else "",
    )


def question_of(predict: str | None, budget: float | None) -> Question:
    """What `--predict` or `--budget` asks for.

    Raises:
        TableError: neither compute nor a point of parameters and tokens.
    """
    if budget is not None:
        return Question(positive("--budget", budget), size=True)
    point = parse_point(str(predict))
    if set(point) == {"flops"}:
        return Question(positive("--predict flops", point["flops"]))
    if set(point) != {"params", "tokens"}:
        raise TableError(
            f"--predict {predict}: advice is for a compute, flops=1e21, or a point, params=1e9,tokens=2e10"
        )
    return Question(point=(point["params"], point["tokens"]))


def positive(option: str, flops: float) -> float:
    """The FLOPs of an option, which are to be above 0, and no more than laws can reckon with."""
    least, most = BOUNDS["--budget"]
    if not least <= flops <= most:
        raise TableError(f"{option} {flops:g}: expected FLOPs above 0 and up to {most:g}, such as 1e21")
    return flops


def _laws(rows: pd.DataFrame, target: str) -> list[_Known]:
    """The laws that can be fitted to the runs, with θ drawn."""
    found = []
    for name in LAWS_AVERAGED:
        inputs = tuple(rows[each].to_numpy(dtype=float) for each in LAWS[name].inputs)
        try:
            fitted = fit(name, inputs, rows[target].to_numpy(dtype=float), few_starts=True)
        except FitRefused:
            continue
        draws = resample(fitted, _DRAWS, seed=0, repeats=seeds_of_cells(rows, LAWS[name].inputs))
        theta_SP = np.vstack([fitted.theta_P, draws.theta_SP[: _THETAS - 1]])
        found.append(_Known(fitted, theta_SP, from_draws(fitted, draws)))
    return found


def _prior(candidates: pd.DataFrame, changed: Mapping[str, float]) -> _Known:
    """Chinchilla's law with the published exponents, its terms' shares those of the middle of the candidates."""
    law = LAWS[LAWS_AVERAGED[0]]
    problem = Problem.of(law, tuple(candidates[each].to_numpy(dtype=float) for each in law.inputs))
    values = {**PUBLISHED, **changed}
    theta_P = np.array([values[name] if is_exponent(name) else np.log(values[name]) for name in problem.free])
    steps_SP = np.random.default_rng(0).standard_normal((_THETAS, len(theta_P))) * 0.5 * _prior_spread(problem)
    steps_SP[0] = 0.0
    theta_SP = theta_P + steps_SP
    for place, name in enumerate(problem.free):
        if is_exponent(name):
            theta_SP[:, place] = np.maximum(theta_SP[:, place], PRIOR_EXPONENTS[0])
    parameters = dict(zip(law.parameters, problem.natural(theta_P[None])[0].tolist(), strict=True))
    nothing = np.empty(0)
    return _Known(Fit(law, Objective(), 0.0, parameters, theta_P, problem, nothing, nothing, 0, 0), theta_SP)


def _prior_spread(problem: Problem) -> Array:
    kinds = ("exponent" if is_exponent(name) else OFFSET if name == OFFSET else "coefficient" for name in problem.free)
    return np.array([_SPREAD[kind] for kind in kinds])


def _noise(rows: pd.DataFrame, target: str, uncertainty: Uncertainty | None) -> float:
    """Of a run's logarithm: what seeds or residuals say, the larger one."""
    seeds = seed_noise(rows, target) if len(rows) else None
    residuals = ASSUMED_NOISE.relative if uncertainty is None else uncertainty.scatter
    return max(residuals, seeds.relative if seeds is not None else 0.0, 1e-6)


def _beliefs(
    known: _Known,
    rows: pd.DataFrame,
    candidates: pd.DataFrame,
    question: Question,
    per_token: FlopsPerToken,
    noise: float,
) -> Beliefs:
    """What runs and prior say of the question, and what each candidate would."""
    gradient_SP = _gradient(known, rows if len(rows) else candidates, question, per_token)
    prior_P = 1 / _prior_spread(known.fitted.problem) ** 2
    precision_SPP = np.broadcast_to(np.diag(prior_P), (len(known.theta_SP), len(prior_P), len(prior_P)))
    if len(rows):
        jacobian_SnP = _jacobian(known, rows) / noise
        precision_SPP = precision_SPP + np.einsum("snp,snq->spq", jacobian_SnP, jacobian_SnP)
    return Beliefs(gradient_SP, np.asarray(np.linalg.inv(precision_SPP)), _jacobian(known, candidates) / noise)


def _jacobian(known: _Known, frame: pd.DataFrame) -> Array:
    problem = known.fitted.at(*(frame[each].to_numpy(dtype=float) for each in known.fitted.law.inputs))
    return problem.jacobian(known.theta_SP, problem.evaluate(known.theta_SP)[1])


def _gradient(known: _Known, rows: pd.DataFrame, question: Question, per_token: FlopsPerToken) -> Array:
    """∂/∂θ of the logarithm of the value, or of the best size, at each θ.

    A best size that moves with θ doesn't change the value there to first order.
    """
    fitted, theta_SP = known.fitted, known.theta_SP
    if question.size:
        step, columns = 1e-2, []
        for place in range(theta_SP.shape[1]):
            shift_P = step * np.eye(theta_SP.shape[1])[place]
            ends = (
                np.log(minimise_over_sizes(fitted, theta_SP + sign * shift_P, rows, per_token, question.flops)[0])
                for sign in (1, -1)
            )
            ahead_S, behind_S = ends
            columns.append((ahead_S - behind_S) / (2 * step))
        return np.stack(columns, axis=1)
    if question.point is not None:
        points = np.tile(np.array(question.point)[:, None], len(theta_SP))
    else:
        sizes_S = minimise_over_sizes(fitted, theta_SP, rows, per_token, question.flops)[0]
        points = np.stack([sizes_S, per_token.tokens(question.flops, sizes_S)])
    problem = fitted.at(*points)
    jacobian_SSP = problem.jacobian(theta_SP, problem.evaluate(theta_SP)[1])
    return np.asarray(np.einsum("ssp->sp", jacobian_SSP))


def _now(
    known: _Known, rows: pd.DataFrame, question: Question, per_token: FlopsPerToken, beliefs: Beliefs
) -> tuple[float | None, float]:
    """The value and its interval's width as the runs have it; the prior's width without a fit."""
    if known.uncertainty is None:
        deviation = float(np.exp(0.5 * np.log(beliefs.variances).mean()))
        return None, float(np.expm1(2 * 1.96 * deviation))
    if question.point is not None:
        point = question.point
    else:
        best = from_law(known.fitted, known.uncertainty, rows, (question.flops,)).best[0]
        if question.size:
            return best.params, _width(best.params_ci95)
        point = best.params, float(per_token.tokens(question.flops, np.array([best.params]))[0])
    prediction = predict(known.fitted, known.uncertainty, *(np.array([each]) for each in point))[0]
    return prediction.value, _width(prediction.curve_ci95)


def _width(interval: tuple[float, float]) -> float:
    low, high = interval
    return high / low - 1 if low > 0 else np.inf
