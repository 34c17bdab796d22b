"""Compiled programs that are kept: how many, where, and by what they are found."""

from __future__ import annotations

import gc
import os
import stat
import subprocess
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, load_data
from scipy.stats import multivariate_normal

import glmmjax as gj
from glmmjax.compiling import loaded, private, programs
from glmmjax.compiling.entry import entry
from glmmjax.compiling.memory import mappings
from glmmjax.compiling.precision import cache_directory, persistent_cache
from glmmjax.model.covariance import Diagonal

linux = pytest.mark.skipif(not mappings(), reason="the system does not tell a process its memory mappings")

#: Fits of one structure after the other, of which no two share a program, and after each: mappings, resident MB, and
#: programs made so far. They are compiled in a hurry, which changes none of the three much.
MANY = """
import sys, warnings
import numpy as np
import glmmjax as gj
from glmmjax.compiling import memory, precision, programs

warnings.simplefilter("ignore")
count, most = map(int, sys.argv[1:])
programs.MOST_MAPPINGS = most or programs.MOST_MAPPINGS
precision.QUICK_OPTIONS["xla_backend_optimization_level"] = 0
rng, models, seen = np.random.default_rng(0), [], set()
for k in range(count):
    p, n, m = 1 + k % 10, (4 + k // 10 % 4) * 2 ** (2 + k // 40 % 4), 3 + k // 160
    columns = {f"x{j}": rng.normal(size=n) for j in range(p)}
    g = np.arange(n) % m
    models.append(gj.lmer(f"y ~ {' + '.join(columns)} + (1 | g)", {"y": rng.normal(size=n) + g, "g": g, **columns}))
    assert np.isfinite(models[-1].bse).all()
    seen |= set(programs._in_memory)
    pages = int(open("/proc/self/statm").read().split()[1])
    print(memory.mappings(), pages * 4 // 1024, len(seen), flush=True)
"""


