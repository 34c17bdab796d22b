"""A mixed model as a differentiable layer: the whole fit as a pure function of its design.

The search is the one of `glmer` and `lmer`, in the graph. Derivatives do not go through it. At the optimum x^ of the
deviance D(x; d) of the data d the gradient is 0, so that to first order

    dx^ = -H^-1 (d2D / dx dd) dd,    H = d2D / dx2,

with exact H and mixed derivative (implicit function theorem; Gould et al. 2016, arXiv:1607.05447, lemma 3.2). The
rule calls the fit it belongs to, so it can be differentiated again. Everything else that is returned is a
differentiable function of x^ and the data.

Internal units (`Scaling`) are constants to it: any fixed units give the same estimates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .._arguments import checked, counted, named_starts, positive, setting
from .._errors import DataError
from ..compiling.precision import own_settings
from ..compiling.programs import make_room_at_times
from ..families import Family, dispersions, most_log_phi
from ..families import get as get_family
from ..model.basis import scale_traced
from ..model.design import Design, Term, factors, linear_predictor, off_ridge, u_from_blocks
from ..model.parameters import Layout, Parameters, Scaling
from ..objective.laplace import log_density_constant, pieces, resolve_hessian, warn_if_single_precision
from ..objective.pirls import is_symbolic_zero, unspool
from ..objective.pls import criterion, cross_products, fixed_effects, profile
from ..objective.quadrature import check_nodes
from . import optimise as opt
from .control import unknown_argument
from .glmm import deviance_at
from .lanes import Generalised, Linear
from .problem import (
    CONCAVE,
    FAR,
    FLAT,
    LEAST_CURVATURE,
    LEAST_PART,
    NEAR_ZERO,
    UNDETERMINED,
    ZERO_COST,
)

Kind = Generalised | Linear
START = ("theta", "beta", "phi")
#: status beside those of `optimise`
DEPENDENT = 5
MESSAGES = {**opt.MESSAGES, DEPENDENT: "columns of X are linearly dependent"}
#: Error of a gradient per standard error, in units of the precision; a smaller decrement than its square is noise.
ROUNDING = 1e5
#: Where less than this can be gained, in deviance units, a Newton step is taken without looking: its error is of the
#: order of its square, and derivatives are those at an optimum.
LAST_STEP = 1e-8


class DesignFit(NamedTuple):
    """Estimates of a design in its own units, as `fit_design` returns them.

    Attributes:
        theta: (n_theta,) relative covariance factors in lme4's order and signs.
        beta: (p,) fixed effects.
        phi: (n_phi,) dispersions of the family.
        sigma: () residual standard deviation of a gaussian model, else 1.
        b: (q,) conditional modes of the random effects on their original scale, in the order of Z's columns (terms in
            lme4's order, level by level).
        eta: (n,) linear predictor at the conditional modes, offset included.
        objective: () -2 log-likelihood with all constants, or the REML criterion.
        vcov: (p, p) covariance of beta; None unless asked for.
        status: () int: 0 converged, 1 stopped at the limit on evaluations, 2 the line search could not reduce the
            deviance further, 3 the deviance is not finite, 4 stopped at a point that is not a minimum,
            5 columns of X are linearly dependent. Those other than 0 leave the estimates as they were found.
        evaluations: () int, of deviance and gradient.
    """

    theta: Array
    beta: Array
    phi: Array
    sigma: Array
    b: Array
    eta: Array
    objective: Array
    vcov: Array | None
    status: Array
    evaluations: Array

    @property
    def message(self) -> str:
        """What the status means; not inside `jax.jit`."""
        return MESSAGES[int(self.status)]


class Optimum(NamedTuple):
    """End of a search in internal units."""

    x: Array  # (P,)
    hint: Any  # the search's carry: where PIRLS starts
    hessian: Array  # (P, P) by differences, or the average information of a linear model
    status: Array
    evaluations: Array


class _Start(NamedTuple):
    """Where a search starts, in internal units; beta (p,) is NaN where the search finds its own."""

    theta: Array
    fixed: Array  # whether theta was given
    beta: Array
    phi: Array
    dependent: Array  # whether X has not full rank


@checked(traceable=True, tol=setting(positive), max_evaluations=setting(counted), start=named_starts)
@own_settings
def fit_design(
    design: Design,
    family: str | Family = "binomial",
    nAGQ: int = 1,
    REML: bool = True,
    hessian: str | None = None,
    start: Mapping[str, Any] | DesignFit | None = None,
    tol: Any = 1e-10,
    max_evaluations: Any = 500,
    covariance: bool = False,
) -> DesignFit:
    """Fit a mixed model as a pure function of its design: inside `jax.jit`, `jax.vmap`, `jax.grad`, `jax.jvp`.

    The estimates are those of `glmer`, or of `lmer` for a gaussian family, with derivatives in the design's y, X,
    weights, offset and z, forward and reverse, to second order. A design may have traced leaves: features from a neural
    network as columns of X, a learned offset, weights of 0 for rows that are left out.

        def loss(w):
            X = jnp.column_stack([jnp.ones(design.n), jnp.tanh(raw @ w)])
            return gj.fit_design(replace(design, X=X), "poisson").objective

        jax.grad(loss)(w)

    Args:
        design: see `Design`; leaves may be NumPy or JAX arrays, traced or not.
        family: static; "gaussian" is the linear mixed model, where `nAGQ` and `hessian` change nothing.
        nAGQ: static; 1 is Laplace, 0 finds beta inside PIRLS, k > 1 adaptive Gauss-Hermite quadrature.
        REML: static; criterion of a gaussian model, others maximise the likelihood.
        hessian: static; as `laplace_deviance`.
        start: any of "theta", "beta", "phi" in the design's units, or an earlier fit; it has no derivative.
        tol: decrement of the deviance at which the search stops.
        max_evaluations: of deviance and gradient.
        covariance: static; whether vcov is wanted. Its own derivative takes third derivatives of the deviance, which
            are slow to compile.

    Returns:
        `DesignFit`. Nothing is raised where a search fails: the status says so, and the estimates are what was found.
        theta at an exact 0 (a singular fit) has derivative 0: the deviance is even in each column of the factor.
        Parameters do not move along directions that the data do not determine. theta is differentiated with its signs
        held. There is one search from one start, and no row is left out: where `glmer` finds that the response is
        separated (an infinite variance in vcov tells), coefficients are here where the deviance is flat, with status
        0; and where effects that cancel have two optima, the search may end at the one that `lmer` leaves.

    Raises:
        TypeError: not a design. DataError: a response that the family cannot have, missing or infinite values, shapes
            that do not fit, linearly dependent columns of X (values are checked where they are not traced). ValueError:
            an unknown family, nAGQ, hessian or start.

    Source: Gould et al. 2016, arXiv:1607.05447, lemma 3.2.
    """
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(design)):
        make_room_at_times()
    family = get_family(family)
    kind = _kind(design, family, nAGQ, REML, hessian)
    _check(design, family)
    warn_if_single_precision()
    floats = [design.y, design.X, design.weights, design.offset, *design.z]
    dtype = jnp.result_type(*floats, float)
    y, X, weights, offset, *z = (jnp.asarray(a, dtype) for a in floats)
    design = replace(design, y=y, X=X, weights=weights, offset=offset, z=tuple(z))
    limits = opt.Limits(jnp.asarray(tol, dtype), jnp.asarray(max_evaluations, jnp.int32), jnp.ones((), bool))
    return _fit(design, _given(start, design, family, dtype), limits, kind, bool(covariance))


def _kind(design: Any, family: Family, nAGQ: int, REML: bool, hessian: str | None) -> Kind:
    if not isinstance(design, Design):
        raise TypeError(
            f"design must be a glmmjax Design, as gj.design and gj.design_arrays make it, not {type(design).__name__}"
        )
    if isinstance(nAGQ, bool) or not isinstance(nAGQ, (int, np.integer)) or nAGQ < 0:
        raise ValueError(f"nAGQ must be a non-negative integer, got {nAGQ!r}")
    curvature = resolve_hessian(hessian, family)
    if family.linear:
        return Linear(bool(REML), design.terms, False)
    if nAGQ > 1:
        check_nodes(int(nAGQ), [z.shape[-1] for z in design.z])
    return Generalised(family, curvature, int(nAGQ))


def _check(design: Design, family: Family) -> None:
    """Raise `DataError` for what can be seen of a design before it is traced."""
    if np.ndim(design.y) != 1:
        raise DataError(f"y must be one-dimensional, got shape {np.shape(design.y)}; jax.vmap takes several responses")
    n = design.n
    shapes = {"X": (design.X, 2), "weights": (design.weights, 1), "offset": (design.offset, 1)}
    shapes |= {f"z of block {g + 1}": (z, 2) for g, z in enumerate(design.z)}
    for name, (value, dimensions) in shapes.items():
        if np.ndim(value) != dimensions or np.shape(value)[0] != n:
            wanted = f"({n},)" if dimensions == 1 else f"({n}, columns)"
            raise DataError(f"{name} must have shape {wanted} like y, got {np.shape(value)}")
    width = [sum(t.structure.k for t in design.terms if t.block == g) for g in range(len(design.z))]
    for g, z in enumerate(design.z):
        if z.shape[1] != width[g]:
            raise DataError(f"z of block {g + 1} has {z.shape[1]} columns, its terms have {width[g]}")
    seen = {"y": design.y, **{name: value for name, (value, _) in shapes.items()}}
    seen = {name: np.asarray(value) for name, value in seen.items() if not isinstance(value, jax.core.Tracer)}
    for name, value in seen.items():
        if not np.isfinite(value).all():
            raise DataError(f"{name} has missing or infinite values; remove those rows")
    if (seen.get("weights", np.ones(1)) < 0.0).any():
        raise DataError("weights must not be negative")
    if "y" in seen and "weights" in seen:
        used = seen["weights"] > 0.0
        family.check_response(seen["y"][used], seen["weights"][used], "y", np.flatnonzero(used))
    if "X" in seen and np.linalg.matrix_rank(seen["X"]) < design.p:
        raise DataError(f"the {design.p} columns of X are linearly dependent; leave some out")


def _given(start: Any, design: Design, family: Family, dtype: Any) -> dict[str, Array]:
    """The user's start, checked."""
    if start is None:
        return {}
    given = {name: getattr(start, name) for name in START} if isinstance(start, DesignFit) else dict(start)
    sizes = {"theta": design.n_theta, "beta": design.p, "phi": len(family.phi_names)}
    for name, value in given.items():
        if name not in START:
            raise unknown_argument(name, START, "start")
        if np.shape(value) != (sizes[name],):
            raise ValueError(f"start[{name!r}] must have shape ({sizes[name]},), got {np.shape(value)}")
    return {name: jax.lax.stop_gradient(jnp.asarray(value, dtype)) for name, value in given.items()}


