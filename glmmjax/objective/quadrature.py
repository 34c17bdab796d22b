"""Minus twice the log-likelihood at given parameters, by adaptive Gauss-Hermite quadrature.

With one grouping factor the likelihood is a product of integrals over the d random effects of each level. Level j's
is taken on axes that its own mode and curvature standardise: u = u~_j + R_j z, R_j = L_j^-T, L_j L_j' = Lambda'Z_j'WZ_j
Lambda + I. There the integrand is the standard normal density times

    t_j(z) = exp( log f(y_j | u) - |u|^2/2 - log f(y_j | u~_j) + |u~_j|^2/2 + |z|^2/2 ),    t_j(0) = 1,

and the integral is Laplace's value times sum_k w_k t_j(z_k), a product of d Gauss-Hermite rules. Modes and scales are
functions of the parameters and are differentiated as such.

Sources: Pinheiro & Bates 1995, J. Comput. Graph. Stat. 4(1), section 2.4; Bates 2010, "Computational methods for
mixed models", section 3; Liu & Pierce 1994, Biometrika 81(3).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import logsumexp

from .._arguments import checked
from ..algebra.linalg import sandwich, segment_sum, small_matmul, take
from ..compiling.precision import own_settings
from ..families import Family
from ..families import get as get_family
from ..model.design import Design, linear_predictor
from ..model.parameters import Parameters
from .laplace import (
    Evaluation,
    at_mode,
    laplace,
    log_density_constant,
    resolve_hessian,
    warn_if_single_precision,
)
from .pirls import Blocked, parameters, unspool, zero_u

MAX_POINTS = 100
MAX_DIMENSIONS = 4
MAX_NODES = 100_000
#: Values of the integrand's rows held at a time: memory grows with this or with n, not with their number.
CHUNK = 2**17
#: Chunks whose per-level results are kept for the backward pass before they are grouped.
_GROUP = 64
#: Logarithm of a weight of nothing; -inf would turn up as NaN in derivatives.
_NOTHING = -1e30


class Rule(NamedTuple):
    """A Gauss-Hermite rule for the standard normal density: E g(Z) = sum of w g(z)."""

    z: np.ndarray  # (k,) nodes, increasing
    w: np.ndarray  # (k,) weights, their sum is 1
    log_density: np.ndarray  # (k,) standard normal log density at z


@cache
def _rule(k: int) -> tuple[np.ndarray, np.ndarray]:
    z, w = np.polynomial.hermite_e.hermegauss(k)
    return 0.5 * (z - z[::-1]), w / w.sum()


def gauss_hermite(k: int) -> Rule:
    """Gauss-Hermite rule with the standard normal density as kernel.

    Args:
        k: number of points, 1 to 100.

    Returns:
        `Rule`, exact for polynomials of degree up to 2k - 1. lme4's ``GHrule(k)`` has the same columns.
    """
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= MAX_POINTS:
        raise ValueError(f"k must be an integer from 1 to {MAX_POINTS}, got {k!r}")
    z, w = _rule(int(k))
    return Rule(z.copy(), w.copy(), -0.5 * (z**2 + np.log(2.0 * np.pi)))


def check_nodes(nAGQ: int, widths: Sequence[int]) -> None:
    """Raise ValueError unless blocks of these numbers of columns can be integrated with nAGQ points."""
    if len(widths) != 1:
        raise ValueError(
            f"nAGQ = {nAGQ} needs one grouping factor, the design has {len(widths)}: use nAGQ = 1 (Laplace) or 0"
        )
    d = widths[0]
    if nAGQ > MAX_POINTS:
        raise ValueError(f"nAGQ must be at most {MAX_POINTS}, got {nAGQ}")
    if d > MAX_DIMENSIONS:
        raise ValueError(
            f"nAGQ = {nAGQ} needs at most {MAX_DIMENSIONS} random effects per level, the model has {d}: use nAGQ = 1"
        )
    if nAGQ**d > MAX_NODES:
        raise ValueError(
            f"nAGQ = {nAGQ} with {d} random effects per level has {nAGQ**d:,} nodes per level; the limit is "
            f"{MAX_NODES:,}: use nAGQ = {most_points(d)} or fewer"
        )


def most_points(d: int) -> int:
    """The largest nAGQ for d random effects per level."""
    return max(k for k in range(1, MAX_POINTS + 1) if k**d <= MAX_NODES)


class Local(NamedTuple):
    """What the integrands need at the modes."""

    u: Array  # (m, d) modes
    R: Array  # (m, d, d) standardising scales
    TR: Array  # (m, d, d) the same for b = T u
    eta: Array  # (n,)
    kernel: Array  # (n,)


def standard_scale(H: Array) -> Array:
    """R = L^-T (m, d, d), H = L L': upper triangular, R R' = H^-1. Unrolled, so that any derivative is elementwise."""
    d = H.shape[-1]
    zero = jnp.zeros(H.shape[:-2], H.dtype)
    L = [[zero] * d for _ in range(d)]
    inverse = [[zero] * d for _ in range(d)]
    for j in range(d):
        for i in range(j, d):
            rest = H[..., i, j] - sum((L[i][k] * L[j][k] for k in range(j)), zero)
            L[i][j] = jnp.sqrt(rest) if i == j else rest / L[j][j]
    for i in range(d):
        inverse[i][i] = 1.0 / L[i][i]
        for j in range(i):
            inverse[i][j] = -inverse[i][i] * sum((L[i][k] * inverse[k][j] for k in range(j, i)), zero)
    return jnp.stack([jnp.stack([inverse[j][i] for j in range(d)], axis=-1) for i in range(d)], axis=-2)


def local(u: Array, T: Array, products: Array, params: Parameters, design: Design, family: Family) -> Local:
    """Rows at the modes u (m, d), b = T u, and scales from products Z'WZ (m, d, d)."""
    eta = linear_predictor(unspool((u,), (T,)), params.beta, design)
    kernel = family.kernel(jnp.asarray(design.y), eta, jnp.asarray(design.weights), params.phi)
    R = standard_scale(sandwich(T, products, T) + jnp.eye(T.shape[0], dtype=T.dtype))
    return Local(u, R, small_matmul(T[None], R), eta, kernel)


