"""Wald tests of linear hypotheses about the fixed effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..report.anova_table import AnovaTable, made_table
from ..report.numbers import r_format
from ..report.table import TEXT, Block, Column, Shown, Table
from .hypotheses import hypothesis_label, parse_hypotheses

if TYPE_CHECKING:
    from ..results import MixedModel

#: Rows of L whose singular value is below this part of the largest are combinations of others.
DEPENDENT = 1e-10


def method_name(ddf: str) -> str:
    """ "Satterthwaite" or "Kenward-Roger", however it was written."""
    return "-".join(part.capitalize() for part in ddf.lower().split("-"))


def chisq_tail(x: float, df: float) -> float:
    """P(chi2_df > x); NaN where df is 0."""
    from scipy.special import chdtrc

    return float(chdtrc(df, max(x, 0.0))) if df > 0 else float("nan")


def determined(model: MixedModel, L: np.ndarray) -> tuple[np.ndarray, str]:
    """Combinations (s, r) of hypotheses L (r, p) about coefficients that do not run off, and a sentence where s < r."""
    separation, r = model._estimates.separation, len(L)
    if separation is None or not r or not separation.touches(L).any():
        return np.eye(r), ""
    known = separation.determined_part(L)
    what = "coefficients run off because the response is separated"
    if not len(known):
        return known, f"{what}, and nothing of this is determined; compare likelihoods (anova of two models, drop1)"
    return known, f"{what}: only what is determined is tested; likelihoods compare all (anova of two models, drop1)"


def wald(L: np.ndarray, excess: np.ndarray, V: np.ndarray) -> tuple[float, int]:
    """Wald's chi-square of L beta = rhs, `excess` being L beta - rhs, and its degrees of freedom, the rank of L.

    NaN where the covariance V of the estimates is not known or not definite.
    """
    if not len(L):
        return float("nan"), 0
    basis = _independent_rows(L)
    if not np.isfinite(V).all():
        return float("nan"), len(basis)
    inner, rest = basis @ L, basis @ excess
    covariance = inner @ V @ inner.T
    scale = np.sqrt(np.maximum(np.diag(covariance), np.finfo(float).tiny))
    try:
        half = np.linalg.cholesky(covariance / np.outer(scale, scale))
    except np.linalg.LinAlgError:
        return float("nan"), len(basis)
    return float(np.square(np.linalg.solve(half, rest / scale)).sum()), len(basis)


def _independent_rows(L: np.ndarray) -> np.ndarray:
    """(rank, r) combinations of the rows of L that are independent."""
    size = np.linalg.norm(L, axis=1)
    if len(L) == 1:
        return np.eye(1)
    left, values, _ = np.linalg.svd(L / np.where(size > 0.0, size, 1.0)[:, None])
    rank = int((values > DEPENDENT * values[0]).sum())
    return left[:, :rank].T / np.where(size > 0.0, size, 1.0)


@dataclass(frozen=True, repr=False)
class WaldTest(Shown):
    """Test of linear hypotheses about the fixed effects, as returned by `MixedModel.wald_test`.

    Attributes:
        statistic: chi-square, or F where `df_denom` is not None.
        df: rank of the hypotheses. df_denom: denominator degrees of freedom.
        p_value: of the statistic.
        estimate, std_error: (r,) of L beta, by hypothesis (Kenward-Roger: the adjusted errors).
        rhs: (r,) what L beta is tested to be.
        ddf: method of the degrees of freedom, None for a chi-square.
        note: what is not tested, because coefficients run off; "" where all is.
    """

    statistic: float
    df: int
    df_denom: float | None
    p_value: float
    estimate: pd.Series
    std_error: pd.Series
    rhs: np.ndarray
    ddf: str | None
    note: str = ""

    def table(self) -> AnovaTable:
        """The test as a table of one row, the hypotheses above it."""
        return self._joint([TEXT.document(self._above())])

    def _above(self) -> list[Block]:
        frame = {"estimate": self.estimate, "std.error": self.std_error, "tested": self.rhs}
        hypotheses = Column("", [str(label) for label in self.estimate.index], right=False)
        title = "Linear hypothesis test"
        title += " (Wald chi-square)" if self.ddf is None else f" ({method_name(self.ddf)}'s method)"
        return [title, "", Table([hypotheses, *(Column(k, r_format(v, 5)) for k, v in frame.items())]), ""]

    def _joint(self, heading: Sequence[str]) -> AnovaTable:
        if self.df_denom is None:
            values = {"Chisq": self.statistic, "Df": self.df, "Pr(>Chisq)": self.p_value}
        else:
            values = {"NumDF": self.df, "DenDF": self.df_denom, "F value": self.statistic, "Pr(>F)": self.p_value}
        frame = pd.DataFrame([values], index=["joint" if len(self.estimate) > 1 else ""], dtype=float)
        return made_table(frame, heading, [self.note] if self.note else [])

    def _report(self, page: bool) -> Sequence[Block]:
        _, *joint = self._joint([])._report(page)
        return [*self._above(), *([f"Note: {self.note}"] if self.note else []), *joint]


def wald_test(model: MixedModel, L: Any, rhs: Any = 0.0, ddf: str | None = None) -> WaldTest:
    """Wald test of linear hypotheses about the fixed effects.

    Args:
        L: text such as ``"period2 = period3, period4 = 0"``; coefficient -> weight; or a matrix (r, p) over the
            coefficients of `fixef`.
        rhs: number, or (r,), that L beta is tested to be; text has its own.
        ddf: for linear models "satterthwaite" or "kenward-roger": an F test; None gives a chi-square test.

    Returns:
        `WaldTest`: text, HTML, statistic, df, df_denom, p_value, estimate, std_error.

    Raises:
        ValueError: an unknown coefficient, a wrong shape, or hypotheses that contradict each other.
        NotSupportedError: ddf for a generalised model.
    """
    names = list(model._data.x_names)
    if not names:
        raise ValueError("the model has no fixed effects to test")
    if isinstance(L, str) or (isinstance(L, Sequence) and L and all(isinstance(part, str) for part in L)):
        text = L if isinstance(L, str) else ", ".join(L)
        labels, matrix, own = parse_hypotheses(text, names)
        if np.any(np.asarray(rhs, float)) and "=" in text:
            raise ValueError("the hypotheses have right-hand sides of their own; leave rhs out")
        rhs = own + np.asarray(rhs, float)
    elif isinstance(L, Mapping):
        unknown = [str(name) for name in L if name not in names]
        if unknown:
            raise ValueError(f"no fixed effect is named {unknown[0]!r}; there are {', '.join(names)}")
        matrix = np.array([[float(L.get(name, 0.0)) for name in names]])
        labels = [hypothesis_label(matrix[0], names)]
    else:
        if isinstance(L, pd.DataFrame) and set(L.columns) == set(names):
            L = L[names]
        matrix = np.atleast_2d(np.asarray(L, float))
        if matrix.ndim != 2 or matrix.shape[1] != len(names):
            raise ValueError(
                f"L must have one column for each of the {len(names)} fixed effects ({', '.join(names)}), got shape "
                f"{np.shape(L)}"
            )
        labels = [hypothesis_label(row, names) for row in matrix]
    if not np.isfinite(matrix).all() or not matrix.any(axis=1).all():
        raise ValueError("every hypothesis must have finite weights that are not all zero")
    try:
        target = np.broadcast_to(np.asarray(rhs, float), len(matrix)).copy()
    except ValueError:
        raise ValueError(f"rhs must be a number or one for each of the {len(matrix)} hypotheses") from None
    basis = _independent_rows(matrix)
    inner = basis @ matrix
    implied = matrix @ np.linalg.lstsq(inner, basis @ target, rcond=None)[0]
    if not np.allclose(implied, target, rtol=1e-8, atol=1e-8 * max(1.0, float(np.abs(target).max()))):
        raise ValueError("the hypotheses contradict each other: their rows depend on each other, their rhs does not")
    estimate, note = matrix @ model.beta, ""
    if ddf is None:
        error = np.sqrt(model._variances_of(matrix))
        known, note = determined(model, matrix)
        statistic, df = wald(known @ matrix, known @ (estimate - target), model._fixed_covariance("hessian"))
        p, denominator = chisq_tail(statistic, df), None
    else:
        from .ddf import contrast_test

        error = np.array([contrast_test(model, row, ddf).std_error for row in matrix])
        test = contrast_test(
            model, matrix if len(matrix) == 1 else inner, ddf, basis @ target if len(matrix) > 1 else target
        )
        statistic, df, denominator, p = test.f_value, test.num_df, test.den_df, test.p_value
    index = pd.Index(labels)
    errors = pd.Series(error, index)
    return WaldTest(statistic, df, denominator, p, pd.Series(estimate, index), errors, target, ddf, note)
