"""Covariance structures of random-effects terms: theta <-> relative factor T, and sd/correlation views.

A structure is a frozen, hashable object that maps its slice of theta to the k x k factor T of
Cov(b) = (sigma^2) T T'. Nothing outside this module knows that the unstructured one is a triangle.
Source: Bates et al. 2015, J. Stat. Softw. 67(1), section 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

#: Deviance units that a correlation of +-1 costs, and one of 0, where the other sign is tried: by the Hessian, which
#: knows one side only.
ON_EDGE, OF_SIGN = 2.0, 5.0
#: Correlation of two effects at the other sign, unless the estimates have +-1.
MIRRORED = 0.95
#: Of more effects some are always undecided, and there are 2^(k - 1) ways to choose their signs.
MOST_MIRRORED = 3


@cache
def _lower_by_columns(k: int) -> tuple[np.ndarray, np.ndarray]:
    # int32: JAX keeps index arithmetic between 64 and 32 bit modes, where int64 no longer fits its own sizes
    cols, rows = (index.astype(np.int32) for index in np.triu_indices(k))
    return rows, cols


@cache
def _position_in_theta(k: int) -> np.ndarray:
    """(k, k) position of each entry of T in theta; one past its end above the diagonal."""
    rows, cols = _lower_by_columns(k)
    out = np.full((k, k), rows.size, np.int32)
    out[rows, cols] = np.arange(rows.size)
    return out


def _library(x: Any) -> Any:
    """jax.numpy for traced arrays, NumPy for those on the host: there it saves dispatches."""
    return jnp if isinstance(x, Array) else np


@dataclass(frozen=True)
class Unstructured:
    """Any k x k covariance; theta is the lower triangle of T, column by column (lme4)."""

    k: int

    @property
    def n_theta(self) -> int:
        return self.k * (self.k + 1) // 2

    def index(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of T in the order of theta."""
        return _lower_by_columns(self.k)

    def factor(self, theta: Array) -> Array:
        """(n_theta,) -> T, (k, k) lower triangular."""
        # a gather, which fuses with what uses T, where a scatter does not
        return jnp.concatenate([theta, jnp.zeros(1, theta.dtype)])[_position_in_theta(self.k)]

    def host_factor(self, theta: np.ndarray) -> np.ndarray:
        """`factor` in NumPy: on the host it saves a dozen dispatches."""
        T = np.zeros((self.k, self.k))
        T[self.index()] = theta
        return T

    def theta_of(self, T: Any) -> Any:
        """T (k, k) lower triangular -> theta."""
        return T[self.index()]

    def start(self) -> np.ndarray:
        """Identity T."""
        return self.theta_of(np.eye(self.k))

    def theta_near(self, cov: Any) -> Any:
        """theta of the covariance (k, k) of this structure nearest to cov, which is positive definite."""
        return _cholesky(cov)[self.index()]

    def curvature(self, theta: Any, m: Any, reliability: Any) -> Any:
        """Rough second derivatives of the deviance in theta (n_theta,), from m levels.

        For one column that is 4 m r^2 / theta^2, the expected information of a balanced Gaussian design,
        r being the reliability of the conditional modes.
        """
        rows, cols = self.index()
        T = self.factor(theta) if isinstance(theta, Array) else self.host_factor(theta)
        scale = (T**2).sum(axis=1) ** 0.5
        size = np.where(rows == cols, 4.0, 2.0) * m
        return size * reliability[rows] * reliability[cols] / scale[rows] ** 2

    def on_diagonal(self) -> np.ndarray:
        """Which entries of theta lie on the diagonal of T."""
        rows, cols = self.index()
        return rows == cols

    def turn(self, L: Any) -> Any:
        """C (..., n_theta, n_theta) with theta -> C theta when T becomes L T (z becomes z L^-1), L lower triangular."""
        rows, cols = self.index()
        return L[..., rows[:, None], rows] * (cols[:, None] == cols)

    def flip(self, T: Any) -> Any:
        """Signs (k,) that make T's columns canonical: diagonal >= 0, or the first non-zero entry > 0."""
        lib = _library(T)
        first = lib.argmax(T != 0.0, axis=0)  # above the diagonal there are zeros only
        return lib.where(T[first, np.arange(self.k)] < 0.0, -1.0, 1.0)

    def moved(self, theta: Array, change: Array) -> Array:
        """theta after a step that changes the covariance as `theta + change` does to first order, but does not turn T.

        Where a leading part of T is nearly singular, T T' hardly changes as the later columns turn into each other: a
        curved valley in theta, along which straight steps must be short. Among all k x k factors of T T' the part T W
        of a change, W antisymmetric, is such a turn; it is left out, and the result made triangular again.
        """
        T, rest = self.factor(theta), self.factor(change)
        squares = (T * T).sum(0)
        size = (squares[:, None] + squares + np.finfo(T.dtype).tiny) * max(1, self.k - 1)
        for _ in range(min(self.k - 1, 3)):  # |rest|^2 in W, by descent; with two columns its minimum
            along = T.T @ rest
            rest = rest - T @ ((along - along.T) / size)
        return self.theta_of(semidefinite_cholesky((T + rest) @ (T + rest).T))

    def theta_names(self, group: str, names: tuple[str, ...]) -> list[str]:
        """lme4's names: ``g.x`` on the diagonal, ``g.y.x`` below it."""
        rows, cols = self.index()
        return [
            f"{group}.{names[r]}" if r == c else f"{group}.{names[r]}.{names[c]}"
            for r, c in zip(rows, cols, strict=True)
        ]


