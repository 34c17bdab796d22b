"""Response distributions as log densities of the linear predictor.

A family is a frozen, hashable object (static under `jax.jit`). What the fitter needs of it is the log
density as a function of eta; score, observed information and every higher derivative come from JAX,
for built-in and user families through the same code. `expected_information` is added where a closed
form exists, because lme4's Laplace approximation uses it (Bates et al. 2015; FEATURES: APX-2).

The log density is split in a *kernel*, which depends on eta, and a *constant*, which does not and is
computed once per fit: the sum of both is normalised, so log-likelihoods are absolute.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import gammaln, xlogy

from . import _arguments as arguments
from . import links
from ._errors import DataError
from .compiling.digest import contents
from .links import Link


def _product(y: Array, log_value: Array) -> Array:
    """y * log_value with 0 * (-inf) = 0, derivatives included."""
    positive = y > 0.0
    return jnp.where(positive, y * jnp.where(positive, log_value, 0.0), 0.0)


#: Largest mean of counts that NumPy draws from.
MOST_COUNT = 9e18
#: log of the largest dispersion that log densities are evaluated at, where a family with a limit has reached it
LOG_PHI_MAX = 0.5 * float(np.log(np.finfo(float).max))


def most_log_phi(dtype: Any) -> float:
    """`LOG_PHI_MAX` of a precision."""
    return 0.5 * float(np.log(float(jnp.finfo(dtype).max)))


def dispersions(log_phi: Array) -> Array:
    """exp(log_phi), held finite: its derivative is 0 at infinity, and not NaN."""
    most = most_log_phi(log_phi.dtype)
    return jnp.exp(jnp.where(log_phi < most, log_phi, most))


def reported(log_phi: np.ndarray) -> np.ndarray:
    """Dispersions as estimates have them: infinite from `LOG_PHI_MAX` on."""
    finite: np.ndarray = np.exp(np.minimum(log_phi, LOG_PHI_MAX))
    return np.where(log_phi < LOG_PHI_MAX, finite, np.inf)


def log_of(phi: np.ndarray) -> np.ndarray:
    """The inverse of `reported`."""
    return np.minimum(np.log(phi), LOG_PHI_MAX)


_NEAR = 0.1


def _less_by_series(x: Array) -> Array:
    """log(1 + x) - x for |x| < _NEAR."""
    r = x / (2.0 + x)  # log(1 + x) = 2 artanh r
    q, series = r * r, jnp.zeros_like(r)
    for n in (13, 11, 9, 7, 5, 3):
        series = (series + 2.0 / n) * q
    return r * (series - x)


@jax.custom_jvp
def _log1p_less(x: Array) -> Array:
    """log(1 + x) - x to rounding, for x > -1."""
    near = jnp.abs(x) < _NEAR
    small, large = jnp.where(near, x, 0.0), jnp.where(near, 1.0, x)
    return jnp.where(near, _less_by_series(small), jnp.log(1.0 + large) - large)


@_log1p_less.defjvp
def _log1p_less_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return _log1p_less(x), -x / (1.0 + x) * dx


#: Stirling's series of log Gamma(x) in 1 / x, 1 / x^3, ...; from STIRLING_FROM on it is exact to rounding.
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)
_STIRLING_FROM = 8


def _stirling(x: Array) -> Array:
    w = 1.0 / x
    q, series = w * w, jnp.zeros_like(w)
    for coefficient in reversed(_STIRLING):
        series = series * q + coefficient
    return series * w


def log_rising(y: Array, phi: Array) -> Array:
    """log Gamma(y + phi) - log Gamma(phi) - y log phi >= 0, the sum of log(1 + k / phi) over the integers k < y.

    y (n,) >= 0, phi > 0 a scalar. Nothing of the size of phi log phi is formed, so that it vanishes as
    y (y - 1) / (2 phi) for large phi, and its derivatives likewise.
    """
    low = phi < _STIRLING_FROM
    base = jnp.where(low, phi + _STIRLING_FROM, phi)
    x = y / base
    value = base * _log1p_less(x) + (y - 0.5) * jnp.log1p(x) + (_stirling(base + y) - _stirling(base))
    # Gamma(z + 1) = z Gamma(z) from phi up to the base; in two products, which cannot overflow
    some = jnp.where(low, phi, 1.0)
    factors = [1.0 + y / (some + k) for k in range(_STIRLING_FROM)]
    products = [a * b * c * d for a, b, c, d in (factors[:4], factors[4:])]
    below = y * jnp.log1p(_STIRLING_FROM / some) - jnp.log(products[0]) - jnp.log(products[1])
    return value + jnp.where(low, below, 0.0)


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
    #: whether densities are probabilities, so that no log-likelihood is above 0
    discrete: ClassVar[bool] = False
    #: the family that this one becomes as its dispersion goes to infinity; "" if the density has no such limit
    limit: ClassVar[str] = ""

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

    def finite_start(self, phi: Any) -> np.ndarray:
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
    def check_response(self, y: np.ndarray, weights: np.ndarray | None, name: str, labels: Any) -> list[str]:
        """Raise `DataError` for responses the family cannot have; return notes for the user."""
        return []

    def ends(self, y: np.ndarray) -> np.ndarray | None:
        """(n,) int8: 1 or -1 where the likelihood of a row rises all the way as eta goes to that infinity, else 0.

        None where no row's does, whatever the response (see `_separation`). A user's family says nothing.
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

    def simulate(
        self, rng: np.random.Generator, eta: np.ndarray, weights: np.ndarray, phi: np.ndarray, sigma: float = 1.0
    ) -> np.ndarray:
        """Responses drawn at linear predictors eta (n, s), weights (n,) as in the log density; (n, s).

        Counts are integers, for the binomial numbers of successes. sigma is the gaussian residual sd.

        Raises:
            NotImplementedError: nothing to draw from. DataError: a mean outside the family's range.
        """
        raise NotImplementedError(f"family {self.name} has no sampler")

    def _mean_within(self, eta: np.ndarray, low: float, high: float) -> np.ndarray:
        """Means (n, s), refused where the link leaves the range."""
        mu = np.asarray(self.link.inverse(jnp.asarray(eta)))
        bad = ~((mu >= low) & (mu <= min(high, MOST_COUNT)))
        if bad.any():
            raise DataError(
                f"the {self.link.name} link gives a mean of {mu[bad][0]:.4g} here, outside the range of the "
                f"{self.name} family: no response can be drawn"
            )
        return mu

    def _unweighted(self, weights: np.ndarray) -> None:
        if (weights != 1.0).any():
            raise NotImplementedError(
                f"prior weights multiply the log density of the {self.name} family, which then is no distribution to "
                "draw from; simulate from a fit without weights"
            )

    def __str__(self) -> str:
        return f"{self.name} ({self.link.name})"


