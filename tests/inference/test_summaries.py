"""Principal components of the random effects, ICC, R2 and quantile residuals."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from helpers import assert_close, load_data
from scipy import stats

import glmmjax as gj
from glmmjax.inference.summaries import quantile_residuals
from glmmjax.results import NotSupportedError

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"


@lru_cache(maxsize=4)
def sleep(REML: bool = False) -> gj.MixedModel:
    return gj.lmer("Reaction ~ Days + (Days | Subject)", load_data("sleepstudy"), REML=REML)


@lru_cache(maxsize=4)
def cbpp(link: str = "logit") -> gj.MixedModel:
    return gj.glmer(CBPP, load_data("cbpp"), family=f"binomial({link})")


@lru_cache(maxsize=4)
def ticks(family: str = "poisson", bars: str = "(1 | BROOD)", fixed: str = "YEAR + cHEIGHT") -> gj.MixedModel:
    return gj.glmer(f"TICKS ~ {fixed} + {bars}", load_data("grouseticks"), family=family)


# -------------------- rePCA
def test_repca_of_sleepstudy_is_lme4s():
    frame = sleep().rePCA()["Subject"]
    # lme4 1.1: rePCA(lmer(Reaction ~ Days + (Days | Subject), sleepstudy, REML = FALSE)); its theta is 4e-5 off
    assert_close(frame["sdev"], [0.9293790, 0.2225981], rtol=1e-4)
    assert_close(frame["proportion"].sum(), 1.0, rtol=1e-12)
    assert_close(frame["cumulative"], np.cumsum(frame["proportion"]), rtol=1e-12)
    block = sleep().VarCorr()[0]
    rotation = frame.attrs["rotation"]
    assert list(rotation.index) == ["(Intercept)", "Days"]
    rebuilt = rotation.to_numpy() @ np.diag(frame["sdev"] ** 2) @ rotation.to_numpy().T * sleep().sigma ** 2
    assert_close(rebuilt, block.cov, rtol=1e-8)


def test_repca_joins_the_terms_of_a_factor():
    m = gj.lmer("Reaction ~ Days + (Days || Subject)", load_data("sleepstudy"))
    (frame,) = m.rePCA().values()
    sd = np.concatenate([b.sd for b in m.VarCorr()]) / m.sigma
    assert_close(frame["sdev"], np.sort(sd)[::-1], rtol=1e-10)
    assert list(frame.index) == ["PC1", "PC2"]


# -------------------- ICC and R2
def by_hand(fixed: float, random: float, residual: float) -> tuple[list[float], list[float]]:
    total = fixed + random + residual
    return [random / (random + residual), random / total], [fixed / total, (fixed + random) / total]


def fixed_variance(m: gj.MixedModel) -> float:
    return float(np.var(m.getME("X").to_numpy() @ m.beta, ddof=1))


def test_linear_model_with_a_random_slope():
    m = sleep(REML=True)
    table = m.VarCorr().to_frame()
    v0, v1, c01, residual = table["vcov"]
    days = load_data("sleepstudy")["Days"].to_numpy()
    random = v0 + 2.0 * c01 * days.mean() + v1 * np.square(days).mean()  # Johnson 2014
    icc, r2 = by_hand(m.beta[1] ** 2 * days.var(ddof=1), random, residual)
    assert_close(m.icc(), icc, rtol=1e-10)
    assert_close(m.r2(), r2, rtol=1e-10)
    # MuMIn and performance print these for this model
    assert_close(m.r2(), [0.279, 0.799], atol=6e-4)
    assert list(m.icc().index) == ["adjusted", "unadjusted"] and list(m.r2().index) == ["marginal", "conditional"]


@pytest.mark.parametrize(("link", "residual"), [("logit", np.pi**2 / 3), ("probit", 1.0), ("cloglog", np.pi**2 / 6)])
def test_binomial_model(link: str, residual: float):
    m = cbpp(link)
    icc, r2 = by_hand(fixed_variance(m), m.VarCorr()[0].cov[0, 0], residual)
    assert_close(m.icc(), icc, rtol=1e-10)
    assert_close(m.r2(), r2, rtol=1e-10)


def test_counts_take_their_mean_from_the_model_without_covariates():
    m, null = ticks(), ticks(fixed="1")
    mean = np.exp(null.beta[0] + 0.5 * null.VarCorr()[0].cov[0, 0])
    icc, r2 = by_hand(fixed_variance(m), m.VarCorr()[0].cov[0, 0], np.log(1.0 + 1.0 / mean))
    for given in ({}, {"null": null}):
        assert_close(m.icc(**given), icc, rtol=1e-7)
        assert_close(m.r2(**given), r2, rtol=1e-7)
    v = null.VarCorr()[0].cov[0, 0]
    assert_close(null.icc()["adjusted"], v / (v + np.log(1.0 + 1.0 / mean)), rtol=1e-10)
    assert_close(null.icc()["unadjusted"], null.icc()["adjusted"], rtol=1e-12)
    with pytest.raises(ValueError, match="null must have an intercept and nothing else, it has .*YEAR96"):
        m.icc(null=m)


def test_negative_binomial_and_the_exposure():
    data = load_data("grouseticks").assign(e=lambda d: np.linspace(0.5, 1.5, len(d)))
    family = gj.families.NegativeBinomial(1.5)
    m = gj.glmer("TICKS ~ 1 + offset(log(e)) + (1 | BROOD)", data, family=family)
    v = m.VarCorr()[0].cov[0, 0]
    mean = data["e"].mean() * np.exp(m.beta[0] + 0.5 * v)
    assert_close(m.icc()["adjusted"], v / (v + np.log(1.0 + 1.0 / mean + 1.0 / 1.5)), rtol=1e-10)
    # the offset stays when the model without covariates is fitted
    slope = gj.glmer("TICKS ~ cHEIGHT + offset(log(e)) + (1 | BROOD)", data, family=family)
    assert_close(slope.icc(), slope.icc(null=m), rtol=1e-6)


def test_an_effect_per_row_is_overdispersion():
    m = ticks(bars="(1 | BROOD) + (1 | INDEX)", fixed="1")
    v = {b.group: b.cov[0, 0] for b in m.VarCorr()}
    mean = np.exp(m.beta[0] + 0.5 * sum(v.values()))
    assert_close(m.icc()["adjusted"], v["BROOD"] / (sum(v.values()) + np.log(1.0 + 1.0 / mean)), rtol=1e-10)


def test_after_refit_the_null_model_has_the_new_response():
    m = ticks()
    doubled = m.refit(2.0 * m.getME("y"))
    assert_close(doubled.icc(), doubled.icc(null=ticks(fixed="1").refit(2.0 * m.getME("y"))), rtol=1e-6)


def test_square_root_counts():
    m = ticks(family="poisson(sqrt)", fixed="1")
    v = m.VarCorr()[0].cov[0, 0]
    assert_close(m.icc()["adjusted"], v / (v + 0.25), rtol=1e-10)


# -------------------- quantile residuals
def test_gaussian_quantile_residuals_are_scaled_residuals():
    m = sleep()
    assert_close(m.residuals("quantile"), m.residuals("response") / m.sigma, rtol=1e-12)
    data = load_data("sleepstudy")
    w = gj.lmer("Reaction ~ Days + (1 | Subject)", data, weights=data["w"])
    assert_close(w.residuals("quantile"), w.residuals("pearson", scaled=True), rtol=1e-12)


def at_truth(family: Any, counts: Any, mean: Any, trials: Any = 1.0) -> Any:
    """What quantile residuals read of a fit, with the means that the counts were drawn with as fitted values."""
    weights = np.broadcast_to(trials, mean.shape)
    design = SimpleNamespace(y=counts / weights, weights=weights)
    estimates = SimpleNamespace(phi=np.zeros(0))
    family = gj.families.get(family)
    return SimpleNamespace(family=family, sigma=1.0, _moments=(mean,), _design=design, _estimates=estimates)


@pytest.mark.parametrize("family", ["binomial", "poisson", "negative.binomial(1.7)"])
def test_quantile_residuals_are_standard_normal_under_the_model(family: str, rng: np.random.Generator):
    n = 3000
    mean, trials = rng.uniform(0.5, 6.0, n), np.ones(n)
    if family == "binomial":
        mean, trials = rng.uniform(0.05, 0.95, n), rng.integers(1, 15, n).astype(float)
        counts = rng.binomial(trials.astype(int), mean).astype(float)
    elif family == "poisson":
        counts = rng.poisson(mean).astype(float)
    else:
        counts = rng.negative_binomial(1.7, 1.7 / (1.7 + mean)).astype(float)
    m = at_truth(family, counts, mean, trials)
    r = quantile_residuals(m, 0)
    assert stats.kstest(r, "norm").pvalue > 0.01  # seeds are fixed
    assert_close(quantile_residuals(m, 0), r)
    other = quantile_residuals(m, 1)
    assert np.abs(other - r).max() > 0.1 and stats.kstest(other, "norm").pvalue > 0.01
    # each lies between the two ends of the step of its distribution function
    laws: dict[str, Any] = {
        "binomial": lambda k: stats.binom.cdf(k, trials, mean),
        "poisson": lambda k: stats.poisson.cdf(k, mean),
        "negative.binomial(1.7)": lambda k: stats.nbinom.cdf(k, 1.7, 1.7 / (1.7 + mean)),
    }
    u, F = stats.norm.cdf(r), laws[family]
    assert (u >= F(counts - 1) - 1e-12).all() and (u <= F(counts) + 1e-12).all()


def test_quantile_residuals_keep_their_digits_in_the_upper_tail():
    counts = np.tile([2.0, 3.0, 1.0, 4.0], 40)
    mean = np.full(160, 2.5)
    mean[0] = 1e-9
    counts[0] = 4.0  # about 1e-37 / 24: 1 - F rounds to 0 when it is formed from F
    r = quantile_residuals(at_truth("poisson", counts, mean), 0)
    assert np.isfinite(r).all()
    low, high = -stats.norm.ppf(stats.poisson.sf(3.0, 1e-9)), -stats.norm.ppf(stats.poisson.sf(4.0, 1e-9))
    assert low - 1e-9 <= r[0] <= high + 1e-9


def test_quantile_residuals_of_a_fit():
    m = cbpp()
    r, trials, mu = m.residuals("quantile"), load_data("cbpp")["size"], m.fitted
    assert r.name == "quantile_residual" and r.index.equals(m.fitted.index)
    successes, u = load_data("cbpp")["incidence"], stats.norm.cdf(r)
    assert (u >= stats.binom.cdf(successes - 1, trials, mu) - 1e-12).all()
    assert (u <= stats.binom.cdf(successes, trials, mu) + 1e-12).all()
    assert np.abs(m.residuals("quantile", seed=3) - r).max() > 0.1
    assert_close(m.residuals("quantile", scaled=True), r)


def test_families_without_a_distribution_function():
    def logpdf(y: Any, eta: Any, aux: Any) -> Any:
        return y * eta - jnp.logaddexp(0.0, eta)

    g = np.repeat(np.arange(16), 5)
    y = (np.tile(np.arange(5), 16) < g % 6).astype(float)  # 0 to 5 of 5, so that the variance is not 0
    data = pd.DataFrame({"y": y, "g": g})
    m = gj.glmer("y ~ 1 + (1 | g)", data, family=gj.families.Custom(logpdf, link="logit"))
    with pytest.raises(NotSupportedError, match="known by its log density alone"):
        m.residuals("quantile")
    with pytest.raises(NotSupportedError, match="has no distribution variance"):
        m.icc()
    weighted = at_truth("poisson", y, np.full(80, 0.5), 2.0)
    with pytest.raises(NotSupportedError, match="weights multiply the log density"):
        quantile_residuals(weighted, 0)
    halves = at_truth("binomial", np.full(3, 0.5), np.full(3, 0.3))
    with pytest.raises(NotSupportedError, match="not integers"):
        quantile_residuals(halves, 0)
    with pytest.raises(ValueError, match="'response' or 'quantile', got 'student'"):
        m.residuals("student")


def test_the_null_model_has_the_rows_of_the_fit():
    """A covariate that is missing in one row: as without that row."""
    data = load_data("cbpp").assign(x=np.r_[np.nan, np.arange(55.0)])
    formula = "incidence ~ x + offset(log(size)) + (1 | herd)"
    whole, part = gj.glmer(formula, data, "poisson"), gj.glmer(formula, data[1:], "poisson")
    pd.testing.assert_series_equal(whole.r2(), part.r2(), rtol=1e-9)
    pd.testing.assert_series_equal(whole.icc(), part.icc(), rtol=1e-9)


def test_the_null_model_has_the_random_effects_as_written():
    """(f || g) keeps its columns apart in the null model too."""
    rng = np.random.default_rng(3)
    d = pd.DataFrame({"f": np.tile(list("abc"), 40), "g": np.repeat(np.arange(10), 12), "x": rng.normal(size=120)})
    d["y"] = rng.poisson(np.exp(1.0 + 0.3 * d["x"] + rng.normal(size=(10, 3))[d["g"], np.arange(120) % 3]))
    with pytest.warns(UserWarning, match="makes each column of 'f'"):
        m, null = (gj.glmer(f"y ~ {left} + (f || g)", d, "poisson", nAGQ=0) for left in ("x", "1"))
        pd.testing.assert_series_equal(m.r2(), m.r2(null=null), rtol=1e-9)