def _fit(design: Design, given: dict[str, Array], limits: opt.Limits, kind: Kind, covariance: bool) -> DesignFit:
    """`fit_design` of a checked design of one dtype.

    Its parts are compiled apart, so that outside `jax.jit` the value and either derivative share the program of the
    search.
    """
    scaled, scaling, start = _prepare(design, given, kind)
    found = optimum(scaled, start, limits, kind)
    H = _hessian(found.x, found.hint, scaled, kind) if covariance and scaling.layout.has_beta else None
    return _estimates(found, H, design, scaled, scaling, kind, covariance)


@partial(jax.jit, static_argnames=("kind",))
def _prepare(design: Design, given: dict[str, Array], kind: Kind) -> tuple[Design, Scaling, _Start]:
    """The design in internal units, these, and where the search starts."""
    scaled, scaling = _scale(design, kind)
    dtype = scaled.y.dtype
    theta = scaling.basis.C @ given["theta"] if "theta" in given else jnp.asarray(design.theta_start, dtype)
    theta = off_ridge(theta, design.terms)
    phi = jnp.zeros(0, dtype) if isinstance(kind, Linear) else jnp.asarray(kind.family.phi_start(), dtype)
    begin = given.get("phi", phi)
    start = _Start(
        theta,
        jnp.asarray("theta" in given),
        scaling.A @ given["beta"] if "beta" in given else jnp.full(design.p, jnp.nan, dtype),
        jnp.where(jnp.isfinite(begin), begin, phi),  # at infinity the density is flat
        _dependent(design.X),
    )
    return scaled, scaling, start


