"""Estimates of many datasets of one shape: units, restarts, and the judgement of every fit, vectorised on the host.

The same steps as `problem` takes for one fit, on the ends of searches that `lanes` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from ..families import LOG_PHI_MAX, Family, reported
from ..model.basis import cancelling_start, scale_many, scale_z
from ..model.design import Design, off_ridge
from ..model.parameters import Layout, Scaling
from . import optimise as opt
from .glmm import impossible
from .lanes import Ends, Engine, Generalised, Kind, Linear
from .lmm import EXACT, FINE, part_left
from .problem import (
    ANOTHER,
    BESIDE,
    CONCAVE,
    FAR,
    FLAT,
    LEAST_CURVATURE,
    LEAST_PART,
    NEAR_ZERO,
    SETTLINGS,
    UNDETERMINED,
    ZERO_COST,
    at_limit,
    barely_dispersed,
    safe_inverse,
)
from .separation import Separation, find, none_for_sure, run_off, settled, stand_in

#: Restarts from points that are no minima.
RESTARTS = 4
#: Eigenvalues of a Hessian up to this part of the largest are noise.
NOISE = 1e-10


@dataclass(frozen=True)
class Many:
    """Estimates of B datasets in the user's units, rows in their order.

    `covariance` is that of (theta, beta, log phi), without the directions that the data do not determine and infinite
    for coefficients that run off; for linear models and nAGQ = 0 only beta's part is there. `loglik` is of REML fits
    minus half the criterion. `decrement` is in deviance units.
    """

    theta: np.ndarray  # (B, t)
    beta: np.ndarray  # (B, p)
    phi: np.ndarray  # (B, n_phi)
    sigma: np.ndarray  # (B,)
    objective: np.ndarray  # (B,)
    vcov: np.ndarray  # (B, p, p) of beta
    df: np.ndarray  # (B, p) Satterthwaite's of the fixed effects; NaN where there are none
    converged: np.ndarray  # (B,)
    singular: np.ndarray  # (B,)
    flat: np.ndarray  # (B,) whether parameters are undetermined
    status: np.ndarray  # (B,) code of `optimise`
    decrement: np.ndarray  # (B,)
    evaluations: np.ndarray  # (B,)
    separated: np.ndarray  # (B,) whether coefficients run off, which then have infinite variances

    @staticmethod
    def together(parts: list[Many]) -> Many:
        """One after the other."""
        return Many(*(np.concatenate([getattr(p, name) for p in parts]) for name in Many.__dataclass_fields__))

    def at(self, rows: np.ndarray) -> Many:
        """Some datasets."""
        return Many(*(getattr(self, name)[rows] for name in Many.__dataclass_fields__))


def scale(design: Design, kind: Kind) -> tuple[Design, Scaling]:
    """Designs in internal units, and these with a leading axis of B or 1."""
    out, basis = scale_many(design)
    A = np.eye(design.p)
    if design.p and not isinstance(kind, Linear):
        A = np.linalg.qr(design.X, mode="r") / np.sqrt(design.X.shape[-2])
        out = replace(out, X=np.ascontiguousarray(design.X @ np.linalg.inv(A)))
    return out, Scaling(kind.layout(design), A if A.ndim == 3 else A[None], basis)


def fit_block(
    engine: Engine, design: Design, own: Any, count: int, limits: opt.Limits, start: dict[str, np.ndarray] | None = None
) -> Many:
    """Fit a block's first `count` datasets; those that are separated as `problem.estimate` does, without these rows.

    Args:
        design, own: as for `Engine.run`, in the user's units.
        start: "theta" (n_theta,) and "phi" (n_phi,) for all datasets alike.
    """
    fits = _fit_block(engine, design, own, count, limits, start)
    if isinstance(engine.kind, Linear):
        return fits
    family, found = engine.kind.family, _separations(engine.kind.family, design, own, count)  # type: ignore[attr-defined]
    if not found:
        return fits
    members = np.array(list(found))
    names = ("y", "X", "weights", "offset", "z")
    ones = [_one(design, own, i) for i in members]
    rest = [settled(one, found[i], family, found[i].A) for i, one in zip(members, ones, strict=True)]
    rest += rest[-1:] * (engine.block - members.size)
    which = np.concatenate([members, np.repeat(members[-1:], engine.block - members.size)])
    together = jax.tree.map(lambda leaf, flag: leaf[which] if flag else leaf, design, own)
    changed: dict[str, Any] = {}
    for name in names:
        changed[name] = jax.tree.map(lambda *leaves: np.stack(leaves), *[getattr(one, name) for one in rest])
    flags: dict[str, Any] = {name: jax.tree.map(lambda _: True, changed[name]) for name in names}
    refitted = _fit_block(engine, replace(together, **changed), replace(own, **flags), members.size, limits, start)
    for name in Many.__dataclass_fields__:
        getattr(fits, name)[members] = getattr(refitted, name)
    for i, one in zip(members, ones, strict=True):
        separation = found[i]
        X, offset = np.asarray(one.X, float), np.asarray(one.offset, float)
        fits.beta[i] = run_off(fits.beta[i], separation, X, offset, family.link)
        known = separation.projection @ fits.vcov[i] @ separation.projection.T
        fits.vcov[i] = separation.shown(known)
        fits.objective[i] -= stand_in(family, fits.phi[i], separation)
        fits.separated[i] = True
    return fits


def _one(design: Design, own: Any, i: int) -> Design:
    """The design of dataset i."""
    out: Design = jax.tree.map(lambda leaf, flag: leaf[i] if flag else leaf, design, own)
    return out


def _separations(family: Family, design: Design, own: Any, count: int) -> dict[int, Separation]:
    """What is separated, by dataset; most are none at first sight."""
    y = np.broadcast_to(design.y, (max(count, 1), np.shape(design.y)[-1])) if not own.y else design.y
    ends = family.ends(np.asarray(y[:count]))
    if ends is None:
        return {}
    there = np.broadcast_to(
        np.asarray(design.weights)[:count] > 0.0 if own.weights else design.weights > 0.0, ends.shape
    )
    X = np.asarray(design.X, float)
    A = np.linalg.qr(X, mode="r") / np.sqrt(X.shape[-2])
    Xs = X @ np.linalg.inv(A)
    unclear = np.flatnonzero(~none_for_sure(Xs[:count] if own.X else Xs, ends, there))
    out = {}
    for i in unclear:
        mine = (Xs[i], A[i]) if own.X else (Xs, A)
        found = find(mine[0], ends[i], there[i], mine[1])
        if found is not None:
            out[int(i)] = found
    return out


def _fit_block(
    engine: Engine, design: Design, own: Any, count: int, limits: opt.Limits, start: dict[str, np.ndarray] | None
) -> Many:
    """The same, as if nothing were separated; from two starts where `problem.estimate` takes two."""
    fits = _search_block(engine, design, own, count, limits, start)
    far = None if "theta" in (start or {}) else _cancelling(design, own, count)
    if far is None:
        return fits
    other = _search_block(engine, design, own, count, limits, {**(start or {}), "theta": far})
    better, evaluations = other.objective < fits.objective, fits.evaluations + other.evaluations
    for name in Many.__dataclass_fields__:
        getattr(fits, name)[better] = getattr(other, name)[better]
    return replace(fits, evaluations=evaluations)


def _cancelling(design: Design, own: Any, count: int) -> np.ndarray | None:
    """`cancelling_start` in the user's units, the median over the datasets that have one."""
    if not any(sum(t.block == g for t in design.terms) > 1 for g in range(len(design.z))):
        return None
    members = range(count if any(jax.tree.leaves(own.z)) else 1)
    found = []
    for one in (_one(design, own, i) for i in members):
        far = cancelling_start(one)
        if far is not None:
            found.append(scale_z(one)[1].outer(far))
    return np.median(found, axis=0) if found else None


