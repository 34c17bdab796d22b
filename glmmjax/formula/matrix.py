"""Terms of a formula -> model matrix, coded and named as R's model.matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._errors import DataError
from ..compiling.memory import empty
from . import contrasts as _contrasts
from .columns import Factor, Float, Matrix, Value, drop_unused
from .terms import Terms, bits

RANK_TOLERANCE = 1e-7  # lme4's chkRank.drop.cols: residual norm of a column relative to its own norm


@dataclass(frozen=True)
class Coded:
    """A variable of the fit as columns: how to make them is kept for new data."""

    label: str
    kind: str  # "numeric", "matrix" or "factor"
    levels: tuple[str, ...] = ()
    contrasts: _contrasts.Coding | None = None
    full: _contrasts.Coding | None = None
    suffixes: tuple[str, ...] = ()

    def columns(self, value: Value, by_contrasts: bool) -> tuple[Float, tuple[str, ...]]:
        """(n, k) columns and the suffixes of their names; rows with a missing factor value are NaN."""
        if self.kind == "numeric":
            return value[:, None], ("",)
        if self.kind == "matrix":
            return value.values, self.suffixes
        coding = self.contrasts if by_contrasts else self.full
        assert coding is not None
        table, suffixes = coding
        codes = value.codes
        out = table.take(codes, axis=0, mode="clip")
        if codes.size and codes.min() < 0:
            out[codes < 0] = np.nan
        return out, suffixes


def code_variable(value: Value, label: str, spec: Any = None) -> tuple[Coded, Value]:
    """The coding of a variable on the rows of the fit, and its value with unused levels dropped."""
    if isinstance(value, Matrix):
        return Coded(label, "matrix", suffixes=value.suffixes), value
    if not isinstance(value, Factor):
        if spec is not None:
            raise DataError(f"contrasts were given for '{label}', which is not a factor; use factor({label})")
        return Coded(label, "numeric"), value
    value = drop_unused(value)
    if len(value.levels) < 2:
        only = f" ('{value.levels[0]}')" if value.levels else ""
        raise DataError(f"factor '{label}' has only one level{only} in the rows used; remove it from the formula")
    chosen = value.contrast if value.contrast is not None else spec
    coded = Coded(
        label,
        "factor",
        value.levels,
        _contrasts.code(chosen, value.levels, value.ordered, label),
        _contrasts.indicators(value.levels),
    )
    return coded, value


def matrix_plan(terms: Terms, is_factor: Mapping[int, bool]) -> list[list[tuple[int, bool]]]:
    """Per term: (variable index, coded by contrasts?) in order, R's rule without intercept included."""
    plan = [
        [(i, pattern[i]) for i in bits(code)] for code, pattern in zip(terms.codes, terms.by_contrasts, strict=True)
    ]
    if not terms.intercept:
        # as model.matrix: the first factor of the first term that has one gets all its indicators
        for columns in plan:
            for k, (i, _) in enumerate(columns):
                if is_factor[i]:
                    columns[k] = (i, False)
                    return plan
    return plan


@dataclass(frozen=True)
class MatrixSpec:
    """How to make a model matrix: terms, coded variables, and what the columns are called."""

    terms: Terms
    coded: dict[int, Coded]
    plan: list[list[tuple[int, bool]]]
    names: tuple[str, ...]
    assign: tuple[int, ...]

    @staticmethod
    def fit(terms: Terms, coded: dict[int, Coded]) -> MatrixSpec:
        plan = matrix_plan(terms, {i: c.kind == "factor" for i, c in coded.items()})
        names: list[str] = ["(Intercept)"] if terms.intercept else []
        assign: list[int] = [0] * len(names)
        for t, columns in enumerate(plan, start=1):
            labels = [""]
            for k, (i, by_contrasts) in enumerate(columns):
                c = coded[i]
                if c.kind == "factor":
                    coding = c.contrasts if by_contrasts else c.full
                    assert coding is not None
                    suffixes = coding[1]
                else:
                    suffixes = c.suffixes if c.kind == "matrix" else ("",)
                own = [c.label + s for s in suffixes]
                labels = own if k == 0 else [f"{a}:{b}" for b in own for a in labels]
            names += labels
            assign += [t] * len(labels)
        return MatrixSpec(terms, coded, plan, tuple(names), tuple(assign))

    def build(self, values: Mapping[int, Value], n: int) -> Float:
        """(n, p) in C order; within an interaction the first variable varies fastest."""
        out = empty((n, len(self.names)))
        at = 0
        if self.terms.intercept:
            out[:, 0] = 1.0
            at = 1
        for columns in self.plan:
            block: Float | None = None
            for i, by_contrasts in columns:
                own, _ = self.coded[i].columns(values[i], by_contrasts)
                block = own if block is None else (own[:, :, None] * block[:, None, :]).reshape(n, -1)
            assert block is not None
            out[:, at : at + block.shape[1]] = block
            at += block.shape[1]
        return out


def independent_columns(X: Float) -> NDArray[np.bool_]:
    """Which columns to keep, greedily from the left: residual at least 1e-7 of the column's norm (lme4)."""
    n, p = X.shape
    if p == 0:
        return np.ones(0, dtype=bool)
    gram = X.T @ X
    size = np.sqrt(np.diag(gram))
    if size.all() and np.isfinite(size).all() and n >= p:
        # cheap and safe: residuals far above the tolerance need no orthogonal factor
        try:
            pivots = np.diag(np.linalg.cholesky(gram / size / size[:, None]))
            if pivots.min() > 1e-3:
                return np.ones(p, dtype=bool)
        except np.linalg.LinAlgError:
            pass
    scaled = X / np.where(np.abs(X).max(axis=0, initial=0.0) > 0, np.abs(X).max(axis=0, initial=0.0), 1.0)
    r: Float = np.linalg.qr(scaled, mode="r")  # type: ignore[assignment]
    norms = np.sqrt((r**2).sum(0))
    keep = list(range(p))
    at = 0
    while at < len(keep):
        # r is the factor of the columns in `keep`; a dropped one must not shadow those after it
        residual = abs(r[at, at]) if at < r.shape[0] else 0.0
        if residual < RANK_TOLERANCE * norms[keep[at]] or norms[keep[at]] == 0.0:
            del keep[at]
            r = np.linalg.qr(np.delete(r, at, axis=1), mode="r")  # type: ignore[assignment]
        else:
            at += 1
    out = np.zeros(p, dtype=bool)
    out[keep] = True
    return out
