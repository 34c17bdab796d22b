"""Formula + data -> arrays with labels (`ModelData`), re-usable on new data. NumPy and pandas, no JAX.

Columns, names and codings are those of R's model.matrix; order and names of random-effects terms are lme4's.
Every column is converted to NumPy once; factors are integer codes with labels as text.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as _replace
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from . import _contrasts, _transforms
from ._errors import DataError, FormulaError
from ._parse import (
    Bar,
    Binary,
    Call,
    Const,
    Formula,
    Name,
    Node,
    Num,
    Paren,
    Str,
    Terms,
    Unary,
    base_name,
    bits,
    deparse,
    fail,
    format_number,
    names_in,
    parse,
    parse_expression,
    quote_name,
    strip_parens,
)

Float = NDArray[np.float64]
RANK_TOLERANCE = 1e-7  # lme4's chkRank.drop.cols: residual norm of a column relative to its own norm

# --------------------------------------------------------------------------------------------------- columns


@dataclass(frozen=True)
class Factor:
    """A categorical column: codes (n,) into levels, -1 = missing."""

    codes: NDArray[Any]
    levels: tuple[str, ...]
    ordered: bool = False
    logical: bool = False  # a boolean column: levels FALSE, TRUE
    text: bool = False  # a text column: as.numeric() reads its labels, not its codes
    contrast: Any = None  # of C(f, ...)


@dataclass(frozen=True)
class Matrix:
    """Several numeric columns under one name, e.g. poly(x, 2): values (n, k)."""

    values: Float
    suffixes: tuple[str, ...]


Value = Any  # ndarray (n,), Factor, Matrix; inside calls also a number, str, list or None


class Table:
    """Named columns of any supported container, read on demand."""

    def __init__(self, data: Any, role: str = "data") -> None:
        if not isinstance(data, pd.DataFrame) and hasattr(data, "to_pandas"):
            data = data.to_pandas()
        self._get: Callable[[str], Any]
        if isinstance(data, pd.DataFrame):
            self.columns = [c for c in data.columns if isinstance(c, str)]
            self.index = data.index
            self._get = data.__getitem__
        elif isinstance(data, Mapping):
            self.columns = [str(c) for c in data]
            lengths = {
                k: len(v) if hasattr(v, "__len__") and not isinstance(v, str) else -1 for k, v in data.items()
            }
            if len(set(lengths.values())) > 1 or -1 in lengths.values():
                found = ", ".join(f"'{k}': {'a scalar' if v < 0 else v}" for k, v in lengths.items())
                raise DataError(
                    f"the columns of {role} differ in length ({found}); give arrays of one length"
                )
            self.index = pd.RangeIndex(next(iter(lengths.values()), 0))
            self._get = data.__getitem__
        elif isinstance(data, np.ndarray) and data.dtype.names:
            self.columns = list(data.dtype.names)
            self.index = pd.RangeIndex(len(data))
            self._get = data.__getitem__
        else:
            raise TypeError(
                f"{role} must be a DataFrame, a dict of arrays or a structured array, "
                f"not {type(data).__name__}"
            )
        self.n = len(self.index)
        self.names = frozenset(self.columns)
        self._cache: dict[str, Value] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def column(self, name: str) -> Value:
        if name not in self._cache:
            if name not in self.names:
                raise DataError(missing_column(name, self.columns))
            self._cache[name] = as_column(self._get(name), name)
        return self._cache[name]


def missing_column(name: str, columns: Sequence[str]) -> str:
    """One sentence with near names."""
    near = difflib.get_close_matches(name, columns, 3, 0.6)
    near += [c for c in columns if c.lower() == name.lower() and c not in near]
    if near:
        return f"no column '{name}' in the data; did you mean {' or '.join(repr(c) for c in near)}?"
    shown = ", ".join(columns[:12]) + (", ..." if len(columns) > 12 else "")
    return f"no column '{name}' in the data; its columns are: {shown}"


def label_of(value: Any) -> str:
    """The label of a level: 1 and 1.0 are both "1"; other numbers with 15 significant digits, as R."""
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, np.bool_)):
        return "TRUE" if value else "FALSE"
    if isinstance(value, (float, np.floating)):
        number = float(value)
        return str(int(number)) if number.is_integer() and abs(number) < 1e15 else format_number(number)
    return str(value)


def as_column(raw: Any, name: str) -> Value:
    """A raw column as ndarray (float, int or bool) or Factor."""
    if isinstance(raw, pd.DataFrame):
        raise DataError(f"the data have several columns named '{name}'; rename them")
    array = raw.array if isinstance(raw, (pd.Series, pd.Index)) else raw
    if isinstance(array, pd.Categorical):
        return _from_categorical(array, name)
    if isinstance(array, np.ma.MaskedArray):
        numeric = array.dtype.kind in "iuf"
        array = np.ma.filled(array.astype(np.float64 if numeric else object), np.nan if numeric else None)
    if not isinstance(array, np.ndarray):
        dtype = getattr(array, "dtype", None)
        if isinstance(dtype, np.dtype) or isinstance(array, pd.arrays.NumpyExtensionArray):
            array = np.asarray(array)
        elif isinstance(dtype, pd.api.extensions.ExtensionDtype):
            array = _from_extension(array, dtype, name)
            if isinstance(array, Factor):
                return array
        else:
            array = np.asarray(array)
            if array.dtype.kind in "US" and array.ndim == 1:  # a list: NaN would have become the text "nan"
                array = np.array(raw, dtype=object)
    if array.ndim != 1:
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        else:
            raise DataError(
                f"column '{name}' has {array.ndim} dimensions; each column must be one-dimensional"
            )
    kind = array.dtype.kind
    if kind in "iub":
        return array
    if kind == "f":
        return array.astype(np.float64, copy=False)
    if kind == "O":
        return _from_object(array, name)
    if kind in "US":
        return _factorize(array.astype(str).astype(object), text=True)
    if kind in "Mm":
        _reject_time(name)
    raise DataError(
        f"column '{name}' has type {array.dtype}, which a model cannot use; convert it to numbers or text"
    )


def _reject_time(name: str) -> NoReturn:
    raise DataError(
        f"column '{name}' holds dates or times; convert it to numbers first, e.g. days since the first date, "
        "or to text for a factor"
    )


def _from_categorical(array: pd.Categorical, name: str) -> Factor:
    categories = array.categories
    if categories.dtype.kind in "Mm":
        _reject_time(name)
    levels = tuple(map(label_of, categories.tolist()))
    if len(levels) > 1 and categories.dtype.kind == "O" and len(set(levels)) < len(levels):
        raise DataError(f"two categories of '{name}' have the same label; rename them")
    logical = categories.dtype.kind == "b" and levels == ("FALSE", "TRUE")
    return Factor(array.codes, levels, bool(array.ordered), logical)


def _from_extension(array: Any, dtype: Any, name: str) -> Any:
    kind = getattr(dtype, "kind", "O")
    if kind in "Mm" or isinstance(dtype, (pd.DatetimeTZDtype, pd.PeriodDtype)):
        _reject_time(name)
    if kind == "b":
        missing = np.asarray(array.isna())
        if not missing.any():
            return array.to_numpy(dtype=bool)
        codes = array.to_numpy(dtype=np.float64, na_value=-1.0).astype(np.int64)
        return Factor(codes, ("FALSE", "TRUE"), logical=True)
    if kind in "iu" and not array.isna().any():
        return array.to_numpy(dtype=np.int64 if kind == "i" else np.uint64)
    if kind in "iuf":
        return array.to_numpy(dtype=np.float64, na_value=np.nan)
    return _factorize(array, text=True)


def _from_object(array: NDArray[Any], name: str) -> Value:
    kind = pd.api.types.infer_dtype(array, skipna=True)
    if kind == "string":
        return _factorize(array, text=True)
    if kind in ("integer", "floating", "mixed-integer-float", "decimal"):
        return np.array([np.nan if pd.isna(v) else float(v) for v in array])
    if kind == "boolean":
        codes = np.array([-1 if pd.isna(v) else int(v) for v in array])
        return codes.astype(bool) if (codes >= 0).all() else Factor(codes, ("FALSE", "TRUE"), logical=True)
    if kind == "empty":
        return np.full(array.size, np.nan)
    if kind in ("datetime64", "datetime", "date", "timedelta64", "timedelta", "time", "period"):
        _reject_time(name)
    if kind == "mixed-integer":  # text and numbers
        values = np.array([None if pd.isna(v) else label_of(v) for v in array], dtype=object)
        return _factorize(values, text=True)
    raise DataError(
        f"column '{name}' holds objects of type {type(next(v for v in array if v is not None)).__name__}; "
        "convert it to numbers or text"
    )


def _factorize(values: Any, text: bool = False) -> Factor:
    """Sorted unique values as levels; numbers sort as numbers. NaN and None are missing."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu" and values.size:
        low, high = int(values.min()), int(values.max())
        if high - low <= 4 * values.size + 1000:  # a table is faster than hashing
            shifted = values.astype(np.int64) - low
            codes, used = _compress(shifted, high - low + 1)
            return Factor(codes, tuple(map(str, (np.flatnonzero(used) + low).tolist())))
    codes, uniques = pd.factorize(values)
    found = uniques.tolist() if hasattr(uniques, "tolist") else list(uniques)
    order = sorted(range(len(found)), key=found.__getitem__)
    rank = np.empty(len(found) + 1, dtype=np.int64)
    rank[-1] = -1  # codes of missing values are -1, which indexes the last entry
    rank[order] = np.arange(len(found))
    levels = tuple(label_of(found[i]) for i in order)
    if not text and len(set(levels)) < len(levels):  # numbers equal to 15 digits are one level, as in R
        merged = tuple(dict.fromkeys(levels))
        position = {level: i for i, level in enumerate(merged)}
        rank[order] = [position[level] for level in levels]
        levels = merged
    return Factor(rank[codes], levels, text=text)


