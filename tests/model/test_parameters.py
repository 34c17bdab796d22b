"""The vector of parameters: where each is, its name, its units, and what it means."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from glmmjax.families import LOG_PHI_MAX
from glmmjax.fit.glmm import scale_design
from glmmjax.model.covariance import Diagonal, Unstructured
from glmmjax.model.design import Design, design_arrays
from glmmjax.model.parameters import Layout

#: theta has 3 + 2 entries
X = np.array([1.1, -0.3, 0.6, 0.9, 0.2, 10.0, -20.0, 0.5, 0.25])
LAYOUTS = {
    "all": (2, 2, True, False),
    "beta profiled out": (2, 2, False, False),
    "linear": (2, 0, True, True),
    "theta alone": (2, 0, False, False),
    "no fixed effects": (0, 1, True, False),
}


def design(p: int = 2) -> Design:
    rng = np.random.default_rng(3)
    g, h = np.repeat(np.arange(6), 5), np.tile(np.arange(5), 6)
    z = np.column_stack([np.ones(30), 50.0 + rng.normal(size=30)])
    fixed = np.column_stack([np.ones(30), 7.0 + 3.0 * rng.normal(size=30)])[:, :p]
    return design_arrays(rng.normal(size=30), fixed, [(z, g, Unstructured(2)), (z, h, Diagonal(2))])


def layout(kind: str) -> Layout:
    p, n_phi, has_beta, has_sigma = LAYOUTS[kind]
    return Layout(design(p).terms, p, n_phi, has_beta, has_sigma)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_blocks_cover_x_in_order(kind: str) -> None:
    made = layout(kind)
    x = X[: made.size]
    numbers = np.concatenate([np.arange(made.size)[at] for at in made.at])
    assert numbers.tolist() == list(range(made.size))
    parts = made.unpack(x)
    assert [len(part) for part in parts] == [5, made.p * made.has_beta, made.n_phi, int(made.has_sigma)]
    beta = parts.beta if made.has_beta else np.array([99.0])  # is left out
    assert made.pack(parts.theta, beta, parts.log_phi, parts.log_sigma).tolist() == x.tolist()
    assert isinstance(made.pack(jnp.asarray(parts.theta), *parts[1:]), jax.Array)
    many = np.stack([x, 2.0 * x])
    assert made.pack(*made.unpack(many)).tolist() == many.tolist()


def test_names() -> None:
    theta, x, phi = list("abcde"), ["(Intercept)", "x"], ["phi", "psi"]
    assert layout("all").names(theta, x, phi) == [*theta, *x, "log(phi)", "log(psi)"]
    assert layout("beta profiled out").names(theta, x, phi) == [*theta, "log(phi)", "log(psi)"]
    assert layout("linear").names(theta, x, []) == [*theta, *x, "log(sigma)"]


def test_estimates_as_a_vector() -> None:
    theta, beta = X[:5], X[5:7]
    found = layout("all").of(theta, beta, 1.0, np.array([2.0, np.inf]))
    assert_close(found, [*theta, *beta, np.log(2.0), LOG_PHI_MAX], rtol=1e-15, what="x")
    many = layout("linear").of(np.stack([theta] * 3), np.stack([beta] * 3), np.array([1.0, 2.0, 3.0]), np.zeros((3, 0)))
    assert_close(many[:, -1], np.log([1.0, 2.0, 3.0]), rtol=1e-15, what="log sigma")


def test_natural_scales() -> None:
    point = layout("linear").natural(jnp.asarray(X[:8]))
    T = np.array([[1.1, 0.0], [-0.3, 0.6]])
    assert_close(point.cov[0], np.exp(1.0) * T @ T.T, rtol=1e-14, what="covariance")
    assert_close(point.cov[1], np.exp(1.0) * np.diag([0.81, 0.04]), rtol=1e-14, what="independent effects")
    assert_close(point.sigma, np.exp(0.5), rtol=1e-15, what="sigma")
    params = layout("beta profiled out").parameters(jnp.asarray(X[:7]), "given")
    assert params.beta == "given" and params.phi.tolist() == np.exp([10.0, -20.0]).tolist()


@pytest.mark.parametrize("kind", ["all", "beta profiled out", "no fixed effects"])
def test_internal_units_leave_the_model_as_it_is(kind: str) -> None:
    made, own = layout(kind), design(LAYOUTS[kind][0])
    scaled, scaling = scale_design(own, made)
    x = X[: made.size]
    inner = scaling.inner(x)
    assert_close(scaling.outer(inner), x, rtol=1e-10, what="there and back")
    assert_close(scaling.outer(np.stack([inner, 2.0 * inner], axis=1)), np.stack([x, 2.0 * x], axis=1), rtol=1e-10)
    assert_close(inner[made.at.log_phi], x[made.at.log_phi], rtol=0.0, atol=0.0, what="dispersions have no units")
    there, here = made.unpack(inner), made.unpack(x)
    if made.has_beta:
        assert_close(np.asarray(scaled.X) @ there.beta, np.asarray(own.X) @ here.beta, rtol=1e-10, what="X beta")
    for term in made.terms:  # of a row's random effects
        zs, z = (np.asarray(d.z[term.block])[:, term.columns] for d in (scaled, own))
        T, S = (term.structure.host_factor(part.theta[term.theta]) for part in (here, there))
        assert_close(zs @ S, z @ T, rtol=1e-8, what="z T")


def test_a_layout_is_static() -> None:
    one, other = layout("all"), layout("all")
    assert one.at is one.at and one == other and hash(one) == hash(other)
    assert one != replace(one, has_beta=False)
