"""The outer problem: the minimiser itself, starts, singular fits, scale, other optimisers, limits and messages."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from helpers import DenseLaplace, assert_close, load_data

import glmmjax as gj
from glmmjax.fit import optimise as opt

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
CM = "use ~ age * ch + I(age^2) + urban + (urban | district)"


@cache
def cbpp_fit() -> gj.MixedModel:
    return gj.glmer(CBPP, load_data("cbpp"))


def fit_quietly(*args: Any, **kwargs: Any) -> tuple[gj.MixedModel, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = gj.glmer(*args, **kwargs)
    assert all(w.category is gj.ConvergenceWarning for w in caught)
    return model, [str(w.message) for w in caught]


# -------------------- the minimiser
def rosenbrock(x: Any, carry: Any) -> Any:
    def f(x: Any) -> Any:
        return 100.0 * (x[1] - x[0] ** 2) ** 2 + (1.0 - x[0]) ** 2

    value, gradient = jax.value_and_grad(f)(x)
    return value, gradient, carry + 1, jnp.ones((), jnp.int32), None


@jax.jit
def minimise_rosenbrock(x0: Any, limits: opt.Limits) -> opt.State:
    return opt.minimise(rosenbrock, x0, jnp.eye(2), jnp.zeros((), jnp.int32), limits, 100)


def test_minimise_rosenbrock() -> None:
    s = minimise_rosenbrock(jnp.array([-1.2, 1.0]), opt.Limits(1e-12, 200, True))
    assert int(s.status) == opt.CONVERGED
    assert_close(s.x, [1.0, 1.0], atol=1e-6)  # decrement 1e-12 with a smallest curvature of .4
    # differences of the exact gradient, step 1e-3 of a scale near 1
    assert_close(s.hessian, [[802.0, -400.0], [-400.0, 200.0]], rtol=1e-5)
    searched = int(s.search_evaluations)
    assert searched < 60 and int(s.evaluations) >= searched + 4  # the Hessian takes two per parameter
    path = np.asarray(s.path)[:searched]
    assert_close(path[0, :3], [-1.2, 1.0, 24.2], rtol=1e-14)
    assert np.isnan(np.asarray(s.path)[searched:]).all()
    assert path[:, 2].min() == pytest.approx(float(s.f), abs=1e-15)


@jax.jit
def minimise_narrow(width: Any) -> opt.State:
    """From a minimum at 0 the curvature falls from 2 / width^2 + .02 to .02 within `width`, skewly in the first."""

    def objective(x: Any, carry: Any) -> Any:
        def f(x: Any) -> Any:
            t = (x[0] + 0.3 * x[1]) / width
            return jnp.log1p(t**2 + t**3 / 4.0 + t**4 / 10.0) + 0.01 * (x @ x) + x[1] ** 2

        value, gradient = jax.value_and_grad(f)(x)
        return value, gradient, carry, jnp.ones((), jnp.int32), None

    # the metric is that of the outer part: its differences would span the narrow one
    metric = jnp.diag(jnp.array([50.0, 0.5]))
    return opt.minimise(objective, jnp.zeros(2), metric, jnp.zeros(()), opt.Limits(1e-12, 200, True), 100)


@pytest.mark.parametrize("width", [10.0, 0.1, 0.01])
def test_hessian_where_the_curvature_changes_fast(width: float) -> None:
    """Steps of 1e-3 of a rough standard error are shortened where the curvature changes within them."""
    s = minimise_narrow(width)
    narrow = 2.0 / width**2
    exact = np.array([[narrow + 0.02, 0.3 * narrow], [0.3 * narrow, 0.09 * narrow + 2.02]])
    assert_close(s.hessian, exact, rtol=1e-4)
    assert int(s.shorter) == (0 if width == 10.0 else 1)


def test_minimise_stops_at_its_limit() -> None:
    s = minimise_rosenbrock(jnp.array([-1.2, 1.0]), opt.Limits(1e-12, 5, False))
    assert int(s.status) == opt.EVALUATION_LIMIT and int(s.search_evaluations) == 5
    assert np.isnan(np.asarray(s.hessian)).all()


def test_minimise_says_that_the_start_is_not_finite() -> None:
    s = minimise_rosenbrock(jnp.array([np.nan, 1.0]), opt.Limits(1e-12, 50, True))
    assert int(s.status) == opt.NON_FINITE


def test_every_status_has_a_message() -> None:
    codes = {
        opt.CONVERGED,
        opt.EVALUATION_LIMIT,
        opt.LINE_SEARCH,
        opt.NON_FINITE,
        opt.NOT_MINIMUM,
        opt.EXACT,
        opt.IMPOSSIBLE,
        opt.COARSE,
    }
    assert set(opt.MESSAGES) == codes and len(codes) == 8


# -------------------- starts
@pytest.mark.parametrize("theta", [0.0, 1e-3, 5.0, -0.6])
def test_start_in_theta(theta: float) -> None:
    """theta = 0 is stationary (the deviance is even in theta), a maximum here: not a trap."""
    model = gj.glmer(CBPP, load_data("cbpp"), start={"theta": [theta]})
    assert model.converged and not model.is_singular
    # 1e-10 deviance units left are 1e-5 standard errors (of .18)
    assert model.theta[0] == pytest.approx(0.642261482, abs=3e-6)
    assert model.objective == pytest.approx(cbpp_fit().objective, abs=1e-9)


def test_start_at_zero_in_every_column() -> None:
    formula = "TICKS ~ YEAR + cHEIGHT + (1 | BROOD) + (1 | INDEX) + (1 | LOCATION)"
    model = gj.glmer(formula, load_data("grouseticks"), family="poisson", start={"theta": np.zeros(3)})
    assert model.objective == pytest.approx(1780.54266, abs=1e-5)
    assert_close(np.log(np.sort(model.theta)), [-0.6372940, -0.6133952, -0.2876378], atol=1e-5)


def test_start_at_the_optimum_costs_next_to_nothing() -> None:
    best = cbpp_fit()
    again = gj.glmer(CBPP, load_data("cbpp"), start={"theta": best.theta, "fixef": best.beta})
    assert again.fit_stats.evaluations <= 2
    assert_close(again.theta, best.theta, atol=1e-6)
    assert_close(again.beta, best.beta, atol=1e-6)


def test_first_stage_does_not_matter() -> None:
    """nAGQ = 0 first and then Laplace from there: the same optimum (APX-16)."""
    first = gj.glmer(CBPP, load_data("cbpp"), nAGQ=0)
    second = gj.glmer(CBPP, load_data("cbpp"), start={"theta": first.theta, "beta": first.beta})
    assert second.objective == pytest.approx(cbpp_fit().objective, abs=1e-9)
    assert first.objective > second.objective + 0.05


# -------------------- optimisers
@pytest.mark.parametrize("name", ["newton", "cobyqa", "lbfgs"])
def test_optimisers_agree_on_cbpp(name: str) -> None:
    optimizer = optax.lbfgs() if name == "lbfgs" else name
    model = gj.glmer(CBPP, load_data("cbpp"), control=gj.Control(optimizer=optimizer))
    best = cbpp_fit()
    assert model.converged
    # OPT-2: 1e-6 in the deviance; a derivative-free search may stop anywhere inside that
    assert model.objective == pytest.approx(best.objective, abs=1e-6)
    assert_close(model.beta, best.beta, atol=1e-3 * best.bse.min())
    assert_close(model.bse, best.bse, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["newton", "lbfgs"])
def test_optimisers_agree_on_vector_effects(name: str) -> None:
    optimizer = optax.lbfgs() if name == "lbfgs" else name
    model = gj.glmer(CM, load_data("Contraception"), control={"optimizer": optimizer})
    assert model.converged
    assert model.objective == pytest.approx(2353.529955486, abs=1e-6)
    assert_close(model.theta, [0.6150566, -0.5751928, 0.4419240], atol=2e-5)


def test_exact_hessian() -> None:
    """Central differences of the exact gradient against the automatic Hessian."""
    exact = gj.glmer(CBPP, load_data("cbpp"), control=gj.Control(exact=True))
    # steps of 1e-3 standard errors: 3e-8 measured
    assert_close(cbpp_fit().vcov(full=True), exact.vcov(full=True), rtol=1e-6, atol=1e-9)
    vector = gj.glmer(CM, load_data("Contraception"), control=gj.Control(exact=True))
    plain = gj.glmer(CM, load_data("Contraception"))
    assert_close(plain.bse, vector.bse, rtol=1e-6)
    se = np.sqrt(np.diag(vector.vcov(full=True)))
    assert_close(np.sqrt(np.diag(plain.vcov(full=True))), se, rtol=1e-6)
    # glmmTMB's, whose Hessian differences its gradient (measured: 9e-5)
    names = ["(Intercept)", "age", "chY", "I(age^2)", "urbanY", "age:chY"]
    expected = [0.2240102, 0.0219472, 0.2090484, 0.00085122, 0.1634438, 0.0256182]
    assert_close(vector.bse[names], expected, rtol=1.5e-4)


# -------------------- scale and coding
@pytest.mark.parametrize("factor", [1e4, 1e-4])
def test_rescaled_predictor(factor: float) -> None:
    data = load_data("Contraception")
    plain = gj.glmer(CM, data)
    data["age"] = data["age"] * factor
    scaled = gj.glmer(CM, data)  # any warning is an error here
    assert scaled.objective == pytest.approx(plain.objective, abs=1e-7)
    powers = np.array([{"age": 1, "I(age^2)": 2, "age:chY": 1}.get(n, 0) for n in plain.fixef.index])
    assert_close(scaled.beta * factor**powers, plain.beta, atol=1e-5 * plain.bse.min())
    assert_close(scaled.bse * factor**powers, plain.bse, rtol=1e-5)
    assert_close(scaled.theta, plain.theta, atol=1e-5)


def test_rescaled_random_slope() -> None:
    data = load_data("Contraception")
    formula = "use ~ age + ch + urban + (age || district)"
    plain = gj.glmer(formula, data)
    assert not plain.is_singular
    data["age"] = data["age"] * 1e4
    # lme4's rule for "singular", a diagonal below 1e-4, is not free of scale
    scaled = gj.glmer(formula, data, control={"check_singular": "ignore"})
    assert scaled.objective == pytest.approx(plain.objective, abs=1e-7)
    assert_close(scaled.theta * [1.0, 1e4], plain.theta, atol=1e-5)
    assert scaled.theta[1] > 0.0


CODINGS = ["treatment", "sum", "helmert", "poly", "sas", "matrix"]


@pytest.mark.parametrize("coding", CODINGS)
def test_codings_of_a_factor(coding: str) -> None:
    own = np.array([[3.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, -2.0], [0.0, 5.0, 1.0]])
    contrasts = {"period": own if coding == "matrix" else coding}
    model = gj.glmer(CBPP, load_data("cbpp"), contrasts=contrasts)
    best = cbpp_fit()
    assert model.objective == pytest.approx(best.objective, abs=1e-9)
    assert_close(model.theta, best.theta, atol=1e-6)
    assert_close(model.fitted, best.fitted, atol=1e-6)
    assert (coding == "treatment") == bool(np.allclose(model.beta, best.beta, atol=1e-4))


def test_shifted_predictor() -> None:
    data = load_data("Contraception")
    plain = gj.glmer("use ~ age + urban + (1 | district)", data)
    data["age"] = data["age"] + 1000.0
    moved = gj.glmer("use ~ age + urban + (1 | district)", data)
    # the intercept is 1,000 slopes away: cancellation of 1e3 in X, 1e6 in X'X
    assert moved.objective == pytest.approx(plain.objective, abs=1e-7)
    assert moved.fixef["age"] == pytest.approx(plain.fixef["age"], abs=1e-5 * plain.bse["age"])


# -------------------- singular fits
def balanced() -> pd.DataFrame:
    """Every group has the same successes: less spread than chance, so the variance is 0."""
    y = np.tile([1.0, 0.0, 0.0, 1.0, 0.0], 12)
    x = np.tile([0.3, -1.0, 0.5, 1.2, -0.4], 12)
    return pd.DataFrame({"y": y, "x": x, "g": np.repeat([f"g{i}" for i in range(12)], 5)})


@pytest.mark.parametrize("nAGQ", [1, 0])
def test_zero_variance_is_exactly_zero(nAGQ: int) -> None:
    model, texts = fit_quietly("y ~ x + (1 | g)", balanced(), nAGQ=nAGQ)
    assert model.theta.tolist() == [0.0]
    assert model.converged and model.is_singular and model.singular_terms == ["(1 | g)"]
    assert len(texts) == 1 and "singular" in texts[0] and "g)" in texts[0] and "simpler" in texts[0]
    # then it is the logistic regression, found here by Newton steps on the dense deviance
    X, y, beta = np.stack([np.ones(60), balanced()["x"]], 1), balanced()["y"].to_numpy(), np.zeros(2)
    for _ in range(30):
        mu = 1.0 / (1.0 + np.exp(-X @ beta))
        beta = beta + np.linalg.solve(X.T @ ((mu * (1 - mu))[:, None] * X), X.T @ (y - mu))
    assert_close(model.beta, beta, atol=2e-5 * model.bse.min())  # 1e-10 deviance units left
    covariance = np.linalg.inv(X.T @ ((mu * (1 - mu))[:, None] * X))
    assert_close(model.bse, np.sqrt(np.diag(covariance)), rtol=1e-6)
    assert_close(model.ranef()["g"], np.zeros((12, 1)))
    assert "singular" in str(model.summary()) and "singular" in str(model)


def test_zero_variance_beside_a_positive_one() -> None:
    rng = np.random.default_rng(8)
    data = balanced()
    data = pd.concat([data.assign(h=f"h{j}", y=np.roll(data["y"], j)) for j in range(8)])
    shift = rng.normal(size=8)[data["h"].str[1:].astype(int)] * 1.5
    data["y"] = (rng.uniform(size=len(data)) < 1.0 / (1.0 + np.exp(-shift))).astype(float)
    data["g"] = np.tile([f"g{i}" for i in range(24)], len(data) // 24)
    model, texts = fit_quietly("y ~ 1 + (1 | h) + (1 | g)", data)
    dense = DenseLaplace(gj.design("y ~ 1 + (1 | h) + (1 | g)", data), "binomial", "logit")
    value = dense.deviance(model.theta, model.beta)
    assert value == pytest.approx(model.objective, rel=1e-12)
    if model.is_singular:
        assert 0.0 in model.theta and texts
    for factor in (0.98, 1.02):
        assert dense.deviance(model.theta * factor, model.beta) >= value - 1e-9


def slopes(seed: int = 3) -> pd.DataFrame:
    """Few observations per group and slopes that are twice the intercepts: correlation 1."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(25), 6)
    x = np.tile(np.linspace(-1.0, 1.0, 6), 25)
    u = rng.normal(size=25)[g]
    y = rng.binomial(4, 1.0 / (1.0 + np.exp(-(0.2 + u + 1.5 * u * x))))
    return pd.DataFrame({"y": y, "n": 4 - y, "x": x, "g": g.astype(str)})