def _compress(codes: NDArray[Any], size: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Codes renumbered over those that occur, and which occur (a table of length `size`)."""
    used = np.zeros(size, dtype=bool)
    used[codes] = True
    if used.all():
        return codes.astype(np.int64, copy=False), used
    return (np.cumsum(used) - 1)[codes], used


def as_factor(value: Value) -> Factor:
    if isinstance(value, Factor):
        return value
    if isinstance(value, Matrix):
        raise DataError("a matrix cannot be a factor")
    array = np.asarray(value)
    if array.dtype.kind == "b":
        return Factor(array.astype(np.int64), ("FALSE", "TRUE"), logical=True)
    return _factorize(array)


def drop_unused(factor: Factor) -> Factor:
    """Without the levels that do not occur (a logical keeps both, as in R)."""
    if factor.logical or not factor.levels:
        return factor
    counts = np.bincount(factor.codes[factor.codes >= 0] if factor.codes.min(initial=0) < 0 else factor.codes,
                         minlength=len(factor.levels))  # fmt: skip
    if counts.all():
        return factor
    used = counts > 0
    rank = np.append(np.where(used, np.cumsum(used) - 1, -1), -1)
    levels = tuple(level for level, u in zip(factor.levels, used.tolist(), strict=True) if u)
    return _replace(factor, codes=rank[factor.codes], levels=levels)


def _missing(value: Value) -> NDArray[np.bool_] | None:
    """Rows with a missing value; None where there are none."""
    if isinstance(value, Factor):
        return np.less(value.codes, 0) if value.codes.min(initial=0) < 0 else None
    bad: NDArray[np.bool_]
    if isinstance(value, Matrix):
        bad = np.asarray(np.isnan(value.values).any(axis=1))
    elif value.dtype.kind != "f":
        return None
    else:
        bad = np.isnan(value)
    return bad if bad.any() else None


def _take(value: Value, rows: NDArray[Any] | None) -> Value:
    if rows is None:
        return value
    if isinstance(value, Factor):
        return _replace(value, codes=value.codes[rows])
    if isinstance(value, Matrix):
        return Matrix(value.values[rows], value.suffixes)
    return value[rows]


def combine(a: Factor, b: Factor) -> tuple[Factor, NDArray[np.int64]]:
    """The interaction a:b of two factors without missing codes: observed combinations, `a` varying slowest.

    Returns the factor and the observed pairs as sorted numbers code_a * len(b.levels) + code_b.
    """
    size = len(a.levels) * len(b.levels)
    pair = a.codes.astype(np.int64) * len(b.levels) + b.codes  # int64: category codes are int8 or int16
    if size <= 4 * pair.size + 1000:
        codes, used = _compress(pair, size)
        observed = np.flatnonzero(used)
    else:
        observed, codes = np.unique(pair, return_inverse=True)
    first, second = np.divmod(observed, len(b.levels))
    levels = tuple(
        f"{a.levels[i]}:{b.levels[j]}" for i, j in zip(first.tolist(), second.tolist(), strict=True)
    )
    return Factor(codes, levels), observed


# ------------------------------------------------------------------------------------------------- evaluator


class Evaluator:
    """Evaluates R expressions on a table.

    With `fitting`, what stateful functions learn is written to `state` (key: the call as text) and the levels
    of factor columns to `levels`; without, they are read from there.
    """

    def __init__(
        self,
        table: Table,
        text: str,
        state: dict[str, Any],
        levels: dict[str, Factor],
        fitting: bool,
    ) -> None:
        self.table, self.text, self.state, self.levels, self.fitting = table, text, state, levels, fitting
        self._cache: dict[str, Value] = {}

    def fail(self, node: Node, what: str, remedy: str = "") -> NoReturn:
        if self.text[node.start : node.end].strip():
            fail(self.text, node.start, what, remedy, node.end)
        raise FormulaError(f"{what}; {remedy}" if remedy else what)

    # -- whole variables

    def variable(self, node: Node) -> Value:
        """A model variable: ndarray (n,) float, Factor or Matrix with n rows."""
        label = deparse(node)
        if label not in self._cache:
            with np.errstate(all="ignore"):
                self._cache[label] = self._as_variable(self.evaluate(node), node)
        return self._cache[label]

    def _as_variable(self, value: Value, node: Node) -> Value:
        if isinstance(value, (Factor, Matrix)):
            if isinstance(value, Matrix) and value.values.shape[1] == 1:  # R gives a single column no number
                return value.values[:, 0]
            return value
        if isinstance(value, np.ndarray) and value.ndim == 1:
            if value.size == 1 != self.table.n:
                self.fail(node, f"'{deparse(node)}' is a single number, not a column")
            return as_factor(value) if value.dtype.kind == "b" else value.astype(np.float64, copy=False)
        self.fail(
            node, f"'{deparse(node)}' is not a column of numbers or a factor", "name a column of the data"
        )

    def group(self, node: Node) -> Factor:
        """A grouping factor without ':'."""
        label = "group " + deparse(node)
        if label not in self._cache:
            value = self.evaluate(node)
            if not isinstance(value, (Factor, np.ndarray)):
                self.fail(node, f"'{deparse(node)}' cannot be a grouping factor", "name a column of the data")
            self._cache[label] = as_factor(value)
        return self._cache[label]

    # -- expressions

    def evaluate(self, node: Node) -> Value:
        if isinstance(node, Name):
            return self.name(node)
        if isinstance(node, Num):
            return node.value
        if isinstance(node, (Str, Const)):
            return node.value
        if isinstance(node, Paren):
            return self.evaluate(node.inner)
        if isinstance(node, Unary):
            value = self.evaluate(node.operand)
            if node.op == "!":
                return _from_logical3(1.0 - self.logical3(value, node))
            number = self.number(value, node)
            return -number if node.op == "-" else number
        if isinstance(node, Binary):
            return self.binary(node)
        assert isinstance(node, Call)
        return self.call(node)

    def name(self, node: Name) -> Value:
        name = node.name
        if name not in self.table and name in CONSTANTS:
            return CONSTANTS[name]
        value = self.table.column(name)
        if isinstance(value, Factor):
            if self.fitting:
                self.levels.setdefault(name, _replace(value, codes=value.codes[:0]))
            elif name in self.levels:
                value = _on_levels(value, self.levels[name])
        elif not self.fitting and name in self.levels:
            value = _on_levels(as_factor(value), self.levels[name])
        return value

    def number(self, value: Value, node: Node) -> Any:
        """Float array or float for arithmetic; a factor is an error."""
        if isinstance(value, np.ndarray):
            return value.astype(np.float64, copy=False)
        if isinstance(value, (bool, int, float)):
            return float(value)
        if isinstance(value, list):
            return np.array([self.number(v, node) for v in value])
        if isinstance(value, Factor) and value.logical:
            return np.where(value.codes < 0, np.nan, value.codes)
        if isinstance(value, Matrix):
            return value.values
        what = "a factor or text" if isinstance(value, (Factor, str)) else "something else"
        self.fail(
            node, f"'{deparse(node)}' must be numeric but is {what}", "use as.numeric() if it holds numbers"
        )

    def logical3(self, value: Value, node: Node) -> Any:
        """1, 0 or NaN."""
        number = self.number(value, node)
        return np.where(np.isnan(number), np.nan, number != 0)

    def binary(self, node: Binary) -> Value:
        op = node.op
        left, right = self.evaluate(node.left), self.evaluate(node.right)
        if op in ("&", "&&", "|", "||"):
            a, b = self.logical3(left, node.left), self.logical3(right, node.right)
            if op[0] == "&":
                return _from_logical3(np.where((a == 0) | (b == 0), 0.0, a * b))
            return _from_logical3(np.where((a == 1) | (b == 1), 1.0, a + b))
        if op in _COMPARE:
            return self.compare(op, left, right, node)
        if op == "%in%":
            chosen = right if isinstance(right, list) else [right]
            if isinstance(left, Factor):
                wanted = {label_of(v) for v in chosen}
                hit = np.array([level in wanted for level in left.levels] + [False])
                return hit[left.codes]
            return np.isin(self.number(left, node.left), [self.number(v, node.right) for v in chosen])
        if op == ":":
            if isinstance(left, Factor) and isinstance(right, Factor):
                return _cross(left, right, ":", slow_first=True)
            a, b = self.number(left, node.left), self.number(right, node.right)
            if isinstance(a, float) and isinstance(b, float):
                return [
                    float(v) for v in np.arange(a, b + (0.5 if b >= a else -0.5), 1.0 if b >= a else -1.0)
                ]
            self.fail(node, f"'{deparse(node)}' mixes numbers and factors")
        if op not in _ARITHMETIC:
            self.fail(node, f"'{op}' cannot be used here")
        a, b = self.number(left, node.left), self.number(right, node.right)
        if isinstance(a, float) and isinstance(b, float):
            return float(_ARITHMETIC[op](np.float64(a), np.float64(b)))
        return _ARITHMETIC[op](a, b)

    def compare(self, op: str, left: Value, right: Value, node: Binary) -> Value:
        if isinstance(right, Factor) and not isinstance(left, Factor):
            flipped = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}.get(op, op)
            return self.compare(flipped, right, left, node)
        if isinstance(left, Factor):
            if isinstance(right, Factor):
                labels = {level: i for i, level in enumerate(left.levels)}
                table = np.array([labels.get(level, -2) for level in right.levels] + [-1])
                other: Any = table[right.codes]
                absent = (left.codes < 0) | (right.codes < 0)
                order_known = left.levels == right.levels and left.ordered
            else:
                label = label_of(right)
                other = left.levels.index(label) if label in left.levels else -2
                absent = left.codes < 0
                order_known = left.ordered and other >= 0
            if op not in ("==", "!=") and not order_known:
                if not left.text or not isinstance(right, str):
                    self.fail(
                        node, f"'{op}' needs numbers or an ordered factor", "compare factors with == or !="
                    )
                hit = np.array([_COMPARE[op](level, right) for level in left.levels] + [False])[left.codes]
            else:
                hit = _COMPARE[op](left.codes, other)
            return _from_logical3(np.where(absent, np.nan, hit)) if absent.any() else hit
        if isinstance(left, str) or isinstance(right, str):
            self.fail(
                node, f"'{deparse(node)}' compares numbers with text", "write the number without quotes"
            )
        a, b = self.number(left, node.left), self.number(right, node.right)
        hit = _COMPARE[op](a, b)
        absent = np.isnan(a) | np.isnan(b)
        return _from_logical3(np.where(absent, np.nan, hit)) if np.any(absent) else hit

    # -- calls

    def call(self, node: Call) -> Value:
        name = base_name(node.func)
        if name in _ELEMENTWISE:
            x = self.number(self.argument(node, "x"), node)
            return _ELEMENTWISE[name](x)
        handler = getattr(self, "do_" + name.replace(".", "_"), None)
        if handler is None:
            self.fail(node, f"{node.func}() cannot be used here")
        return handler(node)

    def bind(self, node: Call, *names: str) -> dict[str, Value]:
        """Arguments by name, positional ones filled in R's order; only those given."""
        given: dict[str, Node] = {}
        for key, arg in node.args:
            if key is not None:
                if key not in names:
                    self.fail(arg, f"{node.func}() has no argument '{key}'", f"it has {', '.join(names)}")
                given[key] = arg
        free = [n for n in names if n not in given]
        for key, arg in node.args:
            if key is None:
                if not free:
                    self.fail(arg, f"too many arguments for {node.func}()", f"it takes {', '.join(names)}")
                given[free.pop(0)] = arg
        if names and names[0] not in given:
            self.fail(node, f"{node.func}() needs an argument")
        return {key: self.evaluate(arg) for key, arg in given.items()}

    def argument(self, node: Call, name: str) -> Value:
        return self.bind(node, name)[name]

    def integer(self, value: Value, node: Node, what: str) -> int | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, float) or value != int(value):
            self.fail(node, f"{what} must be a whole number")
        return int(value)

    def numbers(self, value: Value, node: Node) -> list[float] | None:
        if value is None:
            return None
        out = np.atleast_1d(self.number(value, node))
        return [float(v) for v in out]

    def column_of(self, value: Value, node: Node) -> Float:
        x = self.number(value, node)
        if not isinstance(x, np.ndarray) or x.ndim != 1:
            self.fail(node, f"{deparse(node)} needs a column of numbers")
        return x

    def learned(self, node: Node, fit: Callable[[], Any]) -> Any:
        """What a stateful call learned from the data of the fit."""
        key = deparse(node)
        if self.fitting or key not in self.state:
            self.state[key] = fit()
        return self.state[key]

    def do_I(self, node: Call) -> Value:
        return self.argument(node, "x")

    do_offset = do_I

    def do_c(self, node: Call) -> Value:
        out: list[Any] = []
        for _, arg in node.args:
            value = self.evaluate(arg)
            out.extend(value if isinstance(value, list) else [value])
        return out

    def do_log(self, node: Call) -> Value:
        args = self.bind(node, "x", "base")
        out = np.log(self.number(args["x"], node))
        return out / np.log(self.number(args["base"], node)) if "base" in args else out

    def do_round(self, node: Call) -> Value:
        args = self.bind(node, "x", "digits")
        return np.round(
            self.number(args["x"], node), self.integer(args.get("digits", 0.0), node, "digits") or 0
        )

    def do_is_na(self, node: Call) -> Value:
        value = self.argument(node, "x")
        bad = _missing(self._as_variable(value, node))
        return np.zeros(self.table.n, dtype=bool) if bad is None else bad

    def do_ifelse(self, node: Call) -> Value:
        args = self.bind(node, "test", "yes", "no")
        if len(args) < 3:
            self.fail(node, "ifelse() needs test, yes and no")
        test = self.logical3(args["test"], node)
        if isinstance(args["yes"], str) and isinstance(args["no"], str):
            levels = sorted({args["yes"], args["no"]})
            codes = np.where(test == 1, levels.index(args["yes"]), levels.index(args["no"]))
            return Factor(np.where(np.isnan(test), -1, codes), tuple(levels), text=True)
        yes, no = self.number(args["yes"], node), self.number(args["no"], node)
        return np.where(np.isnan(test), np.nan, np.where(test == 1, yes, no))

    def _fold(self, node: Call, by: Callable[[Any, Any], Any]) -> Value:
        values = [self.number(self.evaluate(arg), node) for _, arg in node.args]
        out = values[0] if values else self.fail(node, f"{node.func}() needs arguments")
        for v in values[1:]:
            out = by(out, v)
        return out

    def do_pmin(self, node: Call) -> Value:
        return self._fold(node, np.minimum)

    def do_pmax(self, node: Call) -> Value:
        return self._fold(node, np.maximum)

    def _summary(self, node: Call, by: Callable[[Float], Any]) -> Value:
        """mean(x) and the like: the value of the fit's data is kept for new data."""
        x = self.column_of(self.argument(node, "x"), node)
        return self.learned(
            node, lambda: float(by(x[np.isfinite(x)])) if np.isfinite(x).any() else float("nan")
        )

    def do_mean(self, node: Call) -> Value:
        return self._summary(node, np.mean)

    def do_median(self, node: Call) -> Value:
        return self._summary(node, np.median)

    def do_min(self, node: Call) -> Value:
        return self._summary(node, np.min)

    def do_max(self, node: Call) -> Value:
        return self._summary(node, np.max)

    def do_sd(self, node: Call) -> Value:
        return self._summary(node, lambda x: np.std(x, ddof=1))

    # stateful columns

    def do_poly(self, node: Call) -> Value:
        args = self.bind(node, "x", "degree", "raw")
        x = self.column_of(args["x"], node)
        degree = self.integer(args.get("degree", 1.0), node, "degree")
        assert degree is not None
        if degree < 1:
            self.fail(node, "the degree must be at least 1")
        if args.get("raw") is True:
            basis: _transforms.Transform = _transforms.RawPoly(degree)
        else:
            basis = self.learned(node, lambda: _transforms.Poly.fit(x, degree, deparse(node)))
        return Matrix(basis(x), _contrasts.numbers(degree))

    def do_bs(self, node: Call) -> Value:
        args = self.bind(node, "x", "df", "knots", "degree", "intercept", "Boundary.knots")
        x = self.column_of(args["x"], node)
        degree = self.integer(args.get("degree", 3.0), node, "degree")
        assert degree is not None
        basis = self.learned(
            node,
            lambda: _transforms.BSpline.fit(
                x,
                self.integer(args.get("df"), node, "df"),
                self.numbers(args.get("knots"), node),
                degree,
                bool(args.get("intercept", False)),
                self.numbers(args.get("Boundary.knots"), node),
                deparse(node),
            ),
        )
        values = basis(x)
        return Matrix(values, _contrasts.numbers(values.shape[1]))

    def do_ns(self, node: Call) -> Value:
        args = self.bind(node, "x", "df", "knots", "intercept", "Boundary.knots")
        x = self.column_of(args["x"], node)
        basis = self.learned(
            node,
            lambda: _transforms.NSpline.fit(
                x,
                self.integer(args.get("df"), node, "df"),
                self.numbers(args.get("knots"), node),
                bool(args.get("intercept", False)),
                self.numbers(args.get("Boundary.knots"), node),
                deparse(node),
            ),
        )
        values = basis(x)
        return Matrix(values, _contrasts.numbers(values.shape[1]))

    def do_scale(self, node: Call) -> Value:
        args = self.bind(node, "x", "center", "scale")
        x = self.column_of(args["x"], node)
        center, scale = args.get("center", True), args.get("scale", True)
        for value in (center, scale):
            if not isinstance(value, (bool, float)):
                self.fail(node, "center and scale must be TRUE, FALSE or a number")
        return self.learned(node, lambda: _transforms.Scale.fit(x, center, scale, deparse(node)))(x)

    def do_center(self, node: Call) -> Value:
        x = self.column_of(self.argument(node, "x"), node)
        return self.learned(node, lambda: _transforms.Scale.fit(x, True, False, deparse(node)))(x)

    # factors and conversions

    def do_factor(self, node: Call) -> Value:
        args = self.bind(node, "x", "levels", "labels", "ordered")
        ordered = args.get("ordered")
        return self._factor(node, args, None if ordered is None else bool(ordered))

    def do_ordered(self, node: Call) -> Value:
        return self._factor(node, self.bind(node, "x", "levels", "labels"), True)

    def do_as_factor(self, node: Call) -> Value:
        return self._factor(node, self.bind(node, "x"), None, keep_unused=True)

    def _factor(
        self, node: Call, args: dict[str, Value], ordered: bool | None, keep_unused: bool = False
    ) -> Factor:
        value = args["x"]
        if not isinstance(value, (np.ndarray, Factor)):
            self.fail(node, f"{deparse(node)} needs a column")
        factor = as_factor(value)
        was_ordered = isinstance(value, Factor) and value.ordered
        if not keep_unused and isinstance(value, Factor):
            factor = drop_unused(factor)
        if "levels" in args:
            wanted = args["levels"] if isinstance(args["levels"], list) else [args["levels"]]
            factor = _on_levels(factor, Factor(factor.codes, tuple(map(label_of, wanted))), extra=False)
        elif not self.fitting and deparse(node) in self.state:
            factor = _on_levels(factor, Factor(factor.codes, self.state[deparse(node)]))
        if self.fitting:
            self.state[deparse(node)] = factor.levels
        levels = factor.levels
        if args.get("labels") is not None:
            labels = [
                label_of(v)
                for v in (args["labels"] if isinstance(args["labels"], list) else [args["labels"]])
            ]
            if len(labels) < len(levels) and not self.fitting:
                labels += list(levels[len(labels) :])
            if len(labels) != len(levels):
                self.fail(node, f"{len(labels)} labels for {len(levels)} levels")
            levels = tuple(labels)
        return Factor(factor.codes, levels, was_ordered if ordered is None else ordered)

    def do_relevel(self, node: Call) -> Value:
        args = self.bind(node, "x", "ref")
        if "ref" not in args:
            self.fail(node, "relevel() needs ref, the level to put first")
        factor = as_factor(args["x"])
        ref = label_of(args["ref"])
        if ref not in factor.levels:
            if not self.fitting:
                return factor
            self.fail(node, f"'{ref}' is not a level", f"the levels are {', '.join(factor.levels[:12])}")
        first = factor.levels.index(ref)
        order = [first] + [i for i in range(len(factor.levels)) if i != first]
        rank = np.empty(len(order) + 1, dtype=np.int64)
        rank[order], rank[-1] = np.arange(len(order)), -1
        return _replace(factor, codes=rank[factor.codes], levels=tuple(factor.levels[i] for i in order))

    def do_interaction(self, node: Call) -> Value:
        factors = [as_factor(self.evaluate(arg)) for key, arg in node.args if key is None]
        if len(factors) != len(node.args) or not factors:
            self.fail(node, "interaction() takes columns only")
        out = factors[0]
        for f in factors[1:]:
            out = _cross(out, f, ".", slow_first=False)
        return out

    def do_C(self, node: Call) -> Value:
        words = {i: arg.name for i, (_, arg) in enumerate(node.args) if i > 0 and isinstance(arg, Name)}
        args = [(key, words.get(i)) for i, (key, _) in enumerate(node.args)]
        factor = (
            as_factor(self.evaluate(node.args[0][1])) if node.args else self.fail(node, "C() needs a factor")
        )
        spec: Any = None
        base: int | None = None
        for i, (key, word) in enumerate(args[1:], start=1):
            value = word if word is not None else self.evaluate(node.args[i][1])
            if key == "base":
                base = self.integer(value, node, "base")
            elif key in (None, "contr") and spec is None:
                spec = np.array(value) if isinstance(value, list) else value
            else:
                self.fail(node.args[i][1], "C() takes a factor, contrasts and base")
        if base is not None or (
            isinstance(spec, str) and spec.startswith("contr.") and spec in words.values()
        ):
            spec = _contrasts.Numbered(spec if isinstance(spec, str) else "treatment", base)
        return _replace(factor, contrast=spec)

    def do_cut(self, node: Call) -> Value:
        args = self.bind(node, "x", "breaks", "labels", "include.lowest", "right")
        x = self.column_of(args["x"], node)
        breaks = self.learned(node, lambda: self._breaks(x, args.get("breaks"), node))
        right, lowest = args.get("right", True), args.get("include.lowest", False)
        codes = np.searchsorted(breaks, x, side="left" if right else "right") - 1
        if lowest:
            edge = breaks[0] if right else breaks[-1]
            codes = np.where(x == edge, 0 if right else breaks.size - 2, codes)
        codes = np.where((codes < 0) | (codes > breaks.size - 2) | np.isnan(x), -1, codes)
        if isinstance(args.get("labels"), list):
            levels = tuple(label_of(v) for v in args["labels"])
        elif args.get("labels") is False:
            return np.where(codes < 0, np.nan, codes + 1.0)
        else:
            levels = _interval_labels(breaks, bool(right), bool(lowest))
        if len(levels) != breaks.size - 1:
            self.fail(node, f"{len(levels)} labels for {breaks.size - 1} intervals")
        return Factor(codes, levels)

    def _breaks(self, x: Float, given: Value, node: Node) -> Float:
        if given is None:
            self.fail(node, "cut() needs breaks")
        breaks = np.sort(np.atleast_1d(self.number(given, node)))
        if breaks.size > 1:
            return breaks
        count = int(breaks[0])
        if count < 2:
            self.fail(node, "cut() needs at least 2 intervals")
        good = x[np.isfinite(x)]
        low, high = good.min(), good.max()
        out = np.linspace(low, high, count + 1)
        out[0], out[-1] = low - (high - low) / 1000, high + (high - low) / 1000
        return out

    def do_as_numeric(self, node: Call) -> Value:
        value = self.argument(node, "x")
        if not isinstance(value, Factor) or value.logical:
            return self.number(value, node)
        if value.text:
            try:
                numbers = [float(level) for level in value.levels]
            except ValueError:
                self.fail(node, f"'{deparse(node)}': the column holds text that is not numbers")
            return np.array([*numbers, np.nan])[value.codes]
        return np.where(value.codes < 0, np.nan, value.codes + 1.0)

    def do_as_integer(self, node: Call) -> Value:
        return np.trunc(self.do_as_numeric(node))

    def do_as_logical(self, node: Call) -> Value:
        return _from_logical3(self.logical3(self.argument(node, "x"), node))

    def do_as_character(self, node: Call) -> Value:
        factor = drop_unused(as_factor(self.argument(node, "x")))
        order = sorted(range(len(factor.levels)), key=factor.levels.__getitem__)
        rank = np.empty(len(order) + 1, dtype=np.int64)
        rank[order], rank[-1] = np.arange(len(order)), -1
        return Factor(rank[factor.codes], tuple(factor.levels[i] for i in order), text=True)

    def do_cbind(self, node: Call) -> Value:
        self.fail(node, "cbind() can only be the response", "write cbind(successes, failures) ~ ...")


