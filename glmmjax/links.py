"""Link functions, as stable functions of the linear predictor eta.

A link is what the families need of it: the mean, and the logarithms of the mean and of one minus the
mean, in forms that neither overflow nor cancel for |eta| up to 700. Derivatives come from JAX. A
user's link needs its inverse only: ``Link("mylink", inverse=f)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from copy import copy
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._arguments import function, of_rows, text
from .compiling.digest import contents
from .compiling.entry import entry

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
    """

    name: str
    inverse: Fn
    link: Fn | None = None
    log_mean: Fn | None = None
    log1m_mean: Fn | None = None
    #: What the functions read from outside, as it was when the link was made.
    read: Hashable = field(init=False, repr=False)

    def __post_init__(self) -> None:
        text(self.name, "name")
        for name in ("inverse", "link", "log_mean", "log1m_mean"):
            if name == "inverse" or getattr(self, name) is not None:
                function(getattr(self, name), name)
        object.__setattr__(self, "read", self._reads())

    def _reads(self) -> Hashable:
        return contents((self.inverse, self.link, self.log_mean, self.log1m_mean))

    def at_present(self) -> Link:
        """The link with what its functions read from outside now: itself, unless that has changed."""
        if LINKS.get(self.name) is self or (now := self._reads()) == self.read:
            return self
        other = copy(self)
        object.__setattr__(other, "read", now)
        return other

    def text_for_key(self) -> str | None:
        """See `programs.text_of`: what a link of this package does is in its name."""
        return f"link {self.name}" if LINKS.get(self.name) is self else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Links of this package are pickled and copied by name: they stay the objects that families compare with."""
        if LINKS.get(self.name) is self:
            return get, (self.name,)
        return Link, tuple(getattr(self, f.name) for f in fields(self) if f.init)

    def log_mu(self, eta: Array) -> Array:
        """log of the mean, elementwise."""
        return jnp.log(self.inverse(eta)) if self.log_mean is None else self.log_mean(eta)

    def log1m_mu(self, eta: Array) -> Array:
        """log of one minus the mean, elementwise."""
        return jnp.log1p(-self.inverse(eta)) if self.log1m_mean is None else self.log1m_mean(eta)

    def mu_eta(self, eta: Array) -> Array:
        """Derivative of the mean with respect to eta, elementwise."""
        return jax.jvp(self.inverse, (eta,), (jnp.ones_like(eta),))[1]

    def direction(self, low: float, high: float) -> int:
        """1 if the mean rises with eta over the whole line, inside [low, high], -1 if it falls; 0 if it does neither.

        On the host. A user's link is judged by its means at some points; those here are not bounded in eta but for
        identity, sqrt and the inverse ones.
        """
        if self in _WHOLE_LINE:
            return 1
        return 0 if self in LINKS.values() else _judged(self.inverse, low, high)

    def eta_of(self, mu: Array) -> Array:
        """Linear predictor at a mean: g(mu), elementwise."""
        if self.link is not None:
            return self.link(mu)
        return _bisect(self.inverse, mu)


@lru_cache(maxsize=64)
@entry
def _judged(inverse: Fn, low: float, high: float) -> int:
    mu = np.asarray(inverse(jnp.asarray(np.sinh(np.linspace(-6.0, 6.0, 121)))))
    if np.isnan(mu).any() or mu.min() < low or mu.max() > high or mu[0] == mu[-1]:
        return 0
    steps = np.diff(np.minimum(mu, np.finfo(float).max))
    return 1 if (steps >= 0.0).all() else -1 if (steps <= 0.0).all() else 0


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
def softplus_logistic(x: Array) -> tuple[Array, Array]:
    """log(1 + exp(x)) and its derivative 1 / (1 + exp(-x)), from one exponential and without overflow."""
    e = jnp.exp(-jnp.abs(x))
    denominator = 1.0 + e
    return jnp.maximum(x, 0.0) + jnp.log(denominator), jnp.where(x >= 0.0, 1.0, e) / denominator


@softplus_logistic.defjvp
def _softplus_logistic_jvp(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    (x,), (dx,) = primals, tangents
    value, mu = softplus_logistic(x)
    return (value, mu), (mu * dx, mu * (1.0 - mu) * dx)


def softplus(x: Array) -> Array:
    """log(1 + exp(x)), accurate to rounding of the sum it enters."""
    return softplus_logistic(x)[0]


def logistic(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return softplus_logistic(x)[1]


_MAX_EXP = 700.0


#: Where `exp_extended` leaves the exponential: no mean is so large.
EXP_RANGE = 300.0


def exp_extended(eta: Array) -> Array:
    """exp(eta), continued from EXP_RANGE on by its second-order expansion there.

    A linear predictor in the hundreds, by an offset, say, then has a slope that leads back, and no value overflows.
    """
    t = jnp.where(eta < EXP_RANGE, 0.0, eta - EXP_RANGE)
    return jnp.exp(jnp.where(eta < EXP_RANGE, eta, EXP_RANGE)) * (1.0 + t + 0.5 * t * t)


def _cloglog_log_mean(eta: Array) -> Array:
    # log(1 - exp(-t)), t = exp(eta): eta + log((1 - exp(-t)) / t); the ratio by its series for small t
    t = jnp.exp(jnp.clip(eta, -_MAX_EXP, _MAX_EXP))
    small = t < 1e-5
    safe = jnp.where(small, 1.0, t)
    tail = jnp.where(small, 0.0, t)
    series = eta - 0.5 * jnp.where(small, t, 0.0) + jnp.where(small, t, 0.0) ** 2 / 24.0
    return jnp.where(small, series, jnp.log(-jnp.expm1(-safe)) + 0.0 * tail)


#: Distance from the edge of a link's range at which log densities are continued by a parabola.
EDGE = 1e-4


def log_extended(x: Array) -> Array:
    """log(x), continued below EDGE by its second-order expansion there.

    PIRLS then finds its way back from a linear predictor outside the range of the link. The mode itself
    must lie inside (`Family.in_range`), where this is the logarithm.
    """
    inside = x > EDGE
    t = jnp.where(inside, 0.0, (x - EDGE) / EDGE)
    return jnp.log(jnp.where(inside, x, EDGE)) + t - 0.5 * t * t


def _log1mexp(eta: Array) -> Array:
    """log(1 - exp(eta)) for eta < -EDGE, continued concavely beyond (see `log_extended`)."""
    inside = eta < -EDGE
    safe = jnp.where(inside, eta, -EDGE)
    near = safe > -math.log(2.0)
    value = jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, safe, -0.1))),
        jnp.log1p(-jnp.exp(jnp.where(near, -1.0, safe))),
    )
    # value, slope and curvature of log(1 - exp(eta)) at -EDGE, continued
    t = jnp.where(inside, 0.0, (eta + EDGE) / EDGE)
    return value - t - 0.5 * t * t


logit = Link(
    "logit",
    inverse=logistic,
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
    inverse=lambda eta: -jnp.expm1(-jnp.exp(jnp.where(eta < _MAX_EXP, eta, _MAX_EXP))),
    link=lambda mu: jnp.log(-jnp.log1p(-mu)),
    log_mean=_cloglog_log_mean,
    log1m_mean=lambda eta: -exp_extended(eta),
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
    inverse=jnp.exp,
    link=jnp.log,
    log_mean=lambda eta: eta,
    log1m_mean=_log1mexp,
)
identity = Link("identity", inverse=lambda eta: eta, link=lambda mu: mu, log_mean=log_extended)
sqrt = Link(
    "sqrt",
    inverse=lambda eta: eta * eta,
    link=jnp.sqrt,
    # only eta > 0 is the link's branch; for y > 0 the other one is a second basin with the same means,
    # which would make conditional modes depend on where PIRLS starts
    log_mean=lambda eta: 2.0 * log_extended(eta),
)
inverse = Link("inverse", inverse=lambda eta: 1.0 / eta, link=lambda mu: 1.0 / mu, log_mean=lambda eta: -jnp.log(eta))
inverse_squared = Link(
    "1/mu^2",
    inverse=lambda eta: 1.0 / jnp.sqrt(eta),
    link=lambda mu: 1.0 / (mu * mu),
    log_mean=lambda eta: -0.5 * jnp.log(eta),
)

_WHOLE_LINE = (logit, probit, cloglog, cauchit, log)
LINKS: dict[str, Link] = {
    link.name: link for link in (logit, probit, cloglog, cauchit, log, identity, sqrt, inverse, inverse_squared)
}


@lru_cache(maxsize=64)
def _check(link: Link) -> None:
    """Refuse a user's link whose functions are not elementwise ones of JAX."""
    for name in ("inverse", "link", "log_mean", "log1m_mean"):
        given = getattr(link, name)
        if given is not None:
            of_rows(given, name, (("mu" if name == "link" else "eta", 1),))


def get(link: str | Link) -> Link:
    """The link object for a name such as ``"probit"``; a `Link` is returned as it is.

    Raises:
        ValueError: unknown name (the message lists the known ones). TypeError, ValueError: a user's function that is
            not elementwise, or not written with jax.numpy.
    """
    if isinstance(link, Link):
        if link is not LINKS.get(link.name):
            _check(link)
        return link
    try:
        return LINKS[link]
    except (KeyError, TypeError):
        known = ", ".join(LINKS)
        raise ValueError(f"unknown link {link!r}; known links: {known}, or gj.Link(name, inverse=f)") from None
