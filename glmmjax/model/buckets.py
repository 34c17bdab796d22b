"""Single fits padded to few shapes, so that some rows or levels more or less find the programs of an earlier fit.

Rows that are not there are copies of the first with weight 0; levels without rows have u = 0. Neither adds anything to
the deviance or its derivatives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from .design import Design

#: Rows up to which fits are padded: beyond, compiling is a small part of the fit and a quarter of rows more is not.
MOST_ROWS = 20_000


def sized(n: int) -> int:
    """n rounded up to one of few sizes, at most a quarter larger, so that programs are compiled for few shapes."""
    if n <= 8:
        return n
    step = 2 ** ((n - 1).bit_length() - 3)
    return -(-n // step) * step


@dataclass(frozen=True)
class Bucket:
    """A shape for designs: how many rows and levels are added to theirs, and the levels that they have."""

    rows: int
    levels: int
    own: tuple[int, ...]

    def pad_arrays(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Fields of a design, (n, ...) -> (n + rows, ...): weights by 0, others by copies of the first."""
        fill = {"weights": 0.0}
        return {k: jax.tree.map(partial(add_rows, rows=self.rows, fill=fill.get(k)), v) for k, v in arrays.items()}

    def pad(self, design: Design) -> Design:
        """The design in this shape."""
        rows = {name: getattr(design, name) for name in ("y", "X", "weights", "offset", "z", "level")}
        return replace(design, n_levels=tuple(m + self.levels for m in design.n_levels), **self.pad_arrays(rows))

    def pad_levels(self, blocks: tuple[Any, ...]) -> tuple[Any, ...]:
        """(m, k) per block -> (m + levels, k), by zeros."""
        return tuple(add_rows(block, self.levels, 0.0) for block in blocks)

    def own_levels(self, blocks: tuple[Any, ...]) -> tuple[Any, ...]:
        """(m + levels, k) per block -> (m, k)."""
        return tuple(block[:m] for block, m in zip(blocks, self.own, strict=True))


def add_rows(values: Any, rows: int, fill: float | None = None) -> Any:
    """(n, ...) -> (n + rows, ...), by copies of the first or by `fill`; the array itself if there are none to add."""
    if not rows:
        return values
    values = np.asarray(values)
    first = values[:1] if fill is None else values.dtype.type(fill)
    return np.concatenate([values, np.broadcast_to(first, (rows, *values.shape[1:]))])


def fill_rows(values: np.ndarray) -> np.ndarray:
    """(n, ...) -> rows of a bucket, the added ones copies of the first; large n as they are."""
    n = values.shape[0]
    filled: np.ndarray = add_rows(values, sized(n) - n if n <= MOST_ROWS else 0)
    return filled


def bucket_of(design: Design) -> Bucket:
    """The shape in which a design shares its programs with others; its own where padding would cost or not help."""
    arrays = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(design))
    if len(design.z) != 1 or design.n > MOST_ROWS or not arrays or jax.default_backend() != "cpu":
        return Bucket(0, 0, design.n_levels)
    m = design.n_levels[0]
    return Bucket(sized(design.n) - design.n, sized(m) - m, (m,))
