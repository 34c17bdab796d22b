"""Models at the edge: a dispersion at infinity."""

from __future__ import annotations

import warnings
from decimal import Decimal, getcontext

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import glmmjax as gj
from glmmjax.families import NegativeBinomial
from glmmjax.results import NotSupportedError


# -------------------- the negative binomial towards the Poisson
def _exact(y: int, mu: Decimal, phi: Decimal) -> Decimal:
    """Log density but for -log y!, by sums of logs in 90 digits."""
    rising = sum(((1 + k / phi).ln() for k in range(y)), start=Decimal(0))
    return rising + y * mu.ln() - (y + phi) * (1 + mu / phi).ln()


@pytest.mark.parametrize("phi", [1e-8, 1e-3, 0.5, 7.9, 8.1, 60.0, 1e4, 1e8, 1e12, 1e15])
def test_density_of_the_negative_binomial_and_its_derivatives_in_the_dispersion(phi: float) -> None:
    """Against 90 digits; derivatives by differences there."""
    getcontext().prec = 90
    y, eta = np.array([0.0, 1.0, 2.0, 3.0, 10.0, 50.0, 400.0]), np.array([-3.0, 0.2, 4.0, 0.9, 2.4, 3.8, 6.0])
    family, one = NegativeBinomial(), jnp.ones(1)

    def density(log_phi: jax.Array, y: jax.Array, eta: jax.Array) -> jax.Array:
        return family.kernel(y[None], eta[None], one, jnp.exp(log_phi)[None])[0]

    log_phi, h = float(np.log(phi)), Decimal("1e-12")
    parts = [density, jax.grad(density), jax.grad(jax.grad(density))]
    got = [np.asarray(jax.vmap(f, (None, 0, 0))(jnp.asarray(log_phi), jnp.asarray(y), jnp.asarray(eta))) for f in parts]
    shape = Decimal(float(np.exp(log_phi)))
    for i in range(y.size):
        mu = Decimal(float(eta[i])).exp()
        below, at, above = (_exact(int(y[i]), mu, shape * (s * h).exp()) for s in (-1, 0, 1))
        first, second = (above - below) / (2 * h), (above - 2 * at + below) / (h * h)
        size = max(abs(float(at)), float(mu))  # the kernel is a difference of terms like these
        assert abs(got[0][i] - float(at)) < 1e-14 * size + 1e-12 * abs(float(at))
        for value, want in ((got[1][i], first), (got[2][i], second)):
            assert abs(value - float(want)) < 1e-10 * abs(float(want)) + 1e-12 * min(size, size**2 / phi)


def test_known_dispersion_at_infinity_is_the_poisson() -> None:
    y, eta, one = jnp.arange(6.0), jnp.linspace(-2.0, 3.0, 6), jnp.ones(6)
    none, poisson = jnp.zeros(0), gj.families.get("poisson")
    for family in (NegativeBinomial(np.inf), gj.families.get("negative.binomial(1e14)")):
        own = family.kernel(y, eta, one, none) + family.constant(y, one)
        np.testing.assert_allclose(own, poisson.kernel(y, eta, one, none) + poisson.constant(y, one), rtol=1e-11)
        mu = jnp.exp(eta)
        for name in ("deviance_contribution", "variance"):
            arguments = (mu, none) if name == "variance" else (y, mu, one, none)
            np.testing.assert_allclose(
                getattr(family, name)(*arguments), getattr(poisson, name)(*arguments), rtol=1e-11
            )


def _counts(seed: int, columns: int = 1) -> pd.DataFrame:
    """Poisson counts in 12 groups; with seed 0 less dispersed than that."""
    r = np.random.default_rng(seed)
    g, x, u = np.repeat(np.arange(12), 15), r.normal(size=180), 0.4 * r.normal(size=12)
    mu = np.exp(0.3 + 0.3 * x + u[g])
    return pd.DataFrame({"x": x, "g": g, **{f"y{j}": r.poisson(mu) for j in range(columns)}})


