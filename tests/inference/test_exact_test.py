"""Exact tests of one variance: spectra against dense matrices, null distributions against refits of simulated data."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import assert_close, load_data
from scipy import stats

import glmmjax as gj
from glmmjax.inference import exact_test
from glmmjax.results import NotSupportedError

SLEEP = "Reaction ~ Days + "


@cache
def sleep(terms: str, REML: bool = True) -> gj.MixedModel:
    return gj.lmer(SLEEP + terms, load_data("sleepstudy"), REML=REML)


@cache
def uneven(terms: str, REML: bool = True) -> gj.MixedModel:
    """Levels of 2 to 9 rows, several of one size, with weights and an offset; no variance between levels."""
    rng = np.random.default_rng(3)
    g = np.repeat(np.arange(9), [3, 5, 5, 5, 7, 4, 2, 9, 5])
    frame = pd.DataFrame({"y": rng.normal(size=g.size), "x": rng.normal(size=g.size), "g": g.astype(str)})
    frame["w"], frame["o"] = rng.uniform(0.5, 2.0, g.size), rng.normal(size=g.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gj.ConvergenceWarning)
        weights = "w" if "0" in terms else None
        return gj.lmer(f"y ~ x + {terms}", frame, REML, weights=weights, offset="o")


@pytest.mark.parametrize("terms", ["(1 | g)", "(0 + x | g)"])
def test_spectra_are_those_of_dense_matrices(terms: str) -> None:
    m = uneven(terms)
    space = exact_test._spectra(m)
    root = np.sqrt(np.asarray(m._design.weights))[:, None]
    Z, X = root * np.asarray(m.getME("Z")), root * np.asarray(m.getME("X"))
    P0 = np.eye(X.shape[0]) - X @ np.linalg.solve(X.T @ X, X.T)
    for ours, dense in ((space.inside, Z.T @ P0 @ Z), (space.whole, Z.T @ Z)):
        expected = np.linalg.eigvalsh(dense)
        expected = expected[expected > 1e-9]
        assert_close(np.repeat(ours.values, ours.counts.astype(int)), expected, rtol=1e-9, what="eigenvalues")
    if terms == "(1 | g)":  # four levels have five rows: one eigenvalue but for p = 2 directions
        assert space.inside.counts.max() == 2 and space.inside.counts.sum() == 8
    assert (space.n, space.p) == X.shape


def brute_force(m: gj.MixedModel, nsim: int) -> np.ndarray:
    """The statistic of refits to responses without any random effect, beta and sigma chosen at will."""
    rng = np.random.default_rng(8)
    design, out = m._design, []
    mean, sd = np.asarray(design.offset) + np.asarray(design.X) @ [3.0, -2.0], 4.0 / np.sqrt(np.asarray(design.weights))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gj.ConvergenceWarning)
        for _ in range(nsim):
            again = m.refit(mean + sd * rng.normal(size=m.nobs))
            out.append(linear_objective(again) - again.objective)
    assert min(out) > -1e-6
    return np.maximum(out, 0.0)


def linear_objective(m: gj.MixedModel) -> float:
    """The criterion of the linear model: normal log density at the least-squares estimates, by SciPy."""
    w, X = np.asarray(m._design.weights), np.asarray(m._design.X)
    y = np.asarray(m._design.y) - np.asarray(m._design.offset)
    information = X.T @ (w[:, None] * X)
    rest = y - X @ np.linalg.solve(information, X.T @ (w * y))
    n, p = X.shape
    sigma = np.sqrt((w * rest**2).sum() / (n - p if m.REML else n))
    value = -2.0 * stats.norm.logpdf(rest, scale=sigma / np.sqrt(w)).sum()
    # REML integrates the likelihood over beta, which is normal
    return float(value + np.linalg.slogdet(information / (2.0 * np.pi * sigma**2))[1] if m.REML else value)


@pytest.mark.parametrize("REML", [True, False], ids=["RLRT", "LRT"])
@pytest.mark.parametrize("make", [sleep, uneven], ids=["balanced", "weighted slopes"])
def test_null_distribution_is_that_of_refits(make: Any, REML: bool) -> None:
    """Probability of 0, and the rest by Kolmogorov and Smirnov's test; fixed seeds."""
    m = make("(1 | Subject)" if make is sleep else "(0 + x | g)", REML)
    found, nsim = brute_force(m, 600), 600
    drawn = gj.exact_test(m, nsim=50_000, seed=4).replicates
    zero = (drawn < 1e-6).mean()
    assert abs((found < 1e-6).mean() - zero) < 3.0 * np.sqrt(zero * (1.0 - zero) / nsim)
    assert stats.ks_2samp(found[found > 1e-4], drawn[drawn > 1e-4]).pvalue > 0.01
    # 95 % point: the simulated share above it is 5 % within three standard errors
    assert abs((found > np.quantile(drawn, 0.95)).mean() - 0.05) < 3.0 * np.sqrt(0.05 * 0.95 / nsim)


