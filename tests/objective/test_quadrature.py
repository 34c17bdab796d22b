"""Adaptive Gauss-Hermite quadrature: the rule, the objective, its derivatives, fits, and the quality of Laplace's.

Compared with lme4 (fixed_params/, models/), with near-exact integrals (exact_marginal/), with brute-force integration
in NumPy, and with central differences.
"""

from __future__ import annotations

import math
import re
import warnings
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    all_models,
    assert_close,
    exact_marginal,
    fd6,
    fixed_params,
    load_data,
    model_index,
    reference_model,
    sd_scaled,
)
from scipy import optimize, special, stats

import glmmjax as gj
from glmmjax.objective import quadrature as _quadrature
from glmmjax.objective.quadrature import product_nodes
from glmmjax.results import NotSupportedError


def family_of(call: str) -> gj.families.Family:
    """From R's call, or from the one word "probit" of the exact files."""
    match = re.fullmatch(r"(\w+)\((?:link *= *)?['\"]?(\w*)['\"]?\)", {"probit": "binomial(probit)"}.get(call, call))
    return gj.families.get(call if match is None else f"{match[1]}({match[2]})" if match[2] else match[1])


def saturated(design: gj.Design, family: gj.families.Family) -> float:
    """-2 sum log f(y | mu = y): what lme4 leaves out for nAGQ > 1."""
    y, w = np.asarray(design.y), np.asarray(design.weights)
    if family.name == "binomial":
        return float(-2.0 * stats.binom.logpmf(np.rint(w * y), w, y).sum())
    return float(-2.0 * (w * stats.poisson.logpmf(y, y)).sum())


# -------------------- the rule
def test_five_points() -> None:
    rule = gj.gauss_hermite(5)
    # lme4's GHrule(5)
    assert_close(rule.z, [-2.85697, -1.355626, 0.0, 1.355626, 2.85697], atol=1e-6)
    assert_close(rule.w, [0.01125741, 0.22207592, 0.53333333, 0.22207592, 0.01125741], atol=1e-8)
    assert_close(rule.log_density, stats.norm.logpdf(rule.z), rtol=1e-15)


@pytest.mark.parametrize("k", [1, 2, 3, 10, 51, 100])
def test_rule_is_exact_for_polynomials(k: int) -> None:
    z, w, _ = gj.gauss_hermite(k)
    assert z.size == w.size == k and (np.diff(z) > 0).all() and (w > 0).all()
    for degree in range(2 * k):
        # z^degree over the size of its moment: even ones are (degree - 1)!!, odd ones 0
        scale = math.exp(special.gammaln(degree + 1) - 0.5 * degree * math.log(2) - special.gammaln(degree / 2 + 1))
        terms = w * np.sign(z) ** degree * np.exp(degree * np.log(np.maximum(np.abs(z), 1e-300)) - math.log(scale))
        assert terms.sum() == pytest.approx(1.0 if degree % 2 == 0 else 0.0, abs=1e-11 + 1e-13 * degree), degree


def test_rule_against_scipy() -> None:
    z, w = special.roots_hermitenorm(40)
    rule = gj.gauss_hermite(40)
    assert_close(rule.z, z, atol=1e-13)
    assert_close(rule.w, w / np.sqrt(2.0 * np.pi), rtol=1e-10)


@pytest.mark.parametrize("k", [0, 101, 2.0, True])
def test_rule_refuses(k: Any) -> None:
    with pytest.raises(ValueError, match="from 1 to 100"):
        gj.gauss_hermite(k)


def test_product_nodes() -> None:
    z, w, _ = gj.gauss_hermite(4)
    zeta, log_w = product_nodes(jnp.arange(70), jnp.asarray(z), jnp.log(w), 4, 3)
    assert (log_w[64:] < -1e29).all()
    nodes, weights = np.asarray(zeta)[:64], np.exp(np.asarray(log_w)[:64])
    grid = {tuple(np.round(v, 9)) for v in np.stack(np.meshgrid(z, z, z), -1).reshape(-1, 3)}
    assert {tuple(np.round(v, 9)) for v in nodes} == grid
    assert_close(weights @ (nodes[:, 0] ** 2 * nodes[:, 1] ** 4 * nodes[:, 2] ** 6), 1.0 * 3.0 * 15.0, rtol=1e-12)


