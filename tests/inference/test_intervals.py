"""Delta-method errors of standard deviations and correlations, many refits, and pooling."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_close, load_data
from scipy import stats

import glmmjax as gj

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"


def test_wald_intervals_of_standard_deviations() -> None:
    m = gj.lmer("Reaction ~ Days + (Days | Subject)", load_data("sleepstudy"), REML=False)
    ends = m.confint(which="theta_")
    # glmmTMB's confint(parm = "theta_") and confint(parm = "sigma"), on the log scale as here
    assert_close(ends.loc["sd_(Intercept)|Subject"], [15.017090, 37.6581445], rtol=2e-6)
    assert_close(ends.loc["sd_Days|Subject"], [3.805458, 8.5882004], rtol=5e-6)
    assert_close(ends.loc["sigma"], [22.80047, 28.72492], rtol=1e-6)
    low, high = ends.loc["cor_Days.(Intercept)|Subject"]
    table = m.sdcor()
    middle = table.loc["cor_Days.(Intercept)|Subject", "estimate"]
    assert np.arctanh(high) - np.arctanh(middle) == pytest.approx(np.arctanh(middle) - np.arctanh(low))
    assert list(m.confint(which=None).index) == [*table.index, "(Intercept)", "Days"]
    with pytest.raises(ValueError, match="which must be"):
        m.confint(which="sigma")


def test_delta_method_against_the_likelihood() -> None:
    """A scalar random intercept: its log's standard error is that of theta over theta."""
    m = gj.glmer(CBPP, load_data("cbpp"))
    row = m.sdcor().loc["sd_(Intercept)|herd"]
    se = np.sqrt(m.vcov(full=True).iloc[0, 0])
    assert row["std_error"] == pytest.approx(se, rel=1e-9)
    assert row["transformed_error"] == pytest.approx(se / m.theta[0], rel=1e-9)
    assert row["std_error"] == pytest.approx(0.17856, abs=2e-5)


def test_boundary_has_no_error() -> None:
    with pytest.warns(gj.ConvergenceWarning, match="singular"):
        m = gj.lmer("Yield ~ 1 + (1 | Batch)", load_data("Dyestuff2"))
    assert np.isnan(m.sdcor().loc["sd_(Intercept)|Batch", "std_error"])
    assert np.isfinite(m.sdcor().loc["sigma", "std_error"])


def test_refit_many() -> None:
    m = gj.glmer(CBPP, load_data("cbpp"))
    responses = m.simulate(4, seed=3)
    table = m.refit_many(responses)
    assert list(table.index) == list(responses) and table["converged"].all()
    one = m.refit(responses["sim_3"])
    assert_close(table.loc["sim_3", list(m.fixef.index)], one.beta, rtol=1e-12)
    assert table.loc["sim_3", "se_period2"] == pytest.approx(one.bse["period2"])
    assert table.loc["sim_3", "sd_(Intercept)|herd"] == pytest.approx(one.theta[0])
    with pytest.raises(ValueError, match="responses have 10 rows, the fit has 56"):
        m.refit_many(np.ones((10, 2)))


def test_pool() -> None:
    data = load_data("sleepstudy")
    rng = np.random.default_rng(0)
    fits = [
        gj.lmer("Reaction ~ Days + (1 | Subject)", data.assign(Reaction=data["Reaction"] + 20 * rng.normal(size=180)))
        for _ in range(5)
    ]
    made = gj.pool(fits)
    b = np.array([f.fixef["Days"] for f in fits])
    within, between = np.mean([f.bse["Days"] ** 2 for f in fits]), b.var(ddof=1)
    total = within + 1.2 * between
    row = made.frame.loc["Days"]
    assert row["estimate"] == pytest.approx(b.mean()) and row["std_error"] == pytest.approx(np.sqrt(total))
    # Barnard & Rubin's degrees of freedom, written out
    share = 1.2 * between / total
    nu, complete = 4.0 / share**2, 180 - 4
    seen = (complete + 1) / (complete + 3) * complete * (1 - share)
    df = 1.0 / (1.0 / nu + 1.0 / seen)
    assert row["df"] == pytest.approx(df)
    assert row["p_value"] == pytest.approx(2 * stats.t.sf(abs(row["statistic"]), df))
    assert row["conf_high"] == pytest.approx(row["estimate"] + stats.t.ppf(0.975, df) * row["std_error"])
    assert made.random["sigma"] == pytest.approx(np.mean([f.sigma for f in fits]))
    assert "Pooled over 5 fits" in str(made) and "<table" in made._repr_html_()
    # equal fits: nothing is missing
    same = gj.pool([fits[0], fits[0]])
    assert_close(same.frame["std_error"], fits[0].bse, rtol=1e-12)
    with pytest.raises(ValueError, match="at least two fits"):
        gj.pool(fits[:1])
    with pytest.raises(ValueError, match="fit 2 is of another model"):
        gj.pool([fits[0], gj.lmer("Reaction ~ 1 + (1 | Subject)", data)])
