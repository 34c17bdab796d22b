"""Marginal means and coefficients, separate fits by group, variance inflation, tests and power by simulation."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from helpers import assert_close, load_data
from scipy import integrate, special, stats

import glmmjax as gj
from glmmjax._errors import DataError
from glmmjax.results import NotSupportedError

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"


@cache
def cbpp() -> gj.MixedModel:
    return gj.glmer(CBPP, load_data("cbpp"))


def test_means_of_emmeans() -> None:
    found = cbpp().marginal_means("period")
    # emmeans 1.8 of a fit with tight tolerances; its standard errors are by differences
    assert_close(found.frame["estimate"], [-1.3985320, -2.3908479, -2.5271962, -2.9788476], atol=2e-5)
    assert_close(found.frame["std_error"], [0.2324733, 0.3102138, 0.3302756, 0.4300733], atol=5e-5)
    assert_close(found.frame["conf_low"], [-1.854171, -2.998856, -3.174524, -3.821776], atol=1e-4)
    pairs = found.pairs()
    assert list(pairs.index) == ["1 - 2", "1 - 3", "1 - 4", "2 - 3", "2 - 4", "3 - 4"]
    assert_close(pairs["p_value"], [0.0067, 0.0031, 0.0012, 0.9843, 0.5947, 0.7873], atol=6e-5)
    response = cbpp().marginal_means("period", type="response").frame
    assert_close(response["estimate"], special.expit(found.frame["estimate"]), rtol=1e-12)
    mu = response["estimate"]
    assert_close(response["std_error"], found.frame["std_error"] * mu * (1 - mu), rtol=1e-10)


def test_means_of_a_linear_model() -> None:
    m = gj.lmer("angle ~ recipe * temperature + (1 | recipe:replicate)", load_data("cake"))
    found = m.marginal_means("recipe", ddf="kenward-roger")
    # emmeans with Kenward and Roger's method; the other factor has equal weights
    assert_close(found.frame["estimate"], [33.12222, 31.64444, 31.60000], atol=1e-5)
    assert_close(found.frame["std_error"], [1.7368334] * 3, atol=1e-5)
    assert_close(found.frame["df"], [42.0] * 3, atol=1e-3)
    assert_close(found.frame["conf_high"], [36.62729, 35.14952, 35.10507], atol=2e-4)
    assert_close(found.pairs()["p_value"], [0.8200, 0.8102, 0.9998], atol=6e-5)
    assert len(found.grid) == 18 and "averaged over 18 points" in str(found) and "<table" in found._repr_html_()


def test_means_at_values() -> None:
    m = gj.glmer("use ~ age * ch + I(age^2) + urban + (1 | district)", load_data("Contraception"))
    found = m.marginal_means("age", at={"age": [-5.0, 0.0, 5.0]})
    b = m.fixef
    expected = [
        b["(Intercept)"]
        + 0.5 * b["urbanY"]
        + 0.5 * b["chY"]
        + x * (b["age"] + 0.5 * b["age:chY"])
        + x**2 * b["I(age^2)"]
        for x in (-5.0, 0.0, 5.0)
    ]
    assert_close(found.frame["estimate"], expected, rtol=1e-10)
    both = m.marginal_means(["ch", "urban"]).frame
    assert both[["ch", "urban"]].to_numpy().tolist() == [["N", "N"], ["N", "Y"], ["Y", "N"], ["Y", "Y"]]
    mean_age = load_data("Contraception")["age"].mean()
    first = b["(Intercept)"] + mean_age * b["age"] + mean_age**2 * b["I(age^2)"]
    assert both["estimate"].iloc[0] == pytest.approx(first)


@pytest.mark.parametrize("adjust", ["holm", "bonferroni", "none"])
def test_adjustments(adjust: str) -> None:
    pairs = cbpp().marginal_means("period").pairs(adjust)
    raw = 2.0 * stats.norm.sf(np.abs(pairs["statistic"]))
    if adjust == "bonferroni":
        raw = np.minimum(6.0 * raw, 1.0)
    if adjust == "holm":
        order = np.argsort(raw)
        raw[order] = np.minimum(np.maximum.accumulate(raw[order] * np.arange(6, 0, -1)), 1.0)
    assert_close(pairs["p_value"], raw, rtol=1e-12)


def test_marginal_coefficients() -> None:
    m = cbpp()
    found = m.marginal_coefficients()
    # a saturated design: the marginal coefficients are contrasts of logits of integrated means
    means = []
    for eta in np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]) @ m.beta:
        integrand = lambda z, eta=eta: special.expit(eta + m.theta[0] * z) * stats.norm.pdf(z)  # noqa: E731
        means.append(integrate.quad(integrand, -12, 12, epsabs=1e-13)[0])
    logits = special.logit(means)
    assert_close(found["estimate"], [logits[0], *(logits[1:] - logits[0])], atol=1e-9)
    assert (np.abs(found["estimate"]) < np.abs(found["conditional"])).all()
    # delta method by differences of the whole map
    V = m.vcov(full=True).to_numpy()

    def first(x: np.ndarray) -> float:
        integrand = lambda z: special.expit(x[1] + x[0] * z) * stats.norm.pdf(z)  # noqa: E731
        return float(special.logit(integrate.quad(integrand, -12, 12, epsabs=1e-13)[0]))

    x = np.array([m.theta[0], m.beta[0]])
    J = np.array([(first(x + h) - first(x - h)) / 2e-4 for h in 1e-4 * np.eye(2)])
    assert found["std_error"].iloc[0] == pytest.approx(np.sqrt(J @ V[:2, :2] @ J), rel=1e-5)


def test_lm_list() -> None:
    data = load_data("sleepstudy")
    found = gj.lm_list("Reaction ~ Days | Subject", data)
    assert found.coef.shape == (18, 2)
    for subject in ("308", "372"):
        own = data[data["Subject"] == subject]
        slope, intercept = np.polyfit(own["Days"], own["Reaction"], 1)
        assert_close(found.coef.loc[subject], [intercept, slope], rtol=1e-10)
    # lme4's lmList: pooled residual standard error 25.59182 on 144 degrees of freedom
    assert found.sigma == pytest.approx(25.59182, abs=1e-5) and found.df_resid.sum() == 144
    assert np.ptp(found.bse["Days"]) < 1e-9  # the same days for everybody
    ends = found.confint(0.9)
    half = stats.t.ppf(0.95, 144) * found.bse.loc["308", "Days"]
    row = ends[(ends["Subject"] == "308") & (ends["term"] == "Days")].iloc[0]
    assert row["conf_high"] - row["estimate"] == pytest.approx(half)
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, drawn = found.plot()
    assert len(figure.axes) == 2 and len(drawn) == 36
    plt.close(figure)
    few = gj.lm_list("Reaction ~ Days | Subject", data.drop(index=range(1, 10)))
    assert few.coef.loc["308"].isna().all() and few.coef.notna().all(axis=1).sum() == 17
    with pytest.raises(DataError, match="needs a formula"):
        gj.lm_list("Reaction ~ Days", data)


def test_variance_inflation() -> None:
    m = gj.glmer("use ~ age * ch + I(age^2) + urban + (1 | district)", load_data("Contraception"))
    found = m.vif()
    # one column each: the diagonal of the inverse correlation matrix
    V = m.vcov().to_numpy()[1:, 1:]
    d = 1.0 / np.sqrt(np.diag(V))
    R = V * np.outer(d, d)
    assert_close(found["GVIF"], np.diag(np.linalg.inv(R)), rtol=1e-8)
    with pytest.raises(ValueError, match="at least two terms"):
        cbpp().vif()


def test_standardised_residuals() -> None:
    m = gj.lmer("Reaction ~ Days + (Days | Subject)", load_data("sleepstudy"))
    h = m.hatvalues()
    raw = np.asarray(load_data("sleepstudy")["Reaction"]) - m.fitted
    assert_close(m.rstandard(), raw / (m.sigma * np.sqrt(1 - h)), rtol=1e-9)
    assert np.isfinite(cbpp().rstudent()).all() and (np.sign(cbpp().rstudent()) == np.sign(cbpp().residuals())).all()


def test_bootstrap_test() -> None:
    data = load_data("sleepstudy")
    small, large = gj.lmer("Reaction ~ 1 + (1 | Subject)", data), gj.lmer("Reaction ~ Days + (1 | Subject)", data)
    found = gj.bootstrap_test(small, large, 99, seed=3)
    assert found.p_value == pytest.approx(0.01) and found.df == 1 and not found.failed
    assert found.statistic == pytest.approx(small.refit_ml().objective - large.refit_ml().objective)
    # under the smaller model the statistic is about chi-square(1)
    assert stats.kstest(found.replicates, stats.chi2(1).cdf).pvalue > 0.001
    assert "99 replicates" in str(found)
    with pytest.raises(ValueError, match="more parameters"):
        gj.bootstrap_test(large, small, 9)


def test_power() -> None:
    found = gj.power(cbpp(), "period2", 150, seed=1)
    # 150 data sets: against the normal approximation of the Wald test within 4 x 3 %
    expected = stats.norm.sf(1.96 - abs(cbpp().zvalues["period2"]))
    assert abs(found.estimate - expected) < 0.12 and found.conf_low < found.estimate < found.conf_high
    null = gj.power(cbpp(), "period2", 150, seed=1, beta={"period2": 0.0})
    assert null.estimate < 0.05 + 4.0 * np.sqrt(0.05 * 0.95 / 150)
    assert list(found.to_frame().columns)[:2] == ["power", "conf_low"] and "simulated data sets" in str(found)
    with pytest.raises(ValueError, match="'period9' is not a fixed effect"):
        gj.power(cbpp(), "period9")


def test_refusals() -> None:
    with pytest.raises(ValueError, match="'herd' is not a variable of the fixed effects"):
        cbpp().marginal_means("herd")
    with pytest.raises(ValueError, match="at names 'age'"):
        cbpp().marginal_means("period", at={"age": 3})
    with pytest.raises(NotSupportedError, match="ddf is for linear"):
        cbpp().marginal_means("period", ddf="satterthwaite")
    with pytest.raises(ValueError, match="adjust must be one of"):
        cbpp().marginal_means("period").pairs("fdr")


def test_means_of_numbers_made_factors() -> None:
    """factor(year) has the levels of a factor column, and beside it other numbers are at their mean."""
    data = load_data("sleepstudy")
    data["d"] = (data["Days"] > 4).astype(int) + 2000
    made = gj.lmer("Reaction ~ factor(d) * Days + (1 | Subject)", data)
    column = gj.lmer("Reaction ~ e * Days + (1 | Subject)", data.assign(e=data["d"].astype(str)))
    mine, theirs = made.marginal_means("d"), column.marginal_means("e")
    assert list(mine.frame["d"]) == [2000, 2001]
    assert_close(mine.frame["estimate"], theirs.frame["estimate"], rtol=1e-9)
    assert_close(mine.pairs()["std_error"], theirs.pairs()["std_error"], rtol=1e-7)
    where = gj.lmer("Reaction ~ factor(Days * 2) + (1 | Subject)", data)
    with pytest.raises(DataError, match="levels that were not in the fit.*at="):
        gj.lmer("Reaction ~ factor(Days + 0) + (1 | Subject)", data[data["Days"] != 4]).marginal_means("Days")
    assert_close(where.marginal_means("Days", at={"Days": [0]}).frame["estimate"], where.fixef.iloc[[0]], rtol=1e-9)
