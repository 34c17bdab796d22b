"""Blocked products, Cholesky-like elimination, log-determinants and solves.

The matrix is H = Lambda' Z' W Z Lambda + I, held as small diagonal blocks per level, pair blocks where
two grouping factors meet, and a dense remainder (`symbolic.Plan`). Nothing here knows statistics.

Differentiation never goes through a factorisation: inverse, log-determinant and solve of a symmetric
positive definite matrix have their own rules (d log det S = tr(S^-1 dS)), correct to any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import cho_solve, solve_triangular

from .symbolic import Coupling, Plan

#: Small blocks up to this size are inverted by unrolled elimination, larger ones by LAPACK.
_UNROLL = 8
#: largest single matrix that is inverted pivot by pivot
_SWEEP = 16
#: Triangular matrices up to this size are not split further.
_HALVE = 160


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Grid:
    """Levels of rows that lie in a grid, level 0 .. m - 1 again and again: no indices, and sums without scatters."""

    repeats: int = field(metadata={"static": True})


def segment_sum(values: Array, segments: Array | Grid, m: int) -> Array:
    """Sum of the rows of `values` that share a segment, (m, ...).

    The barrier does nothing here; its transpose keeps the gather of the backward pass apart (see `take`).
    """
    values = jax.lax.optimization_barrier(values)
    if isinstance(segments, Grid):
        return values.reshape(segments.repeats, m, *values.shape[1:]).sum(0)
    return add_at(jnp.zeros((m, *values.shape[1:]), values.dtype), segments, values)


def segment_sums(parts: Sequence[Array], segments: Array | Grid, m: int) -> list[Array]:
    """`segment_sum` of several arrays (n, ...); by one pass over the rows, where that is a loop."""
    if isinstance(segments, Grid):
        return [segment_sum(part, segments, m) for part in parts]
    n = parts[0].shape[0]
    together = segment_sum(jnp.concatenate([part.reshape(n, -1) for part in parts], axis=1), segments, m)
    ends = np.cumsum([prod(part.shape[1:]) for part in parts])
    columns = jnp.split(together, ends[:-1], axis=1)
    return [sums.reshape(m, *part.shape[1:]) for sums, part in zip(columns, parts, strict=True)]


def take(values: Array, index: Array | Grid) -> Array:
    """values[index] for indices known to be in range.

    The barrier keeps XLA from fusing the gather into the loops that use it: on CPU such a loop is no
    longer vectorised (7,584 rows, two gathers: 75 us fused, 15 us apart). For a grid it keeps those loops flat:
    nested ones over 20 levels ran at a third of the speed.
    """
    if isinstance(index, Grid):
        repeated = jnp.broadcast_to(values[None], (index.repeats, *values.shape))
        return jax.lax.optimization_barrier(repeated.reshape(-1, *values.shape[1:]))
    values, index = jnp.asarray(values), jnp.asarray(index)
    rest = values.shape[1:]
    dimensions = jax.lax.GatherDimensionNumbers(
        offset_dims=tuple(range(index.ndim, index.ndim + len(rest))), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    # not values[index]: that takes negative indices for ones from the end, and is seven operations
    gathered = jax.lax.gather(values, index[..., None], dimensions, (1, *rest), mode="promise_in_bounds")
    return jax.lax.optimization_barrier(gathered)


def add_at(to: Array, index: Array, values: Array) -> Array:
    """Scatter-add at indices known to be in range."""
    to, index = jnp.asarray(to), jnp.asarray(index)
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(index.ndim, values.ndim)),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0,),
    )
    return jax.lax.scatter_add(to, index[..., None], values, dimensions, mode="promise_in_bounds")


def outer_sum(a: Array, b: Array) -> Array:
    """sum_r a[..., r, i] b[..., r, j]: batched a'b for tiny matrices, fused elementwise by XLA."""
    if a.shape[-2] == 1:
        return a.swapaxes(-1, -2) * b
    return (a[..., :, :, None] * b[..., :, None, :]).sum(-3)


