"""Arrays over rows whose memory compiled programs read where it is."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np

#: XLA on a CPU copies arrays that do not begin at a multiple of this many bytes.
ALIGNMENT = 64
#: Rows that work on the host takes at a time, where it would make copies of all of them.
BLOCK = 2**16


def empty(shape: tuple[int, ...], dtype: Any = np.float64) -> np.ndarray:
    """As `np.empty`, aligned for XLA."""
    return _aligned(np.empty, shape, dtype)


def zeros(n: int) -> np.ndarray:
    """As `np.zeros`, aligned for XLA; takes no memory until it is written."""
    return _aligned(np.zeros, (n,), np.float64)


def copied(values: Any, dtype: Any = np.float64) -> np.ndarray:
    """A copy aligned for XLA."""
    out = empty(np.shape(values), dtype)
    out[...] = values
    return out


def aligned(values: np.ndarray) -> np.ndarray:
    """The array itself if it is aligned for XLA, else a copy."""
    return copied(values, values.dtype) if values.ctypes.data % ALIGNMENT else values


def _aligned(make: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = make(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    out: np.ndarray = raw[start : start + size].view(dtype).reshape(shape)
    return out


def release() -> None:
    """Give memory that was freed back to the system, where the C library keeps it (glibc: up to 64 MB and more)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def mappings() -> int:
    """Memory mappings of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/maps", "rb") as file:
            return file.read().count(b"\n")
    except OSError:
        return 0


@cache
def most_mappings() -> int | None:
    """Memory mappings that the system allows a process; None where it sets no such limit, or does not tell."""
    try:
        with open("/proc/sys/vm/max_map_count", "rb") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def triangle(n: int, columns: Callable[[slice], np.ndarray]) -> np.ndarray:
    """R (p, p) of the QR factorisation of an (n, p) matrix, from blocks of its rows."""
    R = None
    for rows in blocks(n):
        part = columns(rows)
        R = np.asarray(np.linalg.qr(part if R is None else np.concatenate([R, part]), mode="r"))
    assert R is not None
    return R


def blocks(n: int) -> Iterator[slice]:
    """Consecutive slices of n rows."""
    for start in range(0, n, BLOCK):
        yield slice(start, min(start + BLOCK, n))