def _dependent(X: Array) -> Array:
    """Whether a column of X is a combination of those before it, to rounding."""
    R = jnp.linalg.qr(jax.lax.stop_gradient(X), mode="r")
    return (jnp.abs(jnp.diagonal(R)) <= X.shape[0] * jnp.finfo(X.dtype).eps * jnp.linalg.norm(R, axis=0)).any()


def _scale(design: Design, kind: Kind) -> tuple[Design, Scaling]:
    """The design in internal units, and these, which are constants to derivatives."""
    scaled, basis = scale_traced(design)
    A = eye = jnp.eye(design.p, dtype=design.y.dtype)
    if design.p and not isinstance(kind, Linear):  # where `cross_products` sees to X
        A = jnp.linalg.qr(jax.lax.stop_gradient(design.X), mode="r") / design.n**0.5
        scaled = replace(scaled, X=design.X @ jax.scipy.linalg.solve_triangular(A, eye))
    return scaled, Scaling(kind.layout(design), A, basis)


def _canonical(theta: Array, terms: tuple[Term, ...]) -> Array:
    """theta with the columns of each factor in lme4's signs."""
    signs = [term.structure.flip(theta[term.theta])[0] for term in terms]
    return theta * jax.lax.stop_gradient(jnp.concatenate(signs))


