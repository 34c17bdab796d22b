"""Conditional modes of the random effects, and their implicit derivatives.

Penalised iteratively reweighted least squares in u (jointly in (u, beta) for nAGQ = 0): damped Newton
on the penalised deviance -2 sum log f(y | eta) + |u|^2. Newton steps use the observed information;
steps with safe (expected, or non-negative) weights are taken only where that is not positive definite.

The stopping rule measures the
Newton decrement g'H^-1 g *before* a full Newton step and takes that step, so the error left is of the
order of its square.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .._arguments import checked, vector
from ..algebra.linalg import (
    Blocks,
    Factor,
    factorise,
    one_inverse,
    outer_sum,
    products_times,
    segment_sum,
    segment_sums,
    small_matmul,
    solve,
    weighted_pairs,
    weighted_products,
    weighted_rows,
)
from ..compiling.precision import by_precision, own_settings
from ..families import Family
from ..families import get as get_family
from ..model.design import (
    Design,
    add_random_part,
    factors,
    fixed_part,
    linear_predictor,
    over_devices,
    u_from_blocks,
    u_to_blocks,
)
from ..model.parameters import Parameters
from ..model.rows import chunk_rows, sum_over_rows

#: Newton decrement, relative to 1 + penalised deviance, below which the last full step is taken.
TOLERANCE = 1e-12
MAX_ITERATIONS = 100
#: Penalised deviances above this are not those of data near their means.
FAR = 1e12
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
    status: Array  # 0 converged; messages in glmmjax.objective.pirls.MESSAGES
    iterations: Array


def unspool(u: Blocked, T: Blocked) -> Blocked:
    """b = T u per level, (m, k)."""
    return tuple(small_matmul(x[:, None, :], t.T[None])[:, 0, :] for x, t in zip(u, T, strict=True))


def squared_norm(u: Blocked) -> Array:
    return sum((jnp.vdot(x, x) for x in u), start=jnp.zeros((), u[0].dtype))


def products_with_z(values: Array, design: Design) -> Blocked:
    """Z'values per block, (m, k) for values (n,) and (m, k, c) for values (n, c)."""
    out = []
    for z, level, m in zip(design.z, design.level, design.n_levels, strict=True):
        rows = values[:, None] * z if values.ndim == 1 else z[:, :, None] * values[:, None, :]
        out.append(segment_sum(rows, level, m))
    return tuple(out)


def score_u(score: Blocked, u: Blocked, T: Blocked) -> Blocked:
    """Gradient of the penalised log density in u: Lambda'(Z' dlogf/deta) - u."""
    return tuple(small_matmul(sums[:, None, :], t[None])[:, 0, :] - x for sums, t, x in zip(score, T, u, strict=True))


def border(ZWX: Blocked, T: Blocked) -> Blocked:
    """Lambda'(Z'WX) per block (m, k, p)."""
    return tuple(small_matmul(t.T[None], sums) for t, sums in zip(T, ZWX, strict=True))


class FixedSums(NamedTuple):
    """Sums over rows that a step in beta needs."""

    score: Array  # (p,) X'dlogf/deta
    XWX: Array  # (p, p)
    ZWX: Blocked  # per block (m, k, p)


class Sums(NamedTuple):
    """Sums over rows that a step needs."""

    score: Blocked  # Z'dlogf/deta, per block (m, k)
    blocks: Blocks  # Z'WZ
    fixed: FixedSums | None  # if beta takes part


def row_sums(score: Array, w: Array, design: Design, joint: bool) -> Sums:
    """`Sums` of rows with scores and weights (n,)."""
    X = jnp.asarray(design.X)
    wX = w[:, None] * X
    by_block = []
    for z, level, m in zip(design.z, design.level, design.n_levels, strict=True):
        rows = [score[:, None] * z, weighted_rows(z, w)]
        rows += [z[:, :, None] * wX[:, None, :]] if joint else []
        by_block.append(segment_sums(rows, level, m))
    scores, diagonal, *ZWX = zip(*by_block, strict=True)
    pairs = weighted_pairs(design.z, design.level, w, design.plan)
    fixed = FixedSums(X.T @ score, X.T @ wX, ZWX[0]) if joint else None
    return Sums(scores, Blocks(diagonal, pairs), fixed)


class _Step(NamedTuple):
    du: Blocked
    dbeta: Array | None
    decrement: Array
    ok: Array


