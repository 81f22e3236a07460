"""What a call of the `varscale` command, by the fixture `call`, gives; and arguments that many of them need."""

from collections.abc import Callable
from dataclasses import dataclass

ONE_QUICK_LAW = ("--law", "power", "--target", "loss", "--bootstrap-draws", "50")
NOWHERE = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Result:
    code: int
    output: str
    error: str


Call = Callable[..., Result]
