"""64-bit context and compilation cache of the high-level functions; no global setting is left changed."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .private import private_folder

#: Settings of JAX under which searches that meet NaN on their way, or arrays of several types and ranks, still run,
#: with the same numbers; each has a context manager of this name.
_OURS: dict[str, Any] = {
    "debug_nans": False,
    "debug_infs": False,
    "disable_jit": False,
    "check_tracer_leaks": False,
    "numpy_rank_promotion": "allow",
    "numpy_dtype_promotion": "standard",
    "default_matmul_precision": None,
    "transfer_guard": "allow",
}
_GUARDS = ("transfer_guard_host_to_device", "transfer_guard_device_to_device", "transfer_guard_device_to_host")
#: JAX's setting, the name of its context, and the value that it has to have
_LOOKED_AT = [
    (f"jax_{setting}", name, wanted)
    for name, wanted in _OURS.items()
    for setting in (_GUARDS if name == "transfer_guard" else (name,))
    if hasattr(jax.config, f"jax_{setting}") and hasattr(jax, name)
]
_values = attrgetter("jax_enable_x64", *(setting for setting, _, _ in _LOOKED_AT))


def x64(on: bool = True) -> Any:
    """Context in which JAX computes in float64, or in float32, whatever else the user set for debugging.

    Raises:
        RuntimeError: this process was forked from one that had used JAX.
    """
    check_process()
    if hasattr(jax, "enable_x64"):
        precision = jax.enable_x64(on)
    else:
        experimental: Any = importlib.import_module("jax.experimental")  # older JAX
        precision = experimental.enable_x64(on)
    others = _other_settings()
    return _all_of([precision, *others]) if others else precision


def own_settings(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of pure functions: traced, and run, as `x64` says, in the user's precision."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        check_process()
        others = _other_settings()
        if not others:
            return function(*args, **kwargs)
        with _all_of(others):
            return function(*args, **kwargs)

    return run


def _other_settings() -> list[Any]:
    """Contexts for the settings that are not as they have to be; none where the user left them alone."""
    return [getattr(jax, name)(wanted) for name, wanted in _off(_values(jax.config)[1:])]


def is_double() -> bool:
    """Whether JAX computes in float64 here, and under our settings."""
    values = _values(jax.config)
    return bool(values[0]) and not _off(values[1:])


@cache
def _off(values: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """Contexts to enter, with the values that they set, where the settings looked at have these."""
    pairs = zip(values, _LOOKED_AT, strict=True)
    return list({name: wanted for value, (_, name, wanted) in pairs if value != wanted and value is not None}.items())


@contextlib.contextmanager
def _all_of(contexts: list[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


_forked = False


def _after_fork() -> None:
    global _forked
    try:
        from jax._src.xla_bridge import backends_are_initialized
    except ImportError:  # another version: take it that JAX was used
        _forked = True
    else:
        _forked = _forked or backends_are_initialized()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def check_process() -> None:
    """Raise RuntimeError in a process that was forked after JAX had been used: its threads, which are not there, would
    be waited for without end."""
    if _forked:
        raise RuntimeError(
            "this process was forked from one that had used JAX, whose threads are not here, so that nothing can be "
            "computed: start workers with multiprocessing.get_context('spawn') or 'forkserver', or with joblib, or "
            "fork before the first fit"
        )


def by_precision(double: float, single: float, dtype: Any) -> float:
    """One of two numbers: what rounding allows in arrays of this type."""
    return double if np.dtype(dtype).itemsize >= 8 else single


def cache_directory() -> Path | None:
    """Where compiled programs are kept: $GLMMJAX_CACHE, or the user's cache directory; None if "off".

    The path is absolute, "~" is the home directory. None, too, where there is no home directory.
    """
    chosen = os.environ.get("GLMMJAX_CACHE")
    if chosen is not None:
        if chosen.strip().lower() in ("", "0", "off", "none", "false"):
            return None
        path = os.path.expanduser(chosen)
        return None if path.startswith("~") else _absolute(path)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # to be ignored, says its specification
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "glmmjax" if os.path.isabs(base) else None


@cache
def _absolute(path: str) -> Path:
    """The same wherever the process goes later."""
    return Path(os.path.abspath(path))


def jax_directory() -> Path | None:
    """Where JAX keeps its programs inside `persistent_cache`, below `cache_directory`."""
    base = cache_directory()
    return None if base is None else base / "jax"


#: Compiler options for programs over many small fits. YNN, the library that XLA hands sums to, takes 5 ns a number for
#: short ones; XLA's own loops take 0.3. Registers of 512 bits, where the processor has them, make fits a sixth faster.
LANE_OPTIONS: dict[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": "", "xla_cpu_prefer_vector_width": 512}
#: Compiler options that halve the compilation of small programs: XLA's older emitter of loops and its own sums, less
#: optimisation, one module. A fit of up to 2,000 rows with one grouping factor runs as fast; 5,000 rows take 1.7 times
#: as long, and so do three factors.
QUICK_OPTIONS: dict[str, Any] = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_backend_optimization_level": 1,
    "xla_cpu_parallel_codegen_split_count": 1,
}
#: Options that this version of XLA turned out not to know.
_unknown: list[dict[str, Any]] = []


def compile_with(lowered: Any, options: dict[str, Any] | None) -> Any:
    """A lowered program compiled with these options, or without them where XLA does not know them."""
    if options is not None and options not in _unknown:
        try:
            return lowered.compile(compiler_options=options)
        except Exception:  # whatever an unknown option raises in this version
            _unknown.append(options)
    return lowered.compile()


_SETTINGS = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    # the default also caches XLA autotuning files under a path that enters the key on some versions
    "jax_persistent_cache_enable_xla_caches": "none",
}


class CacheSettings:
    """Settings of JAX's compilation cache, which are those of the whole process, while any thread is inside.

    Args:
        wanted: called by the first to come in; name -> value, empty to leave all as it is.
    """

    def __init__(self, wanted: Callable[[], dict[str, Any]]) -> None:
        self._wanted, self._lock, self._threads = wanted, threading.Lock(), 0
        self._before: dict[str, Any] = {}

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._threads:
                wanted = self._wanted()
                self._before = {name: getattr(jax.config, name) for name in wanted}
                self._set(wanted)
            self._threads += 1
        try:
            yield
        finally:
            with self._lock:
                self._threads -= 1
                if not self._threads:
                    self._set(self._before)

    def _set(self, values: dict[str, Any]) -> None:
        if values:
            from jax.experimental.compilation_cache import compilation_cache

            for name, value in values.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def _kept_on_disk() -> dict[str, Any]:
    base = None if getattr(jax.config, "jax_compilation_cache_dir", None) else cache_directory()
    if base is None or private_folder(base, "jax") is None:
        return {}
    folder = str(jax_directory())
    return {**_SETTINGS, "jax_compilation_cache_dir": folder} if os.access(folder, os.W_OK) else {}


#: Context that keeps programs compiled inside it on disk, unless the user configured a cache. A directory that cannot
#: be written is passed over: the fit then compiles as usual.
persistent_cache = CacheSettings(_kept_on_disk)
