"""Conditional modes of the random effects, and their implicit derivatives.

Penalised iteratively reweighted least squares in u (jointly in (u, beta) for nAGQ = 0): damped Newton
on the penalised deviance -2 sum log f(y | eta) + |u|^2. Newton steps use the observed information;
steps with safe (expected, or non-negative) weights are taken only where that is not positive definite.

The stopping rule measures the
Newton decrement g'H^-1 g *before* a full Newton step and takes that step, so the error left is of the
order of its square.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._design import Design, add_random_part, factors, fixed_part, linear_predictor, u_from_blocks, u_to_blocks
from ._linalg import Factor, factorise, outer_sum, segment_sum, small_matmul, solve, weighted_products
from .families import Family

#: Newton decrement, relative to 1 + penalised deviance, below which the last full step is taken.
TOLERANCE = 1e-12
MAX_ITERATIONS = 100
#: Shortest step tried, as a part of the Newton step.
MIN_SCALE = 2.0**-25

#: status codes
CONVERGED, ITERATION_LIMIT, STEP_LIMIT, NON_FINITE = 0, 1, 2, 3
MESSAGES = {
    CONVERGED: "PIRLS converged",
    ITERATION_LIMIT: f"PIRLS did not converge in {MAX_ITERATIONS} iterations",
    STEP_LIMIT: "PIRLS step-halvings failed to reduce the penalised deviance",
    NON_FINITE: "the penalised deviance is not finite: the linear predictor left the range of the link",
}

Blocked = tuple[Any, ...]  # per block (m, k)


class Parameters(NamedTuple):
    """Parameters of the marginal likelihood."""

    theta: Any  # (n_theta,)
    beta: Any  # (p,)
    phi: Any  # (n_phi,)


class Mode(NamedTuple):
    """Conditional modes; `u` per block (m, k), `beta` the joint mode (nAGQ = 0) or the given one."""

    u: Blocked
    beta: Array
    status: Any
    iterations: Any


class PIRLS(NamedTuple):
    """Result of `pirls`."""

    u: Array  # (q,) spherical conditional modes, in the order of Z's columns
    factor: Factor  # block elimination of Lambda'Z'WZ Lambda + I with the observed information
    status: Array  # 0 converged; messages in glmmjax._pirls.MESSAGES
    iterations: Array


def unspool(u: Blocked, T: Blocked) -> Blocked:
    """b = T u per level, (m, k)."""
    return tuple(small_matmul(x[:, None, :], t.T[None])[:, 0, :] for x, t in zip(u, T, strict=True))


def eta_of(u: Blocked, params: Parameters, design: Design) -> Array:
    """(n,) linear predictor at spherical random effects u."""
    return linear_predictor(unspool(u, factors(params.theta, design)), params.beta, design)


def squared_norm(u: Blocked) -> Array:
    return sum((jnp.vdot(x, x) for x in u), start=jnp.zeros((), u[0].dtype))


def score_u(score: Array, u: Blocked, T: Blocked, design: Design) -> Blocked:
    """Gradient of the penalised log density in u: Lambda'Z' dlogf/deta - u."""
    out = []
    for x, t, z, level, m in zip(u, T, design.z, design.level, design.n_levels, strict=True):
        sums = segment_sum(score[:, None] * z, level, m)
        out.append(small_matmul(sums[:, None, :], t[None])[:, 0, :] - x)
    return tuple(out)


def border(w: Array, T: Blocked, design: Design) -> Blocked:
    """Lambda'Z'WX per block (m, k, p)."""
    out = []
    wX = w[:, None] * design.X
    for t, z, level, m in zip(T, design.z, design.level, design.n_levels, strict=True):
        sums = segment_sum(z[:, :, None] * wX[:, None, :], level, m)
        out.append(small_matmul(t.T[None], sums))
    return tuple(out)


class _Step(NamedTuple):
    du: Blocked
    dbeta: Array
    decrement: Array
    ok: Array


def newton_step(score: Array, w: Array, u: Blocked, T: Blocked, design: Design, joint: bool) -> tuple[_Step, Factor]:
    """One Newton step of the penalised log density with curvature w (n,)."""
    g = score_u(score, u, T, design)
    factor = factorise(weighted_products(design.z, design.level, design.n_levels, w, design.plan), T, design.plan)
    if not joint:
        du = tuple(x[..., 0] for x in solve(factor, tuple(x[..., None] for x in g), design.plan))
        dbeta = jnp.zeros(design.p, score.dtype)
        decrement = sum(jnp.vdot(a, b) for a, b in zip(g, du, strict=True))
        # a block that is not positive definite has a NaN inverse, which reaches the decrement
        return _Step(du, dbeta, jnp.asarray(decrement), jnp.isfinite(decrement) & (decrement >= 0.0)), factor
    # border the system by X: u first, then beta by its Schur complement
    B = border(w, T, design)
    rhs = tuple(jnp.concatenate([x[..., None], b], axis=2) for x, b in zip(g, B, strict=True))
    solved = solve(factor, rhs, design.plan)
    information, g_beta = fixed_information(w, score, B, g, solved, design)
    L = jnp.linalg.cholesky(information)
    dbeta = jax.scipy.linalg.cho_solve((L, True), g_beta)
    du = tuple(s[..., 0] - (s[..., 1:] * dbeta).sum(-1) for s in solved)
    full_g_beta = design.X.T @ score
    decrement = sum(jnp.vdot(a, b) for a, b in zip(g, du, strict=True)) + full_g_beta @ dbeta
    return _Step(du, dbeta, decrement, jnp.isfinite(decrement) & (decrement >= 0.0)), factor


def fixed_information(
    w: Array, score: Array, B: Blocked, g: Blocked, solved: Blocked, design: Design
) -> tuple[Array, Array]:
    """R_X'R_X = X'WX - B'H^-1 B (p, p) and the reduced gradient of beta (p,)."""
    information = design.X.T @ (w[:, None] * design.X)
    reduced = design.X.T @ score
    for b, s, x in zip(B, solved, g, strict=True):
        information = information - outer_sum(b, s[..., 1:]).sum(0)
        reduced = reduced - (s[..., 1:] * x[..., None]).sum((0, 1))
    return information, reduced


