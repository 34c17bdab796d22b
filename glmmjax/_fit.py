"""From a design to estimates: scaling, starting values, minimisation, and the form they are reported in.

Works on arrays; knows no formulas and no labels. The programs below are compiled once per (family,
structure, shape) and are shared by first fits and refits.
"""

from __future__ import annotations

from collections.abc import Callable
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
from ._linalg import factorise, solve, weighted_products
from ._objective import laplace, log_density_constant
from ._pirls import (
    CONVERGED,
    Blocked,
    Parameters,
    _border,
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
#: curvature of the deviance in each theta, in levels: the starting metric
THETA_CURVATURE = 2.0


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
    """Joint penalised fit at the starting theta."""

    beta: Array  # (p,)
    u: Blocked
    information: Array  # (p, p) of beta, u eliminated
    constant: Array  # -2 log density constant
    status: Array


@partial(jax.jit, static_argnames=("family",))
def joint_start(theta: Array, phi: Array, beta_candidates: Array, design: Design, family: Family) -> Start:
    """PIRLS in (u, beta) at theta, from the better of the candidate betas (c, p)."""
    u0 = zero_u(design, theta.dtype)
    y, weights = jnp.asarray(design.y), jnp.asarray(design.weights)

    def value(beta: Array) -> Array:
        eta = jnp.asarray(design.offset) + jnp.asarray(design.X) @ beta
        kernel = family.kernel(y, eta, weights, phi).sum()
        return jnp.where(jnp.isfinite(kernel), kernel, -jnp.inf)

    values = jnp.stack([value(b) for b in beta_candidates])
    beta0 = beta_candidates[jnp.argmax(values)]
    mode = find_mode(Parameters(theta, beta0, phi), design, family, u0, joint=True, tolerance=1e-6)
    T = factors(theta, design)
    eta = linear_predictor(unspool(mode.u, T), mode.beta, design)
    _, score, w = family.derivatives(y, eta, weights, phi)
    w = w if family.canonical else safe_weights(eta, w, Parameters(theta, mode.beta, phi), design, family)
    factor = factorise(weighted_products(design.z, design.level, design.n_levels, w, design.plan), T, design.plan)
    B = _border(w, T, design)
    g = score_u(score, mode.u, T, design)
    rhs = tuple(jnp.concatenate([x[..., None], b], axis=2) for x, b in zip(g, B, strict=True))
    information, _ = fixed_information(w, score, B, g, solve(factor, rhs, design.plan), design)
    return Start(mode.beta, mode.u, information, log_density_constant(design, family), mode.status)


class Carry(NamedTuple):
    u: Blocked
    beta: Array
    status: Array


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
) -> opt.State:
    """The whole fit as one program (BFGS, then the Hessian)."""
    objective = make_objective(design, family, hessian, joint, constant)
    return opt.minimise(objective, x0, inverse0, carry0, limits, path_length)


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


