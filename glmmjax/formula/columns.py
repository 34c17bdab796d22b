"""Columns of a table as NumPy: numbers, factors (integer codes with labels as text) and matrices.

Integers stay integers: a column with missing values that float64 cannot hold (beyond 2^53), and one of larger numbers
than NumPy has, is an object array of Python's integers and None. Which value beside a table belongs to which of its
rows is decided in one place, `by_row`.
"""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as _replace
from decimal import Decimal
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .._errors import DataError
from .syntax import format_number

Float = NDArray[np.float64]
_TIMES = (datetime.date, datetime.time, datetime.timedelta)


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


#: Integers up to this size are float64 numbers; beyond it neighbours become one.
EXACT = 2**53


def by_row(given: Any, index: pd.Index, what: str) -> Any:
    """Values that come beside a table, in the order of the table's rows: the one rule for all of them.

    A pandas Series or DataFrame goes by its index, which must hold the labels of the table's rows (`index`), in the
    same order or, where they are unique, in any. Everything else has no labels and goes by position. A table without
    an index has the labels 0, 1, ...

    Raises:
        DataError: other labels, or the same ones more than once and in another order.
    """
    if not isinstance(given, (pd.Series, pd.DataFrame)) or given.index.equals(index):
        return given
    if len(given) != len(index):
        raise DataError(f"{what} has {len(given)} values, but the data have {len(index)} rows; give one per row")
    unique = given.index.is_unique and index.is_unique
    at = given.index.get_indexer(index) if unique else None
    if at is not None and (at >= 0).all():
        return given.iloc[at]
    if at is None:
        found = "has labels that occur more than once, in another order than"
    else:
        found = f"has no row {label_of(index[int(np.flatnonzero(at < 0)[0])])} and so differs from"
    raise DataError(
        f"the index of {what} {found} the index of the data: give both the same index, or pass .to_numpy() to go by "
        "position"
    )


def rows_of(given: Any, index: pd.Index, what: str) -> Any:
    """`by_row` of what must have as many rows as the table; tables of other libraries become pandas'."""
    given = given if hasattr(given, "shape") and hasattr(given, "__getitem__") else np.asarray(given)
    if not given.shape or given.shape[0] != len(index):
        found = f"{given.shape[0]} values" if given.shape else "one value"
        raise DataError(f"{what} has {found}, but the data have {len(index)} rows; give one per row")
    if hasattr(given, "columns") and not isinstance(given, pd.DataFrame):  # a table without an index
        return pandas_frame(given, what).set_axis(index)
    return by_row(given, index, what)


def common_index(values: Iterable[Any]) -> pd.Index | None:
    """Index of the first pandas object."""
    return next((v.index for v in values if isinstance(v, (pd.Series, pd.DataFrame))), None)


