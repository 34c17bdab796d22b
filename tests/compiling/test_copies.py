"""Models and what they return, pickled, copied, sent to other processes, and in processes that were forked."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from helpers import load_data

import glmmjax as gj
from glmmjax import links

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
SLEEP = "Reaction ~ Days + (Days | Subject)"
COPIES = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


def logpdf(y: Any, eta: Any, aux: Any) -> Any:
    return aux["weights"] * (y * eta - jnp.logaddexp(0.0, eta))


def exponential(eta: Any) -> Any:
    return jnp.exp(eta)


@cache
def models() -> dict[str, gj.MixedModel]:
    """Fitted, and asked what they keep."""
    g = gj.glmer(CBPP, load_data("cbpp"))
    m = gj.lmer(SLEEP, load_data("sleepstudy"))
    for one in (g, m):
        one.predict(se=True)
        one.summary()
        one.profile("theta_")
        one.vcov(type="robust")
        one.hatvalues()
    assert len(m.pvalues) == 2
    return {"glmer": g, "lmer": m, "custom": gj.glmer(CBPP, load_data("cbpp"), gj.families.Custom(logpdf, "logit"))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["glmer", "lmer", "custom"])
def test_a_model_is_copied(name: str, how: str) -> None:
    m = models()[name]
    twin = COPIES[how](m)
    assert twin.objective == m.objective and twin.family == m.family and twin.family.link is m.family.link
    np.testing.assert_array_equal(twin.predict(), m.predict())
    pd.testing.assert_frame_equal(twin.confint(), m.confint())
    assert str(twin.summary()) == str(m.summary())
    y = m.getME("y")
    assert twin.refit(y[::-1].copy()).objective == pytest.approx(m.refit(y[::-1].copy()).objective, abs=1e-9)


def results() -> dict[str, Callable[[], Any]]:
    g, m, cbpp = models()["glmer"], models()["lmer"], load_data("cbpp")
    setup = gj.glmer_setup(CBPP, cbpp)
    return {
        "setup": lambda: setup,
        "linear setup": lambda: gj.lmer_setup(SLEEP, load_data("sleepstudy")),
        "deviance function": lambda: gj.deviance_function(setup),
        "estimates": lambda: gj.optimise(gj.deviance_function(setup)),
        "design": lambda: gj.design(CBPP, cbpp),
        "family": lambda: gj.families.get("binomial(cloglog)"),
        "shape": lambda: gj.families.get("negative.binomial(2)"),
        "control": lambda: gj.Control(tol=1e-8),
        "formula": lambda: gj.parse(CBPP),
        "summary": m.summary,
        "profile": lambda: g.profile("theta_"),
        "bootstrap": lambda: g.bootstrap(3),
        "means": lambda: g.marginal_means("period"),
        "influence": lambda: g.influence("herd"),
        "wald": lambda: g.wald_test("period2 = 0"),
        "VarCorr": m.VarCorr,
        "quadrature": lambda: g.quadrature_error(3),
        "anova": lambda: gj.anova(m),
        "lm_list": lambda: gj.lm_list("Reaction ~ Days | Subject", load_data("sleepstudy")),
        "structure": lambda: gj.structure(g),
        "pool": lambda: gj.pool([g, g]),
    }


@pytest.mark.parametrize("how", COPIES)
def test_results_are_copied(how: str) -> None:
    for name, make in results().items():
        value = make()
        twin = COPIES[how](value)
        assert type(twin) is type(value), name
        assert repr(twin) == repr(value), name
    many = gj.fit_many("~ period + (1 | herd)", load_data("cbpp"), "binomial", y=load_data("cbpp")[["incidence"]] > 0)
    pd.testing.assert_frame_equal(COPIES[how](many).frame, many.frame)


@pytest.mark.parametrize("name", links.LINKS)
def test_links_stay_themselves(name: str) -> None:
    """The families compare them by identity."""
    assert pickle.loads(pickle.dumps(links.LINKS[name])) is links.LINKS[name]
    assert copy.deepcopy(links.LINKS[name]) is links.LINKS[name]
    mine = links.Link(name, exponential)
    assert copy.deepcopy(mine) == mine and copy.deepcopy(mine) is not links.LINKS[name]


def test_long_formulas(cbpp: pd.DataFrame) -> None:
    """Sums and parentheses that Python's stack has no room for are read all the same, and travel."""
    many = [f"v{i}" for i in range(600)]
    rng = np.random.default_rng(0)
    wide = pd.DataFrame(
        {"y": rng.normal(size=1300), "g": np.arange(1300) % 13} | {v: rng.normal(size=1300) for v in many}
    )
    calls = sys.getrecursionlimit()
    short = gj.lmer_setup("y ~ v0 + v1 + (1 | g)", wide)
    deep = gj.lmer_setup("y ~ " + "(" * 400 + "v0" + ")" * 400 + " + v1" * 400 + " + (1 | g)", wide)
    np.testing.assert_array_equal(deep.design.X, short.design.X)
    whole = gj.lmer_setup("y ~ . - g + (1 | g)", wide)
    assert whole.x_names == ["(Intercept)", *many]
    for twin in (pickle.loads(pickle.dumps(whole)), copy.deepcopy(whole)):
        assert str(twin.formula) == str(whole.formula) and twin.data.formula == whole.data.formula
    less = gj.update_formula("y ~ " + " + ".join(many) + " + (1 | g)", ". ~ . - v7")
    assert len(less.fixed_terms.labels) == 599
    assert sys.getrecursionlimit() == calls
    with pytest.raises(gj.FormulaError):  # an error comes out of the thread as it is
        gj.lmer_setup("y ~ " + " + v1" * 400 + " + sine(v2) + (1 | g)", wide)