def newton_step(sums: Sums, u: Blocked, T: Blocked, design: Design) -> _Step:
    """One Newton step of the penalised log density, in u and, where there are sums for it, beta."""
    g, plan = score_u(sums.score, u, T), design.plan
    factor = factorise(sums.blocks, T, plan)
    if sums.fixed is None:
        du = tuple(x[..., 0] for x in solve(factor, tuple(x[..., None] for x in g), plan))
        dbeta = None
        decrement = sum(jnp.vdot(a, b) for a, b in zip(g, du, strict=True))
        # a block that is not positive definite has a NaN inverse, which reaches the decrement
        return _Step(du, dbeta, jnp.asarray(decrement), jnp.isfinite(decrement) & (decrement >= 0.0))
    information, g_beta, solved = reduce_fixed(sums.fixed, g, factor, T, design)
    dbeta = one_inverse(information)[0] @ g_beta
    du = tuple(s[..., 0] - (s[..., 1:] * dbeta).sum(-1) for s in solved)
    decrement = sum(jnp.vdot(a, b) for a, b in zip(g, du, strict=True)) + sums.fixed.score @ dbeta
    decrement = over_devices(decrement, design)
    return _Step(du, dbeta, decrement, jnp.isfinite(decrement) & (decrement >= 0.0))


def reduce_fixed(
    fixed: FixedSums, g: Blocked, factor: Factor, T: Blocked, design: Design
) -> tuple[Array, Array, Blocked]:
    """The system bordered by X without u: R_X'R_X = X'WX - B'H^-1 B (p, p), the reduced gradient of beta (p,), and
    H^-1 [g B] per block (m, k, 1 + p); B = Lambda'Z'WX, g the gradient in u."""
    B = border(fixed.ZWX, T)
    rhs = tuple(jnp.concatenate([x[..., None], b], axis=2) for x, b in zip(g, B, strict=True))
    solved = solve(factor, rhs, design.plan)
    information, reduced = fixed.XWX, fixed.score
    for b, s, x in zip(B, solved, g, strict=True):
        information = information - outer_sum(b, s[..., 1:]).sum(0)
        reduced = reduced - (s[..., 1:] * x[..., None]).sum((0, 1))
    information, reduced = over_devices((information, reduced), design)
    return information, reduced, solved


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
    T, dtype = factors(params.theta, design), params.beta.dtype
    hoisted = not joint and not chunk_rows(design)
    if hoisted:  # the fixed part out of the loop, where XLA would compute it in every turn
        design = replace(design, offset=fixed_part(params.beta, design))

    def at(rows: Design, b: Blocked, beta: Array, fisher: Array) -> tuple[Array, Sums]:
        y, weights = jnp.asarray(rows.y), jnp.asarray(rows.weights)
        eta = add_random_part(jnp.asarray(rows.offset) if hoisted else fixed_part(beta, rows), b, rows)
        kernel, score, w = family.derivatives(y, eta, weights, params.phi)
        if not family.canonical:
            w = jnp.where(fisher, safe_weights(eta, w, params, rows, family), w)
        return kernel.sum(), row_sums(score, w, rows, joint)

    def point(s: _State) -> tuple[Blocked, Array | None]:
        (u, beta), (du, dbeta) = s.base, s.step
        moved = tuple(x + s.scale * d for x, d in zip(u, du, strict=True))
        return moved, None if beta is None or dbeta is None else beta + s.scale * dbeta

    def body(s: _State) -> _State:
        # one evaluation and one step; everything appears once in the compiled program
        u, beta = point(s)
        fisher, nearly = s.flags & _FISHER > 0, s.flags & _NEARLY > 0
        kernel, sums = sum_over_rows(at, design, unspool(u, T), params.beta if beta is None else beta, fisher)
        value = -2.0 * kernel + squared_norm(u)
        if joint:  # else groups on other devices have modes of their own
            value = over_devices(value, design)
        newton = newton_step(sums, u, T, design)

        first = ~jnp.isfinite(s.value)
        falls = first | nearly | (value <= s.value + by_precision(1e-13, 2e-6, dtype) * jnp.abs(s.value))
        accepted = jnp.isfinite(value) & falls
        usable = accepted & newton.ok
        # accepted, but no Newton step from here: try again with safe weights; rejected: half the step
        to_fisher = accepted & ~newton.ok & ~fisher & (not family.canonical)
        # where an exponential rules, Newton steps by 1 however far the mode is: twice as far while that lasts
        far = accepted & ~first & (value > FAR) & (value < 0.6 * s.value)
        scale = jnp.where(accepted, jnp.where(far, 2.0 * s.scale, 1.0), 0.5 * s.scale)
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
            + jnp.where(usable & (relative < by_precision(1e-9, 1e-6, dtype)), _NEARLY, 0)
            + jnp.where(to_fisher, _FISHER, 0)
            + jnp.where(converged | failed, _DONE, 0)
        )
        return _State(
            base=choose((u, beta), s.base, accepted),
            step=choose((newton.du, newton.dbeta), s.step, usable),
            value=jnp.where(accepted, value, s.value),
            scale=jnp.where(to_fisher | failed, 0.0, scale),
            flags=flags.astype(jnp.int32),
            iterations=s.iterations + 1,
        )

    def unfinished(s: _State) -> Array:
        return (s.flags < _DONE) & (s.iterations < MAX_ITERATIONS)

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
    u, beta = point(end)
    return Mode(u, params.beta if beta is None else beta, end.flags % _NEARLY, end.iterations)