def _search_block(
    engine: Engine, design: Design, own: Any, count: int, limits: opt.Limits, start: dict[str, np.ndarray] | None
) -> Many:
    """The same, from one start."""
    kind, start = engine.kind, start or {}
    scaled, scaling = scale(design, kind)
    layout = scaling.layout
    family = kind.family if isinstance(kind, Generalised) else None
    phi = np.zeros(0) if family is None else family.finite_start(start.get("phi", family.phi_start()))
    theta = off_ridge(scaling.basis.C[0] @ start["theta"], design.terms) if "theta" in start else design.theta_start
    dtype = np.asarray(design.y).dtype

    def revise(ends: Ends, repeat: Callable[..., Ends]) -> Ends:
        if family is not None and family.limit and layout.n_phi:
            ends = _settle_dispersions(ends, repeat, family, layout, design.y, limits)
        if not limits.hessian:
            return _settle_singular(ends, repeat, kind, layout)[0]
        ends = _settle(ends, repeat, kind, layout)
        if "theta" in start:
            return ends
        ends, moved = _other_signs(ends, repeat, layout)
        return _settle(ends, repeat, kind, layout) if moved else ends

    ends = engine.run(scaled, own, count, theta.astype(dtype), phi.astype(dtype), "theta" in start, limits, revise)
    ends = Ends(*(np.asarray(a, float) for a in ends))
    rows = (np.asarray(design.weights) > 0.0).sum(-1) * np.ones(engine.block)
    made = judge(ends, kind, scaling, limits, rows[:count])
    return _objections(made, ends, kind, design)


