"""What a user's object says, functions included: their code, and what they read from outside.

Equal digests mean equal contents: arrays are read, functions are followed into closures, globals, defaults and what
they call, classes into their methods. Libraries (the standard one, JAX, NumPy, this package, all that is installed) are
taken by name. What a function writes itself (`nonlocal calls; calls += 1`) is not what it reads from outside.
"""

from __future__ import annotations

import builtins
import copyreg
import dis
import hashlib
import os
import sys
import sysconfig
import types
from collections.abc import Hashable
from functools import cache, lru_cache, partial
from typing import Any

import jax
import numpy as np

#: Nesting beyond which an object is taken as itself.
DEEPEST = 60
#: Members of a class that say nothing about what its instances do.
_UNREAD = ("__dict__", "__weakref__", "__doc__", "__module__", "__firstlineno__", "__annotations__", "_abc_impl",
           "__dataclass_fields__", "__dataclass_params__", "__annotations_cache__", "__annotate_func__")  # fmt: skip
_READS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_PARTS = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_flags")
_COUNTS = ("co_argcount", "co_posonlyargcount", "co_kwonlyargcount")


def digest(value: Any) -> str | None:
    """Hexadecimal digest of a value's contents, the same in every process; None where they cannot all be known.

    Not to be known are objects that are nothing but themselves: open files, locks, generators, traced arrays.
    """
    walk = _Walk()
    walk.add(value)
    return None if walk.opaque else walk.hash.hexdigest()


def contents(value: Any) -> Hashable:
    """A key that is equal for equal contents in this process; what cannot be known is taken as the object itself."""
    walk = _Walk()
    walk.add(value)
    return walk.hash.hexdigest(), tuple(_Itself(x) for x in walk.opaque)


class _Itself:
    """An object by its identity, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class _Walk:
    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.opaque: list[Any] = []
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # ids stay taken
        self._depth = 0

    def add(self, value: Any) -> None:
        kind = type(value)
        if value is None or value is Ellipsis or value is NotImplemented or kind in (bool, int, str, bytes):
            self._say(kind.__name__, value)
        elif kind is float:
            self._say("float", value.hex())
        elif kind is complex:
            self._say("complex", value.real.hex(), value.imag.hex())
        elif id(value) in self._seen:
            self._say("again", self._seen[id(value)])
        else:
            self._alive.append(value)
            if not isinstance(value, (tuple, types.CodeType, np.ndarray)):  # whether these are shared says nothing
                self._seen[id(value)] = len(self._seen)
            self._depth += 1
            try:
                if self._depth > DEEPEST:
                    self._itself(value)
                else:
                    self._compound(value)
            except Exception:  # whatever a user's object answers to being read
                self._itself(value)
            self._depth -= 1

    def _say(self, *parts: Any) -> None:
        self.hash.update(repr(parts).encode("utf-8", "surrogatepass"))

    def _itself(self, value: Any) -> None:
        self._say("itself", type(value).__qualname__, len(self.opaque))
        self.opaque.append(value)

    def _all(self, name: str, *values: Any) -> None:
        self._say(name, len(values))
        for value in values:
            self.add(value)

    def _compound(self, value: Any) -> None:
        if isinstance(value, jax.core.Tracer):
            self._itself(value)
        elif isinstance(value, (np.ndarray, np.generic, jax.Array)):
            self._array(value)
        elif type(value) in (tuple, list):
            self._all(type(value).__name__, *value)
        elif type(value) in (dict, types.MappingProxyType):
            self._all("dict", *value, *value.values())
        elif type(value) in (set, frozenset):
            self._unordered(value)
        elif isinstance(value, types.ModuleType):
            self._say("module", value.__name__)
        elif isinstance(value, types.CodeType):
            self._code(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._all("method", value.__func__, value.__self__)
        elif isinstance(value, partial):
            self._all("partial", value.func, value.args, value.keywords)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, (staticmethod, classmethod)):
            self._all(type(value).__name__, value.__func__)
        elif isinstance(value, property):
            self._all("property", value.fget, value.fset)
        elif isinstance(value, types.CellType):
            self._all("cell", *_cell(value))
        elif isinstance(value, types.BuiltinFunctionType) and not isinstance(
            value.__self__, (types.ModuleType, type(None))
        ):
            self._all("bound", value.__name__, value.__self__)
        elif _is_named(value):
            self._say("name", value.__module__, _name(value))
        elif callable(getattr(value, "__wrapped__", None)) and _is_library(type(value).__module__):
            self._all("wrapper", type(value).__qualname__, value.__wrapped__)  # of `jax.jit` and its like
        else:
            self._object(value)

    def _array(self, value: Any) -> None:
        if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
            self._all("key", str(value.dtype), jax.random.key_data(value))
            return
        array = np.asarray(value)
        if array.dtype.hasobject:
            self._all("objects", array.shape, array.tolist())
        else:
            self._say("array", array.dtype.descr, array.shape)
            self.hash.update(np.ascontiguousarray(array).tobytes())

    def _unordered(self, values: Any) -> None:
        parts = []
        for value in values:
            part = _Walk()
            part.add(value)
            self.opaque += part.opaque
            parts.append(part.hash.hexdigest())
        self._say("set", sorted(parts))

    def _code(self, code: types.CodeType) -> None:
        self._say("code", *(getattr(code, name) for name in (*_PARTS, *_COUNTS)))
        self.hash.update(getattr(code, "co_exceptiontable", b""))
        self._all("constants", *code.co_consts)

    def _function(self, function: types.FunctionType) -> None:
        if _is_library(function.__module__) and _is_library_file(function.__code__.co_filename):
            self._say("library", function.__module__, function.__qualname__)
            if function.__closure__:
                self._closure(function, frozenset())
            self._all("defaults", function.__defaults__, function.__kwdefaults__)
            return
        reads, writes = _outside(function.__code__)
        self._all("function", function.__code__, function.__defaults__, function.__kwdefaults__)
        self._closure(function, writes)
        for name in reads:
            if name in function.__globals__:
                self._all("global", name)
                self._global(function.__globals__[name], function.__code__)
            else:
                self._say("builtin" if hasattr(builtins, name) else "missing", name)

    def _closure(self, function: types.FunctionType, writes: frozenset[str]) -> None:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name not in writes:
                self._say("closure", name)
                self._global(next(iter(_cell(cell)), None), function.__code__)

    def _global(self, value: Any, code: types.CodeType) -> None:
        """A value that code reads; of a user's module the attributes that it may read."""
        self.add(value)
        if isinstance(value, types.ModuleType) and not _is_library(value.__name__):
            for name in _attributes(code):
                if name in vars(value):
                    self._say("attribute", name)
                    self.add(vars(value)[name])

    def _class(self, value: type) -> None:
        self._say("class", value.__module__, value.__qualname__)
        if _is_library(value.__module__) and _is_named(value):
            return
        self._all("bases", *value.__bases__)
        for name, part in sorted(vars(value).items()):
            if name not in _UNREAD and not isinstance(part, (types.MemberDescriptorType, types.GetSetDescriptorType)):
                self._say("member", name)
                self.add(part)

    def _object(self, value: Any) -> None:
        reduce = copyreg.dispatch_table.get(type(value))
        parts = value.__reduce_ex__(4) if reduce is None else reduce(value)  # raises for what is nothing but itself
        if isinstance(parts, str):  # a name in its module
            return self._say("global", parts) if _is_library(type(value).__module__) else self._itself(value)
        self._say("object")
        self.add(type(value))
        make, args, state, items, pairs = (*parts[:5], None, None, None, None)[:5]
        self._all("made", make, args, state)
        self._all("items", *(() if items is None else items))
        self._all("pairs", *(() if pairs is None else pairs))


