"""The generalised linear mixed model as a problem to minimise: scaling, starting values and compiled programs.

The programs are compiled once per (family, structure, shape) and are shared by first fits and refits.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..algebra.linalg import factorise, one_inverse, sandwich, spd_inverse
from ..compiling import programs
from ..compiling.memory import blocks, empty, triangle
from ..compiling.precision import QUICK_OPTIONS, compile_with
from ..families import Family
from ..model.basis import scale_z
from ..model.buckets import bucket_of
from ..model.design import Design, factors, fixed_part, linear_predictor, off_ridge, over_devices
from ..model.parameters import Layout, Parameters, Scaling
from ..model.rows import sum_over_rows
from ..objective.laplace import log_density_constant
from ..objective.pirls import (
    CONVERGED,
    Blocked,
    Sums,
    find_mode,
    reduce_fixed,
    row_sums,
    safe_weights,
    score_u,
    unspool,
    zero_u,
)
from ..objective.quadrature import marginal
from . import optimise as opt
from .problem import PATH_LENGTH, Estimates, Problem, Start, unpacked
from .separation import Separation, find, settled, stand_in, unsettled

#: Rows (of a bucket), times quadrature nodes, up to which a fit with one factor is compiled with `QUICK_OPTIONS`.
QUICK_ROWS = 2_048


def layout_of(design: Design, family: Family, nAGQ: int = 1) -> Layout:
    """(theta, beta, log phi), without beta for nAGQ = 0."""
    return Layout(design.terms, design.p, len(family.phi_names), has_beta=nAGQ > 0)


def scale_design(design: Design, layout: Layout) -> tuple[Design, Scaling]:
    """The design in internal units."""
    X = np.asarray(design.X)
    n, p = X.shape
    A, Xs = np.zeros((p, p)), empty((n, p))
    if p:
        A = triangle(n, lambda rows: X[rows]) / np.sqrt(n)
        for rows in blocks(n):
            Xs[rows] = np.linalg.solve(A.T, X[rows].T).T
    scaled, basis = scale_z(design)
    return replace(scaled, X=Xs), Scaling(layout, A, basis)


def impossible(deviance: Any, n: int) -> Any:
    """Whether no discrete distribution of n rows has this deviance: its log-likelihood is above 0."""
    return deviance < -1e-8 * (1.0 + n)


def tighter(limits: opt.Limits) -> opt.Limits:
    """Limits with the tolerance that the search works to.

    At 1e-10 estimates can be 1e-5 standard errors off; three more digits cost one evaluation.
    """
    return limits._replace(tol=1e-3 * limits.tol)


class Carry(NamedTuple):
    """Modes of the last accepted evaluation, where the next one starts."""

    u: Blocked
    beta: Any
    status: Any


@partial(jax.jit, static_argnames=("family", "nAGQ"))
def starting_values(
    theta: Array, phi: Array, fixed: Array, design: Design, family: Family, nAGQ: int
) -> tuple[Array, Array, Carry, Array]:
    """Point, inverse metric, carry and data constant to start from, for a design in internal units (Xs'Xs = n I).

    PIRLS in (u, beta) at theta, from the link of R's mustart regressed on X or from a constant mean where that is
    better; then, unless theta is `fixed`, one EM step for each term's covariance, kept off the boundary. The metric
    has beta's information in that fit, and for theta a rule of thumb from numbers of levels.
    """

    layout = layout_of(design, family, nAGQ)

    def means(rows: Design) -> tuple[Array, Array]:
        y, weights = jnp.asarray(rows.y), jnp.asarray(rows.weights)
        return (weights * family.mustart(y, weights)).sum(), weights.sum()

    def regressions(rows: Design, level: Array) -> tuple[Array, Array, Array]:
        y, weights, X = jnp.asarray(rows.y), jnp.asarray(rows.weights), jnp.asarray(rows.X)
        mustart = family.mustart(y, weights)

        def onto_X(mean: Array) -> Array:
            target = family.link.eta_of(mean) - jnp.asarray(rows.offset)
            return X.T @ jnp.where(jnp.isfinite(target) & (weights > 0.0), target, 0.0)

        return onto_X(mustart), onto_X(jnp.full_like(mustart, level)), (weights > 0.0).sum()

    def kernels_of(rows: Design, candidates: tuple[Array, Array]) -> tuple[Array, ...]:
        y, weights = jnp.asarray(rows.y), jnp.asarray(rows.weights)
        return tuple(family.kernel(y, fixed_part(beta, rows), weights, phi).sum() for beta in candidates)

    def total(part: Any, *args: Any) -> Any:
        return over_devices(sum_over_rows(part, design, *args), design)

    mean, weight = total(means)
    own, constant, n = total(regressions, mean / weight)
    own, constant = own / n, constant / n
    kernels = total(kernels_of, (own, constant))
    first, second = (jnp.where(jnp.isfinite(k), k, -jnp.inf) for k in kernels)
    beta0 = jnp.where(first >= second, own, constant)
    params = Parameters(theta, beta0, phi)
    mode = find_mode(params, design, family, zero_u(design, theta.dtype), joint=True, tolerance=1e-6)
    good = mode.status == CONVERGED
    T = factors(theta, design)
    b = unspool(mode.u, T)

    def sums_of(rows: Design, b: Blocked, beta: Array) -> Sums:
        eta = linear_predictor(b, beta, rows)
        _, score, w = family.derivatives(jnp.asarray(rows.y), eta, jnp.asarray(rows.weights), phi)
        w = w if family.canonical else safe_weights(eta, w, params, rows, family)
        return row_sums(score, w, rows, layout.has_beta and design.p > 0)

    sums = sum_over_rows(sums_of, design, b, mode.beta)
    thetas, curvatures = [], []
    for term in design.terms:
        columns, start = term.columns, theta[term.theta]
        t, information = T[term.block][columns, columns], sums.blocks.diagonal[term.block][:, columns, columns]
        eye = jnp.eye(t.shape[0], dtype=t.dtype)
        D, _ = spd_inverse(sandwich(t, information, t) + eye)
        effects, there = b[term.block][:, columns], (information != 0.0).any((1, 2)).astype(t.dtype)  # levels with rows
        D, products, m = over_devices((there @ D.reshape(-1, eye.size), effects.T @ effects, there.sum()), design)
        m = jnp.maximum(m, 1.0)
        D = D.reshape(eye.shape) / m
        reliability = 1.0 - jnp.diagonal(D)  # of the conditional modes
        cov = products / m + t @ D @ t.T
        size = jnp.trace(cov) / t.shape[0]
        near = term.structure.theta_near(cov + (1e-3 * size + 1e-4) * eye)
        at = jnp.where(~fixed & good & jnp.isfinite(near).all(), near, start)
        thetas.append(at)
        reliable = jnp.clip(jnp.nan_to_num(reliability, nan=1.0), 0.05, 1.0)
        rough = jnp.where(fixed, term.structure.start(), at)  # columns of a given theta may be near 0
        curvatures.append(term.structure.curvature(rough, m, reliable))
    parts = [jnp.diag(1.0 / jnp.concatenate(curvatures))]
    if sums.fixed is not None:
        factor = factorise(sums.blocks, T, design.plan)
        information, _, _ = reduce_fixed(sums.fixed, score_u(sums.score, mode.u, T), factor, T, design)
        information = 2.0 * jnp.where(jnp.isfinite(information), information, 0.0)
        least = jnp.maximum(1e-8 * jnp.trace(information), 1e-8)
        metric, _ = one_inverse(information + least * jnp.eye(design.p, dtype=information.dtype))
        rough = jnp.diag(1.0 / jnp.maximum(jnp.diagonal(information), least))
        parts.append(jnp.where(jnp.isfinite(metric).all(), metric, rough))
    parts.append(jnp.eye(phi.shape[0], dtype=theta.dtype) / n)
    u = jax.tree.map(lambda a: jnp.where(good, a, 0.0), mode.u)
    carry = Carry(u, mode.beta, jnp.zeros((), jnp.int32))
    inverse = jax.scipy.linalg.block_diag(*[part for part in parts if part.shape[0]])
    x = layout.pack(jnp.concatenate(thetas), mode.beta, jnp.log(phi))
    return x, inverse, carry, log_density_constant(design, family)


def deviance_at(
    x: Array, carry: Carry, design: Design, family: Family, hessian: str, nAGQ: int
) -> tuple[Array, tuple[Carry, Array]]:
    """Deviance without its constant at x, in the layout of `layout_of`."""
    params = layout_of(design, family, nAGQ).parameters(x, carry.beta)
    deviance, at = marginal(params, design, family, carry.u, hessian, nAGQ)
    return deviance, (Carry(at.u, at.beta, at.status), at.iterations)


def make_objective(design: Design, family: Family, hessian: str, nAGQ: int, constant: Array) -> opt.Objective:
    """(x, carry) -> (deviance, gradient, carry, PIRLS iterations, None)."""
    gradient = jax.value_and_grad(deviance_at, has_aux=True)

    def objective(x: Array, carry: Carry) -> tuple[Array, Array, Carry, Array, None]:
        (f, (carry, inner)), g = gradient(x, carry, design, family, hessian, nAGQ)
        if design.axis is not None:
            f, g = over_devices((f, g), design)
            status, inner = jax.lax.pmax((carry.status, inner), design.axis)
            carry = carry._replace(status=status)
        return f + constant, g, carry, inner, None

    return objective


@partial(jax.jit, static_argnames=("family", "hessian", "nAGQ", "path_length"))
def run(
    x0: Array,
    inverse0: Array,
    carry0: Carry,
    limits: opt.Limits,
    constant: Array,
    design: Design,
    family: Family,
    hessian: str,
    nAGQ: int,
    path_length: int,
) -> Array:
    """The whole fit as one program (BFGS, then the Hessian)."""
    objective = make_objective(design, family, hessian, nAGQ, constant)
    return opt.pack(opt.found(opt.minimise(objective, x0, inverse0, carry0, limits, path_length)))


@partial(jax.jit, static_argnames=("family", "hessian", "nAGQ"))
def step(
    state: opt.State,
    inverse0: Array,
    limits: opt.Limits,
    constant: Array,
    design: Design,
    family: Family,
    hessian: str,
    nAGQ: int,
) -> opt.State:
    """One evaluation of the same loop, for a host driver that reports progress."""
    return opt.advance(make_objective(design, family, hessian, nAGQ, constant), state, inverse0, limits)


def one_fit_options(design: Design, nAGQ: int = 1, threads: int = 1) -> dict[str, Any] | None:
    """Compiler options for a program of a single fit, compiled by so many threads."""
    quick = {**QUICK_OPTIONS, "xla_cpu_parallel_codegen_split_count": threads}
    nodes = max(nAGQ, 1) ** design.z[0].shape[1]  # each is a pass over the rows
    return quick if len(design.z) == 1 and design.n * nodes <= QUICK_ROWS else None


def start_options(design: Design) -> dict[str, Any] | None:
    """Compiler options for `starting_values`, which run once a fit: quick ones for several factors, too."""
    products = sum(np.size(leaf) for leaf in jax.tree.leaves(design.plan))
    return QUICK_OPTIONS if design.n <= QUICK_ROWS and products <= 4 * QUICK_ROWS else None


class GeneralisedProblem(Problem):
    """A GLMM: theta, beta and log phi outside (without beta for nAGQ = 0), PIRLS inside."""

    def __init__(self, design: Design, family: Family, nAGQ: int, hessian: str, exact: bool = False) -> None:
        self.design, self.scaling = scale_design(design, layout_of(design, family, nAGQ))
        if jax.default_backend() != "cpu":  # there once; on a CPU every program takes NumPy arrays as they are
            self.design = jax.device_put(self.design)
        self._bucket = bucket_of(self.design)
        self._padded = self._bucket.pad(self.design)  # what programs take, and carries have the shape of
        self.original, self.family, self.hessian, self.nAGQ = design, family, hessian, nAGQ
        self.exact = exact
        self._held = programs.Held()

    @property
    def _static(self) -> tuple[Family, str, int]:
        return self.family, self.hessian, self.nAGQ

    @property
    def _programs(self) -> tuple[Any, Any]:
        """Compiled for these shapes: `starting_values` of (theta, phi, fixed, design), and `run` without statics."""
        settings = {"family": self.family, "nAGQ": self.nAGQ}
        more = {"hessian": self.hessian, "path_length": PATH_LENGTH}
        model = ("GLMM", self.family, self.hessian, self.nAGQ, PATH_LENGTH)
        found = self._held.of_one_fit(model, self._padded, partial(self._compile, settings, more))
        if found is None:
            return partial(starting_values, **settings), partial(run, **settings, **more)
        return found[0], found[1]

    def _compile(self, settings: dict[str, Any], more: dict[str, Any]) -> list[Any]:
        """Both at the same time: the second is traced with the shapes that the first will return."""
        with ThreadPoolExecutor(2) as pool:
            lowered = programs.lower(starting_values, (*self._start_from({}), self._padded), settings)
            first = pool.submit(compile_with, lowered, start_options(self._padded))
            x, inverse, carry, constant = lowered.out_info
            limits = opt.as_arrays(opt.Limits(0.0, 0, True))
            arguments = x, inverse, carry, limits, constant, self._padded
            second = programs.lower(run, arguments, {**settings, **more})
            if self.while_compiling is not None:
                pool.submit(self.while_compiling)
            compiled = compile_with(second, one_fit_options(self._padded, self.nAGQ))
            return [first.result(), compiled]

    def with_rows(self, name: str, values: np.ndarray) -> Self:
        other = copy(self)
        new: dict[str, Any] = {name: np.asarray(values, self.original.y.dtype)}
        other.original = replace(self.original, **new)
        other.design = replace(self.design, **new)
        other._padded = replace(self._padded, **self._bucket.pad_arrays(new))
        return other

    def objection(self, found: opt.Found) -> int | None:
        return opt.IMPOSSIBLE if self.family.discrete and impossible(found.f, self.original.n) else None

    def _start_from(self, start: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """theta and phi of the joint fit, at identity factors or the user's (data units); whether theta is given."""
        theta = start.get("theta")
        phi = self.family.finite_start(start.get("phi", self.family.phi_start()))
        if theta is None:
            return self.original.theta_start, phi, np.asarray(False)
        return off_ridge(self.scaling.basis.inner(theta), self.original.terms), phi, np.asarray(True)

    def _begin(self, start: dict[str, np.ndarray]) -> Start:
        return Start(*self._programs[0](*self._start_from(start), self._padded))

    def start(self, start: dict[str, np.ndarray]) -> Start:
        beta, begin = start.get("beta"), self._begin(start)
        if beta is None:
            return begin
        own = self.scaling.A @ beta
        x = np.array(begin.x)
        if self.layout.has_beta:
            x[self.layout.at.beta] = own
        return begin._replace(x=x, carry=begin.carry._replace(beta=own))

    def minimise(self, begin: Start, limits: opt.Limits, metric: str) -> opt.Found:
        x, inverse, carry, constant = begin
        limits = opt.as_arrays(tighter(limits))
        return unpacked(self._programs[1](x, inverse, carry, limits, constant, self._padded), begin)

    def carry_at(self, u: Blocked, beta: np.ndarray) -> Carry:
        """What an evaluation near modes u, per block (m, k), and beta (p,) of Xs starts from."""
        return Carry(self._bucket.pad_levels(u), beta, np.zeros((), np.int32))

    def separation(self, begin: Start) -> Separation | None:
        design = self.original
        ends = self.family.ends(np.asarray(design.y))
        if ends is None:
            return None
        there = np.asarray(design.weights) > 0.0
        return find(np.asarray(self.design.X), ends, there, self.scaling.A, lambda: np.asarray(begin.carry.beta))

    def settled(self, separation: Separation) -> Self:
        other = copy(self)
        other.original = settled(self.original, separation, self.family, self.scaling.A)
        other.design = settled(self.design, separation, self.family)
        if jax.default_backend() != "cpu":
            other.design = jax.device_put(other.design)
        other._padded = self._bucket.pad(other.design)
        return other

    def unsettled(self, estimates: Estimates, separation: Separation) -> Estimates:
        extra = stand_in(self.family, estimates.phi, separation)
        return unsettled(estimates, separation, self.original, self.family, self.layout, extra)

    def advance(self, state: opt.State, begin: Start, limits: opt.Limits, metric: str) -> opt.State:
        return step(state, begin.inverse, tighter(limits), begin.constant, self._padded, *self._static)

    def evaluate(self, x: Array, carry: Any, constant: Any) -> tuple[Array, Array, Any, Array]:
        return _evaluate(x, carry, constant, self._padded, *self._static)

    def deviance(self, x: Array, carry: Any, constant: Any) -> Array:
        return deviance_at(x, carry, self._padded, *self._static)[0] + constant

    def exact_hessian(self, x: Array, carry: Any, constant: Any) -> Array:
        return _hessian(x, carry, constant, self._padded, *self._static)


@partial(jax.jit, static_argnames=("family", "hessian", "nAGQ"))
def _evaluate(
    x: Array, carry: Carry, constant: Array, design: Design, family: Family, hessian: str, nAGQ: int
) -> tuple[Array, Array, Carry, Array]:
    f, g, carry, inner, _ = make_objective(design, family, hessian, nAGQ, constant)(x, carry)
    return f, g, carry, inner


@partial(jax.jit, static_argnames=("family", "hessian", "nAGQ"))
def _hessian(x: Array, carry: Carry, constant: Array, design: Design, family: Family, hessian: str, nAGQ: int) -> Array:
    """Hessian of the deviance by automatic differentiation."""
    objective = make_objective(design, family, hessian, nAGQ, constant)
    return jax.jacfwd(lambda v: objective(v, carry)[1])(x)