def curvature_weights(
    observed: Array, eta: Array, weights: Array, params: Parameters, family: Family, hessian: str
) -> Array:
    """(n,) weights W of log det from the observed ones."""
    if hessian == "observed" or family.canonical:
        return observed
    expected = family.expected_information(eta, weights, params.phi)
    assert expected is not None
    return expected


class RowsAtMode(NamedTuple):
    """What Laplace's approximation needs of the rows at the mode."""

    kernel: Array  # () log density without its constant
    outside: Array  # () positive if a row is outside the range of the link
    blocks: Blocks  # Z'WZ with the weights of log det


def _rows_at(
    rows: Design, b: Blocked, params: Parameters, family: Family, hessian: str, fixed: bool
) -> tuple[RowsAtMode, Sums]:
    """What rows add to the approximation, and to a step with the observed weights."""
    y, weights = jnp.asarray(rows.y), jnp.asarray(rows.weights)
    eta = linear_predictor(b, params.beta, rows)
    kernel, score, observed = family.derivatives(y, eta, weights, params.phi)
    sums = row_sums(score, observed, rows, fixed)
    w = curvature_weights(observed, eta, weights, params, family, hessian)
    blocks = sums.blocks if w is observed else weighted_products(rows.z, rows.level, rows.n_levels, w, rows.plan)
    outside = (~family.in_range(y, eta) & (weights > 0.0)).any().astype(kernel.dtype)
    return RowsAtMode(kernel.sum(), outside, blocks), sums


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def at_conditional_mode(
    params: Parameters, design: Design, u0: Blocked, family: Family, hessian: str, joint: bool
) -> tuple[Mode, RowsAtMode]:
    """`find_mode` and the rows there, with derivatives in `params` and in every float array of `design`, to any order.

    The implicit function theorem: d(u, beta) = H_obs^-1 d(gradient of the penalised log density). The gradient moves
    with theta and beta through eta alone, so that sums formed anyway give its derivative:
    d(Lambda'Z's - u) = dLambda'Z's - Lambda'(Z'WZ dLambda u + Z'WX dbeta).
    """
    mode = find_mode(params, design, family, u0, joint)
    at = params._replace(beta=mode.beta)

    def rows_at(rows: Design, b: Blocked, at: Parameters) -> RowsAtMode:
        return _rows_at(rows, b, at, family, hessian, False)[0]

    return mode, sum_over_rows(rows_at, design, unspool(mode.u, factors(params.theta, design)), at)


