"""Columns of a table as NumPy: numbers, factors (integer codes with labels as text) and matrices."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as _replace
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ._errors import DataError
from ._parse import (
    format_number,
)

Float = NDArray[np.float64]


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
            lengths = {k: len(v) if hasattr(v, "__len__") and not isinstance(v, str) else -1 for k, v in data.items()}
            if len(set(lengths.values())) > 1 or -1 in lengths.values():
                found = ", ".join(f"'{k}': {'a scalar' if v < 0 else v}" for k, v in lengths.items())
                raise DataError(f"the columns of {role} differ in length ({found}); give arrays of one length")
            self.index = pd.RangeIndex(next(iter(lengths.values()), 0))
            self._get = data.__getitem__
        elif isinstance(data, np.ndarray) and data.dtype.names:
            self.columns = list(data.dtype.names)
            self.index = pd.RangeIndex(len(data))
            self._get = data.__getitem__
        else:
            raise TypeError(
                f"{role} must be a DataFrame, a dict of arrays or a structured array, not {type(data).__name__}"
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
            raise DataError(f"column '{name}' has {array.ndim} dimensions; each column must be one-dimensional")
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
    raise DataError(f"column '{name}' has type {array.dtype}, which a model cannot use; convert it to numbers or text")


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


def missing_rows(value: Value) -> NDArray[np.bool_] | None:
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