def _library(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


class Table:
    """Named columns of any supported container, read on demand."""

    def __init__(self, data: Any, role: str = "data") -> None:
        self._get: Callable[[Any], Any]
        self.index: pd.Index
        keys: list[Any]
        if not isinstance(data, pd.DataFrame) and hasattr(data, "to_pandas"):
            if _library(data) == "polars" and hasattr(data, "get_column"):
                keys, self._get, self.index = list(data.columns), data.get_column, pd.RangeIndex(data.height)
            elif _library(data) == "pyarrow" and hasattr(data, "column_names"):
                keys, self._get, self.index = list(data.column_names), data.column, pd.RangeIndex(data.num_rows)
            else:
                data = data.to_pandas()
        if isinstance(data, pd.DataFrame):
            keys, self.index, self._get = list(data.columns), data.index, data.__getitem__
        elif isinstance(data, Mapping):
            keys = list(data)
            lengths = {k: len(v) if hasattr(v, "__len__") and not isinstance(v, str) else -1 for k, v in data.items()}
            if len(set(lengths.values())) > 1 or -1 in lengths.values():
                found = ", ".join(f"'{k}': {'a scalar' if v < 0 else v}" for k, v in lengths.items())
                raise DataError(f"the columns of {role} differ in length ({found}); give arrays of one length")
            index = common_index(data.values())
            self.index = pd.RangeIndex(next(iter(lengths.values()), 0)) if index is None else index
            labelled = [k for k, v in data.items() if isinstance(v, pd.Series)]
            other = next((k for k in labelled if not data[k].index.equals(self.index)), None)
            if other is not None and len(labelled) < len(data):
                raise DataError(
                    f"columns '{labelled[0]}' and '{other}' of {role} have rows in another order or other labels, and "
                    "columns without an index stand beside them; make it a DataFrame"
                )
            self._get = lambda key: by_row(data[key], self.index, f"column '{key}' of {role}")
        elif isinstance(data, np.ndarray) and data.dtype.names:
            keys, self.index, self._get = list(data.dtype.names), pd.RangeIndex(len(data)), data.__getitem__
        elif not hasattr(self, "index"):
            raise TypeError(
                f"{role} must be a DataFrame, a dict of arrays or a structured array, not {type(data).__name__}"
            )
        self._keys: dict[str, list[Any]] = {}  # by the name in formulas
        for key in keys:
            self._keys.setdefault(str(key), []).append(key)
        self.columns = list(self._keys)
        self.n = len(self.index)
        self.names = frozenset(self.columns)
        self._cache: dict[str, Value] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def raw(self, name: str) -> Any:
        """A column as it was given, or as pandas holds the same values."""
        if name not in self.names:
            raise DataError(missing_column(name, self.columns))
        keys = self._keys[name]
        if len(keys) > 1:
            raise DataError(f"the data have several columns named '{name}'; rename them")
        return _as_pandas(self._get(keys[0]))

    def column(self, name: str) -> Value:
        if name not in self._cache:
            self._cache[name] = as_column(self.raw(name), name)
        return self._cache[name]

    def missing(self, name: str) -> NDArray[np.bool_] | None:
        """Rows in which a column has no value, of types that no model can use too; None where there are none."""
        try:
            return missing_rows(self.column(name))
        except DataError:
            if name not in self.names or len(self._keys[name]) > 1:
                raise
        bad = np.asarray(pd.isna(self.raw(name)), dtype=bool)
        return bad if bad.any() else None


def pandas_frame(data: Any, role: str = "data") -> pd.DataFrame:
    """Any table as pandas; integers stay integers."""
    if isinstance(data, pd.DataFrame):
        return data
    table = Table(data, role)
    columns = {name: table.raw(name) for name in table.columns}
    columns = {name: v.array if isinstance(v, (pd.Series, pd.Index)) else v for name, v in columns.items()}
    return pd.DataFrame(columns, index=table.index)


def missing_column(name: str, columns: Sequence[str]) -> str:
    """One sentence with near names."""
    near = difflib.get_close_matches(name, columns, 3, 0.6)
    near += [c for c in columns if c.lower() == name.lower() and c not in near]
    if near:
        return f"no column '{name}' in the data; did you mean {' or '.join(repr(c) for c in near)}?"
    shown = ", ".join(columns[:12]) + (", ..." if len(columns) > 12 else "")
    return f"no column '{name}' in the data; its columns are: {shown}"


def label_of(value: Any) -> str:
    """The label of a level: 1 and 1.0 are both "1"; numbers with a fraction have 15 significant digits, as in R."""
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, np.bool_)):
        return "TRUE" if value else "FALSE"
    if isinstance(value, (float, np.floating)):
        number = float(value)
        return str(int(number)) if number.is_integer() and abs(number) < EXACT else format_number(number)
    if isinstance(value, Decimal) and value.is_finite():
        return format(value.normalize(), "f")
    return str(value)


def as_column(raw: Any, name: str) -> Value:
    """A raw column as ndarray (float, int, bool, or objects where only these are exact) or Factor."""
    raw = _as_pandas(raw)
    if isinstance(raw, pd.DataFrame):
        raise DataError(f"the data have several columns named '{name}'; rename them")
    array = raw.array if isinstance(raw, (pd.Series, pd.Index)) else raw
    if isinstance(array, pd.Categorical):
        return _from_categorical(array, name)
    if not isinstance(array, np.ndarray):
        dtype = getattr(array, "dtype", None)
        if isinstance(dtype, (np.dtype, pd.SparseDtype)) or isinstance(array, pd.arrays.NumpyExtensionArray):
            array = np.asarray(array)
        elif isinstance(dtype, pd.api.extensions.ExtensionDtype):
            return _from_extension(array, dtype, name)
        else:
            listed = array
            array = np.asarray(array)
            # of a list: NaN would have become the text "nan", large integers rounded floats, True a number
            lossy = array.dtype.kind in "US"
            if isinstance(listed, list) and array.dtype.kind in "iuf":
                lossy = beyond_float(array) or any(isinstance(v, (bool, np.bool_)) for v in listed)
            if array.ndim == 1 and lossy:
                array = np.empty(len(listed), dtype=object)
                array[:] = listed
    if array.ndim != 1:
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        else:
            raise DataError(f"column '{name}' has {array.ndim} dimensions; each column must be one-dimensional")
    kind = array.dtype.kind
    if kind in "iub":
        return array
    if kind == "f":
        return array.astype(np.float64, copy=False)
    if kind == "O":
        return _from_object(array, name)
    if kind == "S":
        try:
            array = np.char.decode(array, "utf-8")
        except UnicodeDecodeError:
            _refuse(name, "bytes that are no text")
        kind = "U"
    if kind == "U":
        return factorize(array.astype(str).astype(object), text=True)
    if kind in "Mm":
        _reject_time(name)
    raise DataError(f"column '{name}' has type {array.dtype}, which a model cannot use; convert it to numbers or text")


