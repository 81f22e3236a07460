"""Which cells to train next: what they would tell of a prediction, or of a budget's best size, before they are trained.

`design` searches; here are the laws, what is known of their parameters, the candidates of a table, and a plain grid of
the same compute to compare with. Letters: S parameter vectors, K candidates, P parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.checks.design import Beliefs, Compute, design, log_ratio
from analysis.checks.forecast import ASSUMED_NOISE
from analysis.checks.requests import BOUNDS, parse_point
from analysis.errors import FitRefused, TableError
from analysis.fitting.bootstrap import resample
from analysis.fitting.fit import Fit, fit
from analysis.fitting.intervals import Uncertainty, from_draws, predict, t_quantile
from analysis.fitting.laws.base import OFFSET, Array, Problem, is_exponent
from analysis.fitting.laws.registry import LAWS
from analysis.fitting.newton import Objective
from analysis.grids.allocation import FlopsPerToken, from_law, minimise_over_sizes
from analysis.grids.frontier import seed_noise

LAWS_AVERAGED = ("chinchilla", "chinchilla-tied")
"""The first one's interval is announced; the design has to serve both."""
PUBLISHED = {"E": 0.72, "A": 0.14, "B": 0.14, "alpha": 0.348, "beta": 0.366}
"""Exponents of Chinchilla's points (Besiroglu et al. 2024), and what the three terms are of the loss at 1e9 parameters
and 2e10 tokens: the prior where there are no runs, taken at the middle of the candidates."""
_SPREAD = {OFFSET: 0.5, "coefficient": 1.0, "exponent": 0.15}
"""Standard deviations of the prior: of logarithms of E and of the coefficients at the middle, and of exponents."""
_THETAS = 8
_DRAWS = 400
_RATIO = 2**0.5
_SIZES = 12
_MOST_SIZES = 10
_SAME = 0.01


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
    """A grid of the same compute: the study's sizes at one to three further budgets."""

    cells: pd.DataFrame
    flops: float
    width: float