def _objections(made: Many, ends: Ends, kind: Kind, design: Design) -> Many:
    """`made` with what cannot be an estimate marked as such; see `problem.Problem.objection`."""
    status, n = made.status.copy(), np.shape(design.y)[-1]
    if isinstance(kind, Generalised):
        if kind.family.discrete:
            status[impossible(made.objective, n)] = opt.IMPOSSIBLE
    else:
        y, X, weights, offset = (np.asarray(a) for a in (design.y, design.X, design.weights, design.offset))
        size = (weights * np.square(y - offset)).sum(-1)
        for i in np.flatnonzero(ends.tail[:, 0] < FINE * np.resize(size, ends.tail.shape[0])):
            own = (a[i] if a.ndim > d else a for a, d in ((y, 1), (X, 2), (weights, 1), (offset, 1)))
            left = part_left(float(ends.tail[i, 0]), *own)
            if left < FINE:
                status[i] = opt.EXACT if left <= EXACT else opt.COARSE
    return replace(made, status=status, converged=made.converged & (status == opt.CONVERGED))


@dataclass(frozen=True)
class _Shape:
    """Eigen-decompositions of Hessians, each parameter in units of its own curvature (`problem.Curvature`)."""

    values: np.ndarray  # (B, P)
    vectors: np.ndarray  # (B, P, P)
    units: np.ndarray  # (B, P)
    finite: np.ndarray  # (B,)

    @property
    def flat(self) -> np.ndarray:
        return np.asarray((self.values < FLAT) & self.finite[:, None])

    @property
    def minimum(self) -> np.ndarray:
        return np.asarray(self.finite & (self.values.min(axis=1, initial=0.0) > CONCAVE))


def _shape(H: np.ndarray) -> _Shape:
    finite = np.isfinite(H).all((1, 2))
    H = np.where(finite[:, None, None], H, np.eye(H.shape[1]))
    diagonal = np.abs(np.diagonal(H, axis1=1, axis2=2))
    least = np.maximum(LEAST_CURVATURE, LEAST_PART * diagonal.max(axis=1, initial=0.0))
    units = 1.0 / np.sqrt(np.maximum(diagonal, least[:, None]))
    values, vectors = np.linalg.eigh(H * units[:, :, None] * units[:, None, :])
    return _Shape(values, vectors, units, finite)


def _settle(ends: Ends, repeat: Callable[..., Ends], kind: Kind, layout: Layout) -> Ends:
    """Minima in canonical form, as `problem` has them."""
    for _ in range(SETTLINGS):
        ends, settled = _settle_singular(_leave_saddles(ends, repeat), repeat, kind, layout)
        if _shape(ends.hessian[settled]).minimum.all():
            break
    return ends