CONSTANTS: dict[str, Any] = {"pi": float(np.pi), "Inf": float("inf"), "T": True, "F": False}
_ELEMENTWISE: dict[str, Callable[[Any], Any]] = {
    "log2": np.log2,
    "log10": np.log10,
    "log1p": np.log1p,
    "exp": np.exp,
    "expm1": np.expm1,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "tanh": np.tanh,
    "floor": np.floor,
    "ceiling": np.ceil,
}
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
    "^": np.power,
    "%%": np.mod,
    "%/%": np.floor_divide,
}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
}


def _from_logical3(value: Any) -> Value:
    """1, 0, NaN -> bool array, or a logical Factor where some are missing."""
    if np.ndim(value) == 0:
        return bool(value)
    bad = np.isnan(value)
    if not bad.any():
        return value != 0
    return Factor(np.where(bad, -1, value).astype(np.int64), ("FALSE", "TRUE"), logical=True)


def _on_levels(factor: Factor, target: Factor, extra: bool = True) -> Factor:
    """The factor on the levels of another; other labels get further levels at the end, or become missing."""
    if factor.levels == target.levels:
        return _replace(target, codes=factor.codes)
    known = {level: i for i, level in enumerate(target.levels)}
    more: list[str] = []
    table = np.empty(len(factor.levels) + 1, dtype=np.int64)
    table[-1] = -1
    for i, level in enumerate(factor.levels):
        if level in known:
            table[i] = known[level]
        elif extra:
            table[i] = len(known) + len(more)
            more.append(level)
        else:
            table[i] = -1
    return _replace(target, codes=table[factor.codes], levels=target.levels + tuple(more))