def _first_bad(bad: np.ndarray, labels: Any) -> str:
    where = int(np.flatnonzero(bad)[0])
    return f"row {labels[where]}"


@dataclass(frozen=True)
class Binomial(Family):
    """Binomial proportions y with `weights` trials; y in {0, 1} for binary data.

    Links: logit, probit, cloglog, cauchit, log, or any `Link` into (0, 1).
    """

    link: Link = links.logit
    name: ClassVar[str] = "binomial"
    discrete: ClassVar[bool] = True
    default_hessian: ClassVar[str] = "expected"
    links_offered: ClassVar[tuple[str, ...]] = ("logit", "probit", "cloglog", "cauchit", "log")

    def __post_init__(self) -> None:
        object.__setattr__(self, "link", _offered(self.link, self))

    def kernel(self, y: Array, eta: Array, weights: Array, phi: Array) -> Array:
        if self.link is links.logit:
            return weights * (y * eta - links.softplus(eta))
        log_mu, log1m_mu = self.link.log_mu(eta), self.link.log1m_mu(eta)
        return weights * (_product(y, log_mu) + _product(1.0 - y, log1m_mu))

    def in_range(self, y: Array, eta: Array) -> Array:
        if self.link is links.log:
            return (eta < -links.EDGE) | (y == 1.0)
        return jnp.ones_like(eta, bool)

    def constant(self, y: Array, weights: Array) -> Array:
        successes = weights * y
        # together: the program for log gamma is long
        trials, ones, zeros = gammaln(jnp.stack([weights, successes, weights - successes]) + 1.0)
        return trials - ones - zeros

    @property
    def canonical(self) -> bool:
        return self.link is links.logit

    def expected_information(self, eta: Array, weights: Array, phi: Array) -> Array:
        if self.link is links.logit:
            mu = links.logistic(eta)
            return weights * mu * (1.0 - mu)
        # mu'^2 / (mu (1 - mu)) as the product of two slopes that stay finite where mu rounds to 0 or 1
        ones = jnp.ones_like(eta)
        _, slope = jax.jvp(self.link.log_mu, (eta,), (ones,))
        _, slope1m = jax.jvp(self.link.log1m_mu, (eta,), (ones,))
        return -weights * slope * slope1m

    def check_response(self, y: np.ndarray, weights: np.ndarray | None, name: str, labels: Any) -> list[str]:
        bad = (y < 0.0) | (y > 1.0)
        if bad.any():
            raise DataError(
                f"response {name} has {y[bad][0]:g} ({_first_bad(bad, labels)}), outside [0, 1]: binomial "
                "responses are 0/1, a two-level factor, cbind(successes, failures) or a proportion with "
                "weights = trials; measurements have family gaussian, counts poisson"
            )
        trials = np.ones_like(y) if weights is None else weights
        successes = y * trials
        off = np.abs(successes - np.rint(successes)) > 1e-6 * np.maximum(1.0, trials)
        if off.any():
            if weights is None:
                raise DataError(
                    f"response {name} has proportions such as {y[off][0]:g} ({_first_bad(off, labels)}) but no "
                    "numbers of trials: give them by weights=, or use cbind(successes, failures)"
                )
            return [
                f"{int(off.sum())} rows have a non-integer number of successes (first: {_first_bad(off, labels)}); "
                "the log density is continued to non-integers by gamma functions"
            ]
        return []

    def ends(self, y: np.ndarray) -> np.ndarray | None:
        direction = self.link.direction(0.0, 1.0)
        if not direction:
            return None
        # means of the log link end at eta = 0, where the likelihood of successes has a slope
        successes = 0 if self.link is links.log else direction
        return np.where(y == 1.0, successes, np.where(y == 0.0, -direction, 0)).astype(np.int8)

    def mustart(self, y: Array, weights: Array) -> Array:
        return (weights * y + 0.5) / (weights + 1.0)

    def variance(self, mu: Array, phi: Array) -> Array:
        return mu * (1.0 - mu)

    def deviance_contribution(self, y: Array, mu: Array, weights: Array, phi: Array) -> Array:
        fit = xlogy(y, mu) + jax.scipy.special.xlog1py(1.0 - y, -mu)
        full = xlogy(y, y) + jax.scipy.special.xlog1py(1.0 - y, -y)
        return 2.0 * weights * (full - fit)

    def simulate(
        self, rng: np.random.Generator, eta: np.ndarray, weights: np.ndarray, phi: np.ndarray, sigma: float = 1.0
    ) -> np.ndarray:
        trials = np.rint(weights)
        if (np.abs(weights - trials) > 1e-8 * np.maximum(1.0, trials)).any():
            raise NotImplementedError("some numbers of trials (weights) are not whole: no successes can be drawn")
        return rng.binomial(trials.astype(np.int64)[:, None], self._mean_within(eta, 0.0, 1.0))