def test_singular_correlation() -> None:
    model, texts = fit_quietly("cbind(y, n) ~ x + (x | g)", slopes())
    assert model.converged and model.is_singular and model.theta[2] == 0.0
    assert abs(model.VarCorr()[0].corr[0, 1]) == pytest.approx(1.0, abs=1e-12)
    assert len(texts) == 1 and "correlation" in texts[0] and "(x | g)" in texts[0]
    # a minimum of the dense deviance, in every direction of T and beta
    dense = DenseLaplace(gj.design("cbind(y, n) ~ x + (x | g)", slopes()), "binomial", "logit")
    value = dense.deviance(model.theta, model.beta)
    assert value == pytest.approx(model.objective, rel=1e-12)
    assert np.abs(dense.gradient(model.theta, model.beta)).max() < 1e-3
    rng = np.random.default_rng(0)
    for _ in range(30):
        step = 0.02 * rng.normal(size=5)
        assert dense.deviance(model.theta + step[:3], model.beta + step[3:]) > value - 1e-9
    assert np.linalg.eigvalsh(model._estimates.hessian).min() > -1e-6
    assert np.isfinite(model.bse).all()


# -------------------- limits and messages
def test_evaluation_limit_warns() -> None:
    model, texts = fit_quietly(CBPP, load_data("cbpp"), control=gj.Control(max_evaluations=2))
    assert not model.converged and model.fit_stats.evaluations <= 3
    [text] = [t for t in texts if "did not converge" in t]
    assert "max_evaluations" in text and "start values" not in text  # one remedy, the one that fits
    assert "NOT converged" in str(model.summary())