class _State(NamedTuple):
    """Little of it: under `vmap` every leaf costs an operation per turn.

    The point to evaluate next, and at the end the mode, is base + scale * step.
    """

    base: tuple[Blocked, Array | None]  # (u, beta if joint), the last accepted point
    step: tuple[Blocked, Array | None]  # the Newton step from it
    value: Array  # its penalised deviance
    scale: Array
    flags: Array  # status, and the bits below
    iterations: Array


#: the last decrement was at rounding level; take the next step with safe weights; finished
_NEARLY, _FISHER, _DONE = 8, 16, 32


def safe_weights(eta: Array, w_observed: Array, params: Parameters, design: Design, family: Family) -> Array:
    """Non-negative curvature: the expected information if offered, else the observed one clipped at 0."""
    expected = family.expected_information(eta, jnp.asarray(design.weights), params.phi)
    return jnp.maximum(w_observed, 0.0) if expected is None else expected


def find_mode(
    params: Parameters,
    design: Design,
    family: Family,
    u0: Blocked,
    joint: bool = False,
    tolerance: float = TOLERANCE,
) -> Mode:
    """Minimise the penalised deviance from u0 (and from params.beta if `joint`).

    Not differentiable through its iterations; `conditional_mode` is.
    """
    T = factors(params.theta, design)
    y, weights = jnp.asarray(design.y), jnp.asarray(design.weights)
    fixed = fixed_part(params.beta, design)  # out of the loop, where XLA would compute it in every turn

    def point(s: _State) -> tuple[Blocked, Array]:
        (u, beta), (du, dbeta) = s.base, s.step
        moved = tuple(x + s.scale * d for x, d in zip(u, du, strict=True))
        return moved, params.beta if beta is None or dbeta is None else beta + s.scale * dbeta

    def body(s: _State) -> _State:
        # one evaluation and one step; everything appears once in the compiled program
        u, beta = point(s)
        eta = add_random_part(fixed_part(beta, design) if joint else fixed, unspool(u, T), design)
        kernel, score, w = family.derivatives(y, eta, weights, params.phi)
        value = -2.0 * kernel.sum() + squared_norm(u)
        fisher, nearly = s.flags & _FISHER > 0, s.flags & _NEARLY > 0
        if not family.canonical:
            w = jnp.where(fisher, safe_weights(eta, w, params, design, family), w)
        newton, _ = newton_step(score, w, u, T, design, joint)

        first = ~jnp.isfinite(s.value)
        falls = first | nearly | (value <= s.value + 1e-13 * jnp.abs(s.value))
        accepted = jnp.isfinite(value) & falls
        usable = accepted & newton.ok
        # accepted, but no Newton step from here: try again with safe weights; rejected: half the step
        to_fisher = accepted & ~newton.ok & ~fisher & (not family.canonical)
        scale = jnp.where(accepted, 1.0, 0.5 * s.scale)
        exhausted = ~accepted & (first | (scale < MIN_SCALE))
        failed = exhausted | (accepted & ~newton.ok & ~to_fisher)

        def choose(new: Any, old: Any, when: Array) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(when, a, b), new, old)

        # a full Newton step with a decrement this small is taken without looking: its error is of second order
        relative = newton.decrement / (1.0 + jnp.abs(value))
        converged = usable & (relative < tolerance) & ~fisher
        status = jnp.where(
            converged,
            CONVERGED,
            jnp.where(failed, jnp.where(jnp.isfinite(value), STEP_LIMIT, NON_FINITE), ITERATION_LIMIT),
        )
        flags = (
            status
            + jnp.where(usable & (relative < 1e-9), _NEARLY, 0)
            + jnp.where(to_fisher, _FISHER, 0)
            + jnp.where(converged | failed, _DONE, 0)
        )
        return _State(
            base=choose((u, beta if joint else None), s.base, accepted),
            step=choose((newton.du, newton.dbeta if joint else None), s.step, usable),
            value=jnp.where(accepted, value, s.value),
            scale=jnp.where(to_fisher | failed, 0.0, scale),
            flags=flags.astype(jnp.int32),
            iterations=s.iterations + 1,
        )

    def unfinished(s: _State) -> Array:
        return (s.flags < _DONE) & (s.iterations < MAX_ITERATIONS)

    dtype = params.beta.dtype
    count = jnp.zeros((), jnp.int32)
    base = (u0, params.beta if joint else None)
    start = _State(
        base=base,
        step=jax.tree.map(jnp.zeros_like, base),
        value=jnp.full((), jnp.inf, dtype),
        scale=jnp.ones((), dtype),
        flags=count + ITERATION_LIMIT,
        iterations=count,
    )
    end = jax.lax.while_loop(unfinished, body, start)
    return Mode(*point(end), end.flags % _NEARLY, end.iterations)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def conditional_mode(params: Parameters, design: Design, u0: Blocked, family: Family, joint: bool) -> Mode:
    """`find_mode` with derivatives in `params` and in every float array of `design`, to any order.

    The implicit function theorem: d(u, beta) = H_obs^-1 d(gradient of the penalised log density).
    """
    return find_mode(params, design, family, u0, joint)


