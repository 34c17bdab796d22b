"""What a fit answers: numbers against lme4, tables, text, predictions, refits and updates."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import assert_close, inference, load_data, reference_model
from scipy import stats

import glmmjax as gj
from glmmjax.results import NotSupportedError

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
OBS = "cbind(incidence, size - incidence) ~ period + (1 | herd) + (1 | obs)"
CM = "use ~ age * ch + I(age^2) + urban + "
#: reference id -> formula, data set; fitted once and shared (the programs are those of the reference models)
MODELS = {
    "cbpp_nagq1": (CBPP, "cbpp", "binomial"),
    "cbpp_herd_obs": (OBS, "cbpp", "binomial"),
    "contra_cm3": (CM + "(1 | district)", "Contraception", "binomial"),
    "contra_cm4": (CM + "(urban | district)", "Contraception", "binomial"),
    "contra_cm5": (CM + "(1 | urban:district) + (1 | district)", "Contraception", "binomial"),
    "contra_age_uncorr": ("use ~ age + ch + urban + (age || district)", "Contraception", "binomial"),
    "grouse_sqrt": ("TICKS ~ YEAR + cHEIGHT + (1 | BROOD)", "grouseticks", "poisson(sqrt)"),
}


@cache
def fit(name: str) -> gj.MixedModel:
    formula, data, family = MODELS[name]
    return gj.glmer(formula, load_data(data), family=family)


def results(name: str) -> dict[str, Any]:
    return reference_model(name)["results"]


# -------------------- numbers
@pytest.mark.parametrize("name", MODELS)
def test_conditional_variances(name: str) -> None:
    model, ref = fit(name), results(name)
    for group, frame in model.ranef(condVar=True).items():
        ours, theirs = frame.attrs["condVar"], ref["condVar"][group]
        if isinstance(theirs, dict):  # several terms on one factor: lme4 lists their own variances
            for j, column in enumerate(frame.columns):
                assert_close(ours[:, j, j], np.ravel(theirs[column]), rtol=1e-4, what=column)
            continue
        shape = (len(frame), frame.shape[1], frame.shape[1])
        # theta is good to 1e-6 in both
        assert_close(ours, np.array(theirs, float).reshape(shape), rtol=1e-4, atol=1e-6, what=group)
        assert_close(ours, ours.swapaxes(1, 2), rtol=1e-13, what="symmetry")


def test_conditional_variances_dense() -> None:
    """Lambda (Lambda'Z'WZ Lambda + I)^-1 Lambda' level by level, for a crossed design with slopes."""
    rng = np.random.default_rng(1)
    n = 240
    a, b = rng.permutation(np.arange(n) % 30), rng.permutation(np.arange(n) % 24)
    x = rng.normal(size=n)
    eta = (rng.normal(size=30)[a] + rng.normal(size=30)[a] * x + rng.normal(size=24)[b]) * 0.8
    y = (rng.uniform(size=n) < 1.0 / (1.0 + np.exp(-eta))).astype(float)
    data = {"y": y, "x": x, "a": a.astype(str), "b": b.astype(str)}
    control = {"check_singular": "ignore"}
    m = gj.glmer("y ~ 1 + (x | a) + (x | b)", data, control=control)
    ZL = m.getME("Z") @ m.getME("Lambda")
    mu = m.getME("mu")
    H = ZL.T @ ((mu * (1 - mu))[:, None] * ZL) + np.eye(ZL.shape[1])
    V = m.getME("Lambda") @ np.linalg.inv(H) @ m.getME("Lambda").T
    start = 0
    for group in ("a", "b"):
        frame = m.ranef(condVar=True)[group]
        for i, block in enumerate(frame.attrs["condVar"]):
            at = slice(start + 2 * i, start + 2 * i + 2)
            assert_close(block, V[at, at], rtol=1e-9, atol=1e-11, what=f"{group} {i}")
        start += 2 * len(frame)
    assert_close(m.getME("L") @ m.getME("L").T, H, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["cbpp_nagq1", "cbpp_herd_obs", "contra_cm4", "contra_cm5", "grouse_sqrt"])
def test_devcomp(name: str) -> None:
    ours, theirs = fit(name).devcomp(), results(name)["devcomp_cmp"]
    for key in ("ldL2", "ldRX2", "wrss", "ussq", "pwrss", "drsum", "dev"):
        # both at estimates good to 1e-5 standard errors: first order in the parts, second in their sum
        assert ours[key] == pytest.approx(theirs[key], rel=1e-8 if key == "dev" else 2e-5), key


