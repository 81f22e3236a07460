"""Units of columns: what a number is multiplied by to become parameters, FLOPs or tokens, and what axes say."""

import math
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.errors import TableError

NOUNS = {"params": "parameters", "flops": "FLOPs", "budget": "FLOPs", "tokens": "tokens"}
UNIQUE_TOKENS = "unique_tokens"
"""A column that counts as tokens do, and is no role."""
_PREFIXES = {
    **{"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15, "E": 1e18, "Z": 1e21},
    **{"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12},
    **{"kilo": 1e3, "mega": 1e6, "giga": 1e9, "tera": 1e12, "peta": 1e15, "exa": 1e18, "zetta": 1e21},
}
_FLOPS = re.compile(r"(?P<prefix>[A-Za-z]*?)[\s-]*(?:flops?|f)?(?P<days>(?:/s)?-?days?)?", re.IGNORECASE)
_COUNTS = re.compile(r"(?:(?P<prefix>[kKMGBTPEZ]|[tmb]\w*(?:and|ion)s?)(?:\s+|$))?(?P<noun>[a-z][\w /-]*)?")
_SECONDS_A_DAY = 86400.0
_BASES = {"log10": 10.0, "log2": 2.0, "ln": math.e}


@dataclass(frozen=True)
class Unit:
    """A column's unit.

    Attributes:
        given: as it was written, such as `PFLOP`.
        factor: what values are multiplied by.
        noun: what the products count, or for a target the unit that axes show.
        base: where values are logarithms: to which base.
    """

    given: str
    factor: float = 1.0
    noun: str = ""
    base: float | None = None

    def values(self, numbers: "pd.Series[float]") -> "pd.Series[float]":
        """A column's numbers in parameters, FLOPs or tokens; infinite where they are too large for a number."""
        with np.errstate(over="ignore"):
            return numbers * self.factor if self.base is None else self.base**numbers


def parse_units(texts: tuple[str, ...]) -> dict[str, Unit]:
    """`ROLE=UNIT` or `COLUMN=UNIT` texts, by role or column.

    A role's unit is a factor (`flops=1e15`), a prefix (`params=M`), a prefix with a noun (`tokens=B images`), a noun
    alone (`tokens=images`), or for compute also `PFLOP`, `PFLOP/s-days`, `PF-days`; or the values are logarithms
    (`flops=log10`, `flops=ln`). Any other column's is shown as it is.

    Raises:
        TableError: naming what can't be read.
    """
    units: dict[str, Unit] = {}
    for text in texts:
        name, equals, unit = (part.strip() for part in text.rpartition("="))
        if not (name and equals and unit):
            raise TableError(f"--unit {text!r}: write ROLE=UNIT, such as params=M, flops=PFLOP or loss='nats a token'")
        role = "tokens" if name == UNIQUE_TOKENS else name
        units[name] = _of_role(role, unit) if role in NOUNS else Unit(unit, 1.0, unit)
    return units


def unit_in_name(role: str, name: str) -> str:
    """The unit other than one that a column's name states, as `params (M)`, `tokens_B` or `PF-days`; empty if none."""
    bracketed = re.search(r"[(\[]([^()\[\]]+)[)\]]\s*$", name)
    for text in [bracketed[1].strip()] if bracketed else [re.split(r"[\s_]+", name)[-1]] if len(name) > 1 else []:
        try:
            unit = _of_role(role, text)
        except TableError:
            continue
        if unit.base is None and unit.factor != 1:
            return text
    return ""


def _of_role(role: str, text: str) -> Unit:
    noun = NOUNS[role]
    if text in _BASES:
        return Unit(text, 1.0, noun, _BASES[text])
    try:
        factor = float(text)
    except ValueError:
        factor = float("nan")
    if factor > 0 and factor != float("inf"):
        return Unit(text, factor, noun)
    if noun == "FLOPs":
        found = _FLOPS.fullmatch(text)
        prefix = found["prefix"] if found else None
        prefix = prefix.upper() if prefix is not None and len(prefix) == 1 else prefix
        if found and prefix is not None and (not prefix or _prefix(prefix)):
            days = _SECONDS_A_DAY if found["days"] else 1.0
            return Unit(text, (_prefix(prefix) or 1.0) * days, noun)
    elif (found := _COUNTS.fullmatch(text)) and (role == "tokens" or (found["noun"] or "param").startswith("param")):
        return Unit(text, _prefix(found["prefix"] or "") or 1.0, found["noun"] or noun)
    examples = "1e15, PFLOP or PFLOP/s-days" if noun == "FLOPs" else f"1e6, M or 'M {noun}'"
    raise TableError(f"--unit {role}={text}: not a factor or a unit; such as {examples}")


def _prefix(text: str) -> float | None:
    return _PREFIXES.get(text) or _PREFIXES.get(text.lower().removesuffix("s"))
