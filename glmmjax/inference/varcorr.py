"""Covariances of the random effects as lme4 shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..model.covariance import cov_to_sdcor, numbered
from ..report.numbers import signif
from ..report.table import Block, Column, Shown, Table

if TYPE_CHECKING:
    from ..results import MixedModel


@dataclass(frozen=True)
class VarCorrBlock:
    """Covariance of one random-effects term, on the scale of the data.

    Attributes:
        group: grouping factor (``g.1``, ``g.2`` for further terms on one factor, as lme4).
        names: columns of the term.
        sd: (k,). corr: (k, k), NaN where a standard deviation is 0. cov: (k, k).
    """

    group: str
    names: tuple[str, ...]
    sd: np.ndarray
    corr: np.ndarray
    cov: np.ndarray


class VarCorr(Shown, list[VarCorrBlock]):
    """Random-effects covariances, one block per term in the order of theta; prints as lme4's VarCorr.

    `residual` is the residual standard deviation, None for families without one.
    """

    residual: float | None = None

    def to_frame(self) -> pd.DataFrame:
        """lme4's ``as.data.frame(VarCorr(m))``: grp, var1, var2, vcov, sdcor (variances, then covariances)."""
        rows: list[tuple[Any, ...]] = []
        for block in self:
            for i, name in enumerate(block.names):
                rows.append((block.group, name, None, block.cov[i, i], block.sd[i]))
            for i in range(len(block.names)):
                for j in range(i + 1, len(block.names)):
                    rows.append((block.group, block.names[i], block.names[j], block.cov[i, j], block.corr[i, j]))
        if self.residual is not None:
            rows.append(("Residual", None, None, self.residual**2, self.residual))
        return pd.DataFrame(rows, columns=["grp", "var1", "var2", "vcov", "sdcor"])

    def _table(self, variance: bool = True) -> Table:
        """Groups, names, (variances,) standard deviations and correlations."""
        blocks, k = list(self), max((len(b.names) for b in self), default=1)
        names = [(b.group if j == 0 else "", name) for b in blocks for j, name in enumerate(b.names)]
        sds = [s for b in blocks for s in b.sd] + ([] if self.residual is None else [self.residual])
        variances = [v for b in blocks for v in np.diag(b.cov)] + ([] if self.residual is None else [self.residual**2])
        corr = [[f"{r:.2f}".replace("nan", "NaN") for r in row[:j]] for b in blocks for j, row in enumerate(b.corr)]
        if self.residual is not None:
            names, corr = [*names, ("Residual", "")], [*corr, []]
        columns = [Column(" Groups", [f" {group}" for group, _ in names], right=False)]
        columns.append(Column("Name", [name for _, name in names], right=False))
        if variance:
            columns.append(Column("Variance", signif(np.asarray(variances), 4)))
        columns.append(Column("Std.Dev.", signif(np.asarray(sds), 4)))
        for j in range(k - 1):
            columns.append(Column("" if j else "Corr", [row[j] if j < len(row) else "" for row in corr]))
        return Table(columns)

    def _report(self, page: bool) -> Sequence[Block]:
        return [self._table(variance=page)]


def varcorr(model: MixedModel) -> VarCorr:
    """Standard deviations, correlations and covariances of the random effects, one block per term."""
    out, groups = VarCorr(), numbered(labels.group for labels in model._data.terms)
    for T, labels, group in zip(model._T, model._data.terms, groups, strict=True):
        cov = model.sigma**2 * T @ T.T
        sd, corr = cov_to_sdcor(cov)
        out.append(VarCorrBlock(group, labels.names, sd, corr, cov))
    if model.is_linear:
        out.residual = model.sigma
    return out