def test_devcomp_of_cbpp() -> None:
    """FEATURES ACC-19, tight."""
    found = fit("cbpp_nagq1").devcomp()
    expected = {
        "ldL2": 16.901012781,
        "ldRX2": 9.629991860,
        "wrss": 63.078285176,
        "ussq": 9.723120669,
        "pwrss": 72.801405845,
        "drsum": 73.471722755,
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=5e-6), key
    assert fit("cbpp_nagq1").conditional_deviance == pytest.approx(found["drsum"], rel=1e-14)
    saturated = 83.9567075  # -2 log density at mu = y: the deviance is d + |u|^2 + log|L|^2 on top of it
    total = saturated + found["drsum"] + found["ussq"] + found["ldL2"]
    assert total == pytest.approx(found["dev"], abs=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_covariance_of_fixed_effects(name: str) -> None:
    model, ref = fit(name), results(name)
    V = model.vcov()
    assert list(V.index) == list(V.columns) == ref["fixef"]["names"]
    sd = np.sqrt(np.diag(np.array(ref["vcov"]["values"])))
    scale = np.outer(sd, sd)
    assert_close(V / scale, np.array(ref["vcov"]["values"]) / scale, atol=2e-4, what="vcov")
    rx = np.array(ref["vcov_RX"]["values"])
    assert_close(model.vcov(type="rx") / scale, rx / scale, atol=2e-5, what="R_X'R_X")
    full = model.vcov(full=True)
    assert list(full.index) == model.theta_names + ref["fixef"]["names"]
    t = len(model.theta)
    assert_close(full.iloc[t:, t:], V, rtol=1e-12)
    joint = np.array(ref["joint_vcov_theta_beta_numeric"])
    sd = np.sqrt(np.diag(joint))
    # lme4's objective differenced: noise of 1e-4 in well determined parameters, 1e-3 in theta
    assert_close(full / np.outer(sd, sd), joint / np.outer(sd, sd), atol=1e-3, what="theta and beta")


def test_wald_table() -> None:
    m = fit("cbpp_nagq1")
    assert_close(m.zvalues, m.fixef / m.bse, rtol=1e-15)
    assert_close(m.pvalues, 2.0 * stats.norm.sf(np.abs(m.zvalues)), rtol=1e-12)
    # FEATURES 2.2
    expected = [
        [-1.854168514, -0.942895739],
        [-1.593340331, -0.391325182],
        [-1.768869663, -0.488474485],
        [-2.418072766, -0.742554949],
    ]
    ci = m.confint()
    assert_close(ci, expected, atol=1e-5)
    assert list(ci.columns) == ["2.5 %", "97.5 %"] and list(m.confint(level=0.9).columns) == ["5 %", "95 %"]
    half = stats.norm.ppf(0.95) * m.bse
    assert_close(m.confint(level=0.9)["95 %"], m.fixef + half, rtol=1e-12)
    with pytest.raises(ValueError, match="'exact' is not available"):
        m.confint(method="exact")
    with pytest.raises(ValueError, match="between 0 and 1"):
        m.confint(level=95)


def test_far_out_p_values_do_not_underflow_early() -> None:
    data = load_data("Contraception")
    m = gj.glmer("use ~ age + urban + (1 | district)", data)
    z = m.zvalues.to_numpy()
    assert_close(m.pvalues, 2.0 * stats.norm.sf(np.abs(z)), rtol=1e-9)


def test_information_criteria() -> None:
    m = fit("cbpp_nagq1")
    assert (m.df, m.df_resid, m.nobs, m.sigma) == (5, 51, 56, 1.0)
    assert m.aic == pytest.approx(194.052564, abs=1e-6)
    assert m.bic == pytest.approx(204.179322, abs=1e-6)
    assert m.aicc == pytest.approx(m.aic + 2 * 5 * 6 / 50, rel=1e-14)
    assert len(m.phi) == 0 and m.ngrps == {"herd": 15}


def test_rx_only_for_nAGQ_0() -> None:
    m = gj.glmer(CBPP, load_data("cbpp"), nAGQ=0)
    assert_close(m.vcov(), m.vcov(type="rx"))
    assert_close(m.bse, results("cbpp_nagq0")["se"], rtol=1e-5)
    with pytest.raises(NotSupportedError, match="nAGQ = 1"):
        m.vcov(full=True)
    with pytest.raises(ValueError, match="type='hessian'"):
        fit("cbpp_nagq1").vcov(full=True, type="rx")
    with pytest.raises(ValueError, match="'hessian', 'rx' or 'robust', got 'sandwich'"):
        fit("cbpp_nagq1").vcov(type="sandwich")


def test_hatvalues() -> None:
    """Working weights: every one in [0, 1], their sum the effective number of parameters."""
    for name in ("cbpp_nagq1", "contra_cm4", "grouse_sqrt"):
        m = fit(name)
        h = m.hatvalues()
        assert (h >= 0.0).all() and (h <= 1.0).all() and h.index.equals(m.fitted.index)
        ZL = m.getME("Z") @ m.getME("Lambda")
        full = np.concatenate([ZL, m.getME("X").to_numpy()], axis=1)
        mu, weights = m.getME("mu"), m.getME("weights")
        w = weights * mu * (1 - mu) if m.family.name == "binomial" else np.full(m.nobs, 4.0)
        M = full.T @ (w[:, None] * full)
        M[: ZL.shape[1], : ZL.shape[1]] += np.eye(ZL.shape[1])
        assert_close(h, w * np.einsum("ij,ji->i", full, np.linalg.solve(M, full.T)), rtol=1e-8)
        assert len(m.fixef) < h.sum() < full.shape[1]


def test_cbpp_rows() -> None:
    """FEATURES ACC-7, ACC-8."""
    m = fit("cbpp_nagq1")
    assert_close(m.fitted[:4], [0.3082077, 0.1417483, 0.1259575, 0.0840288], atol=1e-6)
    first = {
        "deviance": [-1.4380319, 0.9887432],
        "pearson": [-1.3398617, 1.0751259],
        "working": [-0.7755081, 0.8898207],
        "response": [-0.1653505, 0.1082517],
    }
    for kind, values in first.items():
        assert_close(m.residuals(kind)[:2], values, atol=5e-6, what=kind)
        assert_close(m.residuals(kind, scaled=True), m.residuals(kind))
    with pytest.raises(ValueError, match="'response' or 'quantile', got 'partial'"):
        m.residuals("partial")


def test_ranef_and_coef() -> None:
    m = fit("contra_cm4")
    frame = m.ranef()["district"]
    assert frame.index.name == "district" and list(frame.columns) == ["(Intercept)", "urbanY"]
    coef = m.coef()["district"]
    assert_close(coef["urbanY"], m.fixef["urbanY"] + frame["urbanY"], rtol=1e-14)
    assert_close(coef["age"], np.full(60, m.fixef["age"]))
    tidy = m.ranef_frame()
    assert len(tidy) == 120 and set(tidy["term"]) == {"(Intercept)", "urbanY"}
    covariance = m.ranef(condVar=True)["district"].attrs["condVar"]
    sd = tidy[tidy["term"] == "urbanY"]["condsd"].to_numpy()
    assert_close(sd, np.sqrt(covariance[:, 1, 1]), rtol=1e-14)
    assert "condVar" not in m.ranef()["district"].attrs


def test_two_terms_on_one_factor() -> None:
    m = fit("contra_age_uncorr")
    assert list(m.ranef()["district"].columns) == ["(Intercept)", "age"]
    assert [b.group for b in m.VarCorr()] == ["district", "district.1"]
    assert m.theta_names == ["district.(Intercept)", "district.age"]
    split = gj.glmer("use ~ age + ch + urban + (1 | district) + (0 + age | district)", load_data("Contraception"))
    assert split.objective == pytest.approx(m.objective, abs=1e-9)  # FRM-5


# -------------------- tables and text
def test_varcorr() -> None:
    blocks = fit("contra_cm4").VarCorr()
    frame = blocks.to_frame()
    assert list(frame.columns) == ["grp", "var1", "var2", "vcov", "sdcor"]
    assert_close(frame["sdcor"], [0.615056627, 0.725357587, -0.792978307], atol=2e-6)
    assert_close(frame["vcov"], [0.378294654, 0.526143629, -0.353776163], atol=2e-6)
    assert frame["var1"].tolist() == ["(Intercept)", "urbanY", "(Intercept)"]
    assert frame["var2"].isna().tolist() == [True, True, False]
    lines = str(blocks).splitlines()
    assert lines[0].split() == ["Groups", "Name", "Std.Dev.", "Corr"]
    assert lines[1].split() == ["district", "(Intercept)", "0.6151"]
    assert lines[2].split() == ["urbanY", "0.7254", "-0.79"]
    assert "<table" in blocks._repr_html_()


def test_tidy() -> None:
    m = fit("contra_cm4")
    tidy = m.tidy(level=0.9)
    columns = "effect group term estimate std_error statistic p_value conf_low conf_high".split()
    assert list(tidy.columns) == columns
    fixed, random = tidy[tidy["effect"] == "fixed"], tidy[tidy["effect"] == "ran_pars"]
    assert list(fixed["term"]) == list(m.fixef.index) and fixed["group"].isna().all()
    assert_close(fixed["estimate"], m.fixef)
    assert_close(fixed["std_error"], m.bse)
    assert_close(fixed["statistic"], m.zvalues)
    assert_close(fixed["p_value"], m.pvalues)
    assert_close(fixed[["conf_low", "conf_high"]], m.confint(level=0.9))
    assert list(random["term"]) == ["sd__(Intercept)", "sd__urbanY", "cor__(Intercept).urbanY"]
    assert (random["group"] == "district").all()
    assert_close(random["estimate"], m.VarCorr().to_frame()["sdcor"])
    assert tidy["estimate"].dtype == np.float64 and tidy["conf_high"].dtype == np.float64


def test_summary_layout() -> None:
    text = str(fit("cbpp_nagq1").summary())
    blocks = [
        "Generalized linear mixed model fit by maximum likelihood (Laplace Approximation)",
        " Family: binomial  ( logit )",
        "Formula: cbind(incidence, size - incidence) ~ period + (1 | herd)",
        "AIC      BIC   logLik -2*log(L) df.resid",
        "194.1    204.2    -92.0     184.1       51",
        "Scaled residuals:",
        "Random effects:",
        "Groups Name        Variance Std.Dev.",
        "herd   (Intercept)",
        "Number of obs: 56, groups:  herd, 15",
        "Fixed effects:",
        "Estimate Std. Error z value Pr(>|z|)",
        "(Intercept) -1.39853     0.2325  -6.016 1.79e-09 ***",
        "period2     -0.99233     0.3066  -3.236  0.00121 **",
        "Signif. codes:",
        "Correlation of Fixed Effects:",
        "period4 -0.261  0.212  0.196",
        "Converged in ",
    ]
    at = [text.find(block) for block in blocks]
    assert -1 not in at, blocks[at.index(-1)]
    assert at == sorted(at)
    quantiles = np.quantile(fit("cbpp_nagq1").residuals("pearson"), [0, 0.25, 0.5, 0.75, 1])
    line = text.splitlines()[text.splitlines().index("Scaled residuals: ") + 2]
    assert_close([float(v) for v in line.split()], quantiles, atol=5e-5)
    assert not [row for row in text.splitlines() if row != row.rstrip() and "residuals" not in row]


def test_summary_correlations() -> None:
    m = fit("contra_cm4")
    text = str(m.summary())
    correlation = m.vcov() / np.outer(m.bse, m.bse)
    row = next(r for r in text.splitlines() if r.startswith("age:chY ") and len(r.split()) == 6 and "*" not in r)
    assert_close([float(v) for v in row.split()[1:]], correlation.iloc[-1, :-1], atol=5.1e-4)
    assert "Correlation of Fixed" not in str(m.summary(correlation=False))
    one = gj.glmer("cbind(incidence, size - incidence) ~ 1 + (1 | herd)", load_data("cbpp"))
    assert "Correlation of Fixed" not in str(one.summary())


@pytest.mark.slow
def test_summary_leaves_out_many_correlations() -> None:
    m = gj.glmer("r2 ~ (Anger + Gender + btype + situ + mode)^2 + (1 | id)", load_data("VerbAgg"))
    assert len(m.fixef) > 20
    text = str(m.summary())
    assert "p > 20" in text and "Correlation of Fixed Effects:" not in text
    assert "Correlation of Fixed Effects:" in str(m.summary(correlation=True))


def test_short_text_and_html() -> None:
    m = fit("cbpp_nagq1")
    text = str(m)
    assert repr(m) == text and len(text.splitlines()) < 15
    for part in ("Random effects:", "Fixed Effects:", "-1.3985", "herd"):
        assert part in text
    html = m._repr_html_()
    for tag in ("table", "tr", "td", "th", "div", "p"):
        assert len(re.findall(rf"<{tag}[ >]", html)) == html.count(f"</{tag}>"), tag
    assert "Pr(&gt;|z|)" in html and "1.79e-09" in html
    assert m.summary()._repr_html_() == html


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (1.0, "1"),
        (0.5, "0.5"),
        (0.03536, "0.03536"),
        (1.79e-9, "1.79e-09"),
        (0.0, "<2e-16"),
        (np.nan, "NaN"),
    ],
)
def test_p_values_as_text(p: float, text: str) -> None:
    from glmmjax.report.numbers import p_text

    assert p_text(p) == text