def _cross(a: Factor, b: Factor, separator: str, slow_first: bool) -> Factor:
    """All combinations of levels; missing where either is."""
    na, nb = len(a.levels), len(b.levels)
    ca, cb = a.codes.astype(np.int64), b.codes.astype(np.int64)
    if slow_first:
        codes = ca * nb + cb
        levels = tuple(f"{x}{separator}{y}" for x in a.levels for y in b.levels)
    else:
        codes = cb * na + ca
        levels = tuple(f"{x}{separator}{y}" for y in b.levels for x in a.levels)
    return Factor(np.where((ca < 0) | (cb < 0), -1, codes), levels)


def _interval_labels(breaks: Float, right: bool, lowest: bool) -> tuple[str, ...]:
    """R's labels of cut(): as few digits (from 3) as keep the breaks apart."""
    shown = [f"{b:.3g}" for b in breaks]
    for digits in range(3, 13):
        shown = [f"{b:.{digits}g}" for b in breaks]
        if len(set(shown)) == len(shown):
            break
    out = [
        f"{'(' if right else '['}{a},{b}{']' if right else ')'}"
        for a, b in zip(shown, shown[1:], strict=False)
    ]
    if lowest and right:
        out[0] = "[" + out[0][1:]
    elif lowest:
        out[-1] = out[-1][:-1] + "]"
    return tuple(out)


