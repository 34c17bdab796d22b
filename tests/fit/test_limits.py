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


# -------------------- residuals that are small beside the random effects
def _dense_reml(design: gj.Design, theta: np.ndarray) -> float:
    """REML criterion from the dense covariance in extended precision."""
    y, X = (np.asarray(a, np.longdouble) for a in (design.y, design.X))
    V = np.diag(1 / np.asarray(design.weights, np.longdouble))
    for term in design.terms:
        z = np.asarray(design.z[term.block], np.longdouble)[:, term.columns]
        z = z @ term.structure.host_factor(theta[term.theta])
        level = np.asarray(design.level[term.block])
        V = V + (z @ z.T) * (level[:, None] == level)
    columns, p = np.column_stack([X, y]), X.shape[1]
    logdet = np.longdouble(0)
    for j in range(V.shape[0]):  # Cholesky and forward substitution in one
        pivot = np.sqrt(V[j, j])
        logdet += 2 * np.log(pivot)
        below = V[j + 1 :, j] / pivot
        columns[j] /= pivot
        columns[j + 1 :] -= np.outer(below, columns[j])
        V[j + 1 :, j + 1 :] -= np.outer(below, below)
    Q = np.zeros_like(columns)
    for j in range(p + 1):  # Gram and Schmidt, twice
        v = columns[:, j].copy()
        for _ in range(2):
            v -= Q[:, :j] @ (Q[:, :j].T @ v)
        Q[:, j] = v / np.sqrt(v @ v)
        size = (v @ v) if j == p else np.log(v @ v)
        logdet += 0 if j == p else size
    N = y.size - p
    return float(logdet + N * (1 + np.log(2 * np.pi * size / N)))


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="needs 80-bit floats")
@pytest.mark.filterwarnings("ignore:the fit is singular")
@pytest.mark.parametrize(
    ("seed", "lowest"), [(0, 426.31042137272), (2, 433.09327889), (3, 436.42355504), (6, 426.74696642)]
)
def test_random_effects_thousands_of_times_the_residuals(seed: int, lowest: float) -> None:
    """`lowest` by Nelder and Mead on the dense criterion, and by lme4 with bobyqa, from several starts."""
    r = np.random.default_rng(seed)
    g, h = r.integers(0, 7, 84), r.integers(0, 4, 84)
    x, w = r.normal(size=84), r.uniform(0.5, 2, 84)
    y = 1e4 + 0.3 * x + r.normal(size=7)[g] + 1.4 * r.normal(size=84)
    data = pd.DataFrame({"g": g, "h": h, "x": x, "w": w, "y": y})
    formula = "y ~ 0 + poly(x, 2) + (1 | h:g) + (x | g)"
    design = gj.design(formula, data, weights="w")
    fits = [gj.lmer(formula, data, weights="w", control={"optimizer": o}) for o in ("auto", "bfgs")]
    for m in fits:
        assert m.converged and m.objective == pytest.approx(lowest, abs=1e-7)
        assert m.objective == pytest.approx(_dense_reml(design, m.theta), abs=1e-8)
    np.testing.assert_allclose(fits[0].fixef, fits[1].fixef, atol=0.03 * fits[0].bse.iloc[0])


def _exact_data() -> pd.DataFrame:
    r = np.random.default_rng(0)
    g, x = np.arange(120) % 12, r.normal(size=120)
    return pd.DataFrame({"x": x, "g": g, "exact": 2 * x + 1 + g, "noisy": 2 * x + 1 + g + r.normal(size=120)})


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8])
def test_a_response_fitted_exactly_by_its_groups_is_no_fit(scale: float) -> None:
    data = _exact_data()
    data["y"] = scale * (data["exact"] + 1e-12 * np.random.default_rng(1).normal(size=120))
    for fit in (gj.lmer, lambda formula, data: gj.glmer(formula, data, "gaussian")):
        with pytest.warns(UserWarning, match="fitted exactly") as said:
            m = fit("y ~ x + (1 | g)", data)
        assert not m.converged and len(said) == 1 and "fitted exactly" in str(m.summary())


def test_exact_fits_among_refits_and_many() -> None:
    data = _exact_data()
    m = gj.lmer("noisy ~ x + (1 | g)", data)
    with pytest.warns(UserWarning, match="fitted exactly"):
        assert not m.refit(data["exact"]).converged
    many = gj.fit_many("noisy ~ x + (1 | g)", data, y=data[["exact", "noisy"]], family="gaussian")
    assert many.fits["status"].tolist() == ["not converged", "converged"]
    assert "fitted exactly" in many.fits["message"].iloc[0]


