"""Deletion of rows and groups, derivatives of the estimates, sandwich covariances; against refits and R's numbers."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
from helpers import DenseLaplace, assert_close, load_data

import glmmjax as gj
from glmmjax._errors import DataError
from glmmjax.fit.problem import estimate
from glmmjax.results import NotSupportedError

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
SLEEP = "Reaction ~ Days + (Days | Subject)"


@cache
def cbpp() -> gj.MixedModel:
    return gj.glmer(CBPP, load_data("cbpp"), control={"tol": 1e-13})


@cache
def sleep() -> gj.MixedModel:
    return gj.lmer(SLEEP, load_data("sleepstudy"), REML=False, control={"tol": 1e-13})


def estimates(m: gj.MixedModel) -> np.ndarray:
    return np.concatenate([m.theta, m.beta, [np.log(m.sigma)] if m.is_linear else []])


def test_cooks_distance_by_herd() -> None:
    exact = cbpp().cooks_distance("herd", "exact")
    # exact refits at tight tolerances in R
    assert_close(exact.iloc[:4], [0.3422789, 0.0070918, 0.1378994, 0.0583616], atol=1e-5)
    assert list(exact.index) == list(cbpp().ranef()["herd"].index)
    scaled = cbpp().influence("herd", "exact").cooks_distance("lme4")
    assert_close(scaled, exact * 11.0 / 15.0, rtol=1e-12)


@pytest.mark.parametrize("model", [cbpp, sleep], ids=["cbpp", "sleep"])
def test_exact_deletion_is_a_fit_without_the_rows(model: Any) -> None:
    m, group = (cbpp(), "herd") if model is cbpp else (sleep(), "Subject")
    data = load_data("cbpp" if model is cbpp else "sleepstudy")
    found = m.influence(group, "exact")
    assert not found.failed and found.change.shape[0] == m.ngrps[group]
    for label in found.change.index[[0, 5]]:
        rest = data[data[group].astype(str) != str(label)]
        rest = rest.assign(**{group: rest[group].cat.remove_unused_categories()})
        fit = gj.glmer(CBPP, rest) if model is cbpp else gj.lmer(SLEEP, rest, REML=False)
        assert_close(found.change.loc[label], estimates(fit) - estimates(m), atol=2e-5, what=str(label))


@pytest.mark.parametrize(("model", "group"), [(cbpp, "herd"), (sleep, "Subject")], ids=["cbpp", "sleep"])
def test_deletions_together_are_deletions_in_turn(model: Any, group: str) -> None:
    one, many = (model().influence(group, "exact", batched=batched) for batched in (False, True))
    assert not one.failed and not many.failed
    assert_close(many.change, one.change, atol=3e-6)


def test_deletion_of_the_only_level_that_tells_a_fixed_effect(rng: np.random.Generator) -> None:
    g = np.repeat(np.arange(8), 6)
    data = pd.DataFrame({"g": g, "first": 1.0 * (g == 0), "y": rng.normal(size=48) + 3.0 * np.sin(g)})
    m = gj.lmer("y ~ first + (1 | g)", data, REML=False)
    for batched in (False, True):
        found = m.influence("g", "exact", batched=batched)
        assert found.failed == ("0",)
        assert found.change.loc["0"].isna().all() and found.change.drop("0").notna().all(axis=None)
        assert "without: 0" in str(found)


@pytest.mark.parametrize(("model", "group"), [(cbpp, "herd"), (sleep, "Subject")], ids=["cbpp", "sleep"])
def test_first_order_deletion_is_near(model: Any, group: str) -> None:
    first, exact = model().influence(group), model().influence(group, "exact")
    for column in first.change:
        assert np.corrcoef(first.change[column], exact.change[column])[0, 1] > 0.97, column
    assert np.corrcoef(np.ravel(first.change), np.ravel(exact.change))[0, 1] > 0.99


def test_reml_fits_are_deleted_by_their_own_criterion() -> None:
    data = load_data("sleepstudy")
    m = gj.lmer(SLEEP, data)
    found = m.influence("Subject", "exact").change.loc["308"]
    rest = data[data["Subject"] != "308"]
    fit = gj.lmer(SLEEP, rest.assign(Subject=rest["Subject"].cat.remove_unused_categories()))
    assert_close(found, estimates(fit) - estimates(m), atol=2e-5)


def test_rows() -> None:
    data = load_data("sleepstudy")
    m = sleep()
    first, exact = m.influence(), m.influence(method="exact")
    assert list(first.change.index) == list(range(180)) == list(exact.change.index)
    fit = gj.lmer(SLEEP, data.drop(index=7), REML=False)
    assert_close(exact.change.loc[7], estimates(fit) - estimates(m), atol=1e-5)
    assert np.corrcoef(np.ravel(first.change), np.ravel(exact.change))[0, 1] > 0.97
    top = first.cooks_distance().nlargest(5).index
    assert len(set(top) & set(exact.cooks_distance().nlargest(8).index)) >= 4


def refitted(m: gj.MixedModel, what: str, values: np.ndarray) -> np.ndarray:
    """Estimates at other data, past the checks of a formula (which would refuse 0.01 of a trial)."""
    if what == "offset":
        setup = gj.ModelSetup(m._spec, m._data, replace(m._design, offset=values))
        problem = gj.deviance_function(setup).problem
    else:
        problem = m._problem.with_rows(what, values)
    e = estimate(problem, None, 1e-13)
    return np.concatenate([e.theta, e.beta, [np.log(e.sigma)] if m.is_linear else []])


@pytest.mark.parametrize("what", ["weights", "y", "offset"])
@pytest.mark.parametrize("model", [cbpp, sleep], ids=["cbpp", "sleep"])
def test_sensitivity(model: Any, what: str) -> None:
    """Against central differences of whole fits, which end within 1e-7 of their optimum."""
    m = model()
    found = m.sensitivity(what)
    assert found.shape == (m.nobs, estimates(m).size)
    base = {"weights": m.getME("weights"), "y": m.getME("y"), "offset": m.getME("offset")}[what]
    h = 1e-2 * (1.0 + np.abs(base).mean() if what == "y" and m.is_linear else 1.0)
    for row in (3, 20):
        step = np.zeros(m.nobs)
        step[row] = h
        difference = (refitted(m, what, base + step) - refitted(m, what, base - step)) / (2.0 * h)
        assert_close(found.iloc[row], difference, rtol=1e-3, atol=2e-3 * np.abs(difference).max(), what=f"row {row}")


def test_scores_and_sandwich() -> None:
    m, data = cbpp(), load_data("cbpp")
    x = np.concatenate([m.theta, m.beta])
    scores = []
    for herd in data["herd"].cat.categories:
        rows = data[data["herd"] == herd]
        full = gj.design(CBPP, data)
        own = gj.design_arrays(
            np.asarray(full.y)[rows.index],
            np.asarray(full.X)[rows.index],
            [(np.ones(len(rows)), np.zeros(len(rows), np.int32))],
            weights=np.asarray(full.weights)[rows.index],
        )
        scores.append(DenseLaplace(own, "binomial", "logit").gradient(x[:1], x[1:]))
    ours = m._sensitivity.cluster_scores(np.asarray(m._data.terms[0].level), 15)
    assert_close(ours.T, scores, atol=1e-7)
    assert_close(ours.sum(axis=1), np.zeros(5), atol=1e-5)
    H = m.vcov(full=True).to_numpy() / 2.0
    expected = H @ np.transpose(scores) @ np.array(scores) @ H
    robust = m.vcov(type="robust", full=True)
    assert_close(robust, expected, rtol=1e-5, atol=1e-7)
    assert_close(m.vcov(type="robust"), expected[1:, 1:], rtol=1e-5, atol=1e-7)


def test_joint_covariance_of_linear_models() -> None:
    ml = sleep()
    V = ml.vcov(full=True)
    assert list(V.index) == [*ml.theta_names, *ml.fixef.index, "log(sigma)"]
    names = list(ml.fixef.index)
    assert_close(V.loc[names, names], ml.vcov(), rtol=1e-6, atol=1e-6)
    reml = gj.lmer(SLEEP, load_data("sleepstudy"))
    V = reml.vcov(full=True)
    assert_close(V.loc[names, names], reml.vcov(), rtol=1e-6, atol=1e-6)
    # theta's block: with sigma profiled out, twice the inverse Hessian of the profiled criterion
    H = jax.jit(jax.hessian(gj.lmm_deviance))(reml.theta, reml._design)
    assert_close(V.iloc[:3, :3], 2.0 * np.linalg.inv(np.asarray(H)), rtol=1e-5, atol=1e-8)


def test_forms() -> None:
    found = cbpp().influence("herd")
    assert "Influence of deleting one herd (first-order; 15 deletions)" in str(found)
    assert found.to_frame().columns[0] == "herd" and "<table" in found._repr_html_()
    se = np.sqrt(np.diag(cbpp().vcov()))
    assert_close(found.dfbetas(), -found.change.iloc[:, 1:] / se, rtol=1e-12)
    plt = pytest.importorskip("matplotlib.pyplot")
    ax, data = found.plot()
    assert len(data) == 15 and len(ax.texts) == 5
    plt.close(ax.figure)
    ax, data = found.plot("period2", label=0)
    assert_close(data["period2"], found.change["period2"])
    plt.close(ax.figure)
    by_period = cbpp().influence("period")
    assert list(by_period.change.index) == ["1", "2", "3", "4"]


def test_refusals() -> None:
    data = load_data("cbpp").assign(obs=np.arange(56))
    m = gj.glmer(CBPP + " + (1 | obs)", data)
    assert m.vcov(type="robust").shape == (4, 4)  # obs is nested in herd
    with pytest.raises(NotSupportedError, match="clusters of period are not independent: levels of herd"):
        m.vcov(type="robust", cluster="period")
    with pytest.raises(DataError, match="'herds' is neither a grouping factor"):
        m.influence("herds")
    with pytest.raises(ValueError, match="method must be"):
        m.influence("herd", "exactly")
    with pytest.raises(ValueError, match="derivatives in 'weights', 'y' or 'offset'"):
        m.sensitivity("X")
    with pytest.raises(ValueError, match="cluster is for type='robust'"):
        m.vcov(cluster="herd")
    with pytest.raises(ValueError, match="nothing called 'x'"):
        cbpp().influence("herd").plot("x")
    with pytest.raises(NotSupportedError, match="nAGQ = 0"):
        gj.glmer(CBPP, load_data("cbpp"), nAGQ=0).influence("herd")


def test_exact_deletions_and_drop1_of_a_singular_fit_are_least_squares() -> None:
    """Without variance of the random effects, in any refit, both are those of a linear model."""
    rng = np.random.default_rng(5)
    data = pd.DataFrame({"g": np.repeat(np.arange(12), 8), "x": rng.normal(size=96), "f": np.tile(list("abcd"), 24)})
    data["y"] = rng.normal(size=96) + data["x"]
    with pytest.warns(gj.ConvergenceWarning, match="singular"):
        m = gj.lmer("y ~ x + f + (1 | g)", data, REML=False)
    X, y, g = m.getME("X").to_numpy(), m.getME("y"), data["g"].to_numpy()

    def least_squares(rows: np.ndarray, columns: list[int]) -> tuple[np.ndarray, float]:
        beta, rest = np.linalg.lstsq(X[np.ix_(rows, columns)], y[rows])[:2]
        return beta, float(rest[0])

    every, all_rows = list(range(5)), np.ones(96, bool)
    beta, rest = least_squares(all_rows, every)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refits = [gj.lmer("y ~ x + f + (1 | g)", data[g != j], REML=False) for j in range(12)]
    singular = [j for j in range(12) if refits[j].theta[0] == 0.0]
    assert len(singular) > 6
    for batched in (False, True):
        made = m.influence("g", "exact", batched=batched)
        assert not made.failed
        for j in singular:
            assert made.change.iloc[j, 0] == 0.0
            assert_close(made.change.iloc[j, 1:6], least_squares(g != j, every)[0] - beta, atol=1e-7)
    table = gj.drop1(m)
    for name, columns in (("x", [0, 2, 3, 4]), ("f", [0, 1])):
        assert_close(table.loc[name, "LRT"], 96 * np.log(least_squares(all_rows, columns)[1] / rest), atol=1e-7)
