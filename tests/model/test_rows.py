"""Sums over chunks of rows: the same numbers as from all rows at once, whatever the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, load_data

import glmmjax as gj
from glmmjax.fit import glmm
from glmmjax.model import rows as _rows

LOGIT_K = gj.families.Custom(
    lambda y, eta, aux: aux["weights"] * (y * eta - aux["k"] * jax.nn.softplus(eta)), "identity", {"k": 1.5}
)


@contextmanager
def chunks_of(size: int) -> Iterator[None]:
    """Chunks of `size` rows, in programs that know nothing of others."""
    before = _rows.CHUNK, _rows.LARGEST_CHUNK
    _rows.CHUNK, _rows.LARGEST_CHUNK = size, size
    jax.clear_caches()
    try:
        yield
    finally:
        _rows.CHUNK, _rows.LARGEST_CHUNK = before
        jax.clear_caches()


def in_chunks_and_at_once(function: Callable[[], Any], size: int = 7) -> tuple[Any, Any]:
    with chunks_of(size):
        chunked = function()
    return chunked, function()


def crossed(rng: np.random.Generator, n: int = 90) -> tuple[gj.Design, np.ndarray]:
    """Two crossed factors, one with two columns; counts. And parameters (theta, beta)."""
    a, b = rng.integers(0, 9, n), rng.integers(0, 6, n)
    x = rng.normal(size=n)
    X = np.column_stack([np.ones(n), x])
    y = rng.poisson(np.exp(0.3 + 0.4 * x + 0.3 * rng.normal(size=9)[a])).astype(float)
    return gj.design_arrays(y, X, [(X, a), (np.ones(n), b)]), np.array([0.5, -0.1, 0.3, 0.4, 0.3, 0.4])


@pytest.mark.parametrize("kind", ["crossed", "cloglog", "custom"])
def test_objective_in_chunks(kind: str, rng: np.random.Generator) -> None:
    """Value, gradient, exact Hessian and derivatives in the data; the last chunk is not full."""
    design, x = crossed(rng)
    family = gj.families.get("poisson")
    phi = np.zeros(0)
    if kind == "cloglog":
        family = gj.families.get("binomial(cloglog)")
        design = gj.design_arrays(
            (np.asarray(design.y) > 1).astype(float),
            design.X,
            [(design.X, design.level[0])],
            weights=rng.integers(1, 4, design.n),
        )
        x = np.array([0.5, -0.1, 0.3, -0.3, 0.4])
    if kind == "custom":
        family, phi = LOGIT_K, np.array([1.5])
    t = design.n_theta

    def value(x: jax.Array, offset: jax.Array) -> jax.Array:
        return gj.laplace_deviance(x[:t], x[t : t + 2], replace(design, offset=offset), family, x[t + 2 :])

    x = np.concatenate([x, phi])

    def all_of_it() -> tuple[Any, ...]:
        offset = jnp.zeros(design.n)
        f, (g, by_row) = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(x, offset)
        H = jax.jit(jax.jacfwd(jax.grad(value)))(x, offset)
        return f, g, by_row, H

    chunked, whole = in_chunks_and_at_once(all_of_it)
    for a, b in zip(chunked, whole, strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("nAGQ", [0, 1])
def test_fit_in_chunks(nAGQ: int) -> None:
    """Starting values, estimates and the Hessian of a fit."""
    data = load_data("cbpp")

    def fit() -> gj.MixedModel:
        return gj.glmer("cbind(incidence, size - incidence) ~ period + (1 | herd)", data, "binomial", nAGQ=nAGQ)

    def numbers() -> tuple[Any, ...]:
        m = fit()
        return m.objective, m.theta, m.beta, m.vcov(type="rx"), m.u, m.fit_stats.evaluations

    chunked, whole = in_chunks_and_at_once(numbers, 9)
    for a, b in zip(chunked, whole, strict=True):
        assert_close(np.asarray(a), np.asarray(b), rtol=1e-9, atol=1e-9)


def test_memory_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Temporaries of value and gradient grow with the chunk, not with the rows."""
    monkeypatch.setattr(_rows, "CHUNK", 512)
    monkeypatch.setattr(_rows, "LARGEST_CHUNK", 512)
    family = gj.families.get("binomial")

    def temporaries(n: int) -> int:
        g, x = rng.integers(0, 5, n), rng.normal(size=n)
        X = np.column_stack([np.ones(n), x])
        design = gj.design_arrays((x + rng.normal(size=n) > 0).astype(float), X, [(X, g)])
        carry = glmm.Carry((jnp.zeros((5, 2)),), jnp.zeros(2), jnp.zeros((), jnp.int32))

        def objective(x: jax.Array, design: gj.Design) -> Any:
            return glmm.make_objective(design, family, "expected", 1, jnp.zeros(()))(x, carry)[:2]

        compiled = jax.jit(objective).lower(jnp.array([0.5, 0.0, 0.3, 0.0, 0.5]), design).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    few, many = temporaries(4_000), temporaries(40_000)

    assert many - few < 0.1 * 8 * 36_000
