"""Long formulas: what recurses once per term or parenthesis runs where there is room for it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from .._errors import FormulaError

F = TypeVar("F", bound=Callable[..., Any])

#: Calls inside each other, and bytes of the stack that they may take; an address range, not memory.
CALLS, STACK = 250_000, 512 * 2**20
_one = threading.Lock()
_inside = threading.local()


def deep(function: F) -> F:
    """Decorator: a function that needs more calls inside each other than Python allows is run again in a thread that
    has room for them.

    Raises:
        FormulaError: there, too, they are too many.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except RecursionError:
            if getattr(_inside, "deep", False):
                raise
        return _in_thread(function, args, kwargs)

    return run  # type: ignore[return-value]


def _in_thread(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    out: list[Any] = []

    def work() -> None:
        _inside.deep = True
        try:
            out.append((function(*args, **kwargs), None))
        except BaseException as error:
            out.append((None, error))

    with _one:
        calls, size = sys.getrecursionlimit(), threading.stack_size()
        try:
            threading.stack_size(STACK)
            sys.setrecursionlimit(max(calls, CALLS))
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        except (RuntimeError, ValueError, MemoryError):  # no such stack to be had
            out.append((None, RecursionError()))
        finally:
            sys.setrecursionlimit(calls)
            threading.stack_size(size)
    value, error = out[0]
    if isinstance(error, RecursionError):
        raise FormulaError(
            "the formula has more terms or parentheses inside each other than can be read here: write fewer, or give "
            "the columns as a matrix by gj.design_arrays"
        ) from None
    if error is not None:
        raise error
    return value