# -------------------- values at given parameters
@pytest.mark.parametrize("name", ["cbpp_nagq2", "cbpp_nagq9", "cbpp_nagq25", "toy15_nagq10"])
def test_value_against_lme4(name: str) -> None:
    record = fixed_params(name)
    design = gj.design(record["formula"], load_data(record["dataset"]))
    family, t = family_of(record["family_call"]), record["n_theta"]
    value = jax.jit(lambda x: gj.agq_deviance(x[:t], x[t:], design, family, record["nAGQ"]))
    for point in record["points"]:
        ours = float(value(np.array(point["par"], float)))
        assert ours - saturated(design, family) == pytest.approx(point["objective"], abs=1e-8)


#: points per random effect at which the quadrature has converged to what its reference is good for
ENOUGH = {"cbpp": 40, "cbpp_probit": 40, "contra_cm3": 25, "contra_cm4": 31, "grouse_brood": 60}
ENOUGH |= {"owls_offset": 25, "owls_slope2d": 25, "toenail": 100, "toy15": 60}


@pytest.mark.parametrize("name", sorted(ENOUGH))
def test_value_against_brute_force(name: str) -> None:
    record = exact_marginal(name)
    design = gj.design(record["formula"], load_data(record["dataset"]))
    family = family_of(record["family"])
    value = jax.jit(lambda theta, beta: gj.agq_deviance(theta, beta, design, family, ENOUGH[name]))
    for point in record["points"]:
        ours = -0.5 * float(value(np.array(point["theta"], float), np.array(point["beta"], float)))
        # toenail at theta = 6: the most points there are, 100, are 5.1e-5 off
        far = name == "toenail" and point["abs_difference"] > 1e-9
        assert ours == pytest.approx(point["logLik_exact"], abs=1e-4 if far else 1e-8)


class BruteForce:
    """-2 log-likelihood with one grouping factor by the trapezoidal rule on each level's own axes, in NumPy.

    It shares nothing with the package but the arrays of the design. The trapezoidal rule is exact to rounding for
    smooth integrands that die out on both sides; the axes only say where to look.
    """

    def __init__(self, design: gj.Design, log_f: Any, reach: float = 9.0, points: int = 49) -> None:
        self.design, self.log_f = design, log_f  # log_f(row index, eta) -> log density, constants included
        self.grid, self.h = np.linspace(-reach, reach, points, retstep=True)

    def deviance(self, theta: np.ndarray, beta: np.ndarray) -> float:
        design = self.design
        z, level = np.asarray(design.z[0]), np.asarray(design.level[0])
        d = z.shape[1]
        T = np.zeros((d, d))
        for term in design.terms:
            own = np.zeros((term.structure.k, term.structure.k))
            own.T[np.triu_indices(own.shape[0])] = theta[term.theta]
            T[term.columns, term.columns] = own
        fixed = np.asarray(design.offset) + np.asarray(design.X) @ beta
        nodes = np.stack(np.meshgrid(*[self.grid] * d, indexing="ij"), -1).reshape(-1, d)
        total = 0.0
        for j in range(design.n_levels[0]):
            rows = np.flatnonzero(level == j)
            A = z[rows] @ T

            def minus_log(u: np.ndarray, rows: np.ndarray = rows, A: np.ndarray = A) -> np.ndarray:
                eta = fixed[rows][:, None] + A @ np.atleast_2d(u).T
                return 0.5 * np.square(np.atleast_2d(u)).sum(1) - self.log_f(rows[:, None], eta).sum(0)

            mode = optimize.minimize(lambda u: float(minus_log(u)[0]), np.zeros(d), tol=1e-10).x
            H = np.empty((d, d))
            for a in range(d):  # a rough curvature will do
                for b in range(d):
                    e, f = 1e-3 * np.eye(d)[a], 1e-3 * np.eye(d)[b]
                    corners = minus_log(np.stack([mode + e + f, mode + e - f, mode - e + f, mode - e - f]))
                    H[a, b] = (corners @ [1.0, -1.0, -1.0, 1.0]) / 4e-6
            R = np.linalg.cholesky(np.linalg.inv(H))
            values = -minus_log(mode + nodes @ R.T)
            area = np.log(self.h) * d + np.linalg.slogdet(R)[1] - 0.5 * d * np.log(2.0 * np.pi)
            total -= 2.0 * (special.logsumexp(values) + area)
        return total


