"""Linear mixed models: the pure functions at fixed parameters, and fits.

Values against lme4 (fixed_params/, models/), a dense evaluation in NumPy, and lme4's own optimiser trace; derivatives
against differences. `test_ddf.py` has degrees of freedom, `test_structure.py` the symbolic view.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from helpers import all_models, assert_close, fixed_params, load_data, reference_model

import glmmjax as gj
from glmmjax import _cli
from glmmjax.compiling.precision import x64
from glmmjax.model.covariance import Unstructured

SLEEP = "Reaction ~ Days + (Days | Subject)"
#: the optimiser's trace printed in Bates's slides "Theory of linear mixed models" (ML, classroom)
TRACE = (11466.913, 11447.349, 11415.114, 11402.540, 11392.970, 11391.654, 11391.532)

pls = jax.jit(gj.pls)
criterion = jax.jit(gj.lmm_deviance, static_argnums=2)


@pytest.fixture(autouse=True)
def double() -> Any:
    with x64():
        yield


def design_of(record: dict[str, Any]) -> gj.Design:
    return gj.design(record["formula"], load_data(record["dataset"]), weights=record["weights"])


# -------------------- at fixed parameters
@pytest.mark.parametrize(
    "name", ["lmm_sleep", "lmm_sleep_weights", "lmm_pastes", "lmm_penicillin", "lmm_classroom", "lmm_insteval"]
)
def test_fixed_parameters(name: str) -> None:
    """lme4's criterion and its components; 1e-10 is the issue's tolerance, rounding is 1e-12 at most."""
    record = fixed_params(name)
    design = design_of(record)
    for point in record["points"]:
        theta = jnp.asarray(point["theta"], float)
        at = pls(theta, design)
        assert float(criterion(theta, design, point["REML"])) == pytest.approx(point["criterion"], rel=1e-11)
        assert float(at.logdet_L) == pytest.approx(point["ldL2"], rel=1e-11)
        assert float(at.logdet_RX) == pytest.approx(point["ldRX2"], rel=1e-11)
        assert float(at.r2) == pytest.approx(point["wrss"] + point["u_sumsq"], rel=1e-11)
        assert_close(at.beta, point["beta"], rtol=1e-10, what="beta")
        if len(point["u"]) == design.q:  # the file has the first 500 of InstEval's
            assert_close(at.u, point["u"], rtol=1e-8, atol=1e-8, what="u")
        n, p = design.n, design.p
        assert float(at.sigma) == pytest.approx(np.sqrt(float(at.r2) / n), rel=1e-14)
        assert float(at.sigma_reml) == pytest.approx(np.sqrt(float(at.r2) / (n - p)), rel=1e-14)
        assert 2.0 * np.log(np.diag(at.RX)).sum() == pytest.approx(point["ldRX2"], rel=1e-11)
        assert np.all(np.tril(at.RX, -1) == 0.0)


def test_slides_trace() -> None:
    """The first point of the trace printed in the slides, one after another."""
    record = fixed_params("lmm_classroom")
    design = design_of(record)
    found = [round(float(criterion(jnp.asarray(p["theta"], float), design, False)), 3) for p in record["points"]]
    for printed in TRACE:
        assert min(abs(v - printed) for v in found) < 6e-4, printed


def dense_criterion(theta: np.ndarray, design: gj.Design, REML: bool) -> float:
    """Minus twice the log density of y (of the residual contrasts) under V = W^-1 + Z Lambda Lambda' Z'."""
    from glmmjax.model.design import factors

    n, p = design.n, design.p
    V = np.diag(1.0 / np.asarray(design.weights))
    for z, level, T in zip(design.z, design.level, factors(jnp.asarray(theta), design), strict=True):
        zT = np.asarray(z) @ np.asarray(T)
        V += (zT @ zT.T) * (level[:, None] == level[None, :])
    X, y = np.asarray(design.X), np.asarray(design.y) - np.asarray(design.offset)
    inverse = np.linalg.inv(V)
    M = X.T @ inverse @ X
    r = y - X @ np.linalg.solve(M, X.T @ inverse @ y)
    r2, N = r @ inverse @ r, n - p * REML
    out = np.linalg.slogdet(V)[1] + N * (1.0 + np.log(2.0 * np.pi * r2 / N))
    return float(out + np.linalg.slogdet(M)[1] * REML)


def made_up(kind: str, n: int = 90) -> gj.Design:
    rng = np.random.default_rng(7)
    a, b = rng.permutation(np.arange(n) % 13), rng.permutation(np.arange(n) % 6)
    x = rng.normal(5.0, 1.0, n)
    terms: list[Any] = {
        "slope": [(np.column_stack([np.ones(n), x]), a)],
        "two_terms": [(np.ones(n), a), (x, a)],
        "nested": [(np.ones(n), a), (x, a // 3)],
        "crossed": [(np.column_stack([np.ones(n), x]), a), (np.ones(n), b)],
    }[kind]
    X = np.column_stack([np.ones(n), x, rng.normal(size=n)])
    y = X @ [1.0, 2.0, -1.0] + rng.normal(size=13)[a] + rng.normal(size=n)
    return gj.design_arrays(y, X, terms, weights=rng.uniform(0.3, 3.0, n), offset=rng.normal(size=n))


@pytest.mark.parametrize("kind", ["slope", "two_terms", "nested", "crossed"])
@pytest.mark.parametrize("REML", [False, True])
def test_dense(kind: str, REML: bool) -> None:
    """Value, gradient and Hessian against the n x n covariance matrix."""
    design = made_up(kind)
    theta = np.random.default_rng(1).normal(size=design.n_theta)
    value = float(criterion(jnp.asarray(theta), design, REML))
    assert value == pytest.approx(dense_criterion(theta, design, REML), rel=1e-11)
    gradient = jax.jit(jax.grad(gj.lmm_deviance), static_argnums=2)
    hessian = np.asarray(jax.jit(jax.hessian(gj.lmm_deviance), static_argnums=2)(theta, design, REML))
    for i in range(theta.size):
        e = 1e-5 * (np.arange(theta.size) == i)
        difference = (dense_criterion(theta + e, design, REML) - dense_criterion(theta - e, design, REML)) / 2e-5
        # central differences of a dense value of about 300: rounding 1e-8
        assert float(gradient(theta, design, REML)[i]) == pytest.approx(difference, rel=1e-6, abs=1e-6)
        row = (gradient(theta + e, design, REML) - gradient(theta - e, design, REML)) / 2e-5
        assert_close(hessian[i], row, rtol=1e-6, atol=1e-6, what="Hessian")


def test_derivatives_in_the_data() -> None:
    """d criterion / d(y, X, weights, offset): the internal orthogonalisation carries no derivatives, and needs none."""
    design = made_up("crossed")
    theta = np.random.default_rng(1).normal(size=design.n_theta)
    parts = {"y": design.y, "X": design.X, "weights": design.weights, "offset": design.offset}

    def f(parts: dict[str, Any]) -> Any:
        return gj.lmm_deviance(theta, replace(design, **parts), True)

    gradient = jax.jit(jax.grad(f))(parts)
    rng = np.random.default_rng(2)
    for name, part in parts.items():
        for flat in rng.choice(part.size, 3, replace=False):
            e = 1e-5 * (np.arange(part.size) == flat).reshape(part.shape)
            up, down = (dense_criterion(theta, replace(design, **{name: part + s * e}), True) for s in (1, -1))
            assert float(gradient[name].reshape(-1)[flat]) == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-6)


def test_pls_is_differentiable() -> None:
    """d(beta, u, sigma) / d theta against differences."""
    design = made_up("crossed")
    theta = np.random.default_rng(1).normal(size=design.n_theta)

    def f(t: Any) -> Any:
        at = gj.pls(t, design)
        return jnp.concatenate([at.beta, at.u[:5], at.sigma[None], at.RX[0]])

    run = jax.jit(f)
    jacobian = np.asarray(jax.jit(jax.jacrev(f))(theta))
    for i in range(theta.size):
        e = 1e-5 * (np.arange(theta.size) == i)
        assert_close(jacobian[:, i], (run(theta + e) - run(theta - e)) / 2e-5, rtol=1e-6, atol=1e-7, what="Jacobian")


def test_transformations() -> None:
    """vmap over theta gives the single values; theta = 0 is the linear model, with finite derivatives."""
    design = made_up("slope")
    thetas = np.random.default_rng(0).normal(size=(4, 3))
    lanes = jax.jit(jax.vmap(lambda t: gj.lmm_deviance(t, design)))(thetas)
    assert_close(lanes, [float(criterion(t, design, True)) for t in thetas], rtol=1e-13, what="vmap")
    zero = np.zeros(3)
    assert float(criterion(zero, design, False)) == pytest.approx(dense_criterion(zero, design, False), rel=1e-12)
    gradient = jax.grad(gj.lmm_deviance)
    assert_close(jax.jit(gradient)(zero, design), zero, atol=1e-9, what="gradient at 0")
    assert np.isfinite(jax.jit(jax.jacfwd(gradient))(zero, design)).all()


def test_cancellation() -> None:
    """A response far from zero keeps its criterion (DESIGN: cross-products of sleepstudy + 1e6 lose 6.7e-5)."""
    data = load_data("sleepstudy")
    far = data.assign(Reaction=data["Reaction"] + 1e6, Days=data["Days"] + 0.0)
    a, b = gj.lmer(SLEEP, data), gj.lmer(SLEEP, far)
    assert b.objective == pytest.approx(a.objective, abs=1e-9 * a.objective)
    assert_close(b.theta, a.theta, atol=1e-9, what="theta")
    assert b.beta[0] - 1e6 == pytest.approx(a.beta[0], abs=1e-8)
    # raw polynomials of a year: columns that are dependent to 1e-9
    year = 2000.0 + data["Days"]
    m = gj.lmer("Reaction ~ year + I(year^2) + (1 | Subject)", data.assign(year=year))
    centred = gj.lmer("Reaction ~ Days + I(Days^2) + (1 | Subject)", data)
    assert m.objective + 0.0 == pytest.approx(centred.objective, abs=1e-6)


# -------------------- fits against lme4
LMER = all_models(engine="lme4::lmer")


@pytest.mark.parametrize("name", LMER)
def test_reference_models(name: str) -> None:
    """Every lmer file: criterion, estimates, standard errors, what follows from them.

    The files were polished to about 1e-7 of a standard error; our own search ends within 5e-6.
    """
    record = reference_model(name)
    expected = record["results"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gj.ConvergenceWarning)
        m = gj.lmer(
            record["formula"],
            load_data(record["dataset"]),
            REML=bool(record["REML"]),
            weights=record["weights"],
            offset=record["offset"],
        )
    assert m.converged
    assert m.is_singular == expected["isSingular"]
    assert m.fit_stats.evaluations <= 20
    crit = expected["REMLcrit"] if record["REML"] else expected["minus2logLik"]
    assert m.objective == pytest.approx(crit, rel=1e-9)
    assert m.loglik == pytest.approx(-0.5 * crit, rel=1e-9)
    assert_close(m.theta, expected["theta"]["values"], atol=1e-5, what="theta")
    assert m.theta_names == expected["theta"]["names"]
    assert list(m.fixef.index) == expected["fixef"]["names"]
    assert_close(m.fixef, expected["fixef"]["values"], rtol=1e-6, what="beta")
    se = expected["se"]["values"] if isinstance(expected["se"], dict) else expected["se"]
    assert_close(m.bse, se, rtol=1e-6, what="standard errors")
    assert m.sigma == pytest.approx(expected["sigma"], rel=1e-6)
    assert (m.aic, m.bic, m.df) == pytest.approx((expected["AIC"], expected["BIC"], expected["df"]), rel=1e-9)
    residuals = expected["residuals_first20"]
    scale = float(m.residuals().abs().max())
    for kind in ("response", "pearson"):
        ours = m.residuals(kind).to_numpy()[: len(residuals[kind])]
        assert_close(ours, residuals[kind], atol=2e-5 * scale, what=f"{kind} residuals")
    assert_close(m.fitted.to_numpy()[:20], expected["fitted_first20"], atol=2e-5 * scale, what="fitted values")
    devcomp = expected["devcomp_cmp"]
    ours = m.devcomp()
    for key in ("ldL2", "ldRX2", "wrss", "ussq", "pwrss"):
        assert ours[key] == pytest.approx(devcomp[key], rel=1e-4, abs=1e-5), key


def test_conditional_variances() -> None:
    """ranef(condVar=True) is sigma^2 Lambda (L L')^-1 Lambda'; dense algebra for a crossed model."""
    m = gj.lmer("diameter ~ 1 + (1 | plate) + (1 | sample)", load_data("Penicillin"))
    Z, Lambda = m.getME("Z"), m.getME("Lambda")
    H = Lambda.T @ Z.T @ Z @ Lambda + np.eye(Z.shape[1])
    full = m.sigma**2 * Lambda @ np.linalg.inv(H) @ Lambda.T
    effects = m.ranef(condVar=True)
    at = 0
    for frame in effects.values():
        k = len(frame)
        assert_close(frame.attrs["condVar"][:, 0, 0], np.diag(full)[at : at + k], rtol=1e-9, what="condVar")
        at += k


# -------------------- behaviour
@pytest.fixture(scope="module")
def sleep() -> gj.MixedModel:
    return gj.lmer(SLEEP, load_data("sleepstudy"))


@pytest.mark.parametrize("optimizer", ["bfgs", "newton", "cobyqa", optax.lbfgs()])
def test_optimizers(sleep: gj.MixedModel, optimizer: Any) -> None:
    m = gj.lmer(SLEEP, load_data("sleepstudy"), control=gj.Control(optimizer=optimizer))
    assert m.converged
    assert m.objective == pytest.approx(sleep.objective, abs=1e-7)
    # cobyqa stops by its trust region, 1e-6 of the start's metric
    assert_close(m.theta, sleep.theta, atol=1e-4 if optimizer == "cobyqa" else 1e-5, what="theta")


@pytest.mark.parametrize("start", [[0.0, 0.0, 0.0], [10.0, -5.0, 1e-3], [1e-3, 0.0, 3.0]])
def test_starts(sleep: gj.MixedModel, start: list[float]) -> None:
    """Any start ends at the same place, one at the saddle theta = 0 included."""
    m = gj.lmer(SLEEP, load_data("sleepstudy"), start={"theta": start})
    assert m.objective == pytest.approx(sleep.objective, abs=1e-8)
    assert m.fit_stats.evaluations <= 25


def test_average_information(sleep: gj.MixedModel) -> None:
    """The search's metric is the Hessian of the criterion but for observed against expected information."""
    with x64():
        hessian = np.asarray(jax.jit(jax.hessian(gj.lmm_deviance))(sleep.theta, sleep._design))
    ratio = np.linalg.eigvals(np.linalg.solve(hessian, sleep._estimates.hessian)).real
    assert np.all((ratio > 0.8) & (ratio < 1.25))
    exact = gj.lmer(SLEEP, load_data("sleepstudy"), control={"exact": True})
    assert_close(exact._estimates.hessian, hessian, rtol=1e-5, atol=1e-5, what="exact Hessian")


def test_verbose(capsys: pytest.CaptureFixture[str], sleep: gj.MixedModel) -> None:
    """The host's driver takes the same path as the compiled loop."""
    seen: list[tuple[int, float]] = []
    m = gj.lmer(SLEEP, load_data("sleepstudy"), verbose=lambda i, f, x: seen.append((i, f)))
    assert [i for i, _ in seen] == list(range(1, m.fit_stats.evaluations + 1))
    assert np.isfinite([f for _, f in seen]).all() and seen[-1][1] == pytest.approx(m.objective)
    assert_close(m.theta, sleep.theta, atol=1e-12, what="theta")
    assert_close(m.bse, sleep.bse, rtol=1e-10, what="standard errors")
    assert m.fit_stats.path.shape == (m.fit_stats.evaluations, 5)


#: -2 log L of REML fits to data with few differences of groups or none: the lowest of lme4's bobyqa, nloptwrap and
#: Nelder_Mead at tolerances of 1e-10 and below (R 4.2, lme4 1.1-31)
ALL_ZERO = {9: 532.41233570782, 18: 524.46267653794, 28: 514.464982311, 35: 490.5871812323}
FACTOR = {0: 698.725292936, 2: 728.022307586, 5: 704.069249076, 12: 659.703172791, 20: 736.279486310}


def all_zero(seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    g = rng.integers(0, 16, 180)
    rng.random(180)
    return pd.DataFrame({"g": g, "x": rng.normal(2.0, 1.5, 180), "y": rng.normal(size=180)})


def of_a_factor(seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    g, f = np.repeat(np.arange(12), 20), np.tile(list("abc"), 80)
    u = rng.normal(size=12) * [0.0, 0.3, 1.0][seed % 3]
    y, _, x = u[g] + rng.normal(size=240), rng.integers(0, 8, 240), rng.normal(size=240)
    return pd.DataFrame({"y": y, "g": g, "f": f, "x": x})


def test_singular_fits_converge_in_few_evaluations() -> None:
    """Where a covariance loses rank the search still knows the curvature across its range."""
    cases = [("y ~ x + (x | g)", all_zero(seed), best) for seed, best in ALL_ZERO.items()]
    cases += [("y ~ 0 + f + (0 + f | g)", of_a_factor(seed), best) for seed, best in FACTOR.items()]
    for formula, data, best in cases:
        m = gj.lmer(formula, data, control={"check_singular": "ignore"})
        assert m.converged and m.fit_stats.evaluations <= 40
        assert m.objective <= best + 1e-6


def test_turns_of_a_factor_are_gone_around() -> None:
    """T[1, 1] near 0 and parallel columns behind it: the other searches find this optimum in 113 and 79 evaluations."""
    control = {"check_singular": "ignore"}
    m, bfgs = (
        gj.lmer("y ~ x + (x + f | g)", of_a_factor(0), control=control | {"optimizer": o}) for o in ("auto", "bfgs")
    )
    assert m.converged and m.fit_stats.evaluations <= 75
    assert_close([m.objective, bfgs.objective], [698.6187910277, 698.6187910277], atol=1e-8)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_a_step_around_turns_is_the_straight_one_to_first_order(k: int, rng: np.random.Generator) -> None:
    structure = Unstructured(k)
    theta, change = jnp.asarray(rng.normal(size=(2, structure.n_theta)))

    def covariance(theta: Any) -> Any:
        T = structure.factor(theta)
        return T @ T.T

    for step in (1e-3, 1e-4):
        around, straight = structure.moved(theta, step * change), theta + step * change
        assert_close(covariance(around), covariance(straight), atol=50.0 * k * step**2)


def test_a_turn_of_parallel_columns_is_no_step() -> None:
    structure = Unstructured(2)
    T, turn = np.array([[0.0, 0.0], [0.6, 0.8]]), np.array([[0.0, 0.0], [0.8, -0.6]])
    moved = structure.moved(*(jnp.asarray(structure.theta_of(x)) for x in (T, turn)))
    after = structure.factor(moved)
    assert_close(after @ after.T, T @ T.T, atol=1e-12)


@pytest.mark.parametrize(("formula", "data"), [("y ~ x + (x | g)", all_zero(9)), ("y ~ f + (f | g)", of_a_factor(3))])
def test_curvature_where_a_column_is_zero(formula: str, data: pd.DataFrame) -> None:
    """The Hessian that judges a singular fit has the exact one's curvature in the columns at 0."""
    m, exact = (gj.lmer(formula, data, control={"check_singular": "ignore", "exact": exact}) for exact in (False, True))
    zero = np.flatnonzero(exact.theta == 0.0)
    assert zero.size and np.array_equal(zero, np.flatnonzero(m.theta == 0.0))
    mine, right = (np.asarray(x._estimates.hessian)[np.ix_(zero, zero)] for x in (m, exact))
    assert_close(mine, right, atol=1e-3 * np.abs(right).max())


def test_starts_at_zero_are_moved() -> None:
    """The criterion is even in each column of the factor: at 0 its gradient vanishes, minimum or not."""
    data = of_a_factor(2)
    data["count"] = np.random.default_rng(2).poisson(np.exp(0.5 * data["y"]))
    for formula, size in (("y ~ f + (1 | g)", 1), ("y ~ f + (f | g)", 6)):
        fits = [gj.lmer(formula, data, start=s, control={"check_singular": "ignore"}) for s in (None, [0.0] * size)]
        assert_close(fits[1].objective, fits[0].objective, atol=1e-8)
    start = {"theta": [0.0]}
    fits = [gj.glmer("count ~ f + (1 | g)", data, "poisson", start=s) for s in (None, start)]
    assert fits[0].theta[0] > 0.1
    assert_close(fits[1].theta, fits[0].theta, atol=1e-5)
    design = gj.design("count ~ f + (1 | g)", data)
    assert_close(gj.fit_design(design, "poisson", start=start).theta, fits[0].theta, atol=1e-5)


def test_singular_fits() -> None:
    data = load_data("Dyestuff2")
    with pytest.warns(gj.ConvergenceWarning, match="singular"):
        m = gj.lmer("Yield ~ 1 + (1 | Batch)", data)
    assert m.theta[0] == 0.0 and m.is_singular and m.converged
    # a correlation of 1: criterion at the boundary against a fine search along it
    rng = np.random.default_rng(4)
    g = np.repeat(np.arange(12), 5)
    x = np.tile(np.arange(5.0), 12)
    u = rng.normal(size=12)
    frame = pd.DataFrame({"y": u[g] + 0.7 * u[g] * x + rng.normal(size=60), "x": x, "g": g})
    with pytest.warns(gj.ConvergenceWarning, match="singular"):
        m = gj.lmer("y ~ x + (x | g)", frame)
    assert m.converged and abs(m.VarCorr()[0].corr[1, 0]) == pytest.approx(1.0, abs=1e-6)
    bfgs = gj.lmer("y ~ x + (x | g)", frame, control={"optimizer": "bfgs", "check_singular": "ignore"})
    assert m.objective <= bfgs.objective + 1e-8
    assert "the fit is singular" in str(m.summary())


def test_refit_and_criteria(sleep: gj.MixedModel) -> None:
    ml = sleep.refit_ml()
    assert ml.objective == pytest.approx(reference_model("sleep_ml")["results"]["minus2logLik"], rel=1e-10)
    assert not ml.REML and ml.refit_ml() is ml and "maximum likelihood" in str(ml.summary())
    same = gj.glmer(SLEEP, load_data("sleepstudy"), family="gaussian")
    assert same.objective == pytest.approx(ml.objective, abs=1e-10) and not same.REML and same.is_linear
    assert gj.glmer(SLEEP, load_data("sleepstudy"), family=gj.families.Gaussian(), nAGQ=0).objective == same.objective
    again = ml.refit(load_data("sleepstudy")["Reaction"] * 2.0 + 3.0)
    assert_close(again.theta, ml.theta, atol=1e-8, what="theta")
    assert_close(again.beta, 2.0 * ml.beta + np.array([3.0, 0.0]), rtol=1e-9, what="beta")
    smaller = sleep.update(". ~ . - Days")
    assert smaller.REML and list(smaller.fixef.index) == ["(Intercept)"]
    assert sleep.update(". ~ .", REML=False).objective == pytest.approx(ml.objective, abs=1e-9)
    assert sleep.deviance_function()(sleep.theta) == pytest.approx(sleep.objective, abs=1e-9)


def test_summary(sleep: gj.MixedModel) -> None:
    text = str(sleep.summary())
    assert text.startswith("Linear mixed model fit by REML\nFormula: Reaction ~ Days + (Days | Subject)")
    assert "REML criterion at convergence: 1743.6" in text
    assert " Residual               654.94   25.592" in text
    assert "t value" in text and "Pr(>" not in text
    html = sleep._repr_html_()
    assert "REML criterion" in html and "Residual" in html
    frame = sleep.VarCorr().to_frame()
    assert frame["grp"].tolist() == ["Subject"] * 3 + ["Residual"]
    assert frame["sdcor"].iloc[-1] == sleep.sigma
    tidy = sleep.tidy(ddf=None)
    assert tidy["term"].iloc[-1] == "sd__Observation" and tidy["p_value"].isna().all()
    assert sleep.hatvalues().between(0.0, 1.0).all()
    assert (sleep.tvalues == sleep.zvalues).all()
    none = gj.lmer("Reaction ~ 0 + (1 | Subject)", load_data("sleepstudy"))
    assert "(none)" in str(none.summary()) and none.df == 2


def test_bad_input() -> None:
    data = load_data("sleepstudy").assign(row=range(180), k=3.0, fits=lambda d: 2.0 * d["Days"] + 1.0)
    cases: list[tuple[type[Exception], str, Any]] = [
        (gj.DataError, "'row' has 180 levels for 180 rows", lambda: gj.lmer("Reaction ~ Days + (1 | row)", data)),
        (gj.DataError, "'k' is constant", lambda: gj.lmer("k ~ Days + (1 | Subject)", data)),
        (gj.DataError, "fits is fitted exactly", lambda: gj.lmer("fits ~ Days + (1 | Subject)", data)),
        (
            gj.DataError,
            "180 random effects for 178 rows",
            lambda: gj.lmer("Reaction ~ 1 + (factor(Days) | Subject)", data.head(178)),
        ),
        (gj.DataError, "use glmer", lambda: gj.lmer("cbind(Days, Days) ~ 1 + (1 | Subject)", data)),
        (gj.DataError, "fixed effects for", lambda: gj.lmer("Reaction ~ factor(row) + (1 | Subject)", data)),
        (TypeError, "did you mean 'REML'", lambda: gj.lmer(SLEEP, data, REM=True)),
        (TypeError, "use glmer for other families", lambda: gj.lmer(SLEEP, data, family="poisson")),
        (ValueError, "REML must be True or False", lambda: gj.lmer(SLEEP, data, REML="yes")),
        (TypeError, "start has no argument 'beta'", lambda: gj.lmer(SLEEP, data, start={"beta": [1.0, 2.0]})),
        (ValueError, "identity link", lambda: gj.glmer(SLEEP, data, family="gaussian(log)")),
        (TypeError, "lmer has it", lambda: gj.glmer("Reaction ~ 1 + (1 | Subject)", data, family="poisson", REML=True)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
            call()


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert _cli.main(["fit", SLEEP, "sleepstudy", "--family", "gaussian"]) == 0
    assert "REML criterion at convergence: 1743.6" in capsys.readouterr().out
    assert _cli.main(["fit", SLEEP, "sleepstudy", "--family", "gaussian", "--no-REML", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["objective"] == pytest.approx(1751.939344463, abs=1e-8)
    assert record["REML"] is False and record["fixef"][1]["p_value"] is None
    assert _cli.main(["fit", SLEEP, "sleepstudy", "--family", "poisson", "--REML"]) == 2
    assert "--family gaussian" in capsys.readouterr().err
