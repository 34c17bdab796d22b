"""The linear mixed model: penalised least squares on cross-products, and the profiled ML and REML criteria.

The data enter through cross-products that are formed once, so that an evaluation never touches the n rows. One
elimination of

    [ Lambda'Z'WZ Lambda + I   Lambda'Z'W[X y] ]
    [       [X y]'WZ Lambda       [X y]'W[X y]  ]

gives log|L|^2; its Schur complement has the Cholesky factor [R_X, R_X beta; 0, r].
Source: Bates et al. 2015, J. Stat. Softw. 67(1), sections 3.2 to 3.4, equations 34 and 42.

Cross-products cancel, so X is first orthogonalised (X = Xs A) and y replaced by its residual from X. Both are exact
transformations of the problem whatever their coefficients, which therefore carry no derivatives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .._arguments import checked, vector
from ..algebra.bordered import bordered
from ..algebra.linalg import Blocks, one_inverse, penalised, segment_sum, weighted_products
from ..algebra.symbolic import Plan
from ..compiling.precision import own_settings
from ..model.design import Design, Term, factors_of, over_devices, u_from_blocks
from ..model.rows import fold_rows, sum_over_rows
from .laplace import warn_if_single_precision

LOG_2PI = 1.8378770664093453
#: Columns of [X y] are taken one at a time where their products with z would need more numbers than this.
MAX_PRODUCT_SIZE = 2**25


class CrossProducts(NamedTuple):
    """Everything the criterion needs of the data, in internal units."""

    blocks: Blocks  # Z'WZ
    border: tuple[Array, ...]  # per block (m, k, p + 1): Z'W[Xs y]
    gram: Array  # (p + 1, p + 1): [Xs y]'W[Xs y]
    A: Array  # (p, p) upper triangular: X = Xs A
    beta_ols: Array  # (p,) taken out of y, in units of Xs
    log_det_A: Array  # log |det A|
    log_weights: Array  # sum of log weights of the rows that have any
    n: Array  # their number, as a float


def cross_products(design: Design) -> CrossProducts:
    """Cross-products of a design; X orthonormal in them (Xs'WXs = n I), y the weighted OLS residual."""
    n, p, dtype = over_devices(design.n, design), design.p, jnp.asarray(design.X).dtype

    def factor(R: Array | None, rows: Design) -> Array:
        X = jnp.sqrt(jnp.asarray(rows.weights))[:, None] * jnp.asarray(rows.X)
        return jnp.linalg.qr(X if R is None else jnp.concatenate([R, X]), mode="r")

    A, A_inverse, log_det_A = jnp.zeros((0, 0), dtype), jnp.zeros((0, 0), dtype), jnp.zeros((), dtype)
    if p:
        R = fold_rows(factor, jnp.zeros((p, p), dtype), jax.lax.stop_gradient(design))
        if design.axis is not None:
            R = jnp.linalg.qr(jax.lax.all_gather(R, design.axis, tiled=True), mode="r")
        A = R / n**0.5
        A = jnp.where(jnp.diagonal(A) < 0.0, -1.0, 1.0)[:, None] * A
        A_inverse = jax.scipy.linalg.solve_triangular(A, jnp.eye(p, dtype=dtype))
        log_det_A = jnp.log(jnp.diagonal(A)).sum()

    def columns(rows: Design, taken: tuple[Array, ...]) -> tuple[Array, Array]:
        """Xs, and y without its offset and what was taken out of it."""
        X, y = jnp.asarray(rows.X) @ A_inverse, jnp.asarray(rows.y) - jnp.asarray(rows.offset)
        for beta in taken:
            y = y - X @ beta
        return X, y

    def regression(rows: Design, taken: tuple[Array, ...]) -> Array:
        X, y = columns(rows, taken)
        return X.T @ (jnp.asarray(rows.weights) * y) / n

    def products(rows: Design, taken: tuple[Array, ...]) -> tuple[Any, ...]:
        X, y = columns(rows, taken)
        w = jnp.asarray(rows.weights)
        both = jnp.concatenate([X, y[:, None]], axis=1)
        weighted = w[:, None] * both
        blocks = zip(rows.z, rows.level, rows.n_levels, strict=True)
        border = tuple(_products_with(jnp.asarray(z), weighted, level, m) for z, level, m in blocks)
        there = w > 0.0
        return (
            weighted_products(rows.z, rows.level, rows.n_levels, w, rows.plan),
            border,
            both.T @ weighted,
            jnp.log(jnp.where(there, w, 1.0)).sum(),
            there.sum().astype(dtype),
        )

    taken: tuple[Array, ...] = ()
    for _ in range(2):  # the second pass removes the rounding of the first
        beta = over_devices(sum_over_rows(regression, design, taken), design)
        taken = (*taken, jax.lax.stop_gradient(beta))
    blocks, border, gram, log_weights, rows = over_devices(sum_over_rows(products, design, taken), design)
    return CrossProducts(blocks, border, gram, A, taken[0] + taken[1], log_det_A, log_weights, rows)


def _products_with(z: Array, weighted: Array, level: Any, m: int) -> Array:
    """(m, k, c): sums over each level's rows of z_i weighted_i'."""
    if z.size * weighted.shape[1] <= MAX_PRODUCT_SIZE:
        return segment_sum(z[:, :, None] * weighted[:, None, :], level, m)
    one = jax.lax.map(lambda column: segment_sum(z * column[:, None], level, m), weighted.T)
    return jnp.moveaxis(one, 0, -1)


class Profile(NamedTuple):
    """Solution of the penalised least squares problem at one theta, in internal units."""

    logdet_L: Array  # log|L|^2
    logdet_RX: Array  # log|R_X|^2 of Xs
    r2: Array  # penalised weighted residual sum of squares
    beta: Array  # (p,) beyond beta_ols
    u: tuple[Array, ...]  # per block (m, k)
    schur: Array  # (p, p): R_X'R_X of Xs
    schur_inverse: Array  # (p, p)


def scale_border(T: tuple[Array, ...], cross: CrossProducts) -> tuple[Array, ...]:
    """Lambda'Z'W[Xs y] per block (m, k, p + 1)."""
    return tuple((t.T[None, :, :, None] * b[:, None, :, :]).sum(2) for t, b in zip(T, cross.border, strict=True))


def reduce_gram(logdet: Array, quadratic: Array, X: tuple[Array, ...], cross: CrossProducts) -> Profile:
    """Finish the elimination: [Xs y]'W[Xs y] - B'H^-1 B is [R_X'R_X, R_X'R_X beta; ., r^2 + beta'R_X'R_X beta]."""
    p = cross.gram.shape[0] - 1
    reduced = cross.gram - quadratic
    schur, right, r2 = reduced[:p, :p], reduced[:p, p], reduced[p, p]
    if not p:
        return Profile(logdet, jnp.zeros_like(r2), r2, right, tuple(x[..., 0] for x in X), schur, schur)
    schur = 0.5 * (schur + schur.T)
    inverse, logdet_RX = one_inverse(schur)
    beta = inverse @ right
    u = tuple(x[..., p] - x[..., :p] @ beta for x in X)
    return Profile(logdet, logdet_RX, r2 - right @ beta, beta, u, schur, inverse)


def profile(theta: Array, cross: CrossProducts, plan: Plan, terms: tuple[Term, ...]) -> Profile:
    """Penalised least squares at theta; NaN where the system is not positive definite."""
    T = factors_of(theta, terms, [A.shape[-1] for A in cross.blocks.diagonal])
    out = bordered(penalised(cross.blocks, T, plan), scale_border(T, cross), plan)
    return reduce_gram(out.logdet, out.quadratic, out.X, cross)


def criterion(at: Profile, cross: CrossProducts, reml: Array | float) -> Array:
    """Profiled deviance (reml = 0) or REML criterion (reml = 1) with all constants; +inf where r2 is not positive."""
    p = cross.gram.shape[0] - 1
    size = cross.n - reml * p
    r2 = jnp.where(at.r2 > 0.0, at.r2, jnp.nan)
    value = at.logdet_L + size * (1.0 + LOG_2PI + jnp.log(r2 / size)) - cross.log_weights
    if p:
        value = value + reml * (at.logdet_RX + 2.0 * cross.log_det_A)
    return jnp.where(jnp.isfinite(value), value, jnp.inf)


def fixed_effects(beta: Array, cross: CrossProducts) -> Array:
    """(p,) fixed effects in the units of X, from those of Xs beyond the OLS estimate."""
    if not beta.shape[0]:
        return beta
    return jax.scipy.linalg.solve_triangular(cross.A, beta + cross.beta_ols)


class PLS(NamedTuple):
    """Result of `pls`, under the names of the theory.

    Attributes:
        logdet_L: () log|L|^2, the log-determinant of Lambda'Z'WZ Lambda + I.
        logdet_RX: () log|R_X|^2, of the Schur complement of X.
        r2: () penalised weighted residual sum of squares at its minimum.
        beta: (p,) conditional estimate of the fixed effects.
        u: (q,) conditional mode of the spherical random effects, in the order of Z's columns.
        sigma: () residual standard deviation, sqrt(r2 / n).
        sigma_reml: () its REML counterpart, sqrt(r2 / (n - p)).
        RX: (p, p) upper triangular, R_X'R_X = X'WX - R_ZX'R_ZX.
    """

    logdet_L: Array
    logdet_RX: Array
    r2: Array
    beta: Array
    u: Array
    sigma: Array
    sigma_reml: Array
    RX: Array


@checked(traceable=True)
@own_settings
def pls(theta: Any, design: Design) -> PLS:
    """Penalised least squares at theta: min over (u, beta) of |W^1/2 (y - X beta - Z Lambda u)|^2 + |u|^2.

    Args:
        theta: (n_theta,) packed relative factors in lme4's order, relative to sigma.
        design: see `Design`; its weights are precision weights.

    Returns:
        `PLS`, differentiable in theta and in the float arrays of the design.

    Source: Bates et al. 2015, J. Stat. Softw. 67(1), equations 28 to 34.
    """
    theta = _real(theta, design)
    cross = cross_products(design)
    at = profile(theta, cross, design.plan, design.terms)
    return PLS(
        at.logdet_L,
        at.logdet_RX + 2.0 * cross.log_det_A,
        at.r2,
        fixed_effects(at.beta, cross),
        u_from_blocks(at.u, design),
        jnp.sqrt(at.r2 / design.n),
        jnp.sqrt(at.r2 / (design.n - design.p)),
        jnp.linalg.cholesky(at.schur).T @ cross.A if design.p else at.schur,
    )


@checked(traceable=True)
@own_settings
def lmm_deviance(theta: Any, design: Design, REML: bool = True) -> Array:
    """Profiled deviance or REML criterion of a linear mixed model, all constants included.

    Args:
        theta: (n_theta,) packed relative factors in lme4's order, relative to sigma.
        design: see `Design`; its weights are precision weights (lmer's meaning).
        REML: the REML criterion instead of minus twice the log-likelihood.

    Returns:
        () with beta and sigma profiled out; +inf where the residual sum of squares is 0.

    Differentiable to second order in theta and in the float arrays of the design.
    Source: Bates et al. 2015, J. Stat. Softw. 67(1), equations 34 and 42; weights subtract sum log w.
    """
    theta = _real(theta, design)
    cross = cross_products(design)
    return criterion(profile(theta, cross, design.plan, design.terms), cross, float(REML))


def _real(theta: Any, design: Design) -> Array:
    warn_if_single_precision()
    vector(theta, "theta", design.n_theta)
    theta = jnp.asarray(theta)
    return theta.astype(jnp.result_type(theta, float))


Pair = tuple[Array, Array]


def gradient_and_covariance(
    theta: Array, cross: CrossProducts, reml: Array, plan: Plan, terms: tuple[Term, ...]
) -> Pair:
    """Gradient of the profiled criterion (t,), and the covariance of beta (p, p) with sigma profiled out."""

    def value(theta: Array) -> tuple[Array, Array]:
        at = profile(theta, cross, plan, terms)
        size = cross.n - reml * at.beta.shape[0]
        return criterion(at, cross, reml), at.r2 / size * at.schur_inverse

    (_, covariance), g = jax.value_and_grad(value, has_aux=True)(theta)
    return g, covariance


def moving_covariance(
    theta: Array, cross: CrossProducts, reml: Array, plan: Plan, terms: tuple[Term, ...]
) -> tuple[Pair, Array]:
    """Derivatives of what `gradient_and_covariance` returns, theta last, and the covariance of beta."""

    def twice(theta: Array) -> tuple[Pair, Array]:
        out = gradient_and_covariance(theta, cross, reml, plan, terms)
        return out, out[1]

    derivatives, covariance = jax.jacfwd(twice, has_aux=True)(theta)
    return derivatives, covariance