def test_html_is_escaped() -> None:
    data = load_data("cbpp").rename(columns={"herd": "h"})
    data["b"] = pd.Categorical(np.where(np.arange(56) % 2 == 0, "<i>", "&x"))
    m = gj.glmer("cbind(incidence, size - incidence) ~ b + (1 | h)", data)
    html = m._repr_html_()
    assert "<i>" not in html and "b&lt;i&gt;" in html


def test_messages() -> None:
    assert "modelling the probability of 'Y'" in " ".join(fit("contra_cm3").messages())
    assert fit("cbpp_nagq1").messages() == []
    toy = gj.glmer("y ~ x1 + (1 | subject)", load_data("toy15"))
    assert any("fewer than 5 levels" in t and "subject (3)" in t for t in toy.messages())
    assert "Fewer than 5 levels" in str(toy.summary())
    data = load_data("cbpp")
    data.loc[[3, 9], "incidence"] = np.nan
    short = gj.glmer(CBPP, data)
    assert short.nobs == 54
    assert any("2 rows with missing values" in t and "incidence" in t for t in short.messages())
    assert len(short.fitted) == 54 and 3 not in short.fitted.index


# -------------------- getME
def test_getME() -> None:
    m = fit("contra_cm4")
    X, Z, Lambda = m.getME("X").to_numpy(), m.getME("Z"), m.getME("Lambda")
    assert X.shape == (1934, 6) and Z.shape == (1934, 120) and Lambda.shape == (120, 120)
    assert (m.getME("n"), m.getME("p"), m.getME("q")) == (1934, 6, 120)
    b, u = m.getME("b"), m.getME("u")
    assert_close(b, Lambda @ u, rtol=1e-12, atol=1e-14)
    assert_close(b, m.ranef()["district"].to_numpy().reshape(-1), rtol=1e-14)
    eta = X @ m.getME("beta") + Z @ b + m.getME("offset")
    assert_close(m.getME("eta"), eta, rtol=1e-12, atol=1e-13)
    assert_close(m.getME("mu"), 1 / (1 + np.exp(-eta)), rtol=1e-12)
    assert_close(m.getME("mu"), m.fitted)
    L, RX = m.getME("L"), m.getME("RX")
    assert_close(2.0 * np.log(np.diag(L)).sum(), m.devcomp()["ldL2"], rtol=1e-11)
    assert_close(np.linalg.inv(RX.T @ RX), m.vcov(type="rx"), rtol=1e-9, atol=1e-12)
    assert np.array_equal(RX, np.triu(RX))
    assert list(m.getME("theta").index) == m.theta_names
    assert m.getME("flist").columns.tolist() == ["district"] and m.getME("n_rtrms") == 1
    assert set(m.getME("flist")["district"]) == set(m.ranef()["district"].index)
    assert m.getME("cnms") == [("district", ("(Intercept)", "urbanY"))]
    with pytest.raises(ValueError, match="did you mean 'Lambda'"):
        m.getME("Lamda")


