"""The Laplace deviance as a pure function: exact cases, symmetries, derivatives, transformations from outside."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DenseLaplace, assert_close, fd6, laplace_joint, load_data
from scipy import stats

import glmmjax as gj
from glmmjax import families
from glmmjax.objective import pirls

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
THETA, BETA = np.array([0.642261482]), np.array([-1.3985321, -0.9923328, -1.1286721, -1.5803139])
BINOMIAL = families.Binomial()


@pytest.fixture(scope="module")
def design() -> gj.Design:
    return gj.design(CBPP, load_data("cbpp"))


deviance = jax.jit(gj.laplace_deviance, static_argnums=3, static_argnames=("hessian",))


# -------------------- exact values
def test_cbpp_numbers(design: gj.Design) -> None:
    """The optimum of two packages at tight tolerances, and its absolute log-likelihood."""
    value = float(deviance(THETA, BETA, design, BINOMIAL))
    assert value == pytest.approx(184.052563743, abs=2e-8)  # lme4's PIRLS: 1.3e-8 above the true value
    assert value == pytest.approx(DenseLaplace(design, "binomial", "logit").deviance(THETA, BETA), rel=1e-12)
    assert -0.5 * value == pytest.approx(-92.02628, abs=5e-6)


@pytest.mark.parametrize(
    ("link", "hessian", "theta", "value"),
    [
        ("probit", "expected", 0.337992086, 185.242446665),
        ("probit", "observed", 0.338634476, 185.166675406),
        ("cloglog", "expected", 0.58668732, 183.604075835),
        ("cloglog", "observed", 0.585898333, 183.516004036),
        ("cauchit", "expected", 1.14070158, 181.602295195),
    ],
)
def test_other_links_minimised_over_beta(
    design: gj.Design, link: str, hessian: str, theta: float, value: float
) -> None:
    """lme4's (expected) and glmmTMB's (observed) optimum, reached here by Newton steps in beta at their theta."""
    family = families.get(f"binomial({link})")

    @jax.jit
    def step(b: Any) -> Any:
        def f(v: Any) -> Any:
            return gj.laplace_deviance(jnp.array([theta]), v, design, family, hessian=hessian)

        return f(b), jax.grad(f)(b), jax.hessian(f)(b)

    mu = np.array([0.22, 0.09, 0.08, 0.06])  # about the raw proportions by period
    eta = np.asarray(family.link.eta_of(jnp.asarray(mu)))
    beta = np.concatenate([eta[:1], eta[1:] - eta[0]])
    for _ in range(8):
        f, g, H = step(beta)
        beta = beta - np.linalg.solve(H, g)
    # lme4's PIRLS leaves 2e-7; glmmTMB's numbers agree to their last digit
    assert float(f) == pytest.approx(value, abs=4e-7 if hessian == "expected" else 2e-9)


def test_laplace_is_exact_for_a_gaussian() -> None:
    """With a normal response the approximation is the integral itself: a multivariate normal density."""
    rng = np.random.default_rng(2)
    n, sigma = 40, 0.7
    level, other = rng.permutation(np.arange(n) % 8), rng.permutation(np.arange(n) % 3)
    x = rng.normal(size=n)
    X, z = np.stack([np.ones(n), x], 1), np.stack([np.ones(n), x], 1)
    y = rng.normal(size=n)
    made = gj.design_arrays(y, X, [(z, level), (np.ones(n), other)])
    normal = families.Custom(lambda y, eta, aux: jax.scipy.stats.norm.logpdf(y, eta, sigma))
    theta, beta = np.array([0.8, -0.4, 0.5, 1.3]), np.array([0.3, -0.2])
    Z = DenseLaplace(replace(made, y=np.abs(y)), "poisson", "log").scaled_Z(theta)
    exact = -2.0 * stats.multivariate_normal.logpdf(y, X @ beta, Z @ Z.T + sigma**2 * np.eye(n))
    assert float(gj.laplace_deviance(theta, beta, made, normal)) == pytest.approx(exact, rel=1e-13)


def test_large_counts_approach_the_integral() -> None:
    """One group, scalar effect: against brute-force quadrature; the error falls with the information."""
    errors = []
    for scale in (1.0, 100.0):
        y = np.round(scale * np.array([3.0, 5.0, 4.0, 6.0]))
        beta = np.log(scale * 4.0)
        made = gj.design_arrays(y, np.ones(4), [(np.ones(4), np.zeros(4, int))])
        u = np.linspace(-9.0, 9.0, 200_001)
        log_f = stats.poisson.logpmf(y[:, None], np.exp(beta + 0.5 * u)).sum(0) + stats.norm.logpdf(u)
        exact = -2.0 * (np.log(np.exp(log_f - log_f.max()).sum() * (u[1] - u[0])) + log_f.max())
        ours = float(gj.laplace_deviance(jnp.array([0.5]), jnp.array([beta]), made, families.Poisson()))
        errors.append(abs(ours - exact))
    assert errors[0] < 0.02 and errors[1] < 0.05 * errors[0]


def test_groups_add_up(design: gj.Design) -> None:
    """The herds are independent: the deviance is the sum of theirs."""
    herd = np.asarray(design.level[0])
    total = 0.0
    for j in range(15):
        rows = herd == j
        one = gj.design_arrays(
            design.y[rows],
            design.X[rows],
            [(np.ones(rows.sum()), np.zeros(rows.sum(), int))],
            design.weights[rows],
        )
        total += DenseLaplace(one, "binomial", "logit").deviance(THETA, BETA)
    assert float(deviance(THETA, BETA, design, BINOMIAL)) == pytest.approx(total, rel=1e-12)


def test_weights_multiply_the_log_density() -> None:
    """A row of weight 2 is that row twice, for families whose weights are not trials."""
    rng = np.random.default_rng(4)
    n = 30
    y, x, level = rng.poisson(2.0, n).astype(float), rng.normal(size=n), np.arange(n) % 6
    w = rng.integers(1, 4, n)
    again = np.repeat(np.arange(n), w)
    X = np.stack([np.ones(n), x], 1)
    weighted = gj.design_arrays(y, X, [(np.ones(n), level)], weights=w)
    repeated = gj.design_arrays(y[again], X[again], [(np.ones(again.size), level[again])])
    for family in (families.Poisson(), families.NegativeBinomial(1.5), families.Poisson("sqrt")):
        at = (np.array([0.6]), np.array([0.9, 0.05]), weighted, family)
        one = float(deviance(*at))
        two = float(deviance(*at[:2], repeated, family))
        assert one == pytest.approx(two, rel=1e-12), str(family)


def test_offset_shifts_the_linear_predictor(design: gj.Design) -> None:
    moved = replace(design, offset=design.X @ np.array([0.3, -0.2, 0.1, 0.5]))
    shifted = BETA - np.array([0.3, -0.2, 0.1, 0.5])
    a, b = deviance(THETA, BETA, design, BINOMIAL), deviance(THETA, shifted, moved, BINOMIAL)
    assert float(a) == pytest.approx(float(b), rel=1e-13)


def test_matrix_interface_equals_the_formula(design: gj.Design) -> None:
    cbpp = load_data("cbpp")
    X = np.stack([np.ones(56), *((cbpp["period"].astype(str) == p).astype(float) for p in "234")], axis=1)
    herd = cbpp["herd"].cat.codes.to_numpy()
    made = gj.design_arrays(
        cbpp["incidence"] / cbpp["size"], X, [(np.ones(56), herd)], weights=cbpp["size"].to_numpy(float)
    )
    a, b = deviance(THETA, BETA, made, BINOMIAL), deviance(THETA, BETA, design, BINOMIAL)
    assert float(a) == float(b)  # bitwise: the same arrays


# -------------------- symmetries
def test_even_in_whole_columns() -> None:
    """T and T D give the same covariance for D = diag(+-1)."""
    made = gj.design("use ~ age * ch + I(age^2) + urban + (urban | district)", load_data("Contraception"))
    theta, beta = np.array([0.615, -0.575, 0.442]), np.array([-1.3, -0.05, 0.8, -0.006, 0.7, 0.07])
    base = float(deviance(theta, beta, made, BINOMIAL))
    for signs in ([-1, -1, 1], [1, 1, -1], [-1, -1, -1]):
        assert float(deviance(theta * signs, beta, made, BINOMIAL)) == pytest.approx(base, rel=1e-13)
    single = float(deviance(theta * [1, -1, 1], beta, made, BINOMIAL))
    assert abs(single - base) > 1.0  # a single entry is not a symmetry


@pytest.mark.parametrize(
    ("link", "hessian"),
    [("logit", "expected"), ("probit", "expected"), ("probit", "observed"), ("cloglog", "observed")],
)
def test_zero_theta(design: gj.Design, link: str, hessian: str) -> None:
    """No random effects: the GLM's deviance; stationary in theta; every derivative finite."""
    family = families.get(f"binomial({link})")

    @jax.jit
    def all_of_it(x: Any) -> Any:
        def f(x: Any) -> Any:
            return gj.laplace_deviance(x[:1], x[1:], design, family, hessian=hessian)

        return *jax.value_and_grad(f)(x), jax.hessian(f)(x)

    x = np.concatenate([[0.0], 0.7 * BETA])
    value, gradient, H = (np.asarray(v) for v in all_of_it(x))
    mu = np.asarray(family.link.inverse(design.X @ x[1:]))
    s = np.rint(design.y * design.weights)
    assert float(value) == pytest.approx(-2.0 * stats.binom.logpmf(s, design.weights, mu).sum(), rel=1e-13)
    assert gradient[0] == 0.0
    assert np.isfinite(gradient).all() and np.isfinite(H).all()
    by_differences = fd6(lambda v: np.asarray(all_of_it(v)[1]), x, 1e-3)
    assert_close(H, by_differences, rtol=1e-7, atol=1e-7 * np.abs(H).max())