@pytest.mark.filterwarnings("ignore:the counts show no overdispersion")
@pytest.mark.parametrize("nAGQ", [0, 1])
def test_counts_without_overdispersion_have_the_numbers_of_the_poisson(nAGQ: int) -> None:
    data = _counts(0)
    m, p = (gj.glmer("y0 ~ x + (1 | g)", data, family, nAGQ=nAGQ) for family in ("nbinom2", "poisson"))
    assert m.converged and np.isinf(m.phi["phi"]) and m.at_limit == "poisson"
    assert abs(m.loglik - p.loglik) < 1e-9 and m.df == p.df + 1
    np.testing.assert_allclose(m.fixef, p.fixef, atol=1e-7)
    np.testing.assert_allclose(m.theta, p.theta, atol=1e-6)
    np.testing.assert_allclose(m.bse, p.bse, rtol=1e-6)
    assert m.undetermined == [] and "no overdispersion" in str(m.summary())


def test_everything_of_a_fit_at_the_limit_is_that_of_the_poisson() -> None:
    data = _counts(0, columns=5)
    with pytest.warns(UserWarning, match="no overdispersion"):
        m = gj.glmer("y0 ~ x + (1 | g)", data, "nbinom2")
    p = gj.glmer("y0 ~ x + (1 | g)", data, "poisson")
    full = m.vcov(full=True)
    np.testing.assert_allclose(full.iloc[:-1, :-1], p.vcov(full=True), rtol=1e-5, atol=1e-9)
    assert full.iloc[-1, -1] == np.inf
    np.testing.assert_allclose(m.vcov(type="robust"), p.vcov(type="robust"), rtol=1e-5)
    for kind in ("deviance", "pearson", "working", "response", "quantile"):
        np.testing.assert_allclose(m.residuals(kind), p.residuals(kind), atol=1e-6)
    ours, theirs = (f.predict(data.head(), type="response", se=True) for f in (m, p))
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-6)
    pd.testing.assert_frame_equal(m.simulate(2, seed=3), p.simulate(2, seed=3))
    np.testing.assert_allclose(m.influence().cooks_distance(), p.influence().cooks_distance(), rtol=1e-4)
    table = gj.anova(p, m, boundary=True)
    assert table.iloc[1]["Pr(>Chisq) boundary"] == 1.0
    with pytest.raises(NotSupportedError, match="family='poisson'"):
        m.profile()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        each = [gj.glmer(f"y{j} ~ x + (1 | g)", data, "nbinom2") for j in range(5)]
        dropped = gj.drop1(m)
        draws = m.bootstrap(5, seed=1)
    # without x the counts are overdispersed: the likelihood ratio is that of two negative binomial fits
    assert dropped.loc["x", "LRT"] == pytest.approx(
        2 * (m.loglik - gj.glmer("y0 ~ 1 + (1 | g)", data, "nbinom2").loglik)
    )
    finite = draws.frame["phi"][np.isfinite(draws.frame["phi"])]
    assert draws.failed == () and len(finite) < 5 and (finite < 1e6).all()

    many = gj.fit_many("y0 ~ x + (1 | g)", data, y=data[[f"y{j}" for j in range(5)]], family="nbinom2")
    limit = np.array([np.isinf(f.phi["phi"]) for f in each])
    assert 0 < limit.sum() < 5 and (np.isinf(many.fits["phi"]) == limit).all()
    np.testing.assert_allclose(many.fits["logLik"], [f.loglik for f in each], atol=1e-7)
    errors = many.frame[many.frame["term"] == "x"]["std_error"]
    np.testing.assert_allclose(errors, [f.bse["x"] for f in each], rtol=1e-5)
    assert many.fits["message"][limit].str.contains("poisson").all()


@pytest.mark.filterwarnings("ignore:the fit is singular")
def test_a_start_far_out_finds_overdispersion() -> None:
    r = np.random.default_rng(1)
    g = np.repeat(np.arange(12), 15)
    data = pd.DataFrame({"g": g, "x": r.normal(size=180), "y0": r.negative_binomial(2, 0.5, 180)})
    near, far = (gj.glmer("y0 ~ x + (1 | g)", data, "nbinom2", start={"phi": [v]}) for v in (1.0, 1e13))
    assert far.converged and far.phi["phi"] == pytest.approx(near.phi["phi"], rel=1e-5) and near.phi["phi"] < 10.0


def test_fit_design_at_the_limit() -> None:
    design = gj.design("y0 ~ x + (1 | g)", _counts(0))
    m, p = (gj.fit_design(design, family, covariance=True) for family in ("nbinom2", "poisson"))
    assert int(m.status) == 0 and np.isinf(m.phi[0])
    np.testing.assert_allclose(m.beta, p.beta, atol=1e-7)
    np.testing.assert_allclose(m.vcov, p.vcov, rtol=1e-6, atol=1e-12)