def test_check_grad_chooses_the_action() -> None:
    control = {"max_evaluations": 2, "check_grad": "ignore"}
    _, texts = fit_quietly(CBPP, load_data("cbpp"), control=control)
    assert texts == []
    with pytest.raises(RuntimeError, match="did not converge"):
        gj.glmer(CBPP, load_data("cbpp"), control={"max_evaluations": 2, "check_grad": "error"})


def test_check_singular_chooses_the_action() -> None:
    model, texts = fit_quietly("y ~ x + (1 | g)", balanced(), control={"check_singular": "ignore"})
    assert texts == [] and model.is_singular
    with pytest.raises(RuntimeError, match="singular"):
        gj.glmer("y ~ x + (1 | g)", balanced(), control={"check_singular": "error"})


def test_separation_is_named() -> None:
    """One level of f has successes only: its coefficient runs off."""
    rng = np.random.default_rng(5)
    n = 90
    f = np.array(["a", "b", "c"])[np.arange(n) % 3]
    y = np.where(f == "b", 1.0, rng.integers(0, 2, n))
    data = {"y": y, "f": f, "x": rng.normal(size=n), "g": (np.arange(n) % 9).astype(str)}
    model, texts = fit_quietly("y ~ x + f + (1 | g)", data, control={"check_singular": "ignore"})
    assert len(texts) == 1 and "level 'b' of f has successes only" in texts[0] and "of fb runs off" in texts[0], texts
    assert any("separated" in t for t in model.messages())
    assert "separated" in str(model.summary())


