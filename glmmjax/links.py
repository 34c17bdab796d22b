"""Link functions, as stable functions of the linear predictor eta.

A link is what the families need of it: the mean, and the logarithms of the mean and of one minus the
mean, in forms that neither overflow nor cancel for |eta| up to 700. Derivatives come from JAX. A
user's link needs its inverse only: ``Link("mylink", inverse=f)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

Fn = Callable[[Array], Array]


@dataclass(frozen=True)
class Link:
    """A link function g with mu = g^-1(eta).

    Args:
        name: printed in summaries.
        inverse: eta -> mu, elementwise, written with jax.numpy.
        link: mu -> eta; only starting values and `link`-scale conversions use it. Found numerically
            (bisection on [-40, 40]) when not given; g^-1 must then be increasing.
        log_mean: eta -> log mu. Default log(inverse(eta)).
        log1m_mean: eta -> log(1 - mu), for means in (0, 1). Default log1p(-inverse(eta)).
        domain: open interval of eta in which mu is valid for every family that offers this link.
    """

    name: str
    inverse: Fn
    link: Fn | None = None
    log_mean: Fn | None = None
    log1m_mean: Fn | None = None

    def log_mu(self, eta: Array) -> Array:
        """log of the mean, elementwise."""
        return jnp.log(self.inverse(eta)) if self.log_mean is None else self.log_mean(eta)

    def log1m_mu(self, eta: Array) -> Array:
        """log of one minus the mean, elementwise."""
        return jnp.log1p(-self.inverse(eta)) if self.log1m_mean is None else self.log1m_mean(eta)

    def mu_eta(self, eta: Array) -> Array:
        """Derivative of the mean with respect to eta, elementwise."""
        return jax.jvp(self.inverse, (eta,), (jnp.ones_like(eta),))[1]

    def eta_of(self, mu: Array) -> Array:
        """Linear predictor at a mean: g(mu), elementwise."""
        if self.link is not None:
            return self.link(mu)
        return _bisect(self.inverse, mu)


def _bisect(inverse: Fn, mu: Array) -> Array:
    low, high = jnp.full_like(mu, -40.0), jnp.full_like(mu, 40.0)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        below = inverse(middle) < mu
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, 60, halve, (low, high))
    return 0.5 * (low + high)


@jax.custom_jvp
def softplus(x: Array) -> Array:
    """log(1 + exp(x)) without overflow; its derivative is exactly the logistic function."""
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@softplus.defjvp
def _softplus_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return softplus(x), jax.nn.sigmoid(x) * dx


_MAX_EXP = 700.0


def _exp(eta: Array) -> Array:
    return jnp.exp(jnp.minimum(eta, _MAX_EXP))


def _cloglog_log_mean(eta: Array) -> Array:
    # log(1 - exp(-t)), t = exp(eta): eta + log((1 - exp(-t)) / t); the ratio by its series for small t
    t = jnp.exp(jnp.clip(eta, -_MAX_EXP, _MAX_EXP))
    small = t < 1e-5
    safe = jnp.where(small, 1.0, t)
    tail = jnp.where(small, 0.0, t)
    series = eta - 0.5 * jnp.where(small, t, 0.0) + jnp.where(small, t, 0.0) ** 2 / 24.0
    return jnp.where(small, series, jnp.log(-jnp.expm1(-safe)) + 0.0 * tail)


def _log1mexp(eta: Array) -> Array:
    """log(1 - exp(eta)) for eta < 0, -inf elsewhere."""
    inside = eta < 0.0
    safe = jnp.where(inside, eta, -1.0)
    near = safe > -math.log(2.0)
    value = jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, safe, -0.1))),
        jnp.log1p(-jnp.exp(jnp.where(near, -1.0, safe))),
    )
    return jnp.where(inside, value, -jnp.inf)


logit = Link(
    "logit",
    inverse=jax.nn.sigmoid,
    link=lambda mu: jnp.log(mu) - jnp.log1p(-mu),
    log_mean=lambda eta: -softplus(-eta),
    log1m_mean=lambda eta: -softplus(eta),
)
probit = Link(
    "probit",
    inverse=jax.scipy.special.ndtr,
    link=jax.scipy.special.ndtri,
    log_mean=jax.scipy.special.log_ndtr,
    log1m_mean=lambda eta: jax.scipy.special.log_ndtr(-eta),
)
cloglog = Link(
    "cloglog",
    inverse=lambda eta: -jnp.expm1(-_exp(eta)),
    link=lambda mu: jnp.log(-jnp.log1p(-mu)),
    log_mean=_cloglog_log_mean,
    log1m_mean=lambda eta: -_exp(eta),
)
cauchit = Link(
    "cauchit",
    # the angle form keeps full relative accuracy in both tails, where 1/2 + atan(eta)/pi cancels
    inverse=lambda eta: jnp.arctan2(jnp.ones_like(eta), -eta) / math.pi,
    link=lambda mu: -1.0 / jnp.tan(math.pi * mu),
    log_mean=lambda eta: jnp.log(jnp.arctan2(jnp.ones_like(eta), -eta) / math.pi),
    log1m_mean=lambda eta: jnp.log(jnp.arctan2(jnp.ones_like(eta), eta) / math.pi),
)
log = Link(
    "log",
    inverse=_exp,
    link=jnp.log,
    log_mean=lambda eta: eta,
    log1m_mean=_log1mexp,
)
identity = Link("identity", inverse=lambda eta: eta, link=lambda mu: mu)
sqrt = Link(
    "sqrt",
    inverse=lambda eta: eta * eta,
    link=jnp.sqrt,
    log_mean=lambda eta: 2.0 * jnp.log(jnp.abs(eta)),
)
inverse = Link(
    "inverse", inverse=lambda eta: 1.0 / eta, link=lambda mu: 1.0 / mu, log_mean=lambda eta: -jnp.log(eta)
)
inverse_squared = Link(
    "1/mu^2",
    inverse=lambda eta: 1.0 / jnp.sqrt(eta),
    link=lambda mu: 1.0 / (mu * mu),
    log_mean=lambda eta: -0.5 * jnp.log(eta),
)

LINKS: dict[str, Link] = {
    link.name: link
    for link in (logit, probit, cloglog, cauchit, log, identity, sqrt, inverse, inverse_squared)
}


def get(link: str | Link) -> Link:
    """The link object for a name such as ``"probit"``; a `Link` is returned as it is.

    Raises:
        ValueError: unknown name (the message lists the known ones).
    """
    if isinstance(link, Link):
        return link
    try:
        return LINKS[link]
    except KeyError:
        known = ", ".join(LINKS)
        raise ValueError(f"unknown link {link!r}; known links: {known}, or gj.Link(name, inverse=f)") from None
