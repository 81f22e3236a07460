"""Laws of a loss: what error, or what other loss, belongs to it. All rise with it.

- exponential: y = A·(1 - e^(-k·(x - x0))), Gadre et al. 2024 (arXiv 2403.08540), who write ε - c·e^(-γL): A = ε is
  the error of a guess, x0 the loss at which no error would be left.
- logistic: y = E + A / (1 + e^(-k·(x - x0))), Bhagia et al. 2024 (arXiv 2412.04403, OLMo's model ladder), between two
  levels.
- shifted power: y = E + A·(x - x0)^α, Brandfonbrener et al. 2024 (arXiv 2411.12925), x0 and E the losses that can't be
  reduced.

θ holds log x0 for the centred x, so that x - x0 = e^c·(e^t - e^b); log k is of the centred x, too.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import expit

from analysis.fitting.laws.base import OFFSET, Array, Problem
from analysis.fitting.laws.log_terms import LogTerms, Slots, named

_LEAST = 1e-9
"""Stands for x - x0 where that isn't positive, which makes such θ hopeless rather than undefined."""
_LARGEST = 300.0
"""Logarithm beyond which a place or steepness is no number that can be squared."""
_STEEP = np.array([0.5, 1.5, 4.0, 8.0, 16.0])
_BELOW = np.array([0.4, 0.65, 0.8, 0.9, 0.97])