def log_t(zeta: Array, here: Local, params: Parameters, design: Design, family: Family) -> Array:
    """log t_j at points zeta (c, d) of the standardised axes, (m, c)."""
    y, weights = jnp.asarray(design.y), jnp.asarray(design.weights)
    z, level = design.z[0], design.level[0]
    step = small_matmul(here.R, zeta.T[None])  # (m, d, c)
    effect = small_matmul(here.TR, zeta.T[None])
    eta = here.eta[:, None]
    for k in range(z.shape[1]):
        eta = eta + z[:, k, None] * take(effect[:, k], level)

    def rows(eta: Array) -> Array:
        inside = family.in_range(y, eta)
        return jnp.where(inside, family.kernel(y, eta, weights, params.phi) - here.kernel, -jnp.inf)

    change = segment_sum(jax.vmap(rows, 1, 1)(eta), level, design.n_levels[0])
    change = change - ((here.u[:, :, None] + 0.5 * step) * step).sum(1)
    return change + 0.5 * jnp.square(zeta).sum(1)


def product_nodes(index: Array, z: Array, log_w: Array, k: Any, d: int) -> tuple[Array, Array]:
    """Nodes (c, d) and log weights (c,) of the product rule by their numbers; beyond k^d the weight is nothing."""
    zeta, weight, rest = [], jnp.zeros(index.shape, z.dtype), index
    for _ in range(d):
        digit = rest % k
        rest = rest // k
        zeta.append(z[digit])
        weight = weight + log_w[digit]
    return jnp.stack(zeta, axis=1), jnp.where(rest == 0, weight, _NOTHING)


