"""What must not change an answer, or change it by a known rule: examples drawn by hypothesis, shapes fixed."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import special

import glmmjax as gj

N, LEVELS = 120, 12
FAMILIES = ("gaussian", "binomial", "poisson")
SLOPE = "y ~ x + f + (x | g)"
SEEDS = st.integers(0, 2**32 - 1)

#: few examples, the same in every run: each costs a fit, none a compilation
few = settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def table(seed: int, family: str) -> pd.DataFrame:
    """Rows in 12 uneven levels of g and 5 of h, a number x, a factor f, and responses of the family."""
    rng = np.random.Generator(np.random.PCG64(seed))
    g = np.concatenate([np.repeat(np.arange(LEVELS), 4), np.arange(N - 4 * LEVELS) ** 2 // 7 % LEVELS])  # never drawn:
    h = np.tile(np.arange(5), N // 5)  # where two factors meet decides the program
    x, f = rng.normal(size=N), rng.integers(0, 2, size=N)
    effect, slope, other = 0.7 * rng.normal(size=LEVELS), 0.4 * rng.normal(size=LEVELS), 0.5 * rng.normal(size=5)
    eta = 0.3 + 0.5 * x - 0.4 * f + effect[g] + slope[g] * x + other[h]
    size = rng.permutation(np.tile([1, 2, 3], N // 3))
    data = pd.DataFrame({"x": x, "f": np.array(["u", "v"])[f], "g": g, "h": h, "size": size})
    if family == "gaussian":
        data["y"] = eta + 0.5 * rng.normal(size=N)
    elif family == "binomial":
        data["y"] = (rng.uniform(size=N) < special.expit(eta)).astype(int)
        data["s"] = (rng.uniform(size=(N, 3)) < special.expit(eta)[:, None]) @ np.ones(3, int)
        data["s"] = np.minimum(data["s"], size)
        data["t"] = size - data["s"]
    else:
        data["y"] = rng.poisson(np.exp(np.minimum(eta, 4.0)))
    return data


def fit(formula: str, data: pd.DataFrame, family: str, **arguments: Any) -> gj.MixedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # small random data are now and then singular
        if family == "gaussian":
            return gj.lmer(formula, data, REML=False, **arguments)
        return gj.glmer(formula, data, family=family, **arguments)


def same(a: gj.MixedModel, b: gj.MixedModel, *, constant: float = 0.0, errors: bool = True) -> None:
    """The same maximum, `constant` apart: searches end within 1e-10 of it, 1.5e-5 standard errors from each other."""
    assert b.loglik == pytest.approx(a.loglik + constant, abs=1e-7, rel=1e-10)
    names = list(a.fixef.index)
    assert sorted(names) == sorted(b.fixef.index)
    assert (np.abs(b.fixef[names] - a.fixef[names]) / a.bse[names]).max() < 1e-3
    blocks = {block.group: block.cov for block in b.VarCorr()}
    for block in a.VarCorr():
        np.testing.assert_allclose(blocks[block.group], block.cov, rtol=2e-3, atol=1e-5)
    if errors:
        np.testing.assert_allclose(b.bse[names], a.bse[names], rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@few
@given(seed=SEEDS)
def test_order_of_rows(family: str, seed: int) -> None:
    data = table(seed, family)
    same(fit(SLOPE, data, family), fit(SLOPE, data.sample(frac=1.0, random_state=seed), family))


@pytest.mark.parametrize("family", FAMILIES)
@few
@given(seed=SEEDS, how=st.sampled_from(["text", "category", "empty levels", "fractions", "far integers"]))
def test_labels_of_levels(family: str, seed: int, how: str) -> None:
    data = table(seed, family)
    names = np.random.default_rng(seed).permutation(LEVELS)[data["g"]]
    labels: dict[str, Any] = {
        "text": [f"level {v}" for v in names],
        "category": pd.Categorical(names),
        "empty levels": pd.Categorical(names, categories=[-5, *range(LEVELS), 99]),
        "fractions": names / 8.0,
        "far integers": 2**40 + 3 * names,
    }
    a, b = fit(SLOPE, data, family), fit(SLOPE, data.assign(g=labels[how]), family)
    same(a, b)
    assert a.ngrps == b.ngrps


@few
@given(seed=SEEDS)
def test_empty_levels_of_a_fixed_factor(seed: int) -> None:
    data = table(seed, "poisson")
    more = data.assign(f=pd.Categorical(data["f"], categories=["t", "u", "v", "w"]))
    same(fit(SLOPE, data, "poisson"), fit(SLOPE, more[more["f"].notna()], "poisson"))


@pytest.mark.parametrize("family", FAMILIES)
@few
@given(
    seed=SEEDS,
    power=st.integers(-4, 4),
    shift=st.sampled_from([0.0, 1.0, -30.0, 1e3, 1e5]),
    sign=st.sampled_from([-1, 1]),
)
def test_affine_change_of_a_slope(family: str, seed: int, power: int, shift: float, sign: int) -> None:
    """With x' = (x + c) s, b0 + b1 x = (b0 - c b1) + (b1 / s) x': coefficients and covariances follow by a matrix."""
    data = table(seed, family)
    s = sign * 10.0**power
    a, b = fit(SLOPE, data, family), fit(SLOPE, data.assign(x=(data["x"] + shift) * s), family)
    assert b.loglik == pytest.approx(a.loglik, abs=1e-6)
    assert b.fixef["x"] * s == pytest.approx(a.fixef["x"], abs=1e-3 * a.bse["x"])
    assert b.bse["x"] * abs(s) == pytest.approx(a.bse["x"], rel=1e-3)
    assert b.fixef["fv"] == pytest.approx(a.fixef["fv"], abs=1e-3 * a.bse["fv"])
    assert b.bse["fv"] == pytest.approx(a.bse["fv"], rel=1e-3)
    back = np.array([[1.0, shift * s], [0.0, s]])  # of (intercept', slope') to (intercept, slope)
    cov = back @ b.VarCorr()[0].cov @ back.T
    np.testing.assert_allclose(cov, a.VarCorr()[0].cov, rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["binomial", "poisson", "negative.binomial(2)"])
@few
@given(seed=SEEDS)
def test_whole_weights_are_repetitions(family: str, seed: int) -> None:
    """Of log densities (and of trials all of one kind); lmer's weights are precisions, which is another model."""
    data = table(seed, "binomial" if family == "binomial" else "poisson")
    repeated = data.loc[data.index.repeat(data["size"])].reset_index(drop=True)
    same(fit(SLOPE, repeated, family), fit(SLOPE, data, family, weights="size"))


