"""`ModelData`: response, model matrices and labels of a mixed model, and how to make them again on new data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .._errors import DataError
from .columns import Factor, Float, Table, Value, as_factor, codes_in, rows_of
from .functions import Evaluator
from .matrix import MatrixSpec
from .parse import Formula
from .syntax import Node, deparse
from .terms import bits
from .variables import given_column, numeric_column, plus


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
            return codes_in(factor, self.levels), lambda rows: [
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


@dataclass(frozen=True)
class ReTermData:
    """One random-effects term on the rows of the fit."""

    group: str  # the grouping factor as lme4 prints it, e.g. "herd" or "cask:batch"
    names: tuple[str, ...]  # of the k columns
    z: Float  # (n, k)
    level: NDArray[np.int32]  # (n,), 0 <= level < m
    levels: NDArray[Any]  # (m,) labels as text, in the factor's order; every one occurs
    structure: Any = "us"  # of its covariance, by the name that formulas have for it, or an object that says it

    @property
    def label(self) -> tuple[Any, ...]:
        """Grouping factor, columns, and the covariance structure where that is none of lme4's."""
        return (self.group, self.names) if self.structure == "us" else (self.group, self.names, self.structure)


@dataclass(frozen=True)
class NewTerm:
    """A random-effects term on new data: level is -1 where the label was not in the fit."""

    group: str
    z: Float
    level: NDArray[np.int32]
    unknown: tuple[str, ...]  # labels not in the fit, in order of appearance


@dataclass(frozen=True)
class BarSpec:
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
    _bars: tuple[BarSpec, ...] = field(repr=False)
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
                out[i] = codes_in(factor, coded.levels)[self.keep]
        return out

    def matrix_for(self, newdata: Any, offset: Any = None) -> tuple[Float, Float | None]:
        """Model matrix (n_new, p) and offset (n_new,) or None on new data; the response is not needed.

        Rows with missing values come out as NaN. `offset` replaces the offset argument of the fit; it is
        needed if that was an array. DataError where a column is missing or has levels not in the fit.
        """
        evaluator = self._evaluator(newdata)
        X = new_matrix(self._fixed, evaluator)
        total: Float | None = None
        for node in self.formula.offsets:
            total = plus(total, numeric_column(evaluator, node, "offset"))
        if offset is not None:
            total = plus(total, given_column(offset, "offset", evaluator)[0])
        elif isinstance(self._offset_arg, Node):
            total = plus(total, numeric_column(evaluator, self._offset_arg, "offset"))
        elif self._offset_arg is True:
            raise DataError("the model was fitted with an offset array; give the offset of the new rows as well")
        return (X if self._x_keep.all() else X[:, self._x_keep]), total

    def terms_for(self, newdata: Any) -> list[NewTerm]:
        """The random-effects terms on new data, in the order of `terms`."""
        evaluator = self._evaluator(newdata)
        out = []
        made: dict[int, Float] = {}
        found: dict[str, tuple[NDArray[np.int32], tuple[str, ...]]] = {}
        for bar in self._bars:
            if id(bar.matrix) not in made:
                made[id(bar.matrix)] = new_matrix(bar.matrix, evaluator)
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


def new_matrix(spec: MatrixSpec, evaluator: Evaluator) -> Float:
    values: dict[int, Value] = {}
    for i, coded in spec.coded.items():
        value = evaluator.variable(spec.terms.variables[i])
        if coded.kind == "factor":
            factor = as_factor(value)
            codes = codes_in(factor, coded.levels, other=-2)
            if codes.size and codes.min() == -2:
                new = [factor.levels[k] for k in np.unique(factor.codes[codes == -2])]
                raise DataError(
                    f"column '{coded.label}' of the new data has levels that were not in the fit: {shown(new)}; "
                    f"the fit has {shown(coded.levels)}"
                )
            values[i] = Factor(codes, coded.levels)
        elif isinstance(value, Factor):
            raise DataError(f"column '{coded.label}' was numeric in the fit but is a factor in the new data")
        else:
            values[i] = value
    with np.errstate(all="ignore"):
        return spec.build(values, evaluator.table.n)


def shown(labels: Sequence[str], most: int = 8) -> str:
    return ", ".join(f"'{v}'" for v in labels[:most]) + (", ..." if len(labels) > most else "")
