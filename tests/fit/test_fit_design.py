"""The fit as a differentiable function of its design: against glmer and lmer, and against differences of refits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, fd6, load_data

import glmmjax as gj
from glmmjax.objective import laplace

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
SLEEP = "Reaction ~ Days + (Days | Subject)"
#: tighter than the default, for differences of refits
TIGHT = 1e-15
LEAVES = ("y", "X", "weights", "offset", "z")


@cache
def cbpp() -> gj.Design:
    return gj.design(CBPP, load_data("cbpp"))


@cache
def sleep() -> gj.Design:
    return gj.design(SLEEP, load_data("sleepstudy"))


def fit_cbpp(design: gj.Design, **settings: Any) -> gj.DesignFit:
    return gj.fit_design(design, "binomial", **settings)


def fit_sleep(design: gj.Design, **settings: Any) -> gj.DesignFit:
    return gj.fit_design(design, "gaussian", **settings)


# -------------------- values
@pytest.mark.parametrize(
    ("linear", "settings"),
    [
        (False, {}),
        pytest.param(False, {"nAGQ": 0}, marks=pytest.mark.slow),
        pytest.param(False, {"nAGQ": 5}, marks=pytest.mark.slow),
        (True, {"REML": True}),
        pytest.param(True, {"REML": False}, marks=pytest.mark.slow),
    ],
    ids=["laplace", "nAGQ=0", "nAGQ=5", "reml", "ml"],
)
def test_estimates_of_the_host(linear: bool, settings: dict[str, Any]) -> None:
    if linear:
        m = gj.lmer(SLEEP, load_data("sleepstudy"), **settings)
        fit = gj.fit_design(sleep(), "gaussian", covariance=True, **settings)
    else:
        m = gj.glmer(CBPP, load_data("cbpp"), **settings)
        fit = fit_cbpp(cbpp(), covariance=True, **settings)
    assert int(fit.status) == 0 and fit.message == "converged"
    assert_close(fit.objective, m.objective, atol=1e-9)
    # either search ends within some 1e-7 standard errors of the optimum
    assert_close(fit.theta, m.theta, atol=1e-6)
    assert_close(fit.beta, m.beta, atol=1e-6)
    assert_close(fit.sigma, m.sigma, rtol=1e-7)
    assert_close(fit.vcov, m.vcov(), rtol=1e-6)
    assert_close(fit.b, np.concatenate([np.ravel(v) for v in m.ranef().values()]), atol=1e-5)
    assert_close(fit.eta, m.predict(type="link"), atol=1e-5)
    assert fit.phi.shape == (0,)


def test_start_and_limits() -> None:
    whole = fit_cbpp(cbpp(), covariance=True)
    again = fit_cbpp(cbpp(), covariance=True, start=whole)
    assert int(again.evaluations) < int(whole.evaluations)
    assert_close(again.beta, whole.beta, atol=1e-8)
    given = fit_cbpp(cbpp(), covariance=True, start={"theta": [0.0]})  # where the deviance is stationary
    assert_close(given.theta, whole.theta, atol=1e-8)
    short = fit_cbpp(cbpp(), covariance=True, max_evaluations=2)
    assert int(short.status) == 1 and "max_evaluations" in short.message
    assert jnp.isfinite(short.beta).all()


# -------------------- derivatives
def directions(design: gj.Design, scale: float) -> dict[str, np.ndarray]:
    """One tangent for each leaf; a proportion of 0 or 1 does not move."""
    rng = np.random.default_rng(5)
    n = design.n
    spread = design.y * (1.0 - design.y) if scale == 1.0 else scale
    return {
        "y": spread * rng.normal(size=n),
        "X": 0.1 * rng.normal(size=design.X.shape),
        "weights": 0.3 * rng.normal(size=n),
        "offset": scale * rng.normal(size=n),
        "z": 0.2 * rng.normal(size=design.z[0].shape),
    }


def leaves_of(design: gj.Design) -> dict[str, jax.Array]:
    return {name: jnp.asarray(design.z[0] if name == "z" else getattr(design, name)) for name in LEAVES}


def with_leaves(design: gj.Design, leaves: dict[str, Any]) -> gj.Design:
    changes = {**leaves, "z": (leaves["z"],)}
    return replace(design, **changes)


def numbers(fit: gj.DesignFit) -> jax.Array:
    """theta, beta and log sigma first, as `sensitivity` has them."""
    parts = [fit.theta, fit.beta, jnp.log(fit.sigma)[None], fit.objective[None], fit.b[:4], fit.eta[:2]]
    return jnp.concatenate(parts)


def estimates(design: gj.Design, leaves: dict[str, Any]) -> jax.Array:
    linear = design.n == sleep().n
    return numbers((fit_sleep if linear else fit_cbpp)(with_leaves(design, leaves), tol=TIGHT))


def gradients(design: gj.Design) -> tuple[jax.Array, Callable[[int], dict[str, jax.Array]]]:
    """`numbers` of a design, and the gradient of each of them in its leaves."""
    value, pull = jax.vjp(partial(estimates, design), leaves_of(design))
    return value, lambda j: pull(jnp.eye(value.size)[j])[0]


@pytest.mark.parametrize(("data", "scale"), [(cbpp, 1.0), (sleep, 20.0)], ids=["cbpp", "sleep"])
def test_derivatives(data: Callable[[], gj.Design], scale: float) -> None:
    """In every leaf, against differences of refits; forward and reverse are transposes of one linear map."""
    design, move = data(), directions(data(), scale)
    at = leaves_of(design)

    def along(s: np.ndarray) -> np.ndarray:
        return np.asarray(estimates(design, {k: at[k] + s[i] * move[k] for i, k in enumerate(LEAVES)}))

    differences = fd6(along, np.zeros(len(LEAVES)), 1e-3)
    _, gradient = gradients(design)
    for j in range(differences.shape[0]):
        own = gradient(j)
        for i, name in enumerate(LEAVES):
            found = (own[name] * move[name]).sum()
            assert_close(found, differences[j, i], rtol=1e-6, atol=1e-6, what=f"{name} {j}")
    if data is sleep:
        return
    still = jax.tree.map(jnp.zeros_like, at)
    for i, name in enumerate(LEAVES):
        _, found = jax.jvp(partial(estimates, design), (at,), ({**still, name: jnp.asarray(move[name])},))
        assert_close(found, differences[:, i], rtol=1e-6, atol=1e-6, what=name)
    host = gj.glmer(CBPP, load_data("cbpp")).sensitivity("weights")
    for j in (0, 1):
        assert_close(gradient(j)["weights"], host.iloc[:, j], atol=1e-6)


@pytest.mark.slow
def test_second_derivatives() -> None:
    design, move = cbpp(), directions(cbpp(), 1.0)["offset"]

    def moved(s: Any) -> jax.Array:
        return numbers(fit_cbpp(replace(design, offset=design.offset + s * move), tol=TIGHT))

    h = 1e-2
    first = jax.jacfwd(moved)
    weights = np.array([45.0, -9.0, 1.0]) / (60.0 * h)
    differences = sum(w * (first(k * h) - first(-k * h)) for k, w in enumerate(weights, 1))
    assert_close(jax.jacfwd(first)(0.0), differences, atol=1e-6)
    assert_close(jax.jacfwd(jax.jacrev(moved))(0.0), differences, atol=1e-6)


def test_vmap_of_stacked_designs_and_their_gradient() -> None:
    """Lanes have their own y and X, one of them with dependent columns; each is the single fit."""
    design, rng = cbpp(), np.random.default_rng(8)
    trials = np.asarray(design.weights)
    designs = [
        replace(design, y=rng.binomial(trials.astype(int), 0.1 + 0.2 * rng.random(design.n)) / trials, X=design.X * s)
        for s in (1.0, 2.0, 0.5)
    ]
    dependent = replace(design, X=np.asarray(design.X)[:, [0, 1, 2, 2]])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *designs, dependent)

    def together(y: jax.Array) -> tuple[jax.Array, gj.DesignFit]:
        fits = jax.vmap(lambda design, y: fit_cbpp(replace(design, y=y), tol=TIGHT))(stacked, y)
        return fits.beta[:3, 1].sum(), fits

    gradient, fits = jax.grad(together, has_aux=True)(stacked.y)
    assert fits.status.tolist() == [0, 0, 0, 5]
    for i, one in enumerate(designs):
        fit = fit_cbpp(one, covariance=True, tol=TIGHT)
        assert_close(fits.beta[i], fit.beta, atol=1e-8)
        assert_close(fits.theta[i], fit.theta, atol=1e-8)
        assert_close(fits.objective[i], fit.objective, atol=1e-8)
        assert_close(gradient[i], gradients(one)[1](2)["y"], atol=1e-8)


def test_singular_fits() -> None:
    """theta ends at exactly 0 and stays there; the other derivatives are those of the model without it."""
    level = np.asarray(cbpp().X) @ np.array([0.2, -0.1, -0.1, -0.1])
    design = replace(cbpp(), y=np.rint(np.asarray(cbpp().weights) * level) / np.asarray(cbpp().weights))
    value, gradient = gradients(design)
    assert float(value[0]) == 0.0
    assert all(float(jnp.abs(leaf).max()) < 1e-12 for leaf in gradient(0).values())
    at, move = leaves_of(design), directions(design, 1.0)["weights"]
    differences = fd6(
        lambda s: np.asarray(estimates(design, {**at, "weights": at["weights"] + s[0] * move})), [0.0], 1e-3
    )
    assert_close(gradient(1)["weights"] @ move, differences[1, 0], atol=1e-7)


def test_directions_that_the_data_do_not_determine() -> None:
    """A separated coefficient runs off; the others keep their derivatives, and nothing is NaN."""
    design = replace(cbpp(), y=np.where(np.asarray(cbpp().X)[:, 3] == 1.0, 0.0, np.asarray(cbpp().y)))
    value, gradient = gradients(design)
    assert float(value[4]) < -10.0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in gradient(2).values())
    fit = fit_cbpp(design, covariance=True)
    assert np.isinf(fit.vcov[3, 3]) and jnp.isfinite(jnp.diagonal(fit.vcov)[:3]).all()


# -------------------- as a layer
def small() -> tuple[gj.Design, np.ndarray]:
    """60 rows in 10 groups with two raw features, and a row (0, 0, 1) whose weight is a ridge penalty on the slope."""
    rng = np.random.default_rng(2)
    n, m = 60, 10
    group, raw = np.arange(n) % m, rng.normal(size=(n, 2))
    y = np.tanh(raw @ [1.5, -1.0]) * 2.0 + rng.normal(size=m)[group] + 0.3 * rng.normal(size=n)
    X = np.column_stack([np.ones(n), raw[:, 0]])
    pad = np.zeros(1)
    rows = np.append(y, pad), np.vstack([X, [[0.0, 1.0]]]), np.append(np.ones(n), pad), np.append(group, 0)
    return gj.design_arrays(rows[0], rows[1], [(rows[2], rows[3])]), raw


def test_learned_feature_and_penalty_by_leave_out_deviance() -> None:
    """Weights of a feature and a ridge penalty, trained through fits that leave out a third of the rows each."""
    base, raw = small()
    n = raw.shape[0]
    y = jnp.asarray(base.y[:n])
    folds = jnp.asarray((np.arange(n) // 10 % 3)[None, :] != np.arange(3)[:, None], float)

    def left_out(w: jax.Array) -> jax.Array:
        X = jnp.asarray(base.X).at[:n, 1].set(jnp.tanh(raw @ w[:2]))

        def one(keep: jax.Array) -> jax.Array:
            design = replace(base, X=X, weights=jnp.append(keep, jnp.exp(w[2])))
            fit = gj.fit_design(design, "gaussian", REML=False, tol=TIGHT)
            rows = jnp.square((y - fit.eta[:n]) / fit.sigma) + 2.0 * jnp.log(fit.sigma)
            return ((1.0 - keep) * rows).sum()

        return jax.vmap(one)(folds).sum()

    run = jax.jit(jax.value_and_grad(left_out))
    w = jnp.array([0.4, 0.1, 2.0])
    before, gradient = run(w)
    assert_close(gradient, fd6(lambda v: run(jnp.asarray(v))[0], w, 1e-3), rtol=1e-6, atol=1e-6)
    assert float(jnp.abs(gradient).min()) > 1e-2
    optimiser = optax.adam(0.1)
    state = optimiser.init(w)
    for _ in range(30):
        _, gradient = run(w)
        updates, state = optimiser.update(gradient, state)
        w = optax.apply_updates(w, updates)
    assert float(run(w)[0]) < 0.7 * float(before)


# -------------------- refusals
def bad(**changes: Any) -> gj.Design:
    return replace(cbpp(), **changes)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fit_cbpp(np.ones(3)), TypeError, "gj.design"),  # type: ignore[arg-type]
        (lambda: gj.fit_design(cbpp(), "binomail"), ValueError, "binomail"),
        (lambda: gj.fit_design(cbpp(), "poisson"), gj.DataError, "count"),
        (lambda: fit_cbpp(bad(y=cbpp().y + 1.0)), gj.DataError, "outside"),
        (lambda: fit_cbpp(bad(y=np.ones((2, 56)))), gj.DataError, "one-dimensional"),
        (lambda: fit_cbpp(bad(X=np.ones((55, 2)))), gj.DataError, r"X must have shape \(56, columns\)"),
        (lambda: fit_cbpp(bad(X=np.ones((56, 2)))), gj.DataError, "dependent"),
        (lambda: fit_cbpp(bad(offset=np.full(56, np.nan))), gj.DataError, "offset has missing"),
        (lambda: fit_cbpp(bad(weights=-np.ones(56))), gj.DataError, "weights must not be negative"),
        (lambda: fit_cbpp(bad(z=(np.ones((56, 2)),))), gj.DataError, "2 columns, its terms have 1"),
        (lambda: fit_cbpp(cbpp(), nAGQ=-1), ValueError, "nAGQ"),
        (lambda: fit_cbpp(cbpp(), hessian="exact"), ValueError, "hessian"),
        (lambda: fit_cbpp(cbpp(), start={"thetas": [1.0]}), TypeError, "did you mean 'theta'"),
        (lambda: fit_cbpp(cbpp(), start={"theta": [1.0, 2.0]}), ValueError, r"shape \(1,\)"),
        (lambda: jax.jit(partial(fit_cbpp, nAGQ=200))(cbpp()), ValueError, "at most 100"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_single_precision(x32: None) -> None:
    design, _ = small()
    laplace._warned = False
    with pytest.warns(UserWarning, match="64-bit mode is off"):
        fit = gj.fit_design(design, "gaussian", REML=False)
    assert int(fit.status) == 0 and fit.beta.dtype == jnp.float32
    assert_close(fit.beta, [-0.195924, 1.185311], atol=1e-4)
    assert_close(fit.theta, [0.563105], atol=1e-3)
