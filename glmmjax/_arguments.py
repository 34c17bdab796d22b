"""Checks of what users give as arguments, each refusing with one sentence that names the argument. No JAX at import."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np


def unknown_argument(name: str, known: Iterable[str], where: str) -> TypeError:
    """The error for a misspelt argument, with the nearest valid name."""
    known = list(known)
    near = [one for one in known if one.lower() == str(name).lower()]
    near = near or difflib.get_close_matches(str(name), known, 1, 0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(known)}"
    return TypeError(f"{where} has no argument {name!r}{hint}")


def shown(value: Any) -> str:
    """A value in a message: short ones as they are, others by their type."""
    try:
        text = repr(value)
    except Exception:  # a user's own class
        text = ""
    simple = value is None or isinstance(value, (str, bytes, numbers.Number, np.generic, list, tuple, dict))
    return (
        text
        if simple and len(text) <= 60
        else f"{'an' if type(value).__name__[0] in 'aeiouAEIOU' else 'a'} {type(value).__name__}"
    )


def choice(value: Any, name: str, options: Sequence[Any]) -> Any:
    """One of a few values, texts in any case."""
    if isinstance(value, str) and value.lower() in options:
        return value.lower()
    for option in options:
        if value is option or (isinstance(value, str) and value == option):
            return option
    known = [repr(option) for option in options]
    listed = known[0] if len(known) == 1 else f"{', '.join(known[:-1])} or {known[-1]}"
    texts = [option for option in options if isinstance(option, str)]
    near = difflib.get_close_matches(value, texts, 1, 0.5) if isinstance(value, str) else []
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"{name} must be {listed}, got {shown(value)}{hint}")


def flag(value: Any, name: str) -> bool:
    """True or False; 1 and 0 count as these."""
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, (int, np.integer)) and value in (0, 1)):
        return bool(value)
    raise ValueError(f"{name} must be True or False, got {shown(value)}")


def whole(value: Any, name: str, least: int = 0, most: float = math.inf) -> int:
    """An integer between two others."""
    if not isinstance(value, (bool, np.bool_)) and isinstance(value, (int, np.integer)) and least <= value <= most:
        return int(value)
    kind = {0: "a non-negative integer", 1: "a positive integer"}.get(least, f"an integer of at least {least}")
    if most < math.inf:
        kind = f"an integer from {least} to {most:g}"
    raise ValueError(f"{name} must be {kind}, got {shown(value)}")


def number(value: Any, name: str, low: float = -math.inf, high: float = math.inf, ends: bool = False) -> float:
    """A finite number between two others, which count with `ends`."""
    real = isinstance(value, (numbers.Real, np.generic)) or (isinstance(value, np.ndarray) and value.ndim == 0)
    if real and not isinstance(value, (bool, np.bool_)) and np.asarray(value).dtype.kind in "iuf":
        found = float(value)  # type: ignore[arg-type]
        if math.isfinite(found) and (low < found < high or (ends and found in (low, high))):
            return found
    if low == -math.inf and high == math.inf:
        kind = "a finite number"
    elif high == math.inf:
        kind = f"at least {low:g}" if ends else "positive" if low == 0.0 else f"above {low:g}"
    else:
        kind = f"{'from' if ends else 'between'} {low:g} {'to' if ends else 'and'} {high:g}"
    raise ValueError(f"{name} must be {kind}, got {shown(value)}")


def level(value: Any) -> float:
    """A confidence level."""
    return number(value, "level", 0.0, 1.0)


def random_state(value: Any, name: str = "seed") -> Any:
    """What NumPy makes a generator of: a non-negative integer, a sequence of such, a generator, or None."""
    if isinstance(value, (bool, np.bool_, str, float)):
        raise ValueError(f"{name} must be a non-negative integer or a NumPy generator, got {shown(value)}")
    try:
        np.random.default_rng(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a non-negative integer or a NumPy generator, got {shown(value)}") from None
    return value


def text(value: Any, name: str) -> str:
    """A text."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text, got {shown(value)}")
    return value


