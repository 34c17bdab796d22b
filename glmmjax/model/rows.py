"""Sums over the rows of a design, a chunk of rows at a time where there are many.

What is computed for a row (linear predictor, score, weight, products with z) then never leaves the cache: memory is
that of a chunk, in derivatives too, and a pass over a million rows takes half the time (24 against 59 ms).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from ..algebra.linalg import Grid
from .design import Design

#: Rows at a time, where the sums are small.
CHUNK = 2**16
#: Each chunk adds to all sums: it has this many rows per random effect, up to the largest chunk.
ROWS_PER_EFFECT = 2
LARGEST_CHUNK = 2**18

Sums = TypeVar("Sums")


def chunk_rows(design: Design) -> int:
    """Rows of a chunk; 0 where all rows are taken at once."""
    size = max(CHUNK, min(ROWS_PER_EFFECT * design.q, LARGEST_CHUNK))
    in_grid = any(isinstance(level, Grid) for level in design.level)
    return 0 if in_grid or design.n <= 2 * size else size


def some_rows(design: Design, number: Array, size: int) -> Design:
    """The rows of a chunk; the last one begins in the one before it, with weight 0 for the rows it has again."""
    start = jnp.minimum(number * size, design.n - size)
    take = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
    first_time = start + jnp.arange(size, dtype=start.dtype) >= number * size
    couplings = tuple(c if c.row_pair is None else replace(c, row_pair=take(c.row_pair)) for c in design.plan.couplings)
    return replace(
        design,
        y=take(design.y),
        X=take(design.X),
        weights=jnp.where(first_time, take(design.weights), 0.0),
        offset=take(design.offset),
        z=tuple(take(z) for z in design.z),
        level=tuple(take(level) for level in design.level),
        plan=replace(design.plan, couplings=couplings),
    )


def fold_rows(step: Callable[[Any, Design], Any], start: Any, design: Design) -> Any:
    """step(state, rows) chunk by chunk from `start`; step(None, design) where all rows are taken at once."""
    size = chunk_rows(design)
    if not size:
        return step(None, design)

    def one(state: Any, number: Array) -> tuple[Any, None]:
        return step(state, some_rows(design, number, size)), None

    return jax.lax.scan(one, start, jnp.arange(-(-design.n // size), dtype=jnp.int32))[0]


def sum_over_rows(part: Callable[..., Sums], design: Design, *args: Any) -> Sums:
    """part(design, *args), a pytree of sums over the rows of `design` in which rows of weight 0 count for nothing.

    Where there are many rows `part` is called with chunks of them, and called again in a backward pass, which keeps
    nothing of the forward one.
    """
    size = chunk_rows(design)
    if not size:
        return part(design, *args)

    @partial(jax.checkpoint, prevent_cse=False)
    def piece(number: Array, design: Design, args: Any) -> Sums:
        return part(some_rows(design, number, size), *args)

    def add(total: Sums, number: Array) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, piece(number, design, args)), None

    numbers = jnp.arange(-(-design.n // size), dtype=jnp.int32)
    shapes = jax.eval_shape(piece, numbers[0], design, args)
    return jax.lax.scan(add, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), numbers)[0]
