"""Families: log densities against SciPy, derivatives against closed forms, tails, names and refusals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from helpers import DenseLaplace, assert_close, fixed_params, load_data, reference_model
from scipy import special, stats

import glmmjax as gj
from glmmjax import families, links
from glmmjax._errors import NotSupportedError
from glmmjax.families import Family, NegativeBinomial
from glmmjax.links import Link

PAIRS = [
    *(("binomial", link) for link in families.Binomial.links_offered),
    *(("poisson", link) for link in families.Poisson.links_offered),
    *(("negative.binomial", link) for link in NegativeBinomial.links_offered),
]
IDS = [f"{family}-{link}" for family, link in PAIRS]
SHAPE = 1.7


def make(family: str, link: str) -> families.Family:
    return NegativeBinomial(SHAPE, link) if family == "negative.binomial" else families.get(f"{family}({link})")


def inside(link: str, family: str) -> np.ndarray:
    """Linear predictors inside the range of the link."""
    if link in ("sqrt", "identity"):
        return np.linspace(0.05, 6.0, 25)
    if link == "log":
        return np.linspace(-6.0, -0.05, 25) if family == "binomial" else np.linspace(-4.0, 4.0, 25)
    return np.linspace(-3.0, 2.0, 25)


def responses(family: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    if family != "binomial":
        return np.concatenate([[0.0, 0.0], rng.poisson(3.0, size - 2)]), rng.uniform(0.5, 2.0, size)
    trials = rng.integers(1, 9, size).astype(float)
    successes = rng.binomial(trials.astype(int), 0.4)
    successes[0], successes[1] = 0, trials[1]
    return successes / trials, trials


def derivatives(family: Any, y: Any, eta: Any, weights: Any, phi: Any = ()) -> tuple[np.ndarray, ...]:
    phi = jnp.asarray(phi, float)
    out = family.derivatives(jnp.asarray(y), jnp.asarray(eta), jnp.asarray(weights), phi)
    return tuple(np.asarray(v) for v in out)


@pytest.mark.parametrize(("name", "link"), PAIRS, ids=IDS)
def test_log_density(name: str, link: str) -> None:
    family, eta = make(name, link), inside(link, name)
    y, w = responses(name, eta.size)
    mu = np.asarray(family.link.inverse(eta))
    kernel = np.asarray(family.kernel(jnp.asarray(y), jnp.asarray(eta), jnp.asarray(w), jnp.zeros(0)))
    total = kernel + np.asarray(family.constant(jnp.asarray(y), jnp.asarray(w)))
    if name == "binomial":
        expected = stats.binom.logpmf(np.rint(w * y), w, mu)
    elif name == "poisson":
        expected = w * stats.poisson.logpmf(y, mu)
    else:
        expected = w * stats.nbinom.logpmf(y, SHAPE, SHAPE / (SHAPE + mu))
    # gammaln of JAX and SciPy, each good to a few 1e-15 of its size
    assert_close(total, expected, rtol=2e-13, atol=2e-13)


@pytest.mark.parametrize(("name", "link"), PAIRS, ids=IDS)
def test_derivatives_closed_form(name: str, link: str) -> None:
    """Score and information against a (y - mu) mu' / V and its derivative, as textbooks have them."""
    family, eta = make(name, link), inside(link, name)
    y, w = responses(name, eta.size)
    design = gj.design_arrays(y, np.ones(eta.size), [(np.ones(eta.size), np.arange(eta.size) % 3)], weights=w)
    dense = DenseLaplace(design, name, link, shape=SHAPE)
    log_f, score, observed, expected = dense.rows(eta)
    value, ours_score, ours_observed = derivatives(family, y, eta, w)
    assert_close(value, log_f, rtol=1e-12, atol=1e-13, what="kernel")
    # the textbook form cancels near mu = 1 (1 - mu from 0.05 here)
    assert_close(ours_score, score, rtol=1e-11, atol=1e-12, what="score")
    assert_close(ours_observed, observed, rtol=1e-10, atol=1e-11, what="observed information")
    information = family.expected_information(jnp.asarray(eta), jnp.asarray(w), jnp.zeros(0))
    assert_close(information, expected, rtol=1e-11, what="expected information")
    if family.canonical:
        assert_close(information, ours_observed, rtol=1e-12, what="canonical: the two agree")