def test_getME_of_lme4() -> None:
    """lme4's values of the bookkeeping pieces; matrices by what defines them."""
    m = gj.lmer("Reaction ~ Days + (Days | Subject)", load_data("sleepstudy"))
    assert_close(m.getME("ST")[0], [[0.96674177, 0.0], [0.01569091, 0.23091]], atol=2e-5)  # lme4 stops early
    assert m.getME("Gp").tolist() == [0, 36] and m.getME("Tp").tolist() == [0, 3]
    assert m.getME("Lind").tolist() == [0, 1, 2] * 18
    assert m.getME("REML") == 2 and m.getME("is_REML") and m.getME("N") == 180 and m.getME("k") == 1
    assert [m.getME(f"{v}_i").tolist() for v in "plqm"] == [[2], [18], [36], [3]] and m.getME("m") == 3
    assert m.getME("p_i").index[0] == "(Intercept) + Days | Subject"
    assert m.getME("lower").tolist() == [0.0, -np.inf, 0.0]
    parts = m.getME("Ztlist")
    assert list(parts) == ["Subject.(Intercept)", "Subject.Days"] and parts["Subject.Days"].shape == (18, 180)
    assert_close(np.stack(list(parts.values()), axis=1).reshape(36, 180), m.getME("Zt"))
    assert_close(m.getME("A"), m.getME("Lambdat") @ m.getME("Zt"), rtol=1e-14)
    assert m.getME("mmList")["(Intercept) + Days | Subject"].shape == (180, 2)
    everything = m.getME("ALL")
    X, RZX = m.getME("X").to_numpy(), everything["RZX"]
    assert_close(everything["L"] @ RZX, everything["A"] @ X, atol=1e-9)
    assert_close(everything["RX"].T @ everything["RX"], X.T @ X - RZX.T @ RZX, rtol=1e-9)
    # Lambda' from theta by position
    filled = everything["Lambdat"].copy()
    column, row = np.nonzero(filled.T)
    assert_close(filled[row, column], everything["theta"].to_numpy()[everything["Lind"]])
    g = fit("cbpp_nagq1")
    assert g.getME("Gp").tolist() == [0, 15] and g.getME("Lind").tolist() == [0] * 15 and g.getME("REML") == 0


