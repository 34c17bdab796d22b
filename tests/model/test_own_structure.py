"""A covariance structure of one's own: compound symmetry, added here alone, has the right numbers everywhere.

Two independent answers: with a correlation >= 0 the model is the one of two intercepts, (1 | g) + (1 | g:column), whose
variances are the covariance and the variance less the covariance; for any correlation, dense matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from helpers import assert_close
from scipy.optimize import minimize

import glmmjax as gj
from glmmjax._errors import NotSupportedError
from glmmjax._steps import fit
from glmmjax.formula import parse
from glmmjax.model import covariance
from glmmjax.model.covariance import Diagonal, Structure, Unstructured, natural_of, structure_of

K, M, REPEATS = 3, 14, 3


@dataclass(frozen=True)
class Least(Structure):
    """Compound symmetry by the least that a structure must say: T = a P + b (I - P), P the mean of the columns."""

    k: int

    @property
    def n_theta(self) -> int:
        return 2

    def factor(self, theta: Any) -> Any:
        mean = np.full((self.k, self.k), 1.0 / self.k)
        return theta[0] * mean + theta[1] * (np.eye(self.k) - mean)

    def start(self) -> np.ndarray:
        return np.ones(2)

    def theta_near(self, cov: Any) -> Any:
        common = cov.sum() / self.k
        return jnp.sqrt(jnp.stack([common, (jnp.trace(cov) - common) / (self.k - 1)]))


@dataclass(frozen=True)
class CompoundSymmetry(Least):
    """The same with what makes its searches easy and its reports short: one standard deviation, one correlation."""

    def scales(self) -> np.ndarray:
        return np.ones(2, bool)

    def raised(self, theta: Any, below: float, to: float) -> Any:
        lib: Any = jnp if isinstance(theta, jax.Array) else np
        return lib.where(abs(theta) < below, to, theta)

    def flip(self, theta: Any) -> tuple[Any, Any]:
        lib: Any = jnp if isinstance(theta, jax.Array) else np
        signs = lib.where(theta < 0.0, -1.0, 1.0)
        mean = np.full((self.k, self.k), 1.0 / self.k)
        a, b = signs[..., 0, None, None], signs[..., 1, None, None]
        return signs, a * mean + b * (np.eye(self.k) - mean)

    def settled(self, theta: Any, near_zero: float) -> Any:
        lib: Any = jnp if isinstance(theta, jax.Array) else np
        return lib.where(abs(theta) < near_zero, 0.0, theta)

    def entries(self) -> tuple[tuple[int, int], ...]:
        return ((0, 0), (0, 1))

    def natural_names(self, group: str, names: tuple[str, ...]) -> list[str]:
        return [f"sd|{group}", f"cor|{group}"]

    def followed_correlation(self, theta: Any, a: int, b: int) -> Any:
        """The angle of (b, a), smooth where one of them is 0."""
        return jnp.arctan2(theta[0], theta[1])

    def shown_correlation(self) -> tuple[Callable[[Any], Any], float, float]:
        return self.correlation, 0.0, np.pi / 2.0

    def correlation(self, angle: Any) -> Any:
        common, apart = np.sin(angle) ** 2, np.cos(angle) ** 2
        return (common - apart) / (common + (self.k - 1) * apart)

    def theta_names(self, group: str, names: tuple[str, ...]) -> list[str]:
        return [f"{group}.common", f"{group}.apart"]

    def lower(self) -> np.ndarray:
        return np.zeros(2)


@dataclass(frozen=True)
class Autoregressive(Structure):
    """Correlations rho^|i - j|, not linear in any parameters; theta = (sd, rho / sqrt(1 - rho^2))."""

    k: int

    @property
    def n_theta(self) -> int:
        return 2

    def factor(self, theta: Any) -> Any:
        rho = theta[1] / jnp.sqrt(1.0 + theta[1] ** 2)
        lag = np.abs(np.arange(self.k)[:, None] - np.arange(self.k))
        return theta[0] * jnp.linalg.cholesky(rho**lag)

    def start(self) -> np.ndarray:
        return np.array([1.0, 0.0])

    def theta_near(self, cov: Any) -> Any:
        size = jnp.trace(cov) / self.k
        rho = jnp.clip(jnp.diagonal(cov, 1).mean() / size, -0.95, 0.95)
        return jnp.stack([jnp.sqrt(size), rho / jnp.sqrt(1.0 - rho**2)])

    def entries(self) -> tuple[tuple[int, int], ...]:
        return ((0, 0), (0, 1))


@cache
def table(correlation: float) -> pd.DataFrame:
    """M groups, K conditions in each, REPEATS rows of each; in some cells a row less."""
    rng = np.random.default_rng(20 + round(10 * correlation))
    cov = 1.3**2 * ((1.0 - correlation) * np.eye(K) + correlation)
    b = rng.multivariate_normal(np.zeros(K), cov, M)
    g, c, r = (a.ravel() for a in np.indices((M, K, REPEATS)))
    keep = (g + 2 * c + r) % 7 > 0
    g, c = g[keep], c[keep]
    x = rng.normal(size=g.size)
    eta = 0.5 + 0.4 * x + 0.3 * (c == 1) + b[g, c]
    frame = pd.DataFrame({"y": eta + rng.normal(size=g.size), "x": x, "g": g, "c": np.array(["a", "b", "c"])[c]})
    return frame.assign(gc=frame.g.astype(str) + frame.c, counts=rng.poisson(np.exp(1.0 + 0.6 * eta)))


def fitted(structure: Callable[[int], Structure], data: pd.DataFrame, scale: Any = 1.0, **more: Any) -> Any:
    """y ~ x + c + (0 + c | g) with another structure than the formula's; columns of z multiplied by `scale`."""
    if "family" in more:
        setup = gj.glmer_setup("counts ~ x + c + (0 + c | g)", data, **more)
    else:
        setup = gj.lmer_setup("y ~ x + c + (0 + c | g)", data, **more)
    design, term = setup.design, setup.data.terms[0]
    terms = [(term.z * scale, term.level, structure(K))]
    return fit(replace(setup, design=gj.design_arrays(design.y, design.X, terms, names=["g"])))


