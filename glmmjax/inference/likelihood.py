"""A fitted model's deviance over all its parameters, many points at a time: what profiles and covariances are made of.

The parameters are (theta, beta, log phi) of a generalised model, and (theta, beta, log sigma) of a linear one, whose
deviance is that of maximum likelihood with nothing profiled out.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..algebra.linalg import block_diagonal
from ..algebra.symbolic import Plan
from ..compiling.entry import entry
from ..families import Family
from ..fit import optimise as opt
from ..fit.glmm import Carry, GeneralisedProblem, deviance_at, layout_of
from ..fit.lmm import LinearProblem
from ..model.basis import APART, Basis
from ..model.design import Design, Term
from ..model.parameters import Layout
from ..objective.pls import LOG_2PI, CrossProducts, cross_products, profile
from ..objective.quadrature import CHUNK

if TYPE_CHECKING:
    from ..results import MixedModel

#: Most points evaluated by one call of the compiled program; others wait for the next.
LANES = 16
#: Most that a step along a direction of `root` moves a linear predictor, where the response is separated.
FARTHEST = 10.0
#: Rows times points of one call, quadrature nodes counted: some 300 bytes each.
MAX_VALUES = 1_000_000


@partial(jax.jit, static_argnames=("family", "hessian", "nAGQ"))
def _generalised(x: Array, u: Any, design: Design, family: Family, hessian: str, nAGQ: int) -> tuple[Array, Array]:
    def one(v: Array) -> tuple[Array, Array]:
        carry = _carry(v, u, design, family)
        (f, _), g = jax.value_and_grad(deviance_at, has_aux=True)(v, carry, design, family, hessian, nAGQ)
        return f, g

    return jax.vmap(one)(x)


def _carry(x: Array, u: Any, design: Design, family: Family) -> Carry:
    """Where the search for modes starts at x."""
    return Carry(u, x[layout_of(design, family).at.beta], jnp.zeros((), jnp.int32))


def _with(design: Design, field: str, values: Array) -> Design:
    changes: dict[str, Any] = {field: values}
    return replace(design, **changes)


@partial(jax.jit, static_argnames=("family", "hessian", "nAGQ", "field"))
def _generalised_mixed(x: Array, u: Any, design: Design, family: Family, hessian: str, nAGQ: int, field: str) -> Array:
    carry = _carry(x, u, design, family)

    def deviance(v: Array, values: Array) -> Array:
        return deviance_at(v, carry, _with(design, field, values), family, hessian, nAGQ)[0]

    return _mixed(deviance, x, jnp.asarray(getattr(design, field), x.dtype))


@partial(jax.jit, static_argnames=("field",))
def _linear_mixed(x: Array, design: Design, field: str) -> Array:
    def deviance(v: Array, values: Array) -> Array:
        cross = cross_products(_with(design, field, values))
        return linear_deviance(v, cross, cross.A, False, design.plan, design.terms)

    return _mixed(deviance, x, jnp.asarray(getattr(design, field), x.dtype))


@partial(jax.jit, static_argnames=("family", "hessian", "nAGQ"))
def _generalised_without(
    g: Array, x: Array, codes: Array, u: Any, design: Design, family: Family, hessian: str, nAGQ: int
) -> Array:
    carry = _carry(x, u, design, family)

    def one(label: Array) -> Array:
        rest = replace(design, weights=jnp.where(codes == label, 0.0, design.weights))
        return jax.grad(lambda v: deviance_at(v, carry, rest, family, hessian, nAGQ)[0])(x)

    return jax.vmap(one)(g)


@jax.jit
def _linear_without(g: Array, x: Array, codes: Array, design: Design) -> Array:
    def one(label: Array) -> Array:
        cross = cross_products(replace(design, weights=jnp.where(codes == label, 0.0, design.weights)))
        return jax.grad(lambda v: linear_deviance(v, cross, cross.A, False, design.plan, design.terms))(x)

    return jax.vmap(one)(g)


def _mixed(deviance: Any, x: Array, values: Array) -> Array:
    """(P, n) second derivatives in x and values: the gradient in the values of each directional derivative in x."""

    def along(e: Array) -> Array:
        return jax.grad(lambda v: jax.jvp(lambda w: deviance(w, v), (x,), (e,))[1])(values)

    return jax.lax.map(along, jnp.eye(x.shape[0], dtype=x.dtype))


def linear_deviance(x: Array, cross: CrossProducts, A: Array, reml: bool, plan: Plan, terms: tuple[Term, ...]) -> Array:
    """-2 log-likelihood of a linear mixed model at x = (theta, beta, log sigma), internal units but for beta.

    With `reml` the restricted one of (theta, log sigma), to which beta adds its quadratic form: its Hessian in beta is
    twice the inverse covariance there, and beta and the rest are apart at the estimates.
    """
    p = cross.gram.shape[0] - 1
    theta, beta, _, (log_sigma,) = Layout(terms, p, has_sigma=True).unpack(x)
    at = profile(theta, cross, plan, terms)
    away = A @ beta - cross.beta_ols - at.beta
    size = cross.n - (p if reml else 0)
    value = at.logdet_L + size * (LOG_2PI + 2.0 * log_sigma) - cross.log_weights
    value = value + (at.r2 + away @ at.schur @ away) * jnp.exp(-2.0 * log_sigma)
    if reml and p:
        value = value + at.logdet_RX + 2.0 * cross.log_det_A
    return value


@partial(jax.jit, static_argnames=("reml", "terms"))
def _linear(
    x: Array, cross: CrossProducts, A: Array, reml: bool, plan: Plan, terms: tuple[Term, ...]
) -> tuple[Array, Array]:
    return jax.vmap(jax.value_and_grad(lambda v: linear_deviance(v, cross, A, reml, plan, terms)))(x)


class Likelihood:
    """-2 log-likelihood of a model's data as a function of x (P,) = (theta, beta, log phi or log sigma).

    Attributes:
        x: (P,) the estimates. names: of the parameters. root: (P, P) directions about a standard error long, which are
            those of the parameters where these are well apart.
    """

    @entry
    def __init__(self, model: MixedModel, reml: bool = False) -> None:
        e, problem, layout = model._estimates, model._problem, model._layout
        self.model, self.layout = model, layout
        self.x, self.names = layout.of(e.theta, e.beta, e.sigma, e.phi), model._names_in(layout)
        self._J = replace(problem.scaling, layout=layout).jacobian
        if isinstance(problem, LinearProblem):
            cross: Any = problem.cross
            self._data: tuple[Any, ...] = (cross, cross.A, reml, problem.original.plan, problem.original.terms)
            curvature = np.diag(e.hessian)
            constant = 0.0
            spread = [model._standard_errors, [1.0 / np.sqrt(2.0 * model.nobs)]]
        else:
            assert isinstance(problem, GeneralisedProblem)
            u = tuple(np.asarray(b) for b in e.u)
            self._data = (u, problem.design, problem.family, problem.hessian, max(problem.nAGQ, 1))
            curvature = np.diag(e.hessian)
            constant = float(-2.0 * np.asarray(_constant(model._design, model.family)).sum())
            spread = [np.sqrt(2.0 / np.maximum(curvature[layout.at.theta.stop :], 1e-8))]
        self.constant = constant
        theta_scale = np.sqrt(2.0 / np.maximum(curvature[layout.at.theta], 1e-2))
        scale = np.concatenate([theta_scale, *spread])
        self.root = np.diag(np.where(np.isfinite(scale), scale, 1.0))
        basis, A = problem.scaling.basis, np.asarray(self._data[1]) if layout.has_sigma else problem.scaling.A
        if not basis.diagonal or (np.abs(np.diag(A)) < APART * np.linalg.norm(A, axis=0)).any():
            self.root = self._internal_root(basis, A, e.hessian)
        if (
            e.separation is not None
        ):  # flat directions are long, but where rows are far out no further than they stay so
            own = self.root[:, layout.at.beta]
            moves = np.abs(np.asarray(model._design.X) @ own[layout.at.beta]).max(axis=0)
            own /= np.maximum(1.0, moves / FARTHEST)
        self.evaluations = 0
        values = model.nobs if model.nAGQ <= 1 else max(model.nobs, CHUNK)
        self._lanes = max(1, min(LANES, MAX_VALUES // values))

    def _internal_root(self, basis: Basis, A: np.ndarray, H: np.ndarray) -> np.ndarray:
        """`root` along internal coordinates; A (p, p) with X = Xs A, H the Hessian of the fit."""
        apart = np.linalg.inv(A)
        if self.layout.has_sigma:
            fixed, H = self.model.sigma / np.sqrt(self.model.nobs) * apart, basis.inverse.T @ H @ basis.inverse
            rest = np.eye(1) / np.sqrt(2.0 * self.model.nobs)
        else:
            back = block_diagonal([basis.inverse, apart, np.eye(self.layout.n_phi)])
            scale = np.sqrt(2.0 / np.maximum(np.diag(back.T @ H @ back), 1e-2))
            return np.asarray(back * np.where(np.isfinite(scale), scale, 1.0))
        return block_diagonal([basis.inverse * np.sqrt(2.0 / np.maximum(np.diag(H), 1e-2)), fixed, rest])

    @entry
    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Deviances (L,) and gradients (L, P) at x (L, P); +inf or NaN outside the parameters' range."""
        inner = x @ self._J.T
        f, g = [], []
        for start in range(0, len(x), self._lanes):
            part = inner[start : start + self._lanes]
            filled = np.concatenate([part, np.repeat(part[-1:], self._lanes - len(part), axis=0)])
            program: Any = _linear if self.layout.has_sigma else _generalised
            one, two = program(filled, *self._data)
            f.append(np.asarray(one)[: len(part)])
            g.append(np.asarray(two)[: len(part)])
        self.evaluations += len(x)
        return np.concatenate(f) + self.constant, np.concatenate(g) @ self._J

    def hessian(self, x: np.ndarray, root: np.ndarray | None = None, h: float = 1e-3) -> np.ndarray:
        """(L, P, P) Hessians at x (L, P), by central differences of exact gradients along the columns of `root`, and in
        its coordinates; without one, along `self.root`. Steps are shorter where the curvature changes within them, as
        in a fit."""
        L, P = x.shape
        columns = self.root if root is None else root
        H, spacing, open_ = np.empty((L, P, P)), np.full((L, P), h), np.arange(L)
        at = self(x)[1] @ columns
        for _ in range(opt.SHORTENINGS + 1):
            steps = spacing[open_, :, None] * columns.T  # (L, P, P): one step a row
            here = x[open_, None]
            points = np.concatenate([here + steps, here - steps], axis=1).reshape(-1, P)
            g = (self(points)[1] @ columns).reshape(-1, 2, P, P)
            found = (g[:, 0] - g[:, 1]) / (2.0 * spacing[open_, :, None])
            H[open_] = 0.5 * (found + found.swapaxes(1, 2))
            factors = np.ones((L, P))
            for lane, (after, before) in zip(open_, g, strict=True):
                relative = h / spacing[lane]
                change = opt.change_of_curvature(after, at[lane], before, H[lane], spacing[lane], relative)
                factors[lane] = opt.shortening(change)
            spacing *= factors
            open_ = np.flatnonzero((factors < 1.0).any(axis=1))
            if not open_.size:
                break
        return H

    @entry
    def without(self, codes: np.ndarray, m: int) -> np.ndarray:
        """(m, P) gradients at the estimates of the deviance without the rows of each of m clusters."""
        problem, out = self.model._problem, []
        for start in range(0, m, self._lanes):
            g = np.minimum(np.arange(start, start + self._lanes), m - 1).astype(np.int32)
            if isinstance(problem, LinearProblem):
                found = _linear_without(g, self._J @ self.x, codes, problem._scaled)
            else:
                found = _generalised_without(g, self._J @ self.x, codes, *self._data)
            out.append(np.asarray(found)[: m - start])
        return np.asarray(np.concatenate(out) @ self._J)

    @entry
    def mixed(self, field: str) -> np.ndarray:
        """(P, n) second derivatives of the deviance at the estimates in x and the design's weights, y or offset."""
        problem = self.model._problem
        if isinstance(problem, LinearProblem):
            found = np.asarray(_linear_mixed(self._J @ self.x, problem._scaled, field))
        else:
            found = np.asarray(_generalised_mixed(self._J @ self.x, *self._data, field))
        return np.asarray(self._J.T @ found)


@entry
def _constant(design: Design, family: Family) -> Array:
    return family.constant(jnp.asarray(design.y), jnp.asarray(design.weights))
