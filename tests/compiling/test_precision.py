"""float64 without asking for it, and no global setting of JAX changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, load_data

import glmmjax as gj
from glmmjax.compiling.entry import entry
from glmmjax.compiling.precision import CacheSettings
from glmmjax.objective import laplace

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"


def run(code: str, **environment: str) -> dict[str, object]:
    """Run code in a fresh interpreter; its last line of output is JSON."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "GLMMJAX_", "XLA_"))}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"), **environment}
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    result: dict[str, object] = json.loads(out.stdout.splitlines()[-1])
    return result


SETTINGS = """
    import json, jax
    def settings():
        return {k: repr(v) for k, v in jax.config.values.items()} | {"x64": repr(jax.numpy.ones(1).dtype)}
"""
FIT = f"""
    import glmmjax as gj
    m = gj.glmer("{CBPP}", gj.datasets.load("cbpp"))
    _ = str(m.summary()), m.ranef(condVar=True), m.hatvalues(), m.residuals(), m.predict(type="response")
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.mark.slow
def test_no_global_setting_changes(cache: Path) -> None:
    """Importing and fitting in a fresh process: every jax.config value is as before, x64 flag and cache included."""
    code = (
        SETTINGS
        + """
    before = settings()
    import glmmjax
    imported = settings()
    """
        + FIT
        + """
    after = settings()
    print(json.dumps({
        "import": [k for k in before if before[k] != imported[k]],
        "fit": [k for k in before if before[k] != after[k]],
        "new": [k for k in after if k not in before],
        "x64": after["x64"],
        "objective": m.objective,
        "dtypes": sorted({str(getattr(v, "dtype", type(v).__name__)) for v in
                          (m.beta, m.theta, m.fixef, m.bse, m.fitted, m.u, m.loglik, m.vcov().to_numpy())}),
    }))
    """
    )
    found = run(code, GLMMJAX_CACHE=str(cache))
    assert found["import"] == found["fit"] == found["new"] == []
    assert found["x64"] == "dtype('float32')"
    assert found["objective"] == pytest.approx(184.052563743, abs=2e-8)
    assert found["dtypes"] == ["float", "float64"]
    assert any(cache.iterdir()), "programs are kept in the cache directory"


@pytest.mark.slow
def test_cache_of_the_user_is_kept(cache: Path, tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    code = (
        SETTINGS
        + f"""
    jax.config.update("jax_compilation_cache_dir", {str(own)!r})
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    before = settings()
    """
        + FIT
        + """
    after = settings()
    print(json.dumps([k for k in before if before[k] != after[k]]))
    """
    )
    assert run(code, GLMMJAX_CACHE=str(other)) == []
    assert own.exists() and any(own.iterdir())
    assert not other.exists()


@pytest.mark.parametrize("value", ["off", "0", "none", ""])
def test_cache_can_be_switched_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from glmmjax.compiling.precision import cache_directory

    monkeypatch.setenv("GLMMJAX_CACHE", value)
    assert cache_directory() is None


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from glmmjax.compiling.precision import cache_directory, persistent_cache

    monkeypatch.setenv("GLMMJAX_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("GLMMJAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "glmmjax"
    # a place that cannot be written (a file stands there) is passed over
    (tmp_path / "glmmjax").write_text("not a folder")
    with persistent_cache():
        pass


def test_import_is_light() -> None:
    """`import glmmjax` loads neither JAX nor pandas."""
    code = """
    import json, sys
    import glmmjax
    print(json.dumps({m: m in sys.modules for m in ("jax", "pandas", "scipy", "matplotlib", "optax")}))
    """
    assert not any(run(code).values())


# -------------------- 64 bit switched off, in this process
def test_fit_in_float64_where_x64_is_off(x32: None) -> None:
    assert jnp.ones(1).dtype == jnp.float32
    m = gj.glmer(CBPP, load_data("cbpp"))
    assert jnp.ones(1).dtype == jnp.float32  # as before
    assert m.objective == pytest.approx(184.052563743, abs=2e-8)
    assert m.converged
    for value in (m.beta, m.theta, m.u, m.linear_predictor, m.getME("mu"), m.getME("L"), m.hatvalues()):
        assert np.asarray(value).dtype == np.float64 and isinstance(np.asarray(value), np.ndarray)
    for frame in (m.vcov(), m.vcov(full=True), m.ranef()["herd"], m.VarCorr().to_frame()[["vcov", "sdcor"]]):
        assert (frame.dtypes == np.float64).all()
    assert m.predict(type="response").dtype == np.float64
    assert m.ranef(condVar=True)["herd"].attrs["condVar"].dtype == np.float64
    again = m.refit(m.getME("y"))
    assert again.objective == pytest.approx(m.objective, rel=1e-13)
    assert m.deviance_function()(m.theta, m.beta) == pytest.approx(m.objective, rel=1e-13)
    assert m.hatvalues().sum() == pytest.approx(float(np.float64(m.hatvalues().sum())), rel=1e-15)


def test_design_is_float64_numpy(x32: None) -> None:
    design = gj.design(CBPP, load_data("cbpp"))
    for leaf in jax.tree.leaves(design):
        assert isinstance(leaf, np.ndarray) and leaf.dtype in (np.float64, np.int32)


def test_pure_functions_warn_once_in_float32(x32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laplace, "_warned", False)
    design = gj.design(CBPP, load_data("cbpp"))
    theta, beta = np.array([0.642261]), np.array([-1.39853, -0.99233, -1.12867, -1.58031])
    with pytest.warns(UserWarning, match=r"float32.*jax.enable_x64\(True\)"):
        value = gj.laplace_deviance(theta, beta, design, gj.families.Binomial())
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(184.05256, abs=5e-2)  # float32: 1e-3 in a deviance
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gj.laplace_deviance(theta, beta, design, gj.families.Binomial())


@pytest.mark.parametrize("formula", [CBPP, "cbind(incidence, size - incidence) ~ 1 + (1 | herd) + (1 | period)"])
def test_pure_functions_in_float32_after_a_fit(formula: str, x32: None) -> None:
    """A fit runs in 64 bit; what JAX keeps of it must not break 32-bit calls afterwards, nor the reverse."""
    m = gj.glmer(formula, load_data("cbpp"), control={"check_singular": "ignore"})
    design = gj.design(formula, load_data("cbpp"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*float32.*", UserWarning)
        value = gj.laplace_deviance(m.theta, m.beta, design, gj.families.Binomial())
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(m.objective, abs=5e-2)
    assert gj.glmer(formula, load_data("cbpp"), control={"check_singular": "ignore"}).objective == m.objective


def test_no_warning_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laplace, "_warned", False)
    design = gj.design(CBPP, load_data("cbpp"))
    value = jax.jit(gj.laplace_deviance, static_argnums=3)(
        np.array([0.642261]), np.array([-1.39853, -0.99233, -1.12867, -1.58031]), design, gj.families.Binomial()
    )
    assert value.dtype == jnp.float64 and not laplace._warned


def test_the_reported_numbers_carry_float64(x32: None) -> None:
    """Differences that float32 cannot hold: a large offset that the intercept takes back."""
    data = load_data("cbpp")
    m = gj.glmer(CBPP, data)
    moved = gj.glmer(CBPP, data, offset=np.full(56, 1e4))
    assert moved.objective == pytest.approx(m.objective, abs=1e-7)
    assert moved.fixef["(Intercept)"] + 1e4 == pytest.approx(m.fixef["(Intercept)"], abs=1e-6)


def test_settings_for_debugging_are_the_users() -> None:
    """Fits and pure functions run under them with the same numbers, lme4's at tight tolerances."""
    cbpp, sleep = load_data("cbpp"), load_data("sleepstudy")
    theta, beta = np.array([0.6423]), np.array([-1.3985, -0.9923, -1.1287, -1.5803])
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
        jax.default_matmul_precision("bfloat16"),
    ):
        m = gj.glmer(CBPP, cbpp)
        linear = gj.lmer("Reaction ~ Days + (Days | Subject)", sleep)
        design = gj.design(CBPP, cbpp)
        value, slope = jax.value_and_grad(gj.laplace_deviance)(theta, beta, design, "binomial")
        solved = gj.pls(linear.theta, gj.design("Reaction ~ Days + (Days | Subject)", sleep))
        settings = [getattr(jax.config, f"jax_{name}") for name in ("numpy_rank_promotion", "debug_nans")]
    assert settings == ["raise", True]
    assert m.loglik == pytest.approx(-0.5 * 184.052563743, abs=1e-8)
    assert linear.objective == pytest.approx(1743.628272, abs=1e-6)
    assert float(value) == pytest.approx(184.052563743, abs=1e-4) and abs(float(slope[0])) < 0.1
    np.testing.assert_allclose(solved.beta, [251.40510485, 10.46728596], rtol=1e-8)


