"""Score tests of many covariates against likelihood-ratio tests and dense algebra."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import glmmjax as gj


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    rng = np.random.default_rng(7)
    g, h = np.repeat(np.arange(12), 20), rng.integers(0, 5, 240)
    x = rng.normal(size=240)
    eta = 0.3 + 0.4 * x + (0.6 * rng.normal(size=12))[g] + (0.3 * rng.normal(size=5))[h]
    return pd.DataFrame({"y": rng.poisson(np.exp(eta)), "z": eta + rng.normal(size=240), "x": x, "g": g, "h": h})


@pytest.fixture(scope="module")
def covariates(data: pd.DataFrame) -> pd.DataFrame:
    rng = np.random.default_rng(8)
    C = rng.normal(size=(len(data), 40)) + 0.3 * rng.normal(size=(12, 40))[data["g"]]
    return pd.DataFrame(C, columns=[f"snp{i}" for i in range(40)])


def test_first_order_equivalence_to_likelihood_ratios(data, covariates):
    m = gj.glmer("y ~ x + (1 | g) + (1 | h)", data, "poisson")
    table = m.score_test(covariates)
    score, ratio = table["statistic"] ** 2, []
    for name in covariates.columns[:15]:
        larger = gj.glmer("y ~ x + c + (1 | g) + (1 | h)", data.assign(c=covariates[name]), "poisson")
        ratio.append(m.objective - larger.objective)
        # one step from the null: off by the curvature over the step
        assert table.loc[name, "std_error"] == pytest.approx(larger.bse["c"], rel=0.05)
    np.testing.assert_allclose(score[:15], ratio, rtol=0.1, atol=0.02)
    np.testing.assert_allclose(table["p_value"], stats.chi2.sf(score, 1), rtol=1e-10)
    np.testing.assert_allclose(table["p_adjusted"], stats.false_discovery_control(table["p_value"]))


def test_linear_model_dense(data, covariates):
    """U = c'V^-1 (y - X beta), I = c'Pc, with dense matrices."""
    m = gj.lmer("z ~ x + (1 | g) + (1 | h)", data)
    table = m.score_test(covariates)
    X, Z = np.asarray(m.getME("X")), np.asarray(m.getME("Z"))
    Lambda = np.asarray(m.getME("Lambda"))
    V = m.sigma**2 * (np.eye(len(data)) + Z @ Lambda @ Lambda.T @ Z.T)
    Vi = np.linalg.inv(V)
    P = Vi - Vi @ X @ np.linalg.solve(X.T @ Vi @ X, X.T @ Vi)
    C = covariates.to_numpy()
    information = np.einsum("ij,ik,kj->j", C, P, C)
    U = C.T @ P @ data["z"].to_numpy()
    np.testing.assert_allclose(table["statistic"], U / np.sqrt(information), rtol=1e-8)
    np.testing.assert_allclose(table["estimate"], U / information, rtol=1e-8)
    np.testing.assert_allclose(table["std_error"], 1.0 / np.sqrt(information), rtol=1e-10)


def test_null_distribution(data):
    rng = np.random.default_rng(9)
    m = gj.lmer("z ~ x + (1 | g) + (1 | h)", data)
    p = m.score_test(rng.normal(size=(len(data), 4000)))["p_value"]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_spanned_covariates_and_bad_input(data, covariates):
    m = gj.lmer("z ~ x + (1 | g) + (1 | h)", data)
    table = m.score_test(np.column_stack([data["x"], 2.0 - data["x"], covariates["snp0"]]))
    assert table["p_value"].isna().tolist() == [True, True, False]
    with pytest.raises(gj.DataError, match="have 3 rows"):
        m.score_test(np.ones((3, 2)))
    with pytest.raises(gj.DataError, match="'snp1'"):
        m.score_test(covariates.assign(snp1=np.nan))
    with pytest.raises(gj.DataError, match="numbers"):
        m.score_test(pd.DataFrame({"a": ["u"] * len(data)}))
    with pytest.raises(ValueError, match="adjust"):
        m.score_test(covariates, adjust="fdr")
