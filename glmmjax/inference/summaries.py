"""Principal components of the random effects, intraclass correlation and R2; quantile residuals.

Variances are on the link scale. With s2_f the variance of X beta over the rows, s2_r that of the random effects
and s2_e that of the distribution, ICC = s2_r / (s2_r + s2_e) and R2 = (s2_f [+ s2_r]) / (s2_f + s2_r + s2_e).

Sources: Nakagawa & Schielzeth 2013, Methods Ecol. Evol. 4(2) (R2 of random intercepts); Johnson 2014, Methods
Ecol. Evol. 5(9) (random slopes: the variance averaged over the rows); Nakagawa, Johnson & Schielzeth 2017, J. R.
Soc. Interface 14(134) (distribution variances, ICC); Dunn & Smyth 1996, J. Comput. Graph. Stat. 5(3) (residuals).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._errors import NotSupportedError
from ..algebra.linalg import block_diagonal
from ..formula.syntax import deparse

if TYPE_CHECKING:
    from ..results import MixedModel


def re_pca(model: MixedModel) -> dict[str, pd.DataFrame]:
    """Principal components of the random effects (lme4's rePCA): few of them say that a term is too rich.

    Returns:
        dict: grouping factor -> DataFrame with a row per component: sdev (relative to sigma), proportion
        (of the variance), cumulative; ``attrs["rotation"]`` has the directions.
    """
    out = {}
    for group, indices in model._by_group().items():
        # columns of several terms on one factor are uncorrelated, hence the block-diagonal template
        rotation, sdev, _ = np.linalg.svd(block_diagonal([model._T[i] for i in indices]))
        variance = sdev**2
        share = variance / variance.sum() if variance.sum() > 0.0 else np.full_like(variance, np.nan)
        labels = pd.Index([f"PC{i + 1}" for i in range(sdev.size)], name=group)
        frame = pd.DataFrame({"sdev": sdev, "proportion": share, "cumulative": np.cumsum(share)}, index=labels)
        names = [n for i in indices for n in model._data.terms[i].names]
        frame.attrs["rotation"] = pd.DataFrame(rotation, names, labels)
        out[group] = frame
    return out


@dataclass(frozen=True)
class Variances:
    """Variance components on the link scale: of X beta, of the random effects, and of what is left."""

    fixed: float
    random: float
    residual: float


def variances(model: MixedModel, null: MixedModel | None) -> Variances:
    """The three components; one effect per row is overdispersion and counts as residual."""
    fixed = float(np.var(np.asarray(model._design.X) @ model.beta, ddof=1))
    random, dispersion = _random_variance(model)
    return Variances(fixed, random, _distribution_variance(model, null) + dispersion)


def _random_variance(model: MixedModel) -> tuple[float, float]:
    """Mean over the rows of Var(z'b), of the terms with repeated levels and of the observation-level ones."""
    random = dispersion = 0.0
    for T, labels in zip(model._T, model._data.terms, strict=True):
        own = model.sigma**2 * float(np.square(labels.z @ T).sum(axis=1).mean())
        if len(labels.levels) == model.nobs:
            dispersion += own
        else:
            random += own
    return random, dispersion


def _distribution_variance(model: MixedModel, null: MixedModel | None) -> float:
    def mean() -> float:
        return _marginal_mean(model if null is None else null, refit=null is None)

    value = model.family.latent_variance(mean, model._estimates.phi, model.sigma)
    if value is None:
        raise NotSupportedError(
            f"family {model.family} has no distribution variance on the link scale here; ICC and R2 are for gaussian, "
            "binomial (logit, probit, cloglog), Poisson (log, sqrt) and negative binomial (log) models"
        )
    return value


def _marginal_mean(model: MixedModel, refit: bool) -> float:
    """exp(intercept + half the random variance) of the model without covariates, times the mean exposure."""
    if list(model._data.x_names) != ["(Intercept)"]:
        if not refit:
            raise ValueError(f"null must have an intercept and nothing else, it has {', '.join(model._data.x_names)}")
        formula = model._data.formula
        kept = [formula.random_formula().removeprefix("~"), *map(deparse, formula.offsets)]
        response = np.asarray(model._design.y)
        model = model.update(". ~ 1 + " + " + ".join(kept), subset=model._data.keep)  # the rows of the fit
        if not np.array_equal(model._design.y, response):  # update starts from the data, refit replaced the response
            model = model.refit(response)
    exposure = float(np.exp(model._design.offset).mean())
    return exposure * float(np.exp(model.beta[0] + 0.5 * sum(_random_variance(model))))


def icc(model: MixedModel, null: MixedModel | None = None) -> pd.Series:
    """Intraclass correlation on the link scale: share of the random effects in the variance.

    Random slopes count with the variance that they have on average over the rows; a term with a level per
    row is overdispersion and counts with the distribution. That of the binomial is that of the latent
    response: pi^2/3, 1, pi^2/6 (logit, probit, cloglog), for one trial; that of counts with a log link is
    log(1 + 1/mu [+ 1/theta]), mu = exp(intercept + half the random variance) of the model without covariates.

    Args:
        null: for count models, the fitted model without covariates; None fits it.

    Returns:
        Series: adjusted (of the variance that X beta leaves), unadjusted (of all).

    Raises:
        NotSupportedError: a family or link without such a variance.

    Source: Nakagawa, Johnson & Schielzeth 2017, J. R. Soc. Interface 14(134); Johnson 2014.
    """
    v = variances(model, null)
    with np.errstate(invalid="ignore"):
        adjusted = np.float64(v.random) / (v.random + v.residual)
        unadjusted = np.float64(v.random) / (v.fixed + v.random + v.residual)
    return pd.Series({"adjusted": adjusted, "unadjusted": unadjusted}, name="icc")


def r2(model: MixedModel, null: MixedModel | None = None) -> pd.Series:
    """Nakagawa's R2 on the link scale; arguments and variances as `icc`.

    Returns:
        Series: marginal (share of X beta in the variance), conditional (with the random effects).

    Source: Nakagawa & Schielzeth 2013, Methods Ecol. Evol. 4(2); Johnson 2014, Methods Ecol. Evol. 5(9).
    """
    v = variances(model, null)
    total = np.float64(v.fixed + v.random + v.residual)
    return pd.Series({"marginal": v.fixed / total, "conditional": (v.fixed + v.random) / total}, name="r2")


# ---- residuals -------------------------------------------------------------------------------------
def distribution(model: MixedModel) -> Any:
    """Frozen scipy.stats distribution of the n responses (successes for the binomial) given the modes.

    Raises:
        NotSupportedError: a user's family, which has a density and no distribution function, or weights that
            multiply the log density.
    """
    return model.family.distribution(model._moments[0], np.asarray(model._design.weights), model._estimates.phi)


def quantile_residuals(model: MixedModel, seed: int) -> np.ndarray:
    """(n,) Phi^-1 of a uniform draw between F(y-) and F(y); standard normal where the model holds."""
    y, weights, family = np.asarray(model._design.y), np.asarray(model._design.weights), model.family
    if family.linear:
        return (y - model._moments[0]) * np.sqrt(weights) / model.sigma
    from scipy.special import ndtri

    F = distribution(model)
    if family.trials:
        y, successes = np.rint(weights * y), weights * y
        if (np.abs(y - successes) > 1e-6 * np.maximum(weights, 1.0)).any():
            raise NotSupportedError("the numbers of successes are not integers, so that they have no distribution")
    before = y - 1.0 if family.discrete else y
    draw = np.random.default_rng(seed).random(y.size)
    low, high = F.cdf(before), F.cdf(y)
    # in the upper half from the other end: 1 - F keeps its digits where F rounds to 1
    rest, more = F.sf(y), F.sf(before)
    tiny = np.finfo(float).tiny
    lower = ndtri(np.maximum(low + draw * (high - low), tiny))
    upper = -ndtri(np.maximum(rest + (1.0 - draw) * (more - rest), tiny))
    return np.asarray(np.where(low + draw * (high - low) <= 0.5, lower, upper))


def vif(model: MixedModel) -> pd.DataFrame:
    """Generalised variance-inflation factors of the terms (Fox & Monette 1992): GVIF, df, GVIF^(1/(2 df))."""
    V = model._fixed_covariance("hessian")
    assign = np.asarray(model._data.assign)
    separation = model._estimates.separation
    off = np.zeros(assign.size, bool) if separation is None else separation.columns
    rest = (assign > 0) & ~off
    labels = [t for j, t in enumerate(model._data.term_labels, start=1) if (assign == j).any()]
    if len(labels) < 2:
        raise ValueError("variance inflation needs at least two terms besides the intercept")
    scale = 1.0 / np.sqrt(np.where(off, 1.0, np.diag(V)))
    R = (V * np.outer(scale, scale))[np.ix_(rest, rest)]
    own = assign[rest]
    whole = np.linalg.slogdet(R)[1]
    rows = []
    for j in np.unique(assign[assign > 0]):
        a, b = own == j, own != j
        if (assign[off] == j).any():  # a coefficient that runs off has no variance to be inflated
            rows.append([np.nan, int((assign == j).sum()), np.nan])
            continue
        gvif = np.exp(np.linalg.slogdet(R[np.ix_(a, a)])[1] + np.linalg.slogdet(R[np.ix_(b, b)])[1] - whole)
        rows.append([gvif, int(a.sum()), gvif ** (0.5 / a.sum())])
    return pd.DataFrame(rows, index=labels, columns=["GVIF", "df", "GVIF^(1/(2 df))"])
