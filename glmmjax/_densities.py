"""Pieces of log densities that keep their digits, and their derivatives' too, where the formulas would lose them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


def product(y: Array, log_value: Array) -> Array:
    """y * log_value with 0 * (-inf) = 0, derivatives included."""
    positive = y > 0.0
    return jnp.where(positive, y * jnp.where(positive, log_value, 0.0), 0.0)


_NEAR = 0.1


def _less_by_series(x: Array) -> Array:
    """log(1 + x) - x for |x| < _NEAR."""
    r = x / (2.0 + x)  # log(1 + x) = 2 artanh r
    q, series = r * r, jnp.zeros_like(r)
    for n in (13, 11, 9, 7, 5, 3):
        series = (series + 2.0 / n) * q
    return r * (series - x)


@jax.custom_jvp
def log1p_less(x: Array) -> Array:
    """log(1 + x) - x to rounding, for x > -1."""
    near = jnp.abs(x) < _NEAR
    small, large = jnp.where(near, x, 0.0), jnp.where(near, 1.0, x)
    return jnp.where(near, _less_by_series(small), jnp.log(1.0 + large) - large)


@log1p_less.defjvp
def _log1p_less_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return log1p_less(x), -x / (1.0 + x) * dx


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
    value = base * log1p_less(x) + (y - 0.5) * jnp.log1p(x) + (_stirling(base + y) - _stirling(base))
    # Gamma(z + 1) = z Gamma(z) from phi up to the base; in two products, which cannot overflow
    some = jnp.where(low, phi, 1.0)
    factors = [1.0 + y / (some + k) for k in range(_STIRLING_FROM)]
    products = [a * b * c * d for a, b, c, d in (factors[:4], factors[4:])]
    below = y * jnp.log1p(_STIRLING_FROM / some) - jnp.log(products[0]) - jnp.log(products[1])
    return value + jnp.where(low, below, 0.0)


class Saturation(NamedTuple):
    """What a negative binomial is made of, with m = mu / phi; all of it from one exponential and one logarithm.

    No derivative of these is a difference of large numbers as phi goes to infinity.
    """

    softplus: Array  # log(1 + m)
    logistic: Array  # m / (1 + m)
    part: Array  # phi log(1 + m), which tends to mu
    mean: Array  # mu / (1 + m)
    gap: Array  # log(1 + m) - m / (1 + m)


@jax.custom_jvp
def saturation(log_mu: Array, phi: Array) -> Saturation:
    """log_mu (n,), phi > 0 a scalar."""
    t = log_mu - jnp.log(phi)
    e, low = jnp.exp(-jnp.abs(t)), t < 0.0
    less, whole, p = _less_by_series(e), jnp.log(1.0 + e), jnp.where(low, e, 1.0) / (1.0 + e)
    near = e < _NEAR
    s = jnp.where(low, 0.0, t) + jnp.where(near, e + less, whole)
    gap = jnp.where(low & near, less + e * p, s - p)
    return Saturation(s, p, phi * s, phi * p, gap)


@saturation.defjvp
def _saturation_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Saturation, Saturation]:
    (log_mu, phi), (d_log_mu, d_phi) = primals, tangents
    x = saturation(log_mu, phi)
    p, q, dt = x.logistic, 1.0 - x.logistic, d_log_mu - d_phi / phi
    pp = p * p
    return x, Saturation(
        p * dt, p * q * dt, x.mean * d_log_mu + x.gap * d_phi, x.mean * q * d_log_mu + pp * d_phi, pp * dt
    )
