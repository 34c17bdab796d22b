"""Separated responses: directions in which the likelihood rises for ever, found from the data alone.

A row whose response lies at an end of its range (successes only, failures only, a count of 0) has a likelihood that
rises all the way as eta goes to one end, t = 1 or -1 (`Family.ends`); other rows, t = 0, have theirs at a finite eta.
For any theta the likelihood, marginal or conditional, has its supremum at infinity exactly if X has a direction of
recession d: t_i x_i'd >= 0 in every row, 0 where t_i = 0, and > 0 in some. The rows where some d has it > 0 are the
*separated* ones. There is a d for all of them together, and along it they say nothing in the limit: what remains is the
likelihood of the other rows.

By Stiemke's lemma the opposite has a proof, too: nothing is separated exactly if X has full rank and there are
multipliers with sum c_i x_i = 0 and c_i t_i > 0 wherever t_i is not 0. Such multipliers are the scores of a logistic
regression at its maximum, and all that is needed is to come near it: approximate ones that can be corrected without a
change of sign are a proof. Those of the linear regression of t on X do for most data, which is one pass over the rows.
Where they do not, Newton's method for the logistic regression finds either multipliers, or the separated rows with a
direction for them and multipliers for the rest, which is a proof as well. Only if rounding prevents both is a linear
programme solved. No decision depends on the units or origins of columns, nor on where a search for the estimates
stopped.

Sources: Albert & Anderson 1984, Biometrika 71(1); Konis 2007, Linear programming algorithms for detecting separated
data (thesis, Oxford); Correia, Guimaraes & Zylkin 2019, arXiv:1903.01633 (counts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np

from .. import links
from ..algebra.linalg import block_diagonal
from ..compiling.entry import entry
from ..families import Family, dispersions, log_of
from ..links import Link
from ..model.design import Design
from ..model.parameters import Layout

if TYPE_CHECKING:
    from .problem import Estimates

#: A correction of multipliers that leaves this part of each of them has not changed a sign by rounding.
MARGIN = 1e-3
#: Squared length, relative to the largest, below which a direction is not among those of some rows.
WITHIN = 1e-11
#: Newton's method stops when the rest that it can gain is this; rows with a smaller score than SETTLED are separated.
GAIN, SETTLED = 1e-11, 1e-8
MOST_STEPS = 80
#: Longest step in eta, beside as far again as it has come; and the least move of a row, relative to the largest.
FARTHEST, LEAST_MOVE = 30.0, 1e-8
#: After every so many steps rows with a score below TRY_BELOW are tried as the separated ones.
TRY_EVERY, TRY_BELOW = 5, 0.02
#: Rows that are looked at first, and how many times more are looked at next: rows enough prove for all.
FIRST_ROWS, MORE_ROWS = 4096, 16
#: eta of separated rows where the estimates are reported; and that of rows that stand in, inside any link's range.
FAR, FAR_CAUCHY, ETA = 30.0, 1e8, -1.0
#: Part of a combination of coefficients that lies along undetermined directions.
TOUCHES = 1e-6


@dataclass(frozen=True)
class Separation:
    """Which rows are separated, and what the others determine.

    Attributes:
        rows: (n,) the separated rows. ends: (n,) int8 as `Family.ends`.
        null: (p, k) orthonormal basis, in internal units (`Scaling`), of what the other rows do not determine.
        kept: (p, p - k) its orthogonal complement.
        direction: (p,) in internal units; moves eta of separated rows towards their ends, by at least 1, and of no
            others.
        A: (p, p) of the internal units.
    """

    rows: np.ndarray
    ends: np.ndarray
    null: np.ndarray
    kept: np.ndarray
    direction: np.ndarray
    A: np.ndarray

    @property
    def projection(self) -> np.ndarray:
        """(p, p) from coefficients to coefficients without the undetermined part, in the user's units."""
        return np.asarray(np.linalg.solve(self.A, self.kept @ (self.kept.T @ self.A)))

    def known(self, beta: np.ndarray) -> np.ndarray:
        """(p,) what is determined of coefficients."""
        return np.asarray(self.projection @ beta)

    def kept_of(self, layout: Layout) -> np.ndarray:
        """(P, P - k) directions of all parameters, in the user's units, whose coefficients move within `basis`."""
        before, after = layout.at.beta.start, layout.size - layout.at.beta.stop
        return block_diagonal([np.eye(before), self.basis, np.eye(after)])

    def information(self, I: np.ndarray) -> np.ndarray:
        """(p, p) information, in internal units, but for rounding that of what is determined; definite."""
        own = self.kept @ (self.kept.T @ I @ self.kept) @ self.kept.T
        return np.asarray(own + 1e-16 * np.trace(I) * self.null @ self.null.T)

    def vague(self, V: np.ndarray) -> np.ndarray:
        """A covariance of the determined part (p, p) with very large variances along what is not determined."""
        far = np.linalg.solve(self.A, self.null)
        far = far / np.linalg.norm(far, axis=0)
        return np.asarray(V + 1e8 * np.abs(V).max(initial=1.0) * far @ far.T)

    def touches(self, L: np.ndarray) -> np.ndarray:
        """(r,) which linear combinations L (r, p) of the coefficients are not determined."""
        own = np.linalg.solve(self.A.T, np.asarray(L, float).T).T
        size = np.linalg.norm(own, axis=1)
        along = np.linalg.norm(own @ self.null, axis=1)
        return np.asarray(along > TOUCHES * np.where(size > 0.0, size, 1.0))

    @property
    def columns(self) -> np.ndarray:
        """(p,) which coefficients are not determined."""
        return self.touches(np.eye(self.A.shape[0]))

    @property
    def alone(self) -> np.ndarray:
        """(p,) which of them are so whatever the others are: their columns are 0 but in separated rows."""
        size = np.linalg.norm(self.A, axis=0)
        return np.asarray(np.linalg.norm(self.kept.T @ self.A, axis=0) < TOUCHES * size)

    @property
    def basis(self) -> np.ndarray:
        """(p, p - k) basis, in the user's units, of a complement of what is not determined."""
        return np.asarray(np.linalg.solve(self.A, self.kept))

    def shown(self, V: np.ndarray, first: int = 0) -> np.ndarray:
        """A covariance as it is reported: infinite variances, and covariances of 0, of undetermined coefficients.

        Args:
            V: of parameters, the coefficients from number `first` on; its values are those of what is determined.
        """
        out, at = V.copy(), first + np.flatnonzero(self.columns)
        out[at], out[:, at] = 0.0, 0.0
        out[at, at] = np.inf
        return out

    def determined_part(self, L: np.ndarray) -> np.ndarray:
        """(s, r) combinations of the rows of L (r, p) that are determined, s as many as there are."""
        own = np.linalg.solve(self.A.T, L.T).T
        size = np.linalg.norm(own, axis=1)
        size = np.where(size > 0.0, size, 1.0)
        left, values, _ = np.linalg.svd((own / size[:, None]) @ self.null)
        rank = int((values > TOUCHES).sum())
        return np.asarray(left[:, rank:].T / size)


