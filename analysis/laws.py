"""The laws: what each predicts, and its first and second derivatives, for many parameter vectors at once.

Letters in array names: S parameter vectors (starts or bootstrap draws), n rows, J terms of a sum, P free parameters.

Most laws are sums of power terms with positive coefficients, y = Σ_j exp(Z_j · θ + c_j), where θ holds the logarithms
of the coefficients and the exponents. log y is then a log-sum-exp of functions linear in θ, so that gradients and
Hessians are matrix products. Inputs are centred at their geometric means while fitting: the coefficient of a term is
then the value of that term in the middle of the data, which takes most of the correlation between coefficients and
exponents away.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analysis.errors import FitRefused

Array = NDArray[np.float64]
Link = Literal["log", "logit"]
NO_OFFSET = 1e-6
"""Share of the lowest value below which an offset is none."""
_LARGEST_LOG = 700.0
"""Logarithms of coefficients are kept below this, where float64 ends."""


@dataclass(frozen=True)
class Term:
    """One term of a sum: coefficient · input^-exponent, or the coefficient alone (the offset)."""

    coefficient: str
    exponent: str | None = None
    input: int = 0


@dataclass(frozen=True)
class Law:
    """A function with a name. `inputs` are the roles of its columns; `terms` are empty for the law with a break."""

    name: str
    formula: str
    inputs: tuple[str, ...]
    terms: tuple[Term, ...]
    link: Link = "log"

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters, coefficients first: E, A, B, alpha, beta."""
        if not self.terms:
            return ("A", "B", "alpha", "beta")
        exponents = [term.exponent for term in self.terms if term.exponent]
        return (*(term.coefficient for term in self.terms), *dict.fromkeys(exponents))

    @property
    def has_offset(self) -> bool:
        """Whether the law levels off at a constant E."""
        return any(term.exponent is None for term in self.terms)


LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Law("power", "A·x^-α", ("x",), (Term("A", "alpha"),)),
        Law(
            "power-offset",
            "E + A·x^-α",
            ("x",),
            (Term("E"), Term("A", "alpha")),
        ),
        Law(
            "chinchilla",
            "E + A·N^-α + B·D^-β",
            ("params", "tokens"),
            (Term("E"), Term("A", "alpha", 0), Term("B", "beta", 1)),
        ),
        Law(
            "chinchilla-tied",
            "E + A·N^-α + B·D^-α",
            ("params", "tokens"),
            (Term("E"), Term("A", "alpha", 0), Term("B", "alpha", 1)),
        ),
        Law(
            "broken-power",
            "A·x^-α·(1 + x/B)^(α-β)",
            ("x",),
            (),
        ),
        Law(
            "power-logit",
            "odds y/(1-y) = A·x^-α",
            ("x",),
            (Term("A", "alpha"),),
            link="logit",
        ),
        Law(
            "power-floor",
            "E + A·x^-α, E ≥ 0",
            ("x",),
            (Term("E"), Term("A", "alpha")),
        ),
    )
}


