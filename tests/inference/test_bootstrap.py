"""Bootstrap replicates against single refits and against the distributions that theory says."""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import pandas as pd
import pytest
from helpers import assert_close, load_data

import glmmjax as gj
from glmmjax.inference import bootstrap as _bootstrap
from glmmjax.results import NotSupportedError

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"


@cache
def cbpp() -> gj.MixedModel:
    return gj.glmer(CBPP, load_data("cbpp"))


@cache
def sleep() -> gj.MixedModel:
    return gj.lmer("Reaction ~ Days + (Days | Subject)", load_data("sleepstudy"))


def test_replicates_are_refits() -> None:
    for m in (cbpp(), sleep()):
        made = m.bootstrap(3, seed=5)
        responses = list(_bootstrap.draw_responses(m, 3, 5, "parametric"))
        for y, (_, row) in zip(responses, made.frame.iterrows(), strict=True):
            again = m.refit(y)
            sds = np.concatenate([block.sd for block in again.VarCorr()])
            names = [n for n in made.frame if n.startswith("sd_")]
            assert_close(row[names], sds, atol=2e-4 * max(1.0, m.sigma))  # both stop at 1e-10 of the deviance
            assert_close(row[list(m.fixef.index)], again.beta, atol=2e-4 * max(1.0, m.sigma))
        assert_close(made.observed[list(m.fixef.index)], m.beta)


def test_lanes_of_one_program_are_single_fits() -> None:
    for m in (cbpp(), sleep()):
        one, many = m.bootstrap(20, seed=6), m.bootstrap(20, seed=6, batched=True)
        assert one.failed == many.failed and one.singular == many.singular
        # other starts, and searches that end 1e-10 of the deviance above the optimum: 1e-5 standard errors
        assert_close(many.good, one.good, atol=3e-5 * max(1.0, m.sigma))


