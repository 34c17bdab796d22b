"""64-bit context and compilation cache of the high-level functions; no global setting is left changed."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np


def x64(on: bool = True) -> Any:
    """Context in which JAX computes in float64, or in float32."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    experimental: Any = importlib.import_module("jax.experimental")  # older JAX
    return experimental.enable_x64(on)


def by_precision(double: float, single: float, dtype: Any) -> float:
    """One of two numbers: what rounding allows in arrays of this type."""
    return double if np.dtype(dtype).itemsize >= 8 else single


def cache_directory() -> Path | None:
    """Where compiled programs are kept: $GLMMJAX_CACHE, or the user's cache directory; None if "off"."""
    chosen = os.environ.get("GLMMJAX_CACHE")
    if chosen is not None:
        return None if chosen.lower() in ("", "0", "off", "none", "false") else Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "glmmjax"


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
        self._wanted, self._lock, self._inside = wanted, threading.Lock(), 0
        self._before: dict[str, Any] = {}
        #: called by everyone who comes in
        self.before: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.before()
        with self._lock:
            if not self._inside:
                wanted = self._wanted()
                self._before = {name: getattr(jax.config, name) for name in wanted}
                self._set(wanted)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._set(self._before)

    def _set(self, values: dict[str, Any]) -> None:
        if values:
            from jax.experimental.compilation_cache import compilation_cache

            for name, value in values.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def _kept_on_disk() -> dict[str, Any]:
    directory = None if getattr(jax.config, "jax_compilation_cache_dir", None) else cache_directory()
    if directory is None:
        return {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return {}
    return {**_SETTINGS, "jax_compilation_cache_dir": str(directory)} if os.access(directory, os.W_OK) else {}


#: Context that keeps programs compiled inside it on disk, unless the user configured a cache. A directory that cannot
#: be written is passed over: the fit then compiles as usual.
persistent_cache = CacheSettings(_kept_on_disk)
