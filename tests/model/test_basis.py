"""Random slopes far from 0 and in any unit: the fit is that of the covariate in standard units."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
from helpers import assert_close

import glmmjax as gj
from glmmjax.model.basis import scale_many, scale_traced, scale_z

SHIFTS = (2e3, 1e6)


def table(seed: int = 5, slope: float = 0.8) -> pd.DataFrame:
    """Two covariates in standard units, 15 groups of 20 rows; a gaussian, a binary and a count response."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(15), 20)
    x, w = rng.normal(size=(2, g.size))
    u = rng.normal(size=(15, 2)) @ np.array([[1.0, 0.4], [0.0, slope]])
    eta = 0.2 + 0.6 * x + 0.3 * w + u[g, 0] + u[g, 1] * x
    y = eta + rng.normal(size=g.size)
    b = (rng.random(g.size) < 1.0 / (1.0 + np.exp(-eta))) * 1
    return pd.DataFrame({"x": x, "w": w, "g": g, "y": y, "b": b, "n": rng.poisson(np.exp(0.3 * eta))})


def quietly(fit: Any, *args: Any, **settings: Any) -> tuple[gj.MixedModel, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = fit(*args, **settings)
    return model, [str(w.message) for w in said]


def same_model(
    fit: Any, formula: str, data: pd.DataFrame, moved: dict[str, tuple[float, float]], **settings: Any
) -> None:
    """The fit with columns x -> a + b x, {x: (a, b)}: deviance, slopes, their standard errors, messages, u."""
    one, first = quietly(fit, formula, data, **settings)
    other = data.assign(**{name: a + b * data[name] for name, (a, b) in moved.items()})
    two, second = quietly(fit, formula, other, **settings)
    # by REML the determinant of X'X has the units of X in it
    units = 2.0 * sum(np.log(b) for name, (_, b) in moved.items() if settings.get("REML", fit is gj.lmer))
    assert_close(two.objective - units, one.objective, atol=1e-6, what="objective")
    assert (two.converged, two.is_singular, second) == (one.converged, one.is_singular, first)
    for name, (_, b) in moved.items():
        error = one.bse[name]
        assert_close(b * two.bse[name], error, rtol=2e-5, what=f"standard error of {name}")
        assert_close(b * two.fixef[name], one.fixef[name], atol=1e-5 * error, what=name)
    assert_close(two.fitted, one.fitted, rtol=1e-5, atol=1e-6, what="fitted")


@pytest.mark.parametrize("shift", SHIFTS)
def test_linear(shift: float) -> None:
    same_model(gj.lmer, "y ~ x + (x | g)", table(), {"x": (shift, 1.0)})
    same_model(gj.lmer, "y ~ x + (x | g)", table(), {"x": (1e-3 * shift, 1e-3)}, REML=False)


@pytest.mark.parametrize("nAGQ", [0, 1])
def test_generalised(nAGQ: int) -> None:
    for shift in SHIFTS:
        same_model(gj.glmer, "b ~ x + (x | g)", table(), {"x": (shift, 1.0)}, nAGQ=nAGQ)
    same_model(gj.glmer, "b ~ x + (x | g)", table(), {"x": (-5e7, 1e4)}, nAGQ=nAGQ)


def test_quadrature() -> None:
    """A product rule has directions, those of the factor T: what differs is its error, which is small at 15 nodes."""
    data = table()
    one, two = (gj.glmer("b ~ x + (x | g)", d, nAGQ=15) for d in (data, data.assign(x=data.x + 1e6)))
    assert two.converged and not two.is_singular
    assert_close(two.objective, one.objective, atol=1e-5)
    assert_close(two.bse["x"], one.bse["x"], rtol=1e-4)


def test_two_covariates() -> None:
    data = table()
    same_model(gj.lmer, "y ~ x + w + (x + w | g)", data, {"x": (3e4, 1.0), "w": (-200.0, 0.01)})
    same_model(gj.glmer, "n ~ x + w + (x + w | g)", data, {"x": (3e4, 1.0), "w": (-200.0, 0.01)}, family="poisson")


@pytest.mark.parametrize("fit", [gj.lmer, gj.glmer])
def test_singular(fit: Any) -> None:
    """No slope varies: the correlation is estimated at its bound, and it is said in the same words."""
    data = table(seed=3, slope=0.0)
    for shift in SHIFTS:
        same_model(fit, f"{'y' if fit is gj.lmer else 'b'} ~ x + (x | g)", data, {"x": (shift, 1.0)})


def test_units_alone_make_nothing_singular() -> None:
    data = table()
    for formula in ("y ~ x + (x | g)", "y ~ x + (0 + x | g)", "y ~ x + (x || g)"):
        for unit in (1e-7, 1e7):
            same_model(gj.lmer, formula, data, {"x": (0.0, unit)})


def test_covariances_are_those_of_the_shifted_model() -> None:
    """b0 + b1 x = (b0 - b1 c) + b1 (x + c)."""
    data, shift = table(), 1e4
    one, two = gj.lmer("y ~ x + (x | g)", data), gj.lmer("y ~ x + (x | g)", data.assign(x=data.x + shift))
    M = np.array([[1.0, -shift], [0.0, 1.0]])
    assert_close(two.VarCorr()[0].cov, M @ one.VarCorr()[0].cov @ M.T, rtol=1e-6)
    assert_close(two.ranef()["g"].to_numpy(), one.ranef()["g"].to_numpy() @ M.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fit", [gj.lmer, gj.glmer])
def test_what_follows_from_the_curvature(fit: Any) -> None:
    """Profiles, sandwich and first-order deletions of the slope, and leverages, 1e5 standard deviations from 0."""
    data, formula = table(), f"{'y' if fit is gj.lmer else 'b'} ~ x + (x | g)"
    one, two = fit(formula, data), fit(formula, data.assign(x=data.x + 1e5))
    assert_close(two.hatvalues(), one.hatvalues(), rtol=1e-5)
    robust = [m.vcov(type="robust").loc["x", "x"] for m in (one, two)]
    assert_close(robust[1], robust[0], rtol=1e-5)
    cook = [m.influence("g").cooks_distance() for m in (one, two)]
    assert_close(cook[1], cook[0], rtol=1e-4)
    if fit is gj.lmer:
        rows = ["sd_x|g", "sigma", "x"]
        ends = [m.confint("profile", which=["x"]).loc[rows] for m in (one, two)]
        assert_close(ends[1], ends[0], rtol=1e-5)


def test_fixed_effects_far_from_zero() -> None:
    """The same with a random intercept alone, where X is far from 0 and z is not."""
    data = table()
    for shift in (1e4, 1e6):
        same_model(gj.glmer, "b ~ x + (1 | g)", data, {"x": (shift, 1.0)}, nAGQ=0)
    one, two = (gj.lmer("y ~ x + (1 | g)", d) for d in (data, data.assign(x=data.x + 1e5)))
    robust = [m.vcov(type="robust").loc["x", "x"] for m in (one, two)]
    assert_close(robust[1], robust[0], rtol=1e-5)


def test_many() -> None:
    """Datasets far from 0 beside others: each like its own fit."""
    parts = [table(seed) for seed in (1, 2, 3, 4)]
    moved = [part.assign(x=part.x + c) for part, c in zip(parts, (0.0, 1e4, 1e6, -30.0), strict=True)]

    def fitted(tables: list[pd.DataFrame], formula: str, family: str) -> gj.ManyFits:
        return gj.fit_many(formula, pd.concat([t.assign(d=i) for i, t in enumerate(tables)]), family, by="d")

    for formula, family in (("y ~ x + (x | g)", "gaussian"), ("b ~ x + (x | g)", "binomial")):
        one, two = fitted(parts, formula, family), fitted(moved, formula, family)
        assert (two.fits["status"] == "converged").all()
        assert_close(two.fits["logLik"], one.fits["logLik"], atol=1e-6, what="logLik")
        assert two.fits["singular"].tolist() == one.fits["singular"].tolist()
        errors = [f.frame.loc[f.frame["term"] == "x", "std_error"].to_numpy() for f in (one, two)]
        assert_close(errors[1], errors[0], rtol=2e-5, what="standard errors")


@pytest.mark.parametrize("family", ["gaussian", "binomial"])
def test_as_a_differentiable_layer(family: str) -> None:
    data, shift = table(), 1e5

    def fitted(x: Any) -> gj.DesignFit:
        ones = jax.numpy.ones_like(x)
        y = data["y"].to_numpy() if family == "gaussian" else data["b"].to_numpy(float)
        design = gj.design_arrays(y, np.ones((y.size, 2)), [(np.ones((y.size, 2)), data["g"].to_numpy())])
        columns = jax.numpy.column_stack([ones, x])
        return gj.fit_design(replace(design, X=columns, z=(columns,)), family, covariance=True)

    x = data["x"].to_numpy()
    one, two = fitted(x), fitted(x + shift)
    assert int(two.status) == 0
    assert_close(two.objective, one.objective, atol=1e-6)
    assert_close(two.vcov[1, 1], one.vcov[1, 1], rtol=1e-5)
    slopes = [jax.grad(lambda v: fitted(v).beta[1])(v) for v in (x, x + shift)]
    assert_close(slopes[1], slopes[0], rtol=1e-4, atol=1e-6)


# -------------------- the change of basis itself
def design_of(z: np.ndarray, *more: np.ndarray) -> gj.Design:
    level = np.arange(z.shape[0]) % 7
    return gj.design_arrays(np.zeros(z.shape[0]), np.ones((z.shape[0], 1)), [(c, level) for c in (z, *more)])


def columns(shift: float, n: int = 60) -> np.ndarray:
    x, w = np.random.default_rng(2).normal(size=(2, n))
    return np.column_stack([np.ones(n), x + shift, w, (x + shift) * w])


def test_ordinary_columns_get_units_only() -> None:
    z = columns(0.5)
    scaled, basis = scale_z(design_of(z))
    assert basis.diagonal
    assert_close(np.diag(basis.L[0]), np.sqrt(np.square(z).mean(axis=0)), rtol=1e-14)
    assert_close(scaled.z[0] * np.diag(basis.L[0]), z, rtol=1e-14)


def test_far_columns_get_an_orthonormal_basis() -> None:
    z = columns(1e5)
    design = design_of(z, 3.0 * np.ones(60))  # a second term on the same factor keeps its own column
    scaled, basis = scale_z(design)
    assert not basis.diagonal
    L, zs = basis.L[0], scaled.z[0]
    assert_close(zs[:, :4].T @ zs[:, :4] / 60, np.eye(4), atol=1e-5)  # 1e-16 times 1e10
    assert_close(zs @ L, np.column_stack([z, 3.0 * np.ones(60)]), rtol=1e-14)
    theta = np.random.default_rng(3).normal(size=design.n_theta)
    term = design.terms[0].structure
    inner = term.host_factor(basis.inner(theta)[:10])
    assert_close(inner, L[:4, :4] @ term.host_factor(theta[:10]), rtol=1e-13)
    assert_close(basis.inner(theta)[10], 3.0 * theta[10], rtol=1e-14)
    assert_close(basis.outer(basis.inner(theta)), theta, rtol=1e-4, atol=1e-4)
    zero = theta * (np.arange(11) >= 4)  # a column of zeros stays one exactly
    assert (basis.inner(zero)[:4] == 0.0).all() and (basis.outer(zero)[:4] == 0.0).all()


def test_dependent_columns_are_left_alone() -> None:
    z = columns(1e3)[:, :2]
    doubled = np.column_stack([z, 2.0 * z[:, 1]])
    for design in (design_of(doubled), design_of(z[:1])):
        scaled, basis = scale_z(design)
        assert basis.diagonal and np.isfinite(scaled.z[0]).all()


def test_all_three_find_the_same_basis() -> None:
    z = columns(1e4)
    design = design_of(z)
    single, basis = scale_z(design)
    together, many = scale_many(replace(design, z=(np.stack([columns(0.0), z]),)))
    traced, in_graph = scale_traced(replace(design, z=(jax.numpy.asarray(z),)))
    assert np.count_nonzero(many.C[0] - np.diag(np.diag(many.C[0]))) == 0
    for found in (many.C[1], np.asarray(in_graph.C)):
        assert_close(found, basis.C, rtol=1e-6, atol=1e-6)
    for found in (many.inverse[1], np.asarray(in_graph.inverse)):
        assert_close(found, basis.inverse, rtol=1e-6, atol=1e-6)
    for found in (together.z[0][1], np.asarray(traced.z[0])):
        assert_close(found, single.z[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["gaussian", "poisson"])
def test_independent_effects_that_cancel(family: str) -> None:
    """Slopes in z far from 0 as a difference of two large effects: the optimum that a start near the truth leads to."""
    rng = np.random.default_rng(5)
    g = np.repeat(np.arange(16), 16)
    z = 60.0 + 0.6 * rng.normal(size=g.size)
    eta = 1.0 + rng.normal(size=16)[g] * (z - 60.0)
    y = eta + 0.3 * rng.normal(size=g.size) if family == "gaussian" else rng.poisson(np.exp(eta))
    data = {"y": y, "z": z, "g": g}
    sigma = 0.3 if family == "gaussian" else 1.0
    near = {"theta": [60.0 / sigma, 1.0 / sigma]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        formula = "y ~ 1 + (1 | g) + (0 + z | g)"
        fits = [gj.glmer(formula, data, family, start=start) for start in (None, near)]
        several = pd.concat([pd.DataFrame(data).assign(d=d) for d in "ab"])
        many = gj.fit_many(formula, several, family, by="d", REML=False)
    assert fits[0].loglik == pytest.approx(fits[1].loglik, abs=1e-6)
    assert fits[0].converged
    np.testing.assert_allclose(many.fits["logLik"], fits[1].loglik, rtol=0.0, atol=1e-6)