def function(value: Any, name: str) -> Any:
    """Something that can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {shown(value)}")
    return value


def numeric(value: Any, name: str, size: int | None = None, finite: bool = True) -> np.ndarray:
    """A float array, of one dimension and `size` numbers if that is given."""
    try:
        out = np.asarray(value)
        out = out.astype(float, copy=False) if out.dtype.kind in "iufb" else np.asarray(value, float)
        if np.asarray(value).dtype.kind in "OUS" and any(
            isinstance(v, (str, bytes)) for v in np.ravel(np.asarray(value, object))
        ):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers, got {shown(value)}") from None
    if size is not None:
        out = out.reshape(-1)
        if out.size != size:
            raise ValueError(f"{name} must have {size} number{'' if size == 1 else 's'}, got {out.size}")
    if finite and not np.isfinite(out).all():
        raise ValueError(f"{name} must be finite, got {shown(value)}")
    return out


#: Rows that a user's function is tried with: no data has a shape of its own in a function of single rows.
_ROWS = 7


def of_rows(function: Callable[..., Any], name: str, like: Sequence[Any], remedy: str = "") -> list[bool]:
    """Check that a user's function returns a number per row of its arguments, by tracing it; nothing is computed.

    Args:
        like: its arguments: names and numbers of dimensions (1 for rows, 0 for a number), or dicts of them.

    Returns:
        Which leaves of the arguments the result depends on, dicts in the order of their keys.

    Raises:
        TypeError, ValueError: one sentence. What the function raises itself passes through.
    """
    import jax
    import jax.numpy as jnp

    if not callable(function):
        raise TypeError(f"{name} must be a function, got {shown(function)}")

    def shape(dimensions: int) -> Any:
        return jax.ShapeDtypeStruct((_ROWS,) * dimensions, jnp.result_type(float))

    arguments = [{k: shape(d) for k, d in a.items()} if isinstance(a, Mapping) else shape(a[1]) for a in like]
    names = ["aux" if isinstance(a, Mapping) else a[0] for a in like]
    call = f"{name}({', '.join(names)})"
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{name} is called as {call}, which its arguments do not allow: {error}") from None
    except ValueError:  # no signature to be had
        pass
    try:
        made, out = jax.make_jaxpr(function, return_shape=True)(*arguments)
    except jax.errors.TracerArrayConversionError:
        raise TypeError(
            f"{call} uses NumPy, SciPy or math on its arguments, which have no derivatives: write it with "
            "jax.numpy and jax.scipy"
        ) from None
    except KeyError as error:
        known = [key for a in like if isinstance(a, Mapping) for key in a]
        if not error.args or error.args[0] in known or not known:
            raise
        listed = ", ".join(repr(key) for key in known)
        raise ValueError(f"{call} reads aux[{error.args[0]!r}], which is not there; aux has {listed}") from None
    except (TypeError, ValueError) as error:  # the texts are those of JAX's arrays while they are traced
        texts = "Only scalar arrays can be converted", "The truth value of an array"
        if not isinstance(error, jax.errors.ConcretizationTypeError) and not str(error).startswith(texts):
            raise
        raise TypeError(
            f"{call} needs values that it cannot have (an if, a float() or a function of math on its arguments): write "
            "it with jax.numpy, choices with jnp.where"
        ) from None
    if getattr(out, "shape", None) != (_ROWS,):
        what = f"shape {out.shape} for {_ROWS} rows" if hasattr(out, "shape") else shown(out)
        if getattr(out, "shape", None) == ():
            what = "one number for all rows"
        raise ValueError(f"{call} returns {what}; it must return one number per row{remedy}")
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"{call} returns numbers of type {out.dtype}; it must return real numbers")
    from jax.interpreters import partial_eval

    if not hasattr(partial_eval, "dce_jaxpr"):  # another version: take all as used
        return [True] * len(made.jaxpr.invars)
    return list(partial_eval.dce_jaxpr(made.jaxpr, [True])[1])


# -------------------- the arguments of public functions, by their names
def is_model(value: Any) -> bool:
    """Whether it is a fitted model: those who ask do not import its class, which knows them."""
    return hasattr(value, "_estimates")


def fitted(value: Any, name: str) -> Any:
    """A fitted model."""
    if not is_model(value):
        raise TypeError(f"{name} must be a fitted model, as glmer and lmer return it, got {shown(value)}")
    return value


def models(value: Any, name: str) -> Any:
    """Several fitted models."""
    if not isinstance(value, (list, tuple)) or not value:
        raise TypeError(f"{name} must be a list of fitted models, got {shown(value)}")
    for one in value:
        fitted(one, f"each of {name}")
    return value


def models_by_name(value: Any, name: str) -> Any:
    """A fitted model, or a dict of them."""
    for one in mapping(value, name).values() if isinstance(value, Mapping) else (value,):
        fitted(one, name)
    return value


def tables(value: Any, name: str) -> Any:
    """A dict of data frames."""
    for key, one in mapping(value, name).items():
        if not hasattr(one, "columns"):
            raise TypeError(f"{name}[{key!r}] must be a DataFrame, got {shown(one)}")
    return value


def a_test(value: Any, name: str) -> Any:
    """A name or a function."""
    if not isinstance(value, str) and not callable(value):
        raise TypeError(f"{name} must be the name of a fixed effect or a function of a model, got {shown(value)}")
    return value


def of_class(*names: str) -> Callable[[Any, str], Any]:
    """An instance of one of these classes of the package."""

    def check(value: Any, name: str) -> Any:
        if not any(kind.__name__ in names for kind in type(value).__mro__):
            raise TypeError(f"{name} must be a gj.{' or gj.'.join(names)}, got {shown(value)}")
        return value

    return check


def a_design(value: Any, name: str) -> Any:
    """The arrays of a model."""
    if not any(kind.__name__ == "Design" for kind in type(value).__mro__):
        raise TypeError(f"{name} must be a Design, as gj.design and gj.design_arrays make it, got {shown(value)}")
    return value


def texts(value: Any, name: str) -> Any:
    """A text or several."""
    listed = [value] if isinstance(value, str) else value
    ok = isinstance(listed, Iterable) and not isinstance(listed, (bytes, Mapping))
    if not ok or not all(isinstance(v, str) for v in listed):
        raise TypeError(f"{name} must be a text or several, got {shown(value)}")
    return value


def mapping(value: Any, name: str) -> Any:
    """A dict with texts as keys."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict, got {shown(value)}")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{name} must have texts as keys, got {shown(key)}")
    return value


