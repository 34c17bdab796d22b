"""The objective and its derivatives at given parameters: no optimiser is involved.

Values against lme4 (fixed_params/), values and gradients against a dense NumPy Laplace approximation iterated
to machine precision (`helpers.DenseLaplace`), gradients and Hessians against central differences.
"""

from __future__ import annotations

import re
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest
from helpers import DenseLaplace, assert_close, fd6, fixed_params, load_data, reference_model

import glmmjax as gj

#: every Laplace file of the folder for families with fixed dispersion
NAMES = [
    "cbpp_nagq1",
    "cbpp_probit",
    "cbpp_cloglog",
    "cbpp_cauchit",
    "cbpp_herd_obs",
    "toy15_nagq1",
    "contra_cm3",
    "contra_cm4",
    "contra_cm5",
    "grouse_full",
    "grouse_sqrt",
    "owls_offset",
    "verbagg",
]
#: files in which lme4's own value moves by up to 6e-9 of it between calls (its PIRLS stops early)
NOISY = {"contra_cm3", "contra_cm4", "cbpp_herd_obs"}
CASES = [pytest.param(n, marks=pytest.mark.slow) if n in ("grouse_full", "verbagg") else n for n in NAMES]


@partial(jax.jit, static_argnums=(1, 3, 4))
def value_and_gradient(x: Any, t: int, design: gj.Design, family: Any, hessian: str) -> Any:
    return jax.value_and_grad(lambda v: gj.laplace_deviance(v[:t], v[t:], design, family, None, hessian))(x)


@partial(jax.jit, static_argnums=(1, 3, 4))
def exact_hessian(x: Any, t: int, design: gj.Design, family: Any, hessian: str) -> Any:
    return jax.hessian(lambda v: gj.laplace_deviance(v[:t], v[t:], design, family, None, hessian))(x)