# -------------------- derivatives with respect to the data
@pytest.mark.parametrize("family", ["binomial(logit)", "binomial(probit)"])
def test_derivatives_in_the_data(design: gj.Design, family: str) -> None:
    made = families.get(family)
    rng = np.random.default_rng(0)

    @jax.jit
    def f(part: Any, x: Any, d: gj.Design) -> Any:
        y, X, w, o, z = part
        return gj.laplace_deviance(x[:1], x[1:], replace(d, y=y, X=X, weights=w, offset=o, z=(z,)), made)

    x = np.concatenate([THETA, 0.6 * BETA])
    # strictly inside (0, 1), where the density continued to non-integers is smooth
    parts = (0.02 + 0.96 * design.y, design.X + 0.0, design.weights, design.offset + 0.1, design.z[0] + 0.0)
    gradient = jax.jit(jax.grad(f))(parts, x, design)
    for i, (name, part) in enumerate(zip(("y", "X", "weights", "offset", "z"), parts, strict=True)):
        for flat in rng.choice(part.size, 3, replace=False):

            def one(v: np.ndarray, i: int = i, flat: int = flat) -> float:
                changed = [np.array(p) for p in parts]
                changed[i].reshape(-1)[flat] = v[0]
                return float(f(tuple(changed), x, design))

            expected = fd6(one, [part.reshape(-1)[flat]], 1e-3)[0]
            ours = float(np.asarray(gradient[i]).reshape(-1)[flat])
            assert ours == pytest.approx(expected, rel=1e-7, abs=1e-7), f"{name}[{flat}]"


