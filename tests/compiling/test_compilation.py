"""How often anything is traced or compiled is a test, not a hope."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import counted
from helpers import assert_close, load_data

import glmmjax as gj
from glmmjax import _ahead
from glmmjax.compiling import programs as _programs
from glmmjax.compiling.precision import CacheSettings
from glmmjax.fit import glmm, lmm
from glmmjax.model.buckets import Bucket

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"


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
    gj.glmer(CBPP, load_data("cbpp"))
    jax.clear_caches()
    _programs.forget()
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


SLEEP = "Reaction ~ Days + (Days | Subject)"
WEIGHTS = 1.0 + np.arange(175) % 3
SHAPES: dict[str, Callable[[], gj.MixedModel]] = {
    "laplace": lambda: gj.glmer(CBPP, load_data("cbpp")[:53]),
    "nAGQ0": lambda: gj.glmer(CBPP, load_data("cbpp")[:53], nAGQ=0),
    "quadrature": lambda: gj.glmer(CBPP, load_data("cbpp")[:53], nAGQ=5),
    "offset": lambda: gj.glmer("incidence ~ offset(log(size)) + (1 | herd)", load_data("cbpp")[2:], "poisson"),
    "REML": lambda: gj.lmer(SLEEP, load_data("sleepstudy")[:175]),
    "weighted": lambda: gj.lmer("Reaction ~ Days + (1 | Subject)", load_data("sleepstudy")[:175], weights=WEIGHTS),
}


@pytest.mark.parametrize("name", SHAPES)
def test_padding_to_a_bucket_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of weight 0 and empty levels add zeros: only the order of sums differs."""
    padded = SHAPES[name]()
    assert padded._problem._bucket.rows
    for module in (glmm, lmm):
        monkeypatch.setattr(module, "bucket_of", lambda design: Bucket(0, 0, design.n_levels))
    plain = SHAPES[name]()
    assert not plain._problem._bucket.rows
    for what in ("theta", "beta", "objective", "sigma"):
        assert_close(getattr(padded, what), getattr(plain, what), rtol=1e-9, what=what)
    assert_close(padded.vcov(), plain.vcov(), rtol=1e-7)
    for a, b in zip(padded._estimates.u, plain._estimates.u, strict=True):
        assert_close(a, b, atol=1e-9)
    assert padded.fit_stats.evaluations == plain.fit_stats.evaluations
    y = np.asarray(padded.getME("y"))[::-1].copy()
    if name in ("laplace", "REML"):
        assert_close(padded.refit(y).beta, plain.refit(y).beta, rtol=1e-8)


@pytest.mark.parametrize(("formula", "data", "rows"), [(CBPP, "cbpp", (56, 55, 53)), (SLEEP, "sleepstudy", (180, 166))])
def test_some_rows_less_trace_nothing(formula: str, data: str, rows: tuple[int, ...]) -> None:
    table, fit = load_data(data), gj.lmer if data == "sleepstudy" else gj.glmer
    str(fit(formula, table[: rows[0]]).summary())
    for n in rows[1:]:
        with counted() as count:
            m = fit(formula, table[:n])
            str(m.summary())
        assert m.nobs == n and (count.traces, count.programs) == (0, 0)