def beta_candidates(design: Design, family: Family) -> np.ndarray:
    """Starting values (2, p): the link of R's mustart regressed on X, and a constant mean."""
    y, w = np.asarray(design.y), np.asarray(design.weights)
    mustart = np.asarray(family.mustart(jnp.asarray(y), jnp.asarray(w)))
    rows = np.asarray(family.link.eta_of(jnp.asarray(mustart)))
    level = np.asarray(family.link.eta_of(jnp.asarray(np.average(mustart, weights=w))))
    targets = np.stack([rows, np.broadcast_to(level, rows.shape)], axis=1) - np.asarray(design.offset)[:, None]
    X = np.asarray(design.X)
    solved: np.ndarray = np.linalg.lstsq(X.T @ X, X.T @ np.where(np.isfinite(targets), targets, 0.0))[0]
    return solved.T


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

    `hessian` is that of the deviance over (theta, beta, log phi), or over theta for nAGQ = 0.
    """

    theta: np.ndarray
    beta: np.ndarray
    phi: np.ndarray
    u: tuple[np.ndarray, ...]
    objective: float
    gradient: np.ndarray
    hessian: np.ndarray
    converged: bool
    ridge: tuple[int, ...]
    stats: FitStats


class _Problem:
    """One design in internal units, ready to be minimised from any start."""

    def __init__(self, design: Design, family: Family, nAGQ: int, hessian: str) -> None:
        scaled, self.scaling = scale_design(design, len(family.phi_names))
        self.candidates = beta_candidates(scaled, family)
        self.design: Design = jax.device_put(scaled)
        self.original, self.family, self.hessian, self.joint = design, family, hessian, nAGQ == 0
        self.levels = np.concatenate(
            [np.full(t.structure.n_theta, design.n_levels[t.block]) for t in design.terms]
        )

    def start(self, theta: np.ndarray, phi: np.ndarray) -> Start:
        return joint_start(theta, phi, self.candidates, self.design, self.family)

    def metric(self, start: Start) -> np.ndarray:
        """Inverse of the first guess of the Hessian."""
        blocks = [np.diag(1.0 / (THETA_CURVATURE * self.levels))]
        if not self.joint:
            blocks.append(_safe_inverse(2.0 * np.asarray(start.information)))
        blocks.append(np.eye(self.scaling.n_phi) / max(self.design.n, 1))
        size = sum(b.shape[0] for b in blocks)
        out, at = np.zeros((size, size)), 0
        for b in blocks:
            out[at : at + b.shape[0], at : at + b.shape[0]] = b
            at += b.shape[0]
        return out

    def run(
        self, x0: np.ndarray, inverse0: np.ndarray, carry: Carry, constant: Array, limits: opt.Limits, verbose: Any
    ) -> opt.State:
        args = (self.design, self.family, self.hessian, self.joint)
        length = 64
        if not verbose:
            return run(x0, inverse0, carry, limits, constant, *args, length)
        report = verbose if callable(verbose) else _print_progress
        state = opt.initial_state(jnp.asarray(x0), jnp.asarray(inverse0), carry, length)
        while opt.is_running(state):
            state = step(state, inverse0, limits, constant, *args)
            report(int(state.evaluations), float(state.f), self.external(np.asarray(state.x)))
        return state

    def external(self, x: np.ndarray) -> np.ndarray:
        """Internal parameters -> (theta, beta, log phi), or theta for nAGQ = 0."""
        out: np.ndarray = np.linalg.solve(self.scaling.jacobian(self.joint), x)
        return out

    def internal(self, parameters: np.ndarray) -> np.ndarray:
        return self.scaling.jacobian(self.joint) @ parameters


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
    design: Design,
    family: Family,
    nAGQ: int,
    hessian: str,
    start: dict[str, np.ndarray] | None = None,
    tol: float = 1e-10,
    max_evaluations: int = 500,
    optimizer: Any = "bfgs",
    exact: bool = False,
    verbose: Any = False,
) -> Estimates:
    """Minimise the deviance of a design.

    Args:
        nAGQ: 0 (beta inside PIRLS) or 1 (Laplace).
        start: any of "theta" (n_theta,), "beta" (p,), "phi" (n_phi,).
        verbose: False, True, or a callable (evaluation, deviance, parameters).
    """
    problem = _Problem(design, family, nAGQ, hessian)
    start = start or {}
    theta0 = start.get("theta")
    # user's theta are in the units of the data, the default is the identity in internal units
    theta = design.theta_start if theta0 is None else problem.scaling.c * np.asarray(theta0, float)
    phi = np.asarray(start.get("phi", family.phi_start()), float).reshape(-1)
    begin = problem.start(theta, phi)
    beta = np.asarray(begin.beta)
    if "beta" in start:
        beta = problem.scaling.A @ np.asarray(start["beta"], float)
    log_phi = np.log(phi)
    x0 = np.concatenate([theta, log_phi] if problem.joint else [theta, beta, log_phi])
    inverse0 = problem.metric(begin)
    carry = Carry(begin.u, jnp.asarray(beta), begin.status)
    if int(begin.status) != CONVERGED:
        carry = Carry(zero_u(problem.design, jnp.float64), jnp.asarray(beta), jnp.zeros_like(begin.status))
    limits = opt.Limits(tol, max_evaluations, True)
    extra = 0
    if optimizer != "bfgs":
        from ._other_optimisers import search

        x0, extra = search(problem, optimizer, x0, inverse0, carry, begin.constant, tol, max_evaluations)
        limits = limits._replace(max_evaluations=1)
    state = problem.run(x0, inverse0, carry, begin.constant, limits, verbose)
    restarts = 0
    state, restarts, more = _leave_saddles(problem, state, inverse0, begin.constant, limits, verbose)
    state, further = _settle_singular(problem, state, begin.constant, limits)
    return _report(problem, state, begin, restarts, extra + more + further, exact, limits, optimizer != "bfgs")


def _eigen(state: opt.State) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and vectors of the Hessian in internal units."""
    H = np.asarray(state.hessian)
    if not np.isfinite(H).all():
        return np.full(H.shape[0], np.nan), np.eye(H.shape[0])
    values, vectors = np.linalg.eigh(H)
    return values, vectors


def _leave_saddles(
    problem: _Problem, state: opt.State, inverse0: np.ndarray, constant: Array, limits: opt.Limits, verbose: Any
) -> tuple[opt.State, int, int]:
    """Restart along a direction of negative curvature: a column of T at 0 is always stationary."""
    restarts, extra = 0, 0
    while restarts < 4:
        values, vectors = _eigen(state)
        scale = np.abs(values).max(initial=0.0)
        if not np.isfinite(scale) or values.min(initial=0.0) > -1e-6 * max(scale, 1.0):
            break
        x, direction = np.asarray(state.x), vectors[:, int(np.argmin(values))]
        # the size of a random effect's sd in internal units, not that of the tiny curvature
        trial = x + 0.3 * direction / np.abs(direction).max()
        again = problem.run(trial, inverse0, state.carry, constant, limits, verbose)
        extra += int(state.search_evaluations)
        restarts += 1
        if not float(again.f) < float(state.f) - 1e-9:
            break
        state = again
    return state, restarts, extra


