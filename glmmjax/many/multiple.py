"""p-values of several tests at once."""

from __future__ import annotations

import numpy as np

ADJUSTMENTS = ("BH", "bonferroni", "holm", "none")


def adjusted(p: np.ndarray, method: str) -> np.ndarray:
    """p-values adjusted for their number, NaN kept.

    "BH" is Benjamini & Hochberg 1995, J. R. Stat. Soc. B 57; "holm" Holm 1979, Scand. J. Stat. 6.
    """
    out = np.full(p.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    m = known.size
    if not m or method == "none":
        out[known] = p[known]
        return out
    if method == "bonferroni":
        out[known] = np.minimum(m * p[known], 1.0)
        return out
    order = known[np.argsort(p[known], kind="stable")]
    rank = np.arange(1, m + 1)
    if method == "BH":
        out[order] = np.minimum.accumulate((p[order] * m / rank)[::-1])[::-1]
    else:
        out[order] = np.maximum.accumulate(p[order] * (m + 1 - rank))
    out[known] = np.minimum(out[known], 1.0)
    return out