def _as_pandas(raw: Any) -> Any:
    """polars, pyarrow and masked columns as pandas or NumPy hold the same values exactly; anything else as it is."""
    if isinstance(raw, np.ma.MaskedArray):
        gone = np.ma.getmaskarray(raw)
        if raw.dtype.kind in "iu":
            return pd.arrays.IntegerArray(np.ma.getdata(raw).copy(), gone.copy()) if raw.ndim == 1 else raw.filled(0)
        out = np.ma.getdata(raw).astype(np.float64 if raw.dtype.kind == "f" else object)
        out[gone] = np.nan if raw.dtype.kind == "f" else None
        return out
    library = _library(raw)
    if library == "polars" and hasattr(raw, "null_count"):
        return _from_polars(raw)
    if library == "pyarrow" and hasattr(raw, "null_count"):
        if str(raw.type).startswith("dictionary"):
            return pd.Categorical(raw.to_pandas())
        if str(raw.type).endswith("_view"):  # which pandas does not hold
            return np.array(raw.to_pylist(), dtype=object)
        return pd.arrays.ArrowExtensionArray(raw)  # type: ignore[attr-defined]
    return raw


def _from_polars(series: Any) -> Any:
    kind, dtype = type(series.dtype).__name__, series.dtype
    if hasattr(dtype, "base_type"):
        kind = dtype.base_type().__name__
    if kind == "Enum":  # has an order of levels for tables and plots; polars knows no ordered factor
        codes = series.to_physical().cast(int).fill_null(-1).to_numpy()
        return pd.Categorical.from_codes(codes, dtype.categories.to_list())
    if kind in ("String", "Utf8", "Categorical"):  # the latter's order is that in which polars met the labels
        return series.cast(str).to_numpy() if series.null_count() == 0 else np.array(series.to_list(), dtype=object)
    if kind in ("Float32", "Float64", "Float16", "Date", "Datetime", "Duration"):
        return series.to_numpy()
    if kind == "Boolean" and series.null_count() == 0:
        return series.to_numpy()
    if kind.removeprefix("U").removeprefix("Int") in ("8", "16", "32", "64"):
        if series.null_count() == 0:
            return series.to_numpy()
        return pd.arrays.IntegerArray(series.fill_null(0).to_numpy().copy(), series.is_null().to_numpy().copy())
    out = np.empty(len(series), dtype=object)  # wide integers, decimals, logicals with missing values; nothing usable
    out[:] = series.to_list()
    return out


def plain(values: Any, name: str) -> NDArray[Any]:
    """Values beside a table as an array: numbers in the types of `as_column`, labels as text with None for missing."""
    if isinstance(values, np.ndarray):
        return values
    if np.ndim(values) == 2:
        columns = values.columns if hasattr(values, "columns") else range(np.shape(values)[1])
        if isinstance(values, pd.DataFrame):
            return np.column_stack([plain(values.iloc[:, i], str(c)) for i, c in enumerate(columns)])
        return np.asarray(values)
    column = as_column(values, name)
    return np.array([*column.levels, None], object)[column.codes] if isinstance(column, Factor) else column


def beyond_float(values: NDArray[Any]) -> bool:
    """Whether there are numbers at which float64 no longer tells integers apart."""
    if values.dtype.kind == "O":
        return any(v is not None and abs(v) >= EXACT for v in values)
    if not values.size:
        return False
    if values.dtype.kind == "f":
        size = np.abs(values)
        return bool(((size >= EXACT) & (size < np.inf)).any())
    return int(values.max()) >= EXACT or int(values.min()) <= -EXACT


def _refuse(name: str, what: str) -> NoReturn:
    raise DataError(f"column '{name}' holds {what}, which a model cannot use; convert it to numbers or text")


def _reject_time(name: str) -> NoReturn:
    raise DataError(
        f"column '{name}' holds dates or times; convert it to numbers first, e.g. days since the first date, "
        "or to text for a factor"
    )


