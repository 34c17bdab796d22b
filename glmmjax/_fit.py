"""From a design to estimates: scaling, starting values, minimisation, and the form they are reported in.

Works on arrays; knows no formulas and no labels. The programs below are compiled once per (family,
structure, shape) and are shared by first fits and refits.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import _optimise as opt
from ._covariance import Unstructured, semidefinite_cholesky
from ._design import Design, factors, linear_predictor
from ._linalg import factorise, sandwich, solve, spd_inverse, weighted_products
from ._objective import laplace, log_density_constant
from ._pirls import (
    CONVERGED,
    Blocked,
    Parameters,
    border,
    find_mode,
    fixed_information,
    safe_weights,
    score_u,
    unspool,
    zero_u,
)
from .families import Family

#: theta columns below this norm are tried at exactly zero (DESIGN: singular fits)
NEAR_ZERO = 1e-3
ZERO_COST = 1e-8
#: evaluations whose point and deviance are kept
PATH_LENGTH = 64


@dataclass(frozen=True)
class Scaling:
    """Internal units of a design, undone exactly in every result.

    X = Xs A with Xs'Xs = n I (A from the QR factorisation of X), so that beta_s = A beta; the columns
    of z have unit root mean square, so that theta_s = c * theta.
    """

    A: np.ndarray  # (p, p)
    c: np.ndarray  # (n_theta,)
    n_phi: int

    def jacobian(self, joint: bool) -> np.ndarray:
        """d(internal parameters) / d(theta, beta, log phi); theta only if `joint`."""
        if joint:
            return np.diag(self.c)
        size = self.c.size + self.A.shape[0] + self.n_phi
        J = np.eye(size)
        t, p = self.c.size, self.A.shape[0]
        J[:t, :t] = np.diag(self.c)
        J[t : t + p, t : t + p] = self.A
        return J


def scale_design(design: Design, n_phi: int) -> tuple[Design, Scaling]:
    """The design in internal units."""
    X = np.asarray(design.X)
    n, p = X.shape
    if p:
        R = np.linalg.qr(X, mode="r")
        A = R / np.sqrt(n)
        Xs = np.ascontiguousarray(np.linalg.solve(A.T, X.T).T)
    else:
        A, Xs = np.zeros((0, 0)), X
    zs, scales = [], []
    for z in design.z:
        rms = np.sqrt(np.mean(np.square(z), axis=0))
        rms = np.where(rms > 0.0, rms, 1.0)
        zs.append(np.asarray(z) if np.all(rms == 1.0) else z / rms)
        scales.append(rms)
    c = np.concatenate([t.structure.scale(scales[t.block][t.columns]) for t in design.terms])
    return replace(design, X=Xs, z=tuple(zs)), Scaling(A, c, n_phi)


class Start(NamedTuple):
    """Joint penalised fit at the starting theta, and what it says about theta."""

    beta: Array  # (p,)
    u: Blocked
    information: Array  # (p, p) of beta, u eliminated
    covariances: tuple[Array, ...]  # per term, one EM step for the covariance (k, k)
    reliabilities: tuple[Array, ...]  # per term, of the conditional modes (k,)
    constant: Array  # -2 log density constant
    status: Array


@partial(jax.jit, static_argnames=("family",))
def joint_start(theta: Array, phi: Array, design: Design, family: Family) -> Start:
    """PIRLS in (u, beta) at theta, for a design in internal units (Xs'Xs = n I).

    It starts from the link of R's mustart regressed on X, or from a constant mean where that is better.
    """
    u0 = zero_u(design, theta.dtype)
    y, weights, X = jnp.asarray(design.y), jnp.asarray(design.weights), jnp.asarray(design.X)
    offset = jnp.asarray(design.offset)
    mustart = family.mustart(y, weights)
    level = (weights * mustart).sum() / weights.sum()

    def candidate(mean: Array) -> Array:
        target = family.link.eta_of(mean) - offset
        return X.T @ jnp.where(jnp.isfinite(target), target, 0.0) / design.n

    def value(beta: Array) -> Array:
        kernel = family.kernel(y, offset + X @ beta, weights, phi).sum()
        return jnp.where(jnp.isfinite(kernel), kernel, -jnp.inf)

    rows, constant = candidate(mustart), candidate(jnp.full_like(mustart, level))
    beta0 = jnp.where(value(rows) >= value(constant), rows, constant)
    params = Parameters(theta, beta0, phi)
    mode = find_mode(params, design, family, u0, joint=True, tolerance=1e-6)
    T = factors(theta, design)
    b = unspool(mode.u, T)
    eta = linear_predictor(b, mode.beta, design)
    _, score, w = family.derivatives(y, eta, weights, phi)
    w = w if family.canonical else safe_weights(eta, w, params, design, family)
    blocks = weighted_products(design.z, design.level, design.n_levels, w, design.plan)
    factor = factorise(blocks, T, design.plan)
    B = border(w, T, design)
    g = score_u(score, mode.u, T, design)
    rhs = tuple(jnp.concatenate([x[..., None], b], axis=2) for x, b in zip(g, B, strict=True))
    information, _ = fixed_information(w, score, B, g, solve(factor, rhs, design.plan), design)
    covariances, reliabilities = [], []
    for term in design.terms:
        columns = term.columns
        t = T[term.block][columns, columns]
        D, _ = spd_inverse(sandwich(t, blocks.diagonal[term.block][:, columns, columns], t) + jnp.eye(t.shape[0]))
        effects = b[term.block][:, columns]
        m = design.n_levels[term.block]
        covariances.append(effects.T @ effects / m + t @ D.mean(0) @ t.T)
        reliabilities.append(1.0 - jnp.diagonal(D.mean(0)))
    return Start(
        mode.beta,
        mode.u,
        information,
        tuple(covariances),
        tuple(reliabilities),
        log_density_constant(design, family),
        mode.status,
    )


class Carry(NamedTuple):
    """Modes of the last accepted evaluation, where the next one starts."""

    u: Blocked
    beta: Any
    status: Any


def deviance_at(
    x: Array, carry: Carry, design: Design, family: Family, hessian: str, joint: bool
) -> tuple[Array, tuple[Carry, Array]]:
    """Deviance without its constant at x = (theta, beta, log phi), or (theta, log phi) if `joint`."""
    t, p = design.n_theta, design.p
    beta = carry.beta if joint else x[t : t + p]
    phi = jnp.exp(x[t:] if joint else x[t + p :])
    deviance, at = laplace(Parameters(x[:t], beta, phi), design, family, carry.u, hessian, joint)
    return deviance, (Carry(at.u, at.beta, at.status), at.iterations)


def make_objective(
    design: Design, family: Family, hessian: str, joint: bool, constant: Array
) -> Callable[[Array, Carry], tuple[Array, Array, Carry, Array]]:
    """(x, carry) -> (deviance, gradient, carry, PIRLS iterations)."""
    gradient = jax.value_and_grad(deviance_at, has_aux=True)

    def objective(x: Array, carry: Carry) -> tuple[Array, Array, Carry, Array]:
        (f, (carry, inner)), g = gradient(x, carry, design, family, hessian, joint)
        return f + constant, g, carry, inner

    return objective


@partial(jax.jit, static_argnames=("family", "hessian", "joint", "path_length"))
def run(
    x0: Array,
    inverse0: Array,
    carry0: Carry,
    limits: opt.Limits,
    constant: Array,
    design: Design,
    family: Family,
    hessian: str,
    joint: bool,
    path_length: int,
) -> opt.Found:
    """The whole fit as one program (BFGS, then the Hessian)."""
    objective = make_objective(design, family, hessian, joint, constant)
    return opt.found(opt.minimise(objective, x0, inverse0, carry0, limits, path_length))


@partial(jax.jit, static_argnames=("family", "hessian", "joint"))
def step(
    state: opt.State,
    inverse0: Array,
    limits: opt.Limits,
    constant: Array,
    design: Design,
    family: Family,
    hessian: str,
    joint: bool,
) -> opt.State:
    """One evaluation of the same loop, for a host driver that reports progress."""
    return opt.advance(make_objective(design, family, hessian, joint, constant), state, inverse0, limits)


@dataclass(frozen=True)
class FitStats:
    """How a fit went.

    Attributes:
        evaluations: of deviance and gradient together, in the search.
        hessian_evaluations: further ones spent on the Hessian.
        pirls_iterations: in all evaluations.
        decrement: (1/2) g'H^-1 g at the estimates, deviance units.
        status: code; `message` is what it means.
        restarts: from points that were not minima.
        path: (evaluations, P + 2) array: theta, beta, log phi evaluated, deviance, decrement.
    """

    evaluations: int
    hessian_evaluations: int
    pirls_iterations: int
    decrement: float
    status: int
    message: str
    restarts: int
    path: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Estimates:
    """Estimates of a design, NumPy throughout.

    `hessian` is that of the deviance over (theta, beta, log phi), or over theta for nAGQ = 0; `covariance` is
    twice its inverse without the directions undetermined by the data, and `ridge` has the positions of the
    parameters that these move. Both are judged in internal units.
    """

    theta: np.ndarray
    beta: np.ndarray
    phi: np.ndarray
    u: tuple[np.ndarray, ...]
    objective: float
    gradient: np.ndarray
    hessian: np.ndarray
    covariance: np.ndarray
    converged: bool
    ridge: tuple[int, ...]
    stats: FitStats


class Problem:
    """One design in internal units on the device, ready to be minimised from any start."""

    def __init__(self, design: Design, family: Family, nAGQ: int, hessian: str, exact: bool = False) -> None:
        scaled, self.scaling = scale_design(design, len(family.phi_names))
        self.design: Design = jax.device_put(scaled)
        self.original, self.family, self.hessian, self.joint = design, family, hessian, nAGQ == 0
        self.exact = exact

    def with_response(self, y: np.ndarray) -> Problem:
        """The same design with another response; nothing else is copied or scaled again."""
        other = copy(self)
        other.original = replace(self.original, y=y)
        other.design = replace(self.design, y=jax.device_put(y))
        return other

    def start(
        self, theta: np.ndarray | None, beta: np.ndarray | None, phi: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, Carry, Array]:
        """Point, inverse metric, carry and constant to start from, in internal units."""
        design, p = self.original, self.original.p
        # the joint fit is at identity factors, or at the user's theta (units of the data)
        theta0 = design.theta_start if theta is None else self.scaling.c * theta
        begin = joint_start(theta0, phi, self.design, self.family)
        host = jax.device_get(begin._replace(u=()))
        good = int(host.status) == CONVERGED
        blocks, parts = [], []
        u = begin.u
        for term, cov, r in zip(design.terms, host.covariances, host.reliabilities, strict=True):
            part = theta0[term.theta]
            size = float(np.trace(cov)) / cov.shape[0]
            reliable = np.clip(np.nan_to_num(r, nan=1.0), 0.05, 1.0)
            if theta is None and good and np.isfinite(size):
                # one EM step from the identity; kept off the boundary
                part = term.structure.theta_near(cov + (1e-3 * size + 1e-4) * np.eye(cov.shape[0]))
            at = part if theta is None else term.structure.start()
            curvature = term.structure.curvature(at, design.n_levels[term.block], reliable)
            parts.append(part)
            blocks.append(np.diag(1.0 / curvature))
        beta_s = host.beta if beta is None else self.scaling.A @ beta
        x = [*parts, np.log(phi)] if self.joint else [*parts, beta_s, np.log(phi)]
        if not self.joint and p:
            blocks.append(_safe_inverse(2.0 * host.information))
        blocks += [np.eye(1) / design.n] * phi.size
        if not good:
            u = zero_u(self.design, jnp.float64)
        carry = Carry(u, beta_s, np.zeros((), np.int32))
        return np.concatenate(x), block_diagonal(blocks), carry, begin.constant

    def run(
        self,
        x0: np.ndarray,
        inverse0: np.ndarray,
        carry: Carry,
        constant: Array,
        limits: opt.Limits,
        verbose: Any,
    ) -> opt.Found:
        """Search from x0; the result is on the host, its Hessian by differences or exact."""
        limits = limits._replace(hessian=not self.exact)
        out = self._search(x0, inverse0, carry, constant, limits, verbose)
        if not self.exact:
            return out
        for _ in range(3):
            H = _hessian(out.x, out.carry, constant, self.design, self.family, self.hessian, self.joint)
            out = out._replace(hessian=np.asarray(H))
            inverse = _safe_inverse(out.hessian)
            move = -inverse @ out.g
            if -0.5 * out.g @ move <= limits.tol or out.status != opt.CONVERGED:
                break
            # the exact Hessian promises a gain that BFGS's approximation did not see
            before = out.numbers
            out = self._search(out.x + move, inverse, out.carry, constant, limits, verbose)
            out = out._replace(numbers=np.concatenate([out.numbers[:3], out.numbers[3:] + before[3:]]))
        return out

    def _search(
        self, x0: np.ndarray, inverse0: np.ndarray, carry: Carry, constant: Array, limits: opt.Limits, verbose: Any
    ) -> opt.Found:
        args = (self.design, self.family, self.hessian, self.joint)
        if not verbose:
            out: opt.Found = jax.device_get(run(x0, inverse0, carry, limits, constant, *args, PATH_LENGTH))
            return out
        report = verbose if callable(verbose) else _print_progress
        state = opt.initial_state(jnp.asarray(x0), jnp.asarray(inverse0), carry, PATH_LENGTH)
        while opt.is_running(state):
            state = step(state, inverse0, limits, constant, *args)
            report(int(state.evaluations), float(state.f), self.external(np.asarray(state.x)))
        out = jax.device_get(opt.found(state))
        return out

    def external(self, x: np.ndarray) -> np.ndarray:
        """Internal parameters -> (theta, beta, log phi), or theta for nAGQ = 0."""
        out: np.ndarray = np.linalg.solve(self.scaling.jacobian(self.joint), x)
        return out


def block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    """Square blocks along the diagonal of one matrix."""
    size = sum(b.shape[0] for b in blocks)
    out, at = np.zeros((size, size)), 0
    for b in blocks:
        out[at : at + b.shape[0], at : at + b.shape[0]] = b
        at += b.shape[0]
    return out


def _safe_inverse(H: np.ndarray) -> np.ndarray:
    """Inverse of a symmetric matrix with its eigenvalues held away from 0."""
    values, vectors = np.linalg.eigh(0.5 * (H + H.T))
    floor = max(1e-8 * float(values.max(initial=0.0)), 1e-8)
    out: np.ndarray = (vectors / np.maximum(values, floor)) @ vectors.T
    return out


def _print_progress(evaluation: int, deviance: float, parameters: np.ndarray) -> None:
    shown = " ".join(f"{v:.5g}" for v in parameters[:8])
    print(f"{evaluation:4d}  {deviance:.8f}  {shown}{' ...' if parameters.size > 8 else ''}")


def estimate(
    problem: Problem,
    start: dict[str, np.ndarray] | None = None,
    tol: float = 1e-10,
    max_evaluations: int = 500,
    optimizer: Any = "bfgs",
    verbose: Any = False,
) -> Estimates:
    """Minimise the deviance of a design.

    Args:
        start: any of "theta" (n_theta,), "beta" (p,), "phi" (n_phi,).
        verbose: False, True, or a callable (evaluation, deviance, parameters).
    """
    start = start or {}
    phi = np.asarray(start.get("phi", problem.family.phi_start()), float).reshape(-1)
    x0, inverse0, carry, constant = problem.start(start.get("theta"), start.get("beta"), phi)
    limits = opt.Limits(tol, max_evaluations, True)
    extra = 0
    if optimizer != "bfgs":
        from ._other_optimisers import search

        x0, extra = search(problem, optimizer, x0, inverse0, carry, constant, tol, max_evaluations)
        limits = limits._replace(max_evaluations=1)
    state = problem.run(x0, inverse0, carry, constant, limits, verbose)
    state, restarts, more = _leave_saddles(problem, state, inverse0, constant, limits, verbose)
    state, further = _settle_singular(problem, state, constant, limits)
    return _report(problem, state, restarts, extra + more + further, limits, optimizer != "bfgs")


class Curvature(NamedTuple):
    """Eigen-decomposition of the Hessian with each parameter in units of its own curvature.

    In these units 1 is a parameter determined by itself, 0 a direction the data say nothing about.
    """

    values: np.ndarray  # (P,), NaN if the Hessian is not finite
    vectors: np.ndarray  # (P, P)
    units: np.ndarray  # (P,) internal units of each parameter

    @property
    def flat(self) -> np.ndarray:
        """(P,) directions that the data do not determine."""
        return self.values < 1e-8

    @property
    def minimum(self) -> bool:
        """No direction of negative curvature beyond the error of the differences."""
        return bool(np.isfinite(self.values).all() and self.values.min(initial=0.0) > -1e-5)


def curvature(H: np.ndarray) -> Curvature:
    """See `Curvature`."""
    P = H.shape[0]
    if not np.isfinite(H).all():
        return Curvature(np.full(P, np.nan), np.eye(P), np.ones(P))
    # below 1e-3 deviance units per squared unit of theta a curvature is nothing, and may be noise
    diagonal = np.abs(np.diag(H))
    units = 1.0 / np.sqrt(np.maximum(diagonal, max(1e-3, 1e-10 * diagonal.max(initial=0.0))))
    values, vectors = np.linalg.eigh(H * np.outer(units, units))
    return Curvature(values, vectors, units)


def _leave_saddles(
    problem: Problem,
    state: opt.Found,
    inverse0: np.ndarray,
    constant: Array,
    limits: opt.Limits,
    verbose: Any,
) -> tuple[opt.Found, int, int]:
    """Restart along a direction of negative curvature: a column of T at 0 is always stationary."""
    restarts, extra = 0, 0
    while restarts < 4:
        shape = curvature(state.hessian)
        if shape.minimum or not np.isfinite(shape.values).all():
            break
        direction = shape.units * shape.vectors[:, int(np.argmin(shape.values))]
        # as far as a random effect's sd may be, not as the curvature at the saddle says
        trial = state.x + 0.3 * direction / np.abs(direction).max()
        again = problem.run(trial, inverse0, state.carry, constant, limits, verbose)
        extra += state.search_evaluations
        restarts += 1
        if not again.f < state.f - 1e-9:
            break
        state = again
    return state, restarts, extra


def _settle_singular(problem: Problem, state: opt.Found, constant: Array, limits: opt.Limits) -> tuple[opt.Found, int]:
    """Report singular factors in canonical form: columns near 0 at exactly 0, rank-deficient T re-factored."""
    extra = 0
    design = problem.original
    x = np.asarray(state.x)
    t = design.n_theta
    theta = x[:t] / problem.scaling.c
    proposal = theta.copy()
    for term in design.terms:
        part = theta[term.theta]
        T = term.structure.host_factor(part)
        norms = np.linalg.norm(T, axis=0)
        if isinstance(term.structure, Unstructured) and term.structure.k > 1 and np.abs(np.diag(T)).min() < NEAR_ZERO:
            T = semidefinite_cholesky(T @ T.T, tol=NEAR_ZERO**2 * 1e-2)
            norms = np.linalg.norm(T, axis=0)
        T = np.where(norms < NEAR_ZERO, 0.0, T)
        proposal[term.theta] = term.structure.theta_of(T)
    if np.array_equal(proposal, theta):
        return state, extra
    x0 = x.copy()
    x0[:t] = proposal * problem.scaling.c
    once = limits._replace(max_evaluations=1)
    settled = problem.run(x0, state.inverse, state.carry, constant, once, False)
    extra += settled.search_evaluations
    if settled.f <= state.f + ZERO_COST:
        # the search is still the first one; only the point and what was computed there change
        numbers = settled.numbers.copy()
        numbers[2], numbers[4] = state.numbers[2], state.numbers[4]
        numbers[[3, 5]] += state.numbers[[3, 5]]
        settled = settled._replace(numbers=numbers, path=state.path)
        return settled, extra
    return state, extra


def _report(
    problem: Problem,
    state: opt.Found,
    restarts: int,
    extra: int,
    limits: opt.Limits,
    external_search: bool,
) -> Estimates:
    design, joint = problem.original, problem.joint
    J = problem.scaling.jacobian(joint)
    t, p = design.n_theta, design.p
    x, g, H = state.x, state.g, state.hessian
    parameters = problem.external(x)
    theta = parameters[:t].copy()
    beta_s = np.asarray(state.carry.beta) if joint else x[t : t + p]
    beta = np.linalg.solve(problem.scaling.A, beta_s) if p else np.zeros(0)
    signs = np.ones(J.shape[0])
    u = [np.array(block) for block in state.carry.u]
    for term in design.terms:
        T = term.structure.host_factor(theta[term.theta])
        flips = term.structure.flip(T)
        if (flips < 0).any():
            signs[term.theta] = np.where(term.structure.theta_of(np.broadcast_to(flips, T.shape)) < 0, -1.0, 1.0)
            u[term.block][:, term.columns] *= flips
    theta = theta * signs[:t] + 0.0
    shape = curvature(H)
    along = shape.vectors.T @ (shape.units * g)
    decrement = 0.5 * float(np.sum(np.where(shape.flat, 0.0, along**2 / np.where(shape.flat, 1.0, shape.values))))
    if not np.isfinite(decrement):
        decrement = state.decrement
    minimum = shape.minimum
    status = state.status
    # BFGS and Newton certify their own tolerance; other searches stop by rules of theirs
    enough = 1e-7 if external_search else 10.0 * float(limits.tol)
    converged = minimum and np.isfinite(state.f) and decrement < enough
    if external_search and converged:
        status = opt.CONVERGED
    elif converged and status in (opt.LINE_SEARCH, opt.EVALUATION_LIMIT):
        status = opt.CONVERGED
    elif not minimum and status == opt.CONVERGED:
        status, converged = opt.NOT_MINIMUM, False
    converged = converged and status == opt.CONVERGED
    outer = J.T @ H @ J
    outer = outer * np.outer(signs, signs)
    root = signs[:, None] * np.linalg.solve(J, shape.units[:, None] * shape.vectors)
    covariance = 2.0 * (root / np.where(shape.flat, np.inf, shape.values)) @ root.T
    moved = (np.abs(root) > 0.3 * np.linalg.norm(root, axis=1, keepdims=True))[:, shape.flat].any(axis=1)
    ridge = tuple(int(i) for i in np.flatnonzero(moved))
    # a coefficient that runs off has no finite variance; theta's ridges are rotations of a singular T
    at = np.flatnonzero(moved & (np.arange(moved.size) >= t))
    covariance[at, at] = np.inf
    searched = state.search_evaluations
    path = np.asarray(state.path)[:searched]
    if path.size:
        path = np.concatenate([np.linalg.solve(J, path[:, :-2].T).T, path[:, -2:]], axis=1)
    phi = np.exp(x[t:] if joint else x[t + p :])
    stats = FitStats(
        evaluations=searched + extra,
        hessian_evaluations=state.evaluations - searched,
        pirls_iterations=state.inner,
        decrement=decrement,
        status=status,
        message=opt.MESSAGES[status],
        restarts=restarts,
        path=path,
    )
    gradient = (J.T @ g) * signs
    return Estimates(theta, beta, phi, tuple(u), state.f, gradient, outer, covariance, converged, ridge, stats)


@partial(jax.jit, static_argnames=("family", "hessian", "joint"))
def _hessian(
    x: Array, carry: Carry, constant: Array, design: Design, family: Family, hessian: str, joint: bool
) -> Array:
    """Hessian of the deviance by automatic differentiation."""
    objective = make_objective(design, family, hessian, joint, constant)
    return jax.jacfwd(lambda v: objective(v, carry)[1])(x)
