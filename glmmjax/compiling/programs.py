"""Compiled programs, kept in memory and whole in the cache directory: a process that finds one neither traces nor
compiles it.

JAX's own cache keeps what XLA makes of a traced program, and to ask for it the program must be traced, which takes a
second. A file here is found by everything that a program depends on: this package's source, JAX, the processor or
accelerator, model, shapes and settings. A file that cannot be read, or is not whole, is made again; a directory that
cannot be written, or that others can write, is passed over. Models with code of users' own are kept in memory only.
"""

from __future__ import annotations

import contextlib
import enum
import gc
import hashlib
import itertools
import os
import pickle
import platform
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from .._errors import warn
from .digest import contents
from .loaded import source_digest
from .memory import mappings, most_mappings
from .memory import release as release_memory
from .precision import (
    QUICK_OPTIONS,
    CacheSettings,
    cache_directory,
    compile_with,
    jax_directory,
)
from .private import private_folder, prune, read, write

try:
    from jax._src.config import trace_context
except ImportError:  # another version

    def trace_context() -> tuple[Any, ...]:
        return ()


#: Files kept; the oldest go first. One has some 0.3 to 3 MB.
MOST_FILES = 300
#: Programs kept in memory, the longest unused go first. One holds some 7 MB where it has one grouping factor.
MOST_PROGRAMS = 100

#: Mappings beyond those of others (files, the user's programs) at which programs are let go: so many are some 40
#: structures of several factors, and 1 GB.
MOST_MAPPINGS = 25_000
#: All mappings as a part of what the system allows, where that is less, and the part beyond which the next program may
#: not find room.
ROOM, NEAR = 0.7, 0.9
#: Programs made after which JAX's traces of functions of this package and of its own are let go.
MOST_TRACED = 100
#: Programs compiled elsewhere after which mappings are counted.
SOME_PROGRAMS = 30
#: Programs made after which the C library gives back what compiling them left free.
SOME_MADE = 10

#: Numbers in a `PersistentJit` function's arguments up to which it is compiled with `QUICK_OPTIONS`.
QUICK_NUMBERS = 100_000

_in_memory: dict[Any, Programs] = {}
_turns = itertools.count(1)
_making: dict[Any, threading.Lock] = {}
#: XLA reads them once.
_FLAGS = os.environ.get("XLA_FLAGS", "")
_lock, _making_room = threading.Lock(), threading.Lock()
_others = 0  # mappings that stay when all programs are let go, where that was necessary
_traced = 0  # programs made since traces were let go
_compiled = 0  # programs compiled since mappings were counted
_untrimmed = 0  # programs made since memory was given back


class Programs(list[Any]):
    """Compiled programs of one key. This module alone holds them, so that it can let them go: see `Held`."""

    used = 0  # turn of the last use


class Held:
    """Where a model finds its programs again while they are kept; pickled and copied without them."""

    def __init__(self) -> None:
        self._found: weakref.ref[Programs] | None = None

    def get(self) -> Programs | None:
        """The programs, which count as used; None if they were never there, or have been let go."""
        found = None if self._found is None else self._found()
        if found is not None:
            found.used = next(_turns)
        return found

    def of_one_fit(self, model: tuple[Any, ...], design: Any, make: Callable[[], Sequence[Any]]) -> Programs | None:
        """See `of_one_fit`."""
        found = self.get() or of_one_fit(model, design, make)
        self._found = None if found is None else weakref.ref(found)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return Held, ()


def lower(jitted: Any, args: tuple[Any, ...], statics: dict[str, Any]) -> Any:
    """`jitted.lower(*args, **statics)`, of which JAX keeps nothing: its caches end with the function made here."""
    count_trace()
    return jax.jit(partial(jitted.__wrapped__, **statics)).lower(*args)


def count_trace() -> None:
    """Called before a program is traced. What that calls stays in JAX's caches, some 40 traces and half a megabyte, so
    these are cleared now and then."""
    global _traced
    _traced += 1
    if _traced > MOST_TRACED:
        _traced = 0
        _forget_traces()