NOT_PROBIT = [pair for pair in PAIRS if pair[1] != "probit"]  # NumPy has no ndtr in long double


@pytest.mark.parametrize(("name", "link"), NOT_PROBIT, ids=["-".join(pair) for pair in NOT_PROBIT])
def test_derivatives_by_differences(name: str, link: str) -> None:
    """Differences of the closed-form log density in long double (80 bits on x86)."""
    family, eta = make(name, link), inside(link, name)
    y, w = responses(name, eta.size)
    L = np.longdouble
    yl, wl = y.astype(L), w.astype(L)

    def log_f(e: np.ndarray) -> np.ndarray:
        mu = {
            "logit": lambda: 1 / (1 + np.exp(-e)),
            "cloglog": lambda: -np.expm1(-np.exp(e)),
            "cauchit": lambda: L(0.5) + np.arctan(e) / np.arccos(L(-1)),
            "log": lambda: np.exp(e),
            "sqrt": lambda: e * e,
            "identity": lambda: e,
        }[link]()
        if name == "binomial":
            out = np.where(yl > 0, yl * np.log(mu), 0) + np.where(yl < 1, (1 - yl) * np.log1p(-mu), 0)
        elif name == "poisson":
            out = yl * np.log(mu) - mu
        else:
            out = yl * np.log(mu / L(SHAPE)) - (yl + L(SHAPE)) * np.log1p(mu / L(SHAPE))
        return wl * out

    h = L(1e-4)
    e = eta.astype(L)
    first = (8 * (log_f(e + h) - log_f(e - h)) - (log_f(e + 2 * h) - log_f(e - 2 * h))) / (12 * h)
    second = (16 * (log_f(e + h) + log_f(e - h)) - (log_f(e + 2 * h) + log_f(e - 2 * h)) - 30 * log_f(e)) / (12 * h * h)
    _, score, observed = derivatives(family, y, eta, w)
    # fourth order: h^4 times the fifth and sixth derivatives, which are up to 5!/0.05^5 near the edge
    near = inside(link, name).min() < 0.1 and link in ("sqrt", "identity")
    near = near or (name, link) == ("binomial", "log")
    assert_close(score, first.astype(float), rtol=1e-8 if near else 1e-11, atol=1e-11, what="score")
    assert_close(observed, -second.astype(float), rtol=1e-7 if near else 1e-9, atol=1e-9, what="information")


@pytest.mark.parametrize(("name", "link"), PAIRS, ids=IDS)
def test_tails(name: str, link: str) -> None:
    """Kernel, score and information are finite for |eta| <= 700, or the point is out of range and says so."""
    family = make(name, link)
    eta = np.concatenate([[-700.0, -300.0, -100.0, -40.0], np.linspace(-30, 30, 61), [40.0, 100.0, 300.0, 700.0]])
    for y in (0.0, 1.0) if name == "binomial" else (0.0, 3.0):
        ys, ones = np.full_like(eta, y), np.ones_like(eta)
        ok = np.asarray(family.in_range(jnp.asarray(ys), jnp.asarray(eta)))
        value, score, observed = derivatives(family, ys, eta, ones)
        for what, part in {"kernel": value, "score": score, "information": observed}.items():
            bad = eta[ok & ~np.isfinite(part)]
            assert bad.size == 0, f"{what} at y = {y} is not finite at eta = {bad}"
        assert not np.isnan(value).any()
        expected = np.asarray(family.expected_information(jnp.asarray(eta), jnp.asarray(ones), jnp.zeros(0)))
        if name == "binomial" and link != "log":
            assert np.isfinite(expected).all(), f"expected information at eta = {eta[~np.isfinite(expected)]}"
            assert (expected >= 0.0).all()
        if (name, link) == ("poisson", "log"):  # beyond, the kernel is a parabola that leads back
            assert (ok == (eta < links.EXP_RANGE)).all()
        elif link not in ("sqrt", "identity") and (name, link) != ("binomial", "log"):
            assert ok.all()


