"""Stateful transforms: what is computed from the data of the fit is kept and used again on new data.

`poly`, `scale` as in R's stats, `bs`, `ns` as in R's splines package (same knots, basis and column order).
A transform is a frozen object; calling it on (n,) values gives (n, k) columns. Missing values stay missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .._errors import DataError

Array = NDArray[np.float64]


def _finite(x: Array, label: str) -> Array:
    """The values a transform learns from; missing rows are dropped later, infinite ones reported later."""
    good = x[np.isfinite(x)]
    if good.size == 0:
        raise DataError(f"{label} has no finite values to work with")
    return good


@dataclass(frozen=True)
class Poly:
    """Orthonormal polynomials by the three-term recurrence of R's poly(); alpha (k,), norm2 (k + 2,)."""

    alpha: Array
    norm2: Array

    @staticmethod
    def fit(x: Array, degree: int, label: str) -> Poly:
        x = _finite(x, label)
        if degree < 1:
            raise DataError(f"{label}: the degree must be at least 1")
        if degree >= np.unique(x).size:
            raise DataError(f"{label}: the degree {degree} must be less than the number of distinct values")
        mean = x.mean()
        centred = x - mean
        q, r = np.linalg.qr(np.vander(centred, degree + 1, increasing=True))
        raw = q * np.diag(r)
        norm2 = (raw**2).sum(0)
        alpha = ((centred[:, None] * raw**2).sum(0) / norm2 + mean)[:degree]
        return Poly(alpha, np.concatenate([[1.0], norm2]))

    def __call__(self, x: Array) -> Array:
        degree = self.alpha.size
        z = np.ones((x.size, degree + 1))
        z[:, 1] = x - self.alpha[0]
        for i in range(1, degree):
            z[:, i + 1] = (x - self.alpha[i]) * z[:, i] - self.norm2[i + 1] / self.norm2[i] * z[:, i - 1]
        return z[:, 1:] / np.sqrt(self.norm2[2:])


@dataclass(frozen=True)
class RawPoly:
    """Plain powers x, x^2, ..., x^degree."""

    degree: int

    def __call__(self, x: Array) -> Array:
        return x[:, None] ** np.arange(1.0, self.degree + 1)


@dataclass(frozen=True)
class Scale:
    """(x - center) / scale."""

    center: float
    scale: float

    @staticmethod
    def fit(x: Array, center: bool | float, scale: bool | float, label: str) -> Scale:
        x = _finite(x, label)
        mid = float(x.mean()) if center is True else 0.0 if center is False else float(center)
        if scale is True:  # root mean square about the centre with divisor n - 1, R's scale()
            size = float(np.sqrt(((x - mid) ** 2).sum() / max(1, x.size - 1)))
            if size == 0.0:
                raise DataError(f"{label}: the column is constant and cannot be scaled; remove it")
        else:
            size = 1.0 if scale is False else float(scale)
        return Scale(mid, size)

    def __call__(self, x: Array) -> Array:
        return (x - self.center) / self.scale


def bspline_basis(knots: Array, x: Array, order: int, deriv: int = 0) -> Array:
    """All B-splines of `order` on `knots` at x, or a derivative; (n, len(knots) - order).

    Cox-de Boor on the knot interval of each x. Outside the boundary the end pieces are continued as
    polynomials, which is what R's bs() does by Taylor expansion.
    """
    n_basis = knots.size - order
    degree = order - 1
    # interval index, clamped to the intervals between the boundary knots (right end belongs to the last one)
    at = np.clip(np.searchsorted(knots, x, side="right") - 1, degree, n_basis - 1)
    while (flat := (knots[at + 1] == knots[at]) & (at > degree)).any():
        at = np.where(flat, at - 1, at)
    local = np.zeros((x.size, order))
    local[:, 0] = 1.0
    low = degree - deriv  # build the splines of lower degree, then differentiate up
    for j in range(1, low + 1):
        saved = np.zeros(x.size)
        for r in range(j):
            right, left = knots[at + r + 1], knots[at + r + 1 - j]
            part = local[:, r] / (right - left)
            local[:, r] = saved + (right - x) * part
            saved = (x - left) * part
        local[:, j] = saved
    for j in range(low + 1, degree + 1):
        saved = np.zeros(x.size)
        for r in range(j):
            part = j * local[:, r] / (knots[at + r + 1] - knots[at + r + 1 - j])
            local[:, r] = saved - part
            saved = part
        local[:, j] = saved
    out = np.zeros((x.size, n_basis))
    np.put_along_axis(out, at[:, None] + np.arange(-degree, 1), local, axis=1)
    out[np.isnan(x)] = np.nan
    return out