def test_the_grid_is_fine_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    space = exact_test._spectra(uneven("(0 + x | g)"))
    usual = exact_test._draw(space, True, 400, np.random.default_rng(5))
    monkeypatch.setattr(exact_test, "GRID", 8 * exact_test.GRID)
    fine = exact_test._draw(space, True, 400, np.random.default_rng(5))
    assert_close(usual, fine, atol=2e-5, what="draws")
    assert 0.3 < (usual == 0.0).mean() < 0.8


def test_sleepstudy() -> None:
    m = sleep("(1 | Subject)")
    out = gj.exact_test(m)
    assert out.statistic == pytest.approx(linear_objective(m) - m.objective, abs=1e-6)
    assert out.kind == "RLRT" and out.p_value == 1.0 / 10_001
    assert out.chibar_p_value == pytest.approx(0.5 * stats.chi2.sf(out.statistic, 1))
    assert "RLRT = 107.1986, p = 9.999e-05 (half chi-square(0), half chi-square(1): 2.014e-25)" in str(out)
    row = out.to_frame().iloc[0]
    assert row["nsim"] == 10_000 and row["statistic"] == out.statistic
    assert "RLRT" in out._repr_html_()
    m = sleep("(1 | Subject)", False)
    out = gj.exact_test(m, nsim=100)
    assert out.kind == "LRT" and out.statistic == pytest.approx(linear_objective(m) - m.objective, abs=1e-6)


def test_seeds_and_no_variance() -> None:
    m = uneven("(1 | g)")
    one, two, other = (gj.exact_test(m, nsim=500, seed=s) for s in (1, 1, 2))
    assert np.array_equal(one.replicates, two.replicates) and not np.array_equal(one.replicates, other.replicates)
    still = m.refit(m.getME("y"))
    still._estimates = replace(still._estimates, objective=linear_objective(still))  # a fit with variance 0
    out = gj.exact_test(still, nsim=500)
    assert (out.statistic, out.p_value, out.chibar_p_value) == (0.0, 1.0, 1.0)


def test_one_of_several_variances() -> None:
    """The random slope beside the intercept: the statistic is that of the two models, the distribution its own."""
    alone, null, alternative = sleep("(0 + Days | Subject)"), sleep("(1 | Subject)"), sleep("(Days || Subject)")
    out = gj.exact_test(alone, alternative, null)
    assert out.statistic == pytest.approx(null.objective - alternative.objective)
    assert out.p_value == 1.0 / 10_001 and out.term == "(0 + Days | Subject)"
    assert np.array_equal(out.replicates, gj.exact_test(alone).replicates)
    with pytest.raises(ValueError, match="belong together"):
        gj.exact_test(alone, alternative)
    with pytest.raises(ValueError, match=r"must have the terms of null .* and \(0 \+ Days \| Subject\)"):
        gj.exact_test(alone, null, alternative)
    with pytest.raises(ValueError, match="null must be a linear model fitted by REML"):
        gj.exact_test(alone, alternative, sleep("(1 | Subject)", False))
    with pytest.raises(ValueError, match=r"2 random-effects terms, .*\(1 \| Subject\).*with the tested term alone"):
        gj.exact_test(alternative)


def unfitted(setup: gj.ModelSetup) -> gj.MixedModel:
    """A model whose estimates do not matter."""
    problem = gj.deviance_function(setup).problem
    return gj.MixedModel(setup.spec, setup.data, problem, sleep("(1 | Subject)")._estimates)


def test_what_has_no_exact_test() -> None:
    vector = gj.lmer_setup("Reaction ~ Days + (Days | Subject)", load_data("sleepstudy"))
    with pytest.raises(NotSupportedError, match=r"\(Days \| Subject\) has 2 random effects per level"):
        gj.exact_test(unfitted(vector))
    generalised = gj.glmer_setup("cbind(incidence, size - incidence) ~ 1 + (1 | herd)", load_data("cbpp"))
    with pytest.raises(NotSupportedError, match="linear mixed models.*bootstrap_test"):
        gj.exact_test(unfitted(generalised))
    with pytest.raises(ValueError, match="nsim must be a positive integer"):
        gj.exact_test(sleep("(1 | Subject)"), nsim=0)


def test_many_levels() -> None:
    """Levels of few sizes need no matrix of their number; of too many different ones it is refused."""
    rng = np.random.default_rng(6)
    g = rng.integers(0, 20_000, 60_000)
    frame = pd.DataFrame({"y": rng.normal(size=g.size), "x": rng.normal(size=g.size), "g": g})
    setup = gj.lmer_setup("y ~ x + (1 | g)", frame)
    space = exact_test._spectra(unfitted(setup))
    assert space.inside.counts.sum() == setup.design.n_levels[0] - 1  # the constant is in X
    assert space.inside.values.size < 60
    with pytest.raises(NotSupportedError, match="'g' has .* levels with different sums of squares of x"):
        exact_test._spectra(unfitted(gj.lmer_setup("y ~ x + (0 + x | g)", frame)))