def _other_signs(ends: Ends, repeat: Callable[..., Ends], layout: Layout) -> tuple[Ends, bool]:
    """Searches from correlations of the other sign, as in `problem`; whether any ended lower."""
    at, moved = layout.at.theta, False
    for term in filter(lambda term: term.structure.has_mirror, layout.terms):
        shape = _shape(ends.hessian)
        variance = (
            2.0
            * np.square(shape.units)
            * (np.square(shape.vectors) / np.maximum(shape.values, NOISE)[:, None, :]).sum(-1)
        )
        open_ = term.structure.undecided(ends.x[:, at][:, term.theta], variance[:, at][:, term.theta])
        which = np.flatnonzero(open_ & shape.finite & (ends.numbers[:, 2] == opt.CONVERGED))
        if not which.size:
            continue
        x = ends.x[which].copy()
        for theta in x[:, at]:
            theta[term.theta] = term.structure.mirrored(theta[term.theta])
        new = repeat(which, x, np.stack([safe_inverse(H) for H in ends.hessian[which]]))
        better = new.numbers[:, 0] < ends.numbers[which, 0] - ANOTHER
        ends = _replaced(ends, which, new, better)
        moved |= bool(better.any())
    return ends, moved


def _leave_saddles(ends: Ends, repeat: Callable[..., Ends]) -> Ends:
    """Restart along directions of negative curvature; see `problem`."""
    open_ = np.arange(ends.x.shape[0])
    for _ in range(RESTARTS):
        shape = _shape(ends.hessian[open_])
        bent = ~shape.minimum & shape.finite
        if not bent.any():
            return ends
        which = open_[bent]
        worst = np.argmin(shape.values[bent], axis=1)
        direction = shape.units[bent] * np.take_along_axis(shape.vectors[bent], worst[:, None, None], 2)[..., 0]
        trial = ends.x[which] + 0.3 * direction / np.abs(direction).max(axis=1, keepdims=True)
        inverse = np.stack([safe_inverse(H) for H in ends.hessian[which]])
        new = repeat(which, trial, inverse)
        better = new.numbers[:, 0] < ends.numbers[which, 0] - 1e-9
        ends = _replaced(ends, which, new, better)
        open_ = which[better]
        if not open_.size:
            return ends
    return ends


def _settle_dispersions(
    ends: Ends, repeat: Callable[..., Ends], family: Family, layout: Layout, y: np.ndarray, limits: opt.Limits
) -> Ends:
    """Fits at the family's limit where that costs nothing, as in `problem`; without Hessians those that ended far."""
    finite, last, rest = np.isfinite(ends.numbers[:, 0]), layout.at.log_phi, slice(layout.at.log_phi.start)
    far = np.resize(np.log(FAR * np.maximum(1.0, np.max(y, axis=-1))), finite.size)
    if not limits.hessian:
        x = np.array(ends.x)
        x[:, last] = np.where((finite & (x[:, last] > far[:, None]).all(1))[:, None], LOG_PHI_MAX, x[:, last])
        return ends._replace(x=x)
    which = np.flatnonzero(finite & np.array([barely_dispersed(H, layout) for H in ends.hessian], bool))
    if not which.size:
        return ends

    def moved(which: np.ndarray, log_phi: Any, limit: int | None = None) -> Ends:
        x = np.array(ends.x[which])
        x[:, last] = np.reshape(log_phi, (-1, 1))
        inverse = np.zeros((which.size, x.shape[1], x.shape[1]))
        inverse[:, last, last] = 1.0
        for i, H in enumerate(ends.hessian[which, rest, rest]):
            inverse[i, rest, rest] = safe_inverse(H) if np.isfinite(H).all() else np.eye(H.shape[0]) / y.shape[-1]
        return repeat(which, x, inverse, limit)

    new = moved(which, LOG_PHI_MAX)
    take = new.numbers[:, 0] <= ends.numbers[which, 0] + ZERO_COST
    ends = _replaced(ends, which, new, take)
    which = which[take]
    if not which.size:
        return ends
    inwards = moved(which, far[which], 1)
    ends = _replaced(ends, which, inwards, np.zeros(which.size, bool))
    which = which[(inwards.g[:, last] > 0.0).all(1)]
    if not which.size:
        return ends
    new = moved(which, np.log(family.phi_start()[-1]))
    return _replaced(ends, which, new, new.numbers[:, 0] < ends.numbers[which, 0] - ZERO_COST)