@cache
def own(correlation: float, REML: bool = True, structure: type = CompoundSymmetry) -> Any:
    return fitted(structure, table(correlation), REML=REML)


@cache
def two_intercepts(REML: bool = True) -> Any:
    return gj.lmer("y ~ x + c + (1 | g) + (1 | gc)", table(0.5), REML=REML)


def natural(m: Any) -> np.ndarray:
    """sd, correlation and sigma by VarCorr."""
    block = m.VarCorr()[0]
    assert_close(block.sd, np.full(K, block.sd[0]), rtol=1e-10)
    return np.array([block.sd[0], block.corr[1, 0], m.sigma])


# -------------------- dense matrices
def compound(v: np.ndarray) -> np.ndarray:
    return v[0] ** 2 * ((1.0 - v[1]) * np.eye(K) + v[1])


def criterion(m: Any, v: np.ndarray, of: Callable[[np.ndarray], np.ndarray] = compound, scale: Any = 1.0) -> float:
    """-2 log-likelihood or REML criterion at v = (sd, correlation, sigma), by the covariance of each group's rows."""
    G = of(v)
    if v[0] <= 0.0 or v[2] <= 0.0 or np.linalg.eigvalsh(G)[0] < -1e-12:
        return np.inf
    term, X, y = m._data.terms[0], np.asarray(m._design.X), np.asarray(m._design.y)
    p, logdet, A = X.shape[1], 0.0, np.zeros((X.shape[1] + 1,) * 2)
    for j in range(M):
        rows = term.level == j
        z, both = term.z[rows] * scale, np.column_stack([X[rows], y[rows]])
        V = z @ G @ z.T + v[2] ** 2 * np.eye(len(z))
        A += both.T @ np.linalg.solve(V, both)
        logdet += np.linalg.slogdet(V)[1]
    rest = A[p, p] - A[p, :p] @ np.linalg.solve(A[:p, :p], A[:p, p])
    logdet += m.REML * np.linalg.slogdet(A[:p, :p])[1]
    return float(logdet + rest + (len(y) - m.REML * p) * np.log(2.0 * np.pi))


def minimum(f: Callable[[np.ndarray], float], v: Any) -> Any:
    return minimize(f, v, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-11, "maxiter": 2000})


