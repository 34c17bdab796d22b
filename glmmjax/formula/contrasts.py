"""Contrast matrices of factors, with R's values and column names (stats::contrasts, contr.*)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._errors import DataError
from .columns import label_of

Coding = tuple[NDArray[np.float64], tuple[str, ...]]  # (levels x columns), suffixes of the column names


def treatment(levels: Sequence[str], base: int = 1) -> Coding:
    """Differences from the level number `base` (from 1), R's contr.treatment."""
    keep = [i for i in range(len(levels)) if i != base - 1]
    return np.eye(len(levels))[:, keep], tuple(levels[i] for i in keep)


def sas(levels: Sequence[str]) -> Coding:
    """Treatment contrasts with the last level as base."""
    return treatment(levels, len(levels))


def sum_(levels: Sequence[str]) -> Coding:
    """Deviations from the mean of the levels; the last level is minus the sum of the others."""
    n = len(levels)
    return np.vstack([np.eye(n - 1), -np.ones((1, n - 1))]), numbers(n - 1)


def helmert(levels: Sequence[str]) -> Coding:
    """Each level against the mean of those before it, R's sign and scale."""
    n = len(levels)
    out = -np.triu(np.ones((n, n - 1)))
    for j in range(n - 1):
        out[j + 1, j] = j + 1
    return out, numbers(n - 1)


def poly(levels: Sequence[str]) -> Coding:
    """Orthonormal polynomials over equally spaced scores."""
    n = len(levels)
    if n > 95:
        raise DataError(f"orthogonal polynomial contrasts cannot be represented accurately for {n} levels (95 at most)")
    scores = np.arange(1.0, n + 1) - (n + 1) / 2
    q, r = np.linalg.qr(np.vander(scores, n, increasing=True))
    out = (q * np.sign(np.diag(r)))[:, 1:]
    return out, tuple((".L", ".Q", ".C")[k - 1] if k <= 3 else f"^{k}" for k in range(1, n))


def numbers(k: int) -> tuple[str, ...]:
    return tuple(str(i) for i in range(1, k + 1))


@dataclass(frozen=True)
class Numbered:
    """C(f, contr.SAS) or C(f, treatment, base = 2): R tells the function only the number of levels then, so
    that the columns are called by the levels' numbers."""

    name: str
    base: int | None = None


_NAMED: dict[str, Callable[[Sequence[str]], Coding]] = {
    "treatment": treatment,
    "sum": sum_,
    "helmert": helmert,
    "poly": poly,
    "sas": sas,
}


def indicators(levels: Sequence[str]) -> Coding:
    """One column per level: the coding of a factor that is not marginal to an earlier term."""
    return np.eye(len(levels)), tuple(levels)


def code(spec: Any, levels: Sequence[str], ordered: bool, label: str) -> Coding:
    """The contrast matrix of a factor.

    Args:
        spec: None (treatment, or poly for an ordered factor), a name with or without R's "contr.", an array
            or DataFrame (levels x columns; a DataFrame names its columns, its index may name the levels)
        levels: labels in order.
        label: the factor's name, for messages.
    """
    if spec is None:
        return poly(levels) if ordered else treatment(levels)
    if isinstance(spec, Numbered):
        coding = code(spec.name, levels, ordered, label)
        if spec.base is not None:
            if not 1 <= spec.base <= len(levels):
                raise DataError(f"the base {spec.base} of '{label}' must be between 1 and {len(levels)}")
            coding = treatment(levels, spec.base)
        number = {level: str(i) for i, level in enumerate(levels, start=1)}
        return coding[0], tuple(number.get(suffix, suffix) for suffix in coding[1])
    if isinstance(spec, str):
        name = spec.removeprefix("contr.").lower()
        if name not in _NAMED:
            raise DataError(f"unknown contrasts {spec!r} for '{label}'; use one of {', '.join(_NAMED)} or a matrix")
        return _NAMED[name](levels)
    suffixes: tuple[str, ...] | None = None
    if hasattr(spec, "columns") and hasattr(spec, "index"):
        suffixes = tuple(str(c) for c in spec.columns)
        rows = [label_of(i) for i in spec.index]
        if sorted(rows) == sorted(levels):
            spec = spec.iloc[[rows.index(level) for level in levels]]
        elif list(spec.index) != list(range(len(levels))):  # which is no index
            raise DataError(
                f"the index of the contrasts of '{label}' ({', '.join(rows[:8])}) differs from the levels "
                f"({', '.join(levels[:8])}); name these, or pass .to_numpy() to go by position"
            )
    matrix = np.array(spec, dtype=np.float64)
    if matrix.ndim == 1:
        matrix = matrix[:, None]
    n = len(levels)
    if matrix.ndim != 2 or matrix.shape[0] != n:
        raise DataError(
            f"the contrast matrix of '{label}' has {len(np.atleast_1d(matrix))} rows, but the factor has {n} levels: "
            f"{', '.join(levels[:8])}{', ...' if n > 8 else ''}; give one row per level"
        )
    return matrix, numbers(matrix.shape[1]) if suffixes is None else suffixes