def _ends_of_counts(y: np.ndarray, link: Link) -> np.ndarray | None:
    """A count of 0 wants the smallest mean."""
    direction = link.direction(0.0, np.inf)
    return np.where(y == 0.0, -direction, 0).astype(np.int8) if direction else None


def _check_counts(y: np.ndarray, name: str, labels: Any, family: str) -> None:
    bad = y < 0.0
    if bad.any():
        raise DataError(
            f"response {name} has {y[bad][0]:g} ({_first_bad(bad, labels)}): a {family} response cannot be negative"
        )
    bad = np.abs(y - np.rint(y)) > 1e-7 * np.maximum(1.0, y)
    if bad.any():
        raise DataError(
            f"response {name} has {y[bad][0]:g} ({_first_bad(bad, labels)}): a {family} response must be a count; "
            "model rates with counts and offset(log(exposure))"
        )


@dataclass(frozen=True)
class Poisson(Family):
    """Poisson counts. Links: log, sqrt, identity, or any `Link` into (0, inf)."""

    link: Link = links.log
    name: ClassVar[str] = "poisson"
    discrete: ClassVar[bool] = True
    default_hessian: ClassVar[str] = "expected"
    links_offered: ClassVar[tuple[str, ...]] = ("log", "sqrt", "identity")

    def __post_init__(self) -> None:
        object.__setattr__(self, "link", _offered(self.link, self))

    def kernel(self, y: Array, eta: Array, weights: Array, phi: Array) -> Array:
        if self.link is links.log:
            return weights * (y * eta - links.exp_extended(eta))
        mu = self.link.inverse(eta)
        value = _product(y, self.link.log_mu(eta)) - mu
        if self.link is links.identity:  # a steep parabola holds the mean of zero counts at zero
            value = value - 0.5 * (jnp.minimum(eta, 0.0) / links.EDGE) ** 2
        elif self.link is not links.sqrt:
            # a mean outside (0, inf) has density 0: PIRLS then halves its step
            value = jnp.where((mu >= 0.0) & ~jnp.isnan(value), value, -jnp.inf)
        return weights * value

    def in_range(self, y: Array, eta: Array) -> Array:
        if self.link is links.sqrt:
            return (eta > links.EDGE) | (y == 0.0)
        if self.link is links.identity:
            return jnp.where(y > 0.0, eta > links.EDGE, eta >= 0.0)
        if self.link is links.log:
            return eta < links.EXP_RANGE
        return jnp.ones_like(eta, bool)

    def constant(self, y: Array, weights: Array) -> Array:
        return -weights * gammaln(y + 1.0)

    @property
    def canonical(self) -> bool:
        return self.link is links.log

    def expected_information(self, eta: Array, weights: Array, phi: Array) -> Array:
        if self.link is links.log:
            return weights * links.exp_extended(eta)
        if self.link is links.sqrt:
            return 4.0 * weights
        mu, slope = jax.jvp(self.link.inverse, (eta,), (jnp.ones_like(eta),))
        return weights * slope * slope / mu

    def check_response(self, y: np.ndarray, weights: np.ndarray | None, name: str, labels: Any) -> list[str]:
        _check_counts(y, name, labels, "Poisson")
        return []

    def ends(self, y: np.ndarray) -> np.ndarray | None:
        return _ends_of_counts(y, self.link)

    def mustart(self, y: Array, weights: Array) -> Array:
        return y + 0.1

    def variance(self, mu: Array, phi: Array) -> Array:
        return mu

    def deviance_contribution(self, y: Array, mu: Array, weights: Array, phi: Array) -> Array:
        return 2.0 * weights * (xlogy(y, y) - xlogy(y, mu) - (y - mu))

    def simulate(
        self, rng: np.random.Generator, eta: np.ndarray, weights: np.ndarray, phi: np.ndarray, sigma: float = 1.0
    ) -> np.ndarray:
        self._unweighted(weights)
        return rng.poisson(self._mean_within(eta, 0.0, np.inf))


