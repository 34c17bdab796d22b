"""Evaluation of R expressions on a table: arithmetic, factor functions, stateful transforms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace as _replace
from typing import Any, NoReturn

import numpy as np

from . import _contrasts, _transforms
from ._columns import (
    Factor,
    Float,
    Matrix,
    Table,
    Value,
    as_factor,
    drop_unused,
    label_of,
    missing_rows,
)
from ._errors import FormulaError
from ._parse import (
    Binary,
    Call,
    Const,
    Name,
    Node,
    Num,
    Paren,
    Str,
    Unary,
    base_name,
    deparse,
    fail,
)


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
        self.fail(node, f"'{deparse(node)}' is not a column of numbers or a factor", "name a column of the data")

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
        self.fail(node, f"'{deparse(node)}' must be numeric but is {what}", "use as.numeric() if it holds numbers")

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
                return [float(v) for v in np.arange(a, b + (0.5 if b >= a else -0.5), 1.0 if b >= a else -1.0)]
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
                    self.fail(node, f"'{op}' needs numbers or an ordered factor", "compare factors with == or !=")
                hit = np.array([_COMPARE[op](level, right) for level in left.levels] + [False])[left.codes]
            else:
                hit = _COMPARE[op](left.codes, other)
            return _from_logical3(np.where(absent, np.nan, hit)) if absent.any() else hit
        if isinstance(left, str) or isinstance(right, str):
            self.fail(node, f"'{deparse(node)}' compares numbers with text", "write the number without quotes")
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
        return np.round(self.number(args["x"], node), self.integer(args.get("digits", 0.0), node, "digits") or 0)

    def do_is_na(self, node: Call) -> Value:
        value = self.argument(node, "x")
        bad = missing_rows(self._as_variable(value, node))
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
        return self.learned(node, lambda: float(by(x[np.isfinite(x)])) if np.isfinite(x).any() else float("nan"))

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

    def _factor(self, node: Call, args: dict[str, Value], ordered: bool | None, keep_unused: bool = False) -> Factor:
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
            labels = [label_of(v) for v in (args["labels"] if isinstance(args["labels"], list) else [args["labels"]])]
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
        factor = as_factor(self.evaluate(node.args[0][1])) if node.args else self.fail(node, "C() needs a factor")
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
        if base is not None or (isinstance(spec, str) and spec.startswith("contr.") and spec in words.values()):
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
    out = [f"{'(' if right else '['}{a},{b}{']' if right else ')'}" for a, b in zip(shown, shown[1:], strict=False)]
    if lowest and right:
        out[0] = "[" + out[0][1:]
    elif lowest:
        out[-1] = out[-1][:-1] + "]"
    return tuple(out)
