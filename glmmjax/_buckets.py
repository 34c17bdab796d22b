"""Single fits padded to few shapes, so that some rows or levels more or less find the programs of an earlier fit.

Rows that are not there are copies of the first with weight 0; levels without rows have u = 0. Neither adds anything to
the deviance or its derivatives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from ._design import Design

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
    """A shape for designs of n rows and m levels: how many of each are added."""

    n: int
    m: int
    rows: int
    levels: int

    def pad_rows(self, values: Any, fill: float | None = None) -> np.ndarray:
        """(n, ...) -> (n + rows, ...), by copies of the first or by `fill`."""
        values = np.asarray(values)
        added = np.broadcast_to(values[:1] if fill is None else values.dtype.type(fill), (self.rows, *values.shape[1:]))
        return np.concatenate([values, added])

    def pad(self, design: Design) -> Design:
        """The design in this shape."""
        return replace(
            design,
            y=self.pad_rows(design.y),
            X=self.pad_rows(design.X),
            weights=self.pad_rows(design.weights, 0.0),
            offset=self.pad_rows(design.offset),
            z=tuple(self.pad_rows(z) for z in design.z),
            level=tuple(self.pad_rows(level) for level in design.level),
            n_levels=(self.m + self.levels,),
        )

    def pad_levels(self, blocks: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
        """(m, k) per block -> (m + levels, k)."""
        return tuple(np.concatenate([b, np.zeros((self.levels, *b.shape[1:]), b.dtype)]) for b in blocks)

    def own_levels(self, blocks: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
        """(m + levels, k) per block -> (m, k), on the host."""
        return tuple(np.asarray(b)[: self.m] for b in blocks)


def fill_rows(values: np.ndarray) -> np.ndarray:
    """(n, ...) -> rows of a bucket, the added ones copies of the first; large n as they are."""
    n = values.shape[0]
    return values if n > MOST_ROWS else Bucket(n, 0, sized(n) - n, 0).pad_rows(values)


def bucket_of(design: Design) -> Bucket | None:
    """Where a design's programs are shared with others; None where it is padded by nothing, or should not be."""
    arrays = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(design))
    if len(design.z) != 1 or design.n > MOST_ROWS or not arrays or jax.default_backend() != "cpu":
        return None
    m = design.n_levels[0]
    rows, levels = sized(design.n) - design.n, sized(m) - m
    return Bucket(design.n, m, rows, levels) if rows or levels else None
