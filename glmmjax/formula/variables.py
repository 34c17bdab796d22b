"""What stands beside the terms of a model, on a table: response, weights, offset and subset."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._errors import DataError
from .columns import Factor, Float, Matrix, Table, Value, as_column, by_row, missing_column
from .expressions import CONSTANTS
from .functions import Evaluator
from .parse import parse_expression
from .syntax import Call, Name, Node, base_name, deparse, names_in


def check_columns(names: Iterable[str], table: Table, role: str = "") -> None:
    """Raise DataError for the first of the names that is no column."""
    for name in names:
        if name not in table and name not in CONSTANTS:
            raise DataError(role + missing_column(name, table.columns))


def plus(total: Float | None, more: Float) -> Float:
    return more if total is None else total + more


def numeric_column(evaluator: Evaluator, node: Node, role: str) -> Float:
    with np.errstate(all="ignore"):
        value = evaluator.evaluate(node)
    if isinstance(value, Factor) and not value.logical:
        raise DataError(f"the {role} '{deparse(node)}' is not numeric; it must be a column of numbers")
    number = evaluator.number(value, node)
    if not isinstance(number, np.ndarray):
        return np.full(evaluator.table.n, float(number))
    return number


def given_column(given: Any, role: str, evaluator: Evaluator) -> tuple[Float, Node | bool]:
    """A weights or offset argument as floats, and where from: an expression, or True for an array."""
    table = evaluator.table
    if isinstance(given, str):
        node: Node = Name(given) if given in table else parse_expression(given)
        check_columns(names_in(node), table, f"{role}: ")
        return numeric_column(evaluator, node, role), node
    if np.ndim(given) == 0:
        raise TypeError(f"{role} must be a column name, an array or a Series, not {type(given).__name__}")
    if len(getattr(given, "columns", ())) == 1:  # a table of one column
        given = given[given.columns[0]]
    if isinstance(given, np.ndarray) and given.ndim == 2 and given.shape[1] == 1:
        given = given[:, 0]
    if np.ndim(given) != 1:
        raise DataError(f"{role} has {np.ndim(given)} dimensions; give one number per row")
    value = as_column(by_row(given, table.index, role), role)
    if isinstance(value, Factor) and not value.logical:
        raise DataError(f"{role} is not numeric; give a column of numbers")
    if isinstance(value, Factor):
        value = np.where(value.codes < 0, np.nan, value.codes)
    if value.size != table.n:
        raise DataError(f"{role} has {value.size} values, but the data have {table.n} rows; give one per row")
    return value.astype(np.float64, copy=False), True


@dataclass(frozen=True)
class Response:
    y: Value  # ndarray (n,) float or Factor
    other: Float | None  # failures of cbind
    kind: str
    columns: tuple[Node, ...]


def response_of(evaluator: Evaluator, node: Node) -> Response:
    label = deparse(node)
    if isinstance(node, Call) and base_name(node.func) == "cbind":
        if len(node.args) != 2:
            evaluator.fail(node, f"cbind() has {len(node.args)} arguments", "write cbind(successes, failures)")
        parts = [arg for _, arg in node.args]
        values = [numeric_column(evaluator, part, "response") for part in parts]
        return Response(values[0], values[1], "cbind", tuple(parts))
    value = evaluator.variable(node)
    if isinstance(value, Matrix):
        raise DataError(f"the response '{label}' has several columns; give one, or cbind(successes, failures)")
    return Response(value, None, "binary" if isinstance(value, Factor) else "numeric", (node,))


def subset_mask(subset: Any, evaluator: Evaluator) -> NDArray[np.bool_]:
    table = evaluator.table
    if isinstance(subset, str):
        node = parse_expression(subset)
        check_columns(names_in(node), table, "subset: ")
        with np.errstate(all="ignore"):
            value = Evaluator(table, subset, {}, {}, True).evaluate(node)
        if isinstance(value, Factor) and value.logical:
            return value.codes == 1  # missing counts as false, as in R
        if not (isinstance(value, np.ndarray) and value.dtype.kind == "b"):
            raise DataError(f"subset {subset!r} is not a condition; write e.g. \"period != '4'\"")
        return value
    mask = np.asarray(by_row(subset, table.index, "subset"))
    if mask.dtype.kind == "O":
        mask = np.array([v is True or v is np.True_ for v in mask.ravel()])
    if mask.dtype.kind != "b" or mask.ndim != 1:
        raise TypeError("subset must be a boolean array or a condition in text such as \"period != '4'\"")
    if mask.size != table.n:
        raise DataError(f"subset has {mask.size} values, but the data have {table.n} rows; give one per row")
    return mask
