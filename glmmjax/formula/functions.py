"""The functions that formulas can call, as in R: of numbers, of factors, and those that learn from the fit's data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace as _replace
from itertools import product
from typing import Any

import numpy as np

from . import contrasts, transforms
from .columns import (
    Factor,
    Float,
    Matrix,
    Value,
    drop_unused,
    factorize,
    in_order,
    label_of,
    merge_levels,
    missing_rows,
)
from .expressions import Expressions, crossed, from_logical3, on_levels
from .syntax import Call, Name, Node, base_name, coded_factor, deparse

ELEMENTWISE: dict[str, Callable[[Any], Any]] = {
    **{name: getattr(np, name) for name in "log2 log10 log1p exp expm1 sqrt abs sin cos tan tanh floor".split()},
    "ceiling": np.ceil,
}
#: Of one column, without its missing values.
SUMMARIES: dict[str, Callable[[Float], Any]] = {
    "mean": np.mean,
    "median": np.median,
    "min": np.min,
    "max": np.max,
    "sd": lambda x: np.std(x, ddof=1),
}
#: Of several columns, row by row: with missing values kept, and passed over.
FOLDS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    "pmin": (np.minimum, np.fmin),
    "pmax": (np.maximum, np.fmax),
}


class Evaluator(Expressions):
    """Expressions with calls: a function is an entry of the tables above, or a method `do_<name>` here."""

    def call(self, node: Call) -> Value:
        name = base_name(node.func)
        if name in ELEMENTWISE:
            return ELEMENTWISE[name](self.number(self.argument(node, "x"), node))
        if name in SUMMARIES:
            return self._summary(node, SUMMARIES[name])
        if name in FOLDS:
            return self._fold(node, *FOLDS[name])
        handler = getattr(self, "do_" + name.replace(".", "_"), None)
        if handler is None:
            self.fail(node, f"{node.func}() cannot be used here")
        return handler(node)

    def do_I(self, node: Call) -> Value:
        return self.argument(node, "x")

    def do_offset(self, node: Call) -> Value:
        return self.argument(node, "object")

    def do_c(self, node: Call) -> Value:
        out: list[Any] = []
        for _, arg in node.args:
            value = self.evaluate(arg)
            out.extend(value if isinstance(value, list) else [value])
        return out

    def do_log(self, node: Call) -> Value:
        args = self.bind(node, "x", "base")
        x = self.number(args["x"], node)
        if "base" not in args:
            return np.log(x)
        base = self.number(args["base"], node)
        self.fitting_together(node, x, base)
        return np.log(x) / np.log(base)

    def do_round(self, node: Call) -> Value:
        args = self.bind(node, "x", "digits")
        digits = self.integer(args.get("digits", 0.0), node, "digits of round()")
        if digits is None or abs(digits) > 15:
            self.fail(node, "digits of round() must be between -15 and 15")
        return _rounded(self.number(args["x"], node), digits)

    def do_is_na(self, node: Call) -> Value:
        value = self.argument(node, "x")
        bad = missing_rows(self._as_variable(value, node))
        return np.zeros(self.table.n, dtype=bool) if bad is None else bad

    def do_ifelse(self, node: Call) -> Value:
        args = self.bind(node, "test", "yes", "no")
        if len(args) < 3:
            self.fail(node, "ifelse() needs test, yes and no")
        test = self.logical3(args["test"], node)
        if np.shape(test) != (self.table.n,):
            self.fail(node, "the test of ifelse() must be a column", "write a condition on columns of the data")
        values = args["yes"], args["no"]
        known = [v for v in values if not (isinstance(v, float) and np.isnan(v))]  # NA goes with anything
        if known and all(isinstance(v, str) or (isinstance(v, Factor) and v.text) for v in known):
            yes, no = (np.array([*v.levels, None], object)[v.codes] if isinstance(v, Factor) else v for v in values)
            out = np.where(test == 1, yes, no).astype(object)
            out[np.isnan(test)] = None
            return factorize(out, text=True)
        yes, no = self.number(values[0], node), self.number(values[1], node)
        self.fitting_together(node, test, yes, no)
        out = np.where(np.isnan(test), np.nan, np.where(test == 1, yes, no))
        return from_logical3(out) if known and all(map(_is_logical, known)) else out

    def _fold(self, node: Call, by: Callable[[Any, Any], Any], without_missing: Callable[[Any, Any], Any]) -> Value:
        """pmin and pmax; with na.rm = TRUE a missing value gives way to another one."""
        named, rest = self.given(node, "na.rm")
        if not rest:
            self.fail(node, f"{node.func}() needs arguments")
        if "na.rm" in named and self.flag(self.evaluate(named["na.rm"]), node, "na.rm"):
            by = without_missing
        out, *more = [self.number(self.evaluate(arg), node) for arg in rest]
        self.fitting_together(node, out, *more)
        for v in more:
            out = by(out, v)
        return out

    def _summary(self, node: Call, by: Callable[[Float], Any]) -> Value:
        """mean(x) and the like, without missing values: the value of the fit's data is kept for new data."""
        named, rest = self.given(node, "x", "na.rm")
        if len(rest) + ("x" in named) != 1:
            self.fail(node, f"{node.func}() takes one column", "and na.rm by its name")
        x = self.column_of(self.evaluate(rest[0] if rest else named["x"]), node)
        remove = "na.rm" in named and self.flag(self.evaluate(named["na.rm"]), node, "na.rm")

        def value() -> float:
            if not remove and np.isnan(x).any():
                self.fail(node, f"{deparse(node)}: the column has missing values", "add na.rm = TRUE")
            good = x[np.isfinite(x)]
            return float(by(good)) if good.size else float("nan")

        return self.learned(node, value)

    # stateful columns

    def do_poly(self, node: Call) -> Value:
        """poly(x, degree), or poly(x, z, ..., degree = ): all products up to the degree, R's polym."""
        named, rest = self.given(node, "x", "degree", "raw")
        nodes = ([named["x"]] if "x" in named else []) + rest
        if not nodes:
            self.fail(node, "poly() needs an argument")
        values = [self.evaluate(arg) for arg in nodes]
        degree = self.evaluate(named["degree"]) if "degree" in named else 1.0
        if len(values) == 2 and isinstance(values[1], (bool, float)):
            if "degree" in named:
                self.fail(nodes[1], "the degree of poly() is given twice", "give it once")
            degree = values.pop()
        columns = []
        for arg, value in zip(nodes, values, strict=False):
            if not isinstance(value, (np.ndarray, Factor)):
                what = f"too many arguments for poly(), or '{deparse(arg)}' is not a column"
                self.fail(arg, what, "write poly(x, 2), or poly(x, z, degree = 2), and raw by its name")
            columns.append(self.column_of(value, arg))
        k = self.integer(degree, node, "degree")
        if k is None or k < 1:
            self.fail(node, "the degree of poly() must be at least 1")
        if "raw" in named and self.flag(self.evaluate(named["raw"]), node, "raw"):
            parts: tuple[transforms.Transform, ...] = (transforms.RawPoly(k),) * len(columns)
        else:
            parts = self.learned(node, lambda: tuple(transforms.Poly.fit(x, k, deparse(node)) for x in columns))
        if len(columns) == 1:
            return Matrix(parts[0](columns[0]), contrasts.numbers(k))
        powers = [p[::-1] for p in product(range(k + 1), repeat=len(columns)) if 0 < sum(p) <= k]
        bases = [np.column_stack([np.ones(x.size), part(x)]) for part, x in zip(parts, columns, strict=True)]
        out = np.ones((columns[0].size, len(powers)))
        for i, basis in enumerate(bases):
            out *= basis[:, [p[i] for p in powers]]
        return Matrix(out, tuple(".".join(map(str, p)) for p in powers))

    def do_bs(self, node: Call) -> Value:
        return self._spline(node, "degree")

    def do_ns(self, node: Call) -> Value:
        return self._spline(node)

    def _spline(self, node: Call, *degree: str) -> Matrix:
        """ns(x, ...), or bs(x, ...) where there is a degree."""
        args = self.bind(node, "x", "df", "knots", *degree, "intercept", "Boundary.knots")
        x, label = self.column_of(args["x"], node), deparse(node)

        def fit() -> transforms.Transform:
            df, knots = self.integer(args.get("df"), node, "df"), self.numbers(args.get("knots"), node)
            intercept = self.flag(args.get("intercept", False), node, "intercept")
            ends = self.numbers(args.get("Boundary.knots"), node)
            if not degree:
                return transforms.NSpline.fit(x, df, knots, intercept, ends, label)
            order = self.integer(args.get("degree", 3.0), node, "degree") or 0
            return transforms.BSpline.fit(x, df, knots, order, intercept, ends, label)

        values = self.learned(node, fit)(x)
        return Matrix(values, contrasts.numbers(values.shape[1]))

    def do_scale(self, node: Call) -> Value:
        args = self.bind(node, "x", "center", "scale")
        x = self.column_of(args["x"], node)
        center, scale = args.get("center", True), args.get("scale", True)
        for value in (center, scale):
            if not isinstance(value, (bool, float)) or not np.isfinite(value):
                self.fail(node, "center and scale must be TRUE, FALSE or a number")
        if not isinstance(scale, bool) and scale == 0.0:
            self.fail(node, "scale must not be 0")
        return self.learned(node, lambda: transforms.Scale.fit(x, center, scale, deparse(node)))(x)

    def do_center(self, node: Call) -> Value:
        x = self.column_of(self.argument(node, "x"), node)
        return self.learned(node, lambda: transforms.Scale.fit(x, True, False, deparse(node)))(x)

    # factors and conversions

    def do_factor(self, node: Call) -> Value:
        args = self.bound(node, "x", "levels", "labels", "exclude", "ordered")
        given = self.evaluate(args["ordered"]) if "ordered" in args else None
        return self._factor(node, args, None if given is None else self.flag(given, node, "ordered"))

    def do_ordered(self, node: Call) -> Value:
        return self._factor(node, self.bound(node, "x", "levels", "labels", "exclude"), True)

    def do_as_factor(self, node: Call) -> Value:
        return self._factor(node, self.bound(node, "x"), None, keep_unused=True)

    def labels(self, value: Value, node: Node, what: str) -> list[str]:
        """Labels from c(...), a number or a text."""
        listed = value if isinstance(value, list) else [value]
        if not listed or not all(isinstance(v, (str, bool, float)) for v in listed):
            self.fail(node, f"{what} must be text or numbers, as in c('a', 'b')")
        return [label_of(v) for v in listed]

    def _factor(self, node: Call, args: dict[str, Node], ordered: bool | None, keep_unused: bool = False) -> Factor:
        given = self.evaluate(args["x"])
        factor = self.factor(args["x"], given)
        was_ordered = isinstance(given, Factor) and given.ordered
        if not keep_unused and isinstance(given, Factor):
            factor = drop_unused(factor)
        if "levels" in args:
            wanted = self.labels(self.evaluate(args["levels"]), node, "levels")
            if len(set(wanted)) < len(wanted):
                self.fail(args["levels"], "two levels of factor() are the same", "name each level once")
            factor = on_levels(factor, Factor(factor.codes, tuple(wanted)), extra=False)
        elif not self.fitting and deparse(node) in self.state:
            factor = on_levels(factor, Factor(factor.codes, self.state[deparse(node)]))
        if "exclude" in args:
            excluded = self.evaluate(args["exclude"])
            if excluded is None:
                self.fail(args["exclude"], "missing values cannot be a level here", "give them a label in the data")
            gone = set(self.labels(excluded, node, "exclude"))
            kept = tuple(level for level in factor.levels if level not in gone)
            factor = on_levels(factor, Factor(factor.codes, kept), extra=False)
        if self.fitting:
            self.state[deparse(node)] = factor.levels
        levels = factor.levels
        if "labels" in args:
            labels = self.labels(self.evaluate(args["labels"]), node, "labels")
            if len(labels) == 1 < len(levels):  # as R
                labels = [f"{labels[0]}{i}" for i in range(1, len(levels) + 1)]
            if len(labels) < len(levels) and not self.fitting:
                labels += list(levels[len(labels) :])
            if len(labels) != len(levels):
                self.fail(node, f"{len(labels)} labels for {len(levels)} levels")
            factor = merge_levels(_replace(factor, levels=tuple(labels)))
        return Factor(factor.codes, factor.levels, was_ordered if ordered is None else ordered)

    def do_relevel(self, node: Call) -> Value:
        args = self.bound(node, "x", "ref")
        if "ref" not in args:
            self.fail(node, "relevel() needs ref, the level to put first")
        factor, ref = self.evaluate(args["x"]), self.evaluate(args["ref"])
        if not isinstance(factor, Factor):
            self.fail(args["x"], "relevel() is for factors", "use relevel(factor(x), ref)")
        if factor.ordered:
            self.fail(args["x"], "relevel() is for unordered factors", "use factor(x, levels = c(...))")
        if isinstance(ref, str):
            if ref not in factor.levels:
                if not self.fitting:
                    return factor
                self.fail(node, f"'{ref}' is not a level", f"the levels are {', '.join(factor.levels[:12])}")
            first = factor.levels.index(ref)
        else:  # as in R: a number counts the levels
            number = self.integer(ref, args["ref"], "ref of relevel(), unless it is text,")
            if number is None or not 1 <= number <= len(factor.levels):
                many = len(factor.levels)
                self.fail(args["ref"], f"ref of relevel() must be a level's number, 1 to {many}, or its name as text")
            first = number - 1
        return in_order(factor, [first] + [i for i in range(len(factor.levels)) if i != first])

    def do_interaction(self, node: Call) -> Value:
        named, columns = self.given(node, "drop", "sep", "lex.order")
        if not columns:
            self.fail(node, "interaction() needs columns")
        options = {key: self.evaluate(arg) for key, arg in named.items()}
        separator = options.get("sep", ".")
        if not isinstance(separator, str):
            self.fail(named["sep"], "sep of interaction() must be text")
        slow_first = self.flag(options.get("lex.order", False), node, "lex.order")
        out, *more = [self.factor(arg) for arg in columns]
        for f in more:
            out = merge_levels(crossed(out, f, separator, slow_first))
        return drop_unused(out) if self.flag(options.get("drop", False), node, "drop") else out

    def do_C(self, node: Call) -> Value:
        """C(object, contr, base = ): contrasts from a word, a name as text, or a vector of numbers per level."""
        at = coded_factor(node)
        if at is None:
            self.fail(node, "C() needs a factor")
        named, rest = self.given(node, "object", "contr", "base")
        rest = rest if "object" in named else rest[1:]
        if len(rest) > 1 or (rest and "contr" in named):
            self.fail(rest[-1], "C() takes a factor, contrasts and base", "name base; how.many is not available")
        factor = self.factor(node.args[at][1])
        contr = named.get("contr", rest[0] if rest else None)
        word = contr.name if isinstance(contr, Name) else None
        spec: Any = word if word is not None or contr is None else self.evaluate(contr)
        if isinstance(spec, list):
            spec = self._completed(np.array([self.number(v, node) for v in spec]), factor, node)
        elif spec is not None and not isinstance(spec, str):
            self.fail(node, "contrasts are a name, such as sum, or a vector with a number per level")
        base = self.integer(self.evaluate(named["base"]), node, "base of C()") if "base" in named else None
        if base is not None and not (spec in ("treatment", "contr.treatment") or (spec is None and not factor.ordered)):
            self.fail(
                named["base"], "base is of treatment contrasts only", "leave it out, or use C(f, treatment, base = 2)"
            )
        if base is not None or (word is not None and word.startswith("contr.")):
            spec = contrasts.Numbered(spec if isinstance(spec, str) else "treatment", base)
        return _replace(factor, contrast=spec)

    def _completed(self, column: Float, factor: Factor, node: Node) -> Float:
        """A contrast of the levels with orthogonal ones beside it, R's `contrasts<-`; (levels, levels - 1)."""
        n = len(factor.levels)
        if column.shape != (n,):
            self.fail(node, f"{column.size} contrast values for {n} levels ({', '.join(factor.levels[:12])})")
        if np.ptp(column) == 0.0:
            self.fail(node, "the contrast is the same for all levels", "give numbers that differ")
        out = np.linalg.qr(np.column_stack([np.ones(n), column]), mode="complete")[0][:, 1:]
        out[:, 0] = column
        return out

    def do_cut(self, node: Call) -> Value:
        names = "x", "breaks", "labels", "include.lowest", "right", "dig.lab", "ordered_result"
        args = self.bind(node, *names)
        x = self.column_of(args["x"], node)
        breaks = self.learned(node, lambda: self._breaks(x, args.get("breaks"), node))
        right = self.flag(args.get("right", True), node, "right")
        lowest = self.flag(args.get("include.lowest", False), node, "include.lowest")
        ordered = self.flag(args.get("ordered_result", False), node, "ordered_result")
        digits = self.integer(args.get("dig.lab", 3.0), node, "dig.lab of cut()")
        if digits is None or not 1 <= digits <= 22:
            self.fail(node, "dig.lab of cut() must be between 1 and 22")
        codes = np.searchsorted(breaks, x, side="left" if right else "right") - 1
        if lowest:
            edge = breaks[0] if right else breaks[-1]
            codes = np.where(x == edge, 0 if right else breaks.size - 2, codes)
        codes = np.where((codes < 0) | (codes > breaks.size - 2) | np.isnan(x), -1, codes)
        labels = args.get("labels")
        if labels is False:
            return np.where(codes < 0, np.nan, codes + 1.0)
        if labels is None:
            levels = _interval_labels(breaks, right, lowest, digits)
        else:
            levels = tuple(self.labels(labels, node, "labels of cut()"))
        if len(levels) != breaks.size - 1:
            self.fail(node, f"{len(levels)} labels for {breaks.size - 1} intervals")
        return merge_levels(Factor(codes, levels, ordered))

    def _breaks(self, x: Float, given: Value, node: Node) -> Float:
        if given is None:
            self.fail(node, "cut() needs breaks")
        breaks = np.sort(np.atleast_1d(self.number(given, node)))
        if np.isnan(breaks).any() or (np.diff(breaks) == 0.0).any():
            self.fail(node, "the breaks of cut() must differ from each other and not be missing")
        if breaks.size > 1:
            return breaks
        if not 2 <= breaks[0] < np.inf:
            self.fail(node, "cut() needs at least 2 intervals")
        count = int(breaks[0])
        good = x[np.isfinite(x)]
        if not good.size:
            self.fail(node, f"{deparse(node)}: the column has no finite values")
        low, high = good.min(), good.max()
        if low == high:  # as R
            return np.linspace(low - abs(low) / 1000, high + abs(high) / 1000, count + 1)
        out = np.linspace(low, high, count + 1)
        out[0], out[-1] = low - (high - low) / 1000, high + (high - low) / 1000
        return out

    def do_as_numeric(self, node: Call) -> Value:
        value = self.argument(node, "x")
        if not isinstance(value, Factor) or value.logical:
            return self.number(value, node)
        if value.text:
            try:
                numbers = [float(level.replace("_", "?")) for level in value.levels]  # Python would read 1_000
            except ValueError:
                self.fail(node, f"'{deparse(node)}': the column holds text that is not numbers")
            return np.array([*numbers, np.nan])[value.codes]
        return np.where(value.codes < 0, np.nan, value.codes + 1.0)

    def do_as_integer(self, node: Call) -> Value:
        return np.trunc(self.do_as_numeric(node))

    def do_as_logical(self, node: Call) -> Value:
        return from_logical3(self.logical3(self.argument(node, "x"), node))

    def do_as_character(self, node: Call) -> Value:
        factor = drop_unused(self.factor(self.bound(node, "x")["x"]))
        out = in_order(factor, sorted(range(len(factor.levels)), key=factor.levels.__getitem__))
        return Factor(out.codes, out.levels, text=True)

    def do_cbind(self, node: Call) -> Value:
        self.fail(node, "cbind() can only be the response", "write cbind(successes, failures) ~ ...")