# -------------------- the fit
@pytest.mark.parametrize("structure", [CompoundSymmetry, Least])
@pytest.mark.parametrize(("correlation", "REML"), [(0.5, True), (-0.3, False)])
def test_fit(structure: type, correlation: float, REML: bool) -> None:
    m = own(correlation, REML, structure)
    best = minimum(lambda v: criterion(m, v), [1.0, 0.1, 1.0])
    assert m.converged and not m.is_singular and m.df == 4 + 2 + 1
    assert_close(m.objective, best.fun, atol=1e-8)
    assert_close(natural(m), best.x, rtol=1e-6, atol=1e-7)


def test_nlme() -> None:
    """R's lme(y ~ x + c, random = list(g = pdCompSymm(~ 0 + c)), method = "ML"), nlme 3.1: its search ends at 1e-6."""
    m = own(-0.3, False)
    assert_close(m.loglik, -186.993525789, atol=1e-8)
    assert_close(natural(m), [1.4272621, -0.3082683, 0.9661740], rtol=1e-5)


def test_two_intercepts() -> None:
    """Coefficients, standard errors, degrees of freedom, modes and their variances, components, predictions."""
    m, other = own(0.5), two_intercepts()
    assert_close(m.objective, other.objective, atol=1e-8)
    for ddf in ("satterthwaite", "kenward-roger"):
        for answer in (m, own(0.5, True, Least)):
            assert_close(answer.coefficients(ddf).to_numpy(), other.coefficients(ddf).to_numpy(), rtol=1e-5, atol=1e-7)
        tests = [gj.anova(fit, ddf=ddf).to_numpy(float) for fit in (m, other)]
        assert_close(tests[0], tests[1], rtol=1e-5, atol=1e-7)
    cells, groups = other.ranef()["gc"].iloc[:, 0], other.ranef()["g"].iloc[:, 0]
    by_cell = np.array([[cells[f"{g}{c}"] + groups[g] for c in "abc"] for g in groups.index])
    assert_close(m.ranef()["g"].to_numpy(), by_cell, atol=1e-6)
    rows = table(0.5)[::7]
    assert_close(m.predict(rows), other.predict(rows), atol=1e-6)
    assert_close(m.predict(rows, re_form="~0"), other.predict(rows, re_form="~0"), atol=1e-6)
    assert_close(m.icc().to_numpy(), other.icc().to_numpy(), atol=1e-6)
    common, apart = (block.cov[0, 0] for block in sorted(other.VarCorr(), key=lambda block: len(block.group)))
    assert_close(natural(m)[:2], [np.sqrt(common + apart), common / (common + apart)], rtol=1e-6)


def test_poisson() -> None:
    m = fitted(CompoundSymmetry, table(0.5), family="poisson")
    other = gj.glmer("counts ~ x + c + (1 | g) + (1 | gc)", table(0.5), "poisson")
    assert_close(m.objective, other.objective, atol=1e-7)
    assert_close(m.beta, other.beta, atol=1e-4)
    assert_close(m.bse.to_numpy(), other.bse.to_numpy(), rtol=1e-3)


@pytest.mark.parametrize("structure", [CompoundSymmetry, Least])
def test_columns_in_other_units(structure: type) -> None:
    """The structure is of the columns as they are: not each is divided by its own unit, as for lme4's terms."""
    scale = np.array([100.0, 40.0, 250.0])
    m = fitted(structure, table(0.5), scale)
    best = minimum(lambda v: criterion(m, v * [0.01, 1.0, 1.0], scale=scale), [1.0, 0.1, 1.0])
    assert m.converged
    assert_close(m.objective, best.fun, atol=1e-7)
    assert_close(natural(m), best.x * [0.01, 1.0, 1.0], rtol=1e-5, atol=1e-6)


def test_fit_design() -> None:
    m = own(0.5, False)
    found = gj.fit_design(m._design, "gaussian", REML=False)
    assert_close(found.objective, m.objective, atol=1e-8)
    assert_close(found.theta, m.theta, atol=1e-5)


