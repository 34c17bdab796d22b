"""Formula + data -> arrays with labels (`ModelData`), re-usable on new data. NumPy and pandas, no JAX.

Columns, names and codings are those of R's model.matrix; order and names of random-effects terms are lme4's.
Every column is converted to NumPy once; factors are integer codes with labels as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as _replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .._errors import DataError, FormulaError, check_scale
from ..compiling.memory import copied
from .columns import Factor, Float, Matrix, Table, Value, combine, drop_unused, label_of, missing_rows, take_rows
from .deep import deep
from .functions import Evaluator
from .matrix import Coded, MatrixSpec, code_variable, independent_columns
from .model_data import BarSpec, GroupSpec, ModelData, ReTermData, shown
from .parse import Bar, Formula, leaves, parse
from .syntax import Binary, Call, Name, Node, deparse, format_number, names_in, quote_name, strip_parens
from .terms import Terms
from .variables import Response, check_columns, given_column, numeric_column, plus, response_of, subset_mask


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
    parsed, contrasts = _checked(parse(formula), table, contrasts, require_bars, require_response)
    evaluator = Evaluator(table, parsed.text, {}, {}, fitting=True)
    found = _evaluated(parsed, evaluator, weights, offset)
    inside = None if subset is None else subset_mask(subset, evaluator)
    rows = _rows_of_fit(found, table, inside, na)
    kept = _on_rows(found, rows)
    y, trials, kind, y_levels = _finish_response(found.response, kept.values)
    fixed, coder = parsed.fixed_terms, _Coder(kept.values, contrasts)
    coder.check(fixed)
    fixed_spec, X = coder.matrix(fixed, len(rows.index), in_fixed=True)
    x_keep = independent_columns(X)
    dropped = tuple(name for name, k in zip(fixed_spec.names, x_keep.tolist(), strict=True) if not k)
    notes = rows.notes
    if dropped:
        X = np.ascontiguousarray(X[:, x_keep])
        aliased = f"{_plural(len(dropped), 'aliased column')} of the fixed effects (rank deficient)"
        notes = (*notes, f"dropped {aliased}: {', '.join(dropped)}")
    terms, bars = _random_terms(parsed.bars, coder, X)
    return ModelData(
        y=y,
        trials=trials,
        response_kind=kind,
        response_levels=y_levels,
        response_name="" if parsed.response is None else deparse(parsed.response),
        X=X,
        x_names=tuple(name for name, k in zip(fixed_spec.names, x_keep.tolist(), strict=True) if k),
        dropped=dropped,
        all_x_names=fixed_spec.names,
        assign=tuple(a for a, k in zip(fixed_spec.assign, x_keep.tolist(), strict=True) if k),
        term_labels=fixed.labels,
        terms=terms,
        weights=kept.weights,
        offset=kept.offset,
        row_index=rows.index,
        table_index=table.index,
        keep=rows.keep,
        n_missing=rows.n_missing,
        missing_columns=rows.missing_columns,
        notes=notes,
        formula=parsed,
        _fixed=fixed_spec,
        _bars=bars,
        _x_keep=x_keep,
        _state=evaluator.state,
        _levels=evaluator.levels,
        _offset_arg=found.offset_arg,
    )


def _checked(
    parsed: Formula, table: Table, contrasts: Mapping[str, Any] | None, require_bars: bool, require_response: bool
) -> tuple[Formula, dict[str, Any]]:
    """The formula without `.` and the contrasts by the names of variables, both fit for the table."""
    parsed = parsed.resolve(table.columns)
    if parsed.response is None and require_response:
        raise FormulaError(f"the formula has no response; write e.g. y {parsed}")
    check_columns(parsed.names, table)
    if not parsed.bars and require_bars:
        raise FormulaError(f"no random-effects term in '{parsed}': add e.g. (1 | group)")
    if table.n == 0:
        raise DataError("the data have no rows")
    if contrasts is not None and not isinstance(contrasts, Mapping):
        raise TypeError(f"contrasts must be a dict from columns to contrasts, not {type(contrasts).__name__}")
    return parsed, {quote_name(k) if k in table else k: v for k, v in (contrasts or {}).items()}


# --------------------------------------------------------------------------------------- values on all rows


@dataclass(frozen=True)
class _Evaluated:
    """What a model uses, on all rows of its table.

    `used` has value and expression of each variable by its label, "group " before those of grouping factors: they
    decide about missing rows. Those in `cancelled` are in no term that is left.
    """

    used: dict[str, tuple[Value, Node]]
    cancelled: set[str]
    response: Response | None
    weights: Float | None
    offset: Float | None  # that of the formula and the argument together
    offset_arg: Node | None | bool  # as `ModelData._offset_arg`
    arguments: list[tuple[str, Float]]  # with the name to give where they have missing values


def _evaluated(parsed: Formula, evaluator: Evaluator, weights: Any, offset: Any) -> _Evaluated:
    response = None if parsed.response is None else response_of(evaluator, parsed.response)
    used: dict[str, tuple[Value, Node]] = {}
    if response is not None:
        for node, value in zip(response.columns, (response.y, response.other), strict=False):
            used[deparse(node)] = value, node
    cancelled = _add_variables(used, parsed, evaluator)
    for bar in parsed.bars:
        for leaf in leaves(bar.group):
            label = "group " + deparse(leaf)
            if label not in used:
                used[label] = evaluator.group(leaf), leaf
    total: Float | None = None
    for node in parsed.offsets:
        total = plus(total, used[deparse(node)][0])
    origin: Node | None | bool = None
    w: Float | None = None
    arguments: list[tuple[str, Float]] = []
    if offset is not None:
        value, origin = given_column(offset, "offset", evaluator)
        arguments.append((offset if isinstance(offset, str) else "offset", value))
        total = plus(total, value)
    if weights is not None:
        w = given_column(weights, "weights", evaluator)[0]
        arguments.append((weights if isinstance(weights, str) else "weights", w))
    return _Evaluated(used, cancelled, response, w, total, origin, arguments)


def _add_variables(used: dict[str, tuple[Value, Node]], parsed: Formula, evaluator: Evaluator) -> set[str]:
    """Put the variables of all terms into `used`; the labels of those that are in terms which cancel alone.

    These (y ~ z + f - f) are in R's model frame too: nested models have the same rows.
    """
    cancelled: set[str] = set()
    for terms in (parsed.fixed_terms, *(bar.terms for bar in parsed.bars)):
        active = set(terms.active)
        for i, node in enumerate(terms.variables):
            label = deparse(node)
            if isinstance(node, Call) and node.func == "offset":
                used[label] = numeric_column(evaluator, node, "offset"), node
                (cancelled.discard if node in terms.offsets else cancelled.add)(label)
            elif i in active and (label not in used or label in cancelled):
                used[label] = evaluator.variable(node), node
                cancelled.discard(label)
            elif label not in used:
                used[label] = _presence(evaluator, node), node
                cancelled.add(label)
    return cancelled


def _presence(evaluator: Evaluator, node: Node) -> Value:
    """A variable of a term that cancels: what it is in a row matters only as there or missing."""
    if not isinstance(node, Name) or node.name not in evaluator.table:
        return evaluator.variable(node)
    missing = evaluator.table.missing(node.name)
    out = np.zeros(evaluator.table.n)
    if missing is not None:
        out[missing] = np.nan
    return out


# ----------------------------------------------------------------------------------------- rows of the fit


def _plural(count: int, noun: str = "row") -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


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


@dataclass(frozen=True)
class _Rows:
    """The rows of the fit among those of the table."""

    keep: NDArray[np.bool_]  # (n_table,)
    numbers: NDArray[np.intp] | None  # None = all
    index: pd.Index  # of those kept
    n_missing: int
    missing_columns: tuple[str, ...]
    notes: tuple[str, ...]


def _rows_of_fit(found: _Evaluated, table: Table, inside: NDArray[np.bool_] | None, na: str) -> _Rows:
    """Rows in the subset without missing values, of a weight and of trials above 0."""
    if inside is not None and not inside.any():
        raise DataError("no rows are left: the subset is empty")
    notes: list[str] = []
    keep = np.ones(table.n, dtype=bool) if inside is None else inside
    missing, columns = _missing(found, table, inside)
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
    for empty, what in _empty(found, keep, table.index):
        if (empty := keep & empty).any():
            notes.append(f"{_plural(int(empty.sum()))} {what} dropped")
            keep = keep & ~empty
    numbers = None if keep.all() else np.flatnonzero(keep)
    index = table.index if numbers is None else table.index[numbers]
    if len(index) == 0:
        raise DataError(f"no rows are left{': ' + '; '.join(notes) if notes else ''}")
    return _Rows(keep, numbers, index, n_missing, tuple(columns), tuple(notes))


def _missing(
    found: _Evaluated, table: Table, inside: NDArray[np.bool_] | None
) -> tuple[NDArray[np.bool_] | None, list[str]]:
    """Rows (n_table,) of the subset with a missing value, None where there are none; columns that have them."""
    missing: NDArray[np.bool_] | None = None
    columns: dict[str, None] = {}
    for label, value in [*((k, v) for k, (v, _) in found.used.items()), *found.arguments]:
        bad = missing_rows(value)
        if bad is None:
            continue
        if inside is not None:
            bad = bad & inside
            if not bad.any():
                continue
        names = names_in(found.used[label][1]) if label in found.used else ()
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
            columns[deparse(found.used[label][1]) if label in found.used else label] = None
        missing = bad if missing is None else missing | bad
    return missing, list(columns)


def _empty(found: _Evaluated, keep: NDArray[np.bool_], index: pd.Index) -> Iterator[tuple[NDArray[np.bool_], str]]:
    """Rows of weight 0 and of 0 trials, which carry no information, with what to call them."""
    w, response = found.weights, found.response
    if w is not None:
        negative = keep & (w < 0)
        if negative.any():
            count = _plural(int(negative.sum()), "negative value")
            raise DataError(f"weights: {count} ({_first_bad(negative, index)}); weights must be 0 or more")
        yield w == 0, "of weight 0"
    if response is not None and response.other is not None:
        for part, node in zip((response.y, response.other), response.columns, strict=True):
            negative = keep & (part < 0)
            if negative.any():
                raise DataError(
                    f"'{deparse(node)}' in cbind() is negative ({_first_bad(negative, index)}); "
                    "give counts of successes and failures"
                )
        yield response.y + response.other == 0, "with 0 trials"


@dataclass(frozen=True)
class _Kept:
    """What a model uses on the rows of its fit, finite; `values` by label, as in `_Evaluated.used`."""

    values: dict[str, Value]
    weights: Float | None
    offset: Float | None


def _on_rows(found: _Evaluated, rows: _Rows) -> _Kept:
    values: dict[str, Value] = {}
    for label, (value, node) in found.used.items():
        values[label] = take_rows(value, rows.numbers)
        if not label.startswith("group ") and label not in found.cancelled:
            what = f"column '{node.name}'" if isinstance(node, Name) else f"'{deparse(node)}'"
            _check_finite(values[label], what, rows.index)
    own: list[Float | None] = []
    for given, what in ((found.offset, "the offset"), (found.weights, "the weights vector")):
        own.append(None if given is None else np.array(take_rows(given, rows.numbers)))  # never the user's own array
        if own[-1] is not None:
            _check_finite(own[-1], what, rows.index)
    return _Kept(values, own[1], own[0])


def _finish_response(
    response: Response | None, values: Mapping[str, Value]
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
                f"the response '{label}' has {len(factor.levels)} levels ({shown(factor.levels)}); "
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


# ----------------------------------------------------------------------------------------- model matrices


class _Coder:
    """Codes variables on the rows of the fit, each once; `values` then have the levels alone that occur.

    `contrasts` apply to the fixed part only.
    """

    def __init__(self, values: dict[str, Value], contrasts: Mapping[str, Any]) -> None:
        self.values, self.contrasts = values, contrasts
        self._coded: dict[tuple[str, bool], Coded] = {}

    def check(self, fixed: Terms) -> None:
        """Raise DataError for contrasts of what is no variable of the fixed part."""
        known = {deparse(fixed.variables[i]) for i in fixed.active}
        for key in self.contrasts:
            if key not in known:
                raise DataError(f"contrasts were given for '{key}', which is not a variable of the fixed part")

    def matrix(self, terms: Terms, n: int, in_fixed: bool = False) -> tuple[MatrixSpec, Float]:
        """How to make the model matrix of terms, and it: (n, columns)."""
        labels = {i: deparse(terms.variables[i]) for i in terms.active}
        spec = MatrixSpec.fit(terms, {i: self._code(label, in_fixed) for i, label in labels.items()})
        return spec, spec.build({i: self.values[label] for i, label in labels.items()}, n)

    def _code(self, label: str, in_fixed: bool) -> Coded:
        contrast = self.contrasts.get(label) if in_fixed else None
        key = label, contrast is not None
        if key not in self._coded:
            self._coded[key], self.values[label] = code_variable(self.values[label], label, contrast)
        return self._coded[key]


def _grouping(node: Node, values: Mapping[str, Value]) -> tuple[Factor, GroupSpec]:
    """A grouping factor on the rows of the fit, with the levels that occur, and how to make it again."""
    node = strip_parens(node)
    if isinstance(node, Binary) and node.op == ":":
        a, spec_a = _grouping(node.left, values)
        b, spec_b = _grouping(node.right, values)
        both, observed = combine(a, b)
        return both, GroupSpec(node, both.levels, spec_a, spec_b, observed)
    factor = drop_unused(_replace(values["group " + deparse(node)], logical=False))
    return factor, GroupSpec(node, factor.levels)


def _random_terms(bars: Sequence[Bar], coder: _Coder, X: Float) -> tuple[tuple[ReTermData, ...], tuple[BarSpec, ...]]:
    """Terms in lme4's order: as written if level counts never increase, else rev(order(counts)).

    A term with the columns of X shares its memory.
    """
    groups: dict[str, tuple[GroupSpec, NDArray[np.int32], NDArray[Any]]] = {}
    matrices: dict[str, tuple[MatrixSpec, Float]] = {}
    out: list[tuple[ReTermData, BarSpec]] = []
    for bar in bars:
        name = bar.group_name
        if name not in groups:
            factor, spec = _grouping(bar.group, coder.values)
            refuse_one_level(name, factor.levels)
            groups[name] = spec, copied(factor.codes, np.int32), np.array(factor.levels, dtype=object)
        group, level, labels = groups[name]
        key = deparse(bar.lhs if bar.whole is None else bar.whole)
        if key not in matrices:
            matrix, z = coder.matrix(bar.terms, X.shape[0])
            matrices[key] = matrix, X if np.array_equal(z, X) else z
        matrix, z = matrices[key]
        if bar.whole is None:
            term = ReTermData(name, matrix.names, z, level, labels, bar.structure)
            out.append((term, BarSpec(matrix, None, group, name, str(bar))))
            continue
        for k, part in enumerate(matrix.assign):  # a part of `||`: each column a term
            if part == bar.part:
                column = np.ascontiguousarray(z[:, k : k + 1])
                term = ReTermData(name, (matrix.names[k],), column, level, labels)
                out.append((term, BarSpec(matrix, (k,), group, name, str(bar))))
    counts = [len(term.levels) for term, _ in out]
    if any(b > a for a, b in zip(counts, counts[1:], strict=False)):
        order = sorted(range(len(out)), key=counts.__getitem__)[::-1]
        out = [out[i] for i in order]
    return tuple(t for t, _ in out), tuple(s for _, s in out)