def _from_categorical(array: pd.Categorical, name: str) -> Factor:
    categories = array.categories
    kind = categories.dtype.kind
    if kind in "Mm" or isinstance(categories.dtype, pd.PeriodDtype):
        _reject_time(name)
    values = categories.tolist()
    types = set(map(type, values)) if kind == "O" else set()
    if any(issubclass(t, _TIMES) for t in types):
        _reject_time(name)
    if kind == "c" or any(issubclass(t, (bytes, tuple, complex)) for t in types):
        _refuse(name, "categories that are neither numbers nor text")
    if kind == "f":
        check_ids(categories.to_numpy(), f"column '{name}'")
    levels = tuple(map(label_of, values))
    if kind in "Of" and len(set(levels)) < len(levels):
        raise DataError(f"two categories of '{name}' have the same label; rename them")
    logical = kind == "b" and levels == ("FALSE", "TRUE")
    return Factor(array.codes, levels, bool(array.ordered), logical)


def _from_extension(array: Any, dtype: Any, name: str) -> Value:
    kind, scalar = getattr(dtype, "kind", "O"), dtype.type
    if kind in "Mm" or scalar in _TIMES or isinstance(dtype, (pd.DatetimeTZDtype, pd.PeriodDtype)):
        _reject_time(name)
    if kind in "biuf" and scalar is not Decimal:
        missing = np.asarray(array.isna())
        if kind == "f":
            return array.to_numpy(dtype=np.float64, na_value=np.nan)
        if kind == "b":
            values = array.fillna(False).to_numpy(dtype=bool)
            return Factor(np.where(missing, -1, values), ("FALSE", "TRUE"), logical=True) if missing.any() else values
        width = np.int64 if kind == "i" else np.uint64
        if not missing.any():
            return array.to_numpy(dtype=width)
        values = array.to_numpy(dtype=width, na_value=0)
        if not beyond_float(values):
            return np.where(missing, np.nan, values.astype(np.float64))
        out = values.astype(object)
        out[missing] = None
        return out
    if scalar is str:
        return factorize(array, text=True)
    if isinstance(dtype, pd.IntervalDtype):
        return factorize(array)
    if scalar is Decimal or np.asarray(array.isna()).all():
        return _from_object(array.to_numpy(dtype=object, na_value=None), name)
    if "dictionary" in str(dtype):  # of pyarrow
        return _from_categorical(pd.Categorical(array.__arrow_array__().to_pandas()), name)
    _refuse(name, f"values of type {dtype}")


def _from_object(array: NDArray[Any], name: str) -> Value:
    kind = pd.api.types.infer_dtype(array, skipna=True)
    if kind == "string":
        return factorize(array, text=True)
    if kind == "empty":
        return np.full(array.size, np.nan)
    if kind in ("datetime64", "datetime", "date", "timedelta64", "timedelta", "time", "period"):
        _reject_time(name)
    if kind == "interval":
        return factorize(array)
    missing = np.asarray(pd.isna(array)) if kind != "mixed" else np.array([v is None or v is pd.NA for v in array])
    there = array[~missing]
    types = {type(v) for v in there}
    if kind == "boolean":
        codes = np.full(array.size, -1)
        codes[~missing] = there.astype(bool)
        return codes.astype(bool) if not missing.any() else Factor(codes, ("FALSE", "TRUE"), logical=True)
    if all(issubclass(t, (int, np.integer, Decimal)) and t is not bool for t in types):
        return _exact_numbers(there, missing)
    if all(issubclass(t, (int, np.integer, Decimal, float, np.floating)) and t is not bool for t in types):
        out = np.full(array.size, np.nan)
        out[~missing] = [float(v) for v in there]
        return out
    if all(issubclass(t, (str, int, np.integer)) and t is not bool for t in types):  # text and numbers
        values = np.array([None if gone else label_of(v) for v, gone in zip(array, missing, strict=True)], dtype=object)
        return factorize(values, text=True)
    names = sorted({t.__name__ for t in types})
    if len(names) > 1:
        raise DataError(f"column '{name}' mixes values of types {' and '.join(names)}; convert it to one of them")
    raise DataError(f"column '{name}' holds objects of type {names[0]}; convert it to numbers or text")


