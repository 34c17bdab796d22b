"""Covariance structures of random-effects terms: theta <-> relative factor T, and sd/correlation views.

A structure is a frozen, hashable object that maps its slice of theta to the k x k factor T of
Cov(b) = (sigma^2) T T'. Nothing outside this module knows which structures there are, or that one is a triangle.
Source: Bates et al. 2015, J. Stat. Softw. 67(1), section 2.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..compiling.precision import x64

#: What counts as 0 in a factor of a singular covariance (lme4's isSingular).
SINGULAR = 1e-4
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


class Structure:
    """What a covariance of k random effects of one level may be: T(theta), of which sigma^2 T T' is the covariance.

    Everything that is asked of a term's covariance is asked of its structure, a frozen, hashable dataclass with the
    field k. Its own are `n_theta`, `factor`, `start` and `theta_near`; the other answers follow from these. They hold
    for every structure; those that know better (what scales, what has a sign, what is 0) are searched more easily,
    and reported in a canonical form. Derivatives are by JAX, so that T is smooth in theta, without bounds: where an
    entry has them, T is even in it, or theta is a transform.

    Where arrays may be of either kind, the answer is by the library of the argument (`_library`).
    """

    k: int

    @property
    def n_theta(self) -> int:
        """Number of parameters."""
        raise NotImplementedError

    def factor(self, theta: Array) -> Array:
        """(n_theta,) -> T (k, k), traced; any factor of the covariance, if possible smooth where that is singular."""
        raise NotImplementedError

    def start(self) -> np.ndarray:
        """theta (n_theta,) of T = I, or near that."""
        raise NotImplementedError

    def theta_near(self, cov: Any) -> Any:
        """theta of the covariance (k, k) of this structure nearest to cov, which is positive definite."""
        raise NotImplementedError

    def host_factor(self, theta: np.ndarray) -> np.ndarray:
        """`factor` on the host: (..., n_theta) -> T (..., k, k)."""
        with _on_host():
            return np.asarray(jnp.vectorize(self.factor, signature="(t)->(k,k)")(jnp.asarray(theta, float)))

    def _factor(self, theta: Any) -> Any:
        return self.factor(theta) if isinstance(theta, Array) else self.host_factor(theta)

    # ---- the search
    def curvature(self, theta: Any, m: Any, reliability: Any) -> Any:
        """Rough second derivatives of the deviance in theta (n_theta,), from m levels.

        The expected ones of m levels of a Gaussian design, m tr(V^-1 V_i V^-1 V_i) with V = T T' and its derivatives,
        times the squared reliability (k,) of the conditional modes: for one column 4 m r^2 / theta^2.
        """
        if not isinstance(theta, Array):
            with _on_host():
                return np.asarray(self.curvature(jnp.asarray(theta, float), m, reliability))

        def covariance(theta: Array) -> Array:
            T = self.factor(theta)
            return T @ T.T

        V, dV = covariance(theta), jax.jacfwd(covariance)(theta)
        least = 1e-8 * jnp.trace(V) + jnp.finfo(V.dtype).tiny
        inner = jnp.linalg.solve(V + least * jnp.eye(self.k, dtype=V.dtype), dV.transpose(2, 0, 1)) * reliability
        return jnp.maximum(m * jnp.einsum("pij,pji->p", inner, inner), 1e-8 * m)

    def scales(self) -> np.ndarray:
        """(n_theta,) which entries of theta T is proportional to, the others being as they are; none if unknown."""
        return np.zeros(self.n_theta, bool)

    def units(self, rms: Any) -> Any:
        """Units (..., k) by which the columns of z, with root mean squares rms, are divided: the structure stays so."""
        lib = _library(rms)
        common = lib.sqrt(lib.square(rms).mean(-1, keepdims=True)) if self.scales().any() else 1.0
        return common * lib.ones_like(rms)

    @property
    def any_basis(self) -> bool:
        """Whether every invertible combination of the columns of z has covariances of the same structure."""
        return False

    def turn(self, L: Any) -> Any:
        """C (..., n_theta, n_theta) with theta -> C theta when T becomes L T (z becomes z L^-1), L lower triangular.

        L is a diagonal of `units`, or any with `any_basis`.
        """
        return _library(L).where(self.scales(), L[..., :1, :1], 1.0) * np.eye(self.n_theta)

    def raised(self, theta: Any, below: float, to: float) -> Any:
        """theta with what is below the first number, and has a derivative of 0 at 0, raised to the second."""
        return theta

    @property
    def turns(self) -> bool:
        """Whether long searches are shorter by `moved`."""
        return False

    def moved(self, theta: Array, change: Array) -> Array:
        """theta after a step that changes the covariance as `theta + change` does to first order."""
        return theta + change

    # ---- what is reported
    def flip(self, theta: Any) -> tuple[Any, Any]:
        """Signs (..., n_theta) that make theta canonical, and F (..., k, k), orthogonal, with T(signs theta) = T F."""
        lib = _library(theta)
        return lib.ones_like(theta), lib.zeros((*theta.shape[:-1], 1, 1)) + np.eye(self.k)

    def settled(self, theta: Any, near_zero: float) -> Any:
        """theta (..., n_theta) with what is near 0 at exactly 0, in the form that is reported of a singular T."""
        return theta

    def singular(self, theta: np.ndarray, below: float = SINGULAR) -> np.ndarray:
        """(...,) whether the covariance of theta (..., n_theta) is singular: a singular value of T below a number."""
        T = self.host_factor(theta)
        finite = np.isfinite(T).all((-2, -1))
        values = np.linalg.svd(np.where(finite[..., None, None], T, np.eye(self.k)), compute_uv=False)
        return np.asarray(values.min(-1) < below)

    @property
    def has_mirror(self) -> bool:
        """Whether correlations of the other sign may be tried, by `undecided` and `mirrored`."""
        return False

    def undecided(self, theta: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """(...,) whether estimates theta with variances (..., n_theta) leave the sign of a correlation open."""
        return np.zeros(theta.shape[:-1], bool)

    def mirrored(self, theta: np.ndarray) -> np.ndarray:
        """theta (n_theta,) of the same standard deviations with correlations of the other sign."""
        return theta

    # ---- names and natural parameters
    def theta_names(self, group: str, names: tuple[str, ...]) -> list[str]:
        """Names (n_theta,) of theta, of a term on a grouping factor with these columns."""
        return [f"{group}.theta{i + 1}" for i in range(self.n_theta)]

    def lower(self) -> np.ndarray:
        """Lower bounds (n_theta,) of canonical theta."""
        return np.full(self.n_theta, -np.inf)

    def entries(self) -> tuple[tuple[int, int], ...]:
        """The natural parameters: (a, a) is the standard deviation of column a, (a, b) its correlation with column b.

        All of them; a structure that has fewer parameters says which.
        """
        return tuple((a, b) for a in range(self.k) for b in range(a, self.k))

    def natural(self, cov: Any) -> Any:
        """The standard deviations and correlations of `entries` (..., r) of covariances (..., k, k)."""
        sd, corr = cov_to_sdcor(cov)
        a, b = np.array(self.entries(), np.int32).T
        return _library(cov).where(a == b, sd[..., a], corr[..., a, b])

    def natural_names(self, group: str, names: tuple[str, ...]) -> list[str]:
        """lme4's names of `natural`: ``sd_x|g`` and ``cor_y.x|g``."""
        return [f"sd_{names[a]}|{group}" if a == b else f"cor_{names[b]}.{names[a]}|{group}" for a, b in self.entries()]

    def followed_sd(self, theta: Array, a: int) -> Array:
        """What a profile follows for the standard deviation of column a in units of sigma: its size is that.

        Where it is an entry of T the deviance is even in it, and its sign is kept.
        """
        return jnp.sqrt(jnp.square(self.factor(theta)[a]).sum())

    def followed_correlation(self, theta: Array, a: int, b: int) -> Array:
        """What a profile follows for the correlation of columns a and b: Fisher's z."""
        T = self.factor(theta)
        return jnp.arctanh(T[a] @ T[b] / jnp.sqrt(jnp.square(T[a]).sum() * jnp.square(T[b]).sum()))

    def shown_correlation(self) -> tuple[Callable[[Any], Any], float, float]:
        """The correlation of what `followed_correlation` gives, increasing, and its limits there."""
        return np.tanh, -np.inf, np.inf

    def basis(self) -> np.ndarray | None:
        """Orthogonal symmetric matrices (r, k, k) that the covariances are the positive semi-definite combinations of.

        None where there are no such. Found by rank: covariances that span more than n_theta are not linear in any
        parameters.
        """
        size = self.k * (self.k + 1)
        T = self.host_factor(np.random.default_rng(0).normal(size=(size, self.n_theta)))
        V = (T @ T.swapaxes(-1, -2)).reshape(size, -1)
        _, values, directions = np.linalg.svd(V, full_matrices=False)
        rank = int((values > 1e-9 * values[0]).sum())
        return directions[:rank].reshape(rank, self.k, self.k) if rank <= self.n_theta else None

    def position(self) -> np.ndarray | None:
        """(k, k) number in theta, from 1, of each entry of T, 0 where that is 0; None if they are no entries of it."""
        return None