QUESTIONS: dict[str, Callable[[gj.MixedModel], Any]] = {
    "drop1": gj.drop1,
    "profile": lambda m: m.profile().confint(),
    "bootstrap": lambda m: m.bootstrap(3, seed=1).frame,
    "update": lambda m: m.update(". ~ ."),
    "influence": lambda m: m.influence(list(m.ngrps)[0], "exact").change,
    "anova": lambda m: gj.anova(m, m.update(f". ~ . - {'Days' if m.is_linear else 'period'}")),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("linear", [False, True], ids=["glmer", "lmer"])
def test_the_same_question_again_traces_nothing(linear: bool, question: str) -> None:
    data = load_data("sleepstudy" if linear else "cbpp")
    response = "Reaction" if linear else "incidence"
    fit = (lambda d: gj.lmer(SLEEP, d, REML=False)) if linear else (lambda d: gj.glmer(CBPP, d))
    QUESTIONS[question](fit(data))
    other = data.copy()
    other.loc[other.index[3], response] = other[response].iloc[3] + 1
    m = fit(other)
    with counted() as count:
        QUESTIONS[question](m)
    assert (count.traces, count.programs) == (0, 0)


def test_programs_of_single_fits_are_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process neither traces nor compiles; what cannot be read or written is made again."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setattr(_programs, "directory", lambda: folder)

    def fits() -> tuple[np.ndarray, str, int]:
        jax.clear_caches()
        _programs.forget()
        with counted() as count:
            m, linear = gj.glmer(CBPP, load_data("cbpp")), gj.lmer(SLEEP, load_data("sleepstudy"))
            text = str(m.summary()) + str(linear.summary())
        return np.concatenate([m.theta, m.beta, linear.theta, linear.beta]), text, count.programs

    first, text, programs = fits()
    assert programs > 0
    files = sorted(folder.iterdir())
    assert len(files) == 5  # the fits, the rows of each summary, and how good Laplace's approximation is
    again, text_again, programs = fits()
    assert programs == 0 and text_again == text
    np.testing.assert_array_equal(again, first)
    files[0].write_bytes(b"cut short")
    files[1].write_bytes(files[1].read_bytes()[:500])
    again, text_again, programs = fits()
    assert programs > 0 and text_again == text
    _, _, programs = fits()
    assert programs == 0  # mended
    monkeypatch.setattr(_programs, "directory", lambda: files[0] / "below a file")
    again, text_again, _ = fits()
    assert text_again == text


def test_a_full_disk_keeps_no_part_of_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = jax.jit(lambda x: x + 1.0).lower(np.zeros(3)).compile()
    monkeypatch.setattr(_programs, "directory", lambda: tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(_programs.os, "replace", full)
        _programs.save("name", [made])
    assert list(tmp_path.iterdir()) == []
    _programs.save("name", [made])
    assert [file.name for file in tmp_path.iterdir()] == ["name"]


@pytest.mark.parametrize(
    ("formula", "family"), [(CBPP, "binomial"), ("incidence ~ offset(log(size)) + (1 | herd)", "nbinom2")]
)
def test_a_fit_for_its_summary_leaves_nothing_to_compile(
    formula: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_data("cbpp")
    monkeypatch.setattr(_programs, "directory", lambda: None)
    jax.clear_caches()
    _programs.forget()
    m = _ahead.fit_for_summary(gj.glmer_setup(formula, data, family))
    with counted() as count:
        text = str(m.summary())
    assert (count.traces, count.programs) == (0, 0)
    assert text == str(gj.glmer(formula, data, family).summary())


def test_settings_last_while_any_thread_is_inside() -> None:
    name = "jax_persistent_cache_min_compile_time_secs"
    before, inside, leave = getattr(jax.config, name), threading.Event(), threading.Event()
    settings = CacheSettings(lambda: {name: before + 1.0})

    def other() -> None:
        with settings():
            inside.set()
            leave.wait(10.0)

    with ThreadPoolExecutor(1) as pool:
        with settings():
            pool.submit(other)
            assert inside.wait(10.0)
        assert getattr(jax.config, name) == before + 1.0
        leave.set()
    assert getattr(jax.config, name) == before


def test_threads_make_a_program_once() -> None:
    _programs.forget()
    made: list[int] = []

    def make() -> list[Any]:
        made.append(1)
        time.sleep(0.05)
        return ["program"]

    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: _programs.obtain("key", lambda: None, jax.local_devices()[:1], make), range(4))
        assert list(found) == [["program"]] * 4
    assert len(made) == 1


def test_few_programs_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_programs, "MOST_PROGRAMS", 2)
    _programs.forget()
    made = []
    for key in ("a", "b", "a", "c", "a", "b"):
        _programs.obtain(key, lambda: None, jax.local_devices()[:1], lambda key=key: made.append(key) or [key])
    assert made == ["a", "b", "c", "b"]  # b was the one longest unused when c came
    _programs.forget()
