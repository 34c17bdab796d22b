"""Refits of one model many at a time: to other responses, with other weights, or with its levels resampled.

Everything that the refits have in common is there once; searches run in the lanes of `lanes`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import jax
import numpy as np

from ..algebra.linalg import Grid
from ..compiling.entry import entry
from ..fit import optimise as opt
from ..fit.batch import Many, fit_block
from ..fit.lanes import Engine, Generalised, Kind, Linear, cores
from ..model.buckets import sized
from ..model.design import Design
from ..report.progress import counter
from .data import safe_eta
from .responses import Stacked

if TYPE_CHECKING:
    from ..results import MixedModel

#: Refits from which on they are done together: cbpp takes 0.1 ms a fit instead of 0.7, but the programs take seconds
#: to compile, and half a second to load from the cache.
BATCH_FROM = 1_000
#: Eigenvalue of X'X over some rows, relative to that over all, below which they do not tell a fixed effect.
LEAST_INFORMATION = 1e-9


def information_by_cluster(X: np.ndarray, codes: np.ndarray, m: int) -> np.ndarray:
    """(m, p, p) parts of the clusters in X'X, in units in which their sum is the identity."""
    p = X.shape[1]
    out = np.zeros((m, p, p))
    Q = np.linalg.qr(X)[0]
    np.add.at(out, codes, Q[:, :, None] * Q[:, None, :])
    return out


def refit_together(
    model: MixedModel,
    stacked: Stacked,
    block_of: Callable[[np.ndarray], Design],
    items: Iterator[np.ndarray],
    total: int,
    limits: opt.Limits,
    start: dict[str, np.ndarray] | None = None,
) -> Many:
    """Fits of designs that differ in some of their arrays.

    Args:
        stacked: the designs. block_of: makes a block of them from stacked items.
        items: what each design is made of. total: their number.
        start: "theta" and "phi" for all alike.
    """
    spec = model._spec
    kind: Kind = Linear(bool(spec.REML), stacked.template.terms, False)
    if not model.is_linear:
        kind = Generalised(spec.family, spec.hessian, spec.nAGQ)
    workers = cores()
    engine = Engine(kind, stacked.n, total, jax.local_devices()[:1], workers)

    @entry
    def fit(block: list[np.ndarray]) -> Many:
        design = block_of(np.stack(block + [block[-1]] * (engine.block - len(block))))
        return fit_block(engine, design, stacked.own, len(block), limits, start)

    parts: list[Many] = []
    with ThreadPoolExecutor(workers) as pool, counter("refits", total) as count:
        waiting: deque[Future[Many]] = deque()
        while block := list(islice(items, engine.block)):
            waiting.append(pool.submit(fit, block))
            if len(waiting) > workers:
                parts.append(waiting.popleft().result())
                count(engine.block)
        parts += [future.result() for future in waiting]
    return Many.together(parts)


def fit_rows(
    model: MixedModel,
    name: str,
    arrays: Iterator[np.ndarray],
    total: int,
    limits: opt.Limits,
    start: dict[str, np.ndarray] | None = None,
) -> Many:
    """Fits to other responses ("y") or with other "weights" (n,), trials included, where 0 leaves a row out."""
    stacked = Stacked(model._data, model._spec.family, {name})
    return refit_together(model, stacked, partial(stacked.with_rows, name), arrays, total, limits, start)


def fit_levels(
    model: MixedModel, draws: np.ndarray, limits: opt.Limits, start: dict[str, np.ndarray] | None = None
) -> Many:
    """Fits to resampled levels of the only grouping factor: draws (B, m), each a level of its own."""
    stacked = _Resampled(model, draws)
    return refit_together(model, stacked, stacked.with_levels, iter(draws), draws.shape[0], limits, start)


class _Resampled(Stacked):
    """Designs of levels drawn with replacement; with few rows per level in excess a draw is a choice of columns of the
    grid in which the rows lie, else of rows, padded to the longest draw."""

    def __init__(self, model: MixedModel, draws: np.ndarray) -> None:
        family = model._spec.family
        super().__init__(model._data, family, {"y", "X", "weights", "offset", "z"})
        m = draws.shape[1]
        whole = self.template
        self._grid = isinstance(whole.level[0], Grid)
        if self._grid:
            return
        level = np.asarray(whole.level[0])[self._position]
        self._members = [self._position[level == j] for j in range(m)]
        sizes = np.array([r.size for r in self._members])
        self.n = sized(int(sizes[draws].sum(axis=1).max()))
        empty = {**self._empty, "X": 0.0, "offset": safe_eta(family)}

        def extended(values: np.ndarray, fill: float) -> np.ndarray:  # by a row that is not there
            row = np.full((1, *values.shape[1:]), fill)
            return np.concatenate([values, row])

        changed = {name: extended(np.asarray(getattr(whole, name)), fill) for name, fill in empty.items()}
        z = tuple(extended(np.asarray(z), 0.0) for z in whole.z)
        self.template = replace(whole, z=z, **changed)
        self.own = replace(self.own, level=(True,))

    def with_levels(self, draws: np.ndarray) -> Design:
        """Arrays of draws (b, m)."""
        B, m = draws.shape
        if self._grid:

            def chosen(values: np.ndarray) -> np.ndarray:
                """Columns of the grid (repeats, m, ...)."""
                grid = values.reshape(values.shape[0] // m, m, *values.shape[1:])
                return np.ascontiguousarray(np.moveaxis(grid[:, draws], 1, 0)).reshape(B, self.n, *values.shape[1:])

            level = self.template.level[0]
        else:
            rows = np.full((B, self.n), self.template.y.shape[0] - 1)
            level = np.zeros((B, self.n), np.int32)
            for i, draw in enumerate(draws):
                parts = [self._members[j] for j in draw]
                own = np.concatenate(parts)
                rows[i, : own.size] = own
                level[i, : own.size] = np.repeat(np.arange(m), [p.size for p in parts])

            def chosen(values: np.ndarray) -> np.ndarray:
                return values[rows]

        t = self.template
        return replace(
            t,
            y=chosen(t.y),
            X=chosen(t.X),
            weights=chosen(t.weights),
            offset=chosen(t.offset),
            z=tuple(chosen(z) for z in t.z),
            level=(level,),
        )
