"""Links: inverses, derivatives and logarithms in stable forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from scipy import special, stats

import glmmjax as gj
from glmmjax import links

#: link -> interior of its range on the scale of eta, where it must invert
ETA = {
    "logit": (-30.0, 30.0),
    "probit": (-8.0, 5.0),
    "cloglog": (-30.0, 3.0),
    "cauchit": (-1e4, 1e4),
    "log": (-30.0, 30.0),
    "identity": (-30.0, 30.0),
    "sqrt": (1e-3, 30.0),
    "inverse": (1e-3, 30.0),
    "1/mu^2": (1e-3, 30.0),
}
#: closed forms by SciPy, float64: mu and its derivative
EXACT = {
    "logit": (special.expit, lambda e: special.expit(e) * special.expit(-e)),
    "probit": (special.ndtr, stats.norm.pdf),
    "cloglog": (lambda e: -np.expm1(-np.exp(e)), lambda e: np.exp(e - np.exp(e))),
    "cauchit": (stats.cauchy.cdf, stats.cauchy.pdf),
    "log": (np.exp, np.exp),
    "identity": (lambda e: e, np.ones_like),
    "sqrt": (np.square, lambda e: 2.0 * e),
    "inverse": (lambda e: 1.0 / e, lambda e: -1.0 / e**2),
    "1/mu^2": (lambda e: e**-0.5, lambda e: -0.5 * e**-1.5),
}


def grid(name: str) -> np.ndarray:
    low, high = ETA[name]
    return np.linspace(low, high, 41)


def test_every_link_is_tested() -> None:
    assert set(links.LINKS) == set(ETA) == set(EXACT)


@pytest.mark.parametrize("name", ETA)
def test_inverts(name: str) -> None:
    link, eta = links.get(name), grid(name)
    # 1 - mu is rounded to 1e-16 where mu is near 1: eta is then known to 1e-16 / (1 - mu)
    mu = np.asarray(link.inverse(eta))
    slope = np.abs(np.asarray(link.mu_eta(jnp.asarray(eta))))
    known = 1e-14 * np.maximum(1.0, np.abs(eta)) + 4e-16 * np.maximum(np.abs(mu), 1e-300) / slope
    assert (np.abs(np.asarray(link.eta_of(jnp.asarray(mu))) - eta) <= known).all()


@pytest.mark.parametrize("name", ETA)
def test_mean_and_slope(name: str) -> None:
    link, eta = links.get(name), grid(name)
    mean, slope = EXACT[name]
    assert_close(link.inverse(eta), mean(eta), rtol=1e-13, atol=1e-300, what="mu")
    # 1 - mu is rounded to 1e-16, which the cloglog's slope multiplies by exp(eta) <= 20
    assert_close(link.mu_eta(jnp.asarray(eta)), slope(eta), rtol=1e-12, atol=3e-15, what="dmu/deta")


@pytest.mark.parametrize("name", ["logit", "probit", "cloglog", "cauchit"])
def test_logarithms_in_the_tails(name: str) -> None:
    link = links.get(name)
    eta = np.array([-700.0, -200.0, -37.0, -5.0, -0.3, 0.0, 0.3, 2.0, 5.0])
    exact = {
        "logit": (-np.logaddexp(0.0, -eta), -np.logaddexp(0.0, eta)),
        "probit": (special.log_ndtr(eta), special.log_ndtr(-eta)),
        # for tiny t, log(1 - exp(-t)) is log t - t / 2
        "cloglog": (
            np.where(eta < -20.0, eta - 0.5 * np.exp(eta), np.log(-np.expm1(-np.exp(eta)))),
            -np.exp(eta),
        ),
        "cauchit": (stats.cauchy.logcdf(eta), stats.cauchy.logsf(eta)),
    }[name]
    # the sum it enters has terms of size 1 or more: absolute accuracy is what counts near 0
    assert_close(link.log_mu(eta), exact[0], rtol=1e-12, atol=2e-16, what="log mu")
    assert_close(link.log1m_mu(eta), exact[1], rtol=1e-12, atol=2e-16, what="log(1 - mu)")


def test_log_link_near_mean_one() -> None:
    eta = np.array([-50.0, -5.0, -0.8, -0.6, -1e-2, -2e-4])
    expected = np.where(eta > -0.5, np.log(-np.expm1(eta)), np.log1p(-np.exp(eta)))
    assert_close(links.log.log1m_mu(eta), expected, rtol=1e-13)


def test_log_extended_is_smooth_to_second_order() -> None:
    edge, h = links.EDGE, 1e-7 * links.EDGE
    inside = np.array([edge * 1.001, 1.0, 50.0])
    assert_close(links.log_extended(jnp.asarray(inside)), np.log(inside), rtol=1e-15)
    for order in range(3):
        f = links.log_extended
        for _ in range(order):
            f = jax.grad(f)
        below, above = float(f(edge - h)), float(f(edge + h))
        # they differ by 2 h times the next derivative (2 / edge relative), and by rounding
        assert below == pytest.approx(above, rel=1e-6)
    assert np.isfinite(float(links.log_extended(-1e6)))


@pytest.mark.parametrize("name", ETA)
def test_slope_is_the_derivative_by_autodiff(name: str) -> None:
    link = links.get(name)
    eta = jnp.asarray(grid(name))
    assert_close(link.mu_eta(eta), jax.vmap(jax.grad(link.inverse))(eta), rtol=1e-14)


# -------------------- user links
def test_link_from_its_inverse_alone() -> None:
    mine = gj.Link("mine", inverse=lambda eta: 1.0 / (1.0 + jnp.exp(-eta)))
    eta = jnp.linspace(-9.0, 9.0, 31)
    assert_close(mine.inverse(eta), links.logit.inverse(eta), rtol=1e-14)
    assert_close(mine.mu_eta(eta), links.logit.mu_eta(eta), rtol=1e-10)
    assert_close(mine.log_mu(eta), links.logit.log_mu(eta), rtol=1e-11, atol=1e-15)
    assert_close(mine.log1m_mu(eta), links.logit.log1m_mu(eta), rtol=1e-11, atol=1e-15)
    # found by bisection on [-40, 40] in 60 halvings, then by the rounding of mu
    assert_close(mine.eta_of(mine.inverse(eta)), eta, atol=1e-11)


def test_objects_and_names() -> None:
    assert links.get("probit") is links.probit
    assert links.get(links.cauchit) is links.cauchit
    assert hash(gj.Link("a", inverse=jnp.exp)) == hash(gj.Link("a", inverse=jnp.exp))
    with pytest.raises(ValueError, match=r"unknown link 'prohbit'; known links: logit, probit, cloglog.*gj.Link"):
        links.get("prohbit")
