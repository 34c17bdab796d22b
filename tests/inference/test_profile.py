"""Profile likelihoods against lme4's and against constrained fits by another optimiser."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from helpers import assert_close, inference, load_data
from scipy import optimize, stats

import glmmjax as gj
from glmmjax.inference.likelihood import Likelihood
from glmmjax.results import NotSupportedError

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"


@cache
def fit(name: str) -> gj.MixedModel:
    record = inference(f"profile_{name}")
    data = load_data(record["dataset"])
    if name.startswith("sleep"):
        return gj.lmer(record["formula"], data, REML=False)
    return gj.glmer(record["formula"], data)


@pytest.mark.parametrize("name", ["cbpp", "contra_cm3", "sleep", "sleep_int"])
def test_intervals_of_lme4(name: str) -> None:
    record = inference(f"profile_{name}")
    made = fit(name).profile()
    for level in ("95", "90"):
        reference = record[f"profile_ci_{level}"]
        ours = made.confint(float(level) / 100.0)
        assert list(ours.index) == reference["rows"] and list(ours.columns) == reference["columns"]
        values = np.array(reference["values"])
        # lme4 interpolates between its points: for small coefficients that shows relative to their intervals
        assert_close(ours, values, atol=5e-4, what=level)
        width = values[:, 1] - values[:, 0]
        assert np.abs((ours.to_numpy() - values) / width[:, None]).max() < 2e-3


@pytest.mark.parametrize("name", ["cbpp", "sleep_int"])
def test_points_of_lme4(name: str) -> None:
    """The signed root at lme4's own points, by our spline."""
    record = inference(f"profile_{name}")
    made = fit(name).profile()
    for parameter, points in record["profile_points"].items():
        focal, zeta = np.array(points["focal"]), np.array(points["zeta"])
        ours = made.zeta(parameter, focal)
        inside = np.isfinite(ours) & (np.abs(zeta) < 2.5)
        assert inside.sum() >= 4
        assert_close(ours[inside], zeta[inside], atol=2e-2, what=parameter)  # a spline between points 0.5 apart
        back = made.value(parameter, ours[inside])
        assert_close(back, focal[inside], rtol=2e-2, atol=2e-3, what=parameter)


def test_curvature_that_changes_within_a_step() -> None:
    """log(1 + (x / w)^2) + (x + z)^2 at x = w / 3, for widths from a thousand steps to four."""
    likelihood = object.__new__(Likelihood)
    likelihood.root = np.eye(2)
    for width in (1.0, 1e-2, 4e-3):

        def evaluate(x: np.ndarray, w: float = width) -> tuple[np.ndarray, np.ndarray]:
            both = 2.0 * x.sum(axis=1)
            return both, np.stack([2.0 * x[:, 0] / (w**2 + x[:, 0] ** 2) + both, both], axis=1)

        kind = type("Made", (Likelihood,), {"__call__": lambda self, x: evaluate(x)})  # noqa: B023
        likelihood.__class__ = kind
        at = width / 3.0
        second = 2.0 * (width**2 - at**2) / (width**2 + at**2) ** 2
        expected = np.array([[second + 2.0, 2.0], [2.0, 2.0]])
        for x in (np.array([[at, 0.0]]), np.array([[at, 0.0], [50.0, 1.0], [-at, 3.0]])):
            assert_close(likelihood.hessian(x)[0], expected, rtol=2e-5, what=str(width))


def constrained(model: gj.MixedModel, fixed: int, value: float) -> float:
    """The lowest deviance with parameter number `fixed` of (theta, beta, log sigma) held, by L-BFGS-B in SciPy."""
    likelihood = Likelihood(model)
    x, scale = likelihood.x.copy(), np.diag(likelihood.root)
    x[fixed] = value
    free = np.delete(np.arange(x.size), fixed)

    def objective(v: np.ndarray) -> tuple[float, np.ndarray]:
        at = x.copy()
        at[free] = x[free] + scale[free] * v
        f, g = likelihood(at[None])
        return float(f[0]), g[0][free] * scale[free]

    out = optimize.minimize(
        objective, np.zeros(free.size), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}
    )
    return float(out.fun)


@pytest.mark.parametrize("name", ["cbpp", "sleep_int"])
def test_ends_rise_by_the_quantile(name: str) -> None:
    model = fit(name)
    ends = model.confint("profile")
    quantile = stats.chi2.ppf(0.95, 1)
    sigma_scaled = model.is_linear
    for j, coefficient in enumerate(model.fixef.index):
        for end in ends.loc[coefficient]:
            rise = constrained(model, model.theta.size + j, float(end)) - model.objective
            assert rise == pytest.approx(quantile, abs=1e-6)
    if not sigma_scaled:
        for end in ends.iloc[0]:
            assert constrained(model, 0, float(end)) - model.objective == pytest.approx(quantile, abs=1e-6)


def test_points_are_minima() -> None:
    """Every point of the frame: deviance as said, and no direction in which it falls at a fixed focal value."""
    model = fit("cbpp")
    frame = model.profile(limit=2.0).frame
    assert_close(frame[".deviance"], model.objective + frame[".zeta"] ** 2, atol=1e-8)
    own = frame[frame[".par"] == "period3"]
    for _, row in own.iterrows():
        best = constrained(model, model.theta.size + 2, float(row[".focal"]))
        assert row[".deviance"] == pytest.approx(best, abs=1e-7)
    assert (own[".focal"] == own["period3"]).all() and own[".zeta"].is_monotonic_increasing


