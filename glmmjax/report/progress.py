"""A bar for long loops: tqdm where it is installed, and silence where nobody watches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def _tqdm(**settings: Any) -> Any:
    """A bar on a terminal, shown after the first second; None elsewhere."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return None
    return tqdm(delay=1.0, leave=False, **settings)


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar; `total` where they have no length."""
    bar = _tqdm(iterable=items, desc=what, total=total)
    yield from items if bar is None else bar


@contextlib.contextmanager
def counter(what: str, total: int | None) -> Iterator[Callable[[int], Any]]:
    """A bar that is moved by hand: called with how many more are done."""
    bar = _tqdm(desc=what, total=total)
    if bar is None:
        yield lambda _: None
        return
    with bar:
        yield bar.update