class _Triangular(Structure):
    """Structures whose theta are entries of a lower triangular T."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "n_theta" in vars(cls):  # the answers here are those of entries of T
            base = cls.__mro__[1].__name__
            raise TypeError(
                f"{cls.__name__} has parameters of its own: derive it from glmmjax.model.covariance.Structure, "
                f"not from {base}"
            )

    def index(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of T in the order of theta."""
        raise NotImplementedError

    @property
    def n_theta(self) -> int:
        return self.index()[0].size

    def on_diagonal(self) -> np.ndarray:
        """Which entries of theta lie on the diagonal of T."""
        rows, cols = self.index()
        return rows == cols

    def host_factor(self, theta: np.ndarray) -> np.ndarray:
        T = np.zeros((*np.shape(theta)[:-1], self.k, self.k))
        T[(..., *self.index())] = theta
        return T

    def theta_of(self, T: Any) -> Any:
        """T (..., k, k) -> theta (..., n_theta)."""
        return T[(..., *self.index())]

    def start(self) -> np.ndarray:
        return self.theta_of(np.eye(self.k))

    def scales(self) -> np.ndarray:
        return np.ones(self.n_theta, bool)

    def units(self, rms: Any) -> Any:
        return rms

    def turn(self, L: Any) -> Any:
        rows, cols = self.index()
        return L[..., rows[:, None], rows] * (cols[:, None] == cols)

    def raised(self, theta: Any, below: float, to: float) -> Any:
        """The diagonal of T in columns of a norm below a number."""
        if self._host_clear(theta, below):
            return theta
        T, lib = self._factor(theta), _library(theta)
        small = lib.linalg.norm(T, axis=-2, keepdims=True) < below
        return self.theta_of(lib.where(small & np.eye(self.k, dtype=bool), to, T))

    def _host_clear(self, theta: Any, below: float) -> bool:
        """Whether theta is on the host, where it saves microseconds to look first, and no diagonal is near 0."""
        return not isinstance(theta, Array) and not self.singular(theta, below).any()

    def flip(self, theta: Any) -> tuple[Any, Any]:
        """Signs of T's columns: diagonal >= 0, or the first non-zero entry > 0."""
        T, lib = self._factor(theta), _library(theta)
        first = lib.argmax(T != 0.0, axis=-2)  # above the diagonal there are zeros only
        leading = lib.take_along_axis(T, first[..., None, :], -2)[..., 0, :]
        signs = lib.where(leading < 0.0, -1.0, 1.0)
        return signs[..., self.index()[1]], signs[..., None, :] * np.eye(self.k)

    def settled(self, theta: Any, near_zero: float) -> Any:
        """Columns near 0 at exactly 0; a singular T in the form that lme4 reports."""
        if self._host_clear(theta, near_zero):
            return theta
        T, lib = self._factor(theta), _library(theta)
        if self.any_basis:
            small = lib.abs(lib.diagonal(T, 0, -2, -1)).min(-1) < near_zero
            again = semidefinite_cholesky(T @ T.swapaxes(-1, -2), tol=near_zero**2 * 1e-2)
            T = lib.where(small[..., None, None], again, T)
        return self.theta_of(lib.where(lib.linalg.norm(T, axis=-2, keepdims=True) < near_zero, 0.0, T))

    def singular(self, theta: np.ndarray, below: float = SINGULAR) -> np.ndarray:
        """lme4's rule: an entry of T's diagonal."""
        return np.asarray((np.abs(theta[..., self.on_diagonal()]) < below).any(-1))

    def theta_names(self, group: str, names: tuple[str, ...]) -> list[str]:
        """lme4's names: ``g.x`` on the diagonal, ``g.y.x`` below it."""
        rows, cols = self.index()
        return [
            f"{group}.{names[r]}" if r == c else f"{group}.{names[r]}.{names[c]}"
            for r, c in zip(rows, cols, strict=True)
        ]

    def lower(self) -> np.ndarray:
        return np.where(self.on_diagonal(), 0.0, -np.inf)

    def basis(self) -> np.ndarray:
        eye = np.eye(self.k)
        pairs = [np.outer(eye[a], eye[b]) for a, b in self.entries()]
        return np.stack([np.maximum(pair, pair.T) for pair in pairs])

    def position(self) -> np.ndarray:
        return self.host_factor(np.arange(1.0, self.n_theta + 1.0)).astype(int)


