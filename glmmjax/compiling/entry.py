"""The door to everything that computes: in float64 whatever the user set, and what is compiled is kept on disk."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import jax

from .precision import check_process, is_double, persistent_cache, x64
from .programs import make_room_at_times

F = TypeVar("F", bound=Callable[..., Any])


class _Thread(threading.local):
    """Whether a thread is inside an entry, and what it leaves with it: the cache, once something is compiled."""

    inside = opened = False

    def __init__(self) -> None:
        self.to_leave = ExitStack()


_here = _Thread()


def entry(function: F) -> F:
    """Decorator of functions and generators that compute: they run as `precision.x64` says, in the persistent cache.

    The cache is opened when something is compiled, so that a call that finds all compiled never touches the disk;
    inside another entry a call costs a look at JAX's settings. A generator is inside while it makes a value, its
    caller is not.
    """
    if inspect.isgeneratorfunction(function):
        return cast(F, _each(function))

    @functools.wraps(function)
    def entered(*args: Any, **kwargs: Any) -> Any:
        if _here.inside and is_double():
            return function(*args, **kwargs)
        if _here.inside:
            with x64():
                return function(*args, **kwargs)
        check_process()
        make_room_at_times()
        with _here.to_leave, x64():
            _here.inside, _here.opened = True, False
            try:
                return function(*args, **kwargs)
            finally:
                _here.inside = False

    return cast(F, entered)


def _each(generator: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    advance = entry(next)

    @functools.wraps(generator)
    def entered(*args: Any, **kwargs: Any) -> Iterator[Any]:
        values, end = generator(*args, **kwargs), object()
        while (value := advance(values, end)) is not end:
            yield value

    return entered


def _open_cache(event: str, duration_secs: float, **_: Any) -> None:
    """Called with what JAX has done: a program that it has lowered will be compiled next."""
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration" and _here.inside and not _here.opened:
        _here.opened = True
        _here.to_leave.enter_context(persistent_cache())


jax.monitoring.register_event_duration_secs_listener(_open_cache)