# -------------------- linear predictors in the hundreds
@pytest.mark.parametrize("offset", [200.0, 800.0])
def test_one_offset_in_the_hundreds(offset: float) -> None:
    """Against the dense Laplace approximation at the estimates, whose slope in each parameter vanishes there."""
    r = np.random.default_rng(0)
    g, x, u = np.arange(120) % 12, r.normal(size=120), r.normal(size=12) * 0.5
    y = r.poisson(np.exp(0.3 + 0.4 * x + u[g]))
    data = pd.DataFrame({"y": y, "x": x, "g": g, "o": np.where(np.arange(120) == 0, offset, 0.0)})
    m = gj.glmer("y ~ x + offset(o) + (1 | g)", data, "poisson")
    assert m.converged and m.loglik < 0.0

    def laplace(theta: float, beta: np.ndarray) -> float:
        """Group by group in one dimension, the mode by bisection of the score."""
        total = 0.0
        fixed = data["o"].to_numpy() + beta[0] + beta[1] * x
        for j in range(12):
            own, counts = fixed[g == j], y[g == j]

            def score(b: float, own: np.ndarray = own, counts: np.ndarray = counts) -> float:
                with np.errstate(over="ignore"):
                    return float((counts - np.exp(own + b)).sum() - b / theta**2)

            low, high = -2e3, 2e3
            for _ in range(200):
                middle = 0.5 * (low + high)
                low, high = (middle, high) if score(middle) > 0 else (low, middle)
            mu = np.exp(own + low)
            logs = counts * (own + low) - mu - np.array([np.sum(np.log(np.arange(1, c + 1))) for c in counts])
            total += -2 * logs.sum() + low**2 / theta**2 + np.log1p(theta**2 * mu.sum())
        return total

    theta, beta = float(m.theta[0]), m.beta
    assert m.objective == pytest.approx(laplace(theta, beta), rel=1e-9)
    for step in (1.01, 0.99):
        assert laplace(theta * step, beta) > m.objective
        assert laplace(theta, beta + (step - 1.0) * 10 * m.bse.to_numpy() * [1, 0]) > m.objective


# -------------------- numbers at the ends of floating point
def test_predictions_beyond_the_largest_number_are_infinite_and_said() -> None:
    m = gj.glmer("y0 ~ x + (1 | g)", _counts(0), "poisson")
    new = pd.DataFrame({"x": [0.0, 5000.0], "g": [0, 1]})
    eta = m.predict(new)
    with pytest.warns(UserWarning, match="1 prediction is larger than any"):
        mu = m.predict(new, type="response")
    assert mu[1] == np.inf and eta[1] > 710.0 and mu[0] == pytest.approx(np.exp(eta[0]), rel=1e-14)
    with pytest.warns(UserWarning, match="larger than any"):
        table = m.predict(new, type="response", se=True)
    assert not table.isna().any(axis=None) and table.iloc[1]["se"] == np.inf
    with pytest.raises(gj.DataError, match="no response can be drawn"):
        gj.simulate("y0 ~ x + (1 | g)", new.assign(y0=0), {"beta": [0.0, 1.0], "theta": [1.0]}, family="poisson")


@pytest.mark.parametrize("size", [1e160, 1e-160])
@pytest.mark.parametrize("name", ["y0", "x", "w", "o"])
def test_units_whose_squares_overflow_are_refused_by_name(name: str, size: float) -> None:
    data = _counts(0).assign(w=1.0, o=0.1)
    data[name] = data[name] * size
    with pytest.raises(gj.DataError, match=f"({name}|weights|offset).* in other units"):
        gj.lmer("y0 ~ x + (x | g)", data, weights="w", offset="o")


def test_a_log_likelihood_above_zero_is_no_fit_of_counts() -> None:
    """A family that calls itself discrete and is none."""

    class Wrong(gj.families.Poisson):
        def constant(self, y: jax.Array, weights: jax.Array) -> jax.Array:
            return 10.0 * jnp.ones_like(y)

    with pytest.warns(UserWarning, match="log-likelihood above 0"):
        m = gj.glmer("y0 ~ x + (1 | g)", _counts(0), Wrong())
    assert not m.converged
