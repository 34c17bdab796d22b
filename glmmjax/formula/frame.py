"""Formula + data -> arrays with labels (`ModelData`), re-usable on new data. NumPy and pandas, no JAX.

Columns, names and codings are those of R's model.matrix; order and names of random-effects terms are lme4's.
Every column is converted to NumPy once; factors are integer codes with labels as text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as _replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .._errors import DataError, FormulaError, check_scale
from ..compiling.memory import copied
from .columns import (
    Factor,
    Float,
    Matrix,
    Table,
    Value,
    as_column,
    as_factor,
    by_row,
    combine,
    drop_unused,
    label_of,
    missing_column,
    missing_rows,
    rows_of,
    take_rows,
)
from .deep import deep
from .evaluate import (
    CONSTANTS,
    Evaluator,
)
from .matrix import Coded, MatrixSpec, code_variable, independent_columns
from .parse import (
    Bar,
    Binary,
    Call,
    Formula,
    Name,
    Node,
    Terms,
    base_name,
    bits,
    deparse,
    format_number,
    names_in,
    parse,
    parse_expression,
    quote_name,
    strip_parens,
)


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
    table_index: pd.Index  # of the table's rows, those left out included
    keep: NDArray[np.bool_]  # over the table's rows
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

    @property
    def shown_terms(self) -> tuple[str, ...]:
        """Each of `terms` as text for messages: "(x | g)"; a column taken out of a `||` by its own name."""
        texts = []
        for term, spec in zip(self.terms, self._bars, strict=True):
            own = term.names[0]
            left = "1" if own == "(Intercept)" else f"0 + {own}"
            texts.append(spec.text if spec.columns is None else f"({left} | {term.group})")
        return tuple(texts)

    @property
    def split_columns(self) -> str:
        """A sentence where a `||` has taken a factor or other columns of one name apart; empty where none has."""
        for bar in self.formula.bars:
            if bar.whole is None or not bar.part:
                continue
            own = [t for t, spec in zip(self.shown_terms, self._bars, strict=True) if spec.text == str(bar)]
            spec = next(spec for spec in self._bars if spec.text == str(bar))
            variables = bits(bar.terms.codes[bar.part - 1])
            if len(own) > 1 or any(spec.matrix.coded[i].kind == "factor" for i in variables):
                label = bar.terms.labels[bar.part - 1]
                return (
                    f"({deparse(bar.whole)} || {bar.group_name}) makes each column of '{label}' an independent random "
                    f"effect, {', '.join(own)}, as glmmTMB does; lme4 fits {bar}, with all their covariances: write "
                    "that for it"
                )
        return ""

    def on_rows(self, given: Any, what: str, has: str = "has") -> Any:
        """Values for the rows of the fit, from some for these or for all rows of its table; pandas by index (`by_row`).

        Args:
            given: anything with rows: Series, DataFrame, array (n, ...), or a list.
            what, has: for messages: "the new response", or "responses" and "have".
        """
        given = given if hasattr(given, "shape") and hasattr(given, "__getitem__") else np.asarray(given)
        if not given.shape or given.shape[0] not in (self.nobs, self.keep.size):
            found = f"{given.shape[0]} {'values' if has == 'has' else 'rows'}" if given.shape else "one value"
            dropped = "" if self.keep.all() else f" and its table {self.keep.size}"
            raise DataError(f"{what} {has} {found}, the fit has {self.nobs} rows{dropped}; give one per row")
        whole = given.shape[0] == self.keep.size
        given = rows_of(given, self.table_index if whole else self.row_index, what)
        if not whole or self.keep.all():
            return given
        if isinstance(given, (pd.Series, pd.DataFrame)):
            return given[self.keep]
        return np.asarray(given)[self.keep]

    def _evaluator(self, newdata: Any) -> Evaluator:
        table = newdata if isinstance(newdata, Table) else Table(newdata, "newdata")
        return Evaluator(table, self.formula.text, self._state, self._levels, fitting=False)

    def factor_codes(self, table: Any) -> dict[int, NDArray[Any]]:
        """Level numbers (n,) in the rows of the fit of the fixed effects' factors, by number of the variable; `table`
        is that of the fit."""
        evaluator = self._evaluator(table)
        out = {}
        for i, coded in self._fixed.coded.items():
            if coded.kind == "factor":
                factor = as_factor(evaluator.variable(self._fixed.terms.variables[i]))
                known = {level: k for k, level in enumerate(coded.levels)}
                number = np.array([known.get(level, -1) for level in factor.levels] + [-1])
                out[i] = number[factor.codes][self.keep]
        return out

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
            raise DataError("the model was fitted with an offset array; give the offset of the new rows as well")
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
                new = [lev for k, lev in enumerate(factor.levels) if table[k] == -2 and (factor.codes == k).any()]
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
class _Response:
    y: Value  # ndarray (n,) float or Factor
    other: Float | None  # failures of cbind
    kind: str
    columns: tuple[Node, ...]


def _response(evaluator: Evaluator, node: Node) -> _Response:
    label = deparse(node)
    if isinstance(node, Call) and base_name(node.func) == "cbind":
        if len(node.args) != 2:
            evaluator.fail(node, f"cbind() has {len(node.args)} arguments", "write cbind(successes, failures)")
        parts = [arg for _, arg in node.args]
        values = [_numeric_column(evaluator, part, "response") for part in parts]
        return _Response(values[0], values[1], "cbind", tuple(parts))
    value = evaluator.variable(node)
    if isinstance(value, Matrix):
        raise DataError(f"the response '{label}' has several columns; give one, or cbind(successes, failures)")
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
            f"{what} has {_plural(int(bad.sum()), 'infinite value')} ({_first_bad(bad, index)}); remove or recode them"
        )
    check_scale(array, what)


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
    mask = np.asarray(by_row(subset, table.index, "subset"))
    if mask.dtype.kind == "O":
        mask = np.array([v is True or v is np.True_ for v in mask.ravel()])
    if mask.dtype.kind != "b" or mask.ndim != 1:
        raise TypeError("subset must be a boolean array or a condition in text such as \"period != '4'\"")
    if mask.size != table.n:
        raise DataError(f"subset has {mask.size} values, but the data have {table.n} rows; give one per row")
    return mask


@deep
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
    if contrasts is not None and not isinstance(contrasts, Mapping):
        raise TypeError(f"contrasts must be a dict from columns to contrasts, not {type(contrasts).__name__}")
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
    cancelled: set[str] = set()
    for terms in (fixed, *(bar.terms for bar in bars)):
        # those of terms that cancel too (y ~ z + f - f), as in R's model frame: nested models have the same rows
        kept = set(_active(terms))
        for i, node in enumerate(terms.variables):
            label = deparse(node)
            if isinstance(node, Call) and node.func == "offset":
                used[label] = (_numeric_column(ev, node, "offset"), node)
                (cancelled.discard if node in terms.offsets else cancelled.add)(label)
            elif i in kept and (label not in used or label in cancelled):
                used[label] = (ev.variable(node), node)
                cancelled.discard(label)
            elif label not in used:
                used[label] = (_presence(ev, node), node)
                cancelled.add(label)
    for bar in bars:
        for leaf in _leaves(bar.group):
            label = "group " + deparse(leaf)
            if label not in used:
                used[label] = (ev.group(leaf), leaf)
    total_offset: Float | None = None
    for node in parsed.offsets:
        total_offset = _plus(total_offset, used[deparse(node)][0])
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
        value = take_rows(value, rows)
        if not label.startswith("group ") and label not in cancelled:
            what = f"column '{node.name}'" if isinstance(node, Name) else f"'{deparse(node)}'"
            _check_finite(value, what, index)
        values[label] = value
    if total_offset is not None:
        total_offset = np.array(take_rows(total_offset, rows))  # a copy: never the user's own array
        _check_finite(total_offset, "the offset", index)
    if w is not None:
        w = np.array(take_rows(w, rows))
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
    re_terms, bar_specs = _random_terms(bars, values, code, X)

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
        table_index=table.index,
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


def _presence(evaluator: Evaluator, node: Node) -> Value:
    """A variable of a term that cancels: what it is in a row matters only as there or missing."""
    if not isinstance(node, Name) or node.name not in evaluator.table:
        return evaluator.variable(node)
    missing = evaluator.table.missing(node.name)
    out = np.zeros(evaluator.table.n)
    if missing is not None:
        out[missing] = np.nan
    return out


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
        bad = missing_rows(value)
        if bad is None:
            continue
        if inside is not None:
            bad = bad & inside
            if not bad.any():
                continue
        names = names_in(used[label][1]) if label in used else ()
        explained = np.zeros(table.n, dtype=bool)
        for name in names:
            own = table.missing(name) if name in table else None
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
        refuse_constant(y, "cbind", label, None)
        return y, trials, "cbind", None
    if response.kind == "binary":
        factor = drop_unused(first)
        if len(factor.levels) > 2:
            raise DataError(
                f"the response '{label}' has {len(factor.levels)} levels ({_shown(factor.levels)}); "
                "a model needs a numeric response or one with two levels"
            )
        y = factor.codes.astype(np.float64)
        refuse_constant(y, "binary", label, factor.levels)
        return y, None, "binary", (factor.levels[0], factor.levels[1])
    refuse_constant(first, "numeric", label, None)
    return copied(first), None, "numeric", None


def refuse_constant(y: Float, kind: str, label: str, levels: Sequence[str] | None) -> None:
    """Raise DataError for a response that is the same in every row.

    Args:
        kind: as `ModelData.response_kind`; with "cbind" proportions may be equal inside (0, 1).
        levels: of a response that was a factor.
    """
    if y.min() != y.max() or (kind == "cbind" and y[0] not in (0.0, 1.0)):
        return
    if kind == "cbind":
        raise DataError(f"the response is constant: all trials are {'successes' if y[0] else 'failures'}")
    only = format_number(float(y[0])) if levels is None else f"'{levels[int(y[0])]}'"
    raise DataError(f"the response '{label}' is constant: every row is {only}")


def refuse_one_level(name: str, levels: Sequence[str]) -> None:
    """Raise DataError for a grouping factor with a single level."""
    if len(levels) < 2:
        raise DataError(
            f"grouping factor '{name}' has only one level ('{levels[0]}'); it needs at least 2, or remove the term"
        )


def _random_terms(
    bars: Sequence[Bar],
    values: dict[str, Value],
    code: Callable[[str, bool], Coded],
    X: Float,
) -> tuple[tuple[ReTermData, ...], tuple[_BarSpec, ...]]:
    """Terms in lme4's order: as written if level counts never increase, else rev(order(counts)).

    A term with the columns of X shares its memory.
    """
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
            refuse_one_level(name, factor.levels)
            labels = np.array(factor.levels, dtype=object)
            groups[name] = factor, spec, copied(factor.codes, np.int32), labels
        _, spec, level, labels = groups[name]
        tree = bar.lhs if bar.whole is None else bar.whole
        key = deparse(tree)
        if key not in matrices:
            terms = bar.terms
            active = _active(terms)
            matrix = MatrixSpec.fit(terms, {i: code(deparse(terms.variables[i]), False) for i in active})
            z = matrix.build({i: values[deparse(terms.variables[i])] for i in active}, X.shape[0])
            matrices[key] = matrix, X if np.array_equal(z, X) else z
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