@contextmanager
def _on_host() -> Iterator[None]:
    """For numbers in double precision, within a trace, too."""
    with jax.ensure_compile_time_eval(), x64():
        yield


@dataclass(frozen=True)
class Unstructured(_Triangular):
    """Any k x k covariance; theta is the lower triangle of T, column by column (lme4)."""

    k: int

    def index(self) -> tuple[np.ndarray, np.ndarray]:
        return _lower_by_columns(self.k)

    def factor(self, theta: Array) -> Array:
        # a gather, which fuses with what uses T, where a scatter does not
        return jnp.concatenate([theta, jnp.zeros(1, theta.dtype)])[_position_in_theta(self.k)]

    def theta_near(self, cov: Any) -> Any:
        return self.theta_of(_cholesky(cov))

    def curvature(self, theta: Any, m: Any, reliability: Any) -> Any:
        rows, cols = self.index()
        scale = (self._factor(theta) ** 2).sum(axis=1) ** 0.5
        size = np.where(rows == cols, 4.0, 2.0) * m
        return size * reliability[rows] * reliability[cols] / scale[rows] ** 2

    @property
    def any_basis(self) -> bool:
        return self.k > 1

    @property
    def turns(self) -> bool:
        return self.k > 1

    def moved(self, theta: Array, change: Array) -> Array:
        """`Structure.moved` without turning T.

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

    @property
    def has_mirror(self) -> bool:
        """Of a covariance of 2 or 3 effects."""
        return 1 < self.k <= MOST_MIRRORED

    def undecided(self, theta: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """The correlation of one effect with the first one, if it may be +-1; none where that has no variance."""
        square, diagonal = np.square(theta), np.flatnonzero(self.on_diagonal())[1:]
        near = (square <= ON_EDGE * variance)[..., diagonal]
        either = ((square <= OF_SIGN * variance) & (square > 0.0))[..., 1 : self.k]
        return np.asarray((near & either).any(-1) & (theta[..., 0] != 0.0))

    def mirrored(self, theta: np.ndarray) -> np.ndarray:
        """The correlations with the first effect, of the same rank; these large."""
        T = self.host_factor(theta * self.flip(theta)[0])
        rest = T[:, 1:]
        size, length = np.linalg.norm(T, axis=1), np.linalg.norm(rest, axis=1)
        rest = rest * (np.sqrt(1.0 - MIRRORED**2) * size / np.where(length > 0.0, length, 1.0))[:, None]
        first = np.sqrt(np.maximum(size**2 - np.square(rest).sum(axis=1), 0.0))
        first[1:] = np.where(T[1:, 0] > 0.0, -first[1:], first[1:])
        return self.theta_of(np.column_stack([first, rest]))

    def followed_sd(self, theta: Array, a: int) -> Array:
        return theta[0] if self.k == 1 else super().followed_sd(theta, a)

    def followed_correlation(self, theta: Array, a: int, b: int) -> Array:
        """Of two columns, minus the angle whose cosine is the correlation: smooth where that is 1."""
        if self.k > 2:
            return super().followed_correlation(theta, a, b)
        T = self.factor(theta)
        return -jnp.arctan2(T[1, 1], T[1, 0] * jnp.sign(T[0, 0]))

    def shown_correlation(self) -> tuple[Callable[[Any], Any], float, float]:
        return super().shown_correlation() if self.k > 2 else (np.cos, -np.pi, 0.0)


@dataclass(frozen=True)
class Diagonal(_Triangular):
    """Independent columns with their own standard deviations; theta is the diagonal of T."""

    k: int

    def index(self) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(self.k), np.arange(self.k)

    def factor(self, theta: Array) -> Array:
        return jnp.diag(theta)

    def theta_near(self, cov: Any) -> Any:
        return _library(cov).sqrt(_library(cov).diagonal(cov))

    def curvature(self, theta: Any, m: Any, reliability: Any) -> Any:
        return 4.0 * m * (reliability / theta) ** 2

    def entries(self) -> tuple[tuple[int, int], ...]:
        return tuple((a, a) for a in range(self.k))

    def followed_sd(self, theta: Array, a: int) -> Array:
        return theta[a]


#: Structures by the names that formulas have for them.
STRUCTURES: dict[str, Callable[[int], Structure]] = {"us": Unstructured, "diag": Diagonal}


def structure_of(label: tuple[Any, ...]) -> Structure:
    """The structure of a term by its label: grouping factor, names (k,), and itself or its name if it is not "us"."""
    _, names, *given = label
    kind = given[0] if given else "us"
    return kind if isinstance(kind, Structure) else STRUCTURES[kind](len(names))


def by_term(theta: np.ndarray, structures: Sequence[Structure]) -> list[np.ndarray]:
    """theta (..., n_theta) of each term."""
    return np.split(theta, np.cumsum([structure.n_theta for structure in structures])[:-1], axis=-1)


def natural_of(theta: np.ndarray, sigma: Any, structures: Sequence[Structure]) -> np.ndarray:
    """Standard deviations and correlations (..., r), term by term, of theta (..., n_theta) and sigma (...,)."""
    out, variance = [], np.square(sigma)[..., None, None]
    for structure, part in zip(structures, by_term(theta, structures), strict=True):
        T = structure.host_factor(part)
        out.append(structure.natural(variance * T @ T.swapaxes(-1, -2)))
    return np.concatenate(out, axis=-1)


def numbered(groups: Iterable[str]) -> list[str]:
    """Names of terms by their grouping factors, as lme4: ``g``, then ``g.1``, ``g.2`` for further ones on g."""
    seen: Counter[str] = Counter()
    out = []
    for group in groups:
        out.append(f"{group}.{seen[group]}" if seen[group] else group)
        seen[group] += 1
    return out


def cov_to_sdcor(cov: Any) -> tuple[Any, Any]:
    """Covariances (..., k, k) -> standard deviations (..., k) and correlations (..., k, k); NaN where an sd is 0."""
    lib = _library(cov)
    sd = lib.sqrt(lib.diagonal(cov, 0, -2, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        corr = cov / (sd[..., :, None] * sd[..., None, :])
    return sd, lib.where(np.eye(cov.shape[-1], dtype=bool), 1.0, corr)


def _cholesky(cov: Any) -> Any:
    """Lower T with T T' = cov; small ones column by column, which needs no LAPACK (see `linalg.one_inverse`)."""
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
    """Lower T (..., k, k) with T T' = cov, with zero columns where rank is missing (no pivoting).

    The form lme4's theta takes for a singular covariance matrix.
    """
    lib, k = _library(cov), cov.shape[-1]
    rest = cov
    least = tol * lib.maximum(lib.diagonal(cov, 0, -2, -1).max(-1), np.finfo(cov.dtype).tiny)
    columns = []
    for j in range(k):
        pivot = rest[..., j, j]
        good = pivot > least
        root = lib.sqrt(lib.where(good, pivot, 1.0))[..., None]
        column = lib.where(good[..., None] & (np.arange(k) >= j), rest[..., j] / root, 0.0)
        rest = rest - column[..., :, None] * column[..., None, :]
        columns.append(column)
    return lib.stack(columns, axis=-1)