def test_deviance_function() -> None:
    m = fit("cbpp_nagq1")
    f = m.deviance_function()
    assert f(m.theta, m.beta) == pytest.approx(m.objective, rel=1e-13)
    for point in inference_points():
        x = np.array(point["par"], float)
        assert f(x[:1], x[1:]) == pytest.approx(point["objective"], rel=1e-9)


def inference_points() -> list[dict[str, Any]]:
    from helpers import fixed_params

    return fixed_params("cbpp_nagq1")["points"]


def test_results_are_copies() -> None:
    m = fit("cbpp_nagq1")
    m.beta[0] = m.theta[0] = 99.0
    m.getME("y")[0] = 99.0
    fitted, modes = m.fitted, m.ranef()["herd"]
    fitted.iloc[0] = modes.iloc[0, 0] = 99.0
    assert m.beta[0] != 99.0 and m.theta[0] != 99.0 and m.getME("y")[0] != 99.0
    assert m.fitted.iloc[0] != 99.0 and m.ranef()["herd"].iloc[0, 0] != 99.0


# -------------------- prediction
@pytest.mark.parametrize(
    ("name", "file", "key"),
    [
        ("contra_cm3", "predict_contra_cm3", "re_form_NULL"),
        ("contra_cm4", "predict_contra_cm3", "cm4_re_form_NULL"),
        ("cbpp_herd_obs", "predict_cbpp_obs", "re_form_NULL"),
    ],
)
def test_predict_new_rows(name: str, file: str, key: str) -> None:
    record, m = inference(file), fit(name)
    new = pd.DataFrame(record["newdata"])
    for kind in ("link", "response"):
        ours = m.predict(new, type=kind, allow_new_levels=True)
        # the predictions' fit of cm3 is 1e-4 standard errors (.3) from the optimum
        assert_close(ours, record[key][kind], atol=3e-5, what=kind)
        if name != "contra_cm4":
            assert_close(m.predict(new, re_form="NA", type=kind), record["re_form_NA"][kind], atol=3e-5)
    with pytest.raises(gj.DataError, match="allow_new_levels=True"):
        m.predict(new)


