"""Predictions: standard errors against glmmTMB and dense matrices, averages over random effects, later levels."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from helpers import REFERENCE, DenseLaplace, assert_close, fd6, inference, load_data
from scipy import integrate, special, stats

import glmmjax as gj
from glmmjax.inference.predict import averages
from glmmjax.results import NotSupportedError

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
CM4 = "use ~ I(age/10) * ch + I(age^2/100) + urban + (urban | district)"
SLEEP = "Reaction ~ Days + (Days | Subject)"


@cache
def glmm(formula: str, data: str, family: str = "binomial", nAGQ: int = 1, hessian: str | None = None) -> gj.MixedModel:
    return gj.glmer(formula, load_data(data), family, nAGQ=nAGQ, hessian=hessian)


@cache
def lmm(formula: str, REML: bool = True) -> gj.MixedModel:
    return gj.lmer(formula, load_data("sleepstudy"), REML=REML)


# -------------------- standard errors
REFERENCES = ["cbpp", "cbpp_obs_cloglog", "contra_cm3", "contra_cm4", "sleep_ml", "sleep_reml"]


@pytest.mark.parametrize("name", REFERENCES)
def test_standard_errors_are_those_of_glmmTMB(name: str) -> None:
    ref: dict[str, Any] = json.loads((REFERENCE / "predict_se" / f"{name}.json").read_text(encoding="utf-8"))
    if ref["dataset"] == "sleepstudy":
        m = lmm(ref["formula"], ref["REML"])
    else:  # glmmTMB's Laplace approximation has the observed information
        family = "binomial(cloglog)" if name.endswith("cloglog") else "binomial"
        m = glmm(ref["formula"], ref["dataset"], family, 1, "observed")
    assert m.objective == pytest.approx(ref["objective"], abs=1e-6)
    rows = np.array(ref["rows"]) - 1
    cases: dict[str, dict[str, Any]] = {
        "fit_rows": {},
        "fixed_only": {"re_form": "NA"},
        "response": {"type": "response"},
    }
    for key, arguments in cases.items():
        if ref[key] is None:
            continue
        ours = m.predict(se=True, **arguments).iloc[rows]
        # R takes the Hessian of the parameters by differences; the fits agree to a few 1e-7
        assert_close(ours["fit"], ref[key]["fit"], atol=2e-6, what=key)
        assert_close(ours["se"], ref[key]["se"], rtol=3e-6, what=key)
    new = m.predict(pd.DataFrame(ref["newdata"]), allow_new_levels=True, se=True)
    assert_close(new["fit"], ref["new_rows"]["fit"], atol=2e-6, what="new rows")
    assert_close(new["se"], ref["new_rows"]["se"], rtol=3e-6, what="new rows")


def test_standard_errors_from_dense_matrices() -> None:
    """Z Lambda H^-1 Lambda'Z' + D Cov D' with D by differences through dense modes; two factors, another link."""
    m = glmm(CBPP + " + (1 | obs)", "cbpp", "binomial(cloglog)", 1, "observed")
    dense = DenseLaplace(m._design, "binomial", "cloglog", "observed")
    t, X, Z = m.theta.size, m.getME("X").to_numpy(), dense.Z

    def eta(x: np.ndarray) -> np.ndarray:
        A = dense.scaled_Z(x[:t])
        return X @ x[t:] + A @ dense.mode(x[:t], x[t:], A)

    x = np.concatenate([m.theta, m.beta])
    A = dense.scaled_Z(m.theta)
    H = A.T @ (dense.rows(eta(x))[2][:, None] * A) + np.eye(Z.shape[1])
    conditional = np.einsum("nq,nq->n", A, np.linalg.solve(H, A.T).T)
    D = fd6(eta, x, 1e-3)
    joint = conditional + np.einsum("ni,ij,nj->n", D, m.vcov(full=True), D)
    assert_close(m.predict(se=True)["se"], np.sqrt(joint), rtol=1e-6)

    # herds exchanged among the rows: pairs of levels that never met in the fit
    shuffle = np.random.default_rng(1).permutation(56)
    new = load_data("cbpp")
    new["herd"] = new["herd"].to_numpy()[shuffle]
    take = np.where(np.arange(Z.shape[1]) >= 56, shuffle[:, None], np.arange(56)[:, None])  # obs comes before herd

    def moved(x: np.ndarray) -> np.ndarray:
        A = dense.scaled_Z(x[:t])
        return X @ x[t:] + np.take_along_axis(A, take, 0) @ dense.mode(x[:t], x[t:], A)

    B, D_new = np.take_along_axis(A, take, 0), fd6(moved, x, 1e-3)
    variance = np.einsum("nq,nq->n", B, np.linalg.solve(H, B.T).T)
    variance += np.einsum("ni,ij,nj->n", D_new, m.vcov(full=True), D_new)
    assert_close(m.predict(new), moved(x), atol=1e-8)
    assert_close(m.predict(new, se=True)["se"], np.sqrt(variance), rtol=1e-6)

    beta = D[:, t:]
    known = conditional + np.einsum("ni,ij,nj->n", beta, m.vcov(type="rx"), beta)
    # vcov(type="rx") has the weights of the fit, here the observed ones
    assert_close(m.predict(se="conditional")["se"], np.sqrt(known), rtol=1e-6)
    one = m.predict(re_form="~(1 | herd)", se="conditional")["se"]
    herd = A * (np.arange(Z.shape[1]) >= 56)
    G = X - herd @ np.linalg.solve(H, A.T @ (dense.rows(eta(x))[2][:, None] * X))
    variance = np.einsum("nq,nq->n", herd, np.linalg.solve(H, herd.T).T)
    assert_close(one, np.sqrt(variance + np.einsum("ni,ij,nj->n", G, m.vcov(type="rx"), G)), rtol=1e-8)


