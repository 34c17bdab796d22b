"""Tables of tests of the fixed effects."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ._summary import columns_text, p_text, stars

if TYPE_CHECKING:
    from .results import MixedModel


class AnovaTable(pd.DataFrame):
    """A DataFrame that prints like R's anova tables; `attrs["heading"]` is its first line."""

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame

    def __str__(self) -> str:
        rows = [["", *map(str, self.columns), ""]]
        for name, values in self.iterrows():
            cells = []
            for column, value in values.items():
                if str(column).startswith("Pr("):
                    cells.append(p_text(float(value)))
                elif column == "NumDF":
                    cells.append(f"{float(value):g}")
                else:
                    cells.append("" if np.isnan(value) else f"{float(value):.5g}")
            rows.append([str(name), *cells, stars(float(values.iloc[-1]))])
        lines = [self.attrs.get("heading", "Analysis of Variance Table")]
        lines += columns_text(rows, [False] + [True] * len(self.columns) + [False])
        if any(row[-1] for row in rows[1:]):
            lines += ["---", "Signif. codes:  0 '***' 0.001 '**' 0.01 '*' 0.05 '.' 0.1 ' ' 1"]
        return "\n".join(lines)

    __repr__ = __str__


def anova(model: MixedModel, type: int = 3, ddf: str = "satterthwaite") -> AnovaTable:
    """F tests of the fixed-effects terms of a linear mixed model, as lmerTest's anova.

    Args:
        model: a fit by `glmmjax.lmer`.
        type: 3 (each term on equally weighted marginal means, whatever contrasts the fit used), 2 (each term
            after all that do not contain it), or 1 (in the order of the formula).
        ddf: denominator degrees of freedom: "satterthwaite", or "kenward-roger" for fits by REML.

    Returns:
        DataFrame, one row per term: Sum Sq, Mean Sq, NumDF, DenDF, F value, Pr(>F). It prints like R's.

    Source: Kuznetsova, Brockhoff & Christensen 2017, J. Stat. Softw. 82(13).
    """
    from ._ddf import anova_table

    table = anova_table(model, type, ddf)
    out = AnovaTable(table)
    out.attrs.update(table.attrs)
    return out
