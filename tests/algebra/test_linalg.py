"""Block elimination against the dense matrix it stands for, for every kind of design."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, fd_gradient
from scipy.linalg import block_diag

import glmmjax as gj
from glmmjax.algebra import symbolic
from glmmjax.algebra.bordered import bordered, selected_inverse
from glmmjax.algebra.linalg import eliminate, factorise, one_inverse, penalised, solve, spd_inverse, weighted_products
from glmmjax.compiling.memory import ALIGNMENT
from glmmjax.model.design import factors


def _levels(kind: str, n: int, rng: np.random.Generator) -> list[np.ndarray]:
    a = rng.permutation(np.arange(n) % 12)  # every level occurs
    if kind in ("single", "slope", "two_terms", "slope_9"):
        return [a]
    if kind in ("nested", "nested_slopes"):
        return [a, a // 3]
    if kind == "nested_3":
        return [a, a // 2, a // 6]
    if kind == "crossed":
        return [a, rng.permutation(np.arange(n) % 7)]
    if kind in ("crossed_3", "crossed_slopes"):
        return [a, rng.permutation(np.arange(n) % 7), rng.permutation(np.arange(n) % 3)]
    if kind == "nested_then_crossed":  # the second factor is eliminated too, the third crosses both
        return [a, a // 4, rng.permutation(np.arange(n) % 2)]
    if kind == "partly_nested":  # the first level crosses two parents, the others are nested
        b = a // 3
        b[np.flatnonzero(a == 0)[0]] = 3
        return [a, b]
    if kind == "observation":
        return [np.arange(n), a]
    if kind == "sparse_crossed":
        return [np.arange(n) // 2, rng.permutation(np.arange(n) % 20)]
    if kind == "sparse_slopes":
        return [np.arange(n) // 2, rng.permutation(np.arange(n) % 20), rng.permutation(np.arange(n) % 5)]
    if kind == "sparse_nested_crossed":
        return [np.arange(n) // 2, np.arange(n) // 4, rng.permutation(np.arange(n) % 14)]
    if kind == "equal_counts":
        return [a, rng.permutation(np.arange(n) % 12)]
    raise KeyError(kind)


#: kind -> columns of the term on each factor, eliminated blocks, rows of the dense remainder
KINDS = {
    "single": ((1,), 1, 0),
    "slope": ((3,), 1, 0),
    "slope_9": ((9,), 1, 0),  # beyond the unrolled sizes
    "two_terms": ((1, 2), 1, 0),
    "nested": ((1, 1), 2, 0),
    "nested_slopes": ((2, 3), 2, 0),
    "nested_3": ((1, 2, 1), 3, 0),
    "crossed": ((1, 1), 1, 7),
    "crossed_3": ((1, 1, 1), 1, 10),
    "crossed_slopes": ((2, 1, 2), 1, 7 + 2 * 3),
    "nested_then_crossed": ((1, 2, 1), 2, 2),
    "partly_nested": ((2, 1), 1, 4),
    "observation": ((1, 2), 2, 0),
    "equal_counts": ((1, 1), 1, 12),
    "sparse_crossed": ((1, 1), 1, 20),
    "sparse_slopes": ((2, 2, 1), 1, 2 * 20 + 5),
    "sparse_nested_crossed": ((1, 2, 2), 2, 2 * 14),
}


class Dense:
    """A design of a kind, its weights and T, and H = Lambda' Z'WZ Lambda + I in the order of the blocks."""

    def __init__(self, kind: str, n: int = 60) -> None:
        rng = np.random.default_rng(3)
        widths, self.n_eliminated, self.size = KINDS[kind]
        levels = _levels(kind, n, rng)
        if kind == "two_terms":
            levels = levels * 2
        zs = [rng.normal(size=(n, k)) for k in widths]
        self.design = gj.design_arrays(np.zeros(n), np.ones(n), list(zip(zs, levels, strict=True)))
        self.theta = rng.normal(size=self.design.n_theta)
        self.w = rng.uniform(0.1, 2.0, n)
        self.Ts = factors(jnp.asarray(self.theta), self.design)
        d = self.design
        parts = []
        for z, level, m in zip(d.z, d.level, d.n_levels, strict=True):
            Z = np.zeros((n, m, z.shape[1]))
            Z[np.arange(n), level] = z
            parts.append(Z.reshape(n, -1))
        self.raw_Z = np.concatenate(parts, axis=1)
        self.Z = self.raw_Z @ self.Lambda(self.theta)
        self.H = self.Z.T @ (self.w[:, None] * self.Z) + np.eye(self.Z.shape[1])

    def Lambda(self, theta: np.ndarray) -> np.ndarray:
        Ts = factors(jnp.asarray(theta), self.design)
        return block_diag(*[np.kron(np.eye(m), T) for m, T in zip(self.design.n_levels, Ts, strict=True)])

    def blocks(self, w: Any) -> Any:
        d = self.design
        return weighted_products(d.z, d.level, d.n_levels, w, d.plan)

    def split(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        shapes = [(m, z.shape[1]) for m, z in zip(self.design.n_levels, self.design.z, strict=True)]
        cuts = np.cumsum([m * k for m, k in shapes])[:-1]
        return tuple(part.reshape(*shape, -1) for part, shape in zip(np.split(x, cuts), shapes, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_plan(kind: str) -> None:
    dense = Dense(kind)
    plan = dense.design.plan
    assert (plan.n_eliminated, plan.size) == (dense.n_eliminated, dense.size)
    # every pair of levels that meet in a row is coupled, and no other
    counts = {(c.first, c.second): (c.a, c.b) for c in plan.couplings}
    for (g, h), (a, b) in counts.items():
        level = dense.design.level
        met = set(zip(level[g].tolist(), level[h].tolist(), strict=True))
        assert {*zip(a.tolist(), b.tolist(), strict=True)} == met
        assert len(a) == len(met) and a.dtype == b.dtype == np.int32
    if "nested" in kind and dense.size == 0:
        # no fill-in: one coupling block per level of the inner factor
        assert all(len(a) == dense.design.n_levels[g] for (g, _), (a, _) in counts.items())


@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: str) -> None:
    dense = Dense(kind)
    rng = np.random.default_rng(5)
    rhs = rng.normal(size=(dense.H.shape[0], 2))

    @jax.jit
    def run(w: Any, r: Any) -> Any:
        blocks = dense.blocks(w)
        H = penalised(blocks, dense.Ts, dense.design.plan)
        factor = eliminate(H, dense.design.plan)
        return factor.logdet, solve(factor, r, dense.design.plan), selected_inverse(factor, H, dense.design.plan)

    logdet, x, inverse = run(dense.w, dense.split(rhs))
    condition = np.linalg.cond(dense.H)
    assert float(logdet) == pytest.approx(np.linalg.slogdet(dense.H)[1], rel=1e-13)
    ours = np.concatenate([np.asarray(v).reshape(-1, 2) for v in x])
    exact = np.linalg.solve(dense.H, rhs)
    # explicit inverses of small blocks: rounding times the condition number (10 to 1,000 here)
    assert_close(ours, exact, atol=1e-15 * condition * np.abs(exact).max() + 1e-14, what="solve")
    full, start = np.linalg.inv(dense.H), [0]
    for block in inverse.diagonal:
        m, k, _ = block.shape
        for i in range(m):
            at = slice(start[-1] + i * k, start[-1] + (i + 1) * k)
            assert_close(block[i], full[at, at], rtol=1e-13 * condition, atol=1e-15, what="inverse")
        start.append(start[-1] + m * k)
    for c, pairs in zip(dense.design.plan.couplings, inverse.pairs, strict=True):
        k, k2 = pairs.shape[1:]
        for value, a, b in zip(pairs, c.a, c.b, strict=True):
            rows, columns = start[c.first] + a * k, start[c.second] + b * k2
            exact = full[rows : rows + k, columns : columns + k2]
            assert_close(value, exact, rtol=1e-13 * condition, atol=1e-14, what="inverse of a pair")


@pytest.mark.parametrize(
    "kind", ["slope", "nested_3", "nested_then_crossed", "crossed_slopes", "sparse_nested_crossed"]
)
def test_bordered(kind: str) -> None:
    """Value, first and second derivatives of log det H and B'H^-1 B against dense algebra in NumPy."""
    dense = Dense(kind)
    plan, n, t = dense.design.plan, dense.w.size, dense.theta.size
    rng = np.random.default_rng(3)
    columns = rng.normal(size=(n, 2))
    weigh = rng.normal(size=(2, 2))
    weigh = weigh + weigh.T

    def f(x: Any) -> Any:
        T = factors(x[:t], dense.design)
        blocks = dense.blocks(x[t:])
        B = []
        for z, level, m, own in zip(dense.design.z, dense.design.level, dense.design.n_levels, T, strict=True):
            full = jnp.zeros((m, z.shape[1], 2)).at[level].add(z[:, :, None] * columns[:, None, :])
            B.append(own.T[None] @ full)
        out = bordered(penalised(blocks, T, plan), tuple(B), plan)
        return out.logdet + (weigh * out.quadratic).sum() + sum(jnp.sin(x).sum() for x in out.X)

    def by_hand(x: np.ndarray) -> float:
        Lambda = dense.Lambda(x[:t])
        H = Lambda.T @ dense.raw_Z.T @ (x[t:, None] * dense.raw_Z) @ Lambda + np.eye(Lambda.shape[0])
        B = Lambda.T @ dense.raw_Z.T @ columns
        X = np.linalg.solve(H, B)
        return float(np.linalg.slogdet(H)[1] + (weigh * (B.T @ X)).sum() + np.sin(X).sum())

    x = np.concatenate([dense.theta, dense.w])
    assert float(jax.jit(f)(x)) == pytest.approx(by_hand(x), rel=1e-12)
    few = [*range(t), t, t + 7, t + n - 1]
    gradient = np.asarray(jax.jit(jax.grad(f))(x))
    for i in few:
        e = 1e-5 * (np.arange(x.size) == i)
        assert gradient[i] == pytest.approx((by_hand(x + e) - by_hand(x - e)) / 2e-5, rel=1e-6, abs=1e-7)
    pick = np.eye(x.size)[few[-1]]
    hessian = np.asarray(jax.jit(lambda v: jax.jvp(jax.grad(f), (x,), (v,))[1])(pick))
    grad = jax.jit(jax.grad(f))
    differences = (grad(x + 1e-5 * pick) - grad(x - 1e-5 * pick)) / 2e-5
    assert_close(hessian, differences, rtol=1e-6, atol=1e-7, what="Hessian column")


