"""Estimates of several imputed data sets pooled by Rubin's rules.

Sources: Rubin 1987, Multiple Imputation for Nonresponse in Surveys, section 3.1; Barnard & Rubin 1999, Biometrika 86
(degrees of freedom); van Buuren 2018, Flexible Imputation of Missing Data, section 2.3 (shares of variance).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._arguments import checked, models
from ..report.table import Block, Shown, of_frame

if TYPE_CHECKING:
    from ..results import MixedModel


@dataclass(frozen=True, repr=False)
class Pooled(Shown):
    """Pooled estimates, as returned by `pool`.

    Attributes:
        m: number of fits. formula: of the first.
        frame: by fixed effect: estimate, std_error, statistic, df, p_value, conf_low, conf_high, "within" and "between"
            variances, "lambda" (share of the variance due to missing data), fmi (fraction of missing information).
        covariance: (p, p) total covariance of the fixed effects.
        random: mean over the fits of standard deviations, correlations and sigma.
    """

    m: int
    formula: str
    frame: pd.DataFrame
    covariance: pd.DataFrame
    random: pd.Series

    def _report(self, page: bool) -> Sequence[Block]:
        title = f"Pooled over {self.m} fits (Rubin's rules)"
        if page:
            return [title, of_frame(self.frame, ".5g")]
        shown = self.frame[["estimate", "std_error", "statistic", "df", "p_value", "fmi"]]
        above = [title, f"Formula: {self.formula}", "Fixed effects:"]
        return [*above, of_frame(shown, ".5g"), "Random effects (means):", of_frame(self.random, ".5g")]


@checked(fits=models)
def pool(fits: Sequence[MixedModel], level: float = 0.95) -> Pooled:
    """Pool fits of one model to several completions of one data set.

    Args:
        fits: at least two, with the same fixed effects and random-effects terms.
        level: of the intervals.

    Returns:
        `Pooled`.

    Raises:
        ValueError: fewer than two fits, or fits of different models.
    """
    from scipy.special import stdtr, stdtrit

    from .profile import standard_focals

    fits = list(fits)
    if len(fits) < 2:
        raise ValueError(f"pooling needs at least two fits, got {len(fits)}")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")
    first = fits[0]
    names = list(first.fixef.index)
    for i, other in enumerate(fits[1:], start=2):
        same = list(other.fixef.index) == names and other.theta_names == first.theta_names
        if not same or other.family != first.family:
            raise ValueError(f"fit {i} is of another model than fit 1 (fixed effects, random effects or family differ)")
    m = len(fits)
    estimates = np.stack([f.beta for f in fits])
    mean = estimates.mean(axis=0)
    within = np.mean([f.vcov().to_numpy() for f in fits], axis=0)
    between = np.atleast_2d(np.cov(estimates, rowvar=False, ddof=1))
    total = within + (1.0 + 1.0 / m) * between
    u, b, t = np.diag(within), np.diag(between), np.diag(total)
    lam = (1.0 + 1.0 / m) * b / t
    with np.errstate(divide="ignore"):
        old = (m - 1) / lam**2
    complete = min(f.df_resid for f in fits) if first.is_linear else np.inf
    if np.isfinite(complete):
        seen = (complete + 1.0) / (complete + 3.0) * complete * (1.0 - lam)
        df = seen / (1.0 + seen / old)  # 1/df = 1/old + 1/seen, old perhaps infinite
    else:
        df = old
    r = (1.0 + 1.0 / m) * b / u
    with np.errstate(invalid="ignore"):
        fmi = np.where(np.isfinite(df), (r + 2.0 / (df + 3.0)) / (1.0 + r), 0.0)
    se = np.sqrt(t)
    statistic = mean / se
    large = np.minimum(df, 1e12)
    half = stdtrit(large, 0.5 + 0.5 * level) * se
    frame = pd.DataFrame(
        {
            "estimate": mean,
            "std_error": se,
            "statistic": statistic,
            "df": df,
            "p_value": 2.0 * stdtr(large, -np.abs(statistic)),
            "conf_low": mean - half,
            "conf_high": mean + half,
            "within": u,
            "between": b,
            "lambda": lam,
            "fmi": fmi,
        },
        index=names,
    )
    labels = [f.name for f in standard_focals(first)]
    k = len(labels) - len(names)
    random = pd.Series(np.mean([_random_part(f, k) for f in fits], axis=0), labels[:k])
    return Pooled(m, first.formula, frame, pd.DataFrame(total, names, names), random)


def _random_part(model: MixedModel, k: int) -> Any:
    from .bootstrap import natural_values

    return natural_values(model)[:k]