def _cell(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not filled yet
        return ()


@lru_cache(maxsize=1024)
def _outside(code: types.CodeType) -> tuple[tuple[str, ...], frozenset[str]]:
    """Names of globals that code and what is defined in it read, sorted, and of outer variables that they write."""
    reads, writes = set(), set()
    for part in _nested(code):
        for step in dis.get_instructions(part):
            if step.opname in _READS:
                reads.add(step.argval)
            elif step.opname in ("STORE_GLOBAL", "STORE_DEREF", "DELETE_GLOBAL", "DELETE_DEREF"):
                writes.add(step.argval)
    return tuple(sorted(reads - writes)), frozenset(writes)


@lru_cache(maxsize=1024)
def _attributes(code: types.CodeType) -> tuple[str, ...]:
    return tuple(sorted({name for part in _nested(code) for name in part.co_names}))


def _nested(code: types.CodeType) -> list[types.CodeType]:
    found = [code]
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            found += _nested(const)
    return found


def _name(value: Any) -> Any:
    return getattr(value, "__qualname__", None) or getattr(value, "__name__", None)


def _is_named(value: Any) -> bool:
    """Whether a library has this value by its name."""
    module, name = getattr(value, "__module__", None), _name(value)
    if not isinstance(module, str) or not isinstance(name, str) or not _is_library(module):
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value


@cache
def _library_folders() -> tuple[str, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    roots = [sysconfig.get_path(name) for name in names] + [os.path.dirname(jax.__file__), own]
    return tuple({os.path.join(os.path.realpath(root), "") for root in roots if root})


@cache
def _is_library_file(path: str) -> bool:
    return path.startswith("<frozen") or os.path.realpath(path).startswith(_library_folders())


@cache
def _is_library(module: str | None) -> bool:
    """Whether a module is one of a library, whose code does not change while a process runs."""
    top = (module or "").partition(".")[0]
    if top == "__main__":
        return False
    if top in sys.builtin_module_names or top in ("jax", "jaxlib", "numpy", __name__.partition(".")[0]):
        return True
    path = getattr(sys.modules.get(module or ""), "__file__", None)
    return path is not None and _is_library_file(path)