def reports(value: Any, name: str) -> Any:
    """True, False, or what progress is reported to."""
    return value if callable(value) else flag(value, name)


def positive(value: Any, name: str) -> float:
    """A number above 0."""
    return number(value, name, 0.0)


def between(value: Any, name: str) -> float:
    """A number between 0 and 1."""
    return number(value, name, 0.0, 1.0)


def counted(value: Any, name: str) -> int:
    """A positive integer."""
    return whole(value, name, 1)


def name_or_number(value: Any, name: str) -> Any:
    """A text or an integer."""
    if not isinstance(value, (str, int, np.integer)):
        raise TypeError(f"{name} must be a text, got {shown(value)}")
    return value


def chosen(value: Any, name: str) -> Any:
    """Names, None for the usual ones, or a dict of functions."""
    if not isinstance(value, Mapping):
        return value if value is None else texts(value, name)
    for key, part in mapping(value, name).items():
        function(part, f"{name}[{key!r}]")
    return value


def a_formula(value: Any, name: str) -> Any:
    """A formula as text, or read already."""
    return value if type(value).__name__ == "Formula" else text(value, name)


def named_starts(value: Any, name: str) -> Any:
    """A dict of vectors, or an earlier fit (a named tuple)."""
    return value if hasattr(value, "_fields") else mapping(value, name)


def path(value: Any, name: str) -> Any:
    """A text or a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be the path of a file, got {shown(value)}")
    return value


def starting(value: Any, name: str) -> Any:
    """Starting values: a dict of vectors, a point, or an earlier fit (a named tuple)."""
    if hasattr(value, "_fields"):
        return value
    for key, part in mapping(value, name).items() if isinstance(value, Mapping) else [("", value)]:
        array(part, f"{name}[{key!r}]" if key else name)
    return value


def array(value: Any, name: str) -> Any:
    """Numbers, traced ones too."""
    return value if traced(value) else numeric(value, name, finite=False)


def setting(check: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """A check of numbers that may be traced."""
    return lambda value, name: value if traced(value) or _is_jax(value) else check(value, name)


def settings(value: Any, name: str) -> Any:
    """A Control, or a dict of its settings."""
    if type(value).__name__ == "Control":
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a gj.Control or a dict, got {type(value).__name__}")
    return mapping(value, name)


def vector(value: Any, name: str, size: int) -> None:
    """Refuse a parameter vector of another shape than (size,); its values may be traced."""
    shape = np.shape(value)
    if shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {shape}")


def traced(value: Any) -> bool:
    """Whether a value is one of JAX's while it traces a function."""
    return any(k.__name__ == "Tracer" and k.__module__.startswith("jax") for k in type(value).__mro__)