def _exact_numbers(there: NDArray[Any], missing: NDArray[np.bool_]) -> NDArray[Any]:
    """Python's integers and decimals in the simplest array that holds them exactly."""
    if any(isinstance(v, Decimal) and not v.is_finite() for v in there):
        out = np.full(missing.size, np.nan)
        out[~missing] = [float(v) for v in there]
        return out
    whole = all(v == int(v) for v in there)
    values: list[Any] = (
        [int(v) for v in there] if whole else [v if isinstance(v, Decimal) else Decimal(int(v)) for v in there]
    )
    if whole and all(abs(v) < EXACT for v in values):
        out = np.full(missing.size, np.nan)
        out[~missing] = values
        return out if missing.any() else out.astype(np.int64)
    if whole and not missing.any():
        for dtype in (np.int64, np.uint64):
            if all(np.iinfo(dtype).min <= v <= np.iinfo(dtype).max for v in values):
                return np.array(values, dtype=dtype)
    exact = np.full(missing.size, None, dtype=object)
    exact[~missing] = values
    return exact


def check_ids(values: NDArray[Any], what: str) -> None:
    """Refuse floats as labels where integers next to each other are one float."""
    if values.dtype.kind == "f" and beyond_float(values):
        raise DataError(
            f"{what} has numbers of 2^53 or more as floats, where neighbouring integers are the same number; give "
            "them as integers or text to use them as a factor"
        )


def factorize(values: Any, text: bool = False) -> Factor:
    """Sorted unique values as levels; numbers sort as numbers. NaN and None are missing."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu" and values.size:
        low, high = int(values.min()), int(values.max())
        if high - low <= 4 * values.size + 1000:  # a table is faster than hashing
            shifted = (
                (values - values.dtype.type(low)).astype(np.int64) if high >= 2**63 else values.astype(np.int64) - low
            )
            codes, used = _compress(shifted, high - low + 1)
            return Factor(codes, tuple(str(low + i) for i in np.flatnonzero(used).tolist()))
    codes, uniques = pd.factorize(values)
    found = uniques.tolist() if hasattr(uniques, "tolist") else list(uniques)
    order = sorted(range(len(found)), key=found.__getitem__)
    out = in_order(Factor(codes, tuple(map(label_of, found)), text=text), order)
    return out if text else merge_levels(out)  # numbers equal to 15 digits are one level, as in R


def in_order(factor: Factor, order: Sequence[int]) -> Factor:
    """The factor with its levels in another order."""
    rank = np.empty(len(order) + 1, dtype=np.int64)
    rank[order], rank[-1] = np.arange(len(order)), -1  # codes of missing values are -1, which indexes the last entry
    return _replace(factor, codes=rank[factor.codes], levels=tuple(factor.levels[i] for i in order))


def merge_levels(factor: Factor) -> Factor:
    """Levels with the same label made one."""
    merged = tuple(dict.fromkeys(factor.levels))
    if len(merged) == len(factor.levels):
        return factor
    return _replace(factor, codes=codes_in(factor, merged), levels=merged)


def _compress(codes: NDArray[Any], size: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Codes renumbered over those that occur, and which occur (a table of length `size`)."""
    used = np.zeros(size, dtype=bool)
    used[codes] = True
    if used.all():
        return codes.astype(np.int64, copy=False), used
    return (np.cumsum(used) - 1)[codes], used


def as_factor(value: Value, what: str = "the factor") -> Factor:
    """A column as a factor; `what` names it in messages."""
    if isinstance(value, Factor):
        return value
    if isinstance(value, Matrix):
        raise DataError(f"{what} is a matrix, which cannot be a factor")
    array = np.asarray(value)
    if array.dtype.kind == "b":
        return Factor(array.astype(np.int64), ("FALSE", "TRUE"), logical=True)
    check_ids(array, what)
    return factorize(array)


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


def missing_rows(value: Value) -> NDArray[np.bool_] | None:
    """Rows with a missing value; None where there are none."""
    if isinstance(value, Factor):
        return np.less(value.codes, 0) if value.codes.min(initial=0) < 0 else None
    bad: NDArray[np.bool_]
    if isinstance(value, Matrix):
        bad = np.asarray(np.isnan(value.values).any(axis=1))
    elif value.dtype.kind == "O":
        bad = np.asarray(pd.isna(value))
    elif value.dtype.kind != "f":
        return None
    else:
        bad = np.isnan(value)
    return bad if bad.any() else None


def codes_in(factor: Factor, levels: Sequence[str], other: int = -1) -> NDArray[np.int64]:
    """Numbers (n,) of a factor's labels among `levels`: -1 where it is missing, `other` where the label is none."""
    known = {level: i for i, level in enumerate(levels)}
    table = np.array([known.get(level, other) for level in factor.levels] + [-1], dtype=np.int64)
    return table[factor.codes]


def take_rows(value: Value, rows: NDArray[Any] | None) -> Value:
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
    levels = tuple(f"{a.levels[i]}:{b.levels[j]}" for i, j in zip(first.tolist(), second.tolist(), strict=True))
    return Factor(codes, levels), observed