def test_predict_new_rows_of_cbpp() -> None:
    """The file's re_form_NULL was predicted after profile(), which had moved lme4's modes to another theta: its
    fixed part is compared, and with it the modes of the model file."""
    record, m, ref = inference("predict_cbpp"), fit("cbpp_nagq1"), results("cbpp_nagq1")
    new = pd.DataFrame(record["newdata"])
    fixed = np.array(record["re_form_NA"]["link"])
    assert_close(m.predict(new, re_form="NA"), fixed, atol=1e-5)
    modes = dict(zip(ref["ranef"]["herd"]["levels"], np.ravel(ref["ranef"]["herd"]["values"]), strict=True))
    expected = fixed + [modes.get(h, 0.0) for h in new["herd"]]
    assert_close(m.predict(new, allow_new_levels=True), expected, atol=2e-5)
    with pytest.raises(gj.DataError, match="'herd' that were not in the fit: '99'"):
        m.predict(new)


def test_predict_with_some_of_the_terms() -> None:
    record, m = inference("predict_cbpp_obs"), fit("cbpp_herd_obs")
    new = pd.DataFrame(record["newdata"])
    ours = m.predict(new, re_form="~(1 | herd)", allow_new_levels=True)
    assert_close(ours, record["re_form_herd"]["link"], atol=1e-5)
    both = m.predict(re_form="~(1 | herd) + (1 | obs)")
    assert_close(both, m.linear_predictor, rtol=1e-14)
    with pytest.raises(ValueError, match=r"\(1 \| cow\) is not in the model; it has .*\(1 \| herd\)"):
        m.predict(re_form="~(1 | cow)")


def test_predict_the_rows_of_the_fit() -> None:
    m = fit("cbpp_nagq1")
    assert_close(m.predict(), m.linear_predictor)
    assert_close(m.predict(type="response"), m.fitted, rtol=1e-15)
    assert_close(m.predict(load_data("cbpp")), m.linear_predictor, rtol=1e-14)
    fixed = m.getME("X").to_numpy() @ m.beta
    assert_close(m.predict(re_form="NA"), fixed, rtol=1e-14)
    assert_close(m.predict(re_form="~0"), fixed, rtol=1e-14)
    new = load_data("cbpp").drop(columns=["incidence", "size"]).iloc[::-1]
    assert_close(m.predict(new), m.linear_predictor[::-1], rtol=1e-14)


def test_predict_uses_offsets() -> None:
    data = load_data("grouseticks")
    data["lo"] = np.linspace(-0.5, 0.5, len(data))
    m = gj.glmer("TICKS ~ YEAR + offset(lo) + (1 | BROOD)", data, family="poisson")
    base = data.iloc[:5].assign(lo=0.0)
    assert_close(m.predict(data.iloc[:5]) - m.predict(base), data["lo"].iloc[:5], atol=1e-12)
    given = gj.glmer("TICKS ~ YEAR + (1 | BROOD)", data, family="poisson", offset=data["lo"].to_numpy())
    assert_close(given.beta, m.beta, atol=1e-8)
    assert_close(given.predict(base, offset=data["lo"].iloc[:5]), m.predict(data.iloc[:5]), atol=1e-6)


# -------------------- refit and update
def test_refit_equals_a_new_fit() -> None:
    data, m = load_data("cbpp"), fit("cbpp_nagq1")
    rng = np.random.default_rng(6)
    new = rng.binomial(data["size"].astype(int), np.clip(m.fitted, 0.05, 0.9))
    again = m.refit(new / data["size"])
    data["incidence"] = new.astype(float)
    fresh = gj.glmer(CBPP, data)
    assert again.objective == pytest.approx(fresh.objective, rel=1e-12)
    assert_close(again.beta, fresh.beta, atol=1e-8)
    assert_close(again.theta, fresh.theta, atol=1e-8)
    assert_close(again.bse, fresh.bse, rtol=1e-8)
    assert_close(again.fitted, fresh.fitted, atol=1e-8)
    assert_close(again.residuals(), fresh.residuals(), atol=1e-7)
    assert m.objective == pytest.approx(184.052563743, abs=2e-8)  # the first fit is as it was
    same = m.refit(m.getME("y"))
    assert same.objective == pytest.approx(m.objective, rel=1e-13)


def test_refit_of_a_fit_that_dropped_rows() -> None:
    data = load_data("cbpp")
    y = (data["incidence"] / data["size"]).to_numpy()
    data.loc[[3, 9], "period"] = np.nan
    m = gj.glmer(CBPP, data)
    a, b = m.refit(y), m.refit(np.delete(y, [3, 9]))
    assert a.objective == b.objective == pytest.approx(m.objective, rel=1e-13)


def test_update() -> None:
    m = fit("cbpp_nagq1")
    more = m.update(". ~ . + (1 | obs)")
    assert more.formula == OBS
    assert more.objective == pytest.approx(fit("cbpp_herd_obs").objective, abs=1e-9)
    less = m.update(". ~ . - period")
    assert list(less.fixef.index) == ["(Intercept)"]
    probit = m.update(". ~ .", family="binomial(probit)")
    assert probit.objective == pytest.approx(185.242446665, abs=4e-7)
    assert m.update(". ~ .", nAGQ=0).nAGQ == 0
    data = load_data("cbpp").iloc[:40]
    assert m.update(". ~ .", data=data).nobs == 40
    with pytest.raises(TypeError, match="did you mean 'family'"):
        m.update(". ~ .", famly="poisson")