def small_design(d: int, weights: bool = True, seed: int = 3) -> tuple[gj.Design, np.ndarray, np.ndarray]:
    """Ten levels of 4 to 9 rows, d random effects in one or two terms, offset; theta and beta to look at."""
    rng = np.random.default_rng(seed)
    level = np.repeat(np.arange(10), rng.integers(4, 10, 10))
    n = level.size
    X = np.column_stack([np.ones(n), rng.normal(size=n)])
    z = np.column_stack([np.ones(n), X[:, 1], rng.normal(size=n), rng.normal(size=n)])[:, :d]
    trials = rng.integers(1, 6, n).astype(float) if weights else np.ones(n)
    y = rng.binomial(trials.astype(int), 0.4) / trials
    terms = [(z, level)] if d < 3 else [(z[:, :2], level), (z[:, 2:], level)]
    design = gj.design_arrays(y, X, terms, weights=trials, offset=0.2 * rng.normal(size=n))
    theta = np.concatenate(
        [np.tril(0.3 * np.ones((k, k)) + 0.5 * np.eye(k)).T[np.triu_indices(k)] for k in ([d] if d < 3 else [2, d - 2])]
    )
    return design, theta, np.array([-0.4, 0.6])


def binomial_log_f(design: gj.Design) -> Any:
    y, w = np.asarray(design.y), np.asarray(design.weights)

    def log_f(rows: np.ndarray, eta: np.ndarray) -> np.ndarray:
        s = w * y
        constant = special.gammaln(w + 1) - special.gammaln(s + 1) - special.gammaln(w - s + 1)
        return constant[rows] + s[rows] * -np.log1p(np.exp(-eta)) + (w - s)[rows] * -np.log1p(np.exp(eta))

    return log_f


@pytest.mark.parametrize(("d", "k"), [(1, 25), (2, 19), (3, 21)])
def test_value_in_several_dimensions(d: int, k: int) -> None:
    design, theta, beta = small_design(d)
    exact = BruteForce(design, binomial_log_f(design), points=49 if d < 3 else 37).deviance(theta, beta)
    assert float(gj.agq_deviance(theta, beta, design, gj.families.Binomial(), k)) == pytest.approx(exact, abs=2e-8)


def test_four_dimensions_and_negative_binomial() -> None:
    """The highest dimension, prior weights, a family with a curvature of its own: against few points upwards."""
    design, theta, beta = small_design(4, weights=False)
    rng = np.random.default_rng(8)
    counts = rng.poisson(1.5, design.n).astype(float)
    design = gj.design_arrays(
        counts,
        design.X,
        [(np.asarray(design.z[0])[:, t.columns], design.level[0]) for t in design.terms],
        weights=rng.uniform(0.5, 2.0, design.n),
    )
    family = gj.families.NegativeBinomial(2.0)
    values = [float(gj.agq_deviance(theta, beta, design, family, k)) for k in (1, 3, 6, 11, 14)]
    errors = np.abs(np.array(values[:-1]) - values[-1])
    assert (errors[1:] < 0.2 * errors[:-1]).all() and errors[-1] < 1e-5
    # the curvature only places the nodes
    expected = float(gj.agq_deviance(theta, beta, design, family, 14, hessian="expected"))
    assert expected == pytest.approx(values[-1], abs=1e-5)


@pytest.mark.parametrize("family", ["binomial", "binomial(probit)", "binomial(cloglog)", "binomial(cauchit)"])
def test_one_point_is_laplace(family: str) -> None:
    design, theta, beta = small_design(2)
    laplace = float(gj.laplace_deviance(theta, beta, design, gj.families.get(family)))
    assert float(gj.agq_deviance(theta, beta, design, gj.families.get(family), 1)) == laplace
    # and the general code says the same
    params = _quadrature.parameters(theta, beta, gj.families.get(family))
    at = _quadrature.at_mode(params, design, gj.families.get(family), _quadrature.zero_u(design, float), "expected")
    here = _quadrature.local(at.mode.u[0], at.T[0], at.blocks.diagonal[0], params, design, gj.families.get(family))
    assert_close(_quadrature.log_ratios(1, here, params, design, gj.families.get(family)), np.zeros(10), atol=1e-14)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    design, theta, beta = small_design(2)
    x = np.concatenate([theta, beta])

    def both() -> Any:
        f = jax.jit(jax.value_and_grad(lambda v: gj.agq_deviance(v[:3], v[3:], design, gj.families.Binomial(), 21)))
        return f(x)

    value, gradient = both()
    for chunk in (design.n * 100, design.n * 5):  # 5 chunks; 89, in groups
        monkeypatch.setattr(_quadrature, "CHUNK", chunk)
        other, other_gradient = both()
        assert float(other) == pytest.approx(float(value), rel=1e-14)
        assert_close(other_gradient, gradient, rtol=1e-11, atol=1e-11)


