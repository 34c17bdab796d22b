"""Internal coordinates of random-effects terms: unit columns, and an orthonormal basis where columns nearly coincide.

A term (x | g) is the same model after x -> a + b x. Far from 0 the columns 1 and x point in nearly one direction, and
everything that looks along the coordinates (steps, differences, cross-products) loses the digits that make the
difference. With Z = Zs L, L (k, k) lower triangular and Zs'Zs = n I (a QL factorisation), the effects of Zs are L b,
and their factor is L T: lower triangular again and *linear* in theta. So theta_s = C theta with a constant matrix C,
the spherical effects u are the same, and ranks, zero columns and signs of columns stay what they are.

Columns that are well apart are divided by their root mean square only: then L and C are diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..compiling.memory import blocks, empty, triangle
from .design import Design, Leaf, Term

#: A term gets an orthonormal basis where less than this part of one of its columns (root mean square) is new beside
#: those after it, but not where it is less than so many units of rounding: that column is a combination of the others.
APART, DEPENDENT = 0.1, 500.0
#: The same part of a column computed from products, whose root loses half of the digits: below this it is nothing.
NOISE = 1e-6


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Basis:
    """Internal coordinates of the random-effects terms of a design; of designs side by side with a leading axis.

    Attributes:
        L: per block (k, k), lower triangular and block diagonal over its terms: z = zs L.
        C: (n_theta, n_theta), lower triangular: theta_s = C theta.
        inverse: of C, exactly 0 where C is.
    """

    L: tuple[Leaf, ...]
    C: Leaf
    inverse: Leaf

    @cached_property
    def diagonal(self) -> bool:
        """Whether there are units only."""
        return not np.any(self.C - np.diag(np.diag(self.C)))

    def inner(self, theta: np.ndarray) -> np.ndarray:
        """theta_s of theta (n_theta, ...)."""
        return np.asarray(self.C @ theta)

    def outer(self, theta_s: np.ndarray) -> np.ndarray:
        """theta of theta_s (n_theta, ...)."""
        if self.diagonal:
            return np.asarray(theta_s / np.diag(self.C).reshape(-1, *[1] * (theta_s.ndim - 1)))
        return np.asarray(self.inverse @ theta_s)


def mixes(term: Term, z: Any) -> bool:
    """Whether the covariance of a term is of its structure in every basis of its columns in z (..., n, k)."""
    return term.structure.any_basis and term.structure.k <= z.shape[-2]


def _units(rms: Any, block: int, terms: Sequence[Term]) -> Any:
    """Units (..., k) of a block's columns from their root mean squares, as the structures of its terms allow."""
    mine = sorted((t for t in terms if t.block == block), key=lambda t: t.first)
    parts = [t.structure.units(rms[..., t.columns]) for t in mine]
    return parts[0] if len(parts) == 1 else (jnp if isinstance(rms, Array) else np).concatenate(parts, axis=-1)


def to_inner(L: Sequence[Any], terms: Sequence[Term]) -> Any:
    """C (..., n_theta, n_theta) of L per block (..., k, k); C^-1 of L^-1."""
    lib: Any = jnp if isinstance(L[0], Array) else np
    parts = [t.structure.turn(L[t.block][..., t.columns, t.columns]) for t in terms]
    out = lib.zeros((*parts[0].shape[:-2], *[sum(p.shape[-1] for p in parts)] * 2), parts[0].dtype)
    for t, part in zip(terms, parts, strict=True):
        at = (..., t.theta, t.theta)
        if lib is np:
            out[at] = part
        else:
            out = out.at[at].set(part)
    return out


def inverse_of_lower(L: np.ndarray) -> np.ndarray:
    """Inverse of lower triangular matrices (..., k, k), itself exactly one: a general inverse pivots."""
    k = L.shape[-1]
    if k == 1:
        return np.asarray(1.0 / L)
    out, eye = np.zeros_like(L), np.eye(k)
    for i in range(k):
        known = (L[..., i, None, :i] @ out[..., :i, :])[..., 0, :]
        out[..., i, :] = (eye[i] - known) / L[..., i, i, None]
    return out