# ---------------------------------------------------------------------------------------------- model matrix


@dataclass(frozen=True)
class Coded:
    """A variable of the fit as columns: how to make them is kept for new data."""

    label: str
    kind: str  # "numeric", "matrix" or "factor"
    levels: tuple[str, ...] = ()
    contrasts: _contrasts.Coding | None = None
    full: _contrasts.Coding | None = None
    suffixes: tuple[str, ...] = ()

    def columns(self, value: Value, by_contrasts: bool) -> tuple[Float, tuple[str, ...]]:
        """(n, k) columns and the suffixes of their names; rows with a missing factor value are NaN."""
        if self.kind == "numeric":
            return value[:, None], ("",)
        if self.kind == "matrix":
            return value.values, self.suffixes
        coding = self.contrasts if by_contrasts else self.full
        assert coding is not None
        table, suffixes = coding
        codes = value.codes
        out = table.take(codes, axis=0, mode="clip")
        if codes.size and codes.min() < 0:
            out[codes < 0] = np.nan
        return out, suffixes


def code_variable(value: Value, label: str, spec: Any = None) -> tuple[Coded, Value]:
    """The coding of a variable on the rows of the fit, and its value with unused levels dropped."""
    if isinstance(value, Matrix):
        return Coded(label, "matrix", suffixes=value.suffixes), value
    if not isinstance(value, Factor):
        if spec is not None:
            raise DataError(f"contrasts were given for '{label}', which is not a factor; use factor({label})")
        return Coded(label, "numeric"), value
    value = drop_unused(value)
    if len(value.levels) < 2:
        only = f" ('{value.levels[0]}')" if value.levels else ""
        raise DataError(
            f"factor '{label}' has only one level{only} in the rows used; remove it from the formula"
        )
    chosen = value.contrast if value.contrast is not None else spec
    coded = Coded(
        label,
        "factor",
        value.levels,
        _contrasts.code(chosen, value.levels, value.ordered, label),
        _contrasts.indicators(value.levels),
    )
    return coded, value


def matrix_plan(terms: Terms, is_factor: Mapping[int, bool]) -> list[list[tuple[int, bool]]]:
    """Per term: (variable index, coded by contrasts?) in order, R's rule without intercept included."""
    plan = [
        [(i, pattern[i]) for i in bits(code)]
        for code, pattern in zip(terms.codes, terms.by_contrasts, strict=True)
    ]
    if not terms.intercept:
        # as model.matrix: the first factor of the first term that has one gets all its indicators
        for columns in plan:
            for k, (i, _) in enumerate(columns):
                if is_factor[i]:
                    columns[k] = (i, False)
                    return plan
    return plan


@dataclass(frozen=True)
class MatrixSpec:
    """How to make a model matrix: terms, coded variables, and what the columns are called."""

    terms: Terms
    coded: dict[int, Coded]
    plan: list[list[tuple[int, bool]]]
    names: tuple[str, ...]
    assign: tuple[int, ...]

    @staticmethod
    def fit(terms: Terms, coded: dict[int, Coded]) -> MatrixSpec:
        plan = matrix_plan(terms, {i: c.kind == "factor" for i, c in coded.items()})
        names: list[str] = ["(Intercept)"] if terms.intercept else []
        assign: list[int] = [0] * len(names)
        for t, columns in enumerate(plan, start=1):
            labels = [""]
            for k, (i, by_contrasts) in enumerate(columns):
                c = coded[i]
                if c.kind == "factor":
                    coding = c.contrasts if by_contrasts else c.full
                    assert coding is not None
                    suffixes = coding[1]
                else:
                    suffixes = c.suffixes if c.kind == "matrix" else ("",)
                own = [c.label + s for s in suffixes]
                labels = own if k == 0 else [f"{a}:{b}" for b in own for a in labels]
            names += labels
            assign += [t] * len(labels)
        return MatrixSpec(terms, coded, plan, tuple(names), tuple(assign))

    def build(self, values: Mapping[int, Value], n: int) -> Float:
        """(n, p) in C order; within an interaction the first variable varies fastest."""
        out = np.empty((n, len(self.names)))
        at = 0
        if self.terms.intercept:
            out[:, 0] = 1.0
            at = 1
        for columns in self.plan:
            block: Float | None = None
            for i, by_contrasts in columns:
                own, _ = self.coded[i].columns(values[i], by_contrasts)
                block = own if block is None else (own[:, :, None] * block[:, None, :]).reshape(n, -1)
            assert block is not None
            out[:, at : at + block.shape[1]] = block
            at += block.shape[1]
        return out


def independent_columns(X: Float) -> NDArray[np.bool_]:
    """Which columns to keep, greedily from the left: residual at least 1e-7 of the column's norm (lme4)."""
    n, p = X.shape
    if p == 0:
        return np.ones(0, dtype=bool)
    gram = X.T @ X
    size = np.sqrt(np.diag(gram))
    if size.all() and np.isfinite(size).all() and n >= p:
        # cheap and safe: residuals far above the tolerance need no orthogonal factor
        try:
            pivots = np.diag(np.linalg.cholesky(gram / size / size[:, None]))
            if pivots.min() > 1e-3:
                return np.ones(p, dtype=bool)
        except np.linalg.LinAlgError:
            pass
    scaled = X / np.where(np.abs(X).max(axis=0, initial=0.0) > 0, np.abs(X).max(axis=0, initial=0.0), 1.0)
    r: Float = np.linalg.qr(scaled, mode="r")  # type: ignore[assignment]
    norms = np.sqrt((r**2).sum(0))
    keep = list(range(p))
    at = 0
    while at < len(keep):
        # r is the factor of the columns in `keep`; a dropped one must not shadow those after it
        residual = abs(r[at, at]) if at < r.shape[0] else 0.0
        if residual < RANK_TOLERANCE * norms[keep[at]] or norms[keep[at]] == 0.0:
            del keep[at]
            r = np.linalg.qr(np.delete(r, at, axis=1), mode="r")  # type: ignore[assignment]
        else:
            at += 1
    out = np.zeros(p, dtype=bool)
    out[keep] = True
    return out


# ------------------------------------------------------------------------------------------ grouping factors


@dataclass(frozen=True)
class GroupSpec:
    """A grouping factor for new data: a leaf (expression, levels) or a pair and its observed combinations."""

    node: Node
    levels: tuple[str, ...]
    left: GroupSpec | None = None
    right: GroupSpec | None = None
    observed: NDArray[np.int64] | None = None

    def codes(self, evaluator: Evaluator) -> tuple[NDArray[np.int64], Callable[[NDArray[Any]], list[str]]]:
        """Level numbers of the fit (-1 unknown or missing) and a function giving the labels of rows."""
        if self.left is None or self.right is None:
            factor = evaluator.group(self.node)
            known = {level: i for i, level in enumerate(self.levels)}
            table = np.array([known.get(level, -1) for level in factor.levels] + [-1], dtype=np.int64)
            return table[factor.codes], lambda rows: [
                factor.levels[c] if c >= 0 else "NA" for c in factor.codes[rows].tolist()
            ]
        a, labels_a = self.left.codes(evaluator)
        b, labels_b = self.right.codes(evaluator)
        assert self.observed is not None
        pair = a * len(self.right.levels) + b
        at = np.searchsorted(self.observed, pair)
        at[at == self.observed.size] = 0
        good = (a >= 0) & (b >= 0) & (self.observed[at] == pair)
        return np.where(good, at, -1), lambda rows: [
            f"{x}:{y}" for x, y in zip(labels_a(rows), labels_b(rows), strict=True)
        ]