def test_complete_separation_is_named() -> None:
    rng = np.random.default_rng(5)
    n = 80
    x, g = rng.normal(size=n), np.arange(n) % 10
    data = {"y": (x > 0.1).astype(float), "x": x, "z": rng.normal(size=n), "g": g.astype(str)}
    model, texts = fit_quietly("y ~ x + z + (1 | g)", data)
    assert len(texts) == 1 and "separated" in texts[0] and " x" in texts[0], texts
    assert (model.pvalues == 1.0).all() and np.isinf(model.bse).all()
    assert 0.0 <= model.objective < 1e-6


def test_verbose_reports_every_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, float, np.ndarray]] = []
    model = gj.glmer(CBPP, load_data("cbpp"), verbose=lambda *args: seen.append(args))
    stats = model.fit_stats
    assert [s[0] for s in seen] == list(range(1, len(seen) + 1))
    assert len(seen) == stats.evaluations + stats.hessian_evaluations
    assert seen[-1][1] == pytest.approx(model.objective, abs=1e-9)
    assert_close(seen[-1][2], np.concatenate([model.theta, model.beta]), atol=1e-6)
    assert model.objective == pytest.approx(cbpp_fit().objective, abs=1e-10)
    assert capsys.readouterr().out == ""
    gj.glmer(CBPP, load_data("cbpp"), verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(seen) and "184.05256" in lines[-1]


def test_path_of_the_fit() -> None:
    model = cbpp_fit()
    path, stats = model.fit_stats.path, model.fit_stats
    assert path.shape == (stats.evaluations, 1 + 4 + 2)
    dense = DenseLaplace(gj.design(CBPP, load_data("cbpp")), "binomial", "logit")
    for row in path:  # theta, beta and the deviance there
        assert dense.deviance(row[:1], row[1:5]) == pytest.approx(row[5], rel=1e-11)
    assert path[-1, 5] == pytest.approx(model.objective, abs=1e-9)
    # one evaluation in PIRLS is at least one step
    assert stats.pirls_iterations >= stats.evaluations + stats.hessian_evaluations


# -------------------- the question on nAGQ 0 against 1
def gauss_newton(y: np.ndarray, X: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """The question's loop: beta by iterated weighted least squares with Z b held fixed as an offset."""
    beta = np.zeros(X.shape[1])
    for _ in range(100):
        mu = 1.0 / (1.0 + np.exp(-(X @ beta + fixed)))
        w = mu * (1.0 - mu)
        beta = np.linalg.solve(X.T @ (w[:, None] * X), X.T @ (w * (X @ beta) + y - mu))
    return beta


def test_toy_question() -> None:
    data = load_data("toy15")
    y, X = data["y"].to_numpy(float), np.stack([np.ones(15), data["x1"].to_numpy(float)], 1)
    fits = {k: gj.glmer("y ~ x1 + (1 | subject)", data, nAGQ=k) for k in (0, 1)}
    at = np.asarray(data["subject"].cat.codes)

    def modes(k: int) -> np.ndarray:
        return fits[k].ranef()["subject"].to_numpy()[at, 0]

    # FEATURES 2.1 item 7, tight: 9 printed digits; the optimum in beta is known to 1e-5 standard errors
    assert_close(fits[0].beta, [-2.268290052, 1.167080581], atol=2e-6)
    assert_close(fits[1].beta, [-2.621388632, 1.362637916], atol=2e-5)
    assert fits[0].theta[0] == pytest.approx(1.763828626, abs=2e-6)
    assert fits[1].theta[0] == pytest.approx(1.843756689, abs=2e-6)
    assert fits[0].objective == pytest.approx(13.767583403, abs=1e-8)
    assert fits[1].objective == pytest.approx(13.688990052, abs=1e-8)
    assert_close(fits[1].ranef()["subject"].to_numpy()[:, 0], [1.824779971, -1.536230554, -0.513975913], atol=1e-5)
    # 1: nAGQ = 0 is the loop at its own modes
    assert_close(gauss_newton(y, X, modes(0)), fits[0].beta, atol=1e-6)
    # 2: nAGQ = 1 is not: its modes give another beta
    other = gauss_newton(y, X, modes(1))
    assert_close(other, [-2.26618496, 1.20781342], atol=1e-4)  # the question's modes have 5 digits
    assert np.abs(other - fits[1].beta).min() > 0.1
    # 3: without random effects the loop is the logistic regression
    assert_close(gauss_newton(y, X, np.zeros(15)), [-1.82147345, 0.92711153], atol=3e-8)  # R's glm stops there