# -------------------- the optimum and its derivative


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def optimum(design: Design, start: _Start, limits: opt.Limits, kind: Kind) -> Optimum:
    """Minimise the deviance of a design in internal units; x has derivatives in the design, nothing else has any."""
    return _search(design, start, limits, kind)


@partial(jax.jit, static_argnames=("kind",))
def _search(design: Design, start: _Start, limits: opt.Limits, kind: Kind) -> Optimum:
    extra, begin = kind.begin(design, start.theta, start.phi, start.fixed)
    x0, inverse, carry, constant = jax.tree.map(lambda a: jnp.asarray(a), tuple(begin))
    layout = kind.layout(design)
    if isinstance(kind, Generalised):
        own = jnp.where(jnp.isfinite(start.beta), start.beta, carry.beta)
        carry = carry._replace(beta=own)
        x0 = x0.at[layout.at.beta].set(own) if layout.has_beta else x0
    objective = kind.objective(kind.data(design, extra), constant)
    end = opt.minimise(objective, x0, inverse, carry, _reachable(kind.limits(limits)), 1, kind.move)

    x_end, g, H = end.x, end.g, end.hessian
    if isinstance(kind, Generalised) and kind.family.limit and layout.n_phi:
        # a search towards an infinite dispersion ends far out, where nothing depends on it any more
        last = np.isin(np.arange(layout.size), np.arange(layout.size)[layout.at.log_phi])
        far = (x_end[layout.at.log_phi] > jnp.log(FAR * jnp.maximum(1.0, design.y.max()))).all()
        g = jnp.where(far & last, 0.0, g)
        x_end = jnp.where(far & last, most_log_phi(x_end.dtype), x_end)
        H = jnp.where(far & (last[:, None] | last), jnp.diag(last.astype(H.dtype)), H)
    shape = curvature(H)
    inverse = pseudo_inverse(shape)
    decrement = 0.5 * g @ inverse @ g
    minimum = shape.finite & (shape.values.min(initial=0.0) > CONCAVE)
    converged = minimum & (decrement < 10.0 * _reachable(limits).tol) & (end.status != opt.NON_FINITE)
    status = jnp.where(converged, opt.CONVERGED, jnp.where(end.status == opt.CONVERGED, opt.NOT_MINIMUM, end.status))
    status = jnp.where(start.dependent, DEPENDENT, status)

    # Newton's step where next to nothing is left, then columns of T near 0 at exactly 0; as in `problem`
    near = converged | (minimum & (decrement < LAST_STEP))
    x = x_end - jnp.where(near, inverse @ g, 0.0)
    parts = layout.unpack(x)
    theta = [term.structure.settled(parts.theta[term.theta], NEAR_ZERO) for term in design.terms]
    settled = layout.pack(jnp.concatenate(theta), *parts[1:])
    values = jax.lax.map(lambda v: deviance(v, end.carry, design, kind), jnp.stack([x_end, settled]))
    x = jnp.where(near & (values[1] <= values[0] + ZERO_COST), settled, jnp.where(near, x, x_end))
    return Optimum(x, end.carry, H, status.astype(jnp.int32), end.evaluations)