def test_mixed_derivative_in_data_and_parameters(design: gj.Design) -> None:
    """d/dy of the gradient in (theta, beta): what implicit derivatives of estimates are made of."""
    x = np.concatenate([THETA, BETA])

    def gradient(y: Any) -> Any:
        def f(v: Any) -> Any:
            return gj.laplace_deviance(v[:1], v[1:], replace(design, y=y), BINOMIAL)

        return jax.grad(f)(x)

    y = 0.02 + 0.96 * design.y
    jacobian = np.asarray(jax.jit(jax.jacfwd(gradient))(y))
    run = jax.jit(gradient)
    for i in (0, 17, 55):
        e = 1e-4 * (np.arange(56) == i)
        central = (np.asarray(run(y + e)) - np.asarray(run(y - e))) / 2e-4
        assert_close(jacobian[:, i], central, rtol=1e-6, atol=1e-6)  # second order in 1e-4


# -------------------- transformations
def test_transformations_from_outside(design: gj.Design) -> None:
    def f(x: Any) -> Any:
        return gj.laplace_deviance(x[:1], x[1:], design, BINOMIAL)

    rng = np.random.default_rng(1)
    xs = np.concatenate([THETA, BETA]) + 0.2 * rng.normal(size=(4, 5))
    lanes = np.asarray(jax.jit(jax.vmap(f))(xs))
    assert float(f(xs[0])) == pytest.approx(lanes[0], rel=1e-13)  # op by op
    assert_close(lanes, [float(jax.jit(f)(x)) for x in xs], rtol=1e-13, what="jit(vmap)")
    gradients = np.asarray(jax.jit(jax.vmap(jax.grad(f)))(xs))
    grad = jax.jit(jax.grad(f))
    for x, g in zip(xs, gradients, strict=True):
        assert_close(g, grad(x), rtol=1e-10, atol=1e-11, what="vmap of grad")
    forward = jax.jit(jax.jacfwd(f))(xs[0])
    assert_close(forward, gradients[0], rtol=1e-10, atol=1e-11, what="forward mode")
    direction = rng.normal(size=5)
    _, tangent = jax.jit(lambda x, d: jax.jvp(f, (x,), (d,)))(xs[0], direction)
    assert float(tangent) == pytest.approx(float(direction @ gradients[0]), rel=1e-11)
    hessians = np.asarray(jax.jit(jax.vmap(jax.hessian(f)))(xs[:2]))
    assert_close(hessians[0], jax.jit(jax.hessian(f))(xs[0]), rtol=1e-9, atol=1e-10, what="vmap of hessian")
    by_reverse = np.asarray(jax.jit(jax.jacrev(jax.grad(f)))(xs[0]))
    assert_close(by_reverse, hessians[0], rtol=1e-9, atol=1e-9, what="reverse over reverse")


