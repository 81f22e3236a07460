"""The language of conditions on rows (`--where`, `--holdout-where`), read here and never run as code.

A condition compares columns (plain names, or any name in `backticks`), numbers and quoted texts with == != < <= > >=
(chained or not), `in [..]` and `not in [..]`, and joins comparisons by `and`, `or`, `not` or their signs & | ~. Columns
and numbers may be combined by + - * / ** first. Python's own parser reads the text; every node of the result that isn't
one of these is refused.

A condition is true, false or unknown for a row, and unknown where a value that decides it is missing: so neither
`loss < 3` nor `not loss < 3` is met by a row without a loss.
"""

import ast
import keyword
import operator
import re
import textwrap
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.errors import TableError
from analysis.tables.roles import column

LONGEST = 1000
"""Characters of a condition."""
DEEPEST = 50
"""Levels of nesting."""
_HINT = "write comparisons such as loss < 5 and status == 'ok', with names with spaces or signs in `backticks`"
_TOKENS = re.compile(
    r"""(?P<text>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|`(?P<quoted>[^`]*)`|(?P<number>\d[\w.]*)|(?P<name>[^\W\d]\w*)"""
    r"""|(?P<sign>[&|])|(?P<space>\s+)"""
)
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    **{ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt},
    **{ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge},
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul},
    **{ast.Div: operator.truediv, ast.Pow: operator.pow},
}


def meets(frame: pd.DataFrame, condition: str, flag: str = "--where") -> "pd.Series[bool]":
    """Which rows meet a condition; a missing value meets none.

    Raises:
        TableError: the condition can't be read, or isn't true or false for each row; one line that names the flag.
    """
    shown = f"{flag} {condition!r}" if len(condition) <= 120 else f"{flag} {condition[:100]!r} …"
    if len(condition) > LONGEST:
        raise TableError(f"{shown}: longer than {LONGEST:,} characters; filter the table itself")
    text, columns = _with_plain_names(condition, frame)
    try:
        with warnings.catch_warnings():  # such as for '\d' in a text
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise TableError(f"{shown} can't be read as a condition; {_HINT}") from error
    try:
        truth = _Reader(frame, columns).condition(tree, 0)
    except TableError as error:
        raise TableError(f"{shown}: {error}") from error
    except (TypeError, ValueError, OverflowError) as error:  # what pandas raises for values that can't be compared
        reason = textwrap.shorten(str(error), 160, placeholder=" …")
        raise TableError(f"{shown}: values can't be compared: {reason}") from error
    return pd.Series(truth.true_n, index=frame.index)


def _with_plain_names(condition: str, frame: pd.DataFrame) -> tuple[str, dict[str, str]]:
    """The condition as Python could parse it, and which column each of its names stands for.

    Columns get names of Python's own kind, whatever theirs is, and the signs & and | become words, which bind less than
    comparisons do.
    """
    columns: dict[str, str] = {}
    prefix = "column"
    while prefix in condition:
        prefix += "_"

    def replaced(found: re.Match[str]) -> str:
        if found["sign"]:
            return " and " if found["sign"] == "&" else " or "
        if found["space"]:
            return " "
        name = found["quoted"] if found["quoted"] is not None else found["name"]
        if name is None or (found["name"] and (keyword.iskeyword(name) or name not in frame.columns)):
            return found[0]
        columns[f"{prefix}{len(columns)}"] = name
        return f" {prefix}{len(columns) - 1} "

    return _TOKENS.sub(replaced, condition).strip(), columns


class _Truth(NamedTuple):
    """Where a condition is true and where it is false; elsewhere it is unknown."""

    true_n: NDArray[np.bool_]
    false_n: NDArray[np.bool_]