@pytest.mark.parametrize("name", ["cbpp", "contra_cm3", "sleep"])
def test_ends_without_a_profile(name: str) -> None:
    model = fit(name)
    assert_close(model.confint("uniroot"), model.confint("profile"), rtol=1e-6, atol=1e-7)


def test_reuse_and_evaluations() -> None:
    model = fit("cbpp")
    made = model.profile()
    # 5 parameters, 2 sides, 6 points: Hessians by 2 x 5 gradients and a few corrections each
    assert made.evaluations < 1200
    before = made._tracer.likelihood.evaluations
    ends = model.confint("profile", profile=made)
    assert made._tracer.likelihood.evaluations - before < 200
    assert_close(ends, model.confint("profile"), rtol=1e-7)
    assert_close(made.estimates, [model.theta[0], *model.beta], atol=1e-6)
    with pytest.raises(ValueError, match="level 0.999 needs 3.29"):
        made.confint(0.999)
    text = str(made)
    assert "Profiles of 5 quantities" in text and "sd_(Intercept)|herd" in text and "<table" in made._repr_html_()


def test_names_and_functions() -> None:
    model = fit("cbpp")
    assert list(model.profile("theta_", limit=2.0).names) == ["sd_(Intercept)|herd"]
    assert list(model.profile(["period2", "(Intercept)"], limit=2.0).names) == ["period2", "(Intercept)"]
    whole = model.confint("profile")

    def icc(q: Any) -> Any:
        return q.cov[0][0, 0] / (q.cov[0][0, 0] + jnp.pi**2 / 3.0)

    made = model.profile({"icc": icc, "odds ratio": lambda q: jnp.exp(q.beta[1])})
    ends = made.confint()
    variance = whole.loc["sd_(Intercept)|herd"].to_numpy() ** 2
    # profiles are invariant under a change of scale
    assert_close(ends.loc["icc"], variance / (variance + np.pi**2 / 3.0), rtol=1e-6)
    assert_close(ends.loc["odds ratio"], np.exp(whole.loc["period2"]), rtol=1e-6)
    # a function of several parameters: a predicted probability, against a constrained search by SciPy
    made = model.profile({"eta": lambda q: q.beta[0] + q.beta[3]})
    upper = made.confint().iloc[0, 1]
    moved = gj.glmer(
        "cbind(incidence, size - incidence) ~ p4 + p2 + p3 + (1 | herd) - 1 + p1",
        load_data("cbpp").assign(
            **{f"p{i}": lambda d, i=i: (d["period"] == str(i)).astype(float) for i in range(1, 5)}
        ),
    )
    assert upper == pytest.approx(moved.confint("profile").loc["p4"].iloc[1], abs=1e-6)


def test_boundaries() -> None:
    data = load_data("cbpp").assign(obs=np.arange(56))
    model = gj.glmer(CBPP + " + (1 | obs)", data)
    made = model.profile("theta_")
    ends = made.confint()
    assert ends.loc["sd_(Intercept)|herd"].iloc[0] == 0.0 and ends.loc["sd_(Intercept)|herd"].iloc[1] > 0.5
    own = made.frame[made.frame[".par"] == "sd_(Intercept)|herd"]
    lowest = own.iloc[0]
    # at the boundary the deviance is that of the model without the term
    without = gj.glmer("cbind(incidence, size - incidence) ~ period + (1 | obs)", data)
    assert abs(lowest[".focal"]) < 1e-12 and lowest[".deviance"] == pytest.approx(without.objective, abs=1e-7)
    assert lowest[".zeta"] == pytest.approx(-np.sqrt(without.objective - model.objective), abs=1e-6)


def test_singular_fits() -> None:
    with pytest.warns(gj.ConvergenceWarning, match="singular"):
        model = gj.lmer("Yield ~ 1 + (1 | Batch)", load_data("Dyestuff2"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gj.ConvergenceWarning)
        ends = model.confint("profile")
    assert ends.iloc[0, 0] == 0.0 and 1.5 < ends.iloc[0, 1] < 3.0
    rng = np.random.default_rng(4)
    g, x = np.repeat(np.arange(12), 5), np.tile(np.arange(5.0), 12)
    u = rng.normal(size=12)
    frame = pd.DataFrame({"y": u[g] + 0.7 * u[g] * x + rng.normal(size=60), "x": x, "g": g})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gj.ConvergenceWarning)
        model = gj.lmer("y ~ x + (x | g)", frame, REML=False)
    ends = model.confint("profile")
    assert ends.loc["cor_x.(Intercept)|g"].iloc[1] == 1.0 and 0.0 < ends.loc["cor_x.(Intercept)|g"].iloc[0] < 1.0
    assert np.isfinite(ends.to_numpy()).all()


def test_refusals() -> None:
    model = fit("cbpp")
    with pytest.raises(ValueError, match="no parameter 'perod2' to profile; there are: .*period2"):
        model.profile("perod2")
    with pytest.raises(ValueError, match="limit must be positive"):
        model.profile(limit=0.0)
    with pytest.raises(ValueError, match="confint method 'exact'"):
        model.confint("exact")
    with pytest.raises(NotSupportedError, match="nAGQ = 0"):
        gj.glmer(CBPP, load_data("cbpp"), nAGQ=0).profile()
    with pytest.raises(ValueError, match="no profile of 'x'"):
        model.profile("period2", limit=2.0).zeta("x", 0.0)