def _leaves(node: Node) -> Iterable[Node]:
    node = strip_parens(node)
    if isinstance(node, Binary) and node.op == ":":
        yield from _leaves(node.left)
        yield from _leaves(node.right)
    else:
        yield node


# ------------------------------------------------------------------------------------------------ model data


@dataclass(frozen=True)
class ReTermData:
    """One random-effects term on the rows of the fit."""

    group: str  # the grouping factor as lme4 prints it, e.g. "herd" or "cask:batch"
    names: tuple[str, ...]  # of the k columns
    z: Float  # (n, k)
    level: NDArray[np.int32]  # (n,), 0 <= level < m
    levels: NDArray[Any]  # (m,) labels as text, in the factor's order; every one occurs


@dataclass(frozen=True)
class NewTerm:
    """A random-effects term on new data: level is -1 where the label was not in the fit."""

    group: str
    z: Float
    level: NDArray[np.int32]
    unknown: tuple[str, ...]  # labels not in the fit, in order of appearance


@dataclass(frozen=True)
class _BarSpec:
    """How to make one random-effects term: matrix, which of its columns (None = all), grouping factor."""

    matrix: MatrixSpec
    columns: tuple[int, ...] | None
    group: GroupSpec
    name: str
    text: str  # the bar, e.g. "(1 | herd)"


@dataclass(frozen=True)
class ModelData:
    """Response, model matrices and labels of a mixed model; n rows are those kept.

    y is 0/1 for a binary response and the proportion of successes for cbind(successes, failures), whose row
    totals are `trials`. `assign` gives each column of X its term: 0 is the intercept, t `term_labels[t - 1]`.
    """

    y: Float | None  # (n,); None only for a one-sided formula with require_response=False
    trials: Float | None  # (n,)
    response_kind: str  # "numeric", "binary" or "cbind"
    response_levels: tuple[str, str] | None  # (failure, success)
    response_name: str
    X: Float  # (n, p)
    x_names: tuple[str, ...]
    dropped: tuple[str, ...]  # aliased columns left out
    all_x_names: tuple[str, ...]
    assign: tuple[int, ...]
    term_labels: tuple[str, ...]
    terms: tuple[ReTermData, ...]
    weights: Float | None  # (n,)
    offset: Float | None  # (n,)
    row_index: pd.Index
    keep: NDArray[np.bool_]  # over the original rows
    n_missing: int
    missing_columns: tuple[str, ...]
    notes: tuple[str, ...]
    formula: Formula
    _fixed: MatrixSpec = field(repr=False)
    _bars: tuple[_BarSpec, ...] = field(repr=False)
    _x_keep: NDArray[np.bool_] = field(repr=False)
    _state: dict[str, Any] = field(repr=False)
    _levels: dict[str, Factor] = field(repr=False)
    _offset_arg: Node | None | bool = field(repr=False)  # expression, None = none given, True = an array

    @property
    def nobs(self) -> int:
        return self.X.shape[0]

    @property
    def formula_bars(self) -> tuple[str, ...]:
        """The bar of each of `terms`, as `str` of the `Bar` in `formula.bars` it came from."""
        return tuple(b.text for b in self._bars)

    def _evaluator(self, newdata: Any) -> Evaluator:
        table = newdata if isinstance(newdata, Table) else Table(newdata, "newdata")
        return Evaluator(table, self.formula.text, self._state, self._levels, fitting=False)

    def matrix_for(self, newdata: Any, offset: Any = None) -> tuple[Float, Float | None]:
        """Model matrix (n_new, p) and offset (n_new,) or None on new data; the response is not needed.

        Rows with missing values come out as NaN. `offset` replaces the offset argument of the fit; it is
        needed if that was an array. DataError where a column is missing or has levels not in the fit.
        """
        evaluator = self._evaluator(newdata)
        n = evaluator.table.n
        X = _new_matrix(self._fixed, evaluator)
        total: Float | None = None
        for node in self.formula.offsets:
            total = _plus(total, _numeric_column(evaluator, node, "offset"))
        if offset is not None:
            total = _plus(total, _argument(offset, "offset", evaluator)[0])
        elif isinstance(self._offset_arg, Node):
            total = _plus(total, _numeric_column(evaluator, self._offset_arg, "offset"))
        elif self._offset_arg is True:
            raise DataError(
                "the model was fitted with an offset array; give the offset of the new rows as well"
            )
        assert X.shape[0] == n
        return (X if self._x_keep.all() else X[:, self._x_keep]), total

    def terms_for(self, newdata: Any) -> list[NewTerm]:
        """The random-effects terms on new data, in the order of `terms`."""
        evaluator = self._evaluator(newdata)
        out = []
        made: dict[int, Float] = {}
        found: dict[str, tuple[NDArray[np.int32], tuple[str, ...]]] = {}
        for bar in self._bars:
            if id(bar.matrix) not in made:
                made[id(bar.matrix)] = _new_matrix(bar.matrix, evaluator)
            z = made[id(bar.matrix)]
            if bar.columns is not None:
                z = z[:, list(bar.columns)]
            if bar.name not in found:
                codes, labels = bar.group.codes(evaluator)
                rows = np.flatnonzero(codes < 0)
                found[bar.name] = codes.astype(np.int32), tuple(dict.fromkeys(labels(rows)))
            level, unknown = found[bar.name]
            out.append(NewTerm(bar.name, z, level, unknown))
        return out


def _new_matrix(spec: MatrixSpec, evaluator: Evaluator) -> Float:
    values: dict[int, Value] = {}
    for i, coded in spec.coded.items():
        value = evaluator.variable(spec.terms.variables[i])
        if coded.kind == "factor":
            factor = as_factor(value)
            known = {level: k for k, level in enumerate(coded.levels)}
            table = np.array([known.get(level, -2) for level in factor.levels] + [-1], dtype=np.int64)
            codes = table[factor.codes]
            if codes.size and codes.min() == -2:
                new = [
                    lev for k, lev in enumerate(factor.levels) if table[k] == -2 and (factor.codes == k).any()
                ]
                raise DataError(
                    f"column '{coded.label}' of the new data has levels that were not in the fit: "
                    f"{_shown(new)}; "
                    f"the fit has {_shown(coded.levels)}"
                )
            values[i] = Factor(codes, coded.levels)
        elif isinstance(value, Factor):
            raise DataError(f"column '{coded.label}' was numeric in the fit but is a factor in the new data")
        else:
            values[i] = value
    with np.errstate(all="ignore"):
        return spec.build(values, evaluator.table.n)


def _shown(labels: Sequence[str], most: int = 8) -> str:
    return ", ".join(f"'{v}'" for v in labels[:most]) + (", ..." if len(labels) > most else "")


def _plus(total: Float | None, more: Float) -> Float:
    return more if total is None else total + more


def _numeric_column(evaluator: Evaluator, node: Node, role: str) -> Float:
    with np.errstate(all="ignore"):
        value = evaluator.evaluate(node)
    if isinstance(value, Factor) and not value.logical:
        raise DataError(f"the {role} '{deparse(node)}' is not numeric; it must be a column of numbers")
    number = evaluator.number(value, node)
    if not isinstance(number, np.ndarray):
        return np.full(evaluator.table.n, float(number))
    return number


def _argument(given: Any, role: str, evaluator: Evaluator) -> tuple[Float, Node | bool]:
    """A weights or offset argument as floats, and where from: an expression, or True for an array."""
    table = evaluator.table
    if isinstance(given, str):
        node: Node = Name(given) if given in table else parse_expression(given)
        for name in names_in(node):
            if name not in table and name not in CONSTANTS:
                raise DataError(f"{role}: {missing_column(name, table.columns)}")
        return _numeric_column(evaluator, node, role), node
    if np.ndim(given) == 0:
        raise TypeError(f"{role} must be a column name, an array or a Series, not {type(given).__name__}")
    if isinstance(given, pd.Series) and len(given) == table.n and not given.index.equals(table.index):
        if given.index.is_unique and set(given.index) == set(table.index):
            given = given.reindex(table.index)
    value = as_column(given, role)
    if isinstance(value, Factor) and not value.logical:
        raise DataError(f"{role} is not numeric; give a column of numbers")
    if isinstance(value, Factor):
        value = np.where(value.codes < 0, np.nan, value.codes)
    if value.size != table.n:
        raise DataError(f"{role} has {value.size} values, but the data have {table.n} rows; give one per row")
    return value.astype(np.float64, copy=False), True


