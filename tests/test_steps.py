"""The steps of a fit, one by one, with another optimiser and at points that are no optimum."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from counting import counted
from helpers import assert_close, fd_gradient, load_data
from scipy.optimize import minimize

import glmmjax as gj

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
SLEEP = "Reaction ~ Days + (Days | Subject)"
#: searches go on until the deviance falls no more, so that the points agree and not the deviances alone
TIGHT = {"tol": 1e-15}


@cache
def deviance(name: str) -> gj.DevianceFunction:
    if name == "sleepstudy":
        return gj.deviance_function(gj.lmer_setup(SLEEP, load_data(name), control=TIGHT))
    return gj.deviance_function(gj.glmer_setup(CBPP, load_data(name), control=TIGHT))


@cache
def model(name: str) -> gj.MixedModel:
    if name == "sleepstudy":
        return gj.lmer(SLEEP, load_data(name), control=TIGHT)
    return gj.glmer(CBPP, load_data(name), control=TIGHT)


@pytest.mark.parametrize("name", ["sleepstudy", "cbpp"])
def test_scipy_as_optimiser(name: str) -> None:
    """SciPy's BFGS from its own start ends in the model of lmer and glmer."""
    f, own = deviance(name), model(name)
    found = minimize(f.value_and_grad, np.where(f.start > 0.5, 0.8, 0.1), jac=True, options={"gtol": 1e-9})
    m = gj.make_model(f, found.x)
    assert m.converged and m.fit_stats.decrement < 1e-12 and m.fit_stats.evaluations == 1
    assert m.objective == pytest.approx(own.objective, abs=1e-8)
    # both searches end where the deviance no longer falls in double precision, 1e-7 standard errors from the optimum
    errors = np.sqrt(np.diag(own.vcov(full=True)))
    assert_close(m.theta, own.theta, atol=1e-6 * errors[: m.theta.size].min(), what="theta")
    assert_close(m.fixef, own.fixef, atol=1e-6 * own.bse.min(), what="fixed effects")
    assert_close(m.sigma, own.sigma, rtol=1e-8, what="sigma")
    # glmer's Hessian is by differences, whose steps depend on the path
    assert_close(m.vcov(), own.vcov(), rtol=1e-6, what="covariance of fixed effects")
    assert_close(m.VarCorr().to_frame()["vcov"], own.VarCorr().to_frame()["vcov"], rtol=1e-6, what="VarCorr")
    assert_close(m.predict(), own.predict(), rtol=1e-7, what="predictions")
    assert str(m.summary()).split("Converged")[0] == str(own.summary()).split("Converged")[0]
    again = m.refit(m.getME("y"))
    assert again.objective == pytest.approx(own.objective, abs=1e-8)


@pytest.mark.parametrize("name", ["sleepstudy", "cbpp"])
def test_fits_are_the_composition_of_their_steps(name: str) -> None:
    f, own = deviance(name), model(name)
    with counted() as count:
        estimates = gj.optimise(f)
        m = gj.make_model(f, estimates)
    assert count.programs == 0
    assert estimates.converged and isinstance(estimates, gj.Estimates)
    assert np.array_equal(m.theta, own.theta) and np.array_equal(m.beta, own.beta)
    assert m.objective == own.objective and m.fit_stats.evaluations == own.fit_stats.evaluations


@pytest.mark.parametrize("name", ["sleepstudy", "cbpp"])
def test_a_deviance_function_is_pure_and_differentiable(name: str) -> None:
    f = deviance(name)
    x = f.start + 0.1
    value, slope = f.value_and_grad(x)
    assert_close(slope, fd_gradient(f, x), rtol=1e-6, atol=1e-5, what="gradient")
    assert_close(f.gradient(x), slope, what="gradient alone")
    if name == "sleepstudy":  # glmer's Hessian program is compiled and tested elsewhere
        assert_close(f.hessian(x), fd_gradient(f.gradient, x), rtol=1e-6, atol=1e-5, what="Hessian")
    f(f.start + 2.0)
    assert f(x) == value  # whatever was evaluated between
    design, point = f.setup.design, f.unpack(x)
    if name == "sleepstudy":
        outside = gj.lmm_deviance(point["theta"], design)
    else:
        outside = gj.laplace_deviance(point["theta"], point["beta"], design, f.setup.family)
    assert value == pytest.approx(float(outside), abs=1e-9)


