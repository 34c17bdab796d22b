"""Elimination of [H B; B' G]: log det H and the quadratic form B'H^-1 B, with a backward pass of their own.

Differentiating the elimination step by step costs several times its value. The derivatives are known in closed
form instead: d log det H = sum <H^-1, dH> over the blocks that H has, which needs H^-1 on the pattern of the
elimination only (Takahashi, Fagan & Chin 1973), and d B'H^-1 B = dB'X + X'dB - X'dH X with X = H^-1 B.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .linalg import (
    Blocks,
    Factor,
    add_at,
    dense_inverse,
    eliminate,
    in_matrix,
    outer_sum,
    small_matmul,
    solve,
    take,
)
from .symbolic import Plan

Columns = tuple[Array, ...]  # per block (m, k, c)


class Bordered(NamedTuple):
    """log det H, the quadratic form and the solution of a bordered system."""

    logdet: Array  # (); NaN if H is not positive definite
    quadratic: Array  # (c, c): B'H^-1 B
    X: Columns  # H^-1 B


def selected_inverse(factor: Factor, H: Blocks, plan: Plan) -> Blocks:
    """The blocks of H^-1 at the positions where H has blocks.

    Entry (e, h) of the inverse is -D_e^-1 sum_j C_ej (H^-1)_jh over the j that e meets. Each (j, h) there was
    held, or filled in, when e was eliminated, so it is known when e is reached from the last block backwards.
    """
    first_dense, size = plan.n_eliminated, plan.size
    diagonal: list[Array] = list(H.diagonal)
    pairs: list[Array] = list(factor.pairs)
    whole = jnp.zeros((0, 0), H.diagonal[0].dtype)
    if size:
        assert factor.S is not None and factor.L is not None
        whole = dense_inverse(factor.S, factor.L)
        for h in range(first_dense, len(diagonal)):
            m, k = diagonal[h].shape[:2]
            position = plan.offsets[h] + jnp.arange(m * k).reshape(m, k)
            diagonal[h] = whole[position[:, :, None], position[:, None, :]]
    flat = whole.reshape(-1)
    for i, c in enumerate(plan.couplings):
        if c.first >= first_dense:
            k, k2 = pairs[i].shape[1:]
            corner = (plan.offsets[c.first] + c.a * k) * size + plan.offsets[c.second] + c.b * k2
            pairs[i] = _windows(flat, corner, k, k2, size)
    for e in reversed(range(first_dense)):
        C = factor.pairs
        own = [i for i, c in enumerate(plan.couplings) if c.first == e]
        sums = {i: jnp.zeros_like(C[i]) for i in own}  # sum_j C_ej (H^-1)_jh
        for product in plan.products[e]:
            left, right, (p, q) = C[product.left], C[product.right], (product.p, product.q)
            if product.kind == "dense":
                M = _windows(flat, product.target, left.shape[2], right.shape[2], size)
            else:
                M = take((diagonal if product.kind == "diagonal" else pairs)[product.into], product.target)
            each_with_itself = product.left == product.right and product.kind == "diagonal"
            if p is None or q is None:
                sums[product.left] += small_matmul(right, M.swapaxes(-1, -2))
                if not each_with_itself:
                    sums[product.right] += small_matmul(left, M)
                continue
            sums[product.left] = add_at(sums[product.left], p, small_matmul(take(right, q), M.swapaxes(-1, -2)))
            if not each_with_itself:
                sums[product.right] = add_at(sums[product.right], q, small_matmul(take(left, p), M))
        D_inverse = factor.inverse[e]
        block = D_inverse
        A = factor.matrices[e]
        if A is not None:
            m, k = D_inverse.shape[:2]
            AS = (A.reshape(-1, size) @ whole).reshape(m, k, size)
            for i in own:
                c = plan.couplings[i]
                if in_matrix(plan, c):
                    k2 = C[i].shape[2]
                    columns = plan.offsets[c.second] + c.b[:, None] * k2 + jnp.arange(k2)[None, :]
                    rows = jnp.arange(k)[None, :, None]
                    sums[i] += AS[c.a[:, None, None], rows, columns[:, None, :]]
        for i in own:
            c = plan.couplings[i]
            D = take(D_inverse, c.a) if c.row_pair is not None else D_inverse
            pairs[i] = -small_matmul(D, sums[i])
            update = -small_matmul((pairs[i][:, :, None, :] * C[i][:, None, :, :]).sum(-1), D)
            block = add_at(block, c.a, update) if c.row_pair is not None else block + update
        diagonal[e] = 0.5 * (block + block.swapaxes(-1, -2))
    return Blocks(tuple(diagonal), tuple(pairs))


def _windows(flat: Array, corner: Any, i: int, j: int, size: int) -> Array:
    """(N, i, j) windows at flat corners of a (size, size) matrix."""
    within = (jnp.arange(i)[:, None] * size + jnp.arange(j)[None, :]).astype(corner.dtype)
    return take(flat, corner[:, None, None] + within)


def _zero_of_integers(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.zeros(np.shape(x), jax.dtypes.float0), tree)


def quadratic(B: Columns, X: Columns) -> Array:
    """sum over blocks and levels of B'X, (c, c')."""
    return sum((outer_sum(b, x).sum(0) for b, x in zip(B, X, strict=True)), start=jnp.zeros(()))


@jax.custom_jvp
def bordered(H: Blocks, B: Columns, plan: Plan) -> Bordered:
    """Eliminate H, symmetric positive definite, from [H B; B' 0]; tangents of H must be symmetric."""
    X = solve(factor := eliminate(H, plan), B, plan)
    return Bordered(factor.logdet, quadratic(B, X), X)


@bordered.defjvp
def _bordered_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Bordered, Bordered]:
    H, B, plan = primals
    dH, dB, _ = tangents
    factor = eliminate(H, plan)
    X = solve(factor, B, plan)
    value = Bordered(factor.logdet, quadratic(B, X), X)
    selected = selected_inverse(factor, H, plan)
    dlogdet = jnp.zeros((), value.logdet.dtype)
    dHX = [jnp.zeros_like(x) for x in X]
    half = jnp.zeros_like(value.quadratic)  # of X'dH X: the part above the diagonal
    whole = jnp.zeros_like(value.quadratic)
    for g, (S, d) in enumerate(zip(selected.diagonal, dH.diagonal, strict=True)):
        dlogdet += (S * d).sum()
        moved = small_matmul(d, X[g])
        whole += outer_sum(X[g], moved).sum(0)
        dHX[g] = dHX[g] + moved
    for c, S, d in zip(plan.couplings, selected.pairs, dH.pairs, strict=True):
        dlogdet += 2.0 * (S * d).sum()
        a = X[c.first] if c.row_pair is None else take(X[c.first], c.a)
        b = take(X[c.second], c.b)
        moved = small_matmul(d, b)
        half += outer_sum(a, moved).sum(0)
        dHX[c.first] = dHX[c.first] + moved if c.row_pair is None else add_at(dHX[c.first], c.a, moved)
        dHX[c.second] = add_at(dHX[c.second], c.b, outer_sum(d, a))
    change = quadratic(dB, X)
    dquadratic = change + change.T - whole - half - half.T
    dX = solve(factor, tuple(b - h for b, h in zip(dB, dHX, strict=True)), plan)
    return value, Bordered(dlogdet, dquadratic, dX)
