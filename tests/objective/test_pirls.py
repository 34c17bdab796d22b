"""Conditional modes: where they are, that they do not depend on the way there, and their derivatives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DenseLaplace, assert_close, fd6, laplace_joint, load_data
from scipy import optimize

import glmmjax as gj
from glmmjax.objective import pirls as _pirls

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
CM4 = "use ~ age * ch + I(age^2) + urban + (urban | district)"
#: theta and beta near the optimum; formula, data set, family
POINTS = {
    "cbpp": (CBPP, "cbpp", "binomial(logit)", [0.642261], [-1.39853, -0.99233, -1.12867, -1.58031]),
    "cbpp_probit": (CBPP, "cbpp", "binomial(probit)", [0.338], [-0.84, -0.53, -0.6, -0.8]),
    "cbpp_cloglog": (CBPP, "cbpp", "binomial(cloglog)", [0.587], [-1.5, -0.9, -1.0, -1.4]),
    "cbpp_cauchit": (CBPP, "cbpp", "binomial(cauchit)", [1.1407], [-1.57, -1.9, -2.5, -5.0]),
    "contraception": (
        CM4,
        "Contraception",
        "binomial(logit)",
        [0.615, -0.575, 0.442],
        [-1.344, -0.0462, 1.212, -0.00565, 0.790, 0.0665],
    ),
    "grouse_sqrt": (
        "TICKS ~ YEAR + cHEIGHT + (1 | BROOD)",
        "grouseticks",
        "poisson(sqrt)",
        [0.9],
        [1.5, 0.9, -0.5, -0.01],
    ),
}
pirls = jax.jit(gj.pirls, static_argnums=3)


def point(name: str) -> tuple[gj.Design, Any, np.ndarray, np.ndarray, DenseLaplace]:
    formula, data, family, theta, beta = POINTS[name]
    design, made = gj.design(formula, load_data(data)), gj.families.get(family)
    names = beta_order(formula, data)
    beta = [dict(zip(BETA_NAMES.get(data, names), beta, strict=True))[n] for n in names]
    return design, made, np.array(theta), np.array(beta), DenseLaplace(design, made.name, made.link.name)


BETA_NAMES = {"Contraception": ["(Intercept)", "age", "chY", "I(age^2)", "urbanY", "age:chY"]}


def beta_order(formula: str, data: str) -> list[str]:
    from glmmjax.formula.frame import build

    return list(build(formula, load_data(data)).x_names)


@pytest.mark.parametrize("name", POINTS)
def test_gradient_is_zero_at_the_mode(name: str) -> None:
    design, family, theta, beta, dense = point(name)
    mode = pirls(theta, beta, design, family)
    assert int(mode.status) == _pirls.CONVERGED
    A, u = dense.scaled_Z(theta), np.asarray(mode.u)
    score = dense.rows(design.offset + design.X @ beta + A @ u)[1]
    # decrement below 1e-12 (1 + deviance) before the last Newton step, of second order after it
    assert np.abs(A.T @ score - u).max() < 1e-10
    assert int(mode.iterations) <= 15
    # log det of the observed information in the factor, as documented
    observed = dense.rows(design.offset + design.X @ beta + A @ u)[2]
    expected = np.linalg.slogdet(A.T @ (observed[:, None] * A) + np.eye(u.size))[1]
    assert float(mode.factor.logdet) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", POINTS)
def test_independent_of_the_start(name: str) -> None:
    design, family, theta, beta, _ = point(name)
    from_zero = pirls(theta, beta, design, family)
    rng = np.random.default_rng(1)
    for size in (0.1, 1.0, 2.0):
        u0 = size * rng.normal(size=design.q)
        other = pirls(theta, beta, design, family, u0=u0)
        assert int(other.status) == _pirls.CONVERGED
        assert_close(other.u, from_zero.u, atol=1e-9, what=f"start of size {size}")


def test_cauchit_reaches_the_right_mode() -> None:
    """Undamped Newton ends at a wrong stationary point here (deviance 215 for 181.60)."""
    design, family, theta, beta, dense = point("cbpp_cauchit")
    u = np.asarray(pirls(theta, beta, design, family).u)
    A, fixed = dense.scaled_Z(theta), design.offset + design.X @ beta

    def penalised(v: np.ndarray) -> float:
        return float(-2.0 * dense.rows(fixed + A @ v)[0].sum() + v @ v)

    # herds are independent: each herd's mode is the best of a fine grid
    grid = np.linspace(-6.0, 6.0, 1201)
    for j in range(u.size):
        others = u.copy()
        values = []
        for g in grid:
            others[j] = g
            values.append(penalised(others))
        assert abs(grid[int(np.argmin(values))] - u[j]) <= 0.0101
        assert penalised(u) <= min(values) + 1e-9
    deviance = float(gj.laplace_deviance(theta, beta, design, family))
    assert deviance < 200.0


@pytest.mark.parametrize(
    ("family", "beta", "y", "bounds"),
    [
        # X beta alone has a mean above 1 (below 0): only the random effects can bring it inside
        ("binomial(log)", 0.3, [0.0, 1.0, 1.0, 0.0, 0.0, 1.0], (-20.0, None)),
        ("poisson(identity)", -0.5, [1.0, 3.0, 2.0, 4.0, 1.0, 2.0], (None, 30.0)),
        ("poisson(sqrt)", -0.5, [1.0, 3.0, 2.0, 4.0, 1.0, 2.0], (None, 30.0)),
    ],
)
def test_restricted_means(family: str, beta: float, y: list[float], bounds: tuple[Any, Any]) -> None:
    made, theta = gj.families.get(family), 2.0
    n = len(y)
    level = np.arange(n) // 3
    design = gj.design_arrays(y, np.ones(n), [(np.ones(n), level)])
    mode = gj.pirls(jnp.array([theta]), jnp.array([beta]), design, made)
    assert int(mode.status) == _pirls.CONVERGED
    eta = beta + theta * np.asarray(mode.u)[level]
    assert bool(made.in_range(jnp.asarray(design.y), jnp.asarray(eta)).all())
    for j in range(2):
        mine = np.array(y)[level == j]

        def penalised(u: float, mine: np.ndarray = mine) -> float:
            e = beta + theta * u
            mu = {"log": np.exp(e), "identity": e, "sqrt": e * e}[made.link.name]
            if made.name == "binomial":
                return float(-2.0 * (mine * e + (1 - mine) * np.log1p(-mu)).sum() + u * u)
            return float(-2.0 * (mine * np.log(mu) - mu).sum() + u * u)

        edge = -beta / theta  # eta = 0
        low, high = bounds
        best = optimize.minimize_scalar(
            penalised,
            bounds=(edge + 1e-9 if low is None else low, edge - 1e-9 if high is None else high),
            method="bounded",
            options={"xatol": 1e-10},
        )
        # a minimum is known to the square root of rounding only
        assert float(mode.u[j]) == pytest.approx(best.x, abs=1e-6)
    assert np.isfinite(float(gj.laplace_deviance([theta], [beta], design, made)))


def test_a_mode_outside_the_range_is_infinite() -> None:
    """With theta = 0 nothing can bring the mean inside: +inf, not a number of the continued density."""
    y, level = np.array([0.0, 1.0, 0.0, 1.0]), np.array([0, 0, 1, 1])
    design = gj.design_arrays(y, np.ones(4), [(np.ones(4), level)])
    family = gj.families.get("binomial(log)")
    assert float(gj.laplace_deviance([0.0], [0.3], design, family)) == np.inf
    assert np.isfinite(float(gj.laplace_deviance([0.0], [-0.3], design, family)))


# -------------------- status
def test_status_of_non_finite_values() -> None:
    design, family, theta, beta, _ = point("cbpp")
    mode = pirls(theta, np.full_like(beta, np.nan), design, family)
    assert int(mode.status) == _pirls.NON_FINITE
    assert float(gj.laplace_deviance(theta, np.full_like(beta, np.nan), design, family)) == np.inf


def test_status_of_the_iteration_limit() -> None:
    design, family, theta, beta, _ = point("cbpp")
    params = _pirls.parameters(theta, beta, family)
    u0 = _pirls.zero_u(design, jnp.float64)
    mode = jax.jit(lambda: _pirls.find_mode(params, design, family, u0, tolerance=-1.0))()
    assert int(mode.status) in (_pirls.ITERATION_LIMIT, _pirls.STEP_LIMIT)
    assert int(mode.iterations) <= _pirls.MAX_ITERATIONS
    # the point itself is the mode: only the criterion was out of reach
    assert_close(mode.u[0].reshape(-1), pirls(theta, beta, design, family).u, atol=1e-9)


def test_every_status_has_a_message() -> None:
    codes = {_pirls.CONVERGED, _pirls.ITERATION_LIMIT, _pirls.STEP_LIMIT, _pirls.NON_FINITE}
    assert set(_pirls.MESSAGES) == codes and len(codes) == 4
    assert len(set(_pirls.MESSAGES.values())) == 4


# -------------------- derivatives of the mode
@pytest.mark.parametrize("name", ["cbpp", "cbpp_probit", "cbpp_cauchit"])
def test_implicit_derivatives(name: str) -> None:
    design, family, theta, beta, dense = point(name)

    @jax.jit
    def u(x: Any) -> Any:
        return gj.pirls(x[:1], x[1:], design, family).u

    x = np.concatenate([theta, beta])
    jacobian = jax.jit(jax.jacfwd(u))(x)
    by_differences = fd6(lambda v: np.asarray(u(v)), x, 1e-3)
    assert_close(jacobian, by_differences, rtol=1e-8, atol=1e-9, what="du/d(theta, beta)")
    exact = np.stack(
        [
            (dense.mode((x + h)[:1], (x + h)[1:]) - dense.mode((x - h)[:1], (x - h)[1:])) / 2e-5
            for h in 1e-5 * np.eye(5)
        ],
        axis=1,
    )
    assert_close(jacobian, exact, rtol=1e-6, atol=1e-8, what="dense")  # second-order differences
    reverse = jax.jit(jax.jacrev(u))(x)
    assert_close(reverse, jacobian, rtol=1e-12, atol=1e-14, what="reverse mode")


def test_vmap_over_parameters() -> None:
    design, family, theta, beta, _ = point("cbpp")
    thetas = np.linspace(0.0, 2.0, 5)[:, None]
    lanes = jax.jit(jax.vmap(lambda t: gj.pirls(t, beta, design, family).u))(thetas)
    for t, u in zip(thetas, lanes, strict=True):
        assert_close(u, pirls(t, beta, design, family).u, atol=1e-11)


# -------------------- nAGQ = 0: u and beta together
@pytest.mark.parametrize("name", ["cbpp", "cbpp_probit"])
def test_joint_mode(name: str) -> None:
    design, family, theta, beta, dense = point(name)
    run = jax.jit(lambda t, b: laplace_joint(t, design, family, b))
    value, beta_hat = run(theta, beta)
    beta_hat = np.asarray(beta_hat)
    A = dense.scaled_Z(theta)
    u = dense.mode(theta, beta_hat)
    score = dense.rows(design.offset + design.X @ beta_hat + A @ u)[1]
    assert np.abs(design.X.T @ score).max() < 1e-8
    assert float(value) == pytest.approx(dense.deviance(theta, beta_hat), rel=1e-12)
    # from elsewhere: the same
    value2, beta2 = run(theta, np.zeros_like(beta))
    assert_close(beta2, beta_hat, atol=1e-9)
    gradient = jax.jit(jax.grad(lambda t: laplace_joint(t, design, family, beta)[0]))(theta)
    by_differences = fd6(lambda t: float(run(t, beta)[0]), theta, 1e-3)
    assert_close(gradient, by_differences, rtol=1e-8, atol=1e-9)
    assert float(value2) == pytest.approx(float(value), rel=1e-13)


def test_rows_of_a_level_decide_its_mode_alone() -> None:
    """Responses of other herds do not move a herd's mode."""
    design, family, theta, beta, _ = point("cbpp")
    before = np.asarray(pirls(theta, beta, design, family).u)
    y = design.y.copy()
    first = np.asarray(design.level[0]) == 0
    y[first] = 1.0 - y[first]
    after = np.asarray(pirls(theta, beta, replace(design, y=y), family).u)
    assert abs(after[0] - before[0]) > 0.1
    assert_close(after[1:], before[1:], atol=1e-11)