@linux
@pytest.mark.slow
def test_many_structures_in_one_process() -> None:
    """Mappings and memory do not grow with the structures that a process has seen, though their models are all kept.

    40 of them with little room. All 1,000, with the room that there is, take half an hour:
    GLMMJAX_STRUCTURES=1000 pytest -n 0 tests/compiling/test_programs.py -k many_structures
    """
    count = int(os.environ.get("GLMMJAX_STRUCTURES", "40"))
    most = 0 if "GLMMJAX_STRUCTURES" in os.environ else 1_000
    env = {**os.environ, "GLMMJAX_CACHE": "off"}
    done = subprocess.run([sys.executable, "-c", MANY, str(count), str(most)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    maps, megabytes, made = np.array([line.split() for line in done.stdout.splitlines()], int).T
    middle, tail = slice(count // 3, 2 * count // 3), slice(2 * count // 3, count)
    assert len(maps) == count <= made[-1]
    assert maps.max() < maps[0] + (most or programs.MOST_MAPPINGS) + 500  # the last one
    assert maps[tail].max() < 1.1 * maps[middle].max() + 100
    assert megabytes[tail].max() < 1.1 * megabytes[middle].max() + 20
    assert maps[0] + 60 * count > maps[tail].max() + 500  # what it would be if nothing were let go


def test_threads_make_programs_while_others_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "MOST_PROGRAMS", 2)
    monkeypatch.setattr(programs, "MOST_TRACED", 3)
    monkeypatch.setattr(programs, "SOME_MADE", 2)

    def made(k: int) -> list[Any]:
        return [programs.lower(jax.jit(lambda x: x * k + 1.0), (np.ones(3),), {}).compile()]

    def work(start: int) -> list[float]:
        out = []
        for k in [(start + i) % 6 for i in range(18)]:
            found = programs.obtain(("threads", k), lambda: None, jax.local_devices()[:1], partial(made, k))
            out.append(float(found[0](np.ones(3))[1]) - k)
        return out

    with ThreadPoolExecutor(4) as pool:
        for values in pool.map(work, range(4)):
            assert values == [1.0] * 18
    assert len(programs._in_memory) <= 2
    assert not programs._making


def test_what_cannot_be_made_leaves_nothing() -> None:
    def refuse() -> list[Any]:
        raise ZeroDivisionError

    devices = jax.local_devices()[:1]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            programs.obtain("refused", lambda: None, devices, refuse)
    assert "refused" not in programs._making
    assert programs.obtain("refused", lambda: None, devices, lambda: [7]) == [7]
    programs.forget()


def test_links_of_users_are_not_held_for_ever() -> None:
    """A service makes one after the other, with data in its closure."""
    made = []
    for k in range(200):
        link = gj.Link("mine", inverse=lambda eta, k=k: jnp.exp(eta) + k)
        link.direction(0.0, np.inf)
        made.append(weakref.ref(link.inverse))
    del link
    gc.collect()
    assert sum(ref() is not None for ref in made) < 100


def test_a_model_finds_its_programs_again() -> None:
    data = load_data("cbpp")
    m = gj.glmer("cbind(incidence, size - incidence) ~ period + (1 | herd)", data)
    linear = gj.lmer("Reaction ~ Days + (Days | Subject)", load_data("sleepstudy"))
    before = [m.refit(data["incidence"] / data["size"]).theta, linear.refit_ml().theta]
    held = [weakref.ref(found) for found in programs._in_memory.values()]
    programs.forget()
    assert held and not any(found() for found in held)  # models hold none
    assert_close(m.refit(data["incidence"] / data["size"]).theta, before[0], rtol=1e-12)
    assert_close(linear.refit_ml().theta, before[1], rtol=1e-12)


@linux
def test_programs_let_go_give_their_mappings_back() -> None:
    x = np.eye(3)

    def obtained() -> Any:
        def make() -> list[Any]:
            function = jax.jit(lambda x: [jax.numpy.linalg.cholesky(x + k).cumsum() for k in range(20)])
            return [programs.lower(function, (x,), {}).compile()]

        return programs.obtain("mine", lambda: None, jax.local_devices()[:1], make)[0]

    held = []
    for _ in range(2):  # libraries are loaded the first time
        programs.forget()
        held.append(mappings())
        jax.block_until_ready(obtained()(x))
        held.append(mappings())
    assert held[3] > held[2] + 40
    programs.forget()
    end = time.monotonic() + 10.0
    while mappings() > held[2] + 10 and time.monotonic() < end:  # XLA's own threads may hold it a moment longer
        time.sleep(0.01)
    assert mappings() < held[2] + 10


class Counted:
    """Mappings that fall by so many with every release."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, held: int, limit: int | None, **falls: int) -> None:
        self.held, self.called = held, list[str]()
        monkeypatch.setattr(programs, "mappings", lambda: self.held)
        monkeypatch.setattr(programs, "most_mappings", lambda: limit)
        monkeypatch.setattr(programs, "_others", 0)
        for name in ("_halve", "forget", "_forget_traces"):
            monkeypatch.setattr(programs, name, lambda name=name: self.release(name, falls.get(name, 0)))
        monkeypatch.setattr(jax, "clear_caches", lambda: self.release("all", falls.get("all", 0)))

    def release(self, name: str, fall: int) -> None:
        self.called.append(name)
        self.held -= fall


MOST = programs.MOST_MAPPINGS


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
    programs.make_room()
    assert counted.called == called
    counted.called.clear()
    programs.make_room()
    assert not counted.called


def test_near_the_limit_all_is_let_go_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch, 64_000, 65_530, all=30_000)
    with pytest.warns(RuntimeWarning, match=r"34,000 memory mappings, of which Linux allows it 65,530.*max_map_count"):
        programs.make_room()
    assert counted.called[-1] == "all"


def test_where_nothing_can_be_released_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    Counted(monkeypatch, 64_000, 65_530)

    def make() -> Any:
        pytest.fail("LLVM would abort the process")

    with pytest.raises(MemoryError, match="64,000 memory mappings.*none can be released.*max_map_count"):
        programs.obtain("new", lambda: None, jax.local_devices()[:1], make)
    monkeypatch.setattr(programs, "_compiled", 1_000)
    entry(lambda: None)()  # where all that is needed may be there


def test_programs_of_jit_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch, MOST + 1, 65_530, _forget_traces=9000)
    monkeypatch.setattr(programs, "SOME_PROGRAMS", 2)
    monkeypatch.setattr(programs, "_compiled", 0)
    jax.jit(lambda x: x + 1.5)(np.ones(2))
    entry(lambda: None)()
    assert not counted.called
    jax.jit(lambda x: x + 2.5)(np.ones(2))
    jax.jit(lambda x: x + 3.5)(np.ones(2))
    entry(lambda: None)()
    assert counted.called[-1] == "_forget_traces"


def test_the_traces_of_users_stay() -> None:
    traces = []

    @jax.jit
    def mine(x: Any) -> Any:
        traces.append(1)
        return jax.numpy.cumsum(x)

    mine(np.ones(3))
    programs._forget_traces()
    mine(np.ones(3))
    assert len(traces) == 1


# -------------------- by what programs are found


def test_static_keywords_count_by_name_and_type() -> None:
    @programs.persistent_jit("a", "b")
    def f(x: Any, a: Any = 1, b: Any = 1) -> Any:
        return x * a + 100.0 * b

    @programs.persistent_jit("n")
    def g(x: Any, n: Any) -> Any:
        return x * (3.0 if n is True else 2.0 if isinstance(n, int) else jnp.copysign(1.0, n))

    one = np.ones(())
    assert [float(f(one, a=2, b=3)), float(f(one, b=2, a=3))] == [302.0, 203.0]
    assert [float(f(one, a=5)), float(f(one, b=5))] == [105.0, 501.0]
    assert [float(g(one, n=n)) for n in (True, 1, 1.0, 0.0, -0.0)] == [3.0, 2.0, 1.0, 1.0, -1.0]


def test_functions_of_one_name_are_not_one() -> None:
    def times(factor: float) -> Any:
        @programs.persistent_jit()
        def scaled(x: Any) -> Any:
            return factor * x

        return scaled

    assert [float(times(k)(np.ones(()))) for k in (2.0, 3.0)] == [2.0, 3.0]


@dataclass(frozen=True)
class Mine(Diagonal):
    """A user's structure, which may be edited between two runs of a script."""

    def factor(self, theta: Any) -> Any:
        return 5.0 * super().factor(theta)


@dataclass(frozen=True)
class MyPoisson(gj.families.Poisson):
    pass


def design_with(structure: Any) -> gj.Design:
    y, level = np.arange(8.0), np.arange(8) % 2
    return gj.design_arrays(y, np.ones((8, 1)), [(np.ones((8, 1)), level, structure)])


OWN = [None, True, 1, 1.0, -0.0, "a", (1, ("b",)), gj.families.Binomial("probit"), Diagonal(1), gj.families.Poisson]
POSING = type("Diagonal", (Diagonal,), {"__module__": Diagonal.__module__})
FOREIGN = [
    Mine(1),
    POSING(1),
    (1, Mine(1)),
    MyPoisson("log"),
    gj.families.Custom(lambda y, eta, aux: -((y - eta) ** 2)),
    gj.families.Poisson(gj.links.Link("log", inverse=jnp.exp)),
    lambda x: x,
    Mine,
]


def test_only_what_is_of_this_package_is_kept_on_disk() -> None:
    texts = [programs.text_of(value) for value in OWN]
    assert None not in texts and len(set(texts)) == len(OWN)
    assert [programs.text_of(value) for value in FOREIGN] == [None] * len(FOREIGN)

    def text(structure: Any) -> str | None:
        return programs.text_of(jax.tree.structure((design_with(structure), [None, {"a": 0.0}])))

    assert "Diagonal(1)" in (text(Diagonal(1)) or "") and text(Mine(1)) is None


def test_a_users_structure_is_not_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "directory", lambda: tmp_path)
    setup = gj.lmer_setup("Reaction ~ 1 + (1 | Subject)", load_data("sleepstudy"))
    term = setup.data.terms[0]
    for structure, files in ((Mine(1), 0), (Diagonal(1), 1)):
        own = gj.design_arrays(setup.data.y, setup.data.X, [(term.z, term.level, structure)])
        gj.optimise(gj.deviance_function(replace(setup, design=own)))
        assert len(list(tmp_path.iterdir())) == files


def test_edited_code_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = jax.tree.structure(design_with(Mine(1)))
    before = [programs.key_of(Mine(1)), programs.key_of(tree)]
    assert before == [programs.key_of(Mine(1)), programs.key_of(jax.tree.structure(design_with(Mine(1))))]
    monkeypatch.setattr(Mine, "factor", lambda self, theta: 2.0 * theta[:, None])
    assert all(a != b for a, b in zip(before, [programs.key_of(Mine(1)), programs.key_of(tree)], strict=True))


SD = 1.0


def normal(y: Any, eta: Any, aux: Any) -> Any:
    return -0.5 * ((y - eta) / SD) ** 2 - jnp.log(SD) - 0.5 * jnp.log(2.0 * jnp.pi)


def test_what_a_log_density_reads_is_read_at_every_fit(rng: np.random.Generator) -> None:
    """The likelihood at the estimates is the normal one with the sd of the time; a model does not mix two."""
    g = np.repeat(np.arange(6), 5)
    data = {"y": rng.normal(size=30) + rng.normal(size=6)[g] * 3.0, "g": g}
    here = sys.modules[__name__]
    family = gj.families.Custom(normal)
    with pytest.MonkeyPatch.context() as patch:
        for sd in (1.0, 1.5, 1.0):
            patch.setattr(here, "SD", sd)
            m = gj.glmer("y ~ 1 + (1 | g)", data, family)
            cov = sd**2 * np.eye(30) + m.theta[0] ** 2 * (g[:, None] == g)
            assert_close(m.loglik, multivariate_normal(np.full(30, m.beta[0]), cov).logpdf(data["y"]), rtol=1e-9)
        before = m.refit(data["y"][::-1].copy()).loglik
        patch.setattr(here, "SD", 2.0)
        assert m.refit(data["y"][::-1].copy()).loglik == before  # by the program that is there
        programs.forget()
        with pytest.raises(ValueError, match="reads from outside.*has changed.*fit the model again"):
            m.refit(data["y"][::-1].copy())


def test_a_log_density_that_keeps_a_record_is_no_error() -> None:
    calls = []

    def recorded(y: Any, eta: Any, aux: Any) -> Any:
        calls.append(1)
        return -((y - eta) ** 2)

    family = gj.families.Custom(recorded)
    before = len(calls)
    for _ in range(2):
        family.kernel(jnp.ones(2), jnp.zeros(2), jnp.ones(2), jnp.ones(0))
    assert len(calls) == before + 2


def test_links_read_anew() -> None:
    scale = types.SimpleNamespace(by=2.0)
    link = gj.links.Link("scaled", inverse=lambda eta: scale.by * eta)
    family = gj.families.Poisson(link)
    assert gj.families.get(family) is family
    scale.by = 3.0
    assert gj.families.get(family) != family and gj.families.get(family).link.inverse(1.0) == 3.0


# -------------------- the source


def test_the_source_is_what_was_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded.source_digest() is not None
    (tmp_path / "package").mkdir()
    files = [tmp_path / "a.py", tmp_path / "package" / "b.py"]
    for file in files:
        file.write_text("x = 1\n")
    monkeypatch.setattr(loaded, "_FOLDER", str(tmp_path))

    def imported() -> str | None:
        loaded._digest.cache_clear()
        monkeypatch.setattr(loaded, "_at_import", loaded._now())
        return loaded.source_digest()

    found = [imported()]
    (tmp_path / "notes.txt").write_text("not source")
    assert imported() == found[0] is not None
    for file in files:
        times = file.stat()
        time.sleep(0.02)
        file.write_text("x = 2\n")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as long as before, and as old
        assert loaded.source_digest() is None
        found.append(imported())
    files[1].unlink()
    assert loaded.source_digest() is None
    found.append(imported())
    assert None not in found and len(set(found)) == 4
    loaded._digest.cache_clear()


def test_programs_of_another_source_or_other_flags_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "directory", lambda: tmp_path)

    def files() -> int:
        programs.forget()
        made = jax.jit(lambda x: x + 1.0).lower(np.zeros(3)).compile()
        programs.obtain("own", lambda: ["own"], jax.local_devices()[:1], lambda: [made])
        return len(list(tmp_path.iterdir()))

    with monkeypatch.context() as patch:
        patch.setattr(programs, "source_digest", lambda: None)
        assert files() == 0
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--set_after_xla_read_them")
        assert files() == 0
    assert files() == 1