def _implicit_rule(
    family: Family, hessian: str, joint: bool, primals: Any, tangents: Any
) -> tuple[tuple[Mode, RowsAtMode], tuple[Mode, RowsAtMode]]:
    params, design, u0 = primals
    plan = design.plan
    mode, _ = at_conditional_mode(params, design, u0, family, hessian, joint)

    leaves, tree = jax.tree.flatten((params._replace(beta=mode.beta), design))
    d_leaves = jax.tree.leaves(tangents[:2], is_leaf=is_symbolic_zero)
    if joint:  # the given beta is only where the iteration starts
        d_leaves[1] = None
    active = [i for i, d in enumerate(d_leaves) if d is not None and not is_symbolic_zero(d)]
    others = [i for i in active if i > 1]  # beside theta and beta
    moving_beta = joint or 1 in active

    def filled(values: list[Array]) -> tuple[Parameters, Design]:
        out = list(leaves)
        for i, value in zip(others, values, strict=True):
            out[i] = value
        made: tuple[Parameters, Design] = jax.tree.unflatten(tree, out)
        return made

    def rows_at(rows: Design, b: Blocked, at: Parameters) -> tuple[RowsAtMode, Sums]:
        return _rows_at(rows, b, at, family, hessian, moving_beta)

    T = factors(params.theta, design)
    dT = jax.tree.map(jnp.zeros_like, T)
    if 0 in active:
        dT = jax.jvp(lambda theta: factors(theta, design), (params.theta,), (d_leaves[0],))[1]
    b, db = unspool(mode.u, T), unspool(mode.u, dT)
    at, _ = filled([leaves[i] for i in others])
    here, sums = sum_over_rows(rows_at, design, b, at)
    fixed = sums.fixed

    # how the scores move while u stays
    moved = tuple(-x[..., 0] for x in products_times(sums.blocks, tuple(x[..., None] for x in db), plan))
    dg_beta = jnp.zeros_like(mode.beta)
    if fixed is not None and joint:
        dg_beta = -sum((x[..., None] * a).sum((0, 1)) for x, a in zip(db, fixed.ZWX, strict=True))
    if fixed is not None and not joint:
        moved = tuple(x - a @ d_leaves[1] for x, a in zip(moved, fixed.ZWX, strict=True))
    values, d_values = [leaves[i] for i in others], [d_leaves[i] for i in others]
    if others:

        def scores(values: list[Array]) -> tuple[Blocked, Array | None]:
            def scores_at(rows: Design, at: Parameters) -> tuple[Blocked, Array | None]:
                eta = linear_predictor(b, at.beta, rows)
                _, score, _ = family.derivatives(jnp.asarray(rows.y), eta, jnp.asarray(rows.weights), at.phi)
                return products_with_z(score, rows), jnp.asarray(rows.X).T @ score if joint else None

            at, rows = filled(values)
            return sum_over_rows(scores_at, rows, at)

        _, (more, more_beta) = jax.jvp(scores, (values,), (d_values,))
        moved = tuple(x + y for x, y in zip(moved, more, strict=True))
        dg_beta = dg_beta + more_beta if joint else dg_beta
    dg = tuple(
        small_matmul(s[:, None, :], d[None])[:, 0] + small_matmul(x[:, None, :], t[None])[:, 0]
        for s, d, x, t in zip(sums.score, dT, moved, T, strict=True)
    )

    factor = factorise(sums.blocks, T, plan)
    rhs = tuple(x[..., None] for x in dg)
    if joint and fixed is not None:
        # what is linear in the tangents is solved apart, so that JAX can transpose it
        B = border(fixed.ZWX, T)
        HB, Hg = solve(factor, B, plan), solve(factor, rhs, plan)
        information = fixed.XWX
        for a, s, x in zip(B, HB, dg, strict=True):
            information = information - outer_sum(a, s).sum(0)
            dg_beta = dg_beta - (s * x[..., None]).sum((0, 1))
        information, dg_beta = over_devices((information, dg_beta), design)
        dbeta = jax.scipy.linalg.solve(information, dg_beta, assume_a="pos") if design.p else dg_beta
        du = tuple(a[..., 0] - (s * dbeta).sum(-1) for a, s in zip(Hg, HB, strict=True))
    else:
        du = tuple(x[..., 0] for x in solve(factor, rhs, plan))
        dbeta = d_leaves[1] if moving_beta else jnp.zeros_like(mode.beta)

    def approximation(b: Blocked, beta: Array, values: list[Array]) -> RowsAtMode:
        def only(rows: Design, b: Blocked, at: Parameters) -> RowsAtMode:
            return _rows_at(rows, b, at, family, hessian, False)[0]

        at, rows = filled(values)
        return sum_over_rows(only, rows, b, at._replace(beta=beta))

    db = tuple(x + y for x, y in zip(db, unspool(du, T), strict=True))
    _, d_here = jax.jvp(approximation, (b, mode.beta, values), (db, dbeta, d_values))
    zero_int = (np.zeros((), jax.dtypes.float0),) * 2
    return (mode, here), (Mode(du, dbeta, *zero_int), d_here)


at_conditional_mode.defjvp(_implicit_rule, symbolic_zeros=True)


def conditional_mode(params: Parameters, design: Design, u0: Blocked, family: Family, joint: bool) -> Mode:
    """The mode of `at_conditional_mode`."""
    return at_conditional_mode(params, design, u0, family, "observed", joint)[0]


def is_symbolic_zero(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.SymbolicZero)


@checked(traceable=True)
@own_settings
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
    family = get_family(family).at_present()
    params = parameters(theta, beta, family, phi, design)
    if u0 is not None:
        vector(u0, "u0", design.q)
    start = zero_u(design, params.beta.dtype) if u0 is None else u_to_blocks(jnp.asarray(u0), design)
    mode, rows = at_conditional_mode(params, design, start, family, "observed", False)
    T = factors(params.theta, design)
    factor = factorise(rows.blocks, T, design.plan)
    return PIRLS(u_from_blocks(mode.u, design), factor, mode.status, mode.iterations)


def zero_u(design: Design, dtype: Any) -> Blocked:
    """u = 0 per block (m, k)."""
    return tuple(jnp.zeros((m, z.shape[1]), dtype) for m, z in zip(design.n_levels, design.z, strict=True))


def parameters(theta: Any, beta: Any, family: Family, phi: Any = None, design: Design | None = None) -> Parameters:
    """Check and pack the parameters of the pure functions."""
    if design is not None:
        vector(theta, "theta", design.n_theta)
        vector(beta, "beta", design.p)
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