# -------------------- the boundary
def test_singular() -> None:
    """With a correlation of -1 / (k - 1), where the diagonal of T is not 0, and with one of 1."""
    data = table(-0.3)
    apart = data.assign(y=data.y - data.groupby("g").y.transform("mean"))
    with pytest.warns(gj.ConvergenceWarning, match=r"the covariance of \(0 \+ c \| g\) is on the boundary"):
        m, least = (fitted(structure, apart, REML=False) for structure in (CompoundSymmetry, Least))
    best = minimum(lambda v: criterion(m, np.array([v[0], -0.5, v[1]])), [1.0, 1.0])
    assert m.is_singular and m.singular_terms == ["(0 + c | g)"] and m.theta[0] == 0.0 and m.theta[1] > 0.0
    assert least.is_singular
    assert_close(m.objective, best.fun, atol=1e-8)
    assert_close(natural(m), [best.x[0], -0.5, best.x[1]], rtol=1e-6, atol=1e-7)
    assert "singular" in str(m.summary())
    alike = data.assign(y=data.y - data.groupby("gc").y.transform("mean") + data.groupby("g").y.transform("mean"))
    intercept = gj.lmer("y ~ x + c + (1 | g)", alike, REML=False)
    with pytest.warns(gj.ConvergenceWarning, match="singular"):
        one = fitted(CompoundSymmetry, alike, REML=False)
    assert one.is_singular and one.theta[1] == 0.0
    assert_close(one.objective, intercept.objective, atol=1e-8)
    assert_close(natural(one)[1], 1.0, atol=1e-12)


# -------------------- natural parameters
def test_natural_parameters() -> None:
    """Estimates and standard errors from differences of the dense criterion; the same by each structure."""
    m = own(0.5)
    found = m.sdcor()
    assert list(found.index) == ["sd|g", "cor|g", "sigma"] and list(found["scale"]) == ["log", "z", "log"]
    assert_close(found["estimate"].to_numpy(), natural(m), rtol=1e-10)

    def at(w: np.ndarray) -> float:
        return criterion(m, np.array([np.exp(w[0]), np.tanh(w[1]), np.exp(w[2])]))

    w, step, eye = found["transformed"].to_numpy(), 1e-3, np.eye(3)
    H = np.array(
        [
            [sum(s * t * at(w + step * (s * a + t * b)) for s in (-1, 1) for t in (-1, 1)) / (4 * step**2) for b in eye]
            for a in eye
        ]
    )
    assert_close(found["transformed_error"].to_numpy(), np.sqrt(np.diag(2.0 * np.linalg.inv(H))), rtol=1e-4)
    least = own(0.5, True, Least).sdcor()
    names = ["sd_ca|g", "cor_cb.ca|g", "cor_cc.ca|g", "sd_cb|g", "cor_cc.cb|g", "sd_cc|g", "sigma"]
    assert list(least.index) == names
    columns = ["estimate", "std_error"]
    for name in names[:-1]:
        kind = "sd|g" if name.startswith("sd") else "cor|g"
        assert_close(least.loc[name, columns].to_numpy(float), found.loc[kind, columns].to_numpy(float), rtol=1e-4)


def test_profile() -> None:
    """Likelihood intervals: at their ends the dense deviance, the rest minimised over, is higher by the quantile.

    But at a correlation of -1 / (k - 1), beyond which there is nothing.
    """
    for m in (own(0.5, False), own(-0.5, False)):
        intervals = m.profile("theta_").confint()
        assert list(intervals.index) == ["sd|g", "cor|g", "sigma"]
        for i, name in enumerate(intervals.index):
            for end in intervals.loc[name]:
                start = np.delete(natural(m), i)
                rise = minimum(lambda v, m=m, end=end, i=i: criterion(m, np.insert(v, i, end)), start).fun - m.objective
                assert_close(rise, rise if abs(end + 0.5) < 1e-12 else 1.959963984540054**2, rtol=1e-4)
                assert rise < 3.85
    assert_close(intervals.loc["cor|g"].iloc[0], -0.5, atol=1e-12)


def test_bootstrap() -> None:
    """One by one and many together; singular ones by their own refits."""
    m = own(-0.5, False)
    single, together = (m.bootstrap(8, seed=3, batched=batched) for batched in (False, True))
    assert list(single.frame.columns) == ["sd|g", "cor|g", "sigma", *m.fixef.index]
    assert_close(single.frame.to_numpy(), together.frame.to_numpy(), atol=2e-5)
    draws = m.simulate(8, seed=3)
    with pytest.warns(gj.ConvergenceWarning, match="singular"):
        refits = [m.refit(draws.iloc[:, i]) for i in range(8)]
    assert_close(single.frame["cor|g"].to_numpy(), [natural(r)[1] for r in refits], atol=2e-5)
    assert single.singular == together.singular == sum(r.is_singular for r in refits) > 0