@dataclass(frozen=True)
class _Response:
    y: Value  # ndarray (n,) float or Factor
    other: Float | None  # failures of cbind
    kind: str
    columns: tuple[Node, ...]


def _response(evaluator: Evaluator, node: Node) -> _Response:
    label = deparse(node)
    if isinstance(node, Call) and base_name(node.func) == "cbind":
        if len(node.args) != 2:
            evaluator.fail(
                node, f"cbind() has {len(node.args)} arguments", "write cbind(successes, failures)"
            )
        parts = [arg for _, arg in node.args]
        values = [_numeric_column(evaluator, part, "response") for part in parts]
        return _Response(values[0], values[1], "cbind", tuple(parts))
    value = evaluator.variable(node)
    if isinstance(value, Matrix):
        raise DataError(
            f"the response '{label}' has several columns; give one, or cbind(successes, failures)"
        )
    return _Response(value, None, "binary" if isinstance(value, Factor) else "numeric", (node,))


def _first_bad(bad: NDArray[np.bool_], index: pd.Index) -> str:
    return f"first in row {label_of(index[int(np.flatnonzero(bad)[0])])}"


def _check_finite(value: Value, what: str, index: pd.Index) -> None:
    if isinstance(value, Factor):
        return
    array = value.values if isinstance(value, Matrix) else value
    finite = np.isfinite(array)
    if not finite.all():
        bad = np.asarray(~finite if array.ndim == 1 else ~finite.all(axis=1))
        raise DataError(
            f"{what} has {_plural(int(bad.sum()), 'infinite value')} "
            f"({_first_bad(bad, index)}); remove or recode them"
        )


def _subset_mask(subset: Any, evaluator: Evaluator) -> NDArray[np.bool_]:
    table = evaluator.table
    if isinstance(subset, str):
        node = parse_expression(subset)
        for name in names_in(node):
            if name not in table and name not in CONSTANTS:
                raise DataError(f"subset: {missing_column(name, table.columns)}")
        with np.errstate(all="ignore"):
            value = Evaluator(table, subset, {}, {}, True).evaluate(node)
        if isinstance(value, Factor) and value.logical:
            return value.codes == 1  # missing counts as false, as in R
        if not (isinstance(value, np.ndarray) and value.dtype.kind == "b"):
            raise DataError(f"subset {subset!r} is not a condition; write e.g. \"period != '4'\"")
        return value
    if isinstance(subset, pd.Series) and not subset.index.equals(table.index) and len(subset) == table.n:
        if subset.index.is_unique and set(subset.index) == set(table.index):
            subset = subset.reindex(table.index)
    mask = np.asarray(subset)
    if mask.dtype.kind == "O":
        mask = np.array([v is True or v is np.True_ for v in mask.ravel()])
    if mask.dtype.kind != "b" or mask.ndim != 1:
        raise TypeError("subset must be a boolean array or a condition in text such as \"period != '4'\"")
    if mask.size != table.n:
        raise DataError(f"subset has {mask.size} values, but the data have {table.n} rows; give one per row")
    return mask


def build(
    formula: str | Formula,
    data: Any,
    *,
    weights: Any = None,
    offset: Any = None,
    contrasts: Mapping[str, Any] | None = None,
    subset: Any = None,
    na: str = "drop",
    require_bars: bool = True,
    require_response: bool = True,
) -> ModelData:
    """Evaluate a mixed-model formula on data.

    Args:
        formula: R's formula language with lme4's bars.
        data: DataFrame, anything with `to_pandas()`, dict of arrays, or structured array.
        weights, offset: column name (or expression), array or Series with one value per row of the data; the
            offset adds to `offset()` in the formula; rows of weight 0 are dropped.
        contrasts: column -> "treatment", "sum", "helmert", "poly", "sas" or a matrix (levels x columns). As
            in lme4 they apply to the fixed part only; use C(f, sum) in a bar.
        subset: boolean array, or a condition in text. Transforms such as poly() learn from all rows, as in R.
        na: "drop" rows with missing values in what the formula uses, or "error".
        require_bars, require_response: refuse a formula without random-effects term, without response.
    Raises:
        FormulaError, DataError, TypeError: one sentence naming the column, what was found and the remedy.
    """
    if na not in ("drop", "error"):
        raise ValueError(f"na must be 'drop' or 'error', not {na!r}")
    table = Table(data)
    parsed = parse(formula)
    if parsed.has_dot:
        parsed = parsed.resolve(table.columns)
    response_node = parsed.response
    if response_node is None and require_response:
        raise FormulaError(f"the formula has no response; write e.g. y {parsed}")
    for name in parsed.names:
        if name not in table.names and name not in CONSTANTS:
            raise DataError(missing_column(name, table.columns))
    bars = parsed.bars
    if not bars and require_bars:
        raise FormulaError(f"no random-effects term in '{parsed}': add e.g. (1 | group)")
    if table.n == 0:
        raise DataError("the data have no rows")
    contrasts = {quote_name(k) if k in table else k: v for k, v in (contrasts or {}).items()}

    state: dict[str, Any] = {}
    levels: dict[str, Factor] = {}
    ev = Evaluator(table, parsed.text, state, levels, fitting=True)

    # evaluate everything on all rows
    used: dict[str, tuple[Value, Node]] = {}  # label -> value, expression: what decides about missing rows
    response = None
    if response_node is not None:
        response = _response(ev, response_node)
        used[deparse(response.columns[0])] = (response.y, response.columns[0])
        if response.other is not None:
            used[deparse(response.columns[1])] = (response.other, response.columns[1])
    fixed = parsed.fixed_terms
    active = _active(fixed)
    for i in active:
        node = fixed.variables[i]
        used[deparse(node)] = (ev.variable(node), node)
    for bar in bars:
        for i in _active(bar.terms):
            node = bar.terms.variables[i]
            label = deparse(node)
            if label not in used:
                used[label] = (ev.variable(node), node)
        for leaf in _leaves(bar.group):
            label = "group " + deparse(leaf)
            if label not in used:
                used[label] = (ev.group(leaf), leaf)
    total_offset: Float | None = None
    for node in parsed.offsets:
        value = _numeric_column(ev, node, "offset")
        used[deparse(node)] = (value, node)
        total_offset = _plus(total_offset, value)
    offset_arg: Node | None | bool = None
    extra: list[tuple[str, Float]] = []  # arguments, with the name to give where they have missing values
    if offset is not None:
        value, offset_arg = _argument(offset, "offset", ev)
        extra.append((offset if isinstance(offset, str) else "offset", value))
        total_offset = _plus(total_offset, value)
    w: Float | None = None
    if weights is not None:
        w = _argument(weights, "weights", ev)[0]
        extra.append((weights if isinstance(weights, str) else "weights", w))

    # which rows stay
    notes: list[str] = []
    keep, rows, n_missing, missing_columns = _kept_rows(table, used, extra, subset, ev, na, notes)
    keep, rows = _without_empty_rows(table, keep, rows, w, response, notes)
    index = table.index if rows is None else table.index[rows]
    n = len(index)
    if n == 0:
        raise DataError(f"no rows are left{': ' + '; '.join(notes) if notes else ''}")
    values: dict[str, Value] = {}
    for label, (value, node) in used.items():
        value = _take(value, rows)
        if not label.startswith("group "):
            what = f"column '{node.name}'" if isinstance(node, Name) else f"'{deparse(node)}'"
            _check_finite(value, what, index)
        values[label] = value
    if total_offset is not None:
        total_offset = np.array(_take(total_offset, rows))  # a copy: never the user's own array
        _check_finite(total_offset, "the offset", index)
    if w is not None:
        w = np.array(_take(w, rows))
        _check_finite(w, "the weights vector", index)

    y, trials, kind, y_levels = _finish_response(response, values, index)

    # model matrices
    known_labels = {deparse(fixed.variables[i]) for i in active}
    for key in contrasts:
        if key not in known_labels:
            raise DataError(f"contrasts were given for '{key}', which is not a variable of the fixed part")
    specs: dict[tuple[str, bool], Coded] = {}

    def code(label: str, in_fixed: bool) -> Coded:
        spec = contrasts.get(label) if in_fixed else None
        key = (label, spec is not None)
        if key not in specs:
            specs[key], values[label] = code_variable(values[label], label, spec)
        return specs[key]

    fixed_spec = MatrixSpec.fit(fixed, {i: code(deparse(fixed.variables[i]), True) for i in active})
    X = fixed_spec.build({i: values[deparse(fixed.variables[i])] for i in active}, n)
    x_keep = independent_columns(X)
    dropped = tuple(name for name, k in zip(fixed_spec.names, x_keep.tolist(), strict=True) if not k)
    if dropped:
        X = np.ascontiguousarray(X[:, x_keep])
        notes.append(
            f"dropped {len(dropped)} aliased column{'s' if len(dropped) > 1 else ''} of the fixed effects "
            f"(rank deficient): {', '.join(dropped)}"
        )
    re_terms, bar_specs = _random_terms(bars, values, code, n)

    return ModelData(
        y=y,
        trials=trials,
        response_kind=kind,
        response_levels=y_levels,
        response_name="" if response_node is None else deparse(response_node),
        X=X,
        x_names=tuple(name for name, k in zip(fixed_spec.names, x_keep.tolist(), strict=True) if k),
        dropped=dropped,
        all_x_names=fixed_spec.names,
        assign=tuple(a for a, k in zip(fixed_spec.assign, x_keep.tolist(), strict=True) if k),
        term_labels=fixed.labels,
        terms=re_terms,
        weights=w,
        offset=total_offset,
        row_index=index,
        keep=keep,
        n_missing=n_missing,
        missing_columns=missing_columns,
        notes=tuple(notes),
        formula=parsed,
        _fixed=fixed_spec,
        _bars=bar_specs,
        _x_keep=x_keep,
        _state=state,
        _levels=levels,
        _offset_arg=offset_arg,
    )


