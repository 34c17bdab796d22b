"""64-bit context and compilation cache of the high-level functions; no global setting is left changed."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
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


@contextlib.contextmanager
def persistent_cache() -> Iterator[None]:
    """Keep programs compiled inside this context on disk, unless the user configured a cache.

    A directory that cannot be written is passed over: the fit then compiles as usual.
    """
    directory = None if getattr(jax.config, "jax_compilation_cache_dir", None) else cache_directory()
    if directory is not None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK):
                directory = None
        except OSError:
            directory = None
    if directory is None:
        yield
        return
    from jax.experimental.compilation_cache import compilation_cache

    wanted = {**_SETTINGS, "jax_compilation_cache_dir": str(directory)}
    before = {name: getattr(jax.config, name) for name in wanted}
    compilation_cache.reset_cache()
    for name, value in wanted.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