@dataclass(frozen=True)
class Advice:
    """Which cells to train, and what is expected of them.

    Widths are the 95% interval's upper over its lower end, minus one.

    Attributes:
        question: what is to be known better.
        value: the prediction, or the best size, as the runs have it now; None without runs.
        width: of its interval now; by the prior where there are too few runs for a law.
        cells: the candidates chosen, in order of use.
        flops: what they cost.
        expected: the width expected with them.
        plain: the plain grid, where one can be afforded.
        noise: standard deviation of a run's logarithm that this rests on.
        laws: averaged over.
        from_prior: whether the prior took the place of a fit.
    """

    question: Question
    value: float | None
    width: float
    cells: pd.DataFrame
    flops: float
    expected: float
    plain: Plain | None
    noise: float
    laws: tuple[str, ...]
    from_prior: bool = False


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
    own_share: float = 1.0,
    prior: Mapping[str, float] | None = None,
) -> Advice:
    """The candidates that narrow the interval of what is asked for most, within compute.

    Args:
        rows: the runs, with params, tokens, flops and the target; may be empty.
        target: the column.
        candidates: what could be trained, with params, tokens and flops; those that are in `rows` are left out.
        question: what is to be known better.
        spend: FLOPs.
        own_share: of a run's FLOPs that it shares with no other run of its size (`design.Compute`).
        prior: exponents instead of the published ones, for too few runs.

    Raises:
        TableError: no candidate can be afforded, or none tells anything.
    """
    _check_columns(rows)
    candidates = _untrained(candidates, rows)
    rows = rows[rows[target].notna()]
    if not len(candidates):
        raise TableError(f"--spend {spend:g}: there is no further cell to train for it")
    known = _laws(rows, target) or [_prior(candidates, prior or {})]
    sizes = pd.concat([rows, candidates])[["params", "tokens", "flops"]]
    per_token = FlopsPerToken(sizes)
    noise = _noise(rows, target, known[0].uncertainty)
    start = [_beliefs(each, rows, candidates, question, per_token, noise) for each in known]
    compute = _compute(candidates, rows, own_share)
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
        for grid, flops in _plain_grids(rows, candidates, spend, per_token, own_share)
    ]
    return Advice(
        question=question,
        value=value,
        width=width,
        cells=cells,
        flops=compute.of(chosen),
        expected=expected(candidates, chosen),
        plain=min(plain, key=lambda each: each.width, default=None),
        noise=noise,
        laws=tuple(each.fitted.law.name for each in known),
        from_prior=known[0].uncertainty is None,
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


def table_candidates(rows: pd.DataFrame, spend: float) -> pd.DataFrame:
    """Cells that could extend a table: sizes from its smallest to twice its largest, budgets up to what is to be spent.

    Raises:
        TableError: the table doesn't say parameters, tokens and FLOPs, or no budget of its own can be afforded.
    """
    _check_columns(rows)
    if spend < (smallest := rows["flops"].min()):
        raise TableError(f"--spend {spend:g}: less than the smallest run of the table takes, {smallest:.3g} FLOPs")
    per_token = FlopsPerToken(rows)
    least, most = rows["params"].min(), rows["params"].max()
    sizes = np.geomspace(least, 2 * most, _SIZES)
    budgets = smallest * _RATIO ** np.arange(int(np.log(spend / smallest) / np.log(_RATIO)) + 1)
    params, flops = (each.ravel() for each in np.meshgrid(sizes, budgets))
    tokens = flops / (per_token(params) * params)
    seen = tokens >= rows["tokens"].min()
    return pd.DataFrame({"params": params[seen], "tokens": tokens[seen], "flops": flops[seen]})


def positive(option: str, flops: float) -> float:
    """The FLOPs of an option, which are to be above 0, and no more than laws can reckon with."""
    least, most = BOUNDS["--budget"]
    if not least <= flops <= most:
        raise TableError(f"{option} {flops:g}: expected FLOPs above 0 and up to {most:g}, such as 1e21")
    return flops


def _check_columns(rows: pd.DataFrame) -> None:
    if missing := [name for name in ("params", "tokens", "flops") if name not in rows.columns]:
        raise TableError(
            f"advice needs {' and '.join(missing)} of the runs, too; --tokens-from-flops 6 gives the third"
        )


def _untrained(candidates: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Without those that have run."""
    if not len(rows):
        return candidates.reset_index(drop=True)
    logs_K2, logs_n2 = (np.log(each[["params", "flops"]].to_numpy(dtype=float)) for each in (candidates, rows))
    apart_Kn = np.abs(logs_K2[:, None] - logs_n2[None]).max(axis=2)
    kept: pd.DataFrame = candidates[apart_Kn.min(axis=1) > _SAME].reset_index(drop=True)
    return kept


def _laws(rows: pd.DataFrame, target: str) -> list[_Known]:
    """The laws that can be fitted to the runs, with θ drawn."""
    found = []
    for name in LAWS_AVERAGED:
        inputs = tuple(rows[each].to_numpy(dtype=float) for each in LAWS[name].inputs)
        try:
            fitted = fit(name, inputs, rows[target].to_numpy(dtype=float), few_starts=True)
        except FitRefused:
            continue
        draws = resample(fitted, _DRAWS, seed=0)
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
            theta_SP[:, place] = np.maximum(theta_SP[:, place], 0.05)
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


def _compute(cells: pd.DataFrame, rows: pd.DataFrame, own_share: float) -> Compute:
    sizes, size_K = np.unique(np.round(np.log(cells["params"].to_numpy(dtype=float)), 3), return_inverse=True)
    trained = np.zeros(len(sizes))
    if len(rows) and own_share < 1:
        logs = np.round(np.log(rows["params"].to_numpy(dtype=float)), 3)
        longest = (1 - own_share) * rows["flops"].to_numpy(dtype=float)
        trained = np.array([longest[logs == size].max(initial=0.0) for size in sizes])
    return Compute(cells["flops"].to_numpy(dtype=float), size_K, trained, own_share)


def _plain_grids(
    rows: pd.DataFrame, candidates: pd.DataFrame, spend: float, per_token: FlopsPerToken, own_share: float
) -> list[tuple[pd.DataFrame, float]]:
    """One to three further budgets, each twice the next, of the study's sizes, that cost what is to be spent.

    Where each budget of the study has sizes of its own, they are those of the largest, growing as the square root of
    compute.
    """
    given = rows if len(rows) else candidates[candidates["planned"]] if "planned" in candidates else candidates
    sizes = np.sort(given["params"].unique())
    growth, last = 0.0, float(given["flops"].max())
    if len(sizes) > _MOST_SIZES:
        sizes = np.sort(given.loc[given["flops"] > 0.98 * last, "params"].unique())
        growth = 0.5
    least = float(candidates["tokens"].min())
    found = []
    for count in (1, 2, 3) if len(rows) else (3, 4, 5, 6):

        def grid(largest: float, count: int = count) -> pd.DataFrame:
            budgets = np.repeat(largest / 2.0 ** np.arange(count), len(sizes))
            params = np.tile(sizes, count) * (budgets / last) ** growth
            whole = pd.DataFrame({"params": params, "tokens": budgets / (per_token(params) * params), "flops": budgets})
            return whole[whole["tokens"] >= 0.99 * least].reset_index(drop=True)

        low, high = np.log(spend / 1e6), np.log(spend)
        for _ in range(25):
            middle = (low + high) / 2
            cells = grid(float(np.exp(middle)))
            cost = _compute(cells, rows, own_share).of(range(len(cells))) if len(cells) else 0.0
            low, high = (middle, high) if cost <= spend else (low, middle)
        cells = grid(float(np.exp(low)))
        if len(cells):
            found.append((cells, _compute(cells, rows, own_share).of(range(len(cells)))))
    return found