def _inner_knots(x: Array, boundary: tuple[float, float], count: int) -> Array:
    if count <= 0:
        return np.empty(0)
    inside = x[(x >= boundary[0]) & (x <= boundary[1])]
    return np.quantile(inside, np.linspace(0, 1, count + 2)[1:-1])


def _boundary(x: Array, given: Sequence[float] | None, label: str) -> tuple[float, float]:
    if given is None:
        low, high = float(x.min()), float(x.max())
    else:
        values = sorted(float(v) for v in given)
        if len(values) != 2:
            raise DataError(f"{label}: Boundary.knots must be two numbers")
        low, high = values
    if low == high:
        raise DataError(f"{label}: the column is constant, so it has no spline basis; remove it")
    return low, high


@dataclass(frozen=True)
class BSpline:
    """splines::bs."""

    knots: Array  # all, boundary knots repeated `degree + 1` times
    degree: int
    intercept: bool

    @staticmethod
    def fit(
        x: Array,
        df: int | None,
        knots: Sequence[float] | None,
        degree: int,
        intercept: bool,
        boundary: Sequence[float] | None,
        label: str,
    ) -> BSpline:
        x = _finite(x, label)
        if degree < 1:
            raise DataError(f"{label}: the degree must be at least 1")
        ends = _boundary(x, boundary, label)
        if knots is not None:
            inner = np.asarray(knots, dtype=np.float64)
        else:
            inner = _inner_knots(x, ends, 0 if df is None else df - (degree + 1) + (not intercept))
            if df is not None and df < degree + intercept:
                raise DataError(f"{label}: df must be at least {degree + intercept} for degree {degree}")
        every = np.sort(np.concatenate([np.repeat(ends, degree + 1), inner]))
        return BSpline(every, degree, intercept)

    def __call__(self, x: Array) -> Array:
        basis = bspline_basis(self.knots, x, self.degree + 1)
        return basis if self.intercept else basis[:, 1:]


@dataclass(frozen=True)
class NSpline:
    """splines::ns: cubic, linear beyond the boundary knots."""

    knots: Array
    intercept: bool
    boundary: tuple[float, float]
    null: Array  # (basis columns, k): orthonormal complement of the second derivatives at the boundary

    @staticmethod
    def fit(
        x: Array,
        df: int | None,
        knots: Sequence[float] | None,
        intercept: bool,
        boundary: Sequence[float] | None,
        label: str,
    ) -> NSpline:
        x = _finite(x, label)
        ends = _boundary(x, boundary, label)
        if knots is not None:
            inner = np.asarray(knots, dtype=np.float64)
        else:
            if df is not None and df < 1 + intercept:
                raise DataError(f"{label}: df must be at least {1 + intercept}")
            inner = _inner_knots(x, ends, 0 if df is None else df - 1 - intercept)
        every = np.sort(np.concatenate([np.repeat(ends, 4), inner]))
        second = bspline_basis(every, np.array(ends), 4, deriv=2)
        if not intercept:
            second = second[:, 1:]
        q = np.linalg.qr(second.T, mode="complete")[0]
        return NSpline(every, intercept, ends, q[:, 2:])

    def __call__(self, x: Array) -> Array:
        low, high = self.boundary
        inside = np.clip(x, low, high)
        basis = bspline_basis(self.knots, inside, 4)
        outside = np.flatnonzero(inside != x)
        outside = outside[~np.isnan(x[outside])]
        if outside.size:
            slope = bspline_basis(self.knots, inside[outside], 4, deriv=1)
            basis[outside] += (x - inside)[outside, None] * slope
        return (basis if self.intercept else basis[:, 1:]) @ self.null


Transform = Poly | RawPoly | Scale | BSpline | NSpline
