"""The linear mixed model as a problem to minimise: theta outside, penalised least squares on cross-products inside.

The search takes Newton steps with the average information (Gilmour, Thompson & Cullis 1995, Biometrics 51), the mean
of observed and expected information, which costs one more solve where either of them costs a trace per pair of
parameters. It is the Hessian of the criterion but for a term that vanishes at an interior optimum; where a factor is
nearly singular that term dominates, and is added from the gradient. Three to nine evaluations are usual.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..algebra.bordered import Columns, quadratic, selected_inverse
from ..algebra.linalg import (
    Blocks,
    Factor,
    block_diagonal,
    eliminate,
    one_inverse,
    penalised,
    products_times,
    sandwich,
    small_matmul,
    solve,
    spd_inverse,
    take,
)
from ..algebra.symbolic import Plan
from ..compiling import programs
from ..compiling.memory import triangle
from ..compiling.precision import compile_with
from ..families import Gaussian
from ..model.basis import scale_z
from ..model.buckets import bucket_of
from ..model.design import Design, Term, factors, factors_of, linear_predictor, off_ridge
from ..model.parameters import Layout, Scaling
from ..objective.pirls import Blocked, newton_step, row_sums, squared_norm, unspool
from ..objective.pls import (
    CrossProducts,
    Profile,
    criterion,
    cross_products,
    fixed_effects,
    profile,
    reduce_gram,
    scale_border,
)
from . import optimise as opt
from .glmm import one_fit_options
from .problem import PATH_LENGTH, Estimates, Problem, Start, unpacked

#: Columns of T below this say nothing of the curvature there.
LEAST_COLUMN = 1e-6
#: Evaluations that nearly every search needs fewer of.
STALLED = 25
#: Residual sums of squares below this part of that of least squares are computed from the rows, below the second one
#: they are rounding: the response is fitted exactly.
FINE, EXACT = 1e-6, 1e-12
#: Part of the tolerance used: Newton's last step is cheap here, and standard errors are wanted to 1e-6.
TIGHTER = 1e-3


class Carry(NamedTuple):
    """What is reported of the point last accepted."""

    u: Blocked  # per block (m, k)
    beta: Any  # (p,) in units of Xs, beyond the OLS estimate; at the end in those of X
    schur: Any  # (p, p): R_X'R_X of Xs; at the end R_X in the units of X
    r2: Any
    G: tuple[Any, ...]  # per block (k, k): gradient of the criterion in the covariance T T'
    em_next: Any  # 1 if the first evaluation is to be followed by an EM step, else 0


def evaluate(
    theta: Array, carry: Carry, cross: CrossProducts, reml: Array, plan: Plan, terms: tuple[Term, ...]
) -> tuple[Array, Array, Carry, opt.Guide]:
    """Criterion, its gradient in theta, estimates, and the metric of the next step; all from one elimination."""
    widths = [A.shape[-1] for A in cross.blocks.diagonal]
    T = factors_of(theta, terms, widths)
    dT = jax.jacfwd(lambda t: factors_of(t, terms, widths))(theta)  # per block (k, k, P)

    def scaled(T: tuple[Array, ...]) -> tuple[Blocks, Columns]:
        return penalised(cross.blocks, T, plan), scale_border(T, cross)

    (H, B), pull = jax.vjp(scaled, T)
    factor = eliminate(H, plan)
    X = solve(factor, B, plan)
    # barriers keep XLA from copying what comes before into every fusion that uses it: a third of the compile time
    factor, X = jax.lax.optimization_barrier((factor, X))
    at = jax.lax.optimization_barrier(reduce_gram(factor.logdet, quadratic(B, X), X, cross))
    f = criterion(at, cross, reml)
    sigma2 = at.r2 / (cross.n - reml * at.beta.shape[0])

    # cotangent of the quadratic form: f depends on it through r2 and, for REML, through log|R_X|^2
    v = jnp.concatenate([-at.beta, jnp.ones(1, at.r2.dtype)])
    weight = jnp.outer(v, v) / sigma2
    p = at.beta.shape[0]
    if p:
        weight = weight + reml * jnp.pad(at.schur_inverse, (0, 1))
    (gradient_T,) = pull(_cotangents(selected_inverse(factor, H, plan), X, weight, plan))
    g = jnp.stack([(a[..., None] * d).sum((0, 1)) for a, d in zip(gradient_T, dT, strict=True)]).sum(0)

    gradient_T, at = jax.lax.optimization_barrier((gradient_T, at))
    information = average_information(at, factor, T, dT, cross, reml, sigma2, plan)
    G = _gradient_in_covariance(gradient_T, T, carry.G)
    hessian = information + _boundary_terms(G, dT)
    inverse = _regularised_inverse(hessian)
    inverse = jax.lax.cond(
        jnp.isfinite(inverse).all(),
        lambda: inverse,
        lambda: _regularised_inverse(information + _boundary_terms(tuple(_positive_part(x) for x in G), dT)),
    )
    jump = jax.lax.cond(
        carry.em_next > 0.0, lambda: _em_step(at, T, sigma2, cross, terms), lambda: jnp.full_like(theta, jnp.nan)
    )
    after = Carry(at.u, at.beta, at.schur, at.r2, G, jnp.zeros_like(f))
    return f, g, after, opt.Guide(hessian, inverse, jnp.isfinite(jump).all(), jump)


def _cotangents(S: Blocks, X: Columns, weight: Array, plan: Plan) -> tuple[Blocks, Columns]:
    """Cotangents of (H, B) for df = <S, dH> - <weight, dQ>, Q = B'H^-1 B."""
    diagonal = []
    moved = [x @ weight for x in X]
    for block, x, wx in zip(S.diagonal, X, moved, strict=True):
        diagonal.append(block + small_matmul(wx, x.swapaxes(-1, -2)))
    pairs = []
    for c, block in zip(plan.couplings, S.pairs, strict=True):
        a = moved[c.first] if c.row_pair is None else take(moved[c.first], c.a)
        pairs.append(2.0 * (block + small_matmul(a, take(X[c.second], c.b).swapaxes(-1, -2))))
    return Blocks(tuple(diagonal), tuple(pairs)), tuple(-2.0 * wx for wx in moved)