@dataclass(frozen=True)
class Gaussian(Family):
    """Gaussian responses with identity link: the linear mixed model, its scale relative to sigma.

    Densities are those at sigma = 1; `glmmjax.lmer` profiles sigma out. `weights` are precision weights.
    """

    link: Link = links.identity
    name: ClassVar[str] = "gaussian"
    default_hessian: ClassVar[str] = "expected"
    links_offered: ClassVar[tuple[str, ...]] = ("identity",)

    def __post_init__(self) -> None:
        if self.link is not links.identity and not (isinstance(self.link, str) and self.link == "identity"):
            raise ValueError(
                f"link {str(getattr(self.link, 'name', self.link))!r} is not available for the gaussian family, "
                "which is fitted as a linear mixed model: use the identity link, or transform the response"
            )
        object.__setattr__(self, "link", links.identity)

    def kernel(self, y: Array, eta: Array, weights: Array, phi: Array) -> Array:
        return -0.5 * weights * jnp.square(y - eta)

    def constant(self, y: Array, weights: Array) -> Array:
        return 0.5 * jnp.log(weights) - 0.5 * jnp.log(2.0 * jnp.pi) * jnp.ones_like(y)

    @property
    def canonical(self) -> bool:
        return True

    def expected_information(self, eta: Array, weights: Array, phi: Array) -> Array:
        return weights * jnp.ones_like(eta)

    def variance(self, mu: Array, phi: Array) -> Array:
        return jnp.ones_like(mu)

    def deviance_contribution(self, y: Array, mu: Array, weights: Array, phi: Array) -> Array:
        return weights * jnp.square(y - mu)

    def simulate(
        self, rng: np.random.Generator, eta: np.ndarray, weights: np.ndarray, phi: np.ndarray, sigma: float = 1.0
    ) -> np.ndarray:
        return np.asarray(eta + sigma / np.sqrt(weights)[:, None] * rng.standard_normal(eta.shape))