@dataclass(frozen=True)
class OfLoss(LogTerms):
    """One of the three; the logarithm of its main term is a + h(z), or a + α·log(x - x0).

    Attributes:
        form: which.
    """

    form: Literal["exponential", "logistic", "power"] = "exponential"

    @property
    def of_losses(self) -> bool:
        """All are."""
        return True

    def ends_at(self, parameters: dict[str, float]) -> float | None:
        """The loss at which nothing is left of the main term, unless that goes on for ever."""
        return None if self.form == "logistic" else parameters["x0"]

    @property
    def levels(self) -> tuple[str, ...]:
        """Of the main term."""
        return ("A",)

    def logs(self, problem: Problem, theta_SP: Array) -> Array:
        """Of the offset, where there is one, and the main term."""
        values = named(problem, theta_SP)
        main_Sn = values["A"] + self._shape(problem, values)[0]
        if not self.has_offset:
            return main_Sn[None]
        return np.stack([np.broadcast_to(values[OFFSET], main_Sn.shape), main_Sn])

    def derivatives(self, problem: Problem, theta_SP: Array) -> Slots:
        """Of those."""
        values, main = named(problem, theta_SP), int(self.has_offset)
        _, first_Sn, second_Sn, z_Sn, place_Sn = self._shape(problem, values)
        slots = Slots(problem, main + 1, len(theta_SP))
        if main:
            slots.set(0, OFFSET, 1.0)
        slots.set(main, "A", 1.0)
        bend_Sn = second_Sn * place_Sn**2 + first_Sn * place_Sn
        slots.set(main, "x0", first_Sn * place_Sn, ("x0", bend_Sn))
        if self.form == "power":  # first_Sn holds the exponent
            slots.set(main, "alpha", z_Sn, ("x0", first_Sn * place_Sn / values["alpha"]))
        else:
            mixed_Sn = second_Sn * place_Sn * z_Sn + first_Sn * place_Sn
            slots.set(main, "k", first_Sn * z_Sn, ("k", second_Sn * z_Sn**2 + first_Sn * z_Sn), ("x0", mixed_Sn))
        return slots

    def _shape(self, problem: Problem, values: dict[str, Array]) -> tuple[Array, Array, Array, Array, Array]:
        """The main term's logarithm without A, its derivatives by z, z, and that of z by log x0; each (S, n).

        z is k·(x - x0), or log(x - x0) for the power.
        """
        t_n, b_S1 = problem.log_inputs_In[0], np.minimum(values["x0"], _LARGEST)
        apart_Sn = np.exp(t_n) - np.exp(b_S1)
        if self.form == "power":
            inside_Sn = np.maximum(apart_Sn, _LEAST)
            z_Sn, alpha_S1 = np.log(inside_Sn), values["alpha"]
            place_Sn = -np.exp(b_S1) / inside_Sn
            # z is a logarithm: its second derivative by log x0 is place - place², the second part of which goes here
            return (
                alpha_S1 * z_Sn,
                np.broadcast_to(alpha_S1, z_Sn.shape),
                -np.broadcast_to(alpha_S1, z_Sn.shape),
                z_Sn,
                place_Sn,
            )
        k_S1 = np.exp(np.minimum(values["k"], _LARGEST))
        z_Sn, place_Sn = k_S1 * apart_Sn, -k_S1 * np.exp(b_S1) * np.ones_like(apart_Sn)
        if self.form == "logistic":
            upper_Sn = expit(-z_Sn)
            return -np.logaddexp(0.0, -z_Sn), upper_Sn, -upper_Sn * (1 - upper_Sn), z_Sn, place_Sn
        inside_Sn = np.maximum(z_Sn, _LEAST)
        slope_Sn = 1 / np.expm1(np.minimum(inside_Sn, 700.0))
        return np.log(-np.expm1(-inside_Sn)), slope_Sn, -slope_Sn * (1 + slope_Sn), inside_Sn, place_Sn

    def starts(self, problem: Problem, y: Array, weights_n: Array, raw: bool, few: bool) -> Array:
        """Places and steepnesses on a grid, with levels by least squares (not negative) at each."""
        x_n = np.exp(problem.log_inputs_In[0])
        if self.form == "logistic":
            places = np.quantile(x_n, [0.1, 0.3, 0.5, 0.7, 0.9])
            steepness = _STEEP / max(float(np.ptp(x_n)), 1e-9) * 2
        else:
            places = x_n.min() * _BELOW
            steepness = _STEEP[:4] / 3 if self.form == "power" else _STEEP / x_n.max()
        third = "alpha" if self.form == "power" else "k"
        starts = []
        for place in places[::2] if few else places:
            for steep in steepness[::2] if few else steepness:
                given = {"x0": np.log([[place]]), third: np.array([[steep if third == "alpha" else np.log(steep)]])}
                shape_n = np.exp(self._shape(problem, given)[0][0])
                levels = self._levels(problem, shape_n, y, weights_n)
                by_name = {**levels, **{name: float(value[0, 0]) for name, value in given.items()}}
                starts.append([by_name[name] for name in problem.free])
        return np.array(starts)

    def _levels(self, problem: Problem, shape_n: Array, y: Array, weights_n: Array) -> dict[str, float]:
        """Logarithms of A and E that suit a shape."""
        scale_n, least = np.sqrt(weights_n) / y, 1e-3 * float(y.min())
        offset = np.exp(problem.pinned_log_offset) if problem.pinned_log_offset is not None else 0.0
        columns = [shape_n] if OFFSET not in problem.free else [shape_n, np.ones_like(y)]
        found, *_ = np.linalg.lstsq(np.stack(columns, axis=1) * scale_n[:, None], (y - offset) * scale_n, rcond=None)
        levels = {"A": float(np.log(max(found[0], least)))}
        return (
            levels if len(columns) == 1 else levels | {OFFSET: float(np.log(np.clip(found[1], least, 0.99 * y.min())))}
        )

    def shift(self, problem: Problem, name: str, values: dict[str, Array]) -> Array | float:
        """The place is along x, the steepness one over it; a power's coefficient turns with the exponent."""
        centre = problem.centres[0]
        if name == "A" and self.form == "power":
            return -values["alpha"] * centre
        return centre if name == "x0" else -centre if name == "k" else 0.0

    def bounds(self, problem: Problem, name: str) -> tuple[float, float] | None:
        """The place lies below the data (of a logistic curve: not far off them)."""
        t_n = problem.log_inputs_In[0]
        if name == "x0":
            return float(t_n.min()) - 4.0, float(t_n.max()) + 2.0 if self.form == "logistic" else float(
                t_n.min()
            ) - 1e-6
        return {"k": (-8.0, 12.0), "alpha": (1e-3, 20.0)}.get(name)
