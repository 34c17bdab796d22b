"""Tables of the fixed effects, their intervals, and all estimates as broom has them."""

from __future__ import annotations

from math import erfc, sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._arguments import choice
from .._errors import NotSupportedError

if TYPE_CHECKING:
    from ..results import MixedModel
    from .profile import Profile


def coefficients(model: MixedModel, ddf: str | None = None) -> pd.DataFrame:
    """Table of the fixed effects: estimate, std_error, statistic, and where there are some df and p_value.

    Args:
        ddf: for linear models, "satterthwaite" or "kenward-roger" (of REML fits) denominator degrees of
            freedom; None leaves p-values out, as lme4. Generalised models have normal p-values.
    """
    if model.is_linear and ddf is not None:
        if ddf not in model._tables:
            from .ddf import coefficient_table

            model._tables[ddf] = coefficient_table(model, ddf)
        return model._tables[ddf].copy()
    if ddf is not None:
        raise NotSupportedError("ddf is for linear mixed models; a generalised one has normal p-values")
    statistic = model.zvalues.to_numpy()
    table = {"estimate": model.beta, "std_error": model.bse.to_numpy(), "statistic": statistic}
    if not model.is_linear:
        # erfc is accurate in the tail; NormalDist.cdf cancels, and is 0 beyond |z| = 8.3
        table["p_value"] = np.array([erfc(v / sqrt(2.0)) for v in np.abs(statistic)])
    return pd.DataFrame(table, index=list(model._data.x_names))


def confint(
    model: MixedModel,
    method: str = "wald",
    level: float = 0.95,
    profile: Profile | None = None,
    nsim: int = 1000,
    seed: Any = 0,
    kind: str = "percentile",
    which: str | None = "beta_",
) -> pd.DataFrame:
    """Confidence intervals, columns named as R's (``2.5 %``, ``97.5 %``).

    Args:
        method: "wald" for the fixed effects; "profile" or "boot" (parametric) for standard deviations,
            correlations, sigma and fixed effects, see `profile` and `bootstrap`; "uniroot" solves for the
            profile's ends in one step, without the profile between.
        profile: one made before, used again.
        nsim, seed, kind: of "boot"; kind "percentile", "basic" or "normal".
        which: of "wald": "beta_" for the fixed effects, "theta_" for standard deviations, correlations and
            sigma (symmetric on the log or Fisher's z scale, by the delta method), None for all.
    """
    choice(kind, "kind", ("percentile", "basic", "normal"))
    half_width = NormalDist().inv_cdf(0.5 + 0.5 * level)
    chosen = method.lower()
    if profile is not None and chosen != "profile":
        raise ValueError(f"a profile is used with method='profile', not {method!r}")
    if chosen == "profile":
        made = model.profile(limit=max(half_width, 2.0)) if profile is None else profile
        return made.confint(level)
    if chosen == "uniroot":
        from .profile import traced

        return traced(model, None, half_width, half_width).confint(level)
    if chosen == "boot":
        return model.bootstrap(nsim, seed).confint(level, kind)
    if chosen != "wald":
        raise ValueError(f"confint method {method!r} is not available; use 'wald', 'profile', 'uniroot' or 'boot'")
    if which not in ("beta_", "theta_", None):
        raise ValueError(f"which must be 'beta_', 'theta_' or None, got {which!r}")
    half = half_width * model.bse
    tail = 50.0 * (1.0 - level)
    ends = pd.DataFrame({f"{tail:g} %": model.fixef - half, f"{100.0 - tail:g} %": model.fixef + half})
    if which == "beta_":
        return ends
    random = model.sdcor()
    z = random["transformed"].to_numpy()
    width = half_width * random["transformed_error"].to_numpy()
    back = np.where(random["scale"] == "log", np.exp([z - width, z + width]), np.tanh([z - width, z + width]))
    random_ends = pd.DataFrame(back.T, random.index, ends.columns)
    return random_ends if which == "theta_" else pd.concat([random_ends, ends])


def tidy(model: MixedModel, level: float = 0.95, ddf: str | None = "satterthwaite") -> pd.DataFrame:
    """broom.mixed's tidy table: effect, group, term, estimate, std_error, statistic, p_value, interval.

    Args:
        level: of the intervals, which are normal.
        ddf: of the p-values of a linear model, as `coefficients`; None leaves them out. The default gives those of
            `pvalues`, and is nothing to a generalised model.
    """
    ci = model.confint(level=level).to_numpy()
    table = model.coefficients(None if ddf == "satterthwaite" and not model.is_linear else ddf)
    fixed = pd.DataFrame(
        {
            "effect": "fixed",
            "group": None,
            "term": list(model._data.x_names),
            "estimate": table["estimate"].to_numpy(),
            "std_error": table["std_error"].to_numpy(),
            "statistic": table["statistic"].to_numpy(),
            "p_value": table.get("p_value", pd.Series(np.nan, table.index)).to_numpy(),
            "conf_low": ci[:, 0],
            "conf_high": ci[:, 1],
        }
    )
    if "df" in table:
        fixed.insert(6, "df", table["df"].to_numpy())
    rows = []
    for _, r in model.VarCorr().to_frame().iterrows():
        single = pd.isna(r["var2"])
        first = "Observation" if pd.isna(r["var1"]) else r["var1"]
        name = f"sd__{first}" if single else f"cor__{first}.{r['var2']}"
        rows.append({"effect": "ran_pars", "group": r["grp"], "term": name, "estimate": r["sdcor"]})
    random = pd.DataFrame(rows).reindex(columns=fixed.columns)
    texts = dict.fromkeys(("effect", "group", "term"), object)
    return pd.concat([fixed.astype(texts), random.astype({**fixed.dtypes.to_dict(), **texts})], ignore_index=True)