class Case:
    """A design and its objective as functions of x = (theta, beta)."""

    def __init__(self, record: dict[str, Any], family: gj.families.Family, hessian: str = "expected") -> None:
        self.design = gj.design(
            record["formula"],
            load_data(record["dataset"]),
            weights=record["weights"],
            offset=record["offset"],
        )
        self.family, self.hessian, self.t = family, hessian, self.design.n_theta
        shape = getattr(family, "theta", 1.0)
        self.dense = DenseLaplace(self.design, family.name, family.link.name, hessian, shape)

    def value(self, x: np.ndarray) -> float:
        return float(self.both(x)[0])

    def gradient(self, x: np.ndarray) -> np.ndarray:
        return self.both(x)[1]

    def both(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        v, g = value_and_gradient(np.asarray(x, float), self.t, self.design, self.family, self.hessian)
        return float(v), np.asarray(g)

    def exact(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(exact_hessian(x, self.t, self.design, self.family, self.hessian))

    def scales(self) -> np.ndarray:
        """Sizes of the parameters that change eta alike: theta 1, beta 1 / (rms of its column)."""
        X = np.asarray(self.design.X)
        return np.concatenate([np.ones(self.t), 1.0 / np.sqrt(np.mean(X * X, axis=0))])


@cache
def case(name: str) -> tuple[Case, list[dict[str, Any]]]:
    record = fixed_params(name)
    kind, _, link = re.fullmatch(r"(\w+)\((['\"]?)(\w*)['\"]?\)", record["family_call"]).groups()
    made = Case(record, gj.families.get(f"{kind}({link})" if link else kind))
    assert made.t == record["n_theta"] and made.design.p == len(record["beta_names"])
    return made, record["points"]


def chosen(points: list[dict[str, Any]]) -> list[np.ndarray]:
    """The first, the middle and the last point of a file."""
    return [np.array(points[i]["par"], float) for i in sorted({0, len(points) // 2, len(points) - 1})]


@pytest.mark.parametrize("name", CASES)
def test_value(name: str) -> None:
    made, points = case(name)
    for point in points:
        x = np.array(point["par"], float)
        ours, theirs = made.value(x), point["objective"]
        if name not in NOISY:
            # lme4's PIRLS at its tightest tolerance (measured: below 5e-10)
            assert ours == pytest.approx(theirs, rel=1e-9)
            continue
        assert ours == pytest.approx(theirs, rel=1e-8)
        if ours != pytest.approx(theirs, rel=1e-9):
            # who is right is settled by Newton to machine precision (measured: 1e-15)
            exact = made.dense.deviance(x[: made.t], x[made.t :])
            assert ours == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_dense(name: str) -> None:
    made, points = case(name)
    for x in chosen(points):
        value, gradient = made.both(x)
        assert value == pytest.approx(made.dense.deviance(x[: made.t], x[made.t :]), rel=1e-12)
        expected = made.dense.gradient(x[: made.t], x[made.t :])
        # rounding only: sums of n terms, some of which cancel
        assert_close(gradient, expected, rtol=1e-10, atol=1e-11 * np.abs(expected).max(), what=str(x))


def check_derivatives(made: Case, x: np.ndarray) -> None:
    s = made.scales()
    _, gradient = made.both(x)
    # sixth-order differences with steps of 1e-3: rounding 1e-16 |deviance| / 1e-3 is what limits them
    by_values = fd6(made.value, x, 2e-3 * s)
    size = np.abs(gradient * s).max() + 1e-3 * abs(made.value(x))
    assert_close(gradient * s, by_values * s, rtol=1e-7, atol=1e-7 * size, what="gradient")
    by_gradients = fd6(made.gradient, x, 2e-3 * s)
    hessian = made.exact(x)
    scale = np.outer(s, s)
    # rounding 1e-16 |gradient| / 1e-3, truncation 1e-18 times seventh derivatives
    assert_close(hessian * scale, by_gradients * scale, atol=1e-6 * np.abs(hessian * scale).max(), what="Hessian")
    assert_close(hessian, hessian.T, rtol=1e-9, atol=1e-12 * np.abs(hessian).max(), what="symmetry")


@pytest.mark.parametrize("name", CASES)
def test_derivatives(name: str) -> None:
    made, points = case(name)
    for x in chosen(points)[1:]:
        check_derivatives(made, x)


@pytest.mark.parametrize("hessian", ["observed", "expected"])
def test_negative_binomial_fixed_shape(hessian: str) -> None:
    """No fixed_params file: values by the dense reference, at and away from lme4's optimum."""
    record = reference_model("arab_nb_glmer")
    shape = float(record["family_call"].split("=")[1].strip(") "))
    made = Case(record, gj.families.NegativeBinomial(shape), hessian)
    ref = record["results"]
    best = np.array(ref["theta"]["values"] + ref["fixef"]["values"])
    for x in (best, best * 1.1 + 0.05):
        value, gradient = made.both(x)
        t = made.t
        assert value == pytest.approx(made.dense.deviance(x[:t], x[t:]), rel=1e-12)
        expected = made.dense.gradient(x[:t], x[t:])
        assert_close(gradient, expected, rtol=1e-10, atol=1e-9 * np.abs(expected).max(initial=1.0))
        check_derivatives(made, x)
    if hessian == "expected":  # lme4's deviance, limited by its PIRLS
        assert made.value(best) == pytest.approx(ref["minus2logLik"], rel=1e-9)


@pytest.mark.parametrize("name", ["cbpp_probit", "cbpp_cloglog", "cbpp_cauchit", "grouse_sqrt"])
def test_observed_information(name: str) -> None:
    """The true Laplace approximation for links that are not canonical."""
    record = fixed_params(name)
    expected, points = case(name)
    made = Case(record, expected.family, "observed")
    x = chosen(points)[1]
    value, gradient = made.both(x)
    t = made.t
    assert value == pytest.approx(made.dense.deviance(x[:t], x[t:]), rel=1e-12)
    truth = made.dense.gradient(x[:t], x[t:])
    assert_close(gradient, truth, rtol=1e-10, atol=1e-11 * np.abs(truth).max())
    assert abs(value - expected.value(x)) > 1e-6 * abs(value)  # the two do differ


@pytest.mark.parametrize("name", ["cbpp_nagq1", "contra_cm4", "cbpp_herd_obs", "contra_cm5", "grouse_full"])
def test_modes(name: str) -> None:
    made, points = case(name)
    run = jax.jit(gj.pirls, static_argnums=3)
    for point in points[1:3]:
        x = np.array(point["par"], float)
        mode = run(x[: made.t], x[made.t :], made.design, made.family)
        assert int(mode.status) == 0
        # lme4's modes are as good as the square root of its deviance tolerance
        assert_close(mode.u, point["u_modes"], atol=2e-4, what="lme4's u")
        # decrement below 2e-9 before the last full Newton step, squared by that step (measured: 2e-11)
        assert_close(mode.u, made.dense.mode(x[: made.t], x[made.t :]), atol=1e-9, what="dense u")