def test_outside_the_range_of_the_link() -> None:
    """Nodes at which a log-binomial probability exceeds 1 have density 0."""
    data = load_data("cbpp")
    design = gj.design("cbind(incidence, size - incidence) ~ period + (1 | herd)", data)
    family = gj.families.get("binomial(log)")
    theta, beta = np.array([0.6]), np.array([-1.7, -0.9, -1.0, -1.3])
    value, gradient = jax.value_and_grad(lambda t: gj.agq_deviance(t, beta, design, family, 40))(theta)
    assert np.isfinite(value) and np.isfinite(gradient).all()

    y, w = np.asarray(design.y), np.asarray(design.weights)

    def log_f(rows: np.ndarray, eta: np.ndarray) -> np.ndarray:
        p = np.exp(np.minimum(eta, 0.0))
        with np.errstate(divide="ignore"):
            out = stats.binom.logpmf(np.rint(w * y)[rows], w[rows], p)
        return np.where(eta < 0.0, out, -np.inf)

    exact = BruteForce(design, log_f, points=2001).deviance(theta, beta)
    # the integrand ends where mu = 1: the order of convergence is that of its zero there
    assert float(value) == pytest.approx(exact, abs=1e-3)


# -------------------- derivatives
@pytest.mark.parametrize(
    ("d", "family", "k"),
    [
        (1, "binomial", 5),
        (1, "binomial(probit)", 4),
        (2, "binomial(cloglog)", 4),
        (3, "binomial", 3),
    ],
)
def test_derivatives(d: int, family: str, k: int) -> None:
    design, theta, beta = small_design(d)
    x, t = np.concatenate([theta, beta]), theta.size
    kind = gj.families.get(family)

    @jax.jit
    def both(v: Any) -> Any:
        return jax.value_and_grad(lambda w: gj.agq_deviance(w[:t], w[t:], design, kind, k))(v)

    gradient = np.asarray(both(x)[1])
    by_values = fd6(lambda v: both(v)[0], x, 1e-2)
    assert_close(gradient, by_values, rtol=1e-8, atol=1e-8 * np.abs(gradient).max(), what="gradient")
    hessian = np.asarray(jax.jit(jax.jacfwd(lambda v: both(v)[1]))(x))
    by_gradients = fd6(lambda v: both(v)[1], x, 1e-2)
    assert_close(hessian, by_gradients, rtol=1e-7, atol=1e-7 * np.abs(hessian).max(), what="Hessian")


def test_derivatives_in_the_data() -> None:
    design, theta, beta = small_design(1)

    @jax.jit
    def value(offset: Any) -> Any:
        from dataclasses import replace

        return gj.agq_deviance(theta, beta, replace(design, offset=offset), gj.families.Binomial(), 6)

    at = np.asarray(design.offset)
    assert_close(jax.grad(value)(at), fd6(value, at, 1e-2), atol=1e-8)


# -------------------- fits
FITS = all_models(lambda row: row["engine"].startswith("lme4::glmer") and (row["nAGQ"] or 0) > 1)


@cache
def fitted(name: str) -> tuple[gj.MixedModel, dict[str, Any]]:
    row, record = model_index()[name], reference_model(name)
    family = gj.families.get(f"{row['family']}({row['link']})")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = gj.glmer(row["formula"], load_data(row["dataset"]), family=family, nAGQ=row["nAGQ"])
    return model, record["results"]


