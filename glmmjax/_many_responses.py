"""Many responses of one design: everything but the response is there once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pandas as pd

from ._columns import pandas_frame, rows_of
from ._design import Design
from ._errors import DataError
from ._frame import ModelData
from ._many_data import Stack, make_group
from .families import Family


@dataclass(frozen=True)
class Responses:
    """Responses in columns of any container; `block` makes some of them dense."""

    n: int
    B: int
    names: list[Any]
    named: bool  # whether the names are those of a table's columns
    columns: Any  # (n, B) array or SciPy sparse matrix by columns

    def block(self, members: np.ndarray) -> np.ndarray:
        """(b, n) responses."""
        part = self.columns[:, members]
        dense = part.toarray() if hasattr(part, "toarray") else part
        return np.ascontiguousarray(np.asarray(dense, float).T)


def as_responses(y: Any, index: pd.Index) -> Responses:
    """Responses from an array, a table (sparse columns too) or a SciPy sparse matrix; `index` is that of the data."""
    if hasattr(y, "columns"):
        same = np.shape(y)[0] == len(index)  # another number of rows is said with what it may come from
        y = rows_of(y, index, "y") if same else pandas_frame(y, "y")
        names: list[Any] = list(y)
        if len(y.columns) and all(isinstance(t, pd.SparseDtype) for t in y.dtypes):
            y = y.sparse.to_coo()  # type: ignore[attr-defined]
        else:
            try:
                y = y.to_numpy(float)
            except (TypeError, ValueError):
                bad = next(str(c) for c in y if not pd.api.types.is_numeric_dtype(y[c]))
                raise DataError(f"response {bad!r} is not numeric; give numbers, 0/1 for binary responses") from None
    else:
        names = []
    if hasattr(y, "tocsc"):
        y = y.tocsc()
    else:
        y = np.asarray(y)
        if y.ndim != 2:
            raise DataError(f"y must have responses in columns, (rows, responses); it has shape {y.shape}")
    n, B = y.shape
    if not B:
        raise DataError("y has no columns")
    return Responses(n, B, names or list(range(B)), bool(names), y)


class Layout:
    """A model frame's design in the layout of a stack, shared by many fits but for the arrays named `own`.

    Attributes:
        template: design of one fit. own: flags of the leaves that every fit has of its own.
        n: rows of the layout, empty ones included.
    """

    def __init__(self, frame: ModelData, family: Family, own: set[str]) -> None:
        frame = frame if frame.y is not None else replace(frame, y=np.zeros(frame.nobs))
        stack = Stack(make_group([frame], [0]), [len(t.levels) for t in _blocks_of(frame)], family)
        self.labels, self.n = stack.labels, stack.n
        self._position = stack.position
        self._empty = {"y": stack.y_empty, "weights": 0.0, "offset": stack.offset_empty}
        squeezed = jax.tree.map(lambda leaf, flag: leaf[0] if flag else leaf, stack.template, stack.own)
        flags = jax.tree.map(lambda _: False, squeezed)
        changes = {name: jax.tree.map(lambda _: True, getattr(flags, name)) for name in own}
        self.own = replace(flags, **changes)
        self.weights = np.asarray(squeezed.weights)[self._position]
        self.template = squeezed

    def filled(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Values (b, n of the frame) of y, weights or offset in the layout, (b, n)."""
        out = np.full((rows.shape[0], self.n), self._empty[name])
        out[:, self._position] = rows
        return out

    def with_rows(self, name: str, rows: np.ndarray) -> Design:
        """The design with y, weights or offset (b, n of the frame)."""
        changes: dict[str, Any] = {name: self.filled(name, rows)}
        return replace(self.template, **changes)


class Shared(Layout):
    """Responses of one design; the attributes of `Stack`."""

    def __init__(
        self,
        frame: ModelData,
        responses: Responses,
        own: dict[str, np.ndarray],
        family: Family,
        errors: dict[int, str],
    ) -> None:
        missing = not hasattr(responses.columns, "tocsc") and bool(np.isnan(np.asarray(responses.columns, float)).any())
        super().__init__(frame, family, {"y", *own} | ({"weights"} if missing else set()))
        self._responses, self._family, self._errors = responses, family, errors
        self._keep = np.flatnonzero(frame.keep)
        self._given = {k: v[self._keep] for k, v in own.items()}
        self.ids = np.arange(responses.B)

    def block(self, members: np.ndarray) -> Design:
        """Arrays of some responses; those that cannot be fitted are noted, and replaced by zeros and ones."""
        y = self._responses.block(members)[:, self._keep]
        missing = np.isnan(y)
        absent = missing.any()
        changes = {}
        weights = None
        if "weights" in self._given:
            weights = self._given["weights"].T[members]
        if absent or weights is not None:
            known = np.broadcast_to(self.weights, y.shape) if weights is None else weights
            weights = np.where(missing, 0.0, known)
        self._check(y, missing, weights, members)
        if absent:
            y = np.where(missing, self._empty["y"], y)
        if self.own.weights:
            known = np.broadcast_to(self.weights, y.shape) if weights is None else weights
            changes["weights"] = self.filled("weights", known)
        if "offset" in self._given:
            changes["offset"] = self.filled("offset", self._given["offset"].T[members])
        return replace(self.template, y=self.filled("y", y), **changes)

    def _check(self, y: np.ndarray, missing: np.ndarray, weights: np.ndarray | None, members: np.ndarray) -> None:
        """Note what is wrong with responses, which are then replaced by something harmless."""
        there = y[~missing] if missing.any() else y
        low = np.where(missing, np.inf, y).min(axis=1, initial=np.inf)
        high = np.where(missing, -np.inf, y).max(axis=1, initial=-np.inf)
        suspect = ~(low < high) | ~np.isfinite(low) | ~np.isfinite(high)
        shared = self.weights
        flat = None
        if not suspect.all():
            try:
                trials = np.broadcast_to(shared, y.shape) if weights is None else weights
                flat = trials[~missing] if missing.any() else trials.reshape(-1)
                ones = bool((flat == 1.0).all())
                finite = np.isfinite(there).reshape(-1)
                positions = pd.Index(np.arange(finite.sum()))
                self._family.check_response(there.reshape(-1)[finite], None if ones else flat[finite], "y", positions)
            except DataError:
                suspect[:] = True
        rest = self.template.p + 1
        few = (~missing).sum(axis=1) <= rest
        for j in np.flatnonzero(suspect | few):
            name, values = self._responses.names[members[j]], y[j][~missing[j]]
            own = shared if weights is None else weights[j]
            own = own[~missing[j]]
            try:
                if not values.size:
                    raise DataError(f"the response {name!r} has no values")
                if not np.isfinite(values).all():
                    raise DataError(f"the response {name!r} has infinite values; replace or leave them out")
                if values.min() == values.max():
                    raise DataError(f"the response {name!r} is constant: every row is {values[0]:g}")
                if values.size <= rest:
                    raise DataError(f"the response {name!r} has {values.size} values for {rest - 1} fixed effects")
                index = pd.Index(np.flatnonzero(~missing[j]))
                self._family.check_response(values, None if (own == 1.0).all() else own, str(name), index)
            except DataError as error:
                self._errors[int(members[j])] = str(error)
                y[j] = np.arange(y.shape[1]) % 2


def _blocks_of(frame: ModelData) -> list[Any]:
    """First term of each grouping factor."""
    seen: dict[str, Any] = {}
    for term in frame.terms:
        seen.setdefault(term.group, term)
    return list(seen.values())