def small_matmul(a: Array, b: Array) -> Array:
    """Batched a b for tiny matrices, (..., i, r) x (..., r, j)."""
    if a.shape[-1] == 1:
        return a * b
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)


def _sweep(j: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
    """Pivot j of a symmetric sweep (Goodnight 1979, Am. Stat. 33): after all of them the matrices are -A^-1.

    The other part of the state is the log-determinant so far; both are NaN from a pivot on that is not positive.
    """
    A, logdet = state
    row = A[..., j, :]
    pivot = row[..., j]
    pivot = jnp.where(pivot > 0.0, pivot, jnp.nan)
    on = jnp.arange(A.shape[-1]) == j
    v = jnp.where(on, -1.0, row)
    rest = jnp.where(on[:, None] | on, 0.0, A)
    return rest - v[..., :, None] * (v / pivot[..., None])[..., None, :], logdet + jnp.log(pivot)


@jax.custom_jvp
def spd_inverse(A: Array) -> tuple[Array, Array]:
    """Inverse (m, k, k) and log-determinant (m,) of symmetric positive definite blocks.

    NaN where a block is not positive definite. Tangents must be symmetric.
    """
    k = A.shape[-1]
    if k == 1:
        d = jnp.where(A > 0.0, A, jnp.nan)
        return 1.0 / d, jnp.log(d[..., 0, 0])
    if k <= _UNROLL:
        state = A, jnp.zeros(A.shape[:-2], A.dtype)
        for j in range(k):
            state = _sweep(j, state)
        return -state[0], state[1]
    L = jnp.linalg.cholesky(A)
    eye = jnp.broadcast_to(jnp.eye(k, dtype=A.dtype), A.shape)
    logdet = 2.0 * jnp.log(jnp.diagonal(L, axis1=-2, axis2=-1)).sum(-1)
    return cho_solve((L, True), eye), logdet


@spd_inverse.defjvp
def _spd_inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    (A,), (dA,) = primals, tangents
    inverse, logdet = spd_inverse(A)
    half = small_matmul(inverse, dA)
    return (inverse, logdet), (-small_matmul(half, inverse), jnp.trace(half, axis1=-2, axis2=-1))


def _triangular_inverse(L: Array) -> Array:
    """Inverse of a lower triangular matrix by halves: matrix products in place of a wide triangular solve."""
    n = L.shape[0]
    if n <= _HALVE:
        return solve_triangular(L, jnp.eye(n, dtype=L.dtype), lower=True)
    h = n // 2
    A, B = _triangular_inverse(L[:h, :h]), _triangular_inverse(L[h:, h:])
    return jnp.block([[A, jnp.zeros((h, n - h), L.dtype)], [-(B @ (L[h:, :h] @ A)), B]])


def _cross_of_triangular(A: Array) -> Array:
    """A'A of a lower triangular matrix by halves, without the products that are zero."""
    n = A.shape[0]
    if n <= _HALVE:
        return A.T @ A
    h = n // 2
    corner, below, last = A[:h, :h], A[h:, :h], A[h:, h:]
    side = last.T @ below
    return jnp.block([[_cross_of_triangular(corner) + below.T @ below, side.T], [side, _cross_of_triangular(last)]])


@jax.custom_jvp
def dense_inverse(S: Array, L: Array) -> Array:
    """S^-1 from S and its Cholesky factor L (not differentiated).

    By halves: three times as fast as two triangular solves against the identity (1,156 rows: 30 against 100 ms).
    """
    return _cross_of_triangular(_triangular_inverse(L))


@dense_inverse.defjvp
def _dense_inverse_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    S, L = primals
    inverse = dense_inverse(S, L)
    return inverse, -inverse @ tangents[0] @ inverse


@jax.custom_jvp
def dense_logdet(S: Array, L: Array) -> Array:
    """log det S, with derivative tr(S^-1 dS); L is S's Cholesky factor."""
    return 2.0 * jnp.log(jnp.diagonal(L)).sum()


@dense_logdet.defjvp
def _dense_logdet_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    S, L = primals
    return dense_logdet(S, L), (dense_inverse(S, L) * tangents[0]).sum()


def dense_solve(S: Array, L: Array, b: Array) -> Array:
    """S^-1 b for b of shape (r, c); L is S's Cholesky factor.

    Differentiable in S and b and transposable: inside another rule a `custom_jvp` function loses its
    rule when JAX linearises around it, and derivatives through the constant L would be dropped.
    """
    return jax.lax.custom_linear_solve(lambda x: S @ x, b, lambda _, right: cho_solve((L, True), right), symmetric=True)


@jax.custom_jvp
def one_inverse(A: Array) -> tuple[Array, Array]:
    """Inverse (k, k) and log-determinant of one symmetric positive definite matrix; NaN if it is not.

    Small ones in a loop: `spd_inverse` is made for many matrices, and its unrolled code takes long to compile; and a
    program without LAPACK does not need SciPy, whose import takes JAX a tenth of a second.
    """
    k = A.shape[0]
    if not k:
        return A, jnp.zeros((), A.dtype)
    if k <= _SWEEP:
        swept, logdet = jax.lax.fori_loop(0, k, _sweep, (A, jnp.zeros((), A.dtype)))
        return -swept, logdet
    L = jnp.linalg.cholesky(A)
    return cho_solve((L, True), jnp.eye(k, dtype=A.dtype)), 2.0 * jnp.log(jnp.diagonal(L)).sum()


@one_inverse.defjvp
def _one_inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    inverse, logdet = one_inverse(primals[0])
    half = inverse @ tangents[0]
    return (inverse, logdet), (-half @ inverse, jnp.trace(half))


class Blocks(NamedTuple):
    """Z'WZ in blocks, before scaling by Lambda."""

    diagonal: tuple[Array, ...]  # per block (m, k, k)
    pairs: tuple[Array, ...]  # per coupling (P, k, k')


class Factor(NamedTuple):
    """Block elimination of H."""

    inverse: tuple[Array, ...]  # per eliminated block, D^-1 (m, k, k)
    pairs: tuple[Array, ...]  # per coupling, scaled and updated (P, k, k')
    matrices: tuple[Array | None, ...]  # per eliminated block, its coupling to the remainder (m, k, r), if dense
    S: Array | None  # dense remainder (r, r)
    L: Array | None  # its Cholesky factor
    logdet: Array  # log det H; NaN if H is not positive definite


def weighted_products(
    zs: tuple[Array, ...], levels: tuple[Array, ...], ms: tuple[int, ...], w: Array, plan: Plan
) -> Blocks:
    """Z'WZ by segment sums over the rows.

    Args:
        zs: per block (n, k). levels: per block (n,) int32. ms: levels per block. w: (n,).
    """
    diagonal = [segment_sum(weighted_rows(z, w), level, m) for z, level, m in zip(zs, levels, ms, strict=True)]
    return Blocks(tuple(diagonal), weighted_pairs(zs, levels, w, plan))


def weighted_rows(z: Array, w: Array) -> Array:
    """(n, k, k): z_i w_i z_i' of each row."""
    return (w[:, None] * z)[:, :, None] * z[:, None, :]


def weighted_pairs(zs: tuple[Array, ...], levels: tuple[Array, ...], w: Array, plan: Plan) -> tuple[Array, ...]:
    """Z'WZ between blocks, per coupling (P, k, k')."""
    pairs = []
    for c in plan.couplings:
        values = (w[:, None] * zs[c.first])[:, :, None] * zs[c.second][:, None, :]
        rows = levels[c.first] if c.row_pair is None else c.row_pair
        pairs.append(segment_sum(values, rows, c.a.shape[0]))
    return tuple(pairs)


def products_times(blocks: Blocks, v: Sequence[Array], plan: Plan) -> list[Array]:
    """Z'WZ v; v holds per block (m, k, c)."""
    out = [small_matmul(A, x) for A, x in zip(blocks.diagonal, v, strict=True)]
    for c, A in zip(plan.couplings, blocks.pairs, strict=True):
        b = small_matmul(A, take(v[c.second], c.b))
        a = outer_sum(A, v[c.first] if c.row_pair is None else take(v[c.first], c.a))
        out[c.first] = out[c.first] + b if c.row_pair is None else add_at(out[c.first], c.a, b)
        out[c.second] = add_at(out[c.second], c.b, a)
    return out


def sandwich(left: Array, A: Array, right: Array) -> Array:
    """left' A right for a batch of blocks A (m, k, k')."""
    if left.shape[0] == right.shape[0] == 1:
        return A * (left * right)
    return small_matmul(small_matmul(left.T[None], A), right[None])


def penalised(blocks: Blocks, Ts: tuple[Array, ...], plan: Plan) -> Blocks:
    """H = Lambda' Z'WZ Lambda + I in blocks; Ts holds per block the relative factor T (k, k)."""
    diagonal = [
        sandwich(T, A, T) + jnp.eye(T.shape[0], dtype=T.dtype) for A, T in zip(blocks.diagonal, Ts, strict=True)
    ]
    pairs = [sandwich(Ts[c.first], A, Ts[c.second]) for c, A in zip(plan.couplings, blocks.pairs, strict=True)]
    return Blocks(tuple(diagonal), tuple(pairs))


def factorise(blocks: Blocks, Ts: tuple[Array, ...], plan: Plan) -> Factor:
    """Eliminate H = Lambda' Z'WZ Lambda + I; Ts holds per block the relative factor T (k, k)."""
    return eliminate(penalised(blocks, Ts, plan), plan)


def eliminate(H: Blocks, plan: Plan) -> Factor:
    """Eliminate a symmetric positive definite matrix block by block."""
    D, C = list(H.diagonal), list(H.pairs)
    size, first_dense = plan.size, plan.n_eliminated
    dtype = D[0].dtype
    upper = jnp.zeros((size * size,), dtype)
    S = jnp.zeros((size, size), dtype)
    inverses: list[Array] = []
    matrices: list[Array | None] = []
    logdet = jnp.zeros((), dtype)
    for e in range(plan.n_eliminated):
        inverse, ld = spd_inverse(D[e])
        inverses.append(inverse)
        logdet = logdet + ld.sum()
        used = {product.right for product in plan.products[e]}
        scaled_pairs = {
            i: small_matmul(take(inverse, c.a) if c.row_pair is not None else inverse, C[i])
            for i, c in enumerate(plan.couplings)
            if i in used
        }
        for product in plan.products[e]:
            a, b = C[product.left], scaled_pairs[product.right]
            if product.p is not None and product.q is not None:
                a, b = take(a, product.p), take(b, product.q)
            values = outer_sum(a, b)
            if product.kind == "diagonal":
                D[product.into] = D[product.into].at[product.target].add(-values, mode="promise_in_bounds")
            elif product.kind == "pair":
                C[product.into] = C[product.into].at[product.target].add(-values, mode="promise_in_bounds")
            else:
                upper = _scatter_windows(upper, product.target, -values, size)
        if plan.dense[e]:
            A = _as_matrix(plan, C, e, D[e].shape[0], D[e].shape[1])
            scaled = small_matmul(inverse, A)
            S = S - A.reshape(-1, size).T @ scaled.reshape(-1, size)
        matrices.append(A if plan.dense[e] else None)
    if not size:
        return Factor(tuple(inverses), tuple(C), tuple(matrices), None, None, logdet)
    for i, c in enumerate(plan.couplings):
        if c.first >= first_dense:
            k, k2 = C[i].shape[1:]
            corner = (plan.offsets[c.first] + c.a * k) * size + plan.offsets[c.second] + c.b * k2
            upper = _scatter_windows(upper, corner, C[i], size)
    U = upper.reshape(size, size)
    S = S + U + U.T
    for h in range(first_dense, len(D)):
        m, k = D[h].shape[:2]
        position = plan.offsets[h] + jnp.arange(m * k).reshape(m, k)
        S = S.at[position[:, :, None], position[:, None, :]].add(D[h], mode="promise_in_bounds")
    S = 0.5 * (S + S.T)
    L = jnp.linalg.cholesky(jax.lax.stop_gradient(S), symmetrize_input=False)
    return Factor(tuple(inverses), tuple(C), tuple(matrices), S, L, logdet + dense_logdet(S, L))


def _scatter_windows(flat: Array, corner: Array, values: Array, size: int) -> Array:
    """Add (N, i, j) windows at flat corners of a (size, size) matrix."""
    _, i, j = values.shape
    position = corner[:, None, None] + (jnp.arange(i)[:, None] * size + jnp.arange(j)[None, :]).astype(corner.dtype)
    return flat.at[position.reshape(-1)].add(values.reshape(-1), mode="promise_in_bounds")


def in_matrix(plan: Plan, c: Coupling) -> bool:
    """Whether a coupling is held as part of its block's dense matrix."""
    return c.first < plan.n_eliminated and plan.dense[c.first] and c.second >= plan.n_eliminated


def _as_matrix(plan: Plan, pairs: list[Array], e: int, m: int, k: int) -> Array:
    """Pair blocks of eliminated block e with the remainder as one (m, k, size) array."""
    out = jnp.zeros((m, k, plan.size), pairs[0].dtype)
    for i, c in enumerate(plan.couplings):
        if c.first == e and c.second >= plan.n_eliminated:
            k2 = pairs[i].shape[2]
            columns = plan.offsets[c.second] + c.b[:, None] * k2 + jnp.arange(k2)[None, :]
            rows = jnp.arange(k)[None, :, None]
            out = out.at[c.a[:, None, None], rows, columns[:, None, :]].add(pairs[i], mode="promise_in_bounds")
    return out


def solve(factor: Factor, rhs: tuple[Array, ...], plan: Plan) -> tuple[Array, ...]:
    """H^-1 rhs; rhs holds per block an array (m, k, c). Linear in rhs, so JAX can transpose it."""
    r = list(rhs)
    n_columns = rhs[0].shape[2]
    split = np.cumsum([x.shape[0] * x.shape[1] for x in rhs[plan.n_eliminated :]])[:-1]
    right = jnp.zeros((plan.size, n_columns), rhs[0].dtype)
    for e in range(plan.n_eliminated):
        t = small_matmul(factor.inverse[e], r[e])
        for i, c in enumerate(plan.couplings):
            if c.first == e and not in_matrix(plan, c):
                values = outer_sum(factor.pairs[i], take(t, c.a) if c.row_pair is not None else t)
                r[c.second] = r[c.second].at[c.b].add(-values, mode="promise_in_bounds")
        matrix = factor.matrices[e]
        if matrix is not None:
            right = right - matrix.reshape(-1, plan.size).T @ t.reshape(-1, n_columns)
    x = list(r)
    solution = right
    if plan.size:
        assert factor.S is not None and factor.L is not None
        right = right + jnp.concatenate([v.reshape(-1, n_columns) for v in r[plan.n_eliminated :]])
        solution = dense_solve(factor.S, factor.L, right)
        parts = jnp.split(solution, split)
        x[plan.n_eliminated :] = [p.reshape(v.shape) for p, v in zip(parts, rhs[plan.n_eliminated :], strict=True)]
    for e in reversed(range(plan.n_eliminated)):
        left = r[e]
        for i, c in enumerate(plan.couplings):
            if c.first == e and not in_matrix(plan, c):
                values = small_matmul(factor.pairs[i], take(x[c.second], c.b))
                if c.row_pair is None:
                    left = left - values
                else:
                    left = left.at[c.a].add(-values, mode="promise_in_bounds")
        matrix = factor.matrices[e]
        if matrix is not None:
            left = left - (matrix.reshape(-1, plan.size) @ solution).reshape(left.shape)
        x[e] = small_matmul(factor.inverse[e], left)
    return tuple(x)


def block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    """Blocks along the diagonal of one matrix."""
    ends = np.cumsum([b.shape for b in blocks], axis=0)
    out = np.zeros(ends[-1])
    for (row, column), b in zip(ends, blocks, strict=True):
        out[row - b.shape[0] : row, column - b.shape[1] : column] = b
    return out