def find(
    Xs: np.ndarray, ends: np.ndarray, there: np.ndarray, A: np.ndarray, near: Callable[[], np.ndarray] | None = None
) -> Separation | None:
    """The separated rows of a design; None if there are none.

    Args:
        Xs: (n, p), its columns about orthogonal and of length sqrt(n). ends: (n,) as `Family.ends`. there: (n,) which
            rows count.
        A: (p, p) with X = Xs A in the user's units.
        near: (p,) coefficients of Xs whose scores may serve as multipliers, which saves time and decides nothing;
            asked for where they are needed, as they may still be computed.
    """
    n, p = Xs.shape
    ends = np.where(there, ends, 0).astype(np.int8)
    if not p or not ends.any():
        return None
    present = np.arange(n) if there.all() else np.flatnonzero(there)
    size = FIRST_ROWS
    while size < present.size:  # rows without a direction of recession, of full rank: nor has any larger set one
        some = present[:: -(-present.size // size)]
        if _regression(Xs[some], ends[some].astype(float), near) is None:
            return None
        size *= MORE_ROWS
    own, t = Xs if present.size == n else Xs[present], ends[present].astype(float)
    at = _regression(own, t, near)
    if at is None:
        return None
    if not at.proved:
        at = _programme(own, t)
        if at is None:
            return None
    separated, direction = at.rows, at.direction
    null, kept = _null(own[~separated], own.shape[0])
    rows = np.zeros(n, bool)
    rows[present] = separated
    if not separated.any() or not null.shape[1]:
        return None
    direction = null @ (null.T @ direction)
    least = (t * (own @ direction))[separated].min()
    return Separation(rows, ends, null, kept, direction / max(float(least), 1e-300), A)


# -------------------- the fit of what is determined
@entry
def settled(design: Design, separation: Separation, family: Family, A: np.ndarray | None = None) -> Design:
    """The design without its separated rows, of the same shape and of full rank; X = Xs A, or Xs itself without A.

    They have weight 0, but for as many as there are undetermined directions: these stand in for a prior of each
    direction, with no random effects, a response that is the mean at ETA and an offset of ETA, so that their optimum is
    where beta has no part along these directions, whatever the other parameters.
    """
    n, gone = design.n, separation.rows | ~(np.asarray(design.weights) > 0.0)
    place = np.flatnonzero(gone)[: separation.null.shape[1]]
    mean = float(family.link.inverse(jnp.asarray([ETA]))[0])
    columns = {name: np.array(getattr(design, name)) for name in ("y", "X", "weights", "offset")}
    columns["X"][gone], columns["weights"][gone], columns["offset"][gone] = 0.0, 0.0, ETA
    columns["y"][place], columns["weights"][place] = mean, _weight(family)
    columns["X"][place] = np.sqrt(n) * (separation.null.T if A is None else separation.null.T @ A)
    z = tuple(np.array(part) for part in design.z)
    for part in z:
        part[place] = 0.0
    return replace(design, z=z, **columns)  # type: ignore[arg-type]


def _weight(family: Family) -> float:
    """Of rows that stand in: where there is a dispersion, so little that they hardly tell of it (1e-4 of a row)."""
    return 1e-4 if family.phi_names else 1.0


@entry
def stand_in(family: Family, phi: np.ndarray, separation: Separation) -> float:
    """The part of the deviance that rows standing in have at their optimum."""
    eta, weight = jnp.asarray([ETA]), jnp.asarray([_weight(family)])
    y = family.link.inverse(eta)
    value = family.kernel(y, eta, weight, dispersions(jnp.asarray(log_of(phi)))) + family.constant(y, weight)
    return -2.0 * separation.null.shape[1] * float(value[0])


def unsettled(
    estimates: Estimates, separation: Separation, design: Design, family: Family, layout: Layout, extra: float
) -> Estimates:
    """Estimates of `settled` in the limit those of the design, without the part of rows that stand in.

    Args:
        layout: of the search. extra: as `stand_in`.
    """
    beta = run_off(estimates.beta, separation, np.asarray(design.X), np.asarray(design.offset), family.link)
    changed = np.eye(estimates.hessian.shape[0])
    if layout.has_beta:
        changed[layout.at.beta, layout.at.beta] = separation.projection
    unknown = ~np.isfinite(np.diag(estimates.covariance))
    covariance = changed @ np.where(unknown[:, None] | unknown, 0.0, estimates.covariance) @ changed.T
    covariance[unknown, unknown] = np.inf
    path = estimates.stats.path.copy()
    path[:, -2:-1] -= extra
    return replace(
        estimates,
        beta=beta,
        objective=_whole_zero(estimates.objective - extra, extra),
        gradient=changed.T @ estimates.gradient,
        hessian=changed.T @ estimates.hessian @ changed,
        covariance=covariance,
        stats=replace(estimates.stats, path=path),
        separation=separation,
    )


def _whole_zero(deviance: float, parts: float) -> float:
    """The deviance, 0 where it is what rounding leaves of its parts: no probability is above 1."""
    return 0.0 if abs(deviance) < 1e-13 * (1.0 + abs(parts)) else deviance


def run_off(beta: np.ndarray, separation: Separation, X: np.ndarray, offset: np.ndarray, link: Link) -> np.ndarray:
    """Coefficients (p,) moved so far that the likelihoods of separated rows are 1 but for rounding.

    The tail of the Cauchy distribution is heavy. Longer ways than 1e10 would move the other rows by rounding.
    """
    known = separation.known(beta)
    eta = (offset + X @ known)[separation.rows]
    wanted = FAR_CAUCHY if link is links.cauchit else FAR
    way = max(wanted - float((separation.ends[separation.rows] * eta).min()), 0.0)
    way = min(way, 1e10 / max(float(np.abs(separation.direction).max()), 1.0))
    return np.asarray(known + way * np.linalg.solve(separation.A, separation.direction))


# -------------------- the certificate
def none_for_sure(X: np.ndarray, ends: np.ndarray, there: np.ndarray) -> np.ndarray:
    """(B,) of many data sets, those of which the first proof shows that nothing is separated.

    Args:
        X: (B, n, p) or (n, p) for all alike. ends, there: (B, n).
    """
    t = np.where(there, ends, 0.0)
    B, p = t.shape[0], X.shape[-1]
    if not p:
        return np.ones(B, bool)
    if X.ndim == 2 and there.all():
        gram = (X.T @ X)[None]
    else:
        rows = np.broadcast_to(X, (B, *X.shape[-2:])) * there[:, :, None]
        gram = rows.transpose(0, 2, 1) @ rows
    size = np.sqrt(np.maximum(np.diagonal(gram, axis1=1, axis2=2), np.finfo(float).tiny))
    gram = gram / (size[:, :, None] * size[:, None, :])
    right = (t @ X if X.ndim == 2 else np.einsum("bn,bnp->bp", t, X)) / size
    known = np.isfinite(gram).all((1, 2))
    gram = np.where(known[:, None, None], gram, np.eye(p))
    known &= np.linalg.eigvalsh(gram)[:, 0] > 1e-9
    gram = np.where(known[:, None, None], gram, np.eye(p))
    move = np.linalg.solve(gram, right[:, :, None])[..., 0] / size
    fitted = move @ X.T if X.ndim == 2 else np.einsum("bnp,bp->bn", X, move)
    return np.asarray(np.broadcast_to(known, B) & ((t * fitted).max(axis=1, initial=0.0) < 1.0 - MARGIN))


def _proof(X: np.ndarray, t: np.ndarray, w: np.ndarray) -> bool:
    """Whether multipliers t w can be corrected to a proof that nothing is separated: sum c_i x_i = 0, c_i t_i > 0.

    The correction is the least one relative to w; rows of t = 0 may have any multiplier, and are given 0 to start with.
    """
    p = X.shape[1]
    weight = np.where(t == 0.0, 1.0, w)
    scaled = weight[:, None] * X
    gram = scaled.T @ scaled
    values, vectors = np.linalg.eigh(gram)
    if not values[0] > WITHIN * max(values[-1], np.finfo(float).tiny) or p == 0:
        return False
    change = scaled @ (vectors @ ((vectors.T @ (X.T @ (t * w))) / values))
    return bool((t * change).max(initial=0.0) < 1.0 - MARGIN)


def _null(X: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal bases of the directions that rows X (r, p) of a design of n such rows do not determine, and do."""
    values, vectors = np.linalg.eigh(X.T @ X)
    small = values < WITHIN * n
    return vectors[:, small], vectors[:, ~small]


class _End(NamedTuple):
    """Separated rows (n,) and a direction (p,) for them, and whether there is a proof."""

    rows: np.ndarray
    direction: np.ndarray
    proved: bool


def _regression(X: np.ndarray, t: np.ndarray, near: Callable[[], np.ndarray] | None) -> _End | None:
    """None where it is proved that nothing is separated. X (n, p) has about orthogonal columns of one length."""
    n, p = X.shape
    end = t != 0.0
    if _proof(X, t, np.ones(n)):
        return None
    guess = None if near is None else near()
    if guess is not None and np.isfinite(guess).all() and _proof(X, t, _logistic(-t * (X @ guess))):
        return None
    d, own = np.zeros(p), np.zeros(n)
    for step_number in range(1, MOST_STEPS + 1):
        w = _logistic(-t * own)
        if _proof(X, t, w):
            return None
        if step_number % TRY_EVERY == 0:
            rows = end & (w < TRY_BELOW)
            if _whole(X, t, w, d, rows):
                return _End(rows, d, True)
        gradient = X.T @ np.where(end, -t * w, own)
        H = X.T @ (np.where(end, w * (1.0 - w), 1.0)[:, None] * X)
        size = 1.0 / np.sqrt(np.maximum(np.diag(H), np.finfo(float).tiny))
        values, vectors = np.linalg.eigh(H * np.outer(size, size))
        step = -size * (vectors @ ((vectors.T @ (size * gradient)) / np.maximum(values, 1e-14)))
        if -0.5 * float(gradient @ step) < GAIN:
            break
        value = _loss(t, own)
        # the curvature of rows far out is rounding: no leaps along it
        step *= min(1.0, (FARTHEST + np.abs(own).max()) / max(float(np.abs(X @ step).max()), 1e-300))
        for _ in range(30):
            moved = X @ (d + step)
            if _loss(t, moved) <= value:
                break
            step = 0.5 * step
        d, own = d + step, moved
    rows = end & (w < SETTLED)
    return _End(rows, d, _whole(X, t, w, d, rows))


def _logistic(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0.0, 1.0, e) / (1.0 + e))


def _loss(t: np.ndarray, own: np.ndarray) -> float:
    """What the regression minimises: a logistic loss of rows with an end, a quadratic one that holds the others."""
    each = np.where(t == 0.0, 0.5 * own * own, np.maximum(-t * own, 0.0) + np.log1p(np.exp(-np.abs(own))))
    return float(each.sum())


def _whole(X: np.ndarray, t: np.ndarray, w: np.ndarray, d: np.ndarray, rows: np.ndarray) -> bool:
    """Whether these are proved to be the separated rows, all of them and no other: d for them, w for the rest."""
    null, kept = _null(X[~rows], X.shape[0])
    moved = t * (X @ (null @ (null.T @ d)))
    if not rows.any() or not null.shape[1] or not moved[rows].min() > LEAST_MOVE * np.abs(moved).max():
        return False
    return not kept.shape[1] or _proof(X[~rows] @ kept, t[~rows], w[~rows])


def _programme(X: np.ndarray, t: np.ndarray) -> _End | None:
    """The same by a linear programme: the largest sum of z, z_i <= t_i x_i'd, 0 <= z_i <= 1, x_i'd = 0 where t_i = 0.

    As d may be as long as it likes, each z_i is 1 in separated rows and 0 in others.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, eye_array, hstack

    null, _ = _null(X[t == 0.0], X.shape[0])
    if not null.shape[1]:
        return None
    rows = t[:, None] * (X @ null)
    size = np.abs(rows).max(axis=1)
    able = (t != 0.0) & (size > 1e-9 * size.max(initial=0.0))  # others cannot move
    unique, back = np.unique(rows[able] / size[able, None], axis=0, return_inverse=True)
    m, k = unique.shape
    cost = np.concatenate([np.zeros(k), -np.ones(m)])
    bounds = [(None, None)] * k + [(0.0, 1.0)] * m
    found = linprog(cost, hstack([csr_array(-unique), eye_array(m)]), np.zeros(m), bounds=bounds, method="highs")
    if found.x is None:
        return None
    separated = np.zeros(X.shape[0], bool)
    separated[able] = (found.x[k:] > 0.5)[back.reshape(-1)]
    return _End(separated, null @ found.x[:k], False) if separated.any() else None
