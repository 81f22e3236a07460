"""Laws that are sums of power terms with positive coefficients, y = Σ_j exp(Z_j · θ + c_j).

log y is then a log-sum-exp of functions linear in θ, so that gradients and Hessians are matrix products. At given
exponents the law is linear in its coefficients, so that a start is a point of a grid over the exponents alone, with
coefficients from non-negative least squares (variable projection, Golub & Pereyra 1973). Letter J: the terms.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from analysis.fitting.laws.base import OFFSET, Array, Law, Problem, is_exponent

SOME_EXPONENTS = 0.2, 0.5
"""Where fits begin of laws with three exponents or more, of which a finer grid would have too many points."""
_LEFT, _STEEPEST = 1e-3, 2.0
"""The least that is left of a term that gives to the offset, and its largest exponent to begin from."""


@dataclass(frozen=True)
class Term:
    """One term of a sum: coefficient · input^(sign · exponent), times others, or the coefficient alone (the offset)."""

    coefficient: str
    exponent: str | None = None
    input: int = 0
    sign: float = -1.0
    times: tuple[tuple[str, int], ...] = ()
    """Exponents and inputs of further powers that it is multiplied by, which fall."""
    fixed: float = 0.0
    """A power of its input that isn't fitted."""

    @property
    def is_offset(self) -> bool:
        """Whether it is its coefficient alone."""
        return self.exponent is None and not self.fixed

    @property
    def powers(self) -> tuple[tuple[str, int, float], ...]:
        """Its exponents, with input and sign of each."""
        own = () if self.exponent is None else ((self.exponent, self.input, self.sign),)
        return (*own, *((exponent, place, -1.0) for exponent, place in self.times))


@dataclass(frozen=True)
class PowerSum(Law):
    """A sum of terms; what derivatives need of a prediction is each term's share of it."""

    terms: tuple[Term, ...] = ()

    @property
    def levels(self) -> tuple[str, ...]:
        """Of the powers."""
        return tuple(term.coefficient for term in self.terms if not term.is_offset)

    @property
    def like_an_offset(self) -> str | None:
        """Of a product of powers: inputs of several kinds rarely tell it from a constant."""
        return next((term.coefficient for term in self.terms if term.times), None)

    @property
    def without_term_like_an_offset(self) -> Law | None:
        """The sum of the other terms."""
        others = tuple(term for term in self.terms if term.coefficient != self.like_an_offset)
        if len(others) == len(self.terms):
            return None
        return power_sum(self.name, self.formula, self.inputs, *others, link=self.link)

    def prepare(self, problem: Problem) -> "_Derivatives":
        """The terms' derivatives, which don't depend on θ."""
        return _Derivatives(self.terms, problem.free, problem.log_inputs_In)

    def evaluate(self, problem: Problem, theta_SP: Array) -> tuple[Array, Array]:
        """Log Σ_j exp(Z_j · θ + c_j), and the terms' shares of the sum."""
        logs_JSn = theta_SP @ problem.prepared.term_derivatives.transpose(0, 2, 1)
        for j, term in enumerate(self.terms):
            if term.fixed:
                logs_JSn[j] += term.fixed * problem.log_inputs_In[term.input]
            elif problem.pinned_log_offset is not None and term.is_offset:
                logs_JSn[j] += problem.pinned_log_offset
        if len(logs_JSn) == 1:
            return logs_JSn[0], np.ones_like(logs_JSn)
        largest_Sn = logs_JSn.max(axis=0)
        shares_JSn = np.exp(logs_JSn - largest_Sn)
        total_Sn = shares_JSn.sum(axis=0)
        return largest_Sn + np.log(total_Sn), shares_JSn / total_Sn

    def gradient(self, problem: Problem, theta_SP: Array, shares_JSn: Array, factors_Sn: Array) -> Array:
        """Σ_n factors · ∂u/∂θ, without the whole Jacobian."""
        gradient_SP: Array = ((shares_JSn * factors_Sn) @ problem.prepared.term_derivatives).sum(axis=0)
        return gradient_SP

    def curvature(
        self, problem: Problem, theta_SP: Array, shares_JSn: Array, outer_Sn: Array, second_Sn: Array
    ) -> Array:
        """Σ_n (outer · ∂u ∂uᵀ + second · ∂²u), summed over pairs of terms (letter A)."""
        first_A, second_A = _pairs(len(self.terms))
        weights_ASn = shares_JSn[first_A] * shares_JSn[second_A] * (outer_Sn - second_Sn)
        weights_ASn[: len(shares_JSn)] += shares_JSn * second_Sn
        flat_SQ = (weights_ASn @ problem.prepared.outer_products).sum(axis=0)
        return np.asarray(flat_SQ.reshape(-1, theta_SP.shape[1], theta_SP.shape[1]))

    def jacobian(self, problem: Problem, theta_SP: Array, shares_JSn: Array) -> Array:
        """The terms' derivatives, each with its share."""
        return np.asarray(np.einsum("jsn,jnp->snp", shares_JSn, problem.prepared.term_derivatives))

    def starts(self, problem: Problem, y: Array, weights_n: Array, raw: bool, few: bool) -> Array:
        """A grid over the exponents with the best non-negative coefficients at each point.

        A single term is a line in the logarithms: its starts lie around the line of least squares.
        """
        if len(self.terms) == 1:
            slope, intercept = np.polyfit(problem.log_inputs_In[0], self.linked(y), 1)
            spread = np.zeros(1) if few else np.array([0.0, -0.5, 0.5, -1.0, 1.0])
            exponents_S = self.terms[0].sign * slope + spread * max(abs(slope), 0.05)
            return np.stack([np.full(len(spread), intercept), exponents_S], axis=1)
        exponents = [name for name in problem.free if is_exponent(name)]
        points = (4 if few else 8) if len(exponents) > 1 else (6 if few else 24)
        values = np.geomspace(0.02, 2.5, points) if len(exponents) < 3 else SOME_EXPONENTS
        # Coefficients minimise relative residuals, which are log residuals to first order.
        scale_n = np.sqrt(weights_n) / (np.ones_like(y) if raw else y)
        offset = np.exp(problem.pinned_log_offset) if problem.pinned_log_offset is not None else 0.0
        terms = [term for term in self.terms if term.coefficient in problem.free]
        floor = 1e-3 * float(np.median(y))
        starts = []
        for point in product(values, repeat=len(exponents)):
            chosen = dict(zip(exponents, point, strict=True))
            columns = [
                np.exp(
                    sum(sign * chosen[name] * problem.log_inputs_In[place] for name, place, sign in term.powers)
                    + term.fixed * problem.log_inputs_In[term.input]
                )
                for term in terms
            ]
            design_nJ, values_n = np.stack(columns, axis=1) * scale_n[:, None], (y - offset) * scale_n
            try:
                solution = nnls(design_nJ, values_n)[0]
            except RuntimeError:  # nnls circles where columns are all but the same
                solution = np.asarray(np.linalg.lstsq(design_nJ, values_n, rcond=None)[0], dtype=np.float64)
            logs = np.log(np.maximum(solution, floor))
            by_name = {term.coefficient: value for term, value in zip(terms, logs, strict=True)} | chosen
            starts.append([by_name[name] for name in problem.free])
        return np.array(starts)

    def traded(self, problem: Problem, theta_GP: Array, offsets_G: Array) -> Array | None:
        """A product of powers that hardly varies is a second offset: it takes the difference, its slopes kept."""
        taking = next((term for term in self.terms if term.coefficient == self.like_an_offset), None)
        if taking is None:
            return None
        traded_GP, place, level = theta_GP.copy(), problem.free.index(OFFSET), problem.free.index(taking.coefficient)
        before_G = np.exp(theta_GP[:, level])
        after_G = np.maximum(before_G + np.exp(theta_GP[:, place]) - offsets_G, _LEFT * before_G)
        for name, *_ in taking.powers:
            exponent = problem.free.index(name)
            traded_GP[:, exponent] = np.minimum(theta_GP[:, exponent] * before_G / after_G, _STEEPEST)
        traded_GP[:, level], traded_GP[:, place] = np.log(after_G), np.log(offsets_G)
        return traded_GP

    def shift(self, problem: Problem, name: str, values: dict[str, Array]) -> Array | float:
        """The centre of the term's input times its exponent."""
        term = next(term for term in self.terms if term.coefficient == name)
        fitted = (-sign * values[each] * problem.centres[place] for each, place, sign in term.powers)
        return sum(fitted, start=-term.fixed * problem.centres[term.input])

    def bounds(self, problem: Problem, name: str) -> tuple[float, float] | None:
        """Beside other terms, an exponent of zero or less would be a second offset."""
        return (1e-4, 20.0) if is_exponent(name) and len(self.terms) > 1 else None