# -------------------- the decorator by which all of this is entered
def dtype() -> np.dtype:
    return np.dtype(jnp.ones(1).dtype)


def test_entered_functions_compute_in_float64_and_restore(x32: None) -> None:
    class Model:
        @entry
        def inner(self) -> np.dtype:
            return dtype()

        @entry
        def outer(self, fail: bool = False) -> list[np.dtype]:
            found = [dtype(), self.inner(), dtype()]
            with jax.enable_x64(False), jax.numpy_rank_promotion("raise"):  # as a user's callback may
                jnp.ones(1, np.float32)
                found += [self.inner()]
                assert dtype() == np.float32
            if fail:
                raise ZeroDivisionError
            return found

    model = Model()
    assert model.outer() == [np.float64] * 4 and dtype() == np.float32
    with pytest.raises(ZeroDivisionError):
        model.outer(fail=True)
    assert dtype() == np.float32 and model.inner() == np.float64


def test_entered_generators_leave_their_caller_alone(x32: None) -> None:
    @entry
    def values(count: int) -> Iterator[np.dtype]:
        """Some."""
        for _ in range(count):
            yield dtype()

    for found in values(3):
        assert found == np.float64 and dtype() == np.float32
    assert list(values(0)) == [] and values.__doc__ == "Some."


def test_entries_of_threads_are_their_own(x32: None) -> None:
    @entry
    def held() -> np.dtype:
        with ThreadPoolExecutor(1) as pool:
            outside, inside = pool.submit(dtype).result(), pool.submit(entry(dtype)).result()
        assert (outside, inside) == (np.float32, np.float64)
        return dtype()

    assert held() == np.float64


def test_the_cache_is_opened_by_what_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that compiles nothing sees no settings changed, and makes no folder; they are as before at the end."""
    monkeypatch.setenv("GLMMJAX_CACHE", str(tmp_path / "programs"))
    program, found = jax.jit(lambda x: x * 3.25 + 0.125), []

    def where() -> str | None:
        return jax.config.jax_compilation_cache_dir

    @entry
    def run() -> None:
        found.append(where())
        program(np.ones(7))
        found.append(where())
        entry(program)(np.ones(7))
        found.append(where())

    folder = tmp_path / "programs" / "jax"
    with CacheSettings(lambda: {"jax_compilation_cache_dir": None})():  # as where the user has set none
        run()
        assert found == [None, str(folder), str(folder)] and where() is None and any(folder.iterdir())
        found.clear()
        run()
        assert found == [None] * 3
