"""The broken power law, y = A·x^-α·(1 + x/B)^(α-β): one smooth break at x = B, from slope α to slope β.

θ = (log A, log B, alpha, beta), A and B for the centred input t, so that u = a - αt + (α - β)·log(1 + e^(t - b)). What
its derivatives need of a prediction is the logistic of t - b, the one row of J.
"""

from dataclasses import dataclass

import numpy as np

from analysis.fitting.laws.base import Array, Law, Problem


@dataclass(frozen=True)
class BrokenPower(Law):
    """A power law whose exponent changes at a place, once and smoothly."""

    def evaluate(self, problem: Problem, theta_SP: Array) -> tuple[Array, Array]:
        """u, and the logistic of log(x/B)."""
        t_n = problem.log_inputs_In[0]
        a_S1, b_S1, alpha_S1, beta_S1 = (theta_SP[:, [i]] for i in range(4))
        beyond_Sn = np.logaddexp(0.0, t_n - b_S1)
        share_Sn = np.exp(-np.logaddexp(0.0, b_S1 - t_n))
        return a_S1 - alpha_S1 * t_n + (alpha_S1 - beta_S1) * beyond_Sn, share_Sn[None]

    def jacobian(self, problem: Problem, theta_SP: Array, shares_JSn: Array) -> Array:
        """∂u/∂θ."""
        t_n = problem.log_inputs_In[0]
        b_S1, difference_S1 = theta_SP[:, [1]], theta_SP[:, [2]] - theta_SP[:, [3]]
        beyond_Sn = np.logaddexp(0.0, t_n - b_S1)
        share_Sn = shares_JSn[0]
        return np.stack([np.ones_like(share_Sn), -difference_S1 * share_Sn, beyond_Sn - t_n, -beyond_Sn], axis=-1)

    def curvature(
        self, problem: Problem, theta_SP: Array, shares_JSn: Array, outer_Sn: Array, second_Sn: Array
    ) -> Array:
        """Only b has second derivatives: by itself, and with each exponent."""
        jacobian_SnP = self.jacobian(problem, theta_SP, shares_JSn)
        result_SPP = np.einsum("sn,snp,snq->spq", outer_Sn, jacobian_SnP, jacobian_SnP)
        difference_S1 = theta_SP[:, [2]] - theta_SP[:, [3]]
        share_Sn = shares_JSn[0]
        second_SPP = np.zeros((len(theta_SP), 4, 4))
        second_SPP[:, 1, 1] = (second_Sn * difference_S1 * share_Sn * (1.0 - share_Sn)).sum(axis=1)
        mixed_S = (second_Sn * share_Sn).sum(axis=1)
        second_SPP[:, 1, 2] = second_SPP[:, 2, 1] = -mixed_S
        second_SPP[:, 1, 3] = second_SPP[:, 3, 1] = mixed_S
        return np.asarray(result_SPP + second_SPP)

    def starts(self, problem: Problem, y: Array, weights_n: Array, raw: bool, few: bool) -> Array:
        """Places of the break across the data, with slopes by least squares at each."""
        t_n, values_n = problem.log_inputs_In[0], self.linked(y)
        starts = []
        span = max(float(np.ptp(t_n)), 1e-9)
        for place in np.linspace(t_n.min() - 0.1 * span, t_n.max() + 0.1 * span, 15):
            beyond_n = np.logaddexp(0.0, t_n - place)
            columns = np.stack([np.ones_like(t_n), beyond_n - t_n, -beyond_n], axis=1)
            (a, alpha, beta), *_ = np.linalg.lstsq(columns, values_n, rcond=None)
            starts.append([a, place, alpha, beta])
        return np.array(starts)

    def shift(self, problem: Problem, name: str, values: dict[str, Array]) -> Array | float:
        """B is a place along the input; A is the coefficient of the first slope."""
        return problem.centres[0] if name == "B" else values["alpha"] * problem.centres[0]

    def bounds(self, problem: Problem, name: str) -> tuple[float, float] | None:
        """The break lies among the rows, or not far beyond them."""
        t_n = problem.log_inputs_In[0]
        return (float(t_n.min()) - 3.0, float(t_n.max()) + 3.0) if name == "B" else None