def average_information(
    at: Profile,
    factor: Factor,
    T: tuple[Array, ...],
    dT: tuple[Array, ...],
    cross: CrossProducts,
    reml: Array,
    sigma2: Array,
    plan: Plan,
) -> Array:
    """(P, P) average information of theta, sigma^2 profiled out, in units of the criterion.

    y'P V_j P V_k P y / sigma^2 - Q_j Q_k / (sigma^4 N), where V = W^-1 + Z Lambda Lambda' Z', P removes X from V^-1,
    N = n or n - p, and Q_j = y'P V_j P y.
    """
    p = at.beta.shape[0]
    b = [small_matmul(u[:, None, :], t.T[None]).swapaxes(-1, -2) for u, t in zip(at.u, T, strict=True)]
    taken = products_times(cross.blocks, b, plan)
    # c = Z'P y; V_j P y = Z g_j
    c = [B[..., p] - B[..., :p] @ at.beta - x[..., 0] for B, x in zip(cross.border, taken, strict=True)]
    # broadcast sums instead of matrix products: small, and fused by XLA
    g = []
    for d, u, t, x in zip(dT, at.u, T, c, strict=True):
        dx = (d[None] * x[:, :, None, None]).sum(1)  # dT_j' c, (m, k, P)
        g.append((d[None] * u[:, None, :, None]).sum(2) + small_matmul(t[None], dx))
    Ag = products_times(cross.blocks, g, plan)
    s = solve(factor, tuple(small_matmul(t.T[None], x) for t, x in zip(T, Ag, strict=True)), plan)
    rest = [x - small_matmul(t[None], y) for x, t, y in zip(g, T, s, strict=True)]
    q = quadratic(tuple(Ag), tuple(rest))
    if p:
        onto_X = quadratic(tuple(B[..., :p] for B in cross.border), tuple(rest))
        q = q - onto_X.T @ at.schur_inverse @ onto_X
    Q = jnp.stack([(x[:, :, None] * y).sum((0, 1)) for x, y in zip(c, g, strict=True)]).sum(0)
    N = cross.n - reml * p
    return q / sigma2 - jnp.outer(Q, Q) / (sigma2 * sigma2 * N)