def test_update_keeps_weights() -> None:
    data = load_data("cbpp")
    m = gj.glmer("prop ~ period + (1 | herd)", data, weights="size")
    assert m.objective == pytest.approx(fit("cbpp_nagq1").objective, rel=1e-12)
    assert "Weights: size" in str(m)
    more = m.update(". ~ . + (1 | obs)")
    assert more.objective == pytest.approx(fit("cbpp_herd_obs").objective, abs=1e-9)


# -------------------- families without everything
def test_custom_family_says_what_it_cannot() -> None:
    import jax.numpy as jnp

    family = gj.families.Custom(lambda y, eta, aux: y * eta - jnp.exp(eta), "log")
    m = gj.glmer("TICKS ~ YEAR + (1 | BROOD)", load_data("grouseticks"), family=family)
    assert_close(m.residuals("response"), m.getME("y") - np.exp(m.linear_predictor), rtol=1e-12)
    for kind in ("deviance", "pearson"):
        with pytest.raises(NotSupportedError, match="type='response'"):
            m.residuals(kind)
    text = str(m.summary())
    assert "Scaled residuals" not in text and "custom" in text
    poisson = gj.glmer("TICKS ~ YEAR + (1 | BROOD)", load_data("grouseticks"), family="poisson")
    assert_close(m.beta, poisson.beta, atol=1e-5 * poisson.bse.min())


# -------------------- no fixed effects
EMPTY = "cbind(incidence, size - incidence) ~ 0 + (1 | herd)"


@cache
def empty(nAGQ: int) -> gj.MixedModel:
    return gj.glmer(EMPTY, load_data("cbpp"), nAGQ=nAGQ)


@pytest.mark.parametrize("nAGQ", [0, 1, 5])
def test_a_model_without_fixed_effects(nAGQ: int) -> None:
    """lme4 at tight tolerances; nAGQ = 0 is Laplace here, and 5 points have the saturated model's constant added."""
    objective, theta, modes = {
        5: (152.42552829117 + 83.95670750, 2.25387690, [-1.203118572, -2.320307235, -1.611015146])
    }.get(nAGQ, (236.74990953808, 2.24660671, [-1.202908323, -2.319734280, -1.610818711]))
    m = empty(nAGQ)
    assert m.converged
    assert m.objective == pytest.approx(objective, abs=1e-7 if nAGQ > 1 else 2e-8)  # digits of the constant
    assert m.theta[0] == pytest.approx(theta, rel=1e-6)
    assert_close(m.ranef()["herd"].iloc[:3, 0], modes, rtol=1e-5)
    for table in (m.fixef, m.bse, m.pvalues, m.coefficients(), m.vcov(), m.vcov(type="rx"), m.confint()):
        assert len(table) == 0
    assert "(none)" in str(m.summary())
    tidy = m.tidy()
    assert list(tidy["term"]) == ["sd__(Intercept)"] and tidy["estimate"][0] == pytest.approx(theta, rel=1e-6)
    for ask in (lambda: m.wald_test("x = 0"), lambda: m.marginal_means("x")):
        with pytest.raises(ValueError, match="no fixed effects to test|has none there"):
            ask()


@pytest.mark.filterwarnings("ignore::glmmjax.ConvergenceWarning")
def test_what_a_model_without_fixed_effects_answers() -> None:
    m, data = empty(1), load_data("cbpp")
    # glmmTMB 1.1.5 at tight tolerances
    assert m.vcov(full=True).to_numpy()[0, 0] ** 0.5 == pytest.approx(2.246606675 * 0.193226174519, rel=1e-5)
    at = m.predict(data.head(2), se=True)
    assert_close(at["fit"], m.ranef()["herd"].iloc[[0, 0], 0], rtol=1e-12)
    rise = m.profile().confint().to_numpy()[0]
    deviance = m.deviance_function()
    assert_close([deviance([t], []) - m.objective for t in rise], np.full(2, stats.chi2.ppf(0.95, 1)), atol=1e-5)
    table = gj.anova(m, m.update(". ~ . + 1"))
    assert table["Chisq"].iloc[1] == pytest.approx(m.objective - m.update(". ~ . + 1").objective, abs=1e-7)
    exact = gj.glmer(EMPTY, data, control={"exact": True})
    assert exact.objective == pytest.approx(m.objective, abs=1e-9)
    many = gj.fit_many(
        "~ 0 + (1 | herd)", data, "binomial", y=np.column_stack([data["incidence"] > 0, data["size"] > 9])
    )
    for name, y in enumerate((data["incidence"] > 0, data["size"] > 9)):
        one = gj.glmer("y ~ 0 + (1 | herd)", data.assign(y=y.astype(int)))
        assert many.fits["logLik"][name] == pytest.approx(one.loglik, abs=1e-8)
    assert len(many.frame) == 0 and many.coef.shape == (2, 0)