def obtain(
    key: Any, stored: Callable[[], Sequence[Any] | None], devices: Sequence[Any], make: Callable[[], Sequence[Any]]
) -> Programs:
    """Compiled programs for these devices: from memory, else from disk, else made and kept in both.

    Args:
        key: what they depend on, hashable. stored: the same as things whose repr says all; None if there are none, and
            nothing is kept on disk.
        make: compiles them.
    """
    with _lock:
        making = _making.setdefault(key, threading.Lock())
    try:
        with making:  # one thread makes a program, others make other ones meanwhile
            found = _in_memory.get(key)
            if found is None:
                make_room()
                found = Programs(_load_or_make(stored(), devices, make))
                _trim_at_times()
            found.used = next(_turns)
            with _lock:
                _in_memory[key] = found
    finally:
        with _lock:
            _making.pop(key, None)
    _let_go(MOST_PROGRAMS)
    return found


def _trim_at_times() -> None:
    """Give back what compiling several programs left free: up to half of the process's memory, in milliseconds."""
    global _untrimmed
    _untrimmed += 1
    if _untrimmed >= SOME_MADE:
        _untrimmed = 0
        release_memory()


def make_room() -> None:
    """Let programs go where the process holds many memory mappings, of which Linux allows each only so many.

    LLVM maps every function of a program apart (a fit has 100 to 500 of them, three mappings each), and aborts the
    process where it is refused one. Counting takes a microsecond a mapping, so this is called before compilations only.
    The longest unused go first, then what JAX keeps for functions of this package; what it keeps for the user's, and
    for its own, only where the system's limit is near.

    Raises:
        MemoryError: the limit is near and nothing can be released.
    """
    global _others, _compiled
    limit = most_mappings()
    with _making_room:
        _compiled = 0
        most = min(_others + MOST_MAPPINGS, np.inf if limit is None else ROOM * limit)
        if mappings() <= most:
            return
        for release in (*[_halve] * 3, forget, _forget_traces):
            release()
            if mappings() <= most - MOST_MAPPINGS / 4:
                break
        else:
            _others = mappings()
        near = limit is not None and mappings() > NEAR * limit
        if near:
            jax.clear_caches()
            gc.collect()
        release_memory()
    if near:
        _say_near(limit or 0)


def _say_near(limit: int) -> None:
    held = mappings()
    text = f"this process holds {held:,} memory mappings, of which Linux allows it {limit:,}"
    remedy = "begin a new process, or allow more by `sysctl -w vm.max_map_count=...`"
    if held > NEAR * limit:
        raise MemoryError(f"{text}, and none can be released: compiling a model could abort it; {remedy}")
    warn(
        f"{text}, after all that JAX kept compiled was let go, your own functions, too, which will be compiled again; "
        f"where this comes often, {remedy}",
        RuntimeWarning,
    )


def make_room_at_times() -> None:
    """`make_room` once many programs were compiled that this module does not see: those of `jax.jit`."""
    if _compiled > SOME_PROGRAMS:
        with contextlib.suppress(MemoryError):  # nothing may be compiled now
            make_room()


def _count(event: str, duration_secs: float, **_: Any) -> None:
    global _compiled
    _compiled += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