def _is_jax(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in ("jax", "jaxlib")


#: Argument -> what it has to be, in all public functions; what is not here they check themselves.
RULES: dict[str, Callable[[Any, str], Any]] = {
    **dict.fromkeys(("level", "alpha"), between),
    **dict.fromkeys(("nsim", "workers", "bins", "max_levels"), counted),
    **dict.fromkeys(("limit",), positive),
    **dict.fromkeys(("nAGQ", "axis", "n_labels", "label", "max_count"), whole),
    **dict.fromkeys(("model", "smaller", "larger", "null", "alternative"), fitted),
    **dict.fromkeys(
        ("REML", "scaled", "full", "condVar", "allow_new_levels", "use_u", "labels", "batched", "shift", "boundary"),
        flag,
    ),
    **dict.fromkeys(("covariance", "correlation", "intercept"), flag),
    "ddf": lambda value, name: value if value is None else text(value, name),
    **dict.fromkeys(("cluster", "groups", "re_form", "adjust", "change", "na", "hessian"), text),
    **dict.fromkeys(("dtype", "interval", "kind", "method", "what", "term", "sort", "scale"), text),
    **dict.fromkeys(("names", "by"), texts),
    **dict.fromkeys(("contrasts", "params"), mapping),
    **dict.fromkeys(("theta", "beta", "phi", "u0", "x", "rhs"), array),
    **dict.fromkeys(("name", "scope"), texts),
    "type": name_or_number,
    "formula": a_formula,
    "which": chosen,
    "intervals": tables,
    "z": numeric,
    "tol": positive,
    "at": mapping,
    "profile": of_class("Profile"),
    "seed": random_state,
    "results": path,
    "start": starting,
    "control": settings,
    "verbose": reports,
    "statistic": function,
    "setup": of_class("ModelSetup"),
    "deviance": of_class("DevianceFunction"),
    "design": a_design,
}


def checked(*skip: str, traceable: bool = False, **rules: Callable[[Any, str], Any]) -> Any:
    """Decorator of a public function or class: its arguments are checked by `RULES` before anything is done.

    None passes where it is the default. Unknown arguments are refused with the nearest valid name, and, unless
    `traceable`, traced arrays with the functions that take them. Of a class it is every public method.

    Args:
        skip: arguments that have another meaning here. rules: further ones, or others than those of `RULES`.
    """

    def decorate(target: Any) -> Any:
        if isinstance(target, type):
            for name, member in list(vars(target).items()):
                if not name.startswith("_") and isinstance(member, types.FunctionType):
                    setattr(target, name, _checked(member, skip, rules, traceable))
            return target
        return _checked(target, skip, rules, traceable)

    return decorate


def _checked(
    function: Callable[..., Any], skip: Sequence[str], rules: Mapping[str, Callable[[Any, str], Any]], traceable: bool
) -> Callable[..., Any]:
    every = {**RULES, **rules}
    where = function.__name__
    #: rule of each argument and whether None passes; names by position; the names of *args and **kwargs
    read: tuple[dict[str, tuple[Any, bool]], list[str], str, str] | None = None

    def signature() -> tuple[dict[str, tuple[Any, bool]], list[str], str, str]:
        parameters = inspect.signature(function).parameters.values()
        known = {p.name: (None if p.name in skip else every.get(p.name), p.default is None) for p in parameters}
        places = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        several = [p.name for p in parameters if p.kind is p.VAR_POSITIONAL]
        named = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
        return known, places, "".join(several), "".join(named)

    @functools.wraps(function)
    def checking(*args: Any, **kwargs: Any) -> Any:
        nonlocal read
        read = read or signature()
        known, places, several, named = read
        for name in kwargs:
            if name not in known and not named:
                raise unknown_argument(name, [p for p in known if p != "self"], where)
        given = [
            *zip(places, args, strict=False),
            *((several, value) for value in args[len(places) :]),
            *kwargs.items(),
        ]
        for name, value in given:
            if not traceable:
                _refuse_traced(value, name, where)
            rule, optional = known.get(name, (None, True))
            if rule is not None and not (value is None and optional):
                rule(value, name)
        return function(*args, **kwargs)  # which says what is missing, or there twice

    return checking


def _refuse_traced(value: Any, name: str, where: str) -> None:
    if isinstance(value, (str, bool, int, float)) or value is None:
        return
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
    for part in parts:
        if traced(part):
            raise TypeError(
                f"{name} is traced (inside jax.jit, jax.grad or jax.vmap), and {where} takes numbers: make the design "
                "outside by gj.design or gj.design_arrays, replace its arrays, and fit inside by gj.fit_design"
            )