# -------------------- tests between models
def test_anova() -> None:
    """Between one intercept and an unstructured covariance; beside independent columns, not within them."""
    data, m = table(0.5), own(0.5, False)
    one, free = (gj.lmer(f"y ~ x + c + {term}", data, REML=False) for term in ("(1 | g)", "(0 + c | g)"))
    for own_, other in ((m, two_intercepts(False)), (own(0.5, False, Least), two_intercepts(False))):
        found, expected = (
            gj.anova(one, middle, free, boundary=True, names=["a", "b", "c"]) for middle in (own_, other)
        )
        assert_close(found.fillna(0.0).to_numpy(float), expected.fillna(0.0).to_numpy(float), rtol=1e-6, atol=1e-6)
        assert str(found).count("Note") == str(expected).count("Note")
    independent = fitted(Diagonal, data, REML=False)
    assert "not nested" in str(gj.anova(m, independent))
    assert "not nested" not in str(gj.anova(independent, free)) and independent.df == 4 + 3 + 1


def test_covariances_that_are_not_linear() -> None:
    def lagged(v: np.ndarray) -> np.ndarray:
        return v[0] ** 2 * v[1] ** np.abs(np.subtract.outer(np.arange(K), np.arange(K)))

    m = own(0.5, True, Autoregressive)
    best = minimum(lambda v: criterion(m, v, lagged), [1.0, 0.1, 1.0])
    assert_close(m.objective, best.fun, atol=1e-8)
    assert_close(natural(m), best.x, rtol=1e-6)
    assert Autoregressive(K).basis() is None and Autoregressive(2).basis() is not None
    with pytest.raises(NotSupportedError, match="Autoregressive.*use ddf='Satterthwaite'"):
        m.coefficients("kenward-roger")
    assert "not known" in str(gj.anova(m, gj.lmer("y ~ x + c + (0 + c | g)", table(0.5))))