def singular(formula: str, family: str | None) -> gj.MixedModel:
    rng = np.random.default_rng(3)
    data = pd.DataFrame({"g": np.arange(120) % 12, "h": np.arange(120) // 12 % 5, "n": rng.poisson(1.0, 120)})
    data["x"] = rng.normal(size=120)
    data["y"] = np.random.default_rng(3).normal(size=120) + rng.normal(size=5)[data["h"]]
    with pytest.warns(gj.ConvergenceWarning, match="singular"):
        return gj.lmer(formula, data) if family is None else gj.glmer(formula, data, family)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("formula", "family"), [("n ~ x + (1 | g)", "poisson"), ("y ~ x + (x | g) + (1 | h)", None)], ids=["glmer", "lmer"]
)
def test_replicates_of_a_singular_fit_are_refits(formula: str, family: str | None, batched: bool) -> None:
    """An estimate of 0 is no place to start from: the deviance is stationary there for every response."""
    m = singular(formula, family)
    made = m.bootstrap(30, seed=1, batched=batched)
    names = [name for name in made.frame if not name.startswith("cor_")]  # there are none beside a variance of 0
    refits = m.refit_many(m.simulate(30, seed=1))[names]
    assert not made.failed and (refits.iloc[:, 0] > 0.05).sum() > 8
    assert_close(made.frame[names], refits, atol=1e-3)


@pytest.mark.parametrize("sizes", [[6] * 12, [60, 3, 4, 5, 3, 3, 4, 9, 3, 5, 4, 3]], ids=["even", "uneven"])
def test_resampled_groups_in_lanes(sizes: list[int], rng: np.random.Generator) -> None:
    """Rows in a grid, and rows padded; draws without the two treated levels tell nothing of the treatment."""
    g = np.repeat(np.arange(12), sizes)
    data = pd.DataFrame({"g": g, "treated": 1.0 * (g < 2), "x": rng.normal(size=g.size)})
    data["y"] = rng.poisson(np.exp(0.3 * data["x"] + 0.6 * rng.normal(size=12)[g]))
    m = gj.glmer("y ~ x + treated + (1 | g)", data, "poisson")
    one, many = (m.bootstrap(30, 3, "groups", batched=batched) for batched in (False, True))
    draws = np.random.default_rng(3).integers(0, 12, (30, 12))
    without = np.flatnonzero((draws >= 2).all(axis=1))
    assert without.size and set(without) <= set(one.failed)
    assert one.failed == many.failed and one.singular == many.singular
    assert_close(many.good, one.good, atol=3e-5)


def test_distribution() -> None:
    """Spread of the replicates is the standard error; seeds reproduce."""
    m = sleep()
    made = m.bootstrap(400, seed=1)
    assert not made.failed and len(made.good) == 400
    table = made.summary()
    # the spread of 400 draws is known within 3.5 %
    assert_close(table["std_error"][["(Intercept)", "Days"]] / m.bse, np.ones(2), atol=0.13)
    # REML keeps beta and sigma free of bias: 3.5 standard errors of the mean
    for name in ("(Intercept)", "Days", "sigma"):
        assert abs(table.loc[name, "bias"]) < 3.5 * table.loc[name, "std_error"] / 20.0
    assert_close(m.bootstrap(5, seed=1).frame, m.bootstrap(5, seed=1).frame)
    assert not np.allclose(m.bootstrap(5, seed=1).frame, m.bootstrap(5, seed=2).frame)


def test_intervals() -> None:
    made = sleep().bootstrap(200, seed=1)
    values = made.good["Days"]
    low, high = np.quantile(values, [0.05, 0.95])
    estimate = made.observed["Days"]
    assert_close(made.confint(0.9).loc["Days"], [low, high], rtol=1e-14)
    assert_close(made.confint(0.9, "basic").loc["Days"], [2 * estimate - high, 2 * estimate - low], rtol=1e-14)
    half = 1.6448536 * values.std()
    middle = 2 * estimate - values.mean()
    assert_close(made.confint(0.9, "normal").loc["Days"], [middle - half, middle + half], rtol=1e-7)
    assert_close(sleep().confint("boot", 0.9, nsim=200, seed=1), made.confint(0.9))
    assert list(made.confint().columns) == ["2.5 %", "97.5 %"]
    assert "Parametric bootstrap, 200 replicates (seed 1)" in str(made) and "<table" in made._repr_html_()


def test_semiparametric() -> None:
    m = sleep()
    made = m.bootstrap(200, seed=3, kind="semiparametric")
    assert made.summary().loc["sigma", "bias"] == pytest.approx(0.0, abs=0.6)
    # with the conditional modes kept, only residuals make Days vary
    assert made.summary().loc["Days", "std_error"] < 0.6 * m.bse["Days"]
    with pytest.raises(NotSupportedError, match="residuals of a linear model"):
        cbpp().bootstrap(2, kind="semiparametric")


def test_groups() -> None:
    m = cbpp()
    made = m.bootstrap(60, seed=4, kind="groups")
    # robust standard errors are what resampled clusters estimate; 60 draws: within 4 x 9 %
    robust = np.sqrt(np.diag(m.vcov(type="robust")))
    ratio = made.good[["(Intercept)", "period2", "period3"]].std() / robust[:3]
    assert ((ratio > 0.6) & (ratio < 1.6)).all()
    # one replicate by hand: the drawn herds as new data
    rng = np.random.default_rng(4)
    draw = rng.integers(0, 15, (60, 15))[0]
    data = load_data("cbpp")
    parts = [data[data["herd"] == str(j + 1)].assign(herd=f"h{i:02d}") for i, j in enumerate(draw)]
    again = gj.glmer(CBPP, pd.concat(parts, ignore_index=True))
    assert_close(made.frame.iloc[0][list(m.fixef.index)], again.beta, atol=1e-4)
    data = data.assign(obs=np.arange(56))
    with pytest.raises(NotSupportedError, match="one grouping factor, the model has 2"):
        gj.glmer(CBPP + " + (1 | obs)", data).bootstrap(2, kind="groups")


def test_separated_replicates_are_kept_apart() -> None:
    made = cbpp().bootstrap(1000, seed=0)
    assert len(made.failed) >= 1  # period 4 has a handful of cases: some draws have none
    assert made.frame.loc[list(made.failed)].isna().all(axis=None)
    assert np.abs(made.good.to_numpy()).max() < 15.0
    assert f"{len(made.failed)} refits did not converge or ran off" in str(made)


def test_statistic() -> None:
    m = sleep()
    made = m.bootstrap(4, seed=2, statistic=lambda q: q.sigma**2)
    assert list(made.frame) == ["statistic"]
    assert_close(made.frame["statistic"], m.bootstrap(4, seed=2).frame["sigma"] ** 2, rtol=1e-5)
    series = m.bootstrap(2, seed=2, statistic=lambda q: q.fixef)
    assert list(series.frame) == ["(Intercept)", "Days"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="nsim must be a positive integer"):
        sleep().bootstrap(0)
    with pytest.raises(ValueError, match="kind must be one of 'parametric'"):
        sleep().bootstrap(2, kind="wild")
    with pytest.raises(ValueError, match="kind must be one of 'percentile'"):
        sleep().bootstrap(2).confint(kind="bca")
    with pytest.raises(ValueError, match="a statistic is of a model with the fit's rows"):
        sleep().bootstrap(2, kind="groups", statistic=lambda q: q.sigma)


@pytest.mark.parametrize("batched", [False, True])
def test_a_variance_of_0_has_no_correlation(batched: bool) -> None:
    """As in a fit of each response: sd 0 and correlation NaN, as lme4 shows, not what noise makes of them."""
    r = np.random.default_rng(1)
    g, x = np.repeat(np.arange(10), 8), r.normal(size=80)
    data = pd.DataFrame({"g": g, "x": x, "y": r.normal(size=80) + 0.2 * r.normal(size=10)[g]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m = gj.lmer("y ~ x + (x | g)", data)
        each = m.refit_many(m.simulate(12, seed=3))
    got = m.bootstrap(12, seed=3, batched=batched).frame
    assert each["cor_x.(Intercept)|g"].isna().sum() == 1
    np.testing.assert_allclose(got, each[list(got.columns)], atol=1e-4, equal_nan=True)
