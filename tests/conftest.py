"""Settings and fixtures for all tests.

Tests of the pure layer run in 64 bit; the `x32` fixture switches it off for one test. Compiled programs are
kept between runs in the folder named by GLMMJAX_TEST_CACHE (default: .jax_cache in the repository), which may
be deleted at any time.
"""

from __future__ import annotations

import gc
import os
import sys

# before NumPy is imported: small dense solves lose a factor of 100 to threads that wait for busy cores
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

# The suite compiles for most of its time, and these options halve that: XLA's older emitter of loops and less
# optimisation, as small fits are compiled for users. Processes that tests start (command line, notebooks) go without.
if tuple(map(int, version("jaxlib").split(".")[:2])) >= (0, 10):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=1")

import jax
import numpy as np
import pandas as pd
import pytest
from helpers import load_data

ROOT = Path(__file__).resolve().parents[1]

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_compilation_cache_dir", os.environ.get("GLMMJAX_TEST_CACHE") or str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True, scope="module")
def drop_compiled_programs() -> Iterator[None]:
    """Forget the programs of a test file: each holds memory maps, and a process may have only so many (65,530)."""
    yield
    jax.clear_caches()
    if "glmmjax.compiling.programs" in sys.modules:
        sys.modules["glmmjax.compiling.programs"].forget()
    gc.collect()


@pytest.fixture
def x32() -> Iterator[None]:
    """Switch 64-bit mode off during one test, as where nobody asked for it."""
    jax.config.update("jax_enable_x64", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", True)


@pytest.fixture
def rng() -> np.random.Generator:
    """A NumPy generator with a fixed seed, fresh for every test."""
    return np.random.default_rng(20240229)


@pytest.fixture
def key() -> jax.Array:
    """A JAX random key with a fixed seed."""
    return jax.random.key(20240229)


@pytest.fixture
def cbpp() -> pd.DataFrame:
    return load_data("cbpp")


@pytest.fixture
def sleepstudy() -> pd.DataFrame:
    return load_data("sleepstudy")