def power_sum(
    name: str,
    formula: str,
    inputs: tuple[str, ...],
    *terms: Term,
    link: Literal["log", "logit"] = "log",
    legend: str = "",
) -> PowerSum:
    """A sum of terms, with the parameters that these name."""
    exponents = dict.fromkeys(name for term in terms for name, *_ in term.powers)
    return PowerSum(
        name, formula, inputs, (*(term.coefficient for term in terms), *exponents), link, legend, terms=terms
    )


@dataclass(frozen=True)
class _Derivatives:
    """Derivatives of the logarithms of terms by θ, at given rows."""

    terms: tuple[Term, ...]
    free: tuple[str, ...]
    log_inputs_In: Array

    @cached_property
    def term_derivatives(self) -> Array:
        """Z: the derivative of each term's logarithm by θ, constant in θ, (J, n, P)."""
        terms_JnP = np.zeros((len(self.terms), self.log_inputs_In.shape[1], len(self.free)))
        for j, term in enumerate(self.terms):
            if term.coefficient in self.free:
                terms_JnP[j, :, self.free.index(term.coefficient)] = 1.0
            for name, place, sign in term.powers:
                terms_JnP[j, :, self.free.index(name)] += sign * self.log_inputs_In[place]
        return terms_JnP

    @cached_property
    def outer_products(self) -> Array:
        """Z_j Z_kᵀ + Z_k Z_jᵀ (Z_j Z_jᵀ for a term with itself), flattened to Q = P² entries, per row, (A, n, Q)."""
        flat = []
        for j, k in zip(*_pairs(len(self.terms)), strict=True):
            outer_nPP = self.term_derivatives[j][:, :, None] * self.term_derivatives[k][:, None, :]
            flat.append((outer_nPP if j == k else outer_nPP + outer_nPP.swapaxes(1, 2)).reshape(len(outer_nPP), -1))
        return np.stack(flat)


@cache
def _pairs(terms: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Both members of every pair of terms, each with itself first."""
    own = np.arange(terms)
    lower, upper = np.tril_indices(terms, -1)
    return np.concatenate([own, lower]), np.concatenate([own, upper])