def _is_logical(value: Value) -> bool:
    if isinstance(value, Factor):
        return value.logical
    return isinstance(value, bool) or (isinstance(value, np.ndarray) and value.dtype.kind == "b")


def _rounded(x: Any, digits: int) -> Any:
    """R's round() since 4.0.0: the nearer of the two neighbours with so many digits, the even one of equally near."""
    if digits == 0:
        return np.rint(x)
    size = np.abs(x)
    power = 10.0 ** abs(digits)
    scaled = size * power if digits > 0 else size / power
    low, high = (v / power if digits > 0 else v * power for v in (np.floor(scaled), np.ceil(scaled)))
    down, up = size - low, high - size
    even = np.floor(scaled) % 2.0 == 0.0
    out = np.where((down < up) | ((down == up) & even), low, high)
    fine = digits + np.log10(np.where(size > 0.0, size, 1.0)) > 15.0  # has no such digits
    return np.where(fine | ~np.isfinite(size), x, np.copysign(out, x))


def _interval_labels(breaks: Float, right: bool, lowest: bool, least: int) -> tuple[str, ...]:
    """R's labels of cut(): as few digits (from `least`) as keep the breaks apart."""
    shown: list[str] = []
    for digits in range(least, max(12, least) + 1):
        shown = [f"{b:.{digits}g}" for b in breaks]
        if len(set(shown)) == len(shown):
            break
    out = [f"{'(' if right else '['}{a},{b}{']' if right else ')'}" for a, b in zip(shown, shown[1:], strict=False)]
    if lowest and right:
        out[0] = "[" + out[0][1:]
    elif lowest:
        out[-1] = out[-1][:-1] + "]"
    return tuple(out)