def _in_basis(z: np.ndarray, L: np.ndarray) -> np.ndarray:
    """zs (..., n, k) with z = zs L to rounding, by substitution: z L^-1 would be off by the condition of L."""
    out = empty(z.shape, z.dtype)
    for j in reversed(range(z.shape[-1])):
        known = (out[..., j + 1 :] @ L[..., j + 1 :, j, None])[..., 0]
        out[..., j] = (z[..., j] - known) / L[..., j, j, None]
    return out


def _new_parts(gram: np.ndarray) -> np.ndarray:
    """(..., k) root mean square of what each unit column has beside those after it, from their products (..., k, k)."""
    out = np.zeros(gram.shape[:-1])
    for j in reversed(range(gram.shape[-1])):
        out[..., j] = np.sqrt(np.maximum(gram[..., j, j], 0.0))
        column = gram[..., :, j] / np.where(out[..., j] > 0.0, out[..., j], np.inf)[..., None]
        gram = gram - column[..., :, None] * column[..., None, :]
    return out


def _apart(diagonal: Any) -> Any:
    """Whether unit columns with these new parts (..., k) stay as they are: well apart, or dependent."""
    least = abs(diagonal).min(-1)
    return (least >= APART) | ~(least > DEPENDENT * np.finfo(diagonal.dtype).eps)


def cancelling_start(design: Design) -> np.ndarray | None:
    """Internal theta (n_theta,) to search from as well, where columns of several terms on one factor nearly coincide.

    In (1 | g) + (0 + z | g) with z far from 0 a slope in the centred z is a difference of two large effects, which
    independent terms can have with large variances only: an optimum of its own, far from the first start. The start
    is in units of what one column has beside the others. None where no columns coincide, or all do.
    """
    if len(design.terms) == len(design.z):  # one term on each factor
        return None
    theta, found = design.theta_start, False
    for g, z in enumerate(design.z):
        terms = [t for t in design.terms if t.block == g]
        if len(terms) < 2:
            continue
        z = np.asarray(z)
        gram = sum(z[rows].T @ z[rows] for rows in blocks(z.shape[0]))
        units = np.sqrt(np.maximum(np.diag(gram), np.finfo(float).tiny))
        least = _new_parts(gram / np.outer(units, units)).min()
        if NOISE < least < APART:
            found = True
            for t in terms:
                theta[t.theta] /= np.where(t.structure.scales(), least, 1.0)
    return theta if found else None


def scale_z(design: Design) -> tuple[Design, Basis]:
    """The design with its random-effects columns in internal coordinates, and these."""
    zs, Ls = [], []
    for g, z in enumerate(design.z):
        z = np.asarray(z)
        n = z.shape[0]
        rms = np.sqrt(sum(np.square(z[rows]).sum(axis=0) for rows in blocks(n)) / n)
        rms = _units(np.where(rms > 0.0, rms, 1.0), g, design.terms)
        scaled, L = z if np.all(rms == 1.0) else np.divide(z, rms, out=empty(z.shape)), np.diag(rms)
        turned = False
        for t in design.terms:
            if t.block != g or not mixes(t, z):
                continue
            own = scaled[:, t.columns]
            if (_new_parts(sum(own[rows].T @ own[rows] for rows in blocks(n)) / n) >= APART).all():
                continue
            R = triangle(n, lambda rows, own=own: own[rows, ::-1])[::-1, ::-1] / np.sqrt(n)  # type: ignore[misc]
            if not _apart(np.diag(R)):
                L[t.columns, t.columns] = np.sign(np.diag(R))[:, None] * R * rms[t.columns]
                turned = True
        if turned:
            scaled = _in_basis(z, L)
        zs.append(scaled)
        Ls.append(L)
    inverses = [inverse_of_lower(L) for L in Ls]
    basis = Basis(tuple(Ls), to_inner(Ls, design.terms), to_inner(inverses, design.terms))
    return replace(design, z=tuple(zs)), basis


