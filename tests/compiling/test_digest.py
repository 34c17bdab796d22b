"""Digests of users' objects: equal for equal contents, in every process, and for no others."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from jax.scipy.special import gammaln

from glmmjax.compiling.digest import contents, digest

NU: Any = 3.0


def density(y: Any, eta: Any, aux: Any) -> Any:
    z = (y - eta) / aux["s"]
    return gammaln(NU) - 0.5 * (NU + 1.0) * jnp.log1p(z * z / NU)


def through_another(y: Any, eta: Any, aux: Any) -> Any:
    return 2.0 * density(y, eta, aux)


def times(factor: Any) -> Callable[[Any], Any]:
    return lambda x: x * factor


def in_a_list(factor: Any) -> Any:
    return [{"by": (factor,)}]


def as_default(factor: Any) -> Callable[[Any], Any]:
    return lambda x, by=factor: x * by


def as_keyword(factor: Any) -> Callable[[Any], Any]:
    def scaled(x: Any, *, by: Any = factor) -> Any:
        return x * by

    return scaled


class Scaled:
    power = 1

    def __init__(self, factor: Any) -> None:
        self.factor = factor

    def apply(self, x: Any) -> Any:
        return self.factor * x**self.power

    def __call__(self, x: Any) -> Any:
        return self.apply(x)


@dataclass(frozen=True)
class Frozen:
    factor: Any


class Colour(Enum):
    RED = 1
    BLUE = 2


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "closure": times,
    "closure of a closure": lambda f: times(times(f)),
    "list": in_a_list,
    "default": as_default,
    "keyword default": as_keyword,
    "partial": lambda f: functools.partial(times(1.0), f),
    "partial of a closure": lambda f: functools.partial(times(f)),
    "bound method": lambda f: Scaled(f).apply,
    "callable object": Scaled,
    "dataclass": Frozen,
    "jit": lambda f: jax.jit(times(f)),
    "vmap": lambda f: jax.vmap(times(f)),
    "custom_jvp": lambda f: jax.custom_jvp(times(f)),
    "namespace": lambda f: types.SimpleNamespace(factor=f),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_a_function_holds(holder: str) -> None:
    hold = HOLDERS[holder]
    assert digest(hold(2.5)) == digest(hold(2.5)) is not None
    assert digest(hold(2.5)) != digest(hold(3.5))
    assert contents(hold(2.5)) == contents(hold(2.5)) != contents(hold(3.5))


PAIRS: list[tuple[Any, Any]] = [
    (1, 1.0),
    (1, True),
    (0.0, -0.0),
    ("a", b"a"),
    ((1, 2), [1, 2]),
    ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
    ({1, 2}, {1, 3}),
    (np.zeros(3), np.array([0.0, 0.0, 1e-300])),
    (np.zeros(3), np.zeros(3, np.float32)),
    (np.zeros((2, 3)), np.zeros((3, 2))),
    (np.arange(6)[::2], np.arange(3)),
    (np.array(["a"], object), np.array(["b"], object)),
    (jnp.zeros(2), jnp.ones(2)),
    (jax.random.key(0), jax.random.key(1)),
    (pd.Series([1.0, 2.0]), pd.Series([1.0, 3.0])),
    (math.sin, math.cos),
    (jnp.sin, jnp.cos),
    (np.exp, np.log),
    (Colour.RED, Colour.BLUE),
    (lambda x: x + 1, lambda x: x + 2),
    (lambda x: x.sin(), lambda x: x.cos()),
    (Scaled, Frozen),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]!s:.12}-{pair[1]!s:.12}")
def test_values_are_told_apart(pair: tuple[Any, Any]) -> None:
    one, other = pair
    assert digest(times(one)) == digest(times(one)) is not None
    assert digest(times(one)) != digest(times(other))


def test_globals_classes_and_arrays_are_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(value: Any, change: Callable[[], Any]) -> bool:
        before = digest(value)
        change()
        return digest(value) != before

    here = sys.modules[__name__]
    for function in (density, through_another, times(through_another)):
        with monkeypatch.context() as patch:
            assert changed(function, lambda patch=patch: patch.setattr(here, "NU", 30.0))
    with monkeypatch.context() as patch:
        assert changed(Scaled(1.0), lambda: patch.setattr(Scaled, "power", 2))
    array, user = np.zeros(3), types.ModuleType("a_module_of_the_user")
    user.factor = 1.0  # type: ignore[attr-defined]
    assert changed(times(array), lambda: array.__setitem__(0, 1.0))
    assert changed(lambda x: x * user.factor, lambda: setattr(user, "factor", 2.0))


def test_what_a_function_writes_itself_does_not_count() -> None:
    calls = 0

    def counts(x: Any) -> Any:
        nonlocal calls
        calls += 1
        return x

    before = digest(counts)
    counts(1.0)
    assert calls == 1 and digest(counts) == before


def test_what_cannot_be_known_is_itself() -> None:
    one, other = threading.Lock(), threading.Lock()
    assert digest(times(one)) is None
    assert contents(times(one)) == contents(times(one)) != contents(times(other))
    circle: list[Any] = [1.0]
    circle.append(circle)
    assert digest(circle) is not None


def test_digests_are_those_of_other_processes() -> None:
    code = (
        "import jax, numpy as np, pandas as pd; from jax.scipy.special import gammaln\n"
        "from glmmjax.compiling.digest import digest\n"
        "values = {'a', 'b', 'c'}, pd.Series([1.0]), np.arange(3), gammaln, jax.nn.softplus\n"
        "def f(x, by=2.0): return gammaln(x) * by + values[2].sum()\n"
        "print(digest(f))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1 and len(found.pop()) == 65