@pytest.mark.parametrize("name", FITS)
def test_fit(name: str) -> None:
    model, ref = fitted(name)
    se = np.array(ref["se"])
    assert model.converged
    ours = model.loglik + 0.5 * saturated(model._design, model.family)
    assert ours == pytest.approx(ref["logLik"], abs=5e-7)
    assert sd_scaled(model.beta, ref["fixef"]["values"], se) < 1e-4
    assert_close(model.theta, ref["theta"]["values"], atol=1e-5)
    # toy15's standard errors difference lme4's deviance, whose PIRLS noise they show
    canonical = model.family.link.name in ("logit",) or model.family.name == "poisson"
    assert_close(model.bse, se, rtol=(2e-4 if name.startswith("toy15") else 1e-4) if canonical else 1e-3)


@pytest.mark.parametrize(("k", "optimum"), [(5, 2352.954539011), (9, 2352.953406574)])
def test_vector_fit(k: int, optimum: float) -> None:
    model = gj.glmer("use ~ age * ch + I(age^2) + urban + (urban | district)", load_data("Contraception"), nAGQ=k)
    assert model.converged and model.objective == pytest.approx(optimum, abs=2e-8)
    if k == 9:
        assert_close(model.theta, [0.6212765, -0.5846019, 0.4512262], atol=5e-6)
        exact = exact_marginal("contra_cm4")["mle_exact"]
        assert sd_scaled(model.beta, exact["beta"], exact["se_beta"]) < 1e-4


def test_vector_fit_against_exact_maximum() -> None:
    record = exact_marginal("owls_slope2d")
    model = gj.glmer(record["formula"], load_data("Owls"), family="poisson", nAGQ=25)
    exact = record["mle_exact"]  # estimates are those of 15 points
    assert model.loglik == pytest.approx(exact["logLik_more_nodes"], abs=1e-6)
    assert_close(model.theta, exact["theta"], atol=1e-4)
    assert sd_scaled(model.beta, exact["beta"], exact["se_beta"]) < 1e-4
    assert_close(model.bse, exact["se_beta"], rtol=1e-4)


def test_one_scale_for_all_points(cbpp: Any) -> None:
    formula = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
    fits = {k: gj.glmer(formula, cbpp, nAGQ=k) for k in (0, 1, 2, 25)}
    assert fits[25].objective == pytest.approx(183.966738, abs=1e-6)
    assert fits[2].objective - fits[25].objective == pytest.approx(100.1140315 - 100.0100305368, abs=1e-6)
    assert all(abs(m.objective - 184.0) < 0.15 for m in fits.values())
    text = str(fits[25].summary())
    assert "(Adaptive Gauss-Hermite Quadrature, nAGQ = 25)" in text
    assert fits[25].refit(fits[25].getME("y")).objective == pytest.approx(fits[25].objective, abs=1e-9)
    assert fits[1].update(". ~ .", nAGQ=25).objective == pytest.approx(fits[25].objective, abs=1e-9)
    deviance = fits[25].deviance_function()
    assert deviance(fits[25].theta, fits[25].beta) == pytest.approx(fits[25].objective, abs=1e-9)


def test_two_terms_on_one_factor(sleepstudy: Any) -> None:
    data = sleepstudy.assign(slow=(sleepstudy["Reaction"] > 300).astype(int), day=sleepstudy["Days"] - 4.5)
    apart = gj.glmer("slow ~ day + (day || Subject)", data, nAGQ=3)
    assert apart.converged and apart._design.n_theta == 2
    full = gj.design("slow ~ day + (day | Subject)", data)
    theta = np.array([apart.theta[0], 0.0, apart.theta[1]])
    value = jax.jit(lambda t: gj.agq_deviance(t, apart.beta, full, apart.family, 3))
    assert float(value(theta)) == pytest.approx(apart.objective, abs=1e-9)


# -------------------- refusals
def test_several_factors_are_refused(cbpp: Any) -> None:
    data = cbpp.assign(obs=np.arange(len(cbpp)))
    with pytest.raises(ValueError, match=r"\(\(Intercept\) \| herd\) is on 'herd'.*'obs'.*nAGQ = 1"):
        gj.glmer("cbind(incidence, size - incidence) ~ period + (1 | herd) + (1 | obs)", data, nAGQ=5)
    design = gj.design("cbind(incidence, size - incidence) ~ period + (1 | herd) + (1 | obs)", data)
    with pytest.raises(ValueError, match="one grouping factor, the design has 2"):
        gj.agq_deviance(np.ones(2), np.zeros(4), design, gj.families.Binomial(), 5)


