"""Denominator degrees of freedom: against lmerTest and pbkrtest, and against dense matrices and their derivatives."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import REFERENCE, assert_close, fd6, load_data
from scipy import stats

import glmmjax as gj
from glmmjax.inference import ddf as _ddf
from glmmjax.results import MixedModel, NotSupportedError

FOLDER = REFERENCE / "ddf"
CASES = sorted(path.stem for path in FOLDER.glob("*.json"))
METHODS = {"satterthwaite": "satterthwaite", "kenward_roger": "Kenward-Roger"}
# R's optimiser sees theta only through the rounding of the deviance, which leaves it 1e-7 to 1e-6 relative;
# lmerTest's derivatives are numerical, to 1e-7; its type III contrasts are rounded to 7 digits.
RTOL = 1e-5
RTOL_P = 1e-4  # tails multiply relative errors


def read(case: str) -> dict[str, Any]:
    out: dict[str, Any] = json.loads((FOLDER / f"{case}.json").read_text(encoding="utf-8"))
    return out


def frame(case: str) -> pd.DataFrame:
    record = read(case)
    if record["data"]:
        return load_data(record["data"])
    columns: dict[str, Any] = {}
    for name, c in record["frame"].items():
        levels = c.get("levels")
        values = c["values"]
        columns[name] = np.array(values, float) if levels is None else pd.Categorical(values, levels, c["ordered"])
    return pd.DataFrame(columns)


@pytest.fixture(scope="module")
def fits() -> dict[str, MixedModel]:
    return {}


def fitted(fits: dict[str, MixedModel], case: str) -> MixedModel:
    if case not in fits:
        r = read(case)
        options = {"REML": r["REML"], "weights": r["weights"], "contrasts": r["contrasts"]}
        with pytest.warns() if case.startswith("singular") else _nothing():
            fits[case] = gj.lmer(r["formula"], frame(case), **options)
    return fits[case]


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


# -------------------- R
@pytest.mark.parametrize("case", CASES)
def test_coefficients_match_r(case: str, fits: dict[str, MixedModel]) -> None:
    model, record = fitted(fits, case), read(case)
    assert abs(model.objective - record["criterion"]) < 1e-9 * (1.0 + abs(record["criterion"]))
    for key, reference in record["summary"].items():
        table = _ddf.coefficient_table(model, METHODS[key])
        assert list(table.columns) == ["estimate", "std_error", "df", "statistic", "p_value"]
        assert list(table.index) == reference["rows"]
        values = np.array(reference["values"])
        se = values[:, 1]
        assert_close(table["estimate"] / se, values[:, 0] / se, atol=RTOL, what="estimate in standard errors")
        assert_close(table["std_error"], se, rtol=RTOL, what="standard error")
        assert_close(table["df"], values[:, 2], rtol=RTOL, what="df")
        assert_close(table["statistic"], values[:, 3], rtol=RTOL, atol=RTOL, what="t")
        assert_close(table["p_value"], values[:, 4], rtol=RTOL_P, what="p")


@pytest.mark.parametrize("case", [c for c in CASES if "anova" in read(c)])
def test_tables_match_r(case: str, fits: dict[str, MixedModel]) -> None:
    model = fitted(fits, case)
    for type_, methods in read(case)["anova"].items():
        for key, reference in methods.items():
            table = _ddf.anova_table(model, type_, METHODS[key])
            assert list(table.columns) == reference["columns"]
            assert list(table.index) == reference["rows"]
            assert table.attrs["heading"] == reference["heading"]
            values = np.array(reference["values"])
            for j, name in enumerate(reference["columns"]):
                tolerance = RTOL_P if name.startswith("Pr") else 2.0 * RTOL
                what = f"type {type_} {key} {name}"
                assert_close(table[name], values[:, j], rtol=tolerance, atol=1e-7 * (name != "Pr(>F)"), what=what)


@pytest.mark.parametrize("case", [c for c in CASES if "slopes_kenward_roger" in read(c)])
def test_joint_kenward_roger_matches_r(case: str, fits: dict[str, MixedModel]) -> None:
    model = fitted(fits, case)
    test = _ddf.contrast_test(model, np.eye(model.beta.size)[1:], "kenward-roger")
    (_, mean_sq, num_df, den_df, f_value, p_value) = read(case)["slopes_kenward_roger"]["values"][0]
    assert test.num_df == num_df
    got = [test.mean_sq, test.den_df, test.f_value]
    assert_close(got, [mean_sq, den_df, f_value], rtol=RTOL)
    assert_close(test.p_value, p_value, rtol=RTOL_P, atol=1e-300)


def test_sleepstudy_is_the_exact_case(fits: dict[str, MixedModel]) -> None:
    """A balanced design whose degrees of freedom are 17; lmerTest's derivatives leave 16.99998 at its default fit."""
    model = fitted(fits, "sleep_reml")
    assert_close(_ddf.coefficient_table(model, "Satterthwaite")["df"], [17.0, 17.0], rtol=1e-8)
    assert_close(_ddf.coefficient_table(model, "kenward-roger")["df"], [17.0, 17.0], rtol=1e-11)
    test = _ddf.contrast_test(model, [0.0, 1.0], "Kenward-Roger")
    assert_close([test.f_value, test.num_df, test.den_df], [45.85300, 1.0, 17.0], rtol=1e-6)
    assert_close(test.t_value**2, test.f_value, rtol=1e-14)