class _Saturation(NamedTuple):
    """What a negative binomial is made of, with m = mu / phi; all of it from one exponential and one logarithm.

    No derivative of these is a difference of large numbers as phi goes to infinity.
    """

    softplus: Array  # log(1 + m)
    logistic: Array  # m / (1 + m)
    part: Array  # phi log(1 + m), which tends to mu
    mean: Array  # mu / (1 + m)
    gap: Array  # log(1 + m) - m / (1 + m)


@jax.custom_jvp
def _saturation(log_mu: Array, phi: Array) -> _Saturation:
    """log_mu (n,), phi > 0 a scalar."""
    t = log_mu - jnp.log(phi)
    e, low = jnp.exp(-jnp.abs(t)), t < 0.0
    less, whole, p = _less_by_series(e), jnp.log(1.0 + e), jnp.where(low, e, 1.0) / (1.0 + e)
    near = e < _NEAR
    s = jnp.where(low, 0.0, t) + jnp.where(near, e + less, whole)
    gap = jnp.where(low & near, less + e * p, s - p)
    return _Saturation(s, p, phi * s, phi * p, gap)


@_saturation.defjvp
def _saturation_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[_Saturation, _Saturation]:
    (log_mu, phi), (d_log_mu, d_phi) = primals, tangents
    x = _saturation(log_mu, phi)
    p, q, dt = x.logistic, 1.0 - x.logistic, d_log_mu - d_phi / phi
    pp = p * p
    return x, _Saturation(
        p * dt, p * q * dt, x.mean * d_log_mu + x.gap * d_phi, x.mean * q * d_log_mu + pp * d_phi, pp * dt
    )


