"""Known traps of scaling-law fits, each with a code; docs/laws.md explains them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Caution:
    """Something a reader must know before trusting a number."""

    code: str
    message: str
    fit: str = ""


CODES: dict[str, str] = {
    "rows-excluded": "rows were left out",
    "repeated-rows": "rows repeat another row's values",
    "law-skipped": "a law was not fitted, because columns or rows are missing",
    "offset-not-identified": "the data can't tell the offset E from zero, or drift with it",
    "few-sizes": "fewer than four sizes",
    "few-budgets": "fewer than four budgets",
    "isoflop-refused": "no IsoFLOP minimum at a budget",
    "minority-optimum": "fewer than half of the starts reached the best optimum",
    "at-bound": "a parameter ended at the edge of what is allowed",
    "prediction-failed": "the held-out prediction did not hold",
    "not-monotone": "the target does not fall with x over the fitted rows",
}