@dataclass(frozen=True)
class Problem:
    """A law at given rows, ready to be evaluated for many θ at once.

    Attributes:
        law: the law.
        centres: mean of log input, per input; θ's coefficients refer to inputs divided by exp(centre).
        log_inputs_In: centred logarithms of the inputs, one row an input.
        pinned_log_offset: log of an offset held fixed, or None when the offset (if the law has one) is free.
    """

    law: Law
    centres: tuple[float, ...]
    log_inputs_In: Array
    pinned_log_offset: float | None = None

    @staticmethod
    def of(
        law: Law, inputs: tuple[Array, ...], offset: float | None = None, centres: tuple[float, ...] | None = None
    ) -> "Problem":
        """Builds the problem from raw inputs (positive, one array an input)."""
        if offset is not None and not law.has_offset:
            raise FitRefused(f"law {law.name} has no offset to pin at {offset:g}")
        if offset is not None and offset <= 0:
            raise FitRefused(f"an offset is pinned at {offset:g}; it must be positive (use law power for none)")
        logs = np.log(np.stack([np.asarray(values, dtype=float) for values in inputs]))
        middle = tuple(float(value) for value in logs.mean(axis=1)) if centres is None else centres
        log_offset = None if offset is None else float(np.log(offset))
        return Problem(law, middle, logs - np.array(middle)[:, None], log_offset)

    @cached_property
    def free(self) -> tuple[str, ...]:
        """Names of the free parameters, in θ's order."""
        if self.pinned_log_offset is None:
            return self.law.parameters
        return tuple(name for name in self.law.parameters if name != "E")

    @cached_property
    def term_derivatives(self) -> Array:
        """Z: the derivative of each term's logarithm by θ, constant in θ."""
        rows = self.log_inputs_In.shape[1]
        terms_JnP = np.zeros((len(self.law.terms), rows, len(self.free)))
        for j, term in enumerate(self.law.terms):
            if term.coefficient in self.free:
                terms_JnP[j, :, self.free.index(term.coefficient)] = 1.0
            if term.exponent is not None:
                terms_JnP[j, :, self.free.index(term.exponent)] -= self.log_inputs_In[term.input]
        return terms_JnP

    @cached_property
    def outer_products(self) -> Array:
        """Z_j Z_kᵀ + Z_k Z_jᵀ (Z_j Z_jᵀ for a term with itself), flattened to Q = P² entries, per row.

        Letter A: pairs of terms, each with itself first. Every Hessian is summed from these.
        """
        flat = []
        for j, k in zip(*_pairs(len(self.law.terms)), strict=True):
            outer_nPP = self.term_derivatives[j][:, :, None] * self.term_derivatives[k][:, None, :]
            flat.append((outer_nPP if j == k else outer_nPP + outer_nPP.swapaxes(1, 2)).reshape(len(outer_nPP), -1))
        return np.stack(flat)

    def evaluate(self, theta_SP: Array) -> tuple[Array, Array]:
        """The linked prediction u (log y, or log odds) of shape (S, n), and the terms' shares of it, (J, S, n).

        For the law with a break, the one "share" is the logistic of log(x/B).
        """
        if not self.law.terms:
            return self._evaluate_break(theta_SP)
        logs_JSn = theta_SP @ self.term_derivatives.transpose(0, 2, 1)
        if self.pinned_log_offset is not None:
            for j, term in enumerate(self.law.terms):
                if term.exponent is None:
                    logs_JSn[j] += self.pinned_log_offset
        if len(logs_JSn) == 1:
            return logs_JSn[0], np.ones_like(logs_JSn)
        largest_Sn = logs_JSn.max(axis=0)
        shares_JSn = np.exp(logs_JSn - largest_Sn)
        total_Sn = shares_JSn.sum(axis=0)
        return largest_Sn + np.log(total_Sn), shares_JSn / total_Sn

    def gradient(self, theta_SP: Array, shares_JSn: Array, factors_Sn: Array) -> Array:
        """Σ_n factors · ∂u/∂θ, of shape (S, P)."""
        if not self.law.terms:
            return np.asarray(np.einsum("sn,snp->sp", factors_Sn, self._jacobian_break(theta_SP, shares_JSn)))
        gradient_SP: Array = ((shares_JSn * factors_Sn) @ self.term_derivatives).sum(axis=0)
        return gradient_SP

    def curvature(self, theta_SP: Array, shares_JSn: Array, outer_Sn: Array, second_Sn: Array) -> Array:
        """Σ_n (outer · ∂u ∂uᵀ + second · ∂²u) of shape (S, P, P)."""
        parameters = theta_SP.shape[1]
        if not self.law.terms:
            jacobian_SnP = self._jacobian_break(theta_SP, shares_JSn)
            result_SPP = np.einsum("sn,snp,snq->spq", outer_Sn, jacobian_SnP, jacobian_SnP)
            return np.asarray(result_SPP + self._second_break(theta_SP, shares_JSn, second_Sn))
        first_A, second_A = _pairs(len(self.law.terms))
        weights_ASn = shares_JSn[first_A] * shares_JSn[second_A] * (outer_Sn - second_Sn)
        weights_ASn[: len(shares_JSn)] += shares_JSn * second_Sn
        flat_SQ = (weights_ASn @ self.outer_products).sum(axis=0)
        return np.asarray(flat_SQ.reshape(-1, parameters, parameters))

    def jacobian(self, theta_SP: Array, shares_JSn: Array) -> Array:
        """∂u/∂θ of shape (S, n, P)."""
        if not self.law.terms:
            return self._jacobian_break(theta_SP, shares_JSn)
        return np.asarray(np.einsum("jsn,jnp->snp", shares_JSn, self.term_derivatives))

    def covariance(self, theta_SP: Array, weights_Sn: Array) -> Array:
        """(JᵀWJ)⁻¹, (S, P, P): to first order the covariance of θ for log errors of unit variance."""
        jacobian_SnP = self.jacobian(theta_SP, self.evaluate(theta_SP)[1]) * np.sqrt(weights_Sn)[..., None]
        sizes_SP = np.maximum(np.sqrt((jacobian_SnP**2).sum(axis=1)), 1e-300)
        scaled_SnP = jacobian_SnP / sizes_SP[:, None]
        inverse_SPP = np.linalg.pinv(np.einsum("snp,snq->spq", scaled_SnP, scaled_SnP), hermitian=True)
        return np.asarray(inverse_SPP / (sizes_SP[:, :, None] * sizes_SP[:, None]))

    # The law with a break, θ = (log A, log B, alpha, beta), B the place of the break, both for the centred input:
    # u = a - αt + (α - β)·log(1 + e^(t - b)).

    def _evaluate_break(self, theta_SP: Array) -> tuple[Array, Array]:
        t_n = self.log_inputs_In[0]
        a_S1, b_S1, alpha_S1, beta_S1 = (theta_SP[:, [i]] for i in range(4))
        beyond_Sn = np.logaddexp(0.0, t_n - b_S1)
        share_Sn = np.exp(-np.logaddexp(0.0, b_S1 - t_n))
        return a_S1 - alpha_S1 * t_n + (alpha_S1 - beta_S1) * beyond_Sn, share_Sn[None]

    def _jacobian_break(self, theta_SP: Array, shares_JSn: Array) -> Array:
        t_n = self.log_inputs_In[0]
        b_S1, difference_S1 = theta_SP[:, [1]], theta_SP[:, [2]] - theta_SP[:, [3]]
        beyond_Sn = np.logaddexp(0.0, t_n - b_S1)
        share_Sn = shares_JSn[0]
        return np.stack([np.ones_like(share_Sn), -difference_S1 * share_Sn, beyond_Sn - t_n, -beyond_Sn], axis=-1)

    def _second_break(self, theta_SP: Array, shares_JSn: Array, second_Sn: Array) -> Array:
        difference_S1 = theta_SP[:, [2]] - theta_SP[:, [3]]
        share_Sn = shares_JSn[0]
        result_SPP = np.zeros((len(theta_SP), 4, 4))
        result_SPP[:, 1, 1] = (second_Sn * difference_S1 * share_Sn * (1.0 - share_Sn)).sum(axis=1)
        mixed_S = (second_Sn * share_Sn).sum(axis=1)
        result_SPP[:, 1, 2] = result_SPP[:, 2, 1] = -mixed_S
        result_SPP[:, 1, 3] = result_SPP[:, 3, 1] = mixed_S
        return result_SPP

    def natural(self, theta_SP: Array) -> Array:
        """θ → the reported parameters (S, len(law.parameters)), for inputs in their own units."""
        values = {name: theta_SP[:, i] for i, name in enumerate(self.free)}
        columns = []
        for name in self.law.parameters:
            if name not in values:
                columns.append(np.full(len(theta_SP), np.exp(self.pinned_log_offset or 0.0)))
            elif name in ("alpha", "beta"):
                columns.append(values[name])
            else:
                columns.append(np.exp(np.clip(values[name] + self._shift(name, values), -_LARGEST_LOG, _LARGEST_LOG)))
        return np.stack(columns, axis=1)

    def _shift(self, name: str, values: dict[str, Array]) -> Array | float:
        """What turns a coefficient's logarithm at the centre into the one for inputs in their own units."""
        if not self.law.terms:
            return self.centres[0] if name == "B" else values["alpha"] * self.centres[0]
        term = next(term for term in self.law.terms if term.coefficient == name)
        return 0.0 if term.exponent is None else values[term.exponent] * self.centres[term.input]


@cache
def _pairs(terms: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Both members of every pair of terms, each with itself first."""
    own = np.arange(terms)
    lower, upper = np.tril_indices(terms, -1)
    return np.concatenate([own, lower]), np.concatenate([own, upper])