def test_too_many_nodes_are_refused() -> None:
    design, theta, beta = small_design(4)
    with pytest.raises(ValueError, match=r"has 160,000 nodes per level; the limit is 100,000: use nAGQ = 17"):
        gj.agq_deviance(theta, beta, design, gj.families.Binomial(), 20)
    with pytest.raises(ValueError, match="at most 100, got 101"):
        gj.agq_deviance(theta, beta, design, gj.families.Binomial(), 101)
    with pytest.raises(ValueError, match="positive integer, got 0"):
        gj.agq_deviance(theta, beta, design, gj.families.Binomial(), 0)
    rng = np.random.default_rng(0)
    level = np.repeat(np.arange(9), 12)
    five = gj.design_arrays((level % 2).astype(float), np.ones(108), [(rng.normal(size=(108, 5)), level)])
    with pytest.raises(ValueError, match="at most 4 random effects per level, the model has 5"):
        gj.agq_deviance(np.ones(15), np.zeros(1), five, gj.families.Binomial(), 3)


@pytest.mark.parametrize("nAGQ", [-1, 2.5, True])
def test_bad_numbers_of_points(nAGQ: Any, cbpp: Any) -> None:
    with pytest.raises(ValueError, match="non-negative integer"):
        gj.glmer("cbind(incidence, size - incidence) ~ period + (1 | herd)", cbpp, nAGQ=nAGQ)


def test_memory_is_bounded() -> None:
    """11^3 nodes for 10^5 rows: working memory is that of some chunks, not of 1.3e8 values (1 GB each array)."""
    n, m = 100_000, 5_000
    rng = np.random.default_rng(1)
    z = rng.normal(size=(n, 3))
    design = gj.design_arrays((z[:, 0] > 0).astype(float), np.ones(n), [(z, np.arange(n) % m)])

    def both(x: Any, design: gj.Design) -> Any:
        return jax.value_and_grad(lambda v: gj.agq_deviance(v[:6], v[6:], design, gj.families.Binomial(), 11))(x)

    used = jax.jit(both).lower(np.zeros(7), design).compile().memory_analysis().temp_size_in_bytes
    chunk = 8 * max(n, _quadrature.CHUNK)
    assert used < 45 * chunk, used / chunk


# -------------------- the quality of the approximation
@cache
def laplace_fit(name: str) -> gj.MixedModel:
    row = model_index()[name]
    return gj.glmer(row["formula"], load_data(row["dataset"]), family=f"{row['family']}({row['link']})")


def test_error_of_cbpp() -> None:
    model = laplace_fit("cbpp_nagq1")
    found = model.quadrature_error()
    assert found.error == pytest.approx(184.052564 - 183.966738, abs=3e-3)  # at the estimates of nAGQ = 1
    assert found.totals["laplace"] == found.totals["fit"] == pytest.approx(model.objective, abs=1e-9)
    assert found.settled and found.k in (3, 5, 9)
    assert list(found.frame.index) == list(model.ranef()["herd"].index) and found.frame["rows"].sum() == 56
    text = str(found)
    assert "15 integrals, one per level of herd" in text and f"{found.k} points" in text
    assert "<table>" in found._repr_html_() and len(found.to_frame()) == 15
    # the sum over levels is the objective itself
    design = model._design
    value = gj.agq_deviance(model.theta, model.beta, design, model.family, 2 * found.k - 1)
    assert found.totals["2k-1"] == pytest.approx(float(value), abs=1e-11)
    assert "off by" not in str(model.summary())


def test_shift_is_where_the_parameters_go() -> None:
    before = laplace_fit("cbpp_nagq1")
    after, _ = fitted("cbpp_nagq25")
    shift = before.quadrature_error(25).shift
    moved = np.concatenate([after.theta - before.theta, after.beta - before.beta])
    # one Newton step: what is left is of second order in the move, here a thirtieth of a standard error
    assert_close(shift["shift"], moved, atol=2e-2 * np.abs(moved).max())
    assert_close(shift["std_error"].to_numpy()[1:], after.bse, rtol=5e-3)