def _implicit_rule(family: Family, joint: bool, primals: Any, tangents: Any) -> tuple[Mode, Mode]:
    params, design, u0 = primals
    mode = conditional_mode(params, design, u0, family, joint)
    at = params._replace(beta=mode.beta)

    leaves, tree = jax.tree.flatten((at, design))
    d_leaves = jax.tree.leaves(tangents[:2], is_leaf=is_symbolic_zero)
    if joint:  # the given beta is only where the iteration starts
        d_leaves[1] = None
    active = [i for i, d in enumerate(d_leaves) if d is not None and not is_symbolic_zero(d)]

    def gradient(values: list[Array]) -> tuple[Blocked, Array, Array]:
        filled = list(leaves)
        for i, value in zip(active, values, strict=True):
            filled[i] = value
        p, d = jax.tree.unflatten(tree, filled)
        T = factors(p.theta, d)
        eta = linear_predictor(unspool(mode.u, T), p.beta, d)
        _, score, w = family.derivatives(jnp.asarray(d.y), eta, jnp.asarray(d.weights), p.phi)
        return score_u(score, mode.u, T, d), jnp.asarray(d.X).T @ score, w

    zero_int = (np.zeros((), jax.dtypes.float0),) * 2
    if not active:
        zeros = jax.tree.map(jnp.zeros_like, (mode.u, mode.beta))
        return mode, Mode(zeros[0], zeros[1], *zero_int)
    _, (dg, dg_beta, _) = jax.jvp(gradient, ([leaves[i] for i in active],), ([d_leaves[i] for i in active],))
    _, _, w = gradient([leaves[i] for i in active])
    T = factors(params.theta, design)
    factor = factorise(weighted_products(design.z, design.level, design.n_levels, w, design.plan), T, design.plan)
    rhs = tuple(x[..., None] for x in dg)
    if not joint:
        du = tuple(x[..., 0] for x in solve(factor, rhs, design.plan))
        dbeta = d_leaves[1] if 1 in active else jnp.zeros_like(mode.beta)
        return mode, Mode(du, dbeta, *zero_int)
    B = border(w, T, design)
    HB = solve(factor, B, design.plan)
    Hg = solve(factor, rhs, design.plan)
    X = jnp.asarray(design.X)
    information = X.T @ (w[:, None] * X)
    for b, s, x in zip(B, HB, dg, strict=True):
        information = information - outer_sum(b, s).sum(0)
        dg_beta = dg_beta - (s * x[..., None]).sum((0, 1))
    dbeta = jax.scipy.linalg.solve(information, dg_beta, assume_a="pos")
    du = tuple(a[..., 0] - (s * dbeta).sum(-1) for a, s in zip(Hg, HB, strict=True))
    return mode, Mode(du, dbeta, *zero_int)