def test_variance_of_zero_leaves_residual_df(fits: dict[str, MixedModel]) -> None:
    model = fitted(fits, "singular")
    assert model.theta[0] == 0.0
    for ddf in METHODS.values():
        table = _ddf.coefficient_table(model, ddf)
        assert np.isfinite(table.to_numpy()).all()
    assert_close(_ddf.coefficient_table(model, "satterthwaite")["df"], [38.0, 38.0], rtol=1e-9)


# -------------------- dense matrices
class Dense:
    """V and its derivatives as (n, n) matrices, from the rows of a model and nothing else."""

    def __init__(self, model: MixedModel) -> None:
        self.X, self.y = np.asarray(model._design.X), np.asarray(model._design.y)
        self.theta, self.sigma, self.REML = model.theta, model.sigma, model.REML
        self.W_inverse = np.diag(1.0 / np.asarray(model._design.weights))
        self.Z = []
        for term in model._data.terms:
            one = np.eye(len(term.levels))[term.level]
            self.Z.append([term.z[:, [j]] * one for j in range(term.z.shape[1])])

    def V(self, theta: np.ndarray, sigma: Any) -> np.ndarray:
        V, at = self.W_inverse.astype(theta.dtype), 0
        for columns in self.Z:
            k = len(columns)
            T = np.zeros((k, k), theta.dtype)
            for j in range(k):
                for i in range(j, k):
                    T[i, j] = theta[at]
                    at += 1
            for i in range(k):
                for j in range(k):
                    V = V + (T @ T.T)[i, j] * columns[i] @ columns[j].T
        return np.asarray(sigma**2 * V)

    def covariance(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(np.linalg.inv(self.X.T @ np.linalg.solve(self.V(x[:-1], np.exp(x[-1])), self.X)))

    def criterion(self, x: np.ndarray) -> complex:
        V = self.V(x[:-1], np.exp(x[-1]))
        VX = np.linalg.solve(V, self.X)
        M = self.X.T @ VX
        rest = self.y - self.X @ np.linalg.solve(M, VX.T @ self.y)
        sign, logdet = np.linalg.slogdet(V)
        value = logdet + np.log(sign) + rest @ np.linalg.solve(V, rest)
        if self.REML:
            sign, logdet = np.linalg.slogdet(M)
            value = value + logdet + np.log(sign)
        return complex(value)

    def satterthwaite(self, row: np.ndarray) -> float:
        """lmerTest's formula over (theta, log sigma), by complex steps."""
        x = np.append(self.theta, np.log(self.sigma))
        steps = 1e-30j * np.eye(x.size)

        def gradient(at: np.ndarray) -> np.ndarray:
            return np.array([self.criterion(at + s).imag for s in steps]) / 1e-30

        H = fd6(gradient, x, 1e-3)
        slope = np.array([(row @ self.covariance(x + s) @ row).imag for s in steps]) / 1e-30
        v = float(row @ self.covariance(x) @ row)
        return float(2.0 * v**2 / (slope @ np.linalg.solve(0.25 * (H + H.T), slope)))

    def kenward_roger(self, L: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, float, float, float]:
        """Adjusted covariance, F, scale factor and df, by the formulas of Kenward & Roger 1997."""
        G = []
        for columns in self.Z:
            for i in range(len(columns)):
                for j in range(i + 1):
                    one = columns[i] @ columns[j].T
                    G.append(one if i == j else one + one.T)
        G.append(self.W_inverse)
        inverse = np.linalg.inv(self.V(self.theta, self.sigma))
        X, g = self.X, len(G)
        Phi = np.linalg.inv(X.T @ inverse @ X)
        P = [-X.T @ inverse @ a @ inverse @ X for a in G]
        Q = [[X.T @ inverse @ a @ inverse @ b @ inverse @ X for b in G] for a in G]
        info = np.array(
            [
                [
                    0.5 * np.trace(inverse @ G[i] @ inverse @ G[j])
                    - np.trace(Phi @ Q[i][j])
                    + 0.5 * np.trace(Phi @ P[i] @ Phi @ P[j])
                    for j in range(g)
                ]
                for i in range(g)
            ]
        )
        W = np.linalg.inv(info)
        U = sum(W[i, j] * (Q[i][j] - P[i] @ Phi @ P[j]) for i in range(g) for j in range(g))
        adjusted = Phi + 2.0 * Phi @ U @ Phi
        q = len(L)
        Theta = L.T @ np.linalg.inv(L @ Phi @ L.T) @ L
        R = [Theta @ Phi @ p @ Phi for p in P]
        A1 = sum(W[i, j] * np.trace(R[i]) * np.trace(R[j]) for i in range(g) for j in range(g))
        A2 = sum(W[i, j] * np.trace(R[i] @ R[j]) for i in range(g) for j in range(g))
        B = (A1 + 6 * A2) / (2 * q)
        c = ((q + 1) * A1 - (q + 4) * A2) / ((q + 2) * A2)
        d = 3 * q + 2 * (1 - c)
        E = 1 / (1 - A2 / q)
        var = 2 / q * (1 + c / d * B) / ((1 - (q - c) / d * B) ** 2 * (1 - (q + 2 - c) / d * B))
        rho = var / (2 * E**2)
        m = 4 + (q + 2) / (q * rho - 1)
        F = (L @ beta) @ np.linalg.solve(L @ adjusted @ L.T, L @ beta) / q
        return adjusted, float(F), float(m / (E * (m - 2))), float(m)


def made_up(rng: np.random.Generator, n: int = 60) -> pd.DataFrame:
    g, h = rng.integers(0, 7, n), rng.integers(0, 5, n)
    d = pd.DataFrame({"g": g.astype(str), "h": h.astype(str), "x": rng.normal(size=n), "f": rng.choice(list("abc"), n)})
    d["w"] = rng.uniform(0.3, 3.0, n)
    effects = rng.normal(size=7)[g] + rng.normal(size=7)[g] * d["x"] + 0.8 * rng.normal(size=5)[h]
    nested = rng.normal(size=(7, 5))[g, h] + 0.7 * rng.normal(size=7)[g] * d["w"]
    d["y"] = effects + nested + 0.5 * d["x"] + 0.7 * rng.normal(size=n) / np.sqrt(d["w"])
    return d


DESIGNS = {
    "slopes": "y ~ x + f + (x | g)",
    "two terms on one factor": "y ~ x + f + (1 | g) + (0 + x | g)",
    "slopes and a further term": "y ~ x + f + (x | g) + (0 + w | g)",
    "nested": "y ~ x + f + (1 | g/h)",
    "crossed": "y ~ x + f + (1 | g) + (1 | h)",
    "crossed slopes": "y ~ x + f + (x || g) + (1 | h) + (1 | g:h)",
}


@pytest.mark.parametrize("weights", [None, "w"], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.filterwarnings("ignore:the fit is singular")
def test_against_dense_matrices(design: str, weights: str | None, rng: np.random.Generator) -> None:
    model = gj.lmer(DESIGNS[design], made_up(rng), weights=weights)
    dense = Dense(model)
    L = np.array([[0.0, 0.0, 1.0, 0.0], [0.0, 0.3, 0.0, 1.0]])
    adjusted, F, scale, df = dense.kenward_roger(L, model.beta)
    table = _ddf.coefficient_table(model, "kenward-roger")
    assert_close(table["std_error"], np.sqrt(np.diag(adjusted)), rtol=1e-9, what="adjusted standard errors")
    test = _ddf.contrast_test(model, L, "kenward-roger")
    assert_close([test.f_value, test.den_df], [scale * F, df], rtol=1e-8, what="scaled F")
    assert_close(test.mean_sq, F * model.sigma**2, rtol=1e-8)
    assert_close(test.p_value, stats.f.sf(scale * F, 2, df), rtol=1e-7)
    # where a direction of theta is flat the dense Hessian has no inverse; those models are left to Kenward-Roger
    if not model.is_singular:
        got = _ddf.coefficient_table(model, "satterthwaite")["df"]
        assert_close(got, [dense.satterthwaite(row) for row in np.eye(4)], rtol=1e-7, what="Satterthwaite df")


def test_satterthwaite_of_maximum_likelihood_against_dense_matrices(rng: np.random.Generator) -> None:
    model = gj.lmer("y ~ x + f + (1 | g) + (1 | g:h)", made_up(rng), REML=False, weights="w")
    got = _ddf.coefficient_table(model, "satterthwaite")["df"]
    dense = Dense(model)
    assert_close(got, [dense.satterthwaite(row) for row in np.eye(4)], rtol=1e-7)


def test_differences_agree_with_exact_derivatives(fits: dict[str, MixedModel]) -> None:
    """Those used where the dense remainder is large."""
    for case in ("unbalanced_slope", "crossed_weights", "singular_correlation"):
        model = fitted(fits, case)
        exact, differences = (_ddf.Satterthwaite(model, exact) for exact in (True, False))
        for row in np.eye(model.beta.size):
            assert_close(differences.single(row), exact.single(row), rtol=1e-6)


# -------------------- contrasts and hypotheses
def marginal_means(model: MixedModel, **grid: Any) -> np.ndarray:
    """Rows of X at all combinations of the grid, averaged with equal weights over all but the first variable."""
    first, *others = grid
    table = pd.MultiIndex.from_product(list(grid.values()), names=list(grid)).to_frame(index=False)
    X, _ = model._data.matrix_for(table)
    return np.asarray(pd.DataFrame(X).groupby(table[first].to_numpy(), sort=False).mean().to_numpy())


@pytest.mark.parametrize("formula", ["y ~ a * b + x + (1 | g)", "y ~ a + a:b + x + (1 | g)"])
def test_type_three_tests_equally_weighted_means(formula: str) -> None:
    plain = gj.lmer(formula, frame("unbalanced"))
    table = _ddf.anova_table(plain, 3)
    test = _ddf.contrast_test(plain, np.diff(marginal_means(plain, a=["p", "q", "r"], b=["u", "v"], x=[0.0]), axis=0))
    assert_close(table.loc["a", ["F value", "NumDF"]], [test.f_value, test.num_df], rtol=1e-9)
    for coding in ("contr.SAS", "contr.sum", "contr.helmert"):
        model = gj.lmer(formula, frame("unbalanced"), contrasts={"a": coding, "b": coding})
        assert_close(_ddf.anova_table(model, 3), table, rtol=1e-6, what=coding)


def test_slope_is_averaged_over_levels_without_their_main_effect() -> None:
    model = gj.lmer("y ~ x + a:x + (1 | g)", frame("unbalanced"))
    at = [marginal_means(model, x=[v], a=["p", "q", "r"])[0] for v in (0.0, 1.0)]
    test = _ddf.contrast_test(model, at[1] - at[0])
    assert_close(_ddf.anova_table(model, 3).loc["x", "F value"], test.f_value, rtol=1e-10)
    assert_close(_ddf.anova_table(model, 3).loc["x", "DenDF"], test.den_df, rtol=1e-10)


@pytest.mark.parametrize("ddf", METHODS.values())
def test_dependent_rows_are_reduced(ddf: str, fits: dict[str, MixedModel]) -> None:
    model = fitted(fits, "unbalanced")
    L = np.zeros((2, model.beta.size))
    L[0, 1], L[1, 2] = 1.0, 1.0
    plain = _ddf.contrast_test(model, L, ddf)
    redundant = _ddf.contrast_test(model, np.vstack([L, L[0] + L[1]]), ddf)
    assert redundant.num_df == 2
    assert_close([redundant.f_value, redundant.mean_sq], [plain.f_value, plain.mean_sq], rtol=1e-9)
    if ddf != "satterthwaite":  # Fai & Cornelius's df depends on the rows that were written
        assert_close(redundant.den_df, plain.den_df, rtol=1e-9)
    twice = _ddf.contrast_test(model, np.vstack([L[0], 2.0 * L[0]]), ddf)
    once = _ddf.contrast_test(model, L[0], ddf)
    assert twice.num_df == 1
    assert_close([twice.f_value, twice.den_df, twice.p_value], [once.f_value, once.den_df, once.p_value], rtol=1e-8)


@pytest.mark.parametrize("ddf", METHODS.values())
def test_units_do_not_matter(ddf: str, fits: dict[str, MixedModel]) -> None:
    model = fitted(fits, "sleep_double_bar")
    data = load_data("sleepstudy").assign(Reaction=lambda d: 1e4 * d["Reaction"], Days=lambda d: 1e-5 * d["Days"])
    other = gj.lmer("Reaction ~ Days + (Days || Subject)", data)
    columns = ["df", "statistic", "p_value"]
    a, b = (_ddf.coefficient_table(m, ddf)[columns] for m in (model, other))
    assert_close(b, a, rtol=1e-6)


def test_mean_df_of_fai_and_cornelius() -> None:
    assert _ddf._mean_df(np.array([7.0, 7.0])) == 7.0
    assert _ddf._mean_df(np.array([1.5, 1.5])) == 1.5  # equal ones are kept even where the formula has no value
    assert _ddf._mean_df(np.array([1.5, 30.0])) == 2.0
    assert_close(_ddf._mean_df(np.array([5.0, 9.0])), 2.0 * (5 / 3 + 9 / 7) / (5 / 3 + 9 / 7 - 2.0), rtol=1e-14)
    assert_close(_ddf._mean_df(np.array([1e9, 2e9])), 2.0 / (0.5 * (2e-9 + 1e-9)), rtol=1e-6)


def test_rows_left_out_of_the_fit_are_left_out_of_the_hypotheses() -> None:
    data = frame("unbalanced")
    data["a"] = data["a"].astype(object)
    data.loc[3, "x"] = np.nan
    model = gj.lmer("y ~ a * b + x + (1 | g)", data, subset="a != 'r'")
    kept = data.drop(index=3)
    other = gj.lmer("y ~ a * b + x + (1 | g)", kept[kept["a"] != "r"])
    assert_close(_ddf.anova_table(model, 3), _ddf.anova_table(other, 3), rtol=1e-7)


def test_intercept_only_gives_an_empty_table(fits: dict[str, MixedModel]) -> None:
    for type_ in (1, 2, 3):
        assert _ddf.anova_table(fitted(fits, "penicillin"), type_).shape == (0, 6)


# -------------------- refusals
def test_unknown_methods_and_types_are_named(fits: dict[str, MixedModel]) -> None:
    model = fitted(fits, "sleep_reml")
    with pytest.raises(ValueError, match="'satterthwaite' or 'kenward-roger', got 'lme4'"):
        _ddf.coefficient_table(model, "lme4")
    with pytest.raises(ValueError, match="type must be 1, 2 or 3, got 4"):
        _ddf.anova_table(model, 4)
    with pytest.raises(ValueError, match="one column for each of the 2 fixed effects"):
        _ddf.contrast_test(model, [1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="not all zero"):
        _ddf.contrast_test(model, [0.0, 0.0])


def test_kenward_roger_needs_reml(fits: dict[str, MixedModel]) -> None:
    with pytest.raises(ValueError, match="REML=True"):
        _ddf.coefficient_table(fitted(fits, "sleep_ml"), "kenward-roger")


def test_many_crossed_levels_are_refused_by_kenward_roger(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gj.lmer("diameter ~ 1 + (1 | plate) + (1 | sample)", load_data("Penicillin"))
    monkeypatch.setattr(_ddf, "MAX_DENSE", 20)
    with pytest.raises(NotSupportedError, match="30 random effects .*plate, sample.*Satterthwaite"):
        _ddf.coefficient_table(model, "kenward-roger")


def test_generalised_models_and_empty_ones_are_refused() -> None:
    generalised = gj.glmer("cbind(incidence, size - incidence) ~ period + (1 | herd)", load_data("cbpp"), "binomial")
    with pytest.raises(NotSupportedError, match="linear mixed models only"):
        _ddf.anova_table(generalised)
    empty = gj.lmer("Yield ~ 0 + (1 | Batch)", load_data("Dyestuff"))
    assert _ddf.coefficient_table(empty, "satterthwaite").empty
    with pytest.raises(ValueError, match="no fixed effects"):
        _ddf.anova_table(empty)


def test_changed_data_are_noticed() -> None:
    data = frame("unbalanced")
    model = gj.lmer("y ~ a * b + x + (1 | g)", data)
    data["x"] = data["x"] ** 2
    with pytest.raises(ValueError, match="changed since the fit"):
        _ddf.anova_table(model, 3)
