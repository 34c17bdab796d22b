"""Counts of what is traced and compiled, for tests that hold them down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

TRACED = "/jax/core/compile/jaxpr_trace_duration"
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_counts: dict[str, int] = {TRACED: 0, LOWERED: 0}


def _listen(event: str, duration: float, **_: Any) -> None:
    if event in _counts:
        _counts[event] += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


class Count:
    traces = 0
    programs = 0


@contextmanager
def counted() -> Iterator[Count]:
    """Functions traced and programs lowered (compiled, or fetched from the cache) inside."""
    before, count = dict(_counts), Count()
    yield count
    count.traces = _counts[TRACED] - before[TRACED]
    count.programs = _counts[LOWERED] - before[LOWERED]