# -------------------- names, pieces and the way from a formula
def test_pieces_of_the_model() -> None:
    m = own(0.5)
    pieces = m.getME("ALL")
    assert list(pieces["theta"].index) == ["g.common", "g.apart"] and (pieces["lower"] == 0.0).all()
    assert "Lind" not in pieces
    with pytest.raises(NotSupportedError, match="no entries of theta"):
        m.getME("Lind")
    assert_close(pieces["Lambda"] @ pieces["u"], pieces["b"], rtol=1e-10)
    T, ST = m.getME("Tlist")[0], m.getME("ST")[0]
    lower = (np.tril(ST, -1) + np.eye(K)) * np.diag(ST)
    assert_close(lower @ lower.T, T @ T.T, rtol=1e-12)
    assert m.getME("m") == 2 and list(own(0.5, True, Least).getME("theta").index) == ["g.theta1", "g.theta2"]
    with pytest.raises(NotSupportedError, match="is in the design and not in the formula"):
        m.update(". ~ . - x")


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word for the structure in formulas: cs(x | g)."""
    monkeypatch.setitem(covariance.STRUCTURES, "cs", CompoundSymmetry)
    monkeypatch.setattr(parse, "STRUCTURES", (*parse.STRUCTURES, "cs"))


FORMULA = "y ~ x + c + cs(0 + c | g)"


def test_formula(named: None) -> None:
    """What a frame says of its terms is what its design has; a changed formula keeps it."""
    m = gj.lmer(FORMULA, table(0.5))
    assert_close(m.objective, own(0.5).objective, atol=1e-9)
    assert m._data.terms[0].label == ("g", ("ca", "cb", "cc"), "cs") and m.theta_names == ["g.common", "g.apart"]
    assert structure_of(m._data.terms[0].label) == CompoundSymmetry(K) == own(0.5)._data.terms[0].structure
    assert m.formula == FORMULA and m._data.shown_terms == ("cs(0 + c | g)",)
    smaller = m.update(". ~ . - x")
    assert smaller.formula == "y ~ c + cs(0 + c | g)" and smaller.df == m.df - 1
    assert str(parse.parse("y ~ x + cs(0 + c | g) + (1 | h) - cs(0 + c | g)").random_formula()) == "~(1 | h)"
    with pytest.raises(gj.FormulaError, match=r"there is no cs\(0 \+ c \| g\) before it"):
        gj.lmer("y ~ x + (0 + c | g) - cs(0 + c | g)", table(0.5))


def test_many(named: None, tmp_path: Path) -> None:
    data = pd.concat([table(r).assign(id=str(r)) for r in (0.5, -0.3)])
    file = tmp_path / "fits.parquet"
    for _ in range(2):  # from the file in the end
        many = gj.fit_many(FORMULA, data, by="id", REML=False, ddf=None, results=file)
        assert [c for c in many.fits.columns if "|" in c] == ["sd|g", "cor|g"]
        for r in (0.5, -0.3):
            row = many.fits.loc[str(r)]
            assert_close(row[["sd|g", "cor|g"]].to_numpy(float), natural(own(r, False))[:2], atol=1e-5)
            assert_close(row["logLik"], own(r, False).loglik, atol=1e-7)


def test_simulate(named: None) -> None:
    """Responses of a model without data have the covariance of the structure."""
    rows = table(0.5)
    template = gj.parameter_template(FORMULA, rows)
    assert list(template["theta"].index) == ["g.common", "g.apart"]
    params = {"beta": np.zeros(4), "theta": [1.5, 0.5], "sigma": 0.1}
    cells = gj.simulate(FORMULA, rows, params, nsim=2000, seed=1).groupby([rows.g, rows.c]).mean()
    found = np.cov(cells.to_numpy().reshape(M, K, -1).swapaxes(0, 1).reshape(K, -1))
    common, apart = 0.15**2, 0.05**2  # theta is relative to sigma
    expected = common / K + apart * (np.eye(K) - 1.0 / K) + 0.01 / 2.5 * np.eye(K)
    assert_close(found, expected, atol=0.0015)


# -------------------- answers of structures
STRUCTURES = [Unstructured(1), Unstructured(3), Diagonal(3), Least(3), CompoundSymmetry(4), Autoregressive(3)]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_what_a_structure_says_agrees_with_its_factor(structure: Structure) -> None:
    rng = np.random.default_rng(5)
    theta = rng.normal(size=(4, structure.n_theta))
    T = np.stack([np.asarray(structure.factor(jnp.asarray(row))) for row in theta])
    assert_close(structure.host_factor(theta), T, rtol=1e-12, atol=1e-14)
    signs, turn = structure.flip(theta)
    assert_close(structure.host_factor(signs * theta), T @ turn, rtol=1e-12, atol=1e-14)
    assert_close(turn @ turn.swapaxes(1, 2), np.broadcast_to(np.eye(structure.k), T.shape), atol=1e-14)
    cov = T @ T.swapaxes(1, 2)
    # units that the structure allows, of columns with any root mean squares
    units = structure.units(rng.uniform(0.5, 2.0, structure.k))
    C = structure.turn(np.diag(units))
    assert_close(structure.host_factor(theta @ C.T), units[:, None] * T, rtol=1e-12, atol=1e-14)
    basis = structure.basis()
    if basis is not None:
        flat = basis.reshape(len(basis), -1)
        gram = flat @ flat.T
        assert_close(gram, np.diag(np.diag(gram)), atol=1e-12)
        fits = np.linalg.lstsq(flat.T, cov.reshape(4, -1).T)[0]
        assert_close(flat.T @ fits, cov.reshape(4, -1).T, atol=1e-12)
    assert_close(natural_of(theta, np.ones(4), [structure]), structure.natural(cov), rtol=1e-12)
    assert structure.natural(cov).shape[-1] == len(structure.natural_names("g", tuple("abcd")[: structure.k]))
    near = np.asarray(structure.theta_near(jnp.asarray(cov[0])))
    again = structure.host_factor(near)
    if not isinstance(structure, Autoregressive):
        assert_close(again @ again.T, cov[0], rtol=1e-10, atol=1e-12)
    ones = np.ones(structure.k)
    default = np.asarray(Structure.curvature(structure, theta[0], 5.0, ones))
    own_ = np.asarray(structure.curvature(theta[0], 5.0, ones))
    if structure.n_theta <= structure.k and not isinstance(structure, Autoregressive):
        assert_close(default, own_, rtol=1e-5)
    assert (default > 0.0).all() and not structure.singular(theta).any()
    assert structure.singular(0.0 * theta).all()


def test_parameters_of_its_own_need_the_base_class() -> None:
    """What `Unstructured` answers is about entries of T; a subclass with other parameters would inherit it."""
    with pytest.raises(TypeError, match=r"Own has parameters of its own: derive it from .*Structure, not from Unstr"):

        class Own(gj.Unstructured):
            @property
            def n_theta(self) -> int:
                return 2