def _halve() -> None:
    _let_go(len(_in_memory) // 2)


def _forget_traces() -> None:
    """Clear JAX's caches of this package's functions and of its own, and of no other's."""
    packages = (__name__.partition(".")[0], "jax")
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in packages:
            for value in list(vars(module).values()):
                jitted: Any = value
                if isinstance(value, (PersistentJit, jnp.ufunc)):
                    jitted = value._jitted if isinstance(value, PersistentJit) else getattr(value, "_func", None)
                if hasattr(type(jitted), "clear_cache"):
                    jitted.clear_cache()
    gc.collect()


def _let_go(keep: int) -> None:
    """Drop programs until this many are left, the longest unused first."""
    with _lock:
        oldest = sorted(_in_memory, key=lambda key: _in_memory[key].used)[: max(len(_in_memory) - keep, 0)]
        dropped = [_in_memory.pop(key) for key in oldest]
    dropped.clear()  # outside the lock: unmapping takes a while


def _load_or_make(stored: Sequence[Any] | None, devices: Sequence[Any], make: Callable[[], Sequence[Any]]) -> list[Any]:
    if stored is None or not usable(devices):
        return list(make())
    name = name_of(stored, devices)
    if name is None:
        return list(make())
    found = load(name, devices)
    if found is None:
        with without_cache():
            found = list(make())
        if name_of(stored, devices) == name:  # modules imported meanwhile are of the same source
            save(name, found)
    return found


def of_one_fit(model: tuple[Any, ...], design: Any, make: Callable[[], Sequence[Any]]) -> Programs | None:
    """Compiled programs for a design of NumPy arrays on one processor, else None: then `jax.jit` keeps them.

    Args:
        model: what they depend on beside the design's shapes, hashable.
    """
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    leaves, treedef = jax.tree.flatten(design)
    if device.platform != "cpu" or jax.process_count() > 1 or any(isinstance(leaf, jax.Array) for leaf in leaves):
        return None
    shapes = tuple((leaf.shape, leaf.dtype.str) for leaf in leaves)
    return of_structure((model, treedef), shapes, [device], make)


def of_structure(
    model: tuple[Any, ...], sizes: tuple[Any, ...], devices: Sequence[Any], make: Callable[[], Sequence[Any]]
) -> Programs:
    """`obtain` of what depends on classes, static data and structures of pytrees, and on numbers and texts."""

    def stored() -> Sequence[Any] | None:
        text = text_of(model)
        return None if text is None else (text, *sizes)

    return obtain((key_of(model), sizes, tuple(devices), _settings()), stored, devices, make)


class PersistentJit:
    """`jax.jit` of a function with static arguments, all of them named, whose programs are kept as those of fits."""

    def __init__(self, function: Callable[..., Any], static_argnames: tuple[str, ...]) -> None:
        self._jitted = jax.jit(function, static_argnames=static_argnames)
        self.__module__, self.__qualname__ = function.__module__, function.__qualname__

    def __call__(self, *args: Any, **statics: Any) -> Any:
        leaves = jax.tree.leaves(args)
        if not all(isinstance(leaf, (np.ndarray, np.generic)) for leaf in leaves):  # traced, or on a device
            return self._jitted(*args, **statics)

        def make() -> list[Any]:
            options = QUICK_OPTIONS if sum(np.size(leaf) for leaf in leaves) < QUICK_NUMBERS else None
            return [compile_with(lower(self._jitted, args, statics), options)]

        found = of_one_fit((self, *sorted(statics.items())), args, make)
        return self._jitted(*args, **statics) if found is None else found[0](*args)


def persistent_jit(*static_argnames: str) -> Callable[[Callable[..., Any]], PersistentJit]:
    """Decorator: see `PersistentJit`."""
    return lambda function: PersistentJit(function, static_argnames)


def text_of(value: Any) -> str | None:
    """A text that says all of a static argument, or of the structure of a pytree with those in it.

    None where anything is a user's own: what an object of theirs does is not in its name, and may be edited.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str) or isinstance(value, np.generic):
        return repr(value)
    if kind is jax.tree_util.PyTreeDef:
        node = value.node_data()
        return "*" if node is None else _joined("tree", [*node, *value.children()])
    if kind in (tuple, list):
        return _joined(kind.__name__, value)
    if value is type(None):
        return "NoneType"
    if isinstance(value, (type, PersistentJit)):
        return f"{value.__module__}.{value.__qualname__}" if _is_own(value) else None
    if not _is_own(kind):
        return None
    if hasattr(kind, "text_for_key"):
        text: str | None = value.text_for_key()
        return text
    if is_dataclass(value):
        return _joined(kind.__qualname__, [getattr(value, field.name) for field in fields(value)])
    return _joined(kind.__qualname__, value) if isinstance(value, tuple) else None


def _joined(name: str, parts: Iterable[Any]) -> str | None:
    texts = [text_of(part) for part in parts]
    return None if None in texts else f"{name}({', '.join(map(str, texts))})"


def _is_own(value: Any) -> bool:
    """Whether this package, or Python itself, has a class or function by its name."""
    if value.__module__.partition(".")[0] not in (__name__.partition(".")[0], "builtins"):
        return False
    found: Any = sys.modules.get(value.__module__)
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is value


def key_of(value: Any) -> Hashable:
    """A key of a static argument in this process: its `text_of`, else itself together with what its code reads."""
    text = None if isinstance(value, PersistentJit) else text_of(value)
    if text is not None:
        return text
    if type(value) is tuple:
        return tuple(map(key_of, value))
    if type(value) is jax.tree_util.PyTreeDef:
        return value, contents(_statics(value))
    return value if isinstance(value, PersistentJit) else (value, contents(value))


def _statics(tree: Any) -> list[Any]:
    """Classes and static data of the nodes of a pytree."""
    found = list(tree.node_data() or ())
    for child in tree.children():
        found += _statics(child)
    return found


def forget() -> None:
    """Drop what is kept in memory."""
    _let_go(0)


def directory() -> Path | None:
    """Where programs are kept; None where the user keeps JAX's elsewhere, or none, or others could write there."""
    own = jax_directory()
    if getattr(jax.config, "jax_compilation_cache_dir", None) not in (None, None if own is None else str(own)):
        return None
    base = cache_directory()
    return None if base is None else private_folder(base, "programs")


def usable(devices: Sequence[Any]) -> bool:
    """Whether programs for these devices can be kept: processors of one process."""
    return devices[0].platform == "cpu" and jax.process_count() == 1 and directory() is not None


@cache
def _surroundings() -> str:
    """JAX, and the machine that code was made for."""
    digest = hashlib.sha256()
    for part in (jax.__version__, jaxlib.__version__, platform.machine(), platform.python_version(), _processor()):
        digest.update(part.encode())
    return digest.hexdigest()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(line for line in lines if line.startswith(("flags", "Features", "model name")))[:20_000]
    except OSError:
        return platform.processor()


def name_of(parts: Sequence[Any], devices: Sequence[Any]) -> str | None:
    """File name of a program that is determined by `parts`, texts or things whose repr says all.

    None where this process may not run the source that is on disk, or XLA not the flags that are in the environment.
    """
    source, flags = source_digest(), os.environ.get("XLA_FLAGS", "")
    if source is None or flags != _FLAGS:
        return None
    digest = hashlib.sha256(f"{source} {_surroundings()}".encode())
    kinds = [(d.platform, d.device_kind, d.id) for d in devices]
    for part in (*parts, kinds, flags, _settings()):
        digest.update(repr(part).encode())
    return digest.hexdigest()[:40]


def _settings() -> Hashable:
    """JAX's settings that change what is traced."""
    return tuple(x for x in trace_context() if x is None or isinstance(x, (bool, int, str, tuple, enum.Enum)))


#: Context without JAX's cache: what comes out of it cannot be written again (XLA leaves its functions out).
without_cache = CacheSettings(lambda: {"jax_enable_compilation_cache": False})


@cache
def _prepare() -> None:
    """Let JAX find LAPACK, which it does when a program that calls it is lowered, and not when one is read.

    It is SciPy's, whose import takes a tenth of a second.
    """
    try:
        from jaxlib.lapack import prepare_lapack_call
    except ImportError:  # another version
        jax.jit(jnp.linalg.cholesky).lower(np.ones((1, 1), np.float32))
    else:
        prepare_lapack_call("potrf", np.dtype(float))


def load(name: str, devices: Sequence[Any]) -> list[Any] | None:
    """Compiled programs for these devices, or None if there is no such file that can be used."""
    folder = directory()
    if folder is None:
        return None
    path = folder / name
    content = read(path)
    if content is None:
        return None
    try:
        from jax.experimental.serialize_executable import deserialize_and_load

        lapack, parts = pickle.loads(content)
        if lapack:
            _prepare()
        here = list(devices)
        # where JAX has more devices than the programs it takes all of them, unless it is told
        where: dict[str, Any] = {} if here == jax.devices("cpu") else {"backend": "cpu", "execution_devices": here}
        made = [deserialize_and_load(*part, **where) for part in parts]
    except Exception:  # of another version: whatever it is, compiling mends it
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return made


def save(name: str, programs: Sequence[Any]) -> None:
    """Keep compiled programs, if the directory can be written and the platform can."""
    folder = directory()
    if folder is None:
        return
    try:
        from jax.experimental.serialize_executable import serialize

        lapack = any("lapack" in program.as_text() for program in programs)
        content = pickle.dumps((lapack, [serialize(program) for program in programs]))
        write(folder / name, content)
        prune(folder, MOST_FILES)
    except Exception:  # read-only, full, or executables that cannot be written: the next process compiles
        return