def test_summary_flags_toenail() -> None:
    model = laplace_fit("toenail_nagq1")
    found = model.quadrature_error(tol=0.05, shift=False)
    assert abs(found.error) > 1.0 and found.settled and found.shift is None
    assert "NOT within" in str(model.quadrature_error(5, shift=False))
    text = str(model.summary())
    assert re.search(r"The Laplace approximation is off by \S+ deviance units at these estimates", text), text
    few, _ = fitted("toenail_nagq5")
    assert "Quadrature with nAGQ = 5 is off by" in str(few.summary())
    enough, _ = fitted("toenail_nagq25")
    assert "off by" not in str(enough.summary())


def test_error_refusals() -> None:
    crossed = laplace_fit("cbpp_herd_obs")
    with pytest.raises(NotSupportedError, match="one grouping factor"):
        crossed.quadrature_error()
    assert crossed._approximation_note == ""
    linear = gj.lmer("Reaction ~ Days + (Days | Subject)", load_data("sleepstudy"))
    with pytest.raises(NotSupportedError, match="exact"):
        linear.integrands()
    with pytest.raises(ValueError, match="tol must be positive"):
        laplace_fit("cbpp_nagq1").quadrature_error(tol=0.0)
    with pytest.raises(ValueError, match="from 1 to 100"):
        laplace_fit("cbpp_nagq1").quadrature_error(0)


def test_integrands() -> None:
    model = laplace_fit("cbpp_nagq1")
    rule = gj.gauss_hermite(25)
    frame = model.integrands(z=rule.z)
    ratio = frame["ratio"].to_numpy().reshape(15, 25)
    assert_close(ratio[:, 12], np.ones(15), rtol=1e-12)
    # the quadrature of what is drawn is each level's likelihood
    by_level = model.quadrature_error(25, shift=False).frame
    assert_close(by_level["laplace"] - 2.0 * np.log(ratio @ rule.w), by_level["k"], rtol=1e-12)
    assert_close(frame["density"], frame["normal"] * frame["ratio"], rtol=1e-13)


def test_integrands_of_two_axes() -> None:
    model = gj.glmer("use ~ age + urban + (urban | district)", load_data("Contraception"))
    z = np.array([-1.5, 0.0, 2.0])
    T = np.zeros((2, 2))
    T[[0, 1, 1], [0, 0, 1]] = model.theta
    design = model._design
    u = model.u.reshape(-1, 2)
    for axis in (0, 1):
        frame = model.integrands(axis, z)
        for j in (0, 7):
            rows = np.asarray(design.level[0]) == j
            A = np.asarray(design.z[0])[rows] @ T
            eta, y = model.linear_predictor[rows], np.asarray(design.y)[rows]
            mu = special.expit(eta)
            L = np.linalg.cholesky(A.T @ ((mu * (1 - mu))[:, None] * A) + np.eye(2))
            step = np.linalg.inv(L).T[:, axis]

            def penalised(
                v: np.ndarray, A: np.ndarray = A, eta: np.ndarray = eta, y: np.ndarray = y, j: int = j
            ) -> float:
                e = eta + A @ (v - u[j])
                return float((y * e - np.logaddexp(0, e)).sum() - 0.5 * v @ v)

            expected = [np.exp(penalised(u[j] + s * step) - penalised(u[j]) + 0.5 * s * s) for s in z]
            own = frame[frame["level"] == model._data.terms[0].levels[j]]
            assert_close(own["ratio"], expected, rtol=1e-10)
    with pytest.raises(ValueError, match="axis must be from 0 to 1"):
        model.integrands(2)


@pytest.mark.parametrize("kind", ["density", "ratio"])
def test_plot(kind: str) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    model = laplace_fit("cbpp_nagq1")
    figure, data = model.plot_integrands(kind)
    panels = [a for a in figure.axes if a.get_visible()]
    assert len(panels) == 15 and [a.get_title() for a in panels] == [str(v) for v in model.ranef()["herd"].index]
    drawn = panels[3].lines[-1].get_ydata()
    assert_close(drawn, data.loc[data["level"] == "4", kind], rtol=0.0)
    plt.close(figure)
    figure, data = model.plot_integrands(kind, levels=["2", "11"])
    assert sorted(data["level"].unique()) == ["11", "2"]
    plt.close(figure)
    with pytest.raises(ValueError, match="herd has no level 99"):
        model.plot_integrands(levels=[99])
    with pytest.raises(ValueError, match="kind must be"):
        model.plot_integrands("histogram")