def _active(terms: Terms) -> list[int]:
    total = 0
    for c in terms.codes:
        total |= c
    return bits(total)


def _plural(count: int, noun: str = "row") -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _kept_rows(
    table: Table,
    used: Mapping[str, tuple[Value, Node]],
    extra: Sequence[tuple[str, Float]],
    subset: Any,
    evaluator: Evaluator,
    na: str,
    notes: list[str],
) -> tuple[NDArray[np.bool_], NDArray[np.intp] | None, int, tuple[str, ...]]:
    """Rows in the subset without missing values: mask, numbers (None = all); count, columns of the rest."""
    inside = None if subset is None else _subset_mask(subset, evaluator)
    if inside is not None and not inside.any():
        raise DataError("no rows are left: the subset is empty")
    missing: NDArray[np.bool_] | None = None
    columns: dict[str, None] = {}
    for label, value in [*((k, v) for k, (v, _) in used.items()), *extra]:
        bad = _missing(value)
        if bad is None:
            continue
        if inside is not None:
            bad = bad & inside
            if not bad.any():
                continue
        names = names_in(used[label][1]) if label in used else ()
        explained = np.zeros(table.n, dtype=bool)
        for name in names:
            own = _missing(table.column(name)) if name in table else None
            if own is not None and (own & bad).any():
                columns[name] = None
                explained |= own
        if (bad & ~explained).any():  # e.g. log of a negative number
            for name in names:  # or a spline of an infinite one: that is no missing value
                raw = table.column(name) if name in table else None
                if isinstance(raw, np.ndarray) and raw.dtype.kind == "f" and np.isinf(raw[bad]).any():
                    _check_finite(np.where(bad, raw, 0.0), f"column '{name}'", table.index)
            columns[deparse(used[label][1]) if label in used else label] = None
        missing = bad if missing is None else missing | bad
    keep = np.ones(table.n, dtype=bool) if inside is None else inside
    n_missing = 0
    if missing is not None:
        n_missing = int(missing.sum())
        where = ", ".join(f"'{c}'" for c in columns)
        if na == "error":
            raise DataError(
                f"{_plural(n_missing)} with missing values in {where} ({_first_bad(missing, table.index)}); "
                "fill or remove them, or use na='drop'"
            )
        notes.append(f"{_plural(n_missing)} with missing values in {where} dropped")
        keep = keep & ~missing
    if keep.all():
        return keep, None, n_missing, tuple(columns)
    return keep, np.flatnonzero(keep), n_missing, tuple(columns)


def _without_empty_rows(
    table: Table,
    keep: NDArray[np.bool_],
    rows: NDArray[np.intp] | None,
    w: Float | None,
    response: _Response | None,
    notes: list[str],
) -> tuple[NDArray[np.bool_], NDArray[np.intp] | None]:
    """Drop rows of weight 0 and of 0 trials: they carry no information."""
    empty = np.zeros(table.n, dtype=bool)
    if w is not None:
        negative = keep & (w < 0)
        if negative.any():
            raise DataError(
                f"weights: {_plural(int(negative.sum()), 'negative value')} "
                f"({_first_bad(negative, table.index)}); weights must be 0 or more"
            )
        zero = keep & (w == 0)
        if zero.any():
            notes.append(f"{_plural(int(zero.sum()))} of weight 0 dropped")
            empty |= zero
    if response is not None and response.other is not None:
        for part, node in zip((response.y, response.other), response.columns, strict=True):
            negative = keep & (part < 0)
            if negative.any():
                raise DataError(
                    f"'{deparse(node)}' in cbind() is negative ({_first_bad(negative, table.index)}); "
                    "give counts of successes and failures"
                )
        none = keep & ~empty & (response.y + response.other == 0)
        if none.any():
            notes.append(f"{_plural(int(none.sum()))} with 0 trials dropped")
            empty |= none
    if not empty.any():
        return keep, rows
    keep = keep & ~empty
    return keep, np.flatnonzero(keep)


def _finish_response(
    response: _Response | None, values: Mapping[str, Value], index: pd.Index
) -> tuple[Float | None, Float | None, str, tuple[str, str] | None]:
    """(y, trials, kind, levels) on the kept rows."""
    if response is None:
        return None, None, "none", None
    label = deparse(response.columns[0])
    first = values[label]
    if response.kind == "cbind":
        trials = first + values[deparse(response.columns[1])]
        y = first / trials
        if y.min() == y.max() and y[0] in (0.0, 1.0):
            raise DataError(f"the response is constant: all trials are {'successes' if y[0] else 'failures'}")
        return y, trials, "cbind", None
    if response.kind == "binary":
        factor = drop_unused(first)
        if len(factor.levels) > 2:
            raise DataError(
                f"the response '{label}' has {len(factor.levels)} levels ({_shown(factor.levels)}); "
                "a model needs a numeric response or one with two levels"
            )
        y = factor.codes.astype(np.float64)
        if len(factor.levels) < 2 or y.min() == y.max():
            only = factor.levels[int(factor.codes[0])]
            raise DataError(f"the response '{label}' is constant: every row is '{only}'")
        return y, None, "binary", (factor.levels[0], factor.levels[1])
    if first.min() == first.max():
        raise DataError(f"the response '{label}' is constant: every row is {format_number(float(first[0]))}")
    return np.array(first), None, "numeric", None


def _random_terms(
    bars: Sequence[Bar],
    values: dict[str, Value],
    code: Callable[[str, bool], Coded],
    n: int,
) -> tuple[tuple[ReTermData, ...], tuple[_BarSpec, ...]]:
    """Terms in lme4's order: as written if level counts never increase, else rev(order(counts))."""
    groups: dict[str, tuple[Factor, GroupSpec, NDArray[np.int32], NDArray[Any]]] = {}
    matrices: dict[str, tuple[MatrixSpec, Float]] = {}

    def grouping(node: Node) -> tuple[Factor, GroupSpec]:
        node = strip_parens(node)
        if isinstance(node, Binary) and node.op == ":":
            a, spec_a = grouping(node.left)
            b, spec_b = grouping(node.right)
            both, observed = combine(a, b)
            return both, GroupSpec(node, both.levels, spec_a, spec_b, observed)
        factor = _replace(values["group " + deparse(node)], logical=False)
        factor = drop_unused(factor)
        return factor, GroupSpec(node, factor.levels)

    out: list[tuple[ReTermData, _BarSpec]] = []
    for bar in bars:
        name = bar.group_name
        if name not in groups:
            factor, spec = grouping(bar.group)
            if len(factor.levels) < 2:
                raise DataError(
                    f"grouping factor '{name}' has only one level ('{factor.levels[0]}'); "
                    "it needs at least 2, or remove the term"
                )
            labels = np.array(factor.levels, dtype=object)
            groups[name] = factor, spec, factor.codes.astype(np.int32), labels
        _, spec, level, labels = groups[name]
        tree = bar.lhs if bar.whole is None else bar.whole
        key = deparse(tree)
        if key not in matrices:
            terms = bar.terms
            active = _active(terms)
            matrix = MatrixSpec.fit(terms, {i: code(deparse(terms.variables[i]), False) for i in active})
            z = matrix.build({i: values[deparse(terms.variables[i])] for i in active}, n)
            matrices[key] = matrix, z
        matrix, z = matrices[key]
        if bar.whole is None:
            term = ReTermData(name, matrix.names, z, level, labels)
            out.append((term, _BarSpec(matrix, None, spec, name, str(bar))))
            continue
        for k, part in enumerate(matrix.assign):  # a part of `||`: each column a term
            if part == bar.part:
                column = np.ascontiguousarray(z[:, k : k + 1])
                term = ReTermData(name, (matrix.names[k],), column, level, labels)
                out.append((term, _BarSpec(matrix, (k,), spec, name, str(bar))))
    counts = [len(term.levels) for term, _ in out]
    if any(b > a for a, b in zip(counts, counts[1:], strict=False)):
        order = sorted(range(len(out)), key=counts.__getitem__)[::-1]
        out = [out[i] for i in order]
    return tuple(t for t, _ in out), tuple(s for _, s in out)
