"""Residuals and leverages, by row."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array

from .._errors import NotSupportedError
from ..algebra.linalg import factorise
from ..compiling import programs
from ..compiling.entry import entry
from ..families import Family
from ..model.buckets import fill_rows
from ..model.design import Design
from ..model.parameters import Parameters
from ..objective.laplace import working_weights
from ..objective.pirls import Blocked, reduce_fixed, row_sums

if TYPE_CHECKING:
    from ..results import MixedModel


@programs.persistent_jit("family")
def _rows(eta: Array, y: Array, weights: Array, phi: Array, family: Family) -> tuple[Array, ...]:
    mu = family.link.inverse(eta)
    try:
        variance, deviance = family.variance(mu, phi), family.deviance_contribution(y, mu, weights, phi)
    except NotImplementedError:
        variance = deviance = jnp.full_like(mu, jnp.nan)
    return mu, family.link.mu_eta(eta), variance, deviance


@entry
def moments(model: MixedModel) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """mu, dmu/deta, variance function and squared deviance residuals per row."""
    rows = (fill_rows(np.asarray(v)) for v in (model.linear_predictor, model._design.y, model._design.weights))
    out = _rows(*rows, model._estimates.phi, family=model.family)
    mu, slope, variance, deviance = (np.asarray(x)[: model.nobs] for x in out)
    return mu, slope, variance, deviance


def residuals(model: MixedModel, type: str | None = None, scaled: bool = False, seed: int = 0) -> pd.Series:
    """Residuals: "deviance", "pearson", "working", "response" (definitions as R's glm) or "quantile".

    The default is lme4's: "response" for linear models, else "deviance". `scaled` divides by sigma.
    "quantile" are Dunn & Smyth's randomised quantile residuals, standard normal under the model and
    `scaled` already; `seed` is that of their randomness.
    """
    type = type or ("response" if model.is_linear else "deviance")
    if type == "quantile":
        from .summaries import quantile_residuals

        return pd.Series(quantile_residuals(model, seed), index=model._data.row_index, name="quantile_residual")
    mu, slope, variance, deviance = model._moments
    y, weights = np.asarray(model._design.y), np.asarray(model._design.weights)
    response = y - mu
    if type == "deviance":
        _need(model, deviance, "deviance residuals")
        values = np.sign(response) * np.sqrt(np.maximum(deviance, 0.0))
    elif type == "pearson":
        _need(model, variance, "Pearson residuals (it has no variance function)")
        # a mean that rounds to its end has no variance left, and its limit no residual
        values = response * np.sqrt(weights / np.where((response == 0.0) & (variance == 0.0), 1.0, variance))
    elif type == "working":
        values = response / slope
    elif type == "response":
        values = response
    else:
        known = "'deviance', 'pearson', 'working', 'response' or 'quantile'"
        raise ValueError(f"residuals type must be {known}, got {type!r}")
    if scaled:
        values = values / model.sigma
    return pd.Series(values, index=model._data.row_index, name=f"{type}_residual")


def _need(model: MixedModel, values: np.ndarray, what: str) -> None:
    if np.isnan(values).all():
        raise NotSupportedError(f"family {model.family.name} does not provide {what}; use type='response'")


@partial(jax.jit, static_argnames=("family", "hessian"))
def _leverages(params: Parameters, u: Blocked, design: Design, family: Family, hessian: str) -> Array:
    """w_i d(log det of the joint penalised information)/dw_i: the diagonal of the hat matrix."""
    w, T = working_weights(params, u, design, family, hessian)

    def logdet(w: Array) -> Array:
        sums = row_sums(jnp.zeros_like(w), w, design, True)
        factor = factorise(sums.blocks, T, design.plan)
        assert sums.fixed is not None
        information, _, _ = reduce_fixed(sums.fixed, sums.score, factor, T, design)
        return factor.logdet + jnp.linalg.slogdet(information)[1]

    return w * jax.grad(logdet)(w)


@entry
def hatvalues(model: MixedModel) -> pd.Series:
    """Leverages: diagonal of W^1/2 [Z Lambda, X] M^-1 [Z Lambda, X]' W^1/2 with *working* weights W.

    Each lies in [0, 1]; their sum is the effective number of parameters at fixed theta.
    """
    h = _leverages(*model._internal, model.family, model._spec.hessian)
    return pd.Series(np.asarray(h), index=model._data.row_index, name="hat")


def rstandard(model: MixedModel, type: str = "deviance") -> pd.Series:
    """Residuals over sigma sqrt(1 - h), h the leverages (R's rstandard); "deviance" or "pearson"."""
    if type not in ("deviance", "pearson"):
        raise ValueError(f"rstandard type must be 'deviance' or 'pearson', got {type!r}")
    left = np.sqrt(1.0 - np.minimum(model.hatvalues(), 1.0 - 1e-12))
    return (model.residuals(type) / (model.sigma * left)).rename("rstandard")


def rstudent(model: MixedModel) -> pd.Series:
    """Approximate deletion residuals, sign(r) sqrt(d^2 + h p^2 / (1 - h)) / sigma: d deviance, p Pearson residuals.

    Source: Williams 1987, Appl. Stat. 36(2), equation 4 (R's rstudent of a glm; sigma of all rows).
    """
    h = np.minimum(model.hatvalues(), 1.0 - 1e-12)
    d, p = model.residuals("deviance"), model.residuals("pearson")
    return (np.sign(d) * np.sqrt(d**2 + h * p**2 / (1.0 - h)) / model.sigma).rename("rstudent")