def test_a_linear_model_without_fixed_effects() -> None:
    m = gj.lmer("Reaction ~ 0 + (1 | Subject)", load_data("sleepstudy"))
    assert len(m.pvalues) == len(m.coefficients("kenward-roger")) == 0
    assert "(none)" in str(m.summary(ddf="satterthwaite"))
    with pytest.raises(ValueError, match="no fixed effects to test"):
        gj.anova(m)


def test_tidy_has_the_p_values_of_the_model() -> None:
    m = gj.lmer("Reaction ~ Days + (Days | Subject)", load_data("sleepstudy"))
    assert_close(m.tidy()["p_value"][:2], [1.17e-17, 3.26e-06], rtol=5e-3)  # lmerTest 3.1-3
    assert list(m.tidy()["p_value"][:2]) == list(m.pvalues)
    assert m.tidy(ddf=None)["p_value"].isna().all()


# -------------------- refit makes the checks of the fit
@pytest.fixture(scope="module")
def counts() -> tuple[pd.DataFrame, gj.MixedModel]:
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"x": rng.normal(size=120), "g": np.arange(120) % 12})
    data["y"] = rng.poisson(np.exp(0.3 + 0.4 * data["x"] + 0.5 * rng.normal(size=12)[data["g"]]))
    return data, gj.glmer("y ~ x + (1 | g)", data, "poisson")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda y: y.reshape(60, 2), "has 60 values, the fit has 120 rows"),
        (lambda y: np.stack([y, y], axis=1), r"has shape \(120, 2\), the fit has 120 rows: give one column, \(120,\)"),
        (lambda y: y[:50], "has 50 values, the fit has 120 rows"),
        (lambda y: np.ones(120), "'y' is constant: every row is 1"),
        (lambda y: 0 * y, "'y' is constant: every row is 0"),
        (lambda y: y - 1, "has -1 .* cannot be negative"),
        (lambda y: y + 0.5, "must be a count"),
        (lambda y: np.where(y == 0, np.nan, y), "missing or infinite values"),
        (lambda y: [None, *y[1:]], "missing or infinite values"),
        (lambda y: ["a"] * 120, "is not numeric: it has 'a'"),
        (lambda y: ["1", *y[1:].tolist()], "is not numeric: it has '1'"),
        (lambda y: y.astype(complex), "is not numeric"),
    ],
)
def test_responses_that_refit_refuses(counts: Any, change: Any, match: str) -> None:
    data, m = counts
    with pytest.raises(gj.DataError, match=match):
        m.refit(change(data["y"].to_numpy()))
    with pytest.raises(gj.DataError):  # and as one of many, named
        m.refit_many(pd.DataFrame({"first": data["y"], "other": data["y"] * 0}))


def test_refit_to_a_response_that_the_fixed_effects_fit(counts: Any) -> None:
    data, _ = counts
    m = gj.lmer("x ~ y + (1 | g)", data)
    for exact in (2.0 * data["y"] + 1.0, 1e6 + 1e-3 * data["y"]):
        with pytest.raises(gj.DataError, match="response x is fitted exactly by the fixed effects"):
            m.refit(exact)
    near = 2.0 * data["y"] + 1.0 + 1e-6 * data["x"]
    assert m.refit(near).loglik == pytest.approx(gj.lmer("x ~ y + (1 | g)", data.assign(x=near)).loglik, abs=1e-4)


@pytest.mark.filterwarnings("ignore::glmmjax.ConvergenceWarning")
def test_one_column_of_successes_in_any_container() -> None:
    """Integers are successes wherever they are: as a fit to these successes."""
    rng = np.random.default_rng(0)
    s, data = (rng.random(120) < 0.4).astype(int), pd.DataFrame({"x": rng.normal(size=120), "g": np.arange(120) % 12})
    formula = "cbind(s, f) ~ x + (1 | g)"
    m = gj.glmer(formula, data.assign(s=2 * s, f=3 - 2 * s), "binomial")
    expected = gj.glmer(formula, data.assign(s=s, f=3 - s), "binomial").loglik
    containers = [s, pd.Series(s), s[:, None], pd.DataFrame({"s": s}), s.astype(object), s.astype(bool), list(s)]
    containers += [pd.array(s, dtype="Int64"), np.stack([s, 3 - s], axis=1), s / 3]
    for newresp in containers:
        assert m.refit(newresp).loglik == pytest.approx(expected, abs=1e-8)
    drawn = m.simulate(1, seed=1)
    successes = drawn["sim_1"].to_numpy()
    again = gj.glmer(formula, data.assign(s=successes, f=3 - successes), "binomial")
    assert m.refit(drawn).loglik == pytest.approx(again.loglik, abs=1e-8)


@pytest.mark.filterwarnings("ignore::glmmjax.ConvergenceWarning")
def test_notes_of_a_refit_are_those_of_its_response() -> None:
    data = load_data("cbpp").assign(p=lambda d: d["incidence"] / d["size"])
    m = gj.glmer("p ~ period + (1 | herd)", data, weights="size")
    odd = m.refit(data["p"] * 0.9)
    assert any("non-integer number of successes" in note for note in odd.messages())
    assert not any("non-integer" in note for note in odd.refit(data["p"].to_numpy()).messages())