def log_ratios(nAGQ: int, here: Local, params: Parameters, design: Design, family: Family) -> Array:
    """log of each level's integral over Laplace's value of it, (m,).

    In chunks of nodes, each evaluated again in the backward pass: memory is that of n rows times one
    chunk, and of one number per level and chunk.
    """
    z, w = _rule(nAGQ)
    rule = jnp.asarray(z, here.eta.dtype), jnp.asarray(np.log(w), here.eta.dtype)
    d = design.z[0].shape[1]
    total = nAGQ**d
    steps = -(-total // max(CHUNK // max(design.n, 1), 1))
    width = -(-total // steps)

    def chunk(start: Array) -> Array:
        zeta, weight = product_nodes(start + jnp.arange(width, dtype=np.int32), *rule, nAGQ, d)
        return logsumexp(log_t(zeta, here, params, design, family) + weight, axis=1)

    def group(starts: Array) -> Array:
        return logsumexp(jax.lax.map(jax.checkpoint(chunk), starts), axis=0)

    if steps == 1:
        return chunk(jnp.zeros((), np.int32))
    if steps <= _GROUP:
        return group(width * jnp.arange(steps, dtype=np.int32))
    groups = -(-steps // _GROUP)
    starts = jnp.minimum(width * jnp.arange(groups * _GROUP, dtype=np.int32), total)
    return logsumexp(jax.lax.map(jax.checkpoint(group), starts.reshape(groups, _GROUP)), axis=0)


def marginal(
    params: Parameters, design: Design, family: Family, u0: Blocked, hessian: str, nAGQ: int
) -> tuple[Array, Evaluation]:
    """Deviance without the data constant by the approximation that nAGQ names, and the modes it was computed at."""
    if nAGQ <= 1:
        return laplace(params, design, family, u0, hessian, joint=nAGQ == 0)
    at = at_mode(params, design, family, u0, hessian)
    here = local(at.mode.u[0], at.T[0], at.blocks.diagonal[0], params, design, family)
    value = at.value - 2.0 * log_ratios(nAGQ, here, params, design, family).sum()
    return jnp.where(jnp.isfinite(value), value, jnp.inf), at.evaluation


@checked(traceable=True)
@own_settings
def agq_deviance(
    theta: Any, beta: Any, design: Design, family: Family, nAGQ: int, phi: Any = None, hessian: str | None = None
) -> Array:
    """Minus twice the marginal log-likelihood by adaptive Gauss-Hermite quadrature.

    Args:
        theta, beta, design, family, phi: as `laplace_deviance`; the design has one grouping factor, with at most 4
            random effects per level.
        nAGQ: static; points per random effect, nAGQ^d at most 100,000 nodes per level. 1 is `laplace_deviance`.
        hessian: curvature that scales the nodes, as in `laplace_deviance`; as nAGQ grows it ceases to matter.

    Returns:
        () all normalising constants included, as in `laplace_deviance`; +inf where PIRLS failed.

    Differentiable to second order: modes and scales of the nodes move with the parameters. Outside the range of a link
    (an identity-link Poisson mean below 0) the density is taken as 0.
    """
    if isinstance(nAGQ, bool) or not isinstance(nAGQ, (int, np.integer)) or nAGQ < 1:
        raise ValueError(f"nAGQ must be a positive integer, got {nAGQ!r}")
    if nAGQ > 1:
        check_nodes(int(nAGQ), [z.shape[1] for z in design.z])
    warn_if_single_precision()
    family = get_family(family).at_present()
    params = parameters(theta, beta, family, phi, design)
    u0 = zero_u(design, params.beta.dtype)
    value, _ = marginal(params, design, family, u0, resolve_hessian(hessian, family), int(nAGQ))
    return value + log_density_constant(design, family)
