"""Compiled programs that are kept: how many, where, and by what they are found."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import weakref
from typing import Any

import jax
import numpy as np
import pytest
from helpers import assert_close, load_data

import glmmjax as gj
from glmmjax import _programs
from glmmjax._memory import mappings

linux = pytest.mark.skipif(not mappings(), reason="the system does not tell a process its memory mappings")

#: Fits of one structure after the other, each of another shape, and the process's mappings and resident MB after each.
MANY = """
import sys, warnings
import numpy as np
import glmmjax as gj
from glmmjax import _memory, _programs

warnings.simplefilter("ignore")
count, most = map(int, sys.argv[1:])
_programs.MOST_MAPPINGS = most or _programs.MOST_MAPPINGS
rng, models = np.random.default_rng(0), []
for k in range(count):
    p, n = 1 + k % 5, 64 * (1 + k // 5)
    columns = {f"x{j}": rng.normal(size=n) for j in range(p)}
    data = {"y": rng.normal(size=n) + np.arange(n) % 6, "g": np.arange(n) % 6, **columns}
    models.append(gj.lmer(f"y ~ {' + '.join(columns)} + (1 | g)", data))
    assert np.isfinite(models[-1].bse).all()
    pages = int(open("/proc/self/statm").read().split()[1])
    print(_memory.mappings(), pages * 4 // 1024, flush=True)
"""


@linux
@pytest.mark.slow
def test_many_structures_in_one_process() -> None:
    """Mappings and memory do not grow with the structures that a process has seen, though their models are all kept.

    40 of them with little room. All 1,000, with the room that there is, take half an hour:
    GLMMJAX_STRUCTURES=1000 pytest -n 0 tests/test_programs.py -k many_structures
    """
    count = int(os.environ.get("GLMMJAX_STRUCTURES", "40"))
    most = 0 if "GLMMJAX_STRUCTURES" in os.environ else 1_000
    env = {**os.environ, "GLMMJAX_CACHE": "off"}
    done = subprocess.run([sys.executable, "-c", MANY, str(count), str(most)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    maps, megabytes = np.array([line.split() for line in done.stdout.splitlines()], int).T
    middle, tail = slice(count // 3, 2 * count // 3), slice(2 * count // 3, count)
    assert len(maps) == count
    assert maps.max() < maps[0] + (most or _programs.MOST_MAPPINGS) + 500  # the last one
    assert maps[tail].max() < 1.1 * maps[middle].max() + 100
    assert megabytes[tail].max() < 1.1 * megabytes[middle].max() + 20
    assert maps[0] + 60 * count > maps[tail].max() + 500  # what it would be if nothing were let go


def test_a_model_finds_its_programs_again() -> None:
    data = load_data("cbpp")
    m = gj.glmer("cbind(incidence, size - incidence) ~ period + (1 | herd)", data)
    linear = gj.lmer("Reaction ~ Days + (Days | Subject)", load_data("sleepstudy"))
    before = [m.refit(data["incidence"] / data["size"]).theta, linear.refit_ml().theta]
    held = [weakref.ref(found) for found in _programs._kept.values()]
    _programs.forget()
    assert held and not any(found() for found in held)  # models hold none
    assert_close(m.refit(data["incidence"] / data["size"]).theta, before[0], rtol=1e-12)
    assert_close(linear.refit_ml().theta, before[1], rtol=1e-12)


@linux
def test_programs_let_go_give_their_mappings_back() -> None:
    x = np.eye(3)

    def obtained() -> Any:
        def make() -> list[Any]:
            function = jax.jit(lambda x: [jax.numpy.linalg.cholesky(x + k).cumsum() for k in range(20)])
            return [_programs.lower(function, (x,), {}).compile()]

        return _programs.obtain("mine", lambda: None, jax.local_devices()[:1], make)[0]

    held = []
    for _ in range(2):  # libraries are loaded the first time
        _programs.forget()
        held.append(mappings())
        jax.block_until_ready(obtained()(x))
        held.append(mappings())
    assert held[3] > held[2] + 40
    _programs.forget()
    end = time.monotonic() + 10.0
    while mappings() > held[2] + 10 and time.monotonic() < end:  # XLA's own threads may hold it a moment longer
        time.sleep(0.01)
    assert mappings() < held[2] + 10


class Counted:
    """Mappings that fall by so many with every release."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, held: int, limit: int | None, **falls: int) -> None:
        self.held, self.called = held, list[str]()
        monkeypatch.setattr(_programs, "mappings", lambda: self.held)
        monkeypatch.setattr(_programs, "most_mappings", lambda: limit)
        monkeypatch.setattr(_programs, "_others", 0)
        for name in ("_halve", "forget", "_forget_traces"):
            monkeypatch.setattr(_programs, name, lambda name=name: self.release(name, falls.get(name, 0)))
        monkeypatch.setattr(jax, "clear_caches", lambda: self.release("all", falls.get("all", 0)))

    def release(self, name: str, fall: int) -> None:
        self.called.append(name)
        self.held -= fall


MOST = _programs.MOST_MAPPINGS


@pytest.mark.parametrize(
    ("held", "limit", "falls", "called"),
    [
        (MOST, 65_530, {}, []),
        (MOST + 1, 65_530, {"_halve": 9000}, ["_halve"]),
        (MOST + 1, None, {"_halve": 5000}, ["_halve", "_halve"]),
        (MOST + 1, 65_530, {"forget": 9000}, ["_halve"] * 3 + ["forget"]),
        (MOST + 1, 65_530, {}, ["_halve"] * 3 + ["forget", "_forget_traces"]),  # others hold them: all may stay
        (10_000, 12_000, {"_forget_traces": 5000}, ["_halve"] * 3 + ["forget", "_forget_traces"]),
    ],
)
def test_what_is_let_go_first(
    held: int, limit: int | None, falls: dict[str, int], called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest unused, then all of this package; never what JAX keeps of others while the limit is far."""
    counted = Counted(monkeypatch, held, limit, **falls)
    _programs.make_room()
    assert counted.called == called
    counted.called.clear()
    _programs.make_room()
    assert not counted.called


def test_near_the_limit_all_is_let_go_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch, 64_000, 65_530, all=30_000)
    with pytest.warns(RuntimeWarning, match=r"34,000 memory mappings, of which Linux allows it 65,530.*max_map_count"):
        _programs.make_room()
    assert counted.called[-1] == "all"


def test_where_nothing_can_be_released_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    Counted(monkeypatch, 64_000, 65_530)

    def make() -> Any:
        pytest.fail("LLVM would abort the process")

    with pytest.raises(MemoryError, match="64,000 memory mappings.*none can be released.*max_map_count"):
        _programs.obtain("new", lambda: None, jax.local_devices()[:1], make)
    monkeypatch.setattr(_programs, "_compiled", 1_000)
    with _programs.persistent_cache():  # where all that is needed may be there
        pass


def test_programs_of_jit_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch, MOST + 1, 65_530, _forget_traces=9000)
    monkeypatch.setattr(_programs, "SOME_PROGRAMS", 2)
    monkeypatch.setattr(_programs, "_compiled", 0)
    jax.jit(lambda x: x + 1.5)(np.ones(2))
    with _programs.persistent_cache():
        assert not counted.called
    jax.jit(lambda x: x + 2.5)(np.ones(2))
    jax.jit(lambda x: x + 3.5)(np.ones(2))
    with _programs.persistent_cache():
        assert counted.called[-1] == "_forget_traces"


def test_the_traces_of_users_stay() -> None:
    traces = []

    @jax.jit
    def mine(x: Any) -> Any:
        traces.append(1)
        return jax.numpy.cumsum(x)

    mine(np.ones(3))
    _programs._forget_traces()
    mine(np.ones(3))
    assert len(traces) == 1