def test_vmap_over_responses(design: gj.Design) -> None:
    rng = np.random.default_rng(3)
    ys = rng.binomial(design.weights.astype(int), 0.2, size=(3, 56)) / design.weights
    run = jax.jit(jax.vmap(lambda y: gj.laplace_deviance(THETA, BETA, replace(design, y=y), BINOMIAL)))
    one = [float(deviance(THETA, BETA, replace(design, y=y), BINOMIAL)) for y in ys]
    assert_close(run(ys), one, rtol=1e-13)


def test_failed_lanes_are_infinite_and_alone(design: gj.Design) -> None:
    betas = np.stack([BETA, np.full(4, np.nan), 0.5 * BETA])
    values = np.asarray(jax.jit(jax.vmap(lambda b: gj.laplace_deviance(THETA, b, design, BINOMIAL)))(betas))
    assert values[1] == np.inf and np.isfinite(values[[0, 2]]).all()
    assert values[0] == pytest.approx(184.052563743, abs=2e-8)


def test_shapes_are_checked(design: gj.Design) -> None:
    with pytest.raises((TypeError, ValueError)):
        gj.laplace_deviance(THETA, BETA[:3], design, BINOMIAL)


# -------------------- the tolerance of the inner iteration
def test_standard_errors_do_not_depend_on_the_pirls_tolerance(
    design: gj.Design, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    original = pirls.find_mode
    for tolerance in (1e-1, 1e-6, 1e-10, 1e-14):
        monkeypatch.setattr(pirls, "find_mode", partial(original, tolerance=tolerance))

        def f(x: Any) -> Any:
            return gj.laplace_deviance(x[:1], x[1:], design, BINOMIAL)

        x = np.concatenate([THETA, BETA])
        iterations = int(jax.jit(lambda x: gj.pirls(x[:1], x[1:], design, BINOMIAL).iterations)(x))
        H = np.asarray(jax.jit(jax.hessian(f))(x))
        found[tolerance] = (iterations, np.sqrt(np.diag(2.0 * np.linalg.inv(H))))
    counts = [found[t][0] for t in (1e-1, 1e-6, 1e-10, 1e-14)]
    assert counts == sorted(counts) and counts[0] < counts[-1]  # the setting did reach the iteration
    tight = found[1e-14][1]
    # two packages: FEATURES row NEW-1, printed to 7 digits
    assert_close(tight, [0.178562, 0.2324718, 0.3066422, 0.3266374, 0.4274359], rtol=2e-6)
    assert_close(found[1e-10][1], tight, rtol=1e-6)
    assert_close(found[1e-6][1], tight, rtol=1e-6)


# -------------------- nAGQ = 0
def test_joint_objective_numbers(design: gj.Design) -> None:
    """The value at the optimum of nAGQ = 0: beta is found inside."""
    value, beta = jax.jit(lambda t: laplace_joint(t, design, BINOMIAL, jnp.zeros(4)))(jnp.array([0.6418150717]))
    assert float(value) == pytest.approx(184.108590946, abs=2e-9)
    # printed to 10 digits; beta moves with theta's tenth
    assert_close(beta, [-1.3604717556, -0.9761774707, -1.1110768931, -1.5596805154], atol=2e-8)