def _settle_singular(
    problem: _Problem, state: opt.State, constant: Array, limits: opt.Limits
) -> tuple[opt.State, int]:
    """Report singular factors in canonical form: columns near 0 at exactly 0, rank-deficient T re-factored."""
    extra = 0
    design = problem.original
    x = np.asarray(state.x)
    t = design.n_theta
    theta = x[:t] / problem.scaling.c
    proposal = theta.copy()
    for term in design.terms:
        part = theta[term.theta]
        T = np.asarray(term.structure.factor(jnp.asarray(part)))
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
    settled = problem.run(x0, np.asarray(state.inverse), state.carry, constant, once, False)
    extra += int(settled.search_evaluations)
    if float(settled.f) <= float(state.f) + ZERO_COST:
        stats = {
            name: getattr(state, name) for name in ("search_evaluations", "path", "status")
        }
        settled = settled._replace(
            evaluations=state.evaluations + settled.evaluations, inner=state.inner + settled.inner, **stats
        )
        return settled, extra
    return state, extra


def _report(
    problem: _Problem,
    state: opt.State,
    begin: Start,
    restarts: int,
    extra: int,
    exact: bool,
    limits: opt.Limits,
    external_search: bool,
) -> Estimates:
    design, joint = problem.original, problem.joint
    J = problem.scaling.jacobian(joint)
    t, p = design.n_theta, design.p
    x, g, H = np.asarray(state.x), np.asarray(state.g), np.asarray(state.hessian)
    if exact:
        H = exact_hessian(problem, state, begin.constant)
    parameters = problem.external(x)
    theta = parameters[:t].copy()
    beta_s = np.asarray(state.carry.beta) if joint else x[t : t + p]
    beta = np.linalg.solve(problem.scaling.A, beta_s) if p else np.zeros(0)
    signs = np.ones(J.shape[0])
    u = [np.array(block) for block in state.carry.u]
    for term in design.terms:
        T = np.asarray(term.structure.factor(jnp.asarray(theta[term.theta])))
        flips = term.structure.flip(T)
        if (flips < 0).any():
            signs[term.theta] = np.where(
                term.structure.theta_of(np.broadcast_to(flips, T.shape)) < 0, -1.0, 1.0
            )
            u[term.block][:, term.columns] *= flips
    theta = theta * signs[:t] + 0.0
    values, vectors = np.linalg.eigh(H) if np.isfinite(H).all() else (np.full(x.size, np.nan), np.eye(x.size))
    scale = np.abs(values).max(initial=1.0)
    flat = values < 1e-9 * scale
    along = vectors.T @ g
    decrement = 0.5 * float(np.sum(np.where(flat, 0.0, along**2 / np.where(flat, 1.0, values))))
    if not np.isfinite(decrement):
        decrement = float(state.decrement)
    minimum = bool(np.isfinite(values).all() and values.min(initial=0.0) > -1e-6 * scale)
    status = int(state.status)
    # BFGS and Newton certify their own tolerance; other searches stop by rules of theirs
    enough = 1e-7 if external_search else 10.0 * float(limits.tol)
    converged = minimum and np.isfinite(float(state.f)) and decrement < enough
    if external_search and converged:
        status = opt.CONVERGED
    elif converged and status in (opt.LINE_SEARCH, opt.EVALUATION_LIMIT):
        status = opt.CONVERGED
    elif not minimum and status == opt.CONVERGED:
        status, converged = opt.NOT_MINIMUM, False
    converged = converged and status == opt.CONVERGED
    outer = J.T @ H @ J
    outer = outer * np.outer(signs, signs)
    ridge = tuple(int(i) for i in np.flatnonzero(flat))
    searched = int(state.search_evaluations)
    path = np.asarray(state.path)[:searched]
    if path.size:
        path = np.concatenate([np.linalg.solve(J, path[:, :-2].T).T, path[:, -2:]], axis=1)
    phi = np.exp(x[t:] if joint else x[t + p :])
    stats = FitStats(
        evaluations=searched + extra,
        hessian_evaluations=int(state.evaluations) - searched,
        pirls_iterations=int(state.inner),
        decrement=decrement,
        status=status,
        message=opt.MESSAGES[status],
        restarts=restarts,
        path=path,
    )
    gradient = (J.T @ g) * signs
    return Estimates(
        theta, beta, phi, tuple(u), float(state.f), gradient, outer, converged, ridge, stats
    )


def exact_hessian(problem: _Problem, state: opt.State, constant: Array) -> np.ndarray:
    """Hessian of the deviance in internal units by automatic differentiation."""
    return np.asarray(
        _hessian(state.x, state.carry, constant, problem.design, problem.family, problem.hessian, problem.joint)
    )


@partial(jax.jit, static_argnames=("family", "hessian", "joint"))
def _hessian(
    x: Array, carry: Carry, constant: Array, design: Design, family: Family, hessian: str, joint: bool
) -> Array:
    objective = make_objective(design, family, hessian, joint, constant)
    return jax.jacfwd(lambda v: objective(v, carry)[1])(x)