def _replaced(ends: Ends, which: np.ndarray, new: Ends, take: np.ndarray) -> Ends:
    """`new` in place of those of `which` to be taken; evaluations add up in any case."""
    out = Ends(*(np.array(a) for a in ends))
    spent = out.numbers[:, 3:].copy()
    spent[which] += new.numbers[:, 3:]
    for whole, part in zip(out, new, strict=True):
        whole[which[take]] = part[take]
    out.numbers[:, 3:] = spent
    return out


def _settle_singular(ends: Ends, repeat: Callable[..., Ends], kind: Kind, layout: Layout) -> tuple[Ends, np.ndarray]:
    """Columns of T near 0 at exactly 0, rank-deficient T re-factored, where that costs nothing, and the numbers of the
    datasets where that was done; see `problem`."""
    at = layout.at.theta
    theta = ends.x[:, at]
    proposal = theta.copy()
    for term in layout.terms:
        part = proposal[:, term.theta]
        near = np.flatnonzero(np.isfinite(part).all(axis=1) & term.structure.singular(part, NEAR_ZERO))
        part[near] = term.structure.settled(part[near], NEAR_ZERO)
    which = np.flatnonzero((proposal != theta).any(axis=1) & np.isfinite(ends.numbers[:, 0]))
    if not which.size:
        return ends, which
    x = ends.x[which].copy()
    x[:, at] = proposal[which]
    inverse = np.stack([safe_inverse(np.where(np.isfinite(H), H, 0.0)) for H in ends.hessian[which]])
    new = repeat(which, x, inverse, 1)
    take = new.numbers[:, 0] <= ends.numbers[which, 0] + ZERO_COST
    new.numbers[:, 1:3] = ends.numbers[which, 1:3]  # the search is still the first one
    ends = _replaced(ends, which, new, take)
    which = which[take]
    if isinstance(kind, Linear) and which.size:  # at an exact zero the curvature cannot be read off the gradient
        x = x[take]
        x[:, at] = [off_ridge(theta, layout.terms, BESIDE, BESIDE) for theta in x[:, at]]
        beside = repeat(which, x, inverse[take], 1)
        ends.hessian[which] = beside.hessian
        ends.numbers[which, 3:] += beside.numbers[:, 3:]
    return ends, which


