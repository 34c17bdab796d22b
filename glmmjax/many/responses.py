"""Many responses of one design: everything but the response is there once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pandas as pd

from .._errors import DataError
from ..compiling.digest import digest
from ..families import Family
from ..formula.columns import pandas_frame, rows_of
from ..formula.frame import refuse_one_level
from ..formula.matrix import independent_columns
from ..formula.model_data import ModelData
from ..model.design import Design
from .data import Stack, check, make_group


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


class Stacked:
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


class Shared(Stacked):
    """Responses of one design; the attributes of `Stack`."""

    def __init__(
        self, frame: ModelData, responses: Responses, own: dict[str, np.ndarray], family: Family, errors: dict[int, str]
    ) -> None:
        missing = not hasattr(responses.columns, "tocsc") and bool(np.isnan(np.asarray(responses.columns, float)).any())
        super().__init__(frame, family, {"y", *own} | ({"weights"} if missing else set()))
        self._responses, self._family, self._errors, self._frame = responses, family, errors, frame
        self._keep = np.flatnonzero(frame.keep)
        self._given = {k: v[self._keep] for k, v in own.items()}
        self.ids = np.arange(responses.B)

    def digests(self) -> list[str]:
        """Of the design and each response, with weights and offset."""
        frame = self._frame
        shared = [(t.group, t.names, t.z, t.level) for t in frame.terms]
        common = digest((self.labels, frame.X, shared, frame.weights, frame.offset, frame.keep))
        out = []
        for i in self.ids:
            y = self._responses.block(self.ids[i : i + 1])[0, self._keep]
            out.append(str(digest((common, y, {k: v[:, i] for k, v in self._given.items()}))))
        return out

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
        used = ~missing if weights is None else ~missing & (weights > 0.0)
        few = used.sum(axis=1) <= rest
        suspect |= self._undetermined(y, used, shared if weights is None else weights)
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
                self._check_alone(y[j], used[j], shared if weights is None else weights[j], name)
            except DataError as error:
                self._errors[int(members[j])] = str(error)
                y[j] = np.arange(y.shape[1]) % 2

    def _undetermined(self, y: np.ndarray, used: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """(b,) responses whose rows may tell less than the design: fewer levels, dependent columns, an exact fit."""
        frame, n, p = self._frame, used.sum(axis=1), self._frame.X.shape[1]
        part = np.flatnonzero(~used.all(axis=1))
        out = np.zeros(used.shape[0], bool)
        for term in frame.terms if part.size else ():
            levels = np.array([np.count_nonzero(np.bincount(term.level[used[j]])) for j in part])
            out[part] |= (levels < 2) | (levels * len(term.names) >= n[part])
        w = np.where(used, weights, 0.0)
        if not part.size and weights.ndim == 1:
            w = w[:1]
        products = (frame.X[:, :, None] * frame.X[:, None, :]).reshape(y.shape[1], p * p)
        gram = (w @ products).reshape(len(w), p, p)
        size = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
        size = np.where(size > 0.0, size, 1.0)
        gram = gram / size[:, :, None] / size[:, None, :]
        if p and part.size:
            out |= np.linalg.eigvalsh(gram)[:, 0] < 1e-6
        if self._family.linear:
            target = np.where(used, y - (0.0 if frame.offset is None else frame.offset), 0.0)
            left = target
            for _ in range(3 if p else 0):  # rounding, and what keeps the matrix from being singular
                score = ((w * left) @ frame.X / size)[:, :, None]
                left = left - (np.linalg.solve(gram + 1e-13 * np.eye(p), score)[:, :, 0] / size) @ frame.X.T
            with np.errstate(invalid="ignore"):
                out |= (w * left**2).sum(axis=1) <= 1e-24 * (w * target**2).sum(axis=1)
        return out

    def _check_alone(self, y: np.ndarray, rows: np.ndarray, weights: np.ndarray, name: Any) -> None:
        """Raise what `glmer` or `lmer` would raise of the table with this response, (n,), and these rows (n,)."""
        frame, terms = self._frame, []
        for term in frame.terms:
            there, level = np.unique(term.level[rows], return_inverse=True)
            refuse_one_level(term.group, term.levels[there])
            terms.append(replace(term, z=term.z[rows], level=level.astype(np.int32), levels=term.levels[there]))
        if not independent_columns(frame.X[rows]).all():
            raise DataError(
                f"the fixed-effects columns are linearly dependent in the rows of the response {name!r}, which then "
                "has a model of its own: fit it alone"
            )
        offset = None if frame.offset is None else frame.offset[rows]
        alone = replace(frame, y=y[rows], X=frame.X[rows], terms=tuple(terms), offset=offset, weights=weights[rows])
        check(replace(alone, response_name=str(name), row_index=frame.row_index[rows]), self._family)


def _blocks_of(frame: ModelData) -> list[Any]:
    """First term of each grouping factor."""
    seen: dict[str, Any] = {}
    for term in frame.terms:
        seen.setdefault(term.group, term)
    return list(seen.values())