def _reachable(limits: opt.Limits) -> opt.Limits:
    """Limits with a tolerance that the precision allows."""
    tol = jnp.asarray(limits.tol)
    return limits._replace(tol=jnp.maximum(tol, float(ROUNDING * jnp.finfo(tol.dtype).eps) ** 2))


def deviance(x: Array, hint: Any, design: Design, kind: Kind) -> Array:
    """Deviance without its constant at x, in internal units; differentiable in x and the design."""
    if isinstance(kind, Linear):
        cross = cross_products(design)
        return criterion(profile(x, cross, design.plan, design.terms), cross, float(kind.REML))
    return deviance_at(x, hint, design, kind.family, kind.curvature, kind.nAGQ)[0]


@partial(jax.jit, static_argnames=("kind",))
def _hessian(x: Array, hint: Any, design: Design, kind: Kind) -> Array:
    """(P, P) exact second derivatives of the deviance."""
    return jax.jacfwd(jax.grad(deviance))(x, hint, design, kind)


@partial(jax.jit, static_argnames=("kind",))
def _change_of_gradient(x: Array, hint: Any, design: Design, tangents: list[Array | None], kind: Kind) -> Array:
    """(P,) derivative of the deviance's gradient along tangents of the design's leaves, None where there is none."""
    leaves, tree = jax.tree.flatten(design)
    active = [i for i, d in enumerate(tangents) if d is not None]

    def gradient(values: list[Array]) -> Array:
        filled = list(leaves)
        for i, value in zip(active, values, strict=True):
            filled[i] = value
        return jax.grad(deviance)(x, hint, jax.tree.unflatten(tree, filled), kind)

    return jax.jvp(gradient, ([leaves[i] for i in active],), ([tangents[i] for i in active],))[1]


def _implicit_rule(kind: Kind, primals: Any, tangents: Any) -> tuple[Optimum, Optimum]:
    found, design = optimum(*primals, kind), primals[0]
    still = jax.tree.map(_no_tangent, found)
    moved = [None if is_symbolic_zero(d) else d for d in jax.tree.leaves(tangents[0], is_leaf=is_symbolic_zero)]
    if all(d is None for d in moved):
        return found, still
    K = differentiable_inverse(_hessian(found.x, found.hint, design, kind))
    return found, still._replace(x=-K @ _change_of_gradient(found.x, found.hint, design, moved, kind))


def _no_tangent(a: Array) -> Any:
    return jnp.zeros_like(a) if jnp.issubdtype(a.dtype, jnp.floating) else np.zeros(a.shape, jax.dtypes.float0)


optimum.defjvp(_implicit_rule, symbolic_zeros=True)


class Curvature(NamedTuple):
    """`problem.Curvature` in the graph."""

    values: Array  # (P,)
    vectors: Array  # (P, P)
    units: Array  # (P,)
    finite: Array  # ()


def curvature(H: Array) -> Curvature:
    """Eigen-decomposition of a Hessian, each parameter in units of its own curvature."""
    H = jax.lax.stop_gradient(H)
    finite = jnp.isfinite(H).all()
    H = jnp.where(finite, H, jnp.eye(H.shape[0], dtype=H.dtype))
    diagonal = jnp.abs(jnp.diagonal(H))
    units = 1.0 / jnp.sqrt(jnp.maximum(diagonal, jnp.maximum(LEAST_CURVATURE, LEAST_PART * diagonal.max())))
    values, vectors = jnp.linalg.eigh(H * jnp.outer(units, units))
    return Curvature(values, vectors, units, finite)


def pseudo_inverse(shape: Curvature) -> Array:
    """(P, P) inverse without the directions that the data do not determine; NaN if the Hessian is not finite."""
    root = shape.units[:, None] * shape.vectors
    flat = shape.values < FLAT
    weight = jnp.where(flat, 0.0, 1.0 / jnp.where(flat, 1.0, shape.values))
    return jnp.where(shape.finite, (root * weight) @ root.T, jnp.nan)