def fitted(seed: int) -> gj.MixedModel:
    rng = np.random.default_rng(seed)
    data = {"y": rng.poisson(2.0, 120), "x": rng.normal(size=120), "g": np.arange(120) % 12}
    return gj.glmer("y ~ x + (1 | g)", data, "poisson", control={"check_singular": "ignore"})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
def test_a_forked_process_says_what_to_do() -> None:
    """It would wait for JAX's threads, which the fork left behind."""
    fitted(0)
    m = models()["glmer"]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        for task, arguments in ((fitted, (1,)), (m.predict, ())):
            with pytest.raises(RuntimeError, match="was forked from one that had used JAX.*'spawn'"):
                pool.apply_async(task, arguments).get(timeout=60)
        assert pool.apply_async(gj.design, (CBPP, load_data("cbpp"))).get(timeout=60).n == 56  # NumPy alone


def test_workers_return_models(tmp_path: Path) -> None:
    script = """
        import multiprocessing
        import numpy as np
        import glmmjax as gj

        def fit(seed):
            rng = np.random.default_rng(seed)
            data = {"y": rng.poisson(2.0, 120), "x": rng.normal(size=120), "g": np.arange(120) % 12}
            return gj.glmer("y ~ x + (1 | g)", data, "poisson", control={"check_singular": "ignore"})

        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                there = pool.apply(fit, (1,))
            here = fit(1)
            assert there.objective == here.objective and (there.predict() == here.predict()).all()
            print("equal")
    """
    path = tmp_path / "workers.py"
    path.write_text(textwrap.dedent(script))
    out = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300)
    assert out.stdout.strip().endswith("equal"), out.stderr[-2000:]


def test_models_of_functions_without_a_name_go_by_cloudpickle() -> None:
    cloudpickle = pytest.importorskip("cloudpickle")
    family = gj.families.Custom(lambda y, eta, aux: aux["weights"] * (y * eta - jnp.logaddexp(0.0, eta)), "logit")
    for m in (models()["glmer"], gj.glmer(CBPP, load_data("cbpp"), family)):
        twin = pickle.loads(cloudpickle.dumps(m))
        np.testing.assert_array_equal(twin.beta, m.beta)
        np.testing.assert_allclose(twin.refit(m.getME("y")).beta, m.beta, atol=1e-8)
        np.testing.assert_array_equal(twin.predict(), m.predict())


def test_models_go_to_joblib_and_come_back(tmp_path: Path) -> None:
    joblib = pytest.importorskip("joblib")
    m = models()["glmer"]
    joblib.dump(m, tmp_path / "model")
    np.testing.assert_array_equal(joblib.load(tmp_path / "model").beta, m.beta)
    back = joblib.Parallel(n_jobs=2)(joblib.delayed(gj.MixedModel.refit)(m, m.getME("y")) for _ in range(2))
    for one in back:
        np.testing.assert_allclose(one.beta, m.beta, atol=1e-8)