@few
@given(seed=SEEDS)
def test_counts_are_bernoulli_rows(seed: int) -> None:
    """cbind(s, t) and its single trials: the same likelihood but for the binomial coefficients."""
    data = table(seed, "binomial")
    rows = data.loc[data.index.repeat(data["size"])].reset_index(drop=True)
    first = rows.groupby(data.index.repeat(data["size"])).cumcount()
    rows["y"] = (first < rows["s"]).astype(int)
    coefficients = special.gammaln(data["size"] + 1) - special.gammaln(data["s"] + 1) - special.gammaln(data["t"] + 1)
    counts = fit("cbind(s, t) ~ x + f + (x | g)", data, "binomial")
    same(fit(SLOPE, rows, "binomial"), counts, constant=float(coefficients.sum()))
    proportions = data.assign(p=data["s"] / data["size"])
    same(counts, fit("p ~ x + f + (x | g)", proportions, "binomial", weights="size"))


@pytest.mark.parametrize("family", FAMILIES)
@few
@given(seed=SEEDS, effect=st.integers(-30, 30))
def test_offset_takes_a_fixed_effect_away(family: str, seed: int, effect: int) -> None:
    data = table(seed, family)
    a = fit(SLOPE, data, family)
    b = fit(SLOPE, data.assign(o=effect / 10 * data["x"]), family, offset="o")
    assert b.loglik == pytest.approx(a.loglik, abs=1e-7)
    assert b.fixef["x"] + effect / 10 == pytest.approx(a.fixef["x"], abs=1e-3 * a.bse["x"])
    np.testing.assert_allclose(b.bse, a.bse, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@few
@given(seed=SEEDS)
def test_order_of_terms(family: str, seed: int) -> None:
    data = table(seed, family)
    a = fit("y ~ x + f + (1 | g) + (1 | h)", data, family)
    same(a, fit("y ~ f + (1 | h) + x + (1 | g)", data, family))