def scale_many(design: Design) -> tuple[Design, Basis]:
    """`scale_z` of datasets side by side, whose z is (B, n, k), or (n, k) for all alike; the basis is (B or 1, ...).

    Rows in which all columns are 0 do not count: they may be none.
    """
    zs: list[np.ndarray] = []
    Ls: list[np.ndarray] = []
    for g, whole in enumerate(design.z):
        z = whole if whole.ndim == 3 else whole[None]
        rows = np.maximum((z != 0.0).any(-1).sum(-1), 1)
        rms = np.sqrt(np.square(z).sum(-2) / rows[:, None])
        rms = _units(np.where(rms > 0.0, rms, 1.0), g, design.terms)
        scaled = z if np.all(rms == 1.0) else z / rms[:, None, :]
        L = rms[..., None] * np.eye(z.shape[-1])
        for t in design.terms:
            if t.block != g or not mixes(t, z):
                continue
            own = scaled[..., t.columns]
            new = _new_parts(own.swapaxes(1, 2) @ own / rows[:, None, None])
            which = np.flatnonzero((new < APART).any(-1))
            if not which.size:
                continue
            R = np.asarray(np.linalg.qr(own[which, :, ::-1], mode="r"))
            R = R[:, ::-1, ::-1] / np.sqrt(rows[which])[:, None, None]
            diagonal = np.diagonal(R, axis1=1, axis2=2)
            turn = ~_apart(diagonal)
            R, which = (np.sign(diagonal)[:, :, None] * R)[turn], which[turn]
            L[which, t.columns, t.columns] = R * rms[which, None, t.columns]
            scaled = np.array(scaled)
            scaled[which, :, t.columns] = _in_basis(z[which, :, t.columns], L[which, t.columns, t.columns])
        zs.append(scaled if whole.ndim == 3 else scaled[0])
        Ls.append(L)
    B = max(L.shape[0] for L in Ls)
    Ls = [np.broadcast_to(L, (B, *L.shape[1:])) for L in Ls]
    inverses = [inverse_of_lower(L) for L in Ls]
    basis = Basis(tuple(Ls), to_inner(Ls, design.terms), to_inner(inverses, design.terms))
    return replace(design, z=tuple(zs)), basis


def scale_traced(design: Design) -> tuple[Design, Basis]:
    """`scale_z` of traced arrays; the basis is constant to derivatives."""
    zs: list[Array] = []
    Ls: list[Array] = []
    inverses: list[Array] = []
    for g, z in enumerate(design.z):
        fixed = jax.lax.stop_gradient(z)
        rms = jnp.sqrt(jnp.mean(jnp.square(fixed), axis=0))
        rms = _units(jnp.where(rms > 0.0, rms, 1.0), g, design.terms)
        L = jnp.diag(rms)
        scaled = z / rms
        turned = jnp.zeros((), bool)
        for t in design.terms:
            if t.block != g or not mixes(t, z):
                continue
            own = fixed[:, t.columns] / rms[t.columns]
            R = jnp.linalg.qr(own[:, ::-1], mode="r")[::-1, ::-1] / z.shape[0] ** 0.5
            diagonal = jnp.diagonal(R)
            apart = _apart(diagonal)
            R = jnp.where(apart, jnp.eye(t.structure.k, dtype=z.dtype), jnp.sign(diagonal)[:, None] * R)
            L = L.at[t.columns, t.columns].set(R * rms[t.columns])
            turned |= ~apart
        inverse = jax.scipy.linalg.solve_triangular(L, jnp.eye(L.shape[0], dtype=z.dtype), lower=True)
        if any(t.block == g and mixes(t, z) for t in design.terms):
            scaled = jnp.where(turned, jax.scipy.linalg.solve_triangular(L.T, z.T).T, scaled)
        zs.append(scaled)
        Ls.append(L)
        inverses.append(inverse)
    basis = Basis(tuple(Ls), to_inner(Ls, design.terms), to_inner(inverses, design.terms))
    return replace(design, z=tuple(zs)), basis