# -------------------- the folder


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


posix = pytest.mark.skipif(os.name != "posix", reason="modes say who may write")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@posix
@pytest.mark.parametrize("mask", [0, 0o022, 0o777])
def test_folders_are_their_owners_alone(mask: int, tmp_path: Path, umask: Callable[[int], int]) -> None:
    umask(mask)
    folder = private.private_folder(tmp_path / "a" / "b", "programs")
    assert folder == tmp_path / "a" / "b" / "programs"
    assert [mode(p) for p in (folder, *folder.parents[:2])] == [0o700] * 3
    private.write(folder / "name", b"body")
    assert mode(folder / "name") & 0o077 == 0


@posix
@pytest.mark.parametrize("writable", [0o770, 0o702, 0o1777])
@pytest.mark.parametrize("which", ["base", "programs"])
def test_folders_that_others_can_write_are_passed_over(which: str, writable: int, tmp_path: Path) -> None:
    base = tmp_path / "base"
    assert private.private_folder(base, "programs") is not None
    (base if which == "base" else base / which).chmod(writable)
    assert private.private_folder(base, "programs") is None


@posix
def test_folders_of_others_and_links_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, elsewhere = tmp_path / "base", tmp_path / "elsewhere"
    base.mkdir(0o755)
    elsewhere.mkdir(0o755)
    (base / "programs").symlink_to(elsewhere)
    assert private.private_folder(base, "programs") is None
    (base / "programs").unlink()
    (base / "programs").write_bytes(b"a file")
    assert private.private_folder(base, "programs") is None
    (base / "programs").unlink()
    (base / "programs").mkdir(0o755)
    assert private.private_folder(base, "programs") is not None and mode(base / "programs") == 0o700
    assert mode(base) == 0o755  # a folder that the user made is left as it is
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(base).st_uid + 1)
    assert private.private_folder(base, "programs") is None


