"""A model's parameters as one vector x: where each is in it, what it is called, its internal units, and what it means.

x (P,) has theta term by term, then beta unless that is profiled out, then the logs of the family's dispersions or, of a
linear model with nothing profiled out, of sigma.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..algebra.linalg import block_diagonal
from ..families import dispersions, log_of
from .basis import Basis
from .design import Leaf, Term

Of = TypeVar("Of")


class Parameters(NamedTuple):
    """Parameters of the marginal likelihood."""

    theta: Any  # (n_theta,)
    beta: Any  # (p,)
    phi: Any  # (n_phi,)


class Point(NamedTuple):
    """Parameters of a model on their natural scales, as functions of them receive them.

    Attributes:
        theta: (n_theta,), relative to sigma in a linear model. beta: (p,). sigma: (), 1 in generalised models.
        phi: (n_phi,) dispersions of the family.
        cov: per term, covariance (k, k) of its random effects.
    """

    theta: Array
    beta: Array
    sigma: Array
    phi: Array
    cov: tuple[Array, ...]


class Blocks(NamedTuple, Generic[Of]):
    """One thing for each block of x."""

    theta: Of
    beta: Of
    log_phi: Of
    log_sigma: Of


@dataclass(frozen=True)
class Layout:
    """Where the parameters of a model are in x (P,), and along any axis like it; static and hashable.

    Attributes:
        terms: the random-effects terms. p: number of fixed effects. n_phi: number of dispersions.
        has_beta: whether the fixed effects are in x; otherwise they are profiled out (linear models, nAGQ = 0).
        has_sigma: whether log sigma is.
    """

    terms: tuple[Term, ...]
    p: int
    n_phi: int = 0
    has_beta: bool = True
    has_sigma: bool = False

    @cached_property
    def at(self) -> Blocks[slice]:
        """Where each block is; empty slices for those that are not there. `Term.theta` is a term's part of theta."""
        n_theta = sum(term.structure.n_theta for term in self.terms)
        sizes = n_theta, self.p if self.has_beta else 0, self.n_phi, int(self.has_sigma)
        return Blocks(*(slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)))

    @property
    def size(self) -> int:
        """P."""
        return int(self.at.log_sigma.stop)

    def names(self, theta: Sequence[str], x: Sequence[str], phi: Sequence[str]) -> list[str]:
        """(P,) names, from those of theta, of the columns of X and of dispersions."""
        sigma = ["log(sigma)"] if self.has_sigma else []
        return [*theta, *(x if self.has_beta else ()), *(f"log({name})" for name in phi), *sigma]

    def pack(self, theta: Any, beta: Any, *logs: Any) -> Any:
        """x from its blocks (..., size), on the host or in a graph; beta is left out where it is profiled out."""
        parts = [theta, *([beta] if self.has_beta else []), *logs]
        return (jnp if any(isinstance(part, Array) for part in parts) else np).concatenate(parts, axis=-1)

    def of(self, theta: Any, beta: Any, sigma: Any, phi: Any) -> np.ndarray:
        """x (..., P) of estimates theta (..., n_theta), beta, sigma (...) and phi, which may be infinite."""
        log_sigma = np.log(sigma)[..., None] if self.has_sigma else np.zeros((*np.shape(sigma), 0))
        return np.asarray(self.pack(theta, beta, log_of(phi), log_sigma))

    def unpack(self, x: Any) -> Blocks[Any]:
        """The blocks of x (..., P)."""
        return Blocks(*(x[..., at] for at in self.at))

    def parameters(self, x: Array, beta: Any = None) -> Parameters:
        """x as the likelihood takes it, with `beta` (p,) where that is profiled out."""
        parts = self.unpack(x)
        return Parameters(parts.theta, parts.beta if self.has_beta else beta, dispersions(parts.log_phi))

    def natural(self, x: Array) -> Point:
        """x on natural scales."""
        parts = self.unpack(x)
        sigma = jnp.exp(parts.log_sigma[0]) if self.has_sigma else jnp.ones((), x.dtype)
        T = [term.structure.factor(parts.theta[term.theta]) for term in self.terms]
        cov = tuple(sigma**2 * t @ t.T for t in T)
        return Point(parts.theta, parts.beta, sigma, dispersions(parts.log_phi), cov)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaling:
    """Internal units of a design, undone exactly in every result; of designs side by side with a leading axis.

    X = Xs A with Xs'Xs = n I (A from the QR factorisation of X), so that beta_s = A beta; z and theta as in `basis`.
    """

    layout: Layout = field(metadata={"static": True})
    A: Leaf  # (p, p)
    basis: Basis

    @cached_property
    def jacobian(self) -> np.ndarray:
        """(P, P) d(internal parameters) / d(the user's)."""
        rest = np.eye(self.layout.size - self.layout.at.beta.stop)
        return block_diagonal([self.basis.C, *([self.A] if self.layout.has_beta else []), rest])

    def inner(self, x: np.ndarray) -> np.ndarray:
        """Internal parameters of the user's, (P,) or columns (P, ...)."""
        return np.asarray(self.jacobian @ x)

    def outer(self, x: np.ndarray) -> np.ndarray:
        """The user's parameters of internal ones, (P,) or columns (P, ...)."""
        out, at = np.array(x), self.layout.at
        out[at.theta] = self.basis.outer(out[at.theta])
        out[at.beta] = self.beta(out[at.beta])
        return out

    def beta(self, beta_s: np.ndarray) -> np.ndarray:
        """Coefficients of X from those of Xs, (p,) or columns (p, ...); of none if there are none."""
        return np.asarray(np.linalg.solve(self.A, beta_s) if beta_s.size else beta_s)
