"""Separate linear models for each level of a grouping factor: what a mixed model shrinks from.

Source: Pinheiro & Bates 2000, Mixed-Effects Models in S and S-PLUS, section 4.1 (lmList and its pooled variance).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._arguments import checked, text
from .._errors import DataError
from ..formula.frame import build
from ..report.pyplot import pyplot
from ..report.table import Block, Shown, of_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@checked()
@dataclass(frozen=True, repr=False)
class LmList(Shown):
    """Separate fits, as returned by `lm_list`.

    Attributes:
        formula, group: as given. coef: (levels, p) estimates, NaN where a level's rows do not determine them.
        rss, df_resid: residual sum of squares and degrees of freedom by level.
        sigma: pooled residual standard deviation.
    """

    formula: str
    group: str
    coef: pd.DataFrame
    rss: pd.Series
    df_resid: pd.Series
    sigma: float
    _unscaled: np.ndarray

    @property
    def bse(self) -> pd.DataFrame:
        """(levels, p) standard errors from the pooled variance."""
        return pd.DataFrame(self.sigma * np.sqrt(self._unscaled), self.coef.index, self.coef.columns)

    def confint(self, level: float = 0.95) -> pd.DataFrame:
        """Intervals from the pooled variance: level, term, estimate, conf_low, conf_high."""
        from scipy.stats import t

        half = t.ppf(0.5 + 0.5 * level, self.df_resid.sum()) * self.bse
        parts = {"estimate": self.coef, "conf_low": self.coef - half, "conf_high": self.coef + half}
        stacked = {name: frame.stack(future_stack=True) for name, frame in parts.items()}
        return pd.DataFrame(stacked).rename_axis([self.group, "term"]).reset_index()

    def plot(self, level: float = 0.95) -> tuple[Any, pd.DataFrame]:
        """Intervals by level, a panel per coefficient; returns the figure and the data in it."""
        plt = pyplot()
        data = self.confint(level)
        terms = list(self.coef.columns)
        height = 1.2 + 0.2 * len(self.coef)
        figure, axes = plt.subplots(
            1, len(terms), sharey=True, squeeze=False, figsize=(2.8 * len(terms) + 0.8, height), layout="constrained"
        )
        for panel, term in zip(axes[0], terms, strict=True):
            _panel(panel, data[data["term"] == term], term)
        axes[0, 0].set_yticks(np.arange(len(self.coef)), [str(v) for v in self.coef.index], fontsize="small")
        axes[0, 0].set_ylabel(self.group)
        return figure, data

    def _report(self, page: bool) -> Sequence[Block]:
        pooled = f"Pooled residual sd {self.sigma:.5g} on {int(self.df_resid.sum())} degrees of freedom"
        return [f"Separate fits by {self.group}: {self.formula}", of_frame(self.coef, ".5g"), pooled]


def _panel(panel: Axes, own: pd.DataFrame, term: str) -> None:
    at = np.arange(len(own))
    panel.hlines(at, own["conf_low"], own["conf_high"], color="C0", linewidth=1.2)
    panel.plot(own["estimate"], at, "o", color="C0", markersize=4)
    panel.set_title(term, fontsize="medium")


@checked(formula=text)
def lm_list(formula: str, data: Any, weights: Any = None, offset: Any = None, na: str = "drop") -> LmList:
    """Fit a linear model to the rows of each level of a grouping factor (lme4's lmList).

    Args:
        formula: ``"y ~ x | g"``.
        data, weights, offset, na: as `glmmjax.lmer`.

    Returns:
        `LmList`.

    Raises:
        DataError: no grouping factor after a bar, or no level with more rows than coefficients.
    """
    left, bar, group = formula.rpartition("|")
    if not bar or "~" in group or "(" in group:
        raise DataError(f"lm_list needs a formula 'y ~ x | g', got {formula!r}")
    frame = build(f"{left.strip()} + (1 | {group.strip()})", data, weights=weights, offset=offset, na=na)
    assert frame.y is not None
    term = frame.terms[0]
    root = np.ones(frame.nobs) if frame.weights is None else np.sqrt(frame.weights)
    y = frame.y - (0.0 if frame.offset is None else frame.offset)
    m, p = len(term.levels), frame.X.shape[1]
    coef, unscaled = np.full((m, p), np.nan), np.full((m, p), np.nan)
    rss, df = np.zeros(m), np.zeros(m, int)
    for j in range(m):
        rows = np.flatnonzero(term.level == j)
        X, target = root[rows, None] * frame.X[rows], root[rows] * y[rows]
        size = np.linalg.norm(X, axis=0)
        if rows.size < p or (size == 0.0).any() or np.linalg.matrix_rank(X / size) < p:
            continue  # this level does not determine every coefficient
        Q, R = np.linalg.qr(X)
        coef[j] = np.linalg.solve(R, Q.T @ target)
        unscaled[j] = np.square(np.linalg.inv(R)).sum(axis=1)
        rss[j], df[j] = np.square(target - X @ coef[j]).sum(), rows.size - p
    if not df.sum():
        raise DataError(f"no level of {term.group!r} has more rows than the {p} coefficients: no variance is left")
    index = pd.Index(list(term.levels), name=term.group)
    return LmList(
        left.strip(),
        term.group,
        pd.DataFrame(coef, index, list(frame.x_names)),
        pd.Series(rss, index, name="rss"),
        pd.Series(df, index, name="df_resid"),
        float(np.sqrt(rss.sum() / df.sum())),
        unscaled,
    )
