"""What a law gives: its names, its prediction with first and second derivatives, where fits of it start and end.

Letters in array names: S parameter vectors θ (starts or bootstrap draws), n rows, P free parameters, I inputs; J what a
law passes from its prediction to its derivatives.

θ holds the logarithms of the coefficients and the exponents as they are. Inputs are centred at their geometric means
while fitting: the coefficient of a term is then the value of that term in the middle of the data, which takes most of
the correlation between coefficients and exponents away.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from analysis.errors import FitRefused
from analysis.tables.annealing import RateSchedule

Array = NDArray[np.float64]
NO_OFFSET = 1e-6
"""Share of the lowest value below which an offset is none."""
OFFSET = "E"
_LARGEST_LOG = 700.0
"""Logarithms of coefficients are kept below this, where float64 ends."""


@dataclass(frozen=True)
class Law(ABC):
    """A function with a name.

    Attributes:
        name: its id.
        formula: for people.
        inputs: the roles of its columns, ("x",) for a law of any one column.
        parameters: E, A, B, alpha and beta, as far as it has them, or others; exponents come last.
        link: whether log y or the log odds of y are predicted.
        legend: what figures call it, with places for parameters and for `power`, the input's power; the name if empty.
        ratios: inputs that follow from two columns where a table has none of their own: the input, above, below.
    """

    name: str
    formula: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    link: Literal["log", "logit"] = "log"
    legend: str = ""
    ratios: tuple[tuple[str, str, str], ...] = ()

    @property
    def has_offset(self) -> bool:
        """Whether the law levels off at a constant E."""
        return OFFSET in self.parameters

    @property
    def is_curve(self) -> bool:
        """Whether it takes any one column, rather than N and D."""
        return self.inputs == ("x",)

    @property
    def is_surface(self) -> bool:
        """Whether it is of N and D alone, so that it has best sizes."""
        return self.inputs == ("params", "tokens")

    @property
    def place(self) -> str:
        """What a law of several columns is fitted against: size and data where it has both, whatever else it takes."""
        of_both = {"params", "tokens"} <= set(self.inputs)
        return "params, tokens" if of_both else ", ".join(self.inputs)

    @property
    def of_losses(self) -> bool:
        """Whether its input is a loss: values rise with it, and predictions are made for lower ones."""
        return False

    def ends_at(self, parameters: dict[str, float]) -> float | None:
        """The x at and below which there is no law, of a fit's parameters; None where it is one everywhere."""
        return None

    @property
    def levels(self) -> tuple[str, ...]:
        """Coefficients that terms beside an offset are multiplied by."""
        return ()

    @property
    def like_an_offset(self) -> str | None:
        """The coefficient of a term that is all but constant where its exponents are small, if there is one."""
        return None

    @property
    def without_term_like_an_offset(self) -> "Law | None":
        """The law of the other terms, where there is a term like an offset."""
        return None

    def columns(self, x: str) -> tuple[str, ...]:
        """The columns that it takes: its own, such as N and D, or the x chosen."""
        return (x,) if self.is_curve else self.inputs

    def along(self, schedules: tuple[RateSchedule, ...]) -> "Law":
        """The law of rows of runs with these schedules; itself where it takes none."""
        return self

    def prepare(self, problem: "Problem") -> Any:
        """What is worked out once for the rows of a problem (`Problem.prepared`)."""
        return None

    @abstractmethod
    def evaluate(self, problem: "Problem", theta_SP: Array) -> tuple[Array, Array]:
        """The linked prediction u (log y, or log odds), (S, n), and what its derivatives need of it, (J, S, n)."""

    @abstractmethod
    def jacobian(self, problem: "Problem", theta_SP: Array, shares_JSn: Array) -> Array:
        """∂u/∂θ of shape (S, n, P)."""

    def gradient(self, problem: "Problem", theta_SP: Array, shares_JSn: Array, factors_Sn: Array) -> Array:
        """Σ_n factors · ∂u/∂θ, of shape (S, P)."""
        return np.asarray(np.einsum("sn,snp->sp", factors_Sn, self.jacobian(problem, theta_SP, shares_JSn)))

    @abstractmethod
    def curvature(
        self, problem: "Problem", theta_SP: Array, shares_JSn: Array, outer_Sn: Array, second_Sn: Array
    ) -> Array:
        """Σ_n (outer · ∂u ∂uᵀ + second · ∂²u) of shape (S, P, P)."""

    @abstractmethod
    def starts(self, problem: "Problem", y: Array, weights_n: Array, raw: bool, few: bool) -> Array:
        """Where fits of the values y begin, (S, P).

        Args:
            problem: the law at the rows.
            y: their values.
            weights_n: how often each row counts.
            raw: whether residuals are of the values rather than of their logarithms.
            few: a coarser choice, for refits of rows that have been fitted before.
        """

    def traded(self, problem: "Problem", theta_GP: Array, offsets_G: Array) -> Array | None:
        """θ at other offsets, (G, P), where the term like an offset takes what that loses; None without such a term."""
        return None

    @abstractmethod
    def shift(self, problem: "Problem", name: str, values: dict[str, Array]) -> Array | float:
        """What turns a coefficient's logarithm at the centre into the one for inputs in their own units."""

    def bounds(self, problem: "Problem", name: str) -> tuple[float, float] | None:
        """The range of a free parameter where it isn't the usual one (`Problem.bounds`)."""
        return None

    def linked(self, y: Array) -> Array:
        """Values in the space of u."""
        return np.asarray(np.log(y) - np.log1p(-y) if self.link == "logit" else np.log(y))

    def respond(self, u: Array) -> Array:
        """A linked prediction back in the values' own units."""
        with np.errstate(over="ignore"):  # a law far outside its rows is infinite
            return np.asarray(1.0 / (1.0 + np.exp(-u)) if self.link == "logit" else np.exp(u))

    def response_derivatives(self, u_Sn: Array) -> tuple[Array, Array]:
        """First and second derivative of `respond`."""
        value_Sn = self.respond(u_Sn)
        if self.link == "logit":
            slope_Sn = value_Sn * (1 - value_Sn)
            return slope_Sn, slope_Sn * (1 - 2 * value_Sn)
        return value_Sn, value_Sn


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
        """Builds the problem from raw inputs (positive, one array an input).

        Raises:
            FitRefused: an offset is pinned that the law hasn't, or that isn't positive.
        """
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
        pinned = self.pinned_log_offset is not None
        return tuple(name for name in self.law.parameters if not (pinned and name == OFFSET))

    @cached_property
    def prepared(self) -> Any:
        """What the law works out once for these rows."""
        return self.law.prepare(self)

    def evaluate(self, theta_SP: Array) -> tuple[Array, Array]:
        """`Law.evaluate` at these rows."""
        return self.law.evaluate(self, theta_SP)

    def gradient(self, theta_SP: Array, shares_JSn: Array, factors_Sn: Array) -> Array:
        """`Law.gradient` at these rows."""
        return self.law.gradient(self, theta_SP, shares_JSn, factors_Sn)

    def curvature(self, theta_SP: Array, shares_JSn: Array, outer_Sn: Array, second_Sn: Array) -> Array:
        """`Law.curvature` at these rows."""
        return self.law.curvature(self, theta_SP, shares_JSn, outer_Sn, second_Sn)

    def jacobian(self, theta_SP: Array, shares_JSn: Array) -> Array:
        """`Law.jacobian` at these rows."""
        return self.law.jacobian(self, theta_SP, shares_JSn)

    def covariance(self, theta_SP: Array, weights_Sn: Array) -> Array:
        """(JᵀWJ)⁻¹, (S, P, P): to first order the covariance of θ for log errors of unit variance."""
        jacobian_SnP = self.jacobian(theta_SP, self.evaluate(theta_SP)[1]) * np.sqrt(weights_Sn)[..., None]
        sizes_SP = np.maximum(np.sqrt((jacobian_SnP**2).sum(axis=1)), 1e-300)
        scaled_SnP = jacobian_SnP / sizes_SP[:, None]
        inverse_SPP = np.linalg.pinv(np.einsum("snp,snq->spq", scaled_SnP, scaled_SnP), hermitian=True)
        return np.asarray(inverse_SPP / (sizes_SP[:, :, None] * sizes_SP[:, None]))

    def natural(self, theta_SP: Array) -> Array:
        """θ → the reported parameters (S, len(law.parameters)), for inputs in their own units."""
        values = {name: theta_SP[:, i] for i, name in enumerate(self.free)}
        columns = []
        for name in self.law.parameters:
            if name not in values:
                columns.append(np.full(len(theta_SP), np.exp(self.pinned_log_offset or 0.0)))
            elif is_exponent(name):
                columns.append(values[name])
            else:
                logs_S = values[name] + self.law.shift(self, name, values)
                columns.append(np.exp(np.clip(logs_S, -_LARGEST_LOG, _LARGEST_LOG)))
        return np.stack(columns, axis=1)

    def bounds(self, y: Array) -> tuple[Array, Array]:
        """A box wide enough never to matter for a law that the data identify."""
        coefficients = float(np.log(np.min(y))) - 25.0, float(np.log(np.max(y))) + 25.0
        usual = ((-20.0, 20.0) if is_exponent(name) else coefficients for name in self.free)
        pairs = [self.law.bounds(self, name) or pair for name, pair in zip(self.free, usual, strict=True)]
        return np.array([low for low, _ in pairs]), np.array([high for _, high in pairs])


def is_exponent(name: str) -> bool:
    """Whether θ holds a parameter as it is, rather than its logarithm."""
    return name in ("alpha", "beta", "gamma", "delta", "lambda")