@pytest.mark.parametrize("link", ["logit", "probit", "cloglog", "cauchit"])
def test_signs_in_the_tails(link: str) -> None:
    """Far out the density of what was not observed vanishes, and its score points back."""
    family = make("binomial", link)
    y, ones = np.array([1.0, 0.0]), np.ones(2)
    value, score, _ = derivatives(family, y, np.array([-30.0, 30.0]), ones)
    assert (value < -3.0).all() and score[0] > 0.0 and score[1] < 0.0
    value, score, _ = derivatives(family, y, np.array([30.0, -30.0]), ones)
    assert (np.abs(value) < 0.02).all() and (np.abs(score) < 1e-3).all()


@pytest.mark.parametrize(
    ("family", "eta", "y", "ok"),
    [
        ("binomial(log)", [-1.0, -1.0, 0.5, 0.5], [0.0, 1.0, 0.0, 0.5], [True, True, False, False]),
        ("poisson(identity)", [2.0, -1.0, 0.0, -0.1], [1.0, 1.0, 0.0, 0.0], [True, False, True, False]),
        ("poisson(sqrt)", [2.0, -1.0, 0.0], [1.0, 1.0, 0.0], [True, False, True]),
        ("binomial(logit)", [-700.0, 700.0], [1.0, 0.0], [True, True]),
    ],
)
def test_in_range(family: str, eta: list[float], y: list[float], ok: list[bool]) -> None:
    assert families.get(family).in_range(jnp.asarray(y), jnp.asarray(eta)).tolist() == ok


@pytest.mark.parametrize(("name", "link"), PAIRS, ids=IDS)
def test_deviance_contributions(name: str, link: str) -> None:
    """Twice the log density at mu = y less that at mu; zero there; variance function of the family."""
    family, eta = make(name, link), inside(link, name)
    y, w = responses(name, eta.size)
    mu = np.asarray(family.link.inverse(eta))
    none = jnp.zeros(0)
    d = np.asarray(family.deviance_contribution(*(jnp.asarray(v) for v in (y, mu, w)), none))
    if name == "binomial":
        s = np.rint(w * y)
        expected = 2 * (stats.binom.logpmf(s, w, y) - stats.binom.logpmf(s, w, mu))
        variance = mu * (1 - mu)
    elif name == "poisson":
        expected = 2 * w * (stats.poisson.logpmf(y, np.maximum(y, 1e-300)) - stats.poisson.logpmf(y, mu))
        variance = mu
    else:
        p = SHAPE / (SHAPE + np.stack([np.maximum(y, 1e-300), mu]))
        full, fit = stats.nbinom.logpmf(y, SHAPE, p)
        expected, variance = 2 * w * (full - fit), mu + mu**2 / SHAPE
    # differences of log densities that cancel where mu is near y
    assert_close(d, expected, rtol=1e-10, atol=1e-12)
    assert_close(family.variance(jnp.asarray(mu), none), variance, rtol=1e-14)
    at_y = family.deviance_contribution(jnp.asarray(y), jnp.asarray(y), jnp.asarray(w), none)
    assert_close(at_y, np.zeros_like(y), atol=1e-13)


@pytest.mark.parametrize(("name", "link"), PAIRS, ids=IDS)
def test_mustart_is_inside(name: str, link: str) -> None:
    family = make(name, link)
    y = np.array([0.0, 1.0, 0.5]) if name == "binomial" else np.array([0.0, 1.0, 40.0])
    mu = np.asarray(family.mustart(jnp.asarray(y), jnp.ones(3)))
    assert np.isfinite(np.asarray(family.link.eta_of(jnp.asarray(mu)))).all()
    assert (mu > 0.0).all() and (name != "binomial" or (mu < 1.0).all())
    if name == "binomial":
        assert_close(mu, (y + 0.5) / 2.0, rtol=1e-15)  # R: (w y + 0.5) / (w + 1)