def differentiable_inverse(H: Array) -> Array:
    """The pseudo-inverse K of a Hessian with its derivative -K dH K."""
    K = pseudo_inverse(curvature(H))
    return 2.0 * K - K @ H @ K


def _runs_off(H: Array, layout: Layout, to_user: Array) -> Array:
    """(p,) which fixed effects move along directions that the data do not determine: they have no variance."""
    shape = curvature(H)
    root = to_user @ (shape.units[:, None] * shape.vectors)[layout.at.beta]
    moved = jnp.abs(root) > UNDETERMINED * jnp.linalg.norm(root, axis=1, keepdims=True)
    return (moved & (shape.values < FLAT)).any(axis=1)


# -------------------- what is reported of it


@partial(jax.jit, static_argnames=("kind", "covariance"))
def _estimates(
    found: Optimum,
    H: Array | None,
    design: Design,
    scaled: Design,
    scaling: Scaling,
    kind: Kind,
    covariance: bool,
) -> DesignFit:
    """Estimates in the user's units; H (P, P) where the covariance of beta is a part of its inverse."""
    if isinstance(kind, Linear):
        beta, phi, sigma, u, objective, vcov = _linear(found, scaled, kind)
    else:
        beta, phi, sigma, u, objective, vcov = _generalised(found, H, scaled, kind, covariance)
    A, layout = scaling.A, scaling.layout
    to_user = jax.scipy.linalg.solve_triangular(A, jnp.eye(design.p, dtype=A.dtype)) if design.p else A
    theta, beta = scaling.basis.inverse @ found.x[layout.at.theta], to_user @ beta
    if covariance:
        vcov = to_user @ vcov @ to_user.T
    if H is not None:
        at = jnp.arange(design.p)
        vcov = vcov.at[at, at].set(jnp.where(_runs_off(H, layout, to_user), jnp.inf, jnp.diagonal(vcov)))
    b = unspool(u, factors(theta, design))
    return DesignFit(
        theta=_canonical(theta, design.terms),
        beta=beta,
        phi=phi,
        sigma=sigma,
        b=u_from_blocks(b, design),
        eta=linear_predictor(b, beta, design),
        objective=objective,
        vcov=vcov if covariance else None,
        status=jnp.where(jnp.isfinite(objective) | (found.status == DEPENDENT), found.status, opt.NON_FINITE),
        evaluations=found.evaluations,
    )


def _generalised(found: Optimum, H: Array | None, design: Design, kind: Generalised, covariance: bool) -> Any:
    """beta, phi, sigma, u, objective and the covariance of beta in internal units."""
    x, layout = found.x, kind.layout(design)
    value, (carry, _) = deviance_at(x, found.hint, design, kind.family, kind.curvature, kind.nAGQ)
    log_phi = x[layout.at.log_phi]
    phi = jnp.where(log_phi < most_log_phi(log_phi.dtype), dispersions(log_phi), jnp.inf)
    vcov = None
    if H is not None:
        vcov = 2.0 * differentiable_inverse(H)[layout.at.beta, layout.at.beta]
    elif covariance:
        at = Parameters(x[layout.at.theta], carry.beta, phi)
        vcov = jnp.linalg.inv(pieces(at, carry.u, design, kind.family, kind.curvature)[1])
    return carry.beta, phi, jnp.ones_like(value), carry.u, value + log_density_constant(design, kind.family), vcov


def _linear(found: Optimum, design: Design, kind: Linear) -> Any:
    """The same of a linear model; its X is in the user's units."""
    cross = cross_products(design)
    at = profile(found.x, cross, design.plan, design.terms)
    reml, p = float(kind.REML), design.p
    sigma2 = at.r2 / (cross.n - reml * p)
    half = jax.scipy.linalg.solve_triangular(cross.A, jnp.eye(p, dtype=cross.A.dtype)) if p else cross.A
    vcov = sigma2 * half @ at.schur_inverse @ half.T
    beta = fixed_effects(at.beta, cross)
    return beta, jnp.zeros(0, sigma2.dtype), jnp.sqrt(sigma2), at.u, criterion(at, cross, reml), vcov