class _Reader:
    """Follows a parsed condition, node by node, over the columns of a table."""

    def __init__(self, frame: pd.DataFrame, columns: dict[str, str]) -> None:
        self.frame, self.columns = frame, columns

    def condition(self, node: ast.expr, level: int) -> _Truth:
        """Truth of a node that says yes or no."""
        _check_level(level)
        if isinstance(node, ast.BoolOp):
            parts = [self.condition(each, level + 1) for each in node.values]
            all_of = isinstance(node.op, ast.And)
            join, other = (np.logical_and, np.logical_or) if all_of else (np.logical_or, np.logical_and)
            return _Truth(join.reduce([each.true_n for each in parts]), other.reduce([each.false_n for each in parts]))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
            inner = self.condition(node.operand, level + 1)
            return _Truth(inner.false_n, inner.true_n)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            parts = [
                self._membership(left, right, isinstance(sign, ast.In), level + 1)
                if isinstance(sign, ast.In | ast.NotIn)
                else self._comparison(left, right, sign, level + 1)
                for left, sign, right in zip(sides, node.ops, sides[1:], strict=False)
            ]
            true_n = np.logical_and.reduce([each.true_n for each in parts])
            return _Truth(true_n, np.logical_or.reduce([each.false_n for each in parts]))
        if isinstance(node, ast.Name):
            values = self._column(node.id)
            known_n = values.notna().to_numpy()
            if all(isinstance(each, bool | np.bool_) for each in values[known_n]):
                true_n = np.zeros(len(values), dtype=bool)
                true_n[known_n] = [bool(each) for each in values[known_n]]
                return _Truth(true_n, known_n & ~true_n)
        elif not isinstance(node, ast.Constant | ast.BinOp | ast.UnaryOp):
            _refuse(node)
        raise TableError(f"this is not a condition that is true or false for each row; {_HINT}")

    def value(self, node: ast.expr, level: int) -> Any:
        """A column, or one number or text."""
        _check_level(level)
        if isinstance(node, ast.Name):
            return self._column(node.id)
        if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            inner = self._number(node.operand, level + 1)
            return -inner if isinstance(node.op, ast.USub) else inner
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            left, right = (self._number(each, level + 1) for each in (node.left, node.right))
            with np.errstate(all="ignore"):
                return _ARITHMETIC[type(node.op)](left, right)
        _refuse(node)

    def _number(self, node: ast.expr, level: int) -> Any:
        """A part of a sum or product, in float64, so that no power of whole numbers grows without end."""
        value = self.value(node, level)
        kind = value.dtype if isinstance(value, pd.Series) else type(value)
        if not pd.api.types.is_numeric_dtype(kind) or pd.api.types.is_bool_dtype(kind):
            raise TableError(f"only columns of numbers, and numbers, can be calculated with; {_HINT}")
        if isinstance(value, pd.Series):
            return value.astype("float64")
        return np.float64(value)

    def _comparison(self, left_node: ast.expr, right_node: ast.expr, sign: ast.cmpop, level: int) -> _Truth:
        if type(sign) not in _COMPARISONS:
            raise TableError(f"`is` compares nothing here; {_HINT}")
        left, right = self.value(left_node, level), self.value(right_node, level)
        for values, other in ((left, right), (right, left)):
            if isinstance(values, pd.Series) and not isinstance(other, pd.Series | bool):
                _check_alike(values, other)
        return self._truth(_COMPARISONS[type(sign)](left, right), left, right)

    def _membership(self, node: ast.expr, members: ast.expr, inside: bool, level: int) -> _Truth:
        if not isinstance(members, ast.List | ast.Tuple):
            raise TableError("`in` needs a list of numbers or quoted texts, such as depth in [4, 8]")
        values = self.value(node, level)
        listed = [self.value(each, level + 1) for each in members.elts]
        if any(isinstance(each, pd.Series) for each in listed) or not isinstance(values, pd.Series):
            raise TableError("`in` compares a column with numbers or quoted texts, such as depth in [4, 8]")
        found = self._truth(values.isin(listed), values)
        return found if inside else _Truth(found.false_n, found.true_n)

    def _truth(self, met: Any, *operands: Any) -> _Truth:
        """Unknown where an operand is missing."""
        columns = [each for each in operands if isinstance(each, pd.Series)]
        if not columns:
            raise TableError(f"this is not a condition that is true or false for each row; {_HINT}")
        known_n = np.logical_and.reduce([each.notna().to_numpy() for each in columns])
        met_n = pd.Series(met).to_numpy(dtype=bool, na_value=False)
        return _Truth(known_n & met_n, known_n & ~met_n)

    def _column(self, name: str) -> "pd.Series[Any]":
        source = self.columns.get(name, name)
        if source not in self.frame.columns:
            column(self.frame, source)
        return self.frame[source]


def _check_alike(values: "pd.Series[Any]", other: Any) -> None:
    """That a text isn't compared with a column of numbers, nor a number with a column of texts."""
    kind = pd.api.types.infer_dtype(values, skipna=True)
    if isinstance(other, str) and kind in ("integer", "floating", "mixed-integer-float") and values.notna().any():
        raise TableError(f"column {values.name!r} holds numbers, not texts such as {other[:40]!r}")
    if not isinstance(other, str) and kind == "string":
        raise TableError(f"column {values.name!r} holds texts, not numbers such as {other:g}")


def _check_level(level: int) -> None:
    if level > DEEPEST:
        raise TableError(f"nested more than {DEEPEST} deep; filter the table itself")


def _refuse(node: ast.expr) -> NoReturn:
    kinds = {ast.Call: "calls", ast.Attribute: "attributes", ast.Subscript: "subscripts", ast.Lambda: "functions"}
    raise TableError(f"{kinds.get(type(node), 'this')} can't be part of a condition; {_HINT}")
