"""Methods that are functions of other modules, which are imported when a method is first asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from ._arguments import checked

P = ParamSpec("P")
R = TypeVar("R")


class Method(Generic[P, R]):
    """A method that is written as a function elsewhere: ``predict = Method(lambda: inference.predict.predict)``.

    Signature, annotations and docstring are those of the function, whose first argument is the object; the others are
    checked as those of all public functions. After the first use it is an ordinary method of the class.
    """

    def __init__(self, load: Callable[[], Callable[Concatenate[Any, P], R]]) -> None:
        self._load = load

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name

    @overload
    def __get__(self, instance: None, owner: type) -> Callable[Concatenate[Any, P], R]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Callable[P, R]: ...
    def __get__(self, instance: object | None, owner: type) -> Any:
        function = self._load()

        @wraps(function)
        def method(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(*args, **kwargs)

        signature = inspect.signature(function)
        first, *rest = signature.parameters.values()
        itself = first.replace(name="self", annotation=inspect.Parameter.empty)
        method.__signature__ = signature.replace(parameters=[itself, *rest])  # type: ignore[attr-defined]
        method.__name__, method.__qualname__ = self._name, f"{self._owner.__name__}.{self._name}"
        made = checked()(method)
        setattr(self._owner, self._name, made)
        return made if instance is None else made.__get__(instance, owner)