@pytest.mark.parametrize("kind", ["slope", "nested_slopes", "crossed_slopes", "sparse_nested_crossed", "two_terms"])
def test_derivatives(kind: str) -> None:
    """log det, its gradient and Hessian in theta and w: d log det H = tr(H^-1 dH)."""
    dense = Dense(kind)
    d = dense.design
    n, t = dense.w.size, dense.theta.size

    def logdet(v: Any) -> Any:
        factor = factorise(weighted_products(d.z, d.level, d.n_levels, v[t:], d.plan), factors(v[:t], d), d.plan)
        return factor.logdet

    x = np.concatenate([dense.theta, dense.w])
    gradient = np.asarray(jax.jit(jax.grad(logdet))(x))
    # by hand: w_i enters H as the outer product of row i of Z Lambda
    leverage = np.einsum("ni,ij,nj->n", dense.Z, np.linalg.inv(dense.H), dense.Z)
    assert_close(gradient[t:], leverage, rtol=1e-11, atol=1e-13, what="d/dw")
    value = jax.jit(logdet)
    by_differences = fd_gradient(lambda v: float(value(np.concatenate([v, dense.w]))), dense.theta, 1e-5)
    assert_close(gradient[:t], by_differences, rtol=1e-8, atol=1e-8, what="d/dtheta")
    # Hessian against differences of the gradient, in theta and three weights
    pick = [*range(t), t, t + 7, t + n - 1]
    hessian = np.asarray(jax.jit(lambda v: jax.jvp(jax.grad(logdet), (x,), (v,))[1])(np.eye(x.size)[pick[-1]]))
    grad = jax.jit(jax.grad(logdet))
    e = np.zeros_like(x)
    e[pick[-1]] = 1e-5
    assert_close(hessian, (grad(x + e) - grad(x - e)) / 2e-5, rtol=1e-7, atol=1e-8, what="Hessian column")


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 9, 12])
def test_spd_inverse(k: int) -> None:
    rng = np.random.default_rng(k)
    root = rng.normal(size=(6, k, 2 * k))
    A = root @ root.transpose(0, 2, 1) / k
    inverse, logdet = spd_inverse(jnp.asarray(A))
    condition = max(np.linalg.cond(a) for a in A)
    assert_close(inverse, np.linalg.inv(A), atol=1e-14 * condition * np.abs(np.linalg.inv(A)).max())
    assert_close(logdet, np.linalg.slogdet(A)[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("k", [1, 2, 7, 16, 17])
def test_inverse_of_one_matrix(k: int) -> None:
    """Pivot by pivot up to 16, by LAPACK beyond; derivatives against those of NumPy's inverse."""
    rng = np.random.default_rng(k)
    root, change = rng.normal(size=(k, 2 * k)), rng.normal(size=(k, k))
    A, dA = root @ root.T / k, change + change.T
    (inverse, logdet), (d_inverse, d_logdet) = jax.jvp(one_inverse, (jnp.asarray(A),), (jnp.asarray(dA),))
    expected = np.linalg.inv(A)
    tolerance = 1e-14 * np.linalg.cond(A) * np.abs(expected).max()
    assert_close(inverse, expected, atol=tolerance)
    assert_close(logdet, np.linalg.slogdet(A)[1], rtol=1e-12, atol=1e-13)
    assert_close(d_inverse, -expected @ dA @ expected, rtol=1e-8, atol=1e-8 * np.abs(d_inverse).max())
    assert_close(d_logdet, np.trace(expected @ dA), rtol=1e-9, atol=1e-9)
    A[-1, -1] = -1.0
    inverse, logdet = one_inverse(jnp.asarray(A))
    assert np.isnan(inverse).all() and np.isnan(logdet)


@pytest.mark.parametrize("k", [1, 2, 9])
def test_not_positive_definite_is_nan(k: int) -> None:
    A = np.stack([np.eye(k), np.eye(k)])
    A[1, -1, -1] = -1.0
    _, logdet = spd_inverse(jnp.asarray(A))
    assert np.isfinite(logdet[0]) and np.isnan(logdet[1])


@pytest.mark.parametrize("kind", ["single", "crossed"])
def test_indefinite_h_is_nan(kind: str) -> None:
    """Negative weights (observed information far from the mode) make H indefinite: NaN, not a number."""
    dense = Dense(kind)
    factor = factorise(dense.blocks(jnp.asarray(-5.0 * dense.w)), dense.Ts, dense.design.plan)
    assert np.linalg.eigvalsh(-5.0 * (dense.H - np.eye(len(dense.H))) + np.eye(len(dense.H))).min() < 0.0
    assert np.isnan(float(factor.logdet))


def test_schur_complements_are_taken_both_ways() -> None:
    """As one matrix product where most pairs of levels meet, by lists of products where few do."""
    chosen = {kind: Dense(kind).design.plan.dense for kind in KINDS if KINDS[kind][2]}
    assert chosen["crossed"] == chosen["crossed_3"] == (True,)
    assert chosen["nested_then_crossed"] == (True, True)
    assert chosen["sparse_crossed"] == chosen["sparse_slopes"] == (False,)
    assert chosen["sparse_nested_crossed"] == (False, True)


@pytest.mark.parametrize("kind", ["sparse_crossed", "sparse_slopes", "sparse_nested_crossed"])
def test_lists_of_products_are_small_and_aligned(kind: str) -> None:
    """The largest arrays of a plan: 4 bytes a number, and where XLA reads them without a copy."""
    lists = jax.tree.leaves(Dense(kind).design.plan.products)
    assert lists
    for values in lists:
        assert values.dtype == np.int32 and values.ctypes.data % ALIGNMENT == 0


# -------------------- limits
def test_dense_remainder_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "MAX_DENSE_BYTES", 8 * 30**2)
    rng = np.random.default_rng(0)
    n = 200
    levels = [rng.permutation(np.arange(n) % m) for m in (50, 25, 9)]
    z = np.ones(n)
    with pytest.raises(gj.DataError) as caught:
        gj.design_arrays(z, z, [(z, v) for v in levels], names=["a", "school", "c"])
    text = str(caught.value)
    assert "34 rows" in text and "'school'" in text and "25 levels x 1 columns" in text and "GiB" in text
    # the largest factor is eliminated and does not count
    gj.design_arrays(z, z, [(z, levels[0]), (z, levels[1])])


def test_products_are_limited_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "MAX_PRODUCTS", 1000)
    rng = np.random.default_rng(0)
    n = 2000
    z = np.ones(n)
    levels = [rng.permutation(np.arange(n) % m) for m in (50, 40)]
    with pytest.raises(gj.DataError, match=r"crossed grouping factors: .* products .*\(limit 1,000\)"):
        gj.design_arrays(z, z, [(z, v) for v in levels])