# -------------------- names
@pytest.mark.parametrize(
    ("text", "family", "link"),
    [
        ("binomial", "binomial", "logit"),
        ("bernoulli", "binomial", "logit"),
        ("binomial(probit)", "binomial", "probit"),
        ("binomial('cloglog')", "binomial", "cloglog"),
        ('binomial(link = "cauchit")', "binomial", "cauchit"),
        ("binomial()", "binomial", "logit"),
        ("poisson", "poisson", "log"),
        ("poisson(link='sqrt')", "poisson", "sqrt"),
        ("poisson(identity)", "poisson", "identity"),
        ("negative.binomial(2)", "negative.binomial", "log"),
        ("MASS::negative.binomial(theta = 2)", "negative.binomial", "log"),
        ("nbinom2(2, link='sqrt')", "negative.binomial", "sqrt"),
        ("nbinom2", "negative.binomial", "log"),
    ],
)
def test_spellings(text: str, family: str, link: str) -> None:
    made = families.get(text)
    assert (made.name, made.link.name) == (family, link)
    assert made.link is links.LINKS[link]
    if family == "negative.binomial":
        assert made.theta == (2.0 if "2" in text.replace("nbinom2", "") else None)
    assert made == families.get(made) and hash(made) == hash(families.get(text))


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gausian", ["unknown family 'gausian'", "binomial", "poisson", "Custom"]),
        ("binomial(sqrt)", ["'sqrt'", "binomial", "logit, probit, cloglog, cauchit, log", "gj.Link"]),
        ("binomial(prohbit)", ["'prohbit'", "logit, probit"]),
        ("poisson(logit)", ["'logit'", "log, sqrt, identity"]),
        ("quasibinomial", ["quasi", "observation-level", "beta-binomial", "negative binomial"]),
        ("quasipoisson(log)", ["quasi", "observation-level", "beta-binomial", "negative binomial"]),
        ("binomial(size=3)", ["size"]),
        (3, ["family", "int"]),
    ],
)
def test_refusals(family: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        families.get(family)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_estimated_negative_binomial() -> None:
    """Against glmmTMB, polished to its optimum; its "sigma" of nbinom2 is our phi."""
    reference = reference_model("arab_nb2_tmb")
    results = reference["results"]
    m = gj.glmer(reference["formula"], load_data("Arabidopsis"), family="nbinom2")
    assert m.loglik == pytest.approx(results["logLik"], abs=1e-7)
    np.testing.assert_allclose(m.fixef, results["fixef"]["cond"]["values"], rtol=1e-5, atol=1e-6)
    assert m.phi["phi"] == pytest.approx(results["sigma"], rel=1e-5)
    sds = {block.group: block.sd[0] for block in m.VarCorr()}
    for block in results["VarCorr"]["cond"]:
        assert sds[block["group"]] == pytest.approx(block["sd"][0], rel=1e-5)
    vcov = np.array(results["vcov"]["cond"]["values"]).reshape(len(m.beta), -1)
    np.testing.assert_allclose(m.bse, np.sqrt(np.diag(vcov)), rtol=1e-5)
    assert m.df == results["df"]
    # a known phi gives the same likelihood, and one parameter less
    fixed = gj.laplace_deviance(m.theta, m.beta, m._design, NegativeBinomial(float(m.phi["phi"])))
    assert float(fixed) == pytest.approx(m.objective, abs=1e-8)
    assert "nbinom2" in str(m.family)
    assert m.simulate(2, seed=1).shape == (m.nobs, 2)
    assert np.isfinite(m.residuals("quantile")).all()


def test_negative_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="theta must be positive, got -1"):
        NegativeBinomial(-1.0)