@dataclass(frozen=True)
class NegativeBinomial(Family):
    """NB2 counts, Var = mu + mu^2 / phi; glmmTMB's nbinom2, MASS's negative.binomial(theta) with theta = phi.

    Args:
        theta: phi where it is known, > 0, ``inf`` being the Poisson; None to estimate it.
        link: log (default), sqrt, identity or any `Link` into (0, inf).
    """

    theta: float | None = None
    link: Link = links.log
    name: ClassVar[str] = "negative.binomial"
    discrete: ClassVar[bool] = True
    limit: ClassVar[str] = "poisson"
    links_offered: ClassVar[tuple[str, ...]] = ("log", "sqrt", "identity")

    def __init__(self, theta: float | None = None, link: str | Link = "log") -> None:
        if theta is not None and not (isinstance(theta, float) and theta == math.inf):
            arguments.number(theta, "theta", 0.0)
        object.__setattr__(self, "theta", None if theta is None else float(theta))
        object.__setattr__(self, "link", _offered(link, self))

    @property
    def phi_names(self) -> tuple[str, ...]:
        return ("phi",) if self.theta is None else ()

    def shape(self, phi: Any) -> Any:
        """phi, given or estimated; may be infinite."""
        return phi[0] if self.theta is None else self.theta

    def _finite_shape(self, phi: Array, like: Array) -> Array:
        """phi, an infinite one as a number at which nothing is left of its inverse."""
        shape, most = jnp.asarray(self.shape(phi), like.dtype), jnp.finfo(like.dtype).max ** 0.5
        return jnp.where(shape < most, shape, most)

    def kernel(self, y: Array, eta: Array, weights: Array, phi: Array) -> Array:
        log_mu, shape = self.link.log_mu(eta), self._finite_shape(phi, eta)
        # y log(mu / (1 + mu / phi)) - phi log(1 + mu / phi): the Poisson kernel and what vanishes with mu / phi
        x = _saturation(log_mu, shape)
        value = _product(y, log_mu) - y * x.softplus - x.part
        if self.theta is None:
            value = value + log_rising(y, shape)
        return weights * value

    def constant(self, y: Array, weights: Array) -> Array:
        counts = -gammaln(y + 1.0)
        if self.theta is not None:
            counts = counts + log_rising(y, self._finite_shape(jnp.zeros(0), counts))
        return weights * counts

    def expected_information(self, eta: Array, weights: Array, phi: Array) -> Array:
        if self.link is links.log:
            return weights * _saturation(eta, self._finite_shape(phi, eta)).mean
        mu, slope = jax.jvp(self.link.inverse, (eta,), (jnp.ones_like(eta),))
        return weights * (slope / mu) * slope / (1.0 + mu / self.shape(phi))

    def check_response(self, y: np.ndarray, weights: np.ndarray | None, name: str, labels: Any) -> list[str]:
        _check_counts(y, name, labels, "negative binomial")
        return []

    def ends(self, y: np.ndarray) -> np.ndarray | None:
        return _ends_of_counts(y, self.link)

    def mustart(self, y: Array, weights: Array) -> Array:
        return y + jnp.where(y == 0.0, 1.0 / 6.0, 0.0)

    def variance(self, mu: Array, phi: Array) -> Array:
        return mu * (1.0 + mu / self.shape(phi))

    def deviance_contribution(self, y: Array, mu: Array, weights: Array, phi: Array) -> Array:
        shape = self._finite_shape(phi, mu)
        away = (y - mu) / (mu + shape)
        near = jnp.abs(away) < 0.5  # then the Poisson deviance and what vanishes with 1 / phi
        small = jnp.where(near, away, 0.0)
        poisson = (y - mu) * (1.0 + small) + (y + shape) * _log1p_less(small)
        rest = jnp.where(near, poisson, (y + shape) * jnp.log1p(jnp.where(near, 0.0, away)))
        return 2.0 * weights * (xlogy(y, y) - xlogy(y, mu) - rest)

    def simulate(
        self, rng: np.random.Generator, eta: np.ndarray, weights: np.ndarray, phi: np.ndarray, sigma: float = 1.0
    ) -> np.ndarray:
        self._unweighted(weights)
        mu, shape = self._mean_within(eta, 0.0, np.inf), float(self.shape(phi))
        if shape < 1e6:
            return rng.negative_binomial(shape, shape / (shape + mu))
        # the probability above would round; the mixture that it stands for does not
        return rng.poisson(mu if np.isinf(shape) else mu * (rng.standard_gamma(shape, mu.shape) / shape))

    def __str__(self) -> str:
        return f"{'nbinom2' if self.theta is None else f'negative.binomial({self.theta:g})'} ({self.link.name})"


#: Code of log densities that change what they read themselves when they run: a list of calls, a random generator.
_CHANGES: set[Any] = set()


