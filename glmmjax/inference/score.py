"""Score tests of many covariates from one fit that has none of them.

With a covariate c added to the fixed effects, the score at the null is c's, s_i = dl/d eta_i the derivative of the
marginal log-likelihood in row i's offset: one vector for all covariates. Its variance is the information about c's
coefficient given the other fixed effects, theta held at its estimate: c'Mc - c'MX (X'MX)^-1 X'Mc with
M = W - WZ Lambda H^-1 Lambda'Z'W, the inverse of the working response's covariance.

Sources: Rao 1948, Proc. Cambridge Phil. Soc. 44; Lin 1997, Biometrika 84 (mixed models); Chen et al. 2016, Am. J. Hum.
Genet. 98 (GMMAT: scans with one null model).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array

from .._errors import DataError
from ..algebra.linalg import eliminate, penalised, segment_sum, solve, weighted_products
from ..compiling.entry import entry
from ..families import Family
from ..many.multiple import ADJUSTMENTS, adjusted
from ..model.design import Design
from ..model.parameters import Parameters
from ..objective.laplace import working_weights
from ..objective.pirls import Blocked
from ..objective.quadrature import marginal

if TYPE_CHECKING:
    from ..results import MixedModel

#: Numbers per chunk of covariates.
CHUNK = 2**21


@partial(jax.jit, static_argnames=("family", "hessian", "nAGQ"))
def _score(params: Parameters, u: Blocked, design: Design, family: Family, hessian: str, nAGQ: int) -> Array:
    """(n,) derivatives of the marginal log-likelihood in the offset."""

    def deviance(offset: Array) -> Array:
        return marginal(params, replace(design, offset=offset), family, u, hessian, nAGQ)[0]

    return -0.5 * jax.grad(deviance)(jnp.asarray(design.offset))


@partial(jax.jit, static_argnames=("family", "hessian"))
def _information(
    C: Array, params: Parameters, u: Blocked, design: Design, family: Family, hessian: str, scale: Array
) -> Array:
    """(c,) information about the coefficient of each covariate (n, c), given the other fixed effects."""
    w, T = working_weights(params, u, design, family, hessian)
    H = penalised(weighted_products(design.z, design.level, design.n_levels, w, design.plan), T, design.plan)
    factor = eliminate(H, design.plan)
    G = jnp.concatenate([jnp.asarray(design.X), C], axis=1)
    p, wG = design.p, w[:, None] * G
    border = []
    for t, z, level, m in zip(T, design.z, design.level, design.n_levels, strict=True):
        sums = [segment_sum(z[:, k, None] * wG, level, m) for k in range(z.shape[1])]
        border.append(jnp.einsum("ij,jmc->mic", t.T, jnp.stack(sums)))
    solved = solve(factor, tuple(border), design.plan)
    cross = design.X.T @ wG
    own = (C * wG[:, p:]).sum(0)
    for b, s in zip(border, solved, strict=True):
        cross = cross - jnp.einsum("mki,mkc->ic", b[..., :p], s)
        own = own - (b[..., p:] * s[..., p:]).sum((0, 1))
    if p:
        half = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(cross[:, :p]), cross[:, p:], lower=True)
        own = own - jnp.square(half).sum(0)
    return own / scale


@entry
def score_test(model: MixedModel, covariates: Any, adjust: str = "BH") -> pd.DataFrame:
    """Score tests of covariates that the model does not have, one at a time, without fitting any of them.

    For scans of many candidates: the null model is fitted once, and each covariate costs a pass over the rows.
    Random effects and dispersions are held at their estimates; to first order the p-values are those of
    likelihood-ratio tests.

    Args:
        covariates: (n, B) array or DataFrame of numbers, rows as the data of the fit (or its rows that were kept).
        adjust: p_adjusted over the covariates: "BH", "holm", "bonferroni" or "none".

    Returns:
        One row per covariate: estimate (of its coefficient after one step), std_error, statistic (z), p_value,
        p_adjusted. NaN where the fixed effects span the covariate.

    Raises:
        DataError: covariates that are not numbers, not finite, or have another number of rows.

    Source: Chen et al. 2016, Am. J. Hum. Genet. 98; see `glmmjax.inference.score`.
    """
    if adjust not in ADJUSTMENTS:
        raise ValueError(f"adjust must be one of {', '.join(map(repr, ADJUSTMENTS))}, got {adjust!r}")
    C, names = _columns(model, covariates)
    design, e, spec = model._design, model._estimates, model._spec
    # the density of a linear model is that at sigma = 1: scores and information in units of sigma^2
    params = Parameters(e.theta, e.beta, e.phi)
    fixed = np.asarray(model.sigma**2)
    n, B = C.shape
    width = max(1, min(CHUNK // max(n, 1), B))
    information = np.empty(B)
    s = np.asarray(_score(params, e.u, design, spec.family, spec.hessian, max(spec.nAGQ, 1))) / fixed
    for a in range(0, B, width):
        part = C[:, a : a + width]
        padded = np.pad(part, ((0, 0), (0, width - part.shape[1])))  # one shape, one program
        found = _information(padded, params, e.u, design, spec.family, spec.hessian, fixed)
        information[a : a + width] = np.asarray(found)[: part.shape[1]]
    U = s @ C
    # a covariate that the fixed effects already span has none left
    size = np.einsum("ij,ij->j", C, C) * float(np.asarray(design.weights).max(initial=1.0)) / fixed
    known = information > 1e-10 * np.maximum(size, np.finfo(float).tiny)
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = np.where(known, U / information, np.nan)
        std_error = np.where(known, 1.0 / np.sqrt(np.abs(information)), np.nan)
    from scipy.special import chdtrc

    statistic = estimate / std_error
    p_value = np.where(known, chdtrc(1.0, statistic**2), np.nan)
    return pd.DataFrame(
        {
            "estimate": estimate,
            "std_error": std_error,
            "statistic": statistic,
            "p_value": p_value,
            "p_adjusted": adjusted(p_value, adjust),
        },
        index=pd.Index(names, name="covariate"),
    )


def _columns(model: MixedModel, covariates: Any) -> tuple[np.ndarray, list[Any]]:
    """(n, B) covariates on the rows of the fit, and their names."""
    if isinstance(covariates, pd.Series):
        covariates = covariates.to_frame()
    covariates = model._data.on_rows(covariates, "covariates", "have")
    names = list(covariates) if isinstance(covariates, pd.DataFrame) else []
    try:
        C = np.asarray(covariates, float)
    except (TypeError, ValueError):
        raise DataError("covariates must be numbers; code factors as columns of 0 and 1") from None
    C = C[:, None] if C.ndim == 1 else C
    if C.ndim != 2:
        raise DataError(f"covariates have {C.ndim} dimensions; give one column for each")
    names = names or list(range(C.shape[1]))
    bad = ~np.isfinite(C).all(axis=0)
    if bad.any():
        raise DataError(
            f"covariate {names[int(np.flatnonzero(bad)[0])]!r} has missing or infinite values; fill them in"
        )
    return np.ascontiguousarray(C), names