def is_symbolic_zero(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.SymbolicZero)


conditional_mode.defjvp(_implicit_rule, symbolic_zeros=True)


def pirls(
    theta: Array,
    beta: Array,
    design: Design,
    family: Family,
    phi: Array | None = None,
    u0: Array | None = None,
) -> PIRLS:
    """Conditional modes of the spherical random effects at given parameters.

    Args:
        theta: (n_theta,) packed relative factors in lme4's order.
        beta: (p,) fixed effects, link scale.
        design: see `Design`.
        family: static.
        phi: (n_phi,) dispersion parameters, positive; needed by families that have any.
        u0: (q,) starting values, default zeros; the result depends on them only beyond the tolerance.

    Returns:
        `PIRLS`: u (q,) in the order of Z's columns, the block factor of the observed penalised
        information at u, status (0 converged), iterations. u is differentiable.
    """
    params = parameters(theta, beta, family, phi)
    start = zero_u(design, params.beta.dtype) if u0 is None else u_to_blocks(jnp.asarray(u0), design)
    mode = conditional_mode(params, design, start, family, False)
    eta = eta_of(mode.u, params, design)
    _, _, w = family.derivatives(jnp.asarray(design.y), eta, jnp.asarray(design.weights), params.phi)
    T = factors(params.theta, design)
    factor = factorise(weighted_products(design.z, design.level, design.n_levels, w, design.plan), T, design.plan)
    return PIRLS(u_from_blocks(mode.u, design), factor, mode.status, mode.iterations)


def zero_u(design: Design, dtype: Any) -> Blocked:
    """u = 0 per block (m, k)."""
    return tuple(jnp.zeros((m, z.shape[1]), dtype) for m, z in zip(design.n_levels, design.z, strict=True))


def parameters(theta: Any, beta: Any, family: Family, phi: Any = None) -> Parameters:
    """Check and pack the parameters of the pure functions."""
    if phi is None:
        phi = family.phi_start()
    theta, beta = jnp.asarray(theta), jnp.asarray(beta)
    dtype = jnp.result_type(theta, beta, float)
    phi = jnp.asarray(phi, dtype).reshape(-1)
    if phi.shape[0] != len(family.phi_names):
        raise ValueError(
            f"family {family.name} has {len(family.phi_names)} dispersion parameters, phi has {phi.shape[0]}"
        )
    return Parameters(theta.astype(dtype), beta.astype(dtype), phi)
