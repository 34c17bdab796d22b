"""What is asked of a response distribution: a log density of the linear predictor.

A family is a frozen, hashable object (static under `jax.jit`). What the fitter needs of it is the log
density as a function of eta; score, observed information and every higher derivative come from JAX,
for built-in and user families through the same code. `expected_information` is added where a closed
form exists, because lme4's Laplace approximation uses it (Bates et al. 2015; FEATURES: APX-2).

The log density is split in a *kernel*, which depends on eta, and a *constant*, which does not and is
computed once per fit: the sum of both is normalised, so log-likelihoods are absolute.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy import ndarray
from numpy.random import Generator

from . import links
from ._errors import DataError, NotSupportedError
from .links import Link

#: Largest mean of counts that NumPy draws from.
MOST_COUNT = 9e18


@dataclass(frozen=True)
class Family:
    """Interface of a response distribution; arguments are elementwise arrays of shape (n,).

    `phi` is a tuple-like array (n_phi,) of positive dispersion parameters, estimated on the log scale.
    `weights` are trials for the binomial and multipliers of the log density elsewhere.
    """

    link: Link

    name: ClassVar[str] = "family"
    #: curvature of the Laplace approximation when the user does not choose one
    default_hessian: ClassVar[str] = "observed"
    links_offered: ClassVar[tuple[str, ...]] = ()
    #: whether densities are probabilities, so that no log-likelihood is above 0; None where a user's may be either
    discrete: ClassVar[bool | None] = None
    #: whether weights are trials and responses proportions of successes; None where a user's may be
    trials: ClassVar[bool | None] = False
    #: range of the mean
    support: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    #: whether the model is a linear mixed model, of which sigma is profiled out
    linear: ClassVar[bool] = False
    #: the family that this one becomes as its dispersion goes to infinity; "" if the density has no such limit
    limit: ClassVar[str] = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "link", offered(self.link, self))

    @property
    def phi_names(self) -> tuple[str, ...]:
        """Names of the positive dispersion parameters."""
        return ()

    def at_present(self) -> Family:
        """The family with what users' functions in it read from outside now: itself, unless that has changed.

        Compiled programs are found by it.
        """
        link = self.link.at_present()
        return self if link is self.link else self._with(link=link)

    def _with(self, **changes: Any) -> Family:
        other = copy(self)
        for name, value in changes.items():
            object.__setattr__(other, name, value)
        return other

    def kernel(self, y: Array, eta: Array, weights: Array, phi: Array) -> Array:
        """Log density without its constant, per row."""
        raise NotImplementedError

    def constant(self, y: Array, weights: Array) -> Array:
        """The part of the log density that depends on the data only, per row."""
        return jnp.zeros_like(y)

    def in_range(self, y: Array, eta: Array) -> Array:
        """Whether the kernel is the log density here, and not its continuation beyond the link's range."""
        return jnp.ones_like(eta, bool)

    def expected_information(self, eta: Array, weights: Array, phi: Array) -> Array | None:
        """Fisher information about eta per row, or None where no closed form is offered."""
        return None

    @property
    def canonical(self) -> bool:
        """Whether observed and expected information agree for every response."""
        return False

    def phi_start(self) -> tuple[float, ...]:
        return (1.0,) * len(self.phi_names)

    def finite_start(self, phi: Any) -> ndarray:
        """(n_phi,) dispersions to start a search at: where one is infinite the density is flat in it, and stays so."""
        given, own = np.asarray(phi, float).reshape(-1), np.asarray(self.phi_start(), float)
        return np.where(np.isfinite(given), given, own)

    def derivatives(self, y: Array, eta: Array, weights: Array, phi: Array) -> tuple[Array, Array, Array]:
        """Kernel, its first derivative and minus its second derivative in eta, per row."""

        def first(e: Array) -> tuple[Array, Array]:
            return jax.jvp(lambda x: self.kernel(y, x, weights, phi), (e,), (jnp.ones_like(e),))

        (value, score), (_, second) = jax.jvp(first, (eta,), (jnp.ones_like(eta),))
        return value, score, -second

    # host-side pieces used around the fit -------------------------------------------------------
    def check_response(self, y: ndarray, weights: ndarray | None, name: str, labels: Any) -> list[str]:
        """Raise `DataError` for responses the family cannot have; return notes for the user."""
        return []

    def ends(self, y: ndarray) -> ndarray | None:
        """(n,) int8: 1 or -1 where the likelihood of a row rises all the way as eta goes to that infinity, else 0.

        None where no row's does, whatever the response (see `fit.separation`). A user's family says nothing.
        """
        return None

    def mustart(self, y: Array, weights: Array) -> Array:
        """R's `mustart`: means inside the family's range to start from."""
        return y

    def variance(self, mu: Array, phi: Array) -> Array:
        """Variance function V(mu) of a response with weight one."""
        raise NotImplementedError(f"family {self.name} has no variance function")

    def deviance_contribution(self, y: Array, mu: Array, weights: Array, phi: Array) -> Array:
        """Squared deviance residuals, weights included."""
        raise NotImplementedError(f"family {self.name} has no deviance residuals")

    def simulate(self, rng: Generator, eta: ndarray, weights: ndarray, phi: ndarray, sigma: float = 1.0) -> ndarray:
        """Responses drawn at linear predictors eta (n, s), weights (n,) as in the log density; (n, s).

        Counts are integers, for the binomial numbers of successes. sigma is the gaussian residual sd.

        Raises:
            NotImplementedError: nothing to draw from. DataError: a mean outside the family's range.
        """
        raise NotImplementedError(f"family {self.name} has no sampler")

    def distribution(self, mu: ndarray, weights: ndarray, phi: ndarray) -> Any:
        """Frozen scipy.stats distribution of the responses, (n,), those of a family with trials as successes.

        Raises:
            NotSupportedError: none is known, or weights multiply the log density.
        """
        raise NotSupportedError(
            f"family {self.name} is known by its log density alone, without the distribution function that this needs"
        )

    def latent_variance(self, mean: Callable[[], float], phi: ndarray, sigma: float) -> float | None:
        """What the distribution adds to the variance of eta, where that is known; `mean()` is the marginal mean.

        Source: Nakagawa, Johnson & Schielzeth 2017, J. R. Soc. Interface 14(134).
        """
        return None

    def _mean_within(self, eta: ndarray) -> ndarray:
        """Means (n, s), refused where the link leaves the range."""
        low, high = self.support
        mu = np.asarray(self.link.inverse(jnp.asarray(eta)))
        bad = ~((mu >= low) & (mu <= min(high, MOST_COUNT)))
        if bad.any():
            raise DataError(
                f"the {self.link.name} link gives a mean of {mu[bad][0]:.4g} here, outside the range of the "
                f"{self.name} family: no response can be drawn"
            )
        return mu

    def _unweighted(self, weights: ndarray) -> None:
        if (weights != 1.0).any():
            raise NotImplementedError(
                f"prior weights multiply the log density of the {self.name} family, which then is no distribution to "
                "draw from; simulate from a fit without weights"
            )

    def refuse(self, y: ndarray, bad: ndarray, name: str, labels: Any, why: str) -> None:
        """`DataError` for the first bad response."""
        if bad.any():
            raise DataError(f"response {name} has {y[bad][0]:g} ({first_bad(bad, labels)}){why}")

    def __str__(self) -> str:
        return f"{self.name} ({self.link.name})"


def first_bad(bad: ndarray, labels: Any) -> str:
    """The first of the bad rows, for messages."""
    return f"row {labels[int(np.flatnonzero(bad)[0])]}"


def offered(link: str | Link, family: Family) -> Link:
    """The link, by its name if the family offers it. Raises ValueError for another one."""
    if isinstance(link, Link):
        return links.get(link)
    if not isinstance(link, str) or link not in links.LINKS or link not in family.links_offered:
        raise ValueError(
            f"link {link!r} is not available for the {family.name} family; it offers "
            f"{', '.join(family.links_offered)}, or any gj.Link object"
        )
    return links.LINKS[link]
