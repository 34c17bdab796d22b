"""R expressions on a table: columns, arithmetic, comparisons and conditions; `functions.py` adds the calls."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace as _replace
from typing import Any, NoReturn

import numpy as np

from .._errors import FormulaError
from .columns import Factor, Float, Matrix, Table, Value, as_factor, beyond_float, codes_in, label_of
from .syntax import Binary, Call, Const, Name, Node, Num, Paren, Str, Unary, deparse, fail_at


class Expressions(ABC):
    """Evaluates R expressions on a table; what functions are there says `call`.

    With `fitting`, what stateful functions learn is written to `state` (key: the call as text) and the levels
    of factor columns to `levels`; without, they are read from there.
    """

    def __init__(
        self, table: Table, text: str, state: dict[str, Any], levels: dict[str, Factor], fitting: bool
    ) -> None:
        self.table, self.text, self.state, self.levels, self.fitting = table, text, state, levels, fitting
        self._cache: dict[str, Value] = {}

    def fail(self, node: Node, what: str, remedy: str = "") -> NoReturn:
        if self.text[node.start : node.end].strip():
            fail_at(self.text, node, what, remedy)
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
            if value.size != self.table.n:
                self.fail(node, f"'{deparse(node)}' has {value.size} values, not one for each of {self.table.n} rows")
            return as_factor(value) if value.dtype.kind == "b" else value.astype(np.float64, copy=False)
        self.fail(node, f"'{deparse(node)}' is not a column of numbers or a factor", "name a column of the data")

    def group(self, node: Node) -> Factor:
        """A grouping factor without ':'."""
        label = "group " + deparse(node)
        if label not in self._cache:
            self._cache[label] = self.factor(node)
        return self._cache[label]

    def factor(self, node: Node, value: Value = None) -> Factor:
        """A column as a factor, numbers by their values; `value` is that of `node` where it is known."""
        value = self.evaluate(node) if value is None else value
        if not isinstance(value, Factor) and not (isinstance(value, np.ndarray) and value.shape == (self.table.n,)):
            self.fail(node, f"'{deparse(node)}' is not a column that could be a factor", "name a column of the data")
        return as_factor(value, f"'{deparse(node)}'")

    # -- expressions

    def evaluate(self, node: Node) -> Value:
        if isinstance(node, Name):
            return self.name(node)
        if isinstance(node, (Num, Str, Const)):
            return node.value
        if isinstance(node, Paren):
            return self.evaluate(node.inner)
        if isinstance(node, Unary):
            value = self.evaluate(node.operand)
            if node.op == "!":
                return from_logical3(1.0 - self.logical3(value, node))
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
                value = on_levels(value, self.levels[name])
        elif not self.fitting and name in self.levels:
            value = on_levels(as_factor(value, f"column '{name}'"), self.levels[name])
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
            if value.values.shape[1] == 1:
                return value.values[:, 0]
            self.fail(node, f"'{deparse(node)}' computes with several columns at once", "write out one of them")
        what = "a factor or text" if isinstance(value, (Factor, str)) else "something else"
        self.fail(node, f"'{deparse(node)}' must be numeric but is {what}", "use as.numeric() if it holds numbers")

    def fitting_together(self, node: Node, *values: Any) -> None:
        """Fail where arrays differ in length; R would recycle the shorter one."""
        sizes = {np.size(v) for v in values if np.ndim(v)} - {1}
        if len(sizes) > 1:
            self.fail(node, f"'{deparse(node)}' combines {' and '.join(map(str, sorted(sizes)))} values")

    def logical3(self, value: Value, node: Node) -> Any:
        """1, 0 or NaN."""
        number = self.number(value, node)
        return np.where(np.isnan(number), np.nan, number != 0)

    def binary(self, node: Binary) -> Value:
        op = node.op
        left, right = self.evaluate(node.left), self.evaluate(node.right)
        if op in ("&", "&&", "|", "||"):
            a, b = self.logical3(left, node.left), self.logical3(right, node.right)
            self.fitting_together(node, a, b)
            if op[0] == "&":
                return from_logical3(np.where((a == 0) | (b == 0), 0.0, a * b))
            return from_logical3(np.where((a == 1) | (b == 1), 1.0, a + b))
        if op in _COMPARE:
            return self.compare(op, left, right, node)
        if op == "%in%":
            chosen = right if isinstance(right, list) else [right]
            if isinstance(left, Factor):
                wanted = {label_of(v) for v in chosen}
                hit = np.array([level in wanted for level in left.levels] + [False])
                return hit[left.codes]
            self._check_exact(node, left, right)
            return np.isin(self.number(left, node.left), [self.number(v, node.right) for v in chosen])
        if op == ":":
            if isinstance(left, Factor) and isinstance(right, Factor):
                return crossed(left, right, ":", slow_first=True)
            a, b = self.number(left, node.left), self.number(right, node.right)
            if isinstance(a, float) and isinstance(b, float):
                return [float(v) for v in np.arange(a, b + (0.5 if b >= a else -0.5), 1.0 if b >= a else -1.0)]
            self.fail(node, f"'{deparse(node)}' mixes numbers and factors")
        if op not in _ARITHMETIC:
            self.fail(node, f"'{op}' cannot be used here")
        a, b = self.number(left, node.left), self.number(right, node.right)
        self.fitting_together(node, a, b)
        if isinstance(a, float) and isinstance(b, float):
            return float(_ARITHMETIC[op](np.float64(a), np.float64(b)))
        return _ARITHMETIC[op](a, b)

    def compare(self, op: str, left: Value, right: Value, node: Binary) -> Value:
        if isinstance(right, Factor) and not isinstance(left, Factor):
            flipped = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}.get(op, op)
            return self.compare(flipped, right, left, node)
        if isinstance(left, Factor):
            if isinstance(right, Factor):
                other: Any = codes_in(right, left.levels, other=-2)
                absent = (left.codes < 0) | (right.codes < 0)
                order_known = left.levels == right.levels and left.ordered
            else:
                label = label_of(right)
                other = left.levels.index(label) if label in left.levels else -2
                absent = (left.codes < 0) | (isinstance(right, float) and np.isnan(right))
                order_known = left.ordered and other >= 0
            if op not in ("==", "!=") and not order_known:
                if not left.text or not isinstance(right, str):
                    self.fail(node, f"'{op}' needs numbers or an ordered factor", "compare factors with == or !=")
                hit = np.array([_COMPARE[op](level, right) for level in left.levels] + [False])[left.codes]
            else:
                hit = _COMPARE[op](left.codes, other)
            return from_logical3(np.where(absent, np.nan, hit)) if absent.any() else hit
        if isinstance(left, str) or isinstance(right, str):
            self.fail(node, f"'{deparse(node)}' compares numbers with text", "write the number without quotes")
        self._check_exact(node, left, right)
        a, b = self.number(left, node.left), self.number(right, node.right)
        self.fitting_together(node, a, b)
        hit = _COMPARE[op](a, b)
        absent = np.isnan(a) | np.isnan(b)
        return from_logical3(np.where(absent, np.nan, hit)) if np.any(absent) else hit

    def _check_exact(self, node: Binary, *values: Value) -> None:
        for value in values:
            if isinstance(value, np.ndarray) and value.dtype.kind in "iuO" and beyond_float(value):
                what = (
                    f"'{deparse(node)}' compares integers beyond 2^53, which the numbers of formulas cannot tell apart"
                )
                self.fail(node, what, "turn the column into text, or give a column of True and False")

    # -- calls

    @abstractmethod
    def call(self, node: Call) -> Value:
        """The value of a call."""

    def given(self, node: Call, *names: str) -> tuple[dict[str, Node], list[Node]]:
        """Arguments given by name, which must be among `names`, and those without one in order."""
        named: dict[str, Node] = {}
        for key, arg in node.args:
            if key is None:
                continue
            if key not in names:
                self.fail(arg, f"{node.func}() has no argument '{key}'", f"it has {', '.join(names)}")
            if key in named:
                self.fail(arg, f"'{key}' of {node.func}() is given twice", "give it once")
            named[key] = arg
        return named, [arg for key, arg in node.args if key is None]

    def bound(self, node: Call, *names: str) -> dict[str, Node]:
        """Arguments by name, positional ones filled in R's order; only those given, the first one always."""
        found, rest = self.given(node, *names)
        free = [n for n in names if n not in found]
        if len(rest) > len(free):
            self.fail(rest[len(free)], f"too many arguments for {node.func}()", f"it takes {', '.join(names)}")
        found.update(zip(free, rest, strict=False))
        if names and names[0] not in found:
            self.fail(node, f"{node.func}() needs an argument")
        return found

    def bind(self, node: Call, *names: str) -> dict[str, Value]:
        """Values of `bound` arguments."""
        return {key: self.evaluate(arg) for key, arg in self.bound(node, *names).items()}

    def flag(self, value: Value, node: Node, what: str) -> bool:
        """TRUE, FALSE or, as in R, a number that is not 0."""
        if not isinstance(value, (bool, float)) or value != value:
            self.fail(
                node, f"{what} of {node.func if isinstance(node, Call) else deparse(node)}() must be TRUE or FALSE"
            )
        return bool(value)

    def argument(self, node: Call, name: str) -> Value:
        return self.bind(node, name)[name]

    def integer(self, value: Value, node: Node, what: str) -> int | None:
        if value is None:
            return None
        if not isinstance(value, float) or not value.is_integer():
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


_NAN = float("nan")
CONSTANTS: dict[str, Any] = {"pi": float(np.pi), "Inf": float("inf"), "NaN": _NAN, "NA": _NAN, "T": True, "F": False}
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
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
}


def from_logical3(value: Any) -> Value:
    """1, 0, NaN -> bool array, or a logical Factor where some are missing."""
    if np.ndim(value) == 0:
        return bool(value)
    bad = np.isnan(value)
    if not bad.any():
        return value != 0
    return Factor(np.where(bad, -1, value).astype(np.int64), ("FALSE", "TRUE"), logical=True)


def on_levels(factor: Factor, target: Factor, extra: bool = True) -> Factor:
    """The factor on the levels of another; other labels get further levels at the end, or become missing."""
    if factor.levels == target.levels:
        return _replace(target, codes=factor.codes)
    known = set(target.levels)
    levels = target.levels + tuple(level for level in factor.levels if extra and level not in known)
    return _replace(target, codes=codes_in(factor, levels), levels=levels)


def crossed(a: Factor, b: Factor, separator: str, slow_first: bool) -> Factor:
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
