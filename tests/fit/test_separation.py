"""Separated responses: which rows, against a linear programme; the rest, against fits without these rows."""

import warnings

import numpy as np
import pandas as pd
import pytest
from helpers import assert_close
from scipy.optimize import linprog

import glmmjax as gj
from glmmjax.fit import separation

F = "b ~ x + t + (1 | g)"


def by_programme(X: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Separated rows by the textbook's programme over all rows."""
    p, end = X.shape[1], t != 0
    m = int(end.sum())
    cost, upper = np.concatenate([np.zeros(p), -np.ones(m)]), np.hstack([-t[end, None] * X[end], np.eye(m)])
    held = np.hstack([X[~end], np.zeros((t.size - m, m))]) if m < t.size else None
    zero = None if held is None else np.zeros(t.size - m)
    found = linprog(cost, upper, np.zeros(m), held, zero, [(None, None)] * p + [(0, 1)] * m)
    out = np.zeros(t.size, bool)
    out[np.flatnonzero(end)] = found.x[p:] > 0.5
    return out


def test_rows_are_those_of_the_linear_programme() -> None:
    found = checked = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        n, levels = int(rng.integers(15, 60)), int(rng.integers(2, 6))
        f = rng.integers(0, levels, n)
        X = np.column_stack([np.ones(n), rng.normal(size=(n, 2)), f[:, None] == np.arange(1, levels)])
        if np.linalg.matrix_rank(X) < X.shape[1]:
            continue
        eta = X @ rng.normal(size=X.shape[1]) * rng.choice([0.3, 1.0, 3.0])
        t = np.where(rng.random(n) < 1.0 / (1.0 + np.exp(-eta)), 1, -1)
        t = np.where(rng.random(n) < rng.choice([0.0, 0.1, 0.3]), 0, t)
        A, there = np.linalg.qr(X, mode="r") / np.sqrt(n), np.ones(n, bool)
        expected = by_programme(X @ np.linalg.inv(A), t)
        # the same columns in other units and far from 0
        Y = X * np.concatenate([[1.0, 1e-4, 1e5], np.ones(levels - 1)])
        Y[:, 1] += 0.2
        for Z in (X, Y):
            A = np.linalg.qr(Z, mode="r") / np.sqrt(n)
            made = separation.find(Z @ np.linalg.inv(A), t, there, A)
            rows = np.zeros(n, bool) if made is None else made.rows
            assert np.array_equal(rows, expected), seed
            if made is not None:
                moved = t * (Z @ np.linalg.solve(made.A, made.direction))
                assert moved[rows].min() > 0.99 and np.abs(moved[~rows]).max(initial=0.0) < 1e-6 * moved.max()
        checked += 1
        found += expected.any()
        first = separation.none_for_sure(X @ np.linalg.inv(A), t[None], there[None])[0]
        assert not (first and expected.any())
    assert checked > 120 and 20 < found < 100


def data(seed: int, n: int = 240) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    g, x, t = np.repeat(np.arange(12), n // 12), rng.normal(size=n), np.tile(["A", "B", "C", "B"], n // 4)
    u = 0.8 * rng.normal(size=12)[g]
    b = (rng.random(n) < 1.0 / (1.0 + np.exp(-(0.2 + 0.6 * x + u)))) * 1
    k = rng.poisson(np.exp(0.3 + 0.3 * x + 0.6 * u))
    return pd.DataFrame({"b": np.where(t == "C", 1, b), "k": np.where(t == "C", 0, k), "x": x, "t": t, "g": g})


def quiet(*args, **kwargs):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = gj.glmer(*args, **kwargs)
    return model, [str(w.message) for w in said]


@pytest.mark.parametrize(
    ("family", "nAGQ"), [("binomial", 1), ("binomial", 0), ("binomial(cauchit)", 1), ("poisson", 5), ("nbinom2", 1)]
)
def test_the_rest_is_the_fit_without_these_rows(family: str, nAGQ: int) -> None:
    d = data(1)
    formula = F if family.startswith("binomial") else F.replace("b ~", "k ~")
    model, said = quiet(formula, d, family, nAGQ=nAGQ)
    rest, _ = quiet(formula, d[d.t != "C"], family, nAGQ=nAGQ)
    assert model.converged and model.separated == ["tC"]
    separated = [text for text in said if "separated" in text]
    assert len(separated) == 1 and "level 'C' of t" in separated[0] and "of tC runs off" in separated[0]
    tol = 1e-4 if family == "nbinom2" else 1e-6
    assert model.objective == pytest.approx(rest.objective, abs=1e-8)
    assert_close(model.theta, rest.theta, atol=1e-5)
    assert_close(model.fixef.iloc[:3], rest.fixef, atol=1e-5)
    assert_close(model.bse.iloc[:3], rest.bse, rtol=tol)
    assert np.isinf(model.bse["tC"]) and model.pvalues["tC"] == 1.0 and model.zvalues["tC"] == 0.0
    assert list(model.confint().loc["tC"]) == [-np.inf, np.inf]
    assert "Inf" in str(model.summary())


def test_what_a_separated_fit_answers() -> None:
    d = data(0)
    d0 = d[d.t != "C"]
    model, _ = quiet(F, d)
    rest = gj.glmer(F, d0)
    names = list(rest.fixef.index)
    for type in ("hessian", "rx", "robust"):
        V = model.vcov(type=type)
        assert_close(V.loc[names, names], rest.vcov(type=type), rtol=1e-5)
        assert np.isinf(V.loc["tC", "tC"])
    assert_close(model.sdcor()["std_error"], rest.sdcor()["std_error"], rtol=1e-5)
    new, new0 = model.predict(d, re_form="NA", se=True), rest.predict(d0, re_form="NA", se=True)
    assert np.isinf(new.loc[d.t == "C", "se"]).all()
    assert_close(new.loc[d.t != "C", "se"], new0["se"], rtol=1e-5)
    joint, alone = model.wald_test("tB = 0, tC = 0"), rest.wald_test("tB = 0")
    assert joint.df == 1 and joint.statistic == pytest.approx(alone.statistic, rel=1e-5) and "run off" in joint.note
    assert np.isnan(model.wald_test("tC = 0").statistic)
    means = model.marginal_means("t", at={"x": 0.0}).frame
    assert_close(means["std_error"][:2], rest.marginal_means("t", at={"x": 0.0}).frame["std_error"], rtol=1e-5)
    assert np.isinf(means["std_error"][2])
    assert not np.isnan(model.residuals("pearson")).any()


def test_the_reference_level_is_separated() -> None:
    """Every coefficient of the factor and the intercept run off; their differences do not."""
    d = data(0).assign(t=lambda q: q.t.map({"C": "0", "A": "1", "B": "2"}))
    model, said = quiet(F, d)
    assert model.separated == ["(Intercept)", "t1", "t2"] and any("level '0' of t" in text for text in said)
    rest = gj.glmer(F, d[d.t != "0"])
    difference = model.wald_test("t2 - t1 = 0")
    assert float(difference.std_error.iloc[0]) == pytest.approx(rest.bse["t2"], rel=1e-5)
    assert difference.p_value == pytest.approx(rest.pvalues["t2"], rel=1e-4)


def test_many_fits_agree_with_single_ones() -> None:
    parts = [data(seed).assign(id=seed) for seed in range(3)]
    rng = np.random.default_rng(9)
    parts[1].loc[parts[1].t == "C", "b"] = rng.integers(0, 2, 60)
    many = gj.fit_many(F, pd.concat(parts, ignore_index=True), "binomial", by="id")
    assert list(many.fits["status"]) == ["separated", "converged", "separated"]
    assert "tC runs off" in many.fits.loc[0, "message"]
    for i, part in enumerate(parts):
        model, _ = quiet(F, part)
        assert_close(many.coef.loc[i], model.beta, atol=1e-6)
        finite = np.isfinite(model.bse.to_numpy())
        assert_close(many.std_error.loc[i].to_numpy()[finite], model.bse.to_numpy()[finite], rtol=1e-5)
        assert np.array_equal(np.isinf(many.std_error.loc[i].to_numpy()), ~finite)
        assert many.fits.loc[i, "logLik"] == pytest.approx(model.loglik, abs=1e-8)


def test_years_are_not_separated() -> None:
    rng = np.random.default_rng(3)
    d = data(3)
    d["b"], d["x"] = rng.integers(0, 2, 240), 2010 + rng.integers(0, 10, 240)
    model, said = quiet(F, d)
    assert model.separated == [] and not any("separated" in text for text in said)


def test_profile_intervals_are_open_where_coefficients_run_off() -> None:
    """The other end by fits with the coefficient held in the offset; all else as in the fit without these rows."""
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"g": np.repeat(np.arange(9), 10), "t": np.tile(["A", "B", "C"], 30), "x": rng.normal(size=90)})
    data["y"] = np.where(data["t"] == "C", 1, rng.binomial(1, 0.5, 90))
    data["k"] = np.where(data["t"] == "C", 0, rng.poisson(2.0, 90))
    rest = data["t"] != "C"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m = gj.glmer("y ~ t + (1 | g)", data)
        ends = m.profile("beta_").confint()
        assert ends.loc["tC"].iloc[1] == np.inf
        held = gj.glmer("y ~ I(t == 'B') + (1 | g)", data, offset=ends.loc["tC"].iloc[0] * (data["t"] == "C"))
        assert_close(held.objective - m.objective, 3.841458820694, atol=1e-5)

        m = gj.glmer("k ~ t * x + (1 | g)", data, "poisson")  # a level of zero counts, with a slope of its own
        ends = m.profile("beta_").confint()
        without = gj.glmer("k ~ t * x + (1 | g)", data[rest], "poisson").profile("beta_").confint()
        assert_close(ends.loc[without.index], without, atol=1e-5)
        assert ends.loc["tC:x"].tolist() == [-np.inf, np.inf]  # a slope of either sign may go with counts of 0
        low, high = ends.loc["tC"]
        held = gj.glmer("k ~ t * x - t + I(t == 'B') + (1 | g)", data, "poisson", offset=high * (data["t"] == "C"))
        assert low == -np.inf
        assert_close(held.objective - m.objective, 3.841458820694, atol=1e-5)