def test_conditional_standard_errors_of_a_linear_model() -> None:
    """Henderson's equations: sigma^2 [X Z] C^-1 [X Z]'."""
    m = lmm(SLEEP)
    XZ = np.concatenate([m.getME("X").to_numpy(), m.getME("Z")], axis=1)
    prior = np.linalg.inv(m.getME("Lambda") @ m.getME("Lambda").T)
    C = XZ.T @ XZ
    C[2:, 2:] += prior
    variance = m.sigma**2 * np.einsum("nc,nc->n", XZ, np.linalg.solve(C, XZ.T).T)
    assert_close(m.predict(se="conditional")["se"], np.sqrt(variance), rtol=1e-9)
    assert (m.predict(se=True)["se"] > m.predict(se="conditional")["se"]).all()


def test_standard_errors_without_random_effects_are_those_of_beta() -> None:
    for m in (glmm(CBPP, "cbpp", hessian="observed"), lmm(SLEEP)):
        X = m.getME("X").to_numpy()
        expected = np.sqrt(np.einsum("ni,ij,nj->n", X, m.vcov(), X))
        # of a linear model the covariance of beta gains that of theta, which is nothing in a balanced design
        assert_close(m.predict(re_form="NA", se=True)["se"], expected, rtol=1e-6)


def test_a_dispersion_is_one_more_uncertain_parameter() -> None:
    """A gaussian family with its variance as dispersion is the linear model, whose theta is relative to sigma."""

    def logpdf(y: Any, eta: Any, aux: Any) -> Any:
        return -0.5 * jnp.square(y - eta) / aux["s"] - 0.5 * jnp.log(2.0 * jnp.pi * aux["s"])

    g = np.arange(40) % 8
    data = pd.DataFrame({"g": g, "x": np.arange(40) // 20, "y": g + np.random.default_rng(1).standard_normal(40)})
    custom = gj.glmer("y ~ x + (1 | g)", data, gj.families.Custom(logpdf, "identity", {"s": 1.0}))
    linear = gj.lmer("y ~ x + (1 | g)", data, REML=False)
    # the Hessian of one is by differences
    assert_close(custom.predict(se=True), linear.predict(se=True), rtol=3e-6)


def test_nagq_0_adds_the_uncertainty_of_theta() -> None:
    m = glmm(CBPP, "cbpp", nAGQ=0)
    joint, known = m.predict(se=True), m.predict(se="conditional")
    assert (joint["se"] > known["se"]).all() and (joint["se"] < 1.1 * known["se"]).all()


def test_intervals_and_scales() -> None:
    m, data = glmm(CBPP, "cbpp", hessian="observed"), load_data("cbpp")
    new = data.head(3).assign(herd=["1", "99", "15"]).set_axis(["a", "b", "c"])
    link = m.predict(new, se=True, level=0.9, allow_new_levels=True)
    mean = m.predict(new, type="response", level=0.9, allow_new_levels=True)
    assert list(mean.columns) == ["fit", "se", "lower", "upper"] and list(mean.index) == ["a", "b", "c"]
    half = stats.norm.ppf(0.95) * link["se"]
    assert_close(link[["lower", "upper"]], np.stack([link["fit"] - half, link["fit"] + half], axis=1), rtol=1e-12)
    assert_close(mean[["fit", "lower", "upper"]], special.expit(link[["fit", "lower", "upper"]]), rtol=1e-12)
    assert_close(mean["se"], link["se"] * mean["fit"] * (1.0 - mean["fit"]), rtol=1e-12)
    assert list(m.predict(se=True).index) == list(data.index)
    # the new herd: its prior variance on top of that of the fixed part
    fixed = m.predict(new, re_form="NA", se=True)["se"].iloc[1]
    assert link["se"].iloc[1] == pytest.approx(np.hypot(fixed, m.theta[0]), rel=1e-12)


def test_intervals_of_new_observations() -> None:
    """The variance of the prediction and the residual variance, by the weights of the fit's rows."""
    data = load_data("sleepstudy").assign(w=np.linspace(0.5, 2.0, 180))
    m = gj.lmer(SLEEP, data, weights="w")
    mean, new = m.predict(level=0.9), m.predict(level=0.9, interval="prediction")
    assert_close(new[["fit", "se"]], mean[["fit", "se"]], what="what is predicted")
    half = stats.norm.ppf(0.95) * np.sqrt(mean["se"] ** 2 + m.sigma**2 / data["w"])
    assert_close(new["upper"] - new["fit"], half, rtol=1e-12, what="rows of the fit")
    rows = m.predict(data.head(2), level=0.9, interval="prediction")
    half = stats.norm.ppf(0.95) * np.hypot(rows["se"], m.sigma)
    assert_close(rows["fit"] - rows["lower"], half, rtol=1e-12, what="new rows")


def test_a_singular_fit_has_standard_errors() -> None:
    size = load_data("cbpp")["size"]
    with pytest.warns(gj.ConvergenceWarning, match="singular"):
        m = glmm(CBPP, "cbpp", hessian="observed").refit(np.rint(0.3 * size).astype(int))
    assert m.theta[0] == 0.0
    joint = m.predict(se=True)["se"]
    assert np.isfinite(joint).all() and (joint >= m.predict(re_form="NA", se=True)["se"] - 1e-12).all()


# -------------------- golden predictions
def test_predictions_of_lme4_for_a_linear_model() -> None:
    record, m = inference("predict_sleep"), lmm(SLEEP)
    new = pd.DataFrame(record["newdata"])
    assert_close(m.predict(new, re_form="NA"), record["re_form_NA"], rtol=1e-9)
    # theta of the file is at its optimum to 1e-6
    assert_close(m.predict(new, allow_new_levels=True), record["re_form_NULL"], rtol=1e-6)
    intercepts = m.predict(new, re_form="~(1 | Subject)", allow_new_levels=True)
    assert_close(intercepts, record["re_form_intercept_only"], rtol=1e-6)


def test_re_form_takes_columns_across_terms() -> None:
    together, apart = lmm(SLEEP), lmm("Reaction ~ Days + (Days || Subject)")
    data = load_data("sleepstudy")
    for m in (together, apart):
        base = m.predict(re_form="NA")
        effects = m.ranef()["Subject"].loc[data["Subject"].astype(str)].to_numpy()
        slopes = m.predict(re_form="~(0 + Days | Subject)") - base
        assert_close(slopes, data["Days"] * effects[:, 1], atol=1e-10)
        assert_close(m.predict(re_form="~(Days | Subject)"), m.predict(), rtol=1e-14)
        assert_close(m.predict(data, re_form="~(Days || Subject)"), m.predict(), rtol=1e-14)
    for missing in ("~(age | Subject)", "~(1 | Days)", "~(Days | Subject:Days)"):
        with pytest.raises(ValueError, match="is not in the model; it has"):
            together.predict(re_form=missing)


def test_columns_of_unused_terms_are_not_needed() -> None:
    m = glmm(CBPP + " + (1 | obs)", "cbpp", "binomial(cloglog)", 1, "observed")
    new = load_data("cbpp").drop(columns=["obs", "incidence", "size"])
    assert_close(m.predict(new, re_form="~(1 | herd)"), m.predict(re_form="~(1 | herd)"), rtol=1e-14)
    with pytest.raises(gj.DataError, match="'obs'"):
        m.predict(new)


# -------------------- new data
def test_transforms_remember_the_data_of_the_fit() -> None:
    data = load_data("Contraception").iloc[:400].copy()
    rng = np.random.default_rng(5)
    data["y"], data["x"], data["w"] = rng.standard_normal((3, 400))
    data["district"] = (np.arange(400) // 40).astype(str)
    data["y"] += np.arange(400) // 40 + (np.arange(400) // 40 % 3) * data["x"]
    m = gj.lmer("y ~ poly(age, 2) + scale(x) + bs(w, df = 4) + urban * livch + (scale(x) | district)", data)
    rows = [3, 300, 7]
    some = data.drop(columns="y").iloc[rows]
    for re_form in (None, "NA"):
        expected = m.predict(re_form=re_form, se="conditional").iloc[rows]
        assert_close(m.predict(some, re_form=re_form, se="conditional"), expected, rtol=1e-9)


def test_offsets_of_new_data() -> None:
    data = load_data("cbpp").assign(lo=lambda d: np.log(d["size"]))
    formula = "incidence ~ period + (1 | herd)"
    named = gj.glmer(formula, data, "poisson", offset="lo")
    inside = gj.glmer("incidence ~ period + offset(2 * lo - lo) + (1 | herd)", data, "poisson")
    array = gj.glmer(formula, data, "poisson", offset=data["lo"].to_numpy())
    some = data.iloc[[5, 20, 40]].drop(columns="incidence")
    expected = named.linear_predictor[[5, 20, 40]]
    for m in (named, inside):
        assert_close(m.predict(some), expected, atol=1e-8)
        assert_close(m.predict(some.assign(lo=0.0)), expected - some["lo"], atol=1e-8)
        with pytest.raises(gj.DataError, match="'lo'"):
            m.predict(some.drop(columns="lo"))
    with pytest.raises(gj.DataError, match="offset array; give the offset of the new rows"):
        array.predict(some)
    assert_close(array.predict(some, offset=some["lo"]), expected, atol=1e-8)
    assert_close(array.predict(some, offset="lo"), expected, atol=1e-8)
    with pytest.raises(gj.DataError, match="give newdata as well"):
        array.predict(offset=data["lo"])
    # the offset shifts means and leaves standard errors alone
    doubled = named.predict(some.assign(lo=some["lo"] + np.log(2.0)), type="marginal", level=0.95)
    assert_close(doubled, 2.0 * named.predict(some, type="marginal", level=0.95), rtol=1e-9)


# -------------------- averages over the random effects
def test_averages_by_quadrature_and_in_closed_form() -> None:
    eta, v = np.array([-3.0, 0.0, 0.7, 2.0]), np.array([0.0, 0.3, 1.0, 4.0])
    for link in (gj.links.logit, gj.links.probit, gj.links.cloglog, gj.links.sqrt, gj.links.identity):
        rule = gj.gauss_hermite(80)
        points = np.asarray(link.inverse(eta[:, None] + np.sqrt(v)[:, None] * rule.z))
        # at sd 2 Gauss-Hermite has 7 digits for cloglog
        assert_close(averages(eta, v, link)[0], points @ rule.w, atol=2e-7, what=link.name)
    assert_close(averages(eta, v, gj.links.probit)[0], special.ndtr(eta / np.sqrt(1.0 + v)), rtol=1e-12)
    assert_close(averages(eta, v, gj.links.log)[0], np.exp(eta + 0.5 * v), rtol=1e-14)
    for sd in (4.0, 8.0):  # far beyond what 100 points of Gauss-Hermite can do
        wide = integrate.quad(
            lambda z, sd=sd: special.expit(0.7 + sd * z) * stats.norm.pdf(z), -12, 12, points=[-0.7 / sd], epsabs=1e-13
        )[0]
        assert float(averages(np.array([0.7]), np.array([sd**2]), gj.links.logit)[0][0]) == pytest.approx(
            wide, abs=1e-11
        )
    for link in (gj.links.logit, gj.links.cloglog, gj.links.log):
        _, slope, bend = averages(eta, v, link)
        h = 1e-5
        assert_close(slope, (averages(eta + h, v, link)[0] - averages(eta - h, v, link)[0]) / (2 * h), atol=1e-9)
        right = v + 0.5  # away from v = 0
        upper, lower = averages(eta, right + h, link)[0], averages(eta, right - h, link)[0]
        assert_close(averages(eta, right, link)[2], (upper - lower) / (2 * h), atol=1e-8)
        assert np.isfinite(bend).all()


def test_marginal_predictions() -> None:
    m = glmm(CM4, "Contraception", hessian="observed")
    rule, design = gj.gauss_hermite(60), m._design
    z = m.getME("Z").reshape(m.nobs, -1, 2).sum(1)

    def means(x: np.ndarray) -> np.ndarray:
        T = np.array([[x[0], 0.0], [x[1], x[2]]])
        sd = np.sqrt(((z @ T) ** 2).sum(1))
        return special.expit((m.getME("X").to_numpy() @ x[3:])[:, None] + sd[:, None] * rule.z) @ rule.w

    x = np.concatenate([m.theta, m.beta])
    out = m.predict(type="marginal", level=0.95)
    assert_close(out["fit"], means(x), rtol=1e-10)
    assert_close(m.predict(type="marginal", re_form="NA"), out["fit"], rtol=1e-14)
    D = fd6(means, x, 1e-3)
    assert_close(out["se"], np.sqrt(np.einsum("ni,ij,nj->n", D, m.vcov(full=True), D)), rtol=1e-7)
    # the interval is normal on the link scale of the mean
    centre = special.logit(out["fit"])
    half = stats.norm.ppf(0.975) * out["se"] / (out["fit"] * (1.0 - out["fit"]))
    assert_close(out["lower"], special.expit(centre - half), rtol=1e-10)
    assert_close(out["upper"], special.expit(centre + half), rtol=1e-10)
    assert design.n_theta == 3
    # all terms kept at their modes: nothing is left to average
    named = m.predict(type="marginal", re_form="~(urban | district)", se=True)
    assert_close(named, m.predict(type="response", se=True), rtol=1e-9)


def test_marginal_predictions_of_a_new_level_and_of_some_terms() -> None:
    m = glmm(CBPP + " + (1 | obs)", "cbpp", "binomial(cloglog)", 1, "observed")
    new = load_data("cbpp").head(2).assign(herd="99")  # averaging needs no level of the fit
    assert_close(m.predict(new, type="marginal"), m.predict(type="marginal")[:2], rtol=1e-14)
    herd = m.predict(type="marginal", re_form="~(1 | herd)")
    sd = m.theta[0]  # obs has more levels and comes first
    assert m.theta_names[0].startswith("obs")
    rule = gj.gauss_hermite(60)
    inside = m.predict(re_form="~(1 | herd)")[:, None] + sd * rule.z
    assert_close(herd, -np.expm1(-np.exp(inside)) @ rule.w, rtol=1e-9)
    linear = lmm(SLEEP)
    assert_close(linear.predict(type="marginal"), linear.predict(re_form="NA"), rtol=1e-12)


# -------------------- levels with data of their own
@pytest.mark.parametrize("kind", ["cbind", "linear", "factor", "weights", "two factors"])
def test_a_copy_of_a_level_gets_the_mode_of_the_level(kind: str) -> None:
    data, group, level = load_data("cbpp"), "herd", "3"
    if kind == "linear":
        data, group, level = load_data("sleepstudy"), "Subject", "308"
        m = lmm(SLEEP)
    elif kind == "factor":
        data, group, level = load_data("Contraception"), "district", "35"
        m = glmm(CM4, "Contraception", hessian="observed")
    elif kind == "weights":
        data = data.assign(rate=data["incidence"] / data["size"])
        m = gj.glmer("rate ~ period + (1 | herd)", data, weights="size")
    elif kind == "two factors":
        m = glmm(CBPP + " + (1 | obs)", "cbpp", "binomial(cloglog)", 1, "observed")
    else:
        m = glmm(CBPP, "cbpp", hessian="observed")
    mine = (data[group].astype(str) == level).to_numpy()
    given = data[mine].assign(**{group: "later"})
    new = pd.concat([given, data.head(4)])
    ours = m.predict(new, given=given)
    assert_close(ours, np.concatenate([m.linear_predictor[mine], m.linear_predictor[:4]]), atol=2e-8)
    if kind == "two factors":
        with pytest.raises(NotSupportedError, match="one grouping factor"):
            m.predict(new, given=given, se=True)
        assert np.isfinite(m.predict(new, given=given, re_form="NA", se=True)["se"]).all()
        return
    for se in (True, "conditional"):
        expected = m.predict(se=se)["se"].to_numpy()
        found = m.predict(new, given=given, se=se)["se"]
        assert_close(found, np.concatenate([expected[mine], expected[:4]]), rtol=1e-7)


def test_rows_given_are_checked() -> None:
    m, data = glmm(CBPP, "cbpp", hessian="observed"), load_data("cbpp")
    later = data.head(3).assign(herd="later")
    refused = {
        "no level that was not in the fit": data.head(3),
        "rows without a level of 'herd'": later.assign(herd=[None, "later", "later"]),
        "missing or infinite values in the response": later.assign(incidence=[np.nan, 1.0, 1.0]),
        "'size'": later.drop(columns="size"),
        "outside": later.assign(incidence=40),
    }
    for words, given in refused.items():
        with pytest.raises(gj.DataError, match=words):
            m.predict(later, given=given)
    with pytest.raises(gj.DataError, match="'herd' that were not in the fit: 'other'"):
        m.predict(later.assign(herd="other"), given=later)
    with pytest.raises(ValueError, match="needs newdata"):
        m.predict(given=later)
    rate = data["incidence"] / data["size"]
    array = gj.glmer("rate ~ period + (1 | herd)", data.assign(rate=rate), weights=data["size"].to_numpy())
    with pytest.raises(gj.DataError, match="naming a column"):
        array.predict(later, given=later.assign(rate=0.5))
    use = glmm(CM4, "Contraception", hessian="observed")
    some = load_data("Contraception").head(3).assign(district="later")
    with pytest.raises(gj.DataError, match="level 'P', which was not in the fit"):
        use.predict(some, given=some.assign(use=["N", "P", "Y"]))


def test_arguments_are_checked() -> None:
    m = glmm(CBPP, "cbpp", hessian="observed")
    for words, arguments in {
        "'link' or 'response' or 'marginal', got 'mean'": {"type": "mean"},
        "se must be True, False or 'conditional', got 'joint'": {"se": "joint"},
        "level must be between 0 and 1, got 95": {"level": 95},
        "interval must be 'confidence' or 'prediction', got 'both'": {"level": 0.9, "interval": "both"},
        "interval='prediction' needs a level": {"interval": "prediction"},
    }.items():
        with pytest.raises(ValueError, match=words):
            m.predict(**arguments)
    with pytest.raises(NotSupportedError, match="not for a generalised model; take quantiles of simulate"):
        m.predict(level=0.9, interval="prediction")
    with pytest.raises(NotSupportedError, match="not for type='marginal'"):
        lmm(SLEEP).predict(level=0.9, interval="prediction", type="marginal")