@dataclass(frozen=True)
class Custom(Family):
    """A user's family: a log density, and nothing else.

    Args:
        logpdf: ``logpdf(y, eta, aux)`` -> log density per row, written with jax.numpy. `aux` is a dict
            of the parameters below and ``aux["weights"]`` (trials or prior weights, ones by default). A `logpdf` that
            uses these applies them itself; the values of one that does not are multiplied by them.
        link: name or `Link`; used for fitted values and `predict(type="response")` only.
        aux: name -> starting value of each extra *positive* parameter, estimated jointly on the log
            scale. For a parameter on the whole line write ``jnp.log(aux["k"])`` in `logpdf`.
        sampler: ``sampler(rng, eta, aux)`` -> responses (n, s), needed by `simulate` only: a NumPy generator, linear
            predictors (n, s), and `aux` as above with weights (n, 1).

    The Laplace approximation uses the observed information, found by differentiation.

    Raises:
        TypeError, ValueError: what is wrong with logpdf, found by tracing it: its arguments, NumPy instead of
            jax.numpy, one number for all rows.

    What `logpdf` reads from outside (globals, closures, attributes of its object, a file) is read when a model is
    fitted; a change of it is seen by the next fit. A fitted model keeps to what it was fitted with, and refuses what
    would have to read it again.
    """

    logpdf: Callable[[Array, Array, Mapping[str, Array]], Array]
    link: Link
    aux: tuple[tuple[str, float], ...]
    weighs: bool = field(compare=False)  # whether logpdf uses the weights
    sampler: Callable[[np.random.Generator, np.ndarray, Mapping[str, Any]], Any] | None = field(compare=False)
    #: `logpdf` with what it reads from outside, as it was when the family was made or given to a fit.
    read: Hashable = field(repr=False)
    name: ClassVar[str] = "custom"

    def __init__(
        self,
        logpdf: Callable[[Array, Array, Mapping[str, Array]], Array],
        link: str | Link = "identity",
        aux: Mapping[str, float] | None = None,
        sampler: Callable[[np.random.Generator, np.ndarray, Mapping[str, Any]], Any] | None = None,
    ) -> None:
        if aux is not None and not isinstance(aux, Mapping):
            raise TypeError(f"aux must be a dict of names and starting values, got {arguments.shown(aux)}")
        for key, value in (aux or {}).items():
            if not isinstance(key, str):
                raise TypeError(f"aux must have texts as names, got {arguments.shown(key)}")
            try:
                arguments.number(value, "value", 0.0)
            except ValueError:
                raise ValueError(
                    f"aux[{key!r}] must start at a positive number, got {value!r}: extra parameters are estimated "
                    "on the log scale; for one on the whole line use jnp.log(aux[...]) in logpdf"
                ) from None
            if key == "weights":
                raise ValueError("aux['weights'] is filled with the prior weights; choose another name")
        items = tuple((k, float(v)) for k, v in (aux or {}).items())
        if sampler is not None:
            arguments.function(sampler, "sampler")
        numbers = {**dict.fromkeys((k for k, _ in items), 0), "weights": 1}
        like = ("y", 1), ("eta", 1), numbers
        used = arguments.of_rows(logpdf, "logpdf", like, ", the log density of that row")
        if not used[1]:
            raise ValueError("logpdf(y, eta, aux) does not depend on eta, the linear predictor")
        object.__setattr__(self, "logpdf", logpdf)
        object.__setattr__(self, "link", links.get(link))
        object.__setattr__(self, "aux", items)
        object.__setattr__(self, "sampler", sampler)
        object.__setattr__(self, "weighs", used[2 + sorted(numbers).index("weights")])
        object.__setattr__(self, "read", contents(logpdf))

    def at_present(self) -> Family:
        other = super().at_present()
        if contents(self.logpdf) == self.read:
            return other
        now = Custom(self.logpdf, other.link, dict(self.aux))
        return other._with(read=now.read, weighs=now.weighs)

    @property
    def phi_names(self) -> tuple[str, ...]:
        return tuple(k for k, _ in self.aux)

    def phi_start(self) -> tuple[float, ...]:
        return tuple(v for _, v in self.aux)

    def kernel(self, y: Array, eta: Array, weights: Array, phi: Array) -> Array:
        aux = {name: phi[i] for i, name in enumerate(self.phi_names)}
        # rows of weight 0 are not there, whatever the user's function makes of it
        value = jnp.where(weights > 0.0, self._log_density(y, eta, {**aux, "weights": weights}), 0.0)
        return value if self.weighs else weights * value

    def _log_density(self, y: Array, eta: Array, aux: Mapping[str, Array]) -> Array:
        """`logpdf`, which is traced for several programs of one model: all of them must read the same from outside."""
        before, code = contents(self.logpdf), getattr(self.logpdf, "__code__", type(self.logpdf))
        if before != self.read and code not in _CHANGES:
            raise ValueError(
                "what the log density of this family reads from outside (globals, closures, attributes) has changed "
                "since the model was fitted, and this would mix both: fit the model again"
            )
        value = self.logpdf(y, eta, aux)
        if contents(self.logpdf) != before:
            _CHANGES.add(code)
        return value

    def simulate(
        self, rng: np.random.Generator, eta: np.ndarray, weights: np.ndarray, phi: np.ndarray, sigma: float = 1.0
    ) -> np.ndarray:
        if self.sampler is None:
            raise NotImplementedError(
                "a log density alone cannot be drawn from: give the family sampler=f with f(rng, eta, aux) -> responses"
            )
        if not self.weighs:
            self._unweighted(weights)
        aux = {name: float(phi[i]) for i, name in enumerate(self.phi_names)}
        drawn = np.asarray(self.sampler(rng, eta, {**aux, "weights": weights[:, None]}))
        if drawn.shape != eta.shape:
            raise ValueError(f"the sampler returned shape {drawn.shape} for linear predictors of shape {eta.shape}")
        return drawn


