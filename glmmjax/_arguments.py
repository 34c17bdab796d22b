"""Checks of what users give as arguments, each refusing with one sentence that names the argument. No JAX at import."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np


def unknown_argument(name: str, known: Iterable[str], where: str) -> TypeError:
    """The error for a misspelt argument, with the nearest valid name."""
    near = difflib.get_close_matches(str(name), list(known), 1, 0.5)
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
        kind = f"{'at least' if ends else 'a number above'} {low:g}"
    else:
        kind = f"a number {'from' if ends else 'between'} {low:g} {'to' if ends else 'and'} {high:g}"
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
        out = out.astype(float) if out.dtype.kind in "iufb" else np.asarray(value, float)
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
    import inspect

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
