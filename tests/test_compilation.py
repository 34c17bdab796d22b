"""How often anything is traced or compiled is a test, not a hope."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_data

import glmmjax as gj

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
TRACED = "/jax/core/compile/jaxpr_trace_duration"
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_counts: dict[str, int] = {TRACED: 0, LOWERED: 0}


def _listen(event: str, duration: float, **_: Any) -> None:
    if event in _counts:
        _counts[event] += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


class Count:
    traces = 0
    programs = 0


@contextmanager
def counted() -> Iterator[Count]:
    """Functions traced and programs lowered (compiled, or fetched from the cache) inside."""
    before, count = dict(_counts), Count()
    yield count
    count.traces = _counts[TRACED] - before[TRACED]
    count.programs = _counts[LOWERED] - before[LOWERED]


def test_the_counter_counts() -> None:
    with counted() as first:
        jax.jit(lambda x: jnp.sin(x) + 17.0)(jnp.arange(7.0))
    assert first.traces >= 1 and first.programs >= 1


def responses(m: gj.MixedModel, n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    trials = m.getME("weights").astype(int)
    return [rng.binomial(trials, np.clip(m.fitted, 0.05, 0.9)) / trials for _ in range(n)]


@pytest.mark.parametrize(
    ("formula", "data", "settings"),
    [
        (CBPP, "cbpp", {}),
        (CBPP, "cbpp", {"nAGQ": 0}),
        (CBPP, "cbpp", {"family": "binomial(probit)"}),
        ("use ~ age * ch + I(age^2) + urban + (urban | district)", "Contraception", {}),
    ],
    ids=["laplace", "nAGQ0", "probit", "vector"],
)
def test_refits_trace_nothing(formula: str, data: str, settings: dict[str, Any]) -> None:
    m = gj.glmer(formula, load_data(data), **settings)
    again = responses(m, 3)
    fits = [m.refit(again[0])]
    _ = fits[0].bse
    with counted() as count:
        fits += [m.refit(y) for y in again[1:]]
        for fit in fits:
            _ = fit.bse, fit.objective, fit.theta
    assert (count.traces, count.programs) == (0, 0)
    assert len({fit.objective for fit in fits}) == 3 and all(f.converged for f in fits)


def test_the_first_refit_traces_nothing_either() -> None:
    m = gj.glmer(CBPP, load_data("cbpp"))
    with counted() as count:
        m.refit(responses(m, 1)[0])
    assert (count.traces, count.programs) == (0, 0)


def test_same_shapes_trace_nothing() -> None:
    """Another data set with as many rows, columns and levels uses the programs of the first."""
    data = load_data("cbpp")
    gj.glmer(CBPP, data)
    other = data.copy()
    other["incidence"] = np.minimum(other["incidence"] + (np.arange(56) % 5 == 0), other["size"])
    other["cow"] = other["herd"]
    with counted() as count:
        # names, data, tolerances and limits are not part of a program
        gj.glmer("cbind(incidence, size - incidence) ~ period + (1 | cow)", other)
        gj.glmer(CBPP, data, start={"theta": [0.9]}, control=gj.Control(tol=1e-9, max_evaluations=90))
    assert (count.traces, count.programs) == (0, 0)


def test_a_user_family_is_traced_once() -> None:
    calls = 0

    def logpdf(y: Any, eta: Any, aux: Any) -> Any:
        nonlocal calls
        calls += 1
        return aux["weights"] * (y * eta - jnp.logaddexp(0.0, eta))

    family = gj.families.Custom(logpdf, "logit")
    m = gj.glmer(CBPP, load_data("cbpp"), family=family)
    first = calls
    assert first > 0
    m.refit(responses(m, 1)[0])
    gj.glmer(CBPP, load_data("cbpp"), family=family)
    assert calls == first  # the body did not run again


def test_jit_of_the_pure_layer_traces_once() -> None:
    design = gj.design(CBPP, load_data("cbpp"))
    traces = 0

    @jax.jit
    def f(x: Any, d: gj.Design) -> Any:
        nonlocal traces
        traces += 1
        return jax.value_and_grad(lambda v: gj.laplace_deviance(v[:1], v[1:], d, gj.families.Binomial()))(x)

    for scale in (1.0, 0.9, 0.8):
        # the family is equal, not the same object: static arguments are compared by value
        f(scale * np.array([0.6, -1.4, -1.0, -1.1, -1.6]), design)
    f(np.zeros(5), gj.design(CBPP, load_data("cbpp")))
    assert traces == 1


def test_few_programs_for_a_fit() -> None:
    """One search program and one for the start; nothing per evaluation."""
    jax.clear_caches()
    gj.glmer(CBPP, load_data("cbpp"))
    jax.clear_caches()
    with counted() as count:
        m = gj.glmer(CBPP, load_data("cbpp"))
    assert m.fit_stats.evaluations + m.fit_stats.hessian_evaluations > 15
    # eager operations on the host side count as programs too; far fewer than evaluations times operations
    assert count.programs <= 12


def test_linear_models() -> None:
    """A second fit, a refit, the other criterion and another response compile nothing."""
    data = load_data("sleepstudy")
    m = gj.lmer("Reaction ~ Days + (Days | Subject)", data)
    with counted() as count:
        gj.lmer("Reaction ~ Days + (Days | Subject)", data.assign(Reaction=data["Reaction"] + data["Days"]))
        m.refit_ml().bse  # noqa: B018
        m.refit(data["Reaction"].to_numpy()[::-1].copy())
        str(m.summary())
    # the summary's residuals need one program, per-row means
    assert count.programs <= 1
    with counted() as count:
        str(m.refit_ml().summary())
    assert count.traces == count.programs == 0