def test_flat_positions_fit_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "MAX_DENSE_BYTES", 1 << 50)
    n = 46_400
    z = np.ones(n)
    rng = np.random.default_rng(0)
    levels = [np.arange(n), rng.permutation(n)]
    levels[0] = np.concatenate([levels[0], [0, 1]])  # crossed: level 0 meets two levels of the other
    levels[1] = np.concatenate([levels[1], levels[1][[5, 6]]])
    z = np.ones(n + 2)
    with pytest.raises(gj.DataError, match=r"dense block of 46,400 rows; the limit is 46,340"):
        gj.design_arrays(z, z, [(z, v) for v in levels])


def test_nested_designs_of_any_size_have_no_remainder() -> None:
    n = 200_000
    inner = np.arange(n) // 2
    design = gj.design_arrays(
        np.zeros(n), np.ones(n), [(np.ones(n), inner // 10), (np.ones(n), inner), (np.ones(n), inner // 5000)]
    )
    assert (design.plan.n_eliminated, design.plan.size) == (3, 0)
    assert design.n_levels == (100_000, 10_000, 20)
    assert all(p.p is None for products in design.plan.products for p in products)


def test_small_integer_levels_do_not_overflow() -> None:
    """pandas' category codes are int8 and int16: products of them would wrap."""
    rng = np.random.default_rng(0)
    n = 4000
    a, b = rng.permutation(np.arange(n) % 120), rng.permutation(np.arange(n) % 100)
    z = np.ones(n)
    wide = gj.design_arrays(z, z, [(z, a), (z, b)])
    small = gj.design_arrays(z, z, [(z, a.astype(np.int8)), (z, b.astype(np.int8))])
    for one, two in zip(jax.tree.leaves(wide), jax.tree.leaves(small), strict=True):
        assert_close(one, two)