def test_points_have_names() -> None:
    f = deviance("cbpp")
    assert f.names == ["herd.(Intercept)", "(Intercept)", "period2", "period3", "period4"]
    x = f.pack([0.5], [-1.0, -0.9, -1.1, -1.5])
    assert {k: v.tolist() for k, v in f.unpack(x).items()} == {"theta": [0.5], "beta": [-1.0, -0.9, -1.1, -1.5]}
    assert deviance("sleepstudy").names == ["Subject.(Intercept)", "Subject.Days.(Intercept)", "Subject.Days"]
    assert "linear, by REML; 180 rows, 3 covariance parameters, 2 fixed effects" in repr(deviance("sleepstudy"))
    assert "binomial (logit), nAGQ = 1; 56 rows" in repr(f.setup)
    with pytest.raises(ValueError, match="made of theta and beta, got theta"):
        f.pack([0.5])
    with pytest.raises(ValueError, match="made of theta, got theta and beta"):  # profiled out
        gj.make_model(deviance("sleepstudy"), {"theta": np.ones(3), "beta": [250.0, 10.0]})
    with pytest.raises(ValueError, match=r"has 5 numbers \(herd.*period4\), got shape \(3,\)"):
        f(np.zeros(3))
    with pytest.raises(ValueError, match=r"start\['beta'\] has 2 values, the model needs 4"):
        gj.make_model(f, {"theta": [0.5], "beta": [0.0, 0.0]})
    with pytest.raises(ValueError, match="not finite at this point"):
        gj.make_model(f, np.full(5, np.nan))


@pytest.mark.parametrize("name", ["sleepstudy", "cbpp"])
def test_a_point_that_is_no_optimum_says_so(name: str) -> None:
    f, own = deviance(name), model(name)
    x = f.start + 0.1
    with pytest.warns(gj.ConvergenceWarning, match="stopped at a point that is not a minimum"):
        m = gj.make_model(f, x)
    assert not m.converged and "NOT converged" in str(m.summary())
    assert m.objective == pytest.approx(f(x), abs=1e-9)
    parts = f.unpack(x)
    assert_close(m.theta, parts["theta"], rtol=1e-12, what="theta is taken as it is")
    if name == "cbpp":
        assert_close(m.beta, parts["beta"], rtol=1e-12, what="beta is taken as it is")
    # the promised decrease is that of a quadratic: right to a factor
    assert 0.2 < m.fit_stats.decrement / (m.objective - own.objective) < 5.0
    # from there a search finds the optimum
    assert gj.make_model(f, gj.optimise(f, start=x)).objective == pytest.approx(own.objective, abs=1e-8)


@pytest.mark.parametrize("name", ["sleepstudy", "cbpp"])
def test_no_variance_is_a_stationary_point_but_no_minimum(name: str) -> None:
    f = deviance(name)
    at = {**f.unpack(f.start), "theta": np.zeros(f.setup.design.n_theta)}
    if name == "cbpp":  # beta of the model without random effects
        at["beta"] = minimize(lambda b: f(f.pack([0.0], b)), at["beta"], options={"gtol": 1e-6}).x
    with pytest.warns(gj.ConvergenceWarning):
        m = gj.make_model(f, at)
    assert not m.converged and m.fit_stats.decrement < 1e-6 and (m.theta == 0.0).all()


def test_other_data_in_a_setup() -> None:
    """The design of a set-up can be replaced before its deviance is made."""
    f, y = deviance("sleepstudy"), load_data("sleepstudy")["Reaction"].to_numpy(float)
    shifted = replace(f.setup, design=replace(f.setup.design, y=np.log(y)))
    other = gj.deviance_function(shifted)
    m = gj.make_model(other, gj.optimise(other))
    assert m.objective == pytest.approx(gj.lmer("log(Reaction)" + SLEEP[8:], load_data("sleepstudy")).objective)


def test_dispersions_are_parameters_too() -> None:
    """A user's family with a free scale, with beta inside PIRLS: x is (theta, log scale)."""

    def logpdf(y: Any, eta: Any, aux: Any) -> Any:
        s = aux["scale"]
        return -0.5 * ((y - eta) / s) ** 2 - jnp.log(s) - 0.5 * jnp.log(2.0 * jnp.pi)

    family = gj.families.Custom(logpdf, link="identity", aux={"scale": 40.0})
    data = load_data("sleepstudy")
    f = gj.deviance_function(gj.glmer_setup("Reaction ~ Days + (1 | Subject)", data, family, nAGQ=0))
    assert f.names == ["Subject.(Intercept)", "log(scale)"]
    m = gj.make_model(f, gj.optimise(f, start={"theta": [30.0]}))
    linear = gj.lmer("Reaction ~ Days + (1 | Subject)", data, REML=False)
    # Laplace is exact here, and the modes do not depend on beta's place
    assert m.objective == pytest.approx(linear.objective, abs=1e-6)
    assert_close(m.phi["scale"], linear.sigma, rtol=1e-4, what="scale")
    assert_close(f.gradient(f.pack([30.0], phi=[35.0])), fd_gradient(f, f.pack([30.0], phi=[35.0])), rtol=1e-5)
    assert f(f.pack(m.theta, phi=m.phi)) == pytest.approx(m.objective, abs=1e-8)