def judge(ends: Ends, kind: Kind, scaling: Scaling, limits: opt.Limits, rows: np.ndarray) -> Many:
    """Estimates in the user's units, and whether each is a minimum.

    Args:
        scaling: as `scale`, of at least B datasets or all alike. rows: (B,) rows of each dataset.
    """
    B, P = ends.x.shape
    layout, at, p = scaling.layout, scaling.layout.at, scaling.layout.p
    f, status = ends.numbers[:, 0], ends.numbers[:, 2].astype(int)
    linear = isinstance(kind, Linear)

    hessian = ends.hessian if linear or limits.hessian else np.broadcast_to(np.eye(P), ends.hessian.shape)
    if not linear:  # the deviance does not depend on an infinite dispersion
        hessian = hessian + np.eye(P) * at_limit(kind.family, layout, ends.x)[:, None]  # type: ignore[attr-defined]
    shape = _shape(hessian)
    along = (shape.vectors.transpose(0, 2, 1) @ (shape.units * ends.g)[:, :, None])[..., 0]
    weight = np.where(shape.flat, 0.0, 1.0 / np.where(shape.flat, 1.0, shape.values))
    decrement = 0.5 * np.sum(weight * along**2, axis=1)
    use = shape.finite & np.isfinite(decrement) & bool(limits.hessian)
    decrement = np.where(use, decrement, ends.numbers[:, 1])
    theta = (scaling.basis.inverse[:B] @ ends.x[:, at.theta, None])[..., 0]
    for term in layout.terms:
        theta[:, term.theta] *= term.structure.flip(theta[:, term.theta])[0]
    theta += 0.0
    if p:
        solve = np.linalg.inv(scaling.A[:B])
        internal = ends.x[:, at.beta] if layout.has_beta else ends.tail[:, :p]
        beta = ends.tail[:, 1 : 1 + p] if linear else (solve @ internal[:, :, None])[..., 0]
    else:
        solve, beta = np.zeros((1, 0, 0)), np.zeros((B, 0))
    phi = reported(ends.x[:, at.log_phi])

    df = np.full((B, p), np.nan)
    if linear and kind.ddf:  # type: ignore[attr-defined]
        df = _satterthwaite(ends.more, theta.shape[1], p, rows - (p if kind.REML else 0))  # type: ignore[attr-defined]
    converged = np.asarray(shape.minimum & np.isfinite(f) & (decrement < 10.0 * float(limits.tol)))
    late = (status == opt.LINE_SEARCH) | (status == opt.EVALUATION_LIMIT)
    status = np.where(converged & late, opt.CONVERGED, status)
    status = np.where(~shape.minimum & (status == opt.CONVERGED), opt.NOT_MINIMUM, status)
    converged &= status == opt.CONVERGED

    sigma = np.ones(B)
    if linear:
        sigma = np.sqrt(ends.tail[:, 0] / (rows - (p if kind.REML else 0)))  # type: ignore[attr-defined]
        RX = ends.tail[:, 1 + p :].reshape(B, p, p)
        half = _inverse(RX)
        vcov = sigma[:, None, None] ** 2 * half @ half.transpose(0, 2, 1)
    elif not layout.has_beta:
        information = _inverse(ends.tail[:, p:].reshape(B, p, p))
        vcov = solve @ information @ solve.transpose(0, 2, 1)
    else:
        root = shape.units[:, :, None] * shape.vectors
        moved = np.abs(root) > UNDETERMINED * np.linalg.norm(root, axis=2, keepdims=True)
        off = (moved & shape.flat[:, None, :]).any(axis=2)[:, at.beta]
        mine = solve @ root[:, at.beta]
        vcov = 2.0 * (mine * weight[:, None, :]) @ mine.transpose(0, 2, 1)
        vcov[:, np.arange(p), np.arange(p)] = np.where(off, np.inf, np.diagonal(vcov, axis1=1, axis2=2))
    known = (shape.finite & bool(limits.hessian)) | (not layout.has_beta)
    vcov = np.where(known[:, None, None], vcov, np.nan)
    return Many(
        theta,
        beta,
        phi,
        sigma,
        f,
        vcov,
        df,
        converged,
        np.any([term.structure.singular(ends.x[:, at.theta][:, term.theta]) for term in layout.terms], axis=0),
        np.asarray(shape.flat.any(axis=1)),
        status,
        decrement,
        ends.numbers[:, 3].astype(int),
        np.zeros(B, bool),
    )


def _inverse(stack: np.ndarray) -> np.ndarray:
    """Inverses (B, p, p); NaN where there is none."""
    good = np.isfinite(stack).all((1, 2))
    safe = np.where(good[:, None, None], stack, np.eye(stack.shape[-1]))
    good &= np.linalg.cond(safe) < 1e15 if stack.shape[-1] else True
    out = np.linalg.inv(np.where(good[:, None, None], safe, np.eye(stack.shape[-1])))
    return np.where(good[:, None, None], out, np.nan)


def _satterthwaite(more: np.ndarray, t: int, p: int, size: np.ndarray) -> np.ndarray:
    """(B, p) degrees of freedom of the fixed effects; see `ddf.Satterthwaite`."""
    B = more.shape[0]
    parts = np.split(more, np.cumsum([t * t, p * p * t, p * p]), axis=1)
    H, slopes = parts[0].reshape(B, t, t), parts[1].reshape(B, p, p, t)
    covariance, A = parts[2].reshape(B, p, p), parts[3].reshape(B, p, p)
    rows = _inverse(A)  # beta = A^-1 beta_s
    v = np.einsum("bji,bik,bjk->bj", rows, covariance, rows)
    slope = np.einsum("bji,bikt,bjk->bjt", rows, slopes, rows)
    good = np.isfinite(H).all((1, 2))
    values, vectors = np.linalg.eigh(np.where(good[:, None, None], 0.5 * (H + H.transpose(0, 2, 1)), np.eye(t)))
    up = values > np.maximum(1e-8, NOISE * values[:, -1:])
    along = np.square(np.einsum("bjt,bts->bjs", slope, vectors))
    spread = 2.0 * (along * np.where(up, 1.0 / np.where(up, values, 1.0), 0.0)[:, None, :]).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(good[:, None], 2.0 * v**2 / (spread + 2.0 * v**2 / size[:, None]), np.nan)