@dataclass(frozen=True)
class Diagonal:
    """Independent columns with their own standard deviations; theta is the diagonal of T."""

    k: int

    @property
    def n_theta(self) -> int:
        return self.k

    def factor(self, theta: Array) -> Array:
        return jnp.diag(theta)

    def host_factor(self, theta: np.ndarray) -> np.ndarray:
        return np.diag(theta)

    def theta_of(self, T: Any) -> Any:
        return _library(T).diagonal(T).copy()

    def start(self) -> np.ndarray:
        return np.ones(self.k)

    def theta_near(self, cov: Any) -> Any:
        return _library(cov).sqrt(_library(cov).diagonal(cov))

    def curvature(self, theta: Any, m: Any, reliability: Any) -> Any:
        return 4.0 * m * (reliability / theta) ** 2

    def on_diagonal(self) -> np.ndarray:
        return np.ones(self.k, bool)

    def turn(self, L: Any) -> Any:
        return L * np.eye(self.k, dtype=bool)

    def flip(self, T: Any) -> Any:
        lib = _library(T)
        return lib.where(lib.diagonal(T) < 0.0, -1.0, 1.0)

    def moved(self, theta: Array, change: Array) -> Array:
        return theta + change

    def theta_names(self, group: str, names: tuple[str, ...]) -> list[str]:
        return [f"{group}.{name}" for name in names]


Structure = Unstructured | Diagonal


def cov_to_sdcor(cov: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Covariance (k, k) -> standard deviations (k,) and correlations (k, k); NaN where an sd is 0."""
    sd = np.sqrt(np.diag(cov))
    with np.errstate(divide="ignore", invalid="ignore"):
        corr = cov / np.outer(sd, sd)
    np.fill_diagonal(corr, 1.0)
    return sd, corr


def _cholesky(cov: Any) -> Any:
    """Lower T with T T' = cov; small ones column by column, which needs no LAPACK (see `_linalg.one_inverse`)."""
    lib, k = _library(cov), cov.shape[0]
    if k > 4:
        return lib.linalg.cholesky(cov)
    rest, columns = cov, []
    for j in range(k):
        column = lib.where(np.arange(k) >= j, rest[:, j] / lib.sqrt(rest[j, j]), 0.0)
        rest = rest - lib.outer(column, column)
        columns.append(column)
    return lib.stack(columns, axis=1)


def semidefinite_cholesky(cov: Any, tol: float = 1e-14) -> Any:
    """Lower T with T T' = cov, with zero columns where rank is missing (no pivoting).

    The form lme4's theta takes for a singular covariance matrix.
    """
    lib, k = _library(cov), cov.shape[0]
    rest = cov
    least = tol * lib.maximum(lib.diagonal(cov).max(), np.finfo(cov.dtype).tiny)
    columns = []
    for j in range(k):
        good = (rest[j, j] > least) & (np.arange(k) >= j)
        column = lib.where(good, rest[:, j] / lib.sqrt(lib.where(rest[j, j] > least, rest[j, j], 1.0)), 0.0)
        rest = rest - lib.outer(column, column)
        columns.append(column)
    return lib.stack(columns, axis=1)


def raised(T: Any, below: float, to: float) -> Any:
    """T (k, k) with the diagonal at `to` in columns of a norm below `below`."""
    lib = _library(T)
    small = lib.linalg.norm(T, axis=0) < below
    return lib.where(small & np.eye(T.shape[0], dtype=bool), to, T)


def has_mirror(structure: Structure) -> bool:
    """Whether the other sign of a correlation may be tried: a covariance of 2 or 3 effects."""
    return isinstance(structure, Unstructured) and 1 < structure.k <= MOST_MIRRORED


def undecided(theta: np.ndarray, variance: np.ndarray, k: int) -> np.ndarray:
    """(...,) whether estimates theta (..., n_theta) of `Unstructured` leave open a correlation's sign and if it is +-1.

    It is one effect's with the first one; nothing is open where that has no variance.

    Args:
        variance: (..., n_theta) of the estimates, by the Hessian.
    """
    square, diagonal = np.square(theta), np.flatnonzero(Unstructured(k).on_diagonal())[1:]
    near = (square <= ON_EDGE * variance)[..., diagonal]
    either = ((square <= OF_SIGN * variance) & (square > 0.0))[..., 1:k]
    return np.asarray((near & either).any(-1) & (theta[..., 0] != 0.0))


def mirrored(T: np.ndarray) -> np.ndarray:
    """T (k, k) of the same standard deviations and rank with correlations of the other sign, and these large."""
    rest = T[:, 1:]
    size, length = np.linalg.norm(T, axis=1), np.linalg.norm(rest, axis=1)
    rest = rest * (np.sqrt(1.0 - MIRRORED**2) * size / np.where(length > 0.0, length, 1.0))[:, None]
    first = np.sqrt(np.maximum(size**2 - np.square(rest).sum(axis=1), 0.0))
    first[1:] = np.where(T[1:, 0] > 0.0, -first[1:], first[1:])
    return np.column_stack([first, rest])


def settle(T: Any, structure: Structure, near_zero: float) -> Any:
    """T (k, k) with columns near 0 at exactly 0, in the form that lme4 reports if it is singular."""
    lib = _library(T)
    if isinstance(structure, Unstructured) and structure.k > 1:
        small = lib.abs(lib.diagonal(T)).min() < near_zero
        T = lib.where(small, semidefinite_cholesky(T @ T.T, tol=near_zero**2 * 1e-2), T)
    return lib.where(lib.linalg.norm(T, axis=0) < near_zero, 0.0, T)