def _offered(link: str | Link, family: Family) -> Link:
    if isinstance(link, Link):
        return links.get(link)
    if not isinstance(link, str) or link not in links.LINKS or link not in family.links_offered:
        raise ValueError(
            f"link {link!r} is not available for the {family.name} family; it offers "
            f"{', '.join(family.links_offered)}, or any gj.Link object"
        )
    return links.LINKS[link]


_QUASI = (
    "quasi families have no likelihood and cannot be fitted by Laplace or quadrature; for overdispersion use an "
    'observation-level random effect "(1 | obs)", or the beta-binomial or negative binomial families'
)
_NAMES: dict[str, Callable[..., Family]] = {"binomial": Binomial, "poisson": Poisson, "gaussian": Gaussian}
_ALIASES = {"bernoulli": "binomial", "normal": "gaussian"}


def get(family: str | Family, link: str | Link | None = None) -> Family:
    """Family object from R's spelling: ``"binomial"``, ``"binomial(probit)"``, ``"poisson(link = 'sqrt')"``,
    ``"negative.binomial(2)"`` (theta fixed), ``"nbinom2"`` (phi estimated), or a `Family`.

    Raises:
        ValueError: unknown family or link; the message lists what there is.
    """
    if isinstance(family, Family):
        if link is not None:
            raise ValueError("give the link inside the family object, not twice")
        return family.at_present()
    if not isinstance(family, str):
        raise ValueError(f"family must be a name or a gj.families object, got {type(family).__name__}")
    match = re.fullmatch(r"\s*(?:MASS::)?([A-Za-z][\w.]*)\s*(?:\((.*)\))?\s*", family)
    name = match.group(1) if match else family
    arguments = [a.strip() for a in (match.group(2) or "").split(",")] if match else []
    arguments = [a for a in arguments if a]
    if name.lower().startswith("quasi"):
        raise ValueError(_QUASI)
    key = _ALIASES.get(name.lower(), name.lower())
    theta: float | None = None
    for argument in arguments:
        label, _, value = argument.rpartition("=")
        value = value.strip().strip("'\"")
        try:
            theta = float(value)
        except ValueError:
            if label.strip() not in ("", "link"):
                raise ValueError(f"family {family!r}: unknown argument {label.strip()!r}") from None
            link = value
    if key in ("negative.binomial", "negative_binomial", "nbinom2"):
        return NegativeBinomial(theta, link or "log")
    if key not in _NAMES or theta is not None:
        raise ValueError(
            f"unknown family {family!r}; available: {', '.join(_NAMES)}, nbinom2, negative.binomial(theta), "
            "or gj.families.Custom(logpdf, link, aux)"
        )
    return _NAMES[key]() if link is None else _NAMES[key](link=link)