def test_damaged_files_are_passed_over(tmp_path: Path) -> None:
    file, body = tmp_path / "name", bytes(range(100))
    private.write(file, body)
    assert private.read(file) == body
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert private.read(file) is None
        file.write_bytes(whole[:at])
        assert private.read(file) is None
    file.write_bytes(whole + b"\0")
    assert private.read(file) is None
    private.write(file, body)
    assert private.read(file) == body
    assert private.read(tmp_path / "missing") is None and private.read(tmp_path) is None


@posix
def test_files_that_others_could_have_written_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, link = tmp_path / "name", tmp_path / "link"
    private.write(file, b"body")
    link.symlink_to(file)
    assert private.read(link) is None
    os.mkfifo(tmp_path / "pipe")
    assert private.read(tmp_path / "pipe") is None
    for writable in (0o620, 0o602):
        file.chmod(writable)
        assert private.read(file) is None
    file.chmod(0o644)
    assert private.read(file) == b"body"
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(file).st_uid + 1)
    assert private.read(file) is None


def test_other_things_in_the_folder_stay_and_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "name").mkdir()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for k in range(5):
        private.write(tmp_path / str(k), b"body")
        os.utime(tmp_path / str(k), (k, k))
    private.prune(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3", "4", "broken", "name"]
    with pytest.raises(OSError):
        private.write(tmp_path / "name", b"body")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3", "4", "broken", "name"]


def test_paths_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))

    def directory(chosen: str | None, xdg: str | None = None) -> Path | None:
        for name, value in (("GLMMJAX_CACHE", chosen), ("XDG_CACHE_HOME", xdg)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        return cache_directory()

    assert directory("~/x") == tmp_path / "x" and directory("~") == tmp_path
    assert directory("~no_such_user_here/x") is None and directory(" Off ") is None
    assert directory(None) == directory(None, "relative") == directory(None, "") == tmp_path / ".cache" / "glmmjax"
    assert directory(None, str(tmp_path)) == tmp_path / "glmmjax"
    monkeypatch.chdir(tmp_path)
    assert directory("kept/here") == tmp_path / "kept" / "here"
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert directory("kept/here") == tmp_path / "kept" / "here"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home directory
    assert directory(None) is None and directory("~/x") is None


@posix
def test_the_cache_of_jax_is_private_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = tmp_path / "cache"
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    monkeypatch.setenv("GLMMJAX_CACHE", str(chosen))
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with persistent_cache():
            assert jax.config.jax_compilation_cache_dir == str(chosen / "jax")  # type: ignore[attr-defined]
        assert mode(chosen / "jax") == 0o700
        assert programs.directory() == chosen / "programs"
        (chosen / "jax").chmod(0o777)
        with persistent_cache():
            assert jax.config.jax_compilation_cache_dir is None  # type: ignore[attr-defined]
        chosen.chmod(0o777)
        assert programs.directory() is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_loaded_where_there_are_more_devices(tmp_path: Path) -> None:
    """They are for one of them."""
    code = (
        "import glmmjax as gj; m = gj.glmer('cbind(incidence, size - incidence) ~ 1 + (1 | herd)', "
        "gj.datasets.load('cbpp')); print(m.objective)"
    )
    env = {**os.environ, "GLMMJAX_CACHE": str(tmp_path), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    runs = [subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True) for _ in range(2)]
    assert not any(run.returncode for run in runs), runs[1].stderr
    assert float(runs[0].stdout) == pytest.approx(float(runs[1].stdout), abs=1e-9)