def _gradient_in_covariance(
    gradient_T: tuple[Array, ...], T: tuple[Array, ...], before: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Gradient G in the covariance T T' of each block, read off the gradient in T, which is 2 G T.

    Zero at an interior optimum. Where T is singular that gives G on T's range only: the rest stays what it was at the
    point before, by the least symmetric change (Powell's; Nocedal & Wright 2006, section 6.2).
    """
    out = []
    for a, t, G in zip(gradient_T, T, before, strict=True):
        inverse, _ = one_inverse(t.T @ t + LEAST_COLUMN**2 * jnp.eye(t.shape[0], dtype=t.dtype))
        inverse = inverse @ t.T
        change = (0.5 * a - G @ t) @ inverse
        change = change + change.T - change.T @ t @ inverse
        out.append(G + 0.5 * (change + change.T))
    return tuple(out)


def _boundary_terms(G: tuple[Array, ...], dT: tuple[Array, ...]) -> Array:
    """2 tr(dT_j' G dT_k): what the average information lacks of the Hessian."""
    return sum((2.0 * jnp.einsum("ijp,il,ljq->pq", d, g, d) for g, d in zip(G, dT, strict=True)), start=jnp.zeros(()))


def _positive_part(G: Array) -> Array:
    values, vectors = jnp.linalg.eigh(G)
    return (vectors * jnp.maximum(values, 0.0)) @ vectors.T


def _regularised_inverse(M: Array) -> Array:
    """Inverse of a positive semi-definite matrix, each parameter in units of its own curvature; else NaN."""
    scale = 1.0 / (jnp.sqrt(jnp.maximum(jnp.diagonal(M), 0.0)) + 1e-10)
    inverse, _ = one_inverse(M * jnp.outer(scale, scale) + 1e-8 * jnp.eye(M.shape[0], dtype=M.dtype))
    return inverse * jnp.outer(scale, scale)


def _em_step(at: Profile, T: tuple[Array, ...], sigma2: Array, cross: CrossProducts, terms: tuple[Term, ...]) -> Array:
    """theta after one step of the EM algorithm, conditional variances taken within each level only."""
    parts = []
    for term in terms:
        columns = term.columns
        t = T[term.block][columns, columns]
        b = at.u[term.block][:, columns] @ t.T
        information = cross.blocks.diagonal[term.block][:, columns, columns]
        there = (information != 0.0).any((1, 2)).astype(t.dtype)  # levels with rows
        D, _ = spd_inverse(sandwich(t, information, t) + jnp.eye(t.shape[0], dtype=t.dtype))
        m = jnp.maximum(there.sum(), 1.0)
        mean = (there @ D.reshape(-1, t.size)).reshape(t.shape) / m
        cov = b.T @ b / (m * sigma2) + t @ mean @ t.T
        size = jnp.trace(cov) / t.shape[0]
        parts.append(term.structure.theta_near(cov + (1e-3 * size + 1e-4) * jnp.eye(t.shape[0], dtype=t.dtype)))
    return jnp.concatenate(parts)


@jax.jit
def _cross(design: Design) -> CrossProducts:
    return cross_products(design)


def in_units_of_X(carry: Carry, cross: CrossProducts) -> Carry:
    """The carry of a finished search with beta and R_X in the units of X."""
    if not carry.beta.shape[0]:
        return carry
    beta = fixed_effects(carry.beta, cross)
    return carry._replace(beta=beta, schur=jnp.linalg.cholesky(carry.schur).T @ cross.A)


@jax.jit
def _finish(found: opt.Found, cross: CrossProducts) -> opt.Found:
    return found._replace(carry=in_units_of_X(found.carry, cross))


def make_move(terms: tuple[Term, ...], metric: str) -> opt.Move:
    """Straight steps; those of a search that takes long go around turns of the factors (`Structure.moved`)."""
    if metric != "own" or not any(t.structure.turns for t in terms):
        return opt.straight

    def around(x: Array, change: Array) -> Array:
        return jnp.concatenate([t.structure.moved(x[t.theta], change[t.theta]) for t in terms])

    return lambda x, change, count: jax.lax.cond(count < STALLED, jnp.add, around, x, change)


def make_objective(
    cross: CrossProducts, reml: Array, plan: Plan, terms: tuple[Term, ...], metric: str
) -> opt.Objective:
    """(theta, carry) -> (criterion, gradient, carry, 0, metric of the next step unless that is left to BFGS)."""

    def objective(x: Array, carry: Carry) -> tuple[Array, Array, Carry, Array, opt.Guide | None]:
        f, g, after, guide = evaluate(x, carry, cross, reml, plan, terms)
        return f, g, after, jnp.zeros((), jnp.int32), guide if metric == "own" else None

    return objective


@partial(jax.jit, static_argnames=("terms", "metric", "path_length"))
def search(
    x0: Array,
    inverse0: Array,
    carry0: Carry,
    limits: opt.Limits,
    cross: CrossProducts,
    reml: Array,
    plan: Plan,
    terms: tuple[Term, ...],
    metric: str,
    path_length: int,
) -> Array:
    """A fit from cross-products."""
    objective = make_objective(cross, reml, plan, terms, metric)
    state = opt.minimise(objective, x0, inverse0, carry0, limits, path_length, make_move(terms, metric))
    return opt.pack(_finish(opt.found(state), cross))


@partial(jax.jit, static_argnames=("metric", "path_length"))
def _run(
    x0: Array,
    inverse0: Array,
    carry0: Carry,
    limits: opt.Limits,
    design: Design,
    reml: Array,
    metric: str,
    path_length: int,
) -> Array:
    """The whole fit as one program: cross-products, then the search, which no longer sees the rows."""
    cross = cross_products(design)
    return search(x0, inverse0, carry0, limits, cross, reml, design.plan, design.terms, metric, path_length)


@partial(jax.jit, static_argnames=("terms", "metric"))
def _step(
    state: opt.State,
    inverse0: Array,
    limits: opt.Limits,
    cross: CrossProducts,
    reml: Array,
    plan: Plan,
    terms: tuple[Term, ...],
    metric: str,
) -> opt.State:
    return opt.advance(
        make_objective(cross, reml, plan, terms, metric), state, inverse0, limits, make_move(terms, metric)
    )


@partial(jax.jit, static_argnames=("terms",))
def _evaluate(
    x: Array, carry: Carry, cross: CrossProducts, reml: Array, plan: Plan, terms: tuple[Term, ...]
) -> tuple[Array, Array, Carry]:
    f, g, after, _ = evaluate(x, carry, cross, reml, plan, terms)
    return f, g, after


@partial(jax.jit, static_argnames=("terms",))
def _hessian(x: Array, cross: CrossProducts, reml: Array, plan: Plan, terms: tuple[Term, ...]) -> Array:
    return jax.hessian(lambda t: criterion(profile(t, cross, plan, terms), cross, reml))(x)


def _by_rows(cross: CrossProducts, reml: Array, design: Design) -> opt.Objective:
    """`make_objective` for BFGS, the penalised residual sum of squares from the residuals of the rows.

    Cross-products cannot tell it where it is a millionth of the response's: its relative error is theirs times that
    ratio. Solved once more for what the rows leave, estimates keep their digits, and so does the gradient, which by the
    envelope theorem needs no derivative of theirs.
    """
    p = design.p
    X = jnp.asarray(design.X)
    rows = replace(design, X=jax.scipy.linalg.solve_triangular(cross.A.T, X.T, lower=True).T if p else X)
    y, w = jnp.asarray(design.y), jnp.asarray(design.weights)

    def value(theta: Array) -> tuple[Array, Profile]:
        at = profile(theta, cross, design.plan, design.terms)
        T = factors(theta, design)
        fixed, u = jax.lax.stop_gradient((cross.beta_ols + at.beta, at.u))
        still = jax.lax.stop_gradient(T)
        left = y - linear_predictor(unspool(u, still), fixed, rows)
        step = newton_step(row_sums(w * left, w, rows, p > 0), u, still, rows)
        step = jax.lax.stop_gradient(step)
        u = tuple(jnp.where(step.ok, a + d, a) for a, d in zip(u, step.du, strict=True))
        if step.dbeta is not None:
            fixed = jnp.where(step.ok, fixed + step.dbeta, fixed)
        left = y - linear_predictor(unspool(u, T), fixed, rows)
        at = at._replace(r2=jnp.vdot(w * left, left) + squared_norm(u), beta=fixed - cross.beta_ols, u=u)
        return criterion(at, cross, reml), at

    def objective(x: Array, carry: Carry) -> tuple[Array, Array, Carry, Array, None]:
        (f, at), g = jax.value_and_grad(value, has_aux=True)(x)
        after = carry._replace(u=at.u, beta=at.beta, schur=at.schur, r2=at.r2)
        return f, g, after, jnp.zeros((), jnp.int32), None

    return objective


@partial(jax.jit, static_argnames=("path_length",))
def _run_by_rows(
    x0: Array, inverse0: Array, carry0: Carry, limits: opt.Limits, design: Design, reml: Array, path_length: int
) -> Array:
    """`_run` by rows."""
    cross = cross_products(design)
    end = opt.minimise(_by_rows(cross, reml, design), x0, inverse0, carry0, limits, path_length)
    return opt.pack(_finish(opt.found(end), cross))


def part_left(r2: float, y: Any, X: Any, weights: Any, offset: Any) -> float:
    """A residual sum of squares as a part of that of least squares on X alone; 1 where it is more than `FINE`."""
    y, w, X = np.asarray(y) - np.asarray(offset), np.asarray(weights), np.asarray(X)
    if not r2 < FINE * float(w @ np.square(y)):
        return 1.0
    root = np.sqrt(w)
    last = triangle(y.size, lambda rows: root[rows, None] * np.column_stack([X[rows], y[rows]]))[-1, -1]
    return r2 / float(np.square(last)) if abs(last) > 1e-13 * np.sqrt(w @ np.square(y)) else 0.0


def begin(theta: Any, em_next: Any, design: Design) -> Start:
    """Start of a search at theta, with a rule of thumb for its metric."""
    p = design.p
    metric = [
        np.diag(1.0 / t.structure.curvature(t.structure.start(), design.n_levels[t.block], np.ones(t.structure.k)))
        for t in design.terms
    ]
    u = tuple(np.zeros((m, z.shape[1])) for m, z in zip(design.n_levels, design.z, strict=True))
    G = tuple(np.zeros((z.shape[1], z.shape[1])) for z in design.z)
    return Start(theta, block_diagonal(metric), Carry(u, np.zeros(p), np.zeros((p, p)), np.zeros(()), G, em_next), 0.0)


class LinearProblem(Problem):
    """An LMM: theta outside, beta and sigma profiled out; the data as cross-products."""

    metric_is_hessian = True
    by_rows = False

    def __init__(self, design: Design, REML: bool, exact: bool = False) -> None:
        self._scaled, basis = scale_z(design)
        self.original, self.REML, self.exact = design, REML, exact
        self.family = Gaussian()
        self.scaling = Scaling(Layout(design.terms, design.p, has_beta=False), np.eye(design.p), basis)
        self._cross: CrossProducts | None = None
        self._held = programs.Held()  # compiled for these shapes
        self._bucket = bucket_of(self._scaled)
        self._padded = self._bucket.pad(self._scaled)

    @property
    def cross(self) -> CrossProducts:
        """Cross-products in internal units, on the device."""
        if self._cross is None:
            self._cross = self._make_cross()
        return self._cross

    def _make_cross(self) -> CrossProducts:
        made: CrossProducts = _cross(self._scaled)
        return made

    def with_rows(self, name: str, values: np.ndarray) -> Self:
        other = copy(self)
        new: dict[str, Any] = {name: np.asarray(values, self.original.y.dtype)}
        other.original = replace(self.original, **new)
        other._scaled = replace(self._scaled, **new)
        other._padded = replace(self._padded, **self._bucket.pad_arrays(new))
        other._cross = None
        return other

    def with_criterion(self, REML: bool) -> LinearProblem:
        """The same problem by REML or by maximum likelihood."""
        other = copy(self)
        other.REML = REML
        return other

    def left(self, found: opt.Found) -> float:
        """Penalised residual sum of squares at the end of a search, as a part of that of least squares on X."""
        design = self.original
        return part_left(float(found.carry.r2), design.y, design.X, design.weights, design.offset)

    def finer(self, found: opt.Found) -> LinearProblem | None:
        if self.by_rows or not EXACT < self.left(found) < FINE:
            return None
        other = copy(self)
        other.by_rows, other.metric_is_hessian = True, False
        return other

    def objection(self, found: opt.Found) -> int | None:
        return opt.EXACT if self.left(found) <= EXACT else None

    @property
    def _reml(self) -> np.ndarray:
        return np.asarray(float(self.REML))

    @property
    def _arguments(self) -> tuple[CrossProducts, np.ndarray, Plan, tuple[Term, ...]]:
        return self.cross, self._reml, self.original.plan, self.original.terms

    def complete(self, estimates: Estimates, carry: Carry) -> Estimates:
        return replace(estimates, sigma=self.sigma(carry), RX=np.asarray(carry.schur))

    def sigma(self, carry: Carry) -> float:
        size = int(np.count_nonzero(self.original.weights)) - (self.original.p if self.REML else 0)
        return float(np.sqrt(carry.r2 / size))

    def finish(self, found: opt.Found) -> opt.Found:
        out: opt.Found = _finish(found, self.cross)
        return out

    def start(self, start: dict[str, np.ndarray]) -> Start:
        design = self.original
        x = design.theta_start
        if "theta" in start:
            x = off_ridge(self.scaling.basis.inner(start["theta"]), design.terms)
        return begin(x, np.asarray(float("theta" not in start)), design)

    def minimise(self, begin: Start, limits: opt.Limits, metric: str) -> opt.Found:
        metric = "bfgs" if self.by_rows else metric
        limits, carry = opt.as_arrays(self._limits(limits, metric)), begin.carry
        begin = begin._replace(carry=carry._replace(u=self._bucket.pad_levels(carry.u)))
        arguments = begin.x, begin.inverse, begin.carry, limits, self._padded, self._reml
        settings = {"metric": metric, "path_length": PATH_LENGTH}

        def make() -> list[Any]:
            lowered = programs.lower(_run, arguments, settings)
            return [compile_with(lowered, one_fit_options(self._padded, threads=2))]

        found = self._held.of_one_fit(("LMM", *settings.values()), self._padded, make) if metric == "own" else None
        program: Any = partial(_run, **settings) if found is None else found[0]
        if self.by_rows:
            program = partial(_run_by_rows, path_length=PATH_LENGTH)
        end = unpacked(program(*arguments), begin)
        return end._replace(carry=end.carry._replace(u=self._bucket.own_levels(end.carry.u)))

    def advance(self, state: opt.State, begin: Start, limits: opt.Limits, metric: str) -> opt.State:
        return _step(state, begin.inverse, self._limits(limits, metric), *self._arguments, metric)

    def _limits(self, limits: opt.Limits, metric: str) -> opt.Limits:
        return limits._replace(tol=TIGHTER * limits.tol, hessian=metric != "own" and limits.hessian)

    def evaluate(self, x: Array, carry: Any, constant: Any) -> tuple[Array, Array, Any, Array]:
        f, g, after = _evaluate(x, carry, *self._arguments)
        return f, g, after, jnp.zeros((), jnp.int32)

    def deviance(self, x: Array, carry: Any, constant: Any) -> Array:
        cross, reml, plan, terms = self._arguments
        return criterion(profile(x, cross, plan, terms), cross, jnp.asarray(reml))

    def exact_hessian(self, x: Array, carry: Any, constant: Any) -> Array:
        return _hessian(x, *self._arguments)