@pytest.mark.parametrize(
    ("aux", "match"),
    [
        ({"k": 0.0}, "must start at a positive number"),
        ({"k": -2.0}, "must start at a positive number"),
        ({"k": np.inf}, "must start at a positive number"),
        ({"weights": 1.0}, "choose another name"),
    ],
)
def test_custom_refuses(aux: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        families.Custom(lambda y, eta, aux: eta, aux=aux)


def test_hessian_choice() -> None:
    from glmmjax.objective.laplace import resolve_hessian

    custom = families.Custom(binomial_logpdf, "logit")
    assert resolve_hessian(None, families.get("binomial(probit)")) == "expected"
    assert resolve_hessian(None, families.get("poisson")) == "expected"
    assert resolve_hessian(None, NegativeBinomial(2.0)) == "observed"
    assert resolve_hessian(None, custom) == "observed"
    with pytest.raises(ValueError, match="'expected' is not available: family custom"):
        resolve_hessian("expected", custom)
    with pytest.raises(ValueError, match="must be None, 'expected' or 'observed', got 'fisher'"):
        resolve_hessian("fisher", custom)


# -------------------- user families
def binomial_logpdf(y: Any, eta: Any, aux: Any) -> Any:
    n = aux["weights"]
    s = n * y
    gammaln = jax.scipy.special.gammaln
    constant = gammaln(n + 1.0) - gammaln(s + 1.0) - gammaln(n - s + 1.0)
    return constant + s * eta - n * jnp.logaddexp(0.0, eta)


def nb_logpdf(y: Any, eta: Any, aux: Any) -> Any:
    gammaln = jax.scipy.special.gammaln
    r, mu = aux["size"], jnp.exp(eta)
    return gammaln(y + r) - gammaln(r) - gammaln(y + 1.0) + r * jnp.log(r) + y * eta - (y + r) * jnp.log(r + mu)


BINOMIAL = families.Custom(binomial_logpdf, "logit")
NB = families.Custom(nb_logpdf, "log", aux={"size": 2.0})
CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"


def test_custom_binomial_at_fixed_parameters(cbpp: Any) -> None:
    record = fixed_params("cbpp_nagq1")
    design = gj.design(CBPP, cbpp)
    run = jax.jit(lambda t, b: gj.laplace_deviance(t, b, design, BINOMIAL))
    for point in record["points"]:
        x = np.array(point["par"], float)
        assert float(run(x[:1], x[1:])) == pytest.approx(point["objective"], rel=1e-9)


def test_custom_binomial_fit(cbpp: Any) -> None:
    mine, theirs = gj.glmer(CBPP, cbpp, family=BINOMIAL), gj.glmer(CBPP, cbpp)
    assert mine.loglik == pytest.approx(theirs.loglik, rel=1e-9)
    # both stop where 1e-10 deviance units are left: 1e-5 standard errors
    assert_close(mine.beta, theirs.beta, atol=1e-5 * theirs.bse.min())
    assert_close(mine.theta, theirs.theta, atol=1e-5)
    assert_close(mine.bse, theirs.bse, rtol=1e-5)
    assert mine.fit_stats.evaluations <= 30


def test_custom_with_dispersion() -> None:
    """A negative binomial with its shape as an extra parameter, against the built-in at that shape."""
    rng = np.random.default_rng(11)
    g = np.repeat(np.arange(20), 12)
    x = rng.normal(size=g.size)
    eta = 1.0 + 0.4 * x + rng.normal(size=20)[g] * 0.6
    y = rng.negative_binomial(3.0, 3.0 / (3.0 + np.exp(eta))).astype(float)
    data = {"y": y, "x": x, "g": g.astype(str)}
    m = gj.glmer("y ~ x + (1 | g)", data, family=NB)
    assert list(m.phi.index) == ["size"] and m.df == 4
    assert 1.5 < m.phi["size"] < 8.0
    design = gj.design("y ~ x + (1 | g)", data)
    theta, beta = m.theta, m.beta
    same = gj.laplace_deviance(theta, beta, design, NegativeBinomial(float(m.phi["size"])))
    assert m.objective == pytest.approx(float(same), rel=1e-12)
    ours = gj.laplace_deviance(theta, beta, design, NB, phi=[float(m.phi["size"])])
    assert m.objective == pytest.approx(float(ours), rel=1e-12)
    # maximised over the shape: no nearby shape is better, and the profile is flat there
    dense = [
        DenseLaplace(design, "negative.binomial", "log", "observed", m.phi["size"] * f).deviance(theta, beta)
        for f in (0.99, 1.0, 1.01)
    ]
    assert dense[1] == pytest.approx(m.objective, rel=1e-12)
    assert dense[1] < min(dense[0], dense[2])
    curvature = (dense[0] - 2 * dense[1] + dense[2]) / 1e-4
    assert abs(dense[2] - dense[0]) / 0.02 < 0.02 * curvature  # third derivatives only
    full = m.vcov(full=True)
    assert full.index[-1] == "log(size)" and full.shape == (4, 4)


def logistic_kernel(y: Any, eta: Any, aux: Any) -> Any:
    return y * eta - jnp.logaddexp(0.0, eta)


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_multiply_a_density_that_does_not_use_them(compiled: bool, cbpp: Any) -> None:
    """With trials as weights that is the binomial without its coefficients."""
    family = families.Custom(jax.jit(logistic_kernel) if compiled else logistic_kernel, "logit")
    m, s, f = gj.glmer(CBPP, cbpp, family), cbpp["incidence"], cbpp["size"] - cbpp["incidence"]
    coefficients = special.gammaln(s + f + 1) - special.gammaln(s + 1) - special.gammaln(f + 1)
    assert m.objective - 2.0 * coefficients.sum() == pytest.approx(184.052563743, abs=2e-8)  # lme4, tight
    assert_close(m.beta, [-1.39853, -0.99233, -1.12867, -1.58031], atol=2e-5)
    with pytest.raises(NotImplementedError, match="prior weights multiply"):
        sampled = families.Custom(logistic_kernel, "logit", sampler=lambda rng, eta, aux: rng.random(eta.shape))
        gj.glmer(CBPP, cbpp, sampled).simulate(1)


@pytest.mark.parametrize(
    ("logpdf", "error", "match"),
    [
        (lambda y, eta, aux: 0.0, ValueError, "one number for all rows.*log density of that row"),
        (lambda y, eta, aux: (y * eta).sum(), ValueError, "one number for all rows"),
        (lambda y, eta, aux: y[:, None] * eta, ValueError, r"returns shape \(7, 7\) for 7 rows"),
        (lambda y, eta, aux: None, ValueError, "returns None"),
        (lambda y, eta, aux: (y, eta), ValueError, "must return one number per row"),
        (lambda y, eta, aux: y > eta, ValueError, "numbers of type bool"),
        (lambda y, eta, aux: 2.0 * y, ValueError, "does not depend on eta"),
        (lambda y, eta, aux: eta * aux["k"], ValueError, r"reads aux\['k'\], which is not there; aux has 'weights'"),
        (lambda y, eta: y * eta, TypeError, r"called as logpdf\(y, eta, aux\)"),
        (lambda y, eta, aux: np.log(eta), TypeError, "uses NumPy.*write it with jax.numpy"),
        (lambda y, eta, aux: stats.norm.logpdf(eta), TypeError, "uses NumPy, SciPy"),
        (lambda y, eta, aux: math.log(eta), TypeError, "needs values that it cannot have"),
        (lambda y, eta, aux: y if eta > 0 else eta, TypeError, "needs values that it cannot have.*jnp.where"),
        ("logit", TypeError, "logpdf must be a function, got 'logit'"),
    ],
)
def test_a_log_density_that_cannot_be_used(logpdf: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        families.Custom(logpdf)


def test_a_link_that_cannot_be_used() -> None:
    with pytest.raises(TypeError, match="inverse.eta. uses NumPy"):
        families.Poisson(links.Link("mine", np.exp))
    with pytest.raises(ValueError, match="inverse.eta. returns one number"):
        families.Custom(logistic_kernel, links.Link("mine", lambda eta: jnp.exp(eta).sum()))
    with pytest.raises(TypeError, match="link must be a function, got 3"):
        links.Link("mine", jnp.exp, 3)  # type: ignore[arg-type]


def test_user_link_equals_logit(cbpp: Any) -> None:
    mine = families.Binomial(gj.Link("mine", inverse=lambda e: 1.0 / (1.0 + jnp.exp(-e))))
    design = gj.design(CBPP, cbpp)
    for point in fixed_params("cbpp_nagq1")["points"][::3]:
        x = np.array(point["par"], float)
        both = [float(gj.laplace_deviance(x[:1], x[1:], design, f)) for f in (mine, families.Binomial())]
        assert both[0] == pytest.approx(both[1], rel=1e-10)
    fit = gj.glmer(CBPP, cbpp, family=mine)
    assert fit.objective == pytest.approx(gj.glmer(CBPP, cbpp).objective, rel=1e-10)
    assert "mine" in str(fit)


def test_poisson_user_link_out_of_range_is_a_step_not_a_number() -> None:
    """A user link may leave (0, inf): density zero there."""
    family = families.Poisson(gj.Link("mine", inverse=lambda e: e))
    value = family.kernel(jnp.array([2.0]), jnp.array([-1.0]), jnp.ones(1), jnp.zeros(0))
    assert float(value[0]) == -np.inf
    assert special.gammaln(3.0) == pytest.approx(-float(family.constant(jnp.array([2.0]), jnp.ones(1))[0]), rel=1e-14)


@dataclass(frozen=True)
class Waiting(Family):
    """Exponential waiting times: a family of this file, which no other file knows."""

    link: Link = links.log
    name: ClassVar[str] = "exponential"
    discrete: ClassVar[bool | None] = False
    support: ClassVar[tuple[float, float]] = (0.0, np.inf)
    links_offered: ClassVar[tuple[str, ...]] = ("log",)

    def kernel(self, y, eta, weights, phi):
        return -weights * (y * jnp.exp(-eta) + eta)

    def variance(self, mu, phi):
        return mu**2

    def deviance_contribution(self, y, mu, weights, phi):
        return 2.0 * weights * (y / mu - 1.0 - jnp.log(y / mu))

    def simulate(self, rng, eta, weights, phi, sigma=1.0):
        return rng.exponential(self._mean_within(eta))

    def distribution(self, mu, weights, phi):
        return stats.expon(scale=mu)

    def latent_variance(self, mean, phi, sigma):
        return np.log(2.0)


def test_what_is_asked_of_a_family_is_asked_of_its_object() -> None:
    rng = np.random.default_rng(20261125)
    d = pd.DataFrame({"g": np.repeat(np.arange(15), 8), "x": rng.normal(size=120)})
    d["y"] = np.ceil(rng.exponential(np.exp(2.0 + 0.3 * d["x"] + 0.5 * rng.normal(size=15)[d["g"]])))
    m = gj.glmer("y ~ x + (1 | g)", d, Waiting())
    mu = np.asarray(m.fitted)
    assert_close(np.asarray(m.residuals("quantile")), stats.norm.ppf(-np.expm1(-d["y"] / mu)), rtol=1e-10)
    shares = m.theta[0] ** 2 / (m.theta[0] ** 2 + np.log(2.0))
    assert float(m.icc()["adjusted"]) == pytest.approx(float(shares), rel=1e-10)
    assert (gj.plots.observed_fitted(m)[1]["lower"] >= 0.0).all()
    with pytest.raises(NotSupportedError, match="rootogram is of Poisson"):
        gj.plots.rootogram(m)
    assert (m.simulate(2, seed=1).to_numpy() > 0.0).all()
    with pytest.raises(ValueError, match="one gives the response probabilities, the other a density"):
        gj.anova(m, gj.glmer("y ~ x + (1 | g)", d, "poisson"))
